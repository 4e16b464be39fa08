"""OpenAI's chat-completions protocol as servers speak it: a request, and what each answer means."""

import email.utils
import json
import re
import time
from typing import NamedTuple

from evaluate import UserError

NOT_A_COMPLETION = "not the JSON of a chat completion"

TRY_AGAIN = (202, 204, 408, 409, 424, 425, 498, 499)  # and all from 500 up
BROKEN_OFF = ("error", "abort", "network_error", "insufficient_system_resource")  # finish_reason
# MiniMax's own codes, as HTTP statuses.
MINIMAX = {1002: 429, 1004: 401, 1008: 402, 1026: 451, 1027: 451, 1039: 429, 2013: 400, 2049: 401}


def any_of(*patterns):
    return re.compile("|".join(patterns), re.IGNORECASE)


FILTERED = any_of(
    "content.?(filter|polic)|content.?management.?policy|responsible.?ai|moderation|flagged",
    "safety.?(system|check)|usage guidelines|data.?inspection|inappropriate|prohibited.?content",
    "(input|output) (new_)?sensitive|sensitive.?content|敏感",
)
WRONG_KEY = any_of(
    "api.?key.{0,20}(invalid|not valid|not found|missing|expired)|authentication|unauthorized",
    "(invalid|incorrect|missing|wrong|expired).{0,12}api.?key|no connected db|login fail",
)
WRONG_MODEL = any_of(
    "model.?not.?(exist|found)|(invalid|unknown|no such).model|not a valid model|模型不存在",
    "model .{0,100}(does not|doesn't|not) exist",
)
NO_CREDIT = any_of(
    "insufficient.?(quota|balance|credit|fund)|exceeded_current_quota|credit balance",
    "arrearage|余额不足",
)
NOT_TAKEN = any_of(
    "(not|n't|un).?(support|permit|allow|recogni|expect|known)|extra_forbidden|deprecated",
    "only .{1,20} (is|are) (allowed|supported)|strictly positive",
)
WANTS_HTTPS = any_of("plain http request|http request to an https")


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


class Reply(NamedTuple):
    text: str  # reasoning that the server split off is put back into its tags
    finish: str  # stop, length, ...
    tokens: int | None  # generated tokens, None where the server does not say
    prompt_tokens: int = 0


def chat_request(model, text, image_url=None, max_tokens=None, temperature=None):
    """The JSON of a request: one user turn, the image and then the text."""
    content = text = text.encode("utf-8", "replace").decode()  # no lone surrogates
    if image_url:
        image = {"type": "image_url", "image_url": {"url": image_url}}
        content = [image, {"type": "text", "text": text}]
    request = {"model": model, "messages": [{"role": "user", "content": content}], "stream": False}
    optional = {"max_tokens": max_tokens, "temperature": temperature}
    return request | {name: value for name, value in optional.items() if value is not None}


def parse_body(body, secrets=()):
    """The JSON value of a body (bytes), an event stream as one completion; else its text.

    The secrets, which some servers repeat, are replaced by ***.
    """
    try:
        text = body.decode("utf-8-sig").strip()
        is_stream = text.startswith(("data:", "event:", ":"))
        return hide(join_events(text) if is_stream else json.loads(text), secrets)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return hide(body.decode("utf-8-sig", "replace").strip(), secrets)


def hide(value, secrets):
    """A JSON value in whose strings *** stands in place of each secret."""
    if isinstance(value, dict):
        return {name: hide(item, secrets) for name, item in value.items()}
    if isinstance(value, list):
        return [hide(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
    return value


def join_events(text):
    """One completion from an event stream. Raises ValueError where its end is missing."""
    message, finish, usage = {}, None, None
    for event in re.findall(r"^data:\s*(\{.*)$", text, re.MULTILINE):
        chunk = json.loads(event)
        if "choices" not in chunk:  # an error
            return chunk
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            finish = choice.get("finish_reason") or finish
            for name, value in (choice.get("delta") or choice.get("message") or {}).items():
                if isinstance(value, str | list):
                    message[name] = message.get(name, type(value)()) + value
    if finish is None and "[DONE]" not in text:
        raise ValueError("the event stream was cut off")
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def read_reply(answer):
    """The Reply in a completion's JSON. Raises Fault, Failed."""
    try:
        choice = answer["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = written(message, finish), message.get("refusal")
        problem = choice.get("error") and (message_of(choice) or "an error without a message")
    except (TypeError, LookupError, AttributeError):
        raise Fault(f"malformed reply: {NOT_A_COMPLETION}") from None
    if finish in ("content_filter", "sensitive") or problem and FILTERED.search(problem):
        raise Failed(short(f"content filter: {problem or 'the reply was cut off'}"), text)
    if problem or finish in BROKEN_OFF:
        raise Fault(short(f"server error: {problem or f'the reply ended with {finish}'}"))
    if refusal and not text or text is None and finish != "length":
        raise Failed(short(f"refusal: {refusal or 'the reply has no content'}"))
    usage = answer.get("usage")
    sent = as_int(usage, "prompt_tokens") or 0
    return Reply(text or "", finish, as_int(usage, "completion_tokens"), sent)


def written(message, finish):
    """What the model wrote, None for nothing at all; reasoning split off is back in its tags."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    thoughts = [part for part in parts if isinstance(part, dict) and "thinking" in part]
    text = flat([part for part in parts if part not in thoughts])
    names = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
    reasoning = flat(thoughts) or next(filter(None, (flat(message.get(n)) for n in names)), "")
    if not reasoning or "</think>" in text:
        return None if content is None else text
    if not text and finish == "stop":  # some parsers take an answer without tags for reasoning
        return reasoning
    return f"<think>{reasoning.strip()}</think>{text}"


def flat(value):
    """The text in a field of a message: a string, or a list of strings and of parts."""
    if isinstance(value, list):
        return "".join(map(flat, value))
    if isinstance(value, dict):
        return flat(value.get("text") or value.get("thinking") or value.get("summary"))
    return value or ""


def as_int(fields, name):
    """A number in a JSON object, None where there is none; some servers send it as a string."""
    try:
        return int(fields[name])
    except (TypeError, ValueError, LookupError, OverflowError):
        return None


def message_of(answer):
    """What an error says, in any of the usual places; empty where nothing is found."""
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):  # Gemini's
        answer = answer[0]
    if isinstance(answer, dict):
        answer = answer.get("error") or answer.get("base_resp") or answer
    if isinstance(answer, dict):
        names = ("message", "detail", "status_msg")
        answer = next(filter(None, map(answer.get, names)), "")
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def is_error(answer):
    """Whether an answer with status 200 reports an error."""
    return isinstance(answer, dict) and bool(answer.get("error") or answer.get("base_resp"))


def short(text):
    """A server's words as one line of at most 300 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def error_status(status, answer):
    """The HTTP status that an answer means: some servers report an error inside a 200."""
    if status in TRY_AGAIN or not 200 <= status < 300:
        return status
    error = base = None
    if isinstance(answer, dict):
        error, base = answer.get("error"), answer.get("base_resp")
    if code := as_int(base, "status_code"):
        return MINIMAX.get(code, 500)
    code = as_int(error, "code")
    return code if code in range(400, 600) else 200


def not_taken(sent, status, answer):
    """The optional parameters of the request `sent` that the answer refuses."""
    body = answer if isinstance(answer, str) else json.dumps(answer)
    if status not in (400, 422) or not NOT_TAKEN.search(body):
        return []
    named = re.search(r'"param": "(\w+)"', body)
    named = named[1] if named and named[1] != "None" else body
    names = ("max_tokens", "max_completion_tokens", "temperature")
    return [name for name in names if name in sent and re.search(rf"\b{name}\b", named)]


def judge(status, answer, headers, model, key):
    """Raise what an answer without a completion means: Fault, Failed or Refused.

    Raises UserError with the mend where every request would meet the same. `key` is the name of
    the environment variable that holds the key, None where there is no key.
    """
    body = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    page = body if body.startswith("<") else None
    said = message_of(answer) or "nothing"
    if page:
        said, body = "a web page, perhaps of a proxy on the way", ""
    if status == 200 and not is_error(answer):  # a torn completion: the words are the model's
        body = ""
    reason = short(f"{status} {said}")
    if status == 429 and not NO_CREDIT.search(body):
        raise RateLimit(f"rate limit: {reason}", retry_after(headers))
    if status >= 500 or status in TRY_AGAIN:
        raise Fault(f"server error: {reason}", retry_after(headers))
    if status == 451 or status in (200, 400, 403, 413, 422) and FILTERED.search(body):
        raise Failed(f"content filter: {reason}")
    if status in (402, 429) or NO_CREDIT.search(body):
        mend = "the account needs credit"
    elif status == 401 or WRONG_KEY.search(body):
        wanted = "it wants a key: put it in OPENAI_API_KEY, or in the variable of --api-key-env"
        mend = f"check the key in {key}" if key else wanted
    elif status == 404 or WRONG_MODEL.search(body):
        mend = f"check --base-url, and whether it has a model {model}"
    elif WANTS_HTTPS.search(page or body):
        mend = "write https:// in --base-url"
    elif status == 403 and not page:
        mend = f"this key may not use the model {model}"
    elif status == 200:
        has_message = isinstance(answer, dict) and said != "nothing"
        raise Fault(f"malformed reply: {reason if has_message else NOT_A_COMPLETION}")
    elif status in (400, 403, 413, 422):
        raise Refused(f"refused: {reason}")
    elif 300 <= status < 400:
        mend = f"the server has moved to {headers.get('location', '?').partition('?')[0]}"
    elif status == 407:
        mend = "check the proxy in HTTP_PROXY or HTTPS_PROXY"
    else:
        mend = "check --base-url"
    raise UserError(f"{reason}; {mend}")


def retry_after(headers):
    """The seconds that a server asks to wait, None where it does not; a number, or a date."""
    of_gateways = [name for name in headers if name.endswith(("-retry-after", "-retry-after-ms"))]
    for name in ("retry-after-ms", "retry-after", *of_gateways):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return float(value) / (1000 if name.endswith("-ms") else 1)
        try:
            date = email.utils.parsedate_to_datetime(value)
            return max(0.0, date.timestamp() - time.time())
        except (ValueError, TypeError):
            continue
    return None
