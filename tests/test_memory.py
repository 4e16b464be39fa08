"""What --estimate says against what a step takes, tensor by tensor; and the real models' sizes."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_memory
import train
from evaluate import UserError
from model import TokenLoss, counted, memory

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
    """In a process of its own, so that nothing else is counted; cases with an adapter only where peft is there.

    The losses are made of fewer logits at once, so that these small models have many times as many, as real ones have.
    """
    code = (
        "import bench_memory, json, model, sys\nmodel.TokenLoss.AT_ONCE = 2**16\nfor shape, cases in json.loads(sys.argv[1]).items():\n"
        "    for result in bench_memory.compare([shape], cases): print(json.dumps(result))"
    )
    cases = {
        shape: [case for case in cases if PEFT or "rank" not in case]
        for shape, cases in MEASURED.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(cases)],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == sum(map(len, cases.values()))
    for result in results:
        assert result["estimated"] == pytest.approx(result["measured"], rel=0.1), result


def test_the_losses_hold_one_copy_of_the_logits(monkeypatch):
    """With their gradient; cross_entropy holds three. The last layer is small beside them, its gradients are counted."""
    monkeypatch.setattr(TokenLoss, "AT_ONCE", 1000)
    head, hidden, targets = (
        torch.nn.Linear(4, 500, bias=False),
        torch.randn(200, 4),
        torch.randint(500, (200,)),
    )
    for token_loss, copies in (
        (TokenLoss.apply, 1.1),
        (functools.partial(torch.nn.functional.cross_entropy, reduction="sum"), 3.1),
    ):
        with bench_memory.Live() as live:
            token_loss(head(hidden), targets).sum().backward()
        assert copies - 0.1 <= live.peak / (4 * 200 * 500) <= copies, token_loss


@functools.cache
def real(name):
    return bench_memory.empty(bench_memory.REAL[name])


def test_the_published_sizes():
    """Counted by hand from the shapes: the text model's layers, the vision tower's blocks, and what is around them."""
    for name, billions in (("3B", 3.754622976), ("7B", 8.292166656)):
        size, trained, *_ = counted(real(name))
        assert size == trained == round(billions * 1e9)
    hidden, mlp, kv, rank = 3584, 18944, 512, 16
    adapter = rank * 28 * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + mlp))
    size, trained, *_ = counted(bench_memory.empty(bench_memory.REAL["7B"]), 16, True)
    assert trained == adapter and size == 8292166656 + adapter


def test_what_each_setting_does_to_the_real_model():
    model = real("7B")
    plain = memory(model, 4, 512, 160, 160)
    assert plain["weights"] == plain["gradients"] == plain["optimizer"] / 2 == 4 * 8292166656
    eight = memory(model, 4, 512, 160, 160, gpus=8, sharded=True)
    assert eight["weights"] == plain["weights"] / 8 and eight["optimizer"] == plain["optimizer"] / 8
    lora = memory(model, 4, 512, 160, 160, rank=16, freeze_vision=True)
    assert (
        lora["weights"] < 1.03 * plain["weights"] / 2
        and lora["optimizer"] < plain["optimizer"] / 100
    )
    for less in (dict(checkpointing=True), dict(freeze_vision=True), dict(passes=1)):
        assert memory(model, 4, 512, 160, 160, **less)["peak"] < plain["peak"]
    assert memory(model, 2, 512, 160, 160)["activations"] == pytest.approx(plain["activations"] / 2)


def test_the_command(tmp_path, monkeypatch, capsys):
    """From a config alone: there are no weights in the folder."""
    bench_memory.config(**bench_memory.REAL["7B"]).save_pretrained(tmp_path)
    estimate = lambda *options: (
        monkeypatch.setattr(sys, "argv", ["train.py", "--estimate", *options]),
        train.main(),
    )
    estimate("--model", str(tmp_path), "--train", "x")
    shown = capsys.readouterr().out
    assert (
        "8.292 billion parameters, 8.292 billion of them trained" in shown
        and "141 GiB  does not fit" in shown
    )
    savers = [line for line in shown.splitlines() if " saves " in line]
    assert savers[0].startswith("--lora 16 saves ") and len(savers) >= 4
    estimate("--model", str(tmp_path), "--train", "x", "--lora", "16", "--gradient-checkpointing")
    assert " 16 GiB  does not fit\n 24 GiB  fits" in capsys.readouterr().out
    with pytest.raises(UserError, match="--model is missing"):
        estimate()
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(UserError, match="name the model that it was made for"):
        estimate("--model", str(tmp_path))


def test_shards_are_estimated_where_auto_would_shard():
    model = real("3B")
    args = train.settings(["--train", "x", "--gpus", "8"])
    ddp, fsdp = (train.needed(model, args, card) for card in (141, 80))
    assert ddp["weights"] == pytest.approx(8 * fsdp["weights"])
