"""How long evaluate.py takes. By hand: python tests/bench_evaluate.py [PREDICTIONS REFERENCES]

Without arguments it scores synthetic posts, as many as CMKP's test set and MMKP-360k's training set
have; else the two files. Prints the best time of three runs, from the start of the process to the
table, and the peak of memory.
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


def write_posts(folder, posts, seed=0):
    """Write posts of about 28 words and predictions of five phrases: (predictions, references)."""
    rng = random.Random(seed)
    syllables = ["".join(pair) for pair in zip("bcdfglmnprstvz" * 5, "aeiou" * 14, strict=True)]
    endings = ["", "", "s", "ing", "ed", "ly", "ation", "er"]
    stems = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(60_000)]
    words = list(dict.fromkeys(stem + rng.choice(endings) for stem in stems))
    # Word frequencies fall off as in language: the logarithm of the rank is even.
    ranks = [int(len(words) ** rng.random()) - 1 for _ in range(500_000)]

    def phrase(length):
        start = rng.randrange(len(ranks) - length)
        return " ".join(words[rank] for rank in ranks[start : start + length])

    paths = folder / f"preds{posts}.jsonl", folder / f"test{posts}.jsonl"
    with open(paths[0], "w") as predictions, open(paths[1], "w") as references:
        for number in range(posts):
            text, keyphrases = (
                phrase(28),
                [phrase(rng.randint(1, 3)) for _ in range(rng.choice([1, 1, 2]))],
            )
            guesses = [
                *keyphrases[: rng.randrange(2)],
                *(phrase(rng.randint(1, 3)) for _ in range(5)),
            ][:5]
            references.write(
                json.dumps({"id": str(number), "text": text, "keyphrases": keyphrases}) + "\n"
            )
            predictions.write(
                json.dumps({"id": str(number), "keyphrases": guesses, "tokens": 9}) + "\n"
            )
    return paths


def measure(*arguments, runs=3):
    """Print the best wall time of some runs, in seconds, and the peak of resident memory, in GB."""
    best, peak = float("inf"), 0
    for _ in range(runs):
        start = time.perf_counter()
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"evaluate.py {' '.join(map(str, arguments))} failed")
        best, peak = min(best, time.perf_counter() - start), max(peak, usage.ru_maxrss)
    options = " ".join(
        str(argument) for argument in arguments[2:] if not isinstance(argument, Path)
    )
    print(
        f"{Path(arguments[0]).name:16} {options:32} {best:6.2f} s  {peak / 1e6:5.2f} GB", flush=True
    )


def main():
    if sys.argv[1:]:
        cases, folder = [tuple(map(Path, sys.argv[1:]))], None
    else:
        folder = tempfile.TemporaryDirectory()
        cases = [write_posts(Path(folder.name), posts) for posts in (5372, 330_000)]
    for predictions, references in cases:
        measure(predictions, references)
        measure(predictions, references, "--train", references)
        measure(predictions, references, "--bootstrap", 1000)
        measure(predictions, references, "--against", predictions, runs=1)


if __name__ == "__main__":
    main()
