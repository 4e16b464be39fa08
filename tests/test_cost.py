"""The FLOPs of tools/cost.py against PyTorch's own counter."""

import argparse

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import read_prompt
from tiny import batch_of, literal, random_posts, tiny_model
from tools.cost import Flops, Lengths
from train import MODES, TrainingStep

GRID, POSTS = (16, 16), 2
TEXT, PLAIN, COT = 36, 9, 40
LENGTHS = Lengths(TEXT, GRID[0] * GRID[1] // 4, PLAIN, COT)
PASSES = {  # tokens of an answer, and how often they are computed, backward passes included
    "sft": [(PLAIN, 3)],
    "cot": [(COT, 3)],
    "multitask": [(PLAIN, 3), (COT, 3)],
    "dynamic": [(PLAIN, 1), (COT, 3)],
}
# A step of dynamic in which every post reasons: the prompt's pass, then those of the answers.
SHARED = [(LENGTHS.prompt, 3), *((length - 1, times) for length, times in PASSES["dynamic"])]


def counted(model, mode, gamma=torch.inf):
    """PyTorch's count of a step; attention as the plain products that it counts on a CPU, too."""
    step, batch = TrainingStep(model, mode, gamma), batch_for(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(batch)[0].sum().backward()
    return counter.get_total_flops() / POSTS


def above_the_diagonal(model, *passes):
    """What causal masks hide: the counter has the whole square of (new tokens, times computed)."""
    c = model.config.text_config
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // 4)
    return 4 * width * c.num_hidden_layers * sum(new**2 / 2 * times for new, times in passes)


def batch_for(model):
    lengths = {"text": (TEXT - 4,) * 2, "plain": (PLAIN,) * 2, "cot": (COT,) * 2}
    return batch_of(random_posts(model.config.model_type, [GRID] * POSTS, **lengths))


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def model(request):
    return tiny_model(request.param, tied=False)


@pytest.mark.parametrize("mode", PASSES)
def test_a_training_step_in_each_mode(model, mode):
    passes = PASSES[mode]
    known = [(LENGTHS.prompt, 3), *((length - 1, times) for length, times in passes)]
    if not MODES[mode].shares_prompt:  # one pass for prompt and answer
        known = [(LENGTHS.prompt + length - 1, times) for length, times in passes]
    expected = Flops(model).training(LENGTHS, mode) + above_the_diagonal(model, *known)
    assert counted(model, mode) == pytest.approx(expected, rel=1e-9)


def test_samples_that_keep_the_plain_answer(model):
    """None of two samples reasons, then one: its neighbour is padded, which the formula omits."""
    flops = Flops(model)
    expected = flops.training(LENGTHS, "dynamic", 0)
    expected += above_the_diagonal(model, (LENGTHS.prompt, 3), (PLAIN - 1, 4))
    assert counted(model, "dynamic", 0) == pytest.approx(expected, rel=1e-9)
    between = TrainingStep(model, "dynamic", 0)(batch_for(model))[1].mean().item()
    padding = flops.answer(LENGTHS.prompt, COT) - flops.answer(LENGTHS.prompt, PLAIN)
    expected = flops.training(LENGTHS, "dynamic", 0.5) + 0.5 * 3 * padding[:2].sum()
    expected += above_the_diagonal(model, *SHARED)
    assert counted(model, "dynamic", between) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mode", PASSES)
def test_gradient_checkpointing(mode):
    """The literal step; a trained pass is computed once more, but for each block's last product."""
    model, settings = tiny_model("qwen2_5_vl", tied=False).train(), {"use_reentrant": False}
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(settings)
    with literal():
        found = counted(model, mode)
    known = [(LENGTHS.prompt + length - 1, times + times // 3) for length, times in PASSES[mode]]
    args = argparse.Namespace(gradient_checkpointing=True)
    expected = Flops(model).training(LENGTHS, mode, args=args) + above_the_diagonal(model, *known)
    assert found == pytest.approx(expected, rel=0.05)


def test_a_frozen_vision_tower(model):
    model.model.visual.requires_grad_(False)
    found = counted(model, "dynamic")
    model.model.visual.requires_grad_(True)
    args = argparse.Namespace(freeze_vision=True)
    expected = Flops(model).training(LENGTHS, "dynamic", args=args)
    assert found == pytest.approx(expected + above_the_diagonal(model, *SHARED), rel=1e-9)


@pytest.mark.parametrize("vision", [False, True])
def test_an_adapter(vision):
    pytest.importorskip("peft", reason="adapters need the optional package peft")
    from support.adapters import add_adapter

    model = tiny_model("qwen2_5_vl", tied=False)
    args = argparse.Namespace(lora=1, freeze_vision=not vision)
    expected = Flops(model).training(LENGTHS, "dynamic", args=args)
    expected += above_the_diagonal(model, *SHARED)
    add_adapter(model, 1, "base", vision)
    assert counted(model, "dynamic") == pytest.approx(expected, rel=0.05)


def test_inference(model):
    """A prompt, then tokens one by one."""
    batch, tokens = batch_for(model), 5
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        prompt = read_prompt(model.eval(), batch.prompt)
        model.lm_head(prompt.last_hidden)
        for index in range(tokens - 1):
            ids = batch.plain.ids[:, index : index + 1]
            mask = torch.ones(POSTS, round(LENGTHS.prompt) + index + 1)
            output = model.model(
                input_ids=ids, attention_mask=mask, past_key_values=prompt.cache, use_cache=True
            )
            model.lm_head(output.last_hidden_state)
    hidden = above_the_diagonal(model, (LENGTHS.prompt, 1), *[(1, 1)] * (tokens - 1))
    expected = sum(Flops(model).inference(LENGTHS, tokens)) + hidden
    assert counter.get_total_flops() == pytest.approx(POSTS * expected, rel=0.01)
