"""Run modes on club worlds and print the table of what came of it, by hand (an hour or so for two modes):

    python tests/study.py --modes sft dynamic --worlds 0 1 2 3 4 --out out/study

A cell is one run of train.py with its defaults, in OUT/MODE-WORLD; one that is finished is not run again. The
numbers that are scored are the last step's. With <think> forbidden means `infer.py --think never` on the same model.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def script(name, *arguments):
    subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def cell(out, mode, world, extra):
    """Train and score one cell; returns its figures."""
    run, club = out / f"{mode}-{world}", out / f"clubworld-{world}"
    if not (run / "test_scores.json").exists():
        resume = ["--resume"] if (run / "settings.json").exists() else []
        script("train.py", "--seed", world, "--mode", mode, "--out", run, *resume, *extra)
    direct = run / "never_preds.jsonl"
    script("infer.py", "--data", club / "test.jsonl", "--out", direct, "--model", run / "last", "--think", "never",
           "--batch-size", 128, "--max-new-tokens", 64, "--workers", 1)
    never = json.loads(subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), str(direct), str(club / "test.jsonl"), "--train",
         str(club / "train.jsonl"), "--json"], check=True, capture_output=True, text=True).stdout)
    scores = json.loads((run / "test_scores.json").read_text())
    pairs = list(zip(lines(run / "test_preds.jsonl"), lines(club / "test.jsonl")))
    reasoned = {}
    for name, kinds, held_out in (("ABC", "ABC", None), ("E", "E", None)):
        chosen = [prediction["think"] is not None for prediction, post in pairs if post["kind"] in kinds]
        reasoned[name] = sum(chosen) / len(chosen)
    held_out = [prediction["keyphrases"][:1] == post["keyphrases"][:1] for prediction, post in pairs if post["held_out"]]
    return {"all": scores["all"]["F1@1"], "absent": scores["absent"]["F1@1"], "unseen": scores["unseen"]["F1@1"],
            "held-out clubs": sum(held_out) / len(held_out), "never: all": never["all"]["F1@1"],
            "never: unseen": never["unseen"]["F1@1"], "reasoned": scores["all"]["reasoned"],
            "reasoned ABC": reasoned["ABC"], "reasoned E": reasoned["E"], "tokens": scores["all"]["tokens"] / 100,
            "training s": sum(line["seconds"] for line in lines(run / "log.jsonl") if "loss" in line) / 100}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["sft", "dynamic"])
    parser.add_argument("--worlds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    args, extra = parser.parse_known_args()
    titles = None
    for mode in args.modes:
        rows = []
        for world in args.worlds:
            figures = cell(args.out, mode, world, extra)
            if titles is None:
                titles = list(figures)
                print("| mode | world | " + " | ".join(titles) + " |\n" + "|---" * (len(titles) + 2) + "|")
            rows.append(list(figures.values()))
            print(f"| {mode} | {world} | " + " | ".join(f"{100 * value:.1f}" for value in rows[-1]) + " |", flush=True)
        columns = list(zip(*rows))
        print(f"| {mode} | mean (range) | " + " | ".join(
            f"{100 * sum(c) / len(c):.1f} ({100 * min(c):.1f}–{100 * max(c):.1f})" for c in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
