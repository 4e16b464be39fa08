"""The study on the club worlds: every mode, and what other gammas do (see tools/study.py).

The modes are compared at equal steps, then at equal training time. A cell is one run of train.py in
a folder of its own; the same command again skips finished cells and resumes a stopped one. The
tables go to OUT/tables.md, and a figure to OUT/gamma.png (with matplotlib).

The rules: test worlds are 0 to 4, development worlds 100 and up; modes share world, order, seed and
steps; the weights of the last step are scored.
"""

import io
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data import EncodedPosts, Loader, Posts
from evaluate import UserError, non_negative_int, read_jsonl
from support.console import info, positive_int, progress, read_json
from support.jsonl import write_atomic
from tools.clubworld import KINDS, write_toy_model, write_world
from train import TOY

ROOT = Path(__file__).parent.parent
GOES_ON = "the same command goes on from here"
EPOCHS, GAMMA = TOY["epochs"], 0.4
MODES = ("sft", "multitask", "cot", "dynamic")


def read(path):
    return [record for _, _, record in read_jsonl(path)]


def script(name, *arguments, **options):
    """Run one of the scripts and return what it printed; its errors and progress are shown."""
    for option, value in options.items():
        arguments += (f"--{option.replace('_', '-')}", value)
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{name} ended with {done.returncode}; {GOES_ON}")
    return done.stdout


# ------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class Cell:
    """One run of train.py."""

    out: Path
    mode: str
    world: int
    gamma: float = GAMMA
    epochs: float = EPOCHS

    @property
    def folder(self):
        name = f"{self.mode}-{self.world}"
        if self.gamma != GAMMA:
            name += f"-gamma{self.gamma:g}"
        if self.epochs != EPOCHS:
            name += f"-{self.epochs:g}epochs"
        return self.out / name

    @property
    def club_world(self):
        return self.out / f"clubworld-{self.world}"

    @property
    def learns_both(self):
        """Whether both kinds of answer are trained, so that plain ones are worth scoring, too."""
        return self.mode == "multitask" or self.mode == "dynamic" and 0 < self.gamma < math.inf

    def run(self):
        """Train and score, unless that is done, and predict with <think> forbidden.

        Raises UserError for a cell of another number of epochs, such as an older default.
        """
        file = self.folder / "settings.json"
        if file.exists() and read_json(file)["epochs"] != self.epochs:
            raise UserError(f"{self.folder}: not of {self.epochs} epochs; choose another --out")
        if not (self.folder / "test_scores.json").exists():
            resume = ["--resume"] if file.exists() else []
            settings = {"seed": self.world, "mode": self.mode, "gamma": self.gamma}
            script("train.py", *resume, **settings, epochs=self.epochs, out=self.folder)
        if self.learns_both:
            files = {"data": self.club_world / "test.jsonl", "model": self.folder / "last"}
            files["out"] = self.folder / "never_preds.jsonl"
            sizes = {"batch_size": 128, "max_new_tokens": TOY["max_new_tokens"], "workers": 0}
            script("infer.py", **files, **sizes, think="never")

    def scores(self, predictions="test_preds.jsonl", **options):
        """evaluate.py's scores of a file of predictions."""
        files = self.folder / predictions, self.club_world / "test.jsonl"
        train = self.club_world / "train.jsonl"
        return json.loads(script("evaluate.py", *files, "--json", train=train, **options))

    @cached_property
    def figures(self):
        """This cell's row of the tables, as a dict: percentages, and tokens per post."""
        scores, posts = self.scores(), read(self.club_world / "test.jsonl")
        thinks = [post["think"] is not None for post in read(self.folder / "test_preds.jsonl")]
        row = {"world": self.world, "gamma": self.gamma}
        row |= {name.title(): 100 * scores[name]["F1@1"] for name in ("all", "absent", "unseen")}
        row["tokens a post"] = scores["all"]["tokens"]
        row["reasoned"] = 100 * scores["all"]["reasoned"]
        row["reasoned, unseen"] = 100 * scores["unseen"]["reasoned"]
        for kind in KINDS:
            of_kind = [t for t, post in zip(thinks, posts, strict=True) if post["kind"] == kind]
            row[f"reasoned, {kind}"] = 100 * statistics.mean(of_kind)
        if self.learns_both:
            plain = self.scores("never_preds.jsonl")
            for name in ("all", "unseen"):
                row[f"{name.title()}, thinking forbidden"] = 100 * plain[name]["F1@1"]
        return row


def run_all(cells, at_once):
    """Write the worlds, then run the cells that are not finished, `at_once` at a time."""
    for world, folder in sorted({(cell.world, cell.club_world) for cell in cells}):
        write_world(folder, world)
        write_toy_model(folder / "toy", world)
    with ThreadPoolExecutor(at_once) as pool:
        list(progress(pool.map(Cell.run, cells), len(cells), "cells", "cell"))


# ----------------------------------------------------------------------------------- training time


def step_seconds(out, modes, rounds=3):
    """The time of a training step on this machine: {mode: (seconds, share of samples on CoT)}.

    Measured on world 0 from each mode's trained toy, and for `dynamic` also from the untrained one,
    with which no sample reasons yet. The modes take turns; the first 5 of a run's 20 steps don't
    count. The result is the median of the rounds' medians, kept in OUT/seconds.json.
    """
    path, club_world, probe = out / "seconds.json", out / "clubworld-0", out / "probe"
    measured = json.loads(path.read_text()) if path.exists() else {}
    starts = {mode: Cell(out, mode, 0).folder / "last" for mode in modes}
    if "dynamic" in modes:
        starts["dynamic, untrained"] = club_world / "toy"
    found = {name: [] for name in starts if name not in measured}
    settings = {"train": club_world / "train.jsonl", "out": probe, "epochs": 20 / 450, "lr": 1e-5}
    settings |= {"micro_batch": TOY["micro_batch"], "workers": TOY["workers"]}
    keys = ("seconds", "cot_share")
    for name in progress(rounds * [*found], rounds * len(found), "time of a step", "run"):
        shutil.rmtree(probe, ignore_errors=True)
        script("train.py", model=starts[name], mode=name.partition(",")[0], **settings)
        steps = read(probe / "log.jsonl")[5:]
        found[name].append([statistics.median(line[key] for line in steps) for key in keys])
    shutil.rmtree(probe, ignore_errors=True)
    for name, pairs in found.items():
        measured[name] = [statistics.median(values) for values in zip(*pairs, strict=True)]
    write_atomic(path, json.dumps(measured, indent=1) + "\n")
    return measured


def training_seconds(cell, measured):
    """(steps, seconds) of a finished cell's training.

    A step of `dynamic` takes longer the more samples reason: its seconds are interpolated between
    those measured from the untrained and from the trained toy.
    """
    lines = read(cell.folder / "log.jsonl")
    shares = [line["cot_share"] for line in lines if "cot_share" in line]
    seconds, share = measured[cell.mode]
    if cell.mode == "dynamic":
        untrained, no_share = measured["dynamic, untrained"]
        part = (statistics.mean(shares) - no_share) / max(share - no_share, 1e-9)
        seconds = untrained + (seconds - untrained) * part
    return len(shares), len(shares) * seconds


def equal_time(cells, measured, limit):
    """The cells with as many epochs, to a hundredth, as fit into `limit` seconds."""
    timed = {}
    for mode, of_mode in cells.items():
        epochs = round(EPOCHS * limit / training_seconds(of_mode[0], measured)[1], 2)
        timed[mode] = [Cell(cell.out, mode, cell.world, epochs=epochs) for cell in of_mode]
    return timed


# ------------------------------------------------------------------------------------------- gamma


def measure_direct(cell):
    """How a trained cell answers 200 posts of kinds A to C that follow the training rules.

    Means over the posts, kept in the cell's folder. p: the probability that the answer does not
    begin with <think>; loss: L(y_s); n: the tokens of y_s with the end of turn; law: exp(-gamma n).
    """
    path = cell.folder / "direct.json"
    if path.exists():
        return json.loads(path.read_text())
    import torch

    from model import DynamicCoT, load

    posts = Posts(cell.club_world / "valid.jsonl", for_training=True)
    chosen = [index for index in range(len(posts)) if posts[index]["kind"] in "ABC"][:200]
    model, encoder, _ = load(str(cell.folder / "last"))
    step, found = DynamicCoT(model, "sft").eval(), []
    with torch.no_grad():
        for micro_batches, _ in Loader(EncodedPosts(posts, encoder, True), [chosen], 50):
            for batch in micro_batches:
                prompt = step.encode_prompt(batch.prompt)
                first = model.lm_head(prompt.last_hidden[:, 0]).softmax(-1)  # (B, vocabulary)
                p, loss = 1 - first[:, encoder.think[0]], step.answer_loss(prompt, batch.plain)
                n = batch.plain.mask.sum(1).float()  # (B,)
                found.append(torch.stack([p, loss, torch.exp(-cell.gamma * n), n]))
    values = torch.cat(found, dim=1).mean(1).tolist()
    result = dict(zip(("p", "loss", "law", "n"), values, strict=True))
    write_atomic(path, json.dumps(result) + "\n")
    return result


def plot_gamma(rows, path):
    """Draw p(direct) over gamma as a PNG: the law as a line, the measured values as dots."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        info(f"{path}: not drawn, because matplotlib is missing; pip install matplotlib")
        return
    n = statistics.mean(row["n"] for row in rows)
    p = {row["gamma"]: row["p"] for row in rows if row["gamma"] < math.inf}
    xs = [max(p, default=1) * i / 100 for i in range(101)]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(xs, [math.exp(-x * n) for x in xs], label=f"exp(−gamma · {n:.2f})")
    axes.plot(p.keys(), p.values(), "o", label="measured p(direct answer)")
    axes.set(xlabel="gamma", ylim=(0, 1.03))
    axes.grid(axis="y", alpha=0.4)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_atomic(path, png.getvalue())


# ------------------------------------------------------------------------------------------ tables

FORBIDDEN = ("All, thinking forbidden", "Unseen, thinking forbidden")
FIGURES = ("tokens a post", "All", "Absent", "Unseen", *FORBIDDEN)
REASONED = ("reasoned", "reasoned, unseen", *(f"reasoned, {kind}" for kind in KINDS))


class Report:
    """OUT/tables.md, which grows by a section whenever its tables are ready."""

    def __init__(self, path):
        self.path, self.sections = path, []

    def add(self, title, *tables):
        self.sections.append(f"### {title}\n\n" + "\n".join(tables))
        print(self.sections[-1], flush=True)
        write_atomic(self.path, "\n".join(self.sections))


def markdown(titles, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (titles, *rows)]
    lines.insert(1, "|---" * len(titles) + "|")
    return "\n".join(lines) + "\n"


def spread(values, digits=1):
    """Mean and range of a figure over worlds, as text; a dash where the mode lacks the figure."""
    if None in values:
        return "–"
    mean, low, high = (f"{of(values):.{digits}f}" for of in (statistics.mean, min, max))
    return mean if low == high else f"{mean} ({low}–{high})"


def mode_tables(cells, measured, unit):
    """Two tables of means and ranges over worlds; training times are in units of `unit` seconds."""
    scores, reasoned = [], []
    for mode, of_mode in cells.items():
        times = [training_seconds(cell, measured) for cell in of_mode]
        price = [str(times[0][0]), spread([seconds / unit for _, seconds in times], 2)]
        column = {
            name: spread([cell.figures.get(name) for cell in of_mode])
            for name in (*FIGURES, *REASONED)
        }
        scores.append([mode, *price, *map(column.get, FIGURES)])
        reasoned.append([mode, *map(column.get, REASONED)])
    titles = ["mode", "steps", "training time, sft = 1", *FIGURES]
    return markdown(titles, scores) + "\n" + markdown(["mode", *REASONED], reasoned)


def world_table(cells):
    """Every cell's own F1@1: All / Unseen."""
    rows = []
    for mode, of_mode in cells.items():
        figures = [cell.figures for cell in of_mode]
        rows.append([mode, *(f"{f['All']:.1f} / {f['Unseen']:.1f}" for f in figures)])
    worlds = [f"world {cell.world}" for cell in next(iter(cells.values()))]
    return markdown(["mode", *worlds], rows)


def signed(difference):
    """evaluate.py's difference of two systems as text."""
    mean = 100 * difference["difference"]
    low, high = (100 * end for end in difference["interval"])
    star = " \\*" if difference["p"] < 0.05 else ""
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}){star}"


def paired_table(cells):
    """dynamic minus each other mode on the same posts: F1@1, 95% interval, a star if p < 0.05."""
    rows = []
    for mode in (mode for mode in cells if mode != "dynamic"):
        found = [
            cell.scores(against=other.folder / "test_preds.jsonl")["against"]
            for cell, other in zip(cells["dynamic"], cells[mode], strict=True)
        ]
        for name in ("all", "unseen"):
            differences = [signed(against[name]["F1@1"]) for against in found]
            rows.append([f"dynamic − {mode}", name, *differences])
    worlds = [f"world {cell.world}" for cell in cells["dynamic"]]
    return markdown(["F1@1", "posts", *worlds], rows)


def gamma_table(rows):
    """A row for each gamma and world; `rows` are dicts of a cell's figures."""
    columns = {
        "world": ("world", "d"),
        "gamma": ("gamma", "g"),
        "All": ("All", ".1f"),
        "Unseen": ("Unseen", ".1f"),
        "tokens a post": ("tokens a post", ".1f"),
        "reasoned": ("reasoned", ".1f"),
        "reasoned, E": ("reasoned, E", ".1f"),
        "L(y_s), A to C": ("loss", ".3f"),
        "p(direct), A to C": ("p", ".3f"),
        "exp(−gamma · n)": ("law", ".3f"),
    }
    cells = [[f"{row[name]:{form}}" for name, form in columns.values()] for row in rows]
    return markdown(list(columns), cells)


def add_options(add):
    """The settings of the club-world study alone."""
    add("--modes", nargs="*", choices=MODES, default=MODES, help="modes on the test worlds")
    worlds_help = "the test worlds"
    add("--worlds", nargs="+", type=non_negative_int, default=[0, 1, 2, 3, 4], help=worlds_help)
    worlds_help = "the development worlds"
    add("--gamma-worlds", nargs="+", type=non_negative_int, default=[100], help=worlds_help)
    add("--at-once", type=positive_int, default=1, help="runs at a time, which share the cores")


def compare_modes(args, report):
    """Every mode on the test worlds, at equal steps and then at equal training time."""
    cells = {mode: [Cell(args.out, mode, world) for world in args.worlds] for mode in args.modes}
    run_all(sum(cells.values(), []), args.at_once)
    timed = {}
    if "sft" in cells and 0 in args.worlds:
        measured = step_seconds(args.out, args.modes)
        _, unit = training_seconds(cells["sft"][0], measured)
        report.add("Equal steps", mode_tables(cells, measured, unit), world_table(cells))
        timed = equal_time(cells, measured, unit)
        run_all(sum(timed.values(), []), args.at_once)
        report.add("Equal training time", mode_tables(timed, measured, unit), world_table(timed))
    else:
        report.add("Equal steps (without times, which need sft and world 0)", world_table(cells))
    for title, some in (("steps", cells), ("training time", timed)):
        if "dynamic" in some and len(some) > 1:
            report.add(f"Paired tests, equal {title}", paired_table(some))


def compare_gammas(args, report):
    """Every gamma on the development worlds."""
    settings = itertools.product(args.gamma_worlds, args.gammas)
    cells = [Cell(args.out, "dynamic", world, gamma) for world, gamma in settings]
    run_all(cells, args.at_once)
    rows = [cell.figures | measure_direct(cell) for cell in cells]
    report.add("Gamma", gamma_table(rows))
    plot_gamma(rows, args.out / "gamma.png")


def study_club_worlds(args, report):
    """Everything, in the worlds and with the gammas that `args` names."""
    if args.at_once > 1:  # else threads of one run would wait for those of another
        threads = max(1, (os.cpu_count() or 1) // args.at_once)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if args.modes:
        compare_modes(args, report)
    if args.gammas:
        compare_gammas(args, report)
