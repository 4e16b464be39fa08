"""The client of servers: rate limits, verdicts, parameters, bodies, keys and networks."""

import re
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
    write_posts,
)
from support import chat, client, connection
from test_gen_cot import gen, ids, lines, no_keys, number, python  # noqa: F401

PAIR = "<answer>a</answer>"


def reasons(posts):
    """The reason of each failed post, by its number."""
    failed = lines(posts.parent / "cot.failed.jsonl")
    return {int(record["id"].removeprefix("post-")): record["reason"] for record in failed}


# ------------------------------------------------------------------------------------ rate limits


def limited(server_log, most, seconds, refusal, reply=right):
    """A reply to at most `most` requests in each window of `seconds`; the others get `refusal`."""
    started, counts, lock = time.monotonic(), {}, threading.Lock()

    def answer(request, tries):
        with lock:
            window = int((time.monotonic() - started) / seconds)
            counts[window] = counts.get(window, 0) + 1
            return reply(request) if counts[window] <= most else refusal

    return answer


def test_a_rate_limit_slows_the_run_down_and_does_not_count_as_a_try(tmp_path, capsys):
    """60 posts at 20 a second, no Retry-After, no further tries: nothing is lost, little wasted."""
    posts = write_posts(tmp_path, 60)
    with Server(limited(None, 20, 1, error(429, "20 requests a minute"))) as server:
        assert gen(posts, server, "--max-retries", 0, "--workers", 16, wait=0.05) == 0
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))
    assert len(server.log) < 60 + 60
    told = capsys.readouterr().err
    assert told.count("rate limit: 429 20 requests a minute; the run slows down") == 1


def test_retry_after_in_milliseconds_and_under_a_gateways_own_name():
    headers = {"retry-after-ms": "250", "retry-after": "1"}
    assert chat.retry_after(headers) == 0.25
    assert chat.retry_after({"llm_provider-retry-after": "7", "x-ratelimit-limit": "3"}) == 7
    assert chat.retry_after({"x-ms-retry-after-ms": "1500"}) == 1.5
    assert chat.retry_after({"retry-after": "soon", "gateway-retry-after": "2"}) == 2
    assert chat.retry_after({"retry-after": "-1", "x-retry-after-x": "2"}) is None


@pytest.mark.parametrize(
    "headers", [{"Retry-After-Ms": "800"}, {"LLM_Provider-Retry-After": "0.8"}], ids=str
)
def test_a_rate_limit_holds_all_requests_back_for_as_long_as_it_says(tmp_path, headers):
    posts, refused = write_posts(tmp_path, 30), []

    def reply(request, tries):
        if len(server.log) > 10 and not refused:
            refused.append(time.time())
            return error(429, "slow", headers)
        return right(request)

    with Server(reply) as server:
        assert gen(posts, server, "--workers", 2) == 0
    waits = sorted(when - refused[0] for _, _, when in server.log)
    assert sum(0 < wait < 0.75 for wait in waits) <= 1  # the other worker's, under way already
    assert sum(wait >= 0.75 for wait in waits) > 15


def test_a_rate_limit_that_never_ends_does(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "PATIENCE", 0.5)
    posts = write_posts(tmp_path, 20)
    with Server(
        lambda request, _: error(429, "no") if number(request) == 3 else right(request)
    ) as server:
        assert gen(posts, server) == 1
    assert reasons(posts) == {3: "rate limit: 429 no (for 0 minutes)"}
    with (
        Server(lambda *_: error(429, "no")) as server,
        pytest.raises(UserError, match=r"rate limit: 429 no \(for 0 minutes\); mend this and run"),
    ):
        gen(posts, server, "--retry-failed")


# --------------------------------------------------------------------------------------- verdicts


def test_a_run_of_which_the_first_posts_are_all_refused_stops_after_a_handful(tmp_path):
    posts = write_posts(tmp_path, 300)
    with (
        Server(lambda *_: error(400, "no such field: messages")) as server,
        pytest.raises(UserError, match="no reply for [5-9] posts in a row, the last: refused: 400"),
    ):
        gen(posts, server, "--workers", 4)
    assert len(server.log) <= 9 and 4 <= len(reasons(posts)) <= 8


def test_refusals_that_come_faster_than_replies_do_not_stop_the_run(tmp_path):
    posts = write_posts(tmp_path, 60)

    def reply(request, tries):
        if number(request) < 12:
            return error(400, "image too odd")
        time.sleep(0.5)
        return right(request)

    with Server(reply) as server:
        assert gen(posts, server) == 1
    assert set(reasons(posts)) == set(range(12)) and len(lines(tmp_path / "cot.jsonl")) == 48


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
    "answer",
    [
        Raw(400, [{"error": {"code": 400, "message": "API key not valid."}}]),
        error(401, "Incorrect API key provided"),
        Raw(200, {"error": {"code": 401, "message": "User not found."}}),
        Raw(200, {"base_resp": {"status_code": 2049, "status_msg": "invalid api key"}}),
    ],
)
def test_a_wrong_key_is_told_with_the_name_of_its_variable(tmp_path, monkeypatch, answer):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    posts = write_posts(tmp_path, 50)
    with (
        Server(lambda *_: answer) as server,
        pytest.raises(UserError, match="; check the key in OPENAI_API_KEY$"),
    ):
        gen(posts, server)
    assert len(server.log) <= 16 and not reasons(posts)


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


# ------------------------------------------------------------------------------------- parameters

USE_OTHER = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead."
)
ONLY_ONE = "Unsupported value: 'temperature' does not support 0.5 with this model. Only 1 is."
LITELLM = "litellm.UnsupportedParamsError: x does not support parameters: ['temperature']"
FORBIDDEN = [{"type": "extra_forbidden", "loc": ["body", "max_tokens"], "msg": "Extra inputs"}]


@pytest.mark.parametrize(
    "refusals, sent",
    [
        (
            {"max_tokens": error(400, USE_OTHER, param="max_tokens", code="unsupported_parameter")},
            {"max_completion_tokens": 1024, "temperature": 0.5},
        ),
        (
            {
                "max_tokens": error(400, USE_OTHER, param="max_tokens"),
                "temperature": error(400, ONLY_ONE, param="temperature", code="unsupported_value"),
            },
            {"max_completion_tokens": 1024},
        ),
        ({"temperature": error(400, LITELLM, param="None")}, {"max_tokens": 1024}),
        (
            {
                "max_tokens": Raw(422, {"detail": FORBIDDEN}),
                "max_completion_tokens": error(400, "Unknown parameter: max_completion_tokens"),
            },
            {"temperature": 0.5},
        ),
        (
            {"temperature": error(400, "invalid temperature: only 1 is allowed for this model")},
            {"max_tokens": 1024},
        ),
    ],
    ids=["max_tokens", "both", "litellm", "no limit at all", "temperature"],
)
def test_a_parameter_that_the_model_does_not_take(tmp_path, capsys, refusals, sent):
    """Learned from the first refusals, said once; nothing is lost and no try is used up."""
    posts = write_posts(tmp_path, 60)

    def reply(request, tries):
        return next((refusals[name] for name in refusals if name in request), right(request))

    with Server(reply) as server:
        assert gen(posts, server, "--temperature", 0.5, "--max-retries", 0, "--workers", 4) == 0
    assert len(lines(tmp_path / "cot.jsonl")) == 60
    assert len(server.log) <= 60 + 4 * len(refusals)
    last = {key: value for key, value in server.log[-1][0].items() if key[0] in "mt"}
    assert last == {"model": "teacher", "messages": last["messages"]} | sent
    told = capsys.readouterr().err
    for name in refusals:
        assert told.count(f"the model does not take {name}; ") == 1


@pytest.mark.parametrize(
    "message",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 1024. This model's maximum context "
        "length is 512 tokens and your request has 100 input tokens (1024 > 512 - 100).",
        "max_tokens is too large: 100000. This model supports at most 16384 completion tokens",
        "Image input is not supported",
    ],
)
def test_other_refusals_teach_nothing(tmp_path, message):
    posts = write_posts(tmp_path, 20)
    with Server(lambda *_: error(400, message)) as server, pytest.raises(UserError) as told:
        gen(posts, server, "--workers", 1)
    assert "5 posts in a row" in str(told.value) and message in str(told.value)
    assert all(request["max_tokens"] == 1024 for request, _, _ in server.log)


# ----------------------------------------------------------------------------------------- bodies


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
    """A server that sends a blank ten times a second for 18 s does not hold the run up."""
    posts, started = write_posts(tmp_path, 2), time.monotonic()
    with Server(
        lambda request, _: Raw(200, completion(request, right(request)), drip=18)
    ) as server:
        assert gen(posts, server, "--timeout", 1, "--max-retries", 1) == 1
    assert time.monotonic() - started < 8 and len(server.log) == 4
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
        ({"content": PAIR, "reasoning": None, "thinking": "why"}, f"<think>why</think>{PAIR}"),
        ({"content": f"<think>a</think>{PAIR}", "reasoning": "why"}, f"<think>a</think>{PAIR}"),
        ({"content": None, "reasoning": "a; b"}, "a; b"),
        ({"content": "", "refusal": None}, ""),
        ({"content": ["a", {"text": "b"}, {"type": "image"}]}, "ab"),
        (
            {"content": "a", "reasoning_details": [{"summary": "x"}, {"data": "y"}]},
            "<think>x</think>a",
        ),
    ],
)
def test_the_text_of_a_reply(message, text):
    answer = {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert chat.read_reply(answer) == chat.Reply(text, "stop", None)


@pytest.mark.parametrize("answer", [{}, {"choices": [{}]}, {"choices": "x"}, {"choices": [5]}])
def test_what_is_no_completion_is_a_fault(answer):
    with pytest.raises(chat.Fault, match="malformed reply"):
        chat.read_reply(answer)


@pytest.mark.parametrize(
    "answer", ["data: {flagged, invalid api key", {"message": {"content": "model not found"}}, None]
)
def test_the_models_own_words_are_no_verdict(answer):
    """Those of a torn completion, or of one in another form, that speak of errors."""
    with pytest.raises(chat.Fault, match="malformed reply"):
        chat.judge(200, answer, {}, "m", None)


# ------------------------------------------------------------------------------------------- keys


def test_a_header_takes_its_value_from_the_environment_and_is_never_shown(
    tmp_path, monkeypatch, capsys
):
    """Azure's form: a deployment's address with its api-version, and no bearer beside the key."""
    posts, key = write_posts(tmp_path, 4), "0123456789abcdef0123"
    monkeypatch.setenv("AZURE_KEY", key)
    monkeypatch.setenv("TRACE", "a word")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key")
    replies = [error(500, f"key {key}"), error(400, f"bad {key}"), f"I know {key}", None]
    headers = ("--header", "api-key=AZURE_KEY", "--header", "X-Trace=TRACE")
    with Server(lambda request, tries: replies[number(request)] or right(request)) as server:
        url = server.url.removesuffix("/v1") + "/openai/deployments/x?api-version=2024-06-01"
        assert gen(posts, server, *headers, "--base-url", url, "--max-retries", 1) == 1
    for _, sent, _ in server.log:
        sent = {name.lower(): value for name, value in sent.items()}
        assert (sent["api-key"], sent["x-trace"]) == (key, "a word") and "authorization" not in sent
        assert sent[":path"] == "/openai/deployments/x/chat/completions?api-version=2024-06-01"
    with Server(lambda *_: error(401, f"wrong: {key}")) as server, pytest.raises(UserError) as told:
        gen(posts, server, *headers, "--retry-failed")
    assert "401 wrong: ***; check the key in AZURE_KEY" in str(told.value)
    shown = capsys.readouterr()
    files = [path.read_text(encoding="utf-8") for path in tmp_path.glob("cot*")]
    assert len(files) == 3 and not any(
        key in text for text in [shown.out, shown.err, str(told.value), *files]
    )


def test_another_header_is_sent_beside_the_bearer(tmp_path, monkeypatch):
    posts = write_posts(tmp_path, 1)
    monkeypatch.setenv("TRACE", "x-1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-key")
    with Server() as server:
        assert gen(posts, server, "--header", "x-trace=TRACE") == 0
    ((_, headers, _),) = server.log
    assert (headers["x-trace"], headers["authorization"]) == ("x-1", "Bearer sk-a-key")


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


def test_a_key_that_a_server_escapes_is_hidden_too():
    body = b'{"error": {"message": "key ab\\/cd\\u0065fgh and ab/cdefgh"}}'
    hidden = chat.parse_body(body, ["ab/cdefgh"])
    assert hidden == {"error": {"message": "key *** and ***"}}


# ---------------------------------------------------------------------------------------- network


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
        assert told.startswith("error: the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY can't be")


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


def test_a_missing_certificate_file_is_named(tmp_path):
    write_posts(tmp_path, 2)
    code, told = run_process(tmp_path, "https://127.0.0.1:9/v1", SSL_CERT_FILE="/no/such.pem")
    assert code == 1 and len(told.splitlines()) == 1
    assert re.match(
        r"error: /no/such.pem: can't be read as certificates \(.*No such file.*\); correct the "
        "environment variable SSL_CERT_FILE",
        told,
    )
    (tmp_path / "broken.pem").write_text("no certificate")
    code, told = run_process(tmp_path, "https://127.0.0.1:9/v1", SSL_CERT_FILE="broken.pem")
    assert told.startswith("error: broken.pem: can't be read as certificates")
    with Server() as server:  # without TLS nobody reads it
        assert run_process(tmp_path, server.url, SSL_CERT_FILE="/no/such.pem")[0] == 0


def test_a_self_signed_server_on_this_machine(tmp_path):
    write_posts(tmp_path, 2)
    with Server(tls=True) as server:
        code, told = run_process(tmp_path, server.url)
        assert code == 1 and told.rstrip().count("\nerror: ") == 1 and "Traceback" not in told
        assert "CERTIFICATE_VERIFY_FAILED" in told and "in SSL_CERT_FILE" in told
        assert "is the server running" not in told and not server.log
        code, told = run_process(tmp_path, server.url, SSL_CERT_FILE=str(CERTIFICATE))
    assert code == 0 and len(server.log) == 2, told


@pytest.mark.parametrize("tls, mend", [(True, "write https://"), (False, "write http://")])
def test_the_wrong_scheme(tmp_path, tls, mend):
    write_posts(tmp_path, 2)
    with Server(tls=tls) as server:
        scheme, _, rest = server.url.partition("://")
        code, told = run_process(tmp_path, ("http" if tls else "https") + f"://{rest}")
    assert code == 1 and f"{mend} in --base-url" in told and "Traceback" not in told, told


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
    assert gen_cot.parse_args(arguments).base_url == connection.OPENAI
