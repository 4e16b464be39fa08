"""Adapters: what they train, what their folders hold, and that merging changes nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import infer
import train
from evaluate import UserError
from model import FAMILIES, DynamicCoT, adapter_of, add_adapter, load, merge
from test_processes import finished, launch
from tiny import batch_of, random_posts, tiny_model

ROOT = Path(__file__).parent.parent
GRIDS = [(4, 4), (2, 6), None, (6, 4)]


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="adapters need the optional package peft")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(run):
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "waited")}
        for line in lines(run / "log.jsonl")
    ]


def adapter_weights(run):
    return load_file(checkpoint.pointed_at(run / "last") / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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
    expected = DynamicCoT(base, "dynamic", 4.0)(batch_of(posts))
    for model in (adapted, with_vision):
        loss, plain_loss, _ = DynamicCoT(model, "dynamic", 4.0)(batch_of(posts))
        assert torch.equal(loss, expected[0]) and torch.equal(plain_loss, expected[1])
        loss.mean().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in name), name
            assert not ("lora_B" in name and not parameter.grad.any()), name
    layers = base.config.text_config.num_hidden_layers
    assert len(trained(adapted)) == layers * 7 * 2 and not any(
        "visual" in name for name in trained(adapted)
    )
    extra = trained(with_vision) - trained(adapted)
    assert len({name.split(".lora_")[0] for name in extra}) == sum(
        isinstance(module, torch.nn.Linear) for module in base.model.visual.blocks.modules()
    )


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
    for share_prompt, checkpointing in ((True, False), (False, False), (False, True)):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
        step = DynamicCoT(model, "dynamic", 4.0, share_prompt)
        step.zero_grad()
        loss = step(batch_of(posts))[0]
        loss.mean().backward()
        results.append(
            (loss, {name: p.grad.clone() for name, p in step.named_parameters() if p.requires_grad})
        )
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=1e-5)
        for name, gradient in gradients.items():
            assert (gradient - results[0][1][name]).norm() <= 2e-5 * gradient.norm(), name


OPTIONS = ["--lora", "8", "--lr", "2e-2", "--gamma", "5", "--save-every", "5"]


@pytest.fixture(scope="module")
def adapter_run(world, tmp_path_factory):
    pytest.importorskip("peft", reason="adapters need the optional package peft")
    out = tmp_path_factory.mktemp("runs") / "lora"
    args = train.settings(
        [
            "--train",
            str(world / "train.jsonl"),
            "--model",
            str(world / "toy"),
            "--out",
            str(out),
            "--epochs",
            "2",
            "--batch-size",
            "8",
            "--workers",
            "0",
            "--max-new-tokens",
            "16",
            *OPTIONS,
        ]
    )
    with checkpoint.Processes("cpu") as processes:
        train.train(args, processes)
    return out


def test_an_adapter_learns_and_its_folder_is_peft_s(peft, adapter_run, world):
    log = lines(adapter_run / "log.jsonl")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["cot_share"] > 0
    folder = checkpoint.pointed_at(adapter_run / "last")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((world / "toy").resolve())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (8, 16, "LORA")
    assert not list(folder.glob("model*.safetensors")) and (folder / "tokenizer.json").is_file()

    ours, encoder, _ = load(str(folder))
    base, _, _ = load(str(world / "toy"))
    assert not torch.equal(logits(ours, encoder), logits(base, encoder))
    theirs = peft.PeftModel.from_pretrained(base, folder)  # as any other program would read it
    assert torch.equal(logits(ours, encoder), logits(theirs, encoder))


def test_a_merged_model_predicts_as_its_adapter(peft, adapter_run, tmp_path, world, monkeypatch):
    arguments = ["--model", str(adapter_run), "--merge", str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()
    with pytest.raises(UserError, match="merged: is there already"):
        train.main()
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--model", str(world / "toy"), "--merge", str(tmp_path / "other")]
    )
    with pytest.raises(UserError, match="no adapter"):
        train.main()
    merged, encoder, _ = load(str(tmp_path / "merged"))
    ours, _, _ = load(str(checkpoint.pointed_at(adapter_run / "last")))
    source = load_file(world / "toy" / "model.safetensors")
    assert {
        name: t.shape for name, t in load_file(tmp_path / "merged" / "model.safetensors").items()
    } == {name: t.shape for name, t in source.items()}
    assert (logits(merged, encoder) - logits(ours, encoder)).abs().max() < 1e-4
    merge(ours)
    assert adapter_of(ours) is None and torch.equal(logits(merged, encoder), logits(ours, encoder))

    outputs = []
    for model in (adapter_run, tmp_path / "merged"):
        out = tmp_path / f"{model.name}.jsonl"
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "infer.py",
                "--data",
                str(world / "test.jsonl"),
                "--out",
                str(out),
                "--model",
                str(model),
                "--workers",
                "0",
                "--max-new-tokens",
                "16",
                "--device",
                "cpu",
            ],
        )
        assert infer.main() == 0
        outputs.append(out.read_text())
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 12


def test_a_stopped_adapter_run_resumes_to_the_same_weights(
    peft, train_on, adapter_run, monkeypatch
):
    monkeypatch.setattr(
        train.checkpoint, "prune", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        train_on("stopped", *OPTIONS)
    monkeypatch.undo()
    with pytest.raises(UserError, match="lora was 8, is 4"):
        train_on("stopped", *OPTIONS, "--lora", "4", "--resume")
    stopped = train_on("stopped", *OPTIONS, "--resume")
    assert same(adapter_weights(stopped), adapter_weights(adapter_run)) and timeless(
        stopped
    ) == timeless(adapter_run)


def test_an_adapter_is_trained_on_only_as_one(peft, train_on, adapter_run, world, tmp_path):
    with pytest.raises(UserError, match="--lora 8.*--merge"):
        train_on("full", "--model", adapter_run)
    more = train_on("more", "--model", adapter_run, "--lora", "8", "--lr", "1e-3", "--epochs", "1")
    assert lines(more / "log.jsonl")[0]["loss"] < 0.8 * lines(adapter_run / "log.jsonl")[0]["loss"]
    settings = json.loads(
        (checkpoint.pointed_at(more / "last") / "adapter_config.json").read_text()
    )
    assert settings["base_model_name_or_path"] == str((world / "toy").resolve())


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_an_adapter_as_one_does(peft, train_on, world, tmp_path, engine):
    options = [
        "--lora",
        "8",
        "--lr",
        "2e-3",
        "--gamma",
        "5",
        "--valid",
        world / "valid.jsonl",
        "--no-freeze-vision",
    ]
    alone = train_on("alone", *options)
    arguments = [
        "--train",
        world / "train.jsonl",
        "--model",
        world / "toy",
        "--out",
        tmp_path / "two",
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--max-new-tokens",
        "16",
        "--parallel",
        engine,
        *options,
    ]
    finished(launch(2, *arguments, script=ROOT / "train.py"))
    ours, theirs = lines(tmp_path / "two" / "log.jsonl"), lines(alone / "log.jsonl")
    for one, other in zip(ours, theirs, strict=True):
        if "loss" in one:
            assert (
                one["loss"] == pytest.approx(other["loss"], rel=1e-4)
                and one["cot_share"] == other["cot_share"]
            )
        else:
            assert one["valid"]["posts"] == other["valid"]["posts"] == 8
    saved, right = adapter_weights(tmp_path / "two"), adapter_weights(alone)
    assert {name: t.shape for name, t in saved.items()} == {
        name: t.shape for name, t in right.items()
    }
    assert all((saved[name] - right[name]).norm() <= 0.05 * right[name].norm() for name in right)


def test_mistakes_in_an_adapter_s_folder(peft, adapter_run, tmp_path, world):
    good = checkpoint.pointed_at(adapter_run / "last")

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(UserError) as caught:
            load(str(folder))
        return str(caught.value)

    def set_base(base):
        def change(folder):
            file = folder / "adapter_config.json"
            file.write_text(
                json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base})
            )

        return change

    assert "base_model_name_or_path is not to be had" in broken("lost", set_base("/nowhere/at/all"))
    assert "an adapter itself" in broken("twice", lambda folder: set_base(str(folder))(folder))
    assert "no adapter_model.safetensors" in broken(
        "empty", lambda folder: (folder / "adapter_model.safetensors").unlink()
    )
    assert "can't be loaded" in broken(
        "torn",
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (good / "adapter_model.safetensors").read_bytes()[:5000]
        ),
    )


def test_without_peft_one_line_says_what_to_install(world, tmp_path):
    """Always run: the import is blocked, whether the package is there or not."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "x"}'
    )
    for script, arguments in (
        (
            "train",
            [
                "--train",
                world / "train.jsonl",
                "--model",
                world / "toy",
                "--lora",
                8,
                "--out",
                tmp_path / "run",
            ],
        ),
        ("infer", ["none", "text", "--model", tmp_path / "adapter"]),
    ):
        code = f"import sys; sys.modules['peft'] = None; import {script}; from evaluate import run; run({script}.main)"
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].endswith(
            "pip install peft"
        ), done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
