"""The types of options, and that the ends of their ranges do no harm."""

import argparse
import contextlib
import importlib
import math

import pytest

from evaluate import UserError, non_negative_int
from support import console
from tiny import call, lines, words, write

COMMANDS = "train infer evaluate gen_cot".split()
COMMANDS += [f"tools.{name}" for name in "clubworld curves gallery memory merge study".split()]
COMMANDS += [f"tools.dataset {name}" for name in "import stats check split".split()]

VALUES = "-1 0 1 0.5 1.5 nan inf -inf text 1e-9 1e999 0x10 1000000000".split()
VALUES += ["", " ", "9" * 18, "9" * 30, "9" * 5000]
TAKEN = {  # what of VALUES an argparse type takes
    console.positive_int: "1 1000000000".split(),
    non_negative_int: ["0", "1", "1000000000", "9" * 18],
    console.whole_number(0, 7): ["0", "1"],
    console.positive_number: "1 0.5 1.5 1e-9 1000000000".split(),
    console.fraction: "0 1 0.5 1e-9".split(),
    console.non_negative_number: "0 1 0.5 1.5 1e-9 1000000000".split(),
    console.number_or_inf: "0 1 0.5 1.5 inf 1e-9 1e999 1000000000".split()
    + ["9" * 18, "9" * 30, "9" * 5000],
}


@pytest.mark.parametrize("kind", TAKEN)
def test_a_number_is_in_its_range_or_refused(kind):
    taken = []
    for value in VALUES:
        with contextlib.suppress(argparse.ArgumentTypeError):
            assert float(kind(value)) == float(value)
            taken.append(value)
    assert taken == TAKEN[kind]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_help_shows_a_default_that_is_none(command, monkeypatch, capsys):
    command, *parts = command.split()
    with pytest.raises(SystemExit, match="0"):
        call(monkeypatch, importlib.import_module(command), *parts, "--help")
    shown = capsys.readouterr().out
    assert "usage:" in shown and "default: None" not in shown


@pytest.mark.parametrize(
    "command, option, nearest",
    [
        ("train", "--leraning-rate", "--lr"),
        ("infer", "--modle=x", "--model"),
        ("evaluate", "--boostrap", "--bootstrap"),
    ],
)
def test_the_option_near_to_an_unknown_one_is_named(command, option, nearest, monkeypatch, capsys):
    files = ["a", "b"] if command in ("infer", "evaluate") else []
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, importlib.import_module(command), *files, option)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"unrecognized arguments: {option} (the nearest option is {nearest});" in line


# ----------------------------------------------------------------------------- a run or one line


@pytest.fixture
def few(world):
    """Eight posts to train on."""
    return write(world / "eight.jsonl", lines(world / "train.jsonl")[:8])


def run(monkeypatch, command, *arguments):
    """A command in this process: its exit code, or the line of its mistake."""
    try:
        return call(monkeypatch, importlib.import_module(command), *words(*arguments))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return str(error)


ENDS = {  # of the ranges: 0 or the line of the mistake
    "--epochs 1e-9 --gamma 0 --clip 1e-300": 0,
    "--lr 1e-300 --gamma inf --clip 1e308": 0,
    "--lr 1e14": "not finite",
    "--lr 1 --weight-decay 1e14": "not finite",
    "--weight-decay 0 --beta2 0 --clip 0": 0,
    "--beta2 0.9999999 --warmup 0 --final-lr 0 --clip inf": 0,
    "--warmup 1 --final-lr 1 --max-pixels 784 --max-new-tokens 1": 0,
    "--batch-size 1000000000 --micro-batch 1000000000": 0,
    "--keep 1000000000 --save-every 999999999999999999 --valid-posts 1000000000": 0,
    "--seed 999999999999999999 --max-pixels 1000000000 --max-length 1000000000": 0,
    "--max-pixels 783": "--max-pixels 783 leave no room",
    "--max-length 1": "--max-length 1 and --max-pixels 401408 leave no room",
    "--lora 4096 --seed 999999999999999999": 0,
}


@pytest.mark.parametrize("options, end", ENDS.items())
def test_training_at_the_ends_of_each_range(monkeypatch, world, few, tmp_path, options, end):
    if "--lora" in options:
        pytest.importorskip("peft", reason="adapters need the optional package peft")
    files = ["--train", few, "--model", world / "toy", "--out", tmp_path / "run"]
    files += ["--valid", world / "valid.jsonl"]
    sizes = "--epochs 1 --batch-size 4 --workers 0 --max-new-tokens 2"
    result = run(monkeypatch, "train", *files, sizes, options)
    if end:
        assert end in str(result)
        return
    assert result == 0 and (tmp_path / "run" / "last").is_file()
    steps = [line for line in lines(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert len(steps) == (1 if "epochs" in options or "batch" in options else 2)
    assert all(math.isfinite(line["loss"]) for line in steps)


def test_other_commands_at_the_ends_of_their_ranges(monkeypatch, world, tmp_path, capsys):
    posts, out = world / "test.jsonl", tmp_path / "preds.jsonl"
    files = ["--data", posts, "--model", world / "toy", "--workers 0 --max-new-tokens 2"]
    sizes = "--batch-size 1000000000 --max-pixels 1000000000 --max-length 1000000000"
    assert run(monkeypatch, "infer", *files, "--out", out, sizes) == 0
    small = run(monkeypatch, "infer", *files, "--out", tmp_path / "small.jsonl", "--max-pixels 1")
    assert "--max-pixels 1 leave no room" in small
    rounds = "--bootstrap 3 --seed 999999999999999999"
    assert run(monkeypatch, "evaluate", out, posts, rounds) == 0
    split = "split --overlap 0 --valid 0 --seed 999999999999999999 --test 1000000000"
    assert "leave nothing to train on" in run(
        monkeypatch, "tools.dataset", split, "--out", tmp_path / "split", posts
    )
    assert "Traceback" not in capsys.readouterr().err
