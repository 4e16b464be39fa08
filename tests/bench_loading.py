"""How long a training step waits for its data: 1-megapixel JPEGs, two workers, a model that takes 200 ms a step. By hand:

    python tests/bench_loading.py --batch-size 4

The pictures are prepared as for a published Qwen2.5-VL (up to 512 image tokens), the model is a pause. What the workers
can do at most is shown beside it: steps a second without any pause.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import numpy as np
from PIL import Image

import data
from tiny import qwen_tokenizer


def write_posts(folder, count):
    """Posts with JPEGs of 1152 x 896 pixels: soft shapes with grain, about as many bytes as a photo has."""
    rng = np.random.default_rng(0)
    with open(folder / "posts.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, (14, 18, 3), dtype=np.uint8))
            picture = np.asarray(
                small.resize((1152, 896), Image.Resampling.BICUBIC), dtype=np.int16
            )
            picture = (picture + rng.integers(-12, 13, picture.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"{number}.jpg", quality=85)
            file.write(
                data.to_line(
                    {
                        "id": str(number),
                        "text": "the quick brown fox " * 5,
                        "image": f"{number}.jpg",
                        "keyphrases": ["brown fox"],
                    }
                )
            )
    return data.Posts(folder / "posts.jsonl", for_training=True)


def measure(posts, encoder, batch_size, workers, seconds, steps):
    """(mean seconds that a step waits for its data, mean seconds of a step), without the first few steps.

    Means, for workers that can't keep up deliver in bursts.
    """
    order = [
        [(step * batch_size + i) % len(posts) for i in range(batch_size)] for step in range(steps)
    ]
    loader, waited, whole = data.Loader(posts, encoder, order, batch_size, workers, True), [], []
    started = time.perf_counter()
    for _ in loader:
        time.sleep(seconds)
        waited.append(loader.waited)
        whole.append(time.perf_counter() - started)
        started = time.perf_counter()
    return statistics.mean(waited[5:]), statistics.mean(whole[5:])


def main():
    from transformers import Qwen2VLImageProcessorPil as ImageProcessor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    parser.add_argument(
        "--batch-size", type=data.count, nargs="+", default=[1, 2, 4, 8], help="posts a step"
    )
    parser.add_argument(
        "--workers", type=data.count, default=2, help="processes that read and prepare images"
    )
    parser.add_argument(
        "--model-seconds", type=float, default=0.2, help="what the model takes for a step"
    )
    parser.add_argument("--steps", type=data.count, default=40, help="steps measured")
    args = parser.parse_args()
    tokenizer = qwen_tokenizer()
    encoder = data.Encoder(
        tokenizer,
        ImageProcessor(min_pixels=56 * 56, max_pixels=12845056),
        tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    with tempfile.TemporaryDirectory() as folder:
        posts = write_posts(Path(folder), 32)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.jpg")) / 32
        print(
            f"JPEGs of {size / 1e3:.0f} kB, {args.workers} workers, a model of {args.model_seconds:.3f} s a step"
        )
        for batch_size in args.batch_size:
            waited, whole = measure(
                posts, encoder, batch_size, args.workers, args.model_seconds, args.steps
            )
            _, alone = measure(posts, encoder, batch_size, args.workers, 0, args.steps)
            print(
                json.dumps(
                    {
                        "batch_size": batch_size,
                        "waited_s": round(waited, 4),
                        "share": round(waited / whole, 4),
                        "posts_per_s_without_model": round(batch_size / alone, 1),
                    }
                )
            )


if __name__ == "__main__":
    main()
