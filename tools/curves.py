"""Training curves of runs in one picture, and on stdout a table of where each run ended.

    python -m tools.curves out/a out/b --out curves.png

For runs made with `train.py --log-choices` it also shows how L(y_s) is distributed over the
samples, and the share of them that switched to reasoning or back since the epoch before.
"""

import io
import math
import os
import warnings
from array import array
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from evaluate import UserError, lay_out, one_line, parse_line, read_lines, run
from support.console import ArgumentParser, info, progress, read_json, writing
from support.jsonl import write_atomic
from tools.gallery import check_out

FILES = "log.jsonl", "settings.json", "choices.jsonl"  # of a run
POINTS, STRETCHES = 200, 60  # the most points of a line, and of what choices.jsonl tells
PANELS = (  # quantity, title, scale of the axis; percent: logged as a fraction
    ("loss", "Training loss", "log"),
    ("plain_loss", "Training loss of the plain answer, L(yₛ)", "log"),
    ("cot_share", "Samples on CoT, %", "percent"),
    ("all", "Validation F1@1, %", "percent"),
    ("unseen", "Validation F1@1, unseen keyphrases, %", "percent"),
    ("generated", "Tokens generated per validation post", ""),
    ("tokens", "Tokens trained on per post, with prompt", ""),
    ("lr", "Learning rate", ""),
    ("to_reasoning", "Switched to reasoning since last epoch, %", ""),
    ("back", "Switched back since last epoch, %", ""),
)
STYLE = {"text.parse_math": False, "svg.hashsalt": "curves", "font.size": 9}  # names may hold $


class Log(NamedTuple):
    """What a run has logged."""

    name: str
    settings: dict
    steps: float
    minutes: float
    lines: dict  # {quantity: [(step, value)]}, of PANELS and the median of L(y_s)
    losses: list  # or array: (step, L(y_s)) of each sample


def number(value):
    """A logged value as a float; NaN for what is no number, or larger than any axis can show."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if usable else math.nan


def read_records(path):
    """Iterate over (where, record with a step); a torn last line is left out. Raises UserError."""
    for line, _, raw in read_lines(path):
        if raw.endswith(b"\n") and raw.strip():
            record, where = parse_line(path, line, raw), f"{path} line {line}"
            if not number(record.get("step")) >= 0:
                raise UserError(f"{where}: no 'step' in it; is this a log that train.py wrote?")
            yield where, record


def read_log(folder, name):
    """The Log of the run in a folder. Raises UserError."""
    path, settings, choices = (folder / file for file in FILES)
    if not path.is_file():
        raise UserError(f"{folder}: no log.jsonl in it; name the folder of a run, train.py's --out")
    steps, minutes, points = 0, 0, defaultdict(list)
    for where, record in read_records(path):
        if "valid" in record:
            record |= read_evaluation(where, record["valid"])
        else:
            steps, samples = max(steps, record["step"]), number(record.get("samples"))
            record["tokens"] = number(record.get("tokens")) / samples if samples > 0 else None
            if (seconds := number(record.get("seconds"))) >= 0:
                minutes += seconds / 60
        for quantity, _, scale in PANELS:
            if math.isfinite(value := number(record.get(quantity))):
                value *= 100 if scale == "percent" else 1
                points[quantity].append((record["step"], value))
    losses = read_choices(choices, points) if choices.is_file() else []
    lines = {quantity: thin(line) for quantity, line in points.items()}
    settings = read_json(settings) if settings.is_file() else {}
    return Log(name, settings, steps, minutes, lines, losses)


def read_evaluation(where, scores):
    """F1@1 of all and of unseen keyphrases, and the tokens per post. Raises UserError."""
    try:
        entries = {key: scores.get(key, {}) for key in ("all", "unseen")}
        values = {key: entry["F1@1"] for key, entry in entries.items() if entry.get("posts")}
        return values | {"generated": entries["all"].get("tokens")}
    except (AttributeError, KeyError):
        raise UserError(f"{where}: an evaluation without the evaluator's scores") from None


def read_choices(path, points):
    """The step and L(y_s) of each sample; adds its median and the share of switches to `points`.

    A sample switches if its choice differs from the last one. Samples without L(y_s) (mode cot)
    are left out. Raises UserError.
    """
    import numpy as np

    rows, before = array("d"), {}
    for where, record in progress(read_records(path), None, path.name, "line"):
        identity, reasons = record.get("id"), record.get("reasons")
        if not isinstance(identity, str) or not isinstance(reasons, bool):
            raise UserError(f"{where}: no 'id' or 'reasons'; did train.py --log-choices write it?")
        switch = reasons - before[identity] if identity in before else math.nan
        rows.extend((record["step"], number(record.get("plain_loss")), switch))
        before[identity] = reasons
    rows = np.array(rows).reshape(-1, 3)
    rows = rows[rows[:, 1] >= 0]
    count = min(STRETCHES, len(np.unique(rows[:, 0])))
    for part in np.array_split(rows, count) if count else []:
        steps, losses, switches = part.T
        points["median"].append((steps.mean(), np.median(losses)))
        again = switches[np.isfinite(switches)]
        if len(again):
            points["to_reasoning"].append((steps.mean(), 100 * (again == 1).mean()))
            points["back"].append((steps.mean(), 100 * (again == -1).mean()))
    return rows[:, :2]


def thin(points):
    """At most POINTS points, each the mean of a stretch of steps."""
    import numpy as np

    return [part.mean(0).tolist() for part in np.array_split(points, min(POINTS, len(points)))]


def summary(logs):
    """Where each run ended, the last points of its lines, as a table."""
    rows = ["run mode gamma steps minutes loss on_CoT F1@1 unseen tokens".split()]
    for log in logs:
        mode = one_line(log.settings.get("mode", "–"))
        gamma = one_line(log.settings.get("gamma", "–")) if mode == "dynamic" else "–"
        row = [log.name, mode, gamma, f"{log.steps:,.0f}", f"{log.minutes:,.1f}"]
        for quantity in ("loss", "cot_share", "all", "unseen", "generated"):
            value = log.lines.get(quantity, [(0, math.nan)])[-1][1]
            digits = 3 if quantity == "loss" else 1
            row.append(f"{value:.{digits}f}".replace("nan", "–"))
        rows.append(row)
    return lay_out(rows)


def draw_lines(axes, quantity, logs):
    """Draw a quantity over all runs; evaluations, which are few, with dots."""
    marker = "." if quantity in ("all", "unseen", "generated") else ""
    for index, log in enumerate(logs):
        x, y = zip(*log.lines.get(quantity, [(math.nan, math.nan)]), strict=True)
        color, dash = f"C{index % 10}", ("-", "--", ":", "-.")[index % 4]
        axes.plot(x, y, dash, color=color, marker=marker, label=log.name, clip_on=False)


def draw_losses(axes, log, last):
    """Draw the distribution of L(y_s) in each stretch of steps, its median, and gamma."""
    import numpy as np
    from matplotlib.colors import PowerNorm

    steps, losses = log.losses.T
    low = max(losses.min(), losses.max() / 1e6, 1e-6)
    width = math.ceil(last / STRETCHES)
    edges = np.arange(0.5, last + width, width), np.geomspace(low, max(2 * low, losses.max()), 60)
    stretch = np.digitize(steps, edges[0])
    shares = 1 / np.bincount(stretch)[stretch]
    colors = {"cmap": "Blues", "norm": PowerNorm(0.5), "cmin": 1e-9}
    axes.hist2d(steps, losses.clip(low), edges, weights=shares, **colors)
    axes.plot(*zip(*log.lines["median"], strict=True), color="black", label="median")
    gamma = number(log.settings.get("gamma"))
    if log.settings.get("mode") == "dynamic" and gamma > 0:
        axes.axhline(gamma, color="C3", linestyle="--", label=f"gamma {gamma:g}")
    axes.legend(loc="upper right", frameon=False)


def finish(axes, title, scale, last):
    """Give a chart its title and its axes, by the range of what was drawn."""
    from matplotlib.ticker import LogLocator

    low, high = axes.dataLim.intervaly
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step", loc="right")
    axes.set_xlim(0, last)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(min(0, low), 100 if scale == "percent" else None)
    if scale == "log" and high > 10 * low > 0:
        axes.set_yscale("log")
        axes.set_ylim(max(low, high / 1e6), high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:,.6g}")
    axes.tick_params(axis="y", which="both", length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.grid(axis="y", alpha=0.4)


def draw(logs):
    """A figure with a chart for each quantity, and one for each run's distribution of L(y_s)."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(panel[0] in log.lines for log in logs)]
    measured = [log for log in logs if len(log.losses)]
    rows = math.ceil((len(panels) + len(measured)) / 3)
    figure = Figure(figsize=(12, 2.7 * rows + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    last = max(log.steps for log in logs)
    charts = iter(figure.subplots(rows, 3, squeeze=False).flat)  # each loop takes the next ones
    for (quantity, title, scale), axes in zip(panels, charts, strict=False):
        draw_lines(axes, quantity, logs)
        finish(axes, title, scale, last)
    for log, axes in zip(measured, charts, strict=False):
        draw_losses(axes, log, last)
        finish(axes, f"L(yₛ) of the samples: {log.name}", "log", last)
    for axes in charts:
        axes.remove()
    names, lines = [log.name for log in logs], figure.axes[0].get_lines()
    figure.legend(lines, names, loc="outside upper left", ncols=3, frameon=False)
    return figure


def render(logs, suffix):
    """The picture as bytes; `suffix` is .png or .svg. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib import style
    except ImportError:
        raise UserError("matplotlib is not installed; run `pip install matplotlib`") from None
    content = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else None  # the same bytes every time
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name may be in any script
        draw(logs).savefig(content, format=suffix[1:], metadata=metadata)
    return content.getvalue()


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    runs = {"metavar": "RUN", "nargs": "+"}
    parser.add_argument("runs", help="a run's folder, train.py's --out", **runs)
    out = "the picture, a .png or .svg file"
    parser.add_argument("--out", metavar="FILE", default="curves.png", help=out)
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    out, folders = Path(args.out), list(map(Path, args.runs))
    check_out([out], [folder / file for folder in folders for file in FILES])
    if out.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"{out}: --out must end in .png or .svg")
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    names = map(one_line, names if len(set(names)) == len(names) else args.runs)
    names = [name if len(name) <= 32 else f"{name[:14]}…{name[-17:]}" for name in names]
    logs = list(map(read_log, folders, names))
    if not any(log.steps and log.lines for log in logs):
        raise UserError(f"{folders[0] / FILES[0]}: no training step in it yet; try again later")
    print(summary(logs))
    picture = render(logs, out.suffix.lower())
    with writing(out):
        write_atomic(out, picture)
    info(f"{out}: {', '.join(log.name for log in logs)}")


if __name__ == "__main__":
    run(main)
