"""Tools for data sets of posts.

    python -m tools.dataset cmkp train_src.txt --images CMKP_images --out train.jsonl
    python -m tools.dataset stats train.jsonl test.jsonl
    python -m tools.dataset split all.jsonl --overlap 0.4492 --test 5000 --valid 5000 --out split
    python -m tools.dataset check train.jsonl
    python -m tools.dataset rename theirs.jsonl --map text=caption --out ours.jsonl

A file of posts is JSONL, or CMKP's text, text<sep>a;b<sep>address on each line.
"""

import hashlib
import json
import math
import os
import random
import re
import signal
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import evaluate
from data import check_record, relative_path
from evaluate import (
    UserError,
    first_few,
    non_negative_int,
    normalize,
    percent,
    plural,
    read_rows,
    shown,
)
from support.console import (
    ArgumentParser,
    fraction,
    info,
    number_in,
    positive_int,
    progress,
    reading,
    whole_number,
    writing,
)
from support.images import NO_FILE, Unreadable, load_image
from support.jsonl import locked, to_line, write_atomic
from support.records import (
    ADDRESS,
    SAVE,
    add_map_option,
    check_file,
    likely_mistakes,
    renamed,
    where_images_are,
)

# ----------------------------------------------------------------------------------- reading posts


class Entry(NamedTuple):
    """A post as these tools see it."""

    record: dict
    image: str | None  # path of the image
    text: int | None  # the same number for texts of the same words; None where there is no text
    phrases: list[str]  # keyphrases as overlaps compare them: lower-cased, not stemmed
    words: int  # words of the text
    scored: int  # keyphrases that differ after stemming
    present: int  # those of them that stand in the text


def to_record(path, line, row, names=None):
    """A row of a file of posts, a dict or a line of CMKP's text, as a record. Raises UserError.

    A record made of CMKP's text has no image yet, but keeps the image's "address". Its id is the
    image's name, else a digest: a line number would change with the order of the posts.
    """
    if isinstance(row, dict):
        row = renamed(row, names) if names else row
        check_record(row, f"{path} line {line}", names=names)
        return row
    post = evaluate.parse_cmkp(path, line, row)
    identity = post["id"] or hashlib.blake2b(row.encode(), digest_size=8).hexdigest()
    keyphrases = [phrase.strip() for phrase in post["keyphrases"]]
    record = {"id": identity, "text": post["text"], "image": None}
    return record | {"keyphrases": keyphrases, "address": post["address"]}


def to_entry(record, folder):
    """The Entry of a record from a file in `folder`."""
    keyphrases, image = record.get("keyphrases", []), record.get("image")
    words = normalize(record["text"])
    scored = {normalize(phrase) for phrase in keyphrases} - {()}
    return Entry(
        record,
        os.path.join(folder, image) if image else None,
        hash(words) if words else None,
        [phrase.strip().lower() for phrase in keyphrases if phrase.strip()],
        len(record["text"].split()),
        len(scored),
        sum(f" {' '.join(phrase)} " in f" {' '.join(words)} " for phrase in scored),
    )


def read_entries(path, names=None):
    """The posts of a JSONL or CMKP file as a list of Entry. Raises UserError."""
    check_file(path, cmkp=True)
    folder = os.path.realpath(Path(path).parent)
    rows = progress(read_rows(path), None, Path(path).name)
    entries = [to_entry(to_record(path, line, row, names), folder) for line, row in rows]
    if not entries:
        raise UserError(f"{path}: no posts in it")
    return entries


# ------------------------------------------------------------------------------------ rename, cmkp


def refuse_input(out, *files):
    """Raise UserError where the file to write is one to read."""
    if Path(out).resolve() in {Path(file).resolve() for file in files}:
        raise UserError(f"{out}: this is a file to read; choose another --out")


def rename(args):
    """Write posts that have other field names with ours, for the commands without --map."""
    refuse_input(args.out, args.source)
    check_file(args.source)
    folder, out, count = os.path.realpath(Path(args.source).parent), Path(args.out), 0

    def lines():
        nonlocal count
        for line, _, row in evaluate.read_jsonl(args.source):
            record, count = to_record(args.source, line, row, args.map), count + 1
            if record.get("image") and not os.path.isabs(record["image"]):
                path = os.path.join(folder, record["image"])
                record["image"] = relative_path(path, out.parent)
            yield to_line(record).encode()

    with writing(out):
        write_atomic(out, lines())
    print(json.dumps({"posts": count}) if args.json else f"{out}: {plural(count, 'post')}")


def make_ids_unique(records):
    """Rename every id that an earlier record has, `x` to `x-2`; returns how many were renamed."""
    taken, seen, count = {record["id"] for record in records}, {}, 0
    for record in records:
        identity = record["id"]
        number = seen[identity] = seen.get(identity, 0) + 1
        while number > 1 and record["id"] in taken:
            record["id"] = f"{identity}-{number}"
            number += 1
        count += record["id"] != identity
        taken.add(record["id"])
    return count


def cmkp(args):
    """Write CMKP's text as JSONL."""
    refuse_input(args.out, args.source)
    check_file(args.source, cmkp=True)
    images = ()
    if args.images:
        with reading(args.images, "--images must be a folder"):
            images = set(os.listdir(args.images))
    records, missing, unusable = [], [], []
    for line, row in read_rows(args.source):
        if isinstance(row, dict):
            raise UserError(
                f"{args.source} line {line}: JSONL already; text<sep>a;b<sep>address is needed here"
            )
        record = to_record(args.source, line, row)
        records.append(record)
        name = record["address"].rsplit("/", 1)[-1]
        if name in images:
            path = os.path.join(os.path.realpath(args.images), name)
            record["image"] = relative_path(path, Path(args.out).parent)
        elif args.images:
            missing.append(name or f"line {line} has no address")
        try:
            check_record(record, f"line {line}", for_training=True)
        except UserError as error:
            unusable.append(str(error))
    if not records:
        raise UserError(f"{args.source}: no posts in it")
    result = {
        "posts": len(records),
        "images": sum(record["image"] is not None for record in records),
        "images_missing": len(missing),
        "ids_renamed": make_ids_unique(records),
        "unusable": len(unusable),
    }
    with writing(args.out):
        write_atomic(args.out, "".join(map(to_line, records)))
    if missing:
        info(f"{plural(len(missing), 'image')} missing: {first_few(missing)}")
    if unusable:
        info(f"{plural(len(unusable), 'post')} of no use for training: {first_few(unusable)}")
    rows = [[name.replace("_", " "), str(value)] for name, value in result.items()]
    print(json.dumps(result, indent=2) if args.json else evaluate.lay_out(rows))


# ------------------------------------------------------------------------------------------- stats

SHARES = {"present", "absent", "overlap", "overlap_occurrences", "posts_with_unseen"}


def share(part, whole):
    """A fraction, 0 where there is nothing."""
    return part / whole if whole else 0.0


def figures_of(entries, known=None):
    """The figures of a list of Entry as a dict, shares as fractions.

    "present" is evaluate.py's: the share of keyphrases whose stemmed words stand consecutively in
    the stemmed text. Overlaps, where `known` is given (the train file's keyphrases), compare
    keyphrases lower-cased and not stemmed; "overlap" is over distinct ones.
    """
    phrases = [phrase for entry in entries for phrase in entry.phrases]
    distinct, images = set(phrases), [entry.image for entry in entries if entry.image is not None]
    scored = sum(entry.scored for entry in entries)
    present = sum(entry.present for entry in entries)
    result = {
        "posts": len(entries),
        "keyphrases": len(phrases),
        "distinct_keyphrases": len(distinct),
        "keyphrases_per_post": share(len(phrases), len(entries)),
        "words_per_post": share(sum(entry.words for entry in entries), len(entries)),
        "present": share(present, scored),
        "absent": share(scored - present, scored),
        "images": len(images),
        "images_missing": sum(not os.path.exists(image) for image in images),
    }
    if known is not None:
        seen = sum(phrase in known for phrase in phrases)
        with_unseen = sum(not known.issuperset(entry.phrases) for entry in entries)
        result["overlap"] = share(len(distinct & known), len(distinct))
        result["overlap_occurrences"] = share(seen, len(phrases))
        result["posts_with_unseen"] = share(with_unseen, len(entries))
    return result


def print_stats(names, parts, as_json):
    """Print the figures of files: `parts` are lists of Entry, the first is the train file."""
    known = {phrase for entry in parts[0] for phrase in entry.phrases}
    columns = []
    for name, entries in zip(names, parts, strict=True):
        columns.append({"file": str(name)} | figures_of(entries, known if columns else None))
    if as_json:
        print(json.dumps({"overlap": columns[-1].get("overlap"), "files": columns}, indent=2))
        return

    def cell(key, value):
        if key in SHARES and value is not None:
            return percent(value) + "%"
        if isinstance(value, float):
            return f"{value:.2f}"
        return "-" if value is None else str(value)

    rows = [
        [key.replace("_", " "), *(cell(key, column.get(key)) for column in columns)]
        for key in columns[-1]
    ]
    print(evaluate.lay_out(rows))


def stats(args):
    """Count posts and keyphrases, and how many of a file's keyphrases the train file has."""
    print_stats(args.files, [read_entries(path, args.map) for path in args.files], args.json)


# ------------------------------------------------------------------------------------------- split

SIDES = TRAIN, VALID, TEST = range(3)
SIDE_NAMES = ("train", "valid", "test")
OVERLAP_TOLERANCE = 0.005
LIKENESS = 0.1  # default: relative difference of a side's means from those of all posts
PATIENCE = 5000  # swaps in vain before the search gives up


def group_posts(entries):
    """The group of each post, a list of numbers: posts that share an image or a text are in one."""
    parent, first = list(range(len(entries))), {}

    def root(post):
        while parent[post] != post:
            parent[post] = post = parent[parent[post]]
        return post

    for post, entry in enumerate(entries):
        image = os.path.normpath(entry.image) if entry.image else entry.record.get("address")
        for key in (("image", image), ("text", entry.text)):
            if key[1]:
                parent[root(post)] = root(first.setdefault(key, post))
    numbers = {}
    return [numbers.setdefault(root(post), len(numbers)) for post in range(len(entries))]


class Groups:
    """The groups of posts that a split keeps together, G of them, and their keyphrases, as arrays.

    of_post: the group of each post.
    pair_group, pair_phrase: the distinct pairs of a group and one of its keyphrases.
    sums: (G, 5), a group's posts, words, keyphrases, keyphrases present and keyphrases scored.
    size: (G,), a group's posts.

    Raises UserError where no post has a keyphrase.
    """

    def __init__(self, entries):
        import numpy as np

        phrases = {}  # keyphrase -> its number
        self.of_post = np.array(group_posts(entries))
        pairs = [
            (group, phrases.setdefault(phrase, len(phrases)))
            for group, entry in zip(self.of_post.tolist(), entries, strict=True)
            for phrase in entry.phrases
        ]
        if not pairs:
            raise UserError("none of the posts has a keyphrase; a split by keyphrases needs some")
        self.phrases = len(phrases)
        pairs = np.unique(np.array(pairs) @ [self.phrases, 1])
        self.pair_group, self.pair_phrase = np.divmod(pairs, self.phrases)
        rows = [(1, e.words, len(e.phrases), e.present, e.scored) for e in entries]
        self.sums = np.zeros((self.of_post.max() + 1, 5), dtype=int)
        np.add.at(self.sums, self.of_post, rows)
        self.size = self.sums[:, 0]

    def overlap(self, side, which):
        """The share of one side's distinct keyphrases that train has, too; `side` is (G,)."""
        import numpy as np

        here, there = np.zeros((2, self.phrases), dtype=bool)
        sides = side[self.pair_group]
        here[self.pair_phrase[sides == which]] = True
        there[self.pair_phrase[sides == TRAIN]] = True
        return share((here & there).sum(), here.sum())


class HoldOut:
    """Splits of groups in which some keyphrases are held out: all posts that have them leave train.

    Keyphrases are held out in a random order, in which a keyphrase of n posts comes late with
    weight n ** sharpness: a sharper order favours rare ones. The rest of test and valid are posts
    whose keyphrases train has, too. A split is an array (G,) of TRAIN, VALID or TEST.
    """

    def __init__(self, groups, sizes, sharpness, seed):
        import numpy as np

        rng, size = np.random.default_rng([seed, sharpness]), groups.size
        phrases, pair_group, pair_phrase = groups.phrases, groups.pair_group, groups.pair_phrase
        self.groups, self.sizes = groups, sizes
        # More frequent keyphrases and larger groups stay in train: none should fill the test set.
        most = max(1, (sizes[VALID] + sizes[TEST]) * sharpness / 20)
        posts = np.bincount(pair_phrase, size[pair_group], minlength=phrases)
        late = np.where(posts <= most, posts**sharpness * rng.exponential(size=phrases), np.inf)
        self.can_be_held = int(np.isfinite(late).sum())
        rank = np.argsort(np.argsort(late))
        self.first = np.full(len(size), phrases)  # rank of the first keyphrase of each group
        np.minimum.at(self.first, pair_group, rank[pair_phrase])
        self.dice, place = rng.random((2, len(size)))
        # One group for each keyphrase comes last: while it is in train, the others can leave train
        # without making the keyphrase unseen.
        in_place = np.argsort(place[pair_group])
        _, keepers = np.unique(pair_phrase[in_place], return_index=True)
        keeper = np.zeros(len(size), dtype=bool)
        keeper[pair_group[in_place][keepers]] = True
        self.fillers = np.lexsort((place, keeper, size > most))

    def split(self, overlap):
        """The split with the most keyphrases held out whose overlap is not below `overlap`."""
        enough, too_many = 0, self.can_be_held + 1
        side, _ = self.deal_evenly(0)
        while too_many - enough > 1:
            held = (enough + too_many) // 2
            dealt = self.deal_evenly(held)
            if dealt is None or dealt[1] < overlap:
                too_many = held
            else:
                enough, side = held, dealt[0]
        self.fill_up(side)
        return side

    def deal_evenly(self, held):
        """(split, overlap) in which test and valid have about the same overlap.

        None where they have no room for the posts of `held` keyphrases.
        """
        low, high = 0 if self.sizes[VALID] else 1, 1  # bounds of the share of posts in test
        found = None
        for _ in range(10):
            to_test = (low + high) / 2
            side, beyond = self.deal(held, to_test)
            if beyond[TEST] > 0 and beyond[VALID] > 0:  # no other share makes room in both
                return None
            of_test, of_valid = (self.groups.overlap(side, which) for which in (TEST, VALID))
            if max(beyond[VALID], beyond[TEST]) <= 0:
                found = side, max(of_test, of_valid)
            if beyond[VALID] > 0 or beyond[TEST] <= 0 and of_test > of_valid:
                low = to_test
            else:
                high = to_test
        return found

    def deal(self, held, to_test):
        """(split, posts beyond each side's size) with `held` keyphrases held out.

        The share `to_test` of their posts is in test, the others in valid.
        """
        size = self.groups.size
        held_side = VALID + (self.dice < to_test)  # TEST is VALID + 1
        side = (self.first < held) * held_side  # TRAIN is 0
        beyond = [int(size[side == which].sum()) - self.sizes[which] for which in SIDES]
        rest = self.fillers[side[self.fillers] == TRAIN]
        so_far, start = size[rest].cumsum(), 0
        for which in (TEST, VALID):
            filled = so_far[start - 1] if start else 0
            end = max(start, int(so_far.searchsorted(filled - beyond[which], "right")))
            side[rest[start:end]] = which
            start = end
        return side, beyond

    def fill_up(self, side):
        """Move smaller groups to test and valid where a group of several posts did not fit."""
        size = self.groups.size
        for which in (TEST, VALID):
            room = self.sizes[which] - size[side == which].sum()
            for group in self.fillers.tolist() if room else ():
                if side[group] == TRAIN and size[group] <= room:
                    side[group], room = which, room - size[group]


def means(sums):
    """(words a post, keyphrases a post, share of keyphrases present) of a row of Groups.sums."""
    posts, words, keyphrases, present, scored = sums
    return share(words, posts), share(keyphrases, posts), share(present, scored)


class Swaps:
    """Swaps groups of the same size between the sides until a split is as asked.

    The counts are lists: a swap changes a few numbers, for which arrays are slow.
    """

    def __init__(self, groups, side, overlap, likeness):
        self.overlap, self.likeness = overlap, likeness
        self.side, self.rows = side.tolist(), groups.sums.tolist()
        self.checked = [which for which in (TEST, VALID) if which in self.side]
        self.whole = means(groups.sums.sum(axis=0).tolist())
        self.sums = [groups.sums[side == which].sum(axis=0).tolist() for which in SIDES]
        self.phrases = [[] for _ in self.rows]  # of each group
        self.count = [[0] * groups.phrases for _ in SIDES]  # of groups that have a keyphrase
        pairs = groups.pair_group.tolist(), groups.pair_phrase.tolist()
        for group, phrase in zip(*pairs, strict=True):
            self.phrases[group].append(phrase)
            self.count[self.side[group]][phrase] += 1
        self.distinct = [0, 0, 0]  # keyphrases of each side
        self.shared = [0, 0, 0]  # those of them that train has, too
        for phrase in range(groups.phrases):
            self.tally(phrase, 1)

    def tally(self, phrase, sign):
        """Add a keyphrase to `distinct` and `shared` (sign 1), or take it out (-1)."""
        for which in self.checked:
            if self.count[which][phrase]:
                self.distinct[which] += sign
                self.shared[which] += sign * (self.count[TRAIN][phrase] > 0)

    def move(self, group, to):
        """Move a group to another side."""
        here, row = self.side[group], self.rows[group]
        self.side[group] = to
        self.sums[here] = [a - b for a, b in zip(self.sums[here], row, strict=True)]
        self.sums[to] = [a + b for a, b in zip(self.sums[to], row, strict=True)]
        for phrase in self.phrases[group]:
            self.tally(phrase, -1)
            self.count[here][phrase] -= 1
            self.count[to][phrase] += 1
            self.tally(phrase, 1)

    def misfits(self):
        """How far each figure of test and valid is from what it should be, in tolerances."""
        for which in self.checked:
            overlap = share(self.shared[which], self.distinct[which])
            yield abs(overlap - self.overlap) / OVERLAP_TOLERANCE
            for mean, target in zip(means(self.sums[which]), self.whole, strict=True):
                yield abs(mean / target - 1) / self.likeness if target else 0

    def badness(self):
        """0 where every figure is well within its tolerance."""
        return sum(max(0, misfit - 0.5) for misfit in self.misfits())

    def search(self, seed):
        """Try random swaps and keep those that help."""
        rng, same_size = random.Random(seed), {}
        for group, row in enumerate(self.rows):
            same_size.setdefault(row[0], []).append(group)
        outside = [group for group, which in enumerate(self.side) if which != TRAIN]
        best, tries = self.badness(), 0
        while best and tries < PATIENCE:
            tries += 1
            position = rng.randrange(len(outside))
            one = outside[position]
            other = rng.choice(same_size[self.rows[one][0]])
            here, there = self.side[one], self.side[other]
            if here == there:
                continue
            self.move(one, there)
            self.move(other, here)
            if (now := self.badness()) < best:
                best, tries = now, 0
                outside[position] = other if there == TRAIN else one
            else:
                self.move(one, here)
                self.move(other, there)

    def named_misfits(self, likeness):
        """{name: misfit} of a side's figures, good up to 1, with this likeness."""
        self.likeness = likeness
        figures = ("overlap", "words a post", "keyphrases a post", "share present")
        names = [f"{SIDE_NAMES[which]} {figure}" for which in self.checked for figure in figures]
        return dict(zip(names, self.misfits(), strict=True))


def resplit(entries, overlap, test, valid, seed, likeness=LIKENESS):
    """Split posts so that few of the keyphrases of test and valid are in train: MMKP-V2's idea.

    Returns a list with TRAIN, VALID or TEST for each entry. Of the orders in which keyphrases
    can be held out, the one that favours rare keyphrases least is taken: rare ones cost few posts,
    and so reach lower overlaps, but test should have unseen keyphrases of all sorts.

    Raises UserError where no split found has this overlap (within OVERLAP_TOLERANCE) and sides that
    are like the whole (within `likeness`).
    """
    groups, sizes, attempts = Groups(entries), (0, valid, test), []
    for bound in (likeness, math.inf):  # without one, to say which likeness this overlap has
        for sharpness in (1, 2, 4, 8):
            side = HoldOut(groups, sizes, sharpness, seed).split(overlap)
            swaps = Swaps(groups, side, overlap, bound)
            swaps.search(seed)
            side[:] = swaps.side
            misfits = swaps.named_misfits(likeness)
            for which in (TEST, VALID):
                if sizes[which] and not (side == which).any():  # all that fit must stay together
                    misfits[f"{SIDE_NAMES[which]} posts"] = math.inf
            worst = max(misfits.values())
            if worst <= 1:
                return side[groups.of_post].tolist()
            broken = {name: misfit for name, misfit in misfits.items() if misfit > 1}
            overlap_met = not any(name.endswith((" overlap", " posts")) for name in broken)
            attempts.append((not overlap_met, worst, side, broken))
        not_met, _, side, broken = min(attempts, key=lambda attempt: attempt[:2])
        if not not_met:
            break
    reached = " and ".join(
        f"{percent(groups.overlap(side, which))}% in {SIDE_NAMES[which]}"
        for which in (TEST, VALID)
        if sizes[which]
    )
    asked = f"--test {test} and --valid {valid} of {plural(len(entries), 'post')}"
    if not_met:
        raise UserError(
            f"an overlap of {percent(overlap)}% can't be reached with {asked}; the closest found "
            f"is {reached} (not as asked: {', '.join(broken)}). Ask for that overlap or other "
            "sizes; nothing was written"
        )
    off = ", ".join(f"{name} by {misfit * likeness:.1%}" for name, misfit in broken.items())
    enough = math.ceil(100 * max(broken.values()) * likeness) / 100
    raise UserError(
        f"the overlap is met with {asked} ({reached}), but not --likeness {likeness:g}; from all "
        f"posts' mean differ {off}. Try --likeness {enough:g} or other sizes; nothing was written"
    )


def random_split(entries, test, valid, seed):
    """Split posts at random; those that share an image or a text stay on one side.

    Returns a list with TRAIN, VALID or TEST for each entry. Raises UserError where no post fits.
    """
    of_post, side = group_posts(entries), {}
    size = Counter(of_post)
    order = random.Random(seed).sample(sorted(size), len(size))
    for which, room in ((TEST, test), (VALID, valid)):
        asked = room
        for group in order:
            if group not in side and size[group] <= room:
                side[group], room = which, room - size[group]
        if asked and room == asked:
            raise UserError(
                f"not as asked: --{SIDE_NAMES[which]} {asked} leaves no {SIDE_NAMES[which]} posts, "
                "because those of the same text or image stay together; ask for more"
            )
    return [side.get(group, TRAIN) for group in of_post]


def split(args):
    """Split posts at random, or with --overlap so that few keyphrases are in train, as MMKP-V2."""
    out = Path(args.out)
    paths = [out / f"{name}.jsonl" for name in SIDE_NAMES]
    for path in paths:
        refuse_input(path, *args.files)
    entries = [entry for path in args.files for entry in read_entries(path, args.map)]
    # Sorted, so that the split does not depend on the order of the input.
    entries.sort(key=lambda e: (e.record["id"], e.record["text"], to_line(e.record)))
    if count := make_ids_unique([entry.record for entry in entries]):
        info(f"ids used more than once: {count} of them, the later ones, now end in a number")
    asked = args.test, args.valid, args.seed
    if args.test + args.valid >= len(entries):
        raise UserError(
            f"--test {args.test} and --valid {args.valid} leave nothing to train on of "
            f"{plural(len(entries), 'post')}"
        )
    if args.overlap is None:
        side = random_split(entries, *asked)
    else:
        side = resplit(entries, args.overlap, *asked, args.likeness)
    parts = [[], [], []]
    for entry, which in zip(entries, side, strict=True):
        parts[which].append(entry)
        image = entry.record.get("image")
        if image and not os.path.isabs(image):
            entry.record["image"] = relative_path(entry.image, out)
    for which, size in ((TEST, args.test), (VALID, args.valid)):
        if len(parts[which]) != size:
            info(
                f"{SIDE_NAMES[which]}: {plural(len(parts[which]), 'post')} where {size} asked for, "
                "because posts that stay together don't add up to it"
            )
    with (
        locked(paths[0]),
        writing(paths[0]),
        tempfile.TemporaryDirectory(dir=out, prefix=".split.") as temporary,
    ):
        for path, part in zip(paths, parts, strict=True):
            lines = "".join(to_line(entry.record) for entry in part)
            write_atomic(Path(temporary) / path.name, lines)
        for path in paths:  # only now: a full disk leaves older files as they were
            os.replace(Path(temporary) / path.name, path)
    print_stats(paths, parts, args.json)


# ------------------------------------------------------------------------------------------- check

COUNTED = ("with_image", "with_text", "with_cot", "keyphrases")
MISSING = f"an image: {NO_FILE}"


class Problem(NamedTuple):
    """One thing that is wrong with a line: its kind, what it is here, and the mend.

    With `field` it is no problem unless the whole file lacks that field.
    """

    kind: str
    what: str
    mend: str
    field: str | None = None


def typed(record, field, kind):
    """A field's value if it is of a type, else the type's empty value."""
    return value if isinstance(value := record.get(field), kind) else kind()


def check_line(path, is_text, names, line, offset):
    """(id or None, list of Problem, counts) of a line of a file of posts and its image.

    counts: how many images, texts, cots and keyphrases the post has.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        raw = file.readline()
    try:
        if is_text:
            record = to_record(path, line, evaluate.decode(path, line, raw))
        else:
            record = evaluate.parse_line(path, line, raw)
            record = renamed(record, names) if names else record
    except UserError as error:
        what, _, mend = str(error).removeprefix(f"{path} line {line}: ").partition("; ")
        return None, [Problem(re.split(r" \(|, not ", what)[0], what, mend)], (0, 0, 0, 0)
    image, text, problems = typed(record, "image", str), typed(record, "text", str).strip(), []
    try:
        check_record(record, "", for_training=True, names=names)
        found = likely_mistakes(record, names)
        problems += [Problem(kind, kind, mend, field) for field, kind, mend in found]
    except UserError as error:
        problems.append(Problem(error.kind, error.what, error.mend))
    if image:
        problems += image_problem(Path(path).parent, image)
    elif not text and isinstance(record.get("text"), str):
        problems.append(Problem("neither text nor image", "neither text nor image", "remove it"))
    has_cot = bool(typed(record, "cot", str).strip())
    counts = (bool(image), bool(text), has_cot, len(typed(record, "keyphrases", list)))
    return typed(record, "id", str) or None, problems, counts


def image_problem(folder, image):
    """A list of the Problem with a post's image, empty where there is none."""
    if ADDRESS.match(image):
        kind = "is an address or data, not a file name"
        return [Problem(f"an image {kind}", f"the image {shown(image)} {kind}", SAVE)]
    try:
        load_image(folder / image, 512 * 28 * 28)
    except Unreadable as error:
        reason = str(error)
        mend = "save it as JPEG or PNG, or write null"
        if not os.path.isfile(folder / image):
            mend = where_images_are(folder, image)
        kind = re.sub(r"^\d+ x \d+ pixels", "its pixels", reason.partition(": ")[0])
        return [Problem(f"an image: {kind}", f"the image {shown(image)}: {reason}", mend)]
    return []


def check(args):
    """Read every record and image and print all that is wrong; exit with 1 if anything is."""
    check_file(args.file, cmkp=True)
    lines, head = [], b""
    for line, offset, raw in evaluate.read_lines(args.file):
        if raw := raw.removeprefix(evaluate.BYTE_ORDER_MARK).strip():
            lines.append((line, offset))
            head = head or raw
    if not lines:
        raise UserError(f"{args.file}: no posts in it")
    is_json = args.file.endswith((".jsonl", ".json")) or evaluate.LOOKS_LIKE_JSON.match(head)
    # multiprocessing.Pool would wait for ever for a worker that the system has killed.
    ignore_ctrl_c = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    pool = ProcessPoolExecutor(args.workers, **ignore_ctrl_c)
    try:
        check_one = partial(check_line, args.file, not is_json, args.map)
        results = pool.map(check_one, *zip(*lines, strict=True), chunksize=8)
        results = progress(results, len(lines), "check")
        counts, found = collect(lines, results, is_json)
    except BrokenProcessPool:
        raise UserError(
            f"{args.file}: a worker process was killed, perhaps because the memory was full; "
            "try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    print_check(len(lines), counts, found, args.json)
    return 1 if found else 0


def collect(lines, results, is_json):
    """(counts of the file, its problems), a dict and a list of (line, id, Problem).

    lines: (line, offset) of each post; results: what `check_line` found in it.
    """
    found, first, tally = [], {}, Counter()
    for (line, _), (identity, problems, has) in zip(lines, results, strict=True):
        if is_json and identity is not None and first.setdefault(identity, line) != line:
            what = f"this id was already used on line {first[identity]}"
            problems.append(Problem("an id is used twice", what, "ids must differ"))
        if problems:
            found += [(line, identity, problem) for problem in problems]
        tally[has] += 1
    counts = {
        name: sum(has[number] * posts for has, posts in tally.items())
        for number, name in enumerate(COUNTED)
    }
    return counts, [row for row in found if not counts.get(f"with_{row[2].field}")]


def print_check(posts, counts, found, as_json):
    """Print what `check` found: (line, id, Problem) each; by kind, unless as JSON."""
    if as_json:
        rows = [
            {
                "line": line,
                "id": identity,
                "kind": p.kind,
                "problem": "; ".join(filter(None, p[1:3])),
            }
            for line, identity, p in found
        ]
        print(json.dumps({"posts": posts, **counts, "problems": rows}, indent=2))
        return
    groups = {}
    for row in found:
        groups.setdefault(row[2].kind, []).append(row)
    images, texts, cots, keyphrases = counts.values()
    having = f"{images:,} with an image, {texts:,} with a text, {cots:,} with a cot"
    having += "" if cots else " (so train with --mode sft)"
    print(f"{plural(posts, 'post')}: {having}; {plural(keyphrases, 'keyphrase')}")
    for kind, rows in sorted(groups.items(), key=lambda group: -len(group[1])):
        if kind == MISSING and len(rows) == images:
            kind = "none of the images is there"
        print(f"\n{len(rows):,} x {kind}")
        for line, identity, problem in rows[:3]:
            named = f" (id {shown(identity)})" if identity is not None else ""
            what = f": {problem.what}" if problem.what != problem.kind else ""
            print(f"  line {line}{named}{what}")
        if mend := rows[0][2].mend:
            print(f"  -> {evaluate.one_line(mend)}")
    kinds = f" of {len(groups)} kinds" if len(groups) > 1 else ""
    print(f"\n{plural(posts, 'post')}, {plural(len(found), 'problem')}{kinds}")


# -------------------------------------------------------------------------------- the command line


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    tools = parser.add_subparsers(required=True, metavar="cmkp | stats | split | check | rename")

    def add_tool(function):
        options = {"help": function.__doc__, "description": function.__doc__}
        tool = tools.add_parser(function.__name__, **options)
        tool.add_argument("--json", action="store_true", help="print JSON instead of a table")
        tool.set_defaults(tool=function)
        return tool.add_argument

    add = add_tool(cmkp)
    add("source", metavar="SRC", help="CMKP's text")
    add("--images", metavar="DIR", help="images, named like the last part of the addresses")
    add("--out", metavar="FILE", help="the JSONL file to write", required=True)

    add = add_tool(rename)
    add("source", metavar="FILE", help="posts")
    add_map_option(add, required=True)
    add("--out", metavar="FILE", help="the JSONL file to write", required=True)

    add = add_tool(stats)
    add("files", metavar="FILE", nargs="+", help="posts; the first is the train file")
    add_map_option(add)

    add = add_tool(split)
    add("files", metavar="FILE", nargs="+", help="posts")
    add_map_option(add)
    overlap = (
        "share of the distinct keyphrases of test, and of valid, that train has, to 0.005; without "
        "it the split is random"
    )
    add("--overlap", type=fraction, help=overlap)
    likeness = "with --overlap: how much test's and valid's means may differ from all posts'"
    add("--likeness", type=number_in("(0, inf]"), default=LIKENESS, help=likeness)
    add("--test", metavar="N", type=positive_int, help="posts in test.jsonl", required=True)
    valid = "posts in valid.jsonl, 0 for none"
    add("--valid", metavar="N", type=non_negative_int, help=valid, required=True)
    add("--seed", type=non_negative_int, default=0, help="seed of the random choices")
    add("--out", metavar="DIR", help="folder for train, valid and test.jsonl", required=True)

    add = add_tool(check)
    add("file", metavar="FILE", help="posts")
    add_map_option(add)
    cores = os.cpu_count() or 1
    add(
        "--workers", type=whole_number(1, 1024), default=cores, help="processes that read the posts"
    )
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    return args.tool(args)


if __name__ == "__main__":
    evaluate.run(main)
