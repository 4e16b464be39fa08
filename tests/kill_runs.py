"""Kill training runs at random moments, resume them, and compare with a run that was left alone.

    python tests/kill_runs.py --kills 80
    python tests/kill_runs.py --kills 20 --processes 2

Half of the kills come inside a save. A run is resumed and killed again until it has had its share
of kills, and then left to finish; its weights and its log must equal, bit for bit, those of the run
that was never stopped.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from support.console import HelpFormatter, positive_int  # noqa: E402


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
    times = ("seconds", "waited")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def start(arguments, processes):
    launcher = []
    if processes > 1:
        launcher = f"-m torch.distributed.run --nproc-per-node {processes}".split()
        launcher += "--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0".split()
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
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
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
    for folder in out.glob(".step-*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if folder.stat().st_mtime > since:
                return True
    return False


def one_run(out, arguments, processes, kills, draw, counts):
    """Train a run to its end through `kills` kills."""
    log_file = out / "log.jsonl"

    def log_size():
        return log_file.stat().st_size if log_file.exists() else 0

    while True:
        resume = ["--resume"] if (out / "last").exists() else []
        process, began = start([*arguments, "--out", out, *resume], processes), time.time()
        if not kills:
            _, errors = process.communicate()
            if process.returncode:
                sys.exit(f"the last run ended with {process.returncode}: {errors[-2000:]}")
            return
        size = log_size()
        if draw.random() < 0.5:
            alive = wait_for(partial(saving, out, began), process)
            time.sleep(draw.random() * 0.1)
        else:
            alive = wait_for(lambda size=size: log_size() > size, process, 0.01)
            time.sleep(draw.random() * 2)
        if not alive and process.returncode:
            _, errors = process.communicate()
            sys.exit(f"a run ended by itself with {process.returncode}: {errors[-2000:]}")
        if process.poll() is None:
            kill(process)
            counts["kills"] += 1
            counts["a save was under way"] += saving(out, began)
            kills -= 1
        else:
            process.communicate()
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--kills", type=positive_int, default=80, help="kills in all")
    add("--kills-a-run", type=positive_int, default=5, help="kills of one run")
    add("--processes", type=positive_int, default=1, help="processes that train together")
    add("--parallel", default="fsdp", help="how they share the model")
    add("--seed", type=int, default=0, help="sets the moments of the kills")
    args = parser.parse_args()
    draw, counts = random.Random(args.seed), {"kills": 0, "a save was under way": 0, "runs": 0}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        club, whole = folder / "club", folder / "whole"
        sizes = "--seed 100 --train 64 --valid 8 --test 8".split()
        command = [sys.executable, "-m", "tools.clubworld", "--out", club, *sizes]
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        subprocess.run(command, check=True, cwd=ROOT, **silent)
        files = ["--train", club / "train.jsonl", "--valid", club / "valid.jsonl"]
        options = "--epochs 3 --batch-size 8 --lr 2e-3 --gamma 5 --workers 1 --save-every 1"
        options = [*options.split(), "--max-new-tokens", 4, "--parallel", args.parallel]
        arguments = [*files, "--model", club / "toy", *options]
        one_run(whole, arguments, args.processes, 0, draw, counts)
        right = tensors(whole), log(whole)
        while counts["kills"] < args.kills:
            out = folder / f"run{counts['runs']}"
            kills = min(args.kills_a_run, args.kills - counts["kills"])
            one_run(out, arguments, args.processes, kills, draw, counts)
            counts["runs"] += 1
            if (tensors(out), log(out)) != right:
                sys.exit(f"{out.name}: not what the run that was never stopped has; {counts}")
            print(json.dumps(counts), flush=True)
    kills = f"{counts['kills']} kills in {counts['runs']} runs"
    print(f"{args.processes} processes: {kills}, all as the run left alone")


if __name__ == "__main__":
    main()
