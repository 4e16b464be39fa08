"""Model folders as the Qwen-VL models are published, but tiny and with random weights.

As published: every file and its name, the keys of every JSON file, the names, shards and bfloat16
of the weights, the tokenizer's kind and added tokens, the template's turns. Tiny: the numbers in
config.json and the vocabulary. `write` returns the model whose weights it wrote; it reads none of
the files.
"""

import json

import torch
from safetensors.torch import save_file

import tiny
from tiny import OF_FAMILY, PATCH, QWEN_TEMPLATE, ROPE, TEXT, VISION, byte_level_bpe, tiny_model

# (family, whether head and embedding are tied, transformers_version, most tokens of a prompt)
KINDS = {
    "Qwen2-VL-2B": ("qwen2_vl", True, "4.41.2", 32768),
    "Qwen2.5-VL-3B": ("qwen2_5_vl", True, "4.41.2", 131072),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", False, "4.41.2", 131072),
    "Qwen3-VL-4B": ("qwen3_vl", True, "4.57.0.dev0", 262144),
    "Qwen3.5-4B": ("qwen3_5", True, "4.57.0.dev0", 262144),
    "Qwen3.5-35B-A3B": ("qwen3_5_moe", False, "4.57.0.dev0", 262144),
}
SAMPLING = {
    "Qwen2-VL-2B": {"repetition_penalty": 1.0, "temperature": 0.01, "top_k": 1, "top_p": 0.001},
    "Qwen2.5-VL-3B": {"repetition_penalty": 1.05, "temperature": 0.000001},
    "Qwen2.5-VL-7B": {"repetition_penalty": 1.05, "temperature": 0.000001},
    "Qwen3-VL-4B": {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.0, "temperature": 0.7},
    "Qwen3.5-35B-A3B": {"top_k": 20, "top_p": 0.95, "temperature": 1.0},
}  # the small Qwen3.5 have no generation_config.json

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
TOOLS["qwen3_vl"] = (
    TOOLS["qwen2_5_vl"] + "<tool_response> </tool_response> <think> </think>".split()
)
TOOLS["qwen3_5"] = TOOLS["qwen3_5_moe"] = TOOLS["qwen3_vl"]
# Special tokens that Qwen3.5 names in tokenizer_config.json only.
CONFIG_ONLY = """
    <|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single>
    <|audio_pad|>
""".split()

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

# An answer begins with an open <think> in Qwen3-VL-Thinking and in Qwen3.5, but with an empty one
# in the small models of Qwen3.5.
THINKING_TEMPLATE = QWEN3_TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
SWITCH = """\
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is DEFAULT %}
        {{- 'OTHER' }}
    {%- else %}
        {{- 'USUAL' }}
    {%- endif %}
"""


def qwen3_5_template(thinks):
    """Qwen3.5's template: it trims, and `enable_thinking` chooses how the answer begins."""
    empty, opened = "<think>\\n\\n</think>\\n\\n", "<think>\\n"
    usual, other = (opened, empty) if thinks else (empty, opened)
    switch = SWITCH.replace("DEFAULT", "false" if thinks else "true")
    switch = switch.replace("OTHER", other).replace("USUAL", usual)
    template = QWEN3_TEMPLATE.replace("    {{- '<|im_start|>assistant\\n' }}\n", switch)
    answered = "message.content if message.role == 'user' else '<think>\\n\\n</think>\\n\\n' + "
    template = template.replace("{{- message.content }}", "{{- " + answered + "message.content }}")
    return template.replace("{{- part.text }}", "{{- part.text|trim }}")


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write(folder, kind, seed=0, shards=3):
    """Write a model of `kind` and return it in float32, with the folder's bfloat16 values."""
    family, tied, version, length = KINDS[kind]
    folder.mkdir(parents=True)
    ids = write_tokenizer(folder, family, length)
    vocabulary = len(ids["vocabulary"]) + 11  # published models have more rows than tokens
    marks = "image_pad video_pad vision_start vision_end".split()
    tokens = {f"{mark.removesuffix('_pad')}_token_id": ids[f"<|{mark}|>"] for mark in marks}
    model = tiny_model(family, seed, vocabulary, tokens, tied).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    write_json(folder / "config.json", config(family, tied, version, vocabulary, ids, tokens))
    if kind in SAMPLING:
        ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
        tokens = {"bos_token_id": ends[1], "pad_token_id": ends[1], "eos_token_id": ends}
        settings = tokens | {"do_sample": True, "transformers_version": "4.49.0"} | SAMPLING[kind]
        write_json(folder / "generation_config.json", settings)
    write_image_processor(folder, family)
    write_weights(folder, model, family, tied, shards)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    return model


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config(family, tied, version, vocabulary, ids, tokens):
    """config.json: nested since Qwen3-VL; the older ones have the text's fields at the top."""
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    text = TEXT | ends | {"vocab_size": vocabulary, "rope_theta": ROPE["rope_theta"]}
    text |= {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True}
    architectures = [f"{tiny.CLASSES[family]}ForConditionalGeneration"]
    whole = {"architectures": architectures, "model_type": family, **tokens}
    whole |= {"tie_word_embeddings": tied, "transformers_version": version}
    merge = {"spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = VISION[family] | merge | {"patch_size": PATCH[family]}
    if family.startswith("qwen3"):
        own = {"attention_bias": False, "dtype": "bfloat16", "tie_word_embeddings": tied}
        text |= OF_FAMILY[family] | own | {"model_type": f"{family}_text"}
        if family == "qwen3_vl":
            text["rope_scaling"] = dict(text.pop("rope_parameters"))
            del text["rope_scaling"]["rope_theta"]
        else:
            del text["rope_theta"], text["bos_token_id"]
            mtp = {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
            text |= {"attn_output_gate": True, "full_attention_interval": 4, **mtp}
            text |= {"mamba_ssm_dtype": "float32", "eos_token_id": ids["<|endoftext|>"]}
        vision |= {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "initializer_range": 0.02}
        return whole | {"text_config": text, "vision_config": vision | {"model_type": family}}
    vision |= {"in_chans": 3, "spatial_patch_size": 14}
    if family == "qwen2_5_vl":
        vision |= {"hidden_act": "silu", "tokens_per_second": 2}
    text |= {"max_window_layers": 2, "sliding_window": 32768, "use_sliding_window": False}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": ROPE["mrope_section"]}}
    text |= {"torch_dtype": "bfloat16", "vision_token_id": ids["<|vision_pad|>"]}
    return whole | text | {"vision_config": vision}


def write_image_processor(folder, family):
    common = {"patch_size": PATCH[family], "temporal_patch_size": 2, "merge_size": 2}
    if not family.startswith("qwen3"):
        name = "Qwen2VLProcessor" if family == "qwen2_vl" else "Qwen2_5_VLProcessor"
        common |= {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "processor_class": name}
        common |= {"image_processor_type": "Qwen2VLImageProcessor"}
        sizes = {"min_pixels": 3136, "max_pixels": 12845056}
        write_json(folder / "preprocessor_config.json", sizes | common)
        return
    common |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    common |= {"processor_class": "Qwen3VLProcessor"}
    image = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}}
    image |= {"image_processor_type": "Qwen2VLImageProcessorFast"}
    write_json(folder / "preprocessor_config.json", image | common)
    video = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}}
    video |= {"video_processor_type": "Qwen3VLVideoProcessor"}
    write_json(folder / "video_preprocessor_config.json", video | common)


def write_tokenizer(folder, family, length):
    """Write the tokenizer's files and the chat template; returns ids by token."""
    newer = family.startswith("qwen3_5")
    tokenizer = json.loads(byte_level_bpe(marks=newer).to_str())
    vocabulary = tokenizer["model"]["vocab"]
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        len(vocabulary) + index: {"content": token, **flags, "special": token in SPECIALS}
        for index, token in enumerate(SPECIALS + TOOLS[family])
    }
    tokenizer["model"]["merges"] = merges
    tokenizer["added_tokens"] = [{"id": number, **token} for number, token in added.items()]
    for token in CONFIG_ONLY if newer else ():
        added[len(vocabulary) + len(added)] = {"content": token, **flags, "special": True}
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *merges, ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    template = QWEN3_TEMPLATE if family == "qwen3_vl" else QWEN_TEMPLATE
    if newer:
        template = qwen3_5_template(thinks=True)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings = {
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
    }
    write_json(folder / "tokenizer_config.json", settings)
    if not newer:
        write_json(folder / "chat_template.json", {"chat_template": template})
    ids = {token["content"]: number for number, token in added.items()}
    return ids | {"vocabulary": [*vocabulary, *added]}


def published_name(name, family):
    """The published name of the weight that transformers 5 calls `name`."""
    if family.startswith("qwen3"):
        return name
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_weights(folder, model, family, tied, shards):
    """bfloat16 shards and their index; the head is left out where it is the embedding."""
    weights, name = {}, "model-{:05}-of-{:05}.safetensors"
    for key, weight in model.state_dict().items():
        if not (tied and key == "lm_head.weight"):
            exact = key.endswith((".A_log", ".linear_attn.norm.weight"))
            dtype = torch.float32 if exact else torch.bfloat16
            weights[published_name(key, family)] = weight.to(dtype).clone()
    if family.startswith("qwen3_5"):  # a layer that predicts a second token, for serving engines
        weights["mtp.fc.weight"] = torch.ones(32, 64, dtype=torch.bfloat16)
        name = "model.safetensors-{:05}-of-{:05}.safetensors"
    names, place = sorted(weights), {}
    for number in range(shards):
        file = name.format(number + 1, shards)
        part = names[number::shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(part, file)
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": place}
    write_json(folder / "model.safetensors.index.json", index)
