"""Let a teacher model write the reasoning of posts whose keyphrases are known.

    python gen_cot.py train.jsonl --out train_cot.jsonl --model gpt-4o --dry-run
    python gen_cot.py train.jsonl --out train_cot.jsonl --model gpt-4o
    python gen_cot.py train.jsonl --out train_cot.jsonl --model NAME --base-url http://localhost:8000/v1 --workers 64

Any server that speaks OpenAI's chat-completions protocol will do. A run can be stopped, killed and started again:
a post that has its reasoning is never asked for again. Posts without an acceptable one go, with the reason and the
last reply, to a file beside --out, train_cot.failed.jsonl; --retry-failed asks for them again.
"""

import argparse
import base64
import contextlib
import copy
import email.utils
import errno
import io
import itertools
import json
import os
import queue
import random
import re
import signal
import statistics
import sys
import threading
import time
from array import array
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import data
from evaluate import CJK, UserError, natural, normalize, parse_line, read_lines, run

PROMPT = """\
You help to make training data for a model that predicts the keyphrases (hashtags) of a social media post from its \
text and its image. Below are a post and the keyphrases that its author chose; its image, if it has one, is above.

Write the reasoning that leads from what can be seen in the image and read in the text to exactly these keyphrases. \
Write it as the model would that knows only the post: name what is seen and what is read, say what follows when both \
are put together, and arrive at the keyphrases at the end. Do not say or hint that the keyphrases were known, and do \
not argue backwards from them. Invent nothing that is neither in the post nor common knowledge. Use 30 to 120 words, \
plain sentences, no lists.

Answer in this form and write nothing else; repeat the keyphrases as they are, separated by semicolons:
<think>the reasoning</think><answer>the keyphrases</answer>

Post: {text}

Keyphrases: {keyphrases}
"""

# Reasoning with one of these in it speaks of keyphrases that it should not know. `#` is any word for them.
GIVE_AWAYS = [
    "given #",
    "provided #",
    "supplied #",
    "target #",
    "reference #",
    "gold #",
    "expected #",
    "correct #",
    "chosen #",
    "# are given",
    "# were given",
    "# are provided",
    "# were provided",
    "keyphrases given",
    "keyphrases provided",
    "keywords given",
    "keywords provided",
    "author's keyphrase",
    "author chose these",
    "given answer",
    "provided answer",
    "ground truth",
    "as instructed",
    "给定的关键词",
    "所给的关键词",
    "给出的关键词",
    "提供的关键词",
    "给定的标签",
    "提供的标签",
    "标准答案",
]
KEYPHRASE = r"(?:keyphrase|key phrase|keyword|hash ?tag|tag)s?"

# --------------------------------------------------------------------- a client for OpenAI-compatible servers

OPENAI = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
LONGEST_WAIT = 60  # seconds between two tries, where the server asks for nothing else
LONGEST_RETRY_AFTER = 600
GRACE = 5  # seconds for the replies under way when a run is stopped
GIVE_UP_AFTER = 100  # posts in a row without any reply: the server has gone, or refuses them all
TRY_AGAIN = {408, 409, 425, 429}
THIS_POST_ONLY = {400, 413, 422}
CONTENT_FILTER = re.compile(
    r"content.?filter|content.?management.?policy|responsible.?ai|moderation|safety system"
    r"|data.?inspection|sensitive.?content|inappropriate",
    re.IGNORECASE,
)


class Failed(Exception):
    """One post has no answer. The text is the reason, its kind first: `too long: 900 words`."""

    def __init__(self, reason, reply=None):
        super().__init__(reason)
        self.reply = reply

    @property
    def kind(self):
        return str(self).partition(":")[0]


class Stopped(Exception):
    """The run was stopped before this post had its answer."""


class Fault(Exception):
    """A request that is worth another try, in `wait` seconds at the earliest where the server said so."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class Refused(Exception):
    """The server answered with an error, or with another address."""

    def __init__(self, response):
        response.read()
        super().__init__(response.status_code)
        self.status, self.headers, self.body = response.status_code, response.headers, response.text


class Reply(NamedTuple):
    text: str  # reasoning that the server split off is put back in its tags
    finish: str  # stop, length, content_filter, …
    tokens: int | None  # generated ones, None where the server doesn't say


class Client:
    """Asks one model on one server, from `workers` threads at once; whatever passes is tried again.

    `first_wait` (seconds) is the longest wait before the second try; it doubles with each further one.
    """

    def __init__(
        self, base_url, model, key_name=KEY, workers=16, max_retries=5, timeout=180, first_wait=2
    ):
        import huggingface_hub

        self.url, self.model, self.key_name = endpoint(base_url), model, key_name
        self.server = without_query(self.url)
        self.key = api_key(key_name, self.url)
        self.workers, self.max_retries, self.first_wait, self.timeout = (
            workers,
            max_retries,
            first_wait,
            timeout,
        )
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.requests = self.prompt_tokens = self.reply_tokens = 0
        self.reached, self.unanswered, self.told, self.started = False, 0, set(), time.monotonic()

        # The hub's own HTTP session blocks every request where HF_HUB_OFFLINE is set, a local server's too, keeps 20
        # connections alive, and reads an error's body in its own way. The library's name differs between versions.
        library = type(huggingface_hub.get_session()).__module__.partition(".")[0]
        self.http = sys.modules[library]
        huggingface_hub.set_client_factory(self.session)
        self.timed_out = (
            self.http.TimeoutException,
            huggingface_hub.InferenceTimeoutError,
        )  # an older hub's, a newer's
        # Without a key of its own the hub's client would send the machine's Hugging Face token.
        self.client = huggingface_hub.InferenceClient(
            base_url=self.url,
            api_key=self.key,
            timeout=timeout,
            headers={"user-agent": "dynamic-cot"},
        )

    def session(self):
        def refuse(response):
            if not response.is_success:
                raise Refused(response)

        limits = self.http.Limits(
            max_connections=self.workers, max_keepalive_connections=self.workers
        )
        return self.http.Client(
            event_hooks={"response": [refuse]},
            limits=limits,
            timeout=self.timeout,
            trust_env=urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1"),
        )

    def ask(self, request):
        """The Reply to a request (a dict, see `make_request`).

        Raises Failed where this post can't be answered, UserError where no post can, Stopped.
        """
        for attempt in itertools.count():
            if self.stop.is_set():
                raise Stopped
            try:
                reply = self.once(request)
            except Fault as fault:
                if attempt == self.max_retries:
                    self.give_up(f"{fault} ({attempt + 1} tries)")
                self.tell(fault)
                wait = random.uniform(0, min(LONGEST_WAIT, self.first_wait * 2 ** min(attempt, 9)))
                if fault.wait is not None:  # not earlier, and not all at the same moment
                    wait = min(fault.wait, LONGEST_RETRY_AFTER) + min(wait, 1)
                if self.stop.wait(wait):
                    raise Stopped from None
            else:
                self.unanswered = 0
                return reply

    def once(self, request):
        """One request, one Reply. Raises Fault, Failed, UserError."""
        with self.lock:
            self.requests += 1
        try:
            answer = self.client.chat_completion(**request)
        except Refused as refused:
            self.reached = True
            self.judge(refused)
        except self.http.ConnectError as error:
            raise Fault(self.clean(f"no connection: {error}")) from None
        except self.timed_out as error:
            if self.http.ConnectTimeout in (type(error), type(error.__cause__)):
                raise Fault(f"no connection: none in {self.timeout:g} s") from None
            self.reached = True
            raise Fault(f"time-out: no reply in {self.timeout:g} s") from None
        except self.http.HTTPError as error:
            self.reached = True
            raise Fault(self.clean(f"connection lost: {error or type(error).__name__}")) from None
        except (ValueError, TypeError, AttributeError, RecursionError):
            self.reached = True
            raise Fault("malformed reply: not the JSON of a chat completion") from None
        self.reached = True
        try:
            usage = answer.usage or {}
            tokens = usage.get("completion_tokens")
            with self.lock:
                self.prompt_tokens += usage.get("prompt_tokens") or 0
                self.reply_tokens += tokens or 0
            choice = answer.choices[
                0
            ]  # by attribute: the items of the hub's dict lack what its types don't know
            return Reply(
                self.hide(written(choice.message, choice.finish_reason)),
                choice.finish_reason,
                tokens,
            )
        except (TypeError, IndexError, AttributeError):
            said = message_of(answer) or "not the JSON of a chat completion"
            raise Fault(self.clean(f"malformed reply: {said}")) from None

    def judge(self, refused):
        """Raise what an answer other than 200 OK means: Fault, Failed or UserError."""
        status, said = refused.status, ""
        with contextlib.suppress(ValueError, RecursionError):
            said = message_of(json.loads(refused.body))
        if not said and not refused.body.lstrip().startswith("<"):  # pages of proxies say nothing
            said = refused.body
        said = self.clean(f"{status} {said}")
        if status in TRY_AGAIN and "insufficient_quota" not in refused.body or status >= 500:
            raise Fault(
                f"{'rate limit' if status == 429 else 'server error'}: {said}",
                retry_after(refused.headers),
            )
        if status in THIS_POST_ONLY:
            if CONTENT_FILTER.search(refused.body):
                self.unanswered = 0
                raise Failed(f"content filter: {said}")
            self.give_up(f"refused: {said}")
        mend = {
            401: f"check the key in {self.key_name}"
            if self.key != "none"
            else f"it wants a key: put it in the environment variable {KEY}, or name another with --api-key-env",
            402: "its account needs credit",
            403: f"this key may not use the model {self.model}",
            404: f"check --base-url, and whether it has a model {self.model}",
            429: "its account needs credit",
        }.get(
            status,
            f"it has moved to {refused.headers.get('location')}"
            if status < 400
            else "check --base-url",
        )
        raise UserError(f"{self.server}: {said}; {mend}")

    def give_up(self, reason):
        """Raise Failed for one post, or UserError where the server answers none."""
        with self.lock:
            self.unanswered += 1
            unanswered = self.unanswered
        if not self.reached:
            raise UserError(
                f"{self.server}: {reason}; is the server running, and --base-url right?"
            )
        if unanswered >= GIVE_UP_AFTER:
            raise UserError(
                f"{self.server}: no reply for {unanswered} posts in a row, the last: {reason}; "
                "run the same command again when this is mended, with --retry-failed for those posts"
            )
        raise Failed(reason)

    def rate(self):
        """Requests a second so far."""
        return self.requests / (time.monotonic() - self.started)

    def tell(self, fault):
        """Tell the person at the screen of the first fault of each kind."""
        kind = str(fault).partition(":")[0]
        with self.lock:
            new = kind not in self.told
            self.told.add(kind)
        if new:
            tell(f"{fault}; it is tried again, and further ones of this kind are not told of")

    def hide(self, text):
        """A server's words without the key, which some repeat."""
        # Shorter ones (none, EMPTY) are no secret, and may be words of a reply.
        return text.replace(self.key, "***") if len(self.key) >= 8 else text

    def clean(self, text):
        """A server's words as one short line without the key."""
        text = self.hide(" ".join(str(text).split()))
        return text if len(text) <= 300 else text[:297] + "..."

    def each(self, work, items):
        """Yield work(item) for all items as they are done, from `workers` threads; few are begun ahead.

        After Ctrl-C no item is begun, what comes in the next seconds is still yielded, then KeyboardInterrupt
        raised; a second one raises it at once. An error of `work` ends the run in the same way; Stopped is none.
        """
        source, lock, results, end = (
            iter(items),
            threading.Lock(),
            queue.Queue(self.workers),
            object(),
        )

        def worker():
            problem = None
            while problem is None and not self.stop.is_set():
                try:
                    with lock:
                        item = next(source, end)
                    if item is end:
                        break
                    results.put(work(item))
                except Stopped:
                    break
                except Exception as error:
                    problem = error
            results.put((end, problem))

        # Daemons: a thread that hangs in a request must not keep the process from ending.
        threads = [threading.Thread(target=worker, daemon=True) for _ in range(self.workers)]
        at_work, problem, deadline = len(threads), None, None
        with self.interruptible():
            for thread in threads:
                thread.start()
            while at_work:
                if self.stop.is_set() and deadline is None:
                    deadline = time.monotonic() + GRACE
                    if problem is None:
                        tell(
                            f"stopping; up to {GRACE} s for the replies under way (Ctrl-C again: at once)"
                        )
                try:
                    result = results.get(timeout=0.1)
                except queue.Empty:
                    if deadline and time.monotonic() > deadline:
                        break
                    continue
                if isinstance(result, tuple) and result[0] is end:
                    at_work -= 1
                    problem = problem or result[1]
                    if result[1]:
                        self.stop.set()
                else:
                    yield result
        if problem:
            raise problem
        if self.stop.is_set():
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interruptible(self):
        """In this block the first Ctrl-C only sets `stop`; so does whatever ends the block early."""

        def interrupted(*_):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.stop.set()

        before = signal.getsignal(signal.SIGINT)
        # A shell has its background jobs ignore Ctrl-C; only the main thread may ask for signals.
        ours = (
            before is not signal.SIG_IGN and threading.current_thread() is threading.main_thread()
        )
        if ours:
            signal.signal(signal.SIGINT, interrupted)
        try:
            yield
        except BaseException:
            self.stop.set()
            raise
        finally:
            if ours:
                signal.signal(signal.SIGINT, before)


def endpoint(base_url):
    """The address that requests go to, by the rule of OpenAI's own client. Raises UserError.

    The hub's client would put /v1 behind every path that doesn't end so (/api/v3, /v1beta/openai).
    """
    try:
        parts = urlsplit(base_url)
        usable = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and base_url.isprintable()
        )
    except ValueError:  # a port that is no number
        usable = False
    if not usable or " " in base_url:
        raise UserError(
            f"--base-url: {base_url!r} is no address; one is like http://localhost:8000/v1"
        )
    if "@" in parts.netloc:
        raise UserError(
            "--base-url: take name and password out of it; a key comes from the environment"
        )
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parts._replace(path=path).geturl()


def without_query(url):
    """An address as messages show it: what follows `?` may be a key."""
    return url.partition("?")[0]


def api_key(name, url):
    """The key in the environment variable `name`, "none" where a server may do without. Raises UserError."""
    if not re.fullmatch(
        r"[A-Za-z_]\w*", name, re.ASCII
    ):  # perhaps the key itself: it isn't repeated
        raise UserError(
            "--api-key-env: takes the name of an environment variable that holds the key"
        )
    key = os.environ.get(name, "").strip()
    if not key and (name != KEY or urlsplit(url).hostname == urlsplit(OPENAI).hostname):
        raise UserError(f"no key: the environment variable {name} is not set")
    if not re.fullmatch(r"[!-~]*", key):  # the HTTP library's complaint would show it
        raise UserError(
            f"the environment variable {name} holds a space, line break or letter that no key has"
        )
    return key or "none"


def message_of(answer):
    """What the JSON of an error says, in any of the usual places; empty where nothing is found."""
    error = answer.get("error") or answer if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or ""
    return error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)


def written(message, finish):
    """What a model wrote, from the message of a reply. A server with a reasoning parser splits off the reasoning."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    split_off = message.get("reasoning_content") or message.get("reasoning")
    if not split_off or "</think>" in content:
        return content
    if (
        not content and finish == "stop"
    ):  # an answer without tags, which some parsers take for reasoning as a whole
        return split_off
    return f"<think>{split_off.strip()}</think>{content}"


def retry_after(headers):
    """The seconds that a server asks to wait, None where it doesn't: a number, or a date as HTTP writes it."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def tell(text):
    """A line on stderr, above the progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


# ---------------------------------------------------------------------------------------------- the request

FACTOR = 28  # pixels of one token of Qwen-VL


def image_part(path, max_pixels):
    """An image as a part of a message: JPEG in a data URL, its metadata left out. Raises data.Unreadable.

    A larger one is scaled to whole tokens, as the model's own processor would: a server that runs this processor
    then leaves its size as it is.
    """
    from PIL import Image

    image = data.load_image(path, max_pixels)
    shrink = (image.width * image.height / max_pixels) ** 0.5
    if shrink > 1:
        size = [max(FACTOR, int(side / shrink / FACTOR) * FACTOR) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    image.info = {}  # a comment would be written again
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=90)
    except OSError as error:  # JPEG knows no side longer than 65,500
        raise data.Unreadable(f"can't be sent as JPEG: {error}") from None
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def make_request(model, prompt, image_path, max_pixels, max_tokens=None, temperature=None):
    """The keywords of a chat completion: one user turn, the image and then the text. Raises data.Unreadable."""
    content = [image_part(image_path, max_pixels)] if image_path else []
    content.append(
        {"type": "text", "text": prompt.encode("utf-8", "replace").decode()}
    )  # no lone surrogates
    request = {"model": model, "messages": [{"role": "user", "content": content}], "stream": False}
    optional = {"max_tokens": max_tokens, "temperature": temperature}
    return request | {name: value for name, value in optional.items() if value is not None}


def read_prompt(path, *places):
    """The prompt in a file, in which each of `places` must stand. Raises UserError."""
    try:
        prompt = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the prompt can't be read ({error})") from None
    for place in places:
        if place not in prompt:
            raise UserError(f"{path}: the prompt has no {place} in it to say where that goes")
    return prompt


def fill(prompt, **values):
    """The prompt with its {places} filled in; what is filled in may hold braces itself."""
    return re.sub(r"\{(\w+)\}", lambda place: values.get(place[1], place[0]), prompt)


# ------------------------------------------------------------------------------------------- accepting a reply

GIVE_AWAY = re.compile(
    "|".join(re.escape(phrase).replace(r"\#", KEYPHRASE) for phrase in GIVE_AWAYS)
)


def wanted(keyphrases):
    """Keyphrases as replies are compared with them: in any order, stemmed, as the parser of answers reads them."""
    return {
        normalize(phrase)
        for phrase in data.parse_answer(f"<answer>{data.plain_answer(keyphrases)}</answer>")[0]
    }


def count_words(text):
    """Words between white space; a Chinese or Japanese character is one."""
    return len(CJK.sub(r" \1 ", text).split())


def accepted(reply, keyphrases, min_words, max_words):
    """The reasoning in a reply. Raises Failed, which says why it can't be taken."""

    def reject(reason):
        return Failed(reason, reply.text)

    if reply.finish == "content_filter":
        raise reject("content filter: the reply was cut off")
    if reply.finish == "length":
        raise reject("cut off: the reply ran out of tokens")
    tags = tuple(re.findall("|".join(data.TAGS), reply.text))
    if missing := [tag for tag in data.TAGS if tag not in tags]:
        raise reject(f"tag missing: {missing[0]}")
    if tags != data.TAGS:
        raise reject(f"tag misplaced: {''.join(tags)}")
    answer, reasoning = data.parse_answer(reply.text)
    if wanted(answer) != wanted(keyphrases):
        raise reject(f"other keyphrases: {data.plain_answer(answer)}")
    words = count_words(reasoning)
    if words < min_words:
        raise reject(f"too short: {words} words")
    if words > max_words:
        raise reject(f"too long: {words} words")
    plain = " ".join(re.sub("[-‐–]", " ", reasoning).replace("’", "'").casefold().split())
    if found := GIVE_AWAY.search(plain):
        raise reject(f"gives away: {found[0]}")
    return reasoning


# ------------------------------------------------------------------------------------------ the files of a run


def identify(file):
    """What changes when another run adds to a file or puts it in order: (inode, size)."""
    state = os.stat(file)
    return state.st_ino, state.st_size


class Lines:
    """A JSONL file to which lines of posts are added as they come, and which is put in the posts' order at the end.

    Only the places of the lines are kept in memory, 8 bytes a post.
    """

    def __init__(self, path, posts):
        self.path, self.posts = Path(path), posts
        self.places = array("q", [-1]) * len(posts)
        self.seen = self.torn = self.file = None

    def __contains__(self, index):
        return self.places[index] >= 0

    def load(self, index_of):
        """Iterate over (line number, offset, index, record); `index_of` knows the hashes of ids. Only reads.

        The index is None for a post that isn't among the posts. Raises UserError.
        """
        if not self.path.exists():
            return
        self.seen = identify(self.path)
        for line, offset, raw in read_lines(self.path):
            if raw.strip():
                try:
                    record = parse_line(self.path, line, raw)
                except UserError:
                    if raw.endswith(b"\n"):
                        raise
                    self.torn = offset  # what a killed run left: `open` cuts it off
                    return
                yield line, offset, index_of.get(hash(str(record.get("id")))), record

    def open(self):
        """Get ready to add lines. Raises UserError where another run does so, too."""
        import fcntl  # not on Windows, where infer.py may import this file all the same

        self.file, busy = open(self.path, "ab+", buffering=0), False
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = True
        except OSError:
            pass  # some network file systems have no locks
        if (
            busy
            or identify(self.file.fileno()) != self.seen
            and (self.seen or identify(self.file.fileno())[1])
        ):
            raise UserError(
                f"{self.path}: another run is writing to it; wait for it, or name another --out"
            )
        if self.torn is not None:
            self.file.truncate(self.torn)
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":  # whole but for its end, as some editors leave it
                self.file.write(b"\n")

    def add(self, index, record):
        """Add one line, whole once this returns. Raises OSError."""
        line = data.to_line(record).encode()
        self.places[index] = self.file.seek(0, os.SEEK_END)
        if self.file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def remove(self, index):
        self.places[index] = -1

    def lines(self):
        """Iterate over (index, line as bytes) in the posts' order."""
        with open(self.path, "rb") as file:
            for index, place in enumerate(self.places):
                if place >= 0:
                    file.seek(place)
                    yield index, file.readline()

    def put_in_order(self):
        """Write the file anew, whole or not at all, in the posts' order and without what was removed."""

        def moved():
            end = 0
            for index, line in self.lines():
                self.places[index] = end
                end += len(line)
                yield line

        data.write_whole(self.path, moved())


class Results:
    """What a run has: the posts with reasoning in --out, the failed ones in a file beside it."""

    def __init__(self, posts, out):
        self.posts, self.out = posts, Path(out)
        failed = self.out.with_suffix(".failed.jsonl")
        for path in (self.out, failed):
            if path.is_dir():
                raise UserError(f"{path}: a folder; --out is the file that the posts go to")
            if path.resolve() == posts.path.resolve():
                raise UserError(f"{path}: the input itself; name another --out")
        self.good, self.failed = Lines(self.out, posts), Lines(failed, posts)
        self.settings = Path(f"{self.out}.settings.json")
        self.words = array("L")  # lengths of the reasonings

    def load(self, teacher, mix):
        """Read what earlier runs left. Raises UserError where that can't be gone on with.

        teacher: what the reasonings depend on, a dict; `mix` allows several in one file.
        """
        self.teachers = [teacher]
        if not any(
            path.exists() and path.stat().st_size for path in (self.good.path, self.failed.path)
        ):
            return
        before = []
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(self.settings.read_text(encoding="utf-8"))
        before = [old for old in before if isinstance(old, dict)]
        if teacher not in before and not mix:
            new = [
                name for name in teacher if teacher[name] not in [old.get(name) for old in before]
            ]
            other = (
                f"another {' and '.join(new) or 'teacher or prompt'}"
                if before
                else "an unknown teacher"
            )
            raise UserError(
                f"{self.out}: was made with {other}; name another --out, or allow both in one with --mix"
            )
        self.teachers = before + [teacher] * (teacher not in before)
        index_of = {hash(self.posts[index]["id"]): index for index in range(len(self.posts))}
        for line, offset, index, record in self.good.load(index_of):
            where = f"{self.out} line {line} (id {record.get('id')})"
            post = self.posts[index] if index is not None else {}
            if any(record.get(field) != post.get(field) for field in ("id", "text", "keyphrases")):
                raise UserError(
                    f"{where}: {self.posts.path} has no such post, or it was changed; "
                    "name another --out, or take the line out of this one"
                )
            if not data.has_cot(record):
                raise UserError(
                    f"{where}: has no reasoning; was this file made by gen_cot.py? Name another --out"
                )
            if index not in self.good:
                self.good.places[index] = offset
                self.words.append(count_words(record["cot"]))
        for _, offset, index, _ in self.failed.load(index_of):
            if index is not None and index not in self.good:
                self.failed.places[index] = offset

    @contextlib.contextmanager
    def open(self):
        """In this block posts can be added. Raises UserError."""
        with contextlib.ExitStack() as files:
            with data.made(self.out.parent, self.out):
                for file in (self.good, self.failed):
                    file.open()
                    files.enter_context(file.file)
                data.write_whole(
                    self.settings, json.dumps(self.teachers, indent=1, ensure_ascii=False) + "\n"
                )
            yield

    def add(self, index, record, failed):
        """Write a post with its reasoning, or with the Failed that it met. Raises UserError."""
        with data.made(self.out.parent, self.out):
            if failed is None:
                self.good.add(index, record)
                self.failed.remove(index)
                self.words.append(count_words(record["cot"]))
            else:
                self.failed.add(index, record | {"reason": str(failed), "reply": failed.reply})

    def put_in_order(self):
        """Put both files in the input's order. Raises UserError."""
        with data.made(self.out.parent, self.out):
            self.good.put_in_order()
            self.failed.put_in_order()
            if not self.failed.path.stat().st_size:
                self.failed.path.unlink()

    def reasons(self):
        """How many posts failed for each kind of reason."""
        kinds = Counter()
        for _, line in self.failed.lines():
            kinds[Failed(json.loads(line).get("reason", "unknown")).kind] += 1
        return kinds

    def moved(self, record):
        """The record for a file in the folder of --out: its image's path is relative to that."""
        image, folder = record.get("image"), os.path.realpath(self.posts.folder)
        if not image or os.path.isabs(image) or folder == os.path.realpath(self.out.parent):
            return record
        return record | {"image": data.relative(os.path.join(folder, image), self.out.parent)}


# --------------------------------------------------------------------------------------------------- the run


def settings(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    add = parser.add_argument
    add("data", metavar="FILE", help="posts with keyphrases (JSONL)")
    add(
        "--out",
        metavar="FILE",
        required=True,
        help="where the posts with their reasoning go (JSONL)",
    )
    add("--model", required=True, help="the teacher's name on the server")
    add("--base-url", default=OPENAI, help="the server's address")
    add_server_options(parser)
    add("--workers", type=data.count, default=16, help="requests at once")
    add("--limit", type=data.count, help="only so many posts, from the beginning of FILE")
    add("--prompt-file", help="another instruction, with {text} and {keyphrases} where those go")
    add(
        "--max-pixels",
        type=data.count,
        default=512 * 28 * 28,
        help="larger images are scaled down to this",
    )
    add(
        "--temperature",
        type=float,
        help="the teacher's; not sent if left out, some models refuse it",
    )
    add(
        "--max-new-tokens",
        type=natural,
        default=1024,
        help="a reply is cut off after this many tokens; 0 sends no limit, some models refuse it",
    )
    add("--min-words", type=natural, default=10, help="shorter reasoning is not taken")
    add("--max-words", type=data.count, default=250, help="longer reasoning is not taken")
    add(
        "--retry-failed",
        action="store_true",
        help="ask again for the posts that failed in an earlier run",
    )
    add(
        "--mix",
        action="store_true",
        help="go on with an --out that another teacher or prompt began",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print one request and how many are to come; send nothing",
    )
    args = parser.parse_args(arguments)
    if args.min_words > args.max_words:
        parser.error("--min-words is more than --max-words")
    if args.temperature is not None and not 0 <= args.temperature <= 2:
        parser.error("--temperature goes from 0 to 2")
    return args


def add_server_options(parser):
    """The settings of a Client that gen_cot.py and infer.py share."""
    add = parser.add_argument
    add(
        "--api-key-env",
        metavar="NAME",
        default=KEY,
        help="environment variable with the server's key; without one the word none is sent",
    )
    add(
        "--timeout",
        type=data.count,
        default=180,
        help="seconds to wait for a reply before the request is tried again",
    )
    add(
        "--max-retries",
        type=natural,
        default=5,
        help="further tries of a request that meets a fault, and of a reply that can't be taken",
    )


def reason(client, posts, prompt, args, index):
    """Ask for one post's reasoning: (index, its record with `cot`, None), or (index, its record, Failed)."""
    record, failed = posts[index], None
    if not wanted(record["keyphrases"]):
        return index, record, Failed("no keyphrases: nothing is left of them after normalisation")
    try:
        request = request_for(posts, record, prompt, args)
        for _ in range(args.max_retries + 1):
            reply = client.ask(request)
            try:
                cot = accepted(reply, record["keyphrases"], args.min_words, args.max_words)
                return index, record | {"cot": cot}, None
            except Failed as rejected:
                failed = rejected
                if failed.kind == "content filter":
                    break
    except data.Unreadable as error:
        failed = Failed(f"unreadable image: {error}")
    except Failed as unanswered:
        failed = Failed(str(unanswered), failed and failed.reply)
    return index, record, failed


def request_for(posts, record, prompt, args):
    """The request for one post's reasoning. Raises data.Unreadable."""
    text = fill(
        prompt, text=record["text"].strip(), keyphrases=data.plain_answer(record["keyphrases"])
    )
    return make_request(
        args.model,
        text,
        posts.image_path(record),
        args.max_pixels,
        args.max_new_tokens or None,
        args.temperature,
    )


def write_reasoning(args, first_wait=2):
    """The whole run; returns 0 if every post asked for has its reasoning, else 1."""
    posts = data.Posts(args.data, for_training=True)
    prompt = read_prompt(args.prompt_file, "{text}", "{keyphrases}") if args.prompt_file else PROMPT
    results = Results(posts, args.out)
    results.load({"teacher": args.model, "prompt": prompt}, args.mix)
    asked = range(min(len(posts), args.limit or len(posts)))
    done = sum(index in results.good for index in asked)
    skipped = 0 if args.retry_failed else sum(index in results.failed for index in asked)
    todo = (
        index
        for index in asked
        if index not in results.good and (args.retry_failed or index not in results.failed)
    )
    if args.dry_run:
        return dry_run(args, posts, prompt, todo, f"{done} posts done, {skipped} failed before")
    if replaced := len(posts) - posts.without_cot:
        data.say(
            f"{replaced} posts of {args.data} have reasoning already; {args.out} gets the teacher's instead"
        )
    client = None
    if done + skipped < len(asked):
        client = Client(
            args.base_url,
            args.model,
            args.api_key_env,
            min(args.workers, len(asked)),
            args.max_retries,
            args.timeout,
            first_wait,
        )
    with results.open():
        if client:
            ask = partial(reason, client, posts, prompt, args)
            ask_teacher(args, client, results, ask, todo, len(asked), done, skipped)
        results.put_in_order()
    return summary(args, results, asked, skipped, client)


def ask_teacher(args, client, results, ask, todo, total, done, failures):
    """Put what becomes of the posts `todo` in `results`; of `total`, `done` and `failures` are there already."""
    with data.progress(None, total, "posts", done=done + failures) as bar:
        try:
            for index, record, failed in client.each(ask, todo):
                results.add(index, results.moved(record) | {"teacher": args.model}, failed)
                failures += failed is not None
                done += failed is None
                bar.set_postfix_str(
                    f"{done} done, {failures} failed, {client.rate():.1f} requests/s, "
                    f"{client.prompt_tokens + client.reply_tokens:,} tokens",
                    refresh=False,
                )
                bar.update()
        except KeyboardInterrupt:
            bar.close()
            data.say(
                f"stopped: {done} of {total} posts are in {args.out}; the same command goes on from there"
            )
            raise


def dry_run(args, posts, prompt, todo, before):
    """Print the first request that would be sent, its image left out, and count those to come."""
    first, count = None, 0
    for index in todo:
        count += 1
        if first is None:
            with contextlib.suppress(data.Unreadable):
                first = request_for(posts, posts[index], prompt, args)
    if first:
        shown = copy.deepcopy(first)
        for part in shown["messages"][0]["content"]:
            if part["type"] == "image_url":
                part["image_url"]["url"] = (
                    f"data:image/jpeg;base64,… ({len(part['image_url']['url']):,} characters)"
                )
        print(f"POST {without_query(endpoint(args.base_url))}")
        print(json.dumps(shown, indent=2, ensure_ascii=False).encode("utf-8", "replace").decode())
    print(f"{count} requests to come ({before}); more where a reply is asked for again")


def summary(args, results, asked, skipped, client):
    """Tell what came of it; returns the exit code."""
    done, lengths = sum(index in results.good for index in asked), results.words
    words = (
        f"; {min(lengths)} to {max(lengths)} words, median {statistics.median(lengths):g}"
        if lengths
        else ""
    )
    data.say(f"{args.out}: {done} of {len(asked)} posts have reasoning{words}")
    if client:
        data.say(
            f"{client.requests} requests, {client.rate():.1f} a second; {client.prompt_tokens:,} tokens sent, "
            f"{client.reply_tokens:,} received"
        )
    if done == len(asked):
        return 0
    kinds = results.reasons()
    data.say(
        f"{results.failed.path}: {kinds.total()} posts failed: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    )
    if skipped:
        data.say(f"{skipped} of them in an earlier run; --retry-failed asks for them again")
    return 1


def main():
    return write_reasoning(settings())


if __name__ == "__main__":
    run(main)
