"""Continuous batching against transformers' own greedy generation, token for token."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LogitsProcessor, PreTrainedTokenizerFast

import model as model_file
from model import FAMILIES, write_answers
from tiny import VOCABULARY, batch_of, random_posts, tiny_model

GRIDS = [(4, 4), None, (2, 6), (6, 4)] + [None] * 3 + [(2, 2), (4, 2), (8, 4), None, (4, 4), (2, 2)]
SIZES = [4, 3, 4, 1, 1]  # posts of each batch; the second has no image
LIMIT, END = 14, 88  # tokens of an answer at most, one that ends it
OTHER_ENDS = [3, 11, 24, 31, 47, 62, 75, 80]
# How an answer begins, whether a token is banned there; by what is asked for and by the template.
STARTS = {
    ("auto", "plain"): ([], False),
    ("always", "plain"): ([5, 6, 7], False),
    ("never", "plain"): ([], True),
    ("always", "opens <think>"): ([], True),
    ("never", "opens <think>"): ([8], False),
}
# What tokens write: `<think`, or parts of it with and without something beside them.
PARTS = ["<", "<t", "think", "THINK>", "hink", "h", "ink>", "k <think", "a", "b", " "]
TEXTS = list(PARTS)
while len(TEXTS) < VOCABULARY:
    longer, part = divmod(len(TEXTS), len(PARTS))
    before, after = ("x" * longer, "") if len(TEXTS) % 2 else ("", "y" * longer)
    TEXTS.append(before + PARTS[part] + after)


class Speaker:
    """What generation asks of an Encoder, with a token for each of TEXTS."""

    def __init__(self, layout, favourite):
        tokenizer = Tokenizer(models.WordLevel({text: n for n, text in enumerate(TEXTS)}, "a"))
        tokenizer.decoder = decoders.Fuse()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        self.left_out, self.end_of_turn = set(), END
        self.layout, self.favourite = layout, favourite

    def start(self, think):
        begun, bans = STARTS[think, self.layout]
        return begun, self.favourite if bans else None

    def decode(self, tokens):
        return list(tokens)


class Never(LogitsProcessor):
    """Tries each token whether `<think` would be in the answer with it."""

    def __init__(self, start):
        self.start = start

    def __call__(self, input_ids, scores):
        for row, tokens in zip(scores, input_ids[:, self.start :].tolist(), strict=True):
            text = "".join(TEXTS[token] for token in tokens)
            row[["<think" in (text + more).lower() for more in TEXTS]] = -torch.inf
        return scores


def batches_of(posts):
    batches, numbers = [], iter(range(len(posts)))
    for size in SIZES:
        indices = list(itertools.islice(numbers, size))
        batches.append(batch_of([posts[index] for index in indices]))
        batches[-1].ids = list(map(str, indices))
    return batches


def theirs(model, posts, think, begun=(), banned=None):
    """transformers' answers to the posts as one batch."""
    begun = list(begun)
    posts = [post | {"prompt": post["prompt"] + begun} for post in posts]
    inputs = batch_of(posts).prompt
    width = inputs["input_ids"].shape[1]
    rows = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=LIMIT,
        pad_token_id=0,
        eos_token_id=[END, *model.generation_config.eos_token_id],
        begin_suppress_tokens=None if banned is None else [banned],
        logits_processor=[Never(width)] if think == "never" else [],
    )[:, width:].tolist()
    answers = []
    for row in rows:
        ends = [place for place, token in enumerate(row) if token in {END, *OTHER_ENDS}]
        length = ends[0] if ends else LIMIT
        answers.append((begun + row[:length], len(begun) + length + bool(ends), bool(ends)))
    return answers


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    model = tiny_model(request.param)
    model.generation_config.eos_token_id = OTHER_ENDS
    return model


@pytest.fixture(scope="module")
def posts(model):
    return random_posts(model.config.model_type, GRIDS, seed=3, text=(3, 30))


@pytest.fixture(scope="module")
def favourite(model, posts):
    """The token with which most of the answers begin; it does not end them."""
    firsts = [tokens[0] for tokens, *_ in theirs(model.eval(), posts, "auto") if tokens]
    return max(firsts, key=firsts.count)


@pytest.mark.parametrize("think, layout", STARTS)
def test_answers_are_transformers_own_whenever_they_come_and_go(
    model, posts, favourite, think, layout, monkeypatch
):
    made, steps = [], []
    cache_class = model_file.AnswerCache
    monkeypatch.setattr(model_file, "AnswerCache", lambda: made.append(cache_class()) or made[-1])

    def note(module, args, inputs):
        steps.append(tuple(inputs["inputs_embeds"].shape[:2]))

    hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    speaker = Speaker(layout, favourite)
    model.train()
    try:
        found = dict(write_answers(model, speaker, batches_of(posts), think, LIMIT))
    finally:
        hook.remove()
    assert model.training
    expected = theirs(model.eval(), posts, think, *speaker.start(think))
    assert [found[str(index)] for index in range(len(posts))] == expected
    lengths = [tokens for _, tokens, _ in expected]
    assert len(set(lengths)) > 3 and {ended for *_, ended in expected} == {True, False}
    # The slot of a finished answer is taken at once as long as there are posts, and dropped then.
    taken = [slots for slots, read in steps if read == 1]
    assert taken == sorted(taken, reverse=True) and taken[0] == max(SIZES) and taken[-1] == 1
    assert {len(tensor) for pair in made[0].stored for tensor in pair} == {max(SIZES)}


def test_answers_under_bf16_autocast_are_transformers_own_but_for_rounding(
    model, posts, favourite, monkeypatch
):
    """As when a float32 model is validated on a GPU; its keys are float32 then, its values not."""
    monkeypatch.setattr(model_file, "bf16_on_cuda", lambda _: torch.autocast("cpu", torch.bfloat16))
    speaker = Speaker("plain", favourite)
    found = dict(write_answers(model.eval(), speaker, batches_of(posts), "auto", LIMIT))
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(model, posts, "auto")
    assert sum(found[str(index)] == answer for index, answer in enumerate(expected)) > 6
