"""Several processes train one model: real ones, started by torchrun, against a single one.

Run as a script, this file is what torchrun starts.
"""

import contextlib
import json
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
from support.jsonl import to_line
from support.log import TrainingLog
from test_resume import lines, weights
from tiny import batch_of, literal, random_posts, tiny_model, train_alone, words
from train import TrainingStep

ROOT = Path(__file__).parent.parent
# Two steps of each mode; and twenty of dynamic, with validation.
SHORT = ("sft", "cot", "multitask", "dynamic")


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
    """Posts with and without images, and a model of few layers: gloo takes its time for each."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    records = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    for record in records[::3]:
        record["image"] = None
    for name, count in (("long", 59), ("short", 14)):
        text = "".join(json.dumps(record) + "\n" for record in records[:count])
        (world / f"{name}.jsonl").write_text(text)
    config = AutoConfig.from_pretrained(world / "toy")
    config.text_config.num_hidden_layers, config.vision_config.depth = 2, 1
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.fullatt_block_indexes = [0]
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(world / "small")
    checkpoint.copy_side_files(world / "toy", world / "small")
    config.save_pretrained(world / "small")
    return world / "long.jsonl"


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
    train_alone(*arguments(posts, out / "long"))
    for mode in SHORT:
        train_alone(*arguments(posts.with_name("short.jsonl"), out / mode, mode))
    return out


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_processes_give_a_single_ones_losses_and_choices(posts, alone, tmp_path, engine):
    finished(launch(2, "runs", engine, posts, tmp_path))
    for run in sorted(tmp_path.iterdir()):
        single = alone / run.name.partition("-")[0]
        expected = steps(single)
        assert len(expected) == len(steps(run)) == (20 if single.name == "long" else 2)
        for ours, theirs in zip(steps(run), expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            for key in ("cot_share", "samples", "tokens"):
                assert ours[key] == theirs[key]
        assert_same_updates(run, single, posts.parent / "small")
    assert len(list(tmp_path.iterdir())) == 1 + 2 * len(SHORT)
    evaluations = [line for line in lines(tmp_path / "long-3" / "log.jsonl") if "valid" in line]
    assert [line["valid"]["posts"] for line in evaluations] == [8] * 2
    assert any(0 < line["cot_share"] < 1 for line in steps(alone / "long"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_qwen3_5_as_one_does(tmp_path, engine):
    """Layers with a recurrent state, with experts, and a head of its own or not."""
    records = [{"id": str(n), "text": "the foxes " * n, "cot": "so"} for n in range(7)]
    for n, record in enumerate(records):
        record["keyphrases"] = ["foxes", "paris"][: 1 + n % 2]
    for n in (1, 2, 4):
        records[n]["image"] = f"{n}.png"
        pixels = np.random.default_rng(n).integers(0, 256, (64, 32 * n + 24), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    (tmp_path / "posts.jsonl").write_text("".join(map(to_line, records)))
    kinds = ["Qwen3.5-4B", "Qwen3.5-35B-A3B"]
    for kind in kinds:
        published.write(tmp_path / kind, kind)
        train_alone(*qwen3_5_arguments(tmp_path, kind, "alone"))
    finished(launch(2, "qwen3_5", engine, tmp_path, *kinds))
    for kind in kinds:
        expected, ours = (steps(tmp_path / f"{kind}-{name}") for name in ("alone", "two"))
        for one, other in zip(ours, expected, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
            assert one["cot_share"] == other["cot_share"]
        assert len(ours) == 2 and any(0 < line["cot_share"] < 1 for line in ours)
        assert ("lm_head.weight" in weights(tmp_path / f"{kind}-two")) == ("A3B" in kind)
        two, alone = (tmp_path / f"{kind}-{name}" for name in ("two", "alone"))
        assert_same_updates(two, alone, tmp_path / kind)


def qwen3_5_arguments(folder, kind, name):
    """Settings of a run over seven posts, four a step."""
    files = ["--train", folder / "posts.jsonl", "--model", folder / kind]
    sizes = "--epochs 1 --batch-size 4 --micro-batch 2 --lr 1e-3 --warmup 0 --workers 0"
    # Between the first losses of two posts without an image, so that one of them reasons.
    gamma = {"Qwen3.5-4B": 6.96, "Qwen3.5-35B-A3B": 7.0}[kind]
    return words(*files, "--out", folder / f"{kind}-{name}", "--gamma", gamma, sizes)


@pytest.fixture(scope="module")
def odd_steps(posts):
    """Five steps of four posts: with images, without, without, no readable image, with images."""
    records = lines(posts.with_name("train.jsonl"))[:20]
    order = data.TrainingOrder(20, 4, 3, 1)
    for step in range(len(order)):
        for index in order[step]:
            image = str(posts.parent / records[index]["image"])
            records[index]["image"] = [image, None, None, "gone.png", image][step]
    path = posts.with_name("odd.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def odd_run(ranks, posts, out):
    """Train on the odd steps with much weight decay; the updates vary smoothly with gradients."""
    make_optimizer = train.make_optimizer

    def smooth(*args):
        optimizer = make_optimizer(*args)
        for group in optimizer.param_groups:
            group["eps"] = 1.0
        return optimizer

    options = "--batch-size 4 --micro-batch 2 --weight-decay 5 --save-every 1 --keep 9"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizer", smooth)
        patch.setattr(TrainingLog, "add_skipped", lambda *_: None)
        train.train(train.parse_args(arguments(posts, out, "dynamic", options)), ranks)


def test_steps_without_images_or_posts_are_those_of_a_single_process(odd_steps, tmp_path):
    """Weights that no post of a step used do not move, on any number of processes."""
    with Ranks("cpu") as ranks:
        odd_run(ranks, odd_steps, tmp_path / "alone")
    finished(launch(2, "odd", odd_steps, tmp_path))
    runs = [tmp_path / name for name in ("alone", "ddp", "fsdp")]
    before = [load_file(odd_steps.parent / "small" / "model.safetensors")] * 3
    for step in range(1, 6):
        after = [load_file(run / f"step-{step}" / "model.safetensors") for run in runs]
        for name, expected in after[0].items():
            used = step != 4 and (step in (1, 5) or "visual" not in name)
            for old, new in zip(before, after, strict=True):
                same = torch.equal(old[name], new[name])
                assert not same if used and expected.ndim > 1 else same or used, (step, name)
                assert (new[name] - expected).abs().max() <= 1e-6, (step, name)
        before = after


def test_a_checkpoint_goes_on_with_another_number_of_processes(posts, alone, tmp_path):
    """Two sharded processes, then one, then three: together the run that was never stopped."""
    out, script = tmp_path / "run", ROOT / "train.py"
    first = arguments(posts, out, "dynamic", "--save-every 3")
    # 1 is torchrun's code where a process has left with 143.
    output = finished(launch(2, "until", 7, "fsdp", *first), 1)
    assert output.count("stopped after step 7 of 20") == 1 and 'train.py", line' not in output
    assert (out / "last").read_text() == "step-7\n"
    # A signal in the first step of this process: the step is ended and saved, and the next process
    # goes on from there.
    code = """
import train
from support.checkpoint import Stop

def enter(self):
    self.asked = 15
    return self

Stop.__enter__, Stop.__exit__ = enter, lambda *_: None
train.run(train.main)
"""
    command = [sys.executable, "-c", code, *first, "--resume"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 143 and "stopped after step 8 of 20" in again.stderr, again.stderr
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


def runs(ranks, posts, out):
    """All runs in one launch: a rank's share of a step at once, and in three micro-batches."""
    posts, out = Path(posts), Path(out)
    train.train(
        train.parse_args(arguments(posts, out / "long-3", "dynamic", "--micro-batch 1")), ranks
    )
    thirds = math.ceil(9 / ranks.world_size / 3)
    for mode in SHORT:
        for name, size in ((f"{mode}-1", 1000), (f"{mode}-3", thirds)):
            short = posts.with_name("short.jsonl")
            options = arguments(short, out / name, mode, "--micro-batch", size)
            train.train(train.parse_args(options), ranks)


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
    if what == "qwen3_5":
        engine, folder, *kinds = rest
        with Ranks("cpu", engine) as ranks:
            for kind in kinds:
                arguments = qwen3_5_arguments(Path(folder), kind, "two")
                train.train(train.parse_args(arguments), ranks)
    elif what == "runs":
        engine, *rest = rest
        with Ranks("cpu", engine) as ranks:
            runs(ranks, *rest)
    elif what == "odd":
        posts, out = map(Path, rest)
        with Ranks("cpu") as ranks:
            for ranks.parallel in ("ddp", "fsdp"):
                odd_run(ranks, posts, out / ranks.parallel)
    else:
        step, engine, *options = rest
        args = train.parse_args(options)
        with Ranks("cpu", engine) as ranks:
            number, rank = (signal.SIGTERM, 0) if what == "until" else (signal.SIGKILL, 1)
            send(number, step, rank, ranks)
            train.train(args, ranks)
