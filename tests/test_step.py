"""The training step against things that are right for another reason."""

import contextlib
import copy
import importlib
import textwrap

import pytest
import torch

import train
from data import Targets, padded
from model import FAMILIES, TokenLoss
from tiny import ROOT, batch_of, lines, literal, random_posts, tiny_model, train_alone
from train import MODES, TrainingStep

GRIDS = [(4, 4), (2, 6), None, (6, 4), (2, 2), (4, 2)]


def gradients(step, batch):
    step.zero_grad()
    loss, plain_loss, use_cot = step(batch)
    loss.mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in step.named_parameters()}
    return loss.detach(), plain_loss, use_cot, found


def single_loss(model, post, answer):
    """transformers' own loss of one post alone: nothing padded, labels on the answer only."""
    ids = torch.tensor([post["prompt"] + answer])
    labels = ids.clone()
    labels[:, : len(post["prompt"])] = -100
    images = post["image"] or {}
    return model(input_ids=ids, labels=labels, mm_token_type_ids=(ids == 90).int(), **images).loss


@torch.no_grad()
def assert_chosen_losses(model, posts, losses, use_cot):
    """Compare a step's losses with transformers' own of the answers that it chose."""
    names = ["cot" if chosen else "plain" for chosen in use_cot]
    pairs = zip(posts, names, strict=True)
    expected = torch.stack([single_loss(model, post, post[name]) for post, name in pairs])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_model(family)


@pytest.fixture(scope="module")
def posts(family):
    return random_posts(family, GRIDS, without_cot=(4,))


@pytest.fixture(scope="module")
def median_gamma(model, posts):
    """A gamma between two samples' losses, so that about half of them go each way."""
    with torch.no_grad():
        losses = sorted(single_loss(model, post, post["plain"]).item() for post in posts)
    return (losses[2] + losses[3]) / 2


@pytest.mark.parametrize("mode", ["multitask", "dynamic"])  # the others have nothing to share
def test_the_shared_prompt_step_equals_the_literal_one(model, posts, median_gamma, mode):
    batch = batch_of(posts)
    step = TrainingStep(model, mode, median_gamma)
    shared = gradients(step, batch)
    with literal():
        apart = gradients(step, batch)
    torch.testing.assert_close(shared[0], apart[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(shared[1], apart[1], rtol=0, atol=1e-5)
    assert torch.equal(shared[2], apart[2])
    if mode == "dynamic":
        assert 0 < shared[2].sum() < len(posts)
    # How a mixture's products round depends on the CPU: up to 1.24e-5; the others, below 2e-6.
    close = 2e-5 if model.config.model_type == "qwen3_5_moe" else 1e-5
    for name, gradient in apart[3].items():
        assert gradient.norm() > 0, name
        assert (shared[3][name] - gradient).norm() <= close * gradient.norm(), name


def test_gamma_just_above_and_below_one_samples_loss(model, posts):
    batch = batch_of(posts)
    with torch.no_grad():
        plain_loss = TrainingStep(model, "sft")(batch)[0]
        for gamma, use_cot in ((plain_loss[1] + 1e-3, True), (plain_loss[1] - 1e-3, False)):
            assert bool(TrainingStep(model, "dynamic", float(gamma))(batch)[2][1]) is use_cot


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradient_are_those_of_the_loop_written_with_transformers_alone(
    model, posts, median_gamma, mode
):
    """As the paper writes it: probe without gradient, pick, then train on each answer alone."""
    literal, losses, choices = copy.deepcopy(model), [], []
    loss, _, use_cot, ours = gradients(TrainingStep(model, mode, median_gamma), batch_of(posts))
    for post, drawn in zip(posts, use_cot, strict=True):
        plain, cot = post["plain"], post["cot"] or post["plain"]
        with torch.no_grad():
            easy = single_loss(literal, post, plain) < median_gamma
        easy = drawn if mode == "dropout" else easy
        choices.append(bool(easy) and post["cot"] is not None)
        targets = {"sft": [plain], "cot": [cot], "multitask": [plain, cot]}
        targets = targets.get(mode, [cot if easy else plain])
        one = sum(single_loss(literal, post, target) for target in targets) / len(targets)
        (one / len(posts)).backward()
        losses.append(one.detach())
    torch.testing.assert_close(loss, torch.stack(losses), rtol=0, atol=1e-5)
    if mode == "dynamic":
        assert use_cot.tolist() == choices and 0 < sum(choices) < len(posts)
    close = 2e-5 if mode == "dynamic" else 5e-5  # Qwen3.5's vision tower rounds more in the others
    for name, parameter in literal.named_parameters():
        error = (ours[f"model.{name}"] - parameter.grad).norm()
        assert error <= close * parameter.grad.norm(), name


@pytest.mark.parametrize("mode", MODES)
def test_the_vision_tower_runs_once_a_step(model, posts, mode):
    """So does the language model where there is one answer; several answers follow one prompt."""
    calls = []
    towers = {"image": model.model.visual, "text": model.model.language_model}
    hooks = [
        tower.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, tower in towers.items()
    ]
    TrainingStep(model, mode, gamma=4.0)(batch_of(posts))
    for hook in hooks:
        hook.remove()
    passes = 3 if MODES[mode].shares_prompt else 1  # the prompt and two answers
    assert calls == ["image"] + ["text"] * passes


def test_logits_are_made_at_answer_tokens_only(model, posts):
    counts = []
    hook = model.lm_head.register_forward_hook(
        lambda module, args, output: counts.append(output.shape[0])
    )
    batch = batch_of(posts)
    _, _, use_cot = TrainingStep(model, "dynamic", gamma=4.0)(batch)
    hook.remove()
    assert counts == [batch.plain.mask.sum(), batch.cot.where(use_cot, batch.plain).mask.sum()]


@pytest.mark.parametrize("tokens", [0, 1, 7, 50])
@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_the_tokens_losses_are_those_of_cross_entropy(monkeypatch, tokens, at_once):
    """To the last bit, and so is the gradient, however the rows are split.

    The logits are overwritten, so that there is no second backward pass.
    """
    monkeypatch.setattr(TokenLoss, "AT_ONCE", at_once)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 33, bias=False)
    hidden, targets = 9 * torch.randn(tokens, 8), torch.randint(33, (tokens,))
    found = []
    for token_loss in (torch.nn.functional.cross_entropy, TokenLoss.apply):
        options = {"reduction": "none"} if token_loss is torch.nn.functional.cross_entropy else {}
        leaf = hidden.clone().requires_grad_()
        loss = token_loss(head(leaf), targets, **options)
        weighed = (loss * torch.arange(1, tokens + 1)).sum()
        found.append([loss, *torch.autograd.grad(weighed, [leaf, head.weight], retain_graph=True)])
    assert all(torch.equal(ours, theirs) for theirs, ours in zip(*found, strict=True))
    if tokens:
        with pytest.raises(RuntimeError, match="inplace operation"):
            weighed.backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [contextlib.nullcontext, literal])
def test_every_parameter_gets_a_gradient_under_bf16_autocast(model, posts, mode, context):
    """Autocast's copies of the weights, made in the probe under no_grad, must not be trained on."""
    step = TrainingStep(model, mode, gamma=4.0)
    step.zero_grad()
    with context(), torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = step(batch_of(posts))
    loss.mean().backward()
    for name, parameter in step.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_any_split_into_micro_batches_gives_the_same_update(family):
    grids = [(4, 4), None, (2, 6), (2, 2), (6, 4), None, (4, 2), (4, 4)]
    posts = random_posts(family, grids, seed=5)
    updates = []
    for size in (1, 2, 4, 8):
        model = tiny_model(family)
        step = TrainingStep(model, "dynamic", gamma=4.0)
        for start in range(0, 8, size):
            (step(batch_of(posts[start : start + size]))[0].sum() / 8).backward()
        # The gradient is the update of plain SGD, without the rounding of weights near 1.
        updates.append({name: p.grad for name, p in model.named_parameters()})
    for update in updates[1:]:
        for name, moved in update.items():
            first = updates[0][name]
            assert (moved - first).norm() <= 1e-4 * first.norm(), name


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_answers_of_one_token_need_no_kernel_of_generation(family, monkeypatch):
    """The fast kernel that reads one token at a time has no backward."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    monkeypatch.setattr(module, "torch_recurrent_gated_delta_rule", None)
    model, posts = tiny_model(family), random_posts(family, GRIDS, plain=(2, 2), cot=(2, 2))
    batch = batch_of(posts)
    batch.plain, batch.cot = (
        Targets(*padded([post[name] for post in posts], pad=0)) for name in ("plain", "cot")
    )
    for mode in MODES:
        loss, _, use_cot = TrainingStep(model, mode, gamma=5.0)(batch)
        loss.mean().backward()
    assert 0 < use_cot.sum() < len(posts)
    assert_chosen_losses(model, posts, loss, use_cot)


def test_a_batch_of_text_only_posts(model, family):
    posts = random_posts(family, [None, None, None])
    loss, _, use_cot = TrainingStep(model, "sft")(batch_of(posts))
    assert_chosen_losses(model, posts, loss, use_cot)


def test_one_more_mode_is_a_function_and_a_row(tmp_path, world, monkeypatch):
    """The settings, the step and the log know it."""
    family = "qwen2_5_vl"
    model, posts = tiny_model(family), random_posts(family, GRIDS, without_cot=(4,))

    def coin(step, batch):
        """Answers that reason for every second post."""
        use_cot = batch.has_cot & (torch.arange(len(batch)) % 2 == 0)
        target = batch.cot.where(use_cot, batch.plain)
        return train.answer_loss(step.model, batch.prompt, target), None, use_cot

    monkeypatch.setitem(MODES, "coin", train.Mode(coin, "either"))
    loss, _, use_cot = TrainingStep(model, "coin")(batch_of(posts))
    assert use_cot.tolist() == [True, False, True, False, False, False]  # the fifth post has no cot
    assert_chosen_losses(model, posts, loss, use_cot)
    shown = " ".join(train.make_parser().format_help().split())
    assert "coin: Answers that reason for every second post." in shown
    options = "--epochs 0.01 --batch-size 8 --micro-batch 8 --workers 0 --device cpu --mode coin"
    files = ["--model", world / "toy", "--train", world / "train.jsonl", "--out", tmp_path / "run"]
    train_alone(*files, options)
    (line,) = lines(tmp_path / "run" / "log.jsonl")
    assert line["cot_share"] == 0.5 and line["plain_loss"] is None


def test_the_mode_in_the_docs_is_the_opposite_of_dynamic(model, posts, median_gamma):
    """docs/contributing.md's recipe, as it stands there."""
    docs = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    recipe = docs.partition("for instance:\n\n")[2].partition("\n\n`dropout`")[0]
    names = vars(train) | {"MODES": {}}
    exec(textwrap.dedent(recipe), names)
    step, batch = TrainingStep(model, "dynamic", median_gamma), batch_of(posts)
    _, _, chosen = step(batch)
    step.mode = names["MODES"]["hard"]
    loss, _, use_cot = step(batch)
    assert torch.equal(use_cot, ~chosen & batch.has_cot) and use_cot.sum() > 0
    assert_chosen_losses(model, posts, loss, use_cot)
