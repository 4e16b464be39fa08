"""Folders laid out like the published Qwen-VL checkpoints: loaded, trained, saved, and used to predict."""

import json
import re
import shutil
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer

import checkpoint
import data
import infer
import published
from evaluate import UserError
from model import FAMILIES, generate, load
from tiny import train_alone

ROOT = Path(__file__).parent.parent
TEXTS = [
    "hello there",
    "the foxes play, and the post names them <tool_call>",
    "日本 😀 <|im_end|>",
    "a",
]
SIZES = [(112, 84), None, (150, 301), (448, 64)]


@pytest.fixture(scope="module", params=published.KINDS)
def source(request, tmp_path_factory):
    """(folder, the model whose weights it holds, built without the folder's files)"""
    folder = tmp_path_factory.mktemp("published") / request.param
    return folder, published.write(folder, request.param)


@pytest.fixture(scope="module")
def loaded(source):
    model, encoder, _ = load(str(source[0]))
    return model.eval(), encoder


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
    path = pictures[0].parent / "posts.jsonl"
    records = [
        {
            "id": str(number),
            "text": text,
            "image": picture and picture.name,
            "keyphrases": ["the foxes", f"post {number}"],
            "cot": "hello there the post names the foxes",
        }
        for number, (text, picture) in enumerate(zip(TEXTS, pictures))
    ]
    path.write_text("".join(map(data.to_line, records)), encoding="utf-8")
    return path


def batch_of(encoder, pictures, numbers):
    return data.collate(
        [
            encoder.encode({"id": str(n), "text": TEXTS[n]}, pictures[n], with_answers=False)
            for n in numbers
        ],
        encoder,
    )


def logits(model, batch):
    with torch.no_grad():
        return model(**batch.prompt, use_cache=False).logits


def in_transformers(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


def headers(folder):
    """Name -> (shape, dtype) of every weight in a folder's safetensors, read from the files themselves."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found |= {
                name: (weight.get_shape(), weight.get_dtype()) for name, weight in slices.items()
            }
    return found


def test_it_loads_as_what_was_written_here_and_in_transformers(source, loaded, pictures):
    folder, written = source
    model, encoder = loaded
    batch = batch_of(encoder, pictures, range(4))
    assert model.dtype == torch.float32
    expected = logits(written, batch)
    assert expected.std() > 0.1 and torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(in_transformers(folder), batch), expected)


def test_image_preparation_is_transformers_own_with_the_folders_numbers(
    source, loaded, pictures, tmp_path
):
    folder, _ = source
    _, encoder = loaded
    own = transformers.AutoImageProcessor.from_pretrained(folder)
    for picture, size in zip(pictures, SIZES):
        if picture is None:
            continue
        ours = encoder.encode({"id": "a", "text": "x"}, picture, with_answers=False).image
        theirs = own(images=[Image.open(picture)], return_tensors="pt")
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])

    # A picture that needs no scaling, by hand: the first patch is its corner, once for each of two frames.
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    patch = settings["patch_size"]
    pixels = np.random.default_rng(9).integers(0, 256, (patch * 18, patch * 20, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ours = encoder.encode({"id": "a", "text": "x"}, tmp_path / "a.png", with_answers=False)
    assert ours.image["image_grid_thw"].tolist() == [[1, 18, 20]]
    assert ours.prompt.count(encoder.image_token_id) == 18 * 20 // 4
    corner = (pixels[:patch, :patch] / 255 - settings["image_mean"]) / settings["image_std"]
    by_hand = np.repeat(corner.transpose(2, 0, 1)[:, None], 2, axis=1).reshape(-1)
    np.testing.assert_allclose(ours.image["pixel_values"][0], by_hand, atol=1e-5)


def test_max_pixels_bounds_as_transformers_does(source, pictures):
    _, encoder, _ = load(str(source[0]), max_pixels=100 * 100)
    own = transformers.AutoImageProcessor.from_pretrained(source[0])
    ours = encoder.encode({"id": "a", "text": "x"}, pictures[2], with_answers=False).image
    smallest = min(own.size["shortest_edge"], 100 * 100)
    theirs = own(
        images=[Image.open(pictures[2])],
        size={"shortest_edge": smallest, "longest_edge": 100 * 100},
        return_tensors="pt",
    )
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert 25 < len(ours["pixel_values"]) <= 100 * 100 // own.patch_size**2


def test_prompt_ids_are_the_chat_templates_with_placeholders_expanded(source, loaded, pictures):
    folder, _ = source
    _, encoder = loaded
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    from_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, picture in zip(
        ["hello there", "the <tool_call> foxes", " 日本 😀\n\n1984 ", "a"], pictures
    ):
        sample = encoder.encode({"id": "a", "text": text}, picture, with_answers=False)
        content = [{"type": "image"}] if picture else []
        content.append({"type": "text", "text": data.PROMPT.replace("{text}", text.strip())})
        turns = [{"role": "user", "content": content}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert from_file.encode(rendered, add_special_tokens=False).ids == ids
        assert ("You are a helpful assistant." in rendered) == ("Qwen3" not in folder.name)
        if picture:
            place = ids.index(encoder.image_token_id)
            count = int(sample.image["image_grid_thw"].prod()) // 4
            ids = ids[:place] + [encoder.image_token_id] * count + ids[place + 1 :]
        assert sample.prompt == ids


@pytest.mark.parametrize("think", ["auto", "always"])
def test_generation_is_transformers_own_for_each_post_alone(source, loaded, pictures, think):
    """theirs: the published generation settings but for sampling and penalties, which predictions must not have."""
    folder, _ = source
    model, encoder = loaded
    theirs = in_transformers(folder)
    plain = dict(do_sample=False, temperature=None, top_k=None, top_p=None, max_new_tokens=40)
    together = generate(
        model, encoder, batch_of(encoder, pictures, range(4)), think, max_new_tokens=40
    )
    penalised = 0
    for number, (text, count, ended) in enumerate(together):
        alone = generate(
            model, encoder, batch_of(encoder, pictures, [number]), think, max_new_tokens=40
        )
        prompt = batch_of(encoder, pictures, [number]).prompt
        if think == "always":
            added = torch.tensor([encoder.plain_ids("<think>")])
            prompt["input_ids"] = torch.cat([prompt["input_ids"], added], dim=1)
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
            prompt["mm_token_type_ids"] = (prompt["input_ids"] == encoder.image_token_id).int()
        start = prompt["input_ids"].shape[1] - (len(encoder.think) if think == "always" else 0)
        own = theirs.generate(**prompt, **plain, repetition_penalty=1.0)[0, start:]
        penalised += not torch.equal(
            own, theirs.generate(**prompt, **plain, repetition_penalty=1.5)[0, start:]
        )
        stop = own[-1].item() in theirs.generation_config.eos_token_id
        answer = encoder.tokenizer.decode(own[:-1] if stop else own, skip_special_tokens=True)
        assert (text, count, ended) == (answer, len(own), stop) == alone[0]
    assert penalised  # else the answers would not tell a penalty from none


def test_an_answer_ends_at_each_token_that_the_folder_says_it_may_end_with(loaded, pictures):
    """The published models end an answer with <|im_end|>, and a text without turns with <|endoftext|>."""
    model, encoder = loaded
    batch = batch_of(encoder, pictures, [0])
    inherited = model.generation_config.eos_token_id
    assert inherited == encoder.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    row = model.generate(
        **batch.prompt, do_sample=False, max_new_tokens=12, repetition_penalty=1.0
    )[0, batch.prompt["input_ids"].shape[1] :].tolist()
    place = next(place for place in range(1, 12) if row[place] not in row[:place])
    try:
        model.generation_config.eos_token_id = [row[place], inherited[0]]
        ((text, count, ended),) = generate(model, encoder, batch, max_new_tokens=12)
    finally:
        model.generation_config.eos_token_id = inherited
    assert (
        ended
        and count == place + 1
        and text == encoder.tokenizer.decode(row[:place], skip_special_tokens=True)
    )


def test_two_steps_of_training_save_and_load_again(source, pictures, posts, tmp_path, capsys):
    folder, written = source
    side_files = {
        file.name: file.read_bytes() for file in folder.iterdir() if "safetensors" not in file.name
    }
    model, encoder, run = train_alone(
        "--model",
        folder,
        "--train",
        posts,
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
        "--batch-size",
        2,
        "--lr",
        1e-3,
        "--warmup",
        0,
        "--gamma",
        99,
        "--workers",
        0,
    )
    saved = run / "step-2"
    assert [
        json.loads(line)["cot_share"] for line in (run / "log.jsonl").read_text().splitlines()
    ] == [1, 1]
    before = written.state_dict()
    still = [
        name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])
    ]
    assert still == []

    # The names and shapes are the published ones; the values are the float32 that training goes on from.
    source_weights, saved_weights = headers(folder), headers(saved)
    assert {dtype for _, dtype in source_weights.values()} == {"BF16"}
    assert saved_weights == {name: (shape, "F32") for name, (shape, _) in source_weights.items()}
    for name, content in side_files.items():
        assert (saved / name).read_bytes() == content, name
    assert {
        "config.json",
        "chat_template.json",
        "merges.txt",
        "generation_config.json",
    } <= side_files.keys()
    assert not list(
        saved.glob("*.index.json")
    )  # one file: an index left over from the source would name shards

    batch = batch_of(encoder, pictures, range(4))
    trained = logits(model.eval(), batch)
    assert not torch.allclose(trained, logits(written, batch), atol=0.01)
    again, again_encoder, _ = load(str(saved))
    assert torch.equal(logits(again.eval(), batch), trained)
    assert torch.equal(logits(in_transformers(saved), batch), trained)
    assert again_encoder.prompt == encoder.prompt

    out = tmp_path / "preds.jsonl"
    assert (
        infer.infer_file(
            infer.settings(
                [
                    "--data",
                    str(posts),
                    "--out",
                    str(out),
                    "--model",
                    str(run),
                    "--workers",
                    "0",
                    "--max-new-tokens",
                    "5",
                ]
            )
        )
        == 0
    )
    predictions = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    answers = generate(again, again_encoder, batch, max_new_tokens=5)
    assert [prediction["output"] for prediction in predictions] == [text for text, _, _ in answers]


def test_nothing_but_our_own_lines_is_on_the_screen(posts, pictures, tmp_path):
    """A real process that trains and predicts with every kind, since a library warns once a process only."""
    kinds = {kind: tmp_path / kind for kind in published.KINDS}
    for kind, folder in kinds.items():
        published.write(folder, kind)
    script = """import sys, infer
sys.path.append("tests")
from tiny import train_alone
posts, picture, *folders = sys.argv[1:]
for folder in folders:
    train_alone("--model", folder, "--train", posts, "--out", folder + "-run", "--epochs", 1, "--workers", 0)
    for image in picture, "none":
        infer.infer_one(infer.settings([image, "hello", "--model", folder + "-run", "--max-new-tokens", "3", "--json"]))
    infer.infer_file(infer.settings(["--data", posts, "--out", folder + ".jsonl", "--model", folder, "--workers", "0",
                                      "--max-new-tokens", "3"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, posts, pictures[0], *kinds.values()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["hello"] * 2 * len(
        kinds
    )
    shown = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    ours = re.compile(
        r"(training|posts): +\d+%\||the answer was cut off after 3 tokens; |.*\.jsonl: 4 posts, "
    )
    assert shown and not [line for line in shown if not ours.match(line)]


def test_weights_too_large_for_one_file_are_saved_in_shards_with_an_index_of_their_own(
    source, pictures, tmp_path, monkeypatch
):
    """transformers cuts at 50 GB; here at 50 kB, in other places than the source is cut."""
    folder, written = source
    model, encoder, _ = load(str(folder))
    save_in_shards = partialmethod(type(model).save_pretrained, max_shard_size="50KB")
    monkeypatch.setattr(type(model), "save_pretrained", save_in_shards)
    checkpoint.save(
        tmp_path,
        1,
        model,
        folder,
        encoder.prompt,
        torch.optim.AdamW(model.parameters()),
        checkpoint.Processes("cpu"),
    )
    saved, index = tmp_path / "step-1", "model.safetensors.index.json"
    places, before = (
        json.loads((place / index).read_text())["weight_map"] for place in (saved, folder)
    )
    assert places.keys() == before.keys() and len(set(places.values())) > 1 and places != before
    assert {file.name for file in saved.glob("model-*.safetensors")} == set(places.values())
    batch = batch_of(encoder, pictures, [0, 2])
    assert torch.equal(logits(load(str(saved))[0].eval(), batch), logits(written, batch))


def test_a_folder_whose_template_is_in_chat_template_json_only(source, loaded, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(source[0], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["chat_template"]
    published.write_json(folder / "tokenizer_config.json", settings)
    _, encoder, _ = load(str(folder))
    record = {"id": "a", "text": "hello there"}
    assert (
        encoder.encode(record, None, False).prompt == loaded[1].encode(record, None, False).prompt
    )
    (folder / "chat_template.json").unlink()
    with pytest.raises(UserError, match="chat_template.jinja"):
        load(str(folder))


def test_another_family_is_refused_in_one_line_that_names_those_that_work(tmp_path):
    folder = tmp_path / "model"
    published.write(folder, "Qwen3-VL-4B")
    config = json.loads((folder / "config.json").read_text())
    for family in ("qwen3_5", "qwen3_vl_moe", "qwen2_5_omni", "llava_next", None):
        published.write_json(folder / "config.json", config | {"model_type": family})
        with pytest.raises(UserError, match=repr(family)) as error:
            load(str(folder))
        assert all(name in str(error.value) for name in FAMILIES) and "\n" not in str(error.value)
