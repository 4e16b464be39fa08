"""Posts as the tools for data sets see them, and `check`, which says what is wrong with them."""

import hashlib
import json
import os
import warnings
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import evaluate
from data import check_record
from evaluate import UserError, canonical, normalize, normalize_cmkp, plural, shown
from support.console import progress
from support.images import MAX_PIXELS, Unreadable, load_image
from support.records import problem, renamed


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
    """A row of a file of posts, a dict or a line of CMKP's text, as a record that is not checked.

    A record made of CMKP's text has no image yet, but keeps the image's "address". Its id is the
    image's name, else a digest: a line number would change with the order of the posts. Raises
    UserError for a line that is not CMKP's.
    """
    if isinstance(row, dict):
        return renamed(row, names)
    post = evaluate.parse_cmkp(path, line, row)
    identity = post["id"] or hashlib.blake2b(row.encode(), digest_size=8).hexdigest()
    keyphrases = [phrase.strip() for phrase in post["keyphrases"]]
    record = {"id": identity, "text": post["text"], "image": None}
    return record | {"keyphrases": keyphrases, "address": post["address"]}


def read_entries(path, names=None):
    """The posts of a JSONL or CMKP file as a list of Entry. Raises UserError."""
    folder, entries = os.path.realpath(Path(path).parent), []
    for line, row in progress(evaluate.read_rows(path), None, Path(path).name):
        record = to_record(path, line, row, names)
        check_record(record, f"{path} line {line}", names=names)
        keyphrases, image = record.get("keyphrases", []), record.get("image")
        to_words = normalize if isinstance(row, dict) else normalize_cmkp
        words = to_words(record["text"])
        scored = {to_words(phrase) for phrase in keyphrases} - {()}
        entry = Entry(
            record,
            os.path.join(folder, image) if image else None,
            hash(words) if words else None,
            [canonical(phrase).lower() for phrase in keyphrases if phrase.strip()],
            len(record["text"].split()),
            len(scored),
            sum(f" {' '.join(phrase)} " in f" {' '.join(words)} " for phrase in scored),
        )
        entries.append(entry)
    if not entries:
        raise UserError(f"{path}: no posts in it")
    return entries


def share(part, whole):
    """A fraction, 0 where there is nothing."""
    return part / whole if whole else 0.0


# ------------------------------------------------------------------------------------------- check

COUNTED = ("with_image", "images_read", "with_text", "with_cot", "keyphrases")


def typed(record, field, kind):
    """A field's value if it is of a type, else the type's empty value."""
    return value if isinstance(value := record.get(field), kind) else kind()


def check_line(path, parse, names, line, raw):
    """(id or None, errors, counts) of a line (bytes) of a file of posts and its image.

    parse: evaluate's `parse_line`, or `decode` for CMKP's text. errors: what
    `support.records.problem` returns. counts: the post's part of the file's COUNTED, as a dict.
    """
    try:
        record = to_record(path, line, parse(path, line, raw), names)
    except UserError as error:
        told = str(error).removeprefix(f"{path} line {line}: ")
        return None, [problem("", "a line that can't be read", told)], {}
    text, image, cot = (typed(record, field, str) for field in ("text", "image", "cot"))
    errors, read, folder = [], False, Path(path).parent
    try:
        check_record(record, "", for_training=True, names=names)
    except UserError as error:
        errors.append(error)
    if image:
        try:
            read = bool(load_image(folder / image, MAX_PIXELS))
        except Unreadable as error:
            kind = f"an image: {str(error).partition(': ')[0]}"
            hint = f"paths to image files begin at {folder}; null is for none"
            errors.append(problem("", kind, f"the image {shown(image)}: {error}; {hint}"))
    elif isinstance(record.get("text"), str) and not text.strip():
        errors.append(problem("", "neither text nor image", "neither text nor image; remove it"))
    keyphrases = len(typed(record, "keyphrases", list))
    counts = bool(image), read, bool(text.strip()), bool(cot.strip()), keyphrases
    return typed(record, "id", str) or None, errors, dict(zip(COUNTED, counts, strict=True))


def check(args):
    """Read every record and image and print all that is wrong; exit with 1 if anything is."""
    rows = [(line, raw) for line, _, raw in evaluate.read_lines(args.file) if raw.strip()]
    if not rows:
        raise UserError(f"{args.file}: no posts in it")
    is_json = args.file.endswith((".jsonl", ".json")) or evaluate.LOOKS_LIKE_JSON.match(rows[0][1])
    parse = evaluate.parse_line if is_json else evaluate.decode
    counts, found, first = Counter(dict.fromkeys(COUNTED, 0)), [], {}
    with ThreadPool() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `load_image` can't do so for each thread
        results = pool.imap(lambda row: check_line(args.file, parse, args.map, *row), rows, 8)
        bar = progress(results, len(rows), "check")
        for (line, _), (identity, errors, of_post) in zip(rows, bar, strict=True):
            same = is_json and identity is not None and canonical(identity)
            if same and first.setdefault(same, line) != line:
                told = f"this id was already used on line {first[same]}; ids must differ"
                errors.append(problem("", "an id is used twice", told))
            for error in errors:
                named = {"line": line, "id": identity}
                found.append(named | {"kind": error.kind, "problem": error.told})
            counts.update(of_post)
    if args.json:
        print(json.dumps({"posts": len(rows), **counts, "problems": found}, indent=2))
    else:
        print_by_kind(len(rows), counts, found)
    return 1 if found else 0


def print_by_kind(posts, counts, found):
    """Print what `check` found: counts, and of each kind of problem the first three."""
    images, read, texts, cots, keyphrases = counts.values()
    pictured = "with an image" if read == images else f"naming an image ({read:,} can be read)"
    having = f"{images:,} {pictured}, {texts:,} with a text, {cots:,} with a cot"
    print(f"{plural(posts, 'post')}: {having}; {plural(keyphrases, 'keyphrase')}")
    kinds = {}
    for row in found:
        kinds.setdefault(row["kind"], []).append(row)
    for kind, rows in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(rows):,} x {kind}")
        for row in rows[:3]:
            named = f" (id {shown(row['id'])})" if row["id"] is not None else ""
            print(f"  line {row['line']}{named}: {evaluate.one_line(row['problem'])}")
    print(f"\n{plural(posts, 'post')}, {plural(len(found), 'problem')}")
