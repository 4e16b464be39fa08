"""The log of a training run, and what a run tells the person in front of it, on stderr."""

import contextlib
import hashlib
import math
import shlex
import shutil
import textwrap
import time
from pathlib import Path

from tqdm import tqdm

from evaluate import first_few, plural, read_jsonl, shown
from support.checkpoint import POINTERS, read_pointer, write_pointer
from support.console import WITHOUT_RATE, info, progress, read_json, reading, writing
from support.jsonl import JsonlWriter

# Lines with this field are remembered; of choices.jsonl, which may exceed the memory, none.
REMEMBERED = {"log.jsonl": "valid", "skipped.jsonl": "id", "choices.jsonl": None}
SUMS = ("samples", "loss", "plain_loss", "use_cot", "truncated", "tokens", "gamma")  # of a step
NO_ROOM = "make room and continue from the last checkpoint with --resume"


class TrainingLog(contextlib.ExitStack):
    """Logs every step and evaluation of a run: log.jsonl, choices.jsonl, skipped.jsonl, a bar.

    A resumed run's log goes on after `step`. What a step did is summed on the device until its end.
    Rank 0 alone writes and shows. `mode` is a row of train.MODES, `order` a data.TrainingOrder.
    """

    def __init__(self, args, mode, folder, order, step, ranks):
        import torch

        super().__init__()
        self.args, self.mode, self.folder = args, mode, folder
        self.order, self.ranks = order, ranks
        self.evaluated, self.best = 0, (-1.0, 0)  # last evaluation's step; best F1@1 and its step
        self.made_on = None  # the posts and settings of the last evaluation
        self.truncated, self.told_of_zeros = 0, False
        self.choices, self.writers, self.board = [], {}, None
        self.refusal = None  # why the run must end after this step
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=ranks.device)
        kept = ranks.from_rank0(self.open_files, step)
        self.skipped = {line["id"]: line["image"] for line in kept["skipped.jsonl"]}
        for line in kept["log.jsonl"]:
            self.remember(line)
        if args.tensorboard:
            self.board = ranks.on_rank0(tensorboard_writer(), str(folder), purge_step=step + 1)
        ranks.on_rank0(say_steps, args, mode, folder, step, order)
        options = {"initial": step, "bar_format": WITHOUT_RATE, "disable": ranks.rank > 0}
        self.bar = self.enter_context(progress(None, len(order), **options))
        for opened in filter(None, (*self.writers.values(), self.board)):
            self.callback(opened.close)
        self.callback(self.say_truncated)

    def open_files(self, step):
        """Open the files and drop what is after `step`; returns {name: lines to remember}."""
        kept = {}
        for name in REMEMBERED:
            writer = JsonlWriter(self.folder / name)
            lines = (line for _, _, line in writer.read(lambda line: line["step"] <= step))
            kept[name] = [line for line in lines if REMEMBERED[name] in line]
            if name != "choices.jsonl" or self.args.log_choices or writer.path.exists():
                with writing(writer.path, NO_ROOM):
                    writer.open()
                self.writers[name] = writer
        return kept

    def say_truncated(self):
        if self.truncated:
            self.ranks.info(f"{plural(self.truncated, 'text')} truncated to --max-length, so far")

    def write(self, name, *lines):
        """Append lines to one of the files. Raises UserError where the disk is full."""
        if self.ranks.rank == 0:
            with writing(self.folder / name, NO_ROOM):
                self.writers[name].append(*lines)

    def timed(self, loader):
        """Yield what a loader yields; a step's time begins when its data are asked for."""
        self.started = time.perf_counter()
        for item in loader:
            self.waited = time.perf_counter() - self.started
            yield item
            self.started = time.perf_counter()

    def add(self, batch, loss, plain_loss, use_cot):
        """Add one micro-batch's per-sample losses and choices (B,)."""
        import torch

        count = len(batch)
        plain = torch.full_like(loss, math.nan) if plain_loss is None else plain_loss
        cot_tokens, plain_tokens = (x.mask[:count].sum(1) for x in (batch.cot, batch.plain))
        targets = torch.where(use_cot, cot_tokens, plain_tokens)
        if self.mode.trains == "both":
            targets = plain_tokens + cot_tokens
        gamma = batch.plain.threshold(self.args.gamma)[:count]
        values = (
            count,
            loss.detach().sum(),
            plain.detach().sum(),
            use_cot.sum(),
            batch.truncated,
            batch.prompt["attention_mask"][:count].sum() + targets.sum(),
            gamma.sum(),
        )
        # They stay on the device: to read a value would wait for the GPU.
        self.sums += torch.stack([torch.as_tensor(value, device=loss.device) for value in values])
        if self.args.log_choices:
            self.choices.append((batch.ids, plain, use_cot, gamma))

    def end_step(self, step, lr, norm, micro_batches):
        """Write the step's line."""
        sums = dict(zip(SUMS, self.ranks.all_reduce(self.sums), strict=True))
        if samples := sums["samples"]:  # none where no image can be read
            seconds = time.perf_counter() - self.started
            line = {
                "step": step,
                "epoch": (step - 1) // self.order.epoch_steps,
                "loss": sums["loss"] / samples,
                "cot_share": sums["use_cot"] / samples,
                "plain_loss": number_or_none(sums["plain_loss"] / samples),
                "lr": lr,
                "grad_norm": norm.item(),
                "samples": int(samples),
                "tokens": int(sums["tokens"]),
                "seconds": round(seconds, 3),
                "waited": round(self.waited, 3),
            }
            if self.args.gamma == "auto":
                line["gamma"] = sums["gamma"] / samples
            if sums["truncated"]:
                line["truncated"] = int(sums["truncated"])
                self.truncated += line["truncated"]
            self.write("log.jsonl", line)
            if self.args.log_choices:
                self.write_choices(step)
            self.write_scalars(step, line)
            text = bar_text(line["loss"], line["cot_share"], line["tokens"] / seconds)
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        self.sums.zero_()
        skipped = [post for batch in micro_batches for post in batch.skipped]
        if self.ranks.any(skipped):
            self.add_skipped(step, self.ranks.all_gather(skipped))

    def write_choices(self, step):
        """Write a line a sample to choices.jsonl."""
        lines = []
        for ids, *values in self.choices:
            for name, loss, chosen, gamma in zip(ids, *(v.tolist() for v in values), strict=True):
                loss, gamma = (number_or_none(round(number, 6)) for number in (loss, gamma))
                line = {"step": step, "id": name, "plain_loss": loss, "use_cot": chosen}
                lines.append(line | {"gamma": gamma})
        self.write("choices.jsonl", *self.ranks.all_gather(lines))
        self.choices = []

    def write_scalars(self, step, values, prefix="train"):
        """Write numbers for TensorBoard, if it was asked for."""
        if self.board:
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self.board.add_scalar(f"{prefix}/{name}", value, step)

    def add_skipped(self, step, skipped):
        """List posts whose image could not be read; once they are too many, `refusal` says so."""
        for post in skipped:
            if post.id not in self.skipped:
                self.ranks.info(f"left out: (id {shown(post.id)}) {post.image}: {post.reason}")
            self.skipped[post.id] = post.image
            line = {"step": step, "id": post.id, "image": post.image, "reason": post.reason}
            self.write("skipped.jsonl", line)
        allowed = max(3, self.order.count // 100)
        if len(self.skipped) > allowed and not self.args.skip_unreadable:
            self.refusal = (
                f"{plural(len(self.skipped), 'image')} of {plural(self.order.count, 'post')} could "
                f"not be read: {first_few([*self.skipped.values()])}; see "
                f"{self.folder / 'skipped.jsonl'}; --resume --skip-unreadable leaves them all out"
            )

    def add_evaluation(self, step, scores):
        """Write an evaluation's line, and let `best` name the best checkpoint; scores: rank 0's."""
        if scores:
            with open(self.args.valid, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            made_on = [content, self.args.valid_posts, self.args.max_new_tokens]
            line = {"step": step, "valid": scores, "made_on": made_on}
            if self.best[1] and made_on != self.made_on:
                info("other validation posts or --max-new-tokens: the best is chosen anew")
            self.write("log.jsonl", line)
            self.remember(line)
            say_evaluation(step / self.order.epoch_steps, step, scores, self.best[1] == step)
            if not scores["all"]["F1@M"] and not self.told_of_zeros:
                info("no keyphrase is right: is the loss still high? are answers cut off?")
                self.told_of_zeros = True
            for name, values in scores.items():
                if isinstance(values, dict):
                    self.write_scalars(step, values, f"valid/{name}")

    def remember(self, line):
        """Remember an evaluation, a line of the log; `best` names one whose checkpoint is there."""
        self.evaluated = step = line["step"]
        f1 = line["valid"]["all"]["F1@1"]
        if line.get("made_on") != self.made_on:
            self.best, self.made_on = (-1.0, 0), line.get("made_on")
        if self.ranks.rank == 0 and f1 >= self.best[0] and (self.folder / f"step-{step}").is_dir():
            self.best = f1, step
            write_pointer(self.folder, "best", f"step-{step}")


def number_or_none(value):
    return value if math.isfinite(value) else None


def tensorboard_writer():
    """TensorBoard's SummaryWriter. Raises UserError where the optional package is missing."""
    with reading("the optional package for --tensorboard", "pip install tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


# -------------------------------------------------------------------- the header, for all scripts


def say(label, text):
    """Print a labelled paragraph, wrapped to the terminal's width (80 columns without one)."""
    width = max(40, shutil.get_terminal_size().columns)
    indents = {"initial_indent": f"{label:<10} ", "subsequent_indent": " " * 11}
    options = {"break_long_words": False, "break_on_hyphens": False}
    info(textwrap.fill(str(text), width, **indents, **options))


def say_posts(posts, label="Posts", most=None):
    """How many posts there are, and what they have; the first `most` are used."""
    count = len(posts)
    note = f"; the first {most:,} are used" if most and most < count else ""
    say(
        label,
        f"{posts.path}: {plural(count, 'post')}, {posts.with_image:,} with an image, "
        f"{count - posts.without_cot:,} with reasoning, "
        f"{posts.keyphrase_count / count:.1f} keyphrases a post{note}",
    )


def say_model(name, model, ranks=None):
    """A model's parameters, and where and how it runs; `ranks` are those that train it."""
    import torch

    from support.distributed import compute_dtype

    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, needed in sizes if needed)
    device, cuda = model.device, model.device.type == "cuda"
    text = f"{name}: {short(total)} parameters"
    where = torch.cuda.get_device_name(device) if cuda else device.type.upper()
    where += f", {str(model.dtype).removeprefix('torch.')}"
    if ranks:
        text += f", {'all' if trained == total else short(trained)} of them trained"
        where += ", bfloat16 autocast" * (compute_dtype(device) == torch.bfloat16)
        where += f", {plural(ranks.world_size, 'rank')}"
        where += f" ({ranks.engine})" if ranks.engine else ""
    say("Model", text)
    say("Device", where)


def short(number):
    """A large number as `3.75 billion`, `1.24 million` or `12,345`."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.2f} {name}"
    return f"{number:,}"


def say_server(name, client):
    """A served model, and where and how often it is asked."""
    say("Model", f"{name} at {client.server}, {plural(client.workers, 'request')} at a time")


def say_output(out, done, failed=0):
    """Where the results go, and how many posts are done, or have failed, already."""
    before = [f"{count:,} {what}" for count, what in ((done, "done"), (failed, "failed")) if count]
    say("Writes", f"{out}: {', '.join(before)} before" if before else out)


def say_steps(args, mode, folder, step, order):
    """How a run trains from `step` on, and where it writes."""
    start = f", from step {step + 1:,} on" if step else ""
    gamma = f", gamma {args.gamma}" if mode.has_gate else ""
    posts = plural(min(args.batch_size, order.count), "post")
    epochs = plural(args.epochs, "epoch")
    method = f"mode {args.mode}{gamma}, learning rate {args.lr:g}"
    say("Steps", f"{len(order):,} with {posts} each, {epochs}{start}; {method}")
    say("Writes", folder)


@contextlib.contextmanager
def say_stopped(writer):
    """Where the block is stopped, say how far the file of a JsonlWriter is, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        done, total = sum(offset >= 0 for offset in writer.offsets), len(writer.offsets)
        count = f"{done} of {plural(total, 'post')}"
        info(f"stopped: {writer.path} has {count}; the same command goes on from there")
        raise


def bar_text(loss, cot_share, speed):
    """The figures of a training bar: with counts and times they fit 80 columns."""
    return f"loss {loss:.3f}, CoT {cot_share:.0%}, {tqdm.format_sizeof(speed)} tokens/s"


def f1(scores):
    """`F1@1 57.3 all, 61.0 unseen` of what `score` returns."""
    names = [name for name in ("all", "unseen") if scores[name]["posts"]]
    return "F1@1 " + ", ".join(f"{100 * scores[name]['F1@1']:.1f} {name}" for name in names)


def say_evaluation(epoch, step, scores, best):
    """The line on an evaluation, above the progress bar."""
    tokens, reasoned = scores["all"]["tokens"], scores["all"]["reasoned"]
    text = f"epoch {epoch:.3g}  step {step}  {f1(scores)}"
    text += f"  {tokens:.1f} tokens a post, {reasoned:.0%} reasoned"
    for name, what in (("cut", "cut off"), ("unreadable", "images unreadable")):
        text += f"  {scores[name]} {what}" if scores[name] else ""
    info(text + "  (best)" * best)


def say_end(args, folder, device, started):
    """What a run that `started` (time.monotonic) took, its checkpoints, and commands to go on."""
    lines = read_jsonl(folder / "log.jsonl")
    scores = {f"step-{line['step']}": line["valid"] for _, _, line in lines if "valid" in line}
    say("Done", f"in {time.monotonic() - started:,.0f} s, peak memory {peak_memory(device)}")
    checkpoints = {}
    for name in POINTERS:
        if checkpoint := read_pointer(folder / name):
            checkpoints.setdefault(checkpoint, []).append(name)
    for checkpoint, names in checkpoints.items():
        found = scores.get(checkpoint.name)
        told = f": validation {f1(found)}" if found else ""
        say(", ".join(names).capitalize(), f"{checkpoint}{told}")
    posts, predictions = args.test or args.valid or args.train, folder / "preds.jsonl"
    names = ["--map", ",".join(map("=".join, args.map.items()))] if args.map else []
    model = ["--model", folder, "--max-new-tokens", args.max_new_tokens]
    command("Predict", "infer.py --data", posts, "--out", predictions, *model, *names)
    if names:  # evaluate.py reads our names only
        ours = folder / "posts.jsonl"
        command("Import", "-m tools.dataset import", posts, *names, "--out", ours)
        command("Score", "evaluate.py", predictions, ours)
    else:
        command("Score", "evaluate.py", predictions, posts, "--train", args.train)
    command("Curves", "-m tools.curves", folder, "--out", folder / "curves.png")


def print_examples(posts, predictions, folder, max_new_tokens):
    """Print three predictions, of which two reason if any do, and a command to try."""
    pairs = [(posts[index], prediction) for index, prediction in enumerate(predictions)]
    reasoned = [pair for pair in pairs if pair[1]["think"]]
    direct = [pair for pair in pairs if not pair[1]["think"]]
    shown = (reasoned[:2] + direct + reasoned[2:])[:3]
    for record, prediction in shown:
        print(f"\nPost       {record['text']}  [{record.get('image')}]")
        print(f"Reference  {'; '.join(record['keyphrases'])}")
        print(f"Predicted  {'; '.join(prediction['keyphrases'])}")
        why_none = prediction.get("error", "answered directly")
        print(f"Reasoning  {prediction['think'] or f'none: {why_none}'}")
    record, _ = shown[0]
    image = str(posts.image_path(record) or "none")
    options = ["--model", str(folder / "last"), "--max-new-tokens", str(max_new_tokens)]
    print(f"\nTry next:  python infer.py {shlex.join([image, record['text'], *options])}")


def command(label, script, *arguments):
    """Print a command on one line, to be copied."""
    info(f"{label:<10} python {script} {shlex.join(map(str, arguments))}")


def say_toy(folder, images):
    """Say so where a model is the toy and an image (None: there is none) is not of its world.

    A toy that was trained on other posts knows these.
    """
    worlds = (image.resolve().parents[:2] for image in images if image)
    foreign = (not any((place / "world.json").is_file() for place in two) for two in worlds)
    run = folder.parent / "settings.json"
    posts = read_json(run).get("train") if run.is_file() else None
    if posts and not Path(posts).with_name("world.json").is_file():
        return
    if (folder / "toy.json").is_file() and any(foreign):
        real = "--model Qwen/Qwen2.5-VL-3B-Instruct"
        info(f"{folder}: this model knows only the club world; real photos need a real one: {real}")


def peak_memory(device):
    """The most memory that a GPU, or else this process, has used until now, as text."""
    if device.type == "cuda":
        import torch

        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
