"""Posts as other people keep them, for `python -m tools.dataset import`."""

import contextlib
import csv
import io
import json
import os
from pathlib import Path

from PIL import Image

from data import check_record, parse_answer, relative_path
from evaluate import UserError, decode, read_jsonl, read_lines, shown, without_doubles
from support.console import reading
from support.records import renamed
from tools.posts import to_record

# The names that fields often have, in any case. Of several in a file the first one is used.
USUAL_NAMES = {
    "id": "id post_id tweet_id image_id _id".split(),
    "text": "text caption tweet content post description title body".split(),
    "image": "image images image_path file_name filename image_name img photo picture".split(),
    "keyphrases": "keyphrases hashtags tags labels keywords keyphrase hashtag label".split(),
    "cot": "cot reasoning rationale".split(),
}
TURNS = ("conversations", "messages")  # of LLaVA and ShareGPT


def read_rows(path):
    """(rows, the usual names in them) of a table, of JSON in any form or of CMKP's text.

    The rows are dicts, the names {our name of a field: the rows' name}. Raises UserError.
    """
    with (
        reading(path, "it must be a text file in UTF-8"),
        open(path, encoding="utf-8-sig", newline="") as file,
    ):
        text = file.read().strip("\r\n")
    head = text.partition("\n")[0].lstrip()
    if not head.startswith(("[", "{")):
        if "<sep>" in head:
            return read_cmkp(path), {}
        rows = read_table(path, text)
        return rows, usual_names(rows)
    try:
        rows = json.loads(text, object_pairs_hook=without_doubles)
    except ValueError:  # else this names the line that is none
        rows = [record for _, _, record in read_jsonl(path)]
    if isinstance(rows, dict):
        lists = [value for name, value in rows.items() if are_records(value) and name not in TURNS]
        rows = lists[0] if len(lists) == 1 else [rows]
    if not are_records(rows):
        raise UserError(f"{path}: a list of JSON objects is needed, not {shown(rows)}")
    rows = list(map(as_post, rows))
    return rows, usual_names(rows)


def are_records(value):
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def read_cmkp(path):
    """The posts of CMKP's text; "image" is the name that the image has in its address."""
    lines = read_lines(path)
    posts = [to_record(path, line, decode(path, line, raw)) for line, _, raw in lines]
    return [post | {"image": post["address"].rpartition("/")[2] or None} for post in posts]


def read_table(path, text):
    """The rows of a table whose first line has the names of its columns. Raises UserError.

    Where quotes can't be those around cells, they are read as text.
    """
    delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        options = {"delimiter": delimiter, "quoting": quoting, "strict": True}
        with contextlib.suppress(csv.Error):
            rows = list(csv.DictReader(io.StringIO(text, newline=""), **options))
            if not any(None in row or None in row.values() for row in rows):
                return rows
    raise UserError(f"{path}: neither JSON nor a table whose rows have a cell for each name")


def as_post(row):
    """A row as it is; of a dialogue the last question is the text, the last answer is read."""
    turns = next((row[name] for name in TURNS if are_records(row.get(name))), None)
    if turns is None:
        return row
    post = {name: value for name, value in row.items() if name not in TURNS}
    for turn in turns:
        who, words = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if who in ("human", "user") and isinstance(words, str):
            post["text"] = words.replace("<image>", "").strip()
        elif who in ("gpt", "assistant") and isinstance(words, str):
            post["keyphrases"], post["cot"] = parse_answer(words)
    return post


def usual_names(rows):
    """{our name: the rows' name} of the fields that have a usual one."""
    theirs = {name.lower(): name for row in rows for name in row}
    found = {ours: [n for n in names if n in theirs] for ours, names in USUAL_NAMES.items()}
    return {ours: theirs[names[0]] for ours, names in found.items() if names}


def to_posts(path, rows, names, folder, out):
    """(records, names of the images that are not there) of a file's rows. Raises UserError.

    names: the rows' names of our fields. folder: the folder of the images, which are found by name
        or by the post's id; "none" for posts without images; None for the paths in the file. out:
        the file to be written, to which images' paths will be relative.
    """
    records, missing = [], []
    images = {}  # {a name, with and without suffix: the file of that name}
    base = os.path.realpath(folder or Path(path).parent)
    if folder and folder != "none":
        suffixes = tuple(Image.registered_extensions())
        with reading(folder, "--images is the folder of the images"):
            files = sorted(file for file in os.listdir(folder) if file.lower().endswith(suffixes))
        images = {Path(file).stem: file for file in files} | {file: file for file in files}
    for number, row in enumerate(rows, start=1):
        record = {"image": None} | renamed(row, names)
        record["id"] = record.get("id") or str(number)
        check_record(record, f"{path}: record {number}", names=names)
        name = record["image"] if folder != "none" else None
        keys = (Path(name or "").name, Path(name or "").stem, record["id"])
        tried = filter(None, (name, *map(images.get, keys)))
        found = next((one for one in tried if os.path.isfile(os.path.join(base, one))), None)
        record["image"] = found and relative_path(os.path.join(base, found), Path(out).parent)
        records.append(record)
        if name and not found:
            missing.append(name)
    if (missing or images) and not any(record["image"] for record in records):
        hint = "--images names their folder, --map image=NAME the field; --images none: no images"
        raise UserError(f"{path}: none of its images is in {base}; {hint}")
    return records, missing
