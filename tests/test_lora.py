"""Adapters: what they train, what their folders hold, and that merging changes nothing."""

import contextlib
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save

import infer
import tools.merge
import train
from evaluate import UserError
from model import FAMILIES, load
from support import checkpoint
from support.adapters import adapter_config, add_adapter, merge_adapter, read_adapter
from test_processes import finished, launch
from test_resume import equal, timeless
from tiny import ROOT, batch_of, call, lines, literal, random_posts, tiny_model, train_alone, words
from train import TrainingStep

GRIDS = [(4, 4), (2, 6), None, (6, 4)]


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="adapters need the optional package peft")


def adapter_weights(run):
    return load_file(checkpoint.read_pointer(run / "last") / "adapter_model.safetensors")


def logits(model, encoder):
    ids = torch.tensor([encoder.prompt_ids("the foxes won again", 0)[0]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_predicts_as_the_base_and_trains_alone(peft, family):
    posts = random_posts(family, GRIDS)
    base, adapted, with_vision = (tiny_model(family) for _ in range(3))
    add_adapter(adapted, 4, "base")
    add_adapter(with_vision, 4, "base", vision=True)
    expected = TrainingStep(base, "dynamic", 4.0)(batch_of(posts))
    for model in (adapted, with_vision):
        loss, plain_loss, _ = TrainingStep(model, "dynamic", 4.0)(batch_of(posts))
        assert torch.equal(loss, expected[0]) and torch.equal(plain_loss, expected[1])
        loss.mean().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in name), name
            assert not ("lora_B" in name and not parameter.grad.any()), name
    extra = trained(with_vision) - trained(adapted)
    for part, names in (("language_model.layers", trained(adapted)), ("visual.blocks", extra)):
        linear = {name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
        linear = {name for name in linear if name.startswith(f"model.{part}.")}
        linear -= {name for name in linear if name.endswith("shared_expert_gate")}
        assert {name.partition(".lora_")[0] for name in names} == linear
        assert len(names) == 2 * len(linear) > 0
    assert not any("visual" in name for name in trained(adapted))


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_and_literal_steps_agree_and_checkpointing_changes_nothing(peft, family):
    posts, results = random_posts(family, GRIDS), []
    model = tiny_model(family)
    torch.manual_seed(1)
    add_adapter(model, 4, "base", vision=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.train()
    step = TrainingStep(model, "dynamic", 4.0)
    for kind in ("shared", "literal", "checkpointing"):
        if kind == "checkpointing":
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
        step.zero_grad()
        with literal() if kind == "literal" else contextlib.nullcontext():
            loss = step(batch_of(posts))[0]
        loss.mean().backward()
        of_trained = [(name, p) for name, p in step.named_parameters() if p.requires_grad]
        results.append((loss, {name: p.grad.clone() for name, p in of_trained}))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=1e-5)
        for name, gradient in gradients.items():
            assert (gradient - results[0][1][name]).norm() <= 2e-5 * gradient.norm(), name


SIZES = "--epochs 2 --batch-size 8 --workers 0 --max-new-tokens 16"
OPTIONS = "--lora 8 --lr 1e-2 --gamma 5 --save-every 5"


@pytest.fixture(scope="module")
def adapter_run(world, tmp_path_factory):
    pytest.importorskip("peft", reason="adapters need the optional package peft")
    out = tmp_path_factory.mktemp("runs") / "lora"
    files = ["--train", world / "train.jsonl", "--model", world / "toy", "--out", out]
    train_alone(*files, SIZES, OPTIONS, "--device cpu")
    return out


def test_an_adapter_learns_and_its_folder_is_peft_s(peft, adapter_run, world):
    log = lines(adapter_run / "log.jsonl")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["cot_share"] > 0
    folder = checkpoint.read_pointer(adapter_run / "last")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((world / "toy").resolve())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (8, 16, "LORA")
    assert not list(folder.glob("model*.safetensors")) and (folder / "tokenizer.json").is_file()

    ours, encoder, _ = load(str(folder))
    base, _, _ = load(str(world / "toy"))
    assert not torch.equal(logits(ours, encoder), logits(base, encoder))
    theirs = peft.PeftModel.from_pretrained(base, folder)  # as any other program would read it
    assert torch.equal(logits(ours, encoder), logits(theirs, encoder))


def test_a_merged_model_is_its_adapter(peft, adapter_run, tmp_path, world, monkeypatch, capsys):
    call(monkeypatch, tools.merge, adapter_run, tmp_path / "merged")
    printed = capsys.readouterr()
    assert printed.out == "" and "merged: the merged model, in float32" in printed.err
    for model, out, told in (
        (adapter_run, "merged", "merged: is there already"),
        (world / "toy", "other", "no adapter"),
    ):
        with pytest.raises(UserError, match=told):
            call(monkeypatch, tools.merge, model, tmp_path / out)
    merged, encoder, _ = load(str(tmp_path / "merged"))
    ours, _, _ = load(str(checkpoint.read_pointer(adapter_run / "last")))
    shapes = [
        {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
        for folder in (world / "toy", tmp_path / "merged")
    ]
    assert shapes[0] == shapes[1]
    assert (logits(merged, encoder) - logits(ours, encoder)).abs().max() < 1e-4
    merge_adapter(ours)
    assert adapter_config(ours) is None
    assert torch.equal(logits(merged, encoder), logits(ours, encoder))

    outputs = []
    for model in (adapter_run, tmp_path / "merged"):
        out = tmp_path / f"{model.name}.jsonl"
        files = ["--data", world / "test.jsonl", "--out", out, "--model", model]
        arguments = words(*files, "--workers 0 --max-new-tokens 16 --device cpu")
        assert call(monkeypatch, infer, *arguments) == 0
        outputs.append(out.read_text())
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 12


def test_a_stopped_adapter_run_resumes_to_equal_weights(peft, train_on, adapter_run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "prune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_on("stopped", OPTIONS)
    monkeypatch.undo()
    with pytest.raises(UserError, match="lora was 8, is 4"):
        train_on("stopped", OPTIONS, "--lora 4 --resume")
    stopped = train_on("stopped", OPTIONS, "--resume")
    assert equal(adapter_weights(stopped), adapter_weights(adapter_run))
    assert timeless(stopped) == timeless(adapter_run)


def test_an_adapter_is_trained_on_only_as_one(peft, train_on, adapter_run, world, tmp_path):
    with pytest.raises(UserError, match="--lora 8.*tools.merge"):
        train_on("full", "--model", adapter_run)
    more = train_on("more", "--lora 8 --lr 1e-3 --epochs 1 --model", adapter_run)
    assert lines(more / "log.jsonl")[0]["loss"] < 0.8 * lines(adapter_run / "log.jsonl")[0]["loss"]
    folder = checkpoint.read_pointer(more / "last")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((world / "toy").resolve())


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_an_adapter_as_one_does(peft, train_on, world, tmp_path, engine):
    options = ["--lora 8 --lr 2e-3 --gamma 5 --no-freeze-vision --valid", world / "valid.jsonl"]
    alone = train_on("alone", *options)
    files = ["--train", world / "train.jsonl", "--model", world / "toy", "--out", tmp_path / "two"]
    arguments = [*files, SIZES, "--parallel", engine, *options]
    finished(launch(2, *arguments, script=ROOT / "train.py"))
    ours, theirs = lines(tmp_path / "two" / "log.jsonl"), lines(alone / "log.jsonl")
    for one, other in zip(ours, theirs, strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one["cot_share"] == other["cot_share"]
        else:
            assert one["valid"]["posts"] == other["valid"]["posts"] == 8
    saved, right = adapter_weights(tmp_path / "two"), adapter_weights(alone)
    shapes = [{name: t.shape for name, t in found.items()} for found in (saved, right)]
    assert shapes[0] == shapes[1]
    assert all((saved[name] - right[name]).norm() <= 0.05 * right[name].norm() for name in right)


def test_mistakes_in_an_adapter_s_folder(peft, adapter_run, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint.read_pointer(adapter_run / "last"), folder)
    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole, saved = weights.read_bytes(), load_file(weights)
    changed = {name.replace("layers.0.", "layers.9."): x for name, x in saved.items()}
    for broken in (whole[:5000], save(changed)):
        weights.write_bytes(broken)
        with pytest.raises(UserError, match="its adapter: can't be read"):
            load(str(folder))
    weights.write_bytes(whole)
    for base, told in (
        ("/nowhere/at/all", "/nowhere/at/all: no model"),
        (folder, "adapter itself"),
    ):
        changed = json.loads(settings.read_text()) | {"base_model_name_or_path": str(base)}
        settings.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=told):
            load(str(folder))


def test_without_a_package_one_line_says_what_to_install(world, tmp_path, monkeypatch):
    """Always run: the imports are blocked, whether the packages are there or not."""
    (tmp_path / "adapter").mkdir()
    settings = '{"peft_type": "LORA", "base_model_name_or_path": "x"}'
    (tmp_path / "adapter" / "adapter_config.json").write_text(settings)
    for module in ("peft", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    files = ["--train", world / "train.jsonl", "--model", world / "toy", "--out", tmp_path / "run"]
    for script, options in (
        (train, [*files, "--lora 8"]),
        (infer, ["none text --model", tmp_path / "adapter"]),
        (train, [*files, "--tensorboard"]),
    ):
        package = "tensorboard" if "--tensorboard" in options else "peft"
        with pytest.raises(UserError, match=f"pip install {package}$"):
            call(monkeypatch, script, *words(*options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_parameters": ["x"]},
        {"trainable_token_indices": [1]},
        {"peft_type": "IA3"},
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(tmp_path, change):
    config = {"peft_type": "LORA", "base_model_name_or_path": "base"} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="must be a LoRA adapter with a base"):
        checkpoint.base_of(tmp_path)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_of_a_tied_tensor_is_refused(peft, tmp_path, name):
    """Merged, it would change the embedding and the head at once."""
    config = peft.LoraConfig(r=2, target_modules=[name], base_model_name_or_path="base")
    peft.get_peft_model(tiny_model("qwen2_5_vl"), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lm_head or embed_tokens, which are tied"):
        read_adapter(tmp_path, tiny_model("qwen2_5_vl"))
