"""A vision-language model: what the training step asks of it, generation, and loading.

`read_prompt` and `answer_loss` are the two functions that the step in `train.py` is made of.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from data import Encoder, EncoderOptions, failed_prediction, make_prediction
from evaluate import UserError, plural
from support.adapters import ADAPTER, adapter_config, inject_adapter, read_adapter
from support.checkpoint import base_of, find_model, full_tensor, read_own
from support.console import hide_loading_report, read_json, reading
from support.decoding import AnswerCache, Generation, Greedy, continue_cache
from support.distributed import compute_dtype, parameters_and_buffers
from support.vision import pack_images

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe")

# ------------------------------------------------------------------------ a prompt and its answers


@dataclass
class Prompt:
    """The image and prompt of B posts after the model has read them; any answer may follow."""

    attention_mask: torch.Tensor  # (B, P)
    next_position: torch.Tensor  # (B,): M-RoPE's, of the first token of an answer
    last_hidden: torch.Tensor  # (B, 1, hidden), at the prompt's last token
    cache: object  # transformers' cache: what each layer keeps of the prompt


def read_prompt(model, inputs):
    """Read image and prompt of B posts once, with gradient, for every answer that may follow.

    Attention is causal, so what the layers keep of the prompt (keys and values, or a recurrent
    state) is the same for all answers: the gradient is that of a pass per answer. Gradient
    checkpointing keeps no such cache: the inputs are returned as they are, and `answer_loss` reads
    them with each answer.
    """
    from transformers import DynamicCache

    if model.training and model.model.language_model.layers[0].gradient_checkpointing:
        return inputs
    positions, cache = rope_positions(model, inputs), DynamicCache(config=model.config)
    options = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
    # Here transformers copies four values from GPU to CPU: two to check that images have their
    # tokens, one to leave out the mask where nothing is padded, one in the backward pass.
    hidden = model.model(**inputs | options).last_hidden_state  # (B, P, hidden)
    next_position = positions.amax((0, 2)) + 1  # text follows the largest position of an image
    return Prompt(inputs["attention_mask"], next_position, hidden[:, -1:], cache)


def rope_positions(model, inputs):
    """M-RoPE's positions (3, B, P) of a prompt's tokens: time, rows and columns."""
    if "position_ids" in inputs:  # computed with the batch: here, it would wait for the GPU
        return inputs["position_ids"]
    without_pixels = {name: x for name, x in inputs.items() if name != "pixel_values"}
    return model.model.get_rope_index(**without_pixels)[0]


def answer_loss(model, prompt, targets):
    """L(y) (B,): the mean negative log-likelihood of each target's tokens, its end included.

    prompt: what `read_prompt` returned, or a batch's inputs, which are then read with the targets.
    """
    # A token is predicted from the one before it, so the last one is a target only.
    ids, mask = targets.ids[:, :-1], targets.mask[:, :-1]  # (B, T - 1)
    if isinstance(prompt, Prompt):
        hidden = read_after(model, prompt, ids, mask)
    else:
        hidden = read_together(model, prompt, ids, mask)
    # hidden is (B, T, hidden): the prompt's last token predicts the answer's first. Logits for
    # the answers only: the product with the vocabulary is what costs most in a small model.
    places = targets.mask.nonzero_static(size=sum(targets.lengths)).unbind(1)
    logits = model.lm_head(hidden[places]).float()  # (answer tokens, vocabulary)
    losses = TokenLoss.apply(logits, targets.ids[places])
    token_loss = torch.zeros_like(targets.ids, dtype=losses.dtype)  # (B, T), 0 at the padding
    token_loss = token_loss.index_put(places, losses)
    return token_loss.sum(1) / targets.mask.sum(1)


def read_after(model, prompt, ids, mask):
    """Hidden states (B, 1 + A, hidden) of the prompt's last token and A answer tokens."""
    output = model.model(
        input_ids=ids,
        position_ids=answer_positions(prompt.next_position, ids),
        attention_mask=torch.cat([prompt.attention_mask, mask], dim=1),
        past_key_values=continue_cache(prompt.cache),
        use_cache=True,
    )
    return torch.cat([prompt.last_hidden, output.last_hidden_state], dim=1)


def read_together(model, inputs, ids, mask):
    """The same in one pass over prompt and answer, which keeps no cache."""
    output = model.model(**append_tokens(model, inputs, ids, mask), use_cache=False)
    return output.last_hidden_state[:, -ids.shape[1] - 1 :]


def append_tokens(model, inputs, ids, mask):
    """The inputs of B posts with text behind their prompts, given as ids and mask (B, A)."""
    positions = rope_positions(model, inputs)
    behind = answer_positions(positions.amax((0, 2)) + 1, ids)
    added = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(mask)}
    joined = {name: torch.cat([inputs[name], x], dim=1) for name, x in added.items()}
    return inputs | joined | {"position_ids": torch.cat([positions, behind], dim=2)}


def answer_positions(first, ids):
    """M-RoPE's positions (3, B, A) of answer tokens: they count on, the same on all three axes."""
    positions = first[:, None] + torch.arange(ids.shape[1], device=ids.device)
    return positions.expand(3, -1, -1)


class TokenLoss(torch.autograd.Function):
    """-log p (N,) of target tokens (N,) from float32 logits (N, V), which it overwrites.

    It gives the values of cross_entropy, bit for bit on a CPU, in less memory: cross_entropy holds
    up to three tensors of the logits' size (1.1 GiB for 640 tokens of a vocabulary of 150,000),
    this function one, which becomes log p and then the gradient. So it has one backward only.
    """

    AT_ONCE = 2**23  # logits that are computed at a time

    @classmethod
    def chunks(cls, logits, *others):
        size = max(1, cls.AT_ONCE // logits.shape[1])
        return zip(*(tensor.split(size) for tensor in (logits, *others)), strict=True)

    @staticmethod
    def forward(ctx, logits, targets):
        for (chunk,) in TokenLoss.chunks(logits):
            chunk.copy_(chunk.log_softmax(1))
        ctx.save_for_backward(logits, targets)
        return -logits.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        log_p, targets = ctx.saved_tensors
        columns = targets[:, None], gradient[:, None]
        for chunk, target, grad_loss in TokenLoss.chunks(log_p, *columns):
            grad_log_p = torch.zeros_like(chunk).scatter_(1, target, -grad_loss)
            # log_softmax's own backward: formulas of our own round differently.
            chunk.copy_(torch._log_softmax_backward_data(grad_log_p, chunk, 1, chunk.dtype))
        return log_p, None


# ------------------------------------------------------------------------------------- generation


@torch.no_grad()
def write_answers(model, encoder, batches, think="auto", max_new_tokens=512):
    """Yield (id, (text, generated tokens, whether it ended)) of each post as it becomes known.

    Greedy decoding with continuous batching: prompts are read a Batch at a time, and as many
    answers are written at once as the largest Batch has posts. When an answer is finished, the last
    one moves to its slot, and the next prompt takes the slot at the end.

    think: "auto" lets the model decide; "always" starts the answer with <think>; "never" keeps
    <think> out of the whole answer. Where the chat template has opened <think>, "always" bans
    </think> at the first position, and "never" starts with it.
    """
    greedy, cache = Greedy(model, encoder, think, max_new_tokens), AnswerCache()
    prompts = read_prompts(model, batches, greedy)
    was_training = model.training
    model.eval()
    try:
        with bf16_on_cuda(model.device):  # around all passes: it casts the weights once
            while cache.fill(prompts):
                hidden = model.model(**cache.inputs(model)).last_hidden_state
                greedy.extend(cache.generations, hidden)
                for done in cache.pop_finished():
                    text = encoder.decode(done.tokens[: len(done.tokens) - done.ended])
                    yield done.id, (text, len(done.tokens), done.ended)
    finally:
        model.train(was_training)


def read_prompts(model, batches, greedy):
    """Yield (Generation with its first token, cache, its index in it) of each post of Batches."""
    for batch in batches:
        inputs = batch.to(model.device).prompt
        if begun := greedy.begun:
            ids = inputs["input_ids"].new_tensor(begun).expand(len(batch), -1)
            inputs = append_tokens(model, inputs, ids, torch.ones_like(ids))
        prompt = read_prompt(model, inputs)
        lengths, positions = prompt.attention_mask.sum(1).tolist(), prompt.next_position.tolist()
        generations = [
            Generation(identity, list(begun), length, position)
            for identity, length, position in zip(batch.ids, lengths, positions, strict=True)
        ]
        greedy.extend(generations, prompt.last_hidden)
        yield from ((new, prompt.cache, index) for index, new in enumerate(generations))


def predict(model, encoder, loader, think="auto", max_new_tokens=512):
    """Yield a prediction for every post of `data.load_steps` without answers, as they are made.

    See `data.make_prediction`; where the image could not be read it has "error" and no keyphrases.
    """
    skipped = []

    def batches():
        for _, micro_batches in loader:
            for batch in micro_batches:
                skipped.extend(batch.skipped)
                if len(batch):
                    yield batch

    def failures():
        while skipped:
            post = skipped.pop(0)
            yield failed_prediction(post.id, f"image {post.image}: {post.reason}")

    for identity, answer in write_answers(model, encoder, batches(), think, max_new_tokens):
        output, tokens, ended = answer
        yield from failures()
        yield make_prediction(identity, output, tokens, cut=not ended)
    yield from failures()


def bf16_on_cuda(device):
    """The autocast of training and generation: bf16 on a GPU that has it, else none."""
    bf16 = compute_dtype(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


# ---------------------------------------------------------------------------------------- loading


COPY = "copy it from the model it was trained from"


def load(name, device="cpu", dtype=torch.float32, options=None, weights=True):
    """(model, encoder, folder) of a Qwen-VL model in Hugging Face layout.

    name: a folder that `find_model` has found (Path), or what it finds one by; an adapter's folder
        gives its base with the adapter on it.
    options: the encoder's EncoderOptions, else those of the folder.
    weights: False leaves the weights uninitialized, since they will come from another rank.

    Raises UserError where a file is missing, damaged, or of another family.
    """
    from transformers import GenerationConfig

    hide_loading_report()
    folder = base = name if isinstance(name, Path) else find_model(name)
    if (folder / ADAPTER).is_file():
        base = base_of(folder)
    check_family(base)
    tokenizer, image_processor = read_tokenizer(base), read_image_processor(base)
    if weights:
        model = read_weights(base, dtype)
    else:
        model = empty_model(base, dtype)
        if (base / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(base)
    if folder != base:
        model = read_adapter(folder, model, weights)
    check_fit(base, model, tokenizer, image_processor)
    encoder = make_encoder(folder, model.config, tokenizer, image_processor, options)
    return model.to(device), encoder, folder


def make_encoder(folder, config, tokenizer, image_processor, options=None):
    """The Encoder of a model; without `options` it is as the folder has it. Raises UserError."""
    from transformers import MODEL_MAPPING

    settings = config.image_token_id, options or EncoderOptions(**read_own(folder))
    # It needs the config alone: processes that prepare posts get no copy of the weights.
    inner = object.__new__(MODEL_MAPPING[type(config)])
    inner.config = config
    with reading(f"{folder}: its chat template", COPY):  # a program of its own
        try:
            return Encoder(tokenizer, image_processor, *settings, inner.get_rope_index)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None


def read_tokenizer(folder):
    """The tokenizer of a folder, with its chat template. Raises UserError."""
    from transformers import AutoTokenizer

    with reading(f"{folder}: its tokenizer", COPY):
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError("no tokenizer.json, no vocab.json")  # else it would be empty
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        template = folder / "chat_template.json"  # transformers reads it for processors only
        if not tokenizer.chat_template and template.is_file():
            tokenizer.chat_template = read_json(template)["chat_template"]
    return tokenizer


def read_image_processor(folder):
    """The image processor of a folder. Raises UserError."""
    from transformers import AutoImageProcessor

    with reading(f"{folder}: its preprocessor_config.json", COPY):
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def check_family(folder):
    """Raises UserError for a model of a family that the step was not written for."""
    config = read_json(folder / "config.json")
    # Without sizes, transformers would make a model of 7 billion weights.
    if config.get("model_type") not in FAMILIES or "vision_config" not in config:
        raise UserError(f"{folder}/config.json: no model of {', '.join(FAMILIES)}")


def read_weights(folder, dtype):
    """The model of a folder. Raises UserError where weights are damaged, missing or misshapen."""
    from transformers import AutoModelForImageTextToText

    with reading(f"{folder}: its weights"):
        index = folder / "model.safetensors.index.json"
        names = set(read_json(index)["weight_map"].values()) if index.is_file() else ()
        if not all(name.endswith(".safetensors") for name in names):
            raise UserError(f"{index}: names files that are not safetensors, which are not read")
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    wrong = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"{folder}: {plural(len(wrong), 'weight')} missing or of another shape, the first "
            f"{min(wrong)}; is the copy whole?"
        )
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and not tied:
        raise UserError(
            f"{folder}/config.json: tie_word_embeddings is true, but in the weights lm_head and "
            "embedding differ; set it to false to use both"
        )
    return pack_images(model)


def empty_model(config, dtype=torch.float32, device="cpu"):
    """A model with uninitialized weights and buffers; on the device "meta" without any memory.

    config: a config of transformers, or a folder that has one.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if isinstance(config, Path):
        config = AutoConfig.from_pretrained(config, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, trust_remote_code=False, attn_implementation="sdpa"
        )
    if device != "meta":
        model.to_empty(device=device)
        model.tie_weights()
        model.eval()
    return pack_images(model)


def unsharded_model(model):
    """A whole copy of a sharded model to generate with, so that each rank can go at its own pace.

    All ranks must call it. A model that is not sharded is returned as it is.
    """
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return model
    copy = empty_model(model.config, compute_dtype(model.device), model.device)
    copy.generation_config = model.generation_config
    if config := adapter_config(model):
        copy = inject_adapter(copy, config)
    tensors = zip(parameters_and_buffers(copy), parameters_and_buffers(model), strict=True)
    with torch.no_grad():
        for own, sharded in tensors:
            own.copy_(full_tensor(sharded))
    return copy


def check_fit(folder, model, tokenizer, image_processor):
    """Raise UserError where tokenizer, image processor and model are not of one model."""
    embeddings, known = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if known > embeddings:
        raise UserError(
            f"{folder}: its tokenizer has {known} tokens, its weights {embeddings}; {COPY}"
        )
    vision, file = model.config.vision_config, f"{folder}: its preprocessor_config.json"
    expected = 3 * vision.temporal_patch_size * vision.patch_size**2, vision.spatial_merge_size
    with reading(file, COPY):  # most of its errors appear only when an image is processed
        image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
        patches = image_processor([image], do_resize=True, return_tensors="pt")["pixel_values"]
        found = patches.shape[1], image_processor.merge_size
    if found != expected:
        raise UserError(
            f"{file} and its weights differ in values of a patch and patches of a token: {found}, "
            f"{expected}; {COPY}"
        )
