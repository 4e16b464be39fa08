"""What predictions cost, against transformers' `generate`. By hand; minutes on two CPU cores:

    python tests/bench_infer.py                 # the default run's model on its 1,000 test posts
    python tests/bench_infer.py --random        # random weights, the real vocabulary

Two ways to the same greedy answers, in turns in one process, both from posts that are encoded
before and in batches of the same size:

    plain   `generate` on one batch after the other, in the order of the file
    ours    continuous batching, posts sorted by prompt length within a window

With --random, half of the answers have 4 tokens and half 120, in random order. Prompts are short
then, so that generation outweighs reading.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import model as model_file  # noqa: E402
from support.checkpoint import checkpoint_of  # noqa: E402
from support.console import HelpFormatter, positive_int, progress  # noqa: E402
from support.decoding import Greedy  # noqa: E402

BATCH = 8  # posts
SHORT, LONG = 4, 120  # tokens of an answer with --random; no answer is longer


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--random", action="store_true", help="a larger model with random weights instead")
    add("--posts", type=positive_int, help="the first N posts only")
    add("--rounds", type=positive_int, default=3, help="runs of each way")
    return parser.parse_args()


def trained(args):
    """(model, encoder, encoded posts) of the run and the world that `python train.py` has left."""
    model, encoder, _ = model_file.load(checkpoint_of("out/run/last"))
    posts = data.Posts("out/clubworld-0/test.jsonl")
    encoded = data.EncodedPosts(posts, encoder, with_answers=False)
    count = min(args.posts or len(posts), len(posts))
    return model, encoder, [encoded[index] for index in progress(range(count), count, "encoding")]


class Counter:
    """An encoder for random weights: answers are token ids, which end after their post's length."""

    image_token_id, end_of_turn, pad = 5, 0, 0

    def start(self, think):
        return [], None

    def decode(self, tokens):
        return tuple(tokens)


def random_posts(args):
    """(model, encoder, posts) with weights, texts and lengths of answers drawn at random.

    An answer's length stands in its post's id.
    """
    from bench_step import build

    model, draw, samples = build("small"), random.Random(0), []
    lengths = [SHORT, LONG] * ((args.posts or 64) // 2)
    draw.shuffle(lengths)
    for index, length in enumerate(lengths):
        text = [draw.randrange(10, 150_000) for _ in range(draw.randint(20, 60))]
        samples.append(data.Sample(f"{index} {length}", [5] * 16 + text))
        samples[-1].pixel_values = torch.randn(64, 3 * 2 * 14 * 14)
        samples[-1].grid = torch.tensor([[1, 8, 8]])
    return model, Counter(), samples


def limit(identity):
    """The length of an answer that the id of a random post says."""
    return int(identity.partition(" ")[2] or 10**9)


class EndsAtLength(Greedy):
    """Greedy decoding that ends the answers of random posts at their lengths."""

    def extend(self, answers, hidden):
        super().extend(answers, hidden)
        for answer in answers:
            if len(answer.tokens) == limit(answer.id):
                answer.ended = False


def plain(model, encoder, samples):
    found = {}
    for start in range(0, len(samples), BATCH):
        batch = data.collate(samples[start : start + BATCH], encoder)
        width = batch.prompt["input_ids"].shape[1]
        limits = torch.tensor([limit(identity) for identity in batch.ids])

        def stop(ids, _, width=width, limits=limits, **__):
            return ids.shape[1] - width >= limits

        rows = model.generate(
            **batch.prompt,
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=LONG,
            eos_token_id=encoder.end_of_turn,
            pad_token_id=encoder.pad,
            stopping_criteria=[stop],
        )[:, width:].tolist()
        for identity, row in zip(batch.ids, rows, strict=True):
            row = row[: limit(identity)]
            ended = encoder.end_of_turn in row
            length = row.index(encoder.end_of_turn) if ended else len(row)
            found[identity] = encoder.decode(row[:length]), length + ended, ended
    return found


def ours(model, encoder, samples):
    def batches():
        window = max(1, 32 // BATCH) * BATCH
        for start in range(0, len(samples), window):
            posts = samples[start : start + window]
            for chunk in data.by_length(posts, -(-len(posts) // BATCH)):
                yield data.collate(chunk, encoder)

    return dict(model_file.write_answers(model, encoder, batches(), max_new_tokens=LONG))


def main():
    args = parse_args()
    torch.set_num_threads(1)
    model, encoder, samples = random_posts(args) if args.random else trained(args)
    model.eval()
    if args.random:
        model_file.Greedy = EndsAtLength
    seconds, expected = {plain: [], ours: []}, plain(model, encoder, samples)  # a warm-up
    for turn in progress(range(2 * args.rounds), 2 * args.rounds, "timing", "run"):
        way = (plain, ours, ours, plain)[turn % 4]
        start = time.process_time()
        found = way(model, encoder, samples)
        seconds[way].append(time.process_time() - start)
        equal = sum(found[identity] == expected[identity] for identity in expected)
        assert equal == len(samples), f"{way.__name__}: only {equal} answers equal plain's"
    lengths = [tokens for _, tokens, _ in expected.values()]
    print(
        f"{len(samples)} posts, batches of {BATCH}, one thread; answers of "
        f"{statistics.mean(lengths):.1f} tokens on average; all equal in {args.rounds} rounds"
    )
    for way, times in seconds.items():
        low, middle, high = (len(samples) / f(times) for f in (max, statistics.median, min))
        print(f"{way.__name__}: {middle:.1f} ({low:.1f}–{high:.1f}) posts per CPU second, median")
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    print(f"ours / plain: {statistics.median(ratios):.2f} (median over the rounds)")


if __name__ == "__main__":
    main()
