"""Posts, prompts and answers: everything between a JSONL file and the tensors that a model reads.

A record is one JSON object a line; other fields are kept and ignored:

    {"id": "D0wn", "text": "some tiny blue flowers", "image": "images/D0wn.jpg",
     "keyphrases": ["wildflower hour"], "cot": "The photo shows …"}

`image` is relative to the JSONL file, or absolute, or null; `cot` is the bare reasoning, or absent.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from array import array
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from evaluate import (
    BYTE_ORDER_MARK,
    LOOKS_LIKE_JSON,
    UserError,
    decode,
    first_few,
    lay_out,
    natural,
    normalize,
    parse_cmkp,
    parse_line,
    percent,
    read_lines,
    read_rows,
    run,
    shown,
)

# ------------------------------------------------------------------------------------------------ records

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
NOT_IN_KEYPHRASE = re.compile(r"[;\n\r]|</?(?:think|answer)>")


def check_record(record, where, for_training=False):
    """Raise UserError, its text beginning with `where`, unless `record` is a usable post."""
    identity = record.get("id")
    if not isinstance(identity, str) or not identity:
        raise UserError(f"{where}: the field 'id' must be a string that is not empty")
    where = f"{where} (id {shown(identity)})"
    if not isinstance(record.get("text"), str):
        raise UserError(f"{where}: the field 'text' must be a string (empty if there is none)")
    if not isinstance(record.get("image"), str | None):
        raise UserError(f"{where}: the field 'image' must be a file name or null")
    if not isinstance(record.get("cot"), str | None):
        raise UserError(f"{where}: the field 'cot' must be a string or null")
    keyphrases = record.get("keyphrases", [])
    if not isinstance(keyphrases, list) or not all(
        isinstance(phrase, str) for phrase in keyphrases
    ):
        raise UserError(f"{where}: the field 'keyphrases' must be a list of strings")
    if not for_training:
        return
    if not keyphrases:
        raise UserError(f"{where}: a post to train on needs at least one keyphrase")
    for phrase in keyphrases:
        if not phrase.strip() or NOT_IN_KEYPHRASE.search(phrase):
            raise UserError(
                f"{where}: the keyphrase {shown(phrase)} is empty or holds a semicolon, line break or tag"
            )
    if any(tag in (record.get("cot") or "") for tag in TAGS):
        raise UserError(f"{where}: 'cot' is the bare reasoning; take the tags out of it")


def refuse_streams(path):
    """Raise UserError for a pipe or device, which can't be read at any place, or twice."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(
            f"{path}: not a file on a disk; this is read more than once, so save it as one first"
        )


class Posts:
    """The records of a JSONL file, read from disk one by one.

    Only byte offsets, line numbers and checksums are kept in memory (20 bytes a record), so that hundreds of
    thousands of posts open in seconds and DataLoader workers share them. Opening reads the file once and checks
    every record.

    Raises UserError naming the line and the id of a record that can't be used, or has changed since.
    """

    def __init__(self, path, for_training=False):
        refuse_streams(path)
        self.path = Path(path)
        self.folder = self.path.parent
        self.offsets, self.lines, self.sums = array("Q"), array("Q"), array("I")
        self.without_cot = 0
        seen = {}  # hash of an id -> its line: a tenth of the memory of the ids themselves
        for line, offset, raw in read_lines(path):
            if not raw.removeprefix(BYTE_ORDER_MARK).strip():
                continue
            record = parse_line(path, line, raw)
            check_record(record, f"{path} line {line}", for_training)
            first = seen.setdefault(hash(record["id"]), line)
            if first != line:
                raise UserError(
                    f"{path} line {line} (id {shown(record['id'])}): this id was already used on line {first}"
                )
            self.offsets.append(offset)
            self.lines.append(line)
            self.sums.append(crc32(raw.removesuffix(b"\n")))
            self.without_cot += not has_cot(record)
        if not self.offsets:
            raise UserError(f"{path}: no posts in it")
        self.file = os.open(self.path, os.O_RDONLY)
        self.size = os.fstat(self.file).st_size

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, index):
        """The record as a dict. `pread` keeps no position, so forked workers can share the open file."""
        start = self.offsets[index]
        end = self.offsets[index + 1] if index + 1 < len(self) else self.size
        raw = os.pread(self.file, end - start, start).partition(b"\n")[0]
        if crc32(raw) != self.sums[index]:
            raise UserError(
                f"{self.path} line {self.lines[index]}: was changed while the file was in use; start again"
            )
        return parse_line(self.path, self.lines[index], raw)

    def __getstate__(self):  # a spawned worker opens the file itself
        return {name: value for name, value in self.__dict__.items() if name != "file"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.file = os.open(self.path, os.O_RDONLY)

    def digest(self):
        """A fingerprint of the file's content."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()

    def image_path(self, record):
        """Where the record's image is, or None for a text-only post."""
        return self.folder / record["image"] if record.get("image") else None


def has_cot(record):
    return bool((record.get("cot") or "").strip())


# ------------------------------------------------------------------------------------- prompts and answers

PROMPT = (
    "Predict the keyphrases (hashtags) that sum up this social media post and its image. Write them separated"
    " by semicolons, the most fitting first. If the post needs reasoning, reason first inside <think></think>,"
    " then give the keyphrases inside <answer></answer>.\n\nPost: {text}"
)


def plain_answer(keyphrases):
    """y_s, the answer without reasoning: `keyphrase 1; keyphrase 2`."""
    return "; ".join(phrase.strip() for phrase in keyphrases)


def cot_answer(cot, keyphrases):
    """y_c, the answer that reasons first: `<think>…</think><answer>keyphrase 1; keyphrase 2</answer>`."""
    return f"<think>{cot.strip()}</think><answer>{plain_answer(keyphrases)}</answer>"


BULLET = re.compile(r"^(?:[-*•·–—▪◦‣]\s+)+")
NUMBER = re.compile(
    r"^\(?\d{1,3}[.)]\s+"
)  # counts only in a list of lines: `2. bundesliga` may be a keyphrase
QUOTES = "\"'`“”‘’«»*_"


def parse_answer(output):
    """(keyphrases, think) of whatever a model wrote; never raises.

    `think` is the reasoning or None. Keyphrases are what stands in <answer>, else after </think>, else
    everything; an answer that ends inside <think> has none. They are split at semicolons and line breaks,
    at commas only where there is no semicolon; bullets, hash signs, quotes and repetitions are dropped.
    """
    think = None
    before, opened, rest = output.partition("<think>")
    if opened or "</think>" in output:
        inside = rest if opened else output
        think, closed, after = inside.partition("</think>")
        if not closed:
            think, tag, after = inside.partition("<answer>")
            after = tag + after
        output = after
        think = strip_tags(think).strip()
    if "<answer>" in output:
        output = output.partition("<answer>")[2]
    answer = output.partition("</answer>")[0]
    return split_keyphrases(strip_tags(answer)), think


def strip_tags(text):
    return re.sub(r"</?(?:think|answer)>", " ", text)


def split_keyphrases(text):
    """The clean, distinct phrases of an answer's text, in order."""
    separators = r"[;；\n\r]" if re.search("[;；]", text) else r"[,，、\n\r]"
    several_lines = "\n" in text.strip()
    phrases = {}
    for part in re.split(separators, text):
        part = BULLET.sub("", " ".join(part.split()))
        part = NUMBER.sub("", part) if several_lines else part
        for phrase in re.split(r"\s+(?=#\w)", part):  # `#one #two` are two
            phrase = phrase.strip(QUOTES + " ")
            phrase = phrase.lstrip("#＃").rstrip(".。 ").strip(QUOTES + " ")
            if phrase:
                phrases.setdefault(phrase.casefold(), phrase)
    return list(phrases.values())


# ------------------------------------------------------------------------------------------------- images

# What posts bring. Pillow knows more formats, among them some that it hands to other programs (EPS to Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
MOST_PIXELS = (
    64_000_000  # what would be larger when decoded is refused: about 1 GB of memory, and 4 s
)
THINNEST = 200  # image processors refuse a picture longer than 200 times its width


class Unreadable(Exception):
    """An image that can't be read; the text says why."""


def load_image(path, max_pixels):
    """The picture in `path` as upright RGB (PIL), the first frame of an animation, alpha over white.

    A JPEG far larger than `max_pixels` is decoded at a half, a quarter or an eighth of its size; the bound
    itself is the image processor's to keep, with the model's own resampling. Raises Unreadable.
    """
    from PIL import Image, UnidentifiedImageError

    if not os.path.exists(path):
        raise Unreadable("no such file")
    if not os.path.isfile(path):  # a FIFO would block for ever
        raise Unreadable("not a regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; errors still raise
            with Image.open(path, formats=FORMATS) as image:
                shrink = (image.width * image.height / (4 * max_pixels)) ** 0.5
                if shrink > 1:
                    image.draft(None, (round(image.width / shrink), round(image.height / shrink)))
                if image.width * image.height > MOST_PIXELS:
                    raise Unreadable(
                        f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}"
                    )
                image.load()
                image = to_rgb(upright(image))
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable(f"not a readable image ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Unreadable(f"too large: {error}") from None
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them trip over
        raise Unreadable(f"not a readable image: {type(error).__name__}: {error}") from None
    longest = THINNEST * min(image.size)
    if max(image.size) > longest:
        image = image.resize((min(image.width, longest), min(image.height, longest)))
    return image


def upright(image):
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    # ImageOps.exif_transpose would write the other metadata anew, and fail where they are torn.
    turn = turns.get(image.getexif().get(0x0112))
    return image if turn is None else image.transpose(turn)


def to_rgb(image):
    from PIL import Image

    if (
        image.mode.startswith("I") or image.mode == "F"
    ):  # 16 bits a pixel: `convert` alone clips to white
        import numpy as np

        values = np.asarray(image, dtype=np.float32)
        values = values / 257 if values.max(initial=0) > 255 else values
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


# --------------------------------------------------------------------------------------- from posts to ids


@dataclass
class Sample:
    """One encoded post. `plain` and `cot` are None where only the prompt is wanted."""

    id: str
    prompt: list[int]
    image: dict | None  # pixel_values (patches, values), image_grid_thw (1, 3)
    plain: list[int] | None = None
    cot: list[int] | None = None
    shortened: bool = False

    def length(self):
        """Tokens of the prompt and the longer of its answers."""
        return len(self.prompt) + len(self.cot or self.plain)


@dataclass
class Skipped:
    """A post whose image can't be read."""

    id: str
    image: str
    reason: str


class Encoder:
    """Turns records into token ids and pixels by the model's own tokenizer, template and image processor.

    The post's text is data: whatever special token is written in it stays plain text. Placeholders of the
    Qwen-VL family are expanded here, one for every merge_size² patches, because its transformers processor
    needs torchvision.
    """

    def __init__(
        self,
        tokenizer,
        image_processor,
        image_token_id,
        prompt=PROMPT,
        max_pixels=512 * 28 * 28,
        max_length=4096,
    ):
        if prompt.count("{text}") != 1:
            raise UserError(
                "the prompt must have {text} in it once, to say where the post goes, not "
                f"{prompt.count('{text}')} times"
            )
        self.tokenizer, self.image_processor, self.prompt = tokenizer, image_processor, prompt
        self.image_token_id, self.max_pixels, self.max_length = (
            image_token_id,
            max_pixels,
            max_length,
        )
        own = image_processor.size
        self.size = {
            "shortest_edge": min(own["shortest_edge"], max_pixels),
            "longest_edge": min(own["longest_edge"], max_pixels),
        }
        self.frames = {has_image: self._frame(has_image) for has_image in (True, False)}
        self.pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        self._check_room()
        self.end_of_turn = self._end_of_turn()
        self.think = self.plain_ids("<think>")
        self.stand_in = Sample(
            "", self.prompt_ids("", 0)[0], None, plain=[*self.think, self.end_of_turn]
        )

    def plain_ids(self, text):
        """Token ids of `text`, in which nothing counts as a special token."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _template(self, content, answer=None):
        turns = [{"role": "user", "content": content}]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer is None
        )

    def _frame(self, has_image):
        """The chat template around the post: ids before, text before, text after, ids after it.

        The template is cut at the special tokens next to the post and not at the post itself: a tokenizer
        that joins a space to the word behind it must see both.
        """
        mark = "\uf8ffPOST\uf8ff"
        content = [{"type": "image"}] if has_image else []
        content.append({"type": "text", "text": self.prompt.replace("{text}", mark)})
        before, _, after = self._template(content).partition(mark)
        special = "|".join(
            re.escape(token.content) for token in self.tokenizer.added_tokens_decoder.values()
        )
        cut = max((match.end() for match in re.finditer(special, before)), default=0)
        found = re.search(special, after)
        end = found.start() if found else len(after)
        ids = lambda text: self.tokenizer(text, add_special_tokens=False).input_ids
        return ids(before[:cut]), before[cut:], after[:end], ids(after[end:])

    def _check_room(self):
        """Raise UserError where the largest image would leave no place for a post's text."""
        head, before, after, tail = self.frames[True]
        if head.count(self.image_token_id) != 1:
            raise UserError(
                f"chat template and prompt put {head.count(self.image_token_id)} image placeholders before the "
                "post, not 1; is the template the model's own?"
            )
        prompt = len(head) - 1 + len(self.plain_ids(before + after)) + len(tail)
        image = (
            self.size["longest_edge"]
            // (self.image_processor.patch_size * self.image_processor.merge_size) ** 2
        )
        if prompt + image >= self.max_length:
            raise UserError(
                f"--max-length {self.max_length} leaves no room for a post's text: the prompt takes {prompt} "
                f"tokens and an image up to {image}; raise it, or lower --max-pixels"
            )

    def _end_of_turn(self):
        """The token with which the chat format ends an answer: `<|im_end|>` for Qwen."""
        mark = "\uf8ffANSWER\uf8ff"
        after = self._template([{"type": "text", "text": "."}], mark).partition(mark)[2]
        return self.tokenizer(after, add_special_tokens=False).input_ids[0]

    def prompt_ids(self, text, image_tokens):
        """(token ids of image + prompt, whether `text` had to be shortened to keep within max_length)."""
        head, before, after, tail = self.frames[image_tokens > 0]
        if image_tokens:
            place = head.index(self.image_token_id)
            head = head[:place] + [self.image_token_id] * image_tokens + head[place + 1 :]
        ids, whole = head + self.plain_ids(before + text + after) + tail, text
        while (
            text and (over := len(ids) - self.max_length) > 0
        ):  # twice where the cut made other tokens of the end
            starts = self.tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
            ).offset_mapping
            text = (
                text[: min(starts[len(starts) - over][0], len(text) - 1)]
                if over < len(starts)
                else ""
            )
            ids = head + self.plain_ids(before + text + after) + tail
        return ids, text != whole

    def answer_ids(self, answer):
        """Token ids of an answer and its end of turn. Tags are tokenized apart from the words beside them, which a
        byte-level vocabulary would join (`>The`): `<think>` is then the same tokens wherever it stands."""
        parts = re.split(f"({'|'.join(TAGS)})", answer)
        return sum(map(self.plain_ids, filter(None, parts)), []) + [self.end_of_turn]

    def encode(self, record, image_path, with_answers):
        """The record as a Sample. Raises Unreadable."""
        image, image_tokens = None, 0
        if image_path is not None:
            picture = load_image(image_path, self.max_pixels)
            image = self.image_processor(images=[picture], size=self.size, return_tensors="pt")
            image_tokens = int(image["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        text = record["text"].strip().encode("utf-8", "replace").decode("utf-8")
        prompt, shortened = self.prompt_ids(text, image_tokens)
        sample = Sample(record["id"], prompt, image, shortened=shortened)
        if with_answers:
            sample.plain = self.answer_ids(plain_answer(record["keyphrases"]))
            if has_cot(record):
                sample.cot = self.answer_ids(cot_answer(record["cot"], record["keyphrases"]))
        return sample


class EncodedPosts:
    """A torch map-style dataset: Posts through an Encoder.

    An item is a Sample, a Skipped, or a UserError: raised in a worker, it would come with the worker's traceback.
    """

    def __init__(self, posts, encoder, with_answers):
        self.posts, self.encoder, self.with_answers = posts, encoder, with_answers

    def __len__(self):
        return len(self.posts)

    def __getitem__(self, index):
        try:
            record = self.posts[index]
            return self.encoder.encode(record, self.posts.image_path(record), self.with_answers)
        except Unreadable as error:
            return Skipped(record["id"], record["image"], str(error))
        except UserError as error:
            return error


# ------------------------------------------------------------------------------------------------ batches


@dataclass
class Answers:
    """Target tokens, padded on the right: `ids` and `mask` (1 at answer tokens), both (B, T)."""

    ids: "torch.Tensor"
    mask: "torch.Tensor"

    @classmethod
    def pad(cls, lists, pad):
        import torch

        ids = torch.full((len(lists), max(map(len, lists))), pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(lists):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return cls(ids, mask)

    def to(self, device):
        return Answers(
            self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True)
        )

    def where(self, keep, other):
        """These answers in the rows where `keep` (B,) is true, `other`'s elsewhere."""
        import torch
        from torch.nn.functional import pad

        width = max(self.ids.shape[1], other.ids.shape[1])
        pick = lambda a, b: torch.where(
            keep[:, None], pad(a, (0, width - a.shape[1])), pad(b, (0, width - b.shape[1]))
        )
        ids, mask = pick(self.ids, other.ids), pick(self.mask, other.mask)
        width = int(mask.sum(1).max())
        return Answers(ids[:, :width], mask[:, :width])


@dataclass
class Batch:
    """One micro-batch of B posts.

    prompt: the model's inputs: input_ids, attention_mask, mm_token_type_ids (B, P), padded on the left, and
        pixel_values, image_grid_thw where there is an image among the posts.
    plain, cot: the two possible targets of each post; where there is no reasoning, cot repeats plain.
    has_cot: (B,) bool.
    """

    ids: list[str]
    prompt: dict
    plain: Answers | None
    cot: Answers | None
    has_cot: "torch.Tensor | None"
    shortened: int

    def __len__(self):
        return len(self.ids)

    def to(self, device):
        answers = self.plain is not None
        return Batch(
            self.ids,
            {name: value.to(device, non_blocking=True) for name, value in self.prompt.items()},
            self.plain.to(device) if answers else None,
            self.cot.to(device) if answers else None,
            self.has_cot.to(device) if answers else None,
            self.shortened,
        )


def collate(samples, encoder):
    """Samples to one Batch: prompts padded on the left, answers on the right.

    No samples at all give a Batch of length 0 that a model can run on all the same: processes which share a step
    must go through the same number of passes. Its one row stands for no post; what is made of it is to be dropped.
    """
    import torch

    ids = [sample.id for sample in samples]
    samples = samples or [encoder.stand_in]
    width = max(len(sample.prompt) for sample in samples)
    input_ids = torch.full((len(samples), width), encoder.pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        input_ids[row, width - len(sample.prompt) :] = torch.tensor(sample.prompt)
        attention_mask[row, width - len(sample.prompt) :] = 1
    prompt = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == encoder.image_token_id).int(),
    }
    images = [sample.image for sample in samples if sample.image is not None]
    if images:
        for name in ("pixel_values", "image_grid_thw"):
            prompt[name] = joined([image[name] for image in images])
    plain = cot = with_cot = None
    if samples[0].plain is not None:
        plain = Answers.pad([sample.plain for sample in samples], encoder.pad)
        cot = Answers.pad([sample.cot or sample.plain for sample in samples], encoder.pad)
        with_cot = torch.tensor([sample.cot is not None for sample in samples])
    return Batch(ids, prompt, plain, cot, with_cot, sum(sample.shortened for sample in samples))


def joined(tensors):
    """One tensor of some, row after row, without a copy where they lie so in memory: `unpack`'s mostly do."""
    import torch

    first, rows = tensors[0], sum(map(len, tensors))
    follow = all(
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.storage_offset() + one.numel() == other.storage_offset()
        for one, other in pairwise(tensors)
    )
    return (
        first.as_strided((rows, *first.shape[1:]), first.stride()) if follow else torch.cat(tensors)
    )


def epoch_order(count, batch_size, seed, epoch):
    """The steps of an epoch: lists of `batch_size` indices in an order that (seed, epoch) decide."""
    import numpy as np

    order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def by_length(samples, parts):
    """Samples in `parts` micro-batches of about equal size, each of samples of about equal length.

    Only samples of one step are sorted among themselves: a step's posts stay a random draw, and micro-batches
    decide nothing but how much is padded.
    """
    if parts > 1:
        samples = sorted(samples, key=Sample.length)
    edges = [len(samples) * part // parts for part in range(parts + 1)]
    return [samples[start:end] for start, end in zip(edges, edges[1:])]


class Loader:
    """Yields (micro-batches, skipped) for every list of indices in `steps`; workers read and encode the posts.

    Of several processes, `rank` (from 0) of `size` gets its share of every step, in as many micro-batches as each of
    the others. `waited` is how many seconds the last step's data took to come, after it was asked for.

    Only the posts themselves pass between processes, two tensors for all images of a step: each costs time and holds an
    open file. A post of 512 image tokens is 10 MB, so that it matters who copies it: the workers
    alone.
    Raises UserError where a record has changed, or the system kills a worker.
    """

    def __init__(self, posts, encoder, steps, micro_batch, workers, with_answers, rank=0, size=1):
        from torch.utils.data import DataLoader

        self.encoder, self.with_answers, self.waited = encoder, with_answers, 0.0
        self.parts = [-(-len(step) // (size * micro_batch)) for step in steps]
        self.steps = DataLoader(
            EncodedPosts(posts, encoder, with_answers),
            num_workers=workers,
            collate_fn=partial(pack, most=micro_batch if with_answers else None),
            batch_sampler=[step[rank::size] for step in steps],
            prefetch_factor=2 if workers else None,
            worker_init_fn=leave_signals,
        )

    def __iter__(self):
        parts = iter(self.parts)
        with closing(
            self._items()
        ) as steps:  # at an error the workers end at once, not when it is forgotten
            while True:
                started = time.perf_counter()
                packed = next(steps, None)
                if packed is None:
                    return
                items = unpack(*packed)
                for error in items:
                    if isinstance(error, UserError):
                        raise error
                samples = [item for item in items if isinstance(item, Sample)]
                chunks = (
                    by_length(samples, next(parts))
                    if self.with_answers
                    else [samples]
                    if samples
                    else []
                )
                micro_batches = [collate(chunk, self.encoder) for chunk in chunks]
                self.waited = time.perf_counter() - started
                yield micro_batches, [item for item in items if isinstance(item, Skipped)]

    def _items(self):
        try:
            yield from self.steps
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):  # an error of the worker's own
                raise
            raise UserError(
                "a process that reads the posts was killed, for want of memory perhaps; try fewer "
                "--workers (0: none beside the main one)"
            ) from None


def pack(items, most):
    """(items, the tensors of all their images in one): what a worker sends for a step.

    Samples that will be more than one micro-batch of `most` are sorted already as `by_length` will sort them. A full
    shared memory is a UserError among the items: left to the worker's queue it would be a traceback, and the main
    process would wait for ever.
    """
    import torch
    from torch.utils.data import get_worker_info

    samples = [item for item in items if isinstance(item, Sample)]
    if most and len(samples) > most:
        items = sorted(samples, key=Sample.length) + [
            item for item in items if not isinstance(item, Sample)
        ]
    with_image = [item for item in items if isinstance(item, Sample) and item.image is not None]
    images = (
        {
            name: torch.cat([sample.image[name] for sample in with_image])
            for name in ("pixel_values", "image_grid_thw")
        }
        if with_image
        else None
    )
    for sample in with_image:
        sample.image = {}
    if images and get_worker_info() is not None:
        try:
            for tensor in images.values():
                tensor.share_memory_()
        except RuntimeError as error:
            return [
                UserError(
                    f"the images that --workers prepare do not fit into shared memory ({error}): give it more room "
                    "(docker --shm-size), or try fewer --workers (0: none beside the main process)"
                )
            ], None
    return items, images


def unpack(items, images):
    """`pack`'s items, each with its own part of the images again."""
    if images:
        grids = images["image_grid_thw"]
        parts = zip(images["pixel_values"].split(grids.prod(1).tolist()), grids.split(1))
        for item in items:
            if isinstance(item, Sample) and item.image is not None:
                item.image = dict(zip(("pixel_values", "image_grid_thw"), next(parts)))
    return items


def leave_signals(_):
    """Ctrl-C and SIGTERM reach a whole group of processes; what they mean is the parent's to say.

    A second SIGTERM is obeyed: that is how Python ends what is still there when the parent ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


# ------------------------------------------------------------------------------------------------- writing


def write_whole(path, content):
    """Write text, bytes, or an iterable of bytes to a file, whole or not at all: a temporary file, then a rename.

    Lone surrogates in text are written as JSON writes them. Raises OSError naming the file.
    """
    path = Path(path)
    content = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    content = [content] if isinstance(content, bytes) else content
    if (
        path.exists() and not path.is_file()
    ):  # a rename would put a file in the place of /dev/stdout
        raise FileExistsError(errno.EEXIST, "not a file on a disk", str(path))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def to_line(record):
    """A record as one line of JSONL, any language readable; a lone surrogate, which UTF-8 can't write, is escaped."""
    return (
        json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")
        + "\n"
    )


# ------------------------------------------------------------------------------------------ for every script


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the script's own description as it stands, and the defaults shown."""


def count(text):
    """A whole number from 1 up, as argparse wants it told."""
    if not (value := natural(text)):
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return value


def times(text):
    """A number above 0, whole or not, as argparse wants it told."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(value) if value.is_integer() else value


def add_reading_options(parser):
    """The settings by which a model reads posts and answers, shared by train.py and infer.py."""
    add = parser.add_argument
    add(
        "--prompt-file",
        help="the prompt, with {text} where the post goes; without it the model folder's own",
    )
    add(
        "--max-pixels",
        type=count,
        default=512 * 28 * 28,
        help="larger images are scaled down to this; 28 x 28 pixels are one token (Qwen3-VL: 32 x 32)",
    )
    add(
        "--max-length",
        type=count,
        default=4096,
        help="tokens of a prompt; the text of a longer post is shortened",
    )
    add(
        "--max-new-tokens",
        type=count,
        default=512,
        help="an answer is cut off after this many tokens",
    )
    add("--workers", type=natural, default=2, help="processes that read and prepare images")
    add("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one")


def say(text):
    """A line for the person at the screen; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def progress(items, total, what, unit="post", done=0, silent=False):
    """A tqdm bar on stderr around `items`, or to be updated by hand where `items` is None."""
    from tqdm import tqdm

    return tqdm(
        items,
        total=total,
        desc=what,
        unit=unit,
        initial=done,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=silent,
    )


# ------------------------------------------------------------------------- tools for data sets: reading posts


class Entry(NamedTuple):
    """A post as the tools see it."""

    record: dict
    image: str | None  # where its image is
    text: int | None  # equal for texts of the same words; None where there is no text
    phrases: list[str]  # keyphrases as overlaps compare them: lower-cased, not stemmed
    words: int
    scored: int  # keyphrases that differ after stemming
    present: int  # those of them that stand in the text


def to_record(path, line, row):
    """A row of a file of posts, a dict or a line of CMKP's text, as a record. Raises UserError.

    CMKP's posts keep their image's "address" and have no image yet. Their id is the image's name, else a
    digest: a line number would change with the order of the posts.
    """
    if isinstance(row, dict):
        check_record(row, f"{path} line {line}")
        return row
    post = parse_cmkp(path, line, row)
    identity = post["id"] or hashlib.blake2b(row.encode(), digest_size=8).hexdigest()
    keyphrases = [phrase.strip() for phrase in post["keyphrases"]]
    return {
        "id": identity,
        "text": post["text"],
        "image": None,
        "keyphrases": keyphrases,
        "address": post["address"],
    }


def read_entries(path):
    """The posts of a JSONL or CMKP file as a list of Entry. Raises UserError."""
    entries, folder = [], os.path.realpath(Path(path).parent)
    for line, row in progress(read_rows(path), None, Path(path).name):
        record = to_record(path, line, row)
        words, image = normalize(record["text"]), record.get("image")
        padded = f" {' '.join(words)} "
        scored = {normalize(phrase) for phrase in record.get("keyphrases", [])} - {()}
        phrases = [
            phrase.strip().lower() for phrase in record.get("keyphrases", []) if phrase.strip()
        ]
        entries.append(
            Entry(
                record,
                os.path.join(folder, image) if image else None,
                hash(words) if words else None,
                phrases,
                len(record["text"].split()),
                len(scored),
                sum(f" {' '.join(phrase)} " in padded for phrase in scored),
            )
        )
    if not entries:
        raise UserError(f"{path}: no posts in it")
    return entries


def number_doubles(records):
    """Change ids that were there before (`x` to `x-2`), so that all are unique; returns how many."""
    taken, seen, renamed = {record["id"] for record in records}, {}, 0
    for record in records:
        identity = record["id"]
        number = seen[identity] = seen.get(identity, 0) + 1
        while number > 1 and record["id"] in taken:
            record["id"] = f"{identity}-{number}"
            number += 1
        renamed += record["id"] != identity
        taken.add(record["id"])
    return renamed


def relative(path, folder):
    """`path`, which begins with a real folder, as a record of a file in `folder` gives it."""
    try:
        return os.path.relpath(
            path, os.path.realpath(folder)
        )  # `..` after a linked folder would lead astray
    except ValueError:  # another drive of Windows
        return path


@contextmanager
def made(folder, path):
    """Make `folder` for what the block writes to `path`; what the system refuses is a UserError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{path}: can't be written ({error.strerror or error}); choose another --out"
        ) from None


def cmkp(args):
    """CMKP's text as JSONL. The image archive's files are named like the last part of the addresses."""
    folder, out = Path(args.out).parent, args.out
    if Path(out).resolve() == Path(args.source).resolve():
        raise UserError(f"{out}: the file to read; choose another --out")
    try:
        found = set(os.listdir(args.images)) if args.images else set()
    except OSError as error:
        raise UserError(
            f"{args.images}: can't be listed ({error.strerror}); --images is a folder"
        ) from None
    records, missing, unusable = [], [], []
    for line, row in read_rows(args.source):
        if isinstance(row, dict):
            raise UserError(
                f"{args.source} line {line}: JSONL already; text<sep>a;b<sep>address is needed here"
            )
        records.append(record := to_record(args.source, line, row))
        name = record["address"].rsplit("/", 1)[-1]
        if name in found:
            record["image"] = relative(os.path.join(os.path.realpath(args.images), name), folder)
        elif args.images:
            missing.append(name or f"line {line} has no address")
        try:
            check_record(record, f"line {line}", for_training=True)
        except UserError as error:
            unusable.append(str(error))
    if not records:
        raise UserError(f"{args.source}: no posts in it")
    renamed = number_doubles(records)
    with made(folder, out):
        write_whole(out, "".join(map(to_line, records)))
    for what, items in (("images are missing", missing), ("posts can't be trained on", unusable)):
        if items:
            say(f"{len(items)} {what}: {first_few(items)}")
    print_result(
        {
            "posts": len(records),
            "images": sum(record["image"] is not None for record in records),
            "images_missing": len(missing),
            "ids_renamed": renamed,
            "unusable": len(unusable),
        },
        args.json,
    )


def print_result(result, as_json):
    rows = [[name.replace("_", " "), str(value)] for name, value in result.items()]
    print(json.dumps(result, indent=2) if as_json else lay_out(rows))


# ------------------------------------------------------------------------------ tools for data sets: figures

SHARES = {"present", "absent", "overlap", "overlap_occurrences", "posts_with_unseen"}


def share(part, whole):
    return part / whole if whole else 0.0


def figures_of(entries, known=None):
    """The figures of a list of Entry as a dict; overlaps, where `known` is the set of the train file's keyphrases.

    Shares are fractions. "overlap" is over distinct keyphrases, lower-cased and not stemmed; "present" is
    evaluate.py's: the share of keyphrases whose stemmed words stand consecutively in the stemmed text.
    """
    phrases = [phrase for entry in entries for phrase in entry.phrases]
    distinct, present = set(phrases), sum(entry.present for entry in entries)
    scored = sum(entry.scored for entry in entries)
    result = {
        "posts": len(entries),
        "keyphrases": len(phrases),
        "distinct_keyphrases": len(distinct),
        "keyphrases_per_post": share(len(phrases), len(entries)),
        "words_per_post": share(sum(entry.words for entry in entries), len(entries)),
        "present": share(present, scored),
        "absent": share(scored - present, scored),
        "images": sum(entry.image is not None for entry in entries),
        "images_missing": sum(
            entry.image is not None and not os.path.exists(entry.image) for entry in entries
        ),
    }
    if known is not None:
        result["overlap"] = share(len(distinct & known), len(distinct))
        result["overlap_occurrences"] = share(
            sum(phrase in known for phrase in phrases), len(phrases)
        )
        result["posts_with_unseen"] = share(
            sum(not known.issuperset(entry.phrases) for entry in entries), len(entries)
        )
    return result


def print_stats(names, parts, as_json):
    """Print the figures of files, given by names and lists of Entry; the first is the train file."""
    known = {phrase for entry in parts[0] for phrase in entry.phrases}
    columns = [
        {"file": str(name)} | figures_of(entries, known if number else None)
        for number, (name, entries) in enumerate(zip(names, parts))
    ]
    if as_json:
        print(json.dumps({"overlap": columns[-1].get("overlap"), "files": columns}, indent=2))
        return

    def cell(key, value):
        return (
            percent(value) + "%"
            if key in SHARES
            else f"{value:.2f}"
            if isinstance(value, float)
            else str(value)
        )

    rows = [
        [
            key.replace("_", " "),
            *(cell(key, column[key]) if key in column else "-" for column in columns),
        ]
        for key in columns[-1]
    ]
    print(lay_out(rows))


def stats(args):
    print_stats(args.files, list(map(read_entries, args.files)), args.json)


# ------------------------------------------------------------------------- tools for data sets: a new split

SIDES = TRAIN, VALID, TEST = range(3)
SIDE_NAMES = ("train", "valid", "test")
OVERLAP_TOLERANCE = 0.005
LIKENESS_TOLERANCE = 0.10  # of the whole's keyphrases a post, share present, words a post
PATIENCE = 5000  # swaps tried in vain before the search gives up


class Groups:
    """Posts in groups that share an image or a text, and the keyphrases of each group, as arrays.

    `pair_group` and `pair_phrase` list the distinct (group, keyphrase) pairs; `sums` has a row a group: posts,
    words, keyphrases, keyphrases present, keyphrases scored.
    """

    def __init__(self, entries):
        import numpy as np

        parent, first = list(range(len(entries))), {}

        def root(post):
            while parent[post] != post:
                parent[post] = post = parent[parent[post]]
            return post

        for post, entry in enumerate(entries):
            image = os.path.normpath(entry.image) if entry.image else entry.record.get("address")
            for key in (("image", image), ("text", entry.text)):
                if key[1]:
                    parent[root(post)] = root(first.setdefault(key, post))
        numbers, phrases = {}, {}
        self.of_post = np.array(
            [numbers.setdefault(root(post), len(numbers)) for post in range(len(entries))]
        )
        pairs = np.array(
            [
                (group, phrases.setdefault(phrase, len(phrases)))
                for group, entry in zip(self.of_post.tolist(), entries)
                for phrase in entry.phrases
            ]
        )
        if not len(pairs):
            raise UserError("none of the posts has a keyphrase; a split by keyphrases needs some")
        self.phrases = len(phrases)
        self.pair_group, self.pair_phrase = np.divmod(
            np.unique(pairs @ [self.phrases, 1]), self.phrases
        )
        columns = np.array(
            [(1, entry.words, len(entry.phrases), entry.present, entry.scored) for entry in entries]
        )
        self.sums = np.stack(
            [np.bincount(self.of_post, column) for column in columns.T], axis=1
        ).astype(int)
        self.size = self.sums[:, 0]

    def overlap(self, side, which):
        """The share of the distinct keyphrases of one side that train has, too."""
        import numpy as np

        here, there = np.zeros((2, self.phrases), dtype=bool)
        sides = side[self.pair_group]
        here[self.pair_phrase[sides == which]] = True
        there[self.pair_phrase[sides == TRAIN]] = True
        return share((here & there).sum(), here.sum())


def resplit(entries, overlap, test, valid, seed):
    """Split posts anew, so that few of the keyphrases of test and valid are in train: the idea of MMKP-V2.

    Returns an array with TRAIN, VALID or TEST for each entry. Some keyphrases are held out, with all posts that
    have them; the rest of test and valid are posts whose keyphrases train has, too. Of the orders in which
    keyphrases can be held out, the one that favours rare keyphrases least is taken: rare ones cost few posts and
    so reach lower overlaps, but test should have unseen keyphrases of all sorts. Swaps then do the rest.

    Raises UserError where the asked overlap (within OVERLAP_TOLERANCE) or the likeness to the whole can't be had.
    """
    if test + valid >= len(entries):
        raise UserError(
            f"--test {test} and --valid {valid} leave nothing to train on of {len(entries)} posts"
        )
    groups, closest = Groups(entries), None
    for sharpness in (1, 2, 4, 8):
        side = hold_out(groups, overlap, (None, valid, test), sharpness, seed)
        misfits = settle(groups, side, overlap, seed)
        misfits |= {
            f"{SIDE_NAMES[which]} posts": float("inf")
            for which, size in ((TEST, test), (VALID, valid))
            if size and not (side == which).any()
        }  # all that could go there stay together
        worst = max(misfits.values())
        if closest is None or worst < closest[0]:
            closest = worst, side, misfits
        if worst <= 1:
            return side[groups.of_post]
    worst, side, misfits = closest
    reached = " and ".join(
        f"{percent(groups.overlap(side, which))}% in {SIDE_NAMES[which]}"
        for which, size in ((TEST, test), (VALID, valid))
        if size
    )
    broken = ", ".join(name for name, value in misfits.items() if value > 1)
    raise UserError(
        f"an overlap of {percent(overlap)}% can't be reached with --test {test} and --valid {valid} of "
        f"{len(entries)} posts; the closest found is {reached} (not as asked: {broken}). Ask for that "
        "overlap or other sizes; nothing was written"
    )


def hold_out(groups, overlap, sizes, sharpness, seed):
    """A first split of groups, close to the asked overlap: an array of TRAIN, VALID or TEST.

    Keyphrases stand in a random order in which a keyphrase of n posts comes late with weight n ** sharpness.
    Two bisections: how many of the first ones are held out, and how their posts are dealt to test and valid.
    """
    import numpy as np

    rng, size = np.random.default_rng([seed, sharpness]), groups.size
    cost = np.bincount(groups.pair_phrase, size[groups.pair_group], minlength=groups.phrases)
    # No phrase and no retweet should fill the test set; where that can't be had, less is asked.
    most = max(1, (sizes[VALID] + sizes[TEST]) * sharpness / 20)
    late = np.where(cost <= most, cost**sharpness * rng.exponential(size=groups.phrases), np.inf)
    rank = np.argsort(np.argsort(late))
    first = np.full(len(size), groups.phrases)  # the earliest keyphrase of each group
    np.minimum.at(first, groups.pair_group, rank[groups.pair_phrase])
    dice, place = rng.random((2, len(size)))
    # A group for each keyphrase stays in train if it can: the others may leave without making a phrase unseen.
    in_place = np.argsort(place[groups.pair_group])
    keeper = np.zeros(len(size), dtype=bool)
    keeper[
        groups.pair_group[in_place][np.unique(groups.pair_phrase[in_place], return_index=True)[1]]
    ] = True
    fillers = np.lexsort((place, keeper, size > most))

    def deal(held, to_test):
        """(side, posts beyond each side's size) with `held` keyphrases held out, `to_test` of their posts in test."""
        side = np.where(first < held, np.where(dice < to_test, TEST, VALID), TRAIN)
        beyond = [int(size[side == which].sum()) - (sizes[which] or 0) for which in SIDES]
        rest = fillers[side[fillers] == TRAIN]
        so_far, start = np.cumsum(size[rest]), 0
        for which in (TEST, VALID):
            filled = so_far[start - 1] if start else 0
            end = max(start, int(np.searchsorted(so_far, filled - beyond[which], "right")))
            side[rest[start:end]] = which
            start = end
        return side, beyond

    def deal_evenly(held):
        """(side, overlap) with test and valid about equal in overlap; None where they can't hold so many posts."""
        low, high, found = 0 if sizes[VALID] else 1, 1, None
        for _ in range(10):
            to_test = (low + high) / 2
            side, beyond = deal(held, to_test)
            if beyond[TEST] > 0 and beyond[VALID] > 0:
                return None
            of_test, of_valid = groups.overlap(side, TEST), groups.overlap(side, VALID)
            if max(beyond[VALID], beyond[TEST]) <= 0:
                found = side, max(of_test, of_valid)
            more = beyond[VALID] > 0 or beyond[TEST] <= 0 and of_test > of_valid
            low, high = (to_test, high) if more else (low, to_test)
        return found

    enough, too_many = 0, int(np.isfinite(late).sum()) + 1
    best = deal_evenly(0)
    while too_many - enough > 1:
        held = (enough + too_many) // 2
        dealt = deal_evenly(held)
        if dealt is None or dealt[1] < overlap:
            too_many = held
        else:
            enough, best = held, dealt
    side = best[0]
    for which in (TEST, VALID):  # groups of several posts may have left room
        room = sizes[which] - size[side == which].sum()
        for group in fillers.tolist() if room else ():
            if side[group] == TRAIN and size[group] <= room:
                side[group], room = which, room - size[group]
    return side


def settle(groups, side, overlap, seed):
    """Swap groups of the same size between the sides, in place, until overlap and likeness are well met.

    Returns how far each figure is from what it should be, in tolerances: a dict in which all are up to 1 where
    the split is as asked.
    """
    import numpy as np

    rng, sides = random.Random(seed), [which for which in (TEST, VALID) if (side == which).any()]
    members = [[] for _ in groups.size]
    for group, phrase in zip(groups.pair_group.tolist(), groups.pair_phrase.tolist()):
        members[group].append(phrase)
    pair_side = side[groups.pair_group]
    count = [
        np.bincount(groups.pair_phrase[pair_side == which], minlength=groups.phrases).tolist()
        for which in SIDES
    ]
    sums, rows = (
        [groups.sums[side == which].sum(axis=0).tolist() for which in SIDES],
        groups.sums.tolist(),
    )
    distinct, shared = [0] * 3, [0] * 3
    place = side.tolist()

    def tally(phrase, sign):
        for which in sides:
            if count[which][phrase]:
                distinct[which] += sign
                shared[which] += sign * (count[TRAIN][phrase] > 0)

    def move(group, to):
        here, place[group] = place[group], to
        sums[here] = [a - b for a, b in zip(sums[here], rows[group])]
        sums[to] = [a + b for a, b in zip(sums[to], rows[group])]
        for phrase in members[group]:
            tally(phrase, -1)
            count[here][phrase] -= 1
            count[to][phrase] += 1
            tally(phrase, 1)

    def means(posts, words, keyphrases, present, scored):
        return share(words, posts), share(keyphrases, posts), share(present, scored)

    whole = means(*groups.sums.sum(axis=0).tolist())

    def misfits():
        for which in sides:
            yield abs(share(shared[which], distinct[which]) - overlap) / OVERLAP_TOLERANCE
            yield from (
                abs(mean / target - 1) / LIKENESS_TOLERANCE if target else 0
                for mean, target in zip(means(*sums[which]), whole)
            )

    def badness():
        return sum(max(0, misfit - 0.5) for misfit in misfits())

    for phrase in range(groups.phrases):
        tally(phrase, 1)
    same_size = {}
    for group, posts in enumerate(groups.size.tolist()):
        same_size.setdefault(posts, []).append(group)
    outside = [group for group, which in enumerate(place) if which != TRAIN]
    best, tries = badness(), 0
    while best and tries < PATIENCE:
        tries += 1
        position = rng.randrange(len(outside))
        one = outside[position]
        other = rng.choice(same_size[rows[one][0]])
        here, there = place[one], place[other]
        if here == there:
            continue
        move(one, there)
        move(other, here)
        if (now := badness()) < best:
            best, tries = now, 0
            outside[position] = other if there == TRAIN else one
        else:
            move(one, here)
            move(other, there)
    side[:] = place
    names = [
        f"{SIDE_NAMES[which]} {name}"
        for which in sides
        for name in ("overlap", "words a post", "keyphrases a post", "share present")
    ]
    return dict(zip(names, misfits()))


def split(args):
    """Write train.jsonl, valid.jsonl and test.jsonl of a new split of the posts in some files."""
    out = Path(args.out)
    paths = [out / f"{name}.jsonl" for name in SIDE_NAMES]
    for path in paths:
        if path.resolve() in {Path(file).resolve() for file in args.files}:
            raise UserError(f"{path}: one of the files to split; choose another --out")
    entries = [entry for path in args.files for entry in read_entries(path)]
    # From here on the order of the input can't matter.
    entries.sort(
        key=lambda entry: (entry.record["id"], entry.record["text"], to_line(entry.record))
    )
    if renamed := number_doubles([entry.record for entry in entries]):
        say(f"{renamed} ids were there more than once; the later ones have a number added")
    side = resplit(entries, args.overlap, args.test, args.valid, args.seed)
    parts = [
        [entry for entry, which in zip(entries, side.tolist()) if which == wanted]
        for wanted in SIDES
    ]
    for wanted, part in ((args.test, parts[TEST]), (args.valid, parts[VALID])):
        if len(part) != wanted:
            say(
                f"{len(part)} posts where {wanted} were asked for: posts that stay together don't add up to it"
            )
    with made(out, out), tempfile.TemporaryDirectory(dir=out, prefix=".split.") as temporary:
        for path, part in zip(paths, parts):
            write_whole(
                Path(temporary) / path.name, "".join(to_line(moved(entry, out)) for entry in part)
            )
        for path in paths:  # nothing can fail for want of space here
            os.replace(Path(temporary) / path.name, path)
    print_stats(paths, parts, args.json)


def moved(entry, folder):
    """The entry's record for a file in `folder`: an image path that was relative to the old file is made anew."""
    image = entry.record.get("image")
    if not image or os.path.isabs(image):
        return entry.record
    return {**entry.record, "image": relative(entry.image, folder)}


# ------------------------------------------------------------------------------- tools for data sets: a check


def check_line(path, is_text, line, offset):
    """What is wrong with one line of a file of posts, and with its image: (id or None, list of problems)."""
    with open(path, "rb") as file:
        file.seek(offset)
        raw = file.readline()
    where = f"{path} line {line}"
    try:
        record = (
            to_record(path, line, decode(path, line, raw))
            if is_text
            else parse_line(path, line, raw)
        )
    except UserError as error:
        return None, [str(error).removeprefix(f"{where}: ")]
    identity, text, image = (
        value if isinstance(value := record.get(field), str) else None
        for field in ("id", "text", "image")
    )
    problems = []
    try:
        check_record(record, where, for_training=True)
    except UserError as error:
        problems.append(
            str(error)
            .removeprefix(where)
            .removeprefix(f" (id {shown(identity)})")
            .removeprefix(": ")
        )
    if image:
        try:
            load_image(Path(path).parent / image, 512 * 28 * 28)
        except Unreadable as error:
            problems.append(f"the image {shown(image)}: {error}")
    elif text is not None and not text.strip():
        problems.append("neither text nor image")
    return identity, problems


def check(args):
    """Read every record and every image once and print all that is wrong; the exit code is 1 if anything is."""
    refuse_streams(args.file)
    lines, head = [], b""
    for line, offset, raw in read_lines(args.file):
        if raw := raw.removeprefix(BYTE_ORDER_MARK).strip():
            lines.append((line, offset))
            head = head or raw
    if not lines:
        raise UserError(f"{args.file}: no posts in it")
    is_text = not args.file.endswith((".jsonl", ".json")) and not LOOKS_LIKE_JSON.match(head)
    wrong, first = [], {}
    # A worker that the system kills is an error of this executor, where multiprocessing.Pool waits for ever.
    pool = ProcessPoolExecutor(
        args.workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        results = pool.map(partial(check_line, args.file, is_text), *zip(*lines), chunksize=8)
        for (line, _), (identity, problems) in zip(lines, progress(results, len(lines), "check")):
            if first.setdefault(identity, line) != line and identity is not None and not is_text:
                problems.append(f"this id was already used on line {first[identity]}")
            wrong += [{"line": line, "id": identity, "problem": problem} for problem in problems]
    except BrokenProcessPool:
        raise UserError(
            f"{args.file}: a worker process was killed, for want of memory perhaps; "
            "try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    if args.json:
        print(json.dumps({"posts": len(lines), "problems": wrong}, indent=2))
    else:
        for problem in wrong:
            named = f" (id {shown(problem['id'])})" if problem["id"] is not None else ""
            print(f"line {problem['line']}{named}: {problem['problem']}")
        print(f"{len(lines)} posts, {len(wrong)} problems")
    return 1 if wrong else 0


# ------------------------------------------------------------------------------------------- the command line


def fraction(text):
    """A number from 0 to 1, as argparse wants it told."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def read_arguments():
    parser = argparse.ArgumentParser(
        description="Tools for data sets of posts.", formatter_class=HelpFormatter
    )
    tools = parser.add_subparsers(required=True, metavar="cmkp | stats | split | check")
    posts = "posts: JSONL, or CMKP's text, text<sep>a;b<sep>address a line"

    def tool(function, what):
        sub = tools.add_parser(
            function.__name__, help=what, description=what, formatter_class=HelpFormatter
        )
        sub.add_argument(
            "--json", action="store_true", help="print one JSON object instead of a table"
        )
        sub.set_defaults(tool=function)
        return partial(sub.add_argument, default=argparse.SUPPRESS), sub.add_argument

    needed, optional = tool(cmkp, "make JSONL of CMKP's text")
    needed("source", metavar="SRC", help="CMKP's text, text<sep>a;b<sep>address a line")
    optional(
        "--images",
        metavar="DIR",
        help="folder with the images, named like the last part of the addresses",
    )
    needed("--out", metavar="FILE", required=True, help="the JSONL to write")

    needed, _ = tool(
        stats, "count posts and keyphrases, and how many of the train file's a test file has"
    )
    needed("files", metavar="FILE", nargs="+", help=f"{posts}; the first is the train file")

    needed, optional = tool(
        split, "split posts anew so that few keyphrases of test and valid are in train (MMKP-V2)"
    )
    needed("files", metavar="FILE", nargs="+", help=posts)
    optional(
        "--overlap",
        type=fraction,
        default=0.4492,
        help="share of the distinct keyphrases of test, and of "
        "valid, that train has too, to within 0.005",
    )
    needed("--test", metavar="N", type=count, required=True, help="posts in test.jsonl")
    needed(
        "--valid", metavar="N", type=natural, required=True, help="posts in valid.jsonl, 0 for none"
    )
    optional("--seed", type=natural, default=0, help="seed of the choice")
    needed(
        "--out",
        metavar="DIR",
        required=True,
        help="folder for train.jsonl, valid.jsonl and test.jsonl",
    )

    needed, optional = tool(check, "read every record and image once and tell all that is wrong")
    needed("file", metavar="FILE", help=posts)
    optional(
        "--workers", type=count, default=os.cpu_count() or 1, help="processes that read the images"
    )
    return parser.parse_args()


def main():
    args = read_arguments()
    return args.tool(args)


if __name__ == "__main__":
    run(main)
