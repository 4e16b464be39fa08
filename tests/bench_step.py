"""What one training step costs. By hand; it takes about four minutes on two CPU cores:

    python tests/bench_step.py

Four ways to do the same optimizer step, timed in turns in one process; the peak memory of each is
measured in a process of its own, and so is that of each mode:

    a  the loop written the obvious way: two full passes, logits at every token
    b  two full passes, logits at answer tokens only
    c  ours: image and prompt read once, probe and target on the same cache
    d  ours with known targets: what plain fine-tuning on the same answers costs

    python tests/bench_step.py --profile                   # where the time of c goes
    python tests/bench_step.py --shape 3b --device cuda    # the real shape, random weights, bf16
    python tests/bench_step.py --shape 3b --layers 2 --rounds 3     # to try that without a GPU
    python tests/bench_step.py --count                     # what a GPU would be asked to do

--count runs a micro-batch of each mode, forward and backward, through narrow models of the depth of
3B and 7B. It counts the operations that PyTorch dispatches, the kernels (all but views), and the
values that are read back, for which a GPU is waited for. Three of these are of the images' sizes,
which stay on the CPU; that `dynamic` reads its choices is not dispatched there, and not counted.

Model FLOPs utilisation is the step's model FLOPs over its time and over the card's dense bf16 peak;
tools/cost.py has their formula. On a machine with other users, CPU time says more than the clock:
set OMP_WAIT_POLICY=passive then, so that threads that wait don't count as busy.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from data import Batch, Targets  # noqa: E402
from support.console import HelpFormatter, fraction, positive_int, progress, read_json  # noqa: E402
from support.vision import pack_images  # noqa: E402
from tiny import literal  # noqa: E402
from tools.cost import PEAKS, Flops, Lengths  # noqa: E402
from tools.memory import SHAPES  # noqa: E402
from train import MODES, TrainingStep  # noqa: E402

# The shape "small" has these instead of 3B's.
SMALL_TEXT = dict(hidden_size=256, intermediate_size=1376, num_hidden_layers=8)
SMALL_TEXT |= dict(num_attention_heads=4, num_key_value_heads=2)
SMALL_TEXT["rope_parameters"] = {"rope_theta": 1e6, "mrope_section": [8, 12, 12]}
SMALL_VISION = dict(
    hidden_size=128, intermediate_size=344, depth=8, num_heads=4, out_hidden_size=256
)
# As narrow as can be: the depth alone decides how many operations there are.
NARROW_TEXT = dict(hidden_size=32, intermediate_size=32, vocab_size=64, num_attention_heads=4)
NARROW_TEXT |= dict(num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
NARROW_TEXT["rope_parameters"] = {"rope_theta": 1e6, "mrope_section": [1, 1, 2]}
NARROW_VISION = dict(hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32)
# Operations that read a value back.
READS = ("_local_scalar_dense", "nonzero", "unique_consecutive", "masked_scatter_backward")
WAYS = {
    "a": "two passes, logits everywhere",
    "b": "two passes, logits at answers",
    "c": "ours",
    "d": "ours, targets known",
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    shapes = ["small", "3b", "7b"]
    add("--shape", choices=shapes, default="small", help="size; 3b and 7b are Qwen2.5-VL's")
    add("--layers", type=positive_int, help="at most this many layers in each tower")
    add("--posts", type=positive_int, default=4, help="posts in the step")
    add("--image", type=positive_int, default=256, help="image tokens a post, a square number")
    add("--prompt", type=positive_int, default=356, help="prompt tokens a post, image included")
    add("--plain", type=positive_int, default=8, help="tokens of the plain answer")
    add("--cot", type=positive_int, default=120, help="tokens of the answer that reasons")
    add("--cot-share", type=fraction, default=1.0, help="share of the posts that reason")
    add("--ways", default="abcd", help="which of the four")
    add("--modes", nargs="*", choices=MODES, default=MODES, help="modes whose memory is measured")
    add("--rounds", type=positive_int, default=7, help="steps of each way, after one to warm up")
    add("--device", default="cpu", help="cpu or cuda; on cuda under bf16 autocast")
    add("--profile", action="store_true", help="only show c's ten slowest operators")
    add("--count", action="store_true", help="only count the operations of each mode")
    add("--json", action="store_true", help="print the counts as JSON")
    add("--memory-of", choices=[*WAYS, *MODES], help=argparse.SUPPRESS)
    if "--count" in sys.argv:
        parser.set_defaults(image=484, prompt=644, cot_share=0.5)
    return parser.parse_args()


def build(shape, layers=None, device="cpu", narrow=False):
    """A model with random weights of at most `layers` layers in each tower."""
    import transformers

    size = "7B" if shape == "7b" else "3B"
    fields = read_json(SHAPES)["models"][f"Qwen/Qwen2.5-VL-{size}-Instruct"]
    if shape == "small":
        fields["text_config"] |= SMALL_TEXT
        fields["vision_config"] |= SMALL_VISION
    if narrow:
        fields["text_config"] |= NARROW_TEXT
        fields["vision_config"] |= NARROW_VISION
    marks = dict(image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8)
    config = transformers.AutoConfig.for_model(**fields, **marks)
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers = min(text.num_hidden_layers, layers or text.num_hidden_layers)
    vision.depth = min(vision.depth, layers or vision.depth)
    vision.fullatt_block_indexes = list(range(7, vision.depth, 8)) or [vision.depth - 1]
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return pack_images(model.train())


def build_with_optimizer(args):
    """(model, optimizer) of a learning rate of 0, so that the weights stay the same."""
    model = build(args.shape, args.layers, args.device)
    return model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def random_batch(args, model):
    """A Batch of posts of equal lengths: image tokens first, then text, then answers."""
    draw = torch.Generator().manual_seed(0)
    side, low = 2 * round(args.image**0.5), 10  # below: the special tokens
    if side * side != 4 * args.image or args.image > args.prompt:
        sys.exit("--image must be a square number, and no more than --prompt")
    high = model.config.text_config.vocab_size
    ids = torch.randint(low, high, (args.posts, args.prompt), generator=draw)
    ids[:, : args.image] = model.config.image_token_id
    mask = torch.ones_like(ids)
    prompt = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        "image_grid_thw": torch.tensor([[1, side, side]] * args.posts),
    }
    prompt["position_ids"] = model.model.get_rope_index(**prompt)[0]
    pixels = args.posts * 4 * args.image, 3 * 2 * 14 * 14
    prompt["pixel_values"] = torch.randn(pixels, generator=draw)

    def targets(length):
        ids = torch.randint(low, high, (args.posts, length), generator=draw)
        return Targets(ids, torch.ones_like(ids))

    names = [str(post) for post in range(args.posts)]
    plain, cot = targets(args.plain), targets(args.cot)
    has_cot = torch.arange(args.posts) < round(args.cot_share * args.posts)
    return Batch(names, prompt, plain, cot, has_cot, truncated=0).to(args.device)


# ------------------------------------------------------------------------------------ the four ways


def full_pass(model, prompt, targets):
    """Per-sample losses (B,) of prompt + targets in one pass with logits at every token."""
    ids = torch.cat([prompt["input_ids"], targets.ids], dim=1)
    inputs = prompt | {
        "position_ids": None,
        "input_ids": ids,
        "attention_mask": torch.cat([prompt["attention_mask"], targets.mask], dim=1),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }
    nothing = torch.full_like(prompt["input_ids"], -100)
    labels = torch.cat([nothing, targets.ids.masked_fill(targets.mask == 0, -100)], dim=1)
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(len(ids), -1).sum(1) / targets.mask.sum(1)


def obvious(model, batch):
    with torch.no_grad():
        plain_loss = full_pass(model, batch.prompt, batch.plain)
    use_cot = (plain_loss < torch.inf) & batch.has_cot
    return full_pass(model, batch.prompt, batch.cot.where(use_cot, batch.plain))


def make_step(way, model, optimizer, batch):
    """A function that does one optimizer step and returns the per-sample losses before it."""
    known = replace(batch, plain=batch.cot.where(batch.has_cot, batch.plain))
    steps = {mode: TrainingStep(model, mode, torch.inf) for mode in MODES}
    losses_of = {mode: lambda m=mode: steps[m](batch)[0] for mode in MODES}
    losses_of |= {
        "a": lambda: obvious(model, batch),
        "b": lambda: steps["dynamic"](batch)[0],  # within `literal`
        "c": lambda: steps["dynamic"](batch)[0],
        "d": lambda: steps["sft"](known)[0],
    }

    def step():
        device = batch.has_cot.device.type
        passes = literal() if way == "b" else nullcontext()
        with passes, torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses = losses_of[way]()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return losses.detach()

    return step


# -------------------------------------------------------------------------------------- the figures


def model_flops(model, batch):
    """{"c": …, "d": …}: model FLOPs of one step, by the formula of tools/cost.py."""
    merge = model.config.vision_config.spatial_merge_size**2
    image = int(batch.prompt["image_grid_thw"][0].prod()) // merge
    text = batch.prompt["input_ids"].shape[1] - image
    lengths = Lengths(text, image, batch.plain.ids.shape[1], batch.cot.ids.shape[1])
    flops, samples, reasoning = Flops(model), len(batch), int(batch.has_cot.sum())
    known = reasoning * flops.training(lengths, "cot")
    known += (samples - reasoning) * flops.training(lengths, "sft")
    ours = samples * flops.training(lengths, "dynamic", reasoning / samples)
    return {"c": ours, "d": known}


class Counter(TorchDispatchMode):
    """Counts operations, kernels and reads in its block."""

    def __init__(self):
        super().__init__()
        self.counts = dict.fromkeys(("operations", "kernels", "reads"), 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts["operations"] += 1
        self.counts["kernels"] += not function.is_view
        self.counts["reads"] += function.name().removeprefix("aten::") in READS
        return function(*args, **(kwargs or {}))


def count(args, shape):
    """{mode: {"operations": n, "kernels": n, "reads": n}} of a narrow model of a shape's depth."""
    model = build(shape, args.layers, narrow=True)
    batch, counts = random_batch(args, model), {}
    for parameter in model.parameters():  # gradients are added up, as in all but the first
        parameter.grad = torch.zeros_like(parameter)
    for mode in MODES:
        with Counter() as counter:
            TrainingStep(model, mode, torch.inf)(batch)[0].sum().backward()
        counts[mode] = counter.counts
    return counts


def print_counts(args):
    counts = {shape: count(args, shape) for shape in ("3b", "7b")}
    if args.json:
        return print(json.dumps(counts))
    print("| | operations | kernels | reads |\n|---|---|---|---|")
    for shape, modes in counts.items():
        for mode, numbers in modes.items():
            print(f"| {shape}, {mode} | {' | '.join(map(str, numbers.values()))} |")


def peak_memory(way):
    """Peak memory in GB of a process that does two steps of a way or mode."""
    arguments = [sys.executable, *sys.argv, "--memory-of", way]
    # Blocks that are freed go back to the system at once, else the peak varies by a tenth.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{way}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout)


def print_memory(args):
    model, optimizer = build_with_optimizer(args)
    step = make_step(args.memory_of, model, optimizer, random_batch(args, model))
    for _ in range(2):
        step()
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e9)
    else:
        import resource

        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def print_profile(step, device):
    step()
    with torch.profiler.profile() as profiled:  # of the CPU, and of a GPU where there is one
        step()
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=spent, row_limit=10, max_name_column_width=60))


def time_in_turns(steps, rounds, device):
    """(seconds, CPU seconds): {way: one step's for each round}; each round begins another way."""
    losses = [step() for step in steps.values()]
    for loss in losses[1:]:  # all ways do the same work; bfloat16 rounds each one's sums otherwise
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=1e-3 if device == "cpu" else 0.1)
    seconds, busy = ({way: [] for way in steps} for _ in range(2))
    ways = "".join(steps)
    turns = [ways[number % len(ways) :] + ways[: number % len(ways)] for number in range(rounds)]
    for way in progress("".join(turns), rounds * len(ways), "timing", "step"):
        start, start_busy = time.perf_counter(), time.process_time()
        steps[way]()
        seconds[way].append(time.perf_counter() - start)
        busy[way].append(time.process_time() - start_busy)
    return seconds, busy


def print_table(seconds, busy, memory, tokens, flops, peak):
    titles = "ms a step, median (range) | CPU s a step | tokens/s | utilisation | peak memory, GB"
    print(f"\n| | {titles} |\n" + "|---" * 6 + "|")
    for way, times in seconds.items():
        median = statistics.median(times)
        ms = f"{1e3 * median:.0f} ({1e3 * min(times):.0f}–{1e3 * max(times):.0f})"
        cpu, speed = f"{statistics.median(busy[way]):.2f}", f"{tokens / median:.0f}"
        used = f"{flops[way] / median / peak:.1%}" if peak and way in flops else ""
        print(f"| {way}: {WAYS[way]} | {ms} | {cpu} | {speed} | {used} | {memory[way]:.2f} |")
    print(f"\nmodel FLOPs of one step: c {flops['c']:.3g}, d {flops['d']:.3g}")

    def ratio(of, one, other):
        return statistics.median(x / y for x, y in zip(of[one], of[other], strict=True))

    for one, other in (("a", "c"), ("b", "c"), ("c", "d")):
        if one in seconds and other in seconds:
            print(
                f"{one} / {other}: time {ratio(seconds, one, other):.2f} (median over the rounds), "
                f"CPU time {ratio(busy, one, other):.2f}, memory {memory[one] / memory[other]:.2f}"
            )


def main():
    args = parse_args()
    torch.set_float32_matmul_precision("high")
    if args.count:
        return print_counts(args)
    if args.memory_of:
        return print_memory(args)
    # Before anything is made here: on Linux, a process's peak begins with its parent's.
    ways = [] if args.profile else [*args.ways, *args.modes]
    memory = {way: peak_memory(way) for way in progress(ways, len(ways), "memory", "process")}
    model, optimizer = build_with_optimizer(args)
    batch = random_batch(args, model)
    if args.profile:
        return print_profile(make_step("c", model, optimizer, batch), args.device)
    name = f"CPU, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    weights = sum(weight.numel() for weight in model.parameters())
    print(
        f"{args.shape}, {weights / 1e6:.0f} million weights in float32, {name}; "
        f"{args.posts} posts of {args.prompt} prompt tokens ({args.image} image), answers of "
        f"{args.plain} and {args.cot}, {args.cot_share:.0%} reason; {args.rounds} rounds",
        flush=True,
    )
    flops = model_flops(model, batch)
    steps = {way: make_step(way, model, optimizer, batch) for way in args.ways}
    seconds, busy = time_in_turns(steps, args.rounds, args.device)
    tokens = batch.prompt["input_ids"].numel() + int(
        batch.cot.where(batch.has_cot, batch.plain).mask.sum()
    )
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    print_table(seconds, busy, memory, tokens, flops, peak)
    if args.modes:
        print(f"\n| mode | {' | '.join(args.modes)} |\n|---" + "|---" * len(args.modes) + "|")
        print(f"| peak memory, GB | {' | '.join(f'{memory[m]:.2f}' for m in args.modes)} |")


if __name__ == "__main__":
    main()
