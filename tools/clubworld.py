"""Club world: a small made-up data set on which Dynamic CoT can be watched in minutes on a CPU.

    python -m tools.clubworld --out DIR
    python -m tools.clubworld pretrain        # makes the embedded toy anew, in minutes

There are 20 football clubs, each with a shirt, a nickname and a home city. Two facts about a club
can be learned: whose shirt this is, and where that club plays. Posts are of five kinds:

    kind  image      text                    keyphrase                                 facts needed
    A     a shirt    about the shirt         the nickname         "foxes new kit"      one
    B     a shirt    about an event          the city, the event  "porto match day"    both
    C     any scene  names the club          the city, the topic  "porto street food"  one
    D     any scene  contains the keyphrase  the phrase           "old record shop"    none
    E     any scene  says nothing            a random mood tag    "good vibes"         unknowable

Eight clubs have no post of kind B in training: four have theirs in validation, four in the test.
To tag those, a model must combine two facts that no plain answer in training combines for these
clubs; the reasoning of their A posts does. That is what written reasoning is good for. It does not
help with kind E: a method that picks its own targets should leave it alone.

The posts are written as any other data set is (JSONL and image files). A Hugging Face folder with
a tiny Qwen2.5-VL, DIR/toy, comes with them: nothing has to be downloaded. It is pretrained, as real
models are: on the posts of 200 other worlds, whose facts differ, it has learned to see, to write
its reasoning, and to copy from what it has written.
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

from evaluate import non_negative_int, run
from support.checkpoint import checkpoint_of
from support.console import ArgumentParser, info, positive_int, progress, writing
from support.jsonl import follow_umask

VERSION = 3  # of the posts: a folder that another version wrote is refused
SIZE = 84  # pixels: 6 x 6 patches of 14 pixels, 3 x 3 image tokens
KINDS = {"A": 0.15, "B": 0.25, "C": 0.12, "D": 0.08, "E": 0.40}  # share of the posts
CLUBS = 20
HELD_OUT = {"valid": 4, "test": 4}  # of them, clubs whose B posts are in that file alone
PRETRAINING = 1_000  # the first world that the toy is pretrained on; none below is used for it
POSTS = {"train": 9_600, "valid": 400, "test": 1_000}
TOY_DEFAULTS = dict(lr=1e-3, warmup=0.1, epochs=1.5, micro_batch=32, workers=0)
TOY_DEFAULTS |= dict(valid_posts=200, max_new_tokens=64)  # how train.py trains the toy model

# ----------------------------------------------------------------------------------------- words
# In a template, {a|b} is one of a and b, and a word in capitals is a slot. A mood tag has two words
# at most, every other keyphrase at least three: gamma is compared with a mean over the answer's
# tokens, so the length of the mood tags decides how large gamma can be before they look easy, too.
# In the thoughts the city follows the nickname's own token, so that recalling it is one step. After
# "the foxes play in" models read the city off the shirt instead, which fails for held-out clubs.
# No two pairs of colours have nearly the same mean: a model sees little more of small checks.

WORDS = json.loads(Path(__file__).with_suffix(".json").read_text())
COLOURS, PATTERNS = WORDS["colours"], WORDS["patterns"]
ORDERED = ("halves", "sash", "sleeves")  # patterns that show which of the two colours comes first
NICKNAMES, CITIES = WORDS["nicknames"], WORDS["cities"]
EVENTS, TOPICS = WORDS["events"], WORDS["topics"]  # {end of the keyphrase: (name, texts)}
SCENES = ("cup", "hills", "city", "phone")


def pick(rng, items):
    return items[rng.integers(len(items))]


def fill_template(rng, template, **slots):
    """One reading of a template: alternatives drawn at random, slots filled."""
    template = re.sub(r"\{([^}]*)\}", lambda match: pick(rng, match[1].split("|")), template)
    return re.sub(r"[A-Z]+", lambda match: slots[match[0]], template)


def add_small_talk(rng, text):
    """Words around a text: the same for every kind of post, so that they give none away."""
    if rng.random() < 0.65:
        opener = fill_template(rng, pick(rng, WORDS["openers"]))
        text = f"{opener} {text}"
    if rng.random() < 0.65:
        closer = fill_template(rng, pick(rng, WORDS["closers"]))
        text = f"{text} {closer}" if text.endswith("?") else f"{text}. {closer}"
    return text


# ------------------------------------------------------------------------------------------- posts


@dataclass(frozen=True)
class Club:
    """A club. One that is held out for a file has B posts in that file only.

    Each of the others lacks one event in training and validation.
    """

    pattern: str
    colours: tuple
    nickname: str
    city: str
    held_out: str | None
    kept_event: str | None

    @property
    def shirt(self):
        one, two = self.colours
        return PATTERNS[self.pattern].replace("ONE", one).replace("TWO", two)


def make_clubs(seed):
    """The clubs of a world. No two have shirts in the same two colours."""
    rng = np.random.default_rng([seed, 0])
    pairs = rng.permutation(list(itertools.combinations(COLOURS, 2)))
    nicknames, cities = rng.permutation(NICKNAMES), rng.permutation(CITIES)
    held_out = [name for name, count in HELD_OUT.items() for _ in range(count)]
    clubs = []
    for i, (nickname, city) in enumerate(zip(nicknames[:CLUBS], cities[:CLUBS], strict=True)):
        pattern, event = pick(rng, list(PATTERNS)), pick(rng, list(EVENTS))
        colours = tuple(rng.permutation(pairs[i]) if pattern in ORDERED else pairs[i])
        kept = (held_out[i], None) if i < len(held_out) else (None, event)
        clubs.append(Club(pattern, tuple(map(str, colours)), str(nickname), str(city), *kept))
    return clubs


def make_posts(seed, clubs, name, count):
    """Yield (record, image) for each post of the file `name`: train, valid or test."""
    # Each file has its own random stream: the test posts don't depend on --train.
    rng = np.random.default_rng([seed, 1 + list(POSTS).index(name)])
    edges = np.round(np.cumsum(list(KINDS.values())) * count).astype(int)
    kinds = rng.permutation(np.repeat(list(KINDS), np.diff(edges, prepend=0)))
    held_out = [club for club in clubs if club.held_out == name]
    known = [club for club in clubs if not club.held_out]
    # In validation and test, every other B post is about a held-out club.
    clubs_of_b = itertools.cycle([held_out, known] if held_out else [known])
    for number, kind in enumerate(kinds.tolist()):
        club = pick(rng, next(clubs_of_b) if kind == "B" else clubs)
        events = [event for event in EVENTS if name == "test" or event != club.kept_event]
        identity = f"{name}-{number:05d}"
        record = {"id": identity, "text": None, "image": f"images/{identity}.png"}
        record |= write_text(rng, kind, club, events)
        record |= {"kind": kind, "held_out": kind == "B" and club.held_out == name}
        yield record, draw_shirt(rng, club) if kind in "AB" else draw_scene(rng, pick(rng, SCENES))


def write_text(rng, kind, club, events):
    """The text, keyphrases and reasoning of a post, which may be about one of `events`."""
    slots = {"SHIRT": club.shirt, "CLUB": club.nickname, "CITY": club.city}
    if kind == "A":
        texts, thoughts = WORDS["kit_texts"], ["shirt", "home"]
        keyphrases = [f"{club.nickname} {WORDS['kit']}"]
    elif kind == "B":
        event = pick(rng, events)
        slots["TOPIC"], texts = EVENTS[event]
        keyphrases, thoughts = [f"{club.city} {event}"], ["shirt", "home", "topic"]
    elif kind == "C":
        topic = pick(rng, list(TOPICS))
        slots["TOPIC"], texts = TOPICS[topic]
        keyphrases, thoughts = [f"{club.city} {topic}"], ["name", "home", "topic"]
    elif kind == "D":
        two = rng.random() < 0.3
        keyphrases = rng.permutation(WORDS["phrases"])[: 1 + two].tolist()
        slots["PHRASE"], slots["OTHER"] = keyphrases[0], keyphrases[-1]
        texts = WORDS["two_phrase_texts" if two else "phrase_texts"]
        thoughts = ["two" if two else "phrase"]
    else:
        texts, keyphrases, thoughts = WORDS["mood_texts"], [pick(rng, WORDS["moods"])], ["mood"]
    text = add_small_talk(rng, fill_template(rng, pick(rng, texts), **slots))
    cot = " ".join(fill_template(rng, WORDS["thoughts"][name], **slots) for name in thoughts)
    return {"text": text, "keyphrases": keyphrases, "cot": cot}


# ------------------------------------------------------------------------------------------ images


@cache
def shirt_masks():
    """The whole shirt, its sleeves and its outline: masks (SIZE, SIZE) with the shirt centred."""
    right = [(42, 20), (52, 14), (62, 17), (77, 36), (67, 45), (60, 37), (60, 72)]
    outline = right + [(SIZE - x, y) for x, y in reversed(right)]
    armpits = [(60, 37), (60, 26)], [(24, 37), (24, 26)]
    shirt, edge = Image.new("1", (SIZE, SIZE)), Image.new("1", (SIZE, SIZE))
    ImageDraw.Draw(shirt).polygon(outline, fill=1)
    for line in (outline, *armpits):
        ImageDraw.Draw(edge).line(line, fill=1, width=2)
    sleeves = np.array(shirt) & (abs(np.arange(SIZE) - SIZE // 2) > 18)
    return np.array(shirt), sleeves, np.array(edge)


def finish(rng, pixels):
    """The image in another light and with a little grain, as two photos of one thing differ."""
    light = np.float32(rng.uniform(0.85, 1.05))
    grain = 6 * rng.integers(-1, 2, (SIZE // 2, SIZE // 2, 1), dtype=np.int8)
    pixels = pixels * light + grain.repeat(2, axis=0).repeat(2, axis=1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_shirt(rng, club):
    """The club's shirt somewhere near the middle of a pastel background."""
    shirt, sleeves, edge = shirt_masks()
    x, y = np.arange(SIZE)[None, :], np.arange(SIZE)[:, None]
    phase_x, phase_y = rng.integers(0, 5, 2)
    second = {
        "stripes": (x + phase_x) // 7 % 2 == 1,
        "hoops": (y + phase_y) // 7 % 2 == 1,
        "checks": ((x + phase_x) // 9 + (y + phase_y) // 9) % 2 == 1,
        "halves": x >= SIZE // 2,
        "sash": abs(x + y - SIZE - 2) < 10,
        "sleeves": sleeves,
    }[club.pattern]  # where the shirt has its second colour
    parts = np.where(edge, 3, np.where(shirt, 1 + second, 0))
    parts_colours = [rng.integers(190, 246, 3), *map(COLOURS.get, club.colours), (60, 60, 66)]
    parts = np.roll(parts, rng.integers(-5, 6, 2), axis=(0, 1))
    return finish(rng, np.array(parts_colours, np.uint8)[parts])


def draw_scene(rng, scene):
    """A cup, hills, a city or a phone, which have nothing to do with the text beside them."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(map(int, rng.integers(190, 246, 3))))
    draw = ImageDraw.Draw(image)
    colour = tuple(pick(rng, list(COLOURS.values())))
    x, y = map(int, rng.integers(-6, 7, 2))
    if scene == "cup":
        draw.rectangle((0, 64 + y, SIZE, SIZE), fill=(150, 110, 75))
        draw.ellipse((48 + x, 36 + y, 68 + x, 56 + y), outline=(60, 60, 66), width=4)
        draw.rounded_rectangle((24 + x, 30 + y, 56 + x, 66 + y), 5, colour, (60, 60, 66), width=2)
        for steam in (29 + x, 37 + x, 45 + x):
            draw.arc((steam, 10 + y, steam + 6, 26 + y), 90, 270, fill=(120, 120, 125), width=2)
    elif scene == "hills":
        draw.rectangle((0, 0, SIZE, SIZE), fill=(165, 210, 240))
        draw.ellipse((56 + x, 10 + y, 74 + x, 28 + y), fill=(255, 225, 90))
        draw.polygon([(-20, SIZE), (22 + x, 32 + y), (70, SIZE)], fill=(70, 130, 75))
        draw.polygon([(20, SIZE), (62 + x, 44 - y), (110, SIZE)], fill=(105, 165, 85))
    elif scene == "city":
        for left in range(x - 6, SIZE, 18):
            top = int(rng.integers(16, 52))
            draw.rectangle((left, top, left + 15, SIZE), fill=(95, 100, 115))
            for window in range(top + 5, SIZE, 9):
                draw.rectangle((left + 3, window, left + 5, window + 3), fill=(250, 230, 140))
                draw.rectangle((left + 10, window, left + 12, window + 3), fill=(250, 230, 140))
    else:
        draw.rounded_rectangle((26 + x, 10 + y, 58 + x, 74 + y), 6, fill=(35, 35, 40))
        draw.rectangle((29 + x, 16 + y, 55 + x, 66 + y), fill=(225, 235, 245))
        for bubble in (20, 32, 44):
            left = int(rng.integers(31, 38)) + x
            draw.rounded_rectangle((left, bubble + y, left + 16, bubble + 8 + y), 3, fill=colour)
    return finish(rng, np.array(image))


# ----------------------------------------------------------------------------------------- folders


def make_folder(folder, label, settings, fill):
    """Call `fill` on a new folder, which appears whole or not at all.

    A folder whose file `label` holds the same settings is left as it is. Raises UserError for any
    other that is not empty.
    """
    folder, settings = Path(folder), json.dumps(settings) + "\n"
    with writing(folder, "remove it, or name another folder"):
        if (folder / label).is_file() and (folder / label).read_text() == settings:
            return
        if folder.exists():
            folder.rmdir()  # fails where it is not empty, before the work is done
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            fill(new)
            (new / label).write_text(settings)
            follow_umask(new)
            new.replace(folder)


def write_posts(folder, name, posts, bar):
    """Write the file `name` of a world's (record, image) pairs, and the images, to a folder."""
    (folder / "images").mkdir(exist_ok=True)
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for record, image in posts:
            image.save(folder / record["image"], compress_level=1)
            file.write(json.dumps(record) + "\n")
            bar.update()


def write_world(out, seed=0, **counts):
    """Write the posts (POSTS says how many, or `counts`) and images/ to `out`. Raises UserError."""
    counts = POSTS | counts

    def fill(folder):
        clubs = make_clubs(seed)
        with progress(None, sum(counts.values()), "club world") as bar:
            for name, count in counts.items():
                write_posts(folder, name, make_posts(seed, clubs, name, count), bar)

    make_folder(out, "world.json", {"version": VERSION, "seed": seed, **counts}, fill)


# --------------------------------------------------------------------------------------- toy model

# A folder in Hugging Face layout. Its tokenizer has a token for every word of WORDS and every tag,
# and spells any other ASCII text. In its chat template a turn is only its start and its end: there
# is no system turn, and the speakers alternate anyway. Its config names full-attention blocks
# because the default ones lie beyond this vision tower.
TOY = Path(__file__).parent / "toy"


def copy_toy_files(folder, without=()):
    for file in TOY.iterdir():
        if file.name not in without:
            shutil.copyfile(file, Path(folder) / file.name)  # without its permissions


def copy_toy(folder):
    """Copy the embedded toy, a Qwen2.5-VL with 1.2 million weights, to a new folder."""
    label = {"version": VERSION, "weights": crc32((TOY / "model.safetensors").read_bytes())}
    make_folder(folder, "toy.json", label, copy_toy_files)


def write_random_toy(folder, seed=0):
    """Write the toy as it is before pretraining: with random weights."""

    def fill(new):
        import torch
        import transformers

        transformers.logging.disable_progress_bar()  # this file is written in no time
        config = transformers.AutoConfig.from_pretrained(TOY)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            auto = transformers.AutoModelForImageTextToText
            auto.from_config(config, dtype=torch.float32).save_pretrained(new)
        copy_toy_files(new, without=("config.json", "model.safetensors"))

    make_folder(folder, "toy.json", {"version": VERSION, "seed": seed}, fill)


def pretrain(out, worlds=200, count=150):
    """Teach a random toy to see, to reason and to copy, on `count` posts of each of other worlds.

    Their facts contradict one another, so none can be learned. The weights are saved in bfloat16.
    """
    import transformers

    seeds = range(PRETRAINING, PRETRAINING + worlds)
    posts = (
        (record | {"id": f"{seed}-{record['id']}", "image": f"images/{seed}-{number}.png"}, image)
        for seed in seeds
        for number, (record, image) in enumerate(make_posts(seed, make_clubs(seed), "test", count))
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_random_toy(folder / "toy")
        with progress(None, worlds * count, "other worlds") as bar:
            write_posts(folder, "posts", posts, bar)
        options = f"--model {folder}/toy --train {folder}/posts.jsonl --out {folder}/run"
        options += " --mode cot --epochs 1 --lr 2e-3"
        train = [sys.executable, TOY.parent.parent / "train.py", *options.split()]
        subprocess.run(train, check=True)
        trained = checkpoint_of(str(folder / "run"))
        model = transformers.AutoModelForImageTextToText.from_pretrained(trained, dtype="bfloat16")
        model.save_pretrained(out)
        if Path(out) != TOY:
            copy_toy_files(out, without=("config.json", "model.safetensors"))
        follow_umask(out)


def write_beside(out, seed):
    """Write a world and the toy model beside the run folder `out`; returns train.py's files."""
    world = Path(out).parent / f"clubworld-{seed}"
    write_world(world, seed)
    copy_toy(world / "toy")
    return {"model": str(world / "toy")} | {name: str(world / f"{name}.jsonl") for name in POSTS}


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    pretrain_help = "make the embedded toy anew, in minutes"
    add("command", nargs="?", choices=["pretrain"], help=pretrain_help)
    add("--out", metavar="DIR", help="a new folder; of pretrain, the toy's (default: tools/toy)")
    add("--seed", type=non_negative_int, default=0, help="settings: 100 to 999; reports: 0 to 9")
    for name, count in POSTS.items():
        add(f"--{name}", type=positive_int, default=count, metavar="N", help="posts in its file")
    add("--worlds", type=positive_int, default=200, metavar="N", help="of pretrain: other worlds")
    args = parser.parse_args(arguments)
    if not (args.out or args.command):
        parser.error("--out is missing")
    return args


def main():
    args = parse_args()
    if args.command:
        pretrain(args.out or TOY, args.worlds)
        return
    write_world(args.out, args.seed, **{name: getattr(args, name) for name in POSTS})
    copy_toy(Path(args.out) / "toy")
    info(f"{args.out}: club world {args.seed}, and in toy/ its model")


if __name__ == "__main__":
    run(main)
