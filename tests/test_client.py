"""The client of servers: what is sent where, rate limits, verdicts, replies, keys, networks."""

import email.utils
import json
import threading
import time
from collections import Counter

import pytest

import gen_cot
from evaluate import UserError
from server import CERTIFICATE, DROP, Raw, Server, completion, error, right, write_posts
from support import client
from test_gen_cot import gen, ids, lines, no_keys, number, python  # noqa: F401

PAIR = "<answer>a</answer>"


def reasons(posts):
    """The reason of each failed post, by its number."""
    failed = lines(posts.parent / "cot.failed.jsonl")
    return {int(record["id"].removeprefix("post-")): record["reason"] for record in failed}


def run_process(posts, url, **environment):
    """gen_cot.py as a process: (exit code, stderr)."""
    arguments = [posts, "--out", "cot.jsonl", "--model", "m", "--base-url", url]
    process = python(*arguments, "--max-retries", 0, cwd=posts.parent, **environment)
    _, told = process.communicate(timeout=60)
    return process.returncode, told


# ----------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "base_url, address",
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1/chat/completions"),
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("https://a.example/api/v3", "https://a.example/api/v3/chat/completions"),
        ("https://a.example/x/chat/completions?v=2", "https://a.example/x/chat/completions?v=2"),
        ("https://a.example/x?api-version=2", "https://a.example/x/chat/completions?api-version=2"),
        ("http://[::1]:8000/v1#top", "http://[::1]:8000/v1/chat/completions"),
    ],
)
def test_addresses(base_url, address):
    assert client.endpoint(base_url) == address


NO_ADDRESSES = "localhost:8000/v1 http:// http://me:word@host/v1 http://host:65536 http://[::1/v1"


@pytest.mark.parametrize("base_url", [*NO_ADDRESSES.split(), "http://host\n/v1"])
def test_addresses_that_are_none(base_url):
    with pytest.raises(UserError, match="--base-url: takes an address like") as told:
        client.endpoint(base_url)
    assert "word" not in str(told.value).replace("password", "")


def test_the_address_in_the_environment(tmp_path, monkeypatch):
    posts = write_posts(tmp_path, 2)
    arguments = [str(posts), "--out", str(tmp_path / "cot.jsonl"), "--model", "m"]
    with Server() as server, Server() as other:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert gen_cot.write_reasoning(gen_cot.parse_args(arguments)) == 0
        (tmp_path / "cot.jsonl").unlink()
        assert gen(posts, other) == 0
    assert len(server.log) == len(other.log) == 2
    assert server.log[0][1][":path"] == "/v1/chat/completions"
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert gen_cot.parse_args(arguments).base_url == gen_cot.OPENAI


# --------------------------------------------------------------------------------- rate limits


def test_a_rate_limit_slows_the_run_down_and_does_not_count_as_a_try(tmp_path, capsys):
    """60 posts at 20 a second, no Retry-After, no further tries: nothing is lost, little wasted."""
    posts, started, taken = write_posts(tmp_path, 60), time.monotonic(), Counter()
    together = threading.Barrier(16)  # a limit that all workers meet at once counts as one

    def reply(request, tries):
        if number(request) < 16 and tries == 0:
            together.wait(60)
            return error(429, "20 requests a second")
        second = int(time.monotonic() - started)
        taken[second] += 1
        return right(request) if taken[second] <= 20 else error(429, "20 requests a second")

    with Server(reply) as server:
        assert gen(posts, server, "--max-retries", 0, "--workers", 16, wait=0.05) == 0
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))
    assert len(server.log) < 60 + 60 and time.monotonic() - started < 30
    told = capsys.readouterr().err
    assert told.count("rate limit: 429 20 requests a second; the run slows down") == 1


def test_retry_after_is_a_number_or_a_date(monkeypatch):
    def asked(value):
        return client.retry_after({"retry-after": value})

    assert client.retry_after({}) is None and asked("soon") is None
    assert asked("2.5") == 2.5 and asked("999999") == client.LONGEST_RETRY_AFTER
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "JST-9")
        time.tzset()
        for text in (date, date.removesuffix(" GMT")):  # without a zone it is UTC
            assert 28 < asked(text) <= 30
    time.tzset()
    assert asked(email.utils.formatdate(time.time() - 30, usegmt=True)) == 0


def test_a_rate_limit_holds_all_requests_back_for_as_long_as_it_says(tmp_path):
    posts, refused = write_posts(tmp_path, 30), []

    def reply(request, tries):
        if len(server.log) > 10 and not refused:
            refused.append(time.time())
            return error(429, "slow", {"Retry-After": "0.8"})
        return right(request)

    with Server(reply) as server:
        assert gen(posts, server, "--workers", 2) == 0
    waits = sorted(when - refused[0] for _, _, when in server.log)
    assert sum(0 < wait < 0.75 for wait in waits) <= 1  # the other worker's, under way already
    assert sum(wait >= 0.75 for wait in waits) > 15


# ------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    "answer, reason",
    [
        (error(400, "no such field: messages"), "refused: 400 no such field: messages"),
        (error(500, "broken"), "server error: 500 broken (2 tries)"),
        (Raw(500, "[1]"), "server error: 500 no word why (2 tries)"),
        # FastAPI's errors hold the request, which is not shown.
        (Raw(422, {"detail": [{"msg": "a string!", "input": "x"}]}), "refused: 422 a string!"),
    ]
    + [
        (Raw(200, body), "malformed reply: not the JSON of a chat completion (2 tries)")
        for body in ("null", b"\xff\xfe", "[" * 100_000)
    ],
)
def test_a_server_that_answers_none_of_the_first_posts_stops_the_run(tmp_path, answer, reason):
    posts = write_posts(tmp_path, 100)
    with Server(lambda *_: answer) as server, pytest.raises(UserError) as told:
        gen(posts, server, "--workers", 4, "--max-retries", 1)
    assert f": {reason} (no reply for 5 posts in a row); check the server" in str(told.value)
    assert set(reasons(posts).values()) == {reason} and 4 <= len(reasons(posts)) < 10
    with Server() as server:
        assert gen(posts, server, "--retry-failed") == 0
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))
    assert not (tmp_path / "cot.failed.jsonl").exists()


def test_a_server_that_breaks_stops_the_run_later(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "GIVE_UP_AFTER", 20)
    posts = write_posts(tmp_path, 100)
    with (
        Server(lambda request, _: right(request) if number(request) < 10 else DROP) as server,
        pytest.raises(UserError, match=r"no connection: .* \(no reply for 20 posts in a row\)"),
    ):
        gen(posts, server, "--workers", 4, "--max-retries", 0)
    assert len(lines(tmp_path / "cot.jsonl")) == 10 and 19 <= len(reasons(posts)) < 24


def test_refusals_after_replies_of_an_earlier_run_do_not_stop_the_run(tmp_path):
    posts = write_posts(tmp_path, 60)
    with Server() as server:
        assert gen(posts, server, "--limit", 10) == 0
    with Server(
        lambda request, _: error(422, "odd") if number(request) < 50 else right(request)
    ) as server:
        assert gen(posts, server) == 1
    assert set(reasons(posts)) == set(range(10, 50))


@pytest.mark.parametrize(
    "answer, told",
    [
        (error(401, "Incorrect API key"), "401 Incorrect API key"),
        (error(404, "No such model"), "404 No such model"),
        (error(429, "Quota", code="insufficient_quota"), "429 Quota"),
        (error(402, "Insufficient Balance"), "402 Insufficient Balance"),
        (Raw(307, "", {"Location": "https://elsewhere.example"}), "307 no word why"),
    ],
    ids="401 404 quota 402 moved".split(),
)
def test_what_no_post_can_pass_stops_the_run_at_once_in_one_line(tmp_path, answer, told):
    posts, started = write_posts(tmp_path, 300), time.monotonic()
    with (
        Server(lambda request, tries: answer if len(server.log) > 20 else right(request)) as server,
        pytest.raises(UserError, match=f"{told} .*; check .* --model, the key") as stopped,
    ):
        gen(posts, server, "--workers", 4)
    assert time.monotonic() - started < client.GRACE  # nothing is under way to wait for
    assert len(server.log) < 30 and "\n" not in str(stopped.value)
    assert 16 <= len(lines(tmp_path / "cot.jsonl")) <= 20
    assert not lines(tmp_path / "cot.failed.jsonl")


def test_no_server(tmp_path):
    posts = write_posts(tmp_path, 3)
    with Server() as server:
        pass
    with pytest.raises(UserError, match="no connection: .*(2 tries).*check the server"):
        gen(posts, server, "--max-retries", 1)
    assert not lines(tmp_path / "cot.jsonl") and not lines(tmp_path / "cot.failed.jsonl")


def test_a_parameter_that_the_model_does_not_take_is_the_users(tmp_path):
    """It is not dropped by itself; --request drops it, and is a setting of the run."""
    posts, refusal = write_posts(tmp_path, 8), error(400, "Unsupported: 'max_tokens'")

    def reply(request, tries):
        return refusal if "max_tokens" in request else right(request)

    with Server(reply) as server:
        with pytest.raises(UserError, match="refused: 400 .*'max_tokens'.* and --request"):
            gen(posts, server, "--workers", 2)
        changed = ["--request", '{"max_tokens": null, "max_completion_tokens": 512}']
        with pytest.raises(UserError, match="was made with another .*--request"):
            gen(posts, server, "--retry-failed", *changed)
        assert gen(posts, server, *changed, out="other.jsonl") == 0
    sent = server.log[-1][0]
    assert "max_tokens" not in sent and sent["max_completion_tokens"] == 512


@pytest.mark.parametrize("wrong", ["[1]", '{"stream": true}', "{"])
def test_requests_that_are_none(wrong, capsys):
    with pytest.raises(SystemExit):
        gen_cot.parse_args(["a.jsonl", "--out", "b.jsonl", "--model", "m", "--request", wrong])
    assert "is not a JSON object without model, messages and stream" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- replies


def test_the_timeout_is_for_the_whole_reply(tmp_path):
    """A server that sends a blank ten times a second for 6 s does not hold the run up."""
    posts, started = write_posts(tmp_path, 2), time.monotonic()
    with Server(lambda request, _: Raw(200, completion(request, right(request)), drip=6)) as server:
        assert gen(posts, server, "--timeout", 1, "--max-retries", 1) == 1
    assert time.monotonic() - started < 5 and len(server.log) == 4
    assert set(reasons(posts).values()) == {"time-out: no reply in 1 s (2 tries)"}


@pytest.mark.parametrize(
    "message, text",
    [
        ({"content": PAIR, "reasoning_content": "why"}, f"<think>why</think>{PAIR}"),
        ({"content": f"<think>a</think>{PAIR}", "reasoning": "why"}, f"<think>a</think>{PAIR}"),
        ({"content": "", "refusal": None}, ""),
        ({"content": ["a", {"text": "b"}, {"type": "image"}]}, "ab"),
        (
            {"content": [{"type": "reasoning", "summary": [{"text": "x"}]}, {"text": "a"}]},
            "<think>x</think>a",
        ),
    ],
)
def test_the_text_of_a_reply(message, text):
    answer = {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert client.read_reply(answer) == client.Reply(text, False, None)


@pytest.mark.parametrize(
    "finish, cut",
    [(finish, False) for finish in (None, "stop", "EOS", "eos_token", "end_turn", "stop_sequence")]
    + [(finish, True) for finish in ("Length", "max_tokens", "model_length")]
    + [("model_context_window_exceeded", True)],
)
def test_how_a_reply_ends(finish, cut):
    answer = {"choices": [{"message": {"content": "a"}, "finish_reason": finish}]}
    assert client.read_reply(answer) == client.Reply("a", cut, None)


@pytest.mark.parametrize(
    "usage, tokens, prompt_tokens",
    [
        ({"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28}, 8, 20),
        ({"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 433}, 413, 20),
        ({"prompt_tokens": "20", "completion_tokens": "8"}, 8, 20),
        ({"completion_tokens": {"total": 8}}, None, 0),
        (None, None, 0),
    ],
)
def test_tokens_of_reasoning_count_where_only_the_total_has_them(usage, tokens, prompt_tokens):
    answer = {"choices": [{"message": {"content": "a"}}], "usage": usage}
    assert client.read_reply(answer) == client.Reply("a", False, tokens, prompt_tokens)


@pytest.mark.parametrize(
    "choice, tokens, reason",
    [
        ({"message": {"content": "a"}, "finish_reason": "RECITATION"}, 9, "not finished: .*RECI"),
        ({"finish_reason": "error"}, 9, "not finished: the server says error"),
        ({"finish_reason": "stop"}, 9, "refusal: the reply has no content"),
        ({"message": {"content": ""}}, 0, "refusal: the reply has no content"),
        ({"message": {"content": None, "reasoning": "So"}}, 9, "reasoning only: serve without"),
    ],
)
def test_replies_that_are_no_answer(choice, tokens, reason):
    answer = {"choices": [choice], "usage": {"completion_tokens": tokens}}
    with pytest.raises(client.Failed, match=reason):
        client.read_reply(answer)


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [5]}, [], None])
def test_what_is_no_completion_is_a_fault(answer):
    with pytest.raises(client.Fault, match="malformed reply"):
        client.read_reply(answer)


# ---------------------------------------------------------------------------------------- keys


def test_the_machines_own_token_is_never_sent(tmp_path):
    posts = write_posts(tmp_path, 1)
    for name in ("token", "stored_tokens"):
        (tmp_path / name).write_text("hf_storedtoken")
    tokens = {"HF_TOKEN": "hf_environmenttoken", "HF_HOME": str(tmp_path), "OPENAI_API_KEY": ""}
    with Server() as server:
        code, told = run_process(posts, server.url, **tokens)
    assert code == 0, told
    ((request, headers, _),) = server.log
    assert headers["authorization"] == "Bearer none" and headers["user-agent"] == "dynamic-cot"
    assert "hf_" not in json.dumps([request, headers])


@pytest.mark.parametrize(
    "options, header, variable",
    [
        (["--api-key-env", "OTHER_KEY"], "authorization", "OTHER_KEY"),
        (["--header", "api-key=AZURE_KEY", "--header", "X-Trace=TRACE"], "api-key", "AZURE_KEY"),
    ],
)
def test_a_key_is_sent_and_shown_nowhere(tmp_path, monkeypatch, capsys, options, header, variable):
    """Not where the server repeats it in an error; a model's own words stay as they are."""
    posts, key = write_posts(tmp_path, 5), "sk-proj-0123456789"
    monkeypatch.setenv(variable, f" {key}\n")
    monkeypatch.setenv("TRACE", "a word")
    replies = [error(500, f"at {key}"), error(400, f"bad {key}"), Raw(500, f"no JSON {key}"), None]

    def reply(request, tries):
        return replies[number(request)] if number(request) < 3 else right(request)

    with Server(reply) as server:
        url = server.url.removesuffix("/v1") + "/openai/deployments/x?api-version=2024-06-01"
        assert gen(posts, server, *options, "--base-url", url, "--max-retries", 1) == 1
    for _, sent, _ in server.log:
        sent = {name.lower(): value for name, value in sent.items()}
        assert sent[header].removeprefix("Bearer ") == key
        assert ("authorization" in sent) == (header == "authorization")
        assert sent[":path"] == "/openai/deployments/x/chat/completions?api-version=2024-06-01"
    with (
        Server(lambda *_: error(401, f"Incorrect API key provided: {key}")) as server,
        pytest.raises(UserError) as told,
    ):
        gen(posts, server, *options, "--retry-failed")
    assert "401 Incorrect API key provided: *** (" in str(told.value)
    shown = capsys.readouterr()
    files = [path.read_text(encoding="utf-8") for path in tmp_path.glob("cot*")]
    assert len(files) == 3 and not any(
        key in text for text in [shown.out, shown.err, str(told.value), *files]
    )


def test_the_words_of_a_model_are_never_changed(tmp_path, monkeypatch):
    """Not even where a key is one of them."""
    monkeypatch.setenv("OPENAI_API_KEY", "reasoning")
    posts = write_posts(tmp_path, 1)
    with Server(lambda r, _: right(r).replace("so this sums", "so reasoning sums")) as server:
        assert gen(posts, server) == 0
    assert "so reasoning sums it up" in lines(tmp_path / "cot.jsonl")[0]["cot"]


@pytest.mark.parametrize(
    "option, value, told",
    [
        ("--api-key-env", "OTHER", "no key: the environment variable OTHER is not set"),
        ("--api-key-env", "BROKEN", "BROKEN holds a character that no key has"),
        ("--api-key-env", "sk-0123-4567", "variable that --api-key-env names is not set"),
        ("--header", "api-key", "variable that --header names is not set"),
        ("--header", "api-key=sk0123456789abcdef", "variable that --header names is not set"),
        ("--header", "api-key=AZURE_KEY", "no key: the environment variable AZURE_KEY is not set"),
    ],
)
def test_keys_that_are_none(tmp_path, monkeypatch, option, value, told):
    monkeypatch.setenv("BROKEN", "sk-0123\nX: y")
    with Server() as server, pytest.raises(UserError, match=told) as refused:
        gen(write_posts(tmp_path, 1), server, option, value)
    assert "0123" not in str(refused.value) and not server.log
    assert not (tmp_path / "cot.jsonl.settings.json").exists()


# ------------------------------------------------------------------------------------- network


def test_a_socks_proxy_is_nothing_to_a_local_server_and_one_line_for_another(tmp_path):
    posts = write_posts(tmp_path, 2)
    proxy = {"ALL_PROXY": "socks5://127.0.0.1:9", "all_proxy": "socks5://127.0.0.1:9"}
    with Server() as server:
        code, told = run_process(posts, server.url, **proxy)
    assert code == 0 and len(server.log) == 2, told
    (tmp_path / "cot.jsonl").unlink()
    for scheme in ("socks5", "socks9"):
        proxy = {"ALL_PROXY": f"{scheme}://me:word@127.0.0.1:9", "HTTP_PROXY": ""}
        code, told = run_process(posts, "http://teacher.invalid/v1", **proxy)
        assert code == 1 and len(told.splitlines()) == 1 and "word" not in told, told
        assert told.startswith("error: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or SSL_CERT_FILE: can't")


def test_proxies_of_the_environment_are_used_for_other_hosts(tmp_path):
    posts = write_posts(tmp_path, 2)
    with Server() as server:
        proxy = {"http_proxy": server.url.removesuffix("/v1"), "no_proxy": ""}
        code, told = run_process(posts, "http://teacher.invalid/v1", **proxy)
        assert code == 0, told
        assert server.log[0][1][":path"] == "http://teacher.invalid/v1/chat/completions"
        (tmp_path / "cot.jsonl").unlink()
        proxy["no_proxy"] = "teacher.invalid"
        code, told = run_process(posts, "http://teacher.invalid/v1", **proxy)
    assert code == 1 and len(server.log) == 2 and "no connection" in told, told


def test_a_self_signed_server_on_this_machine(tmp_path):
    posts = write_posts(tmp_path, 2)
    with Server(tls=True) as server:
        code, told = run_process(posts, server.url)
        assert code == 1 and told.rstrip().count("\nerror: ") == 1 and "Traceback" not in told
        assert "CERTIFICATE_VERIFY_FAILED" in told and not server.log
        code, told = run_process(posts, server.url, SSL_CERT_FILE=str(CERTIFICATE))
    assert code == 0 and len(server.log) == 2, told
