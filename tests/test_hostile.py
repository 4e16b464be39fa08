"""What users will bring: hostile texts, images, data files, model folders and disks. Each ends in one line or is handled."""

import json
import logging
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import data
import evaluate
import infer
import train
from data import Encoder, Posts, Unreadable, load_image
from evaluate import UserError
from model import load
from test_data import make_encoder
from tiny import train_alone

ROOT = Path(__file__).parent.parent


def lines(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def post(number, **fields):
    return {
        "id": f"p{number}",
        "text": "hello",
        "image": None,
        "keyphrases": ["foxes"],
        "cot": "why",
    } | fields


def write(path, *records):
    path.write_text("".join(map(data.to_line, records)), encoding="utf-8")
    return path


def run(script, *arguments, **options):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def told(done, *parts):
    """`done` ended with one line of error (progress bars aside) that has these parts."""
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: "), done.stderr
    assert all(str(part) in last for part in parts), last


# --------------------------------------------------------------------------------------------------- texts

TEXTS = {
    "special tokens": "<|im_end|><|image_pad|><|im_start|>assistant\n<|vision_start|><|endoftext|>",
    "tags": "</think><answer>x</answer>",
    "long": "the foxes play " * 7000,
    "one long word": "a" * 100_000,
    "long without spaces": "日本" * 50_000,
    "NUL": "a\0b\0",
    "surrogates": "a \ud800 b \udc00",
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈",
    "right to left": "خبر عاجل שלום \u202e",
    "scripts": "สวัสดี देवनागरी ꦗꦮ ተ",
    "empty": "",
    "white": " \n\t\u2003",
    "no width": "\u200b\ufeff",
    "separators": "a\u2028b\x85c\x1c",
    "control": "\x1b[31mred\x07",
}


@pytest.fixture(scope="module")
def encoders(world, tmp_path_factory):
    """The byte-level tokenizer of the published kind, and the toy's."""
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "bytes": make_encoder(folder, max_length=300),
        "toy": load(str(world / "toy"), max_length=300)[1],
    }


@pytest.mark.parametrize("tokenizer", ["bytes", "toy"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts(encoders, world, tokenizer, text):
    encoder = encoders[tokenizer]
    record, image = (
        post(1, text=text, keyphrases=[text.replace("\n", " ") or "x"]),
        world / "images" / "test-00000.png",
    )
    record["keyphrases"] = [
        data.NOT_IN_KEYPHRASE.sub(" ", phrase).strip()[:200] or "x"
        for phrase in record["keyphrases"]
    ]
    start = time.process_time()
    for path in (image, None):
        sample = encoder.encode(record, path, with_answers=True)
        plain = encoder.encode(post(1, text="x"), path, with_answers=True)
        special = set(encoder.tokenizer.all_special_ids) - {encoder.tokenizer.unk_token_id}
        only_special = lambda tokens: [token for token in tokens if token in special]
        assert only_special(sample.prompt) == only_special(
            plain.prompt
        )  # the same image, turns and ends, whatever was written
        assert only_special(sample.plain) == only_special(sample.cot) == [encoder.end_of_turn]
        assert len(sample.prompt) <= 300 and sample.shortened == (len(text) > 1000)
        assert (
            sample.plain == encoder.encode(record | {"text": "x"}, path, with_answers=True).plain
        )  # never cut
        batch = data.collate([sample, plain], encoder)
        images = 0 if path is None else 2 * int(sample.image["image_grid_thw"].prod()) // 4
        assert int(batch.prompt["mm_token_type_ids"].sum()) == images
    assert (
        time.process_time() - start < 20
    )  # a word of 100,000 letters once took the toy's tokenizer hours


def test_a_prompt_that_leaves_no_room_for_the_text(tmp_path, world):
    with pytest.raises(UserError, match="--max-length 120 leaves no room.*--max-pixels"):
        make_encoder(tmp_path, max_length=120)
    encoder = load(str(world / "toy"), max_length=42)[
        1
    ]  # 36 of the largest image, 5 around it: one word fits
    saved(tmp_path, "large.png")
    Image.open(tmp_path / "large.png").resize((168, 168)).save(tmp_path / "large.png")
    sample = encoder.encode(post(1, text="size size size"), tmp_path / "large.png", False)
    assert (
        len(sample.prompt) == 42
        and sample.shortened
        and sample.prompt.count(encoder.image_token_id) == 36
    )


HOSTILE_IDS = ["\ud800", "日本", "a\u2028b\x85", "\x1b[31m\n\0", "\ud801", " "]


def test_ids_survive_in_every_file(world, tmp_path, monkeypatch):
    """Lone surrogates and line separators: in predictions, skipped.jsonl, the log that is gone on with, and the scores."""
    posts = [
        post(0, id=name, text=f"{name} hello", image=f"gone{name}.png" if number % 2 else None)
        for number, name in enumerate(HOSTILE_IDS)
    ]
    path = write(tmp_path / "posts.jsonl", *posts)
    assert [record["id"] for record in lines(path)] == HOSTILE_IDS
    arguments = [
        "--data",
        str(path),
        "--out",
        str(tmp_path / "preds.jsonl"),
        "--model",
        str(world / "toy"),
        "--workers",
        "0",
        "--max-new-tokens",
        "3",
    ]
    assert infer.infer_file(infer.settings(arguments)) == 1
    predictions = lines(tmp_path / "preds.jsonl")
    assert [prediction["id"] for prediction in predictions] == HOSTILE_IDS and sum(
        "error" in p for p in predictions
    ) == 3
    for script, out in (
        ("evaluate.py", [tmp_path / "preds.jsonl", path]),
        ("data.py", ["check", path]),
        ("data.py", ["stats", path]),
    ):
        done = run(script, *out, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
        assert done.returncode == (out[0] == "check"), done.stderr
    asked = []  # those without an error are not predicted again
    monkeypatch.setattr(
        data.EncodedPosts,
        "__getitem__",
        lambda self, i: asked.append(self.posts[i]["id"]) or data.Skipped("", "", ""),
    )
    with pytest.raises(KeyError):
        infer.infer_file(infer.settings(arguments))
    assert asked == HOSTILE_IDS[1::2]

    log = tmp_path / "skipped.jsonl"
    log.write_bytes(
        "".join(data.to_line({"step": 1, "id": name}) for name in HOSTILE_IDS).encode()
        + b'{"step": 1, "id": "\xe6\x97'
    )
    file, kept = train.open_appended(log, 1, True)
    file.close()
    assert [line["id"] for line in kept] == [line["id"] for line in lines(log)] == HOSTILE_IDS


def test_an_error_is_one_printable_line(tmp_path):
    path = tmp_path / "posts.jsonl"
    path.write_text('{"id": "\\u001b[31m\\n\\ud800' + "i" * 5000 + '", "text": 5}\n')
    done = run("data.py", "stats", path)
    told(done, "posts.jsonl line 1 (id '\\x1b[31m\\n\\ud800iii", "'text'")
    assert (
        len(done.stderr.strip().splitlines()[-1]) < 1100
        and done.stderr.strip().splitlines()[-1].isprintable()
    )


# -------------------------------------------------------------------------------------------------- images


def png(width, height, bits, color, rows, *extra):
    chunk = lambda kind, body: (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
        + b"".join(chunk(*part) for part in extra)
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def packed(row, times):
    pack = zlib.compressobj(9)
    return b"".join(pack.compress(row) for _ in range(times)) + pack.flush()


def saved(folder, name, **options):
    Image.effect_noise((80, 60), 50).convert("RGB").save(folder / name, **options)
    return (folder / name).read_bytes()


def not_to_be_read(folder):
    """Names of files in `folder` that are no readable pictures, and a part of the reason."""
    whole = {kind: saved(folder, f"whole.{kind}") for kind in ("jpg", "png", "gif", "webp")}
    files = {
        f"torn{part}.{kind}": (content[: int(len(content) * part)], "not a readable image")
        for kind, content in whole.items()
        for part in (0.02, 0.5, 0.9)
    }
    bomb = b"k\0\0" + packed(bytes(10**6), 300)
    saved(folder, "a.eps")
    canvas = (
        b"WEBPVP8X"
        + struct.pack("<I", 10)
        + b"\2\0\0\0"
        + b"\xfe\x3f\0" * 2
        + b"ANIM"
        + struct.pack("<I", 6)
        + bytes(6)
    )
    files |= {
        "empty.jpg": (b"", "JPEG, PNG"),
        "text.jpg": (b"hello", "JPEG, PNG"),
        "page.png": (b"<!DOCTYPE html><p>", "JPEG, PNG"),
        "a.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "JPEG, PNG"),
        "eps.jpg": ((folder / "a.eps").read_bytes(), "JPEG, PNG"),
        "50k.png": (png(50_000, 50_000, 1, 0, packed(bytes(6251), 50_000)), "pixels"),
        "9k.png": (png(9000, 9000, 1, 0, packed(bytes(1126), 9000)), "9000 x 9000 pixels"),
        "ztxt.png": (png(1, 1, 8, 0, packed(bytes(2), 1), (b"zTXt", bomb)), "too large"),
        "iccp.png": (png(1, 1, 8, 0, packed(bytes(2), 1), (b"iCCP", bomb)), "too large"),
        "canvas.webp": (b"RIFF" + struct.pack("<I", len(canvas)) + canvas, "pixels"),
        "canvas.gif": (whole["gif"][:6] + b"\xff\xff\xff\xff" + whole["gif"][10:], "pixels"),
        "huge.bmp": (
            b"BM"
            + struct.pack(
                "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0
            ),
            "pixels",
        ),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    os.symlink("loop.jpg", folder / "loop.jpg")
    odd = {
        "folder.jpg": "not a regular",
        "fifo.jpg": "not a regular",
        "/dev/zero": "not a regular",
        "loop.jpg": "no such file",
        "gone.jpg": "no such file",
        "a\0b.jpg": "no such file",
        "a" * 5000: "no such file",
        "\ud800.jpg": "no such file",
    }
    return {name: reason for name, (_, reason) in files.items()} | odd


def test_pictures_that_cannot_be_read(tmp_path, world):
    """Every one by hand, then all of them by the command; memory and time say that none was decoded first."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reasons, start = not_to_be_read(tmp_path), time.process_time()
    for name, reason in reasons.items():
        with pytest.raises(Unreadable) as error:
            load_image(tmp_path / name, 10**6)
        assert reason in str(error.value), (name, str(error.value))
    assert time.process_time() - start < 10
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000
    )  # KB; 50,000 x 50,000 pixels would be 2.5 GB
    path = write(
        tmp_path / "posts.jsonl",
        *(post(number, image=name) for number, name in enumerate(reasons)),
        post("good"),
    )
    done = run("data.py", "check", path, "--json")
    problems = json.loads(done.stdout)["problems"]
    assert [problem["id"] for problem in problems] == [
        f"p{number}" for number in range(len(reasons))
    ]
    assert all(reason in problem["problem"] for problem, reason in zip(problems, reasons.values()))
    done = run(
        "infer.py",
        "--data",
        path,
        "--out",
        tmp_path / "preds.jsonl",
        "--model",
        world / "toy",
        "--max-new-tokens",
        2,
    )
    assert done.returncode == 1 and f"{len(reasons)} failed" in done.stderr
    predictions = lines(tmp_path / "preds.jsonl")
    assert [
        reason in prediction["error"] for prediction, reason in zip(predictions, reasons.values())
    ] == [True] * len(reasons)
    assert "error" not in predictions[-1]


def test_no_other_program_is_started_for_a_picture(tmp_path, monkeypatch):
    saved(tmp_path, "a.eps")
    shutil.copy(tmp_path / "a.eps", tmp_path / "a.jpg")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    for name in ("a.eps", "a.jpg"):
        with pytest.raises(Unreadable):
            load_image(tmp_path / name, 10**6)


def test_odd_pictures_that_are_read(tmp_path):
    red = lambda *size: Image.new("RGB", size, (200, 30, 10))
    (
        red(1, 1).save(tmp_path / "dot.png"),
        red(1, 20_000).save(tmp_path / "tall.png"),
        red(20_000, 1).save(tmp_path / "wide.png"),
    )
    red(9, 9).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    (tmp_path / "rgb16.png").write_bytes(
        png(9, 9, 16, 2, packed(b"\0" + b"\xc8\xc8\x1e\x1e\x0a\x0a" * 9, 9))
    )
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 200, 30, 10])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    palette.save(tmp_path / "palette.gif", transparency=0)
    for name in ("moving.png", "moving.gif", "moving.webp", "pages.tiff"):
        red(9, 9).save(
            tmp_path / name,
            save_all=True,
            append_images=[Image.new("RGB", (9, 9), "blue")] * 2,
            **(
                {}
                if name == "pages.tiff"
                else {"lossless": True}
                if "webp" in name
                else {"duration": 9}
            ),
        )
    jpeg = saved(tmp_path, "noise.jpg")
    for torn, size in (
        (
            b"Exif\0\0II*\0\xff\xff\xff\xffgarbage",
            (80, 60),
        ),  # no tags; then a width that is text, and turned
        (
            b"Exif\0\0II*\0\x08\0\0\0\2\0"
            + struct.pack("<HHI4sHHI4sI", 0x100, 2, 3, b"ab", 0x112, 3, 1, b"\6", 0),
            (60, 80),
        ),
    ):
        (tmp_path / "exif.jpg").write_bytes(
            jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(torn)) + torn + jpeg[2:]
        )
        assert load_image(tmp_path / "exif.jpg", 10**6).size == size
    for path in set(tmp_path.iterdir()) - {tmp_path / "exif.jpg", tmp_path / "noise.jpg"}:
        picture = load_image(path, 10**6)
        assert picture.mode == "RGB" and max(picture.size) <= 200 * min(picture.size), path
        assert np.abs(np.asarray(picture, int) - (200, 30, 10)).max() <= 12, path


@pytest.mark.parametrize(
    "orientation, corner", [*enumerate([(0, 0), (1, 0), (1, 1), (0, 1)] * 2, start=1)]
)
def test_a_large_photo_is_turned_after_it_was_decoded_small(tmp_path, orientation, corner):
    """One red corner, stored at the top left, and where the EXIF orientation says that it belongs."""
    pixels = np.zeros((1500, 2000, 3), np.uint8)
    pixels[:750, :1000, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    picture = load_image(tmp_path / "a.jpg", 40_000)
    width, height = (500, 375) if orientation < 5 else (375, 500)
    assert picture.size == (width, height)
    red = {
        (x, y)
        for x in (0, 1)
        for y in (0, 1)
        if picture.getpixel((x * width // 2 + width // 4, y * height // 2 + height // 4))[0] > 200
    }
    assert red == {corner}


# ---------------------------------------------------------------------------------------------- data files

GOOD = "".join(json.dumps(post(number)) + "\n" for number in range(3)).encode()
SECOND = lambda line: GOOD.splitlines(keepends=True)[0] + line + b"\n"
FILES = {
    "malformed": (SECOND(b'{"id": "x", '), "line 2: not a line of JSON"),
    "no text": (SECOND(b'{"id": "b", "keyphrases": ["x"]}'), "line 2"),
    "wrong type": (SECOND(b'{"id": "b", "text": ["x"], "keyphrases": ["x"]}'), "'text'"),
    "same id": (GOOD + GOOD, "'p0'"),
    "no keyphrases": (
        SECOND(b'{"id": "b", "text": "x", "keyphrases": []}'),
        "line 2 (id 'b'): a post to train on needs",
    ),
    "gzip": (b"\x1f\x8b\x08" + GOOD, "gunzip"),
    "empty": (b"", "no posts"),
    "blank": (b"\n\r\n \n", "no posts"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "line 1: not UTF-8"),
    "UTF-16, no mark": (GOOD.decode().encode("utf-16-le"), "line 1"),
    "Latin-1": (SECOND(b'{"id": "b", "text": "\xe9"}'), "line 2: not UTF-8"),
    "NUL": (SECOND(bytes(99)), "line 2"),
    "CR only": (GOOD.replace(b"\n", b"\r"), "one whole JSON object a line"),
    "a list": (b"[" + GOOD.replace(b"\n", b", ") + b"{}]", "object"),
    "many digits": (SECOND(b'{"id": "b", "n": ' + b"9" * 5000 + b"}"), "line 2: a whole number"),
    "deep": (SECOND(b"[" * 100_000), "line 2: JSON nested too deeply"),
    "deep text": (SECOND(b'{"id": "b", "text": ' + b"[" * 900 + b"]" * 900 + b"}"), "'text'"),
    "a string": (b'"x"\n', "line 1: a JSON object"),
    "Parquet": (b"PAR1\xff\xd8", "line 1: not UTF-8"),
}


@pytest.mark.parametrize("content, part", FILES.values(), ids=FILES)
def test_data_files_that_cannot_be_used(tmp_path, content, part):
    path = tmp_path / "posts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Posts(path, for_training=True)
    assert "posts.jsonl" in str(error.value) and part in str(error.value)
    if part != "line 2 (id 'b'): a post to train on needs":
        with pytest.raises(UserError, match="posts.jsonl"):
            evaluate.read_references(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n").rstrip(),
        GOOD.replace(b", ", b",\r"),
        b"\n\n" + GOOD.replace(b"\n", b"\n \n"),
        GOOD.replace(b"}", b', "a": NaN, "b": 1e999, "c": ' + b"9" * 4000 + b"}"),
    ],
    ids=["mark", "CRLF", "both", "CR within", "blank lines", "numbers"],
)
def test_data_files_that_can_be_used(tmp_path, content):
    path = tmp_path / "posts.jsonl"
    path.write_bytes(content)
    posts = Posts(path, for_training=True)
    assert [posts[index]["id"] for index in range(len(posts))] == ["p0", "p1", "p2"]
    assert len(evaluate.read_references(path)) == 3 and len(data.read_entries(path)) == 3


def test_a_pipe_is_refused_where_a_file_is_read_twice(tmp_path):
    os.mkfifo(tmp_path / "posts.jsonl")
    told(run("data.py", "check", tmp_path / "posts.jsonl"), "posts.jsonl: not a file on a disk")
    with pytest.raises(UserError, match="not a file on a disk"):
        Posts(tmp_path / "posts.jsonl")
    with pytest.raises(UserError, match="folder"):
        Posts(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 200),
        lambda path: path.write_bytes(GOOD.replace(b"hello", b"jello")),
    ],
    ids=["cut", "changed"],
)
def test_a_file_that_changes_while_it_is_read(encoders, tmp_path, change, workers):
    path = tmp_path / "posts.jsonl"
    path.write_bytes(GOOD)
    posts = Posts(path)
    with open(path, "ab") as file:  # what is appended does no harm
        file.write(b'{"id": "late"')
    assert posts[2]["id"] == "p2"
    change(path)
    with pytest.raises(UserError, match=r"posts.jsonl line \d: was changed") as error:
        list(data.Loader(posts, encoders["toy"], [[2, 1]], 2, workers, True))
    assert "Traceback" not in str(error.value)


def test_a_worker_that_is_killed_is_told(encoders, tmp_path, monkeypatch):
    path = tmp_path / "posts.jsonl"
    path.write_bytes(GOOD)
    monkeypatch.setattr(Encoder, "encode", lambda *args: os.kill(os.getpid(), 9))
    with pytest.raises(UserError, match="killed.*--workers"):
        list(data.Loader(Posts(path), encoders["toy"], [[0]], 1, 1, True))


def test_full_shared_memory_is_told(encoders, world, tmp_path, monkeypatch):
    path = write(tmp_path / "posts.jsonl", post(1, image=str(world / "images" / "test-00000.png")))

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match="shared memory.*--workers"):
        list(data.Loader(Posts(path), encoders["toy"], [[0]], 1, 1, True))


def test_posts_that_stay_together_cannot_be_split(tmp_path):
    path = write(tmp_path / "posts.jsonl", *(post(number) for number in range(4)))
    told(
        run("data.py", "split", path, "--test", 1, "--valid", 1, "--out", tmp_path / "x"),
        "not as asked",
        "test posts",
    )


# ------------------------------------------------------------------------------------------- model folders


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL_MARK']}",)


def change_json(folder, name, **fields):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


def in_shards(folder, last="model-2.safetensors"):
    tensors = load_file(folder / "model.safetensors")
    half, names = len(tensors) // 2, sorted(tensors)
    (folder / "model.safetensors").unlink()
    parts = {"model-1.safetensors": names[:half], last: names[half:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(
            {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
        )
    )


def pickled_shard(folder):
    in_shards(folder, "model-2.bin")
    (folder / "model-2.bin").write_bytes(pickle.dumps(Evil()))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def with_code(name, **fields):
    def change(folder):
        change_json(folder, name, **fields)
        (folder / "evil.py").write_text(
            "import os\nopen(os.environ['EVIL_MARK'], 'w').close()\nclass T: pass\n"
        )

    return change


def other_weights(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors, sorted(tensors)[0])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def lost_shard(folder):
    in_shards(folder)
    (folder / "model-2.safetensors").unlink()


FOLDERS = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "a pickle": (pickled, "not read"),
    "a pickled shard": (pickled_shard, "index.json: names model-2.bin"),
    "a lost shard": (lost_shard, "names model-2.safetensors"),
    "no index": (
        lambda folder: (in_shards(folder), replaced("model.safetensors.index.json", b"[]")(folder)),
        "not an index",
    ),
    "torn header": (cut("model.safetensors", 500), "model.safetensors: its weights"),
    "torn data": (cut("model.safetensors", -9), "model.safetensors: its weights"),
    "other shape": (
        other_weights(lambda tensors, name: tensors.update({name: tensors[name][:2].clone()})),
        "1 weights.*embed_tokens",
    ),
    "a weight less": (
        other_weights(lambda tensors, name: tensors.pop(name)),
        "weights are missing",
    ),
    "config a list": (replaced("config.json", b"[]"), "a JSON object"),
    "config not UTF-8": (replaced("config.json", b"\xff{}"), "config.json: not JSON"),
    # transformers' defaults are those of a 7B model, which would fill the memory before the weights are missed
    "bare config": (
        replaced("config.json", b'{"model_type": "qwen2_5_vl"}'),
        "describes .* weights",
    ),
    "bad sizes": (
        lambda folder: change_json(folder, "config.json", text_config={"hidden_size": -5}),
        "config.json: describes no model",
    ),
    "another image token": (
        lambda folder: change_json(folder, "config.json", image_token_id=2),
        "0 image placeholders",
    ),
    "torn tokenizer": (cut("tokenizer.json", 9000), "its tokenizer"),
    "tokenizer of another model": (
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json")
            .read_text()
            .replace('"<|endoftext|>": 0', '"<|endoftext|>": 0, "zz": 876', 1)
        ),
        "its tokenizer has 877 tokens",
    ),
    "tokenizer with code": (
        with_code(
            "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["evil.T", "evil.T"]},
            tokenizer_class="T",
        ),
        None,
    ),
    "processor with code": (
        with_code(
            "preprocessor_config.json",
            auto_map={"AutoImageProcessor": "evil.T"},
            image_processor_type="T",
        ),
        "custom code",
    ),
    "model with code": (
        with_code(
            "config.json",
            auto_map={"AutoConfig": "evil.T", "AutoModelForImageTextToText": "evil.T"},
        ),
        None,
    ),
    "no processor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "preprocessor_config",
    ),
    "processor torn": (cut("preprocessor_config.json", 40), "preprocessor_config"),
    "other patches": (
        lambda folder: change_json(folder, "preprocessor_config.json", patch_size=16),
        "patches of 1536 values",
    ),
    "patches of text": (
        lambda folder: change_json(folder, "preprocessor_config.json", patch_size="x"),
        "preprocessor_config.json can't be used",
    ),
    "prompt not UTF-8": (replaced("prompt.txt", b"\xff{text}"), "prompt.txt"),
    "two places": (replaced("prompt.txt", b"{text} {text}"), "not 2 times"),
    "bad template": (replaced("chat_template.jinja", b"{% for %}"), "chat template can't be used"),
    "endless template": (
        replaced("chat_template.jinja", b"{% for i in range(999999999) %}x{% endfor %}"),
        "chat template can't be used",
    ),
}


@pytest.mark.parametrize("change, message", FOLDERS.values(), ids=FOLDERS)
def test_model_folders(world, tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("EVIL_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question was asked"))
    shown, logger = [], logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(
        logger, "handle", lambda record: logger.filter(record) and shown.append(record.getMessage())
    )
    folder = tmp_path / "model"
    shutil.copytree(world / "toy", folder)
    change(folder)
    if message is None:
        load(str(folder))
    else:
        with pytest.raises(UserError, match=message) as error:
            load(str(folder))
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "mark").exists(), "the folder's code was run"
    assert not any("REPORT" in message for message in shown)


def test_weights_in_parts_load(world, tmp_path):
    shutil.copytree(world / "toy", tmp_path / "model")
    in_shards(tmp_path / "model")
    one, other = (
        load(str(folder))[0].state_dict() for folder in (world / "toy", tmp_path / "model")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------- outputs


def limit_files(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_the_file_size_limit_while_predicting(world, tmp_path):
    """What was predicted is kept, and a second run goes on from there to the same file as one that met no limit."""
    arguments = [
        "--data",
        world / "test.jsonl",
        "--model",
        world / "toy",
        "--batch-size",
        1,
        "--workers",
        0,
        "--max-new-tokens",
        20,
    ]
    told(
        run("infer.py", *arguments, "--out", tmp_path / "a.jsonl", preexec_fn=limit_files(1000)),
        "a.jsonl",
        "File too large",
        "kept",
    )
    kept = (tmp_path / "a.jsonl").read_bytes().splitlines()[:-1]
    assert kept
    quick = [*map(str, arguments), "--batch-size", "12"]
    assert infer.infer_file(infer.settings([*quick, "--out", str(tmp_path / "a.jsonl")])) == 0
    assert infer.infer_file(infer.settings([*quick, "--out", str(tmp_path / "b.jsonl")])) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "b.jsonl").read_bytes().splitlines()[: len(kept)] == kept


def test_the_file_size_limit_while_saving(world, tmp_path, monkeypatch):
    """The real limit, met by the second checkpoint: the first survives, `last` names it, and the run can go on."""
    arguments = [
        "--train",
        str(world / "train.jsonl"),
        "--model",
        str(world / "toy"),
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "2",
        "--batch-size",
        "32",
        "--workers",
        "0",
    ]
    save, limits = checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(run, *rest):
        if (run / "last").is_file():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            return save(run, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint, "save", limited)
    with pytest.raises(
        UserError, match="step-4: the checkpoint could not be saved.*File too large.*--resume"
    ):
        train_alone(*arguments)
    monkeypatch.undo()
    run = tmp_path / "run"
    assert (run / "last").read_text() == "step-2\n" and not list(run.glob(".*"))
    load(checkpoint.model_folder(str(run)))
    train_alone(*arguments, "--resume")
    assert (run / "last").read_text() == "step-4\n"


def test_a_full_disk_under_the_log(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train, "open_appended", lambda path, *_: (open("/dev/full", "a", encoding="utf-8"), [])
    )
    with pytest.raises(UserError, match="No space left.*--resume"):
        train_alone(
            "--train",
            world / "train.jsonl",
            "--model",
            world / "toy",
            "--out",
            tmp_path / "run",
            "--epochs",
            1,
            "--workers",
            0,
        )


def test_results_that_cannot_be_printed(world, tmp_path):
    path = tmp_path / "posts.jsonl"
    path.write_bytes(GOOD)
    for script, *arguments in (
        ("evaluate.py", path, path),
        ("data.py", "stats", path),
        ("data.py", "check", path, "--json"),
    ):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, ROOT / script, *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        told(done, "the output: No space left")


@pytest.mark.parametrize("out", ["file/below", "/proc/nowhere/x", "fifo", "a" * 5000])
def test_places_that_cannot_be_written(world, tmp_path, out):
    (tmp_path / "file").write_text("x")
    os.mkfifo(
        tmp_path / "fifo"
    )  # a device would do as well, but a test that fails should not cost the machine its device
    source, out = tmp_path / "src.txt", str(tmp_path / out)
    source.write_text("a<sep>b<sep>c.jpg\n")
    told(run("data.py", "cmkp", source, "--out", out), out[:400])
    with pytest.raises((UserError, OSError), match="not a file|can't be written|too long"):
        infer.infer_file(
            infer.settings(
                [
                    "--data",
                    str(world / "test.jsonl"),
                    "--model",
                    str(world / "toy"),
                    "--out",
                    out,
                    "--workers",
                    "0",
                ]
            )
        )
    with pytest.raises((UserError, OSError), match="can't write a run|too long"):
        checkpoint.open_run(out, {}, False)
    assert (tmp_path / "fifo").is_fifo() and sorted(os.listdir(tmp_path)) == [
        "fifo",
        "file",
        "src.txt",
    ]


def test_a_file_is_not_written_over_itself(tmp_path):
    source = tmp_path / "src.txt"
    source.write_text("a<sep>b<sep>c.jpg\n")
    told(run("data.py", "cmkp", source, "--out", source), "choose another --out")
    assert source.read_text() == "a<sep>b<sep>c.jpg\n"
    source.write_text("")
    told(run("data.py", "cmkp", source, "--out", tmp_path / "out.jsonl"), "no posts")
