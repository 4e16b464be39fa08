"""Posts, prompts and answers: everything between a JSONL file and the tensors that a model reads.

A record is one JSON object a line; other fields are kept and ignored:

    {"id": "D0wn", "text": "some tiny blue flowers", "image": "images/D0wn.jpg",
     "keyphrases": ["wildflower hour"], "cot": "The photo shows …"}

`image` is relative to the JSONL file, or absolute, or null; `cot` is the reasoning without tags, or
absent.
"""

import math
import os
import re
import signal
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evaluate import BYTE_ORDER_MARK, UserError, parse_line, read_lines, shown
from support.checkpoint import ENCODER_FILE, read_own
from support.console import info, positive_int, reading, reading_progress, whole_number
from support.images import MAX_PIXELS, Unreadable, fit, load_image
from support.jsonl import IndexedLines
from support.phrases import WORDS_ONLY, split_keyphrases
from support.records import (
    add_map_option,
    check_file,
    look_over,
    problem,
    renamed,
    wrong_field,
)

if TYPE_CHECKING:
    import torch

MAX_LENGTH = 4096  # default, in tokens

# ---------------------------------------------------------------------------------------- records

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
NOT_IN_KEYPHRASE = re.compile(r"[;；؛\n\r]|</?(?:think|answer)>", re.IGNORECASE)
FIELD_TYPES = (
    ("text", str, "a string (empty if there is none)"),
    ("image", str | None, "one file name or null"),
    ("cot", str | None, "a string or null"),
)


def check_record(record, where, for_training=False, names=None):
    """Raise UserError, its text beginning with `where`, unless `record` is a usable post.

    It has the attributes `kind` and `hint` (see `support.records.problem`).
    """
    identity = record.get("id")
    if not isinstance(identity, str) or not identity:
        raise wrong_field(where, record, names, "id", "a string that is not empty")
    where = f"{where} (id {shown(identity)})"
    for name, kind, must in FIELD_TYPES:
        if not isinstance(record.get(name), kind):
            raise wrong_field(where, record, names, name, must)
    keyphrases = record.get("keyphrases", [])
    if not isinstance(keyphrases, list) or not all(isinstance(item, str) for item in keyphrases):
        raise wrong_field(where, record, names, "keyphrases", "a list of strings")
    if not for_training:
        return
    if not keyphrases:
        raise wrong_field(where, record, names, "keyphrases", "a list of at least one to train on")
    check_keyphrases(keyphrases, where)
    cot = record.get("cot") or ""
    if ("<" in cot or "＜" in cot) and (TAG.search(cot) or CHAT_TOKEN.search(cot)):
        raise problem(where, "'cot' is the reasoning alone", "remove the tags from it")


def check_keyphrases(keyphrases, where):
    """Raise UserError unless `parse_answer` returns the keyphrases from their answer."""
    seen = set()
    for phrase in keyphrases:
        if not phrase.strip() or NOT_IN_KEYPHRASE.search(phrase):
            kind = "is empty or holds a semicolon, line break or tag"
            raise wrong_keyphrase(where, phrase, kind, "split or remove it")
        folded = " ".join(phrase.split()).casefold()
        if folded in seen:
            raise wrong_keyphrase(where, phrase, "is there twice", "keep only one")
        seen.add(folded)
    answer = plain_answer(keyphrases)
    if WORDS_ONLY.fullmatch(answer):
        return
    phrases, found = [" ".join(phrase.split()) for phrase in keyphrases], parse_answer(answer)[0]
    if found != phrases:
        lost = next((phrase for phrase in phrases if phrase not in found), phrases[0])
        kind = "begins with a hash sign" if lost[0] in "#＃" else "would be lost"
        hint = f"the answer {shown(answer)} is read as {shown('; '.join(found))}; remove quotes, "
        hint += "hash signs, brackets, bullets, numbers or labels from it"
        raise wrong_keyphrase(where, lost, kind, hint)


def wrong_keyphrase(where, phrase, kind, hint):
    """The UserError for a keyphrase that can't be used."""
    hint = f"{hint}, or let --map keyphrases=keyphrases do so"
    return problem(where, f"a keyphrase {kind}", hint, f"the keyphrase {shown(phrase)} {kind}")


class Posts(IndexedLines):
    """The records of a JSONL file, read from disk one by one.

    Opening reads the file once and checks every record, so that hundreds of thousands of posts open
    in seconds; then `records.look_over` warns of what seems wrong. `names` says which of the
    file's fields are ours ({"text": "caption"}). `with_image` and `without_cot` count posts,
    `keyphrase_count` their keyphrases.

    Raises UserError naming the line and id of a record that can't be used, or has changed since.
    """

    def __init__(self, path, for_training=False, names=None):
        check_file(path)
        super().__init__(path)
        self.folder, self.names = self.path.parent, names or {}
        self.with_image = self.without_cot = self.keyphrase_count = 0
        first_lines = {}  # hash of an id -> its line: a tenth of the memory of the ids themselves
        for line, offset, raw in reading_progress(read_lines(path), path):
            if not raw.removeprefix(BYTE_ORDER_MARK).strip():
                continue
            record = parse_line(path, line, raw)
            if names:
                record = renamed(record, names)
            check_record(record, f"{path} line {line}", for_training, names)
            first = first_lines.setdefault(hash(record["id"]), line)
            if first != line:
                raise UserError(
                    f"{path} line {line} (id {shown(record['id'])}): this id was already used on "
                    f"line {first}"
                )
            self.offsets.append(offset)
            self.lines.append(line)
            self.with_image += bool(record.get("image"))
            self.without_cot += not has_cot(record)
            self.keyphrase_count += len(record.get("keyphrases", ()))
        if not self.offsets:
            raise UserError(f"{path}: no posts in it")
        look_over(self, for_training)

    def original(self, index):
        """The record as the file has it."""
        return parse_line(self.path, self.lines[index], self.raw(index))

    def __getitem__(self, index):
        """The record as a dict."""
        record = self.original(index)
        return renamed(record, self.names) if self.names else record

    def image_path(self, record):
        """Where the record's image is, or None for a text-only post."""
        return self.folder / record["image"] if record.get("image") else None


def has_cot(record):
    """Whether a record has reasoning that is not blank."""
    return bool((record.get("cot") or "").strip())


def relative_path(path, folder):
    """`path`, which begins with a resolved folder, as a record of a file in `folder` writes it."""
    try:
        return os.path.relpath(path, os.path.realpath(folder))  # `..` would leave a linked folder
    except ValueError:  # another drive of Windows
        return path


# ---------------------------------------------------------------------------- prompts and answers

PROMPT = (
    "Predict the keyphrases (hashtags) that sum up this social media post and its image. Write them"
    " separated by semicolons, the most fitting first. If the post needs reasoning, reason first"
    " inside <think></think>, then give the keyphrases inside <answer></answer>.\n\nPost: {text}"
)


def load_prompt_file(path, *fields):
    """The prompt in a file, which must contain each of `fields`. Raises UserError."""
    with reading(path, "a prompt is a UTF-8 text file"):
        prompt = Path(path).read_text(encoding="utf-8")
    for name in fields:
        if name not in prompt:
            raise UserError(f"{path}: the prompt has no {name} in it to say where that goes")
    return prompt


def fill_prompt(prompt, **values):
    """The prompt with its {fields} replaced; the values may hold braces themselves."""
    return re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), prompt)


def plain_answer(keyphrases):
    """y_s, the answer without reasoning: `keyphrase 1; keyphrase 2`.

    It ends with a semicolon where `parse_answer` would not return the keyphrases without it: where
    a comma would separate them, or a period would be the end of a sentence.
    """
    phrases = [" ".join(phrase.split()) for phrase in keyphrases]
    answer = "; ".join(phrases)
    if WORDS_ONLY.fullmatch(answer) or parse_answer(answer)[0] == phrases:
        return answer
    return f"{answer};" if parse_answer(f"{answer};")[0] == phrases else answer


def cot_answer(cot, keyphrases):
    """y_c, the answer that reasons first: `<think>…</think><answer>keyphrase 1; …</answer>`."""
    return f"<think>{cot.strip()}</think><answer>{plain_answer(keyphrases)}</answer>"


# Models also write tags in capitals, in full-width letters, translated, or without the last `>`.
TAG = re.compile(
    r"[<＜]([/／]?)(?:(think|thinking|思考|ｔｈｉｎｋ)|(?:answers?|答案|ａｎｓｗｅｒ))(?:\s*[>＞]|\b)",
    re.IGNORECASE,
)
# Tokens of chat formats that some servers and tokenizers leave in the text.
CHAT_TOKEN = re.compile(
    r"<\|(?:im_start\|>|start_header_id\|>)\s*assistant\b|<start_of_turn>\s*model\b"
    r"|<[|｜][^<>]{1,40}[|｜]>|</?s>|<(?:bos|eos|eod|pad|end_of_turn|end_of_utterance)>",
    re.IGNORECASE,
)


def parse_answer(output):
    """(keyphrases, think) of whatever a model wrote; never raises.

    The keyphrases are those of the last <answer> that has any; else of what follows the last
    </think>; else of what precedes a <think> that is never closed. `think` is the reasoning, None
    where it is blank. A </think> without its <think> ends reasoning, too: some chat templates write
    the <think> themselves.
    """
    output = next(filter(str.strip, CHAT_TOKEN.split(output)), "").rstrip()
    head, bracket, tail = output.rpartition("<")
    whole = (head + tag for tag in TAGS if tag.startswith(bracket + tail.lower()))
    output = next(whole, output)  # a tag at the end may be cut off
    outside, thoughts, answers = [], [], []
    texts, start = outside, 0
    for tag in TAG.finditer(output):
        texts.append(output[start : tag.start()])
        start = tag.end()
        closing, is_think = tag.groups()
        if closing and is_think:
            if texts is outside:
                thoughts += outside
            outside.clear()
        if not closing:
            texts = thoughts if is_think else answers
        elif is_think or texts is answers:
            texts = outside
    texts.append(output[start:])
    lists = map(split_keyphrases, [*reversed(answers), "\n".join(outside)])
    keyphrases = [phrase for phrase in next(filter(None, lists), []) if not TAG.search(phrase)]
    think = " ".join(filter(None, map(str.strip, thoughts)))
    return keyphrases, think or None


def make_prediction(identity, output, tokens, cut):
    """An answer as a line of predictions; with "cut" if it ran out of tokens.

    {"id", "keyphrases", "think", "output": what the model wrote, "tokens": generated ones}
    """
    keyphrases, think = parse_answer(output)
    prediction = {"id": identity, "keyphrases": keyphrases, "think": think}
    return prediction | {"output": output, "tokens": tokens} | ({"cut": True} if cut else {})


def failed_prediction(identity, error):
    """The prediction for a post that has none; `error` says why."""
    nothing = {"keyphrases": [], "think": None, "output": "", "tokens": 0}
    return {"id": identity, **nothing, "error": error}


# ------------------------------------------------------------------------- from posts to token ids


@dataclass
class Sample:
    """One encoded post. `plain` and `cot` are token ids, None where only the prompt is needed."""

    id: str
    prompt: list[int]
    pixel_values: "torch.Tensor | None" = None  # (patches, values of a patch)
    grid: "torch.Tensor | None" = None  # (1, 3): frames, rows and columns of patches
    plain: list[int] | None = None
    cot: list[int] | None = None
    truncated: bool = False

    def length(self):
        """Tokens of the prompt and the longer of its answers, if it has any."""
        return len(self.prompt) + len(self.cot or self.plain or [])


@dataclass
class Skipped:
    """A post whose image can't be read."""

    id: str
    image: str
    reason: str


class EncoderOptions(NamedTuple):
    """How posts become prompts."""

    prompt: str = PROMPT
    max_pixels: int = MAX_PIXELS
    max_length: int = MAX_LENGTH  # in tokens


class Encoder:
    """Encodes records with the model's own tokenizer, chat template and image processor.

    Posts and answers are data: a token's name written in them stays plain text. A tag is the
    tokenizer's own token where it has one. If the chat template itself opens <think>
    (`opens_think`), y_c goes on from there, and y_s closes it first. The image placeholder is
    expanded here, to one token for every merge_size² patches, because transformers' processor of
    the Qwen-VL family needs torchvision.

    Raises UserError where the prompt or the chat template can't be used.
    """

    def __init__(self, tokenizer, image_processor, image_token_id, options=None):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token_id = image_token_id
        self.prompt, self.max_pixels, self.max_length = options or EncoderOptions()
        if self.prompt.count("{text}") != 1:
            raise UserError("the prompt must contain {text} once, to say where the post goes")
        self.size = {
            edge: int(min(image_processor.size[edge], self.max_pixels))
            for edge in ("shortest_edge", "longest_edge")
        }
        self.token_side = image_processor.patch_size * image_processor.merge_size
        added = tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        # Only tokens that are marked as special can be kept out of plain text.
        tokenizer.add_tokens([*added.values()], special_tokens=True)
        own = {token.content: [number] for number, token in added.items()}
        self.tags = {tag: own.get(tag) or self.plain_ids(tag) for tag in TAGS}
        self.think = self.tags["<think>"]
        self.left_out = special.difference(*self.tags.values())
        self.frames = {has_image: self._frame(has_image) for has_image in (True, False)}
        before_answer = self._apply_template([{"type": "text", "text": "."}])
        self.opens_think = before_answer.rstrip().endswith("<think>")
        pad = tokenizer.pad_token_id
        self.pad = pad if pad is not None else tokenizer.eos_token_id
        self._check_room()
        self.end_of_turn = self._end_of_turn()

    def plain_ids(self, text):
        """Token ids of `text`, in which nothing counts as an added token."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def template_ids(self, text):
        """Token ids of a part of the chat template, its added tokens included."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _apply_template(self, content, answer=None):
        turns = [{"role": "user", "content": content}]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer is None
        )

    def _frame(self, has_image):
        """The chat template around the post: ids before, text before, text after, ids after it.

        The template is cut at the added tokens next to the post, not at the post itself: a
        tokenizer that joins a space to the word behind it must see both.
        """
        mark = "\uf8ffPOST\uf8ff"
        content = [{"type": "image"}] if has_image else []
        content.append({"type": "text", "text": self.prompt.replace("{text}", mark)})
        before, _, after = self._apply_template(content).partition(mark)
        tokens = self.tokenizer.added_tokens_decoder.values()
        special = re.compile("|".join(re.escape(token.content) for token in tokens))
        start = max((match.end() for match in special.finditer(before)), default=0)
        found = special.search(after)
        end = found.start() if found else len(after)
        head, tail = self.template_ids(before[:start]), self.template_ids(after[end:])
        return head, before[start:], after[:end], tail

    def _check_room(self):
        """Raise UserError where the largest image would leave no room for a post's text."""
        head, before, after, tail = self.frames[True]
        if (placeholders := head.count(self.image_token_id)) != 1:
            raise UserError(
                f"chat template and prompt put {placeholders} image placeholders before the post, "
                "not 1; is the template the model's own?"
            )
        prompt = len(head) - 1 + len(self.plain_ids(before + after)) + len(tail)
        image = self.size["longest_edge"] // self.token_side**2
        if not image:
            least = f"{self.token_side} x {self.token_side} pixels"
            raise UserError(f"--max-pixels {self.max_pixels} is less than a token's {least}")
        if prompt + image >= self.max_length:
            raise UserError(
                f"--max-length {self.max_length} leaves no room for a post's text: the prompt takes"
                f" {prompt} tokens and an image up to {image}; raise it, or lower --max-pixels"
            )

    def _end_of_turn(self):
        """The token with which the chat format ends an answer: `<|im_end|>` for Qwen."""
        mark = "\uf8ffANSWER\uf8ff"
        after = self._apply_template([{"type": "text", "text": "."}], mark).partition(mark)[2]
        return self.template_ids(after)[0]

    def prompt_ids(self, text, image_tokens):
        """(token ids of image + prompt, whether `text` was truncated to keep to max_length)."""
        head, before, after, tail = self.frames[image_tokens > 0]
        if image_tokens:
            place = head.index(self.image_token_id)
            head = head[:place] + [self.image_token_id] * image_tokens + head[place + 1 :]
        ids, whole = head + self.plain_ids(before + text + after) + tail, text
        # More than once where the cut changes how the end of the text is tokenized.
        while text and (excess := len(ids) - self.max_length) > 0:
            encoded = self.tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
            )
            starts = [start for start, _ in encoded.offset_mapping]
            keep = min(starts[-excess], len(text) - 1) if excess < len(starts) else 0
            text = text[:keep]
            ids = head + self.plain_ids(before + text + after) + tail
        return ids, text != whole

    def answer_ids(self, answer):
        """Token ids of an answer, as it goes on from the prompt, and its end of turn.

        Tags are tokenized apart from the words beside them, which a byte-level vocabulary would
        join (`>The`): `<think>` is then the same tokens wherever it stands.
        """
        if self.opens_think:  # y_s closes it, y_c goes on in it
            answer = ("</think>" + answer).removeprefix("</think><think>")
        parts = filter(None, re.split(f"({'|'.join(TAGS)})", answer))
        ids = [self.tags[part] if part in self.tags else self.plain_ids(part) for part in parts]
        return sum(ids, []) + [self.end_of_turn]

    def start(self, think):
        """How --think begins an answer: (the tokens that it begins with, a first token to ban).

        The chat template may have opened <think> already: then "always" only must not close it at
        once, and "never" closes it.
        """
        if think == "always":
            return (
                ([], self.tags["</think>"][0]) if self.opens_think else (self.tags["<think>"], None)
            )
        if think == "never":
            return (
                (self.tags["</think>"], None) if self.opens_think else ([], self.tags["<think>"][0])
            )
        return [], None

    def decode(self, ids):
        """The text of an answer's token ids; of the special tokens only the tags are in it.

        It begins with the <think> that the chat template has opened.
        """
        shown = [token for token in ids if token not in self.left_out]
        text = self.tokenizer.decode(shown, clean_up_tokenization_spaces=False)
        return "<think>" + text if self.opens_think else text

    def image_patches(self, picture):
        """(pixel_values, image_grid_thw) of a PIL image within the model's limits of size."""
        process, most = self.image_processor, self.size["longest_edge"]
        # To resize a picture to its own size takes longer than to read its pixels.
        fits = self.size["shortest_edge"] <= math.prod(picture.size) <= most
        fits = fits and not any(edge % self.token_side for edge in picture.size)
        image = process([picture], size=self.size, do_resize=not fits, return_tensors="pt")
        if int(image["image_grid_thw"].prod()) * process.patch_size**2 > most:
            # The processor makes a picture that is thin, or has to grow, larger than it may be.
            picture = fit(picture, most, self.token_side)
            image = process([picture], do_resize=False, return_tensors="pt")
        return image["pixel_values"], image["image_grid_thw"]

    def encode(self, record, image_path, with_answers):
        """The record as a Sample. Raises Unreadable."""
        pixel_values = grid = None
        image_tokens = 0
        if image_path is not None:
            pixel_values, grid = self.image_patches(load_image(image_path, self.max_pixels))
            image_tokens = int(grid.prod()) // self.image_processor.merge_size**2
        text = record["text"].strip().encode("utf-8", "replace").decode("utf-8")
        prompt, truncated = self.prompt_ids(text, image_tokens)
        sample = Sample(record["id"], prompt, pixel_values, grid, truncated=truncated)
        if with_answers:
            sample.plain = self.answer_ids(plain_answer(record["keyphrases"]))
            if has_cot(record):
                sample.cot = self.answer_ids(cot_answer(record["cot"], record["keyphrases"]))
        return sample


class EncodedPosts:
    """Posts through an Encoder; an item is a Sample or a Skipped."""

    def __init__(self, posts, encoder, with_answers):
        self.posts, self.encoder, self.with_answers = posts, encoder, with_answers

    def __getitem__(self, index):
        record = self.posts[index]
        try:
            return self.encoder.encode(record, self.posts.image_path(record), self.with_answers)
        except Unreadable as error:
            return Skipped(record["id"], record["image"], str(error))


# ---------------------------------------------------------------------------------------- batches


@dataclass
class Targets:
    """Target tokens, padded on the right: `ids` and `mask` (1 at answer tokens), both (B, T).

    T is 3 at least: a model reads all but the last, and kernels that read a single token, as
    generation does, may have no backward (Qwen3.5).
    """

    ids: "torch.Tensor"
    mask: "torch.Tensor"

    @classmethod
    def pad(cls, lists, pad):
        import torch

        ids = torch.full((len(lists), max(3, *map(len, lists))), pad)
        mask = torch.zeros_like(ids)
        for i, tokens in enumerate(lists):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
        return cls(ids, mask)

    def to(self, device):
        return Targets(*(x.to(device, non_blocking=True) for x in (self.ids, self.mask)))

    def where(self, keep, other):
        """These targets where `keep` (B,) is true, `other`'s elsewhere, as wide as they need."""
        import torch
        from torch.nn.functional import pad

        width = max(self.ids.shape[1], other.ids.shape[1])

        def pick(ours, theirs):
            ours, theirs = (pad(x, (0, width - x.shape[1])) for x in (ours, theirs))
            return torch.where(keep[:, None], ours, theirs)

        ids, mask = pick(self.ids, other.ids), pick(self.mask, other.mask)
        longest = max(3, int(mask.sum(1).max()))
        return Targets(ids[:, :longest], mask[:, :longest])


@dataclass
class Batch:
    """One micro-batch of B posts.

    prompt: the model's inputs: input_ids, attention_mask, mm_token_type_ids (B, P), padded on the
        left, and pixel_values (patches, values), image_grid_thw (images, 3) where there are images.
    plain, cot: the two possible targets of each post; without reasoning, cot repeats plain.
    has_cot: (B,) bool.
    truncated: how many of the posts' texts were truncated.
    skipped: posts of the step whose images could not be read; the first micro-batch has them.
    """

    ids: list[str]
    prompt: dict
    plain: Targets | None
    cot: Targets | None
    has_cot: "torch.Tensor | None"
    truncated: int
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self):
        return len(self.ids)

    def to(self, device):
        prompt = {name: value.to(device, non_blocking=True) for name, value in self.prompt.items()}
        targets = (self.plain, self.cot, self.has_cot)
        plain, cot, has_cot = (x if x is None else x.to(device) for x in targets)
        return replace(self, prompt=prompt, plain=plain, cot=cot, has_cot=has_cot)


def collate(samples, encoder, pixel_values=None):
    """Samples to one Batch: prompts padded on the left, answers on the right.

    `pixel_values` are those of all the samples' images, one after the other, if they were put
    together before. Without any samples the Batch has length 0 and one row that is not a post: on
    several ranks, a rank without a post still runs the model as often as the others.
    """
    import torch

    ids = [sample.id for sample in samples]
    if not samples:
        placeholder = [*encoder.think, encoder.end_of_turn]
        samples = [Sample("", encoder.prompt_ids("", 0)[0], plain=placeholder)]
    width = max(len(sample.prompt) for sample in samples)
    input_ids = torch.full((len(samples), width), encoder.pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        input_ids[row, width - len(sample.prompt) :] = torch.tensor(sample.prompt)
        attention_mask[row, width - len(sample.prompt) :] = 1
    prompt = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == encoder.image_token_id).int(),  # 1 at image tokens
    }
    if grids := [sample.grid for sample in samples if sample.grid is not None]:
        prompt["pixel_values"] = concat_images(samples) if pixel_values is None else pixel_values
        prompt["image_grid_thw"] = torch.cat(grids)
    plain = cot = with_cot = None
    if samples[0].plain is not None:
        plain = Targets.pad([sample.plain for sample in samples], encoder.pad)
        cot = Targets.pad([sample.cot or sample.plain for sample in samples], encoder.pad)
        with_cot = torch.tensor([sample.cot is not None for sample in samples])
    return Batch(ids, prompt, plain, cot, with_cot, sum(sample.truncated for sample in samples))


def concat_images(samples):
    """The pixel_values (patches, values) of all samples with an image, None where there is none."""
    import torch

    images = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    return torch.cat(images) if images else None


@lru_cache(1)
def epoch_order(count, batch_size, seed, epoch):
    """The steps of an epoch: lists of `batch_size` indices in an order set by (seed, epoch)."""
    import numpy as np

    order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


class TrainingOrder:
    """The posts of every step of a run: item i, from 0, has the `batch_size` indices of step i + 1.

    Each epoch has an order of its own; the last one may be a part of one.
    """

    def __init__(self, count, batch_size, seed, epochs):
        self.count, self.settings = count, (count, batch_size, seed)
        self.epoch_steps = math.ceil(count / batch_size)
        # Rounded before: 1.1 * 100, which is above 110 in binary, gives 110.
        self.steps = max(1, math.ceil(round(epochs * self.epoch_steps, 6)))

    def __len__(self):
        return self.steps

    def __getitem__(self, i):
        epoch, index = divmod(i, self.epoch_steps)
        return epoch_order(*self.settings, epoch)[index]

    def ends_epoch(self, step):
        """Whether an epoch, or the run, ends after so many steps."""
        return step == self.steps or step > 0 and step % self.epoch_steps == 0


def by_length(samples, parts):
    """Samples in `parts` micro-batches of about equal size, each of samples of similar length.

    Only samples of one step are sorted among themselves: a step's posts stay a random draw, and
    the micro-batches decide nothing but how much is padded.
    """
    if parts > 1:
        samples = sorted(samples, key=Sample.length)
    edges = [len(samples) * part // parts for part in range(parts + 1)]
    return [samples[start:end] for start, end in zip(edges[:-1], edges[1:], strict=True)]


class Steps:
    """A torch dataset whose items are whole steps: (micro-batches, skipped), or a UserError.

    A micro-batch is (samples, pixel_values of all of them). Of several ranks, each gets its share
    of every step, in as many micro-batches as each of the others; some may be empty. Errors are
    returned: raised in a worker, they would carry the worker's traceback.
    """

    def __init__(self, dataset, order, micro_batch, ranks=None):
        self.dataset, self.order, self.micro_batch = dataset, order, micro_batch
        self.rank, self.world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, step):
        indices = self.order[step]
        parts = math.ceil(len(indices) / (self.world_size * self.micro_batch))
        try:
            items = [self.dataset[index] for index in indices[self.rank :: self.world_size]]
            samples = [item for item in items if isinstance(item, Sample)]
            if self.world_size == 1:  # no micro-batch is empty, but for the only one
                parts = max(1, min(parts, len(samples)))
            micro_batches = [(chunk, share_images(chunk)) for chunk in by_length(samples, parts)]
        except UserError as error:
            return error
        return micro_batches, [item for item in items if isinstance(item, Skipped)]


def share_images(samples):
    """Take the samples' images out of them, into one tensor for the main process to read.

    One tensor a micro-batch: each one that passes between processes costs time and an open file.
    The images of a post are 10 MB at 512 tokens, so only the worker copies them. Raises UserError.
    """
    from torch.utils.data import get_worker_info

    pixel_values = concat_images(samples)
    for sample in samples:
        sample.pixel_values = None
    if pixel_values is not None and get_worker_info() is not None:
        try:
            pixel_values.share_memory_()
        except RuntimeError as error:  # raised later, it would leave the main process waiting
            raise UserError(
                f"the images that --workers prepare do not fit into shared memory ({error}): give "
                "it more room (docker --shm-size), or try fewer --workers (0: none)"
            ) from None
    return pixel_values


class Loader:
    """Yields (step, micro-batches) of the steps after the first `start`; workers encode posts.

    dataset: an EncodedPosts; order: the lists of indices of all steps, which count from 1; ranks:
        the Ranks that share each step, if there are any.

    Raises UserError where a record has changed, or the system kills a worker.
    """

    def __init__(self, dataset, order, micro_batch, workers=0, ranks=None, start=0):
        from torch.utils.data import DataLoader

        self.encoder, self.start = dataset.encoder, start
        self.steps = DataLoader(
            Steps(dataset, order, micro_batch, ranks),
            sampler=range(start, len(order)),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=ignore_signals,
        )

    def __iter__(self):
        with closing(self._items()) as steps:  # after an error the workers end at once
            for step, item in enumerate(steps, self.start + 1):
                if isinstance(item, UserError):
                    raise item
                micro_batches, skipped = item
                batches = [
                    collate(samples, self.encoder, images) for samples, images in micro_batches
                ]
                batches[0].skipped = skipped
                yield step, batches

    def _items(self):
        try:
            yield from self.steps
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):  # an error of the worker's own
                raise
            raise UserError(
                "the system killed a process that reads the posts, perhaps because memory ran out; "
                "try fewer --workers (0: the main process reads)"
            ) from None


def prompt_loader(posts, indices, encoder, batch_size, workers):
    """A Loader of some posts' prompts, sorted by length within a few batches at a time."""
    size = max(1, 32 // batch_size) * batch_size
    steps = [indices[start : start + size] for start in range(0, len(indices), size)]
    return Loader(EncodedPosts(posts, encoder, with_answers=False), steps, batch_size, workers)


def ignore_signals(_):
    """Ctrl-C and SIGTERM reach the whole process group; the main process decides what to do.

    A second SIGTERM ends the worker: that is how Python ends workers when the main process ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


# --------------------------------------------------------------- settings of train.py and infer.py


def add_reading_options(parser):
    """The settings by which a model reads posts and answers."""
    add = parser.add_argument
    add_map_option(add)
    add("--prompt-file", help="the prompt, with {text} where the post goes (default: the model's)")
    pixels_help = "larger images are scaled down; a token is 28 x 28 pixels (Qwen3: 32 x 32)"
    model_s = "(default: the model's own, else"
    add("--max-pixels", type=positive_int, help=f"{pixels_help} {model_s} {MAX_PIXELS})")
    length_help = "tokens of a prompt; a longer post's text is truncated"
    add("--max-length", type=positive_int, help=f"{length_help} {model_s} {MAX_LENGTH})")
    add("--max-new-tokens", type=positive_int, default=512, help="tokens of an answer at most")
    add("--workers", type=whole_number(0, 1024), default=2, help="processes that prepare images")
    add("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one")


def own_options(folder):
    """The EncoderOptions of a model's folder, with defaults for what it lacks. Raises UserError."""
    return EncoderOptions(**read_own(folder))


def resolve_options(args, folder):
    """The EncoderOptions of a script: what `args` give, else what the model's folder has.

    --max-pixels and --max-length are set in `args`, too; one that is given and is not the folder's
    is mentioned. Raises UserError.
    """
    own = own_options(folder)
    for name in ("max_pixels", "max_length"):
        given, default = getattr(args, name), getattr(own, name)
        if given is None:
            setattr(args, name, default)
        elif given != default and (Path(folder) / ENCODER_FILE).is_file():
            flag = "--" + name.replace("_", "-")
            info(f"{flag} {given} is used instead of the model's own, {default}")
    prompt = load_prompt_file(args.prompt_file, "{text}") if args.prompt_file else own.prompt
    return EncoderOptions(prompt, args.max_pixels, args.max_length)
