"""Prediction: thinking or not, one post, files, stopping, going on.

That generation is transformers' own, test_generate.py and test_published.py show.
"""

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import torch

import data
import infer
from evaluate import UserError
from model import load
from support.checkpoint import checkpoint_of
from tiny import ROOT, generate, lines, train_alone, words, write
from train import TrainingStep


@pytest.fixture(scope="module")
def thinker(world, tmp_path_factory):
    """A toy trained just long enough to write tags."""
    out = tmp_path_factory.mktemp("thinker") / "run"
    files = ["--train", world / "train.jsonl", "--model", world / "toy", "--out", out]
    train_alone(*files, "--mode cot --epochs 8 --batch-size 8 --lr 3e-3 --workers 0")
    return out


@pytest.fixture(scope="module")
def taught(world, thinker):
    vlm, encoder, _ = load(checkpoint_of(str(thinker)))
    return vlm, encoder, data.Posts(world / "test.jsonl")


def batch_of(encoder, posts, indices):
    dataset = data.EncodedPosts(posts, encoder, with_answers=False)
    return data.collate([dataset[index] for index in indices], encoder)


def test_generation_after_a_training_step_and_the_reverse(taught):
    """The model remembers position offsets between calls; a stale one must not reach the next."""
    vlm, encoder, posts = taught
    batch = batch_of(encoder, posts, range(4))
    before = generate(vlm, encoder, batch, max_new_tokens=6)
    dataset = data.EncodedPosts(posts, encoder, with_answers=True)
    step = TrainingStep(vlm, "dynamic", 9.0)
    one = data.collate([dataset[i] for i in (5, 6)], encoder)
    loss = step(one)[0]
    assert generate(vlm, encoder, batch, max_new_tokens=6) == before
    assert torch.equal(step(one)[0], loss)


def test_think_always_and_never(taught):
    vlm, encoder, posts = taught
    batch, modes = batch_of(encoder, posts, range(8)), ("auto", "always", "never")
    auto, always, never = (generate(vlm, encoder, batch, think) for think in modes)
    assert auto == always and all(text.startswith("<think>") for text, _, _ in auto)
    assert not any("<think" in text for text, _, _ in never)


def test_plain_transformers_with_autoprocessor_answers_as_infer_does(thinker, world, tmp_path):
    pytest.importorskip("torchvision", reason="AutoProcessor needs torchvision")
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, out = checkpoint_of(str(thinker)), tmp_path / "preds.jsonl"
    assert infer_file("--data", world / "test.jsonl", "--model", thinker, "--out", out) == 0
    processor = AutoProcessor.from_pretrained(folder)
    vlm = AutoModelForImageTextToText.from_pretrained(folder)
    for record, prediction in zip(lines(world / "test.jsonl"), lines(out), strict=True):
        image, text = Image.open(world / record["image"]), record["text"]  # the toy's prompt
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        options = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt")
        messages = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(messages, tokenize=True, **options)
        output = vlm.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(answer, skip_special_tokens=True) == prediction["output"]


def run(*arguments, cwd):
    command = [sys.executable, ROOT / "infer.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_one_post(thinker, world, tmp_path):
    record = lines(world / "train.jsonl")[0]
    image = world / record["image"]
    shown = run(image, record["text"], "--model", thinker, cwd=tmp_path)
    assert shown.returncode == 0 and "Reasoning: " in shown.stdout, shown.stderr
    asked = run(image, record["text"], "--model", thinker, "--json", cwd=tmp_path)
    prediction = json.loads(asked.stdout)
    assert shown.stdout.splitlines()[0] == "; ".join(prediction["keyphrases"])
    assert prediction["think"] in shown.stdout and prediction["tokens"] > 4
    assert shown.stderr == asked.stderr == ""


def test_without_a_model_it_says_how_to_get_one(tmp_path):
    failed = run("none", "hello", cwd=tmp_path)
    (line,) = failed.stderr.splitlines()
    assert failed.returncode == 1 and "python train.py" in line


@pytest.mark.parametrize(
    "arguments",
    [
        "image.jpg",
        "image.jpg text --out preds.jsonl",
        "image.jpg text --data posts.jsonl --out preds.jsonl",
        "--data posts.jsonl",
        "--data posts.jsonl --out preds.jsonl --json",
    ],
)
def test_arguments_that_do_not_go_together(arguments, capsys):
    with pytest.raises(SystemExit):
        infer.parse_args(arguments.split())
    assert "give an image and a text" in capsys.readouterr().err


def infer_file(*arguments):
    return infer.infer_file(infer.parse_args(words(*arguments, "--workers 0 --max-new-tokens 8")))


@pytest.fixture
def encoded(monkeypatch):
    """The ids of the posts that have been encoded."""
    ids, encode = [], data.Encoder.encode

    def note(encoder, record, *args, **kwargs):
        ids.append(record["id"])
        return encode(encoder, record, *args, **kwargs)

    monkeypatch.setattr(data.Encoder, "encode", note)
    return ids


def test_a_file_of_posts_stopped_and_continued(world, tmp_path, monkeypatch, capsys, encoded):
    arguments = ["--data", world / "test.jsonl", "--model", world / "toy", "--batch-size", 4]
    assert infer_file(*arguments, "--out", tmp_path / "whole.jsonl") == 0
    whole = lines(tmp_path / "whole.jsonl")
    assert [p["id"] for p in whole] == [r["id"] for r in lines(world / "test.jsonl")]
    assert set(whole[0]) - {"cut"} == {"id", "keyphrases", "think", "output", "tokens", "post"}

    out, all_here = tmp_path / "stopped.jsonl", infer.all_here

    def stopped(*arguments):
        yield from itertools.islice(all_here(*arguments), 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(infer, "all_here", stopped)
        infer_file(*arguments, "--out", out)
    told = f"stopped: {out} has 5 of 12 posts; the same command goes on from there"
    assert told in capsys.readouterr().err
    kept = {prediction["id"] for prediction in lines(out)}
    with open(out, "a", encoding="utf-8") as file:
        file.write('{"id": "torn')
    encoded.clear()
    assert infer_file(*arguments, "--out", out) == 0
    assert "5 done before" in " ".join(capsys.readouterr().err.split())
    assert lines(out) == whole and len(encoded) == 7 and not kept & set(encoded)
    changed = r"something else \(think\): think was 'auto', is 'never'; choose"
    with pytest.raises(UserError, match=changed):
        infer_file(*arguments, "--out", out, "--think", "never")
    (tmp_path / "stopped.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match="was made with unknown settings; choose another --out"):
        infer_file(*arguments, "--out", out)


def test_predictions_come_as_they_end_and_before_all_posts_are_read(
    world, thinker, taught, tmp_path, encoded
):
    """Posts are sorted by the lengths of their prompts in windows of 32, and slots are refilled."""
    records = lines(world / "train.jsonl")[:40]
    for record in records:
        record["image"] = str(world / record["image"])
    records[7]["image"] = "lost.png"
    posts = write(tmp_path / "posts.jsonl", records)
    files = ["--data", posts, "--out", "unused", "--model", thinker]
    args = infer.parse_args(words(*files, "--max-new-tokens 40 --batch-size 2 --workers 0"))
    order = [*range(len(records))]
    predictions = infer.all_here(args, *infer.find_folder(args), data.Posts(posts), order)
    found = [next(predictions)]
    assert len(encoded) < len(records)
    found += predictions
    ids = [record["id"] for record in records]
    assert sorted(p["id"] for p in found) == sorted(ids) == sorted(encoded)
    assert [p["id"] for p in found] != ids
    errors = [p for p in found if "error" in p]
    assert [p["id"] for p in errors] == [ids[7]] and "no such file" in errors[0]["error"]
    vlm, encoder, _ = taught
    (third,) = [p for p in found if p["id"] == ids[3]]
    alone = generate(vlm, encoder, batch_of(encoder, data.Posts(posts), [3]), max_new_tokens=40)
    assert [(third["output"], third["tokens"], "cut" not in third)] == alone


def test_a_failed_start_and_a_changed_model_or_file(world, tmp_path):
    out, toy = tmp_path / "preds.jsonl", tmp_path / "toy"
    shutil.copytree(world / "toy", toy)
    arguments = ["--data", world / "test.jsonl", "--out", out]
    (tmp_path / "settings.json").write_text("{}")
    for model in (tmp_path / "typo", tmp_path):  # the other is a run without a checkpoint
        with pytest.raises(UserError, match="no model here"):
            infer_file(*arguments, "--model", model)
    assert not out.exists() and infer_file(*arguments, "--model", toy) == 0
    shutil.copy(world / "toy" / "model.safetensors", toy / "model.safetensors")
    with pytest.raises(UserError, match=r"something else.*model.safetensors has changed; "):
        infer_file(*arguments, "--model", toy)
