"""Training curves of runs in one picture, and on stdout a table of where each run ended.

    python -m tools.curves out/a out/b --out curves.png

Runs made with `train.py --log-choices` have the distribution of L(y_s) over their samples, too.
"""

import warnings
from array import array
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluate import UserError, lay_out, one_line, parse_line, read_lines, run
from support.console import ArgumentParser, info, read_json, reading, reading_progress, writing
from support.jsonl import write_atomic
from train import MODES

STRETCHES = 120  # the most points of a line
PANELS = {  # quantity: title; what is shown in percent is logged as a fraction
    "loss": "Training loss",
    "plain_loss": "Training loss of the plain answer, L(yₛ)",
    "cot_share": "Samples on CoT, %",
    "all": "Validation F1@1, %",
    "unseen": "Validation F1@1, unseen keyphrases, %",
    "generated": "Tokens generated per validation post",
    "tokens": "Tokens trained on per post, with prompt",
}


class Log(NamedTuple):
    """What a run has logged."""

    name: str
    settings: dict
    steps: int
    minutes: float
    lines: dict  # {quantity of PANELS: [(step, value)]}, without those it has not logged
    losses: np.ndarray  # (n, 3), the step, L(y_s) and gamma of each sample


def read_records(path):
    """Iterate over the records of a run's file; a torn last line is left out. Raises UserError."""
    for line, _, raw in reading_progress(read_lines(path), path):
        if raw.endswith(b"\n"):
            yield parse_line(path, line, raw)


def read_log(folder, name):
    """The Log of the run in a folder. Raises UserError."""
    path, choices = folder / "log.jsonl", folder / "choices.jsonl"
    steps, minutes, lines, samples = 0, 0, defaultdict(list), array("d")
    with reading(path, "name the folder of a run, train.py's --out"):
        settings = read_json(folder / "settings.json")
        for record in read_records(path):
            if scores := record.get("valid"):
                classes = [name for name in ("all", "unseen") if scores[name]["posts"]]
                values = {name: scores[name]["F1@1"] for name in classes}
                values["generated"] = scores["all"]["tokens"]
            else:
                values = record | {"tokens": record["tokens"] / record["samples"]}
                steps, minutes = record["step"], minutes + record["seconds"] / 60
            for quantity in PANELS.keys() & values.keys():
                value = values[quantity]
                if value is not None and np.isfinite(value):  # no L(y_s), or a run that diverged
                    unit = 100 if PANELS[quantity].endswith("%") else 1
                    lines[quantity].append((record["step"], unit * value))
    if choices.exists():
        with reading(choices, "did train.py --log-choices write it?"):
            for record in read_records(choices):
                if record["plain_loss"] is not None:
                    gamma = record.get("gamma") or settings["gamma"]  # null: infinite
                    samples.extend((record["step"], record["plain_loss"], gamma))
    lines = {name: [part.mean(0).tolist() for part in split(line)] for name, line in lines.items()}
    losses = np.array(samples).reshape(-1, 3)
    return Log(name, settings, steps, minutes, lines, losses)


def split(points):
    """Points (step, value) as arrays (n, 2) of at most STRETCHES stretches of steps."""
    points = np.array(points)
    return np.array_split(points, min(STRETCHES, len(np.unique(points[:, 0]))))


def summary(logs):
    """Where each run ended, the last points of its lines, as a table."""
    rows = ["run mode gamma steps minutes loss on_CoT F1@1 unseen tokens".split()]
    for log in logs:
        mode = log.settings["mode"]
        gamma = str(log.settings["gamma"]) if MODES[mode].has_gate else "–"
        row = [log.name, mode, gamma, f"{log.steps:,}", f"{log.minutes:,.1f}"]
        for quantity in ("loss", "cot_share", "all", "unseen", "generated"):
            line = log.lines.get(quantity)
            row.append(f"{line[-1][1]:.4g}" if line else "–")
        rows.append(row)
    return lay_out(rows)


def draw_lines(axes, quantity, logs):
    """Draw a quantity over all runs; short lines, such as evaluations, with dots."""
    for index, log in enumerate(logs):
        points = log.lines.get(quantity, [(np.nan, np.nan)])
        style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":", "-.")[index % 4]}
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", **style)
    if "loss" in quantity:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 100 if PANELS[quantity].endswith("%") else None)


def draw_losses(axes, log):
    """Draw the distribution of L(y_s) in each stretch of steps, its median, and gamma."""
    steps, losses, gammas = log.losses.T
    low, high = max(losses.min(), 1e-6), losses.max()
    edges = np.linspace(0.5, log.steps + 0.5, min(log.steps, 60) + 1), np.geomspace(low, high, 61)
    axes.hist2d(steps, losses.clip(low), edges, cmin=1, cmap="Blues", norm="log")
    medians = [np.median(part, axis=0) for part in split(log.losses[:, :2])]
    axes.plot(*np.transpose(medians), color="black", label="median")
    if MODES[log.settings["mode"]].has_gate:
        label = f"gamma {log.settings['gamma']}"
        axes.axhspan(gammas.min(), gammas.max(), color="C3", alpha=0.4, linestyle="--", label=label)
    axes.set_yscale("log")
    axes.legend(frameon=False)


def draw(logs):
    """A figure with a chart for each quantity, and one for each run's distribution of L(y_s)."""
    from matplotlib.figure import Figure

    logged = [name for name in PANELS if any(name in log.lines for log in logs)]
    charts = [(PANELS[name], draw_lines, name, logs) for name in logged]
    charts += [(f"L(yₛ) of {log.name}", draw_losses, log) for log in logs if len(log.losses)]
    rows, last = -(-len(charts) // 3), max(log.steps for log in logs)
    figure = Figure(figsize=(12, 2.7 * rows + 0.4), layout="constrained")
    for place, (title, draw_chart, *content) in enumerate(charts, start=1):
        axes = figure.add_subplot(rows, 3, place)
        draw_chart(axes, *content)
        axes.set(xlim=(0, last), xlabel="step")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.grid(axis="y", alpha=0.4)
    lines = figure.axes[0].get_lines()
    figure.legend(lines, [log.name for log in logs], loc="outside upper left", ncols=3)
    return figure


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="a run's folder, train.py's --out")
    add("--out", metavar="FILE", default="curves.png", help="the picture, a .png or .svg file")
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    out = Path(args.out)
    if out.suffix not in (".png", ".svg"):
        raise UserError(f"{out}: --out must end in .png or .svg")
    logs = [read_log(Path(folder), one_line(folder)) for folder in args.runs]
    if not any(log.lines for log in logs):
        raise UserError(f"{args.runs[0]}: no training step in its log yet; try again later")
    print(summary(logs))
    with reading("matplotlib", "pip install matplotlib"):
        from matplotlib import rc_context
    picture = BytesIO()
    logs = [log._replace(name=log.name.replace("$", r"\$")) for log in logs]  # no formulas
    with rc_context({"font.size": 9}), warnings.catch_warnings(action="ignore"):  # of glyphs
        draw(logs).savefig(picture, format=out.suffix[1:])
    with writing(out):
        write_atomic(out, picture.getvalue())
    info(f"wrote {out}")


if __name__ == "__main__":
    run(main)
