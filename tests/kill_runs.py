"""Kill training runs at random moments, half of them inside a save, resume them, and compare with a run left alone. By hand:

    python tests/kill_runs.py --kills 80
    python tests/kill_runs.py --kills 20 --processes 2

Every run that was killed is resumed (and killed again) until it has had its share of kills and is let through; its weights
and its log must then equal, bit for bit, those of the run that was never stopped.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import data

ROOT = Path(__file__).parent.parent


def tensors(run):
    """Weights and optimizer state of a run's last checkpoint, as bytes."""
    from safetensors.torch import load_file

    folder = run / (run / "last").read_text().strip()
    return {
        (file.name, name): tensor.numpy().tobytes()
        for file in [folder / "model.safetensors", *sorted(folder.glob("optimizer/*"))]
        for name, tensor in load_file(file).items()
    }


def log(run):
    lines = (json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "waited")}
        for line in lines
    ]


def start(arguments, processes):
    launcher = (
        []
        if processes == 1
        else [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "127.0.0.1:0",
        ]
    )
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def descendants(pid):
    """A process and all that it started, whatever their groups."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def kill(process):
    for pid in descendants(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()


def wait_for(condition, process, pause=0.002):
    """Wait until a condition holds; False if the process ends first."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(pause)
    return False


def saving(out, since):
    """Whether a save begun after `since` is under way, or was cut."""
    for partial in out.glob(".step-*.partial"):
        try:
            if partial.stat().st_mtime > since:
                return True
        except FileNotFoundError:
            pass
    return False


def one_run(out, arguments, processes, kills, draw, counts):
    """Train a run to its end through so many kills."""
    while True:
        resume = (
            ["--resume"] if (out / "settings.json").exists() and (out / "last").exists() else []
        )
        process, began = start([*arguments, "--out", out, *resume], processes), time.time()
        if not kills:
            _, errors = process.communicate()
            if process.returncode:
                sys.exit(f"the last run ended with {process.returncode}: {errors[-2000:]}")
            return
        size = (out / "log.jsonl").stat().st_size if (out / "log.jsonl").exists() else 0
        inside = draw.random() < 0.5
        if inside:
            alive = wait_for(lambda: saving(out, began), process)
            time.sleep(draw.random() * 0.1)
        else:
            alive = wait_for(
                lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > size,
                process,
                0.01,
            )
            time.sleep(draw.random() * 2)
        if not alive and process.returncode:
            sys.exit(
                f"a run ended by itself with {process.returncode}: {process.communicate()[1][-2000:]}"
            )
        if process.poll() is None:
            kill(process)
            counts["kills"] += 1
            counts["a save was under way"] += saving(out, began)
            kills -= 1
        else:
            process.communicate()
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    parser.add_argument("--kills", type=data.count, default=80, help="kills in all")
    parser.add_argument(
        "--kills-a-run", type=data.count, default=5, help="kills that one run goes through"
    )
    parser.add_argument(
        "--processes", type=data.count, default=1, help="processes that train together"
    )
    parser.add_argument("--parallel", default="fsdp", help="how they share the model")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    draw, counts = random.Random(args.seed), {"kills": 0, "a save was under way": 0, "runs": 0}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run(
            [
                sys.executable,
                ROOT / "clubworld.py",
                "--out",
                folder / "club",
                "--seed",
                "100",
                "--train",
                "64",
                "--valid",
                "8",
                "--test",
                "8",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        arguments = [
            "--train",
            folder / "club" / "train.jsonl",
            "--valid",
            folder / "club" / "valid.jsonl",
            "--model",
            folder / "club" / "toy",
            "--epochs",
            3,
            "--batch-size",
            8,
            "--lr",
            2e-3,
            "--gamma",
            5,
            "--workers",
            1,
            "--max-new-tokens",
            4,
            "--save-every",
            1,
            "--parallel",
            args.parallel,
        ]
        one_run(folder / "whole", arguments, args.processes, 0, draw, counts)
        right = tensors(folder / "whole"), log(folder / "whole")
        while counts["kills"] < args.kills:
            out = folder / f"run{counts['runs']}"
            one_run(
                out,
                arguments,
                args.processes,
                min(args.kills_a_run, args.kills - counts["kills"]),
                draw,
                counts,
            )
            counts["runs"] += 1
            if (tensors(out), log(out)) != right:
                sys.exit(f"{out.name}: not what the run that was never stopped has; {counts}")
            print(json.dumps(counts), flush=True)
    print(
        f"{args.processes} processes: {counts['kills']} kills in {counts['runs']} runs, all as the run left alone"
    )


if __name__ == "__main__":
    main()
