"""How long a training step waits for its data, by hand.

    python tests/bench_loading.py --batch-size 4

The posts have JPEGs of one megapixel, prepared as for a published Qwen2.5-VL (up to 512 image
tokens); the model is a pause of 200 ms a step. Steps without the pause show what the workers can do
at most.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import data  # noqa: E402
from support.console import HelpFormatter, positive_int  # noqa: E402
from support.jsonl import to_line  # noqa: E402
from tiny import qwen_tokenizer  # noqa: E402


def write_posts(folder, count):
    """Posts with JPEGs of 1152 x 896 pixels: soft shapes with grain, about the bytes of a photo."""
    rng = np.random.default_rng(0)
    with open(folder / "posts.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, (14, 18, 3), dtype=np.uint8))
            shapes = small.resize((1152, 896), Image.Resampling.BICUBIC)
            picture = np.asarray(shapes, dtype=np.int16)
            picture = (picture + rng.integers(-12, 13, picture.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"{number}.jpg", quality=85)
            record = {"id": str(number), "text": "the quick brown fox " * 5}
            record |= {"image": f"{number}.jpg", "keyphrases": ["brown fox"]}
            file.write(to_line(record))
    return data.Posts(folder / "posts.jsonl", for_training=True)


def measure(encoded, batch_size, workers, seconds, steps):
    """(seconds that a step waits for its data, seconds of a step), without the first few steps.

    They are means, since workers that can't keep up deliver in bursts.
    """
    count = len(encoded.posts)
    order = [[(step * batch_size + i) % count for i in range(batch_size)] for step in range(steps)]
    loader, waited, whole = data.Loader(encoded, order, batch_size, workers), [], []
    started = time.perf_counter()
    for _ in loader:
        time.sleep(seconds)
        waited.append(loader.waited)
        whole.append(time.perf_counter() - started)
        started = time.perf_counter()
    return statistics.mean(waited[5:]), statistics.mean(whole[5:])


def main():
    from transformers import Qwen2VLImageProcessorPil as ImageProcessor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    sizes = [1, 2, 4, 8]
    add("--batch-size", type=positive_int, nargs="+", default=sizes, help="posts a step")
    add("--workers", type=positive_int, default=2, help="processes that prepare images")
    add("--model-seconds", type=float, default=0.2, help="time of the model in a step")
    add("--steps", type=positive_int, default=40, help="steps measured; more than 5")
    args = parser.parse_args()
    tokenizer = qwen_tokenizer()
    processor = ImageProcessor(min_pixels=56 * 56, max_pixels=12845056)
    encoder = data.Encoder(tokenizer, processor, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    with tempfile.TemporaryDirectory() as folder:
        encoded = data.EncodedPosts(write_posts(Path(folder), 32), encoder, with_answers=True)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.jpg")) / 32
        workers, seconds = args.workers, args.model_seconds
        print(f"JPEGs of {size / 1e3:.0f} kB, {workers} workers, a model of {seconds:.3f} s a step")
        for batch_size in args.batch_size:
            waited, whole = measure(encoded, batch_size, workers, seconds, args.steps)
            _, alone = measure(encoded, batch_size, workers, 0, args.steps)
            result = {
                "batch_size": batch_size,
                "waited_s": round(waited, 4),
                "share": round(waited / whole, 4),
                "posts_per_s_without_model": round(batch_size / alone, 1),
            }
            print(json.dumps(result))


if __name__ == "__main__":
    main()
