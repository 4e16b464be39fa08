"""What one training step costs, by hand: python tests/bench_step.py  (about four minutes on two CPU cores)

Four ways to do the same optimizer step, timed in turns in one process, each one's peak memory in a process of its own:

    a  the loop written the obvious way: two full passes, logits at every token
    b  two full passes, logits at answer tokens only
    c  ours: image and prompt read once, probe and target laid upon them
    d  ours with the targets known beforehand: what plain fine-tuning on the same answers costs

    python tests/bench_step.py --profile                        # where the time of c goes
    python tests/bench_step.py --shape 3b --device cuda         # random weights of the real shape, bf16 autocast
    python tests/bench_step.py --shape 3b --device cpu --layers 2 --rounds 3     # to try that without a GPU

Model FLOPs utilisation is the step's model FLOPs over time and over the card's dense bf16 peak. Model FLOPs are those
of the matrix products that the method asks for, whatever is computed besides (padding, recomputation):

    2 x weights x tokens  for every linear layer, + 4 x width x tokens x tokens seen  for attention (half where causal)

once for a forward pass and twice more for a backward pass (once for the patches' layer: pixels need no gradient);
image, prompt and target have both, the probe has no backward pass. The embedding is a look-up and costs nothing; the
head works at answer tokens only. On a machine that others use too, the CPU time tells more than the clock: set
OMP_WAIT_POLICY=passive then, so that threads that wait for one another are not counted as busy.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Answers, Batch, HelpFormatter, count, fraction, progress  # noqa: E402
from model import DynamicCoT, quiet  # noqa: E402

SHAPES = {  # vocabulary, tied; hidden, layers, heads, kv heads, mlp; vision hidden, depth, heads, mlp
    "small": (151936, True, 256, 8, 4, 2, 1376, 128, 8, 4, 344),
    "3b": (151936, True, 2048, 36, 16, 2, 11008, 1280, 32, 16, 3420),
    "7b": (152064, False, 3584, 28, 28, 4, 18944, 1280, 32, 16, 3420),
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by a part of the card's name
WAYS = {
    "a": "two passes, logits everywhere",
    "b": "two passes, logits at answers",
    "c": "ours",
    "d": "ours, targets known",
}


def settings():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add(
        "--shape",
        choices=SHAPES,
        default="small",
        help="the model's size; 3b and 7b are Qwen2.5-VL's",
    )
    add("--layers", type=count, help="at most this many layers in each tower")
    add("--vocabulary", type=count, help="another size of the vocabulary")
    add("--posts", type=count, default=4, help="posts in the step")
    add("--image", type=count, default=256, help="image tokens a post, a square number")
    add("--prompt", type=count, default=356, help="prompt tokens a post, image included")
    add("--plain", type=count, default=8, help="tokens of the plain answer")
    add("--cot", type=count, default=120, help="tokens of the answer that reasons")
    add("--cot-share", type=fraction, default=1.0, help="share of the posts that reason")
    add("--ways", default="abcd", help="which of the four")
    add("--rounds", type=count, default=7, help="steps of each way, after one to warm up")
    add("--threads", type=count, default=2, help="torch's threads on a CPU")
    add("--device", default="cpu", help="cpu or cuda; on cuda under bf16 autocast")
    add(
        "--weights",
        choices=["float32", "bfloat16"],
        default="float32",
        help="bfloat16 for what would not fit: weights, gradients and AdamW's state then take half the memory",
    )
    add(
        "--profile",
        action="store_true",
        help="only show the ten operators that c spends most time in",
    )
    add("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(args):
    """(model, optimizer) with random weights; at a learning rate of 0 every way's steps see the same ones."""
    import transformers

    quiet()
    vocabulary, tied, hidden, layers, heads, kv_heads, mlp, v_hidden, v_depth, v_heads, v_mlp = (
        SHAPES[args.shape]
    )
    layers, v_depth = min(layers, args.layers or layers), min(v_depth, args.layers or v_depth)
    half = hidden // heads // 2
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=args.vocabulary or vocabulary,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-6,
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
            },
        ),
        vision_config=dict(
            depth=v_depth,
            hidden_size=v_hidden,
            num_heads=v_heads,
            intermediate_size=v_mlp,
            out_hidden_size=hidden,
            fullatt_block_indexes=[block for block in range(v_depth) if block % 8 == 7]
            or [v_depth - 1],
        ),
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, args.weights)
        ).train()
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
        "pixel_values": torch.randn(args.posts * 4 * args.image, 3 * 2 * 14 * 14, generator=draw),
        "image_grid_thw": torch.tensor([[1, side, side]] * args.posts),
    }

    def answers(length):
        return Answers(
            torch.randint(low, high, (args.posts, length), generator=draw),
            torch.ones(args.posts, length, dtype=torch.long),
        )

    has_cot = torch.arange(args.posts) < round(args.cot_share * args.posts)
    return Batch(
        [str(post) for post in range(args.posts)],
        prompt,
        answers(args.plain),
        answers(args.cot),
        has_cot,
        0,
    ).to(args.device)


# ------------------------------------------------------------------------------------------------ the four ways


def full_pass(model, prompt, answers):
    """Per-sample losses (B,) of prompt + answers in one pass with logits at every token."""
    ids = torch.cat([prompt["input_ids"], answers.ids], dim=1)
    inputs = prompt | {
        "input_ids": ids,
        "attention_mask": torch.cat([prompt["attention_mask"], answers.mask], dim=1),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }
    labels = torch.cat(
        [
            torch.full_like(prompt["input_ids"], -100),
            answers.ids.masked_fill(answers.mask == 0, -100),
        ],
        dim=1,
    )
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(len(ids), -1).sum(1) / answers.mask.sum(1)


def obvious(model, batch):
    with torch.no_grad():
        plain_loss = full_pass(model, batch.prompt, batch.plain)
    reasons = (plain_loss < torch.inf) & batch.has_cot
    return full_pass(model, batch.prompt, batch.cot.where(reasons, batch.plain))


def make_step(way, model, optimizer, batch):
    """A function that does one optimizer step and returns the per-sample losses before it."""
    known = Batch(
        batch.ids, batch.prompt, batch.cot.where(batch.has_cot, batch.plain), None, batch.has_cot, 0
    )
    losses_of = {
        "a": lambda: obvious(model, batch),
        "b": lambda: DynamicCoT(model, "dynamic", torch.inf, share_prompt=False)(batch)[0],
        "c": lambda: DynamicCoT(model, "dynamic", torch.inf)(batch)[0],
        "d": lambda: DynamicCoT(model, "sft")(known)[0],
    }[way]

    def step():
        device = batch.has_cot.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses = losses_of()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return losses.detach()

    return step


# ------------------------------------------------------------------------------------------------- the figures


def model_flops(model, batch):
    """Model FLOPs of one step of c and d, by the formula at the top of this file: {"c": …, "d": …}."""
    text, vision = model.config.text_config, model.config.vision_config
    products = (torch.nn.Linear, torch.nn.Conv3d)
    linear = lambda module: sum(
        m.weight.numel() for m in module.modules() if isinstance(m, products)
    )
    tower, merger = model.model.visual, linear(model.model.visual.merger)
    head = text.hidden_size * text.vocab_size

    def words(before, new):
        """Text layers of one sample: `new` tokens upon `before` ones; causal among themselves."""
        attention = 4 * text.hidden_size * text.num_hidden_layers * new * (before + new / 2)
        return 2 * linear(model.model.language_model) * new + attention

    patches = int(batch.prompt["image_grid_thw"][0].prod())
    in_window = min(patches, (vision.window_size // vision.patch_size) ** 2)
    full = len(vision.fullatt_block_indexes)
    seen = full * patches + (vision.depth - full) * in_window
    image = (
        2 * (linear(tower) - merger) + 4 * vision.hidden_size * seen
    ) * patches + 2 * merger * patches / 4
    prompt = batch.prompt["input_ids"].shape[1]
    answer = lambda length: words(prompt, length - 1) + 2 * head * length
    plain, cot = batch.plain.ids.shape[1], batch.cot.ids.shape[1]
    samples, reasoning = len(batch), int(batch.has_cot.sum())
    targets = reasoning * answer(cot) + (samples - reasoning) * answer(plain)
    known = (
        3 * (samples * (image + words(0, prompt)) + targets)
        - samples * 2 * linear(tower.patch_embed) * patches
    )
    return {"c": known + samples * answer(plain), "d": known}


def peak_memory(way):
    """Peak memory in GB of a process that does two steps of one way."""
    arguments = [sys.executable, *sys.argv, "--memory-of", way]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{way}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout)


def print_memory(args):
    model, optimizer = build(args)
    step = make_step(args.memory_of, model, optimizer, random_batch(args, model))
    for _ in range(2):
        step()
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e9)
    else:
        import resource

        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def print_profile(step, device):
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    ) as profiled:
        step()
    spent = lambda event: (
        event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    )
    operators = [
        event
        for event in profiled.key_averages()
        if event.device_type == torch.autograd.DeviceType.CPU
    ]
    events = sorted(
        operators, key=spent, reverse=True
    )  # a kernel's time is that of the operator that started it
    total = sum(map(spent, events))
    print(
        f"one step of c: {total / 1e3:.0f} ms\n\n| operator | calls | ms | share |\n|---|---|---|---|"
    )
    for event in events[:10]:
        print(
            f"| {event.key[:60]} | {event.count} | {spent(event) / 1e3:.1f} | {spent(event) / total:.1%} |"
        )


def time_in_turns(steps, rounds, device):
    """(seconds, CPU seconds) by way, a list of one step a round each; every round begins with another way."""
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
    print(
        "\n| | ms a step, median (range) | CPU s a step | tokens/s | utilisation | peak memory, GB |"
    )
    print("|---" * 6 + "|")
    for way, times in seconds.items():
        median = statistics.median(times)
        used = f"{flops[way] / median / peak:.1%}" if peak and way in flops else ""
        print(
            f"| {way}: {WAYS[way]} | {1e3 * median:.0f} ({1e3 * min(times):.0f}–{1e3 * max(times):.0f}) | "
            f"{statistics.median(busy[way]):.2f} | {tokens / median:.0f} | {used} | {memory[way]:.2f} |"
        )
    print(f"\nmodel FLOPs of one step: c {flops['c']:.3g}, d {flops['d']:.3g}")
    ratio = lambda of, one, other: statistics.median(x / y for x, y in zip(of[one], of[other]))
    for one, other in (("a", "c"), ("b", "c"), ("c", "d")):
        if one in seconds and other in seconds:
            print(
                f"{one} / {other}: time {ratio(seconds, one, other):.2f} (median over the rounds), "
                f"CPU time {ratio(busy, one, other):.2f}, memory {memory[one] / memory[other]:.2f}"
            )


def main():
    args = settings()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    if args.memory_of:
        return print_memory(args)
    # Before anything is made here: on Linux a process's peak begins with that of the one that started it.
    ways = "" if args.profile else args.ways
    memory = {way: peak_memory(way) for way in progress(ways, len(ways), "memory", "process")}
    model, optimizer = build(args)
    batch = random_batch(args, model)
    if args.profile:
        return print_profile(make_step("c", model, optimizer, batch), args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    weights = sum(weight.numel() for weight in model.parameters())
    print(
        f"{args.shape}, {weights / 1e6:.0f} million weights in {args.weights}, {name}; {args.posts} posts "
        f"of {args.prompt} prompt tokens ({args.image} image), answers of {args.plain} and {args.cot}, "
        f"{args.cot_share:.0%} reason; {args.rounds} rounds",
        flush=True,
    )
    flops = model_flops(model, batch)
    seconds, busy = time_in_turns(
        {way: make_step(way, model, optimizer, batch) for way in args.ways},
        args.rounds,
        args.device,
    )
    tokens = batch.prompt["input_ids"].numel() + int(
        batch.cot.where(batch.has_cot, batch.plain).mask.sum()
    )
    peak = next((flops_a_second for part, flops_a_second in PEAKS.items() if part in name), None)
    print_table(seconds, busy, memory, tokens, flops, peak)


if __name__ == "__main__":
    main()
