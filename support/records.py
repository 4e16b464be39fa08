"""Records as people write them: other names of fields (--map), and checks before a run."""

import argparse
import html
import os

from evaluate import BYTE_ORDER_MARK, UserError, one_line, read_jsonl, read_lines, shown
from support.console import info
from support.phrases import split_keyphrases

FIELDS = ("id", "text", "image", "keyphrases", "cot")
TRIED = 200  # posts whose images are looked for before a run


def problem(where, kind, hint="", what=None):
    """A UserError about a record: `what` is wrong with it, a `kind` that many share, what to do."""
    error = UserError(f"{where}: {what or kind}" + (f"; {hint}" if hint else ""))
    error.kind, error.hint, error.what = kind, hint, what or kind
    return error


def parse_map(text):
    """argparse type: `text=caption,keyphrases=hashtags` as a dict from our names to theirs."""
    names = {}
    for part in text.split(","):
        ours, _, theirs = (side.strip() for side in part.partition("="))
        if ours not in FIELDS or not theirs or ours in names:
            raise argparse.ArgumentTypeError(
                f"{shown(part)} must be OURS=THEIRS, such as text=caption, each of ours (id, text, "
                "image, keyphrases, cot) at most once"
            )
        names[ours] = theirs
    return names


def add_map_option(add, required=False):
    """Add --map to a parser, by its `add_argument`."""
    names_help = "the posts' own names of fields, such as text=caption,keyphrases=hashtags"
    add("--map", type=parse_map, metavar="OURS=THEIRS,…", help=names_help, required=required)


def renamed(record, names):
    """The record with the fields that `names` maps under our names, converted to what we need.

    A record without their name keeps ours, so that files of both kinds can be read together.
    """
    found = {ours: converted(ours, record[name]) for ours, name in names.items() if name in record}
    return {name: record[name] for name in record if name not in names.values()} | found


def converted(field, value):
    """A value of a mapped field as docs/data.md says, itself where it can't be converted."""
    if field == "id" and type(value) is int:
        return str(value)
    if field == "text" and isinstance(value, str | None):
        return html.unescape(value or "")
    if field == "image":
        value = next(iter(value), None) if isinstance(value, list) and len(value) < 2 else value
        return value.get("path") or value if isinstance(value, dict) else value or None
    if field == "keyphrases" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = "; ".join(map(html.unescape, value)) + ";"
    if field == "keyphrases" and isinstance(value, str | None):
        return split_keyphrases(html.unescape(value or ""))
    return value


def mapped_keyphrases(path, names=None):
    """Iterate over the keyphrases of a training file. Raises UserError."""
    for _, _, record in read_jsonl(path):
        yield from renamed(record, names or {})["keyphrases"]


def wrong_field(where, record, names, field, must):
    """The UserError for a field that isn't what it `must` be."""
    theirs = (names or {}).get(field, field)
    label = f"the field {theirs!r}" + (f" of --map {field}={theirs}" if theirs != field else "")
    hint = f"the record has {', '.join(record) or 'no field'}; --map {field}=NAME names the right "
    hint += "one and converts it where it can"
    if field not in record:
        return problem(where, f"{label} is missing; it must be {must}", hint)
    kind = f"{label} must be {must}"
    return problem(where, kind, hint, f"{kind}, not {shown(record[field])}")


def check_file(path, cmkp=False):
    """Raise UserError unless a regular file may hold JSONL, or, with `cmkp`, CMKP's text."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: not a regular file; it is read twice: save it to a file first")
    lines = read_lines(path)
    filled = (raw.removeprefix(BYTE_ORDER_MARK).strip() for _, _, raw in lines)
    head = next(filter(None, filled), b"{")
    lines.close()
    if not head.startswith(b"{") and not (cmkp and b"<sep>" in head):
        hint = f"python -m tools.dataset import {path} --out posts.jsonl makes it of other forms"
        raise UserError(f"{path}: not JSONL, which is one JSON object a line; {hint}")


def warn(text):
    """Print a warning, which may have parts of a record in it, as one line on stderr."""
    info(f"warning: {one_line(text)}")


def look_over(posts, for_training):
    """Warn where no post of a data.Posts has an image.

    Raises UserError where none of the images tried is there; before inference that is a warning.
    """
    if not posts.with_image:
        has = f"the first has {', '.join(posts.original(0))}"
        warn(f"{posts.path}: no post has an 'image'; {has}; --map image=NAME names it")
    records = (posts[index] for index in range(0, len(posts), -(-len(posts) // TRIED)))
    images = [record["image"] for record in records if record.get("image")]
    if images and not any(os.path.isfile(posts.folder / image) for image in images):
        text = (
            f"{posts.path}: the image {shown(images[0])} is not there, nor is that of another post "
            f"({len(images)} tried); paths to image files begin at {posts.folder}"
        )
        if for_training and 100 * posts.with_image > len(posts):  # more than training may skip
            raise UserError(text)
        warn(text)
