"""Chat templates that open <think> themselves, and tokenizers that have the tags as tokens."""

import contextlib
import itertools
import json

import pytest
import torch
import transformers

import published
from data import PROMPT, TAGS, collate, parse_answer
from model import load
from tiny import generate

RECORD = {"id": "a", "text": "the foxes", "keyphrases": ["paris", "old town"], "cot": "hello there"}
PLAIN = "paris; old town<|im_end|>\n"
REASONS = "hello there</think><answer>paris; old town</answer><|im_end|>\n"
EMPTY = "<think>\n\n</think>\n\n"
THINKS, TRIMS = published.THINKING_TEMPLATE, published.qwen3_5_template(thinks=False)
INSTRUCT = PLAIN, "<think>" + REASONS
THINKING = "<think>\n</think>" + PLAIN, "<think>\n" + REASONS
# A layout: the published kind, its template, which tags are tokens marked as special; and what the
# plain answer and the one that reasons look like from the assistant's turn on.
LAYOUTS = {
    "instruct": ("Qwen3-VL-4B", None, (), *INSTRUCT),
    "thinking": ("Qwen3-VL-4B", THINKS, (), *THINKING),
    "empty": ("Qwen3.5-4B", TRIMS, (), EMPTY + PLAIN, EMPTY + "<think>" + REASONS),
    "text": ("Qwen2.5-VL-3B", THINKS, (), *THINKING),
    "special": ("Qwen3-VL-4B", None, TAGS, *INSTRUCT),
    "special thinking": ("Qwen3-VL-4B", THINKS, TAGS, *THINKING),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory):
    """(folder, model, encoder, the two answers as text)"""
    kind, template, special, *answers = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("layout") / kind
    published.write(folder, kind)
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    tokenizer, config = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    if template:
        config["chat_template"] = template
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    for tag in special:
        new = {"id": max(token["id"] for token in added.values()) + 1, "content": tag}
        added[tag] = added["<|im_end|>"] | new | added.get(tag, {}) | {"special": True}
    tokenizer["added_tokens"] = [*added.values()]
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in added.values()
    }
    for file, content in zip(files, (tokenizer, config), strict=True):
        published.write_json(file, content)
    model, encoder, _ = load(str(folder))
    return folder, model.eval(), encoder, answers


def test_answers_go_on_where_the_template_ends(layout):
    folder, _, encoder, (plain, cot) = layout
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    content = [{"type": "text", "text": PROMPT.replace("{text}", RECORD["text"])}]
    turns = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    sample = encoder.encode(RECORD, None, with_answers=True)
    assert sample.prompt == prompt
    for ids, text in ((sample.plain, plain), (sample.cot, cot)):
        assert tokenizer.decode(prompt + ids).rpartition("assistant\n")[2] + "\n" == text
        for tag in TAGS:  # its own token where the tokenizer has one
            if tag in tokenizer.get_added_vocab():
                number = tokenizer.convert_tokens_to_ids(tag)
                written = tokenizer.decode(ids).count(tag)
                assert encoder.tags[tag] == [number] and ids.count(number) == written
    for ids, reasoning in ((sample.plain, ""), (sample.cot, RECORD["cot"])):
        keyphrases, think = parse_answer(encoder.decode(ids))
        assert keyphrases == RECORD["keyphrases"] and (think or "") == reasoning
    reply = tokenizer.decode(sample.cot[:-1])  # a server's, without what the template began
    assert parse_answer(reply) == (RECORD["keyphrases"], RECORD["cot"])


def test_only_the_tags_are_kept_of_the_special_tokens(layout):
    _, _, encoder, _ = layout
    ids = encoder.answer_ids("<think>a</think><answer>b</answer>")
    (image, end), plain = [encoder.image_token_id, encoder.end_of_turn], encoder.plain_ids("c")
    expected = "<think>a</think><answer>b</answer>c"
    assert encoder.decode([end, *ids, image, *plain, encoder.pad]) == expected


@contextlib.contextmanager
def wishing(model, tokens):
    """In this block the model wants to write these tokens, again and again, and nothing else."""
    calls = itertools.count()

    def want(module, inputs, logits):
        logits[..., tokens[next(calls) % len(tokens)]] += 1e4

    hook = model.lm_head.register_forward_hook(want)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("think", ["auto", "always", "never"])
def test_reasoning_can_be_asked_for_and_forbidden(layout, think):
    """The model wants to close its reasoning at once, or to open it: the wrong thing each time."""
    _, model, encoder, (plain, _) = layout
    opened = plain.startswith("<think>\n<")
    tag = "</think>" if opened else "<think>"
    batch = collate([encoder.encode(RECORD, None, with_answers=False)], encoder)
    with wishing(model, encoder.tags[tag][:1]), torch.no_grad():
        ((text, tokens, _),) = generate(model, encoder, batch, think, max_new_tokens=4)
        logits = model(**batch.prompt, use_cache=False).logits[0, -1]
    forced = think == ("never" if opened else "always")
    first, second = logits.topk(2).indices.tolist()
    assert first == encoder.tags[tag][0]
    if forced:
        assert text.startswith("<think></think>" if opened else "<think>")
        assert tokens == 4 + len(encoder.tags[tag])
    else:
        chosen = first if think == "auto" else second
        assert text.startswith(encoder.decode([chosen]))


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_never_keeps_think_out_of_the_whole_answer(layout, case):
    """A model that wants to write the tag all along, in the tokens that it has for it."""
    _, model, encoder, *_ = layout
    tag = case("<think>")
    wanted = encoder.tags[tag] if tag in encoder.tags else encoder.plain_ids(tag)
    batch = collate([encoder.encode(RECORD, None, with_answers=False)], encoder)
    with wishing(model, wanted):
        ((free, _, _),) = generate(model, encoder, batch, "auto", max_new_tokens=20)
    with wishing(model, wanted):
        ((kept, count, _),) = generate(model, encoder, batch, "never", max_new_tokens=20)
    written = kept.removeprefix("<think>") if encoder.opens_think else kept
    assert free.lower().count("<think") > 2 and count > 3
    assert "<think" not in written.lower()
