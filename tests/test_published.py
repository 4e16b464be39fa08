"""Folders like the published Qwen-VL checkpoints: loaded, trained, saved, used to predict."""

import copy
import itertools
import json
import shutil
from collections import Counter
from functools import partialmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import data
import infer
import published
from evaluate import UserError
from model import load
from support import checkpoint
from support.distributed import Ranks
from tiny import generate, lines, train_alone, words, write

FOXES = "the foxes play, and the post names them <tool_call>"
TEXTS = ["hello there", FOXES, "日本 😀 <|im_end|>", "a"]
SIZES = [(112, 84), None, (150, 301), (448, 64)]
# One of each way to write a folder; the other kinds differ in numbers.
LAYOUTS = ["Qwen2.5-VL-7B", "Qwen3-VL-4B", "Qwen3.5-4B"]
each_layout = pytest.mark.parametrize("source", LAYOUTS, indirect=True)


class Source(NamedTuple):
    folder: Path
    written: torch.nn.Module  # whose weights the folder holds, built without the folder's files
    model: torch.nn.Module  # as loaded, like its encoder
    encoder: data.Encoder


@pytest.fixture(scope="module", params=published.KINDS)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / request.param
    written = published.write(folder, request.param)
    model, encoder, _ = load(str(folder))
    return Source(folder, written, model.eval(), encoder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for number, size in enumerate(SIZES):
        paths.append(folder / f"{number}.png" if size else None)
        if size:
            pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def posts(pictures):
    same = {"keyphrases": ["the foxes", "post"], "cot": "hello there the post names the foxes"}
    records = [
        {"id": str(number), "text": text, "image": picture and picture.name} | same
        for number, (text, picture) in enumerate(zip(TEXTS, pictures, strict=True))
    ]
    return write(pictures[0].parent / "posts.jsonl", records)


def batch_of(encoder, pictures, numbers):
    samples = [encode(encoder, pictures[number], TEXTS[number], str(number)) for number in numbers]
    return data.collate(samples, encoder)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch.prompt, use_cache=False).logits


def in_transformers(folder):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def headers(folder):
    """Name -> (shape, dtype) of every weight in a folder's files."""
    files = map(load_file, folder.glob("model*.safetensors"))
    return {name: (weight.shape, weight.dtype) for file in files for name, weight in file.items()}


def encode(encoder, picture=None, text="x", name="a"):
    return encoder.encode({"id": name, "text": text}, picture, with_answers=False)


def test_it_loads_as_what_was_written_here_and_in_transformers(source, pictures):
    folder, written, model, encoder = source
    batch = batch_of(encoder, pictures, range(4))
    assert model.dtype == torch.float32
    expected = logits(written, batch)
    assert expected.std() > 0.1 and torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(in_transformers(folder), batch), expected)


def test_image_preparation_is_transformers_own_with_the_folders_numbers(source, pictures, tmp_path):
    folder, encoder = source.folder, source.encoder
    own = transformers.AutoImageProcessor.from_pretrained(folder)
    for picture in filter(None, pictures):
        ours = encode(encoder, picture)
        theirs = own(images=[Image.open(picture)], return_tensors="pt")
        assert torch.equal(ours.pixel_values, theirs["pixel_values"])
        assert torch.equal(ours.grid, theirs["image_grid_thw"])

    # A picture that needs no scaling, by hand: the first patch is its corner, in both frames.
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    patch = settings["patch_size"]
    pixels = np.random.default_rng(9).integers(0, 256, (patch * 18, patch * 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ours = encode(encoder, tmp_path / "a.png")
    assert ours.grid.tolist() == [[1, 18, 20]]
    assert ours.prompt.count(encoder.image_token_id) == 18 * 20 // 4
    corner = (pixels[:patch, :patch] / 255 - settings["image_mean"]) / settings["image_std"]
    by_hand = np.repeat(corner.transpose(2, 0, 1)[:, None], 2, axis=1).reshape(-1)
    np.testing.assert_allclose(ours.pixel_values[0], by_hand, atol=1e-5)

    # --max-pixels bounds as transformers does.
    _, encoder, _ = load(str(folder), options=data.EncoderOptions(max_pixels=100 * 100))
    ours = encode(encoder, pictures[2]).pixel_values
    smallest = min(own.size["shortest_edge"], 100 * 100)
    size = {"shortest_edge": smallest, "longest_edge": 100 * 100}
    theirs = own(images=[Image.open(pictures[2])], size=size, return_tensors="pt")
    assert torch.equal(ours, theirs["pixel_values"])
    assert 25 < len(ours) <= 100 * 100 // patch**2


def test_prompt_ids_are_the_chat_templates_with_placeholders_expanded(source, pictures):
    folder, encoder = source.folder, source.encoder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    from_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [" the  foxes\n\nplay", "日本 😀 <tool> हिन्दी ", "", "3d 1984 #tag @you é"]
    for text, picture in itertools.product(texts, pictures[:2]):
        if not text and "Qwen3.5" in folder.name:
            continue  # its template trims "Post: " then, which an Encoder does not
        sample = encode(encoder, picture, text)
        content = [{"type": "image"}] if picture else []
        content.append({"type": "text", "text": data.PROMPT.replace("{text}", text.strip())})
        turns = [{"role": "user", "content": content}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert from_file.encode(rendered, add_special_tokens=False).ids == ids
        assert ("You are a helpful assistant." in rendered) == ("Qwen3" not in folder.name)
        if picture:
            place = ids.index(encoder.image_token_id)
            count = int(sample.grid.prod()) // 4
            ids = ids[:place] + [encoder.image_token_id] * count + ids[place + 1 :]
        assert sample.prompt == ids


def test_posts_and_answers_never_become_an_added_token(source):
    """Their ids are those of a tokenizer that has no added tokens at all."""
    folder, encoder = source.folder, source.encoder
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    bare = Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
    added = transformers.AutoTokenizer.from_pretrained(folder).added_tokens_decoder
    assert len(added) >= len(published.SPECIALS + published.TOOLS[published.KINDS[folder.name][0]])
    frame = Counter(encoder.prompt_ids("", 0)[0])
    for token in added.values():
        name = token.content
        for text in (f"foxes{name}play", f" {name} ", f"日{name}{name}"):
            ids, _ = encoder.prompt_ids(text, 0)
            _, before, after, tail = encoder.frames[False]
            expected = bare.encode(before + text + after, add_special_tokens=False).ids
            assert ids[: len(ids) - len(tail)][-len(expected) :] == expected, text
            assert all(Counter(ids)[number] == frame[number] for number in added), text
            if name not in data.TAGS:
                answer = encoder.answer_ids(text)[:-1]
                expected = bare.encode(text, add_special_tokens=False).ids
                assert answer == encoder.answer_ids("")[:-1] + expected, text
        short = copy.copy(encoder)
        short.max_length = frame.total() + 4
        ids, cut = short.prompt_ids(name * 9, 0)
        assert cut and all(Counter(ids)[number] == frame[number] for number in added), name


def test_generation_is_transformers_own_for_each_post_alone(source, pictures):
    """theirs: the published settings, but without sampling and penalties, as predictions are."""
    folder, _, model, encoder = source
    theirs, tokenizer = in_transformers(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    # The second without a generation_config.json.
    assert model.generation_config.eos_token_id in (ends, ends[1])
    plain = dict(do_sample=False, temperature=None, top_k=None, top_p=None, max_new_tokens=20)
    together = generate(model, encoder, batch_of(encoder, pictures, range(4)), max_new_tokens=20)
    penalised = 0
    for number, answer in enumerate(together):
        prompt = batch_of(encoder, pictures, [number]).prompt
        own, with_penalty = (
            theirs.generate(**prompt, **plain, eos_token_id=ends, repetition_penalty=penalty)[0]
            for penalty in (1.0, 1.5)
        )
        penalised += not torch.equal(own, with_penalty)
        own = own[prompt["input_ids"].shape[1] :]
        stop = own[-1].item() in ends
        text = tokenizer.decode(own[:-1] if stop else own, skip_special_tokens=True)
        opened = "<think>" * ("Qwen3.5" in folder.name)  # by the template
        assert answer == (opened + text, len(own), stop)
    assert penalised  # else the answers would not tell a penalty from none


@each_layout
def test_two_steps_of_training_save_and_load_again(source, pictures, posts, tmp_path, capsys):
    folder, written = source.folder, source.written
    side_files = [file for file in folder.iterdir() if "safetensors" not in file.name]
    options = "--epochs 1 --batch-size 2 --lr 1e-3 --warmup 0 --gamma 99 --workers 0"
    files = ["--model", folder, "--train", posts, "--out", tmp_path / "run"]
    model, encoder, run = train_alone(*files, options)
    saved = run / "step-2"
    log = lines(run / "log.jsonl")
    assert [line["cot_share"] for line in log] == [1, 1]
    before = written.state_dict()
    for name, weight in model.state_dict().items():
        assert not torch.equal(weight, before[name]), name

    # The names are the published ones; the values are float32, to continue training.
    source_weights, saved_weights = headers(folder), headers(saved)
    assert {dtype for _, dtype in source_weights.values()} >= {torch.bfloat16}
    source_weights.pop("mtp.fc.weight", None)  # Qwen3.5's; it is not trained and not saved
    assert saved_weights == {
        key: (shape, torch.float32) for key, (shape, _) in source_weights.items()
    }
    for file in side_files:
        assert (saved / file.name).read_bytes() == file.read_bytes(), file.name
    template = "chat_template.jinja" if "Qwen3.5" in folder.name else "chat_template.json"
    sampling = ["generation_config.json"] if folder.name in published.SAMPLING else []
    expected = {"config.json", template, "merges.txt", *sampling}
    assert expected <= {file.name for file in side_files}
    # There is one file: an index left over from the source would name shards.
    assert not list(saved.glob("*.index.json"))

    batch = batch_of(encoder, pictures, range(4))
    trained = logits(model.eval(), batch)
    assert not torch.allclose(trained, logits(written, batch), atol=0.01)
    again, again_encoder, _ = load(str(saved))
    assert torch.equal(logits(again.eval(), batch), trained)
    assert torch.equal(logits(in_transformers(saved), batch), trained)
    assert again_encoder.prompt == encoder.prompt

    out = tmp_path / "preds.jsonl"
    arguments = words("--data", posts, "--out", out, "--model", run)
    arguments += words("--workers 0 --max-new-tokens 5")
    assert infer.infer_file(infer.parse_args(arguments)) == 0
    answers = generate(again, again_encoder, batch, max_new_tokens=5)
    assert [prediction["output"] for prediction in lines(out)] == [text for text, _, _ in answers]


@pytest.mark.parametrize("kind", ["Qwen3.5-4B", "Qwen3.5-35B-A3B"])
def test_an_adapter_of_qwen3_5_learns(kind, posts, tmp_path):
    pytest.importorskip("peft", reason="adapters need the optional package peft")
    published.write(tmp_path / "model", kind)
    files = ["--model", tmp_path / "model", "--train", posts, "--out", tmp_path / "run"]
    options = "--lora 4 --epochs 3 --batch-size 2 --lr 1e-2 --gamma 5 --workers 0"
    model, encoder, run = train_alone(*files, options)
    batch = batch_of(encoder, [None] * 4, [0, 1])
    assert torch.equal(logits(load(str(run))[0].eval(), batch), logits(model.eval(), batch))
    losses = [line["loss"] for line in lines(run / "log.jsonl")]
    assert losses[-1] < 0.97 * losses[0]


@each_layout
def test_weights_too_large_for_one_file_are_saved_in_shards_with_an_index_of_their_own(
    source, pictures, tmp_path, monkeypatch
):
    """transformers cuts at 50 GB; here at 50 kB, in other places than the source is cut."""
    folder, written = source.folder, source.written
    model, encoder, _ = load(str(folder))
    save_in_shards = partialmethod(type(model).save_pretrained, max_shard_size="50KB")
    monkeypatch.setattr(type(model), "save_pretrained", save_in_shards)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.Checkpoints(tmp_path, model, optimizer, encoder, folder, Ranks("cpu")).save(1)
    saved, index = tmp_path / "step-1", "model.safetensors.index.json"
    indexes = [json.loads((place / index).read_text()) for place in (saved, folder)]
    places, before = (content["weight_map"] for content in indexes)
    before.pop("mtp.fc.weight", None)
    assert places.keys() == before.keys() and len(set(places.values())) > 1 and places != before
    assert {file.name for file in saved.glob("model-*.safetensors")} == set(places.values())
    batch = batch_of(encoder, pictures, [0, 2])
    assert torch.equal(logits(load(str(saved))[0].eval(), batch), logits(written, batch))


@each_layout
def test_a_folder_whose_template_is_in_a_file_of_its_own_only(source, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(source.folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["chat_template"]
    published.write_json(folder / "tokenizer_config.json", settings)
    _, encoder, _ = load(str(folder))
    assert encode(encoder).prompt == encode(source.encoder).prompt


@pytest.mark.parametrize("kind", ["Qwen2.5-VL-3B", "Qwen3-VL-4B"])
def test_a_head_of_its_own_is_refused_where_the_config_says_tied(kind, posts, tmp_path, capfd):
    """transformers would train two matrices, and let others read one of them."""
    folder = tmp_path / "model"
    written = published.write(folder, kind, shards=1)
    (folder / "model.safetensors.index.json").unlink()
    file = next(folder.glob("*.safetensors")).rename(folder / "model.safetensors")
    family = published.KINDS[kind][0]
    weights = load_file(file)
    embedding = published.published_name("model.language_model.embed_tokens.weight", family)
    for head, fine in ((weights[embedding], True), (weights[embedding] + 1, False)):
        weights["lm_head.weight"] = head.clone()
        save_file(weights, file, metadata={"format": "pt"})
        if fine:
            model, _, _ = load(str(folder))
            assert torch.equal(model.lm_head.weight, written.lm_head.weight)
    with pytest.raises(UserError, match="config.json: tie_word_embeddings is true.*set it to"):
        load(str(folder))
    assert not capfd.readouterr().err

    # The fix: both are trained and saved, for us and for others.
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    published.write_json(folder / "config.json", config)
    options = "--epochs 1 --batch-size 4 --lr 1e-3 --workers 0"
    files = ["--model", folder, "--train", posts, "--out", tmp_path / "run"]
    model, encoder, run = train_alone(*files, options)
    batch = batch_of(encoder, [None] * 4, [0, 1])
    assert torch.equal(logits(in_transformers(run / "step-1"), batch), logits(model.eval(), batch))
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_vl_moe", "llava_next", None])
def test_another_family_is_refused(family, tmp_path):
    published.write(tmp_path / "model", "Qwen3-VL-4B")
    file = tmp_path / "model" / "config.json"
    published.write_json(file, json.loads(file.read_text()) | {"model_type": family})
    with pytest.raises(UserError, match="config.json: no model of qwen2_vl, "):
        load(str(file.parent))
