"""What answers lean on: the prompt's cache, which several of them share, and a ban on <think>."""

import copy
from functools import lru_cache

import torch

TAG = "<think"


def continue_cache(cache):
    """A cache that goes on from another, whose tensors stay as they are: the gradient needs them.

    Keys and values are appended to out of place, but a recurrent state is overwritten.
    """
    continued = copy.copy(cache)
    continued.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in continued.layers:
        if hasattr(layer, "recurrent_states"):  # most layers of Qwen3.5
            layer.conv_states = CopiedOnRead(layer.conv_states)
            layer.recurrent_states = CopiedOnRead(layer.recurrent_states)
    return continued


class CopiedOnRead(dict):
    """A dict of tensors in which what is done in place is done to a copy."""

    def __getitem__(self, key):
        return super().__getitem__(key).clone()


class NoThink:
    """A logits processor for `generate`, for `--think never`: keeps <think> out of the answer.

    It forbids every token that would complete `<think`, in any case. `<think>` may be one token or
    several, and parts of it may stand in one token with the text beside them. So a token is
    forbidden by the text that it adds to the answer's end.

    encoder: whose tokenizer writes the answers. prompt_length: tokens before the answer.
    """

    def __init__(self, encoder, vocabulary, prompt_length):
        self.texts, self.forbidden = token_texts(encoder, vocabulary)
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        """The scores (B, vocabulary) of the next tokens after input_ids (B, T)."""
        written = [self.written(row) for row in input_ids[:, self.prompt_length :].tolist()]
        return scores.masked_fill(self.forbidden.to(scores.device)[written], -torch.inf)

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
