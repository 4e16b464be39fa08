"""Several processes train one model: real ones, started by torchrun, against a single one.

Run as a script, this file is what torchrun starts.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from PIL import Image

import data
import published
import train
from model import FAMILIES
from support import checkpoint
from support.distributed import Ranks, run_all_layers
from support.log import TrainingLog
from test_resume import weights
from tiny import (
    ROOT,
    batch_of,
    lines,
    literal,
    random_posts,
    tiny_model,
    train_alone,
    words,
    write,
)
from train import MODES, TrainingStep

DRAWN_ALIKE = [mode for mode in MODES if mode != "dropout"]  # each rank has coins of its own
# Layers with a recurrent state, with experts, and a head of its own or not; and a gamma between the
# first losses of two posts without an image, so that one of them reasons.
KINDS = {"Qwen3.5-4B": 6.96, "Qwen3.5-35B-A3B": 7.0}


def arguments(posts, out, mode="dynamic", *options):
    """Settings of a run over 59 posts for two epochs, six a step, or over 14 for one, nine a step.

    An epoch's last step has 5 posts.
    """
    world = Path(posts).parent
    length = ["--epochs 1 --batch-size 9"]
    if Path(posts).name == "long.jsonl":
        length = ["--epochs 2 --batch-size 6 --valid", world / "valid.jsonl"]
    files = ["--train", posts, "--model", world / "small", "--out", Path(out), "--mode", mode]
    sizes = "--micro-batch 1000 --lr 2e-3 --gamma 5 --seed 3 --workers 0 --max-new-tokens 4"
    return words(*files, *length, sizes, *options)


@pytest.fixture(scope="module")
def posts(world):
    """Posts with and without images, and models of few layers: gloo takes its time for each."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    records = lines(world / "train.jsonl")
    for record in records[::3]:
        record["image"] = None
    write(world / "long.jsonl", records[:59])
    write(world / "short.jsonl", records[:14])
    write(world / "odd.jsonl", odd_steps(world))
    few = [{"id": str(n), "text": "the foxes " * n, "cot": "so"} for n in range(7)]
    for n, record in enumerate(few):
        record["keyphrases"] = ["foxes", "paris"][: 1 + n % 2]
    for n in (1, 2, 4):
        few[n]["image"] = f"{n}.png"
        pixels = np.random.default_rng(n).integers(0, 256, (64, 32 * n + 24), dtype=np.uint8)
        Image.fromarray(pixels).save(world / f"{n}.png")
    write(world / "few.jsonl", few)
    for kind in KINDS:
        published.write(world / kind, kind)
    config = AutoConfig.from_pretrained(world / "toy")
    config.text_config.num_hidden_layers, config.vision_config.depth = 2, 1
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.fullatt_block_indexes = [0]
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(world / "small")
    checkpoint.copy_side_files(world / "toy", world / "small")
    config.save_pretrained(world / "small")
    return world / "long.jsonl"


def odd_steps(world):
    """Five steps of four posts: with images, without, without, no readable image, with images."""
    records = lines(world / "train.jsonl")[:20]
    order = data.TrainingOrder(20, 4, 3, 1)
    for step in range(len(order)):
        for index in order[step]:
            image = records[index]["image"]
            records[index]["image"] = [image, None, None, "gone.png", image][step]
    return records


def steps(run):
    return [line for line in lines(run / "log.jsonl") if "loss" in line]


def assert_same_updates(run, single, source):
    """Two runs have the same weights, as far as they have moved from those of a folder."""
    saved, right, start = weights(run), weights(single), {}
    for file in source.glob("*.safetensors"):
        start |= load_file(file)
    shapes = [{name: tensor.shape for name, tensor in found.items()} for found in (saved, right)]
    assert shapes[0] == shapes[1]
    for name, weight in right.items():
        moved = (weight - start[name].float()).norm()
        assert (saved[name] - weight).norm() <= 0.02 * moved, name


def launch(count, *arguments, script=__file__, **options):
    """Start torchrun with `count` processes of a script."""
    launcher = f"-m torch.distributed.run --nproc-per-node {count} --master-port 0"
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0"
    return subprocess.Popen(
        [sys.executable, *words(launcher, rendezvous, Path(script), *arguments)],
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
    with Ranks("cpu") as ranks:
        every_run(ranks, posts.parent, out)
    return out


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(posts, alone, tmp_path, engine):
    finished(launch(2, "runs", engine, posts.parent, tmp_path))
    counts = {"long": 20} | dict.fromkeys([*DRAWN_ALIKE, *KINDS], 2)
    for name, count in counts.items():
        run, single = tmp_path / name, alone / name
        assert len(steps(single)) == len(steps(run)) == count
        for ours, theirs in zip(steps(run), steps(single), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
            for key in ("cot_share", "samples", "tokens"):
                assert ours[key] == theirs[key]
        source = posts.parent / (name if name in KINDS else "small")
        assert_same_updates(run, single, source)
        if name == "long" or name in KINDS:
            assert any(0 < line["cot_share"] < 1 for line in steps(single))
        if name in KINDS:
            assert ("lm_head.weight" in weights(run)) == ("A3B" in name)
    evaluations = [line for line in lines(tmp_path / "long" / "log.jsonl") if "valid" in line]
    assert [line["valid"]["posts"] for line in evaluations] == [8] * 2

    # Weights that no post of a step used do not move.
    before = [load_file(posts.parent / "small" / "model.safetensors")] * 2
    for step in range(1, 6):
        folders = [out / "odd" / f"step-{step}" for out in (alone, tmp_path)]
        after = [load_file(folder / "model.safetensors") for folder in folders]
        for name, expected in after[0].items():
            used = step != 4 and (step in (1, 5) or "visual" not in name)
            for old, new in zip(before, after, strict=True):
                same = torch.equal(old[name], new[name])
                assert not same if used and expected.ndim > 1 else same or used, (step, name)
            assert (after[1][name] - expected).abs().max() <= 1e-6, (step, name)
        before = after


def test_a_checkpoint_goes_on_with_another_number_of_processes(posts, alone, tmp_path, monkeypatch):
    """Two sharded processes, then one, then three: together the run that was never stopped."""
    out, script = tmp_path / "run", ROOT / "train.py"
    first = arguments(posts, out, "dynamic", "--save-every 3")
    # 1 is torchrun's code where a process has left with 143.
    output = finished(launch(2, "until", 7, "fsdp", *first), 1)
    assert output.count("stopped after step 7 of 20") == 1 and 'train.py", line' not in output
    assert (out / "last").read_text() == "step-7\n"

    # A signal in the first step of this process: the step is ended and saved, and the next process
    # goes on from there.
    def enter(stop):
        stop.asked = signal.SIGTERM
        return stop

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(checkpoint.Stop, "__enter__", enter)
        patch.setattr(checkpoint.Stop, "__exit__", lambda *_: None)
        train_alone(*first, "--resume")
    assert (out / "last").read_text() == "step-8\n"
    finished(launch(3, *first, "--parallel fsdp --resume", script=script))
    for ours, theirs in zip(steps(out), steps(alone / "long"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["cot_share"] == theirs["cot_share"]


def test_a_process_that_is_killed_ends_the_others(posts, tmp_path):
    started = time.monotonic()
    process = launch(2, "killed", 3, "ddp", *arguments(posts, tmp_path / "run"))
    output = finished(process, 1, limit=120)
    assert "Signal 9 (SIGKILL)" in output and time.monotonic() - started < 100
    assert len(steps(tmp_path / "run")) == 3


def test_a_mistake_is_told_once(posts, tmp_path):
    wrong = arguments(posts.with_name("none.jsonl"), tmp_path / "run")
    output = finished(launch(2, *wrong, script=ROOT / "train.py"), 1)
    assert output.count("error:") == 1 and "none.jsonl: no such file" in output
    assert 'train.py", line' not in output


@pytest.mark.parametrize("context", [contextlib.nullcontext, literal])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dummy_image_changes_nothing(family, context):
    """What a batch without images, or of no posts, does to a model that must run all its layers."""
    model, posts = tiny_model(family).train(), random_posts(family, [None, None, None])
    step, gradients = TrainingStep(model, "dynamic", 4.0), []
    with context():
        for prepare in (lambda step: None, run_all_layers):
            prepare(step)
            step.zero_grad()
            loss = step(batch_of(posts))[0]
            loss.mean().backward()
            gradients.append((loss, {name: p.grad for name, p in step.named_parameters()}))
        assert torch.equal(gradients[0][0], gradients[1][0])
        for name, gradient in gradients[1][1].items():
            assert gradient is not None, name
            if "visual" in name:
                assert not gradient.any(), name
            else:
                assert torch.equal(gradient, gradients[0][1][name]), name
        empty = batch_of(posts[:1])
        empty.ids = []
        results = step(empty)
    assert all(result.shape == (0,) for result in results)
    step.zero_grad()
    results[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in step.parameters())


# ----------------------------------------------------------------------------- what torchrun starts


def every_run(ranks, folder, out):
    """Twenty steps of dynamic with validation, two of each mode and kind, and the odd steps.

    On several ranks a rank's share of a step is read in micro-batches, in three or one by one.
    """

    def run(name, posts, mode, size, *options):
        size = 1000 if ranks.world_size == 1 else size
        settings = ["--micro-batch", size, *options]
        posts = folder / f"{posts}.jsonl"
        train.train(train.parse_args(arguments(posts, out / name, mode, *settings)), ranks)

    run("long", "long", "dynamic", 1)
    for mode in DRAWN_ALIKE:
        run(mode, "short", mode, math.ceil(9 / ranks.world_size / 3))
    for kind, gamma in KINDS.items():
        few = ["--model", folder / kind, "--gamma", gamma]
        run(kind, "few", "dynamic", 1, *few, "--batch-size 4 --lr 1e-3 --warmup 0 --seed 0")
    make_optimizer = train.make_optimizer

    def smooth(*args):
        """Its updates vary smoothly with the gradients."""
        optimizer = make_optimizer(*args)
        for group in optimizer.param_groups:
            group["eps"] = 1.0
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizer", smooth)
        patch.setattr(TrainingLog, "add_skipped", lambda *_: None)
        options = "--batch-size 4 --weight-decay 5 --save-every 1 --keep 9"
        run("odd", "odd", "dynamic", 2, options)


def send(number, step, rank, ranks):
    """Let a signal reach a rank after a step."""
    end_step = TrainingLog.end_step

    def logged(self, now, *args):
        end_step(self, now, *args)
        if now == int(step) and ranks.rank == rank:
            os.kill(os.getpid(), number)

    TrainingLog.end_step = logged


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "runs":
        engine, *folders = rest
        with Ranks("cpu", engine) as ranks:
            every_run(ranks, *map(Path, folders))
    else:
        step, engine, *options = rest
        args = train.parse_args(options)
        with Ranks("cpu", engine) as ranks:
            number, rank = (signal.SIGTERM, 0) if what == "until" else (signal.SIGKILL, 1)
            send(number, step, rank, ranks)
            train.train(args, ranks)
