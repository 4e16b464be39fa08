"""Kill gen_cot.py at random moments while its server misbehaves in every known way. By hand:

    python tests/kill_gen_cot.py                    # 2,000 posts, ten kills
    python tests/kill_gen_cot.py --posts 500 --kills 30 --seed 3

Each run that was killed is started again; the last one ends by itself. Then every post must be in
exactly one of the two files, no post may have been asked for after it was in one of them, and the
key, which the server repeats wherever it can, must be in no file and on no screen.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from server import (  # noqa: E402
    ANSWERS,
    FAILING,
    HANG,
    PASSING,
    Raw,
    Server,
    completion,
    error,
    right,
    text_of,
    write_posts,
)

KEY = "sk-proj-ThisMustBeNowhere-0123456789"
# The command itself, but with shorter waits between two tries.
SCRIPT = "import sys, gen_cot; sys.exit(gen_cot.write_reasoning(gen_cot.parse_args(), 0.02))"


class Misbehaving:
    """The replies of a server: which, the seed, the post and the number of its request decide."""

    def __init__(self, seed):
        self.seed, self.lock = seed, threading.Lock()
        self.taken = set()  # posts that are in one of the files
        self.asked_again = []  # requests for these
        self.faults = Counter()

    def __call__(self, request, tries):
        number = int(re.search(r"post-(\d+)", text_of(request))[1])
        with self.lock:
            if number in self.taken:
                self.asked_again.append(number)
        post = random.Random(f"{self.seed} {number}")
        name, answer = "right", post.choice(list(ANSWERS.values()))
        if post.random() < 0.05:
            name = post.choice(list(FAILING))
            answer = FAILING[name][0]
        once = random.Random(f"{self.seed} {number} {tries}")
        time.sleep(once.expovariate(20))
        if once.random() < 0.25:
            name, answer = once.choice(list(self.temporary().items()))
        with self.lock:
            self.faults[name] += 1
        return answer(request)

    @staticmethod
    def temporary():
        return {name: answer for name, (answer, _) in PASSING.items()} | {
            "hang": lambda request: HANG,
            "drip": lambda r: Raw(200, completion(r, right(r)), drip=20),
            "closed": lambda r: Raw(200, completion(r, right(r)), cut=10**9),
            "wrong": lambda r: right(r).replace("flowers", "else"),
            "key": lambda r: error(500, f"sent with Bearer {KEY}", {"X-Echo": KEY}),
            "key in JSON": lambda r: Raw(503, json.dumps({"error": KEY}).replace("-", "\\u002d")),
            "slow down": lambda r: error(429, KEY, {"retry-after": "0.3"}),
        }


def in_files(folder):
    """The numbers of the posts in each of the two files, whole lines only."""
    found = []
    for name in ("cot.jsonl", "cot.failed.jsonl"):
        path = folder / name
        raw = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        found.append([int(json.loads(line)["id"].removeprefix("post-")) for line in raw])
    return found


def start(folder, url, screen):
    arguments = [folder / "posts.jsonl", "--out", folder / "cot.jsonl", "--model", "m"]
    options = ["--base-url", url, "--workers", 16, "--timeout", 2, "--max-retries", 8]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments + options)],
        cwd=ROOT,
        stdout=screen,
        stderr=screen,
        env=os.environ | {"OPENAI_API_KEY": KEY},
    )


def kill_run(folder, posts, kills, seed=0):
    """Run, kill, go on, check. Returns (requests, a Counter of what the server did)."""
    draw, behaviour = random.Random(seed), Misbehaving(seed)
    write_posts(folder, posts)
    with Server(behaviour) as server, open(folder / "screen.txt", "wb") as screen:
        for kill in range(kills + 1):
            process = start(folder, server.url, screen)
            moment = len(behaviour.taken) + draw.randrange(1, posts // (kills + 1))
            while process.poll() is None:
                behaviour.taken = set(sum(in_files(folder), []))
                if kill < kills and len(behaviour.taken) >= moment:
                    time.sleep(draw.uniform(0, 0.05))
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.02)
            code = process.wait()
            behaviour.taken = set(sum(in_files(folder), []))
            print(f"run {kill + 1}: exit code {code}, {len(behaviour.taken)} posts", flush=True)
            assert kill == kills or code == -signal.SIGKILL, "it ended before it was killed"
    good, failed = in_files(folder)
    assert sorted(good + failed) == list(range(posts)), "a post is not in exactly one file"
    assert good == sorted(good) and failed == sorted(failed) and code == (1 if failed else 0)
    assert not behaviour.asked_again, f"asked again: {behaviour.asked_again}"
    for path in folder.iterdir():
        assert KEY.encode() not in path.read_bytes(), f"the key is in {path.name}"
    return len(server.log), behaviour.faults


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("posts", 2000), ("kills", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        requests, faults = kill_run(Path(folder), args.posts, args.kills, args.seed)
        good, failed = in_files(Path(folder))
    print(
        f"{args.posts} posts, {args.kills} kills, {requests} requests in "
        f"{time.monotonic() - started:.0f} s: {len(good)} with reasoning, {len(failed)} failed; "
        "none in both or neither, none asked for again, the key nowhere"
    )
    print(", ".join(f"{count} {name}" for name, count in faults.most_common()))


if __name__ == "__main__":
    main()
