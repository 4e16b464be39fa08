"""Records as people write them: other names of fields (--map), and checks before a run."""

import argparse
import html
import os

from evaluate import UserError, one_line, read_jsonl, shown
from support.console import info
from support.phrases import split_keyphrases

FIELDS = {  # what a record's fields must be
    "id": "a string that is not empty",
    "text": "a string (empty if there is none)",
    "image": "one file name or null",
    "keyphrases": "a list of strings, at least one to train on",
    "cot": "a string or null",
}
TRIED = 200  # posts whose images are looked for before a run


def problem(where, kind, told):
    """A UserError about a record: what is `told` of it, and the `kind` that many records share."""
    error = UserError(f"{where}: {told}")
    error.kind, error.told = kind, told
    return error


def wrong_field(where, record, names, field):
    """The UserError for a field that isn't what it must be."""
    kind = f"the field {(names or {}).get(field, field)!r} must be {FIELDS[field]}"
    told = f"{kind}, not {shown(record.get(field))}; the record has {', '.join(record)}; "
    told += f"--map {field}=NAME names the right one, python -m tools.dataset import converts all"
    return problem(where, kind, told)


def parse_map(text):
    """argparse type: `text=caption,keyphrases=hashtags` as a dict from our names to theirs."""
    names = {}
    for part in text.split(","):
        ours, _, theirs = (side.strip() for side in part.partition("="))
        if ours not in FIELDS or not theirs or ours in names:
            needed = f"OURS=THEIRS, such as text=caption, each of {', '.join(FIELDS)} at most once"
            raise argparse.ArgumentTypeError(f"{shown(part)} must be {needed}")
        names[ours] = theirs
    return names


def add_map_option(add):
    """Add --map to a parser, by its `add_argument`."""
    names_help = "the posts' own names of fields, such as text=caption,keyphrases=hashtags"
    add("--map", type=parse_map, metavar="OURS=THEIRS,…", help=names_help)


def renamed(record, names):
    """The record with the fields that `names` maps under our names, converted to what we need.

    A record without their name keeps ours, so that files of both kinds can be read together.
    """
    if not names:
        return record
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
        yield from renamed(record, names)["keyphrases"]


def look_over(posts, for_training):
    """Warn where no post of a data.Posts has an image.

    Raises UserError where none of the images tried is there; before inference that is a warning.
    """
    records = (posts[index] for index in range(0, len(posts), -(-len(posts) // TRIED)))
    images = [record["image"] for record in records if record.get("image")]
    if not posts.with_image:
        has = f"the first has {', '.join(posts[0])}"
        text = f"{posts.path}: no post has an 'image'; {has}; --map image=NAME names it"
    elif images and not any(os.path.isfile(posts.folder / image) for image in images):
        gone = f"the image {shown(images[0])} is not there, nor is any of {len(images)} tried"
        text = f"{posts.path}: {gone}; paths to image files begin at {posts.folder}"
        if for_training and 100 * posts.with_image > len(posts):  # more than training may skip
            raise UserError(text)
    else:
        return
    info(f"warning: {one_line(text)}")
