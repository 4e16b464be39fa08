"""Records, images, prompts and batches."""

import base64
import io
import json
import multiprocessing
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Encoder, EncoderOptions, Posts, TrainingOrder, load_image
from evaluate import UserError
from support import images
from support.jsonl import write_atomic
from tiny import lines, qwen_tokenizer, write

# ------------------------------------------------------------------------------------------ records


def post(**fields):
    return {"id": "a", "text": "hello", "image": None, "keyphrases": ["x"]} | fields


def test_posts_are_read_from_disk_one_by_one(tmp_path):
    records = [post(id=str(i), text="日本 😀 " + "x" * (i % 7), extra=[i]) for i in range(50)]
    records += [post(id="a", image="a.jpg", cot="why"), post(id="b", image="b.jpg", cot=" ")]
    records += [post(id="c", keyphrases=["x", "y"]), {"id": "d", "text": ""}]
    path = write(tmp_path / "posts.jsonl", records)
    (tmp_path / "a.jpg").touch()
    path.write_bytes(
        b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n", 3).rstrip(b"\n")
    )
    posts = Posts(path)
    assert [posts[i] for i in range(len(posts))] == records
    with multiprocessing.get_context("spawn").Pool(1) as worker:
        assert worker.apply(posts.__getitem__, (49,)) == records[49]
    assert (posts.with_image, posts.without_cot, posts.keyphrase_count) == (2, 53, 54)
    for content, told in (("\n\r\n \n", "no posts"), ("{}\r{}\r", "not a line of JSON")):
        path.write_text(content, newline="")
        with pytest.raises(UserError, match=f"posts.jsonl.*{told}"):
            Posts(path)


# ------------------------------------------------------------------------------------------ prompts


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("processor"))


def make_encoder(folder, **options):
    """An Encoder of the published kind; `options` are those of EncoderOptions."""
    from transformers import AutoImageProcessor

    sizes = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 64}
    settings = {"image_processor_type": "Qwen2VLImageProcessor"} | sizes
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    tokenizer, processor = qwen_tokenizer(), AutoImageProcessor.from_pretrained(folder)
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return Encoder(tokenizer, processor, image_token, EncoderOptions(**options))


def picture(path, width=112, height=84):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_targets(encoder):
    sample = encoder.encode(post(keyphrases=["a b", "c"], cot=" why "), None, with_answers=True)
    assert encoder.tokenizer.decode(sample.plain) == "a b; c<|im_end|>"
    expected = "<think>why</think><answer>a b; c</answer><|im_end|>"
    assert encoder.tokenizer.decode(sample.cot) == expected
    assert encoder.encode(post(cot="  "), None, with_answers=True).cot is None


def test_tags_are_the_same_tokens_wherever_they_stand(encoder):
    sample = encoder.encode(post(keyphrases=["The foxes"], cot="The post"), None, with_answers=True)
    assert sample.cot[: len(encoder.tags["<think>"])] == encoder.tags["<think>"]
    joined = encoder.plain_ids("<think>The post")
    assert joined[: len(encoder.tags["<think>"])] != encoder.tags["<think>"]


def test_a_long_text_is_truncated_and_the_rest_kept(tmp_path):
    encoder = make_encoder(tmp_path, max_length=250)
    text = "the foxes play " * 7000
    sample = encoder.encode(post(text=text), picture(tmp_path / "a.png"), with_answers=True)
    short = encoder.encode(post(text="the"), tmp_path / "a.png", with_answers=True)
    assert sample.truncated and not short.truncated
    assert 240 <= len(sample.prompt) <= 250 and sample.plain == short.plain
    assert sample.prompt.count(encoder.image_token_id) == 12
    assert sample.prompt[-5:] == short.prompt[-5:]
    assert "Post: the foxes play the foxes" in encoder.tokenizer.decode(sample.prompt)


SIZES = [(20_000, 100), (100, 20_000), (5000, 3), (1, 1), (10, 11), (700, 30), (640, 480)]


def tokens_of(sample):
    return 0 if sample.grid is None else int(sample.grid.prod()) // 4


@pytest.mark.parametrize("smallest", [56 * 56, 28 * 28 * 64])
@pytest.mark.parametrize("most", [1, 7, 64])
def test_no_picture_takes_more_tokens_than_it_may(tmp_path, most, smallest):
    """Neither a thin one nor one that its processor enlarges; others are the processor's own."""
    encoder = make_encoder(tmp_path, max_pixels=most * 784 + 5, max_length=300)
    encoder.size["shortest_edge"] = min(smallest, encoder.size["longest_edge"])
    for width, height in SIZES:
        path = picture(tmp_path / "a.png", width, height)
        sample = encoder.encode(post(text="foxes " * 400), path, with_answers=False)
        assert 1 <= tokens_of(sample) <= most and len(sample.prompt) <= 300
        assert sample.prompt.count(encoder.image_token_id) == tokens_of(sample)
        image = load_image(path, encoder.max_pixels)
        own = encoder.image_processor([image], size=encoder.size, return_tensors="pt")
        if int(own["image_grid_thw"].prod()) // 4 <= most:
            assert torch.equal(sample.pixel_values, own["pixel_values"])
        else:
            assert 2 * tokens_of(sample) >= most
        url = images.image_url(path, most * 784 + 5)
        sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert max(28, sent.width) * max(28, sent.height) <= most * 784 + 5


def test_a_processor_that_does_not_resize_is_made_to(world, tmp_path):
    from model import load

    shutil.copytree(world / "toy", tmp_path / "toy")
    settings = tmp_path / "toy" / "preprocessor_config.json"
    changed = json.loads(settings.read_text()) | {"do_resize": False}
    settings.write_text(json.dumps(changed))
    encoders = [load(str(folder))[1] for folder in (world / "toy", tmp_path / "toy")]
    for size in ((112, 84), (500, 300), (3000, 40)):
        path = picture(tmp_path / "a.png", *size)
        one, other = (encoder.encode(post(), path, with_answers=False) for encoder in encoders)
        assert torch.equal(one.pixel_values, other.pixel_values) and one.prompt == other.prompt


# ------------------------------------------------------------------------------------------ batches


def test_prompts_are_padded_on_the_left_and_answers_on_the_right(encoder, tmp_path):
    records = [
        (post(id="1", text="hello", cot="why", keyphrases=["a"]), picture(tmp_path / "a.png")),
        (post(id="2", text="hello there the foxes", keyphrases=["a b c", "d"]), None),
    ]
    samples = [encoder.encode(record, image, with_answers=True) for record, image in records]
    batch = data.collate(samples, encoder)
    ids, attended = batch.prompt["input_ids"], batch.prompt["attention_mask"].bool()
    plain, answered = batch.plain.ids, batch.plain.mask.bool()
    for row, sample in enumerate(samples):
        assert ids[row][attended[row]].tolist() == sample.prompt
        assert attended[row][-len(sample.prompt) :].all()
        assert plain[row][answered[row]].tolist() == sample.plain and answered[row][0]
    assert batch.prompt["mm_token_type_ids"].sum(1).tolist() == [12, 0]
    assert batch.has_cot.tolist() == [True, False]
    for row, sample in enumerate(samples):
        tokens = sample.cot or sample.plain
        assert batch.cot.ids[row][batch.cot.mask[row].bool()].tolist() == tokens
    chosen = batch.cot.where(torch.tensor([False, False]), batch.plain)
    assert torch.equal(chosen.ids, batch.plain.ids) and torch.equal(chosen.mask, batch.plain.mask)


def test_every_post_is_met_once_an_epoch():
    order = TrainingOrder(103, 10, seed=3, epochs=1.5)
    steps = [order[i] for i in range(len(order))]
    assert sorted(sum(steps[:11], [])) == list(range(103)) and len(steps) == 17
    assert [len(step) for step in steps[:11]] == [10] * 10 + [3]
    assert [step for step in range(18) if order.ends_epoch(step)] == [11, 17]
    assert steps[:6] != steps[11:] and steps[0] != TrainingOrder(103, 10, seed=4, epochs=1)[0]
    # What numpy 2.4 gives; a run that is resumed goes on in this order.
    expected = np.random.default_rng([3, 1]).permutation(103)[10:20]
    assert steps[12] == expected.tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_every_step_in_as_many_micro_batches_each(world, tmp_path, size):
    """No post is lost or doubled, however uneven a step; a rank without posts has empty batches."""
    encoder, posts = make_encoder(tmp_path), data.Posts(world / "train.jsonl")
    steps = [list(range(start, min(start + 9, 47))) for start in range(0, 47, 9)] + [[47]]
    encoded = data.EncodedPosts(posts, encoder, with_answers=True)
    everyone = [SimpleNamespace(rank=rank, world_size=size) for rank in range(size)]
    shares = [list(data.load_steps(encoded, steps, 2, 0, ranks)) for ranks in everyone]
    for number, step in enumerate(steps):
        of_ranks = [share[number][1] for share in shares]
        assert {len(of_rank) for of_rank in of_ranks} == {-(-len(step) // (2 * size))}
        batches = sum(of_ranks, [])
        assert all(len(batch) <= 2 and batch.plain.ids.shape[1] > 1 for batch in batches)
        ids = sum((batch.ids for batch in batches), [])
        assert sorted(int(i.split("-")[1]) for i in ids) == step


def test_micro_batches_hold_posts_of_about_equal_length():
    draw = random.Random(0)
    samples = []
    for i in range(30):
        prompt, plain = [0] * draw.randrange(10, 60), [0] * draw.randrange(2, 9)
        samples.append(data.Sample(str(i), prompt, plain=plain))

    def total(sample):
        return len(sample.prompt) + len(sample.plain)

    chunks = data.by_length(samples, 8)
    assert [len(chunk) for chunk in chunks] == [3, 4, 4, 4, 3, 4, 4, 4]
    assert sorted(map(total, samples)) == [total(sample) for chunk in chunks for sample in chunk]
    assert data.by_length(samples, 1) == [samples]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("micro_batch", [3, 8, 20])
def test_images_stay_with_their_posts_and_are_not_copied(
    world, tmp_path, monkeypatch, workers, micro_batch
):
    """Each image is what the post alone gives, and what a worker shares is what the model gets.

    Some of the posts have no image, and one an image that can't be read.
    """
    records = lines(world / "train.jsonl")[:12]
    for number, record in enumerate(records):
        record["image"] = None if number % 4 == 1 else f"{world}/{record['image']}"
    records[6]["image"] = "none.png"
    write(tmp_path / "posts.jsonl", records)
    encoder, posts = make_encoder(tmp_path), data.Posts(tmp_path / "posts.jsonl")
    alone = {}
    for record in records[:6] + records[7:]:
        sample = encoder.encode(record, posts.image_path(record), with_answers=True)
        alone[record["id"]] = data.collate([sample], encoder).prompt

    received, collate = [], data.collate

    def collate_received(samples, encoder, pixel_values):
        received.append(pixel_values)
        return collate(samples, encoder, pixel_values)

    monkeypatch.setattr(data, "collate", collate_received)
    encoded = data.EncodedPosts(posts, encoder, with_answers=True)
    ((step, micro_batches),) = data.load_steps(encoded, [list(range(12))], micro_batch, workers)
    assert step == 1 and [post.id for post in micro_batches[0].skipped] == [records[6]["id"]]
    assert sorted(sum((batch.ids for batch in micro_batches), [])) == sorted(alone)
    for batch, pixel_values in zip(micro_batches, received, strict=True):
        for name in ("pixel_values", "image_grid_thw"):
            expected = torch.cat([alone[i][name] for i in batch.ids if name in alone[i]])
            assert torch.equal(batch.prompt[name], expected)
        assert batch.prompt["pixel_values"] is pixel_values
        assert pixel_values.is_shared() == (workers > 0)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "one")

    def full(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        write_atomic(path, "two")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]
