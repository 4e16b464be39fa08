"""Tools for data sets of posts.

    python -m tools.dataset cmkp train_src.txt --images CMKP_images --out train.jsonl
    python -m tools.dataset stats train.jsonl test.jsonl
    python -m tools.dataset split all.jsonl --overlap 0.4492 --test 5000 --valid 5000 --out split
    python -m tools.dataset check train.jsonl
    python -m tools.dataset rename theirs.jsonl --map text=caption --out ours.jsonl

A file of posts is JSONL, or CMKP's text, text<sep>a;b<sep>address on each line.
"""

import json
import os
import tempfile
from pathlib import Path

import evaluate
from data import check_record, relative_path
from evaluate import UserError, first_few, non_negative_int, percent, plural, read_rows
from support.console import (
    ArgumentParser,
    fraction,
    info,
    positive_int,
    positive_number,
    reading,
    whole_number,
    writing,
)
from support.jsonl import locked, to_line, write_atomic
from support.records import add_map_option, check_file
from tools.check import check
from tools.posts import read_entries, share, to_record

# ------------------------------------------------------------------------------------ rename, cmkp


def refuse_input(out, *files):
    """Raise UserError where the file to write is one to read."""
    if Path(out).resolve() in {Path(file).resolve() for file in files}:
        raise UserError(f"{out}: this is a file to read; choose another --out")


def rename(args):
    """Write posts that have other field names with ours, for the commands without --map."""
    refuse_input(args.out, args.source)
    check_file(args.source)
    folder, out, count = os.path.realpath(Path(args.source).parent), Path(args.out), 0

    def lines():
        nonlocal count
        for line, _, row in evaluate.read_jsonl(args.source):
            record, count = to_record(args.source, line, row, args.map), count + 1
            if record.get("image") and not os.path.isabs(record["image"]):
                path = os.path.join(folder, record["image"])
                record["image"] = relative_path(path, out.parent)
            yield to_line(record).encode()

    with writing(out):
        write_atomic(out, lines())
    print(json.dumps({"posts": count}) if args.json else f"{out}: {plural(count, 'post')}")


def make_ids_unique(records):
    """Rename every id that an earlier record has, `x` to `x-2`; returns how many were renamed."""
    taken, seen, count = {record["id"] for record in records}, {}, 0
    for record in records:
        identity = record["id"]
        number = seen[identity] = seen.get(identity, 0) + 1
        while number > 1 and record["id"] in taken:
            record["id"] = f"{identity}-{number}"
            number += 1
        count += record["id"] != identity
        taken.add(record["id"])
    return count


def cmkp(args):
    """Write CMKP's text as JSONL."""
    refuse_input(args.out, args.source)
    check_file(args.source, cmkp=True)
    images = ()
    if args.images:
        with reading(args.images, "--images must be a folder"):
            images = set(os.listdir(args.images))
    records, missing, unusable = [], [], []
    for line, row in read_rows(args.source):
        if isinstance(row, dict):
            raise UserError(
                f"{args.source} line {line}: JSONL already; text<sep>a;b<sep>address is needed here"
            )
        record = to_record(args.source, line, row)
        records.append(record)
        name = record["address"].rsplit("/", 1)[-1]
        if name in images:
            path = os.path.join(os.path.realpath(args.images), name)
            record["image"] = relative_path(path, Path(args.out).parent)
        elif args.images:
            missing.append(name or f"line {line} has no address")
        try:
            check_record(record, f"line {line}", for_training=True)
        except UserError as error:
            unusable.append(str(error))
    if not records:
        raise UserError(f"{args.source}: no posts in it")
    result = {
        "posts": len(records),
        "images": sum(record["image"] is not None for record in records),
        "images_missing": len(missing),
        "ids_renamed": make_ids_unique(records),
        "unusable": len(unusable),
    }
    with writing(args.out):
        write_atomic(args.out, "".join(map(to_line, records)))
    if missing:
        info(f"{plural(len(missing), 'image')} missing: {first_few(missing)}")
    if unusable:
        info(f"{plural(len(unusable), 'post')} of no use for training: {first_few(unusable)}")
    rows = [[name.replace("_", " "), str(value)] for name, value in result.items()]
    print(json.dumps(result, indent=2) if args.json else evaluate.lay_out(rows))


# ------------------------------------------------------------------------------------------- stats

SHARES = {"present", "absent", "overlap", "overlap_occurrences", "posts_with_unseen"}


def figures_of(entries, known=None):
    """The figures of a list of Entry as a dict, shares as fractions.

    "present" is evaluate.py's: the share of keyphrases whose stemmed words stand consecutively in
    the stemmed text. Overlaps, where `known` is given (the train file's keyphrases), compare
    keyphrases lower-cased and not stemmed; "overlap" is over distinct ones.
    """
    phrases = [phrase for entry in entries for phrase in entry.phrases]
    distinct, images = set(phrases), [entry.image for entry in entries if entry.image is not None]
    scored = sum(entry.scored for entry in entries)
    present = sum(entry.present for entry in entries)
    result = {
        "posts": len(entries),
        "keyphrases": len(phrases),
        "distinct_keyphrases": len(distinct),
        "keyphrases_per_post": share(len(phrases), len(entries)),
        "words_per_post": share(sum(entry.words for entry in entries), len(entries)),
        "present": share(present, scored),
        "absent": share(scored - present, scored),
        "images": len(images),
        "images_missing": sum(not os.path.exists(image) for image in images),
    }
    if known is not None:
        seen = sum(phrase in known for phrase in phrases)
        with_unseen = sum(not known.issuperset(entry.phrases) for entry in entries)
        result["overlap"] = share(len(distinct & known), len(distinct))
        result["overlap_occurrences"] = share(seen, len(phrases))
        result["posts_with_unseen"] = share(with_unseen, len(entries))
    return result


def print_stats(names, parts, as_json):
    """Print the figures of files: `parts` are lists of Entry, the first is the train file."""
    known = {phrase for entry in parts[0] for phrase in entry.phrases}
    columns = []
    for name, entries in zip(names, parts, strict=True):
        columns.append({"file": str(name)} | figures_of(entries, known if columns else None))
    if as_json:
        print(json.dumps({"overlap": columns[-1].get("overlap"), "files": columns}, indent=2))
        return

    def cell(key, value):
        if key in SHARES and value is not None:
            return percent(value) + "%"
        if isinstance(value, float):
            return f"{value:.2f}"
        return "-" if value is None else str(value)

    rows = [
        [key.replace("_", " "), *(cell(key, column.get(key)) for column in columns)]
        for key in columns[-1]
    ]
    print(evaluate.lay_out(rows))


def stats(args):
    """Count posts and keyphrases, and how many of a file's keyphrases the train file has."""
    print_stats(args.files, [read_entries(path, args.map) for path in args.files], args.json)


# ------------------------------------------------------------------------------------------- split


def split(args):
    """Split posts at random, or with --overlap so that few keyphrases are in train, as MMKP-V2."""
    from tools.split import SIDE_NAMES, TEST, VALID, random_split, resplit  # numpy: --help is quick

    out = Path(args.out)
    paths = [out / f"{name}.jsonl" for name in SIDE_NAMES]
    for path in paths:
        refuse_input(path, *args.files)
    entries = [entry for path in args.files for entry in read_entries(path, args.map)]
    # Sorted, so that the split does not depend on the order of the input.
    entries.sort(key=lambda e: (e.record["id"], e.record["text"], to_line(e.record)))
    if count := make_ids_unique([entry.record for entry in entries]):
        info(f"ids used more than once: {count} of them, the later ones, now end in a number")
    asked = args.test, args.valid, args.seed
    if args.test + args.valid >= len(entries):
        raise UserError(
            f"--test {args.test} and --valid {args.valid} leave nothing to train on of "
            f"{plural(len(entries), 'post')}"
        )
    if args.overlap is None:
        side = random_split(entries, *asked)
    else:
        side = resplit(entries, args.overlap, *asked, args.likeness)
    parts = [[], [], []]
    for entry, which in zip(entries, side, strict=True):
        parts[which].append(entry)
        image = entry.record.get("image")
        if image and not os.path.isabs(image):
            entry.record["image"] = relative_path(entry.image, out)
    for which, size in ((TEST, args.test), (VALID, args.valid)):
        if len(parts[which]) != size:
            info(
                f"{SIDE_NAMES[which]}: {plural(len(parts[which]), 'post')} where {size} asked for, "
                "because posts that stay together don't add up to it"
            )
    with (
        locked(paths[0]),
        writing(paths[0]),
        tempfile.TemporaryDirectory(dir=out, prefix=".split.") as temporary,
    ):
        for path, part in zip(paths, parts, strict=True):
            lines = "".join(to_line(entry.record) for entry in part)
            write_atomic(Path(temporary) / path.name, lines)
        for path in paths:  # only now: a full disk leaves older files as they were
            os.replace(Path(temporary) / path.name, path)
    print_stats(paths, parts, args.json)


# -------------------------------------------------------------------------------- the command line


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    tools = parser.add_subparsers(required=True, metavar="cmkp | stats | split | check | rename")

    def add_tool(function):
        options = {"help": function.__doc__, "description": function.__doc__}
        tool = tools.add_parser(function.__name__, **options)
        tool.add_argument("--json", action="store_true", help="print JSON instead of a table")
        tool.set_defaults(tool=function)
        return tool.add_argument

    add = add_tool(cmkp)
    add("source", metavar="SRC", help="CMKP's text")
    add("--images", metavar="DIR", help="images, named like the last part of the addresses")
    add("--out", metavar="FILE", help="the JSONL file to write", required=True)

    add = add_tool(rename)
    add("source", metavar="FILE", help="posts")
    add_map_option(add, required=True)
    add("--out", metavar="FILE", help="the JSONL file to write", required=True)

    add = add_tool(stats)
    add("files", metavar="FILE", nargs="+", help="posts; the first is the train file")
    add_map_option(add)

    add = add_tool(split)
    add("files", metavar="FILE", nargs="+", help="posts")
    add_map_option(add)
    overlap = (
        "share of the distinct keyphrases of test, and of valid, that train has, to 0.005; without "
        "it the split is random"
    )
    add("--overlap", type=fraction, help=overlap)
    likeness = "with --overlap: how much test's and valid's means may differ from all posts'"
    add("--likeness", type=positive_number, default=0.1, help=likeness)
    add("--test", metavar="N", type=positive_int, help="posts in test.jsonl", required=True)
    valid = "posts in valid.jsonl, 0 for none"
    add("--valid", metavar="N", type=non_negative_int, help=valid, required=True)
    add("--seed", type=non_negative_int, default=0, help="seed of the random choices")
    add("--out", metavar="DIR", help="folder for train, valid and test.jsonl", required=True)

    add = add_tool(check)
    add("file", metavar="FILE", help="posts")
    add_map_option(add)
    cores = os.cpu_count() or 1
    add(
        "--workers", type=whole_number(1, 1024), default=cores, help="processes that read the posts"
    )
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    return args.tool(args)


if __name__ == "__main__":
    evaluate.run(main)
