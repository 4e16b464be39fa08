"""What is wrong with a file of posts: `python -m tools.dataset check`."""

import json
import re
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import evaluate
from data import check_record
from evaluate import UserError, plural, shown
from support.console import progress
from support.images import MAX_PIXELS, NO_FILE, Unreadable, load_image
from support.records import check_file, renamed
from tools.posts import to_record

COUNTED = ("with_image", "images_read", "with_text", "with_cot", "keyphrases")
MISSING = f"an image: {NO_FILE}"


class Problem(NamedTuple):
    """One thing that is wrong with a line: its kind, what it is here, and what to do."""

    kind: str
    what: str
    hint: str


def typed(record, field, kind):
    """A field's value if it is of a type, else the type's empty value."""
    return value if isinstance(value := record.get(field), kind) else kind()


def check_line(path, is_text, names, line, offset):
    """(id or None, list of Problem, counts) of a line of a file of posts and its image.

    counts: {name: number}, the post's part of the file's COUNTED, which are all 0 without it.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        raw = file.readline()
    try:
        if is_text:
            record = to_record(path, line, evaluate.decode(path, line, raw))
        else:
            record = evaluate.parse_line(path, line, raw)
            record = renamed(record, names) if names else record
    except UserError as error:
        what, _, hint = str(error).removeprefix(f"{path} line {line}: ").partition("; ")
        return None, [Problem(re.split(r" \(|, not ", what)[0], what, hint)], {}
    image, problems = typed(record, "image", str), []
    try:
        check_record(record, "", for_training=True, names=names)
    except UserError as error:
        problems.append(Problem(error.kind, error.what, error.hint))
    unreadable = image_problem(Path(path).parent, image) if image else None
    if unreadable:
        problems.append(unreadable)
    elif not image and isinstance(text := record.get("text"), str) and not text.strip():
        problems.append(Problem("neither text nor image", "neither text nor image", "remove it"))
    counts = {
        "with_image": bool(image),
        "images_read": bool(image) and not unreadable,
        "with_text": bool(typed(record, "text", str).strip()),
        "with_cot": bool(typed(record, "cot", str).strip()),
        "keyphrases": len(typed(record, "keyphrases", list)),
    }
    return typed(record, "id", str) or None, problems, counts


def image_problem(folder, image):
    """The Problem with a post's image, None if it can be read."""
    try:
        load_image(folder / image, MAX_PIXELS)
    except Unreadable as error:
        reason = str(error)
        hint = f"paths to image files begin at {folder}; null is for none"
        kind = re.sub(r"^\d+ x \d+ pixels", "its pixels", reason.partition(": ")[0])
        return Problem(f"an image: {kind}", f"the image {shown(image)}: {reason}", hint)
    return None


def check(args):
    """Read every record and image and print all that is wrong; exit with 1 if anything is."""
    check_file(args.file, cmkp=True)
    lines, head = [], b""
    for line, offset, raw in evaluate.read_lines(args.file):
        if raw := raw.removeprefix(evaluate.BYTE_ORDER_MARK).strip():
            lines.append((line, offset))
            head = head or raw
    if not lines:
        raise UserError(f"{args.file}: no posts in it")
    is_json = args.file.endswith((".jsonl", ".json")) or evaluate.LOOKS_LIKE_JSON.match(head)
    # multiprocessing.Pool would wait for ever for a worker that the system has killed.
    ignore_ctrl_c = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    pool = ProcessPoolExecutor(args.workers, **ignore_ctrl_c)
    try:
        check_one = partial(check_line, args.file, not is_json, args.map)
        results = pool.map(check_one, *zip(*lines, strict=True), chunksize=8)
        results = progress(results, len(lines), "check")
        counts, found = collect(lines, results, is_json)
    except BrokenProcessPool:
        raise UserError(
            f"{args.file}: a worker process was killed, perhaps because the memory was full; "
            "try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    print_check(len(lines), counts, found, args.json)
    return 1 if found else 0


def collect(lines, results, is_json):
    """(counts of the file, its problems), a dict and a list of (line, id, Problem).

    lines: (line, offset) of each post; results: what `check_line` found in it.
    """
    counts, found, first = Counter(dict.fromkeys(COUNTED, 0)), [], {}
    for (line, _), (identity, problems, of_post) in zip(lines, results, strict=True):
        if is_json and identity is not None and first.setdefault(identity, line) != line:
            what = f"this id was already used on line {first[identity]}"
            problems.append(Problem("an id is used twice", what, "ids must differ"))
        found += [(line, identity, problem) for problem in problems]
        counts.update(of_post)
    return counts, found


def print_check(posts, counts, found, as_json):
    """Print what `check` found: (line, id, Problem) each; by kind, unless as JSON."""
    if as_json:
        rows = []
        for line, identity, problem in found:
            told = "; ".join(filter(None, (problem.what, problem.hint)))
            rows.append({"line": line, "id": identity, "kind": problem.kind, "problem": told})
        print(json.dumps({"posts": posts, **counts, "problems": rows}, indent=2))
        return
    groups = {}
    for row in found:
        groups.setdefault(row[2].kind, []).append(row)
    images, read, texts, cots, keyphrases = counts.values()
    pictured = "with an image" if read == images else f"naming an image ({read:,} can be read)"
    having = f"{images:,} {pictured}, {texts:,} with a text, {cots:,} with a cot"
    having += "" if cots else " (so train with --mode sft)"
    print(f"{plural(posts, 'post')}: {having}; {plural(keyphrases, 'keyphrase')}")
    for kind, rows in sorted(groups.items(), key=lambda group: -len(group[1])):
        if kind == MISSING and len(rows) == images:
            kind = "none of the images is there"
        print(f"\n{len(rows):,} x {kind}")
        for line, identity, problem in rows[:3]:
            named = f" (id {shown(identity)})" if identity is not None else ""
            what = f": {problem.what}" if problem.what != problem.kind else ""
            print(f"  line {line}{named}{what}")
        if hint := rows[0][2].hint:
            print(f"  -> {evaluate.one_line(hint)}")
    kinds = f" of {len(groups)} kinds" if len(groups) > 1 else ""
    print(f"\n{plural(posts, 'post')}, {plural(len(found), 'problem')}{kinds}")
