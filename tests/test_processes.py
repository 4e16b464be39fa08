"""Several processes train one model: real ones, started by torchrun, against a single one.

Run as a script, this file is what torchrun starts.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import checkpoint
import train
from model import FAMILIES, DynamicCoT
from tiny import batch_of, random_posts, tiny_model, train_alone

ROOT = Path(__file__).parent.parent
SHORT = (
    "sft",
    "cot",
    "multitask",
    "dynamic",
)  # two steps of each mode; and twenty of dynamic, with validation


def arguments(posts, out, mode="dynamic", *options):
    """Settings of a run over 59 posts for two epochs, six a step, or 14 for one, nine a step; an epoch's last step has 5."""
    world, long = Path(posts).parent, Path(posts).name == "long.jsonl"
    length = (
        ["--epochs", "2", "--batch-size", "6", "--valid", str(world / "valid.jsonl")]
        if long
        else ["--epochs", "1", "--batch-size", "9"]
    )
    return [
        "--train",
        str(posts),
        "--model",
        str(world / "small"),
        "--out",
        str(out),
        "--mode",
        mode,
        *length,
        "--micro-batch",
        "1000",
        "--lr",
        "2e-3",
        "--gamma",
        "5",
        "--seed",
        "3",
        "--workers",
        "0",
        "--max-new-tokens",
        "4",
        *options,
    ]


@pytest.fixture(scope="module")
def posts(world):
    """Posts with and without images, and a model of few layers: gloo takes its time for each."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    records = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    for record in records[::3]:
        record["image"] = None
    for name, count in (("long", 59), ("short", 14)):
        (world / f"{name}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records[:count])
        )
    config = AutoConfig.from_pretrained(world / "toy")
    config.text_config.num_hidden_layers, config.vision_config.depth = 2, 1
    config.text_config.layer_types, config.vision_config.fullatt_block_indexes = (
        config.text_config.layer_types[:2],
        [0],
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(world / "small")
    checkpoint.copy_side_files(world / "toy", world / "small")
    config.save_pretrained(world / "small")
    return world / "long.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(run):
    return [line for line in lines(run / "log.jsonl") if "loss" in line]


def weights(run):
    return load_file(checkpoint.pointed_at(run / "last") / "model.safetensors")


def launch(count, *arguments, script=__file__, **options):
    """A command line for torchrun, and what the process it starts needs around it."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(count),
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        str(script),
        *map(str, arguments),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def finished(process, code=0, limit=600):
    output, _ = process.communicate(timeout=limit)
    assert process.returncode == code, output[-3000:]
    return output


@pytest.fixture(scope="module")
def alone(posts, tmp_path_factory):
    """The runs of a single process, with all posts of a step in one micro-batch."""
    out = tmp_path_factory.mktemp("alone")
    train_alone(*arguments(posts, out / "long"))
    for mode in SHORT:
        train_alone(*arguments(posts.with_name("short.jsonl"), out / mode, mode))
    return out


@pytest.mark.parametrize("count, engine", [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_processes_give_a_single_ones_losses_and_choices(posts, alone, tmp_path, count, engine):
    finished(launch(count, "runs", engine, posts, tmp_path))
    for run in sorted(tmp_path.iterdir()):
        single = alone / run.name.partition("-")[0]
        expected = steps(single)
        assert len(expected) == len(steps(run)) == (20 if single.name == "long" else 2)
        for ours, theirs in zip(steps(run), expected):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert [ours[key] for key in ("cot_share", "samples", "tokens")] == [
                theirs[key] for key in ("cot_share", "samples", "tokens")
            ]
        saved, right = weights(run), weights(single)
        assert {name: tensor.shape for name, tensor in saved.items()} == {
            n: t.shape for n, t in right.items()
        }
        start = load_file(posts.parent / "small" / "model.safetensors")
        for name, weight in right.items():
            assert (saved[name] - weight).norm() <= 0.02 * (weight - start[name]).norm(), name
    assert len(list(tmp_path.iterdir())) == 1 + 2 * len(SHORT)
    evaluations = [
        line["valid"] for line in lines(tmp_path / "long-3" / "log.jsonl") if "valid" in line
    ]
    assert [scores["posts"] for scores in evaluations] == [8] * 2
    assert any(0 < line["cot_share"] < 1 for line in steps(alone / "long"))


def test_a_checkpoint_goes_on_with_another_number_of_processes(posts, alone, tmp_path):
    """Two sharded processes, then one, then four: together the run that was never stopped."""
    out, script = tmp_path / "run", ROOT / "train.py"
    first = arguments(posts, out, "dynamic", "--save-every", "3")
    output = finished(
        launch(2, "until", 7, "fsdp", *first), 1
    )  # torchrun's code for a process that left with 143
    assert output.count("stopped after step 7 of 20") == 1 and 'train.py", line' not in output
    assert (out / "last").read_text() == "step-7\n"
    # A signal during the first step that this process takes: it ends, is saved, and the next goes on from there.
    code = (
        "import train, checkpoint; checkpoint.Stop.__enter__ = lambda self: (setattr(self, 'asked', 15), self)[1]\n"
        "checkpoint.Stop.__exit__ = lambda *_: None\nfrom evaluate import run; run(train.main)"
    )
    alone_again = subprocess.run(
        [sys.executable, "-c", code, *first, "--resume"], cwd=ROOT, capture_output=True, text=True
    )
    assert alone_again.returncode == 143 and "stopped after step 8 of 20" in alone_again.stderr, (
        alone_again.stderr
    )
    finished(launch(4, *first, "--parallel", "fsdp", "--resume", script=script))
    for ours, theirs in zip(steps(out), steps(alone / "long"), strict=True):
        assert (
            ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
            and ours["cot_share"] == theirs["cot_share"]
        )


def test_a_process_that_is_killed_ends_the_others(posts, tmp_path):
    started = time.monotonic()
    process = launch(2, "killed", 3, "ddp", *arguments(posts, tmp_path / "run"))
    output = finished(process, 1, limit=120)
    assert "Signal 9 (SIGKILL)" in output and time.monotonic() - started < 100
    assert len(steps(tmp_path / "run")) == 3


def test_a_mistake_is_told_once(posts, tmp_path):
    process = launch(
        2, *arguments(posts.with_name("none.jsonl"), tmp_path / "run"), script=ROOT / "train.py"
    )
    output = finished(process, 1)
    assert output.count("error:") == 1 and "none.jsonl: no such file" in output
    assert 'train.py", line' not in output


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_at_nothing_changes_nothing(family):
    """What a batch without images, or of no posts, does to a model that must run all its layers."""
    model, posts = tiny_model(family), random_posts(family, [None, None, None])
    for share_prompt in (True, False):
        plain, looking = (
            DynamicCoT(model, "dynamic", 4.0, share_prompt, always_look=look)
            for look in (False, True)
        )
        gradients = []
        for step in (plain, looking):
            step.zero_grad()
            loss = step(batch_of(posts))[0]
            loss.mean().backward()
            gradients.append((loss, {name: p.grad for name, p in step.named_parameters()}))
        assert torch.equal(gradients[0][0], gradients[1][0])
        for name, gradient in gradients[1][1].items():
            assert gradient is not None, name
            assert (
                not gradient.any()
                if "visual" in name
                else torch.equal(gradient, gradients[0][1][name])
            ), name
    empty = batch_of(posts[:1])
    empty.ids = []
    loss, plain_loss, reasons = looking(empty)
    assert loss.shape == plain_loss.shape == reasons.shape == (0,)
    looking.zero_grad()
    loss.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in looking.parameters())


# ------------------------------------------------------------------------------------- what torchrun starts


def runs(processes, posts, out):
    """All runs in one launch: a process's share of a step at once, and in three micro-batches."""
    train.train(
        train.settings(arguments(posts, Path(out) / "long-3", "dynamic", "--micro-batch", "1")),
        processes,
    )
    for mode in SHORT:
        for name, size in (
            (f"{mode}-1", "1000"),
            (f"{mode}-3", str(math.ceil(9 / processes.size / 3))),
        ):
            short = arguments(
                Path(posts).with_name("short.jsonl"), Path(out) / name, mode, "--micro-batch", size
            )
            train.train(train.settings(short), processes)


def send(number, step, rank, processes):
    """Let a signal reach a process after a step."""
    log_step = train.Log.step

    def logged(self, now, *args):
        log_step(self, now, *args)
        if now == int(step) and processes.rank == rank:
            os.kill(os.getpid(), number)

    train.Log.step = logged


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "runs":
        engine, posts, out = rest
        with checkpoint.Processes("cpu", engine) as processes:
            runs(processes, posts, out)
    else:
        step, engine, *options = rest
        args = train.settings(options)
        with checkpoint.Processes("cpu", engine) as processes:
            number, rank = (signal.SIGTERM, 0) if what == "until" else (signal.SIGKILL, 1)
            send(number, step, rank, processes)
            train.train(args, processes)
