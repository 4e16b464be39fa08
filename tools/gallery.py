"""A gallery of predictions: pages that show posts with their images, references and predictions.

    python -m tools.gallery preds.jsonl test.jsonl --train train.jsonl --out gallery.html

A page is one file that loads nothing from elsewhere; small copies of the images are part of it.
The templates in tools/templates/ escape everything that people wrote in their posts.
"""

import base64
import io
import os
import secrets
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

from evaluate import (
    INVALID_WORDS,
    UserError,
    align,
    plural,
    read_predictions,
    read_references,
    read_rows,
    reasoned,
    required,
    run,
    score,
    table,
    train_keyphrases,
    words_of,
)
from support.console import ArgumentParser, info, positive_int, progress, writing
from support.images import Unreadable, load_image
from support.jsonl import locked, write_atomic

LONGEST_SIDE = 320  # pixels of a small copy: sharp on a phone, about 10 kB
FILTERS = {
    "First keyphrase": ("right", "wrong"),
    "Keyphrases": ("seen", "unseen"),
    "Answer": ("reasoned", "direct"),
}
SIGNS = {"right": "✓", "found": "✓", "wrong": "✗", "missed": "○", "repeated": "–", "ignored": "–"}


class Mark(NamedTuple):
    """A keyphrase as the scores see it."""

    phrase: str
    kind: str  # right or wrong (predictions), found or missed (references), repeated, ignored
    unseen: bool


def marks(prediction, post, train):
    """([Mark of each prediction], [Mark of each reference]), by the rules of the evaluator.

    The first of equal phrases counts. Empty references and predictions with an invalid word are
    ignored. `train` is the set of normalized training keyphrases, None where they are unknown.
    """
    to_words = words_of([post])
    predicted = [(phrase, to_words(phrase)) for phrase in prediction["keyphrases"]]
    references = [(phrase, to_words(phrase)) for phrase in post["keyphrases"]]
    valid = {words for _, words in predicted if INVALID_WORDS.isdisjoint(words)}
    right = valid.intersection(words for _, words in references if words)

    def marked(phrases, counts, hit, miss):
        before = set()
        for phrase, words in phrases:
            if not counts(words):
                kind = "ignored"
            elif words in before:
                kind = "repeated"
            else:
                kind = hit if words in right else miss
            before.add(words)
            yield Mark(phrase, kind, train is not None and not (words and words in train))

    return (
        list(marked(predicted, valid.__contains__, "right", "wrong")),
        list(marked(references, bool, "found", "missed")),
    )


def filter_kinds(prediction, predicted, references, train):
    """What the filters know of a post: right or wrong, seen or unseen, reasoned or direct.

    A post is right if its first prediction is (as in P@1), unseen if one of its references is.
    What is unknown is left out.
    """
    kinds = []
    counted = [mark for mark in references if mark.kind in ("found", "missed")]
    if counted:
        hits = [mark.kind for mark in predicted if mark.kind in ("right", "wrong")]
        kinds.append(hits[0] if hits else "wrong")
        if train is not None:
            kinds.append("unseen" if any(mark.unseen for mark in counted) else "seen")
    if "think" in prediction and "failed" not in prediction:
        kinds.append("reasoned" if reasoned(prediction) else "direct")
    return kinds


def describe_post(number, post, prediction, train):
    """What gallery.html shows of a post, apart from its image."""
    predicted, references = marks(prediction, post, train)
    kinds = filter_kinds(prediction, predicted, references, train)
    facts = ["answered directly"] if "direct" in kinds else []
    if "tokens" in prediction and "failed" not in prediction:
        facts.append(plural(prediction["tokens"], "token"))
    return post | {
        "number": number,
        "path": None,  # of the image
        "references": references,
        "predicted": predicted,
        "kinds": kinds,
        "think": (prediction.get("think") or "").strip(),
        "facts": facts + prediction.get("notes", []),
    }


def read_posts(args):
    """(the posts as the template shows them, their scores). Raises UserError."""
    posts = read_references(args.posts)
    predictions = read_predictions(args.predictions)
    for prediction, (_, row) in zip(predictions, read_rows(args.predictions), strict=True):
        if isinstance(row, dict) and (row.get("error") or row.get("cut")):
            prediction["notes"] = [f"failed: {row['error']}" if row.get("error") else "cut off"]
    predictions = align(predictions, posts, args.allow_missing, (args.predictions, args.posts))
    train = set(train_keyphrases(args.train)) if args.train else None
    known = None if train is None else set(map(words_of(posts), train))
    pairs = zip(posts, predictions, strict=True)
    shown = [describe_post(number, *pair, known) for number, pair in enumerate(pairs, start=1)]
    for post, (line, row) in zip(shown, read_rows(args.posts), strict=True):
        if isinstance(row, dict) and row.get("image"):  # CMKP's text has no images
            image = required(f"{args.posts} line {line}", row, "image")
            post["path"] = Path(args.posts).parent / image
    return shown, score(predictions, posts, train, words_of(posts))


def small_copy(path):
    """An image at most LONGEST_SIDE wide and high: {"picture": data URL} or {"problem": why not}.

    {} if `path` is None.
    """
    if path is None:
        return {}
    try:
        # load_image decodes a large JPEG at up to four times this area: enough to scale down well.
        image = load_image(path, LONGEST_SIDE * LONGEST_SIDE // 4)
    except Unreadable as error:
        # Pillow's message names the whole path, which readers of a published page need not know.
        return {"problem": f"{path.name}: {str(error).partition(':')[0]}"}
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=72, method=2)
    return {"picture": f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"}


def render_pages(pages, shared):
    """Iterate over the HTML of the pages, lists of posts; `shared` is the same on every page."""
    import jinja2

    files = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    template = jinja2.Environment(loader=files, **options).get_template("gallery.html")
    template.globals |= shared
    paths = [post["path"] for posts in pages for post in posts]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        copies = iter(progress(pool.map(small_copy, paths), len(paths), "gallery"))
        for here, posts in enumerate(pages):
            shown = [post | next(copies) for post in posts]
            yield template.render(here=here, posts=shown)


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("predictions", help="predictions, JSONL or text, as evaluate.py reads them")
    add("posts", help="their posts: JSONL, or CMKP's text, which has no images")
    add("--train", metavar="FILE", help="training posts: marks unseen keyphrases")
    first = "the first page; the others are numbered beside it"
    add("--out", metavar="FILE", default="gallery.html", help=first)
    add("--page-size", metavar="N", type=positive_int, default=500, help="posts per page")
    missing = "show posts without a prediction as if it were empty"
    add("--allow-missing", action="store_true", help=missing)
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    info(f"reading {args.predictions} and {args.posts} …")
    posts, scores = read_posts(args)
    out, size = Path(args.out), args.page_size
    pages = [posts[start : start + size] for start in range(0, len(posts), size)]
    numbers = range(2, len(pages) + 1)
    paths = [out, *(out.with_name(f"{out.stem}-{number}{out.suffix}") for number in numbers)]
    if out.suffix != ".html":  # pages are drawn anew, nothing else is replaced
        raise UserError(f"{out}: is no name of a page; --out takes one that ends in .html")
    # A published page need not tell where its files were: two parts of a path are enough.
    names = ["/".join(Path(file).parts[-2:]) for file in (args.predictions, args.posts)]
    shared = {
        "predictions": names[0],
        "references": names[1],
        "train": args.train and Path(args.train).name,
        "total": plural(len(posts), "post"),
        "scores": table(scores),
        "filters": FILTERS,
        "known": {kind for post in posts for kind in post["kinds"]},
        "signs": SIGNS,
        "links": [quote(os.fsencode(path.name)) for path in paths],
        "nonce": secrets.token_urlsafe(16),
    }
    warnings.simplefilter("ignore")  # load_image's own filter is not thread-safe
    with locked(out), writing(out):
        for path, page in zip(paths, render_pages(pages, shared), strict=True):
            write_atomic(path, page)
    info(f"{out}: {plural(len(posts), 'post')} on {plural(len(paths), 'page')}")


if __name__ == "__main__":
    run(main)
