"""The commands of a study (see tools/study.py), and on paper what they compute.

FLOPs are those of tools/cost.py; GPU-hours follow from a card's peak and `--utilization`; memory is
that of tools/memory.py.
"""

import math
import os
import random
import re
import shlex
import statistics
from pathlib import Path

import data
import gen_cot
import train
from evaluate import UserError, plural
from support.checkpoint import find_model
from support.console import ArgumentParser
from tools import memory
from tools.clubstudy import ROOT
from tools.cost import PEAKS, Flops, Lengths

ROWS = ("zero-shot", "sft", "multitask", "cot", "dynamic")
SAMPLE = 200  # posts whose lengths are measured
CHARACTERS = 4  # of a token, where there is no tokenizer to count with
GPUS = r"--(?:nnodes|nproc[-_]per[-_]node)[= ](\d+)"  # in torchrun's arguments
COT = 160  # tokens of an answer that reasons where no post has one, and of the longest at least

# --------------------------------------------------------------------------- the commands of a row


def train_options(args, row):
    """train.py's arguments for a row: a mode, or dynamic-gamma0.2."""
    mode, _, gamma = row.partition("-gamma")
    options = [*args.defaults, *args.settings, "--mode", mode]
    options += ["--gamma", gamma] if gamma else []
    files = {"model": args.model, "train": args.train, "valid": args.valid, "out": args.out / row}
    options += [part for name, file in files.items() if file for part in (f"--{name}", str(file))]
    return options


def infer_options(args, row):
    """infer.py's arguments for a row; how posts are read is the same as in training."""
    model = args.model if row == "zero-shot" else args.out / row
    options = ["--data", args.test, "--model", model, "--out", predictions(args, row)]
    parser = ArgumentParser()
    data.add_reading_options(parser)
    for name, value in vars(parser.parse_known_args(args.settings)[0]).items():
        if value != parser.get_default(name):
            options += [f"--{name.replace('_', '-')}", value]
    options += ["--base-url", args.base_url] if args.base_url else []
    return options + shlex.split(args.infer)


def score_options(args, row, other=None):
    """evaluate.py's arguments for a row, or for its comparison with another one."""
    files = [predictions(args, row), args.test, "--train", args.train]
    against = ["--against", predictions(args, other)] if other else []
    return [*files, *against, "--bootstrap", 1000, "--json"]


def predictions(args, row):
    return args.out / row / "preds.jsonl"


# ---------------------------------------------------------------------------- what they compute


def shell(script, options, launch=""):
    """A command as one types it in the current folder."""
    start = shlex.split(launch) or ["python"]
    return shlex.join([*start, os.path.relpath(ROOT / script), *map(str, options)])


def measured_lengths(args, posts, model):
    """(Lengths, tokens of the teacher's instruction) of some posts, by the model's tokenizer."""
    from support.folders import read_image_processor, read_tokenizer

    from model import make_encoder

    try:
        folder = find_model(args.model, ["*.json", "*.txt", "*.jinja"])
        tokenizer, processor = read_tokenizer(folder), read_image_processor(folder)
    except UserError as error:
        raise UserError(f"--lengths is missing: no tokenizer to measure with ({error})") from None
    options = data.encoder_options(train.parse_args(train_options(args, "sft")))
    encoder = make_encoder(folder, model, tokenizer, processor, options)
    chosen = random.Random(0).sample(range(len(posts)), min(SAMPLE, len(posts)))
    encoded = data.EncodedPosts(posts, encoder, with_answers=True)
    samples = [sample for sample in map(encoded.__getitem__, chosen) if hasattr(sample, "prompt")]
    if not samples:
        raise UserError(f"{posts.path}: no image can be read; see python -m tools.dataset check")
    images = [sample.prompt.count(encoder.image_token_id) for sample in samples]
    cots = [len(sample.cot) for sample in samples if sample.cot]
    return Lengths(
        statistics.mean(len(sample.prompt) for sample in samples) - statistics.mean(images),
        statistics.mean(images),
        statistics.mean(len(sample.plain) for sample in samples),
        statistics.mean(cots or [COT]),
    ), len(tokenizer.encode(gen_cot.PROMPT))


class Plan:
    """What the commands of one study compute, from averages over its posts.

    counts: the numbers of posts of "train" and "test"; lengths: Lengths; model: on "meta".
    """

    def __init__(self, args, counts, lengths, model):
        self.args, self.counts, self.lengths = args, counts, lengths
        self.model, self.flops = model, Flops(model)

    def answer(self, row):
        """(share that reasons, mean tokens) of a row's answers; zero-shot is taken to reason."""
        mode, _, gamma = row.partition("-gamma")
        dynamic = {"0": 0, "inf": 1}.get(gamma, self.args.cot_share)
        share = {"sft": 0, "dynamic": dynamic}.get(mode, 1)
        return share, share * self.lengths.cot + (1 - share) * self.lengths.plain

    def training(self, row):
        """A comment on the training of a row, validation included."""
        options, (share, answer) = train.parse_args(train_options(self.args, row)), self.answer(row)
        batches = math.ceil(self.counts["train"] / options.batch_size)
        posts = options.epochs * self.counts["train"]
        both = options.mode in ("multitask", "dynamic")
        tokens = posts * (self.lengths.prompt + answer + both * self.lengths.plain)
        flops = posts * self.flops.training(self.lengths, options.mode, share, options)
        valid = math.ceil(options.epochs) * options.valid_posts if options.valid else 0
        read, generate = (valid * part for part in self.flops.inference(self.lengths, answer))
        steps = f"{plural(train.round_up(options.epochs * batches), 'step')}, "
        return self.comment(steps, tokens, flops + read, generate)

    def inference(self, row):
        """A comment on the inference of a row."""
        posts, (_, answer) = self.counts["test"], self.answer(row)
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
        options = [*train_options(self.args, "dynamic"), "--gpus", gpus, "--lengths", *longest]
        needs, settings = [], memory.parse_args([*map(str, options)])
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


def commands(args, rows):
    """The lines of a shell script that does the whole study; what they cost stands in comments."""
    plan, missing, instruction, lines = make_plan(args)
    yield from lines
    if missing and any(row not in ("zero-shot", "sft") for row in rows):
        name, file = args.paper_data.get("teacher", "gpt-4o"), Path(args.train).with_suffix("")
        yield "\n# reasoning by a teacher"
        yield plan.teacher(missing, instruction)
        options = [args.train, "--out", f"{file}_cot.jsonl", "--model", name]
        if address := args.paper_data.get("teacher_url"):  # of a teacher that is not OpenAI's
            options += ["--base-url", address]
        yield shell("gen_cot.py", options)
        args.train = f"{file}_cot.jsonl"  # that the rows train on
    yield f"\n{plan.memory()}"
    jobs = [job for row in rows for job in ((plan.training, row), (plan.inference, row))]
    if args.base_url:
        jobs.sort(key=lambda job: job[0] == plan.inference)
    for job, row in [job for job in jobs if job != (plan.training, "zero-shot")]:
        yield f"\n# {row}: {job.__name__}"
        yield job(row)
        if job == plan.training:
            yield shell("train.py", train_options(args, row), args.launch)
        else:
            yield shell("infer.py", infer_options(args, row))
    yield "\n# scores"
    others = [row for row in rows if row in ROWS and row != "dynamic"] if "dynamic" in rows else []
    for pair in [(row,) for row in rows] + [("dynamic", row) for row in others]:
        yield shell("evaluate.py", score_options(args, *pair))
