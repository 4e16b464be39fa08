"""Train a vision-language model to predict keyphrases, reasoning only where it pays (Dynamic CoT).

    python train.py                                   # the club world and a toy model, on a CPU
    python train.py --model Qwen/Qwen2.5-VL-3B-Instruct --train train.jsonl --valid valid.jsonl
    torchrun --nproc-per-node 8 train.py …            # the same on eight GPUs

Without --train it trains on the club world, with the toy model's own defaults (see below).
"""

import argparse
import json
import math
import shlex
import time
from contextlib import ExitStack
from pathlib import Path

import data
from evaluate import UserError, non_negative_int, plural, run, score, table
from support.bars import busy
from support.checkpoint import Checkpoints, Stop, checkpoint_of, find_model, is_local, open_run
from support.console import (
    ArgumentParser,
    fraction,
    info,
    number_in,
    out_of_memory,
    positive_int,
    progress,
    whole_number,
)
from support.distributed import Ranks, compute_dtype, full_tensor
from support.jsonl import locked, to_line, write_atomic
from support.log import TrainingLog, tensorboard_writer
from support.records import train_keyphrases
from support.screen import say_end, say_model, say_posts

# The toy model's own defaults; a setting on the command line takes precedence.
TOY = dict(lr=2e-3, warmup=0.1, epochs=2, micro_batch=32, workers=0)
TOY |= dict(valid_posts=200, max_new_tokens=64)

# Settings that a resumed run may change; the others decide what is learned.
FREE_TO_CHANGE = """resume force save_every keep out device workers micro_batch parallel test
    gradient_checkpointing valid valid_posts max_new_tokens log_choices tensorboard""".split()


def make_parser():
    toy = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TOY.items())
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
    every_help = "also save every N steps; 0: only after each epoch and at the end"
    add("--save-every", metavar="N", type=non_negative_int, default=0, help=every_help)
    keep_help = "keep the newest K checkpoints, and the best"
    add("--keep", metavar="K", type=positive_int, default=1, help=keep_help)
    choices_help = "write L(y_s) and the choice of each sample to choices.jsonl"
    add("--log-choices", action="store_true", help=choices_help)
    add("--tensorboard", action="store_true", help="also log for TensorBoard (needs tensorboard)")


def add_training_options(add):
    mode_help = "sft: plain answers; cot: reasoning; multitask: both; dynamic: gamma decides"
    add("--mode", choices=["sft", "cot", "multitask", "dynamic"], default="dynamic", help=mode_help)
    gamma_help = "a sample whose plain answer has a loss below this is taught to reason"
    add("--gamma", type=number_in("[0, inf]"), default=0.4, help=gamma_help)
    epochs_help = "passes over the posts, such as 5 or 2.5; one step at least"
    add("--epochs", type=number_in("(0, 1e6]"), default=5, help=epochs_help)
    add("--batch-size", type=positive_int, default=32, help="posts per step, over all GPUs")
    add("--lr", type=number_in("(0, inf)"), default=5e-5, help="peak learning rate")
    warmup_help = "share of the steps with a rising learning rate"
    add("--warmup", type=fraction, default=0.03, help=warmup_help)
    add(
        "--final-lr", type=fraction, default=0.02, help="share of the peak left at the cosine's end"
    )
    decay_help = "weight decay of AdamW, for matrices only"
    add("--weight-decay", type=number_in("[0, inf)"), default=0.01, help=decay_help)
    add("--beta2", type=number_in("[0, 1)"), default=0.98, help="second beta of AdamW")
    clip_help = "maximum gradient norm; 0: no clipping"
    add("--clip", type=number_in("[0, inf]"), default=1.0, help=clip_help)
    seed_help = "sets the order of the posts, the club world and the toy model"
    add("--seed", type=non_negative_int, default=0, help=seed_help)


def add_memory_options(add):
    micro_help = "posts in one forward pass; affects memory and speed, not the result"
    add("--micro-batch", type=positive_int, default=4, help=micro_help)
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
    if parser.parse_known_args(arguments)[0].train is None:
        parser.set_defaults(**TOY)
    args = parser.parse_args(arguments)
    if args.freeze_vision is None:
        args.freeze_vision = args.lora is not None
    return args


# --------------------------------------------------------------------------------------- the loop


def train(args, ranks):
    """The whole run; returns (model, encoder, run folder)."""
    posts, valid, folder, resumed = open_files(args, ranks)
    model, encoder, source, training_step = build_model(args, folder, resumed, ranks)
    from torch.nn.utils import clip_grad_norm_  # now: mistakes in the files are told before

    from model import bf16_on_cuda

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, args)
    checkpoints = Checkpoints(folder, model, optimizer, encoder, source, ranks)

    steps_per_epoch = math.ceil(len(posts) / args.batch_size)
    total = round_up(args.epochs * steps_per_epoch)
    step = checkpoints.restore() if resumed else 0
    encoded = data.EncodedPosts(posts, encoder, with_answers=True)
    with TrainingLog(args, folder, step, total, len(posts), ranks) as log, Stop() as stop:

        def validate():
            with stop.at_once():  # nothing is lost: a resumed run validates again
                _, scores = predict_and_score(model, encoder, valid, args.valid_posts, args, ranks)
            log.add_evaluation(step, scores)

        if valid and step > log.evaluated and (step % steps_per_epoch == 0 or step == total):
            validate()
        while step < total:
            epoch, done = divmod(step, steps_per_epoch)
            steps = data.epoch_order(len(posts), args.batch_size, args.seed, epoch)
            steps = steps[done:]  # skip what was trained before resuming
            steps = steps[: total - step]  # the last epoch may be a part of one
            loader = data.Loader(
                encoded, steps, args.micro_batch, args.workers, ranks.rank, ranks.world_size
            )
            for micro_batches, skipped in loader:
                log.start_step(loader.waited)
                ranks.seed(args.seed, step)  # dropout
                lr = learning_rate(step, total, args)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                images = sum("pixel_values" in batch.prompt for batch in micro_batches)
                samples, images = ranks.total([sum(map(len, micro_batches)), images])
                for i, batch in enumerate(micro_batches):
                    # DDP reduces gradients once per step, FSDP after every micro-batch.
                    ranks.sync_gradients(i == len(micro_batches) - 1)
                    batch = batch.to(ranks.device)
                    with bf16_on_cuda(ranks.device):
                        loss, plain_loss, use_cot = training_step(batch)  # (B,) each
                    # The mean is over all samples of the step, on all ranks. DDP and FSDP average
                    # gradients over ranks, so multiply by world_size to get their sum.
                    (loss.sum() / samples.clamp(min=1) * ranks.world_size).backward()
                    log.add(batch, loss, plain_loss, use_cot)
                ranks.drop_unused_gradients(model, samples, images)
                norm = full_tensor(clip_grad_norm_(parameters, args.clip or math.inf))
                if not norm.isfinite():
                    raise ranks.error(f"step {step + 1}: {NOT_FINITE}")
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                log.end_step(step, epoch, lr, norm, skipped)
                if ranks.any(stop.asked):
                    checkpoints.save(step)
                    stop.leave(f"stopped after step {step} of {total}; --resume continues", ranks)
                if args.save_every and step % args.save_every == 0:
                    checkpoints.save(step)
                    checkpoints.prune(args.keep)
            checkpoints.save(step)
            if valid:
                validate()
            checkpoints.prune(args.keep)
    return model, encoder, folder


NOT_FINITE = (
    "the loss or its gradient is not finite; the last checkpoint is kept; a lower --lr or a smaller"
    " --clip usually helps"
)


def round_up(steps):
    """A whole number of steps, at least 1; 1.1 * 100, which is above 110 in binary, gives 110."""
    return max(1, math.ceil(round(steps, 6)))


def learning_rate(step, total, args):
    """Linear warm-up to --lr, then half a cosine down to --final-lr of it."""
    warmup = max(1, round(args.warmup * total))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return args.lr * (args.final_lr + (1 - args.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(parameters, args):
    """AdamW with weight decay on matrices only."""
    import torch

    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, float(args.beta2)), fused=True)


# --------------------------------------------------------------------------- before the first step


def open_files(args, ranks):
    """(posts, validation posts or None, run folder, whether to resume from its last checkpoint)."""
    posts = ranks.from_rank0(data.Posts, args.train, True, args.map)
    valid = None
    if args.valid:
        valid = ranks.from_rank0(data.Posts, args.valid, True, args.map)
    ranks.on_rank0(check_reasoning, posts, args.mode)
    ranks.on_rank0(say_posts, posts)
    if valid:
        ranks.on_rank0(say_posts, valid, "Validation", args.valid_posts)
    folder, settings = Path(args.out), ranks.on_rank0(run_settings, args, posts)
    ranks.on_rank0(open_run, folder, settings, args.resume, args.force)
    return posts, valid, folder, args.resume and ranks.from_rank0((folder / "last").is_file)


def run_settings(args, posts):
    """What decides what a run learns, as a dict; it has the content of files. Raises UserError."""
    settings = {k: value for k, value in vars(args).items() if k not in FREE_TO_CHANGE}
    if is_local(args.model):
        settings["model"] = str(Path(args.model).resolve())
    if args.prompt_file:
        settings["prompt"] = data.read_prompt(args.prompt_file, "{text}")
    return settings | {"posts": len(posts), "train_digest": posts.digest()}


def check_reasoning(posts, mode):
    """cot and multitask need reasoning for every post, dynamic for some. Raises UserError."""
    missing = posts.without_cot
    if missing and mode in ("cot", "multitask"):
        raise UserError(
            f"{posts.path}: {missing} of {plural(len(posts), 'post')} without a 'cot'; --mode "
            f"{mode} needs it for all: let gen_cot.py write it, or use --mode dynamic, which "
            "trains those posts on their plain answers"
        )
    if missing == len(posts) and mode == "dynamic":
        raise UserError(
            f"{posts.path}: no post has a 'cot', so none can be taught to reason; let gen_cot.py "
            "write it, or use --mode sft"
        )


def build_model(args, folder, resumed, ranks):
    """(model, encoder, folder it was read from, the training step as a module of all ranks)."""
    source = ranks.from_rank0(find_model, str(folder / "last") if resumed else args.model)
    ranks.on_rank0(data.use_own_limits, args, source)
    name = source if is_local(args.model) else args.model
    with busy(f"loading {name}", disable=ranks.rank > 0):
        model, encoder, training_step = load_model(args, source, ranks)
    ranks.on_rank0(say_model, name, model, ranks)
    return model, encoder, source, training_step


def load_model(args, source, ranks):
    """(model, encoder, the training step as a module of all ranks)."""
    import torch

    from model import DistributedStep, DynamicCoT, load

    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if ranks.device.type == "cpu":  # threads that share a core with a worker slow each other down
        torch.set_num_threads(max(1, torch.get_num_threads() - args.workers))
    # What is trained is float32, an adapter's weights, too.
    dtype = compute_dtype(ranks.device) if args.lora else torch.float32
    model, encoder, _ = ranks.on_all_ranks(
        load, str(source), "cpu", dtype, data.encoder_options(args), weights=ranks.rank == 0
    )
    encoder = ranks.from_rank0(lambda: encoder)  # a network folder may answer ranks differently
    ranks.on_all_ranks(freeze, model, args)
    model.train()
    if args.gradient_checkpointing:
        old_name = model.gradient_checkpointing_enable  # transformers is renaming it
        getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
    step_class = DistributedStep if ranks.world_size > 1 else DynamicCoT
    literal = args.gradient_checkpointing  # keeps no cache
    training_step = step_class(model, args.mode, args.gamma, share_prompt=not literal)
    return model, encoder, ranks.wrap_model(training_step)


def freeze(model, args):
    """Freeze what --freeze-vision leaves out; with --lora all but the adapter. Raises UserError."""
    import torch

    from support.adapters import adapter_config, add_adapter

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
    from model import predict, unsharded_model

    batch_size = 4 * args.micro_batch  # without gradients there is room for more
    count = min(most, len(posts))
    share = range(ranks.rank, count, ranks.world_size)
    size = data.window(batch_size)
    steps = [list(share[i : i + size]) for i in range(0, len(share), size)]
    encoded = data.EncodedPosts(posts, encoder, with_answers=False)
    loader = data.Loader(encoded, steps, batch_size, args.workers)
    limit = args.max_new_tokens
    predictions = predict(unsharded_model(model), encoder, loader, max_new_tokens=limit)
    bar = progress(predictions, len(share), posts.path.name, leave=None, disable=ranks.rank > 0)
    by_id = {prediction["id"]: prediction for prediction in ranks.all_gather(list(bar))}
    if ranks.rank > 0:
        return None, None
    references = [posts[index] for index in range(count)]
    predictions = [by_id[reference["id"]] for reference in references]
    scores = score(predictions, references, train_keyphrases(args.train, args.map))
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
    pairs = [(posts[index], prediction) for index, prediction in enumerate(predictions)]
    reasoned = [pair for pair in pairs if pair[1]["think"]]
    direct = [pair for pair in pairs if not pair[1]["think"]]
    shown = (reasoned[:2] + direct + reasoned[2:])[:3]
    for record, prediction in shown:
        print(f"\nPost       {record['text']}  [{record['image']}]")
        print(f"Reference  {data.plain_answer(record['keyphrases'])}")
        print(f"Predicted  {data.plain_answer(prediction['keyphrases'])}")
        why_none = prediction.get("error", "answered directly")
        print(f"Reasoning  {prediction['think'] or f'none: {why_none}'}")
    record, _ = shown[0]
    image = str(posts.image_path(record) or "none")
    post, name = f"{shlex.quote(image)} {shlex.quote(record['text'])}", folder / "last"
    print(f"\nTry next:  python infer.py {post} --model {shlex.quote(str(name))}")
    return 1 if unreadable else 0


def use_club_world(args, ranks):
    """Write the embedded world and its toy model beside the run, and train on them."""
    from tools.clubworld import write_toy_model, write_world

    world = Path(args.out).parent / f"clubworld-{args.seed}"
    names = {"model": "toy", "train": "train.jsonl", "valid": "valid.jsonl", "test": "test.jsonl"}
    vars(args).update({name: str(world / file) for name, file in names.items()})
    if ranks.rank == 0:
        info(f"No --train given: the club world (seed {args.seed}) in {world}")
    ranks.on_rank0(write_world, world, args.seed)
    with busy("making the toy model", disable=ranks.rank > 0):
        ranks.on_rank0(write_toy_model, world / "toy", args.seed)


def check_args(args):
    """Raise UserError for settings that don't go together, or that need a missing package."""
    if args.lora:
        from support.adapters import need_peft

        need_peft()
    if args.tensorboard:
        tensorboard_writer()
    if args.train is None and (args.model or args.valid or args.test):
        raise UserError(
            "--train is missing: name the posts to train on, or leave out --model, --valid and "
            "--test too for the club world"
        )
    if args.train is not None and args.model is None:
        raise UserError(
            "--model is missing: a folder or hub name of a Qwen-VL model, such as "
            "Qwen/Qwen2.5-VL-3B-Instruct"
        )


def main():
    started = time.monotonic()
    args = parse_args()
    check_args(args)
    mend = (
        "a smaller --micro-batch takes less and changes no result, python -m tools.memory shows "
        "what else would; --resume continues from the last checkpoint"
    )
    with Ranks(args.device, args.parallel) as ranks, out_of_memory(mend), ExitStack() as stack:
        ranks.on_rank0(stack.enter_context, locked(Path(args.out) / "log.jsonl"))
        if args.train is None:
            use_club_world(args, ranks)
        test = ranks.from_rank0(data.Posts, args.test, True, args.map) if args.test else None
        model, encoder, folder = train(args, ranks)
        code = report(model, encoder, folder, test, args, ranks) if test else 0
        ranks.on_rank0(say_end, args, folder, ranks.device, started)
        return code


if __name__ == "__main__":
    run(main)
