"""How long data.py's split, stats and check take, by hand: python tests/bench_data_tools.py [POSTS]

On synthetic posts as many as MMKP-360k has for training, or POSTS: 28 words of text, one to four keyphrases as
common as 1 / rank, a twentieth of them retweets. Prints wall time and peak memory (of the largest process) of each.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "data.py"


def write_posts(path, posts, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioubcdfghlmnprst", k=rng.randint(2, 9))) for _ in range(60_000)]
    # The logarithm of the rank is even, as in language.
    some = lambda count: [words[int(len(words) ** rng.random()) - 1] for _ in range(count)]
    texts = []
    with open(path, "w") as file:
        for number in range(posts):
            keyphrases = [
                f"{words[rank % 60_000]} {rank}"
                for rank in {
                    int((posts / 2) ** rng.random()) for _ in range(rng.choice([1, 1, 1, 2, 2, 4]))
                }
            ]
            text = " ".join(some(28) + keyphrases[: rng.random() < 0.4])
            if texts and rng.random() < 0.05:
                text = rng.choice(texts)
            texts.append(text)
            record = {"id": str(number), "text": text, "image": None, "keyphrases": keyphrases}
            file.write(json.dumps(record) + "\n")


def measure(*arguments):
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"data.py {' '.join(map(str, arguments))} failed")
    words = " ".join(str(argument) for argument in arguments if not isinstance(argument, Path))
    print(
        f"{words:60} {time.perf_counter() - start:6.1f} s  {usage.ru_maxrss / 1e6:5.2f} GB",
        flush=True,
    )


def main():
    posts = int(sys.argv[1]) if sys.argv[1:] else 330_000
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "posts.jsonl", Path(folder) / "split"
        write_posts(path, posts)
        for overlap in (0.4492, 0.8):
            measure(
                "split",
                path,
                "--overlap",
                overlap,
                "--test",
                posts // 10,
                "--valid",
                posts // 10,
                "--out",
                out,
            )
        measure("stats", out / "train.jsonl", out / "test.jsonl")
        measure("check", path, "--workers", 1)


if __name__ == "__main__":
    main()
