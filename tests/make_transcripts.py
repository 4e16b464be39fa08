"""The transcripts in docs/first_runs.md: what a terminal of 80 columns shows of first runs.

    python tests/make_transcripts.py        # makes them anew, between the page's marks

tests/test_screen.py makes them again and compares their shape.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import signal
import sys
import tempfile
import textwrap
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "first_runs.md"
MARKS = "<!-- transcripts: made by tests/make_transcripts.py -->\n", "<!-- end of transcripts -->\n"

FILES = "--model toy --train my/train.jsonl --valid my/valid.jsonl"
SIZES = "--epochs 2 --batch-size 8 --micro-batch 8 --lr 2e-3 --workers 0 --max-new-tokens 16"
TRAIN = f"python train.py {FILES} --out out/run1 {SIZES}"
STOPPED = f"python train.py {FILES} --out out/run2 {SIZES}"
WRONG = "python train.py --model toy --train my/broken.jsonl --out out/run3"
RESUMED = f"{STOPPED} --resume"


def screen(shown, columns):
    """The lines on a terminal to which `shown` was written; it obeys \\r, \\n and "cursor up"."""
    lines, row, column = [[]], 0, 0
    for part in re.findall(r"\x1b\[A|.", shown, re.DOTALL):
        if part == "\x1b[A":
            row = max(0, row - 1)
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
        else:
            if column == columns:
                row, column = row + 1, 0
            while len(lines) <= row:
                lines.append([])
            lines[row] += " " * (column + 1 - len(lines[row]))
            lines[row][column] = part
            column += 1
    return ["".join(line).rstrip() for line in lines]


class Terminal(io.StringIO):
    """Keeps what is written to a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def typed(command):
    """What the terminal shows of a command: its lines, the command's own first."""
    from evaluate import run

    _, script, *arguments = shlex.split(command)
    with (
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.dict(os.environ, COLUMNS="80", LINES="24"),
        contextlib.redirect_stdout(Terminal()) as both,
        contextlib.redirect_stderr(both),
        contextlib.suppress(SystemExit),
    ):
        run(importlib.import_module(script.removesuffix(".py")).main)
    shown = textwrap.wrap(f"$ {command}", 78, subsequent_indent="      ", break_on_hyphens=False)
    return [*(f"{line} \\" for line in shown[:-1]), shown[-1], *screen(both.getvalue(), 80)]


def ctrl_c_after(step):
    """Press Ctrl-C when a training run in this block has done `step`."""
    from support.log import TrainingLog

    end_step = TrainingLog.end_step

    def then_press(log, number, *rest):
        end_step(log, number, *rest)
        if number == step:
            signal.raise_signal(signal.SIGINT)

    return mock.patch.object(TrainingLog, "end_step", then_press)


def write_posts(folder):
    """Posts of a user's own, and one file with a mistake, in `folder`/my, and a toy model."""
    from tools.clubworld import write_toy_model, write_world

    write_world(folder / "my", seed=100, train=32, valid=8, test=1)
    write_toy_model(folder / "toy", seed=100)
    text = (folder / "my" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    text[2] = text[2].replace('"cot": "', '"cot": "<think>')
    (folder / "my" / "broken.jsonl").write_text("".join(text), encoding="utf-8")


def transcripts(folder):
    """{title: lines} of all runs, made in `folder`."""
    with contextlib.chdir(folder), open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stderr(nowhere):
            write_posts(Path())
        found = {"Training on posts of your own": typed(TRAIN), "A mistake in a file": typed(WRONG)}
        with ctrl_c_after(3):
            found["Stopped with Ctrl-C, and resumed"] = typed(STOPPED)
        found["Stopped with Ctrl-C, and resumed"] += typed(RESUMED)
    return found


def main():
    with tempfile.TemporaryDirectory() as folder:
        found = transcripts(folder)
    blocks = [
        f"## {title}\n\n```text\n" + "\n".join(lines).rstrip() + "\n```\n\n"
        for title, lines in found.items()
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    page = [before, MARKS[0], "\n", *blocks, MARKS[1], rest.partition(MARKS[1])[2]]
    PAGE.write_text("".join(page), encoding="utf-8")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
