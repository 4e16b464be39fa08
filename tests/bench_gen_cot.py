"""How fast and in how much memory gen_cot.py asks. By hand:

    python tests/bench_gen_cot.py

speed: 32 workers, photos of one megapixel, a server that answers in 100 ms. memory: tiny images
and a server that answers at once, 1,000 posts and 100,000. The server is a process of its own, on
the same machine.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from server import write_posts  # noqa: E402


def photo(path, size=(1152, 864)):
    """A JPEG about as detailed as a photo: noise of several sizes."""
    from PIL import Image

    layers = [
        Image.effect_noise((size[0] // step, size[1] // step), 90).resize(size)
        for step in (64, 16, 4)
    ]
    Image.merge("RGB", layers).save(path, quality=90)


def gen_cot(posts, server, workers):
    """Run gen_cot.py as a process: (seconds, its own CPU seconds, its peak memory in MB)."""
    started = time.perf_counter()
    command = [sys.executable, ROOT / "gen_cot.py", posts, "--out", posts.parent / "cot.jsonl"]
    command += ["--model", "m", "--base-url", server, "--workers", str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    last = process.stderr.read().splitlines()[-2:]
    _, code, used = os.wait4(process.pid, 0)
    assert code == 0, last
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000


def main():
    for name, wait, workers, count in (
        ("speed", "0.1", 32, 1000),
        ("memory", "0", 16, 1000),
        ("memory", "0", 16, 100_000),
    ):
        with tempfile.TemporaryDirectory() as folder:
            posts = write_posts(Path(folder), count, images=40, size=(28, 28))
            for image in Path(folder).glob("*.jpg") if name == "speed" else ():
                photo(image)
            command = [sys.executable, ROOT / "tests" / "server.py", wait]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                seconds, cpu, memory = gen_cot(posts, server.stdout.readline().strip(), workers)
            finally:
                server.kill()
                server.wait()
        print(
            f"{name}, {count} posts: {seconds:.1f} s, {count / seconds:.1f} posts/s; "
            f"{1000 * cpu / count:.1f} ms of CPU a post; {memory:.0f} MB at the peak",
            flush=True,
        )


if __name__ == "__main__":
    main()
