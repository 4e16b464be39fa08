"""How fast and in how much memory gen_cot.py asks. By hand:

    python tests/bench_gen_cot.py speed|memory [POSTS ...]

speed: 32 workers, photos of one megapixel, a server that answers in 100 ms. memory: tiny images
and a server that answers at once, 1,000 posts and 100,000. The server is a process of its own, on
the same machine.
"""

import io
import json
import os
import resource
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


def stages(posts, count=100):
    """Print the CPU milliseconds that the steps of one request take in one thread."""
    import base64

    from PIL import Image

    from gen_cot import PROMPT, parse_args
    from support import images
    from support.client import chat_request

    def clock(name, step):
        started = time.thread_time()
        for _ in range(count):
            result = step()
        print(f"  {1000 * (time.thread_time() - started) / count:6.2f} ms  {name}")
        return result

    def save(image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    path = posts.parent / "0.jpg"
    image = clock("read the image", lambda: images.load_image(path, 512 * 28 * 28))
    small = clock("scale it", lambda: image.resize((700, 532), Image.Resampling.BICUBIC))
    sent = clock("write it as JPEG", lambda: save(small))
    clock("base64", lambda: base64.b64encode(sent).decode())
    args = parse_args([str(posts), "--out", "unused", "--model", "m"])
    request = chat_request(args, PROMPT, images.image_url(path, 512 * 28 * 28))
    clock("JSON", lambda: json.dumps(request, ensure_ascii=False).encode())
    print(f"  {path.stat().st_size / 1000:.0f} KB read, {len(sent) / 1000:.0f} KB sent")


def main():
    what, counts = sys.argv[1], list(map(int, sys.argv[2:]))
    wait, workers, usual = {"speed": ("0.1", 32, [1000]), "memory": ("0", 16, [1000, 100_000])}[
        what
    ]
    for count in counts or usual:
        with tempfile.TemporaryDirectory() as folder:
            posts = write_posts(Path(folder), count, images=40, size=(28, 28))
            for image in Path(folder).glob("*.jpg") if what == "speed" else ():
                photo(image)
            command = [sys.executable, ROOT / "tests" / "server.py", wait]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                address = server.stdout.readline().strip()
                seconds, cpu, memory = gen_cot(posts, address, workers)
            finally:
                server.kill()
                server.wait()
            server_cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - cpu
            print(
                f"{count} posts: {seconds:.1f} s, {count / seconds:.1f} posts/s; "
                f"{1000 * cpu / count:.1f} ms of CPU a post (the server's own about "
                f"{1000 * server_cpu / count:.1f}); {memory:.0f} MB at the peak",
                flush=True,
            )
            if what == "speed":
                stages(posts)


if __name__ == "__main__":
    main()
