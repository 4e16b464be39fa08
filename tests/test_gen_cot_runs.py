"""Runs of the teacher that meet faults, and that are stopped, killed and go on."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

import gen_cot
from evaluate import UserError
from server import (
    ANSWERS,
    FAILING,
    HANG,
    PASSING,
    REASONING,
    Raw,
    Server,
    completion,
    error,
    right,
    write_posts,
)
from support import client
from test_gen_cot import ROOT, gen, ids, lines, no_keys, number, python, written  # noqa: F401
from tiny import write

# Beside what a server does wrong: what hangs, and replies that are not accepted.
FAULTS = {name: fault for name, fault in (PASSING | FAILING).items() if "429" not in name} | {
    "hang": (lambda request: HANG, "time-out: no reply in 3 s"),
    "wrong": (lambda request: written(REASONING, "other"), "other keyphrases: other"),
    "short": (lambda request: right(request).replace(REASONING, "why"), "too short: 1 word"),
}
REJECTED = ("wrong", "short")
RATE_LIMITS = {name: fault for name, fault in PASSING.items() if "429" in name}
TEMPORARY = [name for name in FAULTS | RATE_LIMITS if name not in FAILING]


def test_500_posts_of_which_one_request_in_four_meets_a_fault(tmp_path, capsys):
    """Right replies come in every dress; each fault lasts for one post, and passes for others."""
    posts, draw = write_posts(tmp_path, 500), random.Random(7)
    records = lines(posts)
    for index in (50, 150, 250):
        records[index + 1]["image"] = "lost.jpg"
    write(posts, records)
    found = [index for index in range(500) if records[index]["image"] != "lost.jpg"]
    lasting = dict(zip(draw.sample(found, len(FAULTS)), FAULTS, strict=True))
    drawn = (draw.choice(TEMPORARY) if draw.random() < 0.25 else None for _ in range(500 * 32))
    passing = [[next(drawn) for _ in range(32)] for _ in records]
    dresses = [draw.choice(list(ANSWERS)) for _ in records]
    faulty = []

    def fault(index, tries):
        return lasting.get(index) or passing[index][tries]

    def reply(request, tries):
        name = fault(number(request), tries)
        faulty.append(name is not None)
        if name is None:
            return ANSWERS[dresses[number(request)]](request)
        return (FAULTS | RATE_LIMITS)[name][0](request)

    def fate(index):
        """(how many requests a post takes, the fault that it ends with or None), by the rules."""
        used = rejected = in_a_row = 0
        while True:
            name = fault(index, used)
            used += 1
            if name in REJECTED:
                rejected, in_a_row = rejected + 1, 0
            elif name in FAULTS:
                in_a_row += 1
            if name is None or name in FAILING or rejected == 3 or in_a_row == 3:
                return used, name

    with Server(reply) as server:
        assert gen(posts, server, "--timeout", 3, "--max-retries", 2) == 1
    assert 0.22 < sum(faulty) / len(faulty) < 0.36 and len(faulty) == len(server.log)
    good, failed = lines(tmp_path / "cot.jsonl"), lines(tmp_path / "cot.failed.jsonl")
    fates = [fate(index) if index in found else (0, "lost") for index in range(500)]
    new = {"cot": REASONING, "teacher": "teacher"}
    assert good == [records[index] | new for index in range(500) if fates[index][1] is None]
    assert len(good) > 450
    assert ids(failed) == [f"post-{index}" for index in range(500) if fates[index][1]]
    for record in failed:
        index = int(record["id"].removeprefix("post-"))
        name = fates[index][1]
        expected = FAULTS[name][1] if name in FAULTS else "unreadable image: no such file"
        assert record["reason"].startswith(expected), record
        tried_in_vain = name in FAULTS and name not in FAILING and name not in REJECTED
        assert ("(3 tries)" in record["reason"]) == tried_in_vain
        if index in lasting or name == "lost":
            written_something = name in REJECTED or name.startswith("finish")
            assert (record["reply"] is not None) == written_something
        assert {field: record[field] for field in records[index]} == records[index]
    tries = Counter(server.asked())
    assert [used for used, _ in fates] == [tries[identity] for identity in ids(records)]
    told = capsys.readouterr().err
    assert f"{len(good)} of 500 posts with reasoning; 23 to 23 words, median 23" in told
    assert f"{len(failed)} posts failed: " in told
    sent = int(re.search(r"(\d+) requests, [\d.]+ a second", told)[1])
    assert 0 <= sent - len(server.log) < 5  # a busy machine may let one wait until it times out
    assert re.search(r"\d+ failed, \d+\.\d requests/s, [\d.]+k tokens\]", told)
    kinds = Counter(record["reason"].partition(":")[0] for record in failed)
    assert kinds["unreadable image"] == 3
    assert all(f" {count} {kind}" in told for kind, count in kinds.items())


KEY = "sk-proj-ThisMustBeNowhere-0123456789"
ECHOES = {
    "key": lambda r: error(500, f"sent with Bearer {KEY}", {"X-Echo": KEY}),
    "key in JSON": lambda r: Raw(503, json.dumps({"error": KEY}).replace("-", "\\u002d")),
    "429": lambda r: error(429, KEY, {"retry-after": "0.3"}),  # the only one: it is on the screen
    "drip": lambda r: Raw(200, completion(r, right(r)), drip=20),
}
# The command itself, but with shorter waits between two tries.
SCRIPT = "import sys, gen_cot; sys.exit(gen_cot.write_reasoning(gen_cot.parse_args(), 0.02))"


def test_killed_while_the_server_misbehaves_in_every_way(tmp_path):
    """Each post is in one of the two files, none is asked for again, the key is nowhere."""
    posts, draw, met = write_posts(tmp_path, 120), random.Random(0), Counter()
    files = tmp_path / "cot.jsonl", tmp_path / "cot.failed.jsonl"
    passing = {name: (FAULTS | RATE_LIMITS)[name][0] for name in TEMPORARY} | ECHOES
    failing = {name: answer for name, (answer, _) in FAILING.items()}
    taken, asked_again = set(), []

    def done():
        return sum((ids(lines(file)) for file in files), [])

    def reply(request, tries):
        post = f"post-{number(request)}"
        if post in taken:
            asked_again.append(post)
        of_post, of_request = random.Random(post), random.Random(f"{post} {tries}")
        kinds = failing if of_post.random() < 0.05 else ANSWERS
        name = of_post.choice(list(kinds))
        time.sleep(of_request.expovariate(20))
        if of_request.random() < 0.25:
            kinds, name = passing, of_request.choice(list(passing))
        met[name] += 1
        return kinds[name](request)

    with Server(reply) as server, open(tmp_path / "screen.txt", "wb") as screen:
        options = f"--model m --base-url {server.url} --workers 16 --timeout 2 --max-retries 8"
        command = [sys.executable, "-c", SCRIPT, posts, "--out", files[0], *options.split()]
        environment = os.environ | {"OPENAI_API_KEY": KEY}
        for kill in (True, True, False):
            moment = len(taken) + draw.randrange(1, 40)
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=screen, stderr=screen, env=environment
            )
            while process.poll() is None:
                taken.update(done())
                if kill and len(taken) >= moment:
                    time.sleep(draw.uniform(0, 0.05))
                    process.kill()
                    break
                time.sleep(0.02)
            assert process.wait() == (-signal.SIGKILL if kill else 1)
            taken.update(done())
    order, (good, failed) = ids(lines(posts)), (ids(lines(file)) for file in files)
    assert sorted(good + failed) == sorted(order) and not asked_again
    for part in (good, failed):
        assert part and part == sorted(part, key=order.index)
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes(), f"the key is in {path.name}"
    assert 120 < len(server.log) < 500 and len(met.keys() - ANSWERS.keys()) > 15


def test_a_torn_line_is_gone_before_anything_is_added(tmp_path):
    posts = write_posts(tmp_path, 12)
    with Server() as server:
        assert gen(posts, server, "--limit", 4) == 0
        for file in ("cot.jsonl", "cot.failed.jsonl"):
            with open(tmp_path / file, "ab") as out:
                out.write(b'{"id": "post-1')
    with (
        Server(lambda r, _: right(r) if len(server.log) < 4 else error(401, "no")) as server,
        pytest.raises(UserError, match="401"),
    ):
        gen(posts, server, "--workers", 1)
    with Server() as server:
        assert gen(posts, server) == 0 and len(server.log) == 5
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "answer, times",
    [(lambda request: error(429, "later", {"Retry-After": "300"}), 1), (lambda request: HANG, 2)],
    ids=["once while all wait", "twice while all hang"],
)
def test_ctrl_c_ends_the_process(tmp_path, answer, times):
    posts = write_posts(tmp_path, 50)
    arguments = [posts, "--out", "cot.jsonl", "--model", "m", "--workers", 8]

    def all_under_way():
        return len(server.log) >= 5 + 8 and len(lines(tmp_path / "cot.jsonl")) == 5

    def reply(request, tries):
        if number(request) < 5:
            return right(request)
        wait_for(all_under_way)
        return answer(request)

    with Server(reply) as server:
        process = python(*arguments, "--base-url", server.url, cwd=tmp_path)
        wait_for(all_under_way)
        time.sleep(0.2)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        _, told = process.communicate(timeout=100)  # the server's own patience is 300 s
    assert process.returncode == 130
    assert "Traceback" not in told and "stopped: cot.jsonl has 5 of 50 posts" in told
    with Server() as server:
        assert gen(posts, server, "--model", "m") == 0
    assert sorted(server.asked()) == sorted(ids(lines(posts))[5:])
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))


def test_few_items_are_begun_ahead_and_errors_of_the_work_come_out():
    begun = []

    async def work(item):
        begun.append(item)
        return item

    async def divide(item):
        return 1 / (item - 50)

    options = gen_cot.parse_args(["posts.jsonl", "--out", "a", "--model", "m"])
    done = client.Client("http://127.0.0.1:1", options, workers=4).each(work, range(1000))
    first = [next(done) for _ in range(10)]
    time.sleep(0.2)
    assert len(begun) <= 10 + 2 * 4 and set(first) <= set(begun)
    assert sorted([*first, *done]) == list(range(1000))
    with pytest.raises(ZeroDivisionError):
        list(client.Client("http://127.0.0.1:1", options, workers=4).each(divide, range(1000)))


def test_replies_under_way_at_ctrl_c_are_kept(tmp_path):
    posts = write_posts(tmp_path, 50)
    arguments = [posts, "--out", "cot.jsonl", "--model", "m", "--workers", 8]

    def reply(request, tries):
        time.sleep(1)
        return right(request)

    with Server(reply) as server:
        process = python(*arguments, "--base-url", server.url, cwd=tmp_path)
        wait_for(lambda: len(server.log) >= 8)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert sorted(ids(lines(tmp_path / "cot.jsonl"))) == sorted(server.asked())


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path):
    posts, before = write_posts(tmp_path, 40), resource.getrlimit(resource.RLIMIT_FSIZE)
    with Server() as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
        try:
            with pytest.raises(UserError, match="cot.jsonl: can't be written"):
                gen(posts, server)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = ids(lines(tmp_path / "cot.jsonl"))
    with Server() as server:
        assert 5 < len(kept) < 40 and gen(posts, server) == 0
    assert sorted(server.asked() + kept) == sorted(ids(lines(posts)))
    assert ids(lines(tmp_path / "cot.jsonl")) == ids(lines(posts))
