"""Tools for data sets of posts.

    python -m tools.dataset import posts.csv --images photos --out posts.jsonl
    python -m tools.dataset check posts.jsonl
    python -m tools.dataset stats train.jsonl test.jsonl
    python -m tools.dataset split all.jsonl --overlap 0.4492 --test 5000 --valid 5000 --out split

`import` reads CSV, TSV, JSON, dialogues and CMKP's text. The others read JSONL, or CMKP's text:
text<sep>a;b<sep>address on each line.
"""

import json
import os
import tempfile
from pathlib import Path

import evaluate
from data import relative_path
from evaluate import UserError, first_few, non_negative_int, percent, plural
from support.console import ArgumentParser, fraction, info, positive_int, positive_number, writing
from support.jsonl import locked, to_line, write_atomic
from support.records import FIELDS, add_map_option
from tools.convert import read_rows, to_posts
from tools.posts import check, read_entries, share

# ------------------------------------------------------------------------------------------ import


def refuse_output(path, replace):
    """Raise UserError where a file that would be written is there, unless it may be replaced."""
    if os.path.exists(path) and not replace:
        raise UserError(f"{path}: is there already; choose another --out, or --replace it")


def write_records(path, records):
    """Write records to a JSONL file, whole or not at all. Raises UserError."""
    with writing(path):
        write_atomic(path, "".join(map(to_line, records)))


def moved(entries, folder):
    """The records of a list of Entry, whose images' paths now begin at `folder`."""
    for entry in entries:
        if entry.image and not os.path.isabs(entry.record["image"]):
            entry.record["image"] = relative_path(entry.image, folder)
    return [entry.record for entry in entries]


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


def import_posts(args):
    """Write posts that somebody has in another form as JSONL of ours."""
    refuse_output(args.out, args.replace)
    rows, names = read_rows(args.file)
    if not rows:
        raise UserError(f"{args.file}: no posts in it")
    names |= args.map or {}
    fields = dict.fromkeys(name for row in rows for name in row)
    if wrong := [name for name in names.values() if name not in fields]:
        they_have = f"they have {', '.join(fields)}"
        raise UserError(f"{args.file}: no record has {first_few(wrong)}; {they_have}")
    records, missing = to_posts(args.file, rows, names, args.images, args.out)
    result = {
        "posts": len(records),
        "images": sum(record["image"] is not None for record in records),
        "images_missing": len(missing),
        "keyphrases": sum(len(record.get("keyphrases", ())) for record in records),
        "ids_renamed": make_ids_unique(records),
        "map": ",".join(f"{ours}={name}" for ours, name in names.items() if name != ours),
        "others": [name for name in fields if name not in {*names.values(), *FIELDS}],
    }
    write_records(args.out, records)
    if missing:
        lost = f"{plural(len(missing), 'image')} missing, their posts are text-only now"
        info(f"{lost}: {first_few(missing)}")
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        names, others = result.pop("map"), ", ".join(result.pop("others"))
        rows = [[name.replace("_", " "), str(value)] for name, value in result.items()]
        print(evaluate.lay_out(rows) + (f"\nread with --map {names}" if names else ""))
        print(f"other fields: {others or 'none'}\nThe first post:\n{to_line(records[0])}", end="")


# ------------------------------------------------------------------------------------------- stats


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
        if isinstance(value, float):
            return f"{value:.2f}" if key.endswith("per_post") else f"{percent(value)}%"
        return "-" if value is None else str(value)

    lines = {key: [cell(key, column.get(key)) for column in columns] for key in columns[-1]}
    print(evaluate.lay_out([[key.replace("_", " "), *cells] for key, cells in lines.items()]))


def stats(args):
    """Count posts and keyphrases, and how many of a file's keyphrases the train file has."""
    print_stats(args.files, [read_entries(path, args.map) for path in args.files], args.json)


# ------------------------------------------------------------------------------------------- split


def split(args):
    """Split posts at random, or with --overlap so that few keyphrases are in train, as MMKP-V2."""
    from tools.split import SIDE_NAMES, TEST, VALID, random_split, resplit  # numpy: --help is quick

    out, sizes = Path(args.out), (0, args.valid, args.test)
    paths = [out / f"{name}.jsonl" for name in SIDE_NAMES]
    for path in paths:
        refuse_output(path, args.replace)
    entries = [entry for path in args.files for entry in read_entries(path, args.map)]
    # Sorted, so that the split does not depend on the order of the input.
    entries.sort(key=lambda e: (e.record["id"], e.record["text"], to_line(e.record)))
    if count := make_ids_unique([entry.record for entry in entries]):
        info(f"ids used more than once: {count} of them, the later ones, now end in a number")
    if sum(sizes) >= len(entries):
        raise UserError(f"--test and --valid leave nothing to train on of {len(entries):,} posts")
    if args.overlap is None:
        side = random_split(entries, sizes, args.seed)
    else:
        side = resplit(entries, args.overlap, sizes, args.seed, args.likeness)
    parts = [[], [], []]
    for entry, which in zip(entries, side, strict=True):
        parts[which].append(entry)
    for which, size in ((TEST, args.test), (VALID, args.valid)):
        if len(parts[which]) != size:
            count = plural(len(parts[which]), f"{SIDE_NAMES[which]} post")
            told = f"not as asked: {count}, not {size}; those of one text or image stay together"
            if not parts[which]:
                raise UserError(f"{told}; ask for more")
            info(told)
    with locked(paths[0]), tempfile.TemporaryDirectory(dir=out, prefix=".split.") as temporary:
        for path, part in zip(paths, parts, strict=True):
            write_records(Path(temporary) / path.name, moved(part, out))
        for path in paths:  # only now: a full disk leaves older files as they were
            os.replace(Path(temporary) / path.name, path)
    print_stats(paths, parts, args.json)


# -------------------------------------------------------------------------------- the command line


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    tools = parser.add_subparsers(required=True, metavar="import | stats | check | split")

    def add_tool(function, name, posts):
        about = function.__doc__
        command = function.__name__.removesuffix("_posts")
        tool = tools.add_parser(command, help=about, description=about)
        tool.set_defaults(tool=function)
        add = tool.add_argument
        add(name, metavar="FILE", nargs="+" if name == "files" else None, help=posts)
        add("--json", action="store_true", help="print JSON instead of a table")
        return add

    def add_out(add, metavar, what):
        add("--out", metavar=metavar, help=what, required=True)
        add("--replace", action="store_true", help="replace what --out has")

    add = add_tool(import_posts, "file", "posts in any form")
    add_map_option(add)
    images = "folder of the images, named as in the file or by the posts' ids; none: no images"
    add("--images", metavar="DIR", help=images)
    add_out(add, "FILE", "the JSONL file to write")

    add_map_option(add_tool(stats, "files", "posts; the first is the train file"))
    add_map_option(add_tool(check, "file", "posts"))

    add = add_tool(split, "files", "posts")
    add_map_option(add)
    overlap = "share of test's and valid's distinct keyphrases that train has; random without it"
    add("--overlap", type=fraction, help=overlap)
    likeness = "with --overlap: how much test's and valid's means may differ from all posts'"
    add("--likeness", type=positive_number, default=0.1, help=likeness)
    add("--test", metavar="N", type=positive_int, help="posts in test.jsonl", required=True)
    add("--valid", metavar="N", type=non_negative_int, help="or 0 for none", required=True)
    add("--seed", type=non_negative_int, default=0, help="seed of the random choices")
    add_out(add, "DIR", "folder for train, valid and test.jsonl")
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    return args.tool(args)


if __name__ == "__main__":
    evaluate.run(main)
