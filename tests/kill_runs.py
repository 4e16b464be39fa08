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
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from support.console import HelpFormatter, positive_int  # noqa: E402


def result(run):
    """(weights and optimizer state of a run's last checkpoint as bytes, its log without times)."""
    from safetensors.torch import load_file

    folder = run / (run / "last").read_text().strip()
    tensors = {
        (file.name, name): tensor.numpy().tobytes()
        for file in [folder / "model.safetensors", *folder.glob("optimizer/*")]
        for name, tensor in load_file(file).items()
    }
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return tensors, [line | {"seconds": None, "waited": None} for line in log]


def start(arguments, processes):
    launcher = f"-m torch.distributed.run --nproc-per-node {processes}".split()
    launcher += "--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0".split()
    command = [sys.executable, *(launcher if processes > 1 else []), ROOT / "train.py", *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), start_new_session=True, **pipes)


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


def wait_for(condition, process):
    """Wait until a condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.002)


def saving(out, since):
    """Whether a save begun after `since` is under way, or was cut."""
    with contextlib.suppress(FileNotFoundError):
        return (out / ".partial").stat().st_mtime > since
    return False


def one_run(out, arguments, args, kills, draw, counts):
    """Train a run to its end through `kills` kills."""
    log = out / "log.jsonl"

    def log_size():
        return log.stat().st_size if log.exists() else 0

    while True:
        resume = ["--resume"] if (out / "last").exists() else []
        began, size = time.time(), log_size()
        process = start([*arguments, "--out", out, *resume], args.processes)
        if kills and draw.random() < 0.5:
            wait_for(lambda began=began: saving(out, began), process)
            time.sleep(draw.random() * 0.1)
        elif kills:
            wait_for(lambda size=size: log_size() > size, process)
            time.sleep(draw.random() * 2)
        if not kills or process.poll() is not None:
            _, errors = process.communicate()
            if process.returncode:
                sys.exit(f"a run ended by itself with {process.returncode}: {errors[-2000:]}")
            return
        kill(process)
        counts["kills"] += 1
        counts["a save was under way"] += saving(out, began)
        kills -= 1


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
        subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        files = ["--train", club / "train.jsonl", "--valid", club / "valid.jsonl"]
        options = "--epochs 3 --batch-size 8 --lr 2e-3 --gamma 5 --workers 1 --save-every 1"
        options = [*options.split(), "--max-new-tokens", 4, "--parallel", args.parallel]
        arguments = [*files, "--model", club / "toy", *options]
        one_run(whole, arguments, args, 0, draw, counts)
        right = result(whole)
        while counts["kills"] < args.kills:
            out = folder / f"run{counts['runs']}"
            kills = min(args.kills_a_run, args.kills - counts["kills"])
            one_run(out, arguments, args, kills, draw, counts)
            counts["runs"] += 1
            if result(out) != right:
                sys.exit(f"{out.name}: not what the run that was never stopped has; {counts}")
            print(json.dumps(counts), flush=True)
    print(f"{args.processes} processes: all as the run left alone")


if __name__ == "__main__":
    main()
