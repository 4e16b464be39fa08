"""How long a training step waits for its data, by hand.

    python tests/bench_loading.py --batch-size 4

The posts have JPEGs of one megapixel, prepared as for a published Qwen2.5-VL (up to 512 image
tokens); the model is a pause of 200 ms a step. Steps without the pause show what the workers can do
at most.
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
from support.console import ArgumentParser, positive_int  # noqa: E402
from support.jsonl import to_line  # noqa: E402
from tiny import qwen_tokenizer  # noqa: E402

POSTS = 32


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


def measure(encoded, batch_size, seconds, args):
    """(seconds that a step waits for its data, seconds of a step), without the first few steps.

    They are means, since workers that can't keep up deliver in bursts.
    """
    order = np.arange(args.steps * batch_size).reshape(args.steps, batch_size) % POSTS
    loader, waited = data.load_steps(encoded, order.tolist(), batch_size, args.workers), []
    times = [time.perf_counter()]
    for batches in loader:
        waited.append(time.perf_counter() - times[-1])
        time.sleep(seconds)
        del batches  # here, as a training step would, not while the clock runs
        times.append(time.perf_counter())
    return statistics.mean(waited[5:]), statistics.mean(np.diff(times)[5:])


def main():
    from transformers import Qwen2VLImageProcessorPil as ImageProcessor

    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--batch-size", type=positive_int, nargs="+", default=[1, 2, 4, 8], help="posts a step")
    add("--workers", type=positive_int, default=2, help="processes that prepare images")
    add("--model-seconds", type=float, default=0.2, help="time of the model in a step")
    add("--steps", type=positive_int, default=40, help="steps measured; more than 5")
    args = parser.parse_args()
    tokenizer = qwen_tokenizer()
    processor = ImageProcessor(min_pixels=56 * 56, max_pixels=12845056)
    encoder = data.Encoder(tokenizer, processor, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    with tempfile.TemporaryDirectory() as folder:
        encoded = data.EncodedPosts(write_posts(Path(folder)), encoder, with_answers=True)
        print(f"{args.workers} workers, a model of {args.model_seconds:.3f} s a step")
        for batch_size in args.batch_size:
            waited, whole = measure(encoded, batch_size, args.model_seconds, args)
            _, alone = measure(encoded, batch_size, 0, args)
            print(
                f"batch size {batch_size}: waits {waited:.4f} s, {waited / whole:.2%} of a step; "
                f"{batch_size / alone:.1f} posts a second without the model"
            )


if __name__ == "__main__":
    main()
