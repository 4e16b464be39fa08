"""Time and memory of opening 330,000 records, and time of reading 1,000 of them at random.

Run by hand: python tests/bench_posts.py [POSTS]
"""

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Posts  # noqa: E402


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main():
    count, draw = int(sys.argv[1]) if sys.argv[1:] else 330_000, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posts.jsonl"
        (Path(folder) / "images").mkdir()
        (Path(folder) / "images" / "0.jpg").touch()  # training needs one that is there
        with open(path, "w") as file:
            for number in range(count):
                words = " ".join(f"word{draw.randrange(9999)}" for _ in range(28))
                record = {
                    "id": f"post-{number}",
                    "text": words,
                    "image": f"images/{number}.jpg",
                    "keyphrases": [words[:12], words[-9:]],
                    "cot": words * 3,
                }
                file.write(json.dumps(record) + "\n")
        before, start = peak(), time.perf_counter()
        posts = Posts(path, for_training=True)
        seconds, size = time.perf_counter() - start, path.stat().st_size / 1e6
        print(f"open: {seconds:.2f} s, {size:.0f} MB of JSONL")
        print(f"memory: {peak():.0f} MB at the peak, {before:.0f} MB of it before opening")
        start = time.perf_counter()
        for _ in range(1000):
            posts[draw.randrange(count)]
        print(f"1,000 random reads: {time.perf_counter() - start:.3f} s")


if __name__ == "__main__":
    main()
