"""The vision-language model, the Dynamic CoT training step, and generation.

The step (Ma et al., EMNLP 2025, section 3): measure without gradient the loss L(y_s) of the plain answer;
below gamma the sample is taught to reason first, y_c, otherwise it keeps the plain answer y_s.
"""

import copy
import json
import logging
import math
import re
from pathlib import Path

import torch
from torch import nn

from data import PROMPT, Encoder, parse_answer
from evaluate import UserError, first_few, shown

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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
            plain_loss, cot_loss = (
                self.answer_loss(prompt, batch.plain),
                self.answer_loss(prompt, batch.cot),
            )
            return (plain_loss + cot_loss) / 2, plain_loss.detach(), batch.has_cot

        with torch.no_grad():
            plain_loss = self.answer_loss(prompt, batch.plain)
        reasons = (plain_loss < self.gamma) & batch.has_cot
        return self.answer_loss(prompt, batch.cot.where(reasons, batch.plain)), plain_loss, reasons

    def read_prompt(self, inputs):
        """Image and prompt through the model, with gradient: what every answer is laid upon."""
        positions, _ = self.model.model.get_rope_index(
            **{k: v for k, v in inputs.items() if k != "pixel_values"}
        )
        prompt = {"inputs": inputs, "positions": positions}  # (3, B, P)
        if self.share_prompt:
            cache = new_cache()
            prompt["last"] = self.read(
                inputs, position_ids=positions, past_key_values=cache, use_cache=True
            )[:, -1:]
            prompt["cache"] = [(layer.keys, layer.values) for layer in cache.layers]
        return prompt

    def answer_loss(self, prompt, answers):
        """L(y) (B,): the mean negative log-likelihood of each answer's tokens, its end of turn included."""
        inputs, mask = prompt["inputs"], answers.mask
        # A token is predicted from the one before it: the last one is never read.
        read, read_mask = answers.ids[:, :-1], mask[:, :-1]
        positions = (
            prompt["positions"].amax((0, 2))[:, None]
            + 1
            + torch.arange(read.shape[1], device=read.device)
        )
        positions = positions.expand(3, -1, -1)
        attention_mask = torch.cat([inputs["attention_mask"], read_mask], dim=1)

        if self.share_prompt:
            hidden = self.model.model(
                input_ids=read,
                position_ids=positions,
                attention_mask=attention_mask,
                past_key_values=new_cache(prompt["cache"]),
                use_cache=True,
            ).last_hidden_state
            hidden = torch.cat([prompt["last"], hidden], dim=1)
        else:
            inputs = inputs | {
                "input_ids": torch.cat([inputs["input_ids"], read], dim=1),
                "mm_token_type_ids": torch.cat(
                    [inputs["mm_token_type_ids"], torch.zeros_like(read_mask)], dim=1
                ),
                "attention_mask": attention_mask,
                "position_ids": torch.cat([prompt["positions"], positions], dim=2),
            }
            hidden = self.read(inputs, use_cache=False)[:, -mask.shape[1] :]

        # The vocabulary is what a small step would spend most of its time on: logits at answer tokens only.
        at = mask.bool()
        logits = self.model.lm_head(hidden[at]).float()  # (number of answer tokens, V)
        token_loss = torch.zeros(mask.shape, device=mask.device).masked_scatter(
            at, TokenLoss.apply(logits, answers.ids[at])
        )
        return token_loss.sum(1) / mask.sum(1)

    def read(self, inputs, **options):
        """The model's last hidden state (B, P, hidden) over images and text."""
        if not self.always_look or "pixel_values" in inputs:
            return self.model.model(**inputs, **options).last_hidden_state
        nothing = (
            self.look_at_nothing()
        )  # first, as an image is: FSDP counts on one order of the layers
        return self.model.model(**inputs, **options).last_hidden_state + nothing

    def look_at_nothing(self):
        """Zero, by way of the whole vision tower."""
        vision = self.model.model.visual
        config, merge = vision.config, vision.config.spatial_merge_size
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        blank = torch.zeros(merge**2, values, device=self.model.device)
        seen = vision(
            blank, grid_thw=torch.tensor([[1, merge, merge]], device=blank.device), return_dict=True
        )
        features = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]
        return 0 * sum(feature.float().sum() for feature in features)


class TokenLoss(torch.autograd.Function):
    """-log p (N,) of target tokens (N,) from float32 logits (N, V), which are used up: they become log p, then the gradient.

    What cross_entropy gives, bit for bit on a CPU. But that holds up to three tensors of the logits' size at once, 1.1 GiB for
    640 tokens of a vocabulary of 150,000; here it is one, and a few rows.
    """

    AT_ONCE = 2**23  # logits

    @classmethod
    def rows(cls, logits, *others):
        size = max(1, cls.AT_ONCE // logits.shape[1])
        return zip(*(tensor.split(size) for tensor in (logits, *others)))

    @staticmethod
    def forward(ctx, logits, targets):
        for (rows,) in TokenLoss.rows(logits):
            rows.copy_(rows.log_softmax(1))
        ctx.save_for_backward(logits, targets)
        return -logits.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        log_p, targets = ctx.saved_tensors
        for rows, target, of_loss in TokenLoss.rows(log_p, targets[:, None], gradient[:, None]):
            of_log_p = torch.zeros_like(rows).scatter_(1, target, -of_loss)
            rows.copy_(torch._log_softmax_backward_data(of_log_p, rows, 1, rows.dtype))
        return log_p, None


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
        for name, values in (
            ("input_ids", begun),
            ("attention_mask", [1] * len(begun)),
            ("mm_token_type_ids", [0] * len(begun)),
        ):
            added = torch.tensor(values, dtype=inputs[name].dtype, device=inputs[name].device)
            inputs[name] = torch.cat([inputs[name], added.expand(len(batch), -1)], dim=1)
    was_training, inherited = model.training, model.generation_config
    # Published models may also end with a second token. No other field is inherited: they ask for sampling and a
    # repetition penalty.
    ends = (
        inherited.eos_token_id
        if isinstance(inherited.eos_token_id, list)
        else [inherited.eos_token_id]
    )
    ends = sorted({encoder.end_of_turn, *ends} - {None})
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=encoder.pad,
        begin_suppress_tokens=[encoder.think[0]] if think == "never" else None,
    )
    model.eval()
    model.generation_config = settings
    try:
        with bf16_on_cuda(model.device):
            output = model.generate(**inputs, generation_config=settings)
    finally:
        model.generation_config = inherited
        model.train(was_training)
    answers = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        length = next((place for place, token in enumerate(row) if token in ends), len(row))
        ended = length < len(row)
        tokens = begun + row[:length]
        text = encoder.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        answers.append((text, len(tokens) + ended, ended))
    return answers


def predict(model, encoder, loader, think="auto", max_new_tokens=512):
    """Yield a prediction for every post of a `data.Loader` without answers.

    A prediction: {"id", "keyphrases", "think", "output", "tokens"}, with "cut" where the answer ran out of
    tokens, and with "error" (and no keyphrases) where the post's image could not be read.
    """
    for micro_batches, skipped in loader:
        for post in skipped:
            yield {
                "id": post.id,
                "keyphrases": [],
                "think": None,
                "output": "",
                "tokens": 0,
                "error": f"image {post.image}: {post.reason}",
            }
        for batch in micro_batches:
            answers = generate(model, encoder, batch.to(model.device), think, max_new_tokens)
            for identity, (output, tokens, ended) in zip(batch.ids, answers):
                keyphrases, reasoning = parse_answer(output)
                prediction = {
                    "id": identity,
                    "keyphrases": keyphrases,
                    "think": reasoning,
                    "output": output,
                    "tokens": tokens,
                }
                yield prediction if ended else prediction | {"cut": True}


# -------------------------------------------------------------------------------------------------- loading


def find(name, files=("*.json", "*.txt", "*.jinja", "*.safetensors")):
    """The folder of a model or adapter: `name` itself where it is one, else the hub's of that name, downloaded.

    Only `files` are taken from the hub: JSON, text and safetensors. Raises UserError.
    """
    folder = Path(name)
    if is_local(name):
        if not (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
            raise UserError(
                f"{name}: no model here (a folder with a config.json or an {ADAPTER}, or a name like "
                "Qwen/Qwen2.5-VL-3B-Instruct, is wanted)"
            )
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (
        Exception
    ) as error:  # the hub's client raises a dozen kinds, for a dozen kinds of no connection
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: neither a folder here nor to be had from the hub ({reason})"
        ) from None


def is_local(name):
    """Whether a model's name is that of a folder; else it is one on the hub."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1


def load(
    name,
    device="cpu",
    dtype=torch.float32,
    prompt_file=None,
    max_pixels=512 * 28 * 28,
    max_length=4096,
    weights=True,
):
    """(model, encoder, folder) of a Qwen-VL model in Hugging Face layout, a folder or a hub name.

    A folder that holds an adapter gives the model that the adapter names, with the adapter on it. The prompt is
    `prompt_file`'s, else the folder's own prompt.txt, else PROMPT. Without `weights` the model has whatever was in
    memory for its weights and buffers: they are to come from another process. Raises UserError where something is
    missing, torn, of another family, or only there as a pickle.
    """
    from transformers import GenerationConfig

    quiet()
    given = folder = find(name)
    if (given / ADAPTER).is_file():
        need_peft()
        folder = base_of(given)
    check_family(folder)
    files = weight_files(folder)
    tokenizer, image_processor = read_tokenizer(folder), read_image_processor(folder)
    if weights:
        check_size(folder, files)
        model = read_weights(folder, dtype)
    else:
        model = empty_model(folder, dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    if folder != given:
        model = read_adapter(given, model, weights)
    check_fit(folder, model, tokenizer, image_processor)
    own = next(
        (place / "prompt.txt" for place in (given, folder) if (place / "prompt.txt").is_file()),
        None,
    )
    prompt_file = prompt_file or own
    try:
        prompt = Path(prompt_file).read_text(encoding="utf-8") if prompt_file else PROMPT
        encoder = Encoder(
            tokenizer, image_processor, model.config.image_token_id, prompt, max_pixels, max_length
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{prompt_file}: the prompt can't be read ({error})") from None
    except UserError as error:
        raise UserError(f"{prompt_file or folder}: {error}") from None
    except Exception as error:  # a template is a program of its own
        raise UserError(
            f"{folder}: its chat template can't be used ({first_line(error)}); copy it from the model it was "
            "trained from"
        ) from None
    return model.to(device), encoder, given


def check_family(folder):
    """Raises UserError for a model of a family that the step was not written for."""
    family = read_json(folder / "config.json").get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{folder}/config.json: the model type {family!r} is not supported; "
            f"those that work are {', '.join(FAMILIES)}"
        )


def read_tokenizer(folder):
    """The tokenizer of a folder, with its chat template. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError(
                "no tokenizer.json, no vocab.json"
            )  # transformers would make an empty one
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{folder}: its tokenizer can't be loaded ({first_line(error)}); copy the tokenizer's files "
            "from the model it was trained from"
        ) from None
    if (
        not tokenizer.chat_template and (folder / "chat_template.json").is_file()
    ):  # transformers' tokenizers pass it by
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder}: its tokenizer has no chat template; copy chat_template.jinja (or the "
            "tokenizer_config.json that holds it) from the model it was trained from"
        )
    return tokenizer


def read_image_processor(folder):
    """The image processor of a folder. Raises UserError."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{folder}: its preprocessor_config.json can't be used ({first_line(error)})"
        ) from None


def read_weights(folder, dtype):
    """The model of a folder. Raises UserError where weights are torn, missing or of another shape."""
    from transformers import AutoModelForImageTextToText

    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserError(
            f"{folder}: its weights can't be loaded ({first_line(error)}); is the copy whole?"
        ) from None
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
        raise UserError(
            f"{folder}: {len(wrong)} weights are missing or of another shape, the first {wrong[0]}; "
            "is the copy whole?"
        )
    return model


def empty_model(config, dtype=torch.float32, device="cpu"):
    """A model with memory for its weights and buffers, but nothing written there yet; on the device "meta" not even
    that. `config` is a config of transformers', or a folder that has one."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    if isinstance(config, Path):
        config = AutoConfig.from_pretrained(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    if device == "meta":
        return model
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
                stored += sum(
                    math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()
                )
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file}: its weights can't be loaded ({first_line(error)}); is the copy whole?"
            ) from None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            described = AutoModelForImageTextToText.from_config(
                config, trust_remote_code=False
            ).num_parameters()
    except Exception as error:
        raise UserError(
            f"{folder}/config.json: describes no model that can be made ({first_line(error)}); copy it "
            "anew"
        ) from None
    if described > 2 * stored:
        raise UserError(
            f"{folder}/config.json: describes {described:,} weights, the *.safetensors have {stored:,}; "
            "copy it from the model it was trained from"
        )


def check_fit(folder, model, tokenizer, image_processor):
    """Raise UserError where tokenizer, image processor and model are not of one model."""
    import numpy as np

    words, known = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if known > words:
        raise UserError(
            f"{folder}: its tokenizer has {known} tokens, its weights {words}; copy the tokenizer's files from "
            "the model it was trained from"
        )
    vision = model.config.vision_config
    wanted = 3 * vision.temporal_patch_size * vision.patch_size**2
    try:  # what is in the file is used with the first image only
        blank = np.zeros((64, 64, 3), np.uint8)
        found = image_processor(images=[blank], return_tensors="pt")["pixel_values"].shape[1]
        merge = image_processor.merge_size
    except Exception as error:
        raise UserError(
            f"{folder}: its preprocessor_config.json can't be used ({first_line(error)}); copy it from the "
            "model it was trained from"
        ) from None
    if (found, merge) != (wanted, vision.spatial_merge_size):
        raise UserError(
            f"{folder}: its preprocessor_config.json makes patches of {found} values, merged by {merge}; its "
            f"weights want {wanted}, merged by {vision.spatial_merge_size}; copy it from the model it was "
            "trained from"
        )


def pick_device(name):
    """The torch.device of a name; `auto` is cuda where there is one, else cpu. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (
        Exception
    ) as error:  # torch has an error of its own for each way in which a device is not there
        raise UserError(
            f"--device {name}: not to be had here ({first_line(error)}); try auto or cpu"
        ) from None
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
        raise UserError(
            f"{path}: a JSON object is needed there, not {shown(content)}; copy it anew"
        )
    return content


def weight_files(folder):
    """The folder's weights: model.safetensors, or every shard that its index names (transformers would unpickle one
    of another kind). Raises UserError."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise UserError(
            f"{folder}: no model.safetensors in it and no index of its parts; pickled weights (*.bin, *.pt) are "
            "not read: convert them with transformers' save_pretrained"
        )
    try:
        files = [
            folder / name
            for name in sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        ]
    except Exception as error:
        raise UserError(
            f"{index}: not an index of weights ({first_line(error)}); copy it anew"
        ) from None
    missing = [file.name for file in files if file.suffix != ".safetensors" or not file.is_file()]
    if missing:
        raise UserError(
            f"{index}: names {first_few(missing)}, which is no safetensors file in the folder; is the copy whole?"
        )
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


# ------------------------------------------------------------------------------------------------- adapters

# The linear layers that --lora adapts, by their names in the families' models.
LORA_TEXT = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
LORA_VISION = r"model\.visual\.blocks\.\d+\.(attn|mlp)\.(qkv|proj|\w+_proj|\w*fc\d)"


def need_peft():
    """Raises UserError where the optional package for adapters is not there."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError("adapters (LoRA) need one more package: pip install peft") from None


def adapter_of(model):
    """The peft configuration of a model's adapter, None where it has none."""
    return getattr(model, "peft_config", {}).get("default")


def add_adapter(model, rank, base, vision=False):
    """Freeze a model and lay a LoRA adapter of `rank` (scale 2, B zero) on every linear layer of its language model,
    and of its vision tower if `vision`.

    `base` is the name that the adapter is to know the model by. The weights of the adapter are float32.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        base_model_name_or_path=base,
        target_modules=f"{LORA_TEXT}|{LORA_VISION}" if vision else LORA_TEXT,
    )
    return with_adapter(model, config)


def with_adapter(model, config):
    """The model, frozen, with a new adapter on it; in place."""
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def base_of(folder):
    """The folder of the model that an adapter was made for. Raises UserError."""
    settings = read_json(folder / ADAPTER)
    name = settings.get("base_model_name_or_path")
    if settings.get("peft_type") != "LORA" or not name or settings.get("modules_to_save"):
        raise UserError(
            f"{folder / ADAPTER}: only LoRA adapters that name their base_model_name_or_path, and have no "
            "modules_to_save, are read"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"{folder}: no {ADAPTER_WEIGHTS} in it; pickled weights (*.bin) are not read"
        )
    try:
        base = find(name)
    except UserError as error:
        raise UserError(
            f"{folder / ADAPTER}: its base_model_name_or_path is not to be had, put the right one there: "
            f"{error}"
        ) from None
    if (base / ADAPTER).is_file():
        raise UserError(
            f"{folder / ADAPTER}: its base_model_name_or_path, {base}, is an adapter itself; merge that "
            "one first"
        )
    return base


def read_adapter(folder, model, weights=True):
    """The model with the adapter of a folder laid on it. Raises UserError where its weights don't fit."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = False
        model = with_adapter(model, config)
        if weights:
            saved = {
                name.removeprefix("base_model.model."): tensor
                for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()
            }
            report = set_peft_model_state_dict(model, saved)
    except Exception as error:
        raise UserError(
            f"{folder}: its adapter can't be loaded ({first_line(error)}); is the copy whole, and the base "
            "that it names the right one?"
        ) from None
    if weights and (
        wrong := sorted(
            {name for name in report.missing_keys if "lora_" in name} | set(report.unexpected_keys)
        )
    ):
        raise UserError(
            f"{folder}: {len(wrong)} weights of the adapter are missing or have no place in the base, the "
            f"first {wrong[0]}; is the base that it names the right one?"
        )
    return model.eval()


def write_adapter(model, weights, folder):
    """Write a model's adapter in peft's layout; `weights` are the model's trained tensors by their names."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.copy(adapter_of(model))
    config.inference_mode = True
    config.save_pretrained(folder)
    named = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in named.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )


def merge(model):
    """Add an adapter's products to the weights that they adapt, in place; what is left has no adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [*model.named_modules()]:
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


# --------------------------------------------------------------------------------------------------- memory


def memory(
    model,
    posts,
    image,
    text,
    answer,
    bf16=True,
    rank=None,
    freeze_vision=False,
    checkpointing=False,
    gpus=1,
    sharded=False,
    passes=2,
):
    """What a training step takes of each GPU at its peak: {part: bytes}, and "peak", by a formula; nothing is run.

    model: one without weights (`torch.device("meta")` will do), whose parameters are counted. posts: those of a
    micro-batch, each with `image` image tokens, `text` other prompt tokens and an answer of `answer` tokens, reasoning
    and all: the worst case, since the probe with its plain answer needs less. bf16: autocast, else all is float32.
    rank: of LoRA. passes: micro-batches of a step. The formula, in which A stands for the answers' tokens:

    - weights and gradients 4 bytes a parameter that is trained, AdamW 8, what is frozen 4 (2 under LoRA in bf16);
      FSDP divides them by the number of GPUs.
    - copies: autocast holds a bf16 copy of each trained matrix from the forward to the end of the backward; under
      checkpointing those of the layers go before the backward, and each layer's come back in its turn. Under
      FSDP there are instead, in bf16, two layers that are gathered and what is outside of layers; or at the end of
      the backward the latter, its gradient, and that in float32 (8 bytes) while it is shared out.
    - activations are what the backward needs of each token in each layer (below), for the prompts and the answers;
      the answers keep the prompts' keys and values once more, each head's own, since transformers repeats them
      where posts are padded. Under checkpointing each layer keeps its input, and one layer the rest. Of a frozen
      vision tower nothing is kept.
    - logits: float32 (A, vocabulary), once, with a few rows more (`TokenLoss`), or with all of them in bf16; or their
      gradient in the computing type and that of the trained head in both types, before the layers go.

    Where a step is one pass, gradients take the place of activations as these go. Not in it: CUDA's own 0.5 GiB
    or so, what the allocator loses to fragments, and generation.
    """
    size, trained, matrices, layer, root = counted(model, rank, freeze_vision)
    hidden, vocabulary = model.config.text_config.hidden_size, model.config.text_config.vocab_size
    shares = gpus if sharded else 1
    item = 2 if bf16 else 4  # bytes of what is computed with
    frozen = 2 if bf16 and rank else 4
    answers = posts * answer
    kept, one = activations(
        model.config, posts, image, text, answer, bf16, rank, freeze_vision, checkpointing, sharded
    )
    cells = answers * vocabulary
    losses = 4 * cells + max(2 * cells if bf16 else 0, 8 * min(cells, TokenLoss.AT_ONCE))
    head_gradient = 0 if rank else (6 if bf16 else 4) * vocabulary * hidden
    logits = max(losses, item * cells + head_gradient)
    backward = max(
        logits, one
    )  # a layer that is computed again has its turn when the logits are gone
    copies = 0
    if bf16 and sharded:
        copies = 2 * (root + 2 * layer)
    elif (
        bf16 and not rank and checkpointing
    ):  # at the backward's peak the head's and a layer's, at the forward's all
        copies = max(2 * (vocabulary * hidden + layer), 2 * matrices + losses - backward)
    elif bf16 and not rank:
        copies = 2 * matrices
    parts = {
        "weights": (4 * trained + frozen * (size - trained)) / shares,
        "gradients": 4 * trained / shares,
        "optimizer": 8 * trained / shares,
        "copies": copies,
        "activations": kept + backward - logits,
        "logits": logits,
    }
    held, work = parts["weights"] + parts["optimizer"], copies + kept + backward
    peak = held + (parts["gradients"] + work if passes > 1 else max(parts["gradients"], work))
    if sharded and not rank:
        peak = max(peak, held + parts["gradients"] + (8 if bf16 else 12) * root)
    return parts | {"peak": peak}


def activations(
    config, posts, image, text, answer, bf16, rank, freeze_vision, checkpointing, sharded
):
    """(bytes that the forward leaves for the backward, those that a layer computed again takes: 0 without
    checkpointing); the arguments are `memory`'s."""
    c, v = config.text_config, config.vision_config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries, keys = head * c.num_attention_heads, head * c.num_key_value_heads
    width = getattr(v, "embed_dim", None) or v.hidden_size
    vision_mlp = getattr(v, "intermediate_size", None) or int(width * v.mlp_ratio)
    item = 2 if bf16 else 4
    stream = (
        2 if bf16 and (sharded or rank) else 4
    )  # between layers; autocast does not cast embeddings
    prompt, prompts, tokens = image + text, posts * (image + text), posts * (image + text + answer)
    patches = v.spatial_merge_size**2 * posts * image

    # A token in a layer: two norms' inputs and normalised values, and for the matrices their outputs (autocast casts
    # one for each of the five; a frozen matrix needs none, but its adapter does); queries, keys, values and what
    # attention made of them; four inner values of the MLP.
    norms = (16 if rank else 24) if not bf16 else 18 if rank else 16 if sharded else 26
    token = norms * c.hidden_size + 4 * item * queries + 4 * item * c.intermediate_size
    if rank:
        token += 7 * item * rank + (2 * queries if bf16 else 0)
    patch = (
        32 if bf16 else 52
    ) * width + 4 * item * vision_mlp  # the same in a vision block, for a patch
    pixels = (
        v.in_channels
        * v.temporal_patch_size
        * v.patch_size**2
        * (6 if bf16 and not freeze_vision else 4)
    )
    ends = patches * pixels + tokens * 3 * stream * c.hidden_size  # the input, the last norm
    if not freeze_vision:
        ends += patches * 5 * item * width  # the merger
    if checkpointing:
        inputs = c.num_hidden_layers * tokens * stream * c.hidden_size
        layer = (
            tokens * (token + 2 * item * c.intermediate_size)
            + item * posts * (prompt + answer) ** 2
        )
        if not freeze_vision:
            inputs += v.depth * patches * item * width
            layer = max(layer, patches * (patch + 2 * item * vision_mlp))
        return ends + inputs, layer
    masks = item * posts * (prompt**2 + answer * (prompt + answer))
    cache = prompts * keys * (2 * stream if rank or sharded else 4 + item)
    repeated = prompts * 2 * item * queries
    layers = c.num_hidden_layers * (tokens * token + masks + cache + repeated)
    return ends + layers + (0 if freeze_vision else v.depth * patches * patch), 0


def counted(model, rank=None, freeze_vision=False):
    """Of a model's parameters: (all, trained, trained matrices that are multiplied with, the largest layer's, those
    outside of layers), the adapter's among them."""
    adapter = LORA_TEXT if freeze_vision else f"{LORA_TEXT}|{LORA_VISION}"
    adapted = (
        sum(
            rank * (layer.in_features + layer.out_features)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and re.fullmatch(adapter, name)
        )
        if rank
        else 0
    )
    size = sum(p.numel() for p in model.parameters())
    learned = [
        p for name, p in model.named_parameters() if not (freeze_vision and "visual" in name)
    ]
    layers = [
        sum(p.numel() for p in layer.parameters())
        for layer in (*model.model.visual.blocks, *model.model.language_model.layers)
    ]
    table = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    matrices = sum(p.numel() for p in learned if p.ndim > 1) - table
    trained = adapted or sum(p.numel() for p in learned)
    return size + adapted, trained, matrices, max(layers), size - sum(layers)
