"""The commands of a study (see tools/study.py), and on paper what they compute.

FLOPs are those of tools/cost.py; GPU-hours follow from a card's peak and `--utilization`; memory is
that of tools/memory.py.
"""

import argparse
import math
import os
import random
import re
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

import data
import gen_cot
import train
from evaluate import UserError, plural
from model import make_encoder, read_image_processor, read_tokenizer
from support.checkpoint import find_model
from support.console import ArgumentParser
from tools import memory
from tools.cost import PEAKS, Flops, Lengths

ROOT = Path(__file__).parent.parent
SAMPLE = 200  # posts whose lengths are measured
CHARACTERS = 4  # of a token, where there is no tokenizer to count with
GPUS = r"--(?:nnodes|nproc[-_]per[-_]node)[= ](\d+)"  # in torchrun's arguments
COT = 160  # tokens of an answer that reasons where no post has one, and of the longest at least

# -------------------------------------------------------------------------- the commands of a cell


@dataclass(frozen=True, eq=False)
class Cell:
    """A row of the table on one data set: a run of train.py, then predictions."""

    args: argparse.Namespace  # the study's settings, with the data set's files
    mode: str  # of train.py, or "zero-shot"
    gamma: float | None = None  # where it is not the mode's own
    epochs: float | None = None
    never: bool = False  # predicts with the same weights, with reasoning forbidden

    @property
    def trained(self):
        """The name of what is trained."""
        gamma = "" if self.gamma is None else f"-gamma{self.gamma:g}"
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
        options = [*self.args.defaults, *self.args.settings, "--mode", self.mode]
        options += [] if self.gamma is None else ["--gamma", f"{self.gamma:g}"]
        options += ["--epochs", f"{self.epochs:g}"] if self.epochs else []
        files = {name: getattr(self.args, name) for name in ("model", "train", "valid")}
        files["out"] = self.folder
        return options + [
            str(x) for name, file in files.items() if file for x in (f"--{name}", file)
        ]

    def infer_options(self):
        """The arguments of infer.py; how posts are read is the same as in training."""
        model = self.args.model if self.mode == "zero-shot" else self.folder
        options = ["--data", self.args.test, "--model", model, "--out", self.predictions]
        parser = ArgumentParser()
        data.add_reading_options(parser)
        given = parser.parse_known_args([*self.args.defaults, *self.args.settings])[0]
        for name, value in vars(given).items():
            if value != parser.get_default(name):
                options += [f"--{name.replace('_', '-')}", value]
        options += ["--base-url", self.args.base_url] if self.args.base_url else []
        options += ["--think", "never"] if self.never else []
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


def shell(script, options, launch=""):
    """A command as one types it in the current folder."""
    start = shlex.split(launch) or ["python"]
    return shlex.join([*start, os.path.relpath(ROOT / script), *map(str, options)])


# ---------------------------------------------------------------------------- what they compute


def measured_lengths(args, posts, model):
    """(Lengths, tokens of the teacher's instruction) of some posts, by the model's tokenizer."""
    try:
        folder = find_model(args.model, ["*.json", "*.txt", "*.jinja"])
        tokenizer, processor = read_tokenizer(folder), read_image_processor(folder)
    except UserError as error:
        raise UserError(f"--lengths is missing: no tokenizer to measure with ({error})") from None
    options = data.resolve_options(train.parse_args(Cell(args, "sft").train_options()), folder)
    encoder = make_encoder(folder, model.config, tokenizer, processor, options)
    chosen = random.Random(0).sample(range(len(posts)), min(SAMPLE, len(posts)))
    encoded = data.EncodedPosts(posts, encoder, with_answers=True)
    samples = [sample for sample in map(encoded.__getitem__, chosen) if hasattr(sample, "prompt")]
    if not samples:
        raise UserError(f"{posts.path}: no image can be read; see python -m tools.dataset check")
    image = statistics.mean(sample.prompt.count(encoder.image_token_id) for sample in samples)
    prompt = statistics.mean(len(sample.prompt) for sample in samples)
    plain = statistics.mean(len(sample.plain) for sample in samples)
    cot = statistics.mean([len(sample.cot) for sample in samples if sample.cot] or [COT])
    return Lengths(prompt - image, image, plain, cot), len(tokenizer.encode(gen_cot.PROMPT))


class Plan:
    """What the commands of one study compute, from averages over its posts.

    counts: the numbers of posts of "train" and "test"; lengths: Lengths; model: on "meta".
    """

    def __init__(self, args, counts, lengths, model):
        self.args, self.counts, self.lengths = args, counts, lengths
        self.model, self.flops = model, Flops(model)

    def answer(self, cell):
        """(share that reasons, mean tokens) of a cell's answers; zero-shot is taken to reason."""
        share = cell.cot_share(self.args.cot_share)
        return share, share * self.lengths.cot + (1 - share) * self.lengths.plain

    def training(self, cell):
        """A comment on the training of a cell, validation included."""
        options, (share, answer) = train.parse_args(cell.train_options()), self.answer(cell)
        count = self.counts["train"]
        steps = len(data.TrainingOrder(count, options.batch_size, options.seed, options.epochs))
        posts, both = options.epochs * count, train.MODES[options.mode].shares_prompt
        tokens = posts * (self.lengths.prompt + answer + both * self.lengths.plain)
        flops = posts * self.flops.training(self.lengths, options.mode, share, options)
        valid = math.ceil(options.epochs) * options.valid_posts if options.valid else 0
        read, generate = (valid * part for part in self.flops.inference(self.lengths, answer))
        return self.comment(f"{plural(steps, 'step')}, ", tokens, flops + read, generate)

    def inference(self, cell):
        """A comment on the inference of a cell."""
        posts, (_, answer) = self.counts["test"], self.answer(cell)
        read, generate = (posts * part for part in self.flops.inference(self.lengths, answer))
        return self.comment("", posts * (self.lengths.prompt + answer), read, generate)

    def comment(self, steps, tokens, read, generate):
        """Tokens, FLOPs, and the hours of one GPU of each kind."""
        shares = self.args.utilization
        seconds = read / shares[0] + generate / shares[1]
        hours = ", ".join(f"{card} {seconds / peak / 3600:,.1f}" for card, peak in PEAKS.items())
        return f"# {steps}{tokens:.3g} tokens, {read + generate:.3g} FLOPs; GPU-hours: {hours}"

    def memory(self):
        """A comment on the memory of a training step, by the size of the cards."""
        gpus = math.prod(map(int, re.findall(GPUS, self.args.launch)))
        longest = [max(COT, math.ceil(most)) for most in (self.lengths.text, self.lengths.cot)]
        options = [*Cell(self.args, "dynamic").train_options(), "--gpus", gpus]
        settings = memory.parse_args([*map(str, [*options, "--lengths", *longest])])
        needs = []
        for card in (80, 141):
            need = memory.estimate(self.model, settings, card)["peak"]
            fits = "" if need <= memory.USABLE * card else ", does not fit"
            needs.append(f"{need:.1f} GiB ({card} GiB cards{fits})")
        return f"# memory of each of {plural(gpus, 'GPU')}: {', '.join(needs)}"

    def teacher(self, missing, instruction):
        """A comment on the teacher's work for `missing` posts."""
        sent = missing * (instruction + self.lengths.prompt + self.lengths.plain) / 1e6
        received, price = missing * self.lengths.cot / 1e6, self.args.price
        cost = f"; it costs {sent * price[0] + received * price[1]:,.0f}" if price else ""
        tokens = f"{sent:,.1f} million tokens in, {received:,.1f} out"
        return f"# {plural(missing, 'request')}, {tokens}{cost}"


def make_plan(args):
    """(Plan, posts without reasoning, tokens of the teacher's instruction, lines that say of what).

    Posts are counted and measured where their files exist. Raises UserError.
    """
    model, counts = memory.read_model(args.model)[0], dict(args.paper_data.get("posts", {}))
    without_cot, instruction, source = 1.0, len(gen_cot.PROMPT) / CHARACTERS, "given"
    posts = data.Posts(args.train, for_training=True) if Path(args.train).exists() else None
    if posts:
        counts["train"], without_cot = len(posts), posts.without_cot / len(posts)
    if Path(args.test).exists():
        counts["test"] = len(data.Posts(args.test))
    counts |= dict(zip(("train", "test"), args.posts or [], strict=False))
    if len(counts) < 2:
        raise UserError("--posts TRAIN TEST is missing: there are no files to count posts in")
    if args.lengths:
        lengths = Lengths(*args.lengths)
    elif posts:
        lengths, instruction = measured_lengths(args, posts, model)
        source = "measured" if without_cot < 1 else f"measured; no post has reasoning: {COT} taken"
    else:
        raise UserError("--lengths TEXT IMAGE PLAIN COT is missing: there are no posts to measure")
    average = ", ".join(f"{value:.0f} {name}" for name, value in vars(lengths).items())
    share, generating = args.utilization
    lines = [
        f"# {args.model}: {memory.count_parameters(model).total / 1e9:.3f} billion parameters",
        f"# {plural(counts['train'], 'post')} to train on, {counts['test']:,} to predict",
        f"# tokens of an average post: {average} ({source})",
        f"# {args.cot_share:.0%} of dynamic's posts reason, and all that zero-shot predicts",
        f"# utilization: {share:.0%} in training and reading, {generating:.1%} in generating",
    ]
    missing = round(counts["train"] * without_cot)
    return Plan(args, counts, lengths, model), missing, instruction, lines


def commands(args, cells):
    """The lines of a shell script that does the whole study; what they cost stands in comments."""
    plan, missing, instruction, lines = make_plan(args)
    yield from lines
    if missing and any(cell.mode != "zero-shot" and cell.cot_share(1) for cell in cells):
        name, file = args.paper_data.get("teacher", "gpt-4o"), Path(args.train).with_suffix("")
        yield "\n# reasoning by a teacher"
        yield plan.teacher(missing, instruction)
        options = [args.train, "--out", f"{file}_cot.jsonl", "--model", name]
        if address := args.paper_data.get("teacher_url"):  # of a teacher that is not OpenAI's
            options += ["--base-url", address]
        yield shell("gen_cot.py", options)
        args.train = f"{file}_cot.jsonl"  # that the rows train on
    yield f"\n{plan.memory()}"
    jobs = [(cell, kind) for cell in cells for kind in ("training", "inference")]
    if args.base_url:  # a server needs the GPUs that trained
        jobs.sort(key=lambda job: job[1] == "inference")
    for cell, kind in jobs:
        if (cell.mode, kind) == ("zero-shot", "training"):
            continue
        yield f"\n# {cell.row}: {kind}"
        yield getattr(plan, kind)(cell)
        if kind == "training":
            yield shell("train.py", cell.train_options(), args.launch)
        else:
            yield shell("infer.py", cell.infer_options())
    yield "\n# scores"
    yield from (shell("evaluate.py", cell.score_options()) for cell in cells)
    for cell, other in pairs(cells):
        yield shell("evaluate.py", cell.score_options(other))


def pairs(cells):
    """(dynamic, other) for each other mode of a data set."""
    own = [cell for cell in cells if cell.gamma is None and not cell.never]
    both = [(one, other) for one in own for other in own if one.args is other.args]
    return [pair for pair in both if pair[0].mode == "dynamic" != pair[1].mode]
