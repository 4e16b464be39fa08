"""Scores of predicted keyphrases, by the arithmetic of CMKP's evaluator (Wang et al., EMNLP 2020).

    python evaluate.py preds.jsonl test.jsonl --train train.jsonl
    python evaluate.py best_pred.txt test_src.txt                   # CMKP's own text files
    python evaluate.py ours.jsonl test.jsonl --against theirs.jsonl

Predictions are JSON objects, one a line, with "id" and "keyphrases" (and perhaps "think" and "tokens"), or
CMKP's text, `a;b;c` a line. References are JSON objects with "id", "text" and "keyphrases", or CMKP's text,
`text<sep>a;b<sep>image address` a line. This file needs nothing but numpy and can be copied elsewhere.
"""

import argparse
import gc
import io
import json
import os
import re
import sys
import unicodedata
from functools import cache
from itertools import chain
from typing import NamedTuple

# --------------------------------------------------------------------------------------- running a script


class UserError(Exception):
    """A mistake of the user's, told in one line that names the file, the record and the mend."""


def run(main):
    """Call a script's `main()` and exit with its code (None is 0); a UserError is one line and code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a character that the screen lacks is no reason to fail
    message = None
    try:
        code = main() or 0
        print(end="", flush=True)
    except UserError as error:
        code, message = 1, error
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader (`| head`) has left
        code = 1
    except OSError as error:  # a full disk or the like, met where nobody could say more about it
        code, message = 1, f"{error.filename or 'the output'}: {error.strerror or error}"
    if message:
        print("error:", one_line(message), file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # Python would complain when it flushes what can't be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def one_line(text):
    """`text` as a screen can show it: one line, not without end, what is not printable (control codes) escaped."""
    text = " ".join(str(text).split())
    text = text if len(text) <= 1000 else f"{text[:500]} ... {text[-500:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ------------------------------------------------------------------------------------------ reading files

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LOOKS_LIKE_JSON = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*["}]')


def read_lines(path):
    """Iterate over (line number from 1, byte offset, bytes) of a file. Raises UserError."""
    offset = 0
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if offset == 0 and raw.startswith(b"\x1f\x8b"):
                    raise UserError(f"{path}: a gzip file; unpack it first (gunzip)")
                yield number, offset, raw
                offset += len(raw)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, where a file is needed") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None


def decode(path, number, raw):
    """The text of a line without byte order mark and line end. Raises UserError where it is not UTF-8."""
    try:
        return raw.removeprefix(BYTE_ORDER_MARK).decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} line {number}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None


def parse_line(path, number, raw):
    """The JSON object in one line (bytes) of a JSONL file. Raises UserError naming file and line."""
    text = decode(path, number, raw)
    try:
        record = json.loads(text)
    except RecursionError:
        raise UserError(f"{path} line {number}: JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {number}: not a line of JSON ({error.msg.removesuffix(' at')} at character "
            f"{error.pos + 1}); one whole JSON object a line is needed"
        ) from None
    except ValueError:
        raise UserError(
            f"{path} line {number}: a whole number of thousands of digits, which Python doesn't read"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{path} line {number}: a JSON object is needed here, not {shown(record)}")
    return record


def jsonl(path):
    """Iterate over (line number from 1, byte offset of the line, dict) of a JSONL file, skipping blank lines.

    Streams: one line is in memory at a time. Raises UserError naming the file and the line.
    """
    for number, offset, raw in read_lines(path):
        if raw.removeprefix(BYTE_ORDER_MARK).strip():
            yield number, offset, parse_line(path, number, raw)


def shown(value):
    """`value` as an error message shows it: escaped and no longer than half a line."""
    try:
        text = repr(value)
    except RecursionError:
        text = "something nested too deeply"
    return text if len(text) <= 60 else text[:57] + "..."


def first_few(items):
    """The first three of some strings, for an error message, and how many more there are."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def read_rows(path):
    """Iterate over (line number, row) of a file: rows are dicts if it is JSONL, strings if it is text.

    JSONL is what is named so, and what begins with a JSON object (blank lines aside).
    """
    lines, head = read_lines(path), []
    for line in lines:
        head.append(line)
        if line[2].strip():
            break
    is_json = str(path).endswith((".jsonl", ".json")) or bool(
        head and LOOKS_LIKE_JSON.match(head[-1][2])
    )
    for number, _, raw in chain(head, lines):
        if not is_json:
            yield number, decode(path, number, raw)
        elif raw.removeprefix(BYTE_ORDER_MARK).strip():
            yield number, parse_line(path, number, raw)


def checked(where, record, field):
    """A field that must be there: "keyphrases" a list of strings, others a string. Raises UserError."""
    value = record.get(field)
    if field == "keyphrases":
        if not isinstance(value, list) or not all(isinstance(phrase, str) for phrase in value):
            raise UserError(
                f"{where}: the field 'keyphrases' must be a list of strings, not {shown(value)}"
            )
    elif not isinstance(value, str):
        raise UserError(f"{where}: the field {field!r} must be a string, not {shown(value)}")
    return value


def parse_cmkp(path, number, line):
    """A post in CMKP's text format, `text<sep>a;b<sep>image address` (the address may be missing), as a dict.

    Its id is the image's file name without extension, None without address. Raises UserError.
    """
    fields = [field.strip() for field in line.split("<sep>")]
    if len(fields) not in (2, 3):
        raise UserError(
            f"{path} line {number}: text<sep>a;b<sep>address is needed here, with 1 or 2 <sep>, "
            f"not {len(fields) - 1}"
        )
    text, keyphrases, address = (*fields, "")[:3]
    identity = address.rsplit("/", 1)[-1].rsplit(".", 1)[0] or None
    return {"id": identity, "text": text, "keyphrases": keyphrases.split(";"), "address": address}


def read_posts(path):
    """Iterate over (line number, post) of a file of posts, JSONL or CMKP's text.

    A post is a dict with "id", "text" and "keyphrases"; CMKP's have "address" too. Raises UserError.
    """
    for number, row in read_rows(path):
        if isinstance(row, str):
            yield number, parse_cmkp(path, number, row)
        else:
            where = f"{path} line {number}"
            yield (
                number,
                {field: checked(where, row, field) for field in ("id", "text", "keyphrases")},
            )


def read_references(path):
    """The posts of a file as a list of dicts with "id", "text" and "keyphrases". Raises UserError."""
    numbered = list(read_posts(path))
    if not numbered:
        raise UserError(f"{path}: no posts in it")
    if "address" not in numbered[0][1]:
        refuse_duplicates(path, numbered)
    return [post for _, post in numbered]


def train_keyphrases(path):
    """Iterate over the keyphrases of a training file, JSONL or CMKP's text. Raises UserError."""
    for _, post in read_posts(path):
        yield from post["keyphrases"]


def parse_prediction(path, number, row):
    """What the scores need of a row of predictions, JSON or `a;b;c`, as a dict. Raises UserError."""
    where = f"{path} line {number}"
    if isinstance(row, str):
        if "<sep>" in row:
            raise UserError(
                f"{where}: a line of references; predictions come first, a;b;c a line or JSONL"
            )
        return {"id": None, "keyphrases": row.split(";") if row.strip() else []}
    prediction = {"id": checked(where, row, "id")}
    # A post that could not be read has no keyphrases, and is scored so.
    prediction["keyphrases"] = [] if row.get("error") else checked(where, row, "keyphrases")
    if "think" in row:
        prediction["think"] = row["think"] and checked(where, row, "think")
    if (tokens := row.get("tokens")) is not None:
        # The comparison is false for NaN, and its bound keeps out whole numbers too large for a float.
        if (
            isinstance(tokens, bool)
            or not isinstance(tokens, int | float)
            or not 0 <= tokens < 1e12
        ):
            raise UserError(
                f"{where}: the field 'tokens' must be a number of tokens, not {shown(tokens)}"
            )
        prediction["tokens"] = tokens
    return prediction


def read_predictions(path):
    """The predictions in a file as a list of dicts with "id" (None in text) and "keyphrases".

    Where the file has "think" and "tokens", they do, too. Raises UserError.
    """
    numbered = [(number, parse_prediction(path, number, row)) for number, row in read_rows(path)]
    if numbered and numbered[0][1]["id"] is not None:
        refuse_duplicates(path, numbered)
    return [prediction for _, prediction in numbered]


def refuse_duplicates(path, numbered):
    """Raise UserError if an id is on more than one line; `numbered` is a list of (line number, record)."""
    lines, doubled = {}, []
    for number, record in numbered:
        first = lines.setdefault(record["id"], number)
        if first != number:
            doubled.append(f"{shown(record['id'])} on lines {first} and {number}")
    if doubled:
        raise UserError(f"{path}: the same id twice: {first_few(doubled)}; keep one line of each")


def align(predictions, references, allow_missing=False, names=("predictions", "references")):
    """The predictions in the order of the references, matched by id, or by line where one side is text.

    CMKP's posts do have the names of their images: JSONL predictions that go by these are matched so, too.
    `allow_missing` puts an empty prediction where there is none. Raises UserError naming the first posts or
    predictions without a partner; `names` are the files' names for it.
    """
    ours, theirs = names
    by_id = {prediction["id"]: prediction for prediction in predictions}
    ids = {post["id"] for post in references}
    images_are_ids = len(ids) == len(references) and not ids.isdisjoint(by_id)
    if None not in by_id and ("address" not in references[0] or images_are_ids):
        unknown = [shown(identity) for identity in by_id if identity not in ids]
        missing = [shown(post["id"]) for post in references if post["id"] not in by_id]
        if unknown:
            raise UserError(
                f"{ours}: {len(unknown)} of {len(by_id)} ids are not in {theirs}: "
                f"{first_few(unknown)}; were these predictions made for another file?"
            )
        if missing and not allow_missing:
            raise UserError(
                f"{ours}: no prediction for {len(missing)} of {len(ids)} posts of {theirs}: "
                f"{first_few(missing)}; --allow-missing scores them as empty"
            )
        return [
            by_id.get(post["id"]) or {"id": post["id"], "keyphrases": []} for post in references
        ]
    missing = len(references) - len(predictions)
    counts = f"{ours}: {len(predictions)} lines for the {len(references)} posts of {theirs}"
    if missing < 0:
        raise UserError(f"{counts}; line {len(references) + 1} is the first without a post")
    if missing and not allow_missing:
        raise UserError(
            f"{counts}; post {len(predictions) + 1} is the first without a line; "
            "--allow-missing scores them as empty"
        )
    return predictions + [{"id": None, "keyphrases": []}] * missing


# ------------------------------------------------------------------------------------- words and stemming

# The letters of scripts that are written without spaces: Han with its extensions, Hiragana and Katakana.
CJK = re.compile(
    "([々〇\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff])"
)


def normalize(phrase):
    """The words of a phrase or text in the form in which they are compared: a tuple of lower-case stems.

    Words stand between white space; a Chinese or Japanese character is a word of its own. The same letters
    match whether accents are part of them or combining characters.
    """
    if not phrase.isascii():
        phrase = CJK.sub(r" \1 ", unicodedata.normalize("NFC", phrase))
    return tuple(map(stem, phrase.lower().split()))


# Porter's conditions see a word as consonants and vowels. A `y` is a vowel after a consonant and a consonant
# elsewhere; `marked` writes the consonant as Y, so that the vowels are simply aeiouy.
CONSONANT_Y = re.compile(r"(^|[aeiouy])y")
VOWEL = re.compile("[aeiouy]")
VOWEL_CONSONANT = re.compile("[aeiouy][^aeiouy]")
SHORT_END = re.compile(r"(?:[^aeiouy][aeiouy][^aeiouywxY]|^[aeiouy][^aeiouy])\Z")

IRREGULAR = {
    "sky": "sky",
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "news": "news",
    "innings": "inning",
    "inning": "inning",
    "outings": "outing",
    "outing": "outing",
    "howe": "howe",
    "cannings": "canning",
    "canning": "canning",
    "proceed": "proceed",
    "exceed": "exceed",
    "succeed": "succeed",
}
STEP_2 = {
    "ational": "ate",
    "tional": "tion",
    "enci": "ence",
    "anci": "ance",
    "izer": "ize",
    "bli": "ble",
    "entli": "ent",
    "eli": "e",
    "ousli": "ous",
    "ization": "ize",
    "ation": "ate",
    "ator": "ate",
    "alism": "al",
    "iveness": "ive",
    "fulness": "ful",
    "ousness": "ous",
    "aliti": "al",
    "iviti": "ive",
    "biliti": "ble",
    "fulli": "ful",
}
STEP_3 = {
    "icate": "ic",
    "ative": "",
    "alize": "al",
    "iciti": "ic",
    "ical": "ic",
    "ful": "",
    "ness": "",
}
STEP_4 = dict.fromkeys(
    [
        "al",
        "ance",
        "ence",
        "er",
        "ic",
        "able",
        "ible",
        "ant",
        "ement",
        "ment",
        "ent",
        "ou",
        "ism",
        "ate",
        "iti",
        "ous",
        "ive",
        "ize",
    ],
    "",
)


def marked(word):
    return CONSONANT_Y.sub(r"\1Y", word) if "y" in word else word


def measure(word):
    """Porter's m: how often a vowel is followed by a consonant."""
    return len(VOWEL_CONSONANT.findall(marked(word)))


@cache
def stem(word):
    """The stem of a lower-case word: Porter's algorithm (Program 14(3), 1980) with NLTK's extensions."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = strip_plural(word)
    word = strip_past(word)
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


def strip_plural(word):
    """Step 1a: caresses, ponies, cats."""
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def strip_past(word):
    """Step 1b: agreed, plastered, motoring; the rest may get its e back (filing), lose a p (hopping)."""
    if word.endswith("ied"):
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
    if word.endswith("*d"):  # NLTK takes the name of its double-letter rule for a suffix, too
        return word[:-2] + "d"
    return word + "e" if measure(word) == 1 and SHORT_END.search(marked(word)) else word


def replace_suffix(word, rules, least):
    """Replace the word's suffix by the first rule that knows it, if what is left measures over `least`."""
    if word.endswith(tuple(rules)):  # one quick look for all of them: most words end otherwise
        suffix = next(suffix for suffix in rules if word.endswith(suffix))
        left = word.removesuffix(suffix)
        return left + rules[suffix] if measure(left) > least else word
    return word


# ------------------------------------------------------------------------------------------- the scores

CUTS = (1, 3, 5)
CUTS_AND_M = (*CUTS, "M")
MEASURES = [
    *(f"{name}@{k}" for name in ("P", "R", "F1") for k in CUTS_AND_M),
    *(f"{name}@{k}" for name in ("MAP", "NDCG") for k in CUTS),
]
HEADLINES = ["F1@1", "F1@3", "F1@5", "F1@M", "MAP@5", "NDCG@5"]
INVALID_WORDS = frozenset([",", ".", "<unk>"])


class Part(NamedTuple):
    """What one class of keyphrases is scored on."""

    posts: object  # array: indices of the posts that have a reference of the class
    keyphrases: int  # the class's references
    values: (
        object  # array, a row a post: P and R at 1, 3, 5, M, average precision and NDCG at 1, 3, 5
    )


def statistics(predictions, references, train=None):
    """What every post contributes to the scores: a dict from the name of a class to its Part.

    A keyphrase is present if its words stand consecutively in the post's text, else absent; seen if it is one
    of `train`, the keyphrases of the training data, else unseen. References and predictions are filtered to a
    class before they are compared.
    """
    import numpy as np

    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    known = {normalize(phrase) for phrase in train or ()}
    guesses, answers = [], []  # a row a phrase: its post; whether it is correct, present, seen
    for post, (prediction, reference) in enumerate(zip(predictions, references)):
        # Words hold no spaces, so that words standing consecutively are a substring from space to space.
        text = f" {' '.join(normalize(reference['text']))} "
        wanted = dict.fromkeys(map(normalize, reference["keyphrases"]))
        wanted.pop((), None)
        for phrase in wanted:
            answers.append((post, True, f" {' '.join(phrase)} " in text, phrase in known))
        for phrase in dict.fromkeys(map(normalize, prediction["keyphrases"])):
            # An empty phrase stays, as a guess that is wrong, absent and unseen.
            if INVALID_WORDS.isdisjoint(phrase):
                present = bool(phrase) and f" {' '.join(phrase)} " in text
                guesses.append((post, phrase in wanted, present, bool(phrase) and phrase in known))

    def columns(rows):
        post, *flags = np.array(rows, dtype=np.int32).reshape(-1, 4).T
        return post, *(flag.astype(bool) for flag in flags)

    guess_post, correct, guess_present, guess_seen = columns(guesses)
    answer_post, _, present, seen = columns(answers)
    classes = {
        "all": (guess_post >= 0, answer_post >= 0),
        "present": (guess_present, present),
        "absent": (~guess_present, ~present),
    }
    if train is not None:
        classes |= {
            "seen": (guess_seen, seen),
            "unseen": (~guess_seen, ~seen),
            "absent_unseen": (~guess_present & ~guess_seen, ~present & ~seen),
        }
    return {
        name: class_statistics(
            guess_post[ours], correct[ours], answer_post[theirs], len(references)
        )
        for name, (ours, theirs) in classes.items()
    }


def class_statistics(guess_post, correct, answer_post, total):
    """The Part of one class, from each guess's post, whether it is correct, and each reference's post."""
    import numpy as np

    answers = np.bincount(answer_post, minlength=total)
    made = np.bincount(guess_post, minlength=total)
    posts = np.flatnonzero(answers)
    # Guesses stand in the order of their posts: ranks and hits so far count from where the post starts.
    start = (np.cumsum(made) - made)[guess_post]
    hits = np.cumsum(np.append(0, correct))
    rank = np.arange(1, len(guess_post) + 1) - start
    precision_here = (hits[1:] - hits[start]) / rank
    answers, made, most = answers[posts], made[posts], made.max(initial=1)

    def per_post(gains, k):
        """The gains of the correct guesses among the first k, added up for each post that is scored."""
        chosen = correct & (rank <= k)
        return np.bincount(guess_post[chosen], gains[chosen], minlength=total)[posts]

    right = [per_post(np.ones(len(rank)), k) for k in (*CUTS, most)]
    precision = [hit / np.clip(made, 1, k) for hit, k in zip(right, (*CUTS, most))]
    recall = [hit / answers for hit in right]
    average_precision = [per_post(precision_here, k) / answers for k in CUTS]
    # The ideal order has all correct guesses first; one that was never made is not missed here.
    gain = np.cumsum(np.append(0, 1 / np.log2(np.arange(2, most + 2))))
    ideal = [gain[np.minimum(right[-1], k).astype(int)] for k in CUTS]
    ndcg = [
        per_post(1 / np.log2(rank + 1), k) / np.where(best > 0, best, 1)
        for k, best in zip(CUTS, ideal)
    ]
    return Part(
        posts, int(answers.sum()), np.column_stack(precision + recall + average_precision + ndcg)
    )


def figures(means):
    """MEASURES from means over posts (any leading axes): F1 is the harmonic mean of mean P and mean R."""
    import numpy as np

    cuts = len(CUTS_AND_M)
    precision, recall, ranking = (
        means[..., :cuts],
        means[..., cuts : 2 * cuts],
        means[..., 2 * cuts :],
    )
    total = precision + recall
    f1 = 2 * precision * recall / np.where(total > 0, total, 1)
    return np.concatenate([precision, recall, f1, ranking], axis=-1)


def score(predictions, references, train=None):
    """Scores of aligned predictions and references: {"posts": n, "all": {"F1@1": …}, "present": …}.

    Predictions are dicts with "keyphrases" and perhaps "think" and "tokens", references dicts with "text" and
    "keyphrases". `train` (an iterable of the training data's keyphrases) adds the classes seen, unseen and
    absent_unseen. A class has the counts "posts" and "keyphrases", MEASURES as fractions (0 without posts), and
    "tokens" (mean per post) and "reasoned" (share of posts) over the predictions that tell.
    """
    return describe(statistics(predictions, references, train), predictions)


def describe(parts, predictions):
    """`score`'s dict, from the classes' statistics."""
    result = {"posts": len(predictions)}
    for name, part in parts.items():
        means = part.values.sum(axis=0) / max(len(part.posts), 1)
        result[name] = {
            "posts": len(part.posts),
            "keyphrases": part.keyphrases,
            **dict(zip(MEASURES, figures(means).tolist())),
        }
        of_class = [predictions[post] for post in part.posts]
        tokens = [
            prediction["tokens"] for prediction in of_class if prediction.get("tokens") is not None
        ]
        thoughts = [prediction["think"] or "" for prediction in of_class if "think" in prediction]
        if tokens:
            result[name]["tokens"] = sum(tokens) / len(tokens)
        if thoughts:
            result[name]["reasoned"] = sum(bool(thought.strip()) for thought in thoughts) / len(
                thoughts
            )
    return result


# ----------------------------------------------------------------------------------------- significance

ROUNDS = 1000  # of resampling, where two systems are compared and the number isn't given
NUMBERS_AT_ONCE = 4_000_000  # random numbers held in memory at a time


def chunks(rounds, posts):
    """Numbers of rounds that add up to `rounds`, each small enough for memory."""
    size = max(1, NUMBERS_AT_ONCE // posts)
    return [min(size, rounds - done) for done in range(0, rounds, size)]


def resample(parts, posts, rounds, seed):
    """MEASURES of `rounds` bootstrap samples: a dict from class to an array of a row a sample.

    A sample draws as many of the `posts` posts as there are, with replacement; means and F1 are taken anew.
    """
    import numpy as np

    random = np.random.default_rng([seed, 0])
    samples = {name: [] for name in parts}
    for size in chunks(rounds, posts):
        drawn = random.integers(posts, size=(size, posts))
        drawn += np.arange(size)[:, None] * posts
        times = (
            np.bincount(drawn.ravel(), minlength=size * posts).reshape(size, posts).astype(float)
        )
        for name, part in parts.items():
            weights = times[:, part.posts]
            means = weights @ part.values / np.maximum(weights.sum(axis=1, keepdims=True), 1)
            samples[name].append(figures(means))
    return {name: np.concatenate(rows) for name, rows in samples.items()}


def intervals(samples):
    """The middle 95% of the rows of `samples`: a dict from measure to [low, high]."""
    import numpy as np

    return dict(zip(MEASURES, np.quantile(samples, [0.025, 0.975], axis=0).T.tolist()))


def compare(parts, others, posts, rounds, seed):
    """p-values of two systems' differences: a dict from class to an array in the order of MEASURES.

    The paired randomisation test: each post's two outcomes are swapped or not at random; p is the share of
    rounds whose difference, of either sign, is at least the real one (which counts as a round itself).
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
            # Sums in another order differ in the last digits; equal differences must count as reached.
            reached[name] += (abs(shuffled) >= abs(real) - 1e-12).sum(axis=0)
    return {name: (count + 1) / (rounds + 1) for name, count in reached.items()}


# -------------------------------------------------------------------------------------------- the table


def table(scores):
    """`score`'s dict, and what `main` adds to it, as text for people: measures in percent."""
    names = [name for name in scores if name not in ("posts", "against")]
    titles = [name.replace("_", "+") for name in names]
    entries = [scores[name] for name in names]

    def row(key, show):
        """A line over all classes, `-` where a class has no posts or the predictions don't tell."""
        return [
            key,
            *(show(entry[key]) if entry["posts"] and key in entry else "-" for entry in entries),
        ]

    counts = [[key, *(str(entry[key]) for entry in entries)] for key in ("posts", "keyphrases")]
    blocks = [[["", *titles], *counts, *(row(measure, percent) for measure in MEASURES)]]
    if any("tokens" in entry for entry in entries):
        blocks[0].append(row("tokens", "{:.1f}".format))
    if any("reasoned" in entry for entry in entries):
        blocks[0].append(row("reasoned", percent))
    if "interval" in scores["all"]:
        blocks.append([["95% interval", *titles]])
        for measure in HEADLINES:
            cells = [
                span(entry["interval"][measure]) if entry["posts"] else "-" for entry in entries
            ]
            blocks[-1].append([measure, *cells])
    if "against" in scores:
        blocks.append([["", "measure", "this", "other", "difference", "95% interval", "p"]])
        for name, title in zip(names, titles):
            for measure in HEADLINES if scores[name]["posts"] else ():
                pair = scores["against"][name][measure]
                figures_of_both = [percent(scores[name][measure]), percent(pair["score"])]
                blocks[-1].append(
                    [
                        title,
                        measure,
                        *figures_of_both,
                        f"{100 * pair['difference']:+.2f}",
                        span(pair["interval"]),
                        f"{pair['p']:.4f}",
                    ]
                )
    return "\n\n".join(map(lay_out, blocks))


def percent(fraction):
    return f"{100 * fraction:.2f}"


def span(ends):
    return f"{percent(ends[0])} to {percent(ends[1])}"


def lay_out(rows):
    """Rows of cells as lines of aligned columns, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(cells) for cells in padded)


# ------------------------------------------------------------------------------------- the command line


def natural(text):
    """A whole number from 0 up, as argparse wants it told."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def read_arguments():
    parser = argparse.ArgumentParser(
        description="Scores of predicted keyphrases.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("predictions", help="predictions: JSONL with id and keyphrases, or text, a;b;c a line")
    add(
        "references",
        help="posts: JSONL with id, text, keyphrases, or text, text<sep>a;b<sep>address a line",
    )
    add("--train", metavar="FILE", help="training posts, to score seen and unseen keyphrases apart")
    add(
        "--against",
        metavar="FILE",
        help="another system's predictions: differences, intervals and p-values",
    )
    add(
        "--bootstrap",
        metavar="N",
        type=natural,
        default=0,
        help=f"rounds of resampling for 95%% intervals, 0 for none; with --against 0 stands for {ROUNDS}",
    )
    add("--seed", type=natural, default=0, help="seed of the resampling")
    add(
        "--json",
        action="store_true",
        help="print one JSON object of unrounded fractions instead of a table",
    )
    add(
        "--allow-missing",
        action="store_true",
        help="score posts without a prediction as empty predictions",
    )
    return parser.parse_args()


def main():
    args = read_arguments()
    gc.disable()  # no cycles here, and looking for some among millions of phrases takes seconds
    references = read_references(args.references)

    def read_aligned(path):
        return align(
            read_predictions(path), references, args.allow_missing, (path, args.references)
        )

    predictions, posts = read_aligned(args.predictions), len(references)
    others = read_aligned(args.against) if args.against else None
    train = list(train_keyphrases(args.train)) if args.train else None
    parts = statistics(predictions, references, train)
    scores = describe(parts, predictions)

    rounds = args.bootstrap or (ROUNDS if others else 0)
    if rounds:
        samples = resample(parts, posts, rounds, args.seed)
        for name in parts:
            scores[name]["interval"] = intervals(samples[name])
    if others:
        other_parts = statistics(others, references, train)
        other_scores = describe(other_parts, others)
        other_samples = resample(other_parts, posts, rounds, args.seed)
        p_values = compare(parts, other_parts, posts, rounds, args.seed)
        scores["against"] = {}
        for name in parts:
            interval = intervals(samples[name] - other_samples[name])
            scores["against"][name] = {
                measure: {
                    "score": other_scores[name][measure],
                    "difference": scores[name][measure] - other_scores[name][measure],
                    "interval": interval[measure],
                    "p": p,
                }
                for measure, p in zip(MEASURES, p_values[name].tolist())
            }
    print(json.dumps(scores, indent=2) if args.json else table(scores))


if __name__ == "__main__":
    run(main)
