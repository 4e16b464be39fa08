"""What users will bring: hostile texts, images, data files, model folders and disks.

Each is handled, or ends in one line.
"""

import json
import logging
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import infer
from data import EncodedPosts, Encoder, Posts
from evaluate import UserError
from model import load
from support import checkpoint
from support.jsonl import JsonlWriter, to_line
from test_data import make_encoder
from tiny import ROOT, lines, train_alone, words, write


def post(number, **fields):
    record = {"id": f"p{number}", "text": "hello", "image": None}
    return record | {"keyphrases": ["foxes"], "cot": "why"} | fields


def run(script, *arguments, **options):
    """Run one of the project's commands: "infer.py --data", or "-m tools.dataset check"."""
    command = [sys.executable, *script.split(), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def told(done, *parts):
    """`done` ended with one line of error (progress bars aside) that has these parts."""
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: "), done.stderr
    assert all(str(part) in last for part in parts), last


# -------------------------------------------------------------------------------------------- texts

TEXTS = {  # test_fuzz.py mixes short ones at random
    "special tokens": "<|im_end|><|image_pad|><|im_start|>assistant\n<|vision_start|><|endoftext|>",
    "long": "the foxes play " * 7000,
    "one long word": "a" * 100_000,
    "long without spaces": "日本" * 50_000,
    "surrogates": "a \ud800 b \udc00",
    "empty": "",
    "separators": "a\u2028b\x85c\x1c\0",
}


def limited(world, length):
    """The toy's options with another --max-length."""
    return data.EncoderOptions(**checkpoint.read_own(world / "toy"))._replace(max_length=length)


@pytest.fixture(scope="module")
def encoders(world, tmp_path_factory):
    """The byte-level tokenizer of the published kind, and the toy's."""
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "bytes": make_encoder(folder, max_length=300),
        "toy": load(world / "toy", options=limited(world, 300))[1],
    }


@pytest.mark.parametrize("tokenizer", ["bytes", "toy"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts(encoders, world, tokenizer, text):
    encoder, image = encoders[tokenizer], world / "images" / "test-00000.png"
    phrase = re.sub(r"[;\n\r]|</?(?:think|answer)>", " ", text).strip()[:200] or "x"
    record = post(1, text=text, keyphrases=[phrase])
    special = set(encoder.tokenizer.all_special_ids) - {encoder.tokenizer.unk_token_id}

    def only_special(tokens):
        return [token for token in tokens if token in special]

    start = time.process_time()
    for path in (image, None):
        sample = encoder.encode(record, path, with_answers=True)
        plain = encoder.encode(post(1, text="x"), path, with_answers=True)
        # The same image, turns and ends, whatever was written.
        assert only_special(sample.prompt) == only_special(plain.prompt)
        assert only_special(sample.plain) == only_special(sample.cot) == [encoder.end_of_turn]
        assert len(sample.prompt) <= 300 and sample.truncated == (len(text) > 1000)
        other = encoder.encode(record | {"text": "x"}, path, with_answers=True)
        assert sample.plain == other.plain  # answers are never truncated
        batch = data.collate([sample, plain], encoder)
        images = 0 if path is None else 2 * int(sample.grid.prod()) // 4
        assert int(batch.prompt["mm_token_type_ids"].sum()) == images
    # A word of 100,000 letters once took the toy's tokenizer hours.
    assert time.process_time() - start < 20


def test_a_prompt_that_leaves_no_room_for_the_text(tmp_path, world):
    # 36 tokens of the largest image, and 5 around it: one word fits.
    encoder = load(world / "toy", options=limited(world, 42))[1]
    Image.effect_noise((168, 168), 50).convert("RGB").save(tmp_path / "large.png")
    sample = encoder.encode(post(1, text="size size size"), tmp_path / "large.png", False)
    assert len(sample.prompt) == 42 and sample.truncated
    assert sample.prompt.count(encoder.image_token_id) == 36


HOSTILE_IDS = ["\ud800", "日本", "a\u2028b\x85", "\x1b[31m\n\0", "\ud801", " "]


def test_ids_survive_in_every_file(world, tmp_path, monkeypatch):
    """Lone surrogates and line separators: in predictions, scores, and a log that is resumed."""
    posts = []
    for number, name in enumerate(HOSTILE_IDS):
        image = f"gone{name}.png" if number % 2 else None
        posts.append(post(0, id=name, text=f"{name} hello", image=image))
    path, out = write(tmp_path / "posts.jsonl", posts), tmp_path / "preds.jsonl"
    assert [record["id"] for record in lines(path)] == HOSTILE_IDS
    files = ["--data", path, "--out", out, "--model", world / "toy"]
    arguments = words(*files, "--workers 0 --max-new-tokens 3")
    assert infer.infer_file(infer.parse_args(arguments)) == 1
    predictions = lines(out)
    assert [prediction["id"] for prediction in predictions] == HOSTILE_IDS
    assert sum("error" in prediction for prediction in predictions) == 3
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    assert run("evaluate.py", out, path, env=ascii_only).returncode == 0
    assert run("-m tools.dataset check", path, env=ascii_only).returncode == 1

    asked = []  # those without an error are not predicted again

    def ask(encoded, index):
        asked.append(encoded.posts[index]["id"])
        return data.Skipped("?", "", "")

    monkeypatch.setattr(EncodedPosts, "__getitem__", ask)
    with pytest.raises(KeyError):
        infer.infer_file(infer.parse_args(arguments))
    assert asked == HOSTILE_IDS[1::2]

    log = tmp_path / "skipped.jsonl"
    skipped = "".join(to_line({"step": 1, "id": name}) for name in HOSTILE_IDS)
    log.write_bytes(skipped.encode() + b'{"step": 1, "id": "\xe6\x97')
    writer = JsonlWriter(log)
    kept = [line["id"] for _, _, line in writer.read(lambda line: line["step"] <= 1)]
    writer.open()
    writer.close()
    assert kept == [line["id"] for line in lines(log)] == HOSTILE_IDS


# --------------------------------------------------------------------------------------- data files

GOOD = "".join(json.dumps(post(number)) + "\n" for number in range(3)).encode()


def test_a_pipe_is_refused_where_a_file_is_read_twice(tmp_path):
    os.mkfifo(tmp_path / "posts.jsonl")
    for path in (tmp_path / "posts.jsonl", tmp_path):
        with pytest.raises(UserError, match="no such file, or not a regular one"):
            Posts(path)


def read_all(posts, encoder, steps, micro_batch, workers):
    return list(data.load_steps(EncodedPosts(posts, encoder, True), steps, micro_batch, workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_while_it_is_read(encoders, tmp_path, workers):
    path = tmp_path / "posts.jsonl"
    path.write_bytes(GOOD)
    posts = Posts(path)
    os.truncate(path, 200)
    with pytest.raises(UserError, match="^[^\n]*posts.jsonl: the file was changed[^\n]*$"):
        read_all(posts, encoders["toy"], [[2, 1]], 2, workers)


def test_a_worker_that_is_killed_is_told(encoders, tmp_path, monkeypatch):
    path = tmp_path / "posts.jsonl"
    path.write_bytes(GOOD)
    monkeypatch.setattr(Encoder, "encode", lambda *args: os.kill(os.getpid(), 9))
    with pytest.raises(UserError, match="killed.*--workers"):
        read_all(Posts(path), encoders["toy"], [[0]], 1, workers=1)


def test_full_shared_memory_is_told(encoders, world, tmp_path, monkeypatch):
    path = write(tmp_path / "posts.jsonl", [post(1, image=str(world / "images/test-00000.png"))])

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match="shared memory.*--workers"):
        read_all(Posts(path), encoders["toy"], [[0]], 1, workers=1)


# ------------------------------------------------------------------------------------ model folders


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL_MARK']}",)


def change_json(folder, name, **fields):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def pickled_shard(folder):
    pickled(folder)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_code(name, auto_map, **fields):
    def change(folder):
        change_json(folder, name, auto_map=auto_map, **fields)
        code = "import os\nopen(os.environ['EVIL_MARK'], 'w').close()\nclass T: pass\n"
        (folder / "evil.py").write_text(code)

    return change


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def edited(name, **fields):
    return lambda folder: change_json(folder, name, **fields)


def other_weights(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors, sorted(tensors)[0])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def smaller_weight(tensors, name):
    tensors[name] = tensors[name][:2].clone()


def larger_vocabulary(folder):
    content = (folder / "tokenizer.json").read_text()
    first = '"<|endoftext|>": 0'
    (folder / "tokenizer.json").write_text(content.replace(first, first + ', "zz": 876', 1))


# transformers' defaults are those of a 7B model, which would fill the memory.
BARE = b'{"model_type": "qwen2_5_vl"}'
LONG_LOOP = b"{% for i in range(999999999) %}x{% endfor %}"
PROCESSOR = "preprocessor_config.json"
TOKENIZER_CODE = {"AutoTokenizer": ["evil.T", "evil.T"]}
MODEL_CODE = {"AutoConfig": "evil.T", "AutoModelForImageTextToText": "evil.T"}
TEMPLATE, WEIGHTS = "its chat template: can't be read", "its weights: can't be read"
FOLDERS = {
    "a pickle": (pickled, WEIGHTS),
    "a pickled shard": (pickled_shard, "index.json: names files that are not safetensors"),
    "torn data": (cut("model.safetensors", -9), WEIGHTS),
    "other shape": (other_weights(smaller_weight), "1 weight missing.*embed_tokens"),
    "a weight less": (other_weights(dict.pop), "2 weights missing"),
    "config a list": (replaced("config.json", b"[]"), "not a mapping"),
    "bare config": (replaced("config.json", BARE), "config.json: no model of"),
    "another image token": (edited("config.json", image_token_id=2), "0 image placeholders"),
    "torn tokenizer": (cut("tokenizer.json", 9000), "its tokenizer"),
    "tokenizer of another model": (larger_vocabulary, "its tokenizer has 877 tokens"),
    "tokenizer with code": (
        with_code("tokenizer_config.json", TOKENIZER_CODE, tokenizer_class="T"),
        None,
    ),
    "processor with code": (
        with_code(PROCESSOR, {"AutoImageProcessor": "evil.T"}, image_processor_type="T"),
        "custom code",
    ),
    "model with code": (with_code("config.json", MODEL_CODE), None),
    "other patches": (edited(PROCESSOR, patch_size=16), "differ in values of a patch"),
    "two places": (replaced("prompt.txt", b"{text} {text}"), "must contain {text} once"),
    "no place": (replaced("prompt.txt", b"Its keyphrases?"), "must contain {text} once"),
    "endless template": (replaced("chat_template.jinja", LONG_LOOP), TEMPLATE),
}


@pytest.mark.parametrize("change, message", FOLDERS.values(), ids=FOLDERS)
def test_model_folders(world, tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("EVIL_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("a question was asked"))
    shown, logger = [], logging.getLogger("transformers.modeling_utils")

    def handle(record):
        if logger.filter(record):
            shown.append(record.getMessage())

    monkeypatch.setattr(logger, "handle", handle)
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


# ------------------------------------------------------------------------------------------ outputs


def limit_files(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_the_file_size_limit_while_predicting(world, tmp_path):
    """What was predicted is kept; a second run ends with the file of one that met no limit."""
    files = ["--data", world / "test.jsonl", "--model", world / "toy"]
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    arguments = words(*files, "--batch-size 1 --workers 0 --max-new-tokens 20")
    done = run("infer.py", *arguments, "--out", one, preexec_fn=limit_files(1000))
    told(done, "a.jsonl", "File too large", "kept")
    kept = one.read_bytes().splitlines()[:-1]
    assert kept
    for out in (one, other):
        quick = words(*arguments, "--batch-size 12 --out", out)
        assert infer.infer_file(infer.parse_args(quick)) == 0
    assert one.read_bytes() == other.read_bytes()
    assert set(kept) < set(other.read_bytes().splitlines())


def test_the_file_size_limit_while_saving(world, tmp_path, monkeypatch):
    """The real limit, met by the second checkpoint: the first survives, and the run can resume."""
    run = tmp_path / "run"
    files = ["--train", world / "train.jsonl", "--model", world / "toy", "--out", run]
    arguments = words(*files, "--epochs 2 --batch-size 32 --workers 0")
    save, limits = checkpoint.Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, step):
        if (self.run / "last").is_file():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            save(self, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", limited)
    message = "step-4: the checkpoint could not be saved.*File too large.*--resume"
    with pytest.raises(UserError, match=message):
        train_alone(*arguments)
    monkeypatch.undo()
    assert (run / "last").read_text() == "step-2\n" and not list(run.glob(".*"))
    load(str(run))
    train_alone(*arguments, "--resume")
    assert (run / "last").read_text() == "step-4\n"


def test_a_full_disk_under_the_log(world, tmp_path, monkeypatch):
    def open_full(self):
        self.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115

    monkeypatch.setattr(JsonlWriter, "open", open_full)
    files = ["--train", world / "train.jsonl", "--model", world / "toy", "--out", tmp_path / "run"]
    with pytest.raises(UserError, match="log.jsonl: .*No space left.*--resume"):
        train_alone(*files, "--epochs 1 --workers 0")


def test_results_that_cannot_be_printed(tmp_path):
    path = tmp_path / "posts.jsonl"
    path.write_bytes(GOOD)
    command = [sys.executable, "evaluate.py", path, path]
    with open("/dev/full", "w") as full:
        streams = dict(stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        told(subprocess.run(command, **streams), "the output: No space left")


@pytest.mark.parametrize("out", ["file/below", "/proc/nowhere/x", "fifo", "a" * 5000])
def test_places_that_cannot_be_written(world, tmp_path, out):
    (tmp_path / "file").write_text("x")
    # A device would do, too, but a test that fails should not cost the machine its device.
    os.mkfifo(tmp_path / "fifo")
    source, out = tmp_path / "src.txt", str(tmp_path / out)
    source.write_text("a<sep>b<sep>c.jpg\n")
    told(run("-m tools.dataset import --images none", source, "--out", out), out[:400])
    arguments = words("--data", world / "test.jsonl", "--model", world / "toy", "--workers 0")
    with pytest.raises((UserError, OSError), match="not a file|can't be written|too long"):
        infer.infer_file(infer.parse_args([*arguments, "--out", out]))
    with pytest.raises((UserError, OSError), match="can't be written|too long"):
        checkpoint.open_run(out, {}, False)
    assert (tmp_path / "fifo").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "src.txt"]
