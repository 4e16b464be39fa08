"""Score predicted keyphrases as CMKP's evaluator does (Wang et al., EMNLP 2020).

    python evaluate.py preds.jsonl test.jsonl --train train.jsonl
    python evaluate.py best_pred.txt test_src.txt                   # CMKP's own text files
    python evaluate.py ours.jsonl test.jsonl --against theirs.jsonl

Predictions: one JSON object a line with "id" and "keyphrases" (optionally "think" and "tokens"),
or CMKP's text, `a;b;c` a line. References: one JSON object a line with "id", "text" and
"keyphrases", or CMKP's text, `text<sep>a;b<sep>image address` a line.
This file needs only numpy and also works when it is copied elsewhere.
"""

import argparse
import difflib
import gc
import hashlib
import html
import io
import json
import math
import os
import re
import reprlib
import string
import sys
import unicodedata
from functools import cache
from itertools import accumulate, chain
from typing import NamedTuple

# ------------------------------------------------------------------------------- running a script


class UserError(Exception):
    """A user's mistake, in one line that names the file, the record and what to do."""


def run(main):
    """Exit with the code that `main()` returns (None is 0); print a UserError and exit with 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal can't encode is printed as an escape.
            stream.reconfigure(errors="backslashreplace")
    message = None
    try:
        code = main() or 0
        print(end="", flush=True)
    except UserError as error:
        code, message = 1, str(error)  # the error's frames may hold a progress bar
    except ImportError as error:  # of a package that is missing, or doesn't fit another
        hint = "pip install -r requirements.txt; pip uninstall torchvision, which is not needed"
        code, message = 1, f"{error}; {hint}"
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the program that reads our output (`| head`) has ended
        code = 1
    except OSError as error:  # an error that no function explains better, such as a full disk
        code, message = 1, f"{error.filename or 'the output'}: {error.strerror or error}"
    if message:
        print("error:", one_line(message), file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # else Python prints an error of its own when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def one_line(text):
    """`text` as one printable line of about 1000 characters at most."""
    text = " ".join(str(text).split())
    text = text if len(text) <= 1000 else f"{text[:500]} ... {text[-500:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


short_repr = reprlib.Repr()
short_repr.maxstring = short_repr.maxother = 60
shown = short_repr.repr  # a value as an error message shows it


def plural(count, noun):
    """`1 post`, `2 posts`, `330,000 posts`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_few(items):
    """The first three strings of a list and how many more there are, for an error message."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


# ---------------------------------------------------------------------------------- reading files

LOOKS_LIKE_JSON = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*["}]')


def read_lines(path):
    """Iterate over (line number from 1, byte offset, bytes) of a file. Raises UserError."""
    offset = 0
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                yield number, offset, raw
                offset += len(raw)
    except OSError as error:
        raise UserError(f"{path}: {str(error.strerror).lower()}") from None


def decode(path, number, raw):
    """A line's text without byte order mark and line end. Raises UserError if it isn't UTF-8."""
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} line {number}: not UTF-8; save the file as UTF-8") from None


def parse_line(path, number, raw):
    """The JSON object in a line (bytes) of a JSONL file, as a dict. Raises UserError."""
    text, where = decode(path, number, raw), f"{path} line {number}"
    try:
        record = json.loads(text, object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:
        hint = "python -m tools.dataset import reads other files"
        raise UserError(f"{where}: not a line of JSON ({error}); {hint}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON object is needed, not {shown(record)}")
    return record


def without_doubles(pairs):
    """A JSON object as a dict. Raises ValueError where a field is there twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in record if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice)} is there twice")
    return record


def read_jsonl(path):
    """Iterate over (line number from 1, byte offset, dict) of a JSONL file without its blank lines.

    Only one line is in memory at a time. Raises UserError naming the file and the line.
    """
    for number, offset, raw in read_lines(path):
        if raw.strip():
            yield number, offset, parse_line(path, number, raw)


def read_rows(path):
    """Iterate over (line number, row): rows are dicts if the file is JSONL, strings if it is text.

    A file is JSONL if its name says so or if its first line that isn't blank begins an object.
    """
    lines, head = read_lines(path), []
    for line in lines:
        head.append(line)
        if line[2].strip():
            break
    start = head[-1][2] if head else b""
    is_json = str(path).endswith((".jsonl", ".json")) or LOOKS_LIKE_JSON.match(start)
    for number, _, raw in chain(head, lines):
        if not is_json:
            yield number, decode(path, number, raw)
        elif raw.strip():
            yield number, parse_line(path, number, raw)


def required(where, record, field):
    """A field: a string (an id in canonical form), or keyphrases, a list. Raises UserError."""
    value = record.get(field)
    if field == "keyphrases":
        kind = "list of strings"
        right = isinstance(value, list) and all(isinstance(phrase, str) for phrase in value)
    else:
        kind, right = "string", isinstance(value, str)
    if not right:
        raise UserError(f"{where}: the field {field!r} must be a {kind}, not {shown(value)}")
    return canonical(value) if field == "id" else value


def parse_cmkp(path, number, line):
    """A post in CMKP's text format, `text<sep>a;b<sep>image address`, as a dict.

    Its id is the image's file name without extension, None without address. Raises UserError.
    """
    fields = [field.strip() for field in line.split("<sep>")]
    if len(fields) not in (2, 3):
        found = f"a line with {len(fields) - 1} <sep>"
        raise UserError(f"{path} line {number}: must be text<sep>a;b<sep>address, not {found}")
    text, keyphrases, address = (*fields, "")[:3]
    identity = address.rsplit("/", 1)[-1].rsplit(".", 1)[0] or None
    return {"id": identity, "text": text, "keyphrases": keyphrases.split(";"), "address": address}


def read_posts(path):
    """Iterate over (line number, post) of a file of posts, JSONL or CMKP's text.

    A post is a dict of "id", "text", "keyphrases" and, in CMKP's text, "address". Raises UserError.
    """
    fields = "id", "text", "keyphrases"
    for number, row in read_rows(path):
        if isinstance(row, str):
            yield number, parse_cmkp(path, number, row)
        else:
            where = f"{path} line {number}"
            yield number, {field: required(where, row, field) for field in fields}


def read_references(path):
    """The posts of a file as a list of dicts (see `read_posts`). Raises UserError."""
    posts = without_duplicates(path, read_posts(path))
    if not posts:
        raise UserError(f"{path}: no posts in it")
    return posts


def train_keyphrases(path):
    """Iterate over the keyphrases of a training file, JSONL or CMKP's text. Raises UserError."""
    for _, post in read_posts(path):
        yield from post["keyphrases"]


def parse_prediction(path, number, row):
    """A row (a dict or `a;b;c`) as a dict: "id", "keyphrases" and, if given, "think" and "tokens".

    A row of text has the id None. Raises UserError.
    """
    where = f"{path} line {number}"
    if isinstance(row, str):
        if "<sep>" in row:
            raise UserError(f"{where}: <sep> belongs to references; predictions come first: a;b;c")
        return {"id": None, "keyphrases": row.split(";") if row.strip() else []}
    prediction = {name: row[name] for name in ("post", "think") if name in row}
    prediction |= {"id": required(where, row, "id"), "keyphrases": []}
    if row.get("error"):  # a post that could not be read counts as one without predictions
        prediction["failed"] = True
    else:
        prediction["keyphrases"] = required(where, row, "keyphrases")
    if row.get("think"):
        required(where, row, "think")
    if (tokens := row.get("tokens")) is not None:
        prediction["tokens"] = tokens
        # NaN fails this comparison; the bound refuses whole numbers too large for a float.
        if type(tokens) not in (int, float) or not 0 <= tokens < 1e12:
            raise UserError(f"{where}: the field 'tokens' must be a number, not {shown(tokens)}")
    return prediction


def read_predictions(path):
    """The predictions of a file as a list of dicts (see `parse_prediction`). Raises UserError."""
    rows = ((number, parse_prediction(path, number, row)) for number, row in read_rows(path))
    return without_duplicates(path, rows)


def without_duplicates(path, numbered):
    """The records of (line number, record) pairs. Raises UserError if two in JSONL share an id."""
    records, lines = [], {}
    for number, record in numbered:
        records.append(record)
        if record["id"] is not None and "address" not in record:
            first = lines.setdefault(record["id"], number)
            if first != number:
                where = f"lines {first} and {number}"
                raise UserError(f"{path}: {where} have the same id {shown(record['id'])}; keep one")
    return records


def align(predictions, references, allow_missing=False, names=("predictions", "references")):
    """The predictions in the order of the references.

    They are matched by id, or line by line if one of the files is text. CMKP's posts have ids,
    too, their images' names: these are used if the predictions have them. `allow_missing` adds an
    empty prediction where there is none; `names` are the files' names for error messages.
    Raises UserError naming the first predictions or posts without a partner.
    """
    made = {prediction["id"]: prediction for prediction in predictions}
    kind, wanted = "id", [post["id"] for post in references]
    images_are_ids = len(set(wanted)) == len(wanted) and not made.keys().isdisjoint(wanted)
    if None in made or ("address" in references[0] and not images_are_ids):
        made = dict(enumerate(predictions, start=1))
        kind, wanted = "line", range(1, len(references) + 1)
    posts = dict(zip(wanted, references, strict=True))
    unknown = [key for key in made if key not in posts]
    missing = [key for key in posts if key not in made and not allow_missing]
    others = [
        key
        for key, post in posts.items()
        if "post" in made.get(key, ()) and made[key]["post"] != digest(post["text"])
    ]
    ours, whole = names[0], f"{plural(len(posts), 'post')} of {names[1]}"
    for keys, told in (
        (unknown, f"{len(unknown)} of {plural(len(made), kind)} not among the {whole}"),
        (missing, f"no prediction for {len(missing)} of {whole}, see --allow-missing"),
        (others, f"made for other texts than those of {len(others)} of {whole}"),
    ):
        if keys:
            raise UserError(f"{ours}: {told}: {kind} {first_few([*map(shown, keys)])}")
    return [made.get(key, {"id": None, "keyphrases": []}) for key in posts]


# ----------------------------------------------------------------------------- words and stemming

# Scripts that are written without spaces: Han with its extensions, Hiragana and Katakana.
CJK = re.compile(
    "([々〇\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff])"
)


def characters(*categories):
    """All characters of these Unicode categories, as a string."""
    return "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c) in categories)


# What a word of raw text loses at its edges: there `#foxes,` is the word foxes.
QUOTES = "\"'`´＂＇" + characters("Pi", "Pf")
LEFT = "#＃¿¡" + QUOTES + characters("Ps")
RIGHT = ".,;:!?…。．｡，､、；：！？‼⁇⁈⁉،؛؟۔।॥։።፣፤፧၊။។" + QUOTES + characters("Pe")
SIGNS = string.punctuation + LEFT + RIGHT


def canonical(text):
    """`text` in the one form in which strings are compared: NFC, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def digest(text):
    """What a prediction keeps of its post's text, to be known by."""
    text = canonical(html.unescape(text)).encode("utf-8", "replace")
    return hashlib.blake2b(text, digest_size=6).hexdigest()


def normalize(phrase):
    """The words of raw text or of a phrase as they are compared: a tuple of lower-case stems.

    Words are separated by white space and lose the punctuation around them; a Chinese or Japanese
    character is a word of its own. HTML's entities are the characters that they stand for.
    """
    words = map(bare, canonical(html.unescape(phrase)).lower().split())
    return tuple(stem(bare(word)) for word in CJK.sub(r" \1 ", " ".join(words)).split())


@cache
def bare(word):
    """`word` without the punctuation around it; a word of nothing but signs stays itself."""
    core = word.lstrip(LEFT).rstrip(RIGHT)
    return core if core.strip(SIGNS) else word


def normalize_cmkp(phrase):
    """The same for CMKP's text files, where punctuation stands apart: no word loses any."""
    return tuple(map(stem, CJK.sub(r" \1 ", canonical(phrase)).lower().split()))


def words_of(posts):
    """The function for the words of these posts: `normalize`, or CMKP's own for its text."""
    return normalize_cmkp if "address" in posts[0] else normalize


# Porter's conditions see a word as consonants and vowels. A `y` after a consonant is a vowel, any
# other `y` a consonant; `marked` writes the latter as Y, so that the vowels are simply aeiouy.
CONSONANT_Y = re.compile(r"(^|[aeiouy])y")
VOWEL = re.compile("[aeiouy]")
VOWEL_CONSONANT = re.compile("[aeiouy][^aeiouy]")
SHORT_END = re.compile(r"(?:[^aeiouy][aeiouy][^aeiouywxY]|^[aeiouy][^aeiouy])\Z")


def pairs(text):
    """A dict from a text of `key:value` words; a value may be empty."""
    return dict(pair.split(":") for pair in text.split())


IRREGULAR = pairs(
    "sky:sky skies:sky dying:die lying:lie tying:tie news:news innings:inning inning:inning "
    "outings:outing outing:outing howe:howe cannings:canning canning:canning proceed:proceed "
    "exceed:exceed succeed:succeed"
)
STEP_2 = pairs(
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble entli:ent eli:e ousli:ous "
    "ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al "
    "iviti:ive biliti:ble fulli:ful"
)
STEP_3 = pairs("icate:ic ative: alize:al iciti:ic ical:ic ful: ness:")
STEP_4 = pairs(
    "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: ou: ism: ate: iti: ous: ive: ize:"
)


def marked(word):
    return CONSONANT_Y.sub(r"\1Y", word) if "y" in word else word


def measure(word):
    """Porter's m: how often a vowel is followed by a consonant."""
    return len(VOWEL_CONSONANT.findall(marked(word)))


@cache
def stem(word):
    """The stem of a lower-case word: Porter (Program 14(3), 1980) with NLTK's extensions."""
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    word = strip_ending(word)
    if word.endswith("y") and len(word) > 2 and not VOWEL.match(marked(word)[-2]):
        word = word[:-1] + "i"
    if word.endswith("alli") and measure(word[:-4]) > 0:
        word = word[:-2]
    if word.endswith("logi"):
        word = word[:-1] if measure(word[:-3]) > 0 else word
    else:
        word = replace_suffix(word, STEP_2, 0)
    word = replace_suffix(word, STEP_3, 0)
    if word.endswith(("sion", "tion")):
        word = word[:-3] if measure(word[:-3]) > 1 else word
    else:
        word = replace_suffix(word, STEP_4, 1)
    if word.endswith("e"):
        m = measure(word[:-1])
        if m > 1 or m == 1 and not SHORT_END.search(marked(word[:-1])):
            word = word[:-1]
    if word.endswith("ll") and measure(word[:-1]) > 1:
        word = word[:-1]
    return word


def strip_ending(word):
    """Steps 1a and 1b: caresses, ponies, cats; agreed, plastered, motoring, filing, hopping."""
    if word.endswith("s") and not word.endswith(("ss", "ies")):
        word = word[:-2] if word.endswith("sses") else word[:-1]
    if word.endswith(("ies", "ied")):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    suffix = "ed" if word.endswith("ed") else "ing" if word.endswith("ing") else None
    if suffix is None or not VOWEL.search(marked(word.removesuffix(suffix))):
        return word
    word = word.removesuffix(suffix)
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if word[-2:-1] == word[-1] and not VOWEL.match(marked(word)[-1]):
        return word if word[-1] in "lsz" else word[:-1]
    if word.endswith("*d"):  # NLTK also takes the name of its double-consonant rule for a suffix
        return word[:-2] + "d"
    return word + "e" if measure(word) == 1 and SHORT_END.search(marked(word)) else word


def replace_suffix(word, rules, least):
    """`word` with its suffix replaced by the first rule that matches, if the rest's m > `least`."""
    if word.endswith(tuple(rules)):  # one fast check for all rules: most words match none
        suffix = next(suffix for suffix in rules if word.endswith(suffix))
        rest = word.removesuffix(suffix)
        return rest + rules[suffix] if measure(rest) > least else word
    return word


# ------------------------------------------------------------------------------------- the scores

CUTS = (1, 3, 5)
MEASURES = [f"{name}@{k}" for name in ("P", "R", "F1") for k in (*CUTS, "M")]
MEASURES += [f"{name}@{k}" for name in ("MAP", "NDCG") for k in CUTS]
HEADLINES = ["F1@1", "F1@3", "F1@5", "F1@M", "MAP@5", "NDCG@5"]
INVALID_WORDS = frozenset([",", ".", "<unk>"])
CLASSES = {  # name of a class -> whether a phrase is in it that is present, or seen, or not
    "all": lambda present, seen: True,
    "present": lambda present, seen: present,
    "absent": lambda present, seen: not present,
    "seen": lambda present, seen: seen,
    "unseen": lambda present, seen: not seen,
    "absent_unseen": lambda present, seen: not present and not seen,
}


class Part(NamedTuple):
    """What the scores of one class of keyphrases are computed from."""

    posts: list  # indices of the N posts that have a reference of the class
    keyphrases: int  # number of references of the class
    values: object  # (N, 14) float: see `score_post`


def statistics(predictions, references, train=None, words=normalize):
    """What each post contributes to the scores: a dict from class name to Part.

    A keyphrase is present if its words stand side by side in the post's text, else absent; seen if
    it is in `train`, the training data's keyphrases, else unseen. References and predictions are
    filtered to a class before they are compared. `words` gives the words that are compared. Raises
    ValueError if the lengths differ.
    """
    import numpy as np

    known = {words(phrase) for phrase in train or ()} - {()}
    classes = {name: [] for name in CLASSES if train is not None or "seen" not in name}
    for post, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        # Words contain no spaces: with spaces around both, words side by side are a substring.
        text = f" {' '.join(words(reference['text']))} "
        wanted = dict.fromkeys(filter(None, map(words, reference["keyphrases"])))
        # An empty phrase is kept: a prediction that is wrong, absent and unseen.
        made = dict.fromkeys(map(words, prediction["keyphrases"]))
        made = [phrase for phrase in made if INVALID_WORDS.isdisjoint(phrase)]
        traits = {
            phrase: (phrase != () and f" {' '.join(phrase)} " in text, phrase in known)
            for phrase in (*wanted, *made)
        }
        for name, rows in classes.items():
            belongs = CLASSES[name]
            answers = sum(belongs(*traits[phrase]) for phrase in wanted)
            if answers:
                correct = (phrase in wanted for phrase in made if belongs(*traits[phrase]))
                rows.append((post, answers, score_post(tuple(correct), answers)))
    parts = {}
    for name, rows in classes.items():
        posts, answers, values = zip(*rows, strict=True) if rows else ((), (), ())
        parts[name] = Part([*posts], sum(answers), np.array(values).reshape(-1, 14))
    return parts


@cache
def score_post(correct, answers):
    """P and R at 1, 3, 5 and M, then AP and NDCG at 1, 3 and 5 of one post: a tuple of 14 floats.

    correct: whether each prediction is, in their order; answers: the number of references.
    """
    ranks = range(1, len(correct) + 1)
    # Sums over the first 0, 1, 2, … predictions. The ideal order has all correct ones first;
    # references that are not predicted don't count.
    hits = [0, *accumulate(correct)]
    precision = [0, *accumulate(correct[rank - 1] * hits[rank] / rank for rank in ranks)]
    gain = [0, *accumulate(correct[rank - 1] / math.log2(rank + 1) for rank in ranks)]
    ideal = [1, *accumulate(1 / math.log2(rank + 1) for rank in ranks)]
    cuts = [min(k, len(correct)) for k in CUTS]
    return (
        *(hits[k] / max(k, 1) for k in (*cuts, len(correct))),
        *(hits[k] / answers for k in (*cuts, len(correct))),
        *(precision[k] / answers for k in cuts),
        *(gain[k] / ideal[min(k, hits[-1])] for k in cuts),
    )


def figures(means):
    """MEASURES (…, 18) from means over posts (…, 14); F1 combines mean P and mean R."""
    import numpy as np

    cuts = len(CUTS) + 1  # and M
    precision, recall, ranking = np.split(means, [cuts, 2 * cuts], axis=-1)
    total = precision + recall
    f1 = 2 * precision * recall / np.where(total > 0, total, 1)
    return np.concatenate([precision, recall, f1, ranking], axis=-1)


def score(predictions, references, train=None, words=normalize):
    """Scores of aligned predictions and references: {"posts": n, "all": {"F1@1": …}, "present": …}.

    Predictions are dicts with "keyphrases" and optionally "think" and "tokens", references dicts
    with "text" and "keyphrases". `train`, the training data's keyphrases, adds the classes seen,
    unseen and absent_unseen. A class has "posts" and "keyphrases" (counts), MEASURES (fractions, 0
    without posts) and, if predictions have the fields, "tokens" (mean) and "reasoned" (share).
    """
    return describe(statistics(predictions, references, train, words), predictions)


def reasoned(prediction):
    """Whether a prediction has reasoning that is not blank."""
    return bool((prediction.get("think") or "").strip())


def describe(parts, predictions):
    """`score`'s dict from the classes' statistics."""
    result = {"posts": len(predictions)}
    for name, part in parts.items():
        means = part.values.sum(axis=0) / max(len(part.posts), 1)
        measures = dict(zip(MEASURES, figures(means).tolist(), strict=True))
        result[name] = {"posts": len(part.posts), "keyphrases": part.keyphrases, **measures}
        scored = [predictions[post] for post in part.posts]
        tokens = [made["tokens"] for made in scored if made.get("tokens") is not None]
        thought = [reasoned(made) for made in scored if "think" in made]
        for key, values in (("tokens", tokens), ("reasoned", thought)):
            if values:
                result[name][key] = sum(values) / len(values)
    return result


# ----------------------------------------------------------------------------------- significance

ROUNDS = 1000  # rounds of resampling for --against without --bootstrap
NUMBERS_AT_ONCE = 4_000_000  # random numbers in memory at a time


def chunks(rounds, posts):
    """Numbers of rounds that add up to `rounds`, each small enough for memory."""
    size = max(1, NUMBERS_AT_ONCE // posts)
    return [min(size, rounds - done) for done in range(0, rounds, size)]


def resample(parts, posts, rounds, seed):
    """The MEASURES of `rounds` bootstrap samples: a dict from class name to (rounds, 18).

    A sample draws as many of the `posts` posts as there are, with replacement, and computes means
    and F1 from these.
    """
    import numpy as np

    random = np.random.default_rng([seed, 0])
    samples = {name: [] for name in parts}
    for size in chunks(rounds, posts):
        drawn = random.integers(posts, size=(size, posts))
        drawn += np.arange(size)[:, None] * posts
        # (size, posts): how often each sample has each post.
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)
        for name, part in parts.items():
            weights = times[:, part.posts]
            means = weights @ part.values / np.maximum(weights.sum(axis=1, keepdims=True), 1)
            samples[name].append(figures(means))
    return {name: np.concatenate(rows) for name, rows in samples.items()}


def intervals(samples):
    """The middle 95% of samples (rounds, 18): a dict from measure to [low, high]."""
    import numpy as np

    ends = np.quantile(samples, [0.025, 0.975], axis=0)
    return dict(zip(MEASURES, ends.T.tolist(), strict=True))


def compare(parts, others, posts, rounds, seed):
    """p-values of two systems' differences: a dict from class name to (18,), one per measure.

    A paired randomisation test: each round swaps each post's two outcomes with probability 1/2; p
    is the share of rounds, the real one included, whose absolute difference reaches the real one.
    """
    import numpy as np

    random = np.random.default_rng([seed, 1])
    reached = {name: np.zeros(len(MEASURES)) for name in parts}
    for size in chunks(rounds, posts):
        swapped = random.integers(2, size=(size, posts), dtype=np.int8).astype(float)
        for name, part in parts.items():
            other, count = others[name], max(len(part.posts), 1)
            moved = swapped[:, part.posts] @ (other.values - part.values)
            ours, theirs = part.values.sum(axis=0), other.values.sum(axis=0)
            real = figures(ours / count) - figures(theirs / count)
            shuffled = figures((ours + moved) / count) - figures((theirs - moved) / count)
            # Summed in another order, equal differences may differ in their last digits.
            reached[name] += (abs(shuffled) >= abs(real) - 1e-12).sum(axis=0)
    return {name: (count + 1) / (rounds + 1) for name, count in reached.items()}


# -------------------------------------------------------------------------------------- the table


def table(scores, everything=False):
    """`score`'s dict, with what `main` adds to it, as text; fractions are shown in percent.

    A comparison with another system comes first, its headline alone unless `everything` is asked.
    """
    names = [name for name in scores if name not in ("posts", "against")]
    titles = [name.replace("_", "+") for name in names]
    entries = [scores[name] for name in names]
    blocks = []
    if "against" in scores:
        blocks.append([["", "measure", "ours", "other", "difference", "95% interval", "p"]])
        for title, entry, against in zip(titles, entries, scores["against"].values(), strict=True):
            for name in (HEADLINES if everything else ("F1@1", "F1@M")) if entry["posts"] else ():
                pair = against[name]
                cells = [title, name, percent(entry[name]), percent(pair["score"])]
                interval = " to ".join(map(percent, pair["interval"]))
                cells += [f"{100 * pair['difference']:+.2f}", interval, f"{pair['p']:.4f}"]
                blocks[-1].append(cells)
        if not everything:
            return lay_out(blocks[0])

    def row(key, show):
        """A line of each class's `key`; `-` where there is nothing to show."""
        cells = [show(entry[key]) if entry["posts"] and key in entry else "-" for entry in entries]
        return [key, *cells]

    rows = [["", *titles]]
    rows += [[key, *(str(entry[key]) for entry in entries)] for key in ("posts", "keyphrases")]
    rows += [row(measure, percent) for measure in MEASURES]
    for key, show in (("tokens", "{:.1f}".format), ("reasoned", percent)):
        if any(key in entry for entry in entries):
            rows.append(row(key, show))
    blocks.append(rows)
    if "interval" in scores["all"]:
        blocks.append([["95% CI", *titles]])
        for name in HEADLINES:
            ends = [entry["interval"][name] if entry["posts"] else () for entry in entries]
            cells = ["-".join(f"{100 * end:.1f}" for end in pair) or "-" for pair in ends]
            blocks[-1].append([name, *cells])
    return "\n\n".join(map(lay_out, blocks))


def percent(fraction):
    return f"{100 * fraction:.2f}"


def lay_out(rows):
    """Rows of cells as lines of columns, the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(cells) for cells in padded)


# ------------------------------------------------------------------------------- the command line


def non_negative_int(text):
    """argparse type: a whole number from 0 to 10^18 - 1; libraries take no larger seeds."""
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from 0 to 10^18 - 1")
    return int(text)


class ArgumentParser(argparse.ArgumentParser):
    """Prints a usage error as one line; names the option that an unknown one is near to."""

    def error(self, message):
        if unknown := re.search("unrecognized arguments: .*?(--[^ =]+)", message):
            # By its name, or by what its help says: --lr, "peak learning rate".
            names = {name: name for name in self._option_string_actions}
            for name, action in self._option_string_actions.items():
                names.setdefault(f"--{action.help}".replace(" ", "-"), name)
            if near := difflib.get_close_matches(unknown[1], names, 1):
                message += f" (the nearest option is {names[near[0]]})"
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parse_args(arguments=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("predictions", help="file of predictions, JSONL or text")
    add("references", help="file of posts, JSONL or text")
    add("--train", metavar="FILE", help="training posts: scores seen and unseen keyphrases")
    add("--against", metavar="FILE", help="another system's predictions: compares the two")
    add("--all", action="store_true", help="with --against: six measures, not F1@1 and F1@M alone")
    rounds = f"rounds of resampling for 95%% intervals (default: 0, or {ROUNDS} with --against)"
    add("--bootstrap", metavar="N", type=non_negative_int, default=0, help=rounds)
    add("--seed", type=non_negative_int, default=0, help="seed of the resampling (default: 0)")
    add("--json", action="store_true", help="print a JSON object of unrounded fractions, no table")
    add("--allow-missing", action="store_true", help="score posts without prediction as empty")
    args = parser.parse_args(arguments)
    if args.bootstrap > 1_000_000:
        parser.error("--bootstrap takes at most 1,000,000 rounds")
    return args


def main():
    args = parse_args()
    gc.disable()  # there are no cycles, and searching millions of phrases for some takes seconds
    references = read_references(args.references)
    systems = []
    for path in filter(None, (args.predictions, args.against)):
        names = path, args.references
        predictions = read_predictions(path)
        if failed := sum("failed" in prediction for prediction in predictions):
            print(f"{path}: {plural(failed, 'post')} failed, scored as wrong", file=sys.stderr)
        systems.append(align(predictions, references, args.allow_missing, names))
    train = list(train_keyphrases(args.train)) if args.train else None
    words = words_of(references)
    parts = [statistics(system, references, train, words) for system in systems]
    scores, *others = map(describe, parts, systems)

    posts, rounds = len(references), args.bootstrap or (ROUNDS if args.against else 0)
    if rounds:
        samples = [resample(part, posts, rounds, args.seed) for part in parts]
        for name in parts[0]:
            scores[name]["interval"] = intervals(samples[0][name])
    if args.against:
        p_values = compare(*parts, posts, rounds, args.seed)
        scores["against"] = {name: {} for name in parts[0]}
        for name, against in scores["against"].items():
            interval = intervals(samples[0][name] - samples[1][name])
            for key, p in zip(MEASURES, p_values[name].tolist(), strict=True):
                other = others[0][name][key]
                pair = {"score": other, "difference": scores[name][key] - other}
                against[key] = {**pair, "interval": interval[key], "p": p}
    print(json.dumps(scores, indent=2) if args.json else table(scores, args.all))


if __name__ == "__main__":
    run(main)
