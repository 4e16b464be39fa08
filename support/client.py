"""A client for servers that speak OpenAI's chat-completions protocol.

It waits, tries again and slows down where that helps; where it does not, one line says what to
do. Keys come from the environment alone. They are never shown or written.
"""

import argparse
import asyncio
import contextlib
import email.utils
import json
import os
import random
import re
import signal
import time
from datetime import UTC
from itertools import islice
from typing import NamedTuple
from urllib.parse import urlsplit

from evaluate import UserError, non_negative_int, plural, shown
from support.console import first_line, info, positive_int

try:
    import httpx2 as httpx  # the name under which huggingface_hub 2 brings it
except ImportError:
    import httpx

OPENAI, KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"
LOCAL = ("localhost", "127.0.0.1", "0.0.0.0", "::1")
KEY_HEADERS = {"authorization", "api-key", "x-api-key", "x-goog-api-key"}  # instead of a bearer
CONNECT_TIMEOUT = 20  # seconds
LONGEST_WAIT = 60  # seconds between two tries, where the server asks for nothing else
LONGEST_RETRY_AFTER = 600  # seconds
PATIENCE = 3600  # seconds in which one request may meet nothing but rate limits
GRACE = 5  # seconds for the replies under way when a run is stopped
GIVE_UP_AFTER = 100  # posts in a row without a reply

# --------------------------------------------------------------------- addresses, keys, parameters


def add_server_options(parser):
    """Add the options of a `Client`."""
    add = parser.add_argument
    key_help = "environment variable with the server's key; where it is not set, 'none' is sent"
    add("--api-key-env", metavar="NAME", default=KEY, help=key_help)
    header_help = (
        "send another header, with the value of an environment variable; for instance "
        "api-key=AZURE_KEY, which then takes the place of --api-key-env"
    )
    add("--header", metavar="NAME=VARIABLE", action="append", help=header_help)
    request_help = (
        "fields to add to every request, null to leave one out; for instance "
        """'{"max_tokens": null, "max_completion_tokens": 512}'"""
    )
    add("--request", metavar="JSON", type=json_object, help=request_help)
    timeout_help = "seconds to wait for a whole reply"
    add("--timeout", type=positive_int, default=180, help=timeout_help)
    retries_help = (
        "how often a request is tried again that met a fault, and one whose reply was not "
        "accepted; a rate limit does not count"
    )
    add("--max-retries", type=non_negative_int, default=5, help=retries_help)


def json_object(text):
    """argparse type: a JSON object of a request's fields that are not the run's own."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict) and value.keys().isdisjoint(("model", "messages", "stream")):
            return value
    raise argparse.ArgumentTypeError(
        f"{shown(text)} is no JSON object without model, messages and stream"
    )


def endpoint(base_url):
    """The address that requests go to, by the rule of OpenAI's own client. Raises UserError."""
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = usable and base_url.isprintable() and " " not in base_url and httpx.URL(base_url)
    except (ValueError, httpx.InvalidURL):
        usable = False
    if not usable:
        raise UserError(
            f"--base-url: {without_query(base_url)!r} is no address; one is like "
            "http://localhost:8000/v1"
        )
    if "@" in parts.netloc:
        raise UserError("--base-url: leave out name and password; keys come from the environment")
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


def without_query(url):
    """An address as messages show it: what follows `?` may be a key."""
    return url.partition("?")[0]


def credentials(options, url):
    """(headers with the keys, the variable that holds the key or None). Raises UserError."""
    headers, source = {}, None
    for pair in options.header or ():
        name, _, variable = pair.partition("=")
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
            raise UserError("--header: takes NAME=VARIABLE, a header and an environment variable")
        headers[name.lower()] = secret(variable, "--header", "[ -~]*")
        source = variable if name.lower() in KEY_HEADERS else source
    if source is None:
        openai = urlsplit(url).hostname == urlsplit(OPENAI).hostname
        optional = options.api_key_env == KEY and not openai
        key = secret(options.api_key_env, "--api-key-env", "[!-~]*", optional)
        headers["authorization"] = f"Bearer {key or 'none'}"
        source = options.api_key_env if key else None
    return headers, source


def secret(variable, option, allowed, optional=False):
    """The value of an environment variable. Raises UserError.

    No message shows the value, nor what might be a key itself, given in place of a variable.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
        raise UserError(f"{option}: takes the name of an environment variable that holds the key")
    name = variable if variable.isupper() else f"that {option} names"
    value = os.environ.get(variable, "").strip()
    if not value and not optional:
        raise UserError(f"no key: the environment variable {name} is not set")
    if not re.fullmatch(allowed, value):  # the HTTP library's complaint would show it
        raise UserError(
            f"the environment variable {name} holds a space, line break or letter that no key has"
        )
    return value


def open_http(url, headers, timeout, connections):
    """The HTTP client. Raises UserError where a setting in the environment can't be used."""
    try:
        return httpx.AsyncClient(
            headers={"user-agent": "dynamic-cot"} | headers,
            verify=httpx.create_ssl_context(),  # with the certificates of SSL_CERT_FILE
            trust_env=urlsplit(url).hostname not in LOCAL,  # proxies
            timeout=httpx.Timeout(None, connect=min(CONNECT_TIMEOUT, 0.9 * timeout)),
            limits=httpx.Limits(max_keepalive_connections=connections, keepalive_expiry=4),
        )
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise UserError(
            "the proxy or the certificates of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, "
            f"SSL_CERT_FILE) can't be used: {first_line(error)}"
        ) from None


# ------------------------------------------------------------------------------------ the protocol


class Failed(Exception):
    """One post has no answer. The text is the reason, its kind first: `too long: 900 words`."""

    def __init__(self, reason, reply=None):
        super().__init__(reason)
        self.kind, self.reply = reason.partition(":")[0], reply


class Refused(Exception):
    """The server refuses a request: for what is in it, or as it refuses all."""


class Fault(Exception):
    """A request is worth another try, after `wait` seconds where the server asks for that."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class RateLimit(Fault):
    """The server takes no more requests for now."""


class Stopped(Exception):
    """The run was stopped before this request had its answer."""


class Reply(NamedTuple):
    text: str  # reasoning that the server split off is put back into its tags
    cut: bool  # whether the model ran out of tokens
    tokens: int | None  # generated tokens, None where the server does not say
    prompt_tokens: int = 0


WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")  # finish_reason
CUT = re.compile("length|max_tokens|model_length|.*context_window.*")
REQUEST_HINT = (
    "change a parameter that the model does not take, or leave it out, with --request, such as "
    """--request '{"max_tokens": null, "max_completion_tokens": 512}'"""
)


def chat_request(args, text, image_url=None, temperature=None):
    """The JSON of a request: one user turn, the image and then the text, and --request's fields."""
    content = text = text.encode("utf-8", "replace").decode()  # no lone surrogates
    if image_url:
        image = {"type": "image_url", "image_url": {"url": image_url}}
        content = [image, {"type": "text", "text": text}]
    request = {
        "model": args.model,
        "messages": [{"role": "user", "content": content}],
        "stream": False,
        "max_tokens": args.max_new_tokens or None,
        "temperature": temperature,
    } | (args.request or {})
    return {name: value for name, value in request.items() if value is not None}


def read_reply(answer):
    """The Reply in a completion's JSON. Raises Fault, Failed."""
    try:
        choice = answer["choices"][0]
        finish, message = choice.get("finish_reason") or "stop", choice.get("message")
    except (TypeError, LookupError, AttributeError):
        raise Fault("malformed reply: not the JSON of a chat completion") from None
    text, reasoning = split_content(message) if isinstance(message, dict) else ("", "")
    cut = bool(CUT.fullmatch(str(finish).lower()))
    if not cut and str(finish).lower() not in WHOLE:
        raise Failed(f"not finished: the server says {short(str(finish))}", text or None)
    if not isinstance(message, dict):
        raise Failed("no message: the reply has none")
    usage = answer.get("usage")
    sent, total = as_int(usage, "prompt_tokens"), as_int(usage, "total_tokens")
    tokens = as_int(usage, "completion_tokens")
    if sent is not None and total is not None:  # some count reasoning in the total only
        tokens = max(tokens or 0, total - sent)
    if not text and reasoning:
        raise Failed(
            "reasoning only: serve without a reasoning parser, or give more --max-new-tokens"
        )
    if not text and (message.get("content") is None or tokens == 0):
        raise Failed(short(f"refusal: {message.get('refusal') or 'the reply has no content'}"))
    if reasoning and "</think>" not in text:
        text = f"<think>{reasoning.strip()}</think>{text}"
    return Reply(text, cut, tokens, sent or 0)


def split_content(message):
    """(answer, reasoning) of a message; of content in parts, what is no text is reasoning."""
    parts, content = {True: [], False: []}, message.get("content")
    for part in content if isinstance(content, list) else [content]:
        is_text = not isinstance(part, dict) or part.get("type", "text") == "text"
        parts[is_text].append(flat(part))
    reasoning = (
        "".join(parts[False]) or message.get("reasoning_content") or message.get("reasoning")
    )
    return "".join(parts[True]), flat(reasoning)


def flat(value):
    """All text in a value of JSON: a string, a part of a message, or a list of these."""
    if isinstance(value, list):
        return "".join(map(flat, value))
    if isinstance(value, dict):
        return flat(value.get("text") or value.get("thinking") or value.get("summary"))
    return value if isinstance(value, str) else ""


def as_int(fields, name):
    """A number in a JSON object, None where there is none; some servers send it as a string."""
    try:
        return int(fields[name])
    except (TypeError, ValueError, LookupError, OverflowError):
        return None


def message_of(answer):
    """What an error says, in the usual places; never the request, which some servers repeat."""
    if isinstance(answer, list):
        return "; ".join(filter(None, map(message_of, answer)))
    if isinstance(answer, dict):
        names = ("error", "message", "msg", "detail")
        return message_of(next(filter(None, map(answer.get, names)), ""))
    return "a web page, perhaps of a proxy" if str(answer).startswith("<") else str(answer)


def short(text):
    """A server's words as one line of at most 300 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def retry_after(headers):
    """The seconds that a server asks to wait, None where it does not; a number, or a date."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    return max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time())


# -------------------------------------------------------------------------------------- the client


class Client:
    """Sends requests to one server, `workers` at once; what is temporary is tried again.

    `options` is what `add_server_options` parsed. The wait before the second try is at most
    `first_wait` seconds and doubles with each further one. Raises UserError.
    """

    def __init__(self, base_url, options, workers=16, first_wait=2):
        self.url, self.options = endpoint(base_url), options
        self.server, self.workers, self.first_wait = without_query(self.url), workers, first_wait
        headers, self.key = credentials(options, self.url)
        self.secrets = [w for value in headers.values() for w in value.split() if len(w) > 7]
        self.http = open_http(self.url, headers, options.timeout, workers)
        self.stop, self.gate = asyncio.Event(), asyncio.Lock()
        self.interval = self.last_start = self.hold_until = 0  # seconds, see `turn`
        self.slowed_at = 0
        self.requests = self.prompt_tokens = self.reply_tokens = 0
        self.reached = False  # whether the server has ever sent anything
        self.answered = False  # whether it has ever answered a request with a completion
        self.refused = 0  # posts
        self.unanswered = 0  # posts in a row
        self.told, self.started = set(), time.monotonic()

    def each(self, work, items):
        """Yield the results of `work(item)`, a coroutine, as they come.

        After Ctrl-C no item is begun; what comes in the next seconds is still yielded, then
        KeyboardInterrupt is raised, at once after a second Ctrl-C. An error of `work` ends the
        run in the same way. A client serves one call; close the generator if it is left early.
        """
        source, pending, problem, deadline = iter(items), set(), None, None
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            self.catch_ctrl_c(loop)
            try:
                while True:
                    if not self.stop.is_set():
                        for item in islice(source, self.workers - len(pending)):
                            pending.add(loop.create_task(work(item)))
                    elif deadline is None:
                        deadline = time.monotonic() + GRACE
                    if not pending or deadline and time.monotonic() > deadline:
                        break
                    wait = asyncio.wait(pending, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
                    done, pending = runner.run(wait)
                    for error in filter(None, [task.exception() for task in done]):
                        if not isinstance(error, Stopped):
                            self.stop.set()
                            problem = problem or error
                    yield from [task.result() for task in done if not task.exception()]
            finally:
                for task in pending:
                    task.cancel()
                runner.run(self.http.aclose())
        if problem:
            raise problem
        if self.stop.is_set():
            raise KeyboardInterrupt

    def catch_ctrl_c(self, loop):
        """Let the first Ctrl-C stop the run, and the second one end it."""

        def interrupted():
            if self.stop.is_set():
                raise KeyboardInterrupt
            self.stop.set()
            info(f"stopping; up to {GRACE} s for the replies under way (Ctrl-C again: at once)")

        # A shell has its background jobs ignore Ctrl-C; only the main thread may ask for signals.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                loop.add_signal_handler(signal.SIGINT, interrupted)

    async def ask(self, request):
        """The Reply to a request (see `chat_request`).

        Raises Failed where this post has no answer, UserError where no post has one, Stopped.
        """
        tries, limited_since = 0, None
        while True:
            start = await self.turn()
            try:
                return await self.once(request)
            except RateLimit as limit:
                self.tell(limit, "the run slows down until it is let through")
                self.slow_down(start, limit.wait)
                limited_since = limited_since or start
                if time.monotonic() - limited_since > PATIENCE:
                    self.give_up(f"{limit} (for {PATIENCE / 60:.0f} minutes)", stop=True)
            except Refused as refused:
                self.refused += 1
                all_refused = not self.answered and self.refused >= max(5, self.workers)
                self.give_up(str(refused), stop=all_refused)
            except Fault as fault:
                tries += 1
                if tries > self.options.max_retries:
                    self.give_up(f"{fault} ({tries} {'try' if tries == 1 else 'tries'})")
                self.tell(fault, "trying again")
                wait = min(LONGEST_WAIT, self.first_wait * 2 ** min(tries - 1, 9))
                wait = random.uniform(0, wait)
                if fault.wait is not None:  # not earlier, and not all at the same moment
                    wait = min(fault.wait, LONGEST_RETRY_AFTER) + min(wait, 1)
                await self.sleep(wait)

    async def turn(self):
        """Wait until the next request may start, and return that time.

        A rate limit doubles the interval between two starts; a request let through halves it.
        """
        async with self.gate:
            while True:
                wait = max(self.hold_until, self.last_start + self.interval) - time.monotonic()
                if wait <= 0 and not self.stop.is_set():
                    self.last_start = time.monotonic()
                    return self.last_start
                await self.sleep(min(max(wait, 0), 0.1))

    def slow_down(self, start, wait):
        """Hold all requests back after a rate limit that met the one started at `start`."""
        now = time.monotonic()
        if start > self.slowed_at:  # those under way since before the last one say nothing new
            self.slowed_at = now
            self.interval = min(LONGEST_WAIT, max(self.first_wait, 2 * self.interval))
        wait = self.interval if wait is None else min(wait, LONGEST_RETRY_AFTER)
        self.hold_until = max(self.hold_until, now + wait)

    async def sleep(self, seconds):
        """Wait. Raises Stopped when the run is stopped."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)
        if self.stop.is_set():
            raise Stopped

    async def once(self, request):
        """One request and its Reply. Raises Fault, Failed, Refused, UserError."""
        response = await self.post(request)
        status = response.status_code
        try:
            answer = json.loads(response.content.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            answer = response.content.decode("utf-8", "replace").strip()
        if status != 429:
            self.interval = self.interval / 2 if self.interval > 0.02 else 0
        if status >= 300 or isinstance(answer, dict) and answer.get("error"):
            self.judge(status, answer, response.headers, request)
        try:
            reply = read_reply(answer)
        except Failed:
            self.unanswered = 0
            raise
        self.answered, self.unanswered = True, 0
        self.prompt_tokens += reply.prompt_tokens
        self.reply_tokens += reply.tokens or 0
        return reply

    def judge(self, status, answer, headers, request):
        """Raise what an error means: Fault, RateLimit, Refused; UserError where all meet it."""
        said = message_of(answer) or "no word why"
        for key in self.secrets:
            said = said.replace(key, "***")
        reason = short(f"{status} {said}")
        hints = {
            401: "it wants a key: put it in OPENAI_API_KEY, or in the variable of --api-key-env",
            402: "the account needs credit",
            429: "the account needs credit",
            404: f"check --base-url, and whether it has a model {request['model']}",
            407: "check the proxy in HTTP_PROXY or HTTPS_PROXY",
        }
        if self.key:
            hints[401] = f"check the key in {self.key}"
        error = answer.get("error") if isinstance(answer, dict) else None
        no_credit = isinstance(error, dict) and error.get("code") == "insufficient_quota"
        if status == 429 and not no_credit:
            raise RateLimit(f"rate limit: {reason}", retry_after(headers))
        if status < 300 or status >= 500 or status in (408, 409, 425):
            raise Fault(f"server error: {reason}", retry_after(headers))
        if status in hints or status < 400:
            raise UserError(f"{self.server}: {reason}; {hints.get(status, 'check --base-url')}")
        names = request.keys() - {"model", "messages", "stream"}
        named = any(re.search(rf"\b{name}\b", said) for name in names)
        raise Refused(f"refused: {reason}" + f"; {REQUEST_HINT}" * named)

    async def post(self, request):
        """The server's response, of any status. Raises Fault, UserError."""
        self.requests += 1
        try:
            async with asyncio.timeout(self.options.timeout):
                response = await self.http.post(self.url, json=request)
        except TimeoutError:
            self.reached = True
            raise Fault(f"time-out: no reply in {self.options.timeout} s") from None
        except httpx.HTTPError as error:
            said = first_line(error)
            if "CERTIFICATE_VERIFY_FAILED" in said:
                hint = "put the file of its certificate, or of its authority's, in SSL_CERT_FILE"
                raise UserError(f"{self.server}: {said}; {hint}") from None
            raise Fault(f"no connection: {said}") from None
        self.reached = True
        return response

    def give_up(self, reason, stop=False):
        """Raise Failed for one post, or UserError where the server seems to answer none."""
        self.unanswered += 1
        if not self.reached:
            hint = "is the server running, and --base-url right?"
            raise UserError(f"{self.server}: {reason}; {hint}")
        if stop or self.unanswered >= GIVE_UP_AFTER:
            raise UserError(
                f"{self.server}: no reply for {plural(self.unanswered, 'post')} in a row, the last:"
                f" {reason}; when this is fixed, run the same command again (gen_cot.py: with "
                "--retry-failed for those posts)"
            )
        raise Failed(reason)

    def rate(self):
        """Requests a second so far."""
        return self.requests / (time.monotonic() - self.started)

    def tell(self, fault, what):
        """Show the first fault of each kind."""
        kind = str(fault).partition(":")[0]
        if kind not in self.told:
            self.told.add(kind)
            info(f"{fault}; {what} (further ones of this kind are not shown)")
