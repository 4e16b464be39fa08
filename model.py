"""The vision-language model, the Dynamic CoT training step, and generation.

The step (Ma et al., EMNLP 2025, section 3): measure without gradient the loss L(y_s) of the plain
answer; below gamma the sample is taught to reason first, y_c, otherwise it keeps y_s.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data import (
    PROMPT,
    Encoder,
    EncoderOptions,
    failed_prediction,
    parse_answer,
    read_prompt,
)
from evaluate import UserError, plural
from support.adapters import (
    ADAPTER,
    adapter_config,
    inject_adapter,
    read_adapter,
)
from support.checkpoint import base_of, find_model, read_own
from support.console import first_line, hide_loading_report, read_json, reading
from support.decoding import Answer, Greedy, Rows, continue_cache
from support.distributed import compute_dtype, full_tensor, parameters_and_buffers
from support.folders import read_image_processor, read_tokenizer, weight_files

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe")
MODES = ("sft", "cot", "multitask", "dynamic")


# --------------------------------------------------------------------------------------- the step


@dataclass
class Prompt:
    """The image and prompt of B posts after the model has read them; every answer follows them."""

    inputs: dict  # input_ids, attention_mask, mm_token_type_ids (B, P), pixel_values, …
    positions: torch.Tensor  # (3, B, P): M-RoPE counts time, rows and columns
    last_hidden: torch.Tensor | None = None  # (B, 1, hidden), at the prompt's last token
    cache: object | None = None  # transformers' cache, what each layer keeps of the prompt

    def rows(self, rows):
        """The Prompt of some of the posts. Of the inputs it keeps what an answer still needs."""
        inputs = {"attention_mask": self.inputs["attention_mask"][rows]}
        cache = continue_cache(self.cache, rows)
        return Prompt(inputs, self.positions[:, rows], self.last_hidden[rows], cache)


class DynamicCoT(nn.Module):
    """The loss of a training step.

    All passes of a step stand in one `forward`: DDP and FSDP expect one forward per backward.

    mode: sft -> L(y_s); cot -> L(y_c); multitask -> (L(y_s) + L(y_c)) / 2;
        dynamic -> L(y_c) where L(y_s) < gamma, else L(y_s).
    share_prompt: where a mode reads two answers, both follow the same prompt and attention is
        causal, so the model reads image and prompt once, and each answer goes on from what the
        layers keep of them: keys and values, or a recurrent state. Without it each answer is a
        full pass of its own, as the method is written: the same gradient at a higher price, and
        the only way under gradient checkpointing, which keeps no cache.
    """

    def __init__(self, model, mode="dynamic", gamma=0.4, share_prompt=True):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        self.model, self.mode, self.gamma = model, mode, gamma
        self.share_prompt = share_prompt and mode in ("multitask", "dynamic")
        # Whether plain answers and reasonings are trained together: where each pass reads the
        # prompt again, and with FSDP, whose ranks must run the same passes.
        self.one_pass = not share_prompt

    def forward(self, batch):
        """Per-sample losses of a Batch of B posts.

        Returns (loss, plain_loss, use_cot): loss (B,) carries the gradient; plain_loss (B,) is
        L(y_s), None in mode cot; use_cot (B,) bool says which samples were trained on y_c.
        """
        prompt = self.encode_prompt(batch.prompt)

        if self.mode == "sft":
            loss = self.answer_loss(prompt, batch.plain)
            return loss, loss.detach(), torch.zeros_like(batch.has_cot)
        if self.mode == "cot":
            return self.answer_loss(prompt, batch.cot), None, batch.has_cot
        if self.mode == "multitask":
            plain_loss = self.answer_loss(prompt, batch.plain)
            cot_loss = self.answer_loss(prompt, batch.cot)
            return (plain_loss + cot_loss) / 2, plain_loss.detach(), batch.has_cot

        assert self.mode == "dynamic"
        with torch.no_grad():
            plain_loss = self.answer_loss(prompt, batch.plain)
        use_cot = (plain_loss < self.gamma) & batch.has_cot
        if self.one_pass:
            target = batch.cot.where(use_cot, batch.plain)
            return self.answer_loss(prompt, target), plain_loss, use_cot
        # A pass for each kind: in one, plain answers would be padded to the longest reasoning.
        loss = torch.zeros_like(plain_loss)
        loss[use_cot] = self.loss_of(use_cot, prompt, batch.cot)
        loss[~use_cot] = self.loss_of(~use_cot, prompt, batch.plain)
        return loss, plain_loss, use_cot

    def encode_prompt(self, inputs):
        """The Prompt of a batch's inputs; with `share_prompt` the model reads it, with gradient."""
        from transformers import DynamicCache

        without_pixels = {name: x for name, x in inputs.items() if name != "pixel_values"}
        positions, _ = self.model.model.get_rope_index(**without_pixels)  # (3, B, P)
        if not self.share_prompt:
            return Prompt(inputs, positions)
        cache = DynamicCache(config=self.model.config)
        hidden = self.read(inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        return Prompt(inputs, positions, hidden[:, -1:], cache)

    def loss_of(self, chosen, prompt, answers):
        """L(y) of the posts that `chosen` (B,) bool selects; no pass if it selects none."""
        rows = chosen.nonzero()[:, 0]
        if not len(rows):
            return chosen.new_zeros(0, dtype=torch.float32)
        if len(rows) < len(chosen):
            prompt, answers = prompt.rows(rows), answers.rows(rows)
        return self.answer_loss(prompt, answers)

    def answer_loss(self, prompt, answers):
        """L(y) (B,): the mean negative log-likelihood of each answer's tokens, its end included."""
        # A token is predicted from the one before it, so the last one is a target only.
        ids, mask = answers.ids[:, :-1], answers.mask[:, :-1]  # (B, T - 1)
        next_position = prompt.positions.amax((0, 2)) + 1  # M-RoPE: text follows the largest one
        positions = next_position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        positions = positions.expand(3, -1, -1)  # (3, B, T - 1), the same in all three for text
        attention_mask = torch.cat([prompt.inputs["attention_mask"], mask], dim=1)

        if self.share_prompt:
            output = self.model.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=attention_mask,
                past_key_values=continue_cache(prompt.cache),
                use_cache=True,
            )
            hidden = torch.cat([prompt.last_hidden, output.last_hidden_state], dim=1)
        else:
            no_images = torch.zeros_like(mask)
            types = torch.cat([prompt.inputs["mm_token_type_ids"], no_images], dim=1)
            inputs = prompt.inputs | {
                "input_ids": torch.cat([prompt.inputs["input_ids"], ids], dim=1),
                "mm_token_type_ids": types,
                "attention_mask": attention_mask,
                "position_ids": torch.cat([prompt.positions, positions], dim=2),
            }
            hidden = self.read(inputs, use_cache=False)[:, -answers.ids.shape[1] :]

        # hidden is (B, T, hidden): the prompt's last token predicts the answer's first. Logits for
        # the answers only: the product with the vocabulary is what costs most in a small model.
        is_answer = answers.mask.bool()
        logits = self.model.lm_head(hidden[is_answer]).float()  # (answer tokens, vocabulary)
        losses = TokenLoss.apply(logits, answers.ids[is_answer])
        token_loss = torch.zeros_like(is_answer, dtype=losses.dtype)  # (B, T), 0 at the padding
        token_loss = token_loss.masked_scatter(is_answer, losses)
        return token_loss.sum(1) / answers.mask.sum(1)

    def read(self, inputs, **options):
        """The model's last hidden state (B, P, hidden) over images and text."""
        return self.model.model(**inputs, **options).last_hidden_state


class DistributedStep(DynamicCoT):
    """The step on several ranks, which must all run the same layers in the same order.

    A rank whose micro-batch has no image runs the vision tower on a dummy image, and a rank without
    any post runs the model on a row that is not a post.
    """

    def forward(self, batch):
        results = super().forward(batch)
        if len(batch):
            return results
        return tuple(None if result is None else result[:0].clone() for result in results)

    def read(self, inputs, **options):
        if "pixel_values" in inputs:
            return super().read(inputs, **options)
        # Before the language model, as with real images: FSDP needs one order of layers.
        zero = self.dummy_vision_loss()
        return super().read(inputs, **options) + zero

    def dummy_vision_loss(self):
        """Zero, computed from the whole vision tower, so that its parameters take part."""
        vision = self.model.model.visual
        config, merge = vision.config, vision.config.spatial_merge_size
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        image = torch.zeros(merge**2, values, device=self.model.device)
        grid = torch.tensor([[1, merge, merge]], device=image.device)
        output = vision(image, grid_thw=grid, return_dict=True)
        features = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        return 0 * sum(feature.float().sum() for feature in features)


class TokenLoss(torch.autograd.Function):
    """-log p (N,) of target tokens (N,) from float32 logits (N, V), which it overwrites.

    It gives the values of cross_entropy, bit for bit on a CPU, in less memory: cross_entropy holds
    up to three tensors of the logits' size (1.1 GiB for 640 tokens of a vocabulary of 150,000),
    this function one, which becomes log p and then the gradient. So it has one backward only.
    """

    AT_ONCE = 2**23  # logits that are computed at a time

    @classmethod
    def rows(cls, logits, *others):
        size = max(1, cls.AT_ONCE // logits.shape[1])
        return zip(*(tensor.split(size) for tensor in (logits, *others)), strict=True)

    @staticmethod
    def forward(ctx, logits, targets):
        for (rows,) in TokenLoss.rows(logits):
            rows.copy_(rows.log_softmax(1))
        ctx.save_for_backward(logits, targets)
        return -logits.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        log_p, targets = ctx.saved_tensors
        for rows, target, grad_loss in TokenLoss.rows(log_p, targets[:, None], gradient[:, None]):
            grad_log_p = torch.zeros_like(rows).scatter_(1, target, -grad_loss)
            # log_softmax's own backward: formulas of our own round differently.
            rows.copy_(torch._log_softmax_backward_data(grad_log_p, rows, 1, rows.dtype))
        return log_p, None


# ------------------------------------------------------------------------------------- generation


def generate(model, encoder, batch, think="auto", max_new_tokens=512):
    """Greedy answers to a Batch's prompts: a list of (text, generated tokens, whether it ended)."""
    answers = dict(write_answers(model, encoder, [batch], think, max_new_tokens))
    return [answers[identity] for identity in batch.ids]


@torch.no_grad()
def write_answers(model, encoder, batches, think="auto", max_new_tokens=512):
    """Yield (id, (text, generated tokens, whether it ended)) of each post as it becomes known.

    Greedy decoding with continuous batching: prompts are read a Batch at a time, and as many
    answers are written at once as the largest Batch has posts. A finished answer leaves its row of
    the cache to the next prompt.

    think: auto lets the model decide; always starts the answer with <think>; never keeps <think>
    out of the whole answer. Where the chat template has opened <think>, always bans </think> at the
    first position, and never starts with it.
    """
    greedy, rows = Greedy(model, encoder, think, max_new_tokens), Rows()
    prompts = read_prompts(model, batches, greedy)
    was_training = model.training
    model.eval()
    try:
        with bf16_on_cuda(model.device):  # around all passes: it casts the weights once
            while rows.fill(prompts):
                hidden = model.model(**rows.inputs(model)).last_hidden_state
                greedy.extend(rows.answers, hidden)
                for answer in rows.pop_finished():
                    text = encoder.decode(answer.tokens[: len(answer.tokens) - answer.ended])
                    yield answer.id, (text, len(answer.tokens), answer.ended)
    finally:
        model.train(was_training)


def read_prompts(model, batches, greedy):
    """Yield (Answer with its first token, cache, its row in it) of each post of some Batches."""
    for batch in batches:
        inputs = batch.to(model.device).prompt
        if begun := greedy.begun:
            added = {"input_ids": begun, "attention_mask": [1] * len(begun)}
            added["mm_token_type_ids"] = [0] * len(begun)
            for name, values in added.items():
                columns = inputs[name].new_tensor(values).expand(len(batch), -1)
                inputs[name] = torch.cat([inputs[name], columns], dim=1)
        prompt = DynamicCoT(model).encode_prompt(inputs)
        lengths = inputs["attention_mask"].sum(1).tolist()
        positions = (prompt.positions.amax((0, 2)) + 1).tolist()
        answers = [
            Answer(identity, list(begun), length, position)
            for identity, length, position in zip(batch.ids, lengths, positions, strict=True)
        ]
        greedy.extend(answers, prompt.last_hidden)
        yield from ((answer, prompt.cache, row) for row, answer in enumerate(answers))


def predict(model, encoder, loader, think="auto", max_new_tokens=512):
    """Yield a prediction for every post of a `data.Loader` without answers, as they are made.

    A prediction: {"id", "keyphrases", "think", "output", "tokens"}, with "cut" where the answer
    ran out of tokens, and with "error" (and no keyphrases) where the image could not be read.
    """
    failed = []

    def batches():
        for micro_batches, skipped in loader:
            failed.extend(skipped)
            yield from micro_batches

    def failures():
        while failed:
            post = failed.pop(0)
            yield failed_prediction(post.id, f"image {post.image}: {post.reason}")

    for identity, answer in write_answers(model, encoder, batches(), think, max_new_tokens):
        output, tokens, ended = answer
        keyphrases, reasoning = parse_answer(output)
        prediction = {
            "id": identity,
            "keyphrases": keyphrases,
            "think": reasoning,
            "output": output,
            "tokens": tokens,
        }
        yield from failures()
        yield prediction if ended else prediction | {"cut": True}
    yield from failures()


def bf16_on_cuda(device):
    """The autocast of training and generation: bf16 on a GPU that has it, else none."""
    bf16 = compute_dtype(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


# ---------------------------------------------------------------------------------------- loading


def load(name, device="cpu", dtype=torch.float32, options=None, weights=True):
    """(model, encoder, folder) of a Qwen-VL model in Hugging Face layout.

    name: a run, a checkpoint, a model or adapter folder, or a hub name; an adapter's folder gives
        its base with the adapter on it.
    options: an EncoderOptions; what it leaves out is as the folder has it, else the default.
    weights: False leaves the weights uninitialized, since they will come from another rank.

    Raises UserError where a file is missing, damaged, of another family, or only a pickle.
    """
    from transformers import GenerationConfig

    hide_loading_report()
    folder = base = find_model(name)
    if (folder / ADAPTER).is_file():
        base = base_of(folder)
    check_family(base)
    files = weight_files(base)
    tokenizer, image_processor = read_tokenizer(base), read_image_processor(base)
    if weights:
        check_size(base, files)
        model = read_weights(base, dtype)
    else:
        model = empty_model(base, dtype)
        if (base / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(base)
    if folder != base:
        model = read_adapter(folder, model, weights)
    check_fit(base, model, tokenizer, image_processor)
    encoder = make_encoder(folder, model, tokenizer, image_processor, options)
    return model.to(device), encoder, folder


def make_encoder(folder, model, tokenizer, image_processor, options=None):
    """The Encoder of a model, with what `options` leave out as the folder has it."""
    options, own = options or EncoderOptions(), read_own(folder)
    file, prompt = options.prompt_file, own.pop("prompt", PROMPT)
    prompt = read_prompt(file) if file else prompt
    own = {name: value for name, value in own.items() if getattr(options, name) is None}
    options = options._replace(**own)
    image_token = model.config.image_token_id
    try:
        return Encoder(tokenizer, image_processor, image_token, prompt, options)
    except UserError as error:
        raise UserError(f"{file or folder}: {error}") from None
    except Exception as error:  # a chat template is a program of its own
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template can't be used ({first_line(error)}); "
            "copy it from the model it was trained from"
        ) from None


def check_family(folder):
    """Raises UserError for a model of a family that the step was not written for."""
    family = read_json(folder / "config.json").get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{folder}/config.json: the model type {family!r} is not supported; "
            f"those that are: {', '.join(FAMILIES)}"
        )


def read_weights(folder, dtype):
    """The model of a folder. Raises UserError where weights are damaged, missing or misshapen."""
    from transformers import AutoModelForImageTextToText

    with reading(f"{folder}: its weights"):
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
    return model


def empty_model(config, dtype=torch.float32, device="cpu"):
    """A model with uninitialized weights and buffers; on the device "meta" without any memory.

    config: a config of transformers, or a folder that has one.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if isinstance(config, Path):
        config = AutoConfig.from_pretrained(config, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    if device == "meta":
        return model
    model.to_empty(device=device)
    model.tie_weights()
    return model.eval()


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


def check_size(folder, files):
    """Raise UserError where config.json describes a far larger model than the weight files hold.

    A config that lacks its sizes has transformers' defaults, those of a 7B model.
    """
    from safetensors import safe_open

    stored = 0
    for file in files:
        with reading(file), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                stored += math.prod(tensors.get_slice(name).get_shape())
    with reading(f"{folder}/config.json", "copy it again"):
        described = empty_model(folder, device="meta").num_parameters()
    if described > 2 * stored:
        raise UserError(
            f"{folder}/config.json: describes {described:,} weights, the *.safetensors files hold "
            f"{stored:,}; copy it from the model it was trained from"
        )


def check_fit(folder, model, tokenizer, image_processor):
    """Raise UserError where tokenizer, image processor and model are not of one model."""
    import numpy as np

    mend = "from the model it was trained from"
    embeddings, known = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if known > embeddings:
        raise UserError(
            f"{folder}: its tokenizer has {known} tokens, its weights {embeddings}; copy the "
            f"tokenizer's files {mend}"
        )
    vision = model.config.vision_config
    expected = 3 * vision.temporal_patch_size * vision.patch_size**2
    # Most errors of preprocessor_config.json appear only when an image is processed.
    image = np.zeros((64, 64, 3), np.uint8)
    with reading(f"{folder}: its preprocessor_config.json", f"copy it {mend}"):
        patches = image_processor([image], do_resize=True, return_tensors="pt")["pixel_values"]
        found, merge = patches.shape[1], image_processor.merge_size
    if (found, merge) != (expected, vision.spatial_merge_size):
        raise UserError(
            f"{folder}: its preprocessor_config.json makes patches of {found} values, merged by "
            f"{merge}; its weights expect {expected}, merged by {vision.spatial_merge_size}; copy "
            f"it {mend}"
        )
