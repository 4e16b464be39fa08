"""Seeded fuzz: records, images, model outputs and predictions broken at random.

Each round must end in a result or in an error of one line that names the file, and in time; each
score must equal one that is computed here, slowly and plainly.
By hand: python tests/test_fuzz.py --rounds 10000 --seed 1
"""

import argparse
import contextlib
import gzip
import io
import json
import math
import random
import signal
import sys
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
from evaluate import UserError, non_negative_int  # noqa: E402
from support import images  # noqa: E402
from support.console import HelpFormatter, positive_int  # noqa: E402
from support.jsonl import to_line  # noqa: E402
from tools.dataset import figures_of  # noqa: E402
from tools.posts import check, check_line, read_entries  # noqa: E402

STEMS = dict(
    line.split()
    for line in (Path(__file__).parent / "porter_nltk.txt").read_text(encoding="utf-8").splitlines()
)
WORDS = [
    *random.Random(0).sample([word for word in STEMS if word.isalpha()], 25),
    "Dogs",
    "dog",
    "running",
    "runs",
]
ODD = [
    "<|im_end|>",
    "<|image_pad|>",
    "<think>",
    "</answer>",
    "日本",
    "寿司",
    "がス",
    "😀",
    "👩‍👩‍👧",
    "خبر",
    "한국",
    "\0",
    "\u2028",
    "\x85",
    "\r",
    "\n",
    "\x1b[31m",
    "\ud800",
    "\udfff",
    "\u200b",
    "e\u0301",
    "ﬁ",
    "İ",
    ",",
    ".",
    "<unk>",
    ";",
    "<sep>",
    "",
    " ",
    "#",
    "\\",
    '"',
    "{",
    "[",
    "a" * 300,
    "\ufeff",
    "\U0002a700",
]
VALUES = [
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "x",
    [],
    {},
    [None],
    ["x"],
    [["x"]],
    {"x": "y"},
]
NEST = "@nested@"  # stands for lists in lists, which json would not write as deep as they are read


class Hang(Exception):
    """A round took too long."""


@contextlib.contextmanager
def limit(seconds):
    def too_long(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------- broken at random


def phrase(draw, most=4):
    return " ".join(
        draw.choice(ODD if draw.random() < 0.15 else WORDS) for _ in range(draw.randint(0, most))
    )


def post(draw, number, images=(None,)):
    record = {
        "id": f"{draw.choice(['p', 'é', '日', chr(0x2028)])}{number}",
        "text": phrase(draw, 12),
        "image": draw.choice(images),
        "keyphrases": [phrase(draw) or "x" for _ in range(draw.randint(1, 4))],
    }
    return record | ({"cot": phrase(draw, 10)} if draw.random() < 0.5 else {})


def break_record(draw, record):
    """A field dropped, doubled or of another type, a value nested or made odd."""
    field = draw.choice([*record, "other"])
    record[field] = draw.choice(VALUES)
    kind = draw.randrange(5)
    if kind == 0:
        del record[field]
    elif kind == 1:
        record[field] = draw.choice(ODD) + draw.choice(ODD)
    elif kind == 2:
        record[field] = [draw.choice(ODD) for _ in range(3)]
    elif kind == 3:
        record[field] = NEST


def break_bytes(draw, content):
    """Bytes flipped, cut, doubled or put in, or the whole in another encoding."""
    content, kind = bytearray(content), draw.randrange(9)
    at = draw.randrange(len(content)) if content else 0
    if kind < 3:
        for _ in range(draw.randint(1, 6)):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
    elif kind == 3:
        del content[at:]
    elif kind == 4:
        del content[at : at + draw.randint(1, 40)]
    elif kind == 5:
        content[at:at] = draw.choice(
            [
                b"\0",
                b"\r",
                b"\n",
                b"\xff\xfe",
                b'"',
                b"{",
                b"\xed\xa0\x80",
                b"9" * 5000,
                b"[" * 99999,
            ]
        )
    elif kind == 6:
        content[at:at] = content[draw.randrange(len(content) or 1) :][:200]
    elif kind == 7:
        return content.replace(
            b"\n", draw.choice([b"\r\n", b"\r", b"\n\n", b"\0\n", b"\n\xef\xbb\xbf"])
        )
    else:
        text = content.decode("utf-8", "replace")
        return draw.choice(
            [
                lambda: text.encode("utf-16"),
                lambda: text.encode("latin-1", "replace"),
                lambda: b"\xef\xbb\xbf" + content,
                lambda: gzip.compress(content),
                lambda: text.encode("utf-16-le"),
            ]
        )()
    return bytes(content)


def write_rows(draw, path, rows, breaks):
    """Rows as JSONL; with `breaks`, some broken as records and some as bytes."""
    if breaks and draw.random() < 0.7:
        break_record(draw, draw.choice(rows))
    deep = draw.choice([3, 200, 800, 5000, 100_000])
    content = "".join(
        json.dumps(row, ensure_ascii=draw.random() < 0.5) + "\n" for row in rows
    ).encode("utf-8", "backslashreplace")
    content = content.replace(json.dumps(NEST).encode(), b"[" * deep + b"]" * deep)
    if breaks and draw.random() < 0.5:
        content = break_bytes(draw, content)
    path.write_bytes(content)


# -------------------------------------------------------------------------------------- the targets


class Fuzz:
    def __init__(self, folder):
        from transformers import AutoImageProcessor

        from tiny import qwen_tokenizer
        from tools.clubworld import make_tokenizer

        self.folder, self.found, self.errors = Path(folder), Counter(), Counter()
        config = {"image_processor_type": "Qwen2VLImageProcessor"}
        config |= {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16}
        (self.folder / "preprocessor_config.json").write_text(json.dumps(config))
        processor = AutoImageProcessor.from_pretrained(self.folder)
        self.encoders = []
        for tokenizer, prompt, length in (
            (qwen_tokenizer(), data.PROMPT, 300),
            (make_tokenizer(), "{text}", 60),
        ):
            pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
            options = data.EncoderOptions(prompt, max_length=length)
            self.encoders.append(data.Encoder(tokenizer, processor, pad, options))
        self.pictures = self.make_pictures()

    def make_pictures(self):
        """Small pictures of every format, as bytes."""
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8))
        exif, found = Image.Exif(), []
        exif[0x0112] = 6
        for kind, mode, options in (
            ("JPEG", "RGB", {"exif": exif}),
            ("JPEG", "CMYK", {}),
            ("JPEG", "RGB", {"progressive": True}),
            ("PNG", "RGB", {}),
            ("PNG", "P", {"transparency": 3}),
            ("PNG", "LA", {}),
            ("PNG", "RGBA", {}),
            ("PNG", "1", {}),
            ("PNG", "I;16", {}),
            ("GIF", "P", {}),
            ("GIF", "P", {"save_all": True, "append_images": [picture.convert("P")] * 2}),
            ("WEBP", "RGB", {}),
            ("WEBP", "RGBA", {"save_all": True, "append_images": [picture] * 2}),
            ("BMP", "RGB", {}),
            ("TIFF", "RGB", {}),
            ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
            ("TIFF", "F", {}),
            ("PPM", "RGB", {}),
            ("ICO", "RGB", {}),
            ("EPS", "RGB", {}),
        ):
            out = io.BytesIO()
            (picture.convert("L") if mode == "I;16" else picture).convert(mode).save(
                out, kind, **options
            )
            found.append(out.getvalue())
        return found

    def one_line(self, error, *names):
        """A UserError must be one line that names a file."""
        text = str(error)
        assert any(name in text for name in names), text
        assert len(evaluate.one_line(text)) <= 1100 and evaluate.one_line(text).isprintable()
        self.errors[text.partition(": ")[2][:25]] += 1

    def records(self, draw):
        """A file of posts through every reader, and what could be read through the encoders."""
        path, images = self.folder / "posts.jsonl", [None]
        for number in range(2):
            content = draw.choice(self.pictures)
            (self.folder / f"{number}.png").write_bytes(
                break_bytes(draw, content) if draw.random() < 0.3 else content
            )
            images.append(f"{number}.png")
        rows = [
            post(draw, number, [*images, "gone\0.png", "\udcff", "."])
            for number in range(draw.randint(1, 4))
        ]
        write_rows(draw, path, rows, breaks=draw.random() < 0.8)
        training, posts = draw.random() < 0.5, None
        for read in (
            lambda: evaluate.read_references(path),
            lambda: figures_of(read_entries(path), {"x"}),
            lambda: data.Posts(path, training),
        ):
            try:
                posts = read()
            except UserError as error:
                posts = None
                self.one_line(error, "posts.jsonl")
        for line, _, raw in evaluate.read_lines(path) if posts else ():
            _, problems, _ = check_line(str(path), evaluate.parse_line, None, line, raw)
            for problem in problems:
                self.one_line(UserError(f"posts.jsonl: {problem.what}; {problem.hint}"), "")
        if draw.random() < 0.03:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(UserError):
                code = check(argparse.Namespace(file=str(path), json=False, map=None))
                assert code == 1 or posts is not None
        if posts is None:
            return
        self.found["files of posts read"] += 1
        plain = [
            json.loads(raw)
            for raw in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
            if raw.removeprefix(b"\xef\xbb\xbf").strip() and not raw.startswith(b"\xef\xbb\xbf")
        ]
        records = [posts[index] for index in range(len(posts))]
        if len(plain) == len(records):  # a byte order mark within the file is an error to json
            assert repr(records) == repr(plain)
        assert repr([json.loads(to_line(record)) for record in records]) == repr(records)
        for encoder in self.encoders:
            items = [
                data.EncodedPosts(posts, encoder, training)[index] for index in range(len(posts))
            ]
            samples = [item for item in items if isinstance(item, data.Sample)]
            skipped = sum(isinstance(item, data.Skipped) for item in items)
            assert len(samples) + skipped == len(items)
            for sample in samples:
                self.check_sample(encoder, sample, training)
            if samples:
                batch = data.collate(samples, encoder)
                pads = sum(int(s.grid.prod()) // 4 for s in samples if s.grid is not None)
                assert int(batch.prompt["mm_token_type_ids"].sum()) == pads
                tokens = sum(len(sample.prompt) for sample in samples)
                assert int(batch.prompt["attention_mask"].sum()) == tokens

    def check_sample(self, encoder, sample, training):
        special = set(encoder.tokenizer.all_special_ids) - {encoder.tokenizer.unk_token_id}
        head, _, _, tail = encoder.frames[sample.grid is not None]
        special_but_images = special - {encoder.image_token_id}
        framed = [token for token in head + tail if token in special_but_images]
        assert [token for token in sample.prompt if token in special_but_images] == framed
        assert len(sample.prompt) <= encoder.max_length
        self.found["prompts shortened"] += sample.truncated
        for answer in (sample.plain, sample.cot) if training else ():
            assert (
                answer is None
                or answer[-1] == encoder.end_of_turn
                and not special & set(answer[:-1])
            )

    def images(self, draw):
        path, content = self.folder / "picture", draw.choice(self.pictures)
        for _ in range(draw.randint(1, 3)):
            content = break_bytes(draw, content)
        if draw.random() < 0.3:  # what a decoder reads first
            content = bytearray(content)
            for at in range(min(4, len(content))):
                content[draw.randrange(at, min(40, len(content)))] = draw.choice(
                    [0, 1, 127, 128, 255]
                )
        path.write_bytes(content)
        try:
            picture = images.load_image(path, draw.choice([100, 10**6]))
        except images.Unreadable as error:
            self.errors[str(error)[:25]] += 1
            return
        assert (
            picture.mode == "RGB"
            and min(picture.size) > 0
            and max(picture.size) <= images.LONGEST_SIDE * min(picture.size)
        )
        self.found["broken images read"] += 1

    def outputs(self, draw):
        pieces = [*data.TAGS, *ODD, *WORDS, "; ", ", ", "\n- ", "\n1. ", "#"]
        output = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 30)))
        keyphrases, think = data.parse_answer(output)
        assert (
            think is None or isinstance(think, str) and not any(tag in think for tag in data.TAGS)
        )
        assert len({phrase.casefold() for phrase in keyphrases}) == len(keyphrases)
        for found in keyphrases:
            assert found and found == found.strip() and not data.NOT_IN_KEYPHRASE.search(found)
            assert found == " ".join(found.split())

    def scores(self, draw):
        """A file of predictions, broken or not: refused in one line, or scored as below."""
        paths = preds, refs, train = [
            self.folder / name for name in ("preds.jsonl", "refs.jsonl", "train.jsonl")
        ]
        posts = [post(draw, number) for number in range(draw.randint(1, 6))]
        predictions = []
        for record in posts:
            guesses = [
                draw.choice(
                    [
                        draw.choice(record["keyphrases"]),
                        phrase(draw, 2),
                        *record["text"].split()[:1],
                    ]
                )
                for _ in range(draw.randint(0, 7))
            ]
            predictions.append(
                {
                    "id": record["id"],
                    "keyphrases": guesses,
                    "think": draw.choice([None, "", "why"]),
                    "tokens": 3,
                }
            )
            if draw.random() < 0.1:
                predictions[-1]["error"] = "no such file"
        draw.shuffle(predictions)
        broken = draw.randrange(4)  # the predictions, the posts, the training file or nothing
        for number, (path, rows) in enumerate(
            zip(paths, (predictions, posts, [post(draw, n) for n in range(3)]), strict=True)
        ):
            write_rows(draw, path, rows, broken == number)
        try:
            references = evaluate.read_references(refs)
            aligned = evaluate.align(
                evaluate.read_predictions(preds), references, names=(preds, refs)
            )
            known = list(evaluate.train_keyphrases(train))
        except UserError as error:
            self.one_line(error, *(path.name for path in paths))
            return
        scores = evaluate.score(aligned, references, known)
        read = [
            [
                json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
                for raw in path.read_bytes().split(b"\n")
                if raw.removeprefix(b"\xef\xbb\xbf").strip()
            ]
            for path in paths
        ]
        expected = recompute(*read)
        for name, wanted in expected.items():
            found = {key: scores[name][key] for key in wanted}
            assert all(abs(found[key] - wanted[key]) < 1e-9 for key in wanted), (
                name,
                found,
                wanted,
            )
        self.found["scores equal to the slow ones"] += 1
        self.found["of these above zero"] += expected["all"]["F1@M"] > 0


# ---------------------------------------------------------- the scores, slowly, as they are defined


def is_cjk(character):
    name = unicodedata.name(character, "")
    return character in "々〇" or any(
        kind in name for kind in ("CJK UNIFIED", "CJK COMPATIBILITY IDEO", "HIRAGANA", "KATAKANA")
    )


def words_of(text):
    text = "".join(f" {c} " if is_cjk(c) else c for c in unicodedata.normalize("NFC", text)).lower()
    return [STEMS.get(word) or evaluate.stem(word) for word in text.split()]


def unique(lists):
    kept = []
    for item in lists:
        if item not in kept:
            kept.append(item)
    return kept


def stands_in(words, text):
    return bool(words) and any(
        text[start : start + len(words)] == words for start in range(len(text))
    )


def belongs(name, words, text, known):
    """Whether a keyphrase is of the class `name`."""
    present, seen = stands_in(words, text), bool(words) and words in known
    return {
        "all": True,
        "present": present,
        "absent": not present,
        "seen": seen,
        "unseen": not seen,
        "absent_unseen": not present and not seen,
    }[name]


def recompute(predictions, posts, train):
    """{class: {measure: score}} from three lists of JSON objects.

    Only the stems of words that are not in STEMS are evaluate.py's.
    """
    by_id = {row["id"]: [] if row.get("error") else row["keyphrases"] for row in predictions}
    known = [words_of(text) for row in train for text in row["keyphrases"]]
    result = {}
    for name in ("all", "present", "absent", "seen", "unseen", "absent_unseen"):
        rows = []
        for record in posts:
            text = words_of(record["text"])
            wanted = [
                words
                for words in unique(map(words_of, record["keyphrases"]))
                if words and belongs(name, words, text, known)
            ]
            made = [
                words
                for words in unique(map(words_of, by_id[record["id"]]))
                if not {",", ".", "<unk>"} & set(words) and belongs(name, words, text, known)
            ]
            if wanted:
                rows.append(measures([words in wanted for words in made], len(wanted)))
        means = {
            key: sum(row[key] for row in rows) / len(rows) if rows else 0.0
            for key in measures([], 1)
        }
        for k in (1, 3, 5, "M"):
            p, r = means[f"P@{k}"], means[f"R@{k}"]
            means[f"F1@{k}"] = 2 * p * r / (p + r) if p + r else 0.0
        result[name] = means
    return result


def gain(order, k):
    return sum(hit / math.log2(rank + 1) for rank, hit in enumerate(order[:k], start=1))


def measures(right, wanted):
    row = {}
    for k in (1, 3, 5, "M"):
        cut = len(right) if k == "M" else k
        row[f"P@{k}"] = sum(right[:cut]) / min(cut, len(right)) if right else 0.0
        row[f"R@{k}"] = sum(right[:cut]) / wanted
    for k in (1, 3, 5):
        ranks = [rank for rank in range(1, min(k, len(right)) + 1) if right[rank - 1]]
        row[f"MAP@{k}"] = sum(sum(right[:rank]) / rank for rank in ranks) / wanted
        best = gain(sorted(right, reverse=True), k)
        row[f"NDCG@{k}"] = gain(right, k) / best if best else 0.0
    return row


# --------------------------------------------------------------------------------------- running it


def fuzz(folder, rounds, seed, progress=lambda items: items):
    """Run `rounds` rounds and return the Fuzz.

    What a round raises is raised again, with a note of the round's number.
    """
    target = Fuzz(folder)
    for number in progress(range(rounds)):
        draw = random.Random(f"{seed} {number}")
        one = draw.choice([target.records, target.images, target.outputs, target.scores])
        target.found[one.__name__] += 1
        try:
            with limit(20), contextlib.redirect_stderr(io.StringIO()):  # progress bars
                one(draw)
        except BaseException as error:
            error.add_note(f"round {number} of seed {seed}: {one.__name__}")
            raise
    return target


def test_fuzz(tmp_path):
    found = fuzz(tmp_path, 400, 0).found
    wanted = "files of posts read", "broken images read", "prompts shortened", "of these above zero"
    assert min(found[name] for name in wanted) > 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--rounds", type=positive_int, default=10_000)
    parser.add_argument("--seed", type=non_negative_int, default=0)
    args = parser.parse_args()
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as folder:
        target = fuzz(folder, args.rounds, args.seed, tqdm)
    print(f"{args.rounds} rounds of seed {args.seed}: no traceback, no hang, no wrong score")
    for name, times in [*target.found.most_common(), *target.errors.most_common(25)]:
        print(f"{times:7d}  {name!r}")


if __name__ == "__main__":
    main()
