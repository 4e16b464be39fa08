"""The FLOPs of tools/cost.py against PyTorch's own counter."""

import argparse

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import MODES, DynamicCoT
from tiny import batch_of, random_posts, tiny_model
from tools.cost import Flops, Lengths

GRID, POSTS = (16, 16), 2
TEXT, PLAIN, COT = 36, 9, 40


def counted(run):
    """PyTorch's count; attention as the plain products that it counts on a CPU, too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def above_the_diagonal(model, *passes):
    """What causal masks hide: the counter has the whole square of (new tokens, times computed)."""
    c = model.config.text_config
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // 4)
    return 4 * width * c.num_hidden_layers * sum(new**2 / 2 * times for new, times in passes)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def model(request):
    return tiny_model(request.param, tied=False)


def batch_for(model):
    lengths = {"text": (TEXT - 4,) * 2, "plain": (PLAIN,) * 2, "cot": (COT,) * 2}
    return batch_of(random_posts(model.config.model_type, [GRID] * POSTS, **lengths))


LENGTHS = Lengths(TEXT, GRID[0] * GRID[1] // 4, PLAIN, COT)
PASSES = {  # tokens of an answer, and how often they are computed, backward passes included
    "sft": [(PLAIN, 3)],
    "cot": [(COT, 3)],
    "multitask": [(PLAIN, 3), (COT, 3)],
    "dynamic": [(PLAIN, 1), (COT, 3)],
}


@pytest.mark.parametrize("mode", MODES)
def test_a_training_step_in_each_mode(model, mode):
    step, batch = DynamicCoT(model, mode, torch.inf), batch_for(model)
    found = counted(lambda: step(batch)[0].sum().backward())
    passes = [(length - 1, times) for length, times in PASSES[mode]]
    if step.share_prompt:
        passes.append((LENGTHS.prompt, 3))
    else:  # one pass for prompt and answer
        passes = [(LENGTHS.prompt + length, times) for length, times in passes]
    hidden = above_the_diagonal(model, *passes)
    expected = POSTS * (Flops(model).training(LENGTHS, mode) + hidden)
    assert found == pytest.approx(expected, rel=1e-9)


def test_samples_that_keep_the_plain_answer(model):
    """No, one and all of two samples reason; no answer is padded to the other kind's length."""
    flops, batch = Flops(model), batch_for(model)
    between = DynamicCoT(model, "dynamic", 0)(batch)[1].mean().item()
    for gamma, share in ((0, 0), (between, 0.5), (torch.inf, 1)):
        found = counted(lambda g=gamma: DynamicCoT(model, "dynamic", g)(batch)[0].sum().backward())
        passes = (LENGTHS.prompt, 3), (PLAIN - 1, 4 - 3 * share), (COT - 1, 3 * share)
        expected = flops.training(LENGTHS, "dynamic", share) + above_the_diagonal(model, *passes)
        assert found == pytest.approx(POSTS * expected, rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing(mode):
    """The literal step; a trained pass is computed once more, but for each block's last product."""
    model, settings = tiny_model("qwen2_5_vl", tied=False).train(), {"use_reentrant": False}
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(settings)
    step, batch = DynamicCoT(model, mode, torch.inf, share_prompt=False), batch_for(model)
    found = counted(lambda: step(batch)[0].sum().backward())
    passes = [(LENGTHS.prompt + length - 1, times + times // 3) for length, times in PASSES[mode]]
    args = argparse.Namespace(gradient_checkpointing=True)
    expected = Flops(model).training(LENGTHS, mode, args=args) + above_the_diagonal(model, *passes)
    assert found == pytest.approx(POSTS * expected, rel=0.05)


def test_frozen_parts(model):
    step, batch = DynamicCoT(model, "dynamic", torch.inf), batch_for(model)
    model.model.visual.requires_grad_(False)
    try:
        found = counted(lambda: step(batch)[0].sum().backward())
    finally:
        model.model.visual.requires_grad_(True)
    hidden = above_the_diagonal(model, (LENGTHS.prompt, 3), (PLAIN - 1, 1), (COT - 1, 3))
    expected = Flops(model).training(LENGTHS, "dynamic", args=argparse.Namespace(freeze_vision=1))
    assert found == pytest.approx(POSTS * (expected + hidden), rel=1e-9)


def test_an_adapter():
    pytest.importorskip("peft", reason="adapters need the optional package peft")
    from support.adapters import add_adapter

    model = tiny_model("qwen2_5_vl", tied=False)
    flops = Flops(model)
    add_adapter(model, 1, "base", vision=False)
    step, batch = DynamicCoT(model, "dynamic", torch.inf), batch_for(model)
    found = counted(lambda: step(batch)[0].sum().backward())
    hidden = above_the_diagonal(model, (LENGTHS.prompt, 3), (PLAIN - 1, 1), (COT - 1, 3))
    args = argparse.Namespace(lora=1, freeze_vision=True)
    expected = flops.training(LENGTHS, "dynamic", args=args)
    assert found == pytest.approx(POSTS * (expected + hidden), rel=0.05)


def test_inference(model):
    """A prompt, then tokens one by one."""
    batch, tokens = batch_for(model), 5

    def run():
        step = DynamicCoT(model.eval())
        prompt = step.encode_prompt(batch.prompt)
        model.lm_head(prompt.last_hidden)
        for index in range(tokens - 1):
            ids = batch.plain.ids[:, index : index + 1]
            mask = torch.ones(POSTS, round(LENGTHS.prompt) + index + 1)
            output = model.model(
                input_ids=ids, attention_mask=mask, past_key_values=prompt.cache, use_cache=True
            )
            model.lm_head(output.last_hidden_state)

    with torch.no_grad():
        found = counted(run)
    hidden = above_the_diagonal(model, (LENGTHS.prompt, 1), *[(1, 1)] * (tokens - 1))
    expected = sum(Flops(model).inference(LENGTHS, tokens)) + hidden
    assert found == pytest.approx(POSTS * expected, rel=0.01)
