"""Posts, prompts and answers: everything between a JSONL file and the tensors that a model reads.

A record is one JSON object a line; other fields are kept and ignored:

    {"id": "D0wn", "text": "some tiny blue flowers", "image": "images/D0wn.jpg",
     "keyphrases": ["wildflower hour"], "cot": "The photo shows …"}

`image` is relative to the JSONL file, absolute, or null; `cot` has no tags, and may be absent.
"""

import math
import os
import re
import signal
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from evaluate import UserError, canonical, parse_line, read_jsonl, shown
from support.checkpoint import load_prompt_file, read_own
from support.console import positive_int, reading_progress, whole_number
from support.images import MAX_PIXELS, Unreadable, load_image, patches
from support.jsonl import IndexedLines
from support.phrases import CHAT_TOKEN, TAG, TURN_TOKEN, WORDS_ONLY, split_keyphrases
from support.records import add_map_option, look_over, problem, renamed, wrong_field

if TYPE_CHECKING:
    import torch

MAX_LENGTH = 4096  # default, in tokens

# ---------------------------------------------------------------------------------------- records


def check_record(record, where, for_training=False, names=None):
    """Raise UserError, as `support.records.problem` makes it, unless `record` is a usable post."""
    where = f"{where} (id {shown(record.get('id'))})"
    keyphrases, cot = record.get("keyphrases", []), record.get("cot")
    are_strings = isinstance(keyphrases, list) and all(isinstance(item, str) for item in keyphrases)
    usable = {
        "id": isinstance(record.get("id"), str) and record["id"],
        "text": isinstance(record.get("text"), str),
        "image": isinstance(record.get("image"), str | None),
        "keyphrases": are_strings and (keyphrases or not for_training),
        "cot": isinstance(cot, str | None),
    }
    for name in usable:
        if not usable[name]:
            raise wrong_field(where, record, names, name)
    if for_training:
        check_keyphrases(keyphrases, where)
        if cot and (TAG.search(cot) or CHAT_TOKEN.search(cot)):
            kind = "'cot' is the reasoning alone"
            raise problem(where, kind, f"{kind}; remove the tags from it")


def check_keyphrases(keyphrases, where):
    """Raise UserError unless `parse_answer` returns the keyphrases from their answer."""
    phrases, joined = list(map(canonical, keyphrases)), "".join(keyphrases)
    found, _ = parse_answer(plain_answer(keyphrases))
    # A line break would become a space, but may separate two keyphrases.
    if found != phrases or "\n" in joined or "\r" in joined:
        lost = next((phrase for phrase in keyphrases if phrase not in found), keyphrases[0])
        raise problem(
            where,
            "a keyphrase would be lost",
            f"the keyphrase {shown(lost)} would be lost: the answer is read as "
            f"{shown('; '.join(found))}; unescape HTML, remove repetitions, semicolons, line "
            "breaks, tags, quotes, hash signs, brackets, bullets, numbers or labels, or let --map "
            "keyphrases=keyphrases do so",
        )


class Posts(IndexedLines):
    """The records of a JSONL file, read from disk one by one.

    Opening reads the file once and checks every record; then `records.look_over` warns of what
    seems wrong. `names` says which of the file's fields are ours ({"text": "caption"}).
    `with_image` and `without_cot` count posts, `keyphrase_count` their keyphrases.

    Raises UserError naming the line and id of a record that can't be used, or has changed since.
    """

    def __init__(self, path, for_training=False, names=None):
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file, or not a regular one, which can be read twice")
        super().__init__(path)
        self.folder, self.names = self.path.parent, names
        self.with_image = self.without_cot = self.keyphrase_count = 0
        first_lines = {}  # hash of an id -> its line: a tenth of the memory of the ids themselves
        for line, offset, record in reading_progress(read_jsonl(path), path):
            record = renamed(record, names)
            check_record(record, f"{path} line {line}", for_training, names)
            first = first_lines.setdefault(hash(canonical(record["id"])), line)
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

    def __getitem__(self, index):
        """The record as a dict."""
        record = parse_line(self.path, self.lines[index], self.raw(index))
        return renamed(record, self.names)

    def image_path(self, record):
        """Where the record's image is, or None for a text-only post."""
        return self.folder / record["image"] if record.get("image") else None


def has_cot(record):
    """Whether a record has reasoning that is not blank."""
    return bool((record.get("cot") or "").strip())


def relative_path(path, folder):
    """`path`, which begins with a resolved folder, as a record of a file in `folder` writes it."""
    return os.path.relpath(path, os.path.realpath(folder))  # `..` would leave a linked folder


# ---------------------------------------------------------------------------- prompts and answers

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PROMPT = (
    "Predict the keyphrases (hashtags) that sum up this social media post and its image. Write them"
    " separated by semicolons, the most fitting first. If the post needs reasoning, reason first"
    " inside <think></think>, then give the keyphrases inside <answer></answer>.\n\nPost: {text}"
)


def fill_prompt(prompt, **values):
    """The prompt with its {fields} replaced; the values may hold braces themselves."""
    return re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), prompt)


def plain_answer(keyphrases):
    """y_s, the answer without reasoning: `keyphrase 1; keyphrase 2`.

    It ends with a semicolon where `parse_answer` would not return the keyphrases without it: where
    a comma would separate them, or a period would be the end of a sentence.
    """
    phrases = list(map(canonical, keyphrases))
    answer = "; ".join(phrases)
    if parse_answer(answer)[0] != phrases and parse_answer(f"{answer};")[0] == phrases:
        return f"{answer};"
    return answer


def cot_answer(cot, keyphrases):
    """y_c, the answer that reasons first: `<think>…</think><answer>keyphrase 1; …</answer>`."""
    return f"<think>{cot.strip()}</think><answer>{plain_answer(keyphrases)}</answer>"


def parse_answer(output):
    """(keyphrases, think) of whatever a model wrote; never raises.

    The keyphrases are those of the last <answer> that has any; else of what follows the last
    </think>; else of what precedes a <think> that is never closed. `think` is the reasoning, None
    where it is blank. A </think> without its <think> ends reasoning, too: some chat templates write
    the <think> themselves.
    """
    if WORDS_ONLY.fullmatch(output):  # so that a file's keyphrases are checked in no time
        return split_keyphrases(output), None
    turns = (CHAT_TOKEN.sub("", turn) for turn in TURN_TOKEN.split(output))
    output = next(filter(str.strip, turns), "").rstrip()
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
    return make_prediction(identity, "", 0, cut=False) | {"error": error}


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
    (`opens_think`), y_c goes on from there, and y_s closes it first. Transformers' processor needs
    torchvision, so the image placeholder is expanded here: a token for merge_size² patches.

    rope_index: the model's `get_rope_index`, with which `collate` computes positions.

    Raises UserError where the prompt or the chat template can't be used.
    """

    def __init__(self, tokenizer, image_processor, image_token_id, options=None, rope_index=None):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token_id, self.rope_index = image_token_id, rope_index
        self.prompt, self.max_pixels, self.max_length = options or EncoderOptions()
        if self.prompt.count("{text}") != 1:
            raise UserError("the prompt must contain {text} once, to say where the post goes")
        self.size = {
            edge: int(min(image_processor.size[edge], self.max_pixels))
            for edge in ("shortest_edge", "longest_edge")
        }
        added = tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        # Only tokens that are marked as special can be kept out of plain text.
        tokenizer.add_tokens([*added.values()], special_tokens=True)
        own = {token.content: [number] for number, token in added.items()}
        self.tags = {tag: own.get(tag) or self.plain_ids(tag) for tag in TAGS}
        self.left_out = special.difference(*self.tags.values())
        pad = tokenizer.pad_token_id
        self.pad = pad if pad is not None else tokenizer.eos_token_id
        self.frames = {has_image: self._frame(has_image) for has_image in (True, False)}
        self._check_room()
        self.opens_think = self._render(".").rstrip().endswith("<think>")
        mark = "\uf8ffANSWER\uf8ff"
        after_answer = self._render(".", mark).partition(mark)[2]
        self.end_of_turn = self.template_ids(after_answer)[0]  # `<|im_end|>` for Qwen

    def plain_tokens(self, text, **options):
        """The tokenizer's encoding of `text`, in which nothing counts as an added token."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8
        options |= {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(text, **options)

    def plain_ids(self, text):
        """Token ids of `text`, in which nothing counts as an added token."""
        return self.plain_tokens(text).input_ids

    def template_ids(self, text):
        """Token ids of a part of the chat template, its added tokens included."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _render(self, text, answer=None, has_image=False):
        """The chat template around a post and its answer, or up to where the answer begins."""
        content = [{"type": "image"}] * has_image + [{"type": "text", "text": text}]
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
        rendered = self._render(self.prompt.replace("{text}", mark), has_image=has_image)
        before, _, after = rendered.partition(mark)
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
        side = self.image_processor.patch_size * self.image_processor.merge_size
        image = self.size["longest_edge"] // side**2
        if not image or prompt + image >= self.max_length:
            raise UserError(
                f"--max-length {self.max_length} and --max-pixels {self.max_pixels} leave no room "
                f"for an image and a post's text: the prompt takes {prompt} tokens, an image up to "
                f"{image} ({side} x {side} pixels each)"
            )

    def prompt_ids(self, text, image_tokens):
        """(token ids of image + prompt, whether `text` was truncated to keep to max_length)."""
        head, before, after, tail = self.frames[image_tokens > 0]
        if image_tokens:
            place = head.index(self.image_token_id)
            head = head[:place] + [self.image_token_id] * image_tokens + head[place + 1 :]
        whole = text
        while True:  # more than twice where the cut changes how the end of the text is tokenized
            ids = head + self.plain_ids(before + text + after) + tail
            excess = len(ids) - self.max_length
            if excess <= 0 or not text:
                return ids, text != whole
            offsets = self.plain_tokens(text, return_offsets_mapping=True).offset_mapping
            keep = offsets[-excess][0] if excess < len(offsets) else 0
            text = text[: min(keep, len(text) - 1)]

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

        Where the chat template has opened <think>, "always" only must not close it at once, and
        "never" closes it.
        """
        tag = self.tags["</think>" if self.opens_think else "<think>"]
        if think == "auto":
            return [], None
        return ([], tag[0]) if (think == "always") == self.opens_think else (tag, None)

    def decode(self, ids):
        """The text of an answer's token ids; of the special tokens only the tags are in it.

        It begins with the <think> that the chat template has opened.
        """
        shown = [token for token in ids if token not in self.left_out]
        text = self.tokenizer.decode(shown, clean_up_tokenization_spaces=False)
        return "<think>" + text if self.opens_think else text

    def encode(self, record, image_path, with_answers):
        """The record as a Sample. Raises Unreadable."""
        pixel_values = grid = None
        image_tokens = 0
        if image_path is not None:
            picture = load_image(image_path, self.max_pixels)
            pixel_values, grid = patches(picture, self.image_processor, self.size)
            image_tokens = int(grid.prod()) // self.image_processor.merge_size**2
        prompt, truncated = self.prompt_ids(record["text"].strip(), image_tokens)
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


def padded(lists, pad, left=False):
    """Lists of token ids as `ids` and `mask` (1 at the tokens), both (B, T) with T at least 3.

    T is 3 at least because a model reads all of a target but its last token, and Qwen3.5's kernels
    for a single token have no backward.
    """
    import torch

    ids = torch.full((len(lists), max(3, *map(len, lists))), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(lists):
        place = slice(-len(tokens), None) if left else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return ids, mask


@dataclass
class Targets:
    """Target tokens, padded on the right: `ids` and `mask` (1 at answer tokens), both (B, T).

    lengths: the answers' numbers of tokens, on the CPU: to read them would wait for a GPU.
    """

    ids: "torch.Tensor"
    mask: "torch.Tensor"
    lengths: list[int] | None = None

    def __post_init__(self):
        if self.lengths is None:
            self.lengths = self.mask.sum(1).tolist()

    def to(self, device):
        tensors = (x.to(device, non_blocking=True) for x in (self.ids, self.mask))
        return Targets(*tensors, self.lengths)

    def threshold(self, gamma):
        """gamma of each plain answer, (B,); "auto" is ln 2 / n of its n tokens: p(y_s) = 1/2."""
        n = self.mask.sum(1).float()
        return math.log(2) / n if gamma == "auto" else n.fill_(gamma)

    def where(self, keep, other):
        """These targets where `keep` (B,) is true, `other`'s elsewhere, as wide as they need."""
        import torch
        from torch.nn.functional import pad

        width = max(self.ids.shape[1], other.ids.shape[1])

        def pick(ours, theirs):
            ours, theirs = (pad(x, (0, width - x.shape[1])) for x in (ours, theirs))
            return torch.where(keep[:, None], ours, theirs)

        # The step's only copy from GPU to CPU: the lengths are the shape of the next pass.
        pairs = zip(keep.tolist(), self.lengths, other.lengths, strict=True)
        lengths = [ours if kept else theirs for kept, ours, theirs in pairs]
        longest = max(3, *lengths)
        ids, mask = pick(self.ids, other.ids), pick(self.mask, other.mask)
        return Targets(ids[:, :longest], mask[:, :longest], lengths)


@dataclass
class Batch:
    """One micro-batch of B posts.

    prompt: the model's inputs: input_ids, attention_mask, mm_token_type_ids (B, P), padded on the
        left, position_ids (3, B, P) where the encoder has them computed, and pixel_values (patches,
        values), image_grid_thw (images, 3), which stays on the CPU, where there are images.
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
        names = self.prompt.keys() - {"image_grid_thw"}  # which would be read back
        prompt = {name: self.prompt[name].to(device, non_blocking=True) for name in names}
        targets = (self.plain, self.cot, self.has_cot)
        plain, cot, has_cot = (x if x is None else x.to(device) for x in targets)
        return replace(self, prompt=self.prompt | prompt, plain=plain, cot=cot, has_cot=has_cot)


def collate(samples, encoder, pixel_values=None):
    """Samples to one Batch: prompts padded on the left, answers on the right.

    `pixel_values` are those of all the samples' images, one after the other, if they were put
    together before. Without any samples the Batch has length 0 and one row that is not a post: on
    several ranks, a rank without a post still runs the model as often as the others.
    """
    import torch

    ids = [sample.id for sample in samples]
    if not samples:
        placeholder = [*encoder.tags["<think>"], encoder.end_of_turn]
        samples = [Sample("", encoder.prompt_ids("", 0)[0], plain=placeholder)]
    prompts = [sample.prompt for sample in samples]
    input_ids, attention_mask = padded(prompts, encoder.pad, left=True)
    prompt = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == encoder.image_token_id).int(),  # 1 at image tokens
    }
    if grids := [sample.grid for sample in samples if sample.grid is not None]:
        prompt["image_grid_thw"] = torch.cat(grids)
    if encoder.rope_index:
        prompt["position_ids"] = encoder.rope_index(**prompt)[0]
    if grids:
        prompt["pixel_values"] = concat_images(samples) if pixel_values is None else pixel_values
    plain = cot = with_cot = None
    if samples[0].plain is not None:
        plain = Targets(*padded([sample.plain for sample in samples], encoder.pad))
        cot = Targets(*padded([sample.cot or sample.plain for sample in samples], encoder.pad))
        with_cot = torch.tensor([sample.cot is not None for sample in samples])
    return Batch(ids, prompt, plain, cot, with_cot, sum(sample.truncated for sample in samples))


def concat_images(samples):
    """The pixel_values (patches, values) of all samples with an image, None where there is none."""
    import torch

    images = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    return torch.cat(images) if images else None


class TrainingOrder:
    """The posts of every step of a run: item i, from 0, has the `batch_size` indices of step i + 1.

    Each epoch has an order of its own, set by (seed, epoch); the last one may be a part of one.
    """

    def __init__(self, count, batch_size, seed, epochs):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch_steps = math.ceil(count / batch_size)
        # Rounded before: 1.1 * 100, which is above 110 in binary, gives 110.
        self.steps = max(1, math.ceil(round(epochs * self.epoch_steps, 6)))

    def __len__(self):
        return self.steps

    def __getitem__(self, i):
        import numpy as np

        epoch, step = divmod(i, self.epoch_steps)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return order[step * self.batch_size :][: self.batch_size].tolist()

    def ends_epoch(self, step):
        """Whether an epoch, or the run, ends after so many steps."""
        return step == self.steps or step > 0 and step % self.epoch_steps == 0


def by_length(samples, parts):
    """Samples in `parts` micro-batches of about equal size, each of samples of similar length.

    Only samples of one step are sorted among themselves: a step's posts stay a random draw, and
    the micro-batches decide nothing but how much is padded.
    """
    if parts > 1:
        samples = sorted(samples, key=lambda x: len(x.prompt) + len(x.cot or x.plain or []))
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
    The images of a post are 10 MB at 512 tokens, so only the worker copies them.
    """
    from torch.utils.data import get_worker_info

    pixel_values = concat_images(samples)
    for sample in samples:
        sample.pixel_values = None
    if pixel_values is not None and get_worker_info() is not None:
        pixel_values.share_memory_()  # an error after this would leave the main process waiting
    return pixel_values


def load_steps(dataset, order, micro_batch, workers=0, ranks=None, start=0):
    """Yield (step, micro-batches) of the steps after the first `start`; workers encode posts.

    dataset: an EncodedPosts; order: the lists of indices of all steps, which count from 1; ranks:
        the Ranks that share each step, if there are any.

    Raises UserError where a record has changed, or the system kills a worker.
    """
    from torch.utils.data import DataLoader

    steps = DataLoader(
        Steps(dataset, order, micro_batch, ranks),
        sampler=range(start, len(order)),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        worker_init_fn=ignore_signals,
    )
    try:
        for step, item in enumerate(steps, start + 1):
            if isinstance(item, UserError):
                raise item
            (micro_batches, skipped), encoder = item, dataset.encoder
            batches = [collate(samples, encoder, images) for samples, images in micro_batches]
            batches[0].skipped = skipped
            yield step, batches
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid|shared memory", str(error)):
            raise
        raise UserError(
            "a process that prepares the posts was killed, perhaps as memory ran out, or found no "
            "room in shared memory (docker --shm-size); try fewer --workers (0: none)"
        ) from None


def prompt_loader(posts, indices, encoder, batch_size, workers):
    """`load_steps` for some posts' prompts, sorted by length within a few batches at a time."""
    size = max(1, 32 // batch_size) * batch_size
    steps = [indices[start : start + size] for start in range(0, len(indices), size)]
    return load_steps(EncodedPosts(posts, encoder, with_answers=False), steps, batch_size, workers)


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
    pixels_help = f"scale larger images down (default: the model's own, else {MAX_PIXELS})"
    add("--max-pixels", type=positive_int, help=pixels_help)
    length_help = f"truncate texts to prompts of N tokens (default: the model's, else {MAX_LENGTH})"
    add("--max-length", type=positive_int, metavar="N", help=length_help)
    add("--max-new-tokens", type=positive_int, default=512, help="tokens of an answer at most")
    add("--workers", type=whole_number(0, 1024), default=2, help="processes that prepare images")
    add("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one")


def resolve_options(args, folder):
    """The EncoderOptions of a script: what `args` give, else what the model's folder has.

    --max-pixels and --max-length are set in `args`, too. Raises UserError.
    """
    own = EncoderOptions(**read_own(folder))
    args.max_pixels = args.max_pixels or own.max_pixels
    args.max_length = args.max_length or own.max_length
    prompt = load_prompt_file(args.prompt_file, "{text}") if args.prompt_file else own.prompt
    return EncoderOptions(prompt, args.max_pixels, args.max_length)
