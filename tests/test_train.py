"""The loop: what it learns and logs, where it stops, and what a resumed run ends with."""

import importlib
import json
import math
import re
import subprocess
import sys
import traceback

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import published
import train
from evaluate import UserError
from support import checkpoint
from support.distributed import Ranks
from test_resume import equal, weights
from tiny import ROOT, call, lines, words, write


@pytest.mark.parametrize("gamma, mode", [("0", "sft"), ("inf", "cot")])
def test_the_ends_of_gamma_train_exactly_as_the_plain_modes(train_on, gamma, mode):
    """The literal step to the last bit; where both answers share the prompt, sums round apart."""
    dynamic = train_on("dynamic", "--mode dynamic --gradient-checkpointing --gamma", gamma)
    plain = train_on("plain", "--mode", mode)
    assert lines(dynamic / "log.jsonl")[-1]["step"] == 16
    assert equal(weights(dynamic), weights(plain))


def test_gamma_auto_reasons_where_the_plain_answer_is_likelier_than_all_others(train_on, world):
    """p(y_s) > 1/2, which is L(y_s) < ln 2 / n, for answers of 4 and 11 tokens."""
    posts = lines(world / "train.jsonl")[:4]
    for post in posts[:2]:
        post["keyphrases"] = [*post["keyphrases"], "one two three four five"]
    few = write(world / "few.jsonl", posts)
    run = train_on("run", "--gamma auto --log-choices --batch-size 4 --epochs 40", posts=few)
    tokenizer = AutoTokenizer.from_pretrained(world / "toy")
    n = {one["id"]: len(tokenizer("; ".join(one["keyphrases"]))["input_ids"]) + 1 for one in posts}
    choices = lines(run / "choices.jsonl")
    for choice in choices:
        tokens = n[choice["id"]]
        assert choice["gamma"] == pytest.approx(math.log(2) / tokens, abs=1e-6)
        assert choice["use_cot"] == (math.exp(-choice["plain_loss"] * tokens) > 0.5)
    assert {choice["use_cot"] for choice in choices} == {True, False} and len(set(n.values())) > 1
    mean = sum(math.log(2) / tokens for tokens in n.values()) / 4
    assert all(abs(line["gamma"] - mean) < 1e-6 for line in lines(run / "log.jsonl"))


def test_a_run_learns_and_logs_every_step(train_on, world):
    valid = world / "valid.jsonl"
    run = train_on("run", "--mode dynamic --gamma 5 --valid-posts 4 --valid", valid)
    steps = [line for line in lines(run / "log.jsonl") if "loss" in line]
    evaluations = [line for line in lines(run / "log.jsonl") if "valid" in line]
    assert [line["step"] for line in steps] == list(range(1, 17))
    assert [line["step"] for line in evaluations] == [8, 16]
    assert evaluations[0]["valid"]["posts"] == 4
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert steps[0]["cot_share"] == 0 < steps[-1]["cot_share"]
    for line in steps:
        assert line["samples"] == 8 and line["seconds"] > 0 and line["grad_norm"] > 0
    assert (run / "best").read_text().strip() in ("step-8", "step-16")
    assert not list(run.glob(".*"))


def test_the_tokens_of_every_answer_that_is_trained_are_logged(train_on, world):
    """Counted from the posts; multitask trains both answers of each."""
    from data import EncodedPosts, Posts
    from model import load

    _, encoder, _ = load(str(world / "toy"))
    posts = Posts(world / "train.jsonl", for_training=True)
    encoded = EncodedPosts(posts, encoder, with_answers=True)
    samples = [encoded[index] for index in range(len(posts))]
    prompts, plain, cot = (
        sum(len(getattr(sample, part)) for sample in samples) for part in ("prompt", "plain", "cot")
    )
    for mode, answers in (("sft", plain), ("cot", cot), ("multitask", plain + cot)):
        run = train_on(mode, "--epochs 1 --mode", mode)
        logged = lines(run / "log.jsonl")
        assert sum(line["tokens"] for line in logged) == prompts + answers


def test_the_learning_rate_rises_and_falls():
    args = train.parse_args("--lr 1 --warmup 0.1 --final-lr 0.2 --train x".split())
    rates = [train.learning_rate(step, 100, args) for step in range(1, 101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert rates[55] == pytest.approx(0.6) and rates[10:] == sorted(rates[10:], reverse=True)


def test_an_epoch_and_a_tenth_is_the_beginning_of_two(train_on):
    """Ten steps an epoch; in binary, 1.1 times 10 is above 11."""
    options = "--mode sft --batch-size 7 --epochs"
    short = lines(train_on("1.1", options, "1.1") / "log.jsonl")
    two = lines(train_on("2", options, "2") / "log.jsonl")
    assert len(short) == 11 and len(two) == 20
    for key in ("step", "epoch", "tokens"):
        assert [line[key] for line in short] == [line[key] for line in two[:11]]
    assert short[-1]["lr"] == pytest.approx(two[-1]["lr"], rel=0.9)
    assert short[-1]["lr"] < 0.2 * two[10]["lr"]
    assert lines(train_on("1.1", options, "1.1", "--resume") / "log.jsonl") == short


@pytest.mark.parametrize("option", ["--valid", "--test"])
def test_a_wrong_validation_or_test_file_is_told_at_once(world, tmp_path, monkeypatch, option):
    files = ["--train", world / "train.jsonl", "--model", world / "toy", "--out", tmp_path / "run"]
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        call(monkeypatch, train, *files, option, tmp_path / "none.jsonl")
    assert not list(tmp_path.glob("run/*"))


def test_a_run_that_failed_before_its_first_checkpoint_can_be_started_anew(train_on, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        train_on("run", posts=tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="settings.json: can't be read"):
        train_on("run", "--resume")
    assert (train_on("run") / "last").is_file()


def records_of(world):
    """The training posts, to be written to a file in another folder."""
    records = lines(world / "train.jsonl")
    return [record | {"image": str(world / record["image"])} for record in records]


def with_bad_images(world, tmp_path, *bad):
    """A file of 128 posts, of which those with the numbers `bad` have no image on the disk."""
    records = [record | {"id": str(n)} for n, record in enumerate(records_of(world) * 2)]
    for number in bad:
        records[number]["image"] = "missing.png"
    return write(tmp_path / "posts.jsonl", records)


def test_an_unreadable_image_is_left_out_and_listed(train_on, world, tmp_path):
    """Also where it is alone in its micro-batch. The split changes nothing but rounding."""
    posts, logs = with_bad_images(world, tmp_path, 5), []
    for name, size in (("whole", 8), ("single", 1)):
        run = train_on(name, "--epochs 1 --gamma 5 --micro-batch", size, posts=posts)
        (skipped,) = lines(run / "skipped.jsonl")
        assert skipped["id"] == "5" and skipped["reason"] == "no such file"
        logs.append(lines(run / "log.jsonl"))
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
        assert all(one[key] == other[key] for key in ("samples", "tokens", "cot_share"))
    assert sum(line["samples"] for line in logs[0]) == 127
    assert any(0 < line["cot_share"] < 1 for line in logs[0])


def test_many_unreadable_images_end_the_run(train_on, world, tmp_path):
    """Its last step is saved first, and it can go on without them."""
    posts = with_bad_images(world, tmp_path, 0, 1, 64, 65)
    with pytest.raises(UserError, match=r"4 images of 128 posts .*missing\.png.*--skip-unreadable"):
        train_on("run", posts=posts)
    stopped = lines(tmp_path / "run" / "log.jsonl")
    assert (tmp_path / "run" / "last").read_text() == f"step-{len(stopped)}\n"
    run = train_on("run", "--resume --skip-unreadable", posts=posts)
    assert lines(run / "log.jsonl")[: len(stopped)] == stopped
    run = train_on("all", "--skip-unreadable", posts=with_bad_images(world, tmp_path, *range(9)))
    assert len({line["id"] for line in lines(run / "skipped.jsonl")}) == 9


@pytest.mark.parametrize("script", ["train", "infer"])
def test_a_full_gpu_is_told_in_a_line(world, tmp_path, monkeypatch, script):
    tried = "CUDA out of memory. Tried to allocate 2.00 GiB"

    def full(*_, **__):
        raise torch.OutOfMemoryError(f"{tried}. GPU 0 has a total capacity of 79.11 GiB.")

    if script == "train":
        where, caller, hint = "train.TrainingStep.forward", "train", "a smaller --micro-batch"
        files = ["--train", world / "train.jsonl", "--out", tmp_path / "run"]
    else:
        where, caller = "model.read_prompt", "read_prompts"
        hint = "try a smaller --batch-size"
        files = ["--data", world / "test.jsonl", "--out", tmp_path / "preds.jsonl"]
    monkeypatch.setattr(where, full)
    module, options = importlib.import_module(script), ["--model", world / "toy", "--workers", 0]
    with pytest.raises(UserError, match=f"^{tried}; {hint}") as told:
        call(monkeypatch, module, *options, *files)
    frames = [frame for frame, _ in traceback.walk_tb(told.value.__context__.__traceback__)]
    (step,) = [frame for frame in frames if frame.f_code.co_name == caller]
    assert not step.f_locals, "what fills the memory is held by nobody"


def test_weights_that_are_not_finite_are_not_saved(train_on, monkeypatch):
    run = train_on("run", "--epochs 1")
    from model import load

    model, encoder, source = load(str(run / "step-8"))
    model.lm_head.weight.data[0, 0] = math.nan
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = checkpoint.Checkpoints(run, model, optimizer, encoder, source, Ranks("cpu"))
    with pytest.raises(UserError, match="not finite"):
        checkpoints.save(9)
    assert (run / "last").read_text().strip() == "step-8"


@pytest.mark.parametrize(
    "mode, keep, message",
    [
        ("cot", 60, "4 of 64 posts.*--mode dynamic"),
        ("multitask", 0, "64 of 64 posts.*--mode sft"),
        ("dynamic", 0, "64 of 64 posts.*--mode sft"),
    ],
)
def test_missing_reasoning_is_counted(train_on, world, tmp_path, mode, keep, message):
    records = records_of(world)
    for record in records[keep:]:
        del record["cot"]
    path = write(tmp_path / "posts.jsonl", records)
    with pytest.raises(UserError, match=message):
        train_on("run", "--mode", mode, posts=path)


def test_gradient_checkpointing_and_a_frozen_vision_tower(train_on, world, monkeypatch):
    """Layers are computed once more; the ends of gamma show that the weights stay the same."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer as Layer

    calls, forward = [], Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    options = "--mode sft --epochs 1 --gradient-checkpointing --freeze-vision"
    frozen = train_on("run", options)
    assert len(calls) == 8 * 4 * 2  # steps, layers, forward and recomputation of one literal pass
    before, after = load_file(world / "toy" / "model.safetensors"), weights(frozen)
    for name in before:
        assert torch.equal(before[name], after[name]) == ("visual" in name), name


def test_the_checkpoint_is_a_model_folder_like_its_source(train_on, world):
    from transformers import AutoModelForImageTextToText

    run = train_on("run")
    folder = checkpoint.read_pointer(run / "last")
    shapes = [
        {name: tensor.shape for name, tensor in load_file(place / "model.safetensors").items()}
        for place in (world / "toy", folder)
    ]
    assert shapes[0] == shapes[1]
    for file in (world / "toy").iterdir():
        if file.name != "model.safetensors":
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    from model import load

    ours, encoder, _ = load(str(folder))
    ids = torch.tensor([encoder.prompt_ids("what a day", 0)[0]])
    assert torch.equal(ours(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


# ------------------------------------------------------------------ one run at a time, TensorBoard


def scalars(run):
    """{tag: {step: value}} of a run's event files, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_what_the_log_says(train_on, world, monkeypatch):
    """Also after steps were done again by a resumed run."""
    pytest.importorskip("tensorboard", reason="--tensorboard needs the optional package")
    options = ["--tensorboard --gamma 5 --valid-posts 4 --valid", world / "valid.jsonl"]
    save = checkpoint.Checkpoints.save

    def save_once(self, step):
        if step == 16:
            raise KeyboardInterrupt
        save(self, step)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_once)
    with pytest.raises(KeyboardInterrupt):
        train_on("run", *options)
    monkeypatch.undo()
    run = train_on("run", *options, "--resume")
    found, logged = scalars(run), lines(run / "log.jsonl")
    for name in ("loss", "cot_share", "lr", "seconds"):
        expected = {line["step"]: line[name] for line in logged if "loss" in line}
        assert list(expected) == list(range(1, 17))
        assert found[f"train/{name}"] == pytest.approx(expected, rel=1e-6)  # stored as float32
    expected = {line["step"]: line["valid"]["all"]["F1@1"] for line in logged if "valid" in line}
    assert len(expected) == 2 and found["valid/all/F1@1"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "given, told", [("--model x", "--train is missing"), ("--train x", "--model is missing")]
)
def test_a_model_and_its_posts_go_together(given, told):
    with pytest.raises(UserError, match=told):
        train.check_args(train.parse_args(given.split()))


def test_the_command_line(world, tmp_path):
    """A real process, of a family that libraries have words for: only our own are on the screen."""
    published.write(tmp_path / "model", "Qwen3.5-4B")
    files = ["--train", world / "train.jsonl", "--test", world / "test.jsonl"]
    sizes = "--epochs 0.5 --workers 1 --max-new-tokens 4 --model model --out run2"
    command = [sys.executable, ROOT / "train.py", *words(*files, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    ours = r"(test\.jsonl:)? *\d+%\||(loading|saving) \S+ …$| {11}\S"  # bars and words
    ours += r"|(Posts|Model|Device|Steps|Writes|Done|Last|Predict|Score|Curves) +\S"
    assert shown and not [line for line in shown if not re.match(ours, line)]
    assert "F1@1" in done.stdout
    assert "python infer.py" in done.stdout and "--model run2" in done.stdout
    assert "python -m tools.curves run2 --out run2/curves.png" in done.stderr
    assert len(lines(tmp_path / "run2" / "test_preds.jsonl")) == 12
    scores = json.loads((tmp_path / "run2" / "test_scores.json").read_text())
    assert math.isfinite(scores["all"]["F1@1"])
