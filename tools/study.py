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
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import data
import train
from evaluate import UserError, non_negative_int, plural, run
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
from tools import memory, tables
from tools.clubworld import TOY_DEFAULTS, write_beside
from tools.plan import ROOT, Cell, commands, pairs

ROWS = ("zero-shot", *train.MODES)
LEARN_BOTH = [name for name, mode in train.MODES.items() if mode.trains in ("both", "either")]
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


def is_trained(cell):
    """Whether a cell's training is finished, with these settings and posts."""
    if not (cell.folder / "last").is_file():
        return False
    options, posts = train.parse_args(cell.train_options()), cell.args.posts
    if changed_settings(cell.folder, train.run_settings(options, posts), train.FREE_TO_CHANGE):
        return False  # train.py refuses to resume it, and names them
    steps = len(data.TrainingOrder(len(posts), options.batch_size, options.seed, options.epochs))
    evaluated = [line["step"] for line in tables.read(cell.folder / "log.jsonl") if "valid" in line]
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
    file = cell.predictions
    info(f"{cell.row}: predicting, in {file}")
    before = file.exists() and file.stat().st_mtime_ns
    code, _ = execute("infer.py", cell.infer_options())
    found = tables.read(file)
    # Failed posts end infer.py with 1, too, but are tried again first, which changes the file.
    tried = any("error" in line for line in found) and file.stat().st_mtime_ns != before
    if len(found) < len(cell.args.test_posts) or (code and not tried):
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
    seconds = {row: sum(map(tables.training_seconds, cells)) for row, cells in groups.items()}
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
        compared = {pair: found.result() for pair, found in compared.items()}
        if not by_name:
            tables.plot_tokens(groups, scores, args.out / "tokens.png")
        note = f"{args.paper_note}\n\n" if args.paper_note else ""
        yield f"### {title}\n\n{note}" + tables.section(groups, scores, compared, paper)
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
        models = [memory.read_model(n)[0] for n in (args.model, f"Qwen/{paper['model']}-Instruct")]
        size, papers = (memory.count_parameters(model).total for model in models)
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
    file, sections = args.out / "tables.md", []
    with locked(file):
        for section in study(args):
            print(section, flush=True)
            sections.append(section)
            write_atomic(file, "\n".join(sections))
    info(f"{file}: the tables")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    run(main)
