"""Kill training runs at random moments, resume them, and compare with a run that was left alone.

    python tests/kill_runs.py --kills 80
    python tests/kill_runs.py --kills 20 --processes 2

Half of the kills come inside a save. A run is resumed and killed again until it has had its five
kills, and then left to finish; its weights and its log must equal, bit for bit, those of the run
that was never stopped.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from safetensors.torch import load_file  # noqa: E402

from test_resume import timeless  # noqa: E402
from tiny import words  # noqa: E402
from tools.clubworld import write_random_toy, write_world  # noqa: E402

OPTIONS = "--epochs 3 --batch-size 8 --lr 2e-3 --gamma 5 --workers 1 --save-every 1"
OPTIONS += " --max-new-tokens 4 --parallel fsdp"


def result(run):
    """(weights and optimizer state of a run's last checkpoint as bytes, its log without times)."""
    folder = run / (run / "last").read_text().strip()
    tensors = {
        (file.name, name): tensor.numpy().tobytes()
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    return tensors, timeless(run)


def start(arguments, count):
    """A process for each of `count` ranks, with the variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks, command = [], [sys.executable, ROOT / "train.py", *arguments]
    for rank in range(count):
        variables = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count)
        variables |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
    return ranks


def saving(out, since):
    """Whether a save begun after `since` is under way, or was cut."""
    with contextlib.suppress(FileNotFoundError):
        return (out / ".partial").stat().st_mtime > since
    return False


def one_run(out, arguments, processes, kills, draw, counts):
    """Train a run to its end through `kills` kills, or as many as it meets."""
    log = out / "log.jsonl"

    def log_size():
        return log.stat().st_size if log.exists() else 0

    while True:
        resume = ["--resume"] if (out / "last").exists() else []
        began, size, in_a_save = time.time(), log_size(), draw.random() < 0.5
        ranks = start([*arguments, "--out", out, *resume], processes)
        while kills and ranks[0].poll() is None:
            if saving(out, began) if in_a_save else log_size() > size:
                time.sleep(draw.random() * (0.1 if in_a_save else 2))
                break
            time.sleep(0.002)
        if not kills or ranks[0].poll() is not None:
            for rank in ranks:
                _, errors = rank.communicate()
                assert not rank.returncode, errors[-2000:]
            return
        for rank in ranks:
            os.killpg(rank.pid, signal.SIGKILL)  # workers that load posts, too
            rank.communicate()
        counts["kills"] += 1
        counts["in a save"] += saving(out, began)
        kills -= 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=80)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    draw, counts = random.Random(0), Counter()
    with tempfile.TemporaryDirectory() as folder:
        club = Path(folder) / "club"
        write_world(club, seed=100, train=64, valid=8, test=8)
        write_random_toy(club / "toy", seed=100)
        files = ["--train", club / "train.jsonl", "--valid", club / "valid.jsonl"]
        arguments = words(*files, "--model", club / "toy", OPTIONS)
        one_run(club / "whole", arguments, args.processes, 0, draw, counts)
        right = result(club / "whole")
        while counts["kills"] < args.kills:
            out, kills = club / f"run{counts['kills']}", min(5, args.kills - counts["kills"])
            one_run(out, arguments, args.processes, kills, draw, counts)
            assert result(out) == right, f"{out}: not what the run that was never stopped has"
            print(f"{dict(counts)}: all as left alone", flush=True)


if __name__ == "__main__":
    main()
