"""What the study (tools/study.py) measures on the club worlds alone.

A step's time, for a comparison at equal training time; and how often a model that was trained with
some gamma answers directly, beside the law exp(-gamma n).
"""

import io
import json
import math
import shutil
import statistics
from pathlib import Path

import torch

from data import EncodedPosts, Posts, load_steps
from evaluate import UserError, read_jsonl
from model import answer_loss, load, read_prompt
from support.console import info, progress, read_json
from support.jsonl import write_atomic
from train import MODES

# ----------------------------------------------------------------------------------- training time


def step_seconds(out, cells, execute, rounds=3):
    """The time of a training step on this machine: {mode: (seconds, share of samples on CoT)}.

    Measured from the trained toy of each of `cells` ({mode: Cell}); where a mode chooses its
    targets also from the untrained one, with which no sample reasons yet. The modes take turns; the
    first 5 of a run's 20 steps don't count. The result is the median of the rounds' medians, kept
    in OUT/seconds.json.
    """
    path, probe = out / "seconds.json", out / "probe"
    measured = read_json(path) if path.exists() else {}
    starts = {mode: (cell, cell.folder / "last") for mode, cell in cells.items()}
    for mode, cell in cells.items():
        if MODES[mode].trains == "either":
            starts[f"{mode}, untrained"] = cell, cell.args.model
    found = {name: [] for name in starts if name not in measured}
    keys = ("seconds", "cot_share")
    for name in progress(rounds * [*found], rounds * len(found), "time of a step", "run"):
        shutil.rmtree(probe, ignore_errors=True)
        cell, model = starts[name]
        options = ["--model", model, "--out", probe, "--epochs", 20 / 450, "--lr", 1e-5]
        code, _ = execute("train.py", [*cell.train_options(), *options])
        if code:
            raise UserError(f"measuring the time of a step of {name} ended with {code}")
        steps = [line for _, _, line in read_jsonl(probe / "log.jsonl")][5:]
        found[name].append([statistics.median(line[key] for line in steps) for key in keys])
    shutil.rmtree(probe, ignore_errors=True)
    for name, pairs in found.items():
        measured[name] = [statistics.median(values) for values in zip(*pairs, strict=True)]
    write_atomic(path, json.dumps(measured, indent=1) + "\n")
    return measured


def training_seconds(cell, measured):
    """(steps, seconds) of a finished cell's training.

    A step of a mode that chooses takes longer the more samples reason: its seconds are interpolated
    between those measured from the untrained and from the trained toy.
    """
    if cell.mode == "zero-shot":
        return 0, 0
    lines = [line for _, _, line in read_jsonl(cell.folder / "log.jsonl")]
    shares = [line["cot_share"] for line in lines if "cot_share" in line]
    seconds, share = measured[cell.mode]
    if MODES[cell.mode].trains == "either":
        untrained, no_share = measured[f"{cell.mode}, untrained"]
        part = (statistics.mean(shares) - no_share) / max(share - no_share, 1e-9)
        seconds = untrained + (seconds - untrained) * part
    return len(shares), len(shares) * seconds


def equal_epochs(cell, measured, limit):
    """The epochs, to a hundredth, that fit into `limit` seconds; None where these are its own."""
    own = read_json(cell.folder / "settings.json")["epochs"]
    epochs = round(own * limit / training_seconds(cell, measured)[1], 2)
    return None if epochs == own else epochs


# ------------------------------------------------------------------------------------------- gamma


def law_rows(cells):
    """The titles and lines of a table of p(direct) beside the law, for cells with gammas."""
    lines = []
    for cell in cells:
        found = measure_direct(cell)
        lines.append(
            [cell.row + cell.args.name, *(f"{found[x]:.3f}" for x in ("loss", "p", "law"))]
        )
    return ["A to C", "L(y_s)", "p(direct)", "exp(−gamma · n)"], lines


def measure_direct(cell):
    """How a trained cell answers 200 posts of kinds A to C that follow the training rules.

    Means over the posts, kept in the cell's folder. p: the probability that the answer does not
    begin with <think>; loss: L(y_s); n: the tokens of y_s with the end of turn; law: exp(-gamma n).
    """
    path = cell.folder / "direct.json"
    if path.exists():
        return read_json(path)
    posts = Posts(Path(cell.args.train).with_name("valid.jsonl"), for_training=True)
    chosen = [index for index in range(len(posts)) if posts[index]["kind"] in "ABC"][:200]
    model, encoder, _ = load(str(cell.folder / "last"))
    found = []
    with torch.no_grad():
        for _, batches in load_steps(EncodedPosts(posts, encoder, True), [chosen], 50):
            for batch in batches:
                prompt = read_prompt(model.eval(), batch.prompt)
                first = model.lm_head(prompt.last_hidden[:, 0]).softmax(-1)  # (B, vocabulary)
                p, loss = (
                    1 - first[:, encoder.tags["<think>"][0]],
                    answer_loss(model, prompt, batch.plain),
                )
                n = batch.plain.mask.sum(1).float()  # (B,)
                found.append(torch.stack([p, loss, torch.exp(-cell.gamma * n), n]))
    values = torch.cat(found, dim=1).mean(1).tolist()
    result = dict(zip(("p", "loss", "law", "n"), values, strict=True))
    write_atomic(path, json.dumps(result) + "\n")
    return result


def plot_gamma(cells, path):
    """Draw p(direct) over gamma as a PNG: the law as a line, the measured values as dots."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        info(f"{path}: not drawn, because matplotlib is missing; pip install matplotlib")
        return
    rows = [(cell.gamma, measure_direct(cell)) for cell in cells]
    n = statistics.mean(found["n"] for _, found in rows)
    p = {gamma: found["p"] for gamma, found in rows if gamma < math.inf}
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
