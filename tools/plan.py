"""The commands of a study (see tools/study.py), and on paper what they compute.

FLOPs are those of tools/cost.py; GPU-hours follow from a card's peak and `--utilization`; memory is
that of tools/memory.py. Disk space is that of the checkpoints which a row keeps.
"""

import argparse
import math
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import data
import gen_cot
import train
from evaluate import UserError, plural
from model import make_encoder, read_image_processor, read_tokenizer
from support.checkpoint import checkpoint_size, checkpoints_kept, find_model
from support.console import ArgumentParser
from tools import memory
from tools.cost import PEAKS, Flops, Lengths, passes

ROOT = Path(__file__).parent.parent
SAMPLE = 200  # posts whose lengths are measured
CHARACTERS = 4  # of a token of the teacher's instruction
GPUS = r"--(?:nnodes|nproc[-_]per[-_]node)[= ](\d+)"  # in torchrun's arguments
COT = 160  # tokens of an answer that reasons where no post has one, and of the longest at least

# -------------------------------------------------------------------------- the commands of a cell


@dataclass(frozen=True, eq=False)
class Cell:
    """A row of the table on one data set: a run of train.py, then predictions."""

    args: argparse.Namespace  # the study's settings, with the data set's files
    mode: str  # of train.py, or "zero-shot"
    gamma: float | str | None = None  # where it is not the mode's own
    epochs: float | None = None
    never: bool = False  # predicts with the same weights, with reasoning forbidden

    @property
    def trained(self):
        """The name of what is trained."""
        gamma = "" if self.gamma is None else f"-gamma{self.gamma}"
        return self.mode + gamma + (f"-{self.epochs:g}epochs" if self.epochs else "")

    @property
    def row(self):
        return self.trained + ("-never" if self.never else "")

    @property
    def folder(self):
        return self.args.out / (self.trained + self.args.suffix)

    @property
    def predictions(self):
        return self.folder / ("never_preds.jsonl" if self.never else "preds.jsonl")

    def train_options(self):
        """The arguments of train.py."""
        files = {name: getattr(self.args, name) for name in ("model", "train", "valid")}
        own = {"mode": self.mode, "gamma": self.gamma, "epochs": self.epochs}
        return [*self.args.defaults, *self.args.settings, *flags(**own, **files, out=self.folder)]

    def infer_options(self):
        """The arguments of infer.py; how posts are read is the same as in training."""
        parser = ArgumentParser()
        data.add_reading_options(parser)
        given = parser.parse_known_args([*self.args.defaults, *self.args.settings])[0]
        changed = {k: value for k, value in vars(given).items() if value != parser.get_default(k)}
        model = self.args.model if self.mode == "zero-shot" else self.folder
        think = "never" if self.never else None
        options = flags(data=self.args.test, model=model, out=self.predictions, **changed)
        options += flags(base_url=self.args.base_url, think=think)
        return options + shlex.split(self.args.infer)

    def score_options(self, other=None):
        """The arguments of evaluate.py, also for a comparison with another cell."""
        files = [self.predictions, self.args.test, "--train", self.args.train]
        against = ["--against", other.predictions] if other else []
        return [*files, *against, "--bootstrap", 1000, "--json"]

    def cot_share(self, chosen):
        """The share of posts that reason, which is `chosen` where the mode decides."""
        trains = "cot" if self.mode == "zero-shot" else train.MODES[self.mode].trains
        chosen = {0: 0, math.inf: 1}.get(self.gamma, chosen)
        return {"plain": 0, "cot": 1, "both": 1, "either": chosen}[trains]


def flags(**values):
    """Options as arguments of a script, without those that are None."""
    given = {name.replace("_", "-"): value for name, value in values.items() if value is not None}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def shell(script, options, launch=""):
    """A command as one types it in the current folder."""
    start = shlex.split(launch) or ["python"]
    return shlex.join([*start, os.path.relpath(ROOT / script), *map(str, options)])


# ---------------------------------------------------------------------------- what they compute


def measured_lengths(args, posts, model):
    """Lengths of some posts, by the model's tokenizer. Raises UserError."""
    folder = find_model(args.model, ["*.json", "*.txt", "*.jinja"])
    tokenizer, processor = read_tokenizer(folder), read_image_processor(folder)
    options = data.resolve_options(train.parse_args(Cell(args, "sft").train_options()), folder)
    encoder = make_encoder(folder, model.config, tokenizer, processor, options)
    encoded = data.EncodedPosts(posts, encoder, with_answers=True)
    chosen = map(encoded.__getitem__, range(0, len(posts), math.ceil(len(posts) / SAMPLE)))
    samples = [sample for sample in chosen if hasattr(sample, "prompt")]
    if not samples:
        raise UserError(f"{posts.path}: no image can be read; see python -m tools.dataset check")
    image = mean(sample.prompt.count(encoder.image_token_id) for sample in samples)
    prompt = mean(len(sample.prompt) for sample in samples)
    plain = mean(len(sample.plain) for sample in samples)
    cot = mean([len(sample.cot) for sample in samples if sample.cot] or [COT])
    return Lengths(prompt - image, image, plain, cot)


class Plan:
    """What the commands of a study compute, from averages over its posts.

    Posts are counted and measured where their files exist. Raises UserError.
    """

    def __init__(self, args):
        self.args, self.model = args, memory.read_model(args.model)[0]
        posts = data.Posts(args.train, for_training=True) if Path(args.train).exists() else None
        counts = args.posts or args.paper_data.get("posts", {}).values()
        if posts and not args.posts:
            counts = len(posts), len(data.Posts(args.test))
        if not counts or not (posts or args.lengths):
            raise UserError(f"{args.train}: no such file; --posts and --lengths go without files")
        self.train_posts, self.test_posts = counts
        self.missing = round(self.train_posts * (posts.without_cot / len(posts) if posts else 1))
        given = args.lengths
        self.lengths = Lengths(*given) if given else measured_lengths(args, posts, self.model)
        self.flops = Flops(self.model)
        self.read = self.generate = self.disk = self.largest = 0  # of all commands so far

    def teacher(self, out):
        """The reasoning of the posts that have none, written to the file `out`."""
        paper, prices = self.args.paper_data, self.args.price
        prompt = len(gen_cot.PROMPT) / CHARACTERS + self.lengths.prompt + self.lengths.plain
        sent, received = (self.missing * tokens / 1e6 for tokens in (prompt, self.lengths.cot))
        costs = f"; it costs {sent * prices[0] + received * prices[1]:,.0f}" if any(prices) else ""
        requests = plural(self.missing, "request")
        model, address = paper.get("teacher", "gpt-4o"), paper.get("teacher_url")
        yield "\n# reasoning by a teacher"
        yield f"# {requests}, {sent:,.1f} million tokens in, {received:,.1f} out{costs}"
        options = flags(out=out, model=model, base_url=address)
        yield shell("gen_cot.py", [self.args.train, *options])

    def memory(self):
        """A comment on the memory of a step, by the size of the GPUs."""
        gpus = math.prod(map(int, re.findall(GPUS, self.args.launch)))
        longest = [max(COT, math.ceil(most)) for most in (self.lengths.text, self.lengths.cot)]
        options = [*Cell(self.args, "dynamic").train_options(), "--gpus", gpus]
        settings = memory.parse_args([*map(str, [*options, "--lengths", *longest])])
        peaks = {card: memory.estimate(self.model, settings, card)["peak"] for card in (80, 141)}
        needs = ", ".join(f"{peak:.1f} GiB ({card} GiB cards)" for card, peak in peaks.items())
        yield f"\n# memory of each of {plural(gpus, 'GPU')}: {needs}"

    def training(self, cell):
        """The training of a cell; the costs include validation."""
        args, share = train.parse_args(cell.train_options()), cell.cot_share(self.args.cot_share)
        order = data.TrainingOrder(self.train_posts, args.batch_size, args.seed, args.epochs)
        posts = args.epochs * self.train_posts
        answers = sum(length * part for length, part, _ in passes(self.lengths, args.mode, share))
        validated = math.ceil(args.epochs) * args.valid_posts if args.valid else 0
        _, read, generate = self.predicting(cell, validated)
        read += posts * self.flops.training(self.lengths, args.mode, share, args)
        costs = self.costs(posts * (self.lengths.prompt + answers), read, generate)
        count = memory.count_parameters(self.model, args.lora, args.freeze_vision)
        size = checkpoint_size(count.total, count.trained, bool(args.lora))
        kept = min(checkpoints_kept(args, order)) * size  # in the end
        self.disk, self.largest = self.disk + kept, max(self.largest, size)
        yield f"\n# {cell.row}: training"
        yield f"# {plural(len(order), 'step')}, {costs}; disk: {kept / 1e9:,.1f} GB"
        yield shell("train.py", cell.train_options(), self.args.launch)

    def total(self):
        """What all commands take together, those of the teacher left out."""
        disk = f"{self.disk / 1e9:,.1f} GB, and {self.largest / 1e9:,.1f} GB more during a save"
        yield "\n# all rows, validation included"
        yield f"# {self.hours(self.read, self.generate)}; disk: {disk}"

    def inference(self, cell):
        """The inference of a cell."""
        yield f"\n# {cell.row}: inference"
        yield f"# {self.costs(*self.predicting(cell, self.test_posts))}"
        yield shell("infer.py", cell.infer_options())

    def predicting(self, cell, posts):
        """(tokens, FLOPs of reading, FLOPs of generating) of so many predictions."""
        share = cell.cot_share(self.args.cot_share)
        answer = share * self.lengths.cot + (1 - share) * self.lengths.plain
        read, generate = self.flops.inference(self.lengths, answer)
        return posts * (self.lengths.prompt + answer), posts * read, posts * generate

    def costs(self, tokens, read, generate):
        """Tokens, FLOPs, and the hours of one GPU of each kind, which are added to the total."""
        self.read, self.generate = self.read + read, self.generate + generate
        return f"{tokens:.3g} tokens, {read + generate:.3g} FLOPs; {self.hours(read, generate)}"

    def hours(self, read, generate):
        """The hours of one GPU of each kind for so many FLOPs."""
        shares = self.args.utilization
        seconds = read / shares[0] + generate / shares[1]
        hours = ", ".join(f"{card} {seconds / peak / 3600:,.1f}" for card, peak in PEAKS.items())
        return f"GPU-hours: {hours}"


def commands(args, cells):
    """The lines of a shell script that does the whole study; what they cost stands in comments."""
    plan, trained = Plan(args), [cell for cell in cells if cell.mode != "zero-shot"]
    average = ", ".join(f"{value:.0f} {name}" for name, value in vars(plan.lengths).items())
    if args.paper_note:
        yield f"# {args.paper_note}"
    yield f"# {plural(plan.train_posts, 'post')} to train on, {plan.test_posts:,} to predict"
    yield f"# tokens of an average post: {average}"
    if plan.missing and any(cell.cot_share(1) for cell in trained):
        out = f"{Path(args.train).with_suffix('')}_cot.jsonl"
        yield from plan.teacher(out)
        args.train = out  # that the rows train on
    yield from plan.memory()
    for cell in trained:  # all of them first: a server needs the GPUs that trained
        yield from plan.training(cell)
    for cell in cells:
        yield from plan.inference(cell)
    yield "\n# scores"
    for cell, other in [(cell, None) for cell in cells] + pairs(cells):
        yield shell("evaluate.py", cell.score_options(other))
    yield from plan.total()


def pairs(cells):
    """(one, other) of a data set: dynamic and each other mode, another gamma and dynamic or cot."""
    return [
        (one, other)
        for one in cells
        for other in cells
        if one.args is other.args and one is not other and one.mode == "dynamic"
        if other.gamma is None and (one.gamma is None or other.mode in ("dynamic", "cot"))
        if not (one.never or other.never)
    ]
