"""The client of servers: what is sent where, rate limits, verdicts, replies, keys, networks."""

import email.utils
import json
import threading
import time

import pytest

import gen_cot
from evaluate import UserError
from server import (
    ANSWERS,
    CERTIFICATE,
    FAILING,
    PASSING,
    REASONING,
    Raw,
    Server,
    completion,
    error,
    right,
    text_of,
    write_posts,
)
from support import client
from test_gen_cot import gen, ids, lines, no_keys, number, python  # noqa: F401

PAIR = "<answer>a</answer>"


def reasons(posts):
    """The reason of each failed post, by its number."""
    failed = lines(posts.parent / "cot.failed.jsonl")
    return {int(record["id"].removeprefix("post-")): record["reason"] for record in failed}


def limited(server_log, most, seconds, refusal, reply=right):
    """A reply to at most `most` requests in each window of `seconds`; the others get `refusal`."""
    started, counts, lock = time.monotonic(), {}, threading.Lock()

    def answer(request, tries):
        with lock:
            window = int((time.monotonic() - started) / seconds)
            counts[window] = counts.get(window, 0) + 1
            return reply(request) if counts[window] <= most else refusal

    return answer


# ----------------------------------------------------------------------------------- addresses


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
    assert client.endpoint(base_url) == address


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
        client.endpoint(base_url)
    assert "me:word" not in str(told.value)


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
    assert gen_cot.parse_args(arguments).base_url == client.OPENAI


# --------------------------------------------------------------------------------- rate limits


def test_a_rate_limit_slows_the_run_down_and_does_not_count_as_a_try(tmp_path, capsys):
    """60 posts at 20 a second, no Retry-After, no further tries: nothing is lost, little wasted."""
    posts = write_posts(tmp_path, 60)
    with Server(limited(None, 20, 1, error(429, "20 requests a minute"))) as server:
        assert gen(posts, server, "--max-retries", 0, "--workers", 16, wait=0.05) == 0
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))
    assert len(server.log) < 60 + 60
    told = capsys.readouterr().err
    assert told.count("rate limit: 429 20 requests a minute; the run slows down") == 1


def test_retry_after_is_a_number_or_a_date():
    now = time.time()
    assert client.retry_after({}) is None and client.retry_after({"retry-after": "soon"}) is None
    assert client.retry_after({"retry-after": "2.5"}) == 2.5
    date = email.utils.formatdate(now + 30, usegmt=True)
    for text in (date, date.removesuffix(" GMT")):  # without a zone it is UTC
        assert 28 < client.retry_after({"retry-after": text}) <= 30
    past = email.utils.formatdate(now - 30, usegmt=True)
    assert client.retry_after({"retry-after": past}) == 0


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


def test_a_rate_limit_that_never_ends_does(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "PATIENCE", 0.5)
    posts = write_posts(tmp_path, 20)
    with (
        Server(lambda *_: error(429, "no")) as server,
        pytest.raises(UserError, match=r"rate limit: 429 no \(for 0 minutes\); when this is fixed"),
    ):
        gen(posts, server)


# ------------------------------------------------------------------------------------ verdicts


def test_a_run_of_which_the_first_posts_are_all_refused_stops_after_a_handful(tmp_path):
    posts = write_posts(tmp_path, 300)
    with (
        Server(lambda *_: error(400, "no such field: messages")) as server,
        pytest.raises(UserError, match="no reply for [5-9] posts in a row, the last: refused: 400"),
    ):
        gen(posts, server, "--workers", 4)
    assert len(server.log) <= 9 and 4 <= len(reasons(posts)) <= 8


def test_refusals_after_replies_of_an_earlier_run_do_not_stop_the_run(tmp_path):
    posts = write_posts(tmp_path, 60)
    with Server() as server:
        assert gen(posts, server, "--limit", 10) == 0
    with Server(
        lambda request, _: error(422, "odd") if number(request) < 50 else right(request)
    ) as server:
        assert gen(posts, server) == 1
    assert set(reasons(posts)) == set(range(10, 50))


@pytest.mark.parametrize("name", FAILING)
def test_what_concerns_one_post_alone_is_not_asked_again(tmp_path, name):
    posts = write_posts(tmp_path, 8)
    answer, reason = FAILING[name]
    with Server(
        lambda request, _: answer(request) if number(request) == 0 else right(request)
    ) as server:
        assert gen(posts, server, "--workers", 1) == 1
    assert len(server.log) == 8 and len(lines(tmp_path / "cot.jsonl")) == 7
    assert reasons(posts)[0].startswith(reason)


@pytest.mark.parametrize("name", PASSING)
def test_what_is_temporary_is_tried_again(tmp_path, name):
    posts = write_posts(tmp_path, 4)
    answer, _ = PASSING[name]
    with Server(lambda request, tries: right(request) if tries else answer(request)) as server:
        assert gen(posts, server) == 0
    assert len(server.log) == 8


@pytest.mark.parametrize(
    "answer, told",
    [
        (error(401, "Incorrect API key"), "401 Incorrect.*; it wants a key: put it in OPENAI_API"),
        (
            error(404, "No such model"),
            "404 No such.*--base-url, and whether it has a model teacher",
        ),
        (error(429, "Quota", code="insufficient_quota"), "429 Quota; the account needs credit"),
        (error(402, "Insufficient Balance"), "402 Insufficient Balance; the account needs credit"),
        (Raw(307, "", {"Location": "https://elsewhere.example"}), "307 no word why; check --base"),
    ],
    ids="401 404 quota 402 moved".split(),
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
    assert 16 <= len(lines(tmp_path / "cot.jsonl")) <= 20
    assert not lines(tmp_path / "cot.failed.jsonl")


@pytest.mark.parametrize(
    "answer",
    [
        error(500, "broken"),
        Raw(200, "null"),
        Raw(200, "[]"),
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


@pytest.mark.parametrize("name", ["max_tokens", "temperature"])
def test_a_parameter_that_the_model_does_not_take_is_the_users(tmp_path, name):
    """The error says what to add; what is added is a setting of the run."""
    posts, repeated = write_posts(tmp_path, 8), "the temperature dropped"
    refusal = error(400, f"Unsupported parameter: '{name}' is not supported", param=name)

    def reply(request, tries):
        return refusal if name in request else right(request)

    options = ["--temperature", 0.5, "--workers", 2]
    with Server(reply) as server:
        with pytest.raises(UserError, match=rf"refused: 400 .*{name}.*--request '{{") as told:
            gen(posts, server, *options)
        assert repeated not in str(told.value)
        changed = ["--request", f'{{"{name}": null, "max_completion_tokens": 512}}']
        with pytest.raises(UserError, match="made with another request"):
            gen(posts, server, *options, "--retry-failed", *changed)
        assert gen(posts, server, *options, *changed, out="other.jsonl") == 0
    sent = server.log[-1][0]
    assert name not in sent and sent["max_completion_tokens"] == 512
    for wrong in ("[1]", '{"stream": true}'):
        with pytest.raises(SystemExit):
            gen(posts, server, "--request", wrong)


def test_what_a_server_repeats_of_the_request_is_no_verdict(tmp_path):
    """FastAPI's errors hold the request: only the message is looked at and shown."""
    posts = write_posts(tmp_path, 3)

    def reply(request, tries):
        detail = {"msg": "Input should be a string", "input": text_of(request) + " max_tokens"}
        return Raw(422, {"detail": [detail]}) if number(request) == 1 else right(request)

    with Server(reply) as server:
        assert gen(posts, server) == 1
    assert reasons(posts) == {1: "refused: 422 Input should be a string"}
    assert all(request["max_tokens"] == 1024 for request, _, _ in server.log)


# ------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize("name", ANSWERS)
def test_right_replies_in_every_dress(tmp_path, capsys, name):
    posts = write_posts(tmp_path, 3)
    with Server(lambda request, _: ANSWERS[name](request)) as server:
        assert gen(posts, server) == 0
    assert {record["cot"] for record in lines(tmp_path / "cot.jsonl")} == {REASONING}
    counted = "0 tokens sent, 0 received" if "usage null" in name else "300 tokens sent, 60"
    counted = "0 tokens sent, 0" if name == "usage of another kind" else counted
    assert len(server.log) == 3 and counted in capsys.readouterr().err


def test_the_timeout_is_for_the_whole_reply(tmp_path):
    """A server that sends a blank ten times a second for 6 s does not hold the run up."""
    posts, started = write_posts(tmp_path, 2), time.monotonic()
    with Server(lambda request, _: Raw(200, completion(request, right(request)), drip=6)) as server:
        assert gen(posts, server, "--timeout", 1, "--max-retries", 1) == 1
    assert time.monotonic() - started < 5 and len(server.log) == 4
    assert set(reasons(posts).values()) == {"time-out: no reply in 1 s (2 tries)"}


def test_connections_that_the_server_closes_after_each_reply(tmp_path):
    posts = write_posts(tmp_path, 60)
    with Server(lambda r, _: Raw(200, completion(r, right(r)), cut=10**9)) as server:
        assert gen(posts, server) == 0
    assert len(lines(tmp_path / "cot.jsonl")) == 60 and len(server.log) >= 60


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
    [(None, False), ("end_turn", False), ("Length", True), ("model_context_window_full", True)],
)
def test_how_a_reply_ends(finish, cut):
    usage = {"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 433}
    answer = {"choices": [{"message": {"content": "a"}, "finish_reason": finish}], "usage": usage}
    assert client.read_reply(answer) == client.Reply("a", cut, 413, 20)


@pytest.mark.parametrize(
    "choice, usage, reason",
    [
        (
            {"message": {"content": "a"}, "finish_reason": "RECITATION"},
            None,
            "not finished: .*RECI",
        ),
        ({"finish_reason": "stop"}, None, "no message"),
        ({"finish_reason": "error"}, None, "not finished: the server says error"),
        ({"message": {"content": ""}}, {"completion_tokens": 0}, "refusal: the reply has no"),
    ],
)
def test_replies_that_are_no_answer(choice, usage, reason):
    with pytest.raises(client.Failed, match=reason):
        client.read_reply({"choices": [choice], "usage": usage})


@pytest.mark.parametrize("answer", [{}, {"choices": "x"}, {"choices": [5]}, [], None])
def test_what_is_no_completion_is_a_fault(answer):
    with pytest.raises(client.Fault, match="malformed reply"):
        client.read_reply(answer)


# ---------------------------------------------------------------------------------------- keys


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
    assert f"401 Incorrect API key provided: ***; check the key in {variable}" in str(told.value)
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


@pytest.mark.parametrize(
    "header, told",
    [
        ("api-key", "--header: takes the name of an environment variable"),
        ("sk-0123456789abcdef", "--header: takes the name of an environment variable"),
        ("api-key=sk-0123456789abcdef", "--header: takes the name of an environment variable"),
        ("api-key=sk0123456789abcdef", "the environment variable that --header names is not set"),
        ("api key=AZURE_KEY", "--header: takes NAME=VARIABLE"),
        ("api-key=AZURE_KEY", "the environment variable AZURE_KEY is not set"),
        ("api-key=BROKEN", "the environment variable BROKEN holds a space, line break or"),
    ],
)
def test_headers_that_are_none(tmp_path, monkeypatch, header, told):
    monkeypatch.setenv("BROKEN", "a\nb")
    with Server() as server, pytest.raises(UserError, match=told) as refused:
        gen(write_posts(tmp_path, 1), server, "--header", header)
    assert "0123456789abcdef" not in str(refused.value) and not server.log


# ------------------------------------------------------------------------------------- network


def run_process(tmp_path, url, **environment):
    """gen_cot.py as a process on two posts: (exit code, stderr)."""
    arguments = [tmp_path / "posts.jsonl", "--out", "cot.jsonl", "--model", "m", "--base-url", url]
    process = python(*arguments, "--max-retries", 0, cwd=tmp_path, **environment)
    _, told = process.communicate(timeout=60)
    return process.returncode, told


def test_a_socks_proxy_is_nothing_to_a_local_server_and_one_line_for_another(tmp_path):
    write_posts(tmp_path, 2)
    proxy = {"ALL_PROXY": "socks5://127.0.0.1:9", "all_proxy": "socks5://127.0.0.1:9"}
    with Server() as server:
        code, told = run_process(tmp_path, server.url, **proxy)
    assert code == 0 and len(server.log) == 2, told
    (tmp_path / "cot.jsonl").unlink()
    for scheme in ("socks5", "socks9"):
        proxy = {"ALL_PROXY": f"{scheme}://me:word@127.0.0.1:9", "HTTP_PROXY": ""}
        code, told = run_process(tmp_path, "http://teacher.invalid/v1", **proxy)
        assert code == 1 and len(told.splitlines()) == 1 and "word" not in told, told
        assert told.startswith("error: the proxy or the certificates of the environment")


def test_proxies_of_the_environment_are_used_for_other_hosts(tmp_path):
    write_posts(tmp_path, 2)
    with Server() as server:
        proxy = {"http_proxy": server.url.removesuffix("/v1"), "no_proxy": ""}
        code, told = run_process(tmp_path, "http://teacher.invalid/v1", **proxy)
        assert code == 0, told
        assert server.log[0][1][":path"] == "http://teacher.invalid/v1/chat/completions"
        (tmp_path / "cot.jsonl").unlink()
        proxy["no_proxy"] = "teacher.invalid"
        code, told = run_process(tmp_path, "http://teacher.invalid/v1", **proxy)
    assert code == 1 and len(server.log) == 2 and "no connection" in told, told


def test_a_self_signed_server_on_this_machine(tmp_path):
    write_posts(tmp_path, 2)
    with Server(tls=True) as server:
        code, told = run_process(tmp_path, server.url)
        assert code == 1 and told.rstrip().count("\nerror: ") == 1 and "Traceback" not in told
        assert "CERTIFICATE_VERIFY_FAILED" in told and "in SSL_CERT_FILE" in told
        assert "is the server running" not in told and not server.log
        code, told = run_process(tmp_path, server.url, SSL_CERT_FILE=str(CERTIFICATE))
    assert code == 0 and len(server.log) == 2, told
