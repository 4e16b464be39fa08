"""Every number flag of every command: what it takes, and that the ends of its range do no harm."""

import argparse
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from evaluate import UserError
from server import Server, write_posts
from tiny import words

ROOT = Path(__file__).parent.parent
SCRIPTS = "train infer evaluate gen_cot".split()
TOOLS = "clubworld curves dataset gallery memory merge study".split()
COMMANDS = [*SCRIPTS, *(f"tools.{name}" for name in TOOLS)]

VALUES = "-1 0 1 0.5 1.5 nan inf -inf text 1e-9 1e308 1e999 0x10 1000000000".split()
VALUES += ["", " ", "9" * 18, "9" * 30, "9" * 5000]
# What of VALUES a flag takes. Whole numbers end at 10^9, those that may be 0 at 10^18.
ABOVE_0 = {"1", "0.5", "1.5", "1e-9"}
FINITE = ABOVE_0 | {"0", "1e308", "1000000000", "9" * 18, "9" * 30}
INFINITE = FINITE | {"inf", "1e999", "9" * 5000}
SHARE = {"0", "1", "0.5", "1e-9"}
FROM_1, FROM_0 = {"1", "1000000000"}, {"0", "1", "1000000000", "9" * 18}
TAKEN = {
    **dict.fromkeys(words("--gamma --gammas --clip"), INFINITE),
    "--weight-decay": FINITE,
    "--lr": FINITE - {"0"},
    "--likeness": INFINITE - {"0"},
    "--map": set(),
    "--epochs": ABOVE_0,
    "--beta2": SHARE - {"1"},
    **dict.fromkeys(words("--warmup --final-lr --overlap --cot-share"), SHARE),
    "--utilization": SHARE - {"0"},
    "--price": FINITE,
    "--posts": FROM_1,
    "--temperature": ABOVE_0 | {"0"},
    **dict.fromkeys(words("--save-every --seed --max-retries --worlds --gamma-worlds"), FROM_0),
    "split --valid": FROM_0,
    "gen_cot --max-new-tokens": FROM_0,
    "gen_cot --min-words": FROM_0 - {"9" * 18},  # not more than --max-words
    **dict.fromkeys(words("--valid-posts --keep --batch-size --micro-batch --max-pixels"), FROM_1),
    **dict.fromkeys(words("--max-length --max-new-tokens --gpus --lengths --limit"), FROM_1),
    **dict.fromkeys(words("--max-words --timeout --page-size --at-once"), FROM_1),
    **dict.fromkeys(words("--train --valid --test"), FROM_1),
    "gen_cot --workers": FROM_1,
    "gallery --workers": FROM_1,
    "--workers": {"0", "1"},
    "check --workers": {"1"},
    "--lora": {"1"},
    "--bootstrap": {"0", "1"},
}
ROOM = {"gen_cot": "--min-words 1 --max-words 1000000000"}  # the first must not be more


class Found(Exception):
    """The parser of a command."""


def parser_of(module, monkeypatch):
    def stop(parser, *_):
        raise Found(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Found) as found:
            module.parse_args([])
    return found.value.args[0]


def flags_of(parser):
    """(name of the subcommand, arguments that it needs, action) of every number flag."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, tool in action.choices.items():
                for _, needed, flag in flags_of(tool):
                    yield name, [name, *needed], flag
            continue
        is_number = not isinstance(action.default, bool) and isinstance(action.default, int | float)
        if action.type is None or action.type is Path:
            assert not is_number, f"{action.dest} takes any text"
            continue
        needed = []
        for other in parser._actions:
            if not other.option_strings:
                needed += ["1"] * (1 if other.nargs in (None, "+", "?") else 0)
            elif other.required and other is not action:
                needed += [other.option_strings[0], "1"]
        yield None, needed, action


def attempt(module, arguments, capsys):
    """The parsed arguments, or None where they were refused in one line."""
    try:
        return module.parse_args(arguments)
    except SystemExit as stopped:
        error = capsys.readouterr().err.strip().splitlines()
        assert stopped.code == 2 and ": error: " in error[-1]
        assert sum("error:" in line for line in error) == 1
        return None


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_flag_takes_its_range_and_nothing_else(command, monkeypatch, capsys):
    module = importlib.import_module(command)
    parser = parser_of(module, monkeypatch)
    for tool, needed, flag in flags_of(parser):
        option = flag.option_strings[0]
        name = f"{tool or command.rpartition('.')[2]} {option}"
        assert name in TAKEN or option in TAKEN, f"{name} is new: add it above"
        count = flag.nargs if isinstance(flag.nargs, int) else 1
        taken = set()
        for value in VALUES:
            arguments = [*needed, *words(ROOM.get(command, "")), option, *[value] * count]
            if (args := attempt(module, arguments, capsys)) is not None:
                got = getattr(args, flag.dest)
                got = got[0] if isinstance(got, list) else got
                assert got == float(value) or str(got) == value, name
                taken.add(value)
        assert taken == TAKEN.get(name, TAKEN.get(option)), name


@pytest.mark.parametrize("command", COMMANDS)
def test_no_help_shows_a_default_that_is_none(command, monkeypatch):
    parsers = [parser_of(importlib.import_module(command), monkeypatch)]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    for parser in parsers:
        assert "default: None" not in parser.format_help()


def test_a_server_s_flags_are_among_them(monkeypatch):
    flags = flags_of(parser_of(importlib.import_module("gen_cot"), monkeypatch))
    assert {"--timeout", "--max-retries"} <= {flag.option_strings[0] for _, _, flag in flags}


# ----------------------------------------------------------------------------- a run or one line


@pytest.fixture
def few(world):
    """Eight posts to train on."""
    path = world / "eight.jsonl"
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:8]))
    return path


def run(monkeypatch, command, *arguments):
    """A command in this process: its exit code, or the line of its mistake."""
    monkeypatch.setattr(sys, "argv", [command, *words(*arguments)])
    try:
        return importlib.import_module(command).main() or 0
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return str(error)


ENDS = {
    "--epochs 1e-9": 0,
    "--gamma 0": 0,
    "--gamma inf": 0,
    "--lr 1e-300": 0,
    "--lr 1e308": "not finite",
    "--lr 1 --weight-decay 1e308": "not finite",
    "--weight-decay 0 --beta2 0": 0,
    "--beta2 0.9999999": 0,
    "--warmup 0 --final-lr 0": 0,
    "--warmup 1 --final-lr 1": 0,
    "--clip 0": 0,
    "--clip inf": 0,
    "--clip 1e308": 0,
    "--clip 1e-300": 0,
    "--batch-size 1000000000 --micro-batch 1000000000": 0,
    "--keep 1000000000 --save-every 999999999999999999 --valid-posts 1000000000": 0,
    "--seed 999999999999999999": 0,
    "--max-pixels 1000000000 --max-length 1000000000": 0,
    "--max-pixels 784": 0,
    "--max-pixels 1": "--max-pixels 1 is less than a token",
    "--max-length 1": "--max-length 1 leaves no room",
    "--max-new-tokens 1": 0,
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
    steps = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, steps) if "loss" in line]
    assert len(steps) == (1 if "epochs" in options or "batch" in options else 2)
    assert all(math.isfinite(line["loss"]) for line in steps)


def test_other_commands_at_the_ends_of_their_ranges(monkeypatch, world, tmp_path, capsys):
    posts, out = world / "test.jsonl", tmp_path / "preds.jsonl"
    files = ["--data", posts, "--model", world / "toy", "--workers 0 --max-new-tokens 2"]
    sizes = "--batch-size 1000000000 --max-pixels 1000000000 --max-length 1000000000"
    assert run(monkeypatch, "infer", *files, "--out", out, sizes) == 0
    small = run(monkeypatch, "infer", *files, "--out", tmp_path / "small.jsonl", "--max-pixels 1")
    assert "--max-pixels 1 is less than a token" in small
    rounds = "--bootstrap 3 --seed 999999999999999999"
    assert run(monkeypatch, "evaluate", out, posts, rounds) == 0
    split = "split --overlap 0 --valid 0 --seed 999999999999999999 --test 1000000000"
    assert "leave nothing to train on" in run(
        monkeypatch, "tools.dataset", split, "--out", tmp_path / "split", posts
    )
    sizes = "--page-size 1000000000 --workers 1000000000"
    page = ["--out", tmp_path / "gallery.html"]
    assert run(monkeypatch, "tools.gallery", out, posts, *page, sizes) == 0
    sizes = "--gpus 1000000000 --batch-size 1000000000 --max-pixels 1000000000"
    lengths = "--lengths 1000000000 1000000000 --lora 4096"
    assert run(monkeypatch, "tools.memory", "--model", world / "toy", sizes, lengths) == 0
    club = ["--out", tmp_path / "club", "--train 1 --valid 1 --test 1 --seed 999999999999999999"]
    assert run(monkeypatch, "tools.clubworld", *club) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_teacher_is_asked_at_the_ends_of_the_ranges(monkeypatch, tmp_path):
    posts = write_posts(tmp_path, 3)
    most = "--timeout --workers --limit --max-words --max-pixels".replace(" ", " 1000000000 ")
    ends = f"{most} 1000000000 --max-retries {'9' * 18} --max-new-tokens {'9' * 18} --min-words 0"
    with Server() as server:
        address = ["--out", tmp_path / "cot.jsonl", "--model x --base-url", server.url]
        assert run(monkeypatch, "gen_cot", posts, *address, ends, "--temperature 2") == 0
    assert len((tmp_path / "cot.jsonl").read_text().splitlines()) == 3


def test_a_mistake_in_a_flag_is_one_line_on_the_screen():
    command = [sys.executable, ROOT / "train.py", "--clip", "-1"]
    done = subprocess.run(command, capture_output=True, text=True)
    message = "train.py: error: argument --clip: '-1' is not a number in [0, inf]; see"
    assert done.returncode == 2 and done.stderr.startswith(message)
