"""Posts as the tools for data sets see them."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import evaluate
from data import check_record
from evaluate import UserError, normalize, read_rows
from support.console import progress
from support.records import check_file, renamed


class Entry(NamedTuple):
    """A post as these tools see it."""

    record: dict
    image: str | None  # path of the image
    text: int | None  # the same number for texts of the same words; None where there is no text
    phrases: list[str]  # keyphrases as overlaps compare them: lower-cased, not stemmed
    words: int  # words of the text
    scored: int  # keyphrases that differ after stemming
    present: int  # those of them that stand in the text


def to_record(path, line, row, names=None):
    """A row of a file of posts, a dict or a line of CMKP's text, as a record. Raises UserError.

    A record made of CMKP's text has no image yet, but keeps the image's "address". Its id is the
    image's name, else a digest: a line number would change with the order of the posts.
    """
    if isinstance(row, dict):
        row = renamed(row, names) if names else row
        check_record(row, f"{path} line {line}", names=names)
        return row
    post = evaluate.parse_cmkp(path, line, row)
    identity = post["id"] or hashlib.blake2b(row.encode(), digest_size=8).hexdigest()
    keyphrases = [phrase.strip() for phrase in post["keyphrases"]]
    record = {"id": identity, "text": post["text"], "image": None}
    return record | {"keyphrases": keyphrases, "address": post["address"]}


def to_entry(record, folder):
    """The Entry of a record from a file in `folder`."""
    keyphrases, image = record.get("keyphrases", []), record.get("image")
    words = normalize(record["text"])
    scored = {normalize(phrase) for phrase in keyphrases} - {()}
    return Entry(
        record,
        os.path.join(folder, image) if image else None,
        hash(words) if words else None,
        [phrase.strip().lower() for phrase in keyphrases if phrase.strip()],
        len(record["text"].split()),
        len(scored),
        sum(f" {' '.join(phrase)} " in f" {' '.join(words)} " for phrase in scored),
    )


def read_entries(path, names=None):
    """The posts of a JSONL or CMKP file as a list of Entry. Raises UserError."""
    check_file(path, cmkp=True)
    folder = os.path.realpath(Path(path).parent)
    rows = progress(read_rows(path), None, Path(path).name)
    entries = [to_entry(to_record(path, line, row, names), folder) for line, row in rows]
    if not entries:
        raise UserError(f"{path}: no posts in it")
    return entries


def share(part, whole):
    """A fraction, 0 where there is nothing."""
    return part / whole if whole else 0.0
