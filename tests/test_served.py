"""Served inference: prompt, predictions and the rules for what fails are those without a server."""

import base64
import io
import re
import signal
import time
from functools import partial

import pytest
import torch
from PIL import Image

import data
import infer
import model as model_file
from evaluate import UserError, digest, read_predictions
from server import HANG, Server, completion, error, text_of, write_posts
from support import images
from test_gen_cot import ids, lines, no_keys, number, python  # noqa: F401
from test_gen_cot_runs import wait_for
from tiny import generate, write


def served(posts, server, *options, out="preds.jsonl", model="toy"):
    """infer.py --data … --base-url … in this process: its exit code."""
    arguments = ["--data", posts, "--out", posts.parent / out, "--model", model]
    arguments += ["--base-url", server.url, *options]
    return infer.infer_file(infer.parse_args(list(map(str, arguments))))


@pytest.fixture(scope="module")
def toy(world):
    """(toy model, encoder), a reply that lets it answer a request by transformers' own template."""
    vlm, encoder, _ = model_file.load(str(world / "toy"))
    prompts = []

    def reply(request, tries):
        content = request["messages"][0]["content"]
        parts = [] if isinstance(content, str) else content
        pictures = [
            Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
            for part in parts
            if part["type"] == "image_url"
        ]
        parts = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
        turns = [{"role": "user", "content": parts or content}]
        text = encoder.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        pixel_values = grid = None
        count = 0
        if pictures:
            image = encoder.image_processor(images=pictures, return_tensors="pt")
            pixel_values, grid = image["pixel_values"], image["image_grid_thw"]
            count = int(grid.prod()) // encoder.image_processor.merge_size**2
        placeholder = encoder.tokenizer.decode([encoder.image_token_id])
        prompt = encoder.tokenizer(
            text.replace(placeholder, placeholder * count), add_special_tokens=False
        ).input_ids
        prompts.append(prompt)
        batch = data.collate([data.Sample("post", prompt, pixel_values, grid)], encoder)
        ((output, tokens, ended),) = generate(
            vlm, encoder, batch, max_new_tokens=request["max_tokens"]
        )
        answer = completion(request, output, "stop" if ended else "length")
        answer["usage"] = {"completion_tokens": tokens}
        return answer

    return vlm, encoder, reply, prompts


def test_served_predictions_are_those_of_the_model_here(world, toy, tmp_path):
    """For text alone to the last token; for images, which JPEG changes, the prompt's token ids."""
    _, encoder, reply, prompts = toy
    records = lines(world / "test.jsonl")
    for record in records:
        record["image"] = record["image"] and str(world / record["image"])
    plain = [record | {"image": None} for record in records]
    for name, posts in (("text", plain), ("images", records)):
        file = write(tmp_path / f"{name}.jsonl", posts)
        prompts.clear()
        with Server(reply) as server:
            options = {"out": f"{name}.served.jsonl", "model": world / "toy"}
            assert served(file, server, "--batch-size", 1, "--max-new-tokens", 8, **options) == 0
        assert [request["temperature"] for request, _, _ in server.log] == [0] * len(posts)
        dataset = data.EncodedPosts(data.Posts(file), encoder, with_answers=False)
        assert prompts == [dataset[index].prompt for index in range(len(posts))]
    arguments = ["--data", tmp_path / "text.jsonl", "--out", tmp_path / "here.jsonl"]
    arguments += ["--model", world / "toy", "--max-new-tokens", 8, "--workers", 0]
    assert infer.infer_file(infer.parse_args(list(map(str, arguments)))) == 0
    assert lines(tmp_path / "text.served.jsonl") == lines(tmp_path / "here.jsonl")
    assert len(read_predictions(tmp_path / "images.served.jsonl")) == len(records)


@pytest.mark.parametrize(
    "size", [(1500, 1150), (900, 640), (640, 480), (3000, 200), (57, 4000), (20, 5000)]
)
def test_a_scaled_image_has_the_tokens_that_it_has_here(tmp_path, size):
    """A server without our --max-pixels makes as many tokens of an image as the encoder here."""
    from transformers import Qwen2VLImageProcessor

    Image.new("RGB", size, "navy").save(tmp_path / "a.png")
    processor = Qwen2VLImageProcessor()
    url = images.image_url(tmp_path / "a.png", 300 * 28 * 28)
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    there = processor(images=[sent], return_tensors="pt")["image_grid_thw"]
    image = images.load_image(tmp_path / "a.png", 300 * 28 * 28)
    limits = {"shortest_edge": 56 * 56, "longest_edge": 300 * 28 * 28}
    here = processor(images=[image], return_tensors="pt", size=limits)["image_grid_thw"]
    assert torch.equal(there, here)


def reply_with(text, finish="stop", **message):
    return lambda request, tries: completion(request, text, finish, **message)


def test_outputs_of_every_kind(tmp_path):
    posts = write_posts(tmp_path, 7)
    tagged = "<think>It is blue.</think><answer>flower; blue</answer>"

    replies = [
        {"text": "flower; blue"},
        {"text": tagged},
        {"text": "<think>It is bl", "finish": "length"},
        {"text": "<answer>flower; blue</answer>", "reasoning_content": "It is blue."},
        {"text": ""},
        {"text": None, "reasoning_content": "flower; blue"},  # a parser that takes all of it
        {"text": "a", "finish": "SAFETY"},
    ]

    def reply(request, tries):
        answer = completion(request, **replies[number(request)])
        return answer if number(request) != 4 else answer | {"usage": None}

    with Server(reply) as server:
        assert served(posts, server) == 1
    blank, cut = {"tokens": 20, "keyphrases": ["flower", "blue"]}, {"keyphrases": [], "cut": True}
    predictions = lines(tmp_path / "preds.jsonl")
    digests = [prediction.pop("post") for prediction in predictions]
    assert digests == [digest(post["text"]) for post in lines(posts)]
    *answers, parsed, unsafe = predictions
    assert parsed["error"].startswith("reasoning only: serve without a reasoning parser")
    assert unsafe["error"] == "not finished: the server says SAFETY" and not unsafe["keyphrases"]
    assert answers == [
        blank | {"id": "post-0", "think": None, "output": "flower; blue"},
        blank | {"id": "post-1", "think": "It is blue.", "output": tagged},
        blank | cut | {"id": "post-2", "think": "It is bl", "output": "<think>It is bl"},
        blank | {"id": "post-3", "think": "It is blue.", "output": tagged},
        {"id": "post-4", "keyphrases": [], "think": None, "output": "", "tokens": None},
    ]
    assert len(read_predictions(tmp_path / "preds.jsonl")) == 7


def test_the_prompt_is_the_option_then_the_folders_then_the_default(tmp_path):
    posts = write_posts(tmp_path, 1)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "prompt.txt").write_text("folder {text}", encoding="utf-8")
    (tmp_path / "own.txt").write_text("own {text} {keyphrases}", encoding="utf-8")
    text = lines(posts)[0]["text"]
    model, own = tmp_path / "model", ["--prompt-file", tmp_path / "own.txt"]
    with Server(reply_with("a")) as server:
        served(posts, server, out="1", model="some/name")
        served(posts, server, out="2", model=model)
        served(posts, server, *own, out="3", model=model)
    assert [text_of(request) for request, _, _ in server.log] == [
        data.PROMPT.replace("{text}", text),
        f"folder {text}",
        f"own {text} {{keyphrases}}",
    ]
    models = [request["model"] for request, _, _ in server.log]
    assert models == ["some/name", str(model), str(model)]


def test_what_fails_is_recorded_and_tried_again(tmp_path, monkeypatch):
    posts = write_posts(tmp_path, 40)
    picture = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").unlink()
    bad = {"post-2": error(400, "image too odd"), "post-6": error(500, "oh no")}

    def reply(request, tries):
        return bad.get(re.search(r"post-\d+", text_of(request))[0], "flower")

    with Server(reply) as server:
        assert served(posts, server, "--max-retries", 0) == 1
    first = lines(tmp_path / "preds.jsonl")
    failed = {row["id"]: row["error"] for row in first if "error" in row}
    assert ids(first) == ids(lines(posts)) and failed.pop("post-1") == "image 1.jpg: no such file"
    assert failed["post-2"] == "refused: 400 image too odd"
    assert failed["post-6"] == "server error: 500 oh no (1 try)"
    assert all(row["keyphrases"] == [] and row["tokens"] == 0 for row in first if "error" in row)
    (tmp_path / "1.jpg").write_bytes(picture)
    bad.clear()
    with Server(reply) as server:
        assert served(posts, server) == 0
    assert sorted(server.asked()) == sorted(row["id"] for row in first if "error" in row)
    assert not any("error" in row for row in lines(tmp_path / "preds.jsonl"))
    with Server(reply) as server:
        with pytest.raises(UserError, match="was made with something else.*model"):
            served(posts, server, model="other")
        with pytest.raises(UserError, match="was made with something else.*max_new_tokens"):
            served(posts, server, "--max-new-tokens", 9)
        elsewhere = ["--base-url", "http://127.0.0.1:1/v1", "--batch-size", 3]
        assert served(posts, server, *elsewhere) == 0 and not server.log


@pytest.mark.parametrize("think", ["always", "never"])
def test_thinking_cant_be_forced_on_a_server(think, capsys):
    with pytest.raises(SystemExit):
        infer.parse_args(["none", "text", "--base-url", "http://127.0.0.1:1", "--think", think])
    assert f"--think {think} needs the model here" in capsys.readouterr().err


infer_process = partial(python, script="infer.py", HF_TOKEN="hf_own")


def test_one_post_as_a_process(tmp_path):
    write_posts(tmp_path, 1)
    with Server(reply_with("<think>It is blue.</think><answer>flower; blue</answer>")) as server:
        address = ["--base-url", server.url, "--model", "m"]
        process = infer_process("1.jpg", "hello {text}", *address, cwd=tmp_path)
        shown, told = process.communicate(timeout=60)
    assert (process.returncode, shown, told) == (0, "flower; blue\n\nReasoning: It is blue.\n", "")
    request, headers, _ = server.log[0]
    assert text_of(request) == data.PROMPT.replace("{text}", "hello {text}")
    assert headers["authorization"] == "Bearer none" and "hf_own" not in str([request, headers])


def test_stopped_and_continued(tmp_path):
    posts = write_posts(tmp_path, 30)

    def flower(request, tries):
        return f"flower {number(request)}"

    with Server(lambda r, tries: HANG if number(r) > 9 else flower(r, tries)) as server:
        address = ["--base-url", server.url, "--model", "m"]
        process = infer_process("--data", posts, "--out", "preds.jsonl", *address, cwd=tmp_path)
        wait_for(lambda: len(server.log) == 18 and len(lines(tmp_path / "preds.jsonl")) == 10)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in told
    assert "stopped: preds.jsonl has 10 of 30 posts; the same command goes on from there" in told
    with open(tmp_path / "preds.jsonl", "a") as file:
        file.write('{"id": "torn')
    with Server(flower) as server:
        assert served(posts, server, model="m") == 0
    assert sorted(server.asked()) == sorted(ids(lines(posts))[10:])
    found = [row["keyphrases"] for row in lines(tmp_path / "preds.jsonl")]
    assert found == [[f"flower {index}"] for index in range(30)]
