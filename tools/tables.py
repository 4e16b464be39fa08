"""The tables of a study (see tools/study.py), from what its runs have left.

A group of cells is a line of a table: one mode on one data set, or on each of several.
"""

import statistics
from collections import defaultdict
from pathlib import Path

import torch

import data
import train
from evaluate import read_jsonl
from model import answer_loss, load, read_prompt
from support.console import info

CLASSES = ("All", "Present", "Absent", "Unseen")


def read(path):
    return [record for _, _, record in read_jsonl(path)] if Path(path).exists() else []


def steps_of(cell):
    """The lines of a cell's steps in its log."""
    return [line for line in read(cell.folder / "log.jsonl") if "loss" in line]


def training_seconds(cell):
    """The time of a cell's steps, without loading and validation."""
    return sum(line["seconds"] for line in steps_of(cell))


def section(groups, scores, compared, paper):
    """All tables of {label: cells}, with each cell's scores and those of compared pairs."""
    each = {f"{row}{c.args.suffix}": [c] for row, cells in groups.items() for c in cells}
    clubs = {row: cells for row, cells in groups.items() if cells[0].args.suffix}
    tables = [score_table(groups, scores, paper), kind_table(clubs, scores)]
    tables += [score_table(each, scores, paper)] if len(each) > len(groups) else []
    tables += [paired_table(compared, paper.get("measure", "F1@1")), law_table(clubs)]
    return "\n".join(filter(None, tables))


def markdown(titles, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (titles, *rows)]
    lines.insert(1, "|---" * len(titles) + "|")
    return "\n".join(lines) + "\n"


def spread(values, digits=1):
    """Mean and range of a figure over data sets, as text; a dash where there is none."""
    if not values:
        return "–"
    mean, low, high = (f"{of(values):.{digits}f}" for of in (statistics.mean, min, max))
    return mean if low == high else f"{mean} ({low}–{high})"


def percent(entries, measure):
    """A score with its 95% interval, of several data sets with its range; a dash without posts."""
    entries = [entry for entry in entries if entry["posts"]]
    if len(entries) != 1:
        return spread([100 * entry[measure] for entry in entries])
    low, high = (100 * end for end in entries[0]["interval"][measure])
    return f"{100 * entries[0][measure]:.1f} ({low:.1f}–{high:.1f})"


def score_table(groups, scores, paper):
    """A line for each group: {label: cells}; the paper's figures stand beside ours."""
    measure, figures = paper.get("measure", "F1@1"), paper.get("figures", {})
    known = [name for name in CLASSES if any(name in figures.get(row, {}) for row in groups)]
    lowest = ["lowest Unseen"] * any(len(cells) > 1 for cells in groups.values())
    titles = [measure, *CLASSES, *lowest, "tokens a post", "reasoned", "steps", "training"]
    titles += ["training time, sft = 1", *(f"{name}, paper's {paper['model']}" for name in known)]
    seconds = {cell: training_seconds(cell) for cells in groups.values() for cell in cells}
    sft = {cell.args.suffix: time for cell, time in seconds.items() if cell.mode == "sft"}
    lines = []
    for label, cells in groups.items():
        found = [scores[cell] for cell in cells]
        times = [seconds[cell] / sft[cell.args.suffix] for cell in cells if cell.args.suffix in sft]
        lines.append(
            [
                label,
                *(percent([entry[name.lower()] for entry in found], measure) for name in CLASSES),
                *(f"{100 * min(entry['unseen'][measure] for entry in found):.1f}" for _ in lowest),
                spread([entry["all"]["tokens"] for entry in found]),
                spread([100 * entry["all"]["reasoned"] for entry in found]) + "%",
                spread([len(steps_of(cell)) for cell in cells], 0),
                f"{statistics.mean(seconds[cell] for cell in cells) / 60:.1f} min",
                spread(times, 2),
                *(str(figures.get(label, {}).get(name, "–")) for name in known),
            ]
        )
    return markdown(titles, lines)


def kind_table(groups, scores):
    """The share of a club world's posts that are reasoned about, by kind; None without rows."""
    lines, shares = [], {}
    for label, cells in groups.items():
        shares = defaultdict(list)
        for cell in cells:
            for name in ("all", "unseen"):
                shares[name].append(100 * scores[cell][name]["reasoned"])
            thinks = {line["id"]: line["think"] is not None for line in read(cell.predictions)}
            kinds = {post["id"]: post["kind"] for post in read(cell.args.test)}
            for kind in sorted(set(kinds.values())):
                thought = [thinks[post] for post in kinds if kinds[post] == kind]
                shares[kind].append(100 * statistics.mean(thought))
        lines.append([label, *map(spread, shares.values())])
    return markdown(["reasoned, %", *shares], lines) if lines else None


def paired_table(compared, measure):
    """A cell minus another on the same posts: difference, interval, a star if p < 0.05.

    Over several data sets it is the mean difference, its range, and how often it has a star.
    """
    found = defaultdict(list)
    for (cell, other), scores in compared.items():
        found[f"{cell.row} − {other.row}"].append(scores)
    rows = []
    for label, scores in found.items():
        rows.append([label])
        for name in map(str.lower, CLASSES):
            entries = [s["against"][name][measure] for s in scores if s[name]["posts"]]
            rows[-1].append(signed(entries))
    return markdown([measure, *CLASSES], rows) if rows else None


def signed(entries):
    """evaluate.py's differences of two systems, one for each data set, as text."""
    if not entries:
        return "–"
    differences = [100 * entry["difference"] for entry in entries]
    stars = [entry["p"] < 0.05 for entry in entries]
    if len(entries) > 1:
        low, high, count = min(differences), max(differences), f", \\* in {sum(stars)}"
    else:
        (low, high), count = (100 * end for end in entries[0]["interval"]), " \\*" * stars[0]
    return f"{statistics.mean(differences):+.1f} ({low:+.1f} to {high:+.1f}){count}"


def law_table(groups):
    """How often models of the club worlds answer directly; None without rows."""
    rows = []
    for label, cells in groups.items():
        if cells[0].mode == "dynamic" and not cells[0].never:
            found = zip(*map(direct_answers, cells), strict=True)
            rows.append([label, *(spread(figures, 3) for figures in found)])
    titles = ["A to C", "L(y_s)", "p(y_s)", "exp(−gamma · n)", "p(direct)"]
    return markdown(titles, rows) if rows else None


@torch.no_grad()
def direct_answers(cell):
    """How a trained cell answers posts of kinds A to C that follow the training rules.

    Means over the posts of L(y_s), of p(y_s) = exp(-L(y_s) n), which settles at exp(-gamma n), n
    tokens of y_s with the end of turn, and of the probability that no <think> begins the answer.
    """
    posts = data.Posts(Path(cell.args.train).with_name("valid.jsonl"), for_training=True)
    easy = [i for i in range(len(posts)) if posts[i]["kind"] in "ABC" and not posts[i]["held_out"]]
    gamma = train.parse_args(cell.train_options()).gamma
    model, encoder, _ = load(str(cell.folder / "last"))
    encoded, found = data.EncodedPosts(posts, encoder, with_answers=True), []
    for _, batches in data.load_steps(encoded, [easy], 50):
        for batch in batches:
            prompt, n = read_prompt(model.eval(), batch.prompt), batch.plain.mask.sum(1)
            first = model.lm_head(prompt.last_hidden[:, 0]).softmax(-1)  # (B, vocabulary)
            loss = answer_loss(model, prompt, batch.plain)
            chances = torch.exp(-torch.stack([loss, batch.plain.threshold(gamma)]) * n)
            direct = 1 - first[:, encoder.tags["<think>"][0]]
            found.append(torch.stack([loss, *chances, direct]))
    return torch.cat(found, dim=1).mean(1).tolist()


def plot_tokens(groups, scores, path):
    """Draw F1@1 over the tokens of a post as a PNG, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        info(f"{path}: not drawn; pip install matplotlib")
        return
    groups = {row: cells for row, cells in groups.items() if not cells[0].never}

    def means(part, measure):
        found = ([scores[cell][part][measure] for cell in cells] for cells in groups.values())
        return list(map(statistics.mean, found))

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, tokens = figure.subplots(), means("all", "tokens")
    for name, marker in (("all", "o"), ("unseen", "^")):
        axes.plot(tokens, f1 := means(name, "F1@1"), marker, label=name)
    # Named at its unseen keyphrases, in turn above and below: near points don't share a place.
    for turn, (*place, row) in enumerate(sorted(zip(tokens, f1, groups, strict=True))):
        below = turn % 2 == 0 and place[1] > 0.5
        side = {"xytext": (0, -6), "ha": "right", "va": "top"} if below else {"xytext": (0, 6)}
        axes.annotate(row, place, textcoords="offset points", rotation=60, **side)
    axes.set(xlabel="tokens a post", ylabel="F1@1", xlim=(0, None), ylim=(0, 1.4))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
