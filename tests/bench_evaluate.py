"""How long evaluate.py takes. By hand: python tests/bench_evaluate.py

It scores synthetic posts, as many as CMKP's test set and MMKP-360k's training set have. Prints the
best time of three runs, from the start of the process to the table, and the peak of memory.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "evaluate.py"
SIZES = 5372, 330_000  # posts


def write_posts(folder, posts):
    """Write posts of 28 words and predictions of five phrases: (predictions, references)."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfglmnprstvz" for b in "aeiou"]
    endings = ["", "", "s", "ing", "ed", "ly", "ation", "er"]
    stems = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(60_000)]
    words = list({stem + rng.choice(endings): None for stem in stems})
    # Word frequencies fall off as in language: the logarithm of the rank is even.
    ranks = [int(len(words) ** rng.random()) - 1 for _ in range(500_000)]

    def phrase(length):
        start = rng.randrange(len(ranks) - length)
        return " ".join(words[rank] for rank in ranks[start : start + length])

    def phrases(count):
        return [phrase(rng.randint(1, 3)) for _ in range(count)]

    paths = folder / f"preds{posts}.jsonl", folder / f"test{posts}.jsonl"
    with open(paths[0], "w") as predictions, open(paths[1], "w") as references:
        for number in range(posts):
            post = {"id": str(number), "text": phrase(28), "keyphrases": phrases(rng.randint(1, 2))}
            guesses = (post["keyphrases"][: rng.randrange(2)] + phrases(5))[:5]
            prediction = {"id": str(number), "keyphrases": guesses, "tokens": 9}
            references.write(json.dumps(post) + "\n")
            predictions.write(json.dumps(prediction) + "\n")
    return paths


def measure(*arguments, runs=3):
    """Print the best wall time of some runs, in seconds, and the peak of resident memory, in GB."""
    times, peak = [], 0
    for _ in range(runs):
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, SCRIPT, *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"evaluate.py {arguments} failed")
        times.append(time.perf_counter() - start)
        peak = max(peak, usage.ru_maxrss)
    shown = f"{Path(arguments[0]).name:16} {' '.join(arguments[2:3]):12}"
    print(f"{shown} {min(times):6.2f} s  {peak / 1e6:5.2f} GB", flush=True)


def main():
    with tempfile.TemporaryDirectory() as folder:
        for posts in SIZES:
            predictions, references = write_posts(Path(folder), posts)
            measure(predictions, references)
            measure(predictions, references, "--train", references)
            measure(predictions, references, "--bootstrap", "1000")
            measure(predictions, references, "--against", predictions, runs=1)


if __name__ == "__main__":
    main()
