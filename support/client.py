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

from evaluate import UserError, non_negative_int, one_line, plural, shown
from support.console import first_line, info, positive_int, reading

try:
    import httpx2 as httpx  # the name under which huggingface_hub 2 brings it
except ImportError:
    import httpx

KEY = "OPENAI_API_KEY"
LOCAL = ("localhost", "127.0.0.1", "0.0.0.0", "::1")
KEY_HEADERS = {"authorization", "api-key", "x-api-key", "x-goog-api-key"}  # instead of a bearer
CONNECT_TIMEOUT = 20  # seconds
LONGEST_WAIT = 60  # seconds between two tries, where the server asks for nothing else
LONGEST_RETRY_AFTER = 600  # seconds
GRACE = 5  # seconds for the replies under way when a run is stopped
GIVE_UP_AFTER = 100  # posts in a row without a reply

# --------------------------------------------------------------------- addresses, keys, parameters


def add_server_options(parser):
    """Add the options of a `Client`."""
    add = parser.add_argument
    key_help = "environment variable with the server's key; without OPENAI_API_KEY, 'none' is sent"
    add("--api-key-env", metavar="NAME", default=KEY, help=key_help)
    header_help = "header with the value of a variable; api-key=AZURE_KEY replaces --api-key-env"
    add("--header", metavar="NAME=VARIABLE", action="append", help=header_help)
    request_help = "fields to add to every request, null to leave one out; for instance "
    request_help += """'{"max_tokens": null, "max_completion_tokens": 512}'"""
    add("--request", metavar="JSON", type=json_object, help=request_help)
    timeout_help = "seconds to wait for a whole reply"
    add("--timeout", type=positive_int, default=180, help=timeout_help)
    retries_help = "further tries after a fault, or a reply not accepted; a rate limit is no try"
    add("--max-retries", type=non_negative_int, default=5, help=retries_help)


def json_object(text):
    """argparse type: a JSON object of a request's fields that are not the run's own."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict) and value.keys().isdisjoint(("model", "messages", "stream")):
            return value
    needed = "a JSON object without model, messages and stream"
    raise argparse.ArgumentTypeError(f"{shown(text)} is not {needed}")


def endpoint(base_url):
    """The address that requests go to, by the rule of OpenAI's own client. Raises UserError."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    usable = url.scheme in ("http", "https") and (url.port or 0) < 2**16
    if not usable or not url.host or url.userinfo:  # it may hold a key, so it is not shown
        raise UserError(
            "--base-url: takes an address like http://localhost:8000/v1, without a name and a "
            "password; keys come from the environment"
        )
    path = url.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return str(url.copy_with(path=path, fragment=None))


def credentials(options):
    """The headers with the keys. Raises UserError."""
    headers = {}
    for pair in options.header or ():
        name, _, variable = pair.partition("=")
        headers[name.lower()] = secret(variable, "--header")
    if KEY_HEADERS.isdisjoint(headers):
        key = secret(options.api_key_env, "--api-key-env", optional=options.api_key_env == KEY)
        headers["authorization"] = f"Bearer {key or 'none'}"
    return headers


def secret(variable, option, optional=False):
    """The value of an environment variable. Raises UserError.

    No message shows the value, nor what might be a key itself, given in place of a variable.
    """
    name = variable if re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable) else f"that {option} names"
    value = os.environ.get(variable, "").strip()
    if not value and not optional:
        raise UserError(f"no key: the environment variable {name} is not set")
    if not (value.isascii() and value.isprintable()):  # the HTTP library's complaint would show it
        raise UserError(f"the environment variable {name} holds a character that no key has")
    return value


# ------------------------------------------------------------------------------------ the protocol


class Failed(Exception):
    """One post has no answer. The text is the reason, its kind first: `too long: 900 words`."""

    def __init__(self, reason, reply=None):
        super().__init__(reason)
        self.reply = reply


class Fault(Exception):
    """A request is worth another try, after `wait` seconds where the server asks for that."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class RateLimit(Fault):
    """The server takes no more requests for now."""


class Reply(NamedTuple):
    text: str  # reasoning that the server split off is put back into its tags
    cut: bool  # whether the model ran out of tokens
    tokens: int | None  # generated tokens, None where the server does not say
    prompt_tokens: int = 0


# Values of `finish_reason`, in any case.
WHOLE = re.compile("stop|eos|eos_token|end_turn|stop_sequence", re.IGNORECASE)
CUT = re.compile("length|max_tokens|model_length|.*context_window.*", re.IGNORECASE)
# Where the text of a message's part and of an error stands; some errors repeat the request, too.
PART, ERROR = ("text", "thinking", "summary"), ("error", "message", "msg", "detail")


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
        finish, message = choice.get("finish_reason") or "stop", choice.get("message") or {}
        text, reasoning = split_content(message)
    except (TypeError, LookupError, AttributeError):
        raise Fault("malformed reply: not the JSON of a chat completion") from None
    cut = bool(CUT.fullmatch(str(finish)))
    if not cut and not WHOLE.fullmatch(str(finish)):
        raise Failed(f"not finished: the server says {one_line(finish)}", text or None)
    usage = answer.get("usage")
    sent, total = as_int(usage, "prompt_tokens"), as_int(usage, "total_tokens")
    tokens = as_int(usage, "completion_tokens")
    if sent is not None and total is not None:  # some count reasoning in the total only
        tokens = max(tokens or 0, total - sent)
    if not text and reasoning:
        raise Failed("reasoning only: serve without a reasoning parser, or more --max-new-tokens")
    if not text and (message.get("content") is None or tokens == 0):
        raise Failed(f"refusal: {one_line(message.get('refusal') or 'the reply has no content')}")
    if reasoning and "</think>" not in text:
        text = f"<think>{reasoning.strip()}</think>{text}"
    return Reply(text, cut, tokens, sent or 0)


def split_content(message):
    """(answer, reasoning) of a message; of content in parts, what is no text is reasoning."""
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part for part in parts if isinstance(part, str) or part.get("type", "text") == "text"]
    others = [part for part in parts if part not in texts]
    beside = message.get("reasoning_content") or message.get("reasoning")
    return text_in(texts, PART), text_in(others, PART) or text_in(beside, PART)


def text_in(value, names):
    """All text in a value of JSON; of an object, that of the first of `names` that holds any."""
    if isinstance(value, list):
        return "".join(text_in(item, names) for item in value)
    if isinstance(value, dict):
        return text_in(next(filter(None, map(value.get, names)), None), names)
    return value if isinstance(value, str) else ""


def as_int(fields, name):
    """A number in a JSON object, None where there is none; some servers send it as a string."""
    try:
        return int(fields[name])
    except (TypeError, ValueError, LookupError, OverflowError):
        return None


def retry_after(headers):
    """The seconds that a server asks to wait, None where it does not; a number, or a date."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return min(float(value), LONGEST_RETRY_AFTER)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time()
    return min(max(seconds, 0), LONGEST_RETRY_AFTER)


# -------------------------------------------------------------------------------------- the client


class Client:
    """Sends requests to one server, `workers` at once; what is temporary is tried again.

    `options` is what `add_server_options` parsed. The wait before the second try is at most
    `first_wait` seconds and doubles with each further one. Raises UserError.
    """

    def __init__(self, base_url, options, workers=16, first_wait=2):
        self.url, self.options = endpoint(base_url), options
        self.server = self.url.partition("?")[0]  # what follows `?` may be a key
        self.workers, self.first_wait = workers, first_wait
        headers = credentials(options)
        self.secrets = [w for value in headers.values() for w in value.split() if len(w) > 7]
        with reading("HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or SSL_CERT_FILE", "correct or unset it"):
            self.http = httpx.AsyncClient(
                headers={"user-agent": "dynamic-cot"} | headers,
                verify=httpx.create_ssl_context(),  # with the certificates of SSL_CERT_FILE
                trust_env=httpx.URL(self.url).host not in LOCAL,  # proxies
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),
                limits=httpx.Limits(max_keepalive_connections=workers, keepalive_expiry=4),
            )
        self.stop, self.gate = asyncio.Event(), asyncio.Lock()
        self.interval = self.next_start = self.slowed_at = 0  # seconds, see `turn`
        self.requests = self.prompt_tokens = self.reply_tokens = 0
        self.reached = False  # whether the server has ever sent anything
        self.answered = False  # whether it has ever answered a request with a completion
        self.unanswered = 0  # posts in a row
        self.told, self.started = set(), time.monotonic()

    def each(self, work, items):
        """Yield the results of `work(item)`, a coroutine, as they come.

        After Ctrl-C no item is begun; what comes in the next seconds is still yielded, then
        KeyboardInterrupt is raised, at once after a second Ctrl-C. An error of `work` ends the
        run in the same way. A client serves one call; close the generator if it is left early.
        """
        source, pending, results, problems = iter(items), set(), [], []

        async def run(item):
            try:
                results.append(await work(item))
            except Exception as error:
                problems.append(error)
                self.stop.set()

        def interrupted():
            if self.stop.is_set():
                raise KeyboardInterrupt
            problems.append(KeyboardInterrupt())
            self.stop.set()
            info(f"stopping; up to {GRACE} s for the replies under way (Ctrl-C again: at once)")

        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as shells' background jobs
                with contextlib.suppress(NotImplementedError):  # Windows
                    loop.add_signal_handler(signal.SIGINT, interrupted)
            try:
                while not self.stop.is_set():
                    begun = islice(source, self.workers - len(pending))
                    pending.update(loop.create_task(run(item)) for item in begun)
                    if not pending:
                        break
                    wait = asyncio.wait(pending, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
                    _, pending = runner.run(wait)
                    yield from results
                    results.clear()
                if pending:
                    runner.run(asyncio.wait(pending, timeout=GRACE))
                yield from results
            finally:
                for task in pending:
                    task.cancel()
                runner.run(self.http.aclose())
        if problems:
            raise problems[0]

    async def ask(self, request):
        """The Reply to a request (see `chat_request`).

        Raises Failed where this post has no answer, UserError where no post has one.
        """
        tries = 0
        while True:
            start = await self.turn()
            try:
                return await self.once(request)
            except RateLimit as limit:
                self.tell(limit, "the run slows down until it is let through")
                now = time.monotonic()
                if start > self.slowed_at:  # those begun before the last one say nothing new
                    self.slowed_at = now
                    self.interval = min(LONGEST_WAIT, max(self.first_wait, 2 * self.interval))
                self.next_start = max(self.next_start, now + (limit.wait or self.interval))
            except Fault as fault:
                tries += 1
                if tries > self.options.max_retries:
                    self.give_up(f"{fault} ({tries} {'try' if tries == 1 else 'tries'})")
                self.tell(fault, "trying again")
                wait = random.uniform(0, min(LONGEST_WAIT, self.first_wait * 2 ** (tries - 1)))
                await self.sleep((fault.wait or 0) + wait)  # not all at the same moment

    async def turn(self):
        """Wait until the next request may start, and return that time.

        A rate limit doubles the interval between two starts; a request let through halves it.
        """
        async with self.gate:
            while (wait := self.next_start - time.monotonic()) > 0 or self.stop.is_set():
                await self.sleep(min(wait, 0.1))
            start = time.monotonic()
            self.next_start = start + self.interval
            return start

    async def sleep(self, seconds):
        """Wait; the task ends here when the run is stopped."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)
        if self.stop.is_set():
            raise asyncio.CancelledError

    async def once(self, request):
        """One request and its Reply. Raises Fault, Failed, UserError."""
        self.requests += 1
        try:
            async with asyncio.timeout(self.options.timeout):
                response = await self.http.post(self.url, json=request)
        except httpx.HTTPError as error:
            raise Fault(f"no connection: {first_line(error)}") from None
        except TimeoutError:
            self.reached = True
            raise Fault(f"time-out: no reply in {self.options.timeout} s") from None
        self.reached, status = True, response.status_code
        answer = response.text
        with contextlib.suppress(ValueError, RecursionError):
            answer = response.json()
        if status != 429:
            self.interval = self.interval / 2 if self.interval > 0.02 else 0
        if status >= 300 or isinstance(answer, dict) and answer.get("error"):
            self.judge(status, answer, response.headers)
        reply = read_reply(answer)
        self.answered, self.unanswered = True, 0
        self.prompt_tokens += reply.prompt_tokens
        self.reply_tokens += reply.tokens or 0
        return reply

    def judge(self, status, answer, headers):
        """Raise what an error means: Fault, RateLimit, Failed; UserError where all meet it."""
        said = text_in(answer, ERROR).strip() or "no word why"
        for key in self.secrets:
            said = said.replace(key, "***")
        reason = one_line(f"{status} {said}")[:300]
        error = answer.get("error") if isinstance(answer, dict) else None
        no_credit = isinstance(error, dict) and error.get("code") == "insufficient_quota"
        if status == 429 and not no_credit:
            raise RateLimit(f"rate limit: {reason}", retry_after(headers))
        if status < 300 or status >= 500 or status in (408, 409, 425):
            raise Fault(f"server error: {reason}", retry_after(headers))
        if status in (401, 402, 404, 407, 429) or status < 400:
            self.give_up(reason, at_once=True)
        self.give_up(f"refused: {reason}")

    def give_up(self, reason, at_once=False):
        """Raise Failed for one post, or UserError where the server seems to answer none."""
        self.unanswered += 1
        most = GIVE_UP_AFTER if self.answered else max(5, self.workers)
        if self.reached and self.unanswered < most and not at_once:
            raise Failed(reason)
        raise UserError(
            f"{self.server}: {reason} (no reply for {plural(self.unanswered, 'post')} in a row); "
            f"check the server, --base-url, --model, the key ({KEY} or --api-key-env), the "
            "account's credit and --request, then run this again (gen_cot.py: with --retry-failed)"
        )

    def rate(self):
        """Requests a second so far."""
        return self.requests / (time.monotonic() - self.started)

    def tell(self, fault, what):
        """Show the first fault of each kind."""
        kind = str(fault).partition(":")[0]
        if kind not in self.told:
            self.told.add(kind)
            info(f"{fault}; {what} (further ones of this kind are not shown)")
