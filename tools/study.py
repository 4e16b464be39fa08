"""The paper's table on any data: each row trains one model in another way on the same posts.

    python -m tools.study --train train.jsonl --valid valid.jsonl --test test.jsonl --model MODEL
    python -m tools.study … --rows sft dynamic --gammas 0.2 0.8 -- --batch-size 64 --lr 3e-5
    python -m tools.study … --launch "torchrun --nproc-per-node 8" --paper mmkp-v2
    python -m tools.study --out out/club --at-once 2       # no --train: the club worlds, in hours

What follows -- are settings of train.py. A row is a run of train.py, in a folder of its own under
--out, then infer.py on the test posts. The same command again skips what is finished and continues
what was stopped. The tables go to OUT/tables.md, all scores to OUT/scores.json.
"""

import argparse
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import data
import train
from evaluate import UserError, non_negative_int, plural, read_jsonl, run
from support.checkpoint import changed_settings, read_pointer
from support.console import (
    ArgumentParser,
    fraction,
    info,
    non_negative_number,
    number,
    number_or_inf,
    positive_int,
    read_json,
)
from support.jsonl import locked, write_atomic
from tools import clubstudy, memory
from tools.clubworld import TOY_DEFAULTS, write_beside
from tools.plan import ROOT, Cell, commands, pairs

ROWS = ("zero-shot", *train.MODES)
CLASSES = ("All", "Present", "Absent", "Unseen")
PAPER = Path(__file__).parent / "paper.json"
LARGE = 4e9  # parameters from which the paper trains 3 epochs, not 5
GOES_ON = "the same command goes on from here"

# ------------------------------------------------------------------------------------ running them


def execute(script, options, launch=""):
    """Run one of the scripts, whose progress is shown; returns (exit code, what it printed).

    Ctrl-C reaches the script by itself, which then saves what it has; SIGTERM is passed on to it.
    """
    command = [*(shlex.split(launch) or [sys.executable]), ROOT / script, *options]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    handlers = {signal.SIGINT: lambda *_: None}
    handlers[signal.SIGTERM] = lambda number, _: process.send_signal(number)
    if threading.current_thread() is not threading.main_thread():  # of several at once
        handlers = {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        printed, _ = process.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return process.returncode, printed


def read(path):
    return [record for _, _, record in read_jsonl(path)] if Path(path).exists() else []


def is_trained(cell):
    """Whether a cell's training is finished. Raises UserError if it had other settings or posts."""
    options, posts = train.parse_args(cell.train_options()), cell.args.posts
    if not (cell.folder / "last").is_file():
        return False
    if changed := changed_settings(cell.folder, train.run_settings(options, posts)):
        raise UserError(
            f"{cell.folder}: was trained with other settings: {', '.join(changed.values())}; "
            "choose another --out"
        )
    order = data.TrainingOrder(len(posts), options.batch_size, options.seed, options.epochs)
    if read_pointer(cell.folder / "last").name != f"step-{len(order)}":
        return False
    evaluated = [line["step"] for line in read(cell.folder / "log.jsonl") if "valid" in line]
    return not options.valid or len(order) in evaluated


def train_cell(cell):
    """Train a cell, unless that is done; a stopped training is resumed."""
    if cell.mode == "zero-shot" or cell.never or is_trained(cell):
        return
    info(f"{cell.row}: training, in {cell.folder}")
    resume = ["--resume"] if (cell.folder / "settings.json").exists() else []
    code, _ = execute("train.py", [*cell.train_options(), *resume], cell.args.launch)
    if code:
        raise UserError(f"the training of {cell.row} ended with {code}; {GOES_ON}")


def predict_cell(cell):
    """Predict the test posts, which infer.py continues; its time is added to seconds.json."""
    out = cell.predictions
    info(f"{cell.row}: predicting, in {out}")
    before, started = out.exists() and out.stat().st_mtime_ns, time.perf_counter()
    code, _ = execute("infer.py", cell.infer_options())
    if out.exists() and out.stat().st_mtime_ns != before:
        seconds = time.perf_counter() - started + inference_seconds(cell)
        write_atomic(seconds_file(cell), json.dumps({"infer": seconds}) + "\n")
    found = read(out)
    refused = code and not any("error" in line for line in found)  # else some posts failed
    if len(found) < len(cell.args.test_posts) or refused:
        name = cell.infer_options()[3]
        server = f" (the server must have the model as {name})" if cell.args.base_url else ""
        raise UserError(f"the inference of {cell.row} ended with {code}{server}; {GOES_ON}")


def run_all(cells, at_once):
    """Train and predict the cells that are not finished, `at_once` of them at a time."""
    jobs = [(job, cell) for cell in cells for job in (train_cell, predict_cell)]
    if any(cell.args.base_url for cell in cells):  # a server needs the GPUs that trained
        jobs.sort(key=lambda job: job[0] is predict_cell)
    if at_once == 1:
        for job, cell in jobs:
            job(cell)
        return
    with ThreadPoolExecutor(at_once) as pool:  # what forbids reasoning needs what is trained
        for job in (train_cell, predict_cell):
            list(pool.map(job, cells))


def seconds_file(cell):
    return cell.folder / cell.predictions.name.replace("preds.jsonl", "seconds.json")


def inference_seconds(cell):
    file = seconds_file(cell)
    return read_json(file)["infer"] if file.exists() else 0


def scores_of(cell, other=None):
    """evaluate.py's scores of a cell, or of its comparison with another one."""
    code, printed = execute("evaluate.py", cell.score_options(other))
    if code:
        raise UserError(f"the scores of {cell.row} failed; {GOES_ON}")
    return json.loads(printed)


# ------------------------------------------------------------------------------------------ tables
# A group of cells is a line of a table: one mode on one data set, or on each of several.


class Report:
    """OUT/tables.md, which grows by a section whenever its tables are ready."""

    def __init__(self, path):
        self.path, self.sections = path, []

    def add(self, title, *tables):
        self.sections.append(f"### {title}\n\n" + "\n".join(filter(None, tables)))
        print(self.sections[-1], flush=True)
        write_atomic(self.path, "\n".join(self.sections))


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


def minutes(seconds):
    return f"{statistics.mean(seconds) / 60:.1f} min" if any(seconds) else "–"


def steps_of(cell):
    """The lines of a cell's steps in its log."""
    return [line for line in read(cell.folder / "log.jsonl") if "loss" in line]


def training_seconds(cell):
    """The time of a cell's steps, without loading and validation."""
    return sum(line["seconds"] for line in steps_of(cell))


def score_table(groups, scores, paper, times=None):
    """A line for each group: {label: cells}; the paper's figures stand beside ours.

    times: of the club worlds, {cell: training time as a multiple of sft's}.
    """
    measure, figures = paper.get("measure", "F1@1"), paper.get("figures", {})
    known = [name for name in CLASSES if any(name in figures.get(row, {}) for row in groups)]
    titles = [measure, *CLASSES, "tokens a post", "reasoned", "training", "inference"]
    titles += ["steps", "training time, sft = 1"] if times else []
    titles += [f"{name}, paper's {paper['model']}" for name in known]
    lines = []
    for label, cells in groups.items():
        of_cells = [scores[cell] for cell in cells]
        line = [label, *(percent([s[name.lower()] for s in of_cells], measure) for name in CLASSES)]
        line += [spread([s["all"]["tokens"] for s in of_cells])]
        line += [spread([100 * s["all"]["reasoned"] for s in of_cells]) + "%"]
        line += [minutes([*map(of, cells)]) for of in (training_seconds, inference_seconds)]
        if times:
            line += [str(len(steps_of(cells[0]))), spread([times[cell] for cell in cells], 2)]
        lines.append([*line, *(str(figures.get(label, {}).get(name, "–")) for name in known)])
    return markdown(titles, lines)


def kind_table(groups, scores):
    """The share of posts that are reasoned about, by their field "kind"; None without kinds."""
    tests = {cell.args.test for cells in groups.values() for cell in cells}
    kinds = sorted({post["kind"] for test in tests for post in read(test) if "kind" in post})
    if not kinds:
        return None
    lines = []
    for label, cells in groups.items():
        if cells[0].never:
            continue
        shares = {kind: [] for kind in ("all", "unseen", *kinds)}
        for cell in cells:
            for name in ("all", "unseen"):
                shares[name].append(100 * scores[cell][name]["reasoned"])
            thinks = {line["id"]: line["think"] is not None for line in read(cell.predictions)}
            for kind in kinds:
                posts = [post for post in read(cell.args.test) if post.get("kind") == kind]
                shares[kind].append(100 * statistics.mean(thinks[post["id"]] for post in posts))
        lines.append([label, *map(spread, shares.values())])
    return markdown(["reasoned, %", *shares], lines)


def paired_table(cells, measure):
    """dynamic minus each other mode on the same posts: difference, interval, a star if p < 0.05."""
    lines = []
    for cell, other in pairs(cells):
        found = scores_of(cell, other)
        differences = [
            signed(found["against"][name.lower()][measure]) if found[name.lower()]["posts"] else "–"
            for name in CLASSES
        ]
        lines.append([f"dynamic − {other.mode}{cell.args.name}", *differences])
    return markdown([measure, *CLASSES], lines)


def signed(difference):
    """evaluate.py's difference of two systems as text."""
    mean = 100 * difference["difference"]
    low, high = (100 * end for end in difference["interval"])
    star = " \\*" if difference["p"] < 0.05 else ""
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}){star}"


# --------------------------------------------------------------------------------------- the study


def data_sets(args, worlds):
    """The settings with the files of each data set: one's own, or those of the club worlds."""
    sets = [argparse.Namespace(**vars(args))] if args.train else []
    toy = [(f"--{name.replace('_', '-')}", str(x)) for name, x in TOY_DEFAULTS.items()]
    for world in [] if args.train else worlds:
        changes = write_beside(args.out / "tables.md", world)
        changes |= {"defaults": [*sum(toy, ()), "--seed", str(world)], "valid": None}
        changes |= {"infer": f"--batch-size 128 {args.infer}", "suffix": f"-{world}"}
        sets.append(argparse.Namespace(**vars(args) | changes | {"name": f", world {world}"}))
    for one in sets:
        info(f"reading {one.train} and {one.test}")
        one.posts, one.test_posts = data.Posts(one.train, for_training=True), data.Posts(one.test)
        for row in args.rows:
            if row != "zero-shot":
                train.check_reasoning(one.posts, row)
    return sets


def mode_groups(args, sets, epochs=None):
    """{row: cells}, on the club worlds also with reasoning forbidden where both are learned."""
    groups = {}
    for mode in args.rows:
        groups[mode] = [Cell(one, mode, epochs=(epochs or {}).get(mode)) for one in sets]
        if (
            not args.train
            and mode != "zero-shot"
            and train.MODES[mode].trains in ("both", "either")
        ):
            groups[f"{mode}-never"] = [replace(cell, never=True) for cell in groups[mode]]
    return groups


def add_tables(report, title, groups, paper, times=None):
    """Score the groups and add their tables; returns {cell: scores}."""
    cells = sum(groups.values(), [])
    scores = {cell: scores_of(cell) for cell in cells}
    tables = [score_table(groups, scores, paper, times), kind_table(groups, scores)]
    if len(cells) > len(groups):
        each = {f"{label}{c.args.name}": [c] for label, group in groups.items() for c in group}
        tables.append(score_table(each, scores, {}, times))
    report.add(title, *tables)
    return scores


def study(args, report):
    """Run what is not finished, then write the tables."""
    sets = data_sets(args, args.worlds)
    groups = mode_groups(args, sets)
    gamma_sets = sets if args.train else data_sets(args, args.gamma_worlds) if args.gammas else []
    gammas = {
        f"dynamic-gamma{gamma:g}": [Cell(one, "dynamic", gamma) for one in gamma_sets]
        for gamma in args.gammas
    }
    measure, scores = args.paper_data.get("measure", "F1@1"), {}
    if args.train:
        count = plural(len(sets[0].test_posts), "post")
        run_all(sum([*groups.values(), *gammas.values()], []), args.at_once)
        parts = [(f"{args.model} on {args.test}, {count}", "Paired tests", groups, None)]
    else:
        run_all(sum(groups.values(), []), args.at_once)
        parts = list(club_parts(args, sets, groups))
    for title, paired, some, times in parts:
        scores |= add_tables(report, title, some, args.paper_data, times)
        if pairs(cells := sum(some.values(), [])):
            report.add(paired, paired_table(cells, measure))
    if gammas:
        if not args.train:
            run_all(sum(gammas.values(), []), args.at_once)
        own = {row: groups[row] for row in ("dynamic",) if args.train and row in groups}
        scores |= add_tables(report, "Other gammas", own | gammas, {})
        if not args.train:
            cells = sum(gammas.values(), [])
            report.add("Gamma and p(direct)", markdown(*clubstudy.law_rows(cells)))
            clubstudy.plot_gamma(cells, args.out / "gamma.png")
    by_name = {cell.row + cell.args.suffix: found for cell, found in scores.items()}
    write_atomic(args.out / "scores.json", json.dumps(by_name, indent=1) + "\n")


def club_parts(args, sets, groups):
    """(title, title of the paired tests, groups, times) of the club worlds' parts.

    The modes are compared at equal steps and, where sft is among them, at equal training time.
    """
    cells = sum(groups.values(), [])
    if not cells:
        return
    if "sft" not in groups:
        yield "Equal steps", "Paired tests, equal steps", groups, None
        return
    first = {mode: groups[mode][0] for mode in args.rows if mode != "zero-shot"}
    measured = clubstudy.step_seconds(args.out, first, execute)
    _, unit = clubstudy.training_seconds(first["sft"], measured)

    def times(cells):
        return {c: clubstudy.training_seconds(c, measured)[1] / unit for c in cells}

    yield "Equal steps", "Paired tests, equal steps", groups, times(cells)
    epochs = {mode: clubstudy.equal_epochs(cell, measured, unit) for mode, cell in first.items()}
    timed = mode_groups(args, sets, epochs)
    run_all(cells := sum(timed.values(), []), args.at_once)
    yield "Equal training time", "Paired tests, equal training time", timed, times(cells)


# -------------------------------------------------------------------------------- the command line


def parse_args(arguments=None):
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/study"), help="the folder of all rows")
    rows_help = "rows of the table (default: all; on the club worlds without zero-shot)"
    add("--rows", nargs="*", choices=ROWS, help=rows_help)
    gammas_help = "also train dynamic with these gammas (default: six on the club worlds)"
    add("--gammas", nargs="*", type=number_or_inf, help=gammas_help)
    add("--infer", default="", help="more settings of infer.py, such as '--batch-size 64'")
    add("--at-once", type=positive_int, default=1, help="runs at a time, which share the cores")
    add = parser.add_argument_group("your data").add_argument
    add("--train", metavar="FILE", help="posts to train on (JSONL)")
    add("--valid", metavar="FILE", help="posts to validate on; the best checkpoint is then scored")
    add("--test", metavar="FILE", help="posts to predict and score")
    add("--model", help="folder or hub name of a Qwen-VL model")
    paper_help = "the paper's figures beside ours, its settings as defaults"
    add("--paper", choices=read_json(PAPER)["data"], help=paper_help)
    add("--launch", default="", help="starts train.py, such as 'torchrun --nproc-per-node 8'")
    add("--base-url", help="predict through the server at this address (see docs/serving.md)")
    add = parser.add_argument_group("the club worlds").add_argument
    worlds = {"nargs": "*", "type": non_negative_int}
    add("--worlds", **worlds, default=[0, 1, 2, 3, 4], help="seeds of the test worlds")
    add("--gamma-worlds", **worlds, default=[100], help="seeds of the development worlds")
    add_plan_options(parser.add_argument_group("on paper").add_argument)
    args = parser.parse_args(arguments[:end])
    args.settings = arguments[end + 1 :]
    if args.paper and args.dry_run and args.train is None:
        args.train, args.valid, args.test = "train.jsonl", "valid.jsonl", "test.jsonl"
    if args.rows is None:
        args.rows = ROWS if args.train else ROWS[1:]
    if args.gammas is None:
        args.gammas = [] if args.train else [0, 0.1, 0.2, 0.4, 0.8, math.inf]
    args.suffix, args.name, args.paper_data, args.defaults = "", "", {}, []
    return args


def add_plan_options(add):
    """The settings of --dry-run."""
    add("--dry-run", action="store_true", help="print all commands and what they cost; run none")
    add("--cot-share", type=fraction, default=1, help="share of dynamic's posts that reason")
    share, price = number("a share above 0", lambda x: 0 < x <= 1), non_negative_number
    several = [
        ("--posts", "TRAIN TEST", positive_int, None, "posts, where there are no files"),
        ("--lengths", "TEXT IMAGE PLAIN COT", positive_int, None, "average tokens of their parts"),
        ("--utilization", "TRAIN GENERATE", share, [0.4, 0.01], "assumed shares of a GPU's peak"),
        ("--price", "IN OUT", price, None, "the teacher's prices of a million tokens"),
    ]
    for flag, names, kind, default, text in several:
        names = tuple(names.split())
        add(flag, nargs=len(names), metavar=names, type=kind, default=default, help=text)


def check_args(args):
    """Raise UserError for what does not go together; apply the paper's settings."""
    if not args.train and (args.dry_run or args.test or args.model or args.paper):
        raise UserError("--train is missing; without it, --test, --model and --paper: club worlds")
    for name in ("model", "test"):
        if args.train and getattr(args, name) is None:
            raise UserError(f"--{name} is missing: with --train it is needed, too")
    if args.paper:
        paper = read_json(PAPER)
        args.paper_data = {"model": paper["model"], **paper["data"][args.paper]}
        size = memory.count_parameters(memory.read_model(args.model)[0]).total
        epochs = "5" if size < LARGE else "3"
        args.defaults = ["--lr", str(args.paper_data["lr"]), "--epochs", epochs, "--gamma", "0.4"]
    own = {"--mode", "--train", "--valid", "--test", "--model", "--out", "--resume"}
    if taken := own.intersection(args.settings):
        raise UserError(f"{min(taken)} can't stand after --: this tool sets it for each row")
    if any(setting.startswith("--map") for setting in args.settings):
        raise UserError(
            "--map can't stand after --: evaluate.py reads our names only; python -m tools.dataset "
            "rename writes them"
        )
    if args.at_once > 1:  # else threads of one run would wait for those of another
        threads = max(1, (os.cpu_count() or 1) // args.at_once)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def main():
    args = parse_args()
    check_args(args)
    if args.dry_run:
        cells = [Cell(args, row) for row in args.rows]
        cells += [Cell(args, "dynamic", gamma) for gamma in args.gammas]
        print(*commands(args, cells), sep="\n")
        return
    report = Report(args.out / "tables.md")
    with locked(report.path):
        study(args, report)
    info(f"{report.path}: the tables")


if __name__ == "__main__":
    run(main)
