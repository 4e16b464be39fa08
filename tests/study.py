"""The paper in miniature: every mode on the club worlds, at equal steps and at equal training time; then other gammas. By hand:

    python tests/study.py --out out/study                              # all of it; --at-once 2 where there are more cores
    python tests/study.py --modes sft dynamic --worlds 0 --gammas      # a part of it

A cell is one run of train.py in a folder of its own: OUT/MODE-WORLD, OUT/MODE-WORLD-EPOCHSepochs at equal training time,
OUT/dynamic-WORLD-gammaGAMMA. What is finished is not run again and what was stopped goes on, so the same command picks up
where it was left. It writes the README's tables to OUT/tables.md, and OUT/gamma.svg. The rules: test worlds are 0 to 4,
development worlds 100 and up; modes share world, order, seed and steps; the weights of the last step are what is scored.
"""

import argparse
import functools
import json
import math
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import data
from train import TOY

EPOCHS, GAMMA = 2, 0.4
MODES = ("sft", "multitask", "cot", "dynamic")
KINDS = "ABCDE"


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def script(name, *arguments):
    """Run one of the project's scripts; returns what it printed. Its errors and its progress are seen."""
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}; the same command goes on from here")
    return done.stdout


# ------------------------------------------------------------------------------------------------------ cells


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
        name += f"-gamma{self.gamma:g}" if self.gamma != GAMMA else ""
        return self.out / (name + (f"-{self.epochs:g}epochs" if self.epochs != EPOCHS else ""))

    @property
    def both(self):
        """Whether it learns both answers: what its plain ones are like is then worth a look."""
        return self.mode == "multitask" or self.mode == "dynamic" and 0 < self.gamma < math.inf

    @property
    def club(self):
        return self.out / f"clubworld-{self.world}"

    def run(self):
        """Train and score, unless that was done before, and score with <think> forbidden."""
        if not (self.folder / "test_scores.json").exists():
            resume = ["--resume"] if (self.folder / "settings.json").exists() else []
            script(
                "train.py",
                "--seed",
                self.world,
                "--mode",
                self.mode,
                "--gamma",
                self.gamma,
                "--epochs",
                self.epochs,
                "--out",
                self.folder,
                *resume,
            )
        if self.both:
            script(
                "infer.py",
                "--data",
                self.club / "test.jsonl",
                "--out",
                self.folder / "never_preds.jsonl",
                "--model",
                self.folder / "last",
                "--think",
                "never",
                "--batch-size",
                128,
                "--max-new-tokens",
                TOY["max_new_tokens"],
                "--workers",
                1,
            )

    def scores(self, predictions="test_preds.jsonl", *options):
        return json.loads(
            script(
                "evaluate.py",
                self.folder / predictions,
                self.club / "test.jsonl",
                "--train",
                self.club / "train.jsonl",
                "--json",
                *options,
            )
        )

    @functools.cache
    def figures(self):
        """What a row of the tables says of this cell: fractions, and tokens a post."""
        scores, posts = self.scores(), lines(self.club / "test.jsonl")
        thought = [
            prediction["think"] is not None
            for prediction in lines(self.folder / "test_preds.jsonl")
        ]
        row = {
            "All": scores["all"]["F1@1"],
            "Absent": scores["absent"]["F1@1"],
            "Unseen": scores["unseen"]["F1@1"],
            "tokens": scores["all"]["tokens"],
            "reasoned": scores["all"]["reasoned"],
            "reasoned, unseen": scores["unseen"]["reasoned"],
        }
        for kind in KINDS:
            row[f"reasoned, {kind}"] = statistics.mean(
                t for t, post in zip(thought, posts) if post["kind"] == kind
            )
        if self.both:
            direct = self.scores("never_preds.jsonl")
            row |= {
                "All, thinking forbidden": direct["all"]["F1@1"],
                "Unseen, thinking forbidden": direct["unseen"]["F1@1"],
            }
        return row


def run_all(cells, at_once):
    """Run the cells that are not finished, some at once; a world is written before the first of them wants it."""
    for club in sorted({cell.club for cell in cells}):
        script("clubworld.py", "--out", club, "--seed", club.name.partition("-")[2])
    with ThreadPoolExecutor(at_once) as pool:
        list(data.progress(pool.map(Cell.run, cells), len(cells), "cells", "cell"))


# -------------------------------------------------------------------------------------------- the price of a step


def step_seconds(out, modes, rounds=3):
    """What a training step takes on this machine: {mode: (seconds, share of samples on CoT)}, kept in OUT/seconds.json.

    Measured in turns on world 0, from each mode's trained toy, and for `dynamic` from the untrained one too, with which
    no sample reasons yet: 20 steps of which the first 5 don't count; the median of the rounds' medians.
    """
    path, club, probe = out / "seconds.json", out / "clubworld-0", out / "probe"
    measured = json.loads(path.read_text()) if path.exists() else {}
    starts = {mode: Cell(out, mode, 0).folder / "last" for mode in modes}
    starts |= {"dynamic, untrained": club / "toy"} if "dynamic" in modes else {}
    found = {name: [] for name in starts if name not in measured}
    for name in data.progress(rounds * [*found], rounds * len(found), "time of a step", "run"):
        shutil.rmtree(probe, ignore_errors=True)
        script(
            "train.py",
            "--train",
            club / "train.jsonl",
            "--model",
            starts[name],
            "--out",
            probe,
            "--mode",
            name.partition(",")[0],
            "--epochs",
            20 / 450,
            "--lr",
            1e-5,
            "--micro-batch",
            TOY["micro_batch"],
            "--workers",
            TOY["workers"],
        )
        steps = lines(probe / "log.jsonl")[5:]
        found[name].append(
            [statistics.median(line[key] for line in steps) for key in ("seconds", "cot_share")]
        )
    shutil.rmtree(probe, ignore_errors=True)
    measured |= {
        name: [statistics.median(values) for values in zip(*pairs)] for name, pairs in found.items()
    }
    data.write_whole(path, json.dumps(measured, indent=1) + "\n")
    return measured


def training_seconds(cell, measured):
    """(steps, seconds) that a finished cell's training takes; a step of `dynamic` the more, the more samples reason."""
    shares = [line["cot_share"] for line in lines(cell.folder / "log.jsonl") if "cot_share" in line]
    seconds, share = measured[cell.mode]
    if cell.mode == "dynamic":
        least, none = measured["dynamic, untrained"]
        seconds = least + (seconds - least) * (statistics.mean(shares) - none) / max(
            share - none, 1e-9
        )
    return len(shares), len(shares) * seconds


def equal_time(cells, measured):
    """Cells of as many epochs, to a hundredth, as train in the time that `sft` takes, going by the cells of equal steps."""
    steps, seconds = training_seconds(cells["sft"][0], measured)
    fitting = {
        mode: seconds / training_seconds(of_mode[0], measured)[1] for mode, of_mode in cells.items()
    }
    return {
        mode: [
            Cell(cell.out, mode, cell.world, epochs=round(EPOCHS * fitting[mode], 2))
            for cell in of_mode
        ]
        for mode, of_mode in cells.items()
    }


# ------------------------------------------------------------------------------------------------------- gamma


def direct(cell):
    """What the law of gamma is about, over 200 posts of kinds A to C which follow the training rules; kept in the cell.

    p: the mean probability that the answer does not begin with <think>; loss: the mean L(y_s); law: the mean of
    exp(-gamma n), n the number of tokens of y_s with the end of turn.
    """
    path = cell.folder / "direct.json"
    if path.exists():
        return json.loads(path.read_text())
    import torch

    from model import DynamicCoT, load

    posts = data.Posts(cell.club / "valid.jsonl", for_training=True)
    chosen = [index for index in range(len(posts)) if posts[index]["kind"] in "ABC"][:200]
    model, encoder, _ = load(str(cell.folder / (cell.folder / "last").read_text().strip()))
    step, found = DynamicCoT(model, "sft").eval(), []
    with torch.no_grad():
        for micro_batches, _ in data.Loader(posts, encoder, [chosen], 50, 0, True):
            for batch in micro_batches:
                prompt = step.read_prompt(batch.prompt)
                thinks = model.lm_head(prompt["last"][:, 0]).softmax(-1)[:, encoder.think[0]]
                n = batch.plain.mask.sum(1)
                found.append(
                    torch.stack(
                        [
                            1 - thinks,
                            step.answer_loss(prompt, batch.plain),
                            torch.exp(-cell.gamma * n),
                            n.float(),
                        ]
                    )
                )
    p, loss, law, n = torch.cat(found, dim=1).mean(1).tolist()
    result = {"p": p, "loss": loss, "law": law, "n": n}
    data.write_whole(path, json.dumps(result) + "\n")
    return result


def gamma_svg(rows):
    """The law as a line and the measured values as dots, on white."""
    from pages import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, tick_text

    n = statistics.mean(row["n"] for row in rows)
    highest = max((row["gamma"] for row in rows if row["gamma"] < math.inf), default=1)
    x, y = Axis(0, highest, LEFT, RIGHT - 6), Axis(0, 1, BOTTOM, TOP)
    grid = "".join(
        f'<path stroke="#ddd" d="M{LEFT} {y.place(t):.1f}H{RIGHT}"/><text x="{LEFT - 7}" y="{y.place(t):.1f}" '
        f'dy=".35em" text-anchor="end">{tick_text(t)}</text>'
        for t in y.ticks
    )
    grid += "".join(
        f'<text x="{x.place(t):.1f}" y="{BOTTOM + 17}" text-anchor="middle">{tick_text(t)}</text>'
        for t in x.ticks
    )
    line = " ".join(
        f"{x.place(g):.1f},{y.place(math.exp(-g * n)):.1f}"
        for g in (highest * i / 100 for i in range(101))
    )
    dots = "".join(
        f'<circle cx="{x.place(row["gamma"]):.1f}" cy="{y.place(row["p"]):.1f}" r="4" fill="#c2410c"/>'
        for row in rows
        if row["gamma"] < math.inf
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH * 3 // 2}"
  font-family="sans-serif" font-size="11" fill="#333">
<rect width="100%" height="100%" fill="white"/>
{grid}
<polyline fill="none" stroke="#2563eb" stroke-width="2" points="{line}"/>
{dots}
<text x="{RIGHT}" y="{HEIGHT - 5}" text-anchor="end">gamma</text>
<text x="{RIGHT - 8}" y="{TOP + 14}" text-anchor="end" fill="#2563eb">exp(−gamma · {n:.2f})</text>
<text x="{RIGHT - 8}" y="{TOP + 30}" text-anchor="end" fill="#c2410c">measured p(direct answer)</text>
</svg>
"""


# ------------------------------------------------------------------------------------------------------ tables


def markdown(titles, rows):
    return (
        "\n".join(
            [
                "| " + " | ".join(titles) + " |",
                "|---" * len(titles) + "|",
                *("| " + " | ".join(row) + " |" for row in rows),
            ]
        )
        + "\n"
    )


def spread(values, factor=100, digits=1):
    """Mean and range of a figure over worlds; a dash for one that a mode lacks."""
    if None in values:
        return "–"
    values = [factor * value for value in values]
    mean = f"{statistics.mean(values):.{digits}f}"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return mean if low == high else f"{mean} ({low}–{high})"


SCORES = ("All", "Absent", "Unseen", "All, thinking forbidden", "Unseen, thinking forbidden")
REASONED = ("reasoned", "reasoned, unseen", *(f"reasoned, {kind}" for kind in KINDS))


def mode_tables(cells, measured, unit):
    """Two tables of the modes' means and ranges over worlds: price and scores; how much of what is reasoned about.

    The unit of training time is the seconds of `sft` at equal steps.
    """
    scores, reasoned = [], []
    for mode, of_mode in cells.items():
        figures = [cell.figures() for cell in of_mode]
        column = lambda name, *how: spread([row.get(name) for row in figures], *how)
        steps, seconds = zip(*(training_seconds(cell, measured) for cell in of_mode))
        scores.append(
            [
                mode,
                str(steps[0]),
                spread(seconds, 1 / unit, 2),
                column("tokens", 1),
                *map(column, SCORES),
            ]
        )
        reasoned.append([mode, *(column(name) for name in REASONED)])
    return (
        markdown(["mode", "steps", "training time, sft = 1", "tokens a post", *SCORES], scores)
        + "\n"
        + markdown(["mode", *REASONED], reasoned)
    )


def world_table(cells):
    """Every cell's own F1@1: All / Unseen."""
    rows = []
    for mode, of_mode in cells.items():
        found = [cell.figures() for cell in of_mode]
        rows.append(
            [mode, *(f"{100 * row['All']:.1f} / {100 * row['Unseen']:.1f}" for row in found)]
        )
    return markdown(["mode", *(f"world {cell.world}" for cell in next(iter(cells.values())))], rows)


def paired_table(cells):
    """dynamic against each other mode on the same posts: the difference of F1@1, its 95% interval, a star where p < 0.05."""
    rows = []
    for mode in (mode for mode in cells if mode != "dynamic"):
        found = [
            cell.scores("test_preds.jsonl", "--against", other.folder / "test_preds.jsonl")[
                "against"
            ]
            for cell, other in zip(cells["dynamic"], cells[mode])
        ]
        for name in ("all", "unseen"):
            row = []
            for difference in (scores[name]["F1@1"] for scores in found):
                low, high = difference["interval"]
                row.append(
                    f"{100 * difference['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
                    + (" \\*" if difference["p"] < 0.05 else "")
                )
            rows.append([f"dynamic − {mode}", name, *row])
    return markdown(["F1@1", "posts", *(f"world {cell.world}" for cell in cells["dynamic"])], rows)


def gamma_table(cells):
    rows = [
        cell.figures() | direct(cell) | {"gamma": cell.gamma, "world": cell.world} for cell in cells
    ]
    shown = [
        [
            str(row["world"]),
            f"{row['gamma']:g}",
            *(f"{100 * row[name]:.1f}" for name in ("All", "Unseen")),
            f"{row['tokens']:.1f}",
            *(f"{100 * row[name]:.1f}" for name in ("reasoned", "reasoned, E")),
            f"{row['loss']:.3f}",
            f"{row['p']:.3f}",
            f"{row['law']:.3f}",
        ]
        for row in rows
    ]
    return rows, markdown(
        [
            "world",
            "gamma",
            "All",
            "Unseen",
            "tokens a post",
            "reasoned",
            "reasoned, E",
            "L(y_s), A to C",
            "p(direct), A to C",
            "exp(−gamma · n)",
        ],
        shown,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/study"), help="the folder of all cells")
    add("--modes", nargs="*", choices=MODES, default=MODES, help="modes on the test worlds")
    add("--worlds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="the test worlds")
    add(
        "--gammas",
        nargs="*",
        type=float,
        default=[0, 0.1, 0.2, 0.4, 0.8, math.inf],
        help="gammas on the development worlds",
    )
    add("--gamma-worlds", nargs="+", type=int, default=[100], help="the development worlds")
    add(
        "--at-once",
        type=data.count,
        default=1,
        help="runs at the same time, a core or two for each",
    )
    args = parser.parse_args()

    parts = []

    def tell(title, *tables):
        parts.append(f"### {title}\n\n" + "\n".join(tables))
        print(parts[-1], flush=True)
        data.write_whole(args.out / "tables.md", "\n".join(parts))

    args.out.mkdir(parents=True, exist_ok=True)
    if args.modes:
        cells = {
            mode: [Cell(args.out, mode, world) for world in args.worlds] for mode in args.modes
        }
        run_all(sum(cells.values(), []), args.at_once)
        if "sft" in cells and 0 in args.worlds:
            measured = step_seconds(args.out, args.modes)
            unit = training_seconds(cells["sft"][0], measured)[1]
            tell("Equal steps", mode_tables(cells, measured, unit), world_table(cells))
            timed = equal_time(cells, measured)
            run_all(sum(timed.values(), []), args.at_once)
            tell("Equal training time", mode_tables(timed, measured, unit), world_table(timed))
        else:
            timed = {}
            tell("Equal steps (training times want sft, and world 0)", world_table(cells))
        for title, some in (("steps", cells), ("training time", timed)):
            if "dynamic" in some and len(some) > 1:
                tell(f"Paired tests, equal {title}", paired_table(some))
    if args.gammas:
        cells = [
            Cell(args.out, "dynamic", world, gamma)
            for world in args.gamma_worlds
            for gamma in args.gammas
        ]
        run_all(cells, args.at_once)
        rows, table = gamma_table(cells)
        tell("Gamma", table)
        data.write_whole(args.out / "gamma.svg", gamma_svg(rows))


if __name__ == "__main__":
    main()
