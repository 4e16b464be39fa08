"""How long a training step waits for its data, by hand.

    python tests/bench_loading.py

The posts have JPEGs of one megapixel, prepared as for a published Qwen2.5-VL (up to 512 image
tokens) by two workers; the model is a pause of 200 ms a step. Steps without the pause show what the
workers can do at most.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import data  # noqa: E402
from support.jsonl import to_line  # noqa: E402
from tiny import qwen_tokenizer  # noqa: E402

POSTS, STEPS, WORKERS, MODEL_SECONDS = 32, 40, 2, 0.2


def write_posts(folder):
    """Posts with JPEGs of 1152 x 896 pixels: soft shapes with grain, about the bytes of a photo."""
    rng = np.random.default_rng(0)
    with open(folder / "posts.jsonl", "w", encoding="utf-8") as file:
        for number in range(POSTS):
            small = Image.fromarray(rng.integers(0, 256, (14, 18, 3), dtype=np.uint8))
            shapes = np.asarray(small.resize((1152, 896), Image.Resampling.BICUBIC), dtype=np.int16)
            picture = (shapes + rng.integers(-12, 13, shapes.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"{number}.jpg", quality=85)
            post = {"id": str(number), "text": "the quick brown fox " * 5}
            file.write(to_line(post | {"image": f"{number}.jpg", "keyphrases": ["brown fox"]}))
    return data.Posts(folder / "posts.jsonl", for_training=True)


def measure(encoded, batch_size, seconds):
    """(seconds that a step waits for its data, seconds of a step), without the first few steps.

    They are means, since workers that can't keep up deliver in bursts.
    """
    order = np.arange(STEPS * batch_size).reshape(STEPS, batch_size) % POSTS
    loader, waited = data.load_steps(encoded, order.tolist(), batch_size, WORKERS), []
    times = [time.perf_counter()]
    for batches in loader:
        waited.append(time.perf_counter() - times[-1])
        time.sleep(seconds)
        del batches  # here, as a training step would, not while the clock runs
        times.append(time.perf_counter())
    return statistics.mean(waited[5:]), statistics.mean(np.diff(times)[5:])


def main():
    from transformers import Qwen2VLImageProcessorPil as ImageProcessor

    tokenizer = qwen_tokenizer()
    processor = ImageProcessor(min_pixels=56 * 56, max_pixels=12845056)
    encoder = data.Encoder(tokenizer, processor, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    with tempfile.TemporaryDirectory() as folder:
        encoded = data.EncodedPosts(write_posts(Path(folder)), encoder, with_answers=True)
        for batch_size in (1, 2, 4, 8):
            waited, whole = measure(encoded, batch_size, MODEL_SECONDS)
            _, alone = measure(encoded, batch_size, 0)
            print(
                f"batch size {batch_size}: waits {waited:.4f} s, {waited / whole:.2%} of a step; "
                f"{batch_size / alone:.1f} posts a second without the model"
            )


if __name__ == "__main__":
    main()
