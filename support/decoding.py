"""How answers are written: caches that are continued or filled in turns, the choice of tokens."""

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers.cache_utils import Cache, DynamicLayer

TAG = "<think"


def continue_cache(cache):
    """A cache that goes on from another, whose tensors stay as they are: the gradient needs them.

    Keys and values are appended to out of place, but a recurrent state is overwritten.
    """
    continued = copy.copy(cache)
    continued.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in filter(is_recurrent, continued.layers):
        for name in ("conv_states", "recurrent_states"):
            setattr(layer, name, CopiedOnRead(getattr(layer, name)))
    return continued


class CopiedOnRead(dict):
    """A dict of tensors in which what is done in place is done to a copy."""

    def __getitem__(self, key):
        return super().__getitem__(key).clone()


@dataclass
class Generation:
    """An answer that is being written."""

    id: str  # of its post
    tokens: list[int]
    length: int  # tokens of prompt and answer that the model has read
    position: int  # M-RoPE's, of the token that it reads next
    ended: bool | None = None  # True: with an end token; False: it has reached the limit


class AnswerCache(Cache):
    """The cache of the answers that are being written: each has a slot, and they come and go.

    An answer's tokens stand in the first columns of its slot, however long the others are, and a
    mask hides what is behind them. So a new answer is copied into a free slot, the next tokens are
    written in place, and nothing needs padding on the left. There are as many slots as the largest
    of the batches that the answers come from, and as many columns as the longest answer needed.
    """

    ROOM = 64  # columns to grow by

    def __init__(self):
        super().__init__(layers=[])
        self.generations, self.slots = [], 1
        self.stored = []  # two tensors a layer: keys and values, or a recurrent state's parts

    def fill(self, prompts):
        """Take in (Generation, cache, index) of an iterator while there are free slots."""
        while len(self.generations) < self.slots and (prompt := next(prompts, None)):
            self.add(*prompt)
        return self.generations

    def add(self, generation, cache, index):
        """Take in an answer that goes on from sequence `index` of a left-padded `cache`."""
        if not self.layers:
            self.stored = [[tensor[:0] for tensor in tensors(layer)] for layer in cache.layers]
            self.layers = list(map(self.make_layer, self.stored, cache.layers))
        self.slots = max(self.slots, len(tensors(cache.layers[0])[0]))
        slot = len(self.generations)
        self.generations.append(generation)
        for stored, layer in zip(self.stored, cache.layers, strict=True):
            for part, tensor in enumerate(tensors(layer)):
                new = tensor[index]
                if not is_recurrent(layer):
                    new = new[:, -generation.length :]
                self.reserve(stored, part, new.shape[1])
                stored[part][slot, :, : new.shape[1]] = new

    def make_layer(self, stored, layer):
        """The layer of this cache for two stored tensors, given that of another."""
        if not is_recurrent(layer):
            return SlotLayer(self, stored)
        layer = copy.copy(layer)
        layer.conv_states, layer.recurrent_states = (SlotStates(self, stored, i) for i in (0, 1))
        return layer

    def reserve(self, stored, part, columns):
        """Replace a stored tensor (slots, …, columns, …) by a larger one where it is too small."""
        old = stored[part]
        if len(old) < self.slots or old.shape[2] < columns:
            shape = [self.slots, *old.shape[1:]]
            if shape[2] < columns:
                shape[2] = columns + self.ROOM
            stored[part] = old.new_zeros(shape)
            stored[part][: len(old), :, : old.shape[2]] = old

    def pop_finished(self):
        """Drop the answers that are finished, and return them."""
        finished = []
        for slot in reversed(range(len(self.generations))):
            if self.generations[slot].ended is not None:
                finished.append(self.generations[slot])
                self.generations[slot] = self.generations[-1]  # the last one takes the slot
                self.generations.pop()
                for stored in self.stored:
                    for tensor in stored:
                        tensor[slot] = tensor[len(self.generations)]
        return finished

    def inputs(self, model):
        """The inputs with which a model reads the last token of each of G answers."""
        numbers = [(each.tokens[-1], each.position, each.length) for each in self.generations]
        for each in self.generations:
            each.position += 1
            each.length += 1
        numbers = torch.tensor(numbers, device=model.device)
        ids, positions, self.ends = numbers[:, :1], numbers[:, 1:2], numbers[:, 2]
        self.used = torch.arange(len(numbers), device=model.device)
        self.width = max(each.length for each in self.generations)
        # Added to the scores of attention (G, heads, 1, columns): -inf behind an answer's end.
        behind = torch.arange(self.width, device=model.device) > self.ends[:, None]
        mask = torch.zeros_like(behind, dtype=model.dtype).masked_fill(behind, -torch.inf)
        return {
            "input_ids": ids,
            "position_ids": positions.expand(3, -1, -1),
            "attention_mask": mask[:, None, None],
            "past_key_values": self,
            "use_cache": True,
        }


class SlotLayer(DynamicLayer):
    """A layer of an AnswerCache: keys and values (G, heads, 1, …) go to the end of each slot."""

    def __init__(self, cache, stored):
        super().__init__()
        self.cache, self.stored = cache, stored

    def update(self, *keys_and_values, **_):
        cache = self.cache
        for part, new in enumerate(keys_and_values[:2]):
            cache.reserve(self.stored, part, cache.width)
            new = new[:, :, 0].to(self.stored[part].dtype)  # under autocast, values are bf16
            self.stored[part][cache.used, :, cache.ends] = new
        return [tensor[: len(cache.generations), :, : cache.width] for tensor in self.stored]


class SlotStates(dict):
    """A part of a layer's recurrent state: that of the slots in use."""

    def __init__(self, cache, stored, part):
        super().__init__()
        self.cache, self.stored, self.part = cache, stored, part

    def __getitem__(self, _):
        return self.stored[self.part][: len(self.cache.generations)]


def is_recurrent(layer):
    """Whether a layer of a cache keeps a recurrent state, as most of Qwen3.5's do."""
    return hasattr(layer, "recurrent_states")


def tensors(layer):
    """The two tensors that a layer of a cache keeps, one row a sequence."""
    if is_recurrent(layer):
        return layer.conv_states[0], layer.recurrent_states[0]
    return layer.keys, layer.values


class Greedy:
    """Adds to answers their most probable next token, of those that `think` allows."""

    def __init__(self, model, encoder, think, max_new_tokens):
        self.head = model.lm_head
        self.begun, self.banned = encoder.start(think)
        self.longest = len(self.begun) + max_new_tokens
        self.texts = self.forbidden = None
        if think == "never":
            self.texts, forbidden = token_texts(encoder, model.config.text_config.vocab_size)
            self.forbidden = forbidden.to(model.device)
        # Published models may end with a second token. No other setting of theirs is inherited:
        # they ask for sampling and a repetition penalty.
        ends = model.generation_config.eos_token_id
        self.ends = {encoder.end_of_turn, *(ends if isinstance(ends, list) else [ends])}

    def extend(self, generations, hidden):
        """Add a token to each unfinished one of B answers, given last hidden (B, 1, hidden)."""
        logits = self.head(hidden[:, 0]).float()  # (B, vocabulary)
        if self.banned is not None and not generations[0].tokens:
            logits[:, self.banned] = -torch.inf
        if self.forbidden is not None:
            written = [self.written(each.tokens) for each in generations]
            logits = logits.masked_fill(self.forbidden[written], -torch.inf)
        for each, token in zip(generations, logits.argmax(1).tolist(), strict=True):
            if each.ended is None:  # else its first token was its last
                each.tokens.append(token)
                if token in self.ends or len(each.tokens) == self.longest:
                    each.ended = token in self.ends

    def written(self, tokens):
        """How many of the first characters of the tag an answer ends with."""
        text = "".join(self.texts[token] for token in tokens)
        return next(n for n in reversed(range(len(TAG))) if text.endswith(TAG[:n]))


@lru_cache(maxsize=1)
def token_texts(encoder, vocabulary):
    """(what each token adds to a text, which tokens `--think never` forbids).

    These are the tokens that would complete `<think`, in any case: (length of the tag, vocabulary)
    bool, row n holds where n of its characters are written. `<think>` may be one token or several,
    and parts of it may stand in one token with the text beside them. So a token is forbidden by the
    text that it adds to the answer's end.
    """
    tokenizer = encoder.tokenizer
    # Decoders put spaces between some tokens, so each is decoded behind another one.
    bracket = tokenizer("<", add_special_tokens=False).input_ids[-1]
    pairs = [[bracket, token] for token in range(len(tokenizer))]
    texts = tokenizer.backend_tokenizer.decode_batch(pairs, skip_special_tokens=False)
    texts = [text.lower().removeprefix("<") for text in texts] + [""] * vocabulary
    for token in encoder.left_out:  # left out of the decoded answer
        texts[token] = ""
    forbidden = torch.zeros(len(TAG), vocabulary, dtype=torch.bool)
    for token, text in enumerate(texts[:vocabulary]):
        for written in range(len(TAG)):
            forbidden[written, token] = text.startswith(TAG[written:]) or TAG in text
    return texts[:vocabulary], forbidden
