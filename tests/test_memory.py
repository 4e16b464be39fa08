"""tools/memory.py's estimate against what a step takes, and the sizes of the real models."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import bench_memory
import published
from evaluate import UserError
from model import TokenLoss
from tools import memory
from tools.memory import Step, count_parameters, step_memory

ROOT = Path(__file__).parent.parent
PEFT = importlib.util.find_spec("peft") is not None
MEASURED = {
    "wide": [{}, {"passes": 1}, {"bf16": True}],
    "wordy": [{}, {"checkpointing": True}],
    "long": [
        {},
        {"bf16": True},
        {"checkpointing": True},
        {"freeze_vision": True},
        {"rank": 8, "freeze_vision": True},
        {"rank": 8, "freeze_vision": True, "checkpointing": True},
    ],
}


def test_the_estimate_is_within_a_tenth_of_the_measured_peak():
    """In a process of its own, so that nothing else is counted. An adapter's cases need peft.

    TokenLoss takes fewer logits at once: like a real model, a small one then has many times more.
    """
    code = """
import bench_memory, json, model, sys
model.TokenLoss.AT_ONCE = 2**16
for shape, cases in json.loads(sys.argv[1]).items():
    for result in bench_memory.compare([shape], cases):
        print(json.dumps(result))
"""
    cases = {
        shape: [case for case in cases if PEFT or "rank" not in case]
        for shape, cases in MEASURED.items()
    }
    command = [sys.executable, "-c", code, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == sum(map(len, cases.values()))
    for result in results:
        assert result["estimated"] == pytest.approx(result["measured"], rel=0.1), result


def test_the_losses_hold_one_copy_of_the_logits(monkeypatch):
    """With their gradient; cross_entropy holds three. The layer before them is small."""
    monkeypatch.setattr(TokenLoss, "AT_ONCE", 1000)
    head, hidden = torch.nn.Linear(4, 500, bias=False), torch.randn(200, 4)
    targets = torch.randint(500, (200,))
    cross_entropy = functools.partial(torch.nn.functional.cross_entropy, reduction="sum")
    for token_loss, copies in ((TokenLoss.apply, 1.1), (cross_entropy, 3.1)):
        with bench_memory.Live() as live:
            token_loss(head(hidden), targets).sum().backward()
        assert copies - 0.1 <= live.peak / (4 * 200 * 500) <= copies, token_loss


@functools.cache
def real(name):
    return bench_memory.empty(bench_memory.REAL[name])


def test_the_published_sizes():
    """Counted by hand from the shapes: text layers, vision blocks, and what is around them."""
    for name, billions in (("3B", 3.754622976), ("7B", 8.292166656)):
        size, trained, *_ = count_parameters(real(name))
        assert size == trained == round(billions * 1e9)
    hidden, mlp, kv, rank = 3584, 18944, 512, 16
    adapter = rank * 28 * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + mlp))
    size, trained, *_ = count_parameters(bench_memory.empty(bench_memory.REAL["7B"]), 16, True)
    assert trained == adapter and size == 8292166656 + adapter


QWEN3_5 = bench_memory.read_shapes("""
      hidden layers heads kv   mlp value_heads tied vision blocks vision_mlp       weights
0.8B    1024     24     8  2  3584          16    1    768     12       3072     873438784
2B      2048     24     8  2  6144          16    1   1024     24       4096    2274069824
4B      2560     32    16  4  9216          32    1   1024     24       4096    4659865088
9B      4096     32    16  4 12288          32    0   1152     27       4304    9653104368
""")


def qwen3_5(size):
    """An empty Qwen3.5 of a published size."""
    shape = QWEN3_5[size]
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10]}
    config = transformers.Qwen3_5Config(
        text_config=dict(
            hidden_size=shape["hidden"],
            intermediate_size=shape["mlp"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv"],
            linear_num_value_heads=shape["value_heads"],
            rope_parameters=rope | {"mrope_interleaved": True, "partial_rotary_factor": 0.25},
        ),
        vision_config=dict(
            depth=shape["blocks"],
            hidden_size=shape["vision"],
            intermediate_size=shape["vision_mlp"],
            out_hidden_size=shape["hidden"],
        ),
        tie_word_embeddings=bool(shape["tied"]),
    )
    with torch.device("meta"):
        return transformers.Qwen3_5ForConditionalGeneration(config)


@pytest.mark.parametrize("size", QWEN3_5)
def test_the_published_sizes_of_qwen3_5(size):
    """The hub's counts. They include a layer that predicts a second token, which is not loaded."""
    shape = QWEN3_5[size]
    hidden, head = shape["hidden"], 256
    attention = (3 * shape["heads"] + 2 * shape["kv"]) * head * hidden + 2 * head
    second = 2 * hidden**2 + attention + 3 * hidden * shape["mlp"] + 5 * hidden
    assert count_parameters(qwen3_5(size)).total == shape["weights"] - second


def test_what_each_setting_does_to_the_real_model():
    model = real("7B")

    def bytes_of(**settings):
        lengths = {"posts": 4, "image": 512, "text": 160, "answer": 160}
        return step_memory(model, Step(**lengths | settings))

    plain = bytes_of()
    assert plain["weights"] == plain["gradients"] == plain["optimizer"] / 2 == 4 * 8292166656
    eight = bytes_of(shards=8)
    assert eight["weights"] == plain["weights"] / 8 and eight["optimizer"] == plain["optimizer"] / 8
    lora = bytes_of(rank=16, freeze_vision=True)
    assert lora["weights"] < 1.03 * plain["weights"] / 2
    assert lora["optimizer"] < plain["optimizer"] / 100
    for less in (dict(checkpointing=True), dict(freeze_vision=True), dict(passes=1)):
        assert bytes_of(**less)["peak"] < plain["peak"]
    half = bytes_of(posts=2)
    assert half["activations"] == pytest.approx(plain["activations"] / 2)


def test_the_command(tmp_path, monkeypatch, capsys):
    """From a config alone: there are no weights in the folder."""
    bench_memory.config(**bench_memory.REAL["7B"]).save_pretrained(tmp_path)

    def estimate(*options):
        monkeypatch.setattr(sys, "argv", ["memory.py", *options])
        memory.main()

    estimate("--model", str(tmp_path), "--train", "x")
    shown = capsys.readouterr().out
    assert "8.292 billion parameters, 8.292 billion of them trained" in shown
    assert "141 GiB  does not fit" in shown
    savers = [line for line in shown.splitlines() if " saves " in line]
    assert savers[0].startswith("--lora 16 saves ") and len(savers) >= 4
    estimate("--model", str(tmp_path))  # --train is not needed, and changes nothing
    assert capsys.readouterr().out == shown
    estimate("--model", str(tmp_path), "--train", "x", "--lora", "16", "--gradient-checkpointing")
    assert " 16 GiB  does not fit\n 24 GiB  fits" in capsys.readouterr().out
    with pytest.raises(UserError, match="--model is missing"):
        estimate()
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(UserError, match="name the model that the adapter was made for"):
        estimate("--model", str(tmp_path))


@pytest.mark.parametrize("kind", ["Qwen3.5-4B", "Qwen3.5-35B-A3B"])
def test_the_command_says_what_it_does_not_know_of_qwen3_5(kind, tmp_path, monkeypatch, capsys):
    published.write(tmp_path / kind, kind)
    monkeypatch.setattr(sys, "argv", ["memory.py", "--model", str(tmp_path / kind)])
    memory.main()
    shown = capsys.readouterr().out
    assert "2 of 3 layers keep a recurrent state" in shown and " 16 GiB  fits" in shown


def test_shards_are_estimated_where_auto_would_shard():
    model = real("3B")
    args = memory.parse_args(["--gpus", "8"])
    ddp, fsdp = (memory.estimate(model, args, card) for card in (141, 80))
    assert ddp["weights"] == pytest.approx(8 * fsdp["weights"])
