"""What a run tells the person in front of it, on stderr: its header, each evaluation, its end."""

import contextlib
import shlex
import shutil
import textwrap
import time

from evaluate import one_line, plural, read_jsonl
from support.checkpoint import read_pointer, step_of
from support.console import info
from support.distributed import compute_dtype
from support.images import MAX_PIXELS, Unreadable, from_club_world, load_image

TOY = "toy.json"  # the toy model's folder has it, and so do its checkpoints


def say(label, text):
    """Print a labelled paragraph, wrapped to the terminal's width (80 columns without one)."""
    width = max(40, shutil.get_terminal_size().columns)
    indents = {"initial_indent": f"{label:<10} ", "subsequent_indent": " " * 11}
    options = {"break_long_words": False, "break_on_hyphens": False}
    info(textwrap.fill(str(text), width, **indents, **options))


# -------------------------------------------------------------------------------------- the header


def say_posts(posts, label="Posts", most=None):
    """How many posts there are, and what they have; the first `most` are used."""
    count = len(posts)
    reasoning = some(count - posts.without_cot, count)
    note = f"; the first {most:,} are used" if most and most < count else ""
    say(
        label,
        f"{posts.path}: {plural(count, 'post')}, {some(posts.with_image, count)} with an image, "
        f"{reasoning} with reasoning, {posts.keyphrases / count:.1f} keyphrases per post{note}",
    )


def some(part, whole):
    """`all`, `none`, or how many."""
    return "all" if part == whole else f"{part:,}" if part else "none"


def say_model(name, model, ranks=None):
    """A model's parameters, and where and how it runs; `ranks` are those that train it."""
    import torch

    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, needed in sizes if needed)
    device, weights = model.device, str(model.dtype).removeprefix("torch.")
    cuda = device.type == "cuda"
    where = [torch.cuda.get_device_name(device) if cuda else device.type.upper(), weights]
    text = f"{name}: {short(total)} parameters"
    if ranks:
        text += f", {'all' if trained == total else short(trained)} of them trained"
        if cuda and compute_dtype(device) == torch.bfloat16:
            where.append("bfloat16 autocast")
        engine = f" ({ranks.engine})" if ranks.engine else ""
        where.append(plural(ranks.world_size, "rank") + engine)
    say("Model", text)
    say("Device", ", ".join(where))


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


def say_steps(args, folder, step, total):
    """How a run trains from `step` on, and where it writes."""
    start = f", from step {step + 1:,} on" if step else ""
    start = ", all of them done before" if step >= total else start
    gamma = f", gamma {args.gamma}" if args.mode == "dynamic" else ""
    posts, epochs = plural(args.batch_size, "post"), plural(args.epochs, "epoch")
    say(
        "Steps",
        f"{total:,} with {posts} each, {epochs}{start}; mode {args.mode}{gamma}, "
        f"learning rate {args.lr:g}",
    )
    say("Writes", folder)


@contextlib.contextmanager
def say_stopped(writer):
    """Where the block is stopped, say how far the file of a JsonlWriter is, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        done, total = sum(offset >= 0 for offset in writer.offsets), len(writer.offsets)
        info(
            f"stopped: {writer.path} has {done} of {plural(total, 'post')}; the same command goes "
            "on from there"
        )
        raise


# ------------------------------------------------------------------------- evaluations and the end


def bar_text(loss, cot_share, speed):
    """The figures of a training bar: with counts and times they fit 80 columns."""
    unit = next((unit for unit in ((1e6, "M"), (1e3, "k")) if speed >= unit[0]), (1, ""))
    return f"loss {loss:.3f}, {cot_share:.0%} on CoT, {speed / unit[0]:.3g}{unit[1]} tokens/s"


def f1(scores):
    """`F1@1 57.3 all, 61.0 unseen` of what `score` returns."""
    names = [name for name in ("all", "unseen") if scores[name]["posts"]]
    return "F1@1 " + ", ".join(f"{100 * scores[name]['F1@1']:.1f} {name}" for name in names)


def say_evaluation(epoch, step, scores, best):
    """The line on an evaluation, above the progress bar."""
    found = scores["all"]
    parts = [f"epoch {epoch:.3g}", f"step {step}", f1(scores)]
    parts.append(f"{found['tokens']:.1f} tokens a post, {found['reasoned']:.0%} reasoned")
    for name, text in (("cut", "cut off"), ("unreadable", "images unreadable")):
        if scores[name]:
            parts.append(f"{scores[name]} {text}")
    info("  ".join([*parts, *["(best)"] * best]))


def say_end(args, folder, device, started):
    """What a run took, its checkpoints, and three commands to go on with.

    started: when it began, by time.monotonic().
    """
    lines = read_jsonl(folder / "log.jsonl")
    scores = {line["step"]: line["valid"] for _, _, line in lines if "valid" in line}
    say("Done", f"in {time.monotonic() - started:,.0f} s, peak memory {peak_memory(device)}")
    checkpoints = {}
    for name in ("best", "last"):
        if (folder / name).is_file():
            checkpoints.setdefault(read_pointer(folder / name), []).append(name)
    for checkpoint, names in checkpoints.items():
        found = scores.get(step_of(checkpoint))
        say(", ".join(names).capitalize(), f"{checkpoint}{': ' + f1(found) if found else ''}")
    posts, predictions = args.test or args.valid or "test.jsonl", folder / "preds.jsonl"
    command("Predict", "infer.py --data", posts, "--out", predictions, "--model", folder)
    command("Score", "evaluate.py", predictions, posts, "--train", args.train)
    command("Curves", "-m tools.curves", folder, "--out", folder / "curves.png")


def command(label, script, *arguments):
    """Print a command on one line, to be copied."""
    info(f"{label:<10} python {script} {shlex.join(map(str, arguments))}")


def say_toy(folder, records, image_path):
    """Say so where the model is the club world's toy and a record's picture is none of its world.

    image_path: a function that gives a record's picture, or None.
    """
    if not (folder / TOY).is_file():
        return
    for record in records:
        with contextlib.suppress(Unreadable):
            image = image_path(record)
            if image and not from_club_world(load_image(image, MAX_PIXELS)):
                post = shlex.join([str(image), record["text"]])
                info(
                    f"{folder}: this model knows only the club world; a real photo needs a real "
                    + one_line(f"model: python infer.py {post} --model Qwen/Qwen2.5-VL-3B-Instruct")
                )
                return


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
