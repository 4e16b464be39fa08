"""tools/study.py on data of one's own: every row, stopped once and gone on."""

import contextlib
import importlib
import io
import json
import os
import signal
from pathlib import Path

import pytest
import torch

import published
from evaluate import UserError
from support.log import TrainingLog
from tiny import words
from tools import study

SIZES = "--epochs 1 --batch-size 8 --micro-batch 8 --lr 1e-3 --workers 0 --max-new-tokens 4"


@pytest.fixture(scope="module")
def files(world, tmp_path_factory):
    """A tiny model in the published layout; 40 posts to train on, and some to predict."""
    folder = tmp_path_factory.mktemp("study")
    published.write(folder / "Qwen2.5-VL-3B", "Qwen2.5-VL-3B")
    for name, count in (("train", 40), ("valid", 4), ("test", 12)):
        lines = (world / f"{name}.jsonl").read_text().splitlines()[:count]
        posts = [json.loads(line) for line in lines]
        for number, post in enumerate(posts):
            post["image"] = None if number % 4 else str(world / post["image"])
        text = "".join(json.dumps(post) + "\n" for post in posts)
        (folder / f"{name}.jsonl").write_text(text)
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


def run_study(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["study", *words(*arguments)])
    study.main()


def test_all_rows_on_a_real_layout_stopped_once(files, tmp_path, scripts, monkeypatch, capsys):
    torch.set_num_threads(1)  # for such small matrices
    out, end_step = tmp_path / "out", TrainingLog.end_step
    prompt = ["--prompt-file", Path(files[1]).with_name("prompt.txt")]

    def stop_multitask(log, step, *rest):
        end_step(log, step, *rest)
        if log.args.mode == "multitask" and step == 3 and not log.args.resume:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingLog, "end_step", stop_multitask)
    everything = [*files, "--out", str(out), "--paper", "mmkp", "--gammas", "inf"]
    everything += ["--", SIZES, *prompt]
    with pytest.raises(UserError, match="training of multitask ended with 143; the same command"):
        run_study(monkeypatch, *everything)
    assert [command[0] for command in scripts] == words("infer.py train.py infer.py train.py")
    del scripts[:]
    run_study(monkeypatch, *everything)
    trained = [command for command in scripts if command[0] == "train.py"]
    modes = [command[command.index("--mode") + 1] for command in trained]
    assert modes == ["multitask", "cot", "dynamic", "dynamic"]
    assert ["--resume" in command for command in trained] == [True, False, False, False]
    for row in ("sft", "multitask", "cot", "dynamic", "dynamic-gammainf"):
        log = study.read(out / row / "log.jsonl")
        assert [line["step"] for line in log if "loss" in line] == [*range(1, 6)], row
    scores = json.loads((out / "scores.json").read_text())
    assert [*scores] == [*study.ROWS, "dynamic-gammainf"]
    assert all(entry["all"]["posts"] == 12 for entry in scores.values())
    tables = (out / "tables.md").read_text()
    sft = next(line for line in tables.splitlines() if line.startswith("| sft |"))
    assert sft.endswith("| 60.83 |")
    low, high = (100 * end for end in scores["sft"]["all"]["interval"]["F1@1"])
    assert sft.startswith(
        f"| sft | {100 * scores['sft']['all']['F1@1']:.1f} ({low:.1f}–{high:.1f})"
    )
    assert sum(line.startswith("| dynamic − ") for line in tables.splitlines()) == 4
    assert capsys.readouterr().out == f"{tables}\n"  # the tables alone are on stdout

    del scripts[:]
    run_study(monkeypatch, *everything)
    assert "train.py" not in [command[0] for command in scripts]
    assert (out / "tables.md").read_text() == tables
    with pytest.raises(UserError, match="sft: was trained with other settings: lr was 0.001, is 1"):
        run_study(monkeypatch, *everything, "--lr 1")
