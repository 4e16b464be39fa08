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

    A part is an array of (linear layers in blocks, attention, what is outside of blocks, the
    embedding of pixels), whose backward passes differ.
    """

    def __init__(self, model):
        c, self.vision = model.config.text_config, model.config.vision_config
        if getattr(c, "num_experts", 0):
            raise UserError("FLOPs of mixtures of experts are not known here")
        tower, words = model.model.visual, model.model.language_model
        self.pixels, self.patch, self.word = map(linear, (tower.patch_embed, tower.blocks, words))
        self.merger = linear(tower) - self.patch - self.pixels
        self.head = 2 * c.hidden_size * c.vocab_size
        outputs = (m for name, m in words.named_modules() if name.endswith("self_attn.o_proj"))
        self.attention = 4 * sum(layer.in_features for layer in outputs)
        self.state = 0
        if recurrent := (getattr(c, "layer_types", None) or []).count("linear_attention"):
            heads = c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
            self.state = 6 * heads * recurrent
        self.patch_attention = 4 * tower.blocks[0].attn.qkv.in_features

    def image(self, tokens):
        """The vision tower on an image of so many tokens; Qwen2.5's blocks see windows of it."""
        v, patches = self.vision, tokens * self.vision.spatial_merge_size**2
        full = len(getattr(v, "fullatt_block_indexes", range(v.depth)))
        window = min(patches, (getattr(v, "window_size", 0) // v.patch_size) ** 2)
        attention = self.patch_attention * patches * (full * patches + (v.depth - full) * window)
        parts = [self.patch * patches, attention, self.merger * tokens, self.pixels * patches]
        return np.array(parts)

    def words(self, before, new):
        """The text layers on `new` tokens after `before` ones; causal among themselves."""
        attention = self.attention * new * (before + new / 2) + self.state * new
        return np.array([self.word * new, attention, 0, 0])

    def answer(self, prompt, length):
        """An answer's tokens after a prompt, and the head at all of them."""
        return self.words(prompt, length - 1) + np.array([0, 0, self.head * length, 0])

    def training(self, lengths, mode, cot_share=1.0, args=None):
        """One post in a training step of `mode`, as its row of train.MODES says.

        cot_share: the share of posts that are trained to reason, where the mode chooses; args:
            train.py's settings, for lora, freeze_vision and gradient_checkpointing.
        """
        lora, literal = (getattr(args, name, None) for name in ("lora", "gradient_checkpointing"))
        linear, repeated = 2 if lora else 3, bool(literal)
        forward = np.ones(4)
        text = np.array([linear + repeated, 3 + repeated, linear, linear - 1])
        vision = forward if getattr(args, "freeze_vision", False) else text

        def prompt(text, vision):
            return self.image(lengths.image) @ vision + self.words(0, lengths.prompt) @ text

        total = 0 if literal else prompt(text, vision)
        for length, share, is_trained in passes(lengths, mode, cot_share):
            times = (text, vision) if is_trained else (forward, forward)
            total += share * (self.answer(lengths.prompt, length) @ times[0])
            total += share * prompt(*times) if literal else 0
        return float(total)

    def inference(self, lengths, tokens):
        """(reading image and prompt, generating `tokens` tokens) for one post."""
        read = self.image(lengths.image) + self.words(0, lengths.prompt)
        return read.sum(), self.answer(lengths.prompt, tokens).sum()


def linear(module):
    """FLOPs of a module's linear layers for a token."""
    products = (m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv3d)))
    return 2 * sum(product.weight.numel() for product in products)


def passes(lengths, mode, cot_share=1.0):
    """The passes over a post's answers in a mode: (tokens, share of the posts, whether trained)."""
    trains, plain, cot = MODES[mode].trains, lengths.plain, lengths.cot
    if trains != "either":
        tokens = {"plain": [plain], "cot": [cot], "both": [plain, cot]}[trains]
        return [(length, 1, True) for length in tokens]
    probe = [(plain, 1, False)] if MODES[mode].shares_prompt else []
    return [*probe, (cot, cot_share, True), (plain, 1 - cot_share, True)]
