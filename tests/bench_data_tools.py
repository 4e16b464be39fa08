"""Time and memory of opening many posts for training, and of split, stats and check.

Run by hand: python tests/bench_data_tools.py [POSTS]

The posts are made up, as many as MMKP-360k has for training, or POSTS: 28 words of text, one to
four keyphrases as common as 1 / rank, a twentieth of them retweets. Prints wall time and peak
memory of each.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
READ_POSTS = """
import sys, random, data
posts = data.Posts(sys.argv[1], for_training=True)
for _ in range(1000):
    posts[random.randrange(len(posts))]
"""


def write_posts(path, posts, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioubcdfghlmnprst", k=rng.randint(2, 9))) for _ in range(60_000)]
    texts = []
    with open(path, "w") as file:
        for number in range(posts):
            # The logarithm of a rank is uniform, as in language.
            count = rng.choice([1, 1, 1, 2, 2, 4])
            ranks = {int((posts / 2) ** rng.random()) for _ in range(count)}
            keyphrases = [f"{words[rank % 60_000]} {rank}" for rank in ranks]
            text = [words[int(len(words) ** rng.random()) - 1] for _ in range(28)]
            text = " ".join(text + keyphrases[: rng.random() < 0.4])
            if texts and rng.random() < 0.05:
                text = rng.choice(texts)
            texts.append(text)
            record = {"id": str(number), "text": text, "image": None, "keyphrases": keyphrases}
            file.write(json.dumps(record) + "\n")


def measure(name, *command):
    """Print the wall time and peak memory of a Python process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name} failed")
    seconds = time.perf_counter() - start
    print(f"{name:20} {seconds:6.1f} s  {usage.ru_maxrss / 1e6:5.2f} GB", flush=True)


def main():
    posts = int(sys.argv[1]) if sys.argv[1:] else 330_000
    tool = "-m", "tools.dataset"
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "posts.jsonl", Path(folder) / "split"
        write_posts(path, posts)
        measure("open", "-c", READ_POSTS, path)
        split = *tool, "split", path, "--out", out, "--test", posts // 10, "--valid", posts // 10
        for overlap in (0.4492, 0.8):
            measure(f"split to {overlap:.2%}", *split, "--overlap", overlap)
        measure("stats", *tool, "stats", out / "train.jsonl", out / "test.jsonl")
        measure("check", *tool, "check", path)


if __name__ == "__main__":
    main()
