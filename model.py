"""The vision-language model, the Dynamic CoT training step, and generation.

The step (Ma et al., EMNLP 2025, section 3): measure without gradient the loss L(y_s) of the plain answer;
below gamma the sample is taught to reason first, y_c, otherwise it keeps the plain answer y_s.
"""

import json
import logging
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from data import PROMPT, Encoder, parse_answer
from evaluate import UserError, first_few, shown

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MODES = ("sft", "cot", "multitask", "dynamic")


# ------------------------------------------------------------------------------------------------ the step


class DynamicCoT(nn.Module):
    """One training step's loss, as one module: one forward for one backward, which DDP and FSDP can wrap.

    mode: sft -> L(y_s); cot -> L(y_c); multitask -> (L(y_s) + L(y_c)) / 2;
        dynamic -> L(y_c) where L(y_s) < gamma, else L(y_s).
    share_prompt: both answers follow the same prompt and attention is causal, so image and prompt are read
        once and every answer is laid upon the same keys and values. Without it each answer is a full pass of
        its own, as the method is written: the same gradient at a higher price, and the only way under
        gradient checkpointing, where no cache can be kept.
    always_look: run the vision tower for a batch without images, too, so that processes which train together
        go through the same layers.
    """

    def __init__(self, model, mode="dynamic", gamma=0.4, share_prompt=True, always_look=False):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        self.model, self.mode, self.gamma, self.share_prompt = model, mode, gamma, share_prompt
        self.always_look = always_look

    def forward(self, batch):
        """Per-sample losses of a Batch of B posts.

        Returns (loss, plain_loss, reasons): loss (B,) carries the gradient; plain_loss (B,) is L(y_s), None in
        mode cot; reasons (B,) bool says which samples were trained on y_c.
        """
        results = self.losses(batch)
        if not len(batch):  # the one row stands for no post
            return tuple(None if result is None else result[:0].clone() for result in results)
        return results

    def losses(self, batch):
        """The method itself; `forward`'s result for every row of the batch."""
        prompt = self.read_prompt(batch.prompt)

        if self.mode == "sft":
            loss = self.answer_loss(prompt, batch.plain)
            return loss, loss.detach(), torch.zeros_like(batch.has_cot)
        if self.mode == "cot":
            return self.answer_loss(prompt, batch.cot), None, batch.has_cot
        if self.mode == "multitask":
            plain_loss, cot_loss = self.answer_loss(prompt, batch.plain), self.answer_loss(prompt, batch.cot)
            return (plain_loss + cot_loss) / 2, plain_loss.detach(), batch.has_cot

        with torch.no_grad():
            plain_loss = self.answer_loss(prompt, batch.plain)
        reasons = (plain_loss < self.gamma) & batch.has_cot
        return self.answer_loss(prompt, batch.cot.where(reasons, batch.plain)), plain_loss, reasons

    def read_prompt(self, inputs):
        """Image and prompt through the model, with gradient: what every answer is laid upon."""
        positions, _ = self.model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})
        prompt = {"inputs": inputs, "positions": positions}  # (3, B, P)
        if self.share_prompt:
            cache = new_cache()
            prompt["last"] = self.read(inputs, position_ids=positions, past_key_values=cache, use_cache=True)[:, -1:]
            prompt["cache"] = [(layer.keys, layer.values) for layer in cache.layers]
        return prompt

    def answer_loss(self, prompt, answers):
        """L(y) (B,): the mean negative log-likelihood of each answer's tokens, its end of turn included."""
        inputs, mask = prompt["inputs"], answers.mask
        # A token is predicted from the one before it: the last one is never read.
        read, read_mask = answers.ids[:, :-1], mask[:, :-1]
        positions = prompt["positions"].amax((0, 2))[:, None] + 1 + torch.arange(read.shape[1], device=read.device)
        positions = positions.expand(3, -1, -1)
        attention_mask = torch.cat([inputs["attention_mask"], read_mask], dim=1)

        if self.share_prompt:
            hidden = self.model.model(input_ids=read, position_ids=positions, attention_mask=attention_mask,
                                      past_key_values=new_cache(prompt["cache"]), use_cache=True).last_hidden_state
            hidden = torch.cat([prompt["last"], hidden], dim=1)
        else:
            inputs = inputs | {
                "input_ids": torch.cat([inputs["input_ids"], read], dim=1),
                "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(read_mask)], dim=1),
                "attention_mask": attention_mask,
                "position_ids": torch.cat([prompt["positions"], positions], dim=2),
            }
            hidden = self.read(inputs, use_cache=False)[:, -mask.shape[1]:]

        # The vocabulary is what a small step would spend most of its time on: logits at answer tokens only.
        at = mask.bool()
        logits = self.model.lm_head(hidden[at]).float()  # (number of answer tokens, V)
        token_loss = torch.zeros(mask.shape, device=mask.device).masked_scatter(
            at, cross_entropy(logits, answers.ids[at], reduction="none"))
        return token_loss.sum(1) / mask.sum(1)

    def read(self, inputs, **options):
        """The model's last hidden state (B, P, hidden) over images and text."""
        if not self.always_look or "pixel_values" in inputs:
            return self.model.model(**inputs, **options).last_hidden_state
        nothing = self.look_at_nothing()  # first, as an image is: FSDP counts on one order of the layers
        return self.model.model(**inputs, **options).last_hidden_state + nothing

    def look_at_nothing(self):
        """Zero, by way of the whole vision tower."""
        vision = self.model.model.visual
        config, merge = vision.config, vision.config.spatial_merge_size
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        blank = torch.zeros(merge**2, values, device=self.model.device)
        seen = vision(blank, grid_thw=torch.tensor([[1, merge, merge]], device=blank.device), return_dict=True)
        features = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]
        return 0 * sum(feature.float().sum() for feature in features)


def new_cache(keys_and_values=None):
    """A key/value cache of its own that begins with the given tensors, one pair a layer (nothing is copied)."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for keys, values in keys_and_values or []:
        layer = cache.layer_class_to_replicate()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


# ----------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(model, encoder, batch, think="auto", max_new_tokens=512):
    """Greedy answers to a Batch's prompts: a list of (text, number of generated tokens, whether it ended).

    think: auto lets the model's own first token decide; always starts the answer with <think>; never bans the
    first token of <think> at the first position.
    """
    from transformers import GenerationConfig

    inputs, begun = dict(batch.prompt), []
    if think == "always":
        begun = encoder.think
        for name, values in (("input_ids", begun), ("attention_mask", [1] * len(begun)),
                             ("mm_token_type_ids", [0] * len(begun))):
            added = torch.tensor(values, dtype=inputs[name].dtype, device=inputs[name].device)
            inputs[name] = torch.cat([inputs[name], added.expand(len(batch), -1)], dim=1)
    was_training, inherited = model.training, model.generation_config
    # Published models may also end with a second token. No other field is inherited: they ask for sampling and a
    # repetition penalty.
    ends = inherited.eos_token_id if isinstance(inherited.eos_token_id, list) else [inherited.eos_token_id]
    ends = sorted({encoder.end_of_turn, *ends} - {None})
    settings = GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=ends, pad_token_id=encoder.pad,
        begin_suppress_tokens=[encoder.think[0]] if think == "never" else None)
    model.eval()
    model.generation_config = settings
    try:
        with bf16_on_cuda(model.device):
            output = model.generate(**inputs, generation_config=settings)
    finally:
        model.generation_config = inherited
        model.train(was_training)
    answers = []
    for row in output[:, inputs["input_ids"].shape[1]:].tolist():
        length = next((place for place, token in enumerate(row) if token in ends), len(row))
        ended = length < len(row)
        tokens = begun + row[:length]
        text = encoder.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append((text, len(tokens) + ended, ended))
    return answers


def predict(model, encoder, loader, think="auto", max_new_tokens=512):
    """Yield a prediction for every post of a `data.Loader` without answers.

    A prediction: {"id", "keyphrases", "think", "output", "tokens"}, with "cut" where the answer ran out of
    tokens, and with "error" (and no keyphrases) where the post's image could not be read.
    """
    for micro_batches, skipped in loader:
        for post in skipped:
            yield {"id": post.id, "keyphrases": [], "think": None, "output": "", "tokens": 0,
                   "error": f"image {post.image}: {post.reason}"}
        for batch in micro_batches:
            answers = generate(model, encoder, batch.to(model.device), think, max_new_tokens)
            for identity, (output, tokens, ended) in zip(batch.ids, answers):
                keyphrases, reasoning = parse_answer(output)
                prediction = {"id": identity, "keyphrases": keyphrases, "think": reasoning, "output": output,
                              "tokens": tokens}
                yield prediction if ended else prediction | {"cut": True}


# -------------------------------------------------------------------------------------------------- loading


def find(name):
    """The folder of a model: `name` itself where it is one, else the hub's model of that name, downloaded.

    Only JSON, text and safetensors files are taken from the hub. Raises UserError.
    """
    folder = Path(name)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        if not (folder / "config.json").is_file():
            raise UserError(f"{name}: no model here (a folder with a config.json, or a name like "
                            "Qwen/Qwen2.5-VL-3B-Instruct, is wanted)")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]))
    except Exception as error:  # the hub's client raises a dozen kinds, for a dozen kinds of no connection
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: neither a folder here nor to be had from the hub ({reason})") from None


def load(name, device="cpu", dtype=torch.float32, prompt_file=None, max_pixels=512 * 28 * 28, max_length=4096,
         weights=True):
    """(model, encoder, folder) of a Qwen-VL model in Hugging Face layout, a folder or a hub name.

    The prompt is `prompt_file`'s, else the folder's own prompt.txt, else PROMPT. Without `weights` the model has
    whatever was in memory for its weights and buffers: they are to come from another process. Raises UserError where
    something is missing, torn, of another family, or only there as a pickle.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig

    quiet()
    folder = find(name)
    config = read_json(folder / "config.json")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{folder}/config.json: the model type {family!r} is not supported; "
                        f"those that work are {', '.join(FAMILIES)}")
    files = weight_files(folder)
    try:
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError("no tokenizer.json, no vocab.json")  # transformers would make an empty one
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{folder}: its tokenizer can't be loaded ({first_line(error)}); copy the tokenizer's files "
                        "from the model it was trained from") from None
    if not tokenizer.chat_template and (folder / "chat_template.json").is_file():  # transformers' tokenizers pass it by
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: its tokenizer has no chat template; copy chat_template.jinja (or the "
                        "tokenizer_config.json that holds it) from the model it was trained from")
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{folder}: its preprocessor_config.json can't be used ({first_line(error)})") from None
    if weights:
        check_size(folder, files)
        model = read_weights(folder, dtype)
    else:
        model = empty_model(AutoConfig.from_pretrained(folder), dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    if prompt_file is None and (folder / "prompt.txt").is_file():
        prompt_file = folder / "prompt.txt"
    try:
        prompt = Path(prompt_file).read_text(encoding="utf-8") if prompt_file else PROMPT
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{prompt_file}: the prompt can't be read ({error})") from None
    check_fit(folder, model, tokenizer, image_processor)
    try:
        encoder = Encoder(tokenizer, image_processor, model.config.image_token_id, prompt, max_pixels, max_length)
    except UserError as error:
        raise UserError(f"{prompt_file or folder}: {error}") from None
    except Exception as error:  # a template is a program of its own
        raise UserError(f"{folder}: its chat template can't be used ({first_line(error)}); copy it from the model it was "
                        "trained from") from None
    return model.to(device), encoder, folder


def read_weights(folder, dtype):
    """The model of a folder. Raises UserError where weights are torn, missing or of another shape."""
    from transformers import AutoModelForImageTextToText

    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True,
            output_loading_info=True)
    except Exception as error:
        raise UserError(f"{folder}: its weights can't be loaded ({first_line(error)}); is the copy whole?") from None
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
        raise UserError(f"{folder}: {len(wrong)} weights are missing or of another shape, the first {wrong[0]}; "
                        "is the copy whole?")
    return model


def empty_model(config, dtype, device="cpu"):
    """A model with memory for its weights and buffers, but nothing written there yet."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    return model.eval()


def check_size(folder, files):
    """Raise UserError where config.json describes a far larger model than the weights are: its defaults are of 7B."""
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForImageTextToText

    stored = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                stored += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: its weights can't be loaded ({first_line(error)}); is the copy whole?") from None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            described = AutoModelForImageTextToText.from_config(config, trust_remote_code=False).num_parameters()
    except Exception as error:
        raise UserError(f"{folder}/config.json: describes no model that can be made ({first_line(error)}); copy it "
                        "anew") from None
    if described > 2 * stored:
        raise UserError(f"{folder}/config.json: describes {described:,} weights, the *.safetensors have {stored:,}; "
                        "copy it from the model it was trained from")


def check_fit(folder, model, tokenizer, image_processor):
    """Raise UserError where tokenizer, image processor and model are not of one model."""
    import numpy as np

    words, known = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if known > words:
        raise UserError(f"{folder}: its tokenizer has {known} tokens, its weights {words}; copy the tokenizer's files from "
                        "the model it was trained from")
    vision = model.config.vision_config
    wanted = 3 * vision.temporal_patch_size * vision.patch_size**2
    try:  # what is in the file is used with the first image only
        blank = np.zeros((64, 64, 3), np.uint8)
        found = image_processor(images=[blank], return_tensors="pt")["pixel_values"].shape[1]
        merge = image_processor.merge_size
    except Exception as error:
        raise UserError(f"{folder}: its preprocessor_config.json can't be used ({first_line(error)}); copy it from the "
                        "model it was trained from") from None
    if (found, merge) != (wanted, vision.spatial_merge_size):
        raise UserError(f"{folder}: its preprocessor_config.json makes patches of {found} values, merged by {merge}; its "
                        f"weights want {wanted}, merged by {vision.spatial_merge_size}; copy it from the model it was "
                        "trained from")


def pick_device(name):
    """The torch.device of a name; `auto` is cuda where there is one, else cpu. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # torch has an error of its own for each way in which a device is not there
        raise UserError(f"--device {name}: not to be had here ({first_line(error)}); try auto or cpu") from None
    return device


def bf16_on_cuda(device):
    """The autocast that training and generation run under: bf16 over float32 weights on CUDA, none on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def read_json(path):
    """The JSON object in a file, as a dict. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); copy it anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is needed there, not {shown(content)}; copy it anew")
    return content


def weight_files(folder):
    """The folder's weights: model.safetensors, or every shard that its index names (transformers would unpickle one
    of another kind). Raises UserError."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise UserError(f"{folder}: no model.safetensors in it and no index of its parts; pickled weights (*.bin, *.pt) are "
                        "not read: convert them with transformers' save_pretrained")
    try:
        files = [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    except Exception as error:
        raise UserError(f"{index}: not an index of weights ({first_line(error)}); copy it anew") from None
    missing = [file.name for file in files if file.suffix != ".safetensors" or not file.is_file()]
    if missing:
        raise UserError(f"{index}: names {first_few(missing)}, which is no safetensors file in the folder; is the copy whole?")
    return files


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def quiet():
    """Keep transformers' loading bars, and its table of what did not fit, off the screen: `load` tells it in a line."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(is_no_report)


def is_no_report(record):
    return "LOAD REPORT" not in record.getMessage()
