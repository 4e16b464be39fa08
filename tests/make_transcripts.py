"""The transcripts in docs/first_runs.md: what a terminal of 80 columns shows of first runs.

    python tests/make_transcripts.py        # makes them anew, between the page's marks

tests/test_screen.py makes them again and compares their shape.
"""

import contextlib
import fcntl
import io
import os
import pty
import re
import shlex
import signal
import struct
import sys
import tempfile
import termios
import textwrap
import threading
from pathlib import Path

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
            row += 1
        else:
            if column == columns:
                row, column = row + 1, 0
            while len(lines) <= row:
                lines.append([])
            lines[row] += " " * (column + 1 - len(lines[row]))
            lines[row][column] = part
            column += 1
    return ["".join(line).rstrip() for line in lines]


@contextlib.contextmanager
def terminal(columns=80):
    """stdout and stderr are a terminal in this block; gives a list that then gets its lines."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received, lines = bytearray(), []

    def receive():
        with contextlib.suppress(OSError):  # the other end was closed
            while part := os.read(master, 4096):
                received.extend(part)

    reader = threading.Thread(target=receive)
    reader.start()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    try:
        with (
            io.TextIOWrapper(os.fdopen(slave, "wb", 0), "utf-8", write_through=True) as both,
            contextlib.redirect_stdout(both),
            contextlib.redirect_stderr(both),
        ):
            yield lines
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
        reader.join()
        os.close(master)
        lines += screen(received.decode(), columns)


def typed(command):
    """What the terminal shows of a command: its lines, the command's own first."""
    import importlib

    from evaluate import run

    _, script, *arguments = shlex.split(command)
    before, sys.argv = sys.argv, [script, *arguments]
    try:
        with terminal() as lines, contextlib.suppress(SystemExit):
            run(importlib.import_module(script.removesuffix(".py")).main)
    finally:
        sys.argv = before
    shown = textwrap.wrap(f"$ {command}", 78, subsequent_indent="      ", break_on_hyphens=False)
    return [*(f"{line} \\" for line in shown[:-1]), shown[-1], *lines]


@contextlib.contextmanager
def ctrl_c_after(step):
    """Press Ctrl-C when a training run in this block has done `step`."""
    from support.log import TrainingLog

    end_step = TrainingLog.end_step

    def then_press(log, number, *rest):
        end_step(log, number, *rest)
        if number == step:
            signal.raise_signal(signal.SIGINT)

    TrainingLog.end_step = then_press
    try:
        yield
    finally:
        TrainingLog.end_step = end_step


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
        f"## {title}\n\n```text\n" + "\n".join(lines).rstrip() + "\n```\n"
        for title, lines in found.items()
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page = before + MARKS[0] + "\n" + "\n".join(blocks) + "\n" + MARKS[1] + after
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
