"""What keeps a GPU busy: the vision tower in few calls, positions that come with the batch."""

import argparse
import pickle
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers

import bench_step
import support.vision
from data import EncodedPosts, Posts, collate
from model import FAMILIES, empty_model, load, rope_positions
from support.checkpoint import read_pointer
from support.console import read_json
from support.vision import pack_images
from tiny import batch_of, generate, literal, random_posts, tiny_model
from train import TrainingStep

GRIDS = [(4, 4), (2, 6), None, (10, 6), (2, 2), (4, 10), (4, 4)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def posts(family):
    return random_posts(family, GRIDS)


def losses_and_gradients(model, batch):
    losses = TrainingStep(model, "dynamic", gamma=4.0)(batch)[0]
    losses.mean().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_windows_of_one_length_in_one_call_equal_one_by_one(family, posts, monkeypatch):
    own, packed = tiny_model(family), pack_images(tiny_model(family))
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []

    def count(*args, **options):
        calls.append(options)
        return attend(*args, **options)

    for module in (torch.nn.functional, support.vision):
        monkeypatch.setattr(module, "scaled_dot_product_attention", count)
    batch, numbers, found = batch_of(posts), [], []
    images = {name: batch.prompt[name] for name in ("pixel_values", "image_grid_thw")}
    for model in (own, packed):
        calls.clear()
        with torch.no_grad():
            model.model.get_image_features(**images)
        numbers.append(len(calls))
        found.append(losses_and_gradients(model, batch))
    (own_losses, own_gradients), (losses, gradients) = found
    lengths = {"qwen2_5_vl": 3 + 5}.get(family, 5 * len(packed.model.visual.blocks))
    assert numbers[1] == lengths < numbers[0]
    assert torch.equal(losses, own_losses)
    for name, gradient in own_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_a_checkpoint_says_nothing_of_it(world, train_on):
    """Its config.json is that of a model of transformers alone, where it attends with sdpa."""
    run = train_on("run", "--epochs 0.1")
    folder = read_pointer(run / "last")
    own = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert read_json(folder / "config.json") == read_json(world / "toy" / "config.json")
    assert own.model.visual.config._attn_implementation == "sdpa"
    model, encoder, _ = load(str(run))
    for part in (model, empty_model(model.config)):
        assert part.model.visual.config._attn_implementation == "flash_by_length"
        assert part.model.language_model.config._attn_implementation == "sdpa"
    assert len(pickle.dumps(encoder.rope_index)) < 10_000  # without the weights


def test_positions_come_with_the_batch(world):
    """They are those that the model computes, and are given to it; so it computes none."""
    model, encoder, _ = load(str(world / "toy"))
    posts = EncodedPosts(Posts(world / "train.jsonl"), encoder, with_answers=True)
    batch = collate([posts[index] for index in range(6)], encoder)
    inputs = dict(batch.prompt)
    positions = inputs.pop("position_ids")
    assert torch.equal(positions, rope_positions(model, inputs))
    expected = TrainingStep(model)(replace(batch, prompt=inputs))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "get_rope_index", None)
        for context in (nullcontext, literal):
            with context():
                loss = TrainingStep(model)(batch)[0]
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
        for think in ("auto", "always"):
            assert generate(model, encoder, batch, think, 3)


def test_a_step_asks_for_no_more_operations_than_before():
    """And waits for no more values; `bench_step.py --count` has the figures of real depths."""
    args = argparse.Namespace(posts=2, image=64, prompt=80, plain=8, cot=20, cot_share=0.5)
    counts = bench_step.count(argparse.Namespace(**vars(args), layers=2, device="cpu"), "3b")
    most = {"sft": (1400, 750, 7), "dynamic": (2250, 1300, 7)}
    for mode, bounds in most.items():
        pairs = zip(counts[mode].values(), bounds, strict=True)
        assert all(0.8 * bound < number <= bound for number, bound in pairs), counts[mode]
