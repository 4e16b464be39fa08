"""The teacher: what is sent and accepted, faults of every kind, stopping, killing and going on."""

import base64
import email.utils
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import data
import gen_cot
from evaluate import UserError
from kill_gen_cot import kill_run
from server import (
    ANSWERS,
    FAILING,
    HANG,
    PASSING,
    REASONING,
    THOUGHTS,
    Raw,
    Server,
    completion,
    error,
    right,
    text_of,
    write_posts,
)
from support import chat, client, connection, images
from support.jsonl import to_line

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def gen(posts, server, *options, out="cot.jsonl", wait=0.01):
    """gen_cot.py in this process: its exit code."""
    arguments = [
        str(posts),
        "--out",
        str(posts.parent / out),
        "--model",
        "teacher",
        "--base-url",
        server.url,
    ]
    return gen_cot.write_reasoning(
        gen_cot.parse_args([*arguments, *map(str, options)]), first_wait=wait
    )


def lines(path):
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        if path.exists()
        else []
    )


def ids(records):
    return [record["id"] for record in records]


def number(request):
    """Which post a request is about."""
    return int(re.search(r"post-(\d+)", text_of(request))[1])


# ------------------------------------------------------------------------------------- what is sent


def test_a_record_and_a_request(tmp_path):
    posts = write_posts(tmp_path, 3, size=(1500, 1000))
    with Server() as server:
        assert gen(posts, server, "--max-pixels", 100 * 28 * 28, "--temperature", 0.5) == 0
    before, after = lines(posts), lines(tmp_path / "cot.jsonl")
    assert after == [record | {"cot": REASONING, "teacher": "teacher"} for record in before]
    for record in after:
        data.check_record(record, "here", for_training=True)
    assert not (tmp_path / "cot.failed.jsonl").exists()
    by_post = {number(request): request for request, _, _ in server.log}
    assert {key: value for key, value in by_post[1].items() if key != "messages"} == {
        "model": "teacher",
        "stream": False,
        "max_tokens": 1024,
        "temperature": 0.5,
    }
    image, text = by_post[1]["messages"][0]["content"]
    prompt = gen_cot.PROMPT.replace("{text}", before[1]["text"])
    assert text["text"] == prompt.replace("{keyphrases}", "wildflower hour 1; flowers")
    kind, _, content = image["image_url"]["url"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:image/jpeg;base64" and picture.format == "JPEG"
    assert picture.size == (12 * 28, 8 * 28)  # 96 tokens; 12.25 x 8.16 would be 100
    content = by_post[0]["messages"][0]["content"]  # of a text-only post: a plain string
    assert content == prompt.replace(before[1]["text"], before[0]["text"]).replace(
        "{keyphrases}", "wildflower hour 0; flowers"
    )


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
    (tmp_path / "posts.jsonl").write_text(
        json.dumps(
            {
                "id": "a",
                "text": "{keyphrases} {text} <think> \ud83d \u2028",
                "image": None,
                "keyphrases": ["x {text}"],
            }
        )
    )
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
        assert not server.log and sorted(path.name for path in tmp_path.iterdir()) == [
            "0.jpg",
            "1.jpg",
            "2.jpg",
            "3.jpg",
            "posts.jsonl",
        ]
        gen(posts, server, "--workers", 1)
    first, request, count = (
        shown.splitlines()[0],
        shown.partition("\n")[2].rpartition("}")[0],
        shown.splitlines()[-1],
    )
    sent, headers, _ = server.log[0]
    assert (
        first
        == f"POST {server.url}/chat/completions"
        == f"POST http://{headers['Host']}{headers[':path']}"
    )
    assert json.loads(request + "}") == sent
    assert count.startswith("3 requests to come (0 posts done, 0 failed before)")
    (tmp_path / "cot.jsonl").write_text(
        "".join((tmp_path / "cot.jsonl").read_text().splitlines(keepends=True)[1:])
    )
    (tmp_path / "0.jpg").write_bytes(b"no image")
    with Server() as server:
        gen(posts, server, "--dry-run")
    assert "1 request to come (3 posts done" in capsys.readouterr().out


def test_a_dry_run_leaves_the_image_out(tmp_path, capsys):
    posts = write_posts(tmp_path, 3)
    posts.write_text("".join(posts.read_text().splitlines(keepends=True)[1:]))
    with Server() as server:
        gen(posts, server, "--dry-run")
    out = capsys.readouterr().out
    assert (
        re.search(r'"url": "data:image/jpeg;base64,… \(\d,\d{3} characters\)"', out)
        and len(out) < 3000
    )


@pytest.mark.parametrize(
    "base_url, address",
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1/chat/completions"),
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1/chat/completions"),
        ("https://a.example/api/v3", "https://a.example/api/v3/chat/completions"),
        ("https://a.example/v1beta/openai/", "https://a.example/v1beta/openai/chat/completions"),
        ("https://a.example/x/chat/completions?v=2", "https://a.example/x/chat/completions?v=2"),
        ("https://a.example/x?api-version=2", "https://a.example/x/chat/completions?api-version=2"),
        ("http://[::1]:8000/v1#top", "http://[::1]:8000/v1/chat/completions"),
    ],
)
def test_addresses(base_url, address):
    assert connection.endpoint(base_url) == address


@pytest.mark.parametrize(
    "base_url",
    [
        "localhost:8000/v1",
        "htp://a/v1",
        "http://",
        "http://me:word@host/v1",
        "http://host:port/v1",
        "http://host:99999/v1",
        "http://[::1/v1",
        "http://a b/v1",
    ],
)
def test_addresses_that_are_none(base_url):
    with pytest.raises(UserError, match="--base-url") as told:
        connection.endpoint(base_url)
    assert "me:word" not in str(told.value)


def test_requests_and_replies_hold_against_openais_types(tmp_path):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    from openai.types.chat import ChatCompletion
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
    from pydantic import TypeAdapter

    posts = write_posts(tmp_path, 2)
    with Server() as server:
        assert gen(posts, server, "--temperature", 1) == 0
        ours = [request for request, _, _ in server.log]
        ours.append(
            chat.chat_request(
                "served", "as infer.py asks", images.image_url(tmp_path / "1.jpg", 784), 512, 0
            )
        )
        path = server.log[0][1][":path"]
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        types = TypeAdapter(CompletionCreateParamsNonStreaming)
        for request in ours:
            checked = types.validate_python(request)
            checked["messages"] = list(
                checked["messages"]
            )  # what is iterable is checked only when it is read
            for message in checked["messages"]:
                if not isinstance(message["content"], str):
                    message["content"] = list(message["content"])
            assert (
                checked == request
                and request.keys() <= CompletionCreateParamsNonStreaming.__annotations__.keys()
            )
            reply = client.chat.completions.create(**request)
            assert (
                reply.choices[0].message.content == right(request)
                and reply.usage.completion_tokens == 20
            )
            ChatCompletion.model_validate(completion(request, "a"), strict=True)
        assert [request for request, _, _ in server.log[-len(ours) :]] == ours
        assert server.log[-1][1][":path"] == path


# --------------------------------------------------------------------------------------------- keys


def python(*arguments, cwd, **environment):
    """Start gen_cot.py as a process, which minds Ctrl-C even where this one ignores it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OPENAI_API_KEY", "HF_TOKEN")
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "gen_cot.py"), *map(str, arguments)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=kept | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_the_machines_own_token_is_never_sent(tmp_path):
    posts = write_posts(tmp_path, 1)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("token", "stored_tokens"):
        (home / name).write_text(
            "hf_storedtoken" if name == "token" else "[me]\nhf_token = hf_storedtoken\n"
        )
    with Server() as server:
        process = python(
            posts,
            "--out",
            "a.jsonl",
            "--model",
            "m",
            "--base-url",
            server.url,
            cwd=tmp_path,
            HF_TOKEN="hf_environmenttoken",
            HF_HOME=str(home),
            OPENAI_API_KEY="",
        )
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    ((request, headers, _),) = server.log
    assert headers["authorization"] == "Bearer none" and headers["user-agent"] == "dynamic-cot"
    assert "hf_" not in json.dumps([request, headers])
    assert headers.keys() <= {
        "Host",
        "Accept",
        "Accept-Encoding",
        "Connection",
        "user-agent",
        "authorization",
        "content-type",
        "Content-Length",
        "Content-Type",
        ":path",
    }


def test_a_key_is_sent_and_shown_nowhere(tmp_path, monkeypatch, capsys):
    """Not even where the server repeats it, in an error or in a reply."""
    posts, key = write_posts(tmp_path, 6), "sk-proj-0123456789"
    monkeypatch.setenv("OTHER_KEY", f" {key}\n")
    replies = [
        error(500, f"at Bearer {key}"),
        error(400, f"bad {key}"),
        f"my key is {key}",
        Raw(500, f"no JSON {key}"),
        {"error": {"message": f"no credit for {key}"}},
        None,
    ]
    with Server(lambda request, tries: replies[number(request)] or right(request)) as server:
        assert gen(posts, server, "--api-key-env", "OTHER_KEY", "--max-retries", 1) == 1
    assert {headers["authorization"] for _, headers, _ in server.log} == {f"Bearer {key}"}
    with (
        Server(lambda *_: error(401, f"Incorrect API key provided: {key}")) as server,
        pytest.raises(UserError) as told,
    ):
        gen(posts, server, "--api-key-env", "OTHER_KEY", "--retry-failed")
    assert "401 Incorrect API key provided: ***; check the key in OTHER_KEY" in str(told.value)
    shown = capsys.readouterr()
    files = [path.read_text(encoding="utf-8") for path in tmp_path.glob("cot*")]
    assert len(files) == 3 and not any(
        key in text for text in [shown.out, shown.err, str(told.value), *files]
    )


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("OPENAI_API_KEY", None, "the environment variable OPENAI_API_KEY is not set"),
        ("OTHER", None, "the environment variable OTHER is not set"),
        ("OTHER", "sk-two words", "OTHER holds a space"),
        ("OTHER", "sk-é", "OTHER holds a space"),
        ("sk-0123-4567", None, "takes the name of an environment variable"),
    ],
)
def test_keys_that_are_none(tmp_path, monkeypatch, name, value, message):
    if value:
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as told:
        gen_cot.write_reasoning(
            gen_cot.parse_args(
                [
                    str(write_posts(tmp_path, 1)),
                    "--out",
                    str(tmp_path / "a.jsonl"),
                    "--model",
                    "m",
                    "--api-key-env",
                    name,
                ]
            )
        )
    assert "sk-" not in str(told.value) and not (tmp_path / "a.jsonl").exists()


# --------------------------------------------------------------------------------- what is accepted


def written(cot, answer="wildflower hour; flowers"):
    return f"<think>{cot}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    "text, reason",
    [
        (written(REASONING), None),
        (
            f"Sure!\n```\n<think>\n {REASONING}\n</think>\n\n"
            "<answer>\n- Flower\n- Wildflower Hours\n</answer>\n```",
            None,
        ),
        (written(REASONING, "flowers; wildflower  hour"), None),
        (written(REASONING, "wildflower hour"), "other keyphrases: wildflower hour"),
        (
            written(REASONING, "wildflower hour; flowers; grass"),
            "other keyphrases: wildflower hour; flowers; grass",
        ),
        (written(REASONING, ""), "other keyphrases: "),
        ("wildflower hour; flowers", "tag missing: <think>"),
        (f"{REASONING}</think><answer>wildflower hour; flowers</answer>", "tag missing: <think>"),
        (f"<think>{REASONING}</think>wildflower hour; flowers", "tag missing: <answer>"),
        (f"<think>{REASONING}<answer>wildflower hour; flowers</answer>", "tag missing: </think>"),
        (written(REASONING + " <think>"), "tag misplaced: <think><think></think><answer></answer>"),
        (
            written(f"{REASONING}</think>"),
            "tag misplaced: <think></think></think><answer></answer>",
        ),
        (
            f"<answer>wildflower hour; flowers</answer><think>{REASONING}</think>",
            "tag misplaced: <answer></answer><think></think>",
        ),
        (written("It is a flower."), "too short: 4 words"),
        ("<think></think><answer>wildflower hour; flowers</answer>", "too short: 0 words"),
        # A thinking teacher: its own thoughts come first, in tags or not.
        (f"{THOUGHTS} </think>\n\n{written(REASONING)}", None),
        (f"<think>{THOUGHTS}</think>\n\n{written(REASONING)}", None),
        (f"<think>\n\n</think>\n\n{written(REASONING)}", None),
        (f"<think>So {written('why', 'x')}, then.</think>{written(REASONING)}", None),
        (f"{written('why', 'x')} or rather: {written(REASONING)}", None),
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
        (written(REASONING + " This fits the given keyphrases."), "gives away: given keyphrases"),
        (written(REASONING + " This fits the  Given\nHash-tags."), "gives away: given hash tags"),
        (written(REASONING + " So says the ground-truth."), "gives away: ground truth"),
        (
            written(REASONING + " These keywords were provided."),
            "gives away: keywords were provided",
        ),
        (written(REASONING + " It is the author’s keyphrase."), "gives away: author's keyphrase"),
        (written(REASONING * 2 + "因此符合给定的关键词。"), "gives away: 给定的关键词"),
        (
            written(
                "I was given a flower and a hashtag is seen on the ground, in truth a well known "
                "one."
            ),
            None,
        ),
        (
            written(
                "The author chose a blue flower and the hashtag given in the text is the expected "
                "one."
            ),
            None,
        ),
    ],
)
def test_replies_that_are_accepted_and_why_others_are_not(text, reason):
    def judge():
        return gen_cot.accepted(
            chat.Reply(text, "stop", 9), ["wildflower hour", "flowers"], 10, 250
        )

    if reason is None:
        cot = judge()
        assert cot == cot.strip() and not any(tag in cot for tag in data.TAGS)
    else:
        with pytest.raises(chat.Failed) as failed:
            judge()
        assert str(failed.value) == reason and failed.value.reply == text


@pytest.mark.parametrize(
    "keyphrases, answer",
    [
        (["red, white"], "red, white"),
        (["red, white", "blue"], "red, white; blue"),
        (["U.S."], "U.S."),
        (["#tag"], "tag"),
        (["running shoes"], "run shoe"),
        (["野花 时间"], "野花时间"),
        (['"quoted"'], "quoted"),
        (["2. bundesliga"], "2. bundesliga"),
        (["café"], "cafe\u0301"),
        (["a", "a"], "a"),
    ],
)
def test_keyphrases_are_compared_as_the_parser_of_answers_reads_them(keyphrases, answer):
    assert (
        gen_cot.accepted(chat.Reply(written(REASONING, answer), "stop", 9), keyphrases, 1, 99)
        == REASONING
    )


def test_a_reply_that_cant_be_taken_is_asked_for_again(tmp_path):
    posts = write_posts(tmp_path, 3)

    def reply(request, tries):
        if number(request) == 1:
            return "no tags at all, only fl\u00f6wers"
        if number(request) == 2 and tries == 2:
            return error(
                400,
                "Your prompt was flagged by our content management policy",
                code="content_filter",
            )
        if number(request) == 2 or tries < 2:
            return completion(request, right(request), finish="length")
        return right(request)

    with Server(reply) as server:
        assert gen(posts, server, "--max-retries", 2) == 1
    assert Counter(server.asked()) == {"post-0": 3, "post-1": 3, "post-2": 3}
    assert ids(lines(tmp_path / "cot.jsonl")) == ["post-0"]
    first, second = lines(tmp_path / "cot.failed.jsonl")
    assert first == lines(posts)[1] | {
        "teacher": "teacher",
        "reason": "tag missing: <think>",
        "reply": "no tags at all, only flöwers",
    }
    assert second["reason"].startswith("content filter: 400") and "<think>" in second["reply"]


def test_replies_of_servers_that_split_off_the_reasoning(tmp_path):
    posts = write_posts(tmp_path, 4)

    def reply(request, tries):
        answer, think = right(request).partition("</think>")[2], f"\n{REASONING}\n"
        return [
            completion(request, answer, reasoning_content=think),
            completion(request, answer, reasoning=think),
            completion(request, right(request), reasoning_content="thoughts of its own"),
            completion(request, [{"type": "text", "text": right(request)}]),
        ][number(request)]

    with Server(reply) as server:
        assert gen(posts, server) == 0
    assert {record["cot"] for record in lines(tmp_path / "cot.jsonl")} == {REASONING}


# ------------------------------------------------------------------------------------------- faults

# Beside what a server does wrong: what hangs, and replies that are not accepted.
FAULTS = {name: fault for name, fault in (PASSING | FAILING).items() if "429" not in name} | {
    "hang": (lambda request: HANG, "time-out: no reply in 2 s"),
    "wrong": (
        lambda request: written(REASONING, "something else"),
        "other keyphrases: something else",
    ),
    "long": (
        lambda request: written("word " * 300, right(request).split("answer>")[1][:-2]),
        "too long: 300 words",
    ),
}
REJECTED = ("wrong", "long")
RATE_LIMITS = {name: fault for name, fault in PASSING.items() if "429" in name}
TEMPORARY = [name for name in FAULTS | RATE_LIMITS if name not in FAILING]


def test_500_posts_of_which_one_request_in_four_meets_a_fault(tmp_path, capsys):
    """Right replies come in every dress; each fault lasts for one post, and passes for others."""
    posts, draw = write_posts(tmp_path, 500), random.Random(7)
    records = lines(posts)
    for index in (50, 150, 250):
        records[index + 1]["image"] = "lost.jpg"
    posts.write_text("".join(to_line(record) for record in records), encoding="utf-8")
    found = [index for index in range(500) if records[index]["image"] != "lost.jpg"]
    lasting = dict(zip(draw.sample(found, len(FAULTS)), FAULTS, strict=True))
    passing = [
        [draw.choice(TEMPORARY) if draw.random() < 0.25 else None for _ in range(32)]
        for _ in records
    ]
    dresses = [draw.choice(list(ANSWERS)) for _ in records]
    faulty = []

    def fault(index, tries):
        return lasting.get(index) or passing[index][tries]

    def reply(request, tries):
        name = fault(number(request), tries)
        faulty.append(name is not None)
        if name is None:
            return ANSWERS[dresses[number(request)]](request)
        return (FAULTS | RATE_LIMITS)[name][0](request)

    def fate(index):
        """(how many requests a post takes, the fault that it ends with or None), by the rules."""
        used = rejected = in_a_row = 0
        while True:
            name = fault(index, used)
            used += 1
            if name in REJECTED:
                rejected, in_a_row = rejected + 1, 0
            elif name in FAULTS:
                in_a_row += 1
            if name is None or name in FAILING or rejected == 3 or in_a_row == 3:
                return used, name

    with Server(reply) as server:
        assert gen(posts, server, "--timeout", 2, "--max-retries", 2) == 1
    assert 0.22 < sum(faulty) / len(faulty) < 0.36 and len(faulty) == len(server.log)
    good, failed = lines(tmp_path / "cot.jsonl"), lines(tmp_path / "cot.failed.jsonl")
    fates = [
        (0, "lost") if record["image"] == "lost.jpg" else fate(index)
        for index, record in enumerate(records)
    ]
    assert good == [
        record | {"cot": REASONING, "teacher": "teacher"}
        for index, record in enumerate(records)
        if fates[index][1] is None
    ]
    assert len(good) > 450 and ids(failed) == [
        record["id"] for i, record in enumerate(records) if fates[i][1]
    ]
    for record in failed:
        index = int(record["id"].removeprefix("post-"))
        name = fates[index][1]
        expected = FAULTS[name][1] if name in FAULTS else "unreadable image: no such file"
        assert record["reason"].startswith(expected), record
        tried_in_vain = name in FAULTS and name not in FAILING and name not in REJECTED
        assert ("(3 tries)" in record["reason"]) == tried_in_vain
        if index in lasting or name == "lost":
            written_something = name in REJECTED or name == "finish content_filter"
            assert (record["reply"] is not None) == written_something
        assert {field: record[field] for field in records[index]} == records[index]
    tries = Counter(server.asked())
    assert [used for used, _ in fates] == [tries[identity] for identity in ids(records)]
    told = capsys.readouterr().err
    assert f"{len(good)} of 500 posts with reasoning; 23 to 23 words, median 23" in told
    assert f"{len(failed)} posts failed: " in told and f"{len(server.log)} requests" in told
    assert re.search(r"\d+ failed, \d+\.\d requests/s, [\d.]+k tokens\]", told)
    kinds = Counter(record["reason"].partition(":")[0] for record in failed)
    assert kinds["unreadable image"] == 3 and all(
        f" {count} {kind}" in told for kind, count in kinds.items()
    )


def test_retry_after_is_honoured_as_seconds_and_as_a_date(tmp_path):
    posts, now = write_posts(tmp_path, 2), time.time()
    assert chat.retry_after({}) is None and chat.retry_after({"retry-after": "soon"}) is None
    assert chat.retry_after({"retry-after": "2.5"}) == 2.5
    assert (
        28 < chat.retry_after({"retry-after": email.utils.formatdate(now + 30, usegmt=True)}) <= 30
    )
    assert chat.retry_after({"retry-after": email.utils.formatdate(now - 30, usegmt=True)}) == 0

    def reply(request, tries):
        wait = ["1", email.utils.formatdate(time.time() + 2.5, usegmt=True)][number(request)]
        return right(request) if tries else Raw(503, "busy", {"Retry-After": wait})

    with Server(reply) as server:
        assert gen(posts, server) == 0
    for index, least in ((0, 1), (1, 1.5)):
        first, second = (when for request, _, when in server.log if number(request) == index)
        assert least <= second - first < 60


@pytest.mark.parametrize(
    "answer, told",
    [
        (
            error(401, "Incorrect API key"),
            "/v1/chat/completions: 401 Incorrect API key; it wants a key: put it in OPENAI_API_KEY",
        ),
        (error(403, "no access"), "403 no access; this key may not use the model teacher"),
        (
            error(404, "No such model"),
            "404 No such model; check --base-url, and whether it has a model teacher",
        ),
        (
            error(429, "Quota exceeded", code="insufficient_quota"),
            "429 Quota exceeded; the account needs credit",
        ),
        (
            Raw(404, "<html>nothing here</html>", kind="text/html"),
            "404 a web page.*; check --base-url",
        ),
        (
            Raw(307, "", {"Location": "https://elsewhere.example/v1"}),
            "307 nothing; the server has moved to https://elsewhere.example/v1",
        ),
        (Raw(403, ["a list"]), r'403 \["a list"\]; this key'),
        (
            Raw(400, [{"error": {"code": 400, "message": "API key not valid."}}]),
            "400 API key not valid.; it wants a key: put it in OPENAI_API_KEY",
        ),
        (
            error(400, "Invalid model name passed in model=teacher", code="400"),
            "400 Invalid model name .*; check --base-url, and whether it has a model teacher",
        ),
        (error(400, "Model Not Exist"), "whether it has a model teacher"),
        (error(400, "No connected db.", type="no_db_connection"), "it wants a key"),
        (Raw(200, {"error": {"code": 401, "message": "User not found."}}), "401 User.*wants a key"),
        (Raw(200, {"error": {"code": 404, "message": "No such"}}), "404 No such.*model teacher"),
        (
            Raw(200, {"base_resp": {"status_code": 1004, "status_msg": "login fail"}}),
            "401 login fail; it wants a key",
        ),
        (
            Raw(200, {"base_resp": {"status_code": 2049, "status_msg": "invalid api key"}}),
            "401 invalid api key; it wants a key",
        ),
        (error(400, "Your credit balance is too low"), "the account needs credit"),
        (error(402, "Insufficient Balance"), "402 Insufficient Balance; the account needs credit"),
        (Raw(405, {"detail": "Method Not Allowed"}), "405 Method Not Allowed; check --base-url"),
        (
            Raw(
                400, "<html>The plain HTTP request was sent to HTTPS port</html>", kind="text/html"
            ),
            "write https:// in --base-url",
        ),
    ],
    ids=(
        "401 403 404 quota page moved list gemini litellm deepseek litellm-key 401-in-200 "
        "404-in-200 minimax-1004 minimax-2049 credit 402 405 plain"
    ).split(),
)
def test_what_no_post_can_pass_stops_the_run_at_once_in_one_line(tmp_path, answer, told):
    posts, started = write_posts(tmp_path, 300), time.monotonic()
    with (
        Server(lambda request, tries: answer if len(server.log) > 20 else right(request)) as server,
        pytest.raises(UserError, match=told) as stopped,
    ):
        gen(posts, server, "--workers", 4)
    assert time.monotonic() - started < client.GRACE  # nothing is under way to wait for
    assert len(server.log) < 30 and "\n" not in str(stopped.value)
    assert 16 <= len(lines(tmp_path / "cot.jsonl")) <= 20 and not lines(
        tmp_path / "cot.failed.jsonl"
    )


@pytest.mark.parametrize(
    "answer",
    [
        error(500, "broken"),
        Raw(200, "null"),
        Raw(200, "[]"),
        Raw(200, '{"choices": [{"message": 5}]}'),
        Raw(200, b"\xff\xfe"),
        Raw(200, {"choices": [], "usage": 7}),
        Raw(500, "[1]"),
        Raw(200, "[" * 100_000),
    ],
)
def test_a_server_that_answers_no_post_stops_the_run(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(client, "GIVE_UP_AFTER", 10)
    posts = write_posts(tmp_path, 100)
    with (
        Server(lambda *_: answer) as server,
        pytest.raises(
            UserError,
            match="no reply for 1[0-3] posts in a row, the last: (server|malformed)",
        ),
    ):
        gen(posts, server, "--workers", 4, "--max-retries", 1)
    assert 9 <= len(lines(tmp_path / "cot.failed.jsonl")) < 20
    with Server() as server:
        assert gen(posts, server, "--retry-failed") == 0
    assert (
        ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))
        and not (tmp_path / "cot.failed.jsonl").exists()
    )


def test_no_server(tmp_path):
    posts = write_posts(tmp_path, 3)
    with Server() as server:
        pass
    with pytest.raises(UserError, match="no connection: .*(2 tries).*is the server running"):
        gen(posts, server, "--max-retries", 1)
    assert not lines(tmp_path / "cot.jsonl") and not lines(tmp_path / "cot.failed.jsonl")


# ---------------------------------------------------------------------- stopping, killing, going on


def test_killed_at_any_moment_it_goes_on_to_the_same_file(tmp_path):
    posts, moment = write_posts(tmp_path, 200), random.randrange(1, 150)
    print("killed once", moment, "lines were written")

    def reply(request, tries):
        time.sleep(0.02)
        return right(request)

    with Server(reply) as server:
        assert gen(posts, server, out="whole.jsonl") == 0
    arguments = [posts, "--out", "cot.jsonl", "--model", "teacher", "--workers", 8]
    out = tmp_path / "cot.jsonl"
    with Server(reply) as server:
        process = python(*arguments, "--base-url", server.url, cwd=tmp_path)
        while process.poll() is None and (
            not out.exists() or out.read_bytes().count(b"\n") < moment
        ):
            time.sleep(0.002)
        process.kill()
        process.communicate()
    kept = [json.loads(line)["id"] for line in out.read_bytes().split(b"\n")[:-1]]
    assert moment <= len(kept) < 200
    with open(out, "ab") as file:
        file.write(b'{"id": "post-199", "text": "t\xc3')
    with Server(reply) as server:
        process = python(*arguments, "--base-url", server.url, cwd=tmp_path)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(server.asked() + kept) == sorted(ids(lines(posts)))


def test_killed_while_the_server_misbehaves_in_every_way(tmp_path):
    """Each post is in one of the two files, none is asked for again, the key is nowhere."""
    requests, faults = kill_run(tmp_path, posts=120, kills=2)
    assert 120 < requests < 500 and len(faults) > 15


def test_a_torn_line_is_gone_before_anything_is_added(tmp_path):
    posts = write_posts(tmp_path, 12)
    with Server() as server:
        assert gen(posts, server, "--limit", 4) == 0
        for file in ("cot.jsonl", "cot.failed.jsonl"):
            with open(tmp_path / file, "ab") as out:
                out.write(b'{"id": "post-1')
    with (
        Server(
            lambda request, tries: right(request) if len(server.log) < 4 else error(401, "no")
        ) as server,
        pytest.raises(UserError, match="401"),
    ):
        gen(posts, server, "--workers", 1)
    with Server() as server:
        assert gen(posts, server) == 0 and len(server.log) == 5
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "answer, times",
    [
        (lambda request: error(429, "later", {"Retry-After": "300"}), 1),
        (lambda request: HANG, 2),
    ],
    ids=["once while all wait", "twice while all hang"],
)
def test_ctrl_c_ends_the_process(tmp_path, answer, times):
    posts = write_posts(tmp_path, 50)
    arguments = [posts, "--out", "cot.jsonl", "--model", "m", "--workers", 8]

    def all_under_way():
        return len(server.log) >= 5 + 8 and len(lines(tmp_path / "cot.jsonl")) == 5

    def reply(request, tries):
        if number(request) < 5:
            return right(request)
        wait_for(all_under_way)
        return answer(request)

    with Server(reply) as server:
        process = python(*arguments, "--base-url", server.url, cwd=tmp_path)
        wait_for(all_under_way)
        time.sleep(0.2)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        _, told = process.communicate(timeout=100)  # the server's own patience is 300 s
    assert process.returncode == 130
    assert "Traceback" not in told and "stopped: cot.jsonl has 5 of 50 posts" in told
    with Server() as server:
        assert gen(posts, server, "--model", "m") == 0
    assert sorted(server.asked()) == sorted(ids(lines(posts))[5:])
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))


@pytest.mark.parametrize("grace, times", [(1, 1), (200, 2)])
def test_what_hangs_is_waited_for_seconds_and_not_after_a_second_ctrl_c(
    tmp_path, monkeypatch, grace, times
):
    monkeypatch.setattr(client, "GRACE", grace)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    posts = write_posts(tmp_path, 20)

    def interrupt():
        wait_for(lambda: len(server.log) >= 8)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    with Server(lambda *_: HANG) as server:
        threading.Thread(target=interrupt).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            gen(posts, server, "--workers", 8)
        assert time.monotonic() - started < 100 and len(server.log) == 8
    signal.signal(signal.SIGINT, before)


def test_few_items_are_begun_ahead_and_errors_of_the_work_come_out():
    begun = []

    async def work(item):
        begun.append(item)
        return item

    async def divide(item):
        return 1 / (item - 50)

    options = gen_cot.parse_args(["posts.jsonl", "--out", "a", "--model", "m"])
    done = client.Client("http://127.0.0.1:1", options, workers=4).each(work, range(1000))
    first = [next(done) for _ in range(10)]
    time.sleep(0.2)
    assert len(begun) <= 10 + 2 * 4 and set(first) <= set(begun)
    assert sorted([*first, *done]) == list(range(1000))
    with pytest.raises(ZeroDivisionError):
        list(client.Client("http://127.0.0.1:1", options, workers=4).each(divide, range(1000)))


def test_replies_under_way_at_ctrl_c_are_kept(tmp_path):
    posts = write_posts(tmp_path, 50)
    arguments = [posts, "--out", "cot.jsonl", "--model", "m", "--workers", 8]

    def reply(request, tries):
        time.sleep(1)
        return right(request)

    with Server(reply) as server:
        process = python(*arguments, "--base-url", server.url, cwd=tmp_path)
        wait_for(lambda: len(server.log) >= 8)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130 and sorted(ids(lines(tmp_path / "cot.jsonl"))) == sorted(
        server.asked()
    )


def test_failed_posts_are_asked_again_only_when_told_to(tmp_path, capsys):
    posts = write_posts(tmp_path, 10)
    with Server(
        lambda request, tries: "no" if number(request) in (3, 7, 8) else right(request)
    ) as server:
        assert gen(posts, server, "--max-retries", 0) == 1
        assert gen(posts, server) == 1 and len(server.log) == 10
    assert "3 posts failed: 3 tag missing" in capsys.readouterr().err
    with Server(
        lambda request, tries: "still no" if number(request) == 7 else right(request)
    ) as server:
        assert gen(posts, server, "--retry-failed", "--max-retries", 0) == 1
    assert sorted(server.asked()) == ["post-3", "post-7", "post-8"]
    (failed,) = lines(tmp_path / "cot.failed.jsonl")
    assert failed["id"] == "post-7" and failed["reply"] == "still no"
    assert len(lines(tmp_path / "cot.jsonl")) == 9
    with Server() as server:
        assert gen(posts, server, "--retry-failed") == 0 and server.asked() == ["post-7"]
        assert gen(posts, server, "--retry-failed") == 0 and len(server.log) == 1
    assert (
        ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))
        and not (tmp_path / "cot.failed.jsonl").exists()
    )


def test_a_limit_that_grows(tmp_path):
    posts = write_posts(tmp_path, 12)
    with Server() as server:
        assert gen(posts, server, "--limit", 5) == 0 and len(lines(tmp_path / "cot.jsonl")) == 5
        assert gen(posts, server, "--limit", 9) == 0 and gen(posts, server, "--limit", 2) == 0
    assert (
        server.asked()
        and sorted(server.asked()) == ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))[:9]
    )


def test_teachers_and_prompts_are_not_mixed_unless_told_to(tmp_path):
    posts = write_posts(tmp_path, 6)
    (tmp_path / "prompt.txt").write_text("{text} Keyphrases: {keyphrases}")
    with Server() as server:
        assert gen(posts, server, "--limit", 2) == 0
        with pytest.raises(UserError, match="cot.jsonl: was made with another teacher; .*--mix"):
            gen(posts, server, "--model", "other")
        with pytest.raises(UserError, match="cot.jsonl: was made with another prompt; .*--mix"):
            gen(posts, server, "--prompt-file", tmp_path / "prompt.txt")
        assert len(server.log) == 2
        assert gen(posts, server, "--model", "other", "--mix", "--limit", 4) == 0
        assert gen(posts, server, "--limit", 6) == 0
        for left in (None, "{}", "[3]", "no JSON"):
            sidecar = tmp_path / "cot.jsonl.settings.json"
            sidecar.unlink() if left is None else sidecar.write_text(left)
            with pytest.raises(UserError, match="was made with an unknown teacher"):
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
        posts.write_text("".join(map(to_line, changed)), encoding="utf-8")
        with pytest.raises(
            UserError, match=r"cot.jsonl line 3 \(id post-2\): .*posts.jsonl has no such post"
        ):
            gen(posts, server)
        write_posts(tmp_path, 4, start=2)
        with pytest.raises(UserError, match=r"cot.jsonl line 1 \(id post-0\)"):
            gen(posts, server)
        with pytest.raises(UserError, match="the input itself"):
            gen(posts, server, out="posts.jsonl")
        with pytest.raises(UserError, match="a folder"):
            gen(posts, server, out=".")
        write_posts(tmp_path, 4)
        (tmp_path / "cot.jsonl").write_bytes(before.replace(b'"cot"', b'"tco"'))
        with pytest.raises(UserError, match="line 1 .*has no reasoning"):
            gen(posts, server)
        (tmp_path / "cot.jsonl").write_bytes(before.replace(b"}\n{", b"}\n{{", 1))
        with pytest.raises(UserError, match="line 2: not a line of JSON"):
            gen(posts, server)
        (tmp_path / "cot.jsonl").write_bytes(
            before[:-1]
        )  # an editor that leaves out the last line's end
        assert gen(posts, server) == 0 and (tmp_path / "cot.jsonl").read_bytes() == before
        assert len(server.log) == 4


def test_posts_with_reasoning_of_their_own_get_the_teachers(tmp_path, capsys):
    posts = write_posts(tmp_path, 2)
    posts.write_text(
        "".join(to_line(record | {"cot": "mine"}) for record in lines(posts)), encoding="utf-8"
    )
    with Server() as server:
        assert gen(posts, server) == 0
    assert {record["cot"] for record in lines(tmp_path / "cot.jsonl")} == {REASONING}
    assert "2 posts of" in capsys.readouterr().err and lines(posts)[0]["cot"] == "mine"


def test_an_out_in_another_folder_finds_its_images(tmp_path):
    posts = write_posts(tmp_path / "in", 6)
    with Server() as server:
        assert gen(posts, server, out="../far/away/cot.jsonl") == 0
    found = data.Posts(tmp_path / "far" / "away" / "cot.jsonl", for_training=True)
    for index in range(6):
        path = found.image_path(found[index])
        assert path is None if index in (0, 5) else images.load_image(path, 1000)


def test_two_runs_do_not_share_an_out(tmp_path):
    posts, inside, over = write_posts(tmp_path, 3), threading.Event(), threading.Event()

    def reply(request, tries):
        inside.set()
        over.wait(60)
        return right(request)

    with Server(reply) as server:
        command = [posts, "--out", "cot.jsonl", "--model", "m", "--base-url", server.url]
        first = python(*command, cwd=tmp_path)
        inside.wait(60)
        second = python(*command, cwd=tmp_path)
        told = second.communicate(timeout=60)[1]
        over.set()
        first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 1) and len(server.log) == 3
    assert (
        told.startswith("error: cot.jsonl: another run is writing to it")
        and len(told.splitlines()) == 1
    )


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path):
    import resource

    posts, before = write_posts(tmp_path, 40), resource.getrlimit(resource.RLIMIT_FSIZE)
    with Server() as server:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
        try:
            with pytest.raises(UserError, match="cot.jsonl: can't be written"):
                gen(posts, server)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = [
        json.loads(line)["id"] for line in (tmp_path / "cot.jsonl").read_bytes().split(b"\n")[:-1]
    ]
    with Server() as server:
        assert 5 < len(kept) < 40 and gen(posts, server) == 0
    assert sorted(server.asked() + kept) == sorted(ids(lines(posts)))
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))
