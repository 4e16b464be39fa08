"""The files of a model's folder: its weights, tokenizer and image processor."""

import json

from evaluate import UserError, first_few
from support.console import read_json, reading


def weight_files(folder):
    """The folder's weights: model.safetensors, or every shard that its index names.

    Raises UserError, also where there are only pickles, which transformers would load.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise UserError(
            f"{folder}: no model.safetensors in it and no index of its parts; pickled weights "
            "(*.bin, *.pt) are not read: convert them with transformers' save_pretrained"
        )
    with reading(index, "copy it again"):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    missing = [file.name for file in files if file.suffix != ".safetensors" or not file.is_file()]
    if missing:
        raise UserError(
            f"{index}: names {first_few(missing)}, which is no safetensors file in the folder; "
            "is the copy whole?"
        )
    return files


def read_tokenizer(folder):
    """The tokenizer of a folder, with its chat template. Raises UserError."""
    from transformers import AutoTokenizer

    mend = "copy the tokenizer's files from the model it was trained from"
    with reading(f"{folder}: its tokenizer", mend):
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError("no tokenizer.json, no vocab.json")  # else it would be empty
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    template = folder / "chat_template.json"  # transformers reads it for processors only
    if not tokenizer.chat_template and template.is_file():
        tokenizer.chat_template = read_json(template).get("chat_template")
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder}: its tokenizer has no chat template; copy chat_template.jinja (or the "
            "tokenizer_config.json that holds it) from the model it was trained from"
        )
    return tokenizer


def read_image_processor(folder):
    """The image processor of a folder. Raises UserError."""
    from transformers import AutoImageProcessor

    mend = "copy it from the model it was trained from"
    with reading(f"{folder}: its preprocessor_config.json", mend):
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
