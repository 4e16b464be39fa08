"""Train a vision-language model to predict keyphrases, reasoning only where it pays (Dynamic CoT).

    python train.py                                   # the club world and a toy model, on a CPU
    python train.py --model Qwen/Qwen2.5-VL-3B-Instruct --train train.jsonl --valid valid.jsonl
    torchrun --nproc-per-node 8 train.py …            # the same on eight GPUs

Without --train it trains on the club world, with the toy's own defaults (the end of --help).
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import data
from evaluate import UserError, digest, non_negative_int, plural, run, score, table
from model import answer_loss, bf16_on_cuda, load, predict, read_prompt, unsharded_model
from support.adapters import adapter_config, add_adapter, need_peft
from support.checkpoint import (
    Checkpoints,
    Stop,
    checkpoint_of,
    find_model,
    full_tensor,
    is_local,
    open_run,
)
from support.console import (
    ArgumentParser,
    fraction,
    gamma_or_auto,
    non_negative_number,
    number,
    number_or_inf,
    out_of_memory,
    positive_int,
    positive_number,
    progress,
    read_json,
    whole_number,
)
from support.distributed import Ranks, compute_dtype
from support.jsonl import locked, to_line, write_atomic
from support.log import (
    TrainingLog,
    print_examples,
    say_end,
    say_model,
    say_posts,
    tensorboard_writer,
)
from support.records import mapped_keyphrases
from tools.clubworld import TOY_DEFAULTS, write_beside

# Settings that a resumed run may change; the others decide what is learned.
FREE_TO_CHANGE = """save_every keep device workers micro_batch parallel gradient_checkpointing test
    valid valid_posts max_new_tokens log_choices tensorboard skip_unreadable""".split()
FILES = ("train", "valid", "test", "prompt_file")


def make_parser():
    toy = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TOY_DEFAULTS.items())
    parser = ArgumentParser(description=__doc__, epilog=f"The toy's defaults: {toy}")
    add_run_options(parser.add_argument_group("the run").add_argument)
    add_training_options(parser.add_argument_group("training").add_argument)
    add_memory_options(parser.add_argument_group("memory and GPUs").add_argument)
    data.add_reading_options(parser.add_argument_group("reading posts and writing answers"))
    return parser


def add_run_options(add):
    add("--model", help="folder or hub name of a Qwen-VL model, or a finished run")
    add("--train", metavar="FILE", help="posts to train on (JSONL)")
    add("--valid", metavar="FILE", help="posts to validate on after each epoch")
    add("--valid-posts", type=positive_int, default=500, help="use the first N posts of --valid")
    add("--test", metavar="FILE", help="posts to predict and score with the final weights")
    add("--out", default="out/run", help="the run's folder")
    add("--resume", action="store_true", help="continue the run in --out where it stopped")
    add("--force", action="store_true", help="resume although settings or posts have changed")
    add("--save-every", type=non_negative_int, default=0, help="save every N steps, too")
    add("--keep", metavar="K", type=positive_int, default=1, help="keep the newest K, and the best")
    add("--log-choices", action="store_true", help="write each sample's L(y_s) to choices.jsonl")
    add("--tensorboard", action="store_true", help="also log for TensorBoard (needs tensorboard)")
    skip_help = "go on however many images can't be read (else to 1%% of the posts, or three)"
    add("--skip-unreadable", action="store_true", help=skip_help)


def add_training_options(add):
    docs = {name: mode.losses.__doc__.splitlines()[0] for name, mode in MODES.items()}
    mode_help = " ".join(f"{name}: {doc}" for name, doc in docs.items())
    add("--mode", choices=list(MODES), default="dynamic", help=mode_help)
    gamma_help = "reason where L(y_s) is below this; auto: below ln 2 / its n tokens, p(y_s) > 1/2"
    add("--gamma", type=gamma_or_auto, default=0.4, help=gamma_help)
    add("--epochs", type=positive_number, default=5, help="passes over the posts, such as 2.5")
    add("--batch-size", type=positive_int, default=32, help="posts per step, over all GPUs")
    add("--lr", type=positive_number, default=5e-5, help="peak learning rate")
    add("--warmup", type=fraction, default=0.03, help="share of the steps with a rising rate")
    add("--final-lr", type=fraction, default=0.02, help="share of the peak at the cosine's end")
    add("--weight-decay", type=non_negative_number, default=0.01, help="AdamW's, for matrices")
    below_1 = number("a number from 0 to below 1", lambda x: 0 <= x < 1)
    add("--beta2", type=below_1, default=0.98, help="second beta of AdamW")
    add("--clip", type=number_or_inf, default=1.0, help="maximum gradient norm; 0: no clipping")
    add("--seed", type=non_negative_int, default=0, help="seeds order, dropout and club world")


def add_memory_options(add):
    add("--micro-batch", type=positive_int, default=4, help="posts in one pass; a matter of memory")
    checkpointing_help = "less memory, more time: the literal step, activations recomputed"
    add("--gradient-checkpointing", action="store_true", help=checkpointing_help)
    freeze_help = "train the language model only; the default with --lora"
    add("--freeze-vision", action=argparse.BooleanOptionalAction, help=freeze_help)
    lora_help = "train an adapter of this rank (needs peft); use about ten times the --lr"
    add("--lora", metavar="RANK", type=whole_number(1, 4096), help=lora_help)
    parallel_help = "under torchrun; ddp: a model on each GPU, fsdp: shards, auto: by GPU memory"
    add("--parallel", choices=["auto", "ddp", "fsdp"], default="auto", help=parallel_help)


def parse_args(arguments=None, parser=None):
    parser = parser or make_parser()
    given, _ = parser.parse_known_args(arguments)
    file = Path(given.out) / "settings.json"
    if given.resume and file.is_file():
        before = read_json(file)
        parser.set_defaults(**{name: before[name] for name in vars(given) if name in before})
    elif given.train is None:
        parser.set_defaults(**TOY_DEFAULTS)
    elif given.model and (Path(checkpoint_of(given.model)) / "toy.json").is_file():
        toy = {name: TOY_DEFAULTS[name] for name in ("lr", "warmup", "micro_batch")}
        parser.set_defaults(**toy)
    args = parser.parse_args(arguments)
    if args.freeze_vision is None:
        args.freeze_vision = args.lora is not None
    return args


# --------------------------------------------------------------------------------------- the step


class TrainingStep(nn.Module):
    """Per-sample losses of a micro-batch of B posts.

    It is a module because DDP and FSDP need all passes of a step in one forward. The
    method is `dynamic` (Ma et al., EMNLP 2025, section 3). Every mode returns (loss,
    plain_loss, use_cot), each (B,): `loss` carries the gradient; `plain_loss` is L(y_s), or None;
    `use_cot` is true where the target was y_c.
    """

    def __init__(self, model, mode="dynamic", gamma=0.4):
        super().__init__()
        self.model, self.mode, self.gamma = model, MODES[mode], gamma

    def forward(self, batch):
        return self.mode.losses(self, batch)

    def sft(self, batch):
        """Plain answers."""
        loss = answer_loss(self.model, batch.prompt, batch.plain)
        return loss, loss.detach(), torch.zeros_like(batch.has_cot)

    def cot(self, batch):
        """Answers that reason first."""
        return answer_loss(self.model, batch.prompt, batch.cot), None, batch.has_cot

    def multitask(self, batch):
        """The mean of both losses."""
        prompt = read_prompt(self.model, batch.prompt)
        plain_loss = answer_loss(self.model, prompt, batch.plain)
        cot_loss = answer_loss(self.model, prompt, batch.cot)
        return (plain_loss + cot_loss) / 2, plain_loss.detach(), batch.has_cot

    def dropout(self, batch):
        """Answers that reason for a random half of the posts (thought dropout)."""
        coin = torch.rand(len(batch.has_cot), device=batch.has_cot.device) < 0.5
        use_cot = coin & batch.has_cot
        target = batch.cot.where(use_cot, batch.plain)
        return answer_loss(self.model, batch.prompt, target), None, use_cot

    def dynamic(self, batch):
        """Answers that reason where the plain one has a loss below gamma."""
        prompt = read_prompt(self.model, batch.prompt)  # image and prompt, once
        with torch.no_grad():
            plain_loss = answer_loss(self.model, prompt, batch.plain)  # L(y_s)
        gamma = batch.plain.threshold(self.gamma)  # (B,); a rule of your own goes here
        use_cot = (plain_loss < gamma) & batch.has_cot
        target = batch.cot.where(use_cot, batch.plain)
        return answer_loss(self.model, prompt, target), plain_loss, use_cot


class Mode(NamedTuple):
    """A row of the table below, which is all that the rest of the project knows of a mode."""

    losses: Callable  # of a TrainingStep and a Batch
    trains: str  # a sample's target: "plain", "cot", "both", or "either", which the mode chooses
    shares_prompt: bool = False  # whether a prompt is read once, for more than one answer
    has_gate: bool = False  # whether L(y_s) is compared with gamma


MODES = {
    "sft": Mode(TrainingStep.sft, "plain"),
    "cot": Mode(TrainingStep.cot, "cot"),
    "multitask": Mode(TrainingStep.multitask, "both", shares_prompt=True),
    "dropout": Mode(TrainingStep.dropout, "either"),
    "dynamic": Mode(TrainingStep.dynamic, "either", shares_prompt=True, has_gate=True),
}

# --------------------------------------------------------------------------------------- the loop


def train(args, ranks):
    """The whole run; returns (model, encoder, run folder)."""
    posts, valid, folder = open_files(args, ranks)
    model, encoder, source, training_step = build_model(args, folder, ranks)
    optimizer = make_optimizer(model, args)
    checkpoints = Checkpoints(folder, model, optimizer, encoder, source, ranks)
    order = data.TrainingOrder(len(posts), args.batch_size, args.seed, args.epochs)
    encoded = data.EncodedPosts(posts, encoder, with_answers=True)
    start = checkpoints.restore()
    ranks.on_rank0(checkpoints.check_space, args, order, start)
    loader = data.load_steps(encoded, order, args.micro_batch, args.workers, ranks, start)

    def validate(step):
        if valid and order.ends_epoch(step) and step > log.evaluated:
            with stop.at_once():  # nothing is lost: a resumed run validates again
                _, scores = predict_and_score(model, encoder, valid, args.valid_posts, args, ranks)
            log.add_evaluation(step, scores)

    with TrainingLog(args, MODES[args.mode], folder, order, start, ranks) as log, Stop() as stop:
        validate(start)
        for step, micro_batches in log.timed(loader):
            ranks.seed(args.seed, step)  # dropout
            lr = set_learning_rate(optimizer, step, len(order), args)
            samples = ranks.total(sum(map(len, micro_batches)))
            for batch in ranks.on_device(micro_batches):
                with bf16_on_cuda(ranks.device):
                    loss, plain_loss, use_cot = training_step(batch)  # (B,) each
                # The mean over all samples of the step. DDP and FSDP average gradients over ranks.
                (loss.sum() / samples * ranks.world_size).backward()
                log.add(batch, loss, plain_loss, use_cot)
            norm = clip_gradients(model, micro_batches, args.clip, step, ranks)
            optimizer.step()
            optimizer.zero_grad()
            log.end_step(step, lr, norm, micro_batches)
            is_due = order.ends_epoch(step) or step % (args.save_every or len(order)) == 0
            if is_due or log.refusal or ranks.any(stop.asked):
                checkpoints.save(step)
                if log.refusal:
                    raise ranks.error(log.refusal)
                if ranks.any(stop.asked):  # perhaps during the save
                    ranks.info(f"stopped after step {step} of {len(order)}; --resume continues")
                    stop.leave()
                validate(step)
                checkpoints.prune(args.keep)
    return model, encoder, folder


def clip_gradients(model, micro_batches, most, step, ranks):
    """Scale the gradients to a norm of at most `most` (0: as they are); returns their norm.

    Raises UserError where it is not finite.
    """
    ranks.drop_unused_gradients(model, micro_batches)
    norm = full_tensor(clip_grad_norm_(model.parameters(), most or math.inf))
    if not norm.isfinite():
        raise ranks.error(
            f"step {step}: the loss or its gradient is not finite; go on from the last checkpoint, "
            "or start anew: a lower --lr or a smaller --clip usually helps"
        )
    return norm


def set_learning_rate(optimizer, step, total, args):
    """Set the learning rate of a step, which counts from 1, and return it."""
    lr = learning_rate(step, total, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def learning_rate(step, total, args):
    """Linear warm-up to --lr, then half a cosine down to --final-lr of it."""
    warmup = max(1, round(args.warmup * total))
    if step <= warmup:
        return args.lr * step / warmup
    done = (step - 1 - warmup) / max(1, total - warmup)
    return args.lr * (args.final_lr + (1 - args.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(model, args):
    """AdamW on the trained parameters, with weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, float(args.beta2)), fused=True)


# --------------------------------------------------------------------------- before the first step


def open_files(args, ranks):
    """(posts, validation posts or None, run folder); the folder is made, or opened to resume."""
    posts = ranks.from_rank0(data.Posts, args.train, True, args.map)
    valid = ranks.from_rank0(data.Posts, args.valid, True, args.map) if args.valid else None
    ranks.on_rank0(check_reasoning, posts, args.mode)
    ranks.on_rank0(say_posts, posts)
    if valid:
        ranks.on_rank0(say_posts, valid, "Validation", args.valid_posts)
    settings = ranks.on_rank0(run_settings, args, posts)
    ranks.on_rank0(open_run, Path(args.out), settings, FREE_TO_CHANGE, args.resume, args.force)
    return posts, valid, Path(args.out)


def run_settings(args, posts):
    """A run's settings as a dict, with what files hold that decide what it learns.

    Files have their whole paths, so that a run can be resumed from any folder. Raises UserError.
    """
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "force", "out")}
    for name in (*FILES, "model") if is_local(args.model) else FILES:
        settings[name] = settings[name] and str(Path(settings[name]).resolve())
    if args.prompt_file:
        settings["prompt"] = data.load_prompt_file(args.prompt_file, "{text}")
    return settings | {"posts": len(posts), "train_digest": posts.digest()}


def check_reasoning(posts, mode):
    """Raise UserError where posts lack the reasoning that a mode trains them on."""
    missing, trains = posts.without_cot, MODES[mode].trains
    if trains != "plain" and missing > (len(posts) - 1 if trains == "either" else 0):
        other = "sft" if missing == len(posts) else "dynamic, which needs it of some posts only"
        raise UserError(
            f"{posts.path}: {missing} of {plural(len(posts), 'post')} without a 'cot', which "
            f"--mode {mode} needs; let gen_cot.py write it, or use --mode {other}"
        )


def build_model(args, folder, ranks):
    """(model, encoder, folder it was read from, the training step as a module of all ranks)."""
    last = folder / "last"  # of a run that is resumed
    source = ranks.from_rank0(find_model, str(last) if last.is_file() else args.model)
    options = ranks.from_rank0(data.resolve_options, args, source)
    name = source if is_local(args.model) else args.model
    ranks.info(f"loading {name} …")
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if ranks.device.type == "cpu":  # threads that share a core with a worker slow each other down
        torch.set_num_threads(max(1, torch.get_num_threads() - args.workers))
    # What is trained is float32, an adapter's weights, too.
    dtype, on_rank0 = compute_dtype(ranks.device) if args.lora else torch.float32, ranks.rank == 0
    model, encoder, _ = ranks.on_all_ranks(load, source, "cpu", dtype, options, on_rank0)
    (encoder,) = ranks.from_rank0(tuple, [encoder])  # a network folder may differ by rank
    ranks.on_all_ranks(freeze, model, args)
    model.train()
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    training_step = ranks.wrap_model(TrainingStep(model, args.mode, args.gamma))
    ranks.on_rank0(say_model, name, model, ranks)
    return model, encoder, source, training_step


def freeze(model, args):
    """Freeze what --freeze-vision leaves out; with --lora all but the adapter. Raises UserError."""
    if not args.lora:
        model.model.visual.requires_grad_(not args.freeze_vision)
    if adapter := adapter_config(model):
        if adapter.r != args.lora:
            raise UserError(
                f"{args.model}: an adapter of rank {adapter.r}; continue to train it with --lora "
                f"{adapter.r}, or make a whole model of it with python -m tools.merge"
            )
    elif args.lora:
        torch.manual_seed(args.seed)
        base = checkpoint_of(args.model)
        base = str(Path(base).resolve()) if is_local(base) else base
        add_adapter(model, args.lora, base, vision=not args.freeze_vision)


# --------------------------------------------------------------------- predictions, and the report


def predict_and_score(model, encoder, posts, most, args, ranks):
    """(predictions, scores) of the first `most` posts, shared out to the ranks; rank 0 gets them.

    The scores also have "cut" and "unreadable": how many answers ran out of tokens, and how many
    images could not be read.
    """
    batch_size = 4 * args.micro_batch  # without gradients there is room for more
    count = min(most, len(posts))
    share = range(ranks.rank, count, ranks.world_size)
    loader = data.prompt_loader(posts, share, encoder, batch_size, args.workers)
    limit = args.max_new_tokens
    predictions = predict(unsharded_model(model), encoder, loader, max_new_tokens=limit)
    bar = progress(predictions, len(share), posts.path.name, leave=None, disable=ranks.rank > 0)
    by_id = {prediction["id"]: prediction for prediction in ranks.all_gather(list(bar))}
    if ranks.rank > 0:
        return None, None
    references = [posts[index] for index in range(count)]
    predictions = [
        by_id[reference["id"]] | {"post": digest(reference["text"])} for reference in references
    ]
    scores = score(predictions, references, mapped_keyphrases(args.train, args.map))
    scores["cut"] = sum("cut" in prediction for prediction in predictions)
    scores["unreadable"] = sum("error" in prediction for prediction in predictions)
    return predictions, scores


def report(model, encoder, folder, posts, args, ranks):
    """Predict and score --test, show three predictions and the next command.

    Returns 1 if an image could not be read.
    """
    predictions, scores = predict_and_score(model, encoder, posts, len(posts), args, ranks)
    if ranks.rank > 0:
        return 0
    write_atomic(folder / "test_preds.jsonl", "".join(map(to_line, predictions)))
    write_atomic(folder / "test_scores.json", json.dumps(scores, indent=1) + "\n")
    cut, unreadable = scores.pop("cut"), scores.pop("unreadable")
    print(table(scores))
    if cut:
        print(f"{plural(cut, 'answer')} cut off after {plural(args.max_new_tokens, 'token')}")
    if unreadable:
        file = folder / "test_preds.jsonl"
        print(f"{plural(unreadable, 'image')} could not be read: see the errors in {file}")
    print_examples(posts, predictions, folder, args.max_new_tokens)
    return 1 if unreadable else 0


def check_args(args):
    """Raise UserError for settings that don't go together, or that need a missing package."""
    if args.lora:
        need_peft()
    if args.tensorboard:
        tensorboard_writer()
    if args.resume and not (Path(args.out) / "settings.json").is_file():
        raise UserError(f"{args.out}: no run to resume here; leave out --resume to start one")
    for name, other in (("model", "train"), ("train", "model")):
        if not getattr(args, name) and (getattr(args, other) or args.valid or args.test):
            raise UserError(f"--{name} is missing; without any files it would be the club world")


def main():
    started = time.monotonic()
    args = parse_args()
    check_args(args)
    hint = (
        "a smaller --micro-batch takes less and changes no result, python -m tools.memory "
        "estimates what other settings need; --resume continues from the last checkpoint"
    )
    with Ranks(args.device, args.parallel) as ranks, out_of_memory(hint), ExitStack() as stack:
        ranks.on_rank0(stack.enter_context, locked(Path(args.out) / "log.jsonl"))
        if args.train is None:
            ranks.info(f"No --train given: the club world {args.seed}, written beside {args.out}")
            vars(args).update(ranks.from_rank0(write_beside, args.out, args.seed))
        test = ranks.from_rank0(data.Posts, args.test, True, args.map) if args.test else None
        model, encoder, folder = train(args, ranks)
        code = report(model, encoder, folder, test, args, ranks) if test else 0
        ranks.on_rank0(say_end, args, folder, ranks.device, started)
        return code


if __name__ == "__main__":
    run(main)
