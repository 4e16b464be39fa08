"""Predict the keyphrases of one post, or of a file of posts.

    python infer.py image.jpg "text of the post"
    python infer.py --data test.jsonl --out preds.jsonl --model out/run1
    python infer.py --data test.jsonl --out preds.jsonl --model out/run1 --base-url http://localhost:8000/v1

The first form prints the keyphrases, then the reasoning if the model chose to reason. Write `none` for the image
of a text-only post. The second form can be stopped and started again: posts already predicted are not predicted
twice, and those whose image could not be read are tried again. The third does the same with a model that a serving
engine has loaded; --model is then its name there.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

import checkpoint
import data
import gen_cot
from evaluate import UserError, jsonl, one_line, parse_prediction, run, shown


def settings(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    add = parser.add_argument
    add("image", nargs="?", help="the post's image, or none")
    add("text", nargs="?", help="the post's text")
    add("--data", metavar="FILE", help="predict all posts of this file (JSONL)")
    add("--out", metavar="FILE", help="where the predictions of --data go (JSONL)")
    add(
        "--model",
        default="out/run",
        help="a run's folder, one of its checkpoints, a model folder, or a hub name; "
        "with --base-url what the server calls it",
    )
    add(
        "--think",
        choices=["auto", "always", "never"],
        default="auto",
        help="whether the model reasons first",
    )
    add("--batch-size", type=data.count, default=8, help="posts generated at once with --data")
    add("--json", action="store_true", help="print the one post's prediction as JSON")
    data.add_reading_options(parser)
    served = parser.add_argument_group(
        "served inference",
        "--batch-size posts are asked for at once; --max-length, "
        "--workers and --device are the server's own affair",
    )
    served.add_argument(
        "--base-url", help="the address of an OpenAI-compatible server that has the model"
    )
    gen_cot.add_server_options(served)
    args = parser.parse_args(arguments)
    if args.data is None and (args.image is None or args.text is None):
        parser.error("give an image and a text, or --data FILE --out FILE")
    if args.data is not None and (args.out is None or args.image is not None):
        parser.error("--data goes with --out FILE and without an image or text")
    if args.base_url and args.think != "auto":
        parser.error(
            f"--think {args.think} needs the model here: a server can't be told how an answer begins; "
            "leave out --base-url or --think"
        )
    return args


def load_model(args):
    """(model, encoder) of --model. Raises UserError, which for the default says how to get a model."""
    if args.model == "out/run" and not Path(args.model).exists():
        raise UserError(
            "no trained model yet: run `python train.py` (minutes on a CPU), or name one with --model"
        )
    name = checkpoint.model_folder(args.model)
    import torch

    from model import load, pick_device

    device = pick_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, encoder, _ = load(
        name, device, dtype, args.prompt_file, args.max_pixels, args.max_length
    )
    return model, encoder


def infer_one(args):
    """Predict the post on the command line and print it."""
    image = None if args.image == "none" else Path(args.image)
    if image is not None and not os.path.exists(image):
        raise UserError(f"{image}: no such file; for a text-only post write none instead")
    record = {"id": "post", "text": args.text}
    try:
        prediction = (
            predict_served(args, record, image)
            if args.base_url
            else predict_here(args, record, image)
        )
    except data.Unreadable as error:
        raise UserError(f"{args.image}: {error}; for a text-only post write none instead") from None
    if args.json:
        sys.stdout.write(data.to_line({"image": args.image, "text": args.text} | prediction))
        return
    print(data.plain_answer(prediction["keyphrases"]) or "(no keyphrases)")
    if prediction["think"]:
        print(f"\nReasoning: {prediction['think']}")
    if prediction.get("cut"):
        data.say(f"the answer was cut off after {args.max_new_tokens} tokens; see --max-new-tokens")


def predict_here(args, record, image):
    """The prediction for one post by the model loaded here. Raises data.Unreadable."""
    vlm, encoder = load_model(args)
    import model

    micro_batches = [data.collate([encoder.encode(record, image, with_answers=False)], encoder)]
    (prediction,) = model.predict(
        vlm, encoder, [(micro_batches, [])], args.think, args.max_new_tokens
    )
    return prediction


def infer_file(args):
    """Predict the posts of --data that --out lacks; returns 1 if a post failed, else 0."""
    posts = data.Posts(args.data)
    done = finished(args, posts)
    todo = [index for index in range(len(posts)) if posts[index]["id"] not in done]
    if todo:
        predictions = (
            all_served(args, posts, todo) if args.base_url else all_here(args, posts, todo)
        )
        begin(args, done)
        with writable(args.out), open(args.out, "a", encoding="utf-8") as file:
            for prediction in data.progress(predictions, len(posts), "posts", done=len(done)):
                file.write(data.to_line(prediction))
                file.flush()
                done[prediction["id"]] = prediction
    ordered = [done[posts[index]["id"]] for index in range(len(posts))]
    with writable(args.out):
        data.write_whole(args.out, "".join(map(data.to_line, ordered)))
    return summary(args, ordered)


@contextlib.contextmanager
def writable(path):
    """What the system refuses in the block, which writes to `path`, is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: can't be written ({error.strerror or error}); what was predicted is kept: make room "
            "and run this again"
        ) from None


def all_here(args, posts, todo):
    """An iterator over predictions for the posts `todo` (indices) by the model loaded here."""
    vlm, encoder = load_model(args)
    import model

    steps = [
        todo[start : start + args.batch_size] for start in range(0, len(todo), args.batch_size)
    ]
    loader = data.Loader(posts, encoder, steps, args.batch_size, args.workers, with_answers=False)
    return model.predict(vlm, encoder, loader, args.think, args.max_new_tokens)


def all_served(args, posts, todo):
    """An iterator over predictions for the posts `todo` (indices) by a served model, as they come."""
    client, prompt = connect(args, min(args.batch_size, len(todo)))

    def predict(index):
        record = posts[index]
        try:
            return ask(args, client, prompt, record, posts.image_path(record))
        except data.Unreadable as error:
            reason = f"image {record['image']}: {error}"
        except gen_cot.Failed as failed:
            reason = str(failed)
        return {
            "id": record["id"],
            "keyphrases": [],
            "think": None,
            "output": "",
            "tokens": 0,
            "error": reason,
        }

    return client.each(predict, todo)


def predict_served(args, record, image):
    """The prediction for one post by a served model. Raises data.Unreadable, UserError."""
    client, prompt = connect(args, 1)
    try:
        return ask(args, client, prompt, record, image)
    except gen_cot.Failed as failed:
        raise UserError(f"{client.server}: {failed}") from None


def connect(args, workers):
    """(client, prompt) of served inference. Raises UserError.

    The prompt is --prompt-file's, else the one that the model was trained with where its folder is here, else PROMPT.
    """
    client = gen_cot.Client(
        args.base_url, args.model, args.api_key_env, workers, args.max_retries, args.timeout
    )
    own = Path(checkpoint.model_folder(args.model)) / "prompt.txt"
    file = args.prompt_file or (own if own.is_file() else None)
    return client, gen_cot.read_prompt(file, "{text}") if file else data.PROMPT


def ask(args, client, prompt, record, image):
    """A served model's prediction for one post, as `model.predict` yields it. Raises data.Unreadable, Failed."""
    text = gen_cot.fill(prompt, text=record["text"].strip())
    reply = client.ask(
        gen_cot.make_request(args.model, text, image, args.max_pixels, args.max_new_tokens, 0)
    )
    if reply.finish == "content_filter":
        raise gen_cot.Failed("content filter: the reply was cut off")
    keyphrases, think = data.parse_answer(reply.text)
    prediction = {
        "id": record["id"],
        "keyphrases": keyphrases,
        "think": think,
        "output": reply.text,
        "tokens": reply.tokens,
    }
    return prediction | {"cut": True} if reply.finish == "length" else prediction


def identity(args):
    """What predictions depend on: settings, and the state of the files that they name. A resumed run must match."""
    names = ("think", "max_pixels", "max_new_tokens", "model" if args.base_url else "max_length")
    now = {name: value for name, value in vars(args).items() if name in names}
    model = Path(checkpoint.model_folder(args.model))
    if not args.base_url:
        from model import find

        model = find(str(model))
    files = [
        args.data,
        *sorted(model.glob("*.safetensors")),
        args.prompt_file or model / "prompt.txt",
    ]
    files = [Path(file) for file in files if Path(file).exists()]
    return now | {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def finished(args, posts):
    """The predictions by id that --out already holds, those with an error left out.

    Raises UserError if they were made with other settings, which stand in a file beside it.
    """
    out = Path(args.out)
    if out.exists() and not out.is_file():
        raise UserError(
            f"{out}: not a file on a disk; --out is the file that the predictions go to"
        )
    if not out.exists() or not out.stat().st_size:
        return {}
    before, now = {}, identity(args)
    with contextlib.suppress(OSError, ValueError, TypeError):
        before = dict(json.loads(Path(f"{out}.settings.json").read_text(encoding="utf-8")))
    if before != now:
        differ = sorted(
            name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
        )
        raise UserError(
            f"{out}: was made with something else ({', '.join(differ)}); name another --out, or remove it"
        )
    known = {posts[index]["id"] for index in range(len(posts))}
    whole_lines, _, torn = out.read_bytes().rpartition(b"\n")
    if torn:  # predicted anew
        data.write_whole(out, whole_lines + b"\n" if whole_lines else b"")
    done = {}
    for line, _, row in jsonl(out):
        if parse_prediction(out, line, row)["id"] in known and not row.get("error"):
            done[row["id"]] = row | {"think": row.get("think"), "tokens": row.get("tokens") or 0}
    return done


def begin(args, done):
    """Write --out anew with what is done, and beside it what it is made with. Raises UserError."""
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        data.write_whole(
            f"{out}.settings.json", json.dumps(identity(args), indent=1, ensure_ascii=False) + "\n"
        )
        data.write_whole(out, "".join(map(data.to_line, done.values())))
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror}); name another --out") from None


def summary(args, predictions):
    failed = [prediction for prediction in predictions if "error" in prediction]
    cut = sum("cut" in prediction for prediction in predictions)
    tokens = sum(prediction["tokens"] or 0 for prediction in predictions) / len(predictions)
    reasoned = sum(prediction["think"] is not None for prediction in predictions) / len(predictions)
    data.say(
        f"{args.out}: {len(predictions)} posts, {tokens:.1f} tokens a post, {reasoned:.1%} reasoned about, "
        f"{cut} cut off after {args.max_new_tokens} tokens, {len(failed)} failed"
    )
    for prediction in failed[:3]:
        data.say(f"  (id {shown(prediction['id'])}) {one_line(prediction['error'])}")
    return 1 if failed else 0


def main():
    args = settings()
    if args.data is None:
        with checkpoint.enough_memory("a smaller --max-pixels takes less"):
            return infer_one(args)
    with checkpoint.enough_memory("a smaller --batch-size takes less; what was predicted is kept"):
        return infer_file(args)


if __name__ == "__main__":
    run(main)
