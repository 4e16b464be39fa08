"""The paper's table on any data: each row trains one model in another way on the same posts.

    python -m tools.study --train train.jsonl --valid valid.jsonl --test test.jsonl --model MODEL
    python -m tools.study … --rows sft dynamic --gammas 0.2 0.8 -- --batch-size 64 --lr 3e-5
    python -m tools.study … --launch "torchrun --nproc-per-node 8" --paper mmkp-v2
    python -m tools.study --out out/club --at-once 2       # no --train: the club worlds, in hours

What follows -- are settings of train.py. A row is a run of train.py, in a folder of its own under
--out, then infer.py on the test posts. The same command again skips what is finished and continues
what was stopped. The tables go to OUT/tables.md, all scores to OUT/scores.json.
"""

import json
import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import data
import train
from evaluate import UserError, plural, run
from support.checkpoint import changed_settings, read_pointer
from support.console import (
    ArgumentParser,
    fraction,
    info,
    non_negative_number,
    positive_int,
    read_json,
)
from support.jsonl import locked, write_atomic
from tools import clubstudy, memory
from tools.clubstudy import GOES_ON, ROOT, Report, markdown, read, signed
from tools.plan import ROWS, commands, infer_options, predictions, score_options, train_options

CLASSES = ("All", "Present", "Absent", "Unseen")
PAPER = Path(__file__).parent / "paper.json"
LARGE = 4e9  # parameters from which the paper trains 3 epochs, not 5

# ------------------------------------------------------------------------------------ running them


def execute(script, options, launch=""):
    """Run one of the scripts, whose progress is shown; returns (exit code, what it printed).

    Ctrl-C reaches the script by itself, which then saves what it has; SIGTERM is passed on to it.
    """
    command = [*(shlex.split(launch) or [sys.executable]), ROOT / script, *options]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    handlers = {signal.SIGINT: lambda *_: None}
    handlers[signal.SIGTERM] = lambda number, _: process.send_signal(number)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        printed, _ = process.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return process.returncode, printed


def is_trained(args, row, posts):
    """Whether a row's training is finished. Raises UserError if it had other settings or posts."""
    options = train.parse_args(train_options(args, row))
    folder = Path(options.out)
    if not (folder / "last").is_file():
        return False
    if changed := changed_settings(folder, train.run_settings(options, posts)):
        raise UserError(
            f"{folder}: was trained with other settings: {', '.join(changed.values())}; choose "
            "another --out"
        )
    steps = train.round_up(options.epochs * math.ceil(len(posts) / options.batch_size))
    if read_pointer(folder / "last").name != f"step-{steps}":
        return False
    evaluated = [line["step"] for line in read(folder / "log.jsonl") if "valid" in line]
    return not options.valid or steps in evaluated


def train_row(args, row, posts):
    """Train a row, unless that is done; a stopped training is resumed."""
    if row == "zero-shot" or is_trained(args, row, posts):
        return
    info(f"{row}: training, in {args.out / row}")
    resume = ["--resume"] if (args.out / row / "settings.json").exists() else []
    code, _ = execute("train.py", [*train_options(args, row), *resume], args.launch)
    if code:
        raise UserError(f"the training of {row} ended with {code}; {GOES_ON}")


def predict_row(args, row, count):
    """Predict the `count` test posts, which infer.py continues; adds the time to seconds.json."""
    out = predictions(args, row)
    info(f"{row}: predicting, in {out}")
    before, started = out.exists() and out.stat().st_mtime_ns, time.perf_counter()
    code, _ = execute("infer.py", infer_options(args, row))
    if out.exists() and out.stat().st_mtime_ns != before:
        seconds = time.perf_counter() - started + inference_seconds(args, row)
        write_atomic(args.out / row / "seconds.json", json.dumps({"infer": seconds}) + "\n")
    found = read(out) if out.exists() else []
    refused = code and not any("error" in line for line in found)  # else some posts failed
    if len(found) < count or refused:
        name = infer_options(args, row)[3]
        server = f" (the server must have the model as {name})" if args.base_url else ""
        raise UserError(f"the inference of {row} ended with {code}{server}; {GOES_ON}")


def inference_seconds(args, row):
    file = args.out / row / "seconds.json"
    return read_json(file)["infer"] if file.exists() else 0


def training_seconds(args, row):
    """The time of a row's steps, without loading and validation."""
    file = args.out / row / "log.jsonl"
    return sum(line.get("seconds", 0) for line in read(file)) if file.exists() else 0


def scores_of(args, row, other=None):
    """evaluate.py's scores of a row, or of its comparison with another one."""
    code, printed = execute("evaluate.py", score_options(args, row, other))
    if code:
        raise UserError(f"the scores of {row} failed; {GOES_ON}")
    return json.loads(printed)


# ------------------------------------------------------------------------------------------ tables


def percent(entry, measure):
    """A score with its 95% interval; a dash where no post has a keyphrase of the class."""
    if not entry["posts"]:
        return "–"
    low, high = (100 * end for end in entry["interval"][measure])
    return f"{100 * entry[measure]:.1f} ({low:.1f}–{high:.1f})"


def minutes(seconds):
    return f"{seconds / 60:.1f} min" if seconds else "–"


def score_table(args, scores, paper):
    """A row of the table for each row of `scores`; the paper's figures stand beside ours."""
    measure = paper.get("measure", "F1@1")
    figures = {row: paper.get("figures", {}).get(row, {}) for row in scores}
    known = [name for name in CLASSES if any(name in figures[row] for row in scores)]
    titles = [*CLASSES, "tokens a post", "reasoned", "training", "inference"]
    titles = [measure, *titles, *(f"{name}, paper's {paper['model']}" for name in known)]
    lines = []
    for row, of_row in scores.items():
        every = of_row["all"]
        cells = [row, *(percent(of_row[name.lower()], measure) for name in CLASSES)]
        cells += [f"{every['tokens']:.1f}", f"{every['reasoned']:.1%}"]
        cells += [minutes(training_seconds(args, row)), minutes(inference_seconds(args, row))]
        lines.append([*cells, *(str(figures[row].get(name, "–")) for name in known)])
    return markdown(titles, lines)


def paired_table(args, scores, measure):
    """dynamic minus each other row on the same posts: difference, interval, a star if p < 0.05."""
    lines = []
    for row in (row for row in scores if row != "dynamic"):
        found = scores_of(args, "dynamic", row)
        cells = [
            signed(found["against"][name.lower()][measure]) if found[name.lower()]["posts"] else "–"
            for name in CLASSES
        ]
        lines.append([f"dynamic − {row}", *cells])
    return markdown([measure, *CLASSES], lines)


def study(args, rows, report):
    """Run what is not finished, then write the tables."""
    info(f"reading {args.train} and {args.test}")
    posts, count = data.Posts(args.train, for_training=True), len(data.Posts(args.test))
    for row in rows:
        train.check_reasoning(posts, row.partition("-gamma")[0])
    jobs = [job for row in rows for job in ((train_row, row, posts), (predict_row, row, count))]
    if args.base_url:  # a server needs the GPUs that trained
        jobs.sort(key=lambda job: job[0] is predict_row)
    for job, row, what in jobs:
        job(args, row, what)
    scores, paper = {row: scores_of(args, row) for row in rows}, args.paper_data
    write_atomic(args.out / "scores.json", json.dumps(scores, indent=1) + "\n")
    table = {row: scores[row] for row in args.rows}
    report.add(
        f"{args.model} on {args.test}, {plural(count, 'post')}", score_table(args, table, paper)
    )
    if args.gammas:
        gammas = {row: scores[row] for row in rows if row.startswith("dynamic")}
        report.add("Other gammas", score_table(args, gammas, {}))
    if "dynamic" in table and len(table) > 1:
        measure = paper.get("measure", "F1@1")
        report.add("Paired tests", paired_table(args, table, measure))


# -------------------------------------------------------------------------------- the command line


def parse_args(arguments=None):
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/study"), help="the folder of all rows")
    gammas_help = "also train dynamic with these gammas (default: six on the club worlds)"
    add("--gammas", nargs="*", type=non_negative_number, help=gammas_help)
    add = parser.add_argument_group("your data").add_argument
    add("--train", metavar="FILE", help="posts to train on (JSONL)")
    add("--valid", metavar="FILE", help="posts to validate on; the best checkpoint is then scored")
    add("--test", metavar="FILE", help="posts to predict and score")
    add("--model", help="folder or hub name of a Qwen-VL model")
    add("--rows", nargs="+", choices=ROWS, default=ROWS, help="rows of the table")
    paper_help = "the paper's figures beside ours, its settings as defaults"
    add("--paper", choices=read_json(PAPER)["data"], help=paper_help)
    add("--launch", default="", help="starts train.py, such as 'torchrun --nproc-per-node 8'")
    add("--base-url", help="predict through the server at this address (see docs/serving.md)")
    add("--infer", default="", help="more settings of infer.py, such as '--batch-size 64'")
    clubstudy.add_options(parser.add_argument_group("the club worlds").add_argument)
    add_plan_options(parser.add_argument_group("on paper").add_argument)
    args = parser.parse_args(arguments[:end])
    args.settings = arguments[end + 1 :]
    if args.paper and args.dry_run and args.train is None:
        args.train, args.valid, args.test = "train.jsonl", "valid.jsonl", "test.jsonl"
    if args.gammas is None:
        args.gammas = [] if args.train else [0, 0.1, 0.2, 0.4, 0.8, math.inf]
    return args


def add_plan_options(add):
    """The settings of --dry-run."""
    add("--dry-run", action="store_true", help="print all commands and what they cost; run none")
    add("--cot-share", type=fraction, default=1, help="share of dynamic's posts that reason")
    share, price = fraction, non_negative_number
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
    """Raise UserError for what is missing; apply the paper's settings."""
    for name in ("model", "test"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing: with --train it is needed, too")
    args.paper_data, args.defaults = {}, []
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
    train.parse_args(train_options(args, args.rows[-1]))


def main():
    args = parse_args()
    report = Report(args.out / "tables.md")
    if args.train:
        check_args(args)
    rows = [*args.rows, *(f"dynamic-gamma{gamma:g}" for gamma in args.gammas)]
    if not args.train and (args.dry_run or args.test or args.model or args.paper):
        raise UserError("--train is missing; without it, --test, --model and --paper: club worlds")
    if args.dry_run:
        print(*commands(args, rows), sep="\n")
        return
    with locked(report.path):
        if args.train:
            study(args, rows, report)
        else:
            clubstudy.study_club_worlds(args, report)
    info(f"{report.path}: the tables")


if __name__ == "__main__":
    run(main)
