"""Model folders as the Qwen-VL models are published, but tiny and with random weights.

As published: every file and its name, the keys of every JSON file, the names, shards and bfloat16
of the weights, the tokenizer's kind and added tokens, the template's turns. Tiny: the numbers in
config.json and the vocabulary. `write` returns the model whose weights it wrote; it reads none of
the files.
"""

import json

import torch
from safetensors.torch import save_file

from tiny import PATCH, QWEN_TEMPLATE, ROPE, TEXT, byte_level_bpe, tiny_model

# (family, whether head and embedding are tied, transformers_version, most tokens of a prompt)
KINDS = {
    "Qwen2-VL-2B": ("qwen2_vl", True, "4.41.2", 32768),
    "Qwen2.5-VL-3B": ("qwen2_5_vl", True, "4.41.2", 131072),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", False, "4.41.2", 131072),
    "Qwen3-VL-4B": ("qwen3_vl", True, "4.57.0.dev0", 262144),
}

SPECIALS = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
    <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <|image_pad|> <|video_pad|>
""".split()
# Also tokens of their own, but not marked as special.
TOOLS = {"qwen2_vl": []}
TOOLS["qwen2_5_vl"] = """
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
    <|repo_name|> <|file_sep|>
""".split()
TOOLS["qwen3_vl"] = [
    *TOOLS["qwen2_5_vl"],
    *"<tool_response> </tool_response> <think> </think>".split(),
]

# Qwen3-VL's has no system turn of its own, and speaks of messages by attribute.
QWEN3_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages if message.role in ('user', 'assistant') %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                <|vision_start|><|image_pad|><|vision_end|>
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write(folder, kind, seed=0, shards=3):
    """Write a model of `kind` and return it in float32, with the folder's bfloat16 values."""
    family, tied, version, length = KINDS[kind]
    folder.mkdir(parents=True)
    ids = write_tokenizer(folder, family, length)
    vocabulary = len(ids["vocabulary"]) + 11  # published models have more rows than tokens
    tokens = {
        f"{name}_token_id": ids[f"<|{token}|>"]
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    model = tiny_model(family, seed, vocabulary, tokens, tied).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    write_json(folder / "config.json", config(family, tied, version, vocabulary, ids, tokens))
    sampling = {
        "qwen2_vl": {"repetition_penalty": 1.0, "temperature": 0.01, "top_k": 1, "top_p": 0.001},
        "qwen2_5_vl": {"repetition_penalty": 1.05, "temperature": 0.000001},
        "qwen3_vl": {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.0, "temperature": 0.7},
    }
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            **sampling[family],
            "transformers_version": "4.49.0",
        },
    )
    write_image_processor(folder, family)
    write_weights(folder, model, family, tied, shards)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    return model


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config(family, tied, version, vocabulary, ids, tokens):
    """config.json: Qwen3-VL's is nested; the older ones have the text's fields at the top."""
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    text = TEXT | {
        "vocab_size": vocabulary,
        "rope_theta": ROPE["rope_theta"],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        **ends,
    }
    if family == "qwen3_vl":
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": family,
            "text_config": text
            | {
                "attention_bias": False,
                "dtype": "bfloat16",
                "head_dim": 8,
                "num_hidden_layers": 3,
                "model_type": "qwen3_vl_text",
                "tie_word_embeddings": tied,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": ROPE["mrope_section"],
                    "rope_type": "default",
                },
            },
            "tie_word_embeddings": tied,
            "transformers_version": version,
            "vision_config": {
                "deepstack_visual_indexes": [0, 1],
                "depth": 3,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 16,
                "in_channels": 3,
                "initializer_range": 0.02,
                "intermediate_size": 24,
                "model_type": family,
                "num_heads": 2,
                "num_position_embeddings": 64,
                "out_hidden_size": 32,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            **tokens,
        }
    vision = {
        "depth": 2,
        "in_chans": 3,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }
    if family == "qwen2_vl":
        architecture, vision = (
            "Qwen2VLForConditionalGeneration",
            vision | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        )
    else:
        architecture, vision = (
            "Qwen2_5_VLForConditionalGeneration",
            vision
            | {
                "hidden_act": "silu",
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "window_size": 56,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
            },
        )
    return {
        "architectures": [architecture],
        **tokens,
        "vision_token_id": ids["<|vision_pad|>"],
        **text,
        "max_window_layers": 2,
        "model_type": family,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": version,
        "use_sliding_window": False,
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": ROPE["mrope_section"]},
    }


def write_image_processor(folder, family):
    patches = {"patch_size": PATCH[family], "temporal_patch_size": 2, "merge_size": 2}
    if family != "qwen3_vl":
        write_json(
            folder / "preprocessor_config.json",
            {
                "min_pixels": 3136,
                "max_pixels": 12845056,
                **patches,
                "image_mean": CLIP_MEAN,
                "image_std": CLIP_STD,
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2VLProcessor"
                if family == "qwen2_vl"
                else "Qwen2_5_VLProcessor",
            },
        )
        return
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor"}
    write_json(
        folder / "preprocessor_config.json",
        {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            **patches,
            **half,
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
    )
    write_json(
        folder / "video_preprocessor_config.json",
        {
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            **patches,
            **half,
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    )


def write_tokenizer(folder, family, length):
    """Write the tokenizer's files and the chat template; returns ids by token."""
    tokenizer = json.loads(byte_level_bpe().to_str())
    vocabulary = tokenizer["model"]["vocab"]
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        len(vocabulary) + index: {"content": token, **flags, "special": token in SPECIALS}
        for index, token in enumerate(SPECIALS + TOOLS[family])
    }
    tokenizer["model"]["merges"] = merges
    tokenizer["added_tokens"] = [{"id": number, **token} for number, token in added.items()]
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges), encoding="utf-8"
    )
    template = QWEN3_TEMPLATE if family == "qwen3_vl" else QWEN_TEMPLATE
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(number): token for number, token in added.items()},
            "additional_special_tokens": SPECIALS[1:],
            "bos_token": None,
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": length,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
            "add_bos_token": False,
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": template})
    return {token["content"]: number for number, token in added.items()} | {
        "vocabulary": [*vocabulary, *added]
    }


def published_name(name, family):
    """The published name of the weight that transformers 5 calls `name`."""
    if family == "qwen3_vl":
        return name
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_weights(folder, model, family, tied, shards):
    """bfloat16 shards and their index; the head is left out where it is the embedding."""
    weights = {
        published_name(name, family): weight.to(torch.bfloat16).clone()
        for name, weight in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    names, place = sorted(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(part, file)
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": place},
    )
