"""What training and inference compute: FLOPs, from a model's shape and its posts' lengths.

Counted are the matrix products that the method needs, without padding:

    2 x weights x tokens                for every linear layer
    4 x width x tokens x tokens seen    for attention, half of it where attention is causal

A backward pass counts twice: once for the inputs' gradients, once for the weights', which a
frozen layer has none of; pixels need no gradient. The shared prompt is read once, and a probe of
the plain answer has no backward pass. The literal step of gradient checkpointing reads the prompt
with every answer, and its backward pass repeats the layers. The embedding is a look-up and costs
nothing; the head works at answer tokens only. A layer with a recurrent state (Qwen3.5) updates and
reads it at every token. An adapter's own products are left out.
"""

from dataclasses import dataclass

import numpy as np
from torch import nn

from evaluate import UserError
from train import MODES

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by a part of the card's name


@dataclass(frozen=True)
class Lengths:
    """Average tokens of a post: prompt without image, image, y_s, y_c; answers with their end."""

    text: float
    image: float
    plain: float
    cot: float

    @property
    def prompt(self):
        return self.text + self.image


class Flops:
    """FLOPs of one post through a model, which may be on the device "meta".

    A part is an array of (linear layers in blocks, attention, what is outside of blocks), whose
    backward passes differ.
    """

    def __init__(self, model):
        if getattr(model.config.text_config, "num_experts", 0):
            raise UserError("FLOPs of mixtures of experts are not known here")

        def linear(*modules):
            products = (nn.Linear, nn.Conv3d)
            inner = (m for module in modules for m in module.modules() if isinstance(m, products))
            return 2 * sum(m.weight.numel() for m in inner)

        tower, words = model.model.visual, model.model.language_model
        mergers = [m for name, m in tower.named_children() if "merger" in name]
        self.config = model.config
        self.merger, self.pixels = linear(*mergers), linear(tower.patch_embed)
        self.patch = linear(tower) - self.merger - self.pixels
        self.word = linear(words)
        self.head = 2 * self.config.text_config.hidden_size * self.config.text_config.vocab_size

    def image(self, tokens):
        """The vision tower on an image of so many tokens."""
        v = self.config.vision_config
        width = getattr(v, "embed_dim", None) or v.hidden_size
        patches = tokens * v.spatial_merge_size**2
        full, window = v.depth, patches
        if hasattr(v, "fullatt_block_indexes"):
            full = len(v.fullatt_block_indexes)
            window = min(patches, (v.window_size // v.patch_size) ** 2)
        seen = full * patches + (v.depth - full) * window
        outside = self.pixels * patches + self.merger * tokens
        return np.array([self.patch * patches, 4 * width * patches * seen, outside])

    def words(self, before, new):
        """The text layers on `new` tokens after `before` ones; causal among themselves."""
        c = self.config.text_config
        width = c.num_attention_heads * (
            getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        )
        kinds = getattr(c, "layer_types", None) or []
        recurrent = kinds.count("linear_attention")
        attention = 4 * width * (c.num_hidden_layers - recurrent) * new * (before + new / 2)
        if recurrent:
            state = c.linear_key_head_dim * c.linear_value_head_dim * c.linear_num_value_heads
            attention += 6 * state * recurrent * new
        return np.array([self.word * new, attention, 0])

    def answer(self, prompt, length):
        """An answer's tokens after a prompt, and the head at all of them."""
        return self.words(prompt, length - 1) + np.array([0, 0, self.head * length])

    def training(self, lengths, mode, cot_share=1.0, args=None):
        """One post in a training step of `mode`, as its row of train.MODES says.

        cot_share: the share of posts that are trained to reason, where the mode chooses; args:
            train.py's settings, for lora, freeze_vision and gradient_checkpointing.
        """
        lora, literal = (getattr(args, name, None) for name in ("lora", "gradient_checkpointing"))
        trained, once = 2 if lora else 3, np.array([1, 1, 1])
        text = np.array([trained, 3, trained]) + np.array([1, 1, 0]) * bool(literal)
        vision = once if getattr(args, "freeze_vision", False) else text

        def prompt(text, vision):
            pixels = self.pixels * lengths.image * self.config.vision_config.spatial_merge_size**2
            image = self.image(lengths.image) @ vision - pixels * (vision[2] == 3)
            return image + self.words(0, lengths.prompt) @ text

        total = 0 if literal else prompt(text, vision)
        for length, share, is_trained in passes(lengths, mode, cot_share):
            times = (text, vision) if is_trained else (once, once)
            total += share * (self.answer(lengths.prompt, length) @ times[0])
            total += share * prompt(*times) if literal else 0
        return float(total)

    def inference(self, lengths, tokens):
        """(reading image and prompt, generating `tokens` tokens) for one post."""
        read = self.image(lengths.image) + self.words(0, lengths.prompt)
        return read.sum(), self.answer(lengths.prompt, tokens).sum()


def passes(lengths, mode, cot_share=1.0):
    """The passes over a post's answers in a mode: (tokens, share of the posts, whether trained)."""
    trains, plain, cot = MODES[mode].trains, lengths.plain, lengths.cot
    if trains != "either":
        tokens = {"plain": [plain], "cot": [cot], "both": [plain, cot]}[trains]
        return [(length, 1, True) for length in tokens]
    probe = [(plain, 1, False)] if MODES[mode].shares_prompt else []
    return [*probe, (cot, cot_share, True), (plain, 1 - cot_share, True)]
