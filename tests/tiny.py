"""Tiny random models of the supported families, and batches of random posts for them."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import train
from data import Batch, Targets
from model import write_answers
from support.distributed import Ranks
from support.jsonl import to_line

ROOT = Path(__file__).parent.parent
VOCABULARY, IMAGE_TOKEN = 97, 90
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=256)
TEXT |= dict(initializer_range=0.3, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=None)
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
TOKENS = dict(
    image_token_id=IMAGE_TOKEN, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93
)
PATCH = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16, "qwen3_5": 16, "qwen3_5_moe": 16}
CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
CLASSES |= {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}

# What config.json of each family has beside TEXT and TOKENS, as published but for the numbers.
VISION = {"qwen2_vl": dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2)}
_block = dict(hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=32)
VISION["qwen2_5_vl"] = dict(depth=2, fullatt_block_indexes=[1], window_size=56, **_block)
VISION["qwen3_5"] = dict(depth=2, num_position_embeddings=64, **_block)
VISION["qwen3_vl"] = VISION["qwen3_5"] | dict(depth=3, deepstack_visual_indexes=[0, 1])
VISION["qwen3_5_moe"] = VISION["qwen3_5"]

_interleaved = {"rope_parameters": ROPE | {"mrope_interleaved": True}}
OF_FAMILY = {"qwen2_vl": {}, "qwen2_5_vl": {}}
OF_FAMILY["qwen3_vl"] = {"head_dim": 8, "num_hidden_layers": 3} | _interleaved
OF_FAMILY["qwen3_5"] = dict(
    head_dim=16,
    num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    rope_parameters=_interleaved["rope_parameters"] | {"partial_rotary_factor": 0.5},
)
_experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
OF_FAMILY["qwen3_5_moe"] = OF_FAMILY["qwen3_5"] | _experts | {"shared_expert_intermediate_size": 24}


def tiny_model(family, seed=0, vocabulary=VOCABULARY, tokens=TOKENS, tied=True):
    """A float32 model of `family` with random weights.

    They are large enough that the losses differ from post to post.
    """
    import transformers

    torch.manual_seed(seed)
    text = TEXT | {"vocab_size": vocabulary, "rope_parameters": ROPE} | OF_FAMILY[family]
    vision = VISION[family] | {"patch_size": PATCH[family]}
    parts = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    config = transformers.AutoConfig.for_model(family, **parts, **tokens)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith(".A_log"):  # a state that lasts as long as a prompt does
            torch.nn.init.uniform_(weight, -3, 0)
    return model


def words(*parts):
    """A command line's arguments: text is split at spaces; a path or number is one argument."""
    return sum((part.split() if isinstance(part, str) else [str(part)] for part in parts), [])


def call(monkeypatch, module, *arguments):
    """`python MODULE ARGUMENTS` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main() or 0


def lines(path):
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def write(path, records):
    """Write records as JSONL, text as lines of its own; returns the path."""
    rows = [row + "\n" if isinstance(row, str) else to_line(row) for row in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(rows), encoding="utf-8")
    return path


def generate(model, encoder, batch, think="auto", max_new_tokens=512):
    """Greedy answers to a Batch's prompts: a list of (text, generated tokens, whether it ended)."""
    answers = dict(write_answers(model, encoder, [batch], think, max_new_tokens))
    return [answers[identity] for identity in batch.ids]


def train_alone(*arguments):
    """`python train.py ARGUMENTS` in this process; returns (model, encoder, run folder).

    The toy's own micro-batch would hold all posts of a step.
    """
    args = train.parse_args(words("--micro-batch 4", *arguments))
    with Ranks(args.device) as ranks:
        return train.train(args, ranks)


@contextlib.contextmanager
def literal():
    """In this block a step reads the prompt again with each answer, as the method is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "read_prompt", lambda model, inputs: inputs)
        yield


def random_posts(family, grids, seed=0, text=(3, 9), plain=(2, 5), cot=(8, 14), without_cot=()):
    """Raw material for `batch_of`: one post a grid (rows, columns of patches); None: no image."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    def tokens(count):
        return torch.randint(0, 89, (count,), generator=draw).tolist()

    posts = []
    for index, grid in enumerate(grids):
        prompt, image = tokens(number(*text)), None
        if grid is not None:
            rows, columns = grid
            pixels = torch.randn(rows * columns, 3 * 2 * PATCH[family] ** 2, generator=draw)
            image = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]])}
            prompt = tokens(2) + [92] + [IMAGE_TOKEN] * (rows * columns // 4) + [93] + prompt
        posts.append({"prompt": prompt, "image": image, "plain": tokens(number(*plain))})
        posts[-1]["cot"] = None if index in without_cot else tokens(number(*cot))
    return posts


def padded(lists, side):
    """(ids, mask) of lists of tokens, padded with 0 on the side."""
    rows = [torch.tensor(tokens) for tokens in lists]
    options = {"batch_first": True, "padding_side": side}
    return pad_sequence(rows, **options), pad_sequence(list(map(torch.ones_like, rows)), **options)


def batch_of(posts):
    """A Batch built by hand, independently of data.collate."""
    input_ids, mask = padded([post["prompt"] for post in posts], "left")
    prompt = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "mm_token_type_ids": ((input_ids == IMAGE_TOKEN) & mask.bool()).int(),
    }
    images = [post["image"] for post in posts if post["image"] is not None]
    if images:
        prompt |= {name: torch.cat([image[name] for image in images]) for name in images[0]}
    return Batch(
        [str(i) for i in range(len(posts))],
        prompt,
        Targets(*padded([post["plain"] for post in posts], "right")),
        Targets(*padded([post["cot"] or post["plain"] for post in posts], "right")),
        torch.tensor([post["cot"] is not None for post in posts]),
        0,
    )


QWEN_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def byte_level_bpe(marks=False):
    """A byte-level BPE with the published models' pattern, trained on a page; no special tokens.

    With `marks` the pattern is Qwen3.5's, in which combining marks belong to words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from data import PROMPT

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    if marks:
        pattern = pattern.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")
        pattern = pattern.replace(r"\s\p{L}", r"\s\p{L}\p{M}")
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    system = "user assistant system You are a helpful assistant"
    page = [PROMPT, system, "the post names the foxes", "hello there"] * 3
    page += ["<think>The post"] * 9  # `>` and `The` are then joined, as in published vocabularies
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(page, trainer)
    return tokenizer


def qwen_tokenizer():
    """A tokenizer of the published kind: its pattern, its special tokens, a system turn."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level_bpe()
    names = "endoftext im_start im_end vision_start vision_end image_pad"
    specials = [f"<|{name}|>" for name in names.split()]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials[1:],
        chat_template=QWEN_TEMPLATE,
    )
