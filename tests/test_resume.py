"""Runs that are interrupted, killed or refused, and what a resumed run ends with."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from evaluate import UserError
from support import checkpoint
from support.distributed import Ranks
from support.jsonl import locked
from tiny import ROOT, lines, train_alone, words

SIZES = "--micro-batch 4 --epochs 2 --batch-size 8 --lr 2e-3 --workers 0 --max-new-tokens 16"


def weights(run):
    return load_file(checkpoint.read_pointer(run / "last") / "model.safetensors")


def equal(one, other):
    """Whether two dicts of tensors are the same to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(run):
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "waited")}
        for line in lines(run / "log.jsonl")
    ]


def same(one, other):
    """Whether two runs have the same weights, log, choices and best checkpoint."""
    return (
        equal(weights(one), weights(other))
        and timeless(one) == timeless(other)
        and lines(one / "choices.jsonl") == lines(other / "choices.jsonl")
        and (one / "best").read_text() == (other / "best").read_text()
    )


@pytest.fixture(scope="module")
def options(world):
    return ["--gamma 5 --save-every 3 --log-choices --valid", world / "valid.jsonl"]


@pytest.fixture(scope="module")
def whole(world, options, tmp_path_factory):
    """A run that nobody interrupts: 16 steps, two epochs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    files = ["--train", world / "train.jsonl", "--model", world / "toy", "--out", out]
    train_alone(*files, SIZES, *options)
    return out


def stop_call(number, function):
    """A function whose call of that number is interrupted instead."""
    calls = []

    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return called


STOPS = {
    "after the first save": (checkpoint.Checkpoints, "prune", 1),
    "before a later save": (checkpoint.Checkpoints, "save", 4),
    "in the first validation": (train, "predict_and_score", 1),
    "in the last validation": (train, "predict_and_score", 2),
}


@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_run_resumes_to_the_whole_one(
    train_on, whole, options, monkeypatch, tmp_path, stop
):
    """Lines after the last checkpoint, and torn ones, are dropped and written anew."""
    owner, name, number = STOPS[stop]
    monkeypatch.setattr(owner, name, stop_call(number, getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt):
        train_on("run", *options)
    monkeypatch.undo()
    run = tmp_path / "run"
    for file in ("log.jsonl", "choices.jsonl"):
        with open(run / file, "a") as log:
            log.write('{"step": 17, "lo')
    train_alone("--resume --out", run)  # no more: its settings are its own
    assert same(whole, run) and not list(run.glob(".*"))
    names = {folder.name for folder in checkpoint.list_checkpoints(run)}
    kept = {"step-16", (run / "best").read_text().strip()}
    assert kept <= names <= kept | {"step-8", "step-15"}  # which an end in validation leaves


def test_a_run_killed_twice_is_the_run_left_alone(train_on, whole, options, world, tmp_path):
    """Real processes: kill -9 in mid-epoch, kill -9 inside a save."""
    run = tmp_path / "run"

    def kill_when(condition, *more):
        files = ["--train", world / "train.jsonl", "--model", world / "toy", "--out", run]
        command = [sys.executable, str(ROOT / "train.py"), *words(*files, SIZES, *options, *more)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not condition():
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()
        process.communicate()

    def logged(count):
        return (run / "log.jsonl").exists() and len(lines(run / "log.jsonl")) >= count

    kill_when(lambda: logged(4))
    assert (run / "last").read_text() == "step-3\n"
    kill_when(lambda: (run / ".partial").exists() and logged(9), "--resume")
    assert [folder.name for folder in checkpoint.list_checkpoints(run)][-1] in ("step-8", "step-9")
    train_on("run", *options, "--resume")
    assert same(whole, run) and not (run / ".partial").exists()


def test_only_a_runs_own_checkpoints_are_listed_and_pruned(tmp_path):
    others = ("step-notes", "step-6-merged", "step-6-backup", "step-9.partial", ".step-9", "best-6")
    for name in ("step-4", "step-5", "step-6", "step-10", *others):
        (tmp_path / name).mkdir()
    (tmp_path / "last").write_text("step-10\n")
    (tmp_path / "best").write_text("step-4\n")
    found = [folder.name for folder in checkpoint.list_checkpoints(tmp_path)]
    assert found == ["step-4", "step-5", "step-6", "step-10"]
    checkpoint.Checkpoints(tmp_path, *[None] * 4, Ranks("cpu")).prune(keep=2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-4", "step-6", "step-10", "last", "best", *others}


def test_the_disk_has_room_for_what_a_run_will_keep(train_on, world, monkeypatch):
    """16 steps of two epochs: a checkpoint that stays, the best, and one that is being written."""
    counts = {"": 2, "--keep 5": 2, "--save-every 3": 2, "--keep 5 --save-every 3": 6}
    parameters = load_file(world / "toy/model.safetensors").values()
    size = (4 + 8) * sum(map(torch.numel, parameters))  # float32 weights and AdamW's state
    valid = ["--valid", world / "valid.jsonl"]

    def start(out, free, *options):
        usage = shutil._ntuple_diskusage(0, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        return train_on(out, *options)

    for options, count in counts.items():
        with pytest.raises(UserError, match=rf"GB are free, and {count} checkpoints of 0.0 GB"):
            start("run", count * size - 1, options)
    with pytest.raises(UserError, match="3 checkpoints"):
        start("run", 3 * size - 1, "--save-every 3", *valid)
    run = start("run", 2 * size)
    assert {file.name for file in run.glob("step-*")} == {"step-16"}
    written = sum(file.stat().st_size for file in run.glob("step-16/**/*.safetensors"))
    assert written == pytest.approx(size, rel=0.01)
    start("run", 0, "--resume")  # finished: nothing will be written


def test_a_model_that_is_not_there_is_told_with_the_runs_that_are(tmp_path, monkeypatch):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "settings.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in ("out/runn", "./out/runn"):  # the first could be one of the hub
        with pytest.raises(UserError, match="; runs there: out/run$"):
            checkpoint.find_model(name)
    (tmp_path / "out" / "best" / "step-3").mkdir(parents=True)
    (tmp_path / "out" / "best" / "step-3" / "config.json").write_text("{}")
    (tmp_path / "out" / "best" / "best").write_text("step-3\n")
    for name in ("out/best", "out/best/best"):
        assert checkpoint.find_model(name).samefile("out/best/step-3")


def test_a_best_checkpoint_that_is_not_there_is_dropped(train_on, world, capsys):
    """Of a run that was copied without it."""
    options = ["--valid", world / "valid.jsonl"]
    run = train_on("run", *options)
    (run / "best").write_text("step-8\n")
    shutil.rmtree(run / "step-8", ignore_errors=True)
    train_on("run", *options, "--resume")
    assert f"{run}/best: dropped, as step-8 is not there" in capsys.readouterr().err
    assert (run / "best").read_text() == "step-16\n"


def test_a_second_ctrl_c_ends_everything():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with checkpoint.Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked == signal.SIGINT
            signal.raise_signal(signal.SIGTERM)  # a scheduler and torchrun may send one each
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with checkpoint.Stop() as stop, pytest.raises(KeyboardInterrupt), stop.at_once():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_killed_before_its_last_checkpoint_was_named(train_on):
    """Between the rename that makes a checkpoint whole and the pointer to it."""
    whole = train_on("run")
    (whole / "last").unlink()
    with pytest.raises(UserError, match="there is a run already"):
        train_on("run")
    assert (train_on("run", "--resume") / "last").read_text() == "step-16\n"


def test_resuming_with_other_posts_or_settings(train_on, world, tmp_path):
    posts = tmp_path / "posts.jsonl"
    text = (world / "train.jsonl").read_text().replace("images/", f"{world}/images/")
    posts.write_text(text)
    train_on("run", "--epochs 1", posts=posts)
    posts.write_text(text.replace("new kit", "old kit"))
    with pytest.raises(UserError, match="epochs was 1, is 2, train_digest was"):
        train_on("run", "--resume", posts=posts)
    run = train_on("run", "--resume --force", posts=posts)
    assert lines(run / "log.jsonl")[-1]["step"] == 16
    posts.write_text("".join(text.splitlines(keepends=True)[:60]))
    with pytest.raises(UserError, match="posts was 64, is 60"):
        train_on("run", "--resume --force", posts=posts)


@pytest.mark.parametrize(
    "name, told",
    [
        ("step-8/optimizer/*.safetensors", "step-8: can't be read .*; remove it to resume from"),
        ("step-8/progress.json", "step-8/progress.json: can't be read"),
        ("step-8/model.safetensors", "step-8: its weights: can't be read"),
        ("settings.json", "settings.json: can't be read"),
    ],
)
def test_resuming_from_a_damaged_file(train_on, name, told):
    run = train_on("run", "--epochs 1")
    (file,) = run.glob(name)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"^{run}/{told}"):
        train_on("run", "--epochs 1 --resume")


HOLDER = """
import multiprocessing, os, sys, time
from support.jsonl import locked
def work():
    print(os.getpid(), flush=True)  # printed by the worker: by now it has let go of the lock
    time.sleep(60)
with locked(sys.argv[1]):
    multiprocessing.get_context("fork").Process(target=work).start()
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    """Even by kill -9, and with a worker process that outlives it."""
    log, lock = tmp_path / "log.jsonl", tmp_path / ".log.jsonl.lock"
    command = [sys.executable, "-c", HOLDER, log]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        name = f"process {holder.pid} on {socket.gethostname()}"
        with (
            pytest.raises(UserError, match=rf"another run is writing to it \({name}\)"),
            locked(log),
        ):
            pass
        holder.kill()
        holder.wait()
        assert lock.read_text() == name
        with locked(log):
            assert lock.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        assert not lock.exists()
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
