"""Records as other people write them: other names, other formats, and what looks like a mistake."""

import argparse
import os
import re
import shlex
from functools import lru_cache
from pathlib import Path

from evaluate import BYTE_ORDER_MARK, UserError, one_line, read_jsonl, read_lines, shown
from support.console import info
from support.phrases import split_keyphrases

FIELDS = {"id", "text", "image", "keyphrases", "cot"}

# What a field is often called, searched for in names like `tweet_id`.
LOOKALIKES = {
    "id": r"(?:^|_)u?u?id(?:_?str)?$|^(?:key|index|idx|number)$",
    "image": r"ima?ge?|photo|pic|media|file|path|url|jpe?g|png",
    "keyphrases": r"key.?(?:phrase|word|term)|phrase|tag|label|topic|categor",
    "cot": r"^cot|cot$|reason|rational|thought|think|explan|chain",
    "text": r"text|caption|tweet|post|content|body|message|descri|title|sentence|comment|status",
}
DIALOGUE = re.compile(r"conversation|messages|dialog|turns", re.IGNORECASE)
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://|data:|www\.|iVBORw0KGgo|/9j/4")  # base64, too
SUFFIX = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|avif|heic)\b", re.IGNORECASE)
GENERIC = re.compile(r"(?:^|_)(?:file_?names?|files?|paths?|urls?)$")  # of any kind of file
SAVE = "save the images and write their file names"
PLACEHOLDER = re.compile(r"<\|?(?:image|img|image_pad)\|?>", re.IGNORECASE)


def problem(where, kind, mend="", what=None):
    """A UserError about a record: `what` is wrong with it, a `kind` that many share, the mend."""
    error = UserError(f"{where}: {what or kind}" + (f"; {mend}" if mend else ""))
    error.kind, error.mend, error.what = kind, mend, what or kind
    return error


# -------------------------------------------------------------------------------------- the names


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
    """A value of a mapped field as the field's type, itself where it can't be.

    Keyphrases are split and cleaned as an answer is; a list of one image is that image, an object
    its "path"; a whole number becomes an id; no text is an empty one.
    """
    if field == "id" and type(value) is int:
        return str(value)
    if field == "text" and value is None:
        return ""
    if field == "image" and isinstance(value, list) and len(value) < 2:
        value = value[0] if value else None
    if field == "image" and isinstance(value, dict) and isinstance(value.get("path"), str):
        return value["path"]
    if field == "keyphrases" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = "; ".join(value) + ";"
    if field == "keyphrases" and isinstance(value, str | None):
        return split_keyphrases(value or "")
    return value


def train_keyphrases(path, names=None):
    """Iterate over the keyphrases of a training file. Raises UserError."""
    for _, _, record in read_jsonl(path):
        yield from renamed(record, names or {})["keyphrases"]


# ------------------------------------------------------------------------------------ the guesses


def has(record, field):
    """Whether a record has a value in a field that is of its type and not blank."""
    value = record.get(field)
    if field == "keyphrases":
        return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
    return isinstance(value, str) and bool(value.strip())


@lru_cache(1000)
def sounds_like(field, name):
    """Whether a field of this name may hold what `field` should."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return name == field or name not in FIELDS and bool(re.search(LOOKALIKES[field], words))


def names_image(name, value):
    """Whether a field may name an image: `url` needs a suffix for that, `photo` a slash."""
    is_path = re.fullmatch(r"\S*[/\\]\S*", value.strip()) and not GENERIC.search(name.lower())
    return bool(SUFFIX.search(value) or is_path)


def lookalikes(record):
    """{field: name} of the fields that a record lacks and that another one looks like.

    A field may look like itself: keyphrases in one string are keyphrases once they are converted.
    """
    found = {}
    for field in LOOKALIKES:
        if has(record, field):
            continue
        for name in record:
            if name in found.values() or not sounds_like(field, name):
                continue
            value = converted(field, record[name])
            if has({field: value}, field) and (field != "image" or names_image(name, value)):
                found[field] = name
                break
        if field not in found and field == "text" and record.get(field, "") is None:
            found[field] = field  # null, which is converted to an empty text
    return found


def map_option(names):
    """`--map …` for {ours: theirs}."""
    return "--map " + shlex.quote(",".join(f"{ours}={name}" for ours, name in names.items()))


def is_address(record, name):
    """Whether a field has the address of an image, not a file's name."""
    return bool(ADDRESS.match(str(converted("image", record.get(name))).strip()))


def mend_for(record, names=None):
    """How a record that can't be used might be mended, empty where there is nothing to guess."""
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if DIALOGUE.search(name):
                return (
                    f"{shown(name)} is a dialogue (LLaVA, ShareGPT), which is no post: "
                    "docs/data.md shows how to turn it round"
                )
            if not has(record, "id") and not has(record, "text"):
                return (
                    f"the records seem to be in the field {shown(name)}: write one of them a line"
                )
    if record and all(isinstance(value, dict) for value in record.values()):
        return "the records seem to be inside this one: write one of them a line"
    guesses = lookalikes(record)
    if "image" in guesses and is_address(record, guesses["image"]):
        del guesses["image"]
    if not guesses and not has(record, "id"):
        return "give each post one, such as its number"
    return f"try {map_option((names or {}) | guesses)}" if guesses else ""


def wrong_field(where, record, names, field, must):
    """The UserError for a field that isn't what it `must` be."""
    theirs = (names or {}).get(field, field)
    label = f"the field {theirs!r}" + (f" of --map {field}={theirs}" if theirs != field else "")
    if field not in record:
        return problem(where, f"{label} is missing; it must be {must}", mend_for(record, names))
    kind = f"{label} must be {must}"
    what = f"{kind}, not {shown(record[field])}"
    return problem(where, kind, mend_for(record, names), what)


def no_keyphrases(where, record, names):
    """The UserError for a post to train on that has no keyphrases."""
    kind = "a training post needs at least one keyphrase"
    field = (names or {}).get("keyphrases", "keyphrases")
    missing = "" if "keyphrases" in record else f", and the field {field!r} is missing"
    return problem(where, kind + missing, mend_for(record, names))


# --------------------------------------------------------------------------------------- the file

MAGIC = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "a SQLite database",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}


def other_format(head):
    """What a file is instead of JSONL, by its first line that is not blank (bytes); else None."""
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    text = head.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "replace").strip()
    if text.startswith("["):
        return "a JSON list"
    if text.startswith("{"):
        # A record on one line ends with a brace.
        return "JSON over several lines" if text.endswith(("{", "[", ",")) else None
    if text.startswith("<"):
        return "XML or HTML"
    if re.match(r"---|%YAML|(?:- )?[\w ]+:(?:\s|$)", text):
        return "YAML"
    if "\t" in text:
        return "a table with tabs (TSV)"
    return "a table (CSV)" if re.search("[,;|]", text) else None


def check_file(path, cmkp=False):
    """Raise UserError where a file holds no JSONL, or, with `cmkp`, CMKP's text.

    A pipe or a device, which can't be read twice, is refused, too.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(
            f"{path}: not a regular file; it is read more than once, so save it to a file first"
        )
    lines = read_lines(path)
    filled = ((n, raw) for n, _, raw in lines if raw.removeprefix(BYTE_ORDER_MARK).strip())
    line, head = next(filled, (0, b""))
    lines.close()
    if b"<sep>" in head and not head.lstrip().startswith(b"{"):
        if not cmkp or str(path).endswith((".jsonl", ".json")):
            raise UserError(f"{path}: CMKP's text; python -m tools.dataset cmkp makes JSONL of it")
    elif kind := other_format(head):
        mend = "docs/data.md shows how to write it"
        if "archive" in kind or "UTF" in kind:
            mend = "unpack it first" if "archive" in kind else "save it as UTF-8"
        wrong = f"not {'UTF-8' if head.startswith(tuple(MAGIC)) else 'JSONL'}, but {kind}"
        raise UserError(f"{path} line {line}: {wrong}; one JSON object a line is needed: {mend}")


# ------------------------------------------------------------------------------------ the mistakes

TRIED = 200  # posts that are looked over before a run


def likely_mistakes(record, names=None):
    """Iterate over (field that no post may have, kind, mend) of what seems wrong with a record.

    The record may be used. What concerns a field only matters where no post of the file has it.
    """
    guesses = lookalikes(record) if record.keys() - FIELDS else {}
    for field in ("image", "cot", "text"):
        if name := guesses.get(field):
            mend = f"try {map_option((names or {}) | {field: name})}"
            if field == "image" and is_address(record, name):
                mend = f"it has addresses: {SAVE}"
            article = "an" if field == "image" else "a"
            yield field, f"no post has {article} {field!r}, but {shown(name)} looks like one", mend
    text = record["text"]
    if "<" in text and (found := PLACEHOLDER.search(text)):
        mend = "remove it: the image goes before the text by itself"
        yield None, f"{found[0]} in the text, which is read as the post's own words", mend


def where_images_are(folder, image):
    """A hint at why the file `image` is not in `folder`, where paths begin."""
    name = image.replace("\\", "/")
    base = name.rpartition("/")[2]
    hint = f"paths begin at the folder of the file, {folder}"
    for path in (folder / name, folder / base, folder / "images" / base, Path(name)):
        if os.path.isfile(path):
            return f"{hint}: write {os.path.relpath(path, folder)}"
    return f"{hint}, and have / for \\" if "\\" in image else hint


def warn(text):
    """Print a warning, which may have parts of a record in it, as one line on stderr."""
    info(f"warning: {one_line(text)}")


def look_over(posts, for_training):
    """Warn of what seems wrong with a data.Posts, of which some posts are read.

    Raises UserError where their images are addresses, or, for training, none of them is there.
    """
    lacking = {"image": not posts.with_image, "text": True}
    lacking["cot"] = for_training and posts.without_cot == len(posts)
    warnings, fields, images = {}, set(), []
    for index in range(0, len(posts), -(-len(posts) // TRIED)):
        original = posts.original(index)
        fields.update(original)
        record = renamed(original, posts.names)
        lacking["text"] &= not record["text"].strip()
        if record.get("image"):
            images.append((index, record["image"]))
        for field, kind, mend in likely_mistakes(record, posts.names):
            warnings.setdefault((kind, mend), (index, field))
    for ours, theirs in posts.names.items():
        if theirs not in fields:
            option = f"--map {ours}={theirs}"
            warn(f"{posts.path}: no post tried has the field {theirs!r} of {option}")
    for (kind, mend), (index, field) in warnings.items():
        if lacking.get(field, True):
            warn(f"{posts.path} line {posts.lines[index]}: {kind}; {mend}")
    if not images:
        return
    index, image = images[0]
    where = f"{posts.path} line {posts.lines[index]}: the image {shown(image)}"
    if ADDRESS.match(image):
        raise UserError(f"{where} is an address or data, not a file name; {SAVE}")
    if not any(os.path.isfile(posts.folder / image) for _, image in images):
        found = "is a folder" if os.path.isdir(posts.folder / image) else "is not there"
        line = (
            f"{where} {found}, and no other post has a file there ({len(images)} tried); "
            f"{where_images_are(posts.folder, image)}"
        )
        if for_training and 100 * posts.with_image > len(posts):  # more than training may skip
            raise UserError(line)
        warn(line)
