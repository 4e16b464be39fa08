"""The memory of a training step, measured on a CPU, beside what tools/memory.py says. By hand:

    python tests/bench_memory.py        # the cases with an adapter need peft

A tensor counts from the operation that makes it until nothing refers to it. The second step is
measured: in it the optimizer has its state. What an operation takes internally is not counted.
bf16 (--device cuda) is the CPU's autocast.
"""

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
from tiny import TOKENS, batch_of, random_posts  # noqa: E402
from tools import memory  # noqa: E402
from train import TrainingStep, freeze  # noqa: E402

TEXT_SIZES = """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size
    vocab_size
""".split()
VISION_SIZES = "hidden_size depth num_heads intermediate_size".split()
SHAPES = {
    "wide": ((256, 2, 4, 2, 704, 2000), (96, 3, 4, 288)),
    "long": ((64, 6, 4, 1, 176, 500), (64, 4, 4, 192)),
    "wordy": ((96, 3, 4, 2, 264, 12000), (64, 2, 4, 192)),
}
CASES = [  # settings of train.py
    "",
    "--batch-size 3",
    "--device cuda",
    "--mode cot",
    "--gradient-checkpointing",
    "--gradient-checkpointing --device cuda",
    "--freeze-vision",
    "--lora 8",
    "--lora 8 --device cuda",
    "--lora 8 --gradient-checkpointing",
]
POSTS, GRID, TEXT, ANSWER = 3, (8, 12), 40, 30
SIZES = f"--micro-batch {POSTS} --batch-size {2 * POSTS} --lengths {TEXT - 2} {ANSWER}"
SIZES += f" --max-pixels {GRID[0] * GRID[1] * 14**2} --device cpu --model base"


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
    text = dict(zip(TEXT_SIZES, SHAPES[name][0], strict=True))
    vision = dict(zip(VISION_SIZES, SHAPES[name][1], strict=True))
    tied = name != "wordy"
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


def measured(name, args):
    """Bytes at the peak of a step with train.py's settings; every post reasons."""
    bf16 = args.device != "cpu"
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config(name))
    if args.lora and bf16:
        model.to(torch.bfloat16)
    freeze(model, args)
    model.train()
    if args.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
            {"use_reentrant": False}
        )
    step = TrainingStep(model, args.mode, float("inf"))
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
            for _ in range(args.batch_size // POSTS):
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
        model = empty_model(config(name), device="meta")
        for case in cases:
            args = memory.parse_args([*SIZES.split(), *case.split()])
            estimated = round(memory.estimate(model, args, 80)["peak"] * 2**30)
            peaks = {"measured": measured(name, args), "estimated": estimated}
            yield {"shape": name, "case": case, **peaks}


def main():
    for result in compare(SHAPES, CASES):
        off = round(result["estimated"] / result["measured"] - 1, 3)
        print(json.dumps(result | {"off": off}), flush=True)


if __name__ == "__main__":
    main()
