"""Predict the keyphrases of one post, or of a file of posts.

    python infer.py image.jpg "text of the post"
    python infer.py --data test.jsonl --out preds.jsonl --model out/run1
    python infer.py --data test.jsonl --out p.jsonl --model M --base-url http://localhost:8000/v1

The first form prints the keyphrases, then the reasoning if the model chose to reason. Write `none`
for the image of a text-only post. The second form can be stopped and started again: posts already
predicted are not predicted twice, and those that failed are tried again. The third does the same
with a model that a server has loaded; --model is then its name there.
"""

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import data
from evaluate import (
    UserError,
    canonical,
    digest,
    one_line,
    parse_prediction,
    plural,
    reasoned,
    run,
    shown,
)
from support.checkpoint import checkpoint_of, differences, find_model
from support.client import Client, Failed, add_server_options, chat_request
from support.console import ArgumentParser, info, out_of_memory, positive_int, progress, writing
from support.images import Unreadable, image_url
from support.jsonl import JsonlWriter, locked, read_settings, to_line, write_settings
from support.log import say_model, say_output, say_posts, say_server, say_stopped, say_toy

KEPT = "what was predicted is kept: make room and run this again"


def find_folder(args):
    """(folder of --model, its EncoderOptions); a server's model may be here, too.

    --max-pixels and --max-length, where not given, are set in `args`, too. Raises UserError.
    """
    if args.base_url:
        folder = Path(checkpoint_of(args.model))
    elif args.model == "out/run" and not Path(args.model).exists():
        raise UserError("no trained model yet: run `python train.py` (minutes), or name a --model")
    else:
        folder = find_model(args.model)
    return folder, data.resolve_options(args, folder)


# --------------------------------------------------------------------------------------- one post


class OnePost(list):
    """A list of one record that stands in for a data.Posts."""

    def image_path(self, record):
        """Where the record's image is, or None for a text-only post."""
        return None if record["image"] is None else Path(record["image"])


def infer_one(args):
    """Predict the post on the command line and print it."""
    image = None if args.image == "none" else args.image
    if image and not Path(image).exists():  # told before the model is loaded
        raise UserError(f"{image}: no such file; for a text-only post write none instead")
    posts = OnePost([{"id": "post", "text": args.text, "image": image}])
    args.workers = 0
    folder, options = find_folder(args)
    predict_all = all_served if args.base_url else all_here
    (prediction,) = predict_all(args, folder, options, posts, [0])
    if "error" in prediction:
        hint = "the image of a text-only post is none"
        raise UserError(f"no prediction: {prediction['error']}; {hint}")
    if args.json:
        sys.stdout.write(to_line({"image": args.image, "text": args.text} | prediction))
        return
    print(data.plain_answer(prediction["keyphrases"]) or "(no keyphrases)")
    if prediction["think"]:
        print(f"\nReasoning: {prediction['think']}")
    if prediction.get("cut"):
        tokens = plural(args.max_new_tokens, "token")
        info(f"the answer was cut off after {tokens}; see --max-new-tokens")
    say_toy(folder, [posts.image_path(posts[0])])


# ---------------------------------------------------------------------------------- a file of posts


def infer_file(args):
    """Predict the posts of --data that --out lacks; returns 1 if a post failed, else 0."""
    posts, out = data.Posts(args.data, names=args.map), Path(args.out)
    if out.exists() and not out.is_file():
        raise UserError(f"{out}: not a file on a disk; --out is the file for the predictions")
    folder, options = find_folder(args)
    writer, made_with = JsonlWriter(out, len(posts)), identity(args, folder)
    with locked(out), contextlib.closing(writer):
        say_posts(posts)
        index_of = {hash(canonical(posts[index]["id"])): index for index in range(len(posts))}
        failed = read_finished(made_with, writer, index_of)
        todo = [index for index in range(len(posts)) if index not in writer]
        todo.sort(key=failed.__contains__)  # again after those that were never tried
        say_output(out, done := len(posts) - len(todo))
        with say_stopped(writer):
            if todo:
                predict_all = all_served if args.base_url else all_here
                predictions = predict_all(args, folder, options, posts, todo)
                with writing(out):
                    write_settings(out, made_with)
                    if out.exists():
                        writer.sort()  # without what is predicted again
                with contextlib.closing(predictions):
                    for prediction in progress(predictions, len(posts), "posts", initial=done):
                        index = index_of[hash(canonical(prediction["id"]))]
                        prediction["post"] = digest(posts[index]["text"])
                        with writing(out, KEPT):
                            writer.append(prediction, index=index)
            with writing(out, KEPT):
                writer.sort()
        code = summary(args, writer)
    say_toy(folder, (posts.image_path(posts[index]) for index in todo[:100]))
    return code


def all_here(args, folder, options, posts, todo):
    """An iterator over predictions for the posts `todo` (indices) by the model loaded here."""
    if args.data:
        info(f"loading {args.model} …")
    import model  # torch takes seconds to import
    from support.distributed import compute_dtype, pick_device

    device = pick_device(args.device)
    vlm, encoder, _ = model.load(folder, device, compute_dtype(device), options)
    if args.data:
        say_model(folder, vlm)
    loader = data.prompt_loader(posts, todo, encoder, args.batch_size, args.workers)
    return model.predict(vlm, encoder, loader, args.think, args.max_new_tokens)


def all_served(args, _, options, posts, todo):
    """An iterator over predictions for the posts `todo` (indices) by a served model."""
    client = Client(args.base_url, args, min(args.batch_size, len(todo)))
    if args.data:
        say_server(args.model, client)
    client.answered = len(todo) < len(posts)  # in an earlier run

    async def predict(index):
        record = posts[index]
        text, image = record["text"].strip(), posts.image_path(record)
        try:
            url = await asyncio.to_thread(image_url, image, options.max_pixels) if image else None
            prompt = data.fill_prompt(options.prompt, text=text)
            reply = await client.ask(chat_request(args, prompt, url, temperature=0))
            return data.make_prediction(record["id"], reply.text, reply.tokens, reply.cut)
        except Unreadable as error:
            reason = f"image {record['image']}: {error}"
        except Failed as failed:
            reason = str(failed)
        return data.failed_prediction(record["id"], reason)

    return client.each(predict, todo)


def identity(args, folder):
    """What predictions depend on, which a resumed run must match: settings, and files' states."""
    names = ("think", "max_pixels", "max_new_tokens", "model" if args.base_url else "max_length")
    now = {name: value for name, value in vars(args).items() if name in names}
    now |= {name: getattr(args, name) for name in ("map", "request") if getattr(args, name)}
    weights = sorted(folder.glob("*.safetensors"))
    files = map(Path, (args.data, *weights, args.prompt_file or folder / "prompt.txt"))
    states = {str(file): file.stat() for file in files if file.exists()}
    return now | {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def read_finished(made_with, writer, index_of):
    """Give `writer` the predictions that --out holds; returns the indices of those with an error.

    Raises UserError if they were made with other settings, which stand in a file beside it.
    """
    out, failed = writer.path, set()
    if not out.exists() or not out.stat().st_size:
        return failed
    before = read_settings(out, dict)
    if different := differences(before, made_with):
        what = f"something else ({', '.join(different)})" if before else "unknown settings"
        changes = f": {'; '.join(different.values())}" if before else ""
        raise UserError(f"{out}: was made with {what}{changes}; choose another --out, or remove it")
    for line, offset, row in writer.read():
        index = index_of.get(hash(parse_prediction(out, line, row)["id"]))
        if index is not None and row.get("error"):
            failed.add(index)
        elif index is not None:
            writer.offsets[index] = offset
    return failed


def summary(args, writer):
    """Print how many posts, tokens and failures there are; returns the exit code."""
    posts = tokens = with_reasoning = cut = 0
    failed = []
    for _, line in writer.lines():
        prediction = json.loads(line)
        posts += 1
        tokens += prediction.get("tokens") or 0
        with_reasoning += reasoned(prediction)
        cut += "cut" in prediction
        if "error" in prediction:
            failed.append((prediction["id"], prediction["error"]))
    info(
        f"{args.out}: {plural(posts, 'post')}, {tokens / posts:.1f} tokens per post, "
        f"{with_reasoning / posts:.1%} reasoned about, {cut} cut off after "
        f"{plural(args.max_new_tokens, 'token')}, {len(failed)} failed"
    )
    for identity, error in failed[:3]:
        info(f"  (id {shown(identity)}) {one_line(error)}")
    return 1 if failed else 0


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("image", nargs="?", help="the post's image, or none")
    add("text", nargs="?", help="the post's text")
    add("--data", metavar="FILE", help="predict all posts of this file (JSONL)")
    add("--out", metavar="FILE", help="file for the predictions of --data (JSONL)")
    model_help = "a run, a checkpoint or a model folder, or a hub name; its name on --base-url"
    add("--model", default="out/run", help=model_help)
    modes, think_help = ["auto", "always", "never"], "whether the model reasons first"
    add("--think", choices=modes, default="auto", help=think_help)
    add("--batch-size", type=positive_int, default=8, help="posts generated at once with --data")
    add("--json", action="store_true", help="print the one post's prediction as JSON")
    data.add_reading_options(parser)
    ignored = "--batch-size posts are asked for at once; --max-length, --workers and --device "
    served = parser.add_argument_group("served inference", ignored + "have no effect")
    served.add_argument("--base-url", help="address of an OpenAI-compatible server with the model")
    add_server_options(served)
    args = parser.parse_args(arguments)
    one = None not in (args.image, args.text) and args.data is None and args.out is None
    many = None not in (args.data, args.out) and args.image is None and not args.json
    if not (one or many):
        parser.error(
            'give an image and a text (none for no image, "" for no text), or --data FILE --out '
            "FILE without --json"
        )
    if args.base_url and args.think != "auto":
        parser.error(
            f"--think {args.think} needs the model here: a server can't be told how answers begin"
        )
    return args


def main():
    args = parse_args()
    if args.data is None:
        with out_of_memory("try a smaller --max-pixels"):
            return infer_one(args)
    with out_of_memory("try a smaller --batch-size; what was predicted is kept"):
        return infer_file(args)


if __name__ == "__main__":
    run(main)
