"""Train a vision-language model to predict keyphrases, reasoning first only where that pays (Dynamic CoT).

python train.py                                   # the club world and a toy model: minutes on a CPU
python train.py --model Qwen/Qwen2.5-VL-3B-Instruct --train train.jsonl --valid valid.jsonl --out out/run1
torchrun --nproc-per-node 8 train.py …            # the same on eight GPUs
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import time
from pathlib import Path

import checkpoint
import data
from evaluate import UserError, natural, parse_line, read_lines, run, score, table, train_keyphrases

# What the toy needs otherwise than a real model; every setting given on the command line still wins.
TOY = {
    "lr": 2e-3,
    "warmup": 0.1,
    "epochs": 2,
    "micro_batch": 32,
    "max_new_tokens": 64,
    "valid_posts": 200,
    "workers": 1,
}


def settings(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=data.HelpFormatter,
        epilog="Without --train: the embedded club world with its toy model, and these defaults instead: "
        + ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TOY.items()),
    )
    add = parser.add_argument
    add("--model", help="folder or hub name of a Qwen-VL model, or a finished run")
    add("--train", metavar="FILE", help="posts to train on (JSONL)")
    add(
        "--valid",
        metavar="FILE",
        help="posts to validate on at the end of each epoch, and of the run",
    )
    add("--test", metavar="FILE", help="posts to predict and score with the final weights")
    add("--out", default="out/run", help="the run's folder")
    add(
        "--merge",
        metavar="FOLDER",
        help="train nothing: write the adapter that --model names, and its base, as one model",
    )
    add(
        "--estimate",
        action="store_true",
        help="train nothing: say what a step with these settings takes of a GPU's memory",
    )
    add(
        "--gpus",
        type=data.count,
        default=int(os.environ.get("WORLD_SIZE", 1)),
        help="how many, for --estimate",
    )
    add(
        "--lengths",
        metavar=("PROMPT", "ANSWER"),
        nargs=2,
        type=data.count,
        default=[160, 160],
        help="for --estimate: tokens of the longest prompt without its image, and of the longest answer with reasoning",
    )
    add("--resume", action="store_true", help="go on where the run in --out stopped")
    add(
        "--force",
        action="store_true",
        help="resume although settings or posts are others than before",
    )
    add(
        "--save-every",
        metavar="N",
        type=natural,
        default=0,
        help="save a checkpoint every N steps, too; 0: at the end of each epoch, and of the run, only",
    )
    add(
        "--keep",
        metavar="K",
        type=data.count,
        default=1,
        help="keep the newest K checkpoints, and the best",
    )
    add(
        "--mode",
        choices=["sft", "cot", "multitask", "dynamic"],
        default="dynamic",
        help="plain answers; reasoning for all; the mean of both losses; each sample's choice by gamma",
    )
    add(
        "--gamma",
        type=float,
        default=0.4,
        help="a sample whose plain answer's loss is below this reasons",
    )
    add(
        "--epochs",
        type=data.times,
        default=5,
        help="times through the training posts; 2.5 stops in the midst of the third",
    )
    add("--lr", type=float, default=5e-5, help="peak learning rate")
    add(
        "--warmup",
        type=float,
        default=0.03,
        help="share of the steps over which the learning rate rises",
    )
    add(
        "--final-lr",
        type=float,
        default=0.02,
        help="share of the peak learning rate left at the end of the cosine",
    )
    add("--weight-decay", type=float, default=0.01, help="AdamW's, on matrices only")
    add("--beta2", type=float, default=0.98, help="AdamW's second beta")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient, 0 for any")
    add("--batch-size", type=data.count, default=32, help="posts a step")
    add(
        "--micro-batch",
        type=data.count,
        default=4,
        help="posts at once in memory; changes speed, not the result",
    )
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="less memory for a slower, literal two-pass step",
    )
    add(
        "--freeze-vision",
        action=argparse.BooleanOptionalAction,
        help="train the language model only; --lora's default",
    )
    add(
        "--lora",
        metavar="RANK",
        type=data.count,
        help="train an adapter of this rank on the frozen model (needs the package peft); wants ten times the --lr",
    )
    add(
        "--parallel",
        choices=["auto", "ddp", "fsdp"],
        default="auto",
        help="under torchrun: the whole model on each GPU, shards of it, or ddp where that takes half of the memory",
    )
    add(
        "--valid-posts",
        type=data.count,
        default=500,
        help="at most this many posts of --valid, from its beginning",
    )
    add(
        "--log-choices",
        action="store_true",
        help="write each sample's L(y_s) and choice to choices.jsonl",
    )
    add(
        "--seed",
        type=natural,
        default=0,
        help="decides the order of the posts, and the club world and toy model",
    )
    data.add_reading_options(parser)
    if parser.parse_known_args(arguments)[0].train is None:
        parser.set_defaults(**TOY)
    args = parser.parse_args(arguments)
    if args.freeze_vision is None:
        args.freeze_vision = args.lora is not None
    return args


def train(args, processes):
    """The whole run; returns (model, encoder, run folder)."""
    import torch

    from model import bf16_on_cuda

    posts, valid, folder, resumed = open_files(args, processes)
    model, encoder, source, step_losses = build_model(args, folder, resumed, processes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, args.beta2),
        fused=True,
    )

    steps_an_epoch = math.ceil(len(posts) / args.batch_size)
    total = math.ceil(round(args.epochs * steps_an_epoch, 6))  # 1.1 * 100 is above 110 in binary
    step = checkpoint.restore(folder, model, optimizer) if resumed else 0

    def save():
        checkpoint.save(folder, step, model, source, encoder.prompt, optimizer, processes)
        log.start_clock()

    def validate():
        with stop.at_once():  # the step is saved, and a resumed run validates first
            _, scores = predict_and_score(
                model, encoder, valid, args.valid_posts, args, "validation", processes
            )
        log.evaluation(step, scores)
        log.start_clock()

    with (
        contextlib.closing(
            Log(folder, step, total, len(posts), args.log_choices, processes)
        ) as log,
        checkpoint.Stop() as stop,
    ):
        if valid and (step == total or step % steps_an_epoch == 0) and step > log.evaluated:
            validate()
        while step < total:
            epoch, done = divmod(step, steps_an_epoch)
            order = data.epoch_order(len(posts), args.batch_size, args.seed, epoch)[
                done : done + total - step
            ]
            loader = data.Loader(
                posts,
                encoder,
                order,
                args.micro_batch,
                args.workers,
                True,
                processes.rank,
                processes.size,
            )
            for micro_batches, skipped in loader:
                processes.seed(args.seed, step)
                lr = learning_rate(step, total, args)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                samples = processes.count(sum(map(len, micro_batches)))
                for batch in processes.passes(micro_batches):
                    with bf16_on_cuda(processes.device):
                        loss, plain_loss, reasons = step_losses(batch)
                    (
                        loss.sum() * processes.size / samples
                    ).backward()  # gradients are averaged over the processes
                    log.add(batch, loss, plain_loss, reasons)
                norm = checkpoint.whole(
                    torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
                )
                if not norm.isfinite():
                    raise processes.shared(
                        f"step {step + 1}: the loss or its gradient is not finite; the last checkpoint "
                        "is kept; a lower --lr or a smaller --clip is what mostly helps"
                    )
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                log.step(step, epoch, lr, norm, skipped, loader.waited)

                if processes.any(stop.asked):
                    save()
                    stop.leave(
                        f"stopped after step {step} of {total}, which is saved; --resume goes on",
                        processes,
                    )
                if args.save_every and step % args.save_every == 0:
                    save()
                    processes.main_only(checkpoint.prune, folder, args.keep)
            save()
            if valid:
                validate()
            processes.main_only(checkpoint.prune, folder, args.keep)
    return model, encoder, folder


def open_files(args, processes):
    """(posts, validation posts or None, run folder, whether to go on from its last checkpoint)."""
    posts = processes.main_first(data.Posts, args.train, for_training=True)
    valid = processes.main_first(data.Posts, args.valid, for_training=True) if args.valid else None
    processes.main_only(check_reasoning, posts, args.mode)
    folder = Path(args.out)
    processes.main_only(
        checkpoint.open_run, folder, run_settings(args, posts), args.resume, args.force
    )
    return posts, valid, folder, args.resume and (folder / "last").is_file()


def build_model(args, folder, resumed, processes):
    """(model, encoder, folder it was read from, the training step as a module that the processes share)."""
    import torch

    from model import DynamicCoT, find, load

    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if (
        processes.device.type == "cpu"
    ):  # threads that share their cores with the loader wait for one another every step
        torch.set_num_threads(max(1, torch.get_num_threads() - args.workers))
    source = processes.main_first(
        find, checkpoint.model_folder(str(folder / "last") if resumed else args.model)
    )
    dtype = (
        torch.bfloat16 if args.lora and processes.device.type == "cuda" else torch.float32
    )  # trained in float32
    model, encoder, _ = processes.together(
        load,
        str(source),
        dtype=dtype,
        prompt_file=args.prompt_file,
        max_pixels=args.max_pixels,
        max_length=args.max_length,
        weights=processes.rank == 0,
    )
    processes.together(choose_trained, model, args)
    model.train()
    if args.gradient_checkpointing:
        enable_checkpointing = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        enable_checkpointing({"use_reentrant": False})  # transformers is renaming it
    step_losses = DynamicCoT(
        model,
        args.mode,
        args.gamma,
        share_prompt=not args.gradient_checkpointing,
        always_look=processes.size > 1,
    )
    return model, encoder, source, processes.spread(step_losses)


def choose_trained(model, args):
    """Freeze what --freeze-vision leaves alone; or everything, with --lora's adapter on it. Raises UserError."""
    import torch

    from model import adapter_of, add_adapter, is_local

    if not args.lora:
        model.model.visual.requires_grad_(not args.freeze_vision)
    if adapter := adapter_of(model):
        if adapter.r != args.lora:
            raise UserError(
                f"{args.model}: an adapter of rank {adapter.r}; train it on with --lora {adapter.r}, or make "
                "a whole model of it with --merge"
            )
    elif args.lora:
        torch.manual_seed(args.seed)
        base = checkpoint.model_folder(args.model)
        add_adapter(
            model,
            args.lora,
            str(Path(base).resolve()) if is_local(base) else base,
            not args.freeze_vision,
        )


def learning_rate(step, total, args):
    """Linear warm-up to --lr, then half a cosine down to --final-lr of it."""
    warmup = max(1, round(args.warmup * total))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return args.lr * (args.final_lr + (1 - args.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def predict_and_score(model, encoder, posts, most, args, what, processes):
    """(predictions, scores) of the first `most` posts, with seen and unseen by the training file.

    The processes share the posts; the scores are None in all but the first. Beside the evaluator's classes they have
    "cut" and "unreadable": how many answers ran out of tokens, and how many images could not be read.
    """
    from model import predict

    at_once = 4 * args.micro_batch  # without gradients there is room for more
    count = min(most, len(posts))
    share = range(processes.rank, count, processes.size)
    steps = [list(share[start : start + at_once]) for start in range(0, len(share), at_once)]
    loader = data.Loader(posts, encoder, steps, at_once, args.workers, False)
    predictions = predict(
        processes.whole_model(model), encoder, loader, max_new_tokens=args.max_new_tokens
    )
    bar = data.progress(predictions, len(share), what, silent=processes.rank > 0)
    by_id = {prediction["id"]: prediction for prediction in processes.gather(list(bar))}
    if processes.rank > 0:
        return None, None
    references = [posts[index] for index in range(count)]
    predictions = [by_id[reference["id"]] for reference in references]
    scores = score(predictions, references, train_keyphrases(args.train))
    return predictions, scores | {
        "cut": sum("cut" in prediction for prediction in predictions),
        "unreadable": sum("error" in prediction for prediction in predictions),
    }


# ----------------------------------------------------------------------------------------------- the log


class Log:
    """log.jsonl, skipped.jsonl and the progress bar; what a step did is summed up on the device until its end.

    Only the first of several processes writes and shows.
    """

    def __init__(self, folder, step, total, posts, log_choices, processes):
        self.folder, self.most_skipped, self.processes = folder, posts // 100, processes
        self.choices = Choices(folder / "choices.jsonl", step, log_choices, processes)
        self.file, lines = processes.main_first(
            open_appended, folder / "log.jsonl", step, processes.rank == 0
        )
        self.skipped_file, skipped = processes.main_first(
            open_appended, folder / "skipped.jsonl", step, processes.rank == 0
        )
        self.skipped = {line["id"] for line in skipped}
        self.evaluated, self.best = (
            0,
            (-1.0, 0),
        )  # the last evaluation's step; the best F1@1 and its step
        for line in lines:
            self.remember(line)
        self.bar = data.progress(None, total, "training", "step", step, silent=processes.rank > 0)
        self.sums = None
        self.start_clock()

    def start_clock(self):
        """What comes next is a step's time, and none of what was before it."""
        self.started = time.perf_counter()

    def add(self, batch, loss, plain_loss, reasons):
        """Take in one micro-batch's per-sample losses (B,)."""
        import torch

        count = len(batch)
        plain = loss.new_full((), float("nan")) if plain_loss is None else plain_loss.sum()
        targets = torch.where(
            reasons, batch.cot.mask[:count].sum(1), batch.plain.mask[:count].sum(1)
        )
        prompts = batch.prompt["attention_mask"][:count]
        widest = targets.max() if count else targets.new_zeros(())
        sums = torch.stack(
            [
                loss.detach().sum(),
                plain,
                reasons.sum(),
                loss.new_tensor(count),
                loss.new_tensor(batch.shortened),
                prompts.sum() + targets.sum(),
                batch.prompt["mm_token_type_ids"][:count].sum(),
                prompts.numel() + count * widest,
            ]
        ).double()
        self.sums = sums if self.sums is None else self.sums + sums
        self.choices.add(batch, plain_loss, reasons)

    def step(self, step, epoch, lr, norm, skipped, waited):
        """Write the step's line. Raises UserError once more than 1% of the posts had to be skipped."""
        loss, plain, reasons, samples, shortened, tokens, of_images, places = self.processes.sum(
            self.sums
        ).tolist()
        if samples:
            seconds = time.perf_counter() - self.started
            line = {
                "step": step,
                "epoch": epoch,
                "loss": loss / samples,
                "cot_share": reasons / samples,
                "plain_loss": None if math.isnan(plain) else plain / samples,
                "lr": lr,
                "grad_norm": norm.item(),
                "samples": int(samples),
                "tokens": int(tokens),
                "padding": round((places - tokens) / (places - of_images), 4),
                "seconds": round(seconds, 3),
                "waited": round(waited, 3),
            }
            if shortened:
                line["shortened"] = int(shortened)
            write_line(self.file, line)
            self.choices.write(step)
            self.bar.set_postfix_str(
                f"loss {line['loss']:.3f}, {line['cot_share']:.0%} on CoT, lr {lr:.1e}, "
                f"{tokens / seconds:.0f} tokens/s, {waited / seconds:.0%} waiting for data",
                refresh=False,
            )
        self.bar.update()
        self.sums = None
        if self.processes.any(skipped):
            self.skip(step, self.processes.gather(skipped))
        self.start_clock()

    def skip(self, step, skipped):
        """List posts whose images could not be read. Raises UserError once they are more than 1%."""
        for post in skipped:
            self.skipped.add(post.id)
            write_line(
                self.skipped_file,
                {"step": step, "id": post.id, "image": post.image, "reason": post.reason},
            )
        if len(self.skipped) > self.most_skipped:
            raise self.processes.shared(
                f"{len(self.skipped)} images could not be read, more than 1% of the training posts; they are listed in "
                f"{self.folder / 'skipped.jsonl'}, the last: {post.image} (id {post.id}): {post.reason}"
            )

    def evaluation(self, step, scores):
        """Write an evaluation's line, and let `best` name the best one's checkpoint."""
        line = {"step": step, "valid": scores}
        if scores:
            write_line(self.file, line)
            self.remember(line)

    def remember(self, line):
        """Take in a line of the log: only evaluations leave a trace."""
        if "valid" in line:
            self.evaluated = line["step"]
            self.best = max(
                self.best, (line["valid"]["all"]["F1@1"], line["step"]), key=lambda best: best[0]
            )
            if (
                self.processes.rank == 0
                and (self.folder / (best := f"step-{self.best[1]}")).is_dir()
            ):
                checkpoint.point(self.folder, "best", best)

    def close(self):
        self.bar.close()
        for file in (self.file, self.skipped_file, self.choices):
            with contextlib.suppress(
                OSError
            ):  # of a line that a full disk did not take, which was told already
                file.close()


class Choices:
    """choices.jsonl, if wanted: a line a sample, its step, id, L(y_s) (null in mode cot) and whether it reasons.

    What the file has after `step`, where the run goes on, is dropped in any case.
    """

    def __init__(self, path, step, wanted, processes):
        self.processes, self.added = processes, []
        if processes.rank == 0 and path.exists():
            cut_back(path, step)
        self.file = (
            open(path if processes.rank == 0 else os.devnull, "a", encoding="utf-8")
            if wanted
            else None
        )

    def add(self, batch, plain_loss, reasons):
        """Keep one micro-batch's L(y_s) (B,), None in mode cot, and choices (B,), on their device."""
        if self.file:
            self.added.append(
                (
                    batch.ids,
                    reasons.float() * math.nan if plain_loss is None else plain_loss,
                    reasons,
                )
            )

    def write(self, step):
        """Write the lines of all that was added since the last time; they leave the device together."""
        import torch

        if self.file:
            ids, plain_loss, reasons = zip(*self.added)
            rows = torch.stack([torch.cat(plain_loss), torch.cat(reasons).float()]).tolist()
            lines = [
                data.to_line(
                    {
                        "step": step,
                        "id": identity,
                        "plain_loss": None if math.isnan(loss) else round(loss, 6),
                        "reasons": bool(reasoned),
                    }
                )
                for identity, loss, reasoned in zip(sum(ids, []), *rows)
            ]
            self.file.writelines(self.processes.gather(lines))
            self.file.flush()
            self.added = []

    def close(self):
        if self.file:
            self.file.close()


def cut_back(path, step):
    """Drop the lines after `step`, and a torn last one, of a JSONL file that may be too large for memory."""
    for number, offset, raw in read_lines(path):
        if not raw.endswith(b"\n") or parse_line(path, number, raw)["step"] > step:
            os.truncate(path, offset)
            break


def open_appended(path, step, write):
    """(file, its lines) of a JSONL file to go on after `step`: later steps' lines, and a torn last one, are dropped.

    Without `write` the file is one that takes anything and keeps nothing.
    """
    kept = []
    if path.exists():
        for line in path.read_bytes().split(
            b"\n"
        ):  # text would be split at U+2028, which ids may have, too
            with contextlib.suppress(ValueError):
                kept.append(json.loads(line))
    kept = [line for line in kept if line["step"] <= step]
    if write:
        data.write_whole(path, "".join(map(data.to_line, kept)))
    return open(path if write else os.devnull, "a", encoding="utf-8"), kept


def write_line(file, record):
    try:
        file.write(data.to_line(record))
        file.flush()
    except OSError as error:
        raise UserError(
            f"{file.name}: can't be written ({error.strerror}); the last checkpoint is kept: make room and go "
            "on with --resume"
        ) from None


# ------------------------------------------------------------------------------------- around the training


def run_settings(args, posts):
    """What a resumed run must share with its beginning: the settings that decide what is learned, and the posts."""
    free = (
        "merge",
        "estimate",
        "gpus",
        "lengths",
        "resume",
        "force",
        "save_every",
        "keep",
        "out",
        "device",
        "workers",
        "micro_batch",
        "gradient_checkpointing",
        "parallel",
        "valid",
        "valid_posts",
        "test",
        "max_new_tokens",
        "log_choices",
    )
    return {name: value for name, value in vars(args).items() if name not in free} | {
        "posts": len(posts),
        "train_digest": posts.digest(),
    }


def check_reasoning(posts, mode):
    """cot and multitask need reasoning for every post, dynamic for some."""
    missing = posts.without_cot
    if missing and mode in ("cot", "multitask"):
        raise UserError(
            f"{posts.path}: {missing} of {len(posts)} posts have no 'cot'; --mode {mode} needs it for all: "
            "have gen_cot.py write it, or use --mode dynamic, which gives those posts plain answers"
        )
    if missing == len(posts) and mode == "dynamic":
        raise UserError(
            f"{posts.path}: no post has a 'cot', so none can be taught to reason; have gen_cot.py write "
            "it, or use --mode sft"
        )


def club_world(args):
    """Fill in the settings that name the embedded world and its toy model, which stand beside the run."""
    world = Path(args.out).parent / f"clubworld-{args.seed}"
    args.model, args.train, args.valid, args.test = (
        str(world / name) for name in ("toy", "train.jsonl", "valid.jsonl", "test.jsonl")
    )
    return world


def write_club_world(world, seed):
    from clubworld import write_toy_model, write_world

    data.say(f"No --train given: the club world (seed {seed}) in {world}")
    write_world(world, seed)
    write_toy_model(world / "toy", seed)


def report(model, encoder, folder, posts, args, processes):
    """Predict and score --test, show three predictions and what to try next; returns 1 if an image could not be read."""
    predictions, scores = predict_and_score(
        model, encoder, posts, len(posts), args, "test", processes
    )
    if processes.rank > 0:
        return 0
    data.write_whole(folder / "test_preds.jsonl", "".join(map(data.to_line, predictions)))
    data.write_whole(folder / "test_scores.json", json.dumps(scores, indent=1) + "\n")
    cut, unreadable = scores.pop("cut"), scores.pop("unreadable")
    print(table(scores))
    if cut:
        print(f"{cut} answers were cut off after {args.max_new_tokens} tokens")
    if unreadable:
        print(
            f"{unreadable} images could not be read: see the errors in {folder / 'test_preds.jsonl'}"
        )
    reasoned = [index for index, prediction in enumerate(predictions) if prediction["think"]]
    direct = [index for index, prediction in enumerate(predictions) if not prediction["think"]]
    shown = (reasoned[:2] + direct + reasoned[2:])[:3]
    for index in shown:
        record, prediction = posts[index], predictions[index]
        print(
            f"\nPost       {record['text']}  [{record['image']}]\nReference  {data.plain_answer(record['keyphrases'])}"
        )
        print(f"Predicted  {data.plain_answer(prediction['keyphrases'])}")
        print(f"Reasoning  {prediction['think'] or 'none: answered directly'}")
    record = posts[shown[0]]
    image = posts.image_path(record) or "none"
    print(
        f"\nTry next:  python infer.py {shlex.quote(str(image))} {shlex.quote(record['text'])} "
        f"--model {shlex.quote(str(folder / 'last'))}"
    )
    return 1 if unreadable else 0


# --------------------------------------------------------------------------------------- memory, beforehand

CARDS, USABLE = (
    (16, 24, 40, 80, 141),
    0.92,
)  # GPUs' GiB; the share that is left by CUDA itself and by fragments
SAVERS = (
    {"gradient_checkpointing": True},
    {"freeze_vision": True},
    {"lora": 16, "freeze_vision": True},
    {"micro_batch": 1},
    {"max_pixels": 256 * 28 * 28},
    {"parallel": "fsdp"},
)


def estimate(args):
    """Print what a step with these settings takes of each GPU, on which GPUs that fits, and what would take less."""
    from model import check_family, counted, empty_model, find

    folder = find(checkpoint.model_folder(args.model), ["config.json"])
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: has no config.json; for an adapter, name the model that it was made for"
        )
    check_family(folder)
    model = empty_model(folder, device="meta")
    size, trained, *_ = counted(model, args.lora, args.freeze_vision)
    needs = {card: needed(model, args, card) for card in CARDS}
    fitting = [card for card in CARDS if needs[card]["peak"] <= USABLE * card]
    shown = fitting[0] if fitting else CARDS[-1]
    print(
        f"{args.model}: {size / 1e9:.3f} billion parameters, {trained / 1e9:.3f} billion of them trained"
    )
    print(
        f"Estimated GiB of each of {args.gpus} GPUs, micro-batches of {args.micro_batch} posts:\n"
    )
    for part, value in needs[shown].items():
        print(f"{part:<12} {value:8.2f}")
    print()
    for card in CARDS:
        print(f"{card:>3} GiB  {'fits' if card in fitting else 'does not fit'}")
    for peak, flag in cheaper(model, args, shown, needs[shown]["peak"]):
        print(f"{flag} saves {needs[shown]['peak'] - peak:.1f} GiB: {peak:.1f}")


def needed(model, args, card):
    """`model.memory` of these settings in GiB, on GPUs of `card` GiB, which decide whether --parallel auto shards."""
    from model import counted, memory

    vision, bf16 = model.config.vision_config, args.device != "cpu"
    size, trained, *_ = counted(model, args.lora, args.freeze_vision)
    whole = 16 * trained + (2 if args.lora and bf16 else 4) * (size - trained)
    auto = args.parallel == "auto" and whole > card * 2**30 / 2
    share = math.ceil(args.batch_size / args.gpus)
    posts = min(args.micro_batch, share)
    parts = memory(
        model,
        posts,
        args.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2,
        *args.lengths,
        bf16,
        args.lora,
        args.freeze_vision,
        args.gradient_checkpointing,
        args.gpus,
        args.gpus > 1 and (args.parallel == "fsdp" or auto),
        math.ceil(share / posts),
    )
    return {part: value / 2**30 for part, value in parts.items()}


def cheaper(model, args, card, peak):
    """(peak in GiB, flag) of each setting that would by itself take less, the cheapest first."""
    found = []
    for change in SAVERS:
        now = needed(model, argparse.Namespace(**vars(args) | change), card)["peak"]
        if now < 0.99 * peak:
            name, value = next(iter(change.items()))
            found.append(
                (now, f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
            )
    return sorted(found)


def main():
    args = settings()
    if args.merge:
        if args.model is None:
            raise UserError(
                "--model is missing: the adapter's folder, or its run's, that --merge is to make a model of"
            )
        return checkpoint.merge(args.model, args.merge)
    if args.estimate:
        if args.model is None:
            raise UserError(
                "--model is missing: a folder or hub name, of which --estimate reads the config alone"
            )
        return estimate(args)
    if args.lora:
        from model import need_peft

        need_peft()
    if args.train is None and (args.model or args.valid or args.test):
        raise UserError(
            "--train is missing: say which posts to train on, or leave out --model, --valid and --test "
            "too for the club world"
        )
    if args.train is not None and args.model is None:
        raise UserError(
            "--model is missing: a folder or hub name of a Qwen-VL model, such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    with (
        checkpoint.Processes(args.device, args.parallel) as processes,
        checkpoint.enough_memory(
            "a smaller --micro-batch takes less and changes no result, --estimate tells what else would; --resume goes on "
            "from the last checkpoint"
        ),
    ):
        if args.train is None:
            processes.main_only(write_club_world, club_world(args), args.seed)
        test = processes.main_first(data.Posts, args.test, for_training=True) if args.test else None
        model, encoder, folder = train(args, processes)
        code = report(model, encoder, folder, test, args, processes) if test else 0
        if processes.rank == 0:
            run_folder, page = (shlex.quote(str(path)) for path in (folder, folder / "curves.html"))
            print(f"Curves:    python pages.py curves {run_folder} --out {page}")
        return code


if __name__ == "__main__":
    run(main)
