import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
# Tiny models are as fast on one thread, and on a busy machine threads wait for one another. And
# a run in this process, whose number of threads train.py sets, equals one in a process of its own.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small club world with its toy model, used by every test that trains or predicts."""
    from tools.clubworld import write_random_toy, write_world

    folder = tmp_path_factory.mktemp("world") / "club"
    write_world(folder, seed=100, train=64, valid=8, test=12)
    write_random_toy(folder / "toy", seed=100)
    return folder


@pytest.fixture
def train_on(world, tmp_path):
    """train_on(out, *options): `python train.py` on the small world; returns the run's folder.

    It trains for 16 steps of eight posts.
    """
    from tiny import train_alone

    def run(out, *options, posts=world / "train.jsonl"):
        files = ["--train", posts, "--model", world / "toy", "--out", tmp_path / out]
        sizes = "--epochs 2 --batch-size 8 --lr 2e-3 --workers 0 --max-new-tokens 16"
        train_alone(*files, sizes, *options)
        return tmp_path / out

    return run
