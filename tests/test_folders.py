"""What folders keep and who may write to them: limits of size, locks, permissions, paths."""

import importlib
import json
import multiprocessing
import os
import shutil
import socket
import sys

import pytest

import infer
import train
from data import EncoderOptions, Posts
from evaluate import UserError
from model import load
from support import checkpoint
from support.distributed import Ranks
from support.jsonl import locked
from tiny import call, lines, words, write

LIMITS = {"max_pixels": 1568, "max_length": 40}


def limits_of(encoder):
    return {name: getattr(encoder, name) for name in LIMITS}


@pytest.fixture
def limited(world, tmp_path):
    """The toy with limits of its own."""
    shutil.copytree(world / "toy", tmp_path / "limited")
    (tmp_path / "limited" / "encoder.json").write_text(json.dumps(LIMITS))
    return tmp_path / "limited"


# ------------------------------------------------------------------- limits travel with the model


def test_limits_travel_from_model_to_checkpoints_and_inference(world, limited, train_on):
    run = train_on("run", "--epochs 1 --model", limited)
    folder = checkpoint.read_pointer(run / "last")
    assert json.loads((folder / "encoder.json").read_text()) == LIMITS
    assert (folder / "prompt.txt").read_text() == "{text}"
    encoder = load(str(run))[1]
    assert limits_of(encoder) == LIMITS
    image = world / "images" / "test-00000.png"  # 9 tokens, where 2 are allowed
    sample = encoder.encode({"id": "a", "text": "kit " * 99}, image, with_answers=False)
    assert sample.prompt.count(encoder.image_token_id) <= 2 and len(sample.prompt) <= 40

    given = train_on("given", "--epochs 1 --max-pixels 784 --model", run)
    assert limits_of(load(str(given))[1]) == LIMITS | {"max_pixels": 784}
    assert limits_of(load(str(world / "toy"))[1]) == {"max_pixels": 401408, "max_length": 4096}


@pytest.mark.parametrize("options", ["", "--max-length 99", "--base-url http://localhost:1"])
def test_inference_uses_the_folders_limits_or_the_flags(limited, options):
    args = infer.parse_args(words("--data x --out y --model", limited, options))
    _, found = infer.find_folder(args)
    expected = LIMITS | ({"max_length": 99} if "99" in options else {})
    assert limits_of(args) == limits_of(found) == expected
    assert infer.identity(args, limited)["max_pixels"] == 1568


@pytest.mark.parametrize("wrong", [{}, {"max_pixels": 9}, LIMITS | {"max_length": 0}, [1]])
def test_broken_limits_are_named(limited, wrong):
    (limited / "encoder.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="encoder.json"):
        load(str(limited))


def test_a_merged_model_and_an_adapter_have_limits_and_those_of_the_base(
    world, limited, train_on, tmp_path, monkeypatch
):
    pytest.importorskip("peft", reason="adapters need the optional package peft")
    import tools.merge

    run = train_on("lora", "--epochs 1 --lora 4 --max-length 50 --model", limited)
    call(monkeypatch, tools.merge, run, tmp_path / "merged")
    for name in (run, tmp_path / "merged"):
        assert limits_of(load(str(name))[1]) == LIMITS | {"max_length": 50}
    adapter = checkpoint.read_pointer(run / "last")
    (adapter / "encoder.json").unlink()
    assert limits_of(load(str(adapter))[1]) == LIMITS


# ------------------------------------------------------------- a resumed run, and the ranks' disks


def test_a_resumed_run_compares_contents_not_paths(world, limited, train_on, tmp_path, monkeypatch):
    posts = shutil.copy(world / "train.jsonl", tmp_path / "posts.jsonl")
    shutil.copytree(world / "images", tmp_path / "images")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{text}?")
    train_on("run", "--epochs 1 --prompt-file", prompt, "--model", limited, posts=posts)
    os.rename(posts, tmp_path / "moved.jsonl")
    shutil.copy(prompt, tmp_path / "same.txt")
    monkeypatch.chdir(tmp_path)
    moved = {"posts": os.path.join("images", "..", "moved.jsonl")}
    for options in ("--prompt-file same.txt", "", "--max-pixels 1568 --max-length 40"):
        train_on("run", "--epochs 1 --resume --model limited", options, **moved)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["prompt"] == "{text}?" and settings["max_pixels"] == 1568
    (tmp_path / "same.txt").write_text("{text}!")
    for option, message in (
        ("--prompt-file same.txt", "prompt was '{text}.', is '{text}!'"),
        ("--max-pixels 784", "max_pixels was 1568, is 784"),
        (f"--model {world / 'toy'}", "model was"),
    ):
        with pytest.raises(UserError, match=message):
            train_on("run", "--epochs 1 --resume --model limited", option, **moved)
    text = (tmp_path / "moved.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(text.replace("the", "a", 1))
    with pytest.raises(UserError, match="train_digest was"):
        train_on("run", "--epochs 1 --resume --model limited", **moved)


class Second(Ranks):
    """The second of two ranks, whose disk answers nothing: it is told what the first found."""

    def __init__(self, found):
        super().__init__("cpu")
        self.rank, self.world_size, self.found = 1, 2, found

    def from_rank0(self, function, *args, **kwargs):
        name = getattr(function, "__name__", "")
        assert name in self.found, f"{name} is asked of rank 0 for the first time"
        return self.found[name]

    def on_rank0(self, function, *args, **kwargs):
        return None

    def on_all_ranks(self, function, *args, **kwargs):
        return function(*args, **kwargs)

    def wrap_model(self, step):
        return step


def test_a_rank_takes_the_first_ranks_word_for_what_is_on_the_disk(world, tmp_path):
    files = ["--train", world / "train.jsonl", "--model", tmp_path / "nowhere", "--resume"]
    args = train.parse_args(words(*files, "--out", tmp_path / "run"))
    posts, encoder = Posts(world / "train.jsonl", for_training=True), object()
    found = {"Posts": posts, "find_model": world / "toy", "tuple": (encoder,)}
    ranks = Second(found | {"resolve_options": EncoderOptions()})
    assert train.open_files(args, ranks) == (posts, None, tmp_path / "run")
    _, received, source, _ = train.build_model(args, tmp_path / "run", ranks)
    assert received is encoder and source == world / "toy"


def test_a_machine_that_does_not_see_the_posts_says_so(world, tmp_path):
    posts = Posts(shutil.copy(world / "train.jsonl", tmp_path / "posts.jsonl"))
    with multiprocessing.get_context("spawn").Pool(1) as there:
        assert there.apply(posts.__getitem__, (3,)) == posts[3]
        text = (tmp_path / "posts.jsonl").read_text()
        (tmp_path / "posts.jsonl").write_text(text.replace("the", "THE"))
        os.utime(tmp_path / "posts.jsonl", ns=(0, posts.state[1] + 1))  # of the same size
        with pytest.raises(UserError, match="posts.jsonl: the file was changed"):
            there.apply(posts.__getitem__, (3,))
        os.unlink(tmp_path / "posts.jsonl")
        with pytest.raises(UserError, match="posts.jsonl: can't be read .*each machine"):
            there.apply(posts.__getitem__, (3,))


# --------------------------------------------------------------------------------- permissions


@pytest.mark.parametrize("umask, files, folders", [(0o077, 0o600, 0o700), (0o027, 0o640, 0o750)])
def test_what_is_written_follows_the_umask(
    world, train_on, tmp_path, monkeypatch, umask, files, folders
):
    before = os.umask(umask)
    try:
        options = "--epochs 1 --save-every 4 --log-choices --test"
        monkeypatch.setattr(sys, "argv", ["x"])
        train_on("run", options, world / "test.jsonl", "--valid", world / "valid.jsonl")
        lora = importlib.util.find_spec("peft") is not None
        if lora:
            train_on("lora", "--epochs 1 --lora 4")
        commands = {"tools.clubworld": ["--train 2 --valid 1 --test 1 --out", tmp_path / "club"]}
        if lora:
            commands["tools.merge"] = [tmp_path / "lora", tmp_path / "merged"]
        for command, arguments in commands.items():
            call(monkeypatch, importlib.import_module(command), *words(*arguments))
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.umask(before)
    count = 0
    for path in tmp_path.rglob("*"):
        mode = path.stat().st_mode & 0o777
        assert mode == (folders if path.is_dir() else files), path
        count += path.suffix == ".safetensors"
    assert count >= (4 if lora else 3)


# ---------------------------------------------------------------------------------------- locks


def held_commands(world, out):
    """{command: (arguments, the file that a first run has locked)}."""
    toy, posts, train = ["--model", world / "toy"], world / "test.jsonl", world / "train.jsonl"
    return {
        "train": ([*toy, "--train", train, "--out", out], out / "log.jsonl"),
        "infer": (["--data", posts, *toy, "--out", out / "p.jsonl"], out / "p.jsonl"),
        "gen_cot": ([posts, "--model x --out", out / "p.jsonl"], out / "p.jsonl"),
        "tools.gallery": ([world / "preds.jsonl", posts, "--out", out / "g.html"], out / "g.html"),
        "tools.merge": ([world / "toy", out / "merged"], out / "merged"),
        "tools.dataset": (["split --test 16 --valid 0 --out", out, train], out / "train.jsonl"),
        "tools.study": (["--out", out], out / "tables.md"),
    }


COMMANDS = "train infer gen_cot tools.gallery tools.merge tools.dataset tools.study".split()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_run_into_the_same_place_is_refused(world, tmp_path, monkeypatch, command):
    predictions = [{"id": post["id"], "keyphrases": []} for post in lines(world / "test.jsonl")]
    write(world / "preds.jsonl", predictions)
    arguments, path = held_commands(world, tmp_path / "out")[command]
    with locked(path), pytest.raises(UserError) as error:
        call(monkeypatch, importlib.import_module(command), *words(*arguments))
    assert f"{path}: another run is writing to it" in str(error.value)
    assert f"(process {os.getpid()} on {socket.gethostname()})" in str(error.value)
    assert not list(tmp_path.rglob("[!.]*.*"))
