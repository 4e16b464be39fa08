"""Records, images, replies and predictions broken at random, from seeds.

Each round must end in a result or in an error of one line that names the file, and in time.
By hand: ROUNDS=5000 SEED=1 python -m pytest tests/test_fuzz.py
"""

import io
import json
import os
import random
import signal
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
from evaluate import UserError
from support import images
from support.jsonl import to_line
from test_evaluate import STEMS, assert_equals_the_oracle
from tiny import qwen_tokenizer

ROUNDS, SEED = int(os.environ.get("ROUNDS", 100)), os.environ.get("SEED", "0")
WORDS = [*random.Random(0).sample([*STEMS], 25), "Dogs", "dog", "running", "runs"]
ODD = """
    <|im_end|> <|image_pad|> <think> </answer> <unk> <sep> , . ; # \\ " { [
    日本 寿司 がス 😀 👩‍👩‍👧 خبر 한국 İ ﬁ e\u0301 \ud800 \udfff \U0002a700
""".split()
ODD += ["", " ", "\n", "\r", "\0", "\x85", "\x1b[31m", "\u200b", "\u2028", "\ufeff", "a" * 300]
VALUES = [None, True, 0, -1, 1e308, float("nan"), 10**30, "", "x", [], {}, [None], ["x"], [["x"]]]
NESTED = "@nested@"  # stands for lists in lists, deeper than json would write them


def rounds():
    """ROUNDS generators of random numbers; a round may take 20 seconds."""

    def too_long(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    for number in range(ROUNDS):
        print(f"round {number}")
        signal.alarm(20)
        yield random.Random(f"{SEED} {number}")
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def phrase(draw, most=4):
    words = [draw.choice(ODD if draw.random() < 0.15 else WORDS) for _ in range(most)]
    return " ".join(words[: draw.randint(0, most)])


def post(draw, number, images=(None,)):
    record = {
        "id": f"{draw.choice(['p', 'é', '日', chr(0x2028)])}{number}",
        "text": phrase(draw, 12),
        "image": draw.choice(images),
        "keyphrases": [phrase(draw) or "x" for _ in range(draw.randint(1, 4))],
    }
    return record | ({"cot": phrase(draw, 10)} if draw.random() < 0.5 else {})


def broken(draw, content):
    """Bytes changed, cut, left out, put in or said twice, or the whole in another encoding."""
    at = draw.randrange(len(content) + 1)
    head, tail = content[:at], content[at:]
    odd = [b"\0", b"\r", b"\n", b"\xff\xfe", b'"', b"{", b"\xed\xa0\x80", b"9" * 5000, b"[" * 99999]
    ends = [b"\r\n", b"\r", b"\n\n", b"\0\n", b"\n\xef\xbb\xbf"]
    ways = [head, head + tail[draw.randint(1, 40) :], head + draw.choice(odd) + tail]
    ways += [head + content[draw.randrange(len(content) or 1) :][:200] + tail]
    ways += [content.replace(b"\n", draw.choice(ends)), b"\xef\xbb\xbf" + content]
    ways += [content.decode("utf-8", "replace").encode("utf-16")]
    ways += [head + bytes([draw.randrange(256)]) + tail[1:]] * 4
    return draw.choice(ways)


def write_rows(draw, path, rows, breaks):
    """Rows as JSONL; with `breaks`, one broken as a record, or the file as bytes."""
    if breaks and draw.random() < 0.7:
        row = draw.choice(rows)
        field = draw.choice([*row, "other"])
        row[field] = draw.choice([draw.choice(VALUES), draw.choice(ODD), NESTED])
        if draw.random() < 0.2:
            del row[field]
    lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5) + "\n" for row in rows]
    deep = draw.choice([3, 200, 5000, 100_000])
    content = "".join(lines).encode("utf-8", "backslashreplace")
    content = content.replace(json.dumps(NESTED).encode(), b"[" * deep + b"]" * deep)
    path.write_bytes(broken(draw, content) if breaks and draw.random() < 0.5 else content)


def plain(path):
    """What json makes of a file's lines."""
    lines = [line.removeprefix(b"\xef\xbb\xbf") for line in path.read_bytes().split(b"\n")]
    return [json.loads(line) for line in lines if line.strip()]


def assert_one_line(error, *names):
    assert any(name in str(error) for name in names), error
    line = evaluate.one_line(str(error))
    assert len(line) <= 1100 and line.isprintable()


@pytest.fixture(scope="module")
def pictures():
    """Small pictures of several formats, as bytes."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8))
    kinds = "JPEG RGB, JPEG CMYK, PNG RGB, PNG P, PNG LA, PNG RGBA, PNG 1, GIF P, WEBP RGBA, "
    kinds += "BMP RGB, TIFF RGB, TIFF F, PPM RGB, ICO RGB, EPS RGB"
    found = []
    for kind in kinds.split(", "):
        file, (name, mode) = io.BytesIO(), kind.split()
        picture.convert(mode).save(file, name)
        found.append(file.getvalue())
    return found


def test_records(pictures, world, tmp_path):
    """A file of posts through the readers, and what could be read through the encoders."""
    from transformers import AutoImageProcessor, AutoTokenizer

    processor = AutoImageProcessor.from_pretrained(world / "toy")
    encoders, found, path = [], Counter(), tmp_path / "posts.jsonl"
    toy = AutoTokenizer.from_pretrained(world / "toy")
    for tokenizer, prompt, length in ((qwen_tokenizer(), data.PROMPT, 300), (toy, "{text}", 60)):
        pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        options = data.EncoderOptions(prompt, max_length=length)
        encoders.append(data.Encoder(tokenizer, processor, pad, options))
    for draw in rounds():
        for name in "01":
            content = draw.choice(pictures)
            content = broken(draw, content) if draw.random() < 0.3 else content
            (tmp_path / name).write_bytes(content)
        places = [None, "0", "1", "gone\0.png", "\udcff", "."]
        rows = [post(draw, number, places) for number in range(draw.randint(1, 4))]
        write_rows(draw, path, rows, breaks=draw.random() < 0.8)
        training = draw.random() < 0.5
        try:
            evaluate.read_references(path)
            posts = data.Posts(path, training)
        except UserError as error:
            assert_one_line(error, "posts.jsonl")
            continue
        records = [posts[index] for index in range(len(posts))]
        assert repr(records) == repr(plain(path))
        assert repr([json.loads(to_line(record)) for record in records]) == repr(records)
        found["files"] += 1
        for encoder in encoders:
            items = data.EncodedPosts(posts, encoder, training)
            items = [items[index] for index in range(len(posts))]
            samples = [item for item in items if isinstance(item, data.Sample)]
            found["skipped"] += sum(isinstance(item, data.Skipped) for item in items)
            found["shortened"] += sum(sample.truncated for sample in samples)
            for sample in samples:
                check_sample(encoder, sample, training)
            if samples:
                batch = data.collate(samples, encoder)
                pads = sum(int(s.grid.prod()) // 4 for s in samples if s.grid is not None)
                assert int(batch.prompt["mm_token_type_ids"].sum()) == pads
                tokens = sum(len(sample.prompt) for sample in samples)
                assert int(batch.prompt["attention_mask"].sum()) == tokens
    assert min(found[name] for name in ("files", "skipped", "shortened")) > 5


def check_sample(encoder, sample, training):
    """Special tokens stand only where the template, the image or the answer's end has them."""
    special = set(encoder.tokenizer.all_special_ids) - {encoder.tokenizer.unk_token_id}
    head, _, _, tail = encoder.frames[sample.grid is not None]
    others = special - {encoder.image_token_id}
    framed = [token for token in head + tail if token in others]
    assert [token for token in sample.prompt if token in others] == framed
    assert len(sample.prompt) <= encoder.max_length
    for answer in filter(None, (sample.plain, sample.cot) if training else ()):
        assert answer[-1] == encoder.end_of_turn and not special & set(answer[:-1])


def test_images(pictures, tmp_path):
    path, read = tmp_path / "picture", 0
    for draw in rounds():
        content = draw.choice(pictures)
        for _ in range(draw.randint(1, 3)):
            content = broken(draw, content)
        if draw.random() < 0.3:  # what a decoder reads first
            head = [draw.choice([byte, byte, byte, 0, 1, 127, 128, 255]) for byte in content[:40]]
            content = bytes(head) + content[40:]
        path.write_bytes(content)
        try:
            picture = images.load_image(path, draw.choice([100, 10**6]))
        except images.Unreadable:
            continue
        read += 1
        short, long = sorted(picture.size)
        assert picture.mode == "RGB" and 0 < long <= images.LONGEST_SIDE * short
    assert read > 5


def test_scores(tmp_path):
    """Files of predictions, posts and training posts, broken or not: refused, or scored right."""
    paths = preds, refs, train = [tmp_path / f"{name}.jsonl" for name in ("preds", "refs", "train")]
    scored = 0
    for draw in rounds():
        posts = [post(draw, number) for number in range(draw.randint(1, 6))]
        made = [{"id": record["id"], "think": None, "tokens": 3} for record in posts]
        for prediction, record in zip(made, posts, strict=True):
            guesses = [*record["keyphrases"], *record["text"].split()[:2], phrase(draw, 2), "x", ""]
            prediction["keyphrases"] = draw.choices(guesses, k=draw.randint(0, 7))
            if draw.random() < 0.1:
                prediction["error"] = "no such file"
        draw.shuffle(made)
        worse = draw.randrange(4)
        for number, rows in enumerate((made, posts, [post(draw, n) for n in range(3)])):
            write_rows(draw, paths[number], rows, number == worse)
        try:
            references, predictions = (
                evaluate.read_references(refs),
                evaluate.read_predictions(preds),
            )
            aligned = evaluate.align(predictions, references, names=(preds, refs))
            known = list(evaluate.train_keyphrases(train))
        except UserError as error:
            assert_one_line(error, *(path.name for path in paths))
            continue
        made, posts, training = map(plain, paths)
        made = {row["id"]: [] if row.get("error") else row["keyphrases"] for row in made}
        made = [{"keyphrases": made[record["id"]]} for record in posts]
        training = [text for record in training for text in record["keyphrases"]]
        scores = evaluate.score(aligned, references, known)
        assert_equals_the_oracle(scores, made, posts, training)
        scored += scores["all"]["F1@M"] > 0
    assert scored > 5
