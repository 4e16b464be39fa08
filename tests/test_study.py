"""tools/study.py on data of one's own: every row, stopped once and gone on."""

import contextlib
import importlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

import gen_cot
import published
from evaluate import UserError
from server import Server
from support.log import TrainingLog
from tiny import call, lines, words, write
from tools import study, tables

SIZES = "--epochs 1 --batch-size 8 --micro-batch 8 --lr 1e-3 --workers 0 --max-new-tokens 4"


@pytest.fixture(scope="module")
def files(world, tmp_path_factory):
    """A tiny model in the published layout; 40 posts to train on, and some to predict."""
    folder = tmp_path_factory.mktemp("study")
    published.write(folder / "Qwen2.5-VL-3B", "Qwen2.5-VL-3B")
    for name, count in (("train", 40), ("valid", 4), ("test", 12)):
        posts = lines(world / f"{name}.jsonl")[:count]
        for number, post in enumerate(posts):
            post["image"] = None if number % 4 else str(world / post["image"])
        write(folder / f"{name}.jsonl", posts)
    (folder / "prompt.txt").write_text("Keyphrases of: {text}")
    names = {f"--{name}": folder / f"{name}.jsonl" for name in ("train", "valid", "test")}
    return words(*sum(names.items(), ()), "--model", folder / "Qwen2.5-VL-3B")


@pytest.fixture
def scripts(monkeypatch):
    """Runs the scripts in this process; the list of what was run."""
    ran = []

    def execute(script, options, launch=""):
        ran.append([script, *map(str, options)])
        monkeypatch.setattr("sys.argv", ran[-1])
        printed, main = io.StringIO(), importlib.import_module(script.removesuffix(".py")).main
        try:
            with contextlib.redirect_stdout(printed):
                code = main() or 0
        except SystemExit as stopped:
            code = stopped.code
        except UserError as error:
            print(error)
            code = 1
        return code, printed.getvalue()

    monkeypatch.setattr(study, "execute", execute)
    return ran


def test_sigterm_reaches_the_script_which_saves_before_the_study_leaves(tmp_path):
    code = """if True:
        import os, signal, sys, time
        def save(*_):
            time.sleep(0.3)
            sys.exit(open(sys.argv[2], "w").close())
        signal.signal(signal.SIGTERM, save)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)"""
    before = signal.signal(signal.SIGTERM, study.stop)
    try:
        with pytest.raises(SystemExit):
            study.execute("x.py", [tmp_path / "saved"], shlex.join([sys.executable, "-c", code]))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "saved").exists() and not study.running


def planned(monkeypatch, capsys, arguments):
    """--dry-run's commands without their interpreter, and {row: tokens of its training}."""
    split = arguments.index("--")
    call(monkeypatch, study, *arguments[:split], "--dry-run", *arguments[split:])
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line)[1:] for line in lines if not line.startswith("#") and line]
    costs = {line: lines[at + 1] for at, line in enumerate(lines) if line.endswith(": training")}
    tokens = {line[2:].partition(":")[0]: cost.split(", ")[1] for line, cost in costs.items()}
    return [[os.path.basename(script), *rest] for script, *rest in commands], tokens


def test_all_rows_on_a_real_layout_stopped_once(files, tmp_path, scripts, monkeypatch, capsys):
    out, end_step = tmp_path / "out", TrainingLog.end_step
    train = Path(files[1])
    prompt = ["--prompt-file", train.with_name("prompt.txt")]
    posts = lines(train)[:12]  # no unseen keyphrases, and `kind` is the user's own
    for post, kind in zip(posts, [None, 1, "a"] * 4, strict=True):
        post["kind"] = kind
    posts[1]["image"] = "missing.png"
    files = [*files, "--test", str(write(tmp_path / "test.jsonl", posts))]

    def stop_cot(log, step, *rest):
        end_step(log, step, *rest)
        if log.args.mode == "cot" and step == 3 and not log.args.resume:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingLog, "end_step", stop_cot)
    everything = words(*files, "--out", out, "--paper mmkp --gammas inf --", SIZES, *prompt)
    commands, tokens = planned(monkeypatch, capsys, everything)
    with pytest.raises(UserError, match="training of cot ended with 143; the same command"):
        call(monkeypatch, study, *everything)
    assert [command[0] for command in scripts] == words("infer.py train.py infer.py train.py")
    first = scripts[:]
    del scripts[:]
    call(monkeypatch, study, *everything)
    ran = [[part for part in command if part != "--resume"] for command in first + scripts]
    assert {*map(tuple, ran)} == {*map(tuple, commands)}
    trained = [command for command in scripts if command[0] == "train.py"]
    modes = [command[command.index("--mode") + 1] for command in trained]
    assert modes == ["cot", "multitask", "dynamic", "dynamic"]
    assert ["--resume" in command for command in trained] == [True, False, False, False]
    rows = words("sft cot multitask dynamic dynamic-gammainf")  # the paper's
    for row in rows:
        log = tables.read(out / row / "log.jsonl")
        assert [line["step"] for line in log if "loss" in line] == [*range(1, 6)], row
        if "dynamic" not in row:  # whose probe the log doesn't count
            assert tokens[row] == f"{sum(line.get('tokens', 0) for line in log):.3g} tokens", row
    scores = json.loads((out / "scores.json").read_text())
    assert [*scores] == ["zero-shot", *rows]
    assert all(entry["all"]["posts"] == 12 for entry in scores.values())
    page = (out / "tables.md").read_text()
    sft = next(line for line in page.splitlines() if line.startswith("| sft |"))
    assert sft.endswith("| 60.83 |")
    assert re.search(
        "The paper's .* none for a model of 0.000 billion parameters.\n\n\\| F1@1", page
    )
    low, high = (100 * end for end in scores["sft"]["all"]["interval"]["F1@1"])
    assert sft.startswith(
        f"| sft | {100 * scores['sft']['all']['F1@1']:.1f} ({low:.1f}–{high:.1f})"
    )
    assert sum(line.startswith("| dynamic − ") for line in page.splitlines()) == 4
    assert capsys.readouterr().out == f"{page}\n"  # the tables alone are on stdout

    del scripts[:]
    call(monkeypatch, study, *everything)
    assert "train.py" not in [command[0] for command in scripts]
    assert (out / "tables.md").read_text() == page
    with pytest.raises(UserError, match="the inference of zero-shot ended with 1"):
        call(monkeypatch, study, "--infer", "--max-new-tokens 3", *everything)
    with pytest.raises(UserError, match="training of sft ended with 1; "):
        call(monkeypatch, study, *everything, "--lr", "1")


def test_rows_are_predicted_through_a_server_after_all_are_trained(
    files, tmp_path, scripts, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Server(lambda request, tries: "foxes new kit") as server:
        arguments = [*files, "--out", tmp_path, "--rows zero-shot sft --base-url", server.url]
        arguments = [*words(*arguments), "--infer", "--batch-size 1", "--", *words(SIZES)]
        call(monkeypatch, study, *arguments)
    ran = [command[0] for command in scripts]
    assert ran[:4] == ["train.py", "infer.py", "infer.py", "evaluate.py"]
    assert {request["model"] for request, *_ in server.log} == {files[-1], f"{tmp_path}/sft"}
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["sft"]["all"]["tokens"] == scores["zero-shot"]["all"]["tokens"] == 20


def test_a_club_world_is_a_data_set_like_any_other(world, tmp_path, scripts, monkeypatch, capsys):
    """Two worlds (the same posts twice): equal steps, equal training time, and a gamma."""
    names = {name: str(world / f"{name}.jsonl") for name in ("train", "valid", "test")}
    monkeypatch.setattr(study, "write_beside", lambda out, seed: names | {"model": world / "toy"})
    seconds = {"sft": 1, "dynamic": 2}  # of a step
    monkeypatch.setattr(
        tables, "training_seconds", lambda cell: seconds[cell.mode] * len(tables.steps_of(cell))
    )
    some = "--rows sft dynamic --worlds 0 1 --gammas 0.2 inf --"
    call(monkeypatch, study, *words("--out", tmp_path, some, SIZES))
    cells = "sft-0 sft-1 dynamic-0 dynamic-1 dynamic-0.5epochs-0 dynamic-0.5epochs-1"
    cells += " dynamic-gamma0.2-0 dynamic-gamma0.2-1 dynamic-gammainf-0 dynamic-gammainf-1"
    assert {path.parent.name for path in tmp_path.glob("*/last")} == set(cells.split())
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert "dynamic-never-1" in scores and scores["sft-0"]["all"]["posts"] == 12
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    ours = [line for line in lines if line[0] == "| dynamic" and len(line) == 11]
    assert [(line[-3], line[-1]) for line in ours] == [("8", "2.00 |"), ("4", "1.00 |")]
    for name, column, of in (("all", 1, lambda pair: sum(pair) / 2), ("unseen", 5, min)):
        values = [100 * scores[f"dynamic-{seed}"][name]["F1@1"] for seed in (0, 1)]
        assert ours[0][column].startswith(f"{of(values):.1f}")
    assert ["| reasoned, %", "all", "unseen", *"ABCD", "E |"] in lines
    start = lines.index(["| A to C", "L(y_s)", "p(y_s)", "exp(−gamma · n)", "p(direct) |"]) + 2
    law = [[float(figure.split()[0]) for figure in line[1:]] for line in lines[start : start + 3]]
    for (loss, answer, settled, direct), gamma in zip(law, (0.4, 0.2, math.inf), strict=True):
        assert settled == pytest.approx(math.exp(-gamma * 4), abs=0.02)  # of 4 tokens, or 5
        assert loss > 1 and 0 <= answer < direct < 1
    count = len([command for command in scripts if command[0] == "train.py"])
    call(monkeypatch, study, *words("--out", tmp_path, some, SIZES))
    assert count == len([command for command in scripts if command[0] == "train.py"]) == 10


VISION = 32 * (4 * 1280**2 + 3 * 1280 * 3420)  # weights of the blocks
TEXT = {"3B": 36 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 11008)}
TEXT["7B"] = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)


@pytest.mark.parametrize("size, epochs", [("3B", 5), ("7B", 3)])
def test_mmkp_360k_on_paper(size, epochs, monkeypatch, capsys):
    """Without data, weights or network. FLOPs: six times weights and tokens, and a little more."""
    launch = ["--launch", "torchrun --nproc-per-node=8"]
    model = ["--paper mmkp-360k --dry-run --model", f"Qwen/Qwen2.5-VL-{size}-Instruct"]
    lengths = "--lengths 100 300 10 100 --utilization 0.5 0.02 --price 2 8"
    call(monkeypatch, study, *words(*model), *launch, *words(lengths))
    lines = capsys.readouterr().out.splitlines()
    trained = [place for place, line in enumerate(lines) if "train.py" in line]
    assert [shlex.split(lines[at])[:3] for at in trained] == 4 * [[*words(launch[1]), "train.py"]]
    for place in trained:
        assert f"--lr 3e-05 --epochs {epochs} --gamma 0.4" in lines[place]
        assert f"# {math.ceil(330614 / 32) * epochs:,} steps, " in lines[place - 1]
    sft = lines[trained[0] - 1]
    flops = float(re.search(r"([\d.e+]+) FLOPs", sft)[1])
    by_hand = 6 * (TEXT[size] * 410 + VISION * 4 * 300) * 330614 * epochs
    assert by_hand < flops < 1.07 * by_hand
    hours = float(re.search(r"H100 ([\d.]+)", sft)[1])
    assert hours == pytest.approx(flops / (0.5 * 989e12) / 3600, rel=0.05)
    requests = 330614 * 1e-6 * (2 * (len(gen_cot.PROMPT) / 4 + 410) + 8 * 100)
    assert any(line.endswith(f" out; it costs {requests:,.0f}") for line in lines)
    assert sum("infer.py" in line for line in lines) == 5
    note = "# The paper's figures are those of Qwen2.5-VL-7B: it has none for a model of 3.755"
    assert lines[0].startswith(note) == (size == "3B")
    # Each row's last checkpoint and its best: weights and AdamW's state, 12 bytes a parameter.
    one = 12 * {"3B": 3.754622976, "7B": 8.292166656}[size]
    assert sft.endswith(f"; disk: {2 * one:.1f} GB")
    every = [re.findall(r"H100 ([\d.]+)", line) for line in lines if "FLOPs" in line]
    total, disk = lines[-1].split("; disk: ")
    assert disk == f"{8 * one:.1f} GB, and {one:.1f} GB more during a save"
    hours = float(re.search(r"H100 ([\d.]+)", total)[1])
    assert len(every) == 9 and hours == pytest.approx(sum(float(h) for (h,) in every), abs=0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--train x", "--model or --test is missing"),
        ("--dry-run", "--train is missing"),
        ("--paper mmkp-v2 --dry-run --model Qwen/Qwen2.5-VL-3B-Instruct", "--posts and --lengths"),
        ("--train x --test y --dry-run --model MODEL", "x: no such file; --posts and"),
        ("--train NO_IMAGES --test y --dry-run --model MODEL", "y: no such file"),
        ("--train NO_IMAGES --test NO_IMAGES --model MODEL --dry-run", "no image can be read"),
        ("--train x --test y --model z -- --mode sft", "--mode can't stand after --"),
    ],
)
def test_what_is_missing_is_named(arguments, message, files, tmp_path, monkeypatch):
    post = {"id": "1", "text": "", "image": "none.jpg", "keyphrases": ["foxes"]}
    write(tmp_path / "posts.jsonl", [post])
    (tmp_path / "none.jpg").write_text("no image")
    arguments = arguments.replace("NO_IMAGES", str(tmp_path / "posts.jsonl"))
    arguments = arguments.replace("MODEL", files[-1])
    with pytest.raises(UserError, match=message):
        call(monkeypatch, study, *words(arguments))
