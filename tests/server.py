"""A local HTTP server that speaks the chat-completions protocol, with faults, and some posts.

By hand, as a teacher that is always right: python tests/server.py [SECONDS A REPLY]
"""

import gzip
import json
import re
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CERTIFICATE = Path(__file__).parent / "localhost.pem"  # self-signed, with its key: for tests only
REASONING = (
    "The photo shows a small blue flower in the grass, and the post is about the wild ones, so "
    "this sums it up."
)
THOUGHTS = "Okay, the user wants the reasoning. It should be short."


def text_of(request):
    """The text of a request's only turn."""
    content = request["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def right(request):
    """What a good teacher replies: reasoning, and the keyphrases in the prompt."""
    keyphrases = text_of(request).rpartition("Keyphrases: ")[2].strip()
    return f"<think>{REASONING}</think><answer>{keyphrases}</answer>"


def completion(request, text, finish="stop", **message):
    """A chat completion as JSON."""
    message = {"role": "assistant", "content": text, "refusal": None} | message
    choice = {"index": 0, "finish_reason": finish, "logprobs": None, "message": message}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }


class Raw:
    """An answer as it goes over the wire: `body` is bytes, text, or a value for JSON.

    cut: only so many bytes are sent, then the connection is closed. drip: before the body a blank
    is sent every 0.1 s for so many seconds, in chunks.
    """

    def __init__(self, status, body="", headers=(), kind="application/json", cut=None, drip=0):
        body = body if isinstance(body, bytes | str) else json.dumps(body)
        self.body = body.encode() if isinstance(body, str) else body
        self.status, self.headers, self.kind = status, dict(headers), kind
        self.cut, self.drip = cut, drip

    def send(self, handler):
        handler.send_response(self.status)
        length = (
            {"Transfer-Encoding": "chunked"} if self.drip else {"Content-Length": len(self.body)}
        )
        for name, value in ({"Content-Type": self.kind} | length | self.headers).items():
            handler.send_header(name, str(value))
        handler.end_headers()
        end = time.monotonic() + self.drip
        while time.monotonic() < end:
            handler.wfile.write(b"1\r\n \r\n")
            handler.wfile.flush()
            time.sleep(0.1)
        if self.drip:
            handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(self.body), self.body))
        else:
            handler.wfile.write(self.body[: self.cut])
        if self.cut is not None:
            handler.close_connection = True


def error(status, message, headers=(), **fields):
    """An error as OpenAI writes it."""
    fields = {"message": message, "type": "error", "param": None, "code": None} | fields
    return Raw(status, {"error": fields}, headers)


def cut(request):
    """A completion of which half arrives before the connection is closed."""
    body = json.dumps(completion(request, right(request)))
    return Raw(200, body, cut=len(body) // 2)


def packed(request):
    body = gzip.compress(json.dumps(completion(request, right(request))).encode())
    return Raw(200, body, {"Content-Encoding": "gzip"})


def answer_of(request):
    return right(request).partition("</think>")[2]


HANG, DROP = "hang", "drop"  # no reply and no end; the connection is closed without a reply
PAGE = "<html><head><title>Bad gateway</title></head></html>"

# What real servers and gateways do, by name. A request gets what these make of it.

# Right replies in every dress: their reasoning is REASONING.
ANSWERS = {
    "plain": lambda r: right(r),
    "gzip": packed,
    "blanks first": lambda r: Raw(200, completion(r, right(r)), drip=0.2),
    "byte-order mark": lambda r: Raw(200, "\ufeff" + json.dumps(completion(r, right(r)))),
    "content in parts": lambda r: completion(r, [{"type": "text", "text": right(r)}]),
    "reasoning_content": lambda r: completion(r, answer_of(r), reasoning_content=REASONING),
    "reasoning": lambda r: completion(r, answer_of(r), reasoning=f"\n{REASONING}\n"),
    "thinking in parts": lambda r: completion(
        r, [{"type": "thinking", "thinking": [{"type": "text", "text": REASONING}]}, answer_of(r)]
    ),
    "thoughts beside": lambda r: completion(r, right(r), reasoning_content=THOUGHTS),
    "thoughts before": lambda r: f"<think>{THOUGHTS}</think>\n\n{right(r)}",
    "thoughts before, not opened": lambda r: f"{THOUGHTS} </think>\n\n{right(r)}",
    "end of a turn": lambda r: completion(r, right(r), "EOS"),
    # Announced: a request on a connection that closes unannounced may be lost, as a fault is.
    "then closed": lambda r: Raw(200, completion(r, right(r)), {"Connection": "close"}),
}

# What passes: (the answer, how the reason of a post begins that always meets it).
PASSING = {
    "429": (lambda r: error(429, "slow down"), "rate limit: 429 slow down"),
    "500": (lambda r: error(500, "oh no"), "server error: 500 oh no"),
    "502 page": (lambda r: Raw(502, PAGE, kind="text/html"), "server error: 502 <html><head>"),
    "408": (lambda r: Raw(408), "server error: 408 no word why"),
    "error in a 200": (
        lambda r: Raw(200, {"error": {"code": "502", "message": "provider"}}),
        "server error: 200 provider",
    ),
    "cut": (cut, "no connection: "),
    "disconnected": (lambda r: DROP, "no connection: "),
    "HTML": (
        lambda r: Raw(200, PAGE, kind="text/html"),
        "malformed reply: not the JSON of a chat completion",
    ),
    "empty": (lambda r: Raw(200), "malformed reply: not the JSON of a chat completion"),
}

# What concerns one post alone and is not asked again: (the answer, how its reason begins).
FAILING = {
    "filter": (lambda r: error(400, "x", code="content_filter"), "refused: 400 x"),
    "403": (lambda r: error(403, "flagged"), "refused: 403 flagged"),
    "finish content_filter": (
        lambda r: completion(r, "<think>The", "content_filter"),
        "not finished: the server says content_filter",
    ),
    "refusal": (lambda r: completion(r, None, refusal="I can't."), "refusal: I can't."),
}


class Server:
    """`reply(request, tries)` says what is answered: a text, a completion, a Raw, or HANG.

    `tries` counts, from 0, the requests with the same text. `log` has (request, headers, time) of
    each, the newest last. `tls` makes it an HTTPS server with a self-signed certificate.
    """

    def __init__(self, reply=lambda request, tries: right(request), keep_log=True, tls=False):
        server, self.reply, self.log, self.tries = self, reply, [], {}
        self.closing, lock = threading.Event(), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1  # the head and the body in one packet

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                tries = 0
                if keep_log:
                    text, headers = text_of(request), dict(self.headers) | {":path": self.path}
                    with lock:
                        tries = server.tries[text] = server.tries.get(text, -1) + 1
                        server.log.append((request, headers, time.time()))
                answer = server.reply(request, tries)
                if answer in (HANG, DROP):
                    server.closing.wait(300 if answer is HANG else 0)
                    self.close_connection = True
                    return
                answer = completion(request, answer) if isinstance(answer, str) else answer
                (Raw(200, answer) if isinstance(answer, dict) else answer).send(self)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *_):  # clients that were killed
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def asked(self):
        """The ids of the posts asked about, in the order of arrival."""
        return [re.search(r"post-\d+", text_of(request))[0] for request, _, _ in self.log]


def write_posts(folder, count, images=4, size=(60, 40), start=0):
    """posts.jsonl with `count` posts, each with its id in its text, and images that they share."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{number}.jpg")
    with open(folder / "posts.jsonl", "w", encoding="utf-8") as file:
        for index in range(start, start + count):
            record = {
                "id": f"post-{index}",
                "text": f"post-{index} some tiny blümchen 花",
                "image": f"{index % images}.jpg" if images and index % 5 else None,
                "keyphrases": [f"wildflower hour {index % 1000}", "flowers"],
                "lang": "en",
            }
            file.write(json.dumps(record) + "\n")
    return folder / "posts.jsonl"


def main():
    wait = float(sys.argv[1]) if sys.argv[1:] else 0

    def reply(request, tries):
        time.sleep(wait)
        return right(request)

    with Server(reply, keep_log=False) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
