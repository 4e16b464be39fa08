"""A real HTTP server on 127.0.0.1 that speaks the chat-completions protocol, with faults at will; posts to ask about.

By hand, as a teacher that is always right: python tests/server.py [SECONDS A REPLY]
"""

import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REASONING = "The photo shows a small blue flower in the grass, and the post is about the wild ones, so this sums it up."


def text_of(request):
    """The text part of a request's only turn."""
    return request["messages"][0]["content"][-1]["text"]


def right(request):
    """What a good teacher replies: reasoning, and the keyphrases that stand in the prompt."""
    keyphrases = text_of(request).rpartition("Keyphrases: ")[2].strip()
    return f"<think>{REASONING}</think><answer>{keyphrases}</answer>"


def completion(request, text, finish="stop", **message):
    """A chat completion as JSON."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "logprobs": None,
                "message": {"role": "assistant", "content": text, "refusal": None} | message,
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }


class Raw:
    """Some other answer than a completion."""

    def __init__(self, status, body="", headers=(), kind="application/json"):
        self.body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.status, self.headers, self.kind, self.cut = status, dict(headers), kind, None


def error(status, message, headers=(), **fields):
    return Raw(
        status,
        {"error": {"message": message, "type": "error", "param": None, "code": None} | fields},
        headers,
    )


def cut(request):
    """A completion of which half arrives before the connection is cut."""
    raw = Raw(200, completion(request, right(request)))
    raw.cut = len(raw.body) // 2
    return raw


HANG, HTML = (
    "hang",
    Raw(200, "<!DOCTYPE html><html><body>Bad gateway</body></html>", kind="text/html"),
)


class Server:
    """`reply(request, tries)` says what is answered: a text, a completion, a Raw, or HANG. `tries` counts, from 0, the
    requests with the same text. `log` has (request, headers, time) of each, the newest last."""

    def __init__(self, reply=lambda request, tries: right(request), keep_log=True):
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
                    with lock:
                        tries = server.tries[text_of(request)] = (
                            server.tries.get(text_of(request), -1) + 1
                        )
                        server.log.append(
                            (request, dict(self.headers) | {":path": self.path}, time.time())
                        )
                answer = server.reply(request, tries)
                if answer is HANG:
                    server.closing.wait(300)
                    self.close_connection = True
                    return
                answer = completion(request, answer) if isinstance(answer, str) else answer
                raw = Raw(200, answer) if isinstance(answer, dict) else answer
                self.send_response(raw.status)
                for name, value in (
                    {"Content-Type": raw.kind, "Content-Length": len(raw.body)} | raw.headers
                ).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(raw.body[: raw.cut])
                if raw.cut:
                    self.close_connection = True

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *_):  # clients that were killed
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

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
    """posts.jsonl with `count` posts, each naming its id in its text, and a few images that they share."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{number}.jpg")
    with open(folder / "posts.jsonl", "w", encoding="utf-8") as file:
        for index in range(start, start + count):
            image = f"{index % images}.jpg" if images and index % 5 else None
            file.write(
                json.dumps(
                    {
                        "id": f"post-{index}",
                        "text": f"post-{index} some tiny blümchen 花",
                        "image": image,
                        "keyphrases": [f"wildflower hour {index % 1000}", "flowers"],
                        "lang": "en",
                    }
                )
                + "\n"
            )
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
