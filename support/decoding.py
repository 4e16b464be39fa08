"""What answers lean on: caches that they share or take turns in, and the choice of tokens."""

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers.cache_utils import Cache, DynamicLayer

TAG = "<think"


def continue_cache(cache, rows=None):
    """A cache that goes on from (the given rows of) another, whose tensors stay as they are.

    The gradient needs them. Keys and values are appended to out of place, but a recurrent state is
    overwritten.
    """

    def chosen(tensor):  # its gradient is added up faster than that of tensor[rows]
        return tensor if rows is None else tensor.index_select(0, rows)

    continued = copy.copy(cache)
    continued.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in continued.layers:
        if is_recurrent(layer):
            for name in ("conv_states", "recurrent_states"):
                states = {key: chosen(state) for key, state in getattr(layer, name).items()}
                setattr(layer, name, CopiedOnRead(states))
        else:
            layer.keys, layer.values = chosen(layer.keys), chosen(layer.values)
    return continued


class CopiedOnRead(dict):
    """A dict of tensors in which what is done in place is done to a copy."""

    def __getitem__(self, key):
        return super().__getitem__(key).clone()


@dataclass
class Answer:
    """An answer that is being written."""

    id: str  # of its post
    tokens: list[int]
    length: int  # tokens of prompt and answer that the model has read
    position: int  # M-RoPE's, of the token that it reads next
    ended: bool | None = None  # True: with an end token; False: it has reached the limit


class Rows(Cache):
    """The cache of the answers that are being written, a row each; they come and go.

    A row's tokens stand in its first columns, however long the other rows are, and a mask hides
    what is behind them. So a new answer is copied into a free row, the next tokens are written in
    place, and no row needs padding on the left. There are as many rows as the largest of the
    batches that the answers come from, and as many columns as the longest answer needed.
    """

    ROOM = 64  # columns to grow by

    def __init__(self):
        super().__init__(layers=[])
        self.answers, self.most = [], 1
        self.stored = []  # two tensors a layer: keys and values, or a recurrent state's parts

    def fill(self, prompts):
        """Take in (answer, cache, row) of an iterator while there is room; returns the answers."""
        while len(self.answers) < self.most and (prompt := next(prompts, None)):
            self.add(*prompt)
        return self.answers

    def add(self, answer, cache, row):
        """Take in an answer that goes on from a row of `cache`, which is padded on the left."""
        if not self.layers:
            self.stored = [[tensor[:0] for tensor in tensors(layer)] for layer in cache.layers]
            self.layers = list(map(self.make_layer, self.stored, cache.layers))
        self.most = max(self.most, len(tensors(cache.layers[0])[0]))
        place = len(self.answers)
        self.answers.append(answer)
        for stored, layer in zip(self.stored, cache.layers, strict=True):
            for index, tensor in enumerate(tensors(layer)):
                new = tensor[row] if is_recurrent(layer) else tensor[row, :, -answer.length :]
                self.reserve(stored, index, new.shape[1])
                stored[index][place, :, : new.shape[1]] = new

    def make_layer(self, stored, layer):
        """The layer of this cache for two stored tensors, given that of another."""
        if not is_recurrent(layer):
            return EndsOfRows(self, stored)
        layer = copy.copy(layer)
        layer.conv_states, layer.recurrent_states = (FirstRows(self, stored, i) for i in (0, 1))
        return layer

    def reserve(self, stored, index, columns):
        """Replace a stored tensor (rows, …, columns, …) by a larger one where it is too small."""
        old = stored[index]
        if len(old) < self.most or old.shape[2] < columns:
            shape = list(old.shape)
            shape[0] = self.most
            if shape[2] < columns:
                shape[2] = columns + self.ROOM
            stored[index] = old.new_zeros(shape)
            stored[index][: len(old), :, : old.shape[2]] = old

    def pop_finished(self):
        """Drop the answers that are finished, and return them."""
        finished = []
        for row in reversed(range(len(self.answers))):
            if self.answers[row].ended is not None:
                finished.append(self.answers[row])
                self.answers[row] = self.answers[-1]  # the last one takes the row
                self.answers.pop()
                for stored in self.stored:
                    for tensor in stored:
                        tensor[row] = tensor[len(self.answers)]
        return finished

    def inputs(self, model):
        """The inputs with which a model reads the last token of each of R answers."""
        numbers = [(answer.tokens[-1], answer.position, answer.length) for answer in self.answers]
        for answer in self.answers:
            answer.position += 1
            answer.length += 1
        numbers = torch.tensor(numbers, device=model.device)
        ids, positions, self.ends = numbers[:, :1], numbers[:, 1:2], numbers[:, 2]
        self.places = torch.arange(len(numbers), device=model.device)
        self.width = max(answer.length for answer in self.answers)
        # Added to the scores of attention (R, heads, 1, columns): -inf behind the end of a row.
        behind = torch.arange(self.width, device=model.device) > self.ends[:, None]
        mask = torch.zeros_like(behind, dtype=model.dtype).masked_fill(behind, -torch.inf)
        return {
            "input_ids": ids,
            "position_ids": positions.expand(3, -1, -1),
            "attention_mask": mask[:, None, None],
            "past_key_values": self,
            "use_cache": True,
        }


class EndsOfRows(DynamicLayer):
    """A layer of Rows whose next keys and values (R, heads, 1, …) go to each row's end."""

    def __init__(self, rows, stored):
        super().__init__()
        self.rows, self.stored = rows, stored

    def update(self, *keys_and_values, **_):
        rows = self.rows
        for index, new in enumerate(keys_and_values[:2]):
            rows.reserve(self.stored, index, rows.width)
            new = new[:, :, 0].to(self.stored[index].dtype)  # under autocast, values are bf16
            self.stored[index][rows.places, :, rows.ends] = new
        return [tensor[: len(rows.answers), :, : rows.width] for tensor in self.stored]


class FirstRows(dict):
    """A part of a layer's recurrent state: that of the rows in use."""

    def __init__(self, rows, stored, index):
        super().__init__()
        self.rows, self.stored, self.index = rows, stored, index

    def __getitem__(self, _):
        return self.stored[self.index][: len(self.rows.answers)]


def is_recurrent(layer):
    """Whether a layer of a cache keeps a recurrent state, as most of Qwen3.5's do."""
    return hasattr(layer, "recurrent_states")


def tensors(layer):
    """The two tensors that a layer of a cache keeps, with a row for each sequence."""
    if is_recurrent(layer):
        return layer.conv_states[0], layer.recurrent_states[0]
    return layer.keys, layer.values


class Greedy:
    """Adds to answers their most probable next token, of those that `think` allows."""

    def __init__(self, model, encoder, think, max_new_tokens):
        self.head = model.lm_head
        self.begun, self.banned = encoder.start(think)
        self.longest = len(self.begun) + max_new_tokens
        vocabulary = model.config.text_config.vocab_size
        self.no_think = NoThink(encoder, vocabulary) if think == "never" else None
        # Published models may end with a second token. No other setting of theirs is inherited:
        # they ask for sampling and a repetition penalty.
        ends = model.generation_config.eos_token_id
        self.ends = {encoder.end_of_turn, *(ends if isinstance(ends, list) else [ends])}

    def extend(self, answers, hidden):
        """Add a token to each unfinished one of B answers, given last hidden (B, 1, hidden)."""
        logits = self.head(hidden[:, 0]).float()  # (B, vocabulary)
        if self.banned is not None and not answers[0].tokens:
            logits[:, self.banned] = -torch.inf
        if self.no_think:
            logits = self.no_think([answer.tokens for answer in answers], logits)
        for answer, token in zip(answers, logits.argmax(1).tolist(), strict=True):
            if answer.ended is None:  # else its first token was its last
                answer.tokens.append(token)
                if token in self.ends or len(answer.tokens) == self.longest:
                    answer.ended = token in self.ends


class NoThink:
    """Keeps <think> out of answers, for `--think never`.

    It forbids every token that would complete `<think`, in any case. `<think>` may be one token or
    several, and parts of it may stand in one token with the text beside them. So a token is
    forbidden by the text that it adds to the answer's end.

    encoder: whose tokenizer writes the answers.
    """

    def __init__(self, encoder, vocabulary):
        self.texts, self.forbidden = token_texts(encoder, vocabulary)

    def __call__(self, answers, logits):
        """The logits (B, vocabulary) of the next tokens of B answers, which are lists of tokens."""
        written = [self.written(tokens) for tokens in answers]
        return logits.masked_fill(self.forbidden.to(logits.device)[written], -torch.inf)

    def written(self, tokens):
        """How many of the first characters of the tag an answer ends with."""
        end = ""
        for token in reversed(tokens):
            if len(end) >= len(TAG):
                break
            end = self.texts[token] + end
        return next(n for n in reversed(range(len(TAG))) if end.endswith(TAG[:n]))


@lru_cache(maxsize=1)
def token_texts(encoder, vocabulary):
    """(what each token adds to a text, which tokens complete the tag).

    The latter is (length of the tag, vocabulary) bool: row n holds where n of its characters are
    written.
    """
    tokenizer = encoder.tokenizer
    # Decoders put spaces between some tokens, so each is decoded behind another one.
    bracket = tokenizer("<", add_special_tokens=False).input_ids[-1]
    pairs = [[bracket, token] for token in range(len(tokenizer))]
    texts = tokenizer.backend_tokenizer.decode_batch(pairs, skip_special_tokens=False)
    texts = [text.lower().removeprefix("<") for text in texts] + [""] * vocabulary
    for token in encoder.hidden:  # left out of the decoded answer
        texts[token] = ""
    forbidden = torch.zeros(len(TAG), vocabulary, dtype=torch.bool)
    for token, text in enumerate(texts[:vocabulary]):
        for written in range(len(TAG)):
            forbidden[written, token] = text.startswith(TAG[written:]) or TAG in text
    return texts[:vocabulary], forbidden
