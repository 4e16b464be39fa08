"""A client for servers that speak OpenAI's chat-completions protocol.

It waits, tries again and slows down where that helps; where it does not, one line says what to
do. Keys come from the environment alone. They are never shown or written.
"""

import asyncio
import contextlib
import random
import re
import signal
import time
from itertools import islice

from evaluate import UserError, plural
from support.chat import (
    Failed,
    Fault,
    RateLimit,
    Refused,
    error_status,
    hide,
    judge,
    not_taken,
    parse_body,
    read_reply,
)
from support.connection import credentials, endpoint, httpx, open_http, speaks_https, without_query
from support.console import first_line, info

LONGEST_WAIT = 60  # seconds between two tries, where the server asks for nothing else
LONGEST_RETRY_AFTER = 600  # seconds
PATIENCE = 3600  # seconds in which one request may meet nothing but rate limits
GRACE = 5  # seconds for the replies under way when a run is stopped
GIVE_UP_AFTER = 100  # posts in a row without a reply
GIVE_UP_EARLY = 5  # posts refused before the first reply
OTHER_FORM = {"max_tokens": "max_completion_tokens"}  # of a parameter that a model does not take


class Stopped(Exception):
    """The run was stopped before this request had its answer."""


class Client:
    """Sends requests to one server, `workers` at once; what is temporary is tried again.

    `options` is what `add_server_options` parsed. The wait before the second try is at most
    `first_wait` seconds and doubles with each further one. Raises UserError.
    """

    def __init__(self, base_url, options, workers=16, first_wait=2):
        self.url, self.options = endpoint(base_url), options
        self.server, self.workers, self.first_wait = without_query(self.url), workers, first_wait
        headers, self.key = credentials(options, self.url)
        self.secrets = [w for value in headers.values() for w in value.split() if len(w) >= 8]
        self.http = open_http(self.url, headers, options.timeout, workers)
        self.stop, self.gate = asyncio.Event(), asyncio.Lock()
        self.interval = self.last_start = self.hold_until = 0  # seconds, see `turn`
        self.slowed_at = self.let_through_at = 0
        self.requests = self.prompt_tokens = self.reply_tokens = 0
        self.reached = False  # whether the server has ever sent anything
        self.answered = False  # whether it has ever answered a request with a completion
        self.refused = 0  # posts, before that
        self.unanswered = 0  # posts in a row
        self.under_way = 0  # requests
        self.forms = {}  # the other form of each parameter that the model does not take, or None
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
                    nothing = self.let_through_at < limited_since
                    self.give_up(f"{limit} (for {PATIENCE / 60:.0f} minutes)", stop=nothing)
            except Refused as refused:
                self.refused += not self.answered
                all_refused = self.refused >= GIVE_UP_EARLY and not self.under_way
                self.give_up(str(refused), stop=all_refused and not self.answered)
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
                # Before more is sent after refusals: are the replies under way refusals, too?
                hold = self.refused >= GIVE_UP_EARLY and self.under_way and not self.answered
                wait = max(self.hold_until, self.last_start + self.interval) - time.monotonic()
                if wait <= 0 and not hold and not self.stop.is_set():
                    self.last_start = time.monotonic()
                    return self.last_start
                await self.sleep(0.1 if hold else min(max(wait, 0), 0.1))

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
        sent = {}
        for name, value in request.items():
            while name in self.forms:
                name = self.forms[name]
            if name:
                sent[name] = value
        response = await self.post(sent)
        answer = parse_body(response.content, self.secrets)
        status = error_status(response.status_code, answer)
        if status != 429:
            self.let_through_at = time.monotonic()
            self.interval = self.interval / 2 if self.interval > 0.02 else 0
        try:
            if status == 200 and isinstance(answer, dict) and answer.get("choices"):
                reply = read_reply(answer)
                self.answered, self.unanswered = True, 0
                self.prompt_tokens += reply.prompt_tokens
                self.reply_tokens += reply.tokens or 0
                return reply
            if refused := not_taken(sent, status, answer):
                for name in refused:
                    self.learn(name)
                return await self.once(request)
            headers = hide(dict(response.headers), self.secrets)
            judge(status, answer, headers, request["model"], self.key)
        except Failed:
            self.unanswered = 0
            raise
        except UserError as error:
            raise UserError(f"{self.server}: {error}") from None

    def learn(self, name):
        """Send a parameter that the model does not take in its other form, or not at all."""
        if name not in self.forms:
            self.forms[name] = OTHER_FORM.get(name)
            info(f"the model does not take {name}; {self.forms[name] or 'nothing'} is sent instead")

    async def post(self, request):
        """The server's response, of any status. Raises Fault, UserError."""
        self.requests += 1
        self.under_way += 1
        try:
            async with asyncio.timeout(self.options.timeout):
                response = await self.http.post(self.url, json=request)
        except TimeoutError:
            self.reached = True
            raise Fault(f"time-out: no reply in {self.options.timeout} s") from None
        except httpx.HTTPError as error:
            raise self.explain(error) from None
        finally:
            self.under_way -= 1
        self.reached = True
        return response

    def explain(self, error):
        """The Fault that an error of the HTTP library means, or a UserError with the mend."""
        said = first_line(error)
        if "CERTIFICATE_VERIFY_FAILED" in said:
            mend = "put the file of its certificate, or of its authority's, in SSL_CERT_FILE"
        elif re.search("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE", said):
            mend = "it does not speak HTTPS; write http:// in --base-url"
        elif isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)):
            return Fault(f"no connection: {said}")
        elif not self.reached and speaks_https(self.url):
            mend = "it speaks HTTPS; write https:// in --base-url"
        else:
            self.reached = True
            return Fault(f"connection lost: {said}")
        return UserError(f"{self.server}: {said}; {mend}")

    def give_up(self, reason, stop=False):
        """Raise Failed for one post, or UserError where the server seems to answer none."""
        self.unanswered += 1
        if not self.reached:
            mend = "is the server running, and --base-url right?"
            raise UserError(f"{self.server}: {reason}; {mend}")
        if stop or self.unanswered >= GIVE_UP_AFTER:
            raise UserError(
                f"{self.server}: no reply for {plural(self.unanswered, 'post')} in a row, the last:"
                f" {reason}; mend this and run the same command again (gen_cot.py: with "
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
