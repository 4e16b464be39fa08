"""Train a vision-language model to predict keyphrases, reasoning first only where that pays (Dynamic CoT).

    python train.py                                   # the club world and a toy model: minutes on a CPU
    python train.py --model Qwen/Qwen2.5-VL-3B-Instruct --train train.jsonl --valid valid.jsonl --out out/run1
"""

import argparse
import contextlib
import json
import math
import shlex
import time
from pathlib import Path

import checkpoint
import data
from evaluate import UserError, natural, run, score, table, train_keyphrases

# What the toy needs otherwise than a real model; every setting given on the command line still wins.
TOY = {"lr": 2e-3, "warmup": 0.1, "epochs": 2, "micro_batch": 32, "max_new_tokens": 64, "valid_posts": 200,
       "workers": 1}


def settings(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=data.HelpFormatter,
        epilog="Without --train: the embedded club world with its toy model, and these defaults instead: "
               + ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in TOY.items()))
    add = parser.add_argument
    add("--model", help="folder or hub name of a Qwen-VL model, or a finished run")
    add("--train", metavar="FILE", help="posts to train on (JSONL)")
    add("--valid", metavar="FILE", help="posts to validate on at the end of each epoch")
    add("--test", metavar="FILE", help="posts to predict and score with the final weights")
    add("--out", default="out/run", help="the run's folder")
    add("--resume", action="store_true", help="go on where the run in --out stopped")
    add("--mode", choices=["sft", "cot", "multitask", "dynamic"], default="dynamic",
        help="plain answers; reasoning for all; the mean of both losses; each sample's choice by gamma")
    add("--gamma", type=float, default=0.4, help="a sample whose plain answer's loss is below this reasons")
    add("--epochs", type=data.count, default=5, help="times through the training posts")
    add("--lr", type=float, default=5e-5, help="peak learning rate")
    add("--warmup", type=float, default=0.03, help="share of the steps over which the learning rate rises")
    add("--final-lr", type=float, default=0.02, help="share of the peak learning rate left at the end of the cosine")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, on matrices only")
    add("--beta2", type=float, default=0.98, help="AdamW's second beta")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient, 0 for any")
    add("--batch-size", type=data.count, default=32, help="posts a step")
    add("--micro-batch", type=data.count, default=4, help="posts at once in memory; changes speed, not the result")
    add("--gradient-checkpointing", action="store_true", help="less memory for a slower, literal two-pass step")
    add("--freeze-vision", action="store_true", help="train the language model only")
    add("--valid-posts", type=data.count, default=500, help="at most this many posts of --valid, from its beginning")
    add("--seed", type=natural, default=0, help="decides the order of the posts, and the club world and toy model")
    data.add_reading_options(parser)
    if parser.parse_known_args(arguments)[0].train is None:
        parser.set_defaults(**TOY)
    return parser.parse_args(arguments)


def train(args):
    """The whole run; returns (model, encoder, run folder)."""
    import torch

    from model import DynamicCoT, bf16_on_cuda, load, pick_device

    device = pick_device(args.device)
    posts = data.Posts(args.train, for_training=True)
    check_reasoning(posts, args.mode)
    valid = data.Posts(args.valid, for_training=True) if args.valid else None
    folder = checkpoint.open_run(args.out, run_settings(args), args.resume)
    resumed = args.resume and (folder / "last").is_file()

    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if device.type == "cpu":  # threads that must share their cores with the loader wait for one another at every step
        torch.set_num_threads(max(1, torch.get_num_threads() - args.workers))
    name = checkpoint.model_folder(str(folder / "last") if resumed else args.model)
    model, encoder, source = load(name, device, prompt_file=args.prompt_file, max_pixels=args.max_pixels,
                                  max_length=args.max_length)
    model.train()
    if args.gradient_checkpointing:
        enable_checkpointing = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable_checkpointing({"use_reentrant": False})  # transformers is renaming it
    model.model.visual.requires_grad_(not args.freeze_vision)
    step_losses = DynamicCoT(model, args.mode, args.gamma, share_prompt=not args.gradient_checkpointing)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
         {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, args.beta2), fused=True)

    steps_an_epoch = math.ceil(len(posts) / args.batch_size)
    total = args.epochs * steps_an_epoch
    step = checkpoint.restore(folder, model, optimizer) if resumed else 0

    with contextlib.closing(Log(folder, step, total, len(posts))) as log:
        if valid and step > log.evaluated:  # stopped between saving and validating
            validate(model, encoder, valid, step, args, log)
        for epoch in range(step // steps_an_epoch, args.epochs):
            order = data.epoch_order(len(posts), args.batch_size, args.seed, epoch)[step % steps_an_epoch:]
            for micro_batches, skipped in data.Loader(posts, encoder, order, args.micro_batch, args.workers, True):
                lr = learning_rate(step, total, args)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                samples = sum(len(batch) for batch in micro_batches)
                for batch in micro_batches:
                    batch = batch.to(device)
                    with bf16_on_cuda(device):
                        loss, plain_loss, reasons = step_losses(batch)
                    (loss.sum() / samples).backward()
                    log.add(batch, loss, plain_loss, reasons)
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
                if not norm.isfinite():
                    raise UserError(f"step {step + 1}: the loss or its gradient is not finite; the last checkpoint is "
                                    "kept; a lower --lr or a smaller --clip is what mostly helps")
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                log.step(step, epoch, lr, norm, skipped)

            checkpoint.save(folder, step, model, source, encoder.prompt, optimizer)
            if valid:
                validate(model, encoder, valid, step, args, log)
            checkpoint.prune(folder)
            log.start_clock()
    return model, encoder, folder


def learning_rate(step, total, args):
    """Linear warm-up to --lr, then half a cosine down to --final-lr of it."""
    warmup = max(1, round(args.warmup * total))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return args.lr * (args.final_lr + (1 - args.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def validate(model, encoder, posts, step, args, log):
    """Score the model's own greedy answers to the first --valid-posts posts; let `best` name the best step's checkpoint."""
    count = min(args.valid_posts, len(posts))
    _, scores = predict_and_score(model, encoder, posts, count, args, "validation")
    log.evaluation(step, scores)
    if log.best[1] == step:
        checkpoint.point(log.folder, "best", f"step-{step}")


def predict_and_score(model, encoder, posts, count, args, what):
    """(predictions, scores) of the first `count` posts, with seen and unseen by the training file.

    Beside the evaluator's classes, scores has "cut" and "unreadable": how many answers ran out of tokens, and
    how many images could not be read.
    """
    from model import predict

    at_once = 4 * args.micro_batch  # without gradients there is room for more
    steps = [list(range(start, min(start + at_once, count))) for start in range(0, count, at_once)]
    loader = data.Loader(posts, encoder, steps, at_once, args.workers, False)
    predictions = list(data.progress(predict(model, encoder, loader, max_new_tokens=args.max_new_tokens), count, what))
    by_id = {prediction["id"]: prediction for prediction in predictions}
    references = [posts[index] for index in range(count)]
    predictions = [by_id[reference["id"]] for reference in references]
    scores = score(predictions, references, train_keyphrases(args.train))
    return predictions, scores | {"cut": sum("cut" in prediction for prediction in predictions),
                                  "unreadable": sum("error" in prediction for prediction in predictions)}


# ----------------------------------------------------------------------------------------------- the log


class Log:
    """log.jsonl, skipped.jsonl and the progress bar; what a step did is summed up on the device until its end."""

    def __init__(self, folder, step, total, posts):
        self.folder, self.most_skipped = folder, posts // 100
        self.file, lines = open_appended(folder / "log.jsonl", step)
        self.skipped_file, skipped = open_appended(folder / "skipped.jsonl", step)
        self.skipped = {line["id"] for line in skipped}
        self.evaluated, self.best = 0, (-1.0, 0)  # the last evaluation's step; the best F1@1 and its step
        for line in lines:
            self.remember(line)
        self.bar = data.progress(None, total, "training", "step", step)
        self.sums, self.shortened = None, 0
        self.start_clock()

    def start_clock(self):
        """What comes next is a step's time, and none of what was before it."""
        self.started = time.perf_counter()

    def add(self, batch, loss, plain_loss, reasons):
        """Take in one micro-batch's per-sample losses (B,)."""
        import torch

        plain = loss.new_full((), float("nan")) if plain_loss is None else plain_loss.sum()
        targets = torch.where(reasons, batch.cot.mask.sum(1), batch.plain.mask.sum(1))
        sums = torch.stack([loss.detach().sum(), plain, reasons.sum(), loss.new_tensor(len(batch)),
                            batch.prompt["attention_mask"].sum() + targets.sum()]).double()
        self.sums = sums if self.sums is None else self.sums + sums
        self.shortened += batch.shortened

    def step(self, step, epoch, lr, norm, skipped):
        """Write the step's line. Raises UserError once more than 1% of the posts had to be skipped."""
        if self.sums is not None:
            loss, plain, reasons, samples, tokens = self.sums.tolist()
            seconds = time.perf_counter() - self.started
            line = {"step": step, "epoch": epoch, "loss": loss / samples, "cot_share": reasons / samples,
                    "plain_loss": None if math.isnan(plain) else plain / samples, "lr": lr,
                    "grad_norm": norm.item(), "samples": int(samples), "tokens": int(tokens),
                    "seconds": round(seconds, 3)}
            if self.shortened:
                line["shortened"] = self.shortened
            write_line(self.file, line)
            self.bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['cot_share']:.0%} on CoT, lr {lr:.1e}, "
                                     f"{tokens / seconds:.0f} tokens/s", refresh=False)
        self.bar.update()
        self.sums, self.shortened = None, 0
        self.start_clock()
        for post in skipped:
            self.skipped.add(post.id)
            write_line(self.skipped_file, {"step": step, "id": post.id, "image": post.image, "reason": post.reason})
        if len(self.skipped) > self.most_skipped:
            raise UserError(f"{len(self.skipped)} images could not be read, more than 1% of the training posts; they "
                            f"are listed in {self.folder / 'skipped.jsonl'}, the last: {skipped[-1].image} "
                            f"(id {skipped[-1].id}): {skipped[-1].reason}")

    def evaluation(self, step, scores):
        """Write an evaluation's line."""
        line = {"step": step, "valid": scores}
        write_line(self.file, line)
        self.remember(line)

    def remember(self, line):
        """Take in a line of the log: only evaluations leave a trace."""
        if "valid" in line:
            self.evaluated = line["step"]
            self.best = max(self.best, (line["valid"]["all"]["F1@1"], line["step"]), key=lambda best: best[0])

    def close(self):
        self.bar.close()
        for file in (self.file, self.skipped_file):
            with contextlib.suppress(OSError):  # of a line that a full disk did not take, which was told already
                file.close()


def open_appended(path, step):
    """(file, its lines) of a JSONL file to go on after `step`: later steps' lines, and a torn last one, are dropped."""
    kept = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):  # text would be split at U+2028, which ids may have, too
            with contextlib.suppress(ValueError):
                kept.append(json.loads(line))
    kept = [line for line in kept if line["step"] <= step]
    data.write_whole(path, "".join(map(data.to_line, kept)))
    return open(path, "a", encoding="utf-8"), kept


def write_line(file, record):
    try:
        file.write(data.to_line(record))
        file.flush()
    except OSError as error:
        raise UserError(f"{file.name}: can't be written ({error.strerror}); the last checkpoint is kept: make room and go "
                        "on with --resume") from None


# ------------------------------------------------------------------------------------- around the training


def run_settings(args):
    """The settings that a resumed run must share with its beginning: those that decide what is learned."""
    free = ("resume", "out", "device", "workers", "micro_batch", "gradient_checkpointing", "valid", "valid_posts",
            "test", "max_new_tokens")
    return {name: value for name, value in vars(args).items() if name not in free}


def check_reasoning(posts, mode):
    """cot and multitask need reasoning for every post, dynamic for some."""
    missing = posts.without_cot
    if missing and mode in ("cot", "multitask"):
        raise UserError(f"{posts.path}: {missing} of {len(posts)} posts have no 'cot'; --mode {mode} needs it for all: "
                        "have gen_cot.py write it, or use --mode dynamic, which gives those posts plain answers")
    if missing == len(posts) and mode == "dynamic":
        raise UserError(f"{posts.path}: no post has a 'cot', so none can be taught to reason; have gen_cot.py write "
                        "it, or use --mode sft")


def club_world(args):
    """Write the embedded world and its toy model beside the run, and fill in the settings that name them."""
    from clubworld import write_toy_model, write_world

    world = Path(args.out).parent / f"clubworld-{args.seed}"
    data.say(f"No --train given: the club world (seed {args.seed}) in {world}")
    write_world(world, args.seed)
    args.model, args.train, args.valid, args.test = (
        str(world / name) for name in ("toy", "train.jsonl", "valid.jsonl", "test.jsonl"))
    write_toy_model(args.model, args.seed)


def report(model, encoder, folder, posts, args):
    """Predict and score --test, show three predictions and what to try next; returns 1 if an image could not be read."""
    predictions, scores = predict_and_score(model, encoder, posts, len(posts), args, "test")
    data.write_whole(folder / "test_preds.jsonl", "".join(map(data.to_line, predictions)))
    data.write_whole(folder / "test_scores.json", json.dumps(scores, indent=1) + "\n")
    cut, unreadable = scores.pop("cut"), scores.pop("unreadable")
    print(table(scores))
    if cut:
        print(f"{cut} answers were cut off after {args.max_new_tokens} tokens")
    if unreadable:
        print(f"{unreadable} images could not be read: see the errors in {folder / 'test_preds.jsonl'}")
    reasoned = [index for index, prediction in enumerate(predictions) if prediction["think"]]
    direct = [index for index, prediction in enumerate(predictions) if not prediction["think"]]
    shown = (reasoned[:2] + direct + reasoned[2:])[:3]
    for index in shown:
        record, prediction = posts[index], predictions[index]
        print(f"\nPost       {record['text']}  [{record['image']}]\nReference  {data.plain_answer(record['keyphrases'])}")
        print(f"Predicted  {data.plain_answer(prediction['keyphrases'])}")
        print(f"Reasoning  {prediction['think'] or 'none: answered directly'}")
    record = posts[shown[0]]
    image = posts.image_path(record) or "none"
    print(f"\nTry next:  python infer.py {shlex.quote(str(image))} {shlex.quote(record['text'])} "
          f"--model {shlex.quote(str(folder / 'last'))}")
    return 1 if unreadable else 0


def main():
    args = settings()
    if args.train is None:
        if args.model or args.valid or args.test:
            raise UserError("--train is missing: say which posts to train on, or leave out --model, --valid and --test "
                            "too for the club world")
        club_world(args)
    elif args.model is None:
        raise UserError("--model is missing: a folder or hub name of a Qwen-VL model, such as Qwen/Qwen2.5-VL-3B-Instruct")
    test = data.Posts(args.test, for_training=True) if args.test else None
    model, encoder, folder = train(args)
    return report(model, encoder, folder, test, args) if test else 0


if __name__ == "__main__":
    run(main)
