"""The memory of a training step, measured on a CPU, beside what tools/memory.py says. By hand:

    python tests/bench_memory.py            # small models; the cases with an adapter need peft
    python tests/bench_memory.py --real     # only estimates: docs/scaling.md's table

A tensor counts from the operation that makes it until nothing refers to it. The second step is
measured: in it the optimizer has its state. What an operation takes internally is not counted.
bf16 is the CPU's autocast.
"""

import argparse
import json
import sys
import weakref
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402
import transformers  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from model import empty_model  # noqa: E402
from support.adapters import add_adapter  # noqa: E402
from support.console import HelpFormatter  # noqa: E402
from tiny import TOKENS, batch_of, random_posts  # noqa: E402
from tools import memory  # noqa: E402
from train import TrainingStep  # noqa: E402


def read_shapes(text):
    """{shape: {setting of a config: value}} of a table with a column for each shape."""
    names, *rows = map(str.split, text.strip().splitlines())
    columns = zip(*([int(value) for value in values] for _, *values in rows), strict=True)
    settings = [setting for setting, *_ in rows]
    return {
        name: dict(zip(settings, column, strict=True))
        for name, column in zip(names, columns, strict=True)
    }


TEXTS = read_shapes("""
                     wide  long  wordy
hidden_size           256    64     96
num_hidden_layers       2     6      3
num_attention_heads     4     4      4
num_key_value_heads     2     1      2
intermediate_size     704   176    264
vocab_size           2000   500  12000
""")
VISIONS = read_shapes("""
                     wide  long  wordy
hidden_size            96    64     64
depth                   3     4      2
num_heads               4     4      4
intermediate_size     288   192    192
""")
REAL = {size: f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B")}
CASES = [
    dict(),
    dict(passes=1),
    dict(bf16=True),
    dict(share_prompt=False),
    dict(checkpointing=True),
    dict(checkpointing=True, bf16=True),
    dict(freeze_vision=True),
    dict(rank=8, freeze_vision=True),
    dict(rank=8, freeze_vision=True, bf16=True),
    dict(rank=8, freeze_vision=True, checkpointing=True),
]
POSTS, GRID, TEXT, ANSWER = 3, (8, 12), 40, 30


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive: `now`, and at most so far: `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def take(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, id(storage), storage.nbytes())

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.take(leaf)
        return result


def config(name):
    text, vision, tied = TEXTS[name], VISIONS[name], name != "wordy"
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    mrope = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope}
    text = text | {"bos_token_id": None, "eos_token_id": None, "rope_parameters": rope}
    blocks = {
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [vision["depth"] - 1],
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text | {"tie_word_embeddings": tied},
        vision_config=vision | blocks,
        tie_word_embeddings=tied,
        **TOKENS,
    )


# docs/scaling.md's table: model, GPUs, flags.
ROWS = [
    (model, gpus, flags)
    for model in REAL
    for gpus, flags in (
        (1, "--lora 16 --gradient-checkpointing --micro-batch 1"),
        (1, "--lora 16 --micro-batch 1"),
        (1, "--lora 16 --gradient-checkpointing --micro-batch 4"),
        (1, "--lora 16 --micro-batch 4"),
        (1, "--freeze-vision --gradient-checkpointing --micro-batch 4"),
        (1, "--gradient-checkpointing --micro-batch 4"),
        (1, "--micro-batch 4"),
        (8, "--parallel fsdp --micro-batch 4"),
        (8, "--parallel fsdp --gradient-checkpointing --micro-batch 4"),
    )
]


def measured(name, settings):
    """Bytes at the peak of a step, with the settings of a memory.Step; every post reasons."""
    bf16, rank, freeze_vision = settings.bf16, settings.rank, settings.freeze_vision
    checkpointing, mode = settings.checkpointing, "dynamic" if settings.share_prompt else "cot"
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config(name))
    if rank:
        model.to(torch.bfloat16 if bf16 else torch.float32)
        add_adapter(model, rank, "base", not freeze_vision)
    elif freeze_vision:
        model.model.visual.requires_grad_(False)
    model.train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
            {"use_reentrant": False}
        )
    step = TrainingStep(model, mode, float("inf"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    posts = random_posts(
        "qwen2_5_vl", [GRID] * POSTS, text=(TEXT - 4, TEXT - 4), plain=(6, 6), cot=(ANSWER, ANSWER)
    )
    posts[0]["prompt"].pop()  # one post is padded, as one mostly is
    live = Live()
    with live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.take(tensor.detach())
        for _ in range(2):
            live.peak = live.now
            for _ in range(settings.passes):
                batch = batch_of(posts)
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = step(batch)[0]
                loss.sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del loss, batch
    return live.peak


def compare(names, cases):
    for name in names:
        for case in cases:
            shape = (POSTS, GRID[0] * GRID[1] // 4, TEXT - 2, ANSWER)
            step = memory.Step(*shape, **{"bf16": False} | case)
            estimated = memory.step_memory(empty_model(config(name), device="meta"), step)["peak"]
            peaks = {"measured": measured(name, step), "estimated": round(estimated)}
            yield {"shape": name, **case, **peaks}


def real():
    parts = "weights gradients optimizer copies activations logits peak".split()
    print("| " + " | ".join(["model", "GPUs", "flags", *parts, "fits"]) + " |")
    print("|---" * (len(parts) + 4) + "|")
    for name, gpus, flags in ROWS:
        args = memory.parse_args([*flags.split(), "--gpus", str(gpus)])
        needs = memory.estimate(memory.read_model(REAL[name])[0], args, 80)
        fits = [str(card) for card in memory.CARDS if needs["peak"] <= memory.USABLE * card]
        cells = [name, str(gpus), f"`{flags}`", *(f"{needs[part]:.1f}" for part in parts)]
        print("| " + " | ".join([*cells, fits[0] if fits else "–"]) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--real", action="store_true", help="estimate the real shapes")
    add("--shapes", nargs="+", choices=TEXTS, default=[*TEXTS], help="which small models")
    add("--cases", metavar="JSON", type=json.loads, default=CASES, help="the settings to measure")
    args = parser.parse_args()
    if args.real:
        return real()
    for result in compare(args.shapes, args.cases):
        off = round(result["estimated"] / result["measured"] - 1, 3)
        print(json.dumps(result | {"off": off}), flush=True)


if __name__ == "__main__":
    main()
