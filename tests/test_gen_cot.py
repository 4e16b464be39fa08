"""The teacher: what is sent, what is accepted, and the files of a run."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

import data
import gen_cot
from evaluate import UserError
from server import REASONING, THOUGHTS, Server, completion, error, right, text_of, write_posts
from support import client, images
from tiny import ROOT, write


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def gen(posts, server, *options, out="cot.jsonl", wait=0.01):
    """gen_cot.py in this process: its exit code."""
    arguments = [posts, "--out", posts.parent / out, "--model", "teacher", "--base-url", server.url]
    args = gen_cot.parse_args(list(map(str, [*arguments, *options])))
    return gen_cot.write_reasoning(args, first_wait=wait)


def lines(path):
    """The records of a JSONL file, none of one that is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def ids(records):
    return [record["id"] for record in records]


def number(request):
    """Which post a request is about."""
    return int(re.search(r"post-(\d+)", text_of(request))[1])


def test_a_record_and_a_request(tmp_path, capsys):
    posts = write_posts(tmp_path, 3, size=(1500, 1000))
    with Server() as server:
        assert gen(posts, server, "--max-pixels", 100 * 28 * 28, "--temperature", 0.5) == 0
    assert "300 tokens sent, 60 received" in capsys.readouterr().err
    before, after = lines(posts), lines(tmp_path / "cot.jsonl")
    assert after == [record | {"cot": REASONING, "teacher": "teacher"} for record in before]
    for record in after:
        data.check_record(record, "here", for_training=True)
    assert not (tmp_path / "cot.failed.jsonl").exists()
    by_post = {number(request): request for request, _, _ in server.log}
    settings = {"model": "teacher", "stream": False, "max_tokens": 1024, "temperature": 0.5}
    assert {key: value for key, value in by_post[1].items() if key != "messages"} == settings
    image, text = by_post[1]["messages"][0]["content"]
    prompt = gen_cot.PROMPT.replace("{text}", before[1]["text"])
    assert text["text"] == prompt.replace("{keyphrases}", "wildflower hour 1; flowers")
    kind, _, content = image["image_url"]["url"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:image/jpeg;base64" and picture.format == "JPEG"
    assert picture.size == (12 * 28, 8 * 28)  # 96 tokens; 12.25 x 8.16 would be 100
    text = by_post[0]["messages"][0]["content"]  # of a text-only post: a plain string
    prompt = gen_cot.PROMPT.replace("{text}", before[0]["text"])
    assert text == prompt.replace("{keyphrases}", "wildflower hour 0; flowers")


def test_images_are_upright_small_ones_keep_their_size_and_metadata_is_not_sent(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "secret camera"
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg", exif=exif, comment="secret place")
    url = images.image_url(tmp_path / "a.jpg", 512 * 28 * 28)
    sent = base64.b64decode(url.partition(",")[2])
    assert Image.open(io.BytesIO(sent)).size == (20, 40) and b"secret" not in sent
    with pytest.raises(images.Unreadable, match="no such file"):
        images.image_url(tmp_path / "b.jpg", 512 * 28 * 28)


def test_what_posts_hold_is_data(tmp_path):
    """Braces, tags and halves of characters in a post reach the server unchanged, or not at all."""
    record = {"id": "a", "text": "{keyphrases} {text} <think> \ud83d \u2028", "image": None}
    record["keyphrases"] = ["x {text}"]
    (tmp_path / "posts.jsonl").write_text(json.dumps(record))
    with Server() as server:
        assert gen(tmp_path / "posts.jsonl", server) == 0
    text = text_of(server.log[0][0])
    assert "Post: {keyphrases} {text} <think> ?" in text and text.endswith("Keyphrases: x {text}\n")
    assert lines(tmp_path / "cot.jsonl")[0]["cot"] == REASONING


def test_another_prompt(tmp_path):
    posts = write_posts(tmp_path, 1)
    (tmp_path / "prompt.txt").write_text(
        "Why {keyphrases}? {text}\nKeyphrases: {keyphrases}", encoding="utf-8"
    )
    (tmp_path / "wrong.txt").write_text("Why? {text}")
    with Server() as server:
        assert gen(posts, server, "--prompt-file", tmp_path / "prompt.txt") == 0
        with pytest.raises(UserError, match="wrong.txt: the prompt has no {keyphrases}"):
            gen(posts, server, "--prompt-file", tmp_path / "wrong.txt", out="b.jsonl")
        with pytest.raises(UserError, match="nowhere.txt: can't be read"):
            gen(posts, server, "--prompt-file", tmp_path / "nowhere.txt", out="b.jsonl")
    assert text_of(server.log[0][0]).startswith("Why wildflower hour 0; flowers? post-0 some")


def test_a_dry_run_prints_what_is_sent_and_sends_nothing(tmp_path, capsys):
    posts = write_posts(tmp_path, 4)
    with Server() as server:
        assert not gen(posts, server, "--dry-run", "--limit", 3)
        shown = capsys.readouterr().out
        pictures = {f"{index}.jpg" for index in range(4)}
        assert {path.name for path in tmp_path.iterdir()} == {"posts.jsonl", *pictures}
        assert not server.log
        gen(posts, server, "--workers", 1)
    first, *request, count = shown.splitlines()
    sent, headers, _ = server.log[0]
    assert first == f"POST http://{headers['Host']}{headers[':path']}"
    assert json.loads("\n".join(request)) == sent
    assert count.startswith("3 requests to come (0 posts done, 0 failed before)")
    write(tmp_path / "cot.jsonl", lines(tmp_path / "cot.jsonl")[:1])
    for index in range(4):
        (tmp_path / f"{index}.jpg").write_bytes(b"no image")
    with Server() as server:
        gen(posts, server, "--dry-run")
    assert capsys.readouterr().out.startswith("3 requests to come (1 post done, 0 failed before)")


def python(*arguments, cwd, script="gen_cot.py", **environment):
    """Start a script as a process, which minds Ctrl-C even where this one ignores it."""
    secrets = ("OPENAI_API_KEY", "HF_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in secrets}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=kept | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def written(cot, answer="wildflower hour; flowers"):
    return f"<think>{cot}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    "text, reason",
    [
        (written(REASONING), None),
        ("Sure!\n```\n" + written(f" {REASONING}\n", "- Flower\n- Wildflower Hours"), None),
        (written(REASONING, "wildflower hour"), "other keyphrases: wildflower hour"),
        (written(REASONING, "flowers; grass"), "other keyphrases: flowers; grass"),
        (written(REASONING, ""), "other keyphrases: "),
        ("wildflower hour; flowers", "tag missing: <think>"),
        (f"{REASONING}</think><answer>wildflower hour; flowers</answer>", "tag missing: <think>"),
        (f"<think>{REASONING}</think>wildflower hour; flowers", "tag missing: <answer>"),
        (f"<think>{REASONING}<answer>wildflower hour; flowers</answer>", "tag missing: </think>"),
        (written(REASONING + " <think>"), "tag misplaced: <think><think></think><answer></answer>"),
        ("<answer>a</answer><think>b</think>", "tag misplaced: <answer></answer><think></think>"),
        (written("It is a flower."), "too short: 4 words"),
        (written(""), "tag misplaced: no reasoning, or a tag in it"),
        (written(REASONING + " <|im_end|>"), "tag misplaced: no reasoning, or a tag in it"),
        # A thinking teacher: its own thoughts come first, in tags or not.
        (f"{THOUGHTS} </think>\n\n{written(REASONING)}", None),
        (f"<think>{THOUGHTS}</think>\n\n{written(REASONING)}", None),
        (f"<think>So {written('why', 'x')}, then.</think>{written(REASONING)}", None),
        (f"{written(REASONING)} </think> <answer>", None),
        (f"<think>{THOUGHTS}</think> wildflower hour", "tag missing: <answer>"),
        (
            f"<think>{THOUGHTS}</think><think>{REASONING}<answer>flowers</answer>",
            "tag misplaced: <think></think><think><answer></answer>",
        ),
        (written("花" * 9), "too short: 9 words"),
        (written("花" * 10), None),
        (written("word " * 250), None),
        (written("word " * 251), "too long: 251 words"),
        (written(REASONING + " This fits the  Given\nHash-tags."), "gives away: given hash tags"),
        (written(REASONING + " So says the ground-truth."), "gives away: ground truth"),
        (written(REASONING + " The tags were provided."), "gives away: tags were provided"),
        (written(REASONING + " It is the author’s keyphrase."), "gives away: author's keyphrase"),
        (written(REASONING * 2 + "因此符合给定的关键词。"), "gives away: 给定的关键词"),
        (written(REASONING + " I was given a flower; a hashtag is on the ground, in truth."), None),
        (written(REASONING + " The author chose the hashtag given in the text, expected."), None),
    ],
)
def test_replies_that_are_accepted_and_why_others_are_not(text, reason):
    reply, keyphrases = client.Reply(text, False, 9), ["wildflower hour", "flowers"]
    if reason is None:
        cot = gen_cot.accepted(reply, keyphrases, 10, 250)
        assert cot == cot.strip() and not any(tag in cot for tag in data.TAGS)
    else:
        with pytest.raises(client.Failed) as failed:
            gen_cot.accepted(reply, keyphrases, 10, 250)
        assert str(failed.value) == reason and failed.value.reply == text


@pytest.mark.parametrize(
    "keyphrases, answer",
    [
        (["red, white"], "red, white"),
        (["red, white", "blue"], "red, white; blue"),
        (["U.S."], "U.S."),
        (["#tag"], "tag"),
        (["野花 时间"], "野花时间"),
        (["café"], "cafe\u0301"),
        (["a", "a"], "a"),
    ],
)
def test_keyphrases_are_compared_as_the_parser_of_answers_reads_them(keyphrases, answer):
    reply = client.Reply(written(REASONING, answer), False, 9)
    assert gen_cot.accepted(reply, keyphrases, 1, 99) == REASONING


def test_a_reply_that_cant_be_taken_is_asked_for_again(tmp_path):
    posts = write_posts(tmp_path, 3)

    def reply(request, tries):
        if number(request) == 1:
            return "no tags at all, only fl\u00f6wers"
        if number(request) == 2 and tries == 2:
            return error(400, "Your prompt was flagged", code="content_filter")
        if number(request) == 2 or tries < 2:
            return completion(request, right(request), finish="length")
        return right(request)

    with Server(reply) as server:
        assert gen(posts, server, "--max-retries", 2) == 1
    assert Counter(server.asked()) == {"post-0": 3, "post-1": 3, "post-2": 3}
    assert ids(lines(tmp_path / "cot.jsonl")) == ["post-0"]
    first, second = lines(tmp_path / "cot.failed.jsonl")
    why = {"reason": "tag missing: <think>", "reply": "no tags at all, only flöwers"}
    assert first == lines(posts)[1] | {"teacher": "teacher"} | why
    assert second["reason"].startswith("refused: 400") and "<think>" in second["reply"]


def test_failed_posts_are_asked_again_only_when_told_to(tmp_path, capsys):
    posts = write_posts(tmp_path, 10)
    wrong = {3, 7, 8}
    with Server(lambda r, _: "no" if number(r) in wrong else right(r)) as server:
        assert gen(posts, server, "--max-retries", 0) == 1
        assert gen(posts, server) == 1 and len(server.log) == 10
    assert "3 posts failed: 3 tag missing" in capsys.readouterr().err
    with Server(lambda r, _: "still no" if number(r) == 7 else right(r)) as server:
        assert gen(posts, server, "--retry-failed", "--max-retries", 0) == 1
    assert sorted(server.asked()) == ["post-3", "post-7", "post-8"]
    (failed,) = lines(tmp_path / "cot.failed.jsonl")
    assert failed["id"] == "post-7" and failed["reply"] == "still no"
    assert len(lines(tmp_path / "cot.jsonl")) == 9
    with Server() as server:
        assert gen(posts, server, "--retry-failed") == 0 and server.asked() == ["post-7"]
        assert gen(posts, server, "--retry-failed") == 0 and len(server.log) == 1
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))
    assert not (tmp_path / "cot.failed.jsonl").exists()


def test_a_limit_that_grows(tmp_path):
    posts = write_posts(tmp_path, 12)
    with Server() as server:
        assert gen(posts, server, "--limit", 5) == 0 and len(lines(tmp_path / "cot.jsonl")) == 5
        assert gen(posts, server, "--limit", 9) == 0 and gen(posts, server, "--limit", 2) == 0
    assert sorted(server.asked()) == ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))[:9]


def test_teachers_and_prompts_are_not_mixed_unless_told_to(tmp_path):
    posts = write_posts(tmp_path, 6)
    (tmp_path / "prompt.txt").write_text("{text} Keyphrases: {keyphrases}")
    with Server() as server:
        assert gen(posts, server, "--limit", 2) == 0
        for other in (["--model", "other"], ["--prompt-file", tmp_path / "prompt.txt"]):
            with pytest.raises(UserError, match="cot.jsonl: was made with another teacher.*--mix"):
                gen(posts, server, *other)
        assert len(server.log) == 2
        assert gen(posts, server, "--model", "other", "--mix", "--limit", 4) == 0
        assert gen(posts, server, "--limit", 6) == 0
        for left in (None, "{}", "[3]", "no JSON"):
            sidecar = tmp_path / "cot.jsonl.settings.json"
            sidecar.unlink() if left is None else sidecar.write_text(left)
            with pytest.raises(UserError, match="was made with another teacher"):
                gen(posts, server)
    teachers = [record["teacher"] for record in lines(tmp_path / "cot.jsonl")]
    assert teachers == ["teacher"] * 2 + ["other"] * 2 + ["teacher"] * 2


def test_an_out_of_other_posts_is_left_alone(tmp_path):
    posts = write_posts(tmp_path, 4)
    with Server() as server:
        assert gen(posts, server) == 0
        before = (tmp_path / "cot.jsonl").read_bytes()
        changed = lines(posts)
        changed[2]["keyphrases"] = ["else"]
        write(posts, changed)
        with pytest.raises(UserError, match=r"cot.jsonl line 3 \(id post-2\): not a post of"):
            gen(posts, server)
        write_posts(tmp_path, 4, start=2)
        with pytest.raises(UserError, match=r"cot.jsonl line 1 \(id post-0\): not a post of"):
            gen(posts, server)
        for out in ("posts.jsonl", "."):
            with pytest.raises(UserError, match="is the input itself, or no file on a disk"):
                gen(posts, server, out=out)
        write_posts(tmp_path, 4)
        (tmp_path / "cot.jsonl").write_bytes(before.replace(b'"cot"', b'"tco"'))
        with pytest.raises(UserError, match="line 1 .*with its reasoning"):
            gen(posts, server)
        (tmp_path / "cot.jsonl").write_bytes(before.replace(b"}\n{", b"}\n{{", 1))
        with pytest.raises(UserError, match="line 2: not a line of JSON"):
            gen(posts, server)
        (tmp_path / "cot.jsonl").write_bytes(before[:-1])  # as some editors leave it
        assert gen(posts, server) == 0 and (tmp_path / "cot.jsonl").read_bytes() == before
        assert len(server.log) == 4


def test_posts_with_reasoning_of_their_own_get_the_teachers(tmp_path):
    posts = write_posts(tmp_path, 2)
    write(posts, [record | {"cot": "mine"} for record in lines(posts)])
    with Server() as server:
        assert gen(posts, server) == 0
    assert {record["cot"] for record in lines(tmp_path / "cot.jsonl")} == {REASONING}
    assert lines(posts)[0]["cot"] == "mine"


def test_an_out_in_another_folder_finds_its_images(tmp_path):
    posts = write_posts(tmp_path / "in", 6)
    with Server() as server:
        assert gen(posts, server, out="../far/away/cot.jsonl") == 0
    found = data.Posts(tmp_path / "far" / "away" / "cot.jsonl", for_training=True)
    for index in range(6):
        path = found.image_path(found[index])
        assert path is None if index in (0, 5) else images.load_image(path, 1000)
