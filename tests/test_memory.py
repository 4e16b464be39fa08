"""tools/memory.py's estimate against what a step takes, and the sizes of the real models."""

import functools
import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch

import bench_memory
import published
from evaluate import UserError
from model import TokenLoss
from support.console import read_json
from tiny import ROOT, call, words
from tools import memory
from tools.memory import count_parameters
from train import MODES, Mode

SEVEN = "Qwen/Qwen2.5-VL-7B-Instruct"
PEFT = importlib.util.find_spec("peft") is not None
MEASURED = {"wide": (0, 1, 2, 3), "wordy": (0, 4), "long": (0, 2, 3, 4, 6, 7, 9)}  # of CASES
LORA = 7  # the first of CASES with an adapter


def test_the_estimate_is_within_a_tenth_of_the_measured_peak():
    """In a process of its own, so that nothing else is counted. An adapter's cases need peft.

    TokenLoss takes fewer logits at once: like a real model, a small one then has many times more.
    """
    code = """
import bench_memory, json, model, sys
model.TokenLoss.AT_ONCE = 2**16
for shape, cases in json.loads(sys.argv[1]).items():
    for result in bench_memory.compare([shape], cases):
        print(json.dumps(result))
"""
    cases = {
        shape: [bench_memory.CASES[case] for case in some if PEFT or case < LORA]
        for shape, some in MEASURED.items()
    }
    command = [sys.executable, "-c", code, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == sum(map(len, cases.values()))
    for result in results:
        assert result["estimated"] == pytest.approx(result["measured"], rel=0.1), result


def test_the_losses_hold_one_copy_of_the_logits(monkeypatch):
    """With their gradient; cross_entropy holds three. The layer before them is small."""
    monkeypatch.setattr(TokenLoss, "AT_ONCE", 1000)
    head, hidden = torch.nn.Linear(4, 500, bias=False), torch.randn(200, 4)
    targets = torch.randint(500, (200,))
    cross_entropy = functools.partial(torch.nn.functional.cross_entropy, reduction="sum")
    for token_loss, copies in ((TokenLoss.apply, 1.1), (cross_entropy, 3.1)):
        with bench_memory.Live() as live:
            token_loss(head(hidden), targets).sum().backward()
        assert copies - 0.1 <= live.peak / (4 * 200 * 500) <= copies, token_loss


@functools.cache
def real(name):
    return memory.read_model(name)[0]


# As the hub shows them; Qwen3.5's include a layer that predicts a second token, which isn't loaded.
PUBLISHED = """
    Qwen2-VL-2B-Instruct     2208985600    Qwen2-VL-7B-Instruct     8291375616
    Qwen2.5-VL-3B-Instruct   3754622976    Qwen2.5-VL-7B-Instruct   8292166656
    Qwen2.5-VL-32B-Instruct 33452718336    Qwen2.5-VL-72B-Instruct         73B
    Qwen3-VL-2B-Instruct     2127532032    Qwen3-VL-4B-Instruct     4437815808
    Qwen3-VL-8B-Instruct     8767123696    Qwen3-VL-32B-Instruct   33357390064
    Qwen3.5-0.8B              873438784    Qwen3.5-2B               2274069824
    Qwen3.5-4B               4659865088    Qwen3.5-9B               9653104368
""".split()
PUBLISHED = dict(zip(PUBLISHED[::2], PUBLISHED[1::2], strict=True))


def second_token_layer(config):
    """Parameters of a layer that predicts a second token, by hand."""
    hidden, head = config.hidden_size, config.head_dim
    attention = (3 * config.num_attention_heads + 2 * config.num_key_value_heads) * head * hidden
    mlp = 3 * hidden * config.intermediate_size
    return 2 * hidden**2 + attention + 2 * head + mlp + 5 * hidden


def test_every_known_shape_has_the_published_number_of_parameters():
    assert {f"Qwen/{name}" for name in PUBLISHED} == {*read_json(memory.SHAPES)["models"]}
    for name, published_count in PUBLISHED.items():
        model = real(f"Qwen/{name}")
        count = count_parameters(model).total
        if "3.5" in name:
            count += second_token_layer(model.config.text_config)
        rounded = published_count.endswith("B")
        assert (f"{count / 1e9:.0f}B" if rounded else str(count)) == published_count, name


def test_an_adapter_s_parameters_are_counted():
    hidden, mlp, kv, rank = 3584, 18944, 512, 16
    adapter = rank * 28 * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + mlp))
    size, trained, *_ = count_parameters(real(SEVEN), 16, True)
    assert trained == adapter and size == 8292166656 + adapter


def bytes_of(model, flags=""):
    args = memory.parse_args(flags.split())
    return {part: gib * 2**30 for part, gib in memory.estimate(model, args, 80).items()}


def test_what_each_setting_does_to_the_real_model():
    model = real(SEVEN)
    plain = bytes_of(model)
    assert plain["weights"] == plain["gradients"] == plain["optimizer"] / 2 == 4 * 8292166656
    eight = bytes_of(model, "--gpus 8 --batch-size 256 --parallel fsdp")
    assert eight["weights"] == plain["weights"] / 8 and eight["optimizer"] == plain["optimizer"] / 8
    lora = bytes_of(model, "--lora 16")
    assert lora["weights"] < 1.03 * plain["weights"] / 2
    assert lora["optimizer"] < plain["optimizer"] / 100
    for less in ("--gradient-checkpointing", "--freeze-vision", "--batch-size 4"):
        assert bytes_of(model, less)["peak"] < plain["peak"]
    half = bytes_of(model, "--micro-batch 2")
    assert half["activations"] == pytest.approx(plain["activations"] / 2)


def test_the_rows_of_the_docs_table():
    table = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\d) \| `(.+)` \| ([\d.]+) \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) == 17
    names = {"3B": "Qwen2.5-VL-3B-Instruct", "7B": "Qwen2.5-VL-7B-Instruct"}
    for name, gpus, flags, gib, needed in rows:
        args = memory.parse_args([*flags.split(), "--gpus", gpus])
        peak = memory.estimate(real(f"Qwen/{names.get(name, name)}"), args, 80)["peak"]
        fits = [f"{card} GiB" for card in memory.CARDS if peak <= memory.USABLE * card]
        assert (f"{peak:.1f}", [*fits, "not one GPU"][0]) == (gib, needed)


def shown(monkeypatch, capsys, *options):
    call(monkeypatch, memory, *words(*options))
    return capsys.readouterr().out


def test_the_command(tmp_path, monkeypatch, capsys):
    """From a config alone: there are no weights in the folder."""
    real(SEVEN).config.save_pretrained(tmp_path)
    whole = shown(monkeypatch, capsys, "--model", tmp_path, "--train x")
    assert "8.292 billion parameters, 8.292 billion of them trained" in whole
    assert whole.splitlines()[-1].split() == ["fits", *["no"] * 5]
    # --train is not needed, and changes nothing; no folder, no network.
    assert shown(monkeypatch, capsys, "--model", SEVEN) == whole.replace(str(tmp_path), SEVEN)
    lora = shown(monkeypatch, capsys, "--model", tmp_path, "--lora 16 --gradient-checkpointing")
    assert lora.splitlines()[-1].split() == ["fits", "no", *["yes"] * 4]
    with pytest.raises(UserError, match="--model is missing"):
        shown(monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["Qwen3.5-4B", "Qwen3.5-35B-A3B"])
def test_the_command_says_what_it_does_not_know_of_qwen3_5(kind, tmp_path, monkeypatch, capsys):
    published.write(tmp_path / kind, kind)
    *_, fits, _, note = shown(monkeypatch, capsys, "--model", tmp_path / kind).splitlines()
    assert "three times as much" in note and fits.split() == ["fits", *["yes"] * 5]


def test_modes_that_read_one_answer_keep_no_cache_of_the_prompt(monkeypatch):
    monkeypatch.setitem(MODES, "coin", Mode(MODES["sft"].losses, "either"))
    model = real("Qwen/Qwen2.5-VL-3B-Instruct")
    needs = {mode: bytes_of(model, f"--mode {mode}") for mode in MODES}
    assert needs["sft"] == needs["cot"] == needs["coin"]
    assert needs["multitask"] == needs["dynamic"]
    # 36 layers of 4 prompts: keys and values (256 each) in float32 and bf16, those of 16 heads in
    # bf16; less the 160 columns of each answer's scores that a prompt of 672 tokens has masked.
    shared = 36 * 4 * (672 * (256 * (4 + 2) + 2 * 2 * 2048) - 2 * 672 * 160)
    assert needs["dynamic"]["activations"] - needs["sft"]["activations"] == pytest.approx(shared)


def test_shards_are_estimated_where_auto_would_shard():
    args = memory.parse_args(["--gpus", "8"])
    ddp, fsdp = (memory.estimate(real("Qwen/Qwen2.5-VL-3B-Instruct"), args, gb) for gb in (141, 80))
    assert ddp["weights"] == pytest.approx(8 * fsdp["weights"])
