"""Serve real models with vLLM; compare infer.py with local inference, and kill gen_cot.py. By hand:

    python tests/served_real.py --vllm vllm/bin/vllm --toy out/run/step-900 --llm MODEL \\
        --posts clubworld/test.jsonl --cmkp test_src.txt

--toy is a checkpoint trained on the world of --posts, --llm a pretrained model of a Qwen-VL family
that a CPU can run, --cmkp CMKP's text. docs/serving.md has the figures, and says how vLLM's CPU
build is installed. It takes a quarter of an hour on two cores.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from evaluate import score  # noqa: E402
from server import DROP, Raw, Server, text_of  # noqa: E402
from support.images import MAX_PIXELS, image_url  # noqa: E402
from tiny import write  # noqa: E402

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
SPECIAL = "<|im_end|> <|im_start|> <|endoftext|> <|vision_start|> <|image_pad|>".split()
# A weak teacher keeps to the form only after examples, each a turn of its own: the engine takes the
# marks of turns that stand in a text for the special tokens.
POST = "Post: {text}\nKeyphrases: {keyphrases}"
REPLY = "<think>The post says {text}, so it is about {keyphrases}.</think>"
REPLY += "<answer>{keyphrases}</answer>"
EXAMPLES = {
    "sunrise over the lake": "nature",
    "the dog ate my cake": "dogs; cake",
    "a goal !": "goal",
}
TURNS = f"{POST}<|im_end|>\n<|im_start|>assistant\n{REPLY}<|im_end|>\n<|im_start|>user\n"
PROMPT = "".join(TURNS.format(text=text, keyphrases=EXAMPLES[text]) for text in EXAMPLES) + POST


class Engine:
    """vLLM with one model; it is started on entering and ended on leaving."""

    def __init__(self, vllm, model, name, length, log):
        self.model, self.name, self.log = model, name, log
        self.url = "http://127.0.0.1:8763/v1"
        options = f"--served-model-name {name} --host 127.0.0.1 --port 8763 --dtype float32 "
        options += f"--generation-config vllm --enforce-eager --max-model-len {length}"
        self.command = [vllm, "serve", model, *options.split()]

    def __enter__(self):
        started, environment = time.monotonic(), os.environ | ENVIRONMENT
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        while True:
            assert self.process.poll() is None, f"vLLM ended: {self.log}"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/models", timeout=5).close()
                break
            time.sleep(1)
        print(f"vLLM serves {self.name} after {time.monotonic() - started:.0f} s")
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self, _):
        self.__exit__()
        self.__enter__()

    def forward(self, request, _):
        """The engine's answer to a request; the connection is closed where there is none."""
        body, kind = json.dumps(request).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/chat/completions", body, kind)
        try:
            with urllib.request.urlopen(request) as answer:
                return Raw(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            return Raw(error.code, error.read())
        except (OSError, http.client.HTTPException):
            return DROP


def rows(*paths):
    """The records of JSONL files, whole lines only; none of a file that does not exist."""
    raw = [path.read_bytes().split(b"\n")[:-1] for path in paths if path.exists()]
    return [json.loads(line) for line in sum(raw, [])]


def run(command, out=(), count=0, act=None):
    """(exit code, seconds) of a script. `act(process)` when `out` has `count` more records."""
    before, started = len(rows(*out)), time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    while process.poll() is None:
        if act and len(rows(*out)) >= before + count:
            act(process)
            act = None
        time.sleep(0.05)
    assert act is None, "it ended before it was interrupted"
    return process.returncode, time.monotonic() - started


def infer(engine, posts, tokens, served=True):
    """Predict the posts of a file here and served, there with a kill: two lists of predictions."""
    here, there = posts.with_suffix(".here.jsonl"), posts.with_suffix(".served.jsonl")
    common = ["infer.py", "--data", posts, "--max-new-tokens", tokens, "--out"]
    count = len(rows(posts))
    code, seconds = run([*common, here, "--model", engine.model, "--device", "cpu"])
    print(f"{posts.name}: exit code {code}, {count / seconds:.1f} posts/s here")
    if served:
        prompt = engine.model / "prompt.txt"
        common += [there, "--model", engine.name, "--base-url", engine.url]
        common += ["--prompt-file", prompt] * prompt.is_file()
        run(common, [there], count // 4, subprocess.Popen.kill)
        done = len(rows(there))
        code, seconds = run(common)
        print(f"  exit code {code}, {(count - done) / seconds:.1f} posts/s served")
    return rows(here), rows(there)


def compare(name, posts, here, served):
    """Print what is equal for `posts`, whose predictions are among those given."""
    order = [post["id"] for post in posts]
    here, served = ({row["id"]: row for row in part} for part in (here, served))
    here, served = ([part[each] for each in order] for part in (here, served))
    pairs = list(zip(here, served, strict=True))
    fields, same = ("tokens", "keyphrases", "think", "output"), {}
    for field in fields:
        same[field] = sum(str(a[field]).strip() == str(b[field]).strip() for a, b in pairs)
    print(f"{name}, {len(posts)} posts, equal here and served: {same}")
    for place, part in (("here", here), ("served", served)):
        f1 = 100 * score(part, posts)["all"]["F1@1"]
        spaces = sum(row["output"].startswith(" ") for row in part)
        errors = {row["error"] for row in part if "error" in row} or "no errors"
        print(f"  {place}: F1@1 {f1:.2f}, {spaces} outputs begin with a space; {errors}")


def with_special_tokens(posts):
    """The posts without images, and with a special token in the middle of each text."""
    for index, post in enumerate(posts):
        words = post["text"].split()
        words.insert(len(words) // 2, SPECIAL[index % len(SPECIAL)])
        yield post | {"id": f"odd-{post['id']}", "image": None, "text": " ".join(words)}


def check_toy(engine, folder, posts):
    """Club-world posts with images, without, with special tokens, and with the JPEGs sent."""
    jpegs = []
    for index, post in enumerate(posts):
        sent = image_url(post["image"], MAX_PIXELS)
        urllib.request.urlretrieve(sent, folder / f"{index}.jpg")
        jpegs.append(post | {"image": f"{index}.jpg"})
    plain = [post | {"id": f"text-{post['id']}", "image": None} for post in posts]
    odd = list(with_special_tokens(posts[:20]))
    here, served = infer(engine, write(folder / "toy.jsonl", posts + plain + odd), 128)
    compare("toy, images", posts, here, served)
    compare("toy, text only", plain, here, served)
    compare("toy, special tokens", odd, here, served)
    here, _ = infer(engine, write(folder / "jpegs.jsonl", jpegs), 128, served=False)
    compare("toy, here with the JPEGs that are sent", posts, here, served)


def check_llm(engine, folder, posts):
    """Real posts without images; the language model as a teacher, killed, and restarted itself."""
    odd = list(with_special_tokens(posts[:10]))
    both = infer(engine, write(folder / "llm.jsonl", posts[:40] + odd), 48)
    compare("llm, text only", posts[:40], *both)
    compare("llm, special tokens", odd, *both)
    prompt, good, failed = (folder / name for name in ("p.txt", "cot.jsonl", "cot.failed.jsonl"))
    prompt.write_text(PROMPT, encoding="utf-8")
    id_of = {post["text"].strip(): post["id"] for post in posts}
    with Server(engine.forward) as recorder:
        command = ["gen_cot.py", write(folder / "posts.jsonl", posts), "--out", good]
        command += ["--model", engine.name, "--base-url", recorder.url, "--prompt-file", prompt]
        command += "--min-words 5 --max-retries 9 --max-new-tokens 80 --temperature 0.5".split()
        kill = subprocess.Popen.kill
        for act in (kill, kill, engine.restart, None):
            command += ["--retry-failed"] * (act is None)
            known = {row["id"] for row in rows(good, failed) if act or "cot" in row}
            start = len(recorder.log)
            code, seconds = run(command, [good, failed], len(posts) // 4, act)
            texts = [text_of(request).rpartition("Post: ")[2] for request, *_ in recorder.log]
            asked = [id_of[text.rpartition("\nKeyphrases: ")[0]] for text in texts[start:]]
            print(
                f"gen_cot.py: exit code {code}, {len(asked)} requests in {seconds:.0f} s, "
                f"{len(known.intersection(asked))} of posts that were done; "
                f"{len(rows(good))} with reasoning, {len(rows(failed))} failed"
            )
    assert sorted(row["id"] for row in rows(good, failed)) == sorted(id_of.values())
    print("every post is in exactly one of the two files; the first of each:")
    for row in rows(good)[:1] + rows(failed)[:1]:
        print(f"  {row['keyphrases']}: {row.get('cot') or row['reason']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("vllm", "toy", "posts", "llm", "cmkp"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="posts of --posts")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="served_real-"))
    print(f"everything is written to {folder}")
    images = args.posts.parent.resolve()
    posts = [post | {"image": str(images / post["image"])} for post in rows(args.posts)]
    with Engine(args.vllm, args.toy, "toy", 512, folder / "toy.log") as engine:
        check_toy(engine, folder, posts[: args.count])
    to_jsonl = ["-m", "tools.dataset", "import", args.cmkp, "--images", "none"]
    run([*to_jsonl, "--out", folder / "cmkp.jsonl"])
    real = list({post["text"]: post for post in rows(folder / "cmkp.jsonl")}.values())[:60]
    with Engine(args.vllm, args.llm, "llm", 2048, folder / "llm.log") as engine:
        check_llm(engine, folder, real)


if __name__ == "__main__":
    main()
