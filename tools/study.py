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
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

import data
import train
from evaluate import UserError, non_negative_int, plural, read_jsonl, run
from model import answer_loss, load, read_prompt
from support.checkpoint import changed_settings, read_pointer
from support.console import (
    ArgumentParser,
    fraction,
    gamma_or_auto,
    info,
    non_negative_number,
    number,
    positive_int,
    read_json,
)
from support.jsonl import locked, write_atomic
from tools import memory
from tools.clubworld import TOY_DEFAULTS, write_beside
from tools.plan import ROOT, Cell, commands, pairs

ROWS = ("zero-shot", *train.MODES)
LEARN_BOTH = [name for name, mode in train.MODES.items() if mode.trains in ("both", "either")]
CLASSES = ("All", "Present", "Absent", "Unseen")
PAPER = Path(__file__).parent / "paper.json"
LARGE = 4e9  # parameters from which the paper trains 3 epochs, not 5
GOES_ON = "the same command goes on from here, once the cause is removed"

# ------------------------------------------------------------------------------------ running them

running = set()  # the processes of scripts


def execute(script, options, launch=""):
    """Run one of the scripts, whose progress is shown; returns (exit code, what it printed)."""
    command = [*(shlex.split(launch) or [sys.executable]), ROOT / script, *options]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    running.add(process)
    try:
        printed, _ = process.communicate()
    finally:
        process.wait()  # Ctrl-C and `stop` have reached it: it saves what it has
        running.discard(process)
    return process.returncode, printed


def stop(*_):
    """On SIGTERM: pass it on to the scripts, and leave when they have."""
    for process in list(running):
        process.terminate()
    sys.exit(128 + signal.SIGTERM)


def read(path):
    return [record for _, _, record in read_jsonl(path)] if Path(path).exists() else []


def is_trained(cell):
    """Whether a cell's training is finished, with these settings and posts."""
    if not (cell.folder / "last").is_file():
        return False
    options, posts = train.parse_args(cell.train_options()), cell.args.posts
    if changed_settings(cell.folder, train.run_settings(options, posts), train.FREE_TO_CHANGE):
        return False  # train.py refuses to resume it, and names them
    steps = len(data.TrainingOrder(len(posts), options.batch_size, options.seed, options.epochs))
    evaluated = [line["step"] for line in read(cell.folder / "log.jsonl") if "valid" in line]
    is_whole = read_pointer(cell.folder / "last").name == f"step-{steps}"
    return is_whole and (not options.valid or steps in evaluated)


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
    """Predict the test posts; infer.py continues what it has."""
    info(f"{cell.row}: predicting, in {cell.predictions}")
    code, _ = execute("infer.py", cell.infer_options())
    found = read(cell.predictions)
    refused = code and not any("error" in line for line in found)  # else some posts failed
    if len(found) < len(cell.args.test_posts) or refused:
        raise UserError(f"the inference of {cell.row} ended with {code}; {GOES_ON}")


def run_all(cells, args):
    """Train and predict the cells that are not finished, `--at-once` of them at a time."""
    apart = args.at_once == 1 and not args.base_url  # a server needs the GPUs that trained
    with ThreadPoolExecutor(args.at_once) as pool:
        run_each = map if args.at_once == 1 else pool.map  # a map ends with the first error
        for some in [[cell] for cell in cells] if apart else [cells]:
            for job in (train_cell, predict_cell):
                list(run_each(job, some))


def scores_of(cell, other=None):
    """evaluate.py's scores of a cell, or of its comparison with another one."""
    code, printed = execute("evaluate.py", cell.score_options(other))
    if code:
        raise UserError(f"the scores of {cell.row} failed; {GOES_ON}")
    return json.loads(printed)


def steps_of(cell):
    """The lines of a cell's steps in its log."""
    return [line for line in read(cell.folder / "log.jsonl") if "loss" in line]


def training_seconds(cell):
    """The time of a cell's steps, without loading and validation."""
    return sum(line["seconds"] for line in steps_of(cell))


# ------------------------------------------------------------------------------------------ tables
# A group of cells is a line of a table: one mode on one data set, or on each of several.


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
    """The share of posts that are reasoned about, by their field "kind"; None without kinds."""
    lines, shares = [], {}
    for label, cells in groups.items():
        shares = defaultdict(list)
        for cell in cells:
            for name in ("all", "unseen"):
                shares[name].append(100 * scores[cell][name]["reasoned"])
            thinks = {line["id"]: line["think"] is not None for line in read(cell.predictions)}
            kinds = {post["id"]: post["kind"] for post in read(cell.args.test) if "kind" in post}
            for kind in sorted(set(kinds.values())):
                thought = [thinks[post] for post in kinds if kinds[post] == kind]
                shares[kind].append(100 * statistics.mean(thought))
        lines.append([label, *map(spread, shares.values())])
    return markdown(["reasoned, %", *shares], lines) if len(shares) > 2 else None


def paired_table(compared, measure):
    """A cell minus another on the same posts: difference, interval, a star if p < 0.05.

    Over several data sets it is the mean difference, its range, and how often it has a star.
    """
    found = defaultdict(list)
    for (cell, other), scores in compared.items():
        found[f"{cell.row} − {other.row}"].append(scores.result())
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
    """How often models of the club worlds answer directly, beside what their gamma says."""
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
    easy = [i for i in range(len(posts)) if posts[i]["kind"] in "ABC"]
    easy = [i for i in easy if not posts[i]["held_out"]]
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
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, marker in (("all", "o"), ("unseen", "^")):
        points = [
            [
                statistics.mean(scores[cell][part][measure] for cell in cells)
                for cells in groups.values()
            ]
            for part, measure in (("all", "tokens"), (name, "F1@1"))
        ]
        axes.plot(*points, marker, label=name)
    # Named at its unseen keyphrases, in turn above and below: near points don't share a place.
    for turn, (*place, row) in enumerate(sorted(zip(*points, groups, strict=True))):
        side = {"xytext": (0, 6)} if turn % 2 else {"xytext": (0, -6), "ha": "right", "va": "top"}
        axes.annotate(row, place, textcoords="offset points", rotation=60, **side)
    axes.set(xlabel="tokens a post", ylabel="F1@1", xlim=(0, None), ylim=(0, 1.4))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


# --------------------------------------------------------------------------------------- the study


def data_sets(args, worlds):
    """The settings with the files of each data set: one's own, or those of the club worlds."""
    sets = [args] if args.train else [club_world(args, seed) for seed in worlds]
    for one in sets:
        info(f"reading {one.train} and {one.test}")
        one.posts, one.test_posts = data.Posts(one.train, for_training=True), data.Posts(one.test)
        for row in args.rows:
            if row != "zero-shot":
                train.check_reasoning(one.posts, row)
    return sets


def club_world(args, seed):
    """The settings of a club world, which is written beside --out."""
    toy = [f"--{name.replace('_', '-')}={value}" for name, value in TOY_DEFAULTS.items()]
    changes = write_beside(args.out / "tables.md", seed) | {"valid": None, "suffix": f"-{seed}"}
    changes |= {"defaults": [*toy, f"--seed={seed}"], "infer": f"--batch-size 128 {args.infer}"}
    return argparse.Namespace(**vars(args) | changes)


def mode_groups(args, sets, epochs):
    """{row: cells}, on the club worlds also with reasoning forbidden where both are learned."""
    groups = {}
    for mode in args.rows:
        groups[mode] = [Cell(one, mode, epochs=epochs.get(mode)) for one in sets]
        if mode in LEARN_BOTH and not args.train:
            groups[f"{mode}-never"] = [replace(cell, never=True) for cell in groups[mode]]
    for value in [] if epochs else args.gammas:
        groups[f"dynamic-gamma{value}"] = [Cell(one, "dynamic", value) for one in sets]
    return groups


def equal_epochs(groups):
    """{mode: epochs, to a hundredth, that train in the time that sft takes for its own}."""
    seconds = {row: sum(map(training_seconds, cells)) for row, cells in groups.items()}
    own = read_json(groups["sft"][0].folder / "settings.json")["epochs"]
    others = [mode for mode in train.MODES if mode in groups and mode != "sft"]
    return {mode: round(own * seconds["sft"] / seconds[mode], 2) for mode in others}


def parts(args):
    """Yield (title, {row: cells}) of each part, which is trained before the next is asked for.

    The club worlds are compared at equal steps, and where sft is among the rows also at equal
    training time.
    """
    sets = data_sets(args, args.worlds)
    groups = mode_groups(args, sets, {})
    if args.train:
        yield f"{args.model} on {args.test}, {plural(len(sets[0].test_posts), 'post')}", groups
        return
    yield "Equal steps", groups
    if groups.get("sft"):
        yield "Equal training time", mode_groups(args, sets, equal_epochs(groups))


def study(args):
    """Run what is not finished; yield the sections of OUT/tables.md, then write the scores."""
    by_name, paper = {}, args.paper_data
    for title, groups in parts(args):
        cells = sum(groups.values(), [])
        if not cells:
            continue
        run_all(cells, args)
        with ThreadPoolExecutor(args.at_once) as pool:
            scores = dict(zip(cells, pool.map(scores_of, cells), strict=True))
            compared = {pair: pool.submit(scores_of, *pair) for pair in pairs(cells)}
        tables = [score_table(groups, scores, paper), kind_table(groups, scores)]
        if len(cells) > len(groups):
            each = {f"{row}{c.args.suffix}": [c] for row, group in groups.items() for c in group}
            tables.append(score_table(each, scores, paper))
        tables.append(paired_table(compared, paper.get("measure", "F1@1")))
        if not args.train:
            tables.append(law_table(groups))
        if not by_name:
            plot_tokens(groups, scores, args.out / "tokens.png")
        note = f"{args.paper_note}\n\n" if args.paper_note else ""
        yield f"### {title}\n\n{note}" + "\n".join(filter(None, tables))
        by_name |= {cell.row + cell.args.suffix: found for cell, found in scores.items()}
    write_atomic(args.out / "scores.json", json.dumps(by_name, indent=1) + "\n")


# -------------------------------------------------------------------------------- the command line


def parse_args(arguments=None):
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/study"), help="the folder of all rows")
    own = [row for row in ROWS if row != "dropout"]  # of the paper
    add("--rows", nargs="*", choices=ROWS, default=own, help="rows (default: the paper's)")
    gammas_help = "also train dynamic with these gammas (default: four on the club worlds)"
    add("--gammas", nargs="*", type=gamma_or_auto, help=gammas_help)
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
    add(
        "--worlds",
        nargs="*",
        type=non_negative_int,
        default=range(10),
        help="seeds of the worlds (default: 0 to 9)",
    )
    add_plan_options(parser.add_argument_group("on paper").add_argument)
    args = parser.parse_args(arguments[:end])
    args.settings = arguments[end + 1 :]
    if args.paper and args.dry_run and args.train is None:
        args.train, args.valid, args.test = "train.jsonl", "valid.jsonl", "test.jsonl"
    if args.gammas is None:
        args.gammas = [] if args.train else [0.1, 0.2, 0.8, "auto"]
    args.suffix, args.paper_data, args.paper_note, args.defaults = "", {}, None, []
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
        ("--price", "IN OUT", price, [0, 0], "the teacher's prices of a million tokens"),
    ]
    for flag, names, kind, default, text in several:
        names = tuple(names.split())
        add(flag, nargs=len(names), metavar=names, type=kind, default=default, help=text)


def check_args(args):
    """Raise UserError for what does not go together; apply the paper's settings."""
    if not args.train and (args.dry_run or args.test or args.model or args.paper):
        raise UserError("--train is missing; the club worlds go without --test, --model, --paper")
    if args.train and not (args.model and args.test):
        raise UserError("--model or --test is missing: with --train both are needed")
    if args.paper:
        paper = read_json(PAPER)
        args.paper_data = {"model": paper["model"], **paper["data"][args.paper]}
        models = (args.model, f"Qwen/{paper['model']}-Instruct")
        size, papers = (
            memory.count_parameters(memory.read_model(name)[0]).total for name in models
        )
        if size != papers:
            args.paper_note = (
                f"The paper's figures are those of {paper['model']}: it has none for a model of "
                f"{size / 1e9:.3f} billion parameters."
            )
        epochs = "5" if size < LARGE else "3"
        args.defaults = ["--lr", str(args.paper_data["lr"]), "--epochs", epochs, "--gamma", "0.4"]
    # evaluate.py reads our field names only.
    own = {"--mode", "--train", "--valid", "--test", "--model", "--out", "--resume", "--map"}
    if taken := own.intersection(setting.partition("=")[0] for setting in args.settings):
        raise UserError(f"{min(taken)} can't stand after --: the study sets it, or needs our names")
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
    tables, sections = args.out / "tables.md", []
    with locked(tables):
        for section in study(args):
            print(section, flush=True)
            sections.append(section)
            write_atomic(tables, "\n".join(sections))
    info(f"{tables}: the tables")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    run(main)
