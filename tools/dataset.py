"""Tools for data sets of posts.

    python -m tools.dataset cmkp train_src.txt --images CMKP_images --out train.jsonl
    python -m tools.dataset stats train.jsonl test.jsonl
    python -m tools.dataset split all.jsonl --overlap 0.4492 --test 5000 --valid 5000 --out split
    python -m tools.dataset check train.jsonl

A file of posts is JSONL, or CMKP's text, text<sep>a;b<sep>address on each line.
"""

import hashlib
import json
import os
import random
import signal
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import evaluate
from data import check_record, refuse_streams, relative_path
from evaluate import UserError, first_few, non_negative_int, normalize, percent, read_rows, shown
from support.console import (
    ArgumentParser,
    fraction,
    info,
    positive_int,
    progress,
    reading,
    whole_number,
    writing,
)
from support.images import Unreadable, load_image
from support.jsonl import locked, to_line, write_atomic

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


def to_record(path, line, row):
    """A row of a file of posts, a dict or a line of CMKP's text, as a record. Raises UserError.

    A record made of CMKP's text has no image yet, but keeps the image's "address". Its id is the
    image's name, else a digest: a line number would change with the order of the posts.
    """
    if isinstance(row, dict):
        check_record(row, f"{path} line {line}")
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


def read_entries(path):
    """The posts of a JSONL or CMKP file as a list of Entry. Raises UserError."""
    folder = os.path.realpath(Path(path).parent)
    rows = progress(read_rows(path), None, Path(path).name)
    entries = [to_entry(to_record(path, line, row), folder) for line, row in rows]
    if not entries:
        raise UserError(f"{path}: no posts in it")
    return entries


# -------------------------------------------------------------------------------------------- cmkp


def make_ids_unique(records):
    """Rename every id that an earlier record has, `x` to `x-2`; returns how many were renamed."""
    taken, seen, renamed = {record["id"] for record in records}, {}, 0
    for record in records:
        identity = record["id"]
        number = seen[identity] = seen.get(identity, 0) + 1
        while number > 1 and record["id"] in taken:
            record["id"] = f"{identity}-{number}"
            number += 1
        renamed += record["id"] != identity
        taken.add(record["id"])
    return renamed


def cmkp(args):
    """Write CMKP's text as JSONL."""
    if Path(args.out).resolve() == Path(args.source).resolve():
        raise UserError(f"{args.out}: this is the file to read; choose another --out")
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
    for what, items in (("images are missing", missing), ("posts can't be trained on", unusable)):
        if items:
            info(f"{len(items)} {what}: {first_few(items)}")
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
    print_stats(args.files, [read_entries(path) for path in args.files], args.json)


# ------------------------------------------------------------------------------------------- split

SIDES = TRAIN, VALID, TEST = range(3)
SIDE_NAMES = ("train", "valid", "test")
OVERLAP_TOLERANCE = 0.005
LIKENESS_TOLERANCE = 0.10  # relative difference of a side's means from those of all posts
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

    def __init__(self, groups, side, overlap):
        self.overlap, self.side, self.rows = overlap, side.tolist(), groups.sums.tolist()
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
                yield abs(mean / target - 1) / LIKENESS_TOLERANCE if target else 0

    def badness(self):
        """0 where every figure is well within its tolerance."""
        return sum(max(0, misfit - 0.5) for misfit in self.misfits())

    def search(self, seed):
        """Try random swaps and keep those that help; returns {name: misfit}, good up to 1."""
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
        figures = ("overlap", "words a post", "keyphrases a post", "share present")
        names = [f"{SIDE_NAMES[which]} {figure}" for which in self.checked for figure in figures]
        return dict(zip(names, self.misfits(), strict=True))


def resplit(entries, overlap, test, valid, seed):
    """Split posts so that few of the keyphrases of test and valid are in train: MMKP-V2's idea.

    Returns an array with TRAIN, VALID or TEST for each entry. Of the orders in which keyphrases
    can be held out, the one that favours rare keyphrases least is taken: rare ones cost few posts,
    and so reach lower overlaps, but test should have unseen keyphrases of all sorts.

    Raises UserError where no split found has this overlap (within OVERLAP_TOLERANCE) and sides that
    are like the whole (within LIKENESS_TOLERANCE).
    """
    if test + valid >= len(entries):
        raise UserError(
            f"--test {test} and --valid {valid} leave nothing to train on of {len(entries)} posts"
        )
    groups, attempts = Groups(entries), []
    wanted = [TEST, VALID] if valid else [TEST]
    for sharpness in (1, 2, 4, 8):
        side = HoldOut(groups, (0, valid, test), sharpness, seed).split(overlap)
        swaps = Swaps(groups, side, overlap)
        misfits = swaps.search(seed)
        side[:] = swaps.side
        for which in wanted:
            if not (side == which).any():  # all the posts that fit there must stay together
                misfits[f"{SIDE_NAMES[which]} posts"] = float("inf")
        worst = max(misfits.values())
        if worst <= 1:
            return side[groups.of_post]
        attempts.append((worst, side, misfits))
    _, side, misfits = min(attempts, key=lambda attempt: attempt[0])
    reached = " and ".join(
        f"{percent(groups.overlap(side, which))}% in {SIDE_NAMES[which]}" for which in wanted
    )
    broken = ", ".join(name for name, misfit in misfits.items() if misfit > 1)
    raise UserError(
        f"an overlap of {percent(overlap)}% can't be reached with --test {test} and --valid {valid}"
        f" of {len(entries)} posts; the closest found is {reached} (not as asked: {broken}). Ask "
        "for that overlap or other sizes; nothing was written"
    )


def split(args):
    """Split posts anew so that few keyphrases of test and valid are in train (as MMKP-V2 does)."""
    out = Path(args.out)
    paths = [out / f"{name}.jsonl" for name in SIDE_NAMES]
    for path in paths:
        if path.resolve() in {Path(file).resolve() for file in args.files}:
            raise UserError(f"{path}: one of the files to split; choose another --out")
    entries = [entry for path in args.files for entry in read_entries(path)]
    # Sorted, so that the split does not depend on the order of the input.
    entries.sort(key=lambda e: (e.record["id"], e.record["text"], to_line(e.record)))
    if renamed := make_ids_unique([entry.record for entry in entries]):
        info(f"{renamed} ids were used more than once; the later ones now end in a number")
    side = resplit(entries, args.overlap, args.test, args.valid, args.seed).tolist()
    parts = [[], [], []]
    for entry, which in zip(entries, side, strict=True):
        parts[which].append(entry)
        image = entry.record.get("image")
        if image and not os.path.isabs(image):
            entry.record["image"] = relative_path(entry.image, out)
    for which, size in ((TEST, args.test), (VALID, args.valid)):
        if len(parts[which]) != size:
            info(
                f"{SIDE_NAMES[which]}: {len(parts[which])} posts where {size} were asked for, "
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


def check_line(path, is_text, line, offset):
    """(id or None, list of problems) of a line of a file of posts and its image."""
    with open(path, "rb") as file:
        file.seek(offset)
        raw = file.readline()
    try:
        if is_text:
            record = to_record(path, line, evaluate.decode(path, line, raw))
        else:
            record = evaluate.parse_line(path, line, raw)
    except UserError as error:
        return None, [str(error).removeprefix(f"{path} line {line}: ")]
    fields = (record.get(field) for field in ("id", "text", "image"))
    identity, text, image = (value if isinstance(value, str) else None for value in fields)
    problems = []
    try:
        check_record(record, "", for_training=True)
    except UserError as error:
        problem = str(error).removeprefix(f" (id {shown(identity)})")
        problems.append(problem.removeprefix(": "))
    if image:
        try:
            load_image(Path(path).parent / image, 512 * 28 * 28)
        except Unreadable as error:
            problems.append(f"the image {shown(image)}: {error}")
    elif text is not None and not text.strip():
        problems.append("neither text nor image")
    return identity, problems


def check(args):
    """Read every record and image and print all that is wrong; exit with 1 if anything is."""
    refuse_streams(args.file)
    lines, head = [], b""
    for line, offset, raw in evaluate.read_lines(args.file):
        if raw := raw.removeprefix(evaluate.BYTE_ORDER_MARK).strip():
            lines.append((line, offset))
            head = head or raw
    if not lines:
        raise UserError(f"{args.file}: no posts in it")
    is_json = args.file.endswith((".jsonl", ".json")) or evaluate.LOOKS_LIKE_JSON.match(head)
    wrong, first = [], {}
    # multiprocessing.Pool would wait for ever for a worker that the system has killed.
    ignore_ctrl_c = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    pool = ProcessPoolExecutor(args.workers, **ignore_ctrl_c)
    try:
        check_one = partial(check_line, args.file, not is_json)
        results = pool.map(check_one, *zip(*lines, strict=True), chunksize=8)
        results = progress(results, len(lines), "check")
        for (line, _), (identity, problems) in zip(lines, results, strict=True):
            if is_json and identity is not None and first.setdefault(identity, line) != line:
                problems.append(f"this id was already used on line {first[identity]}")
            wrong += [{"line": line, "id": identity, "problem": problem} for problem in problems]
    except BrokenProcessPool:
        raise UserError(
            f"{args.file}: a worker process was killed, perhaps because the memory was full; "
            "try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    if args.json:
        print(json.dumps({"posts": len(lines), "problems": wrong}, indent=2))
    else:
        for problem in wrong:
            named = f" (id {shown(problem['id'])})" if problem["id"] is not None else ""
            print(f"line {problem['line']}{named}: {problem['problem']}")
        print(f"{len(lines)} posts, {len(wrong)} problems")
    return 1 if wrong else 0


# -------------------------------------------------------------------------------- the command line


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    tools = parser.add_subparsers(required=True, metavar="cmkp | stats | split | check")

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

    add = add_tool(stats)
    add("files", metavar="FILE", nargs="+", help="posts; the first is the train file")

    add = add_tool(split)
    add("files", metavar="FILE", nargs="+", help="posts")
    overlap = "share of the distinct keyphrases of test, and of valid, that train has, to 0.005"
    add("--overlap", type=fraction, default=0.4492, help=overlap)
    add("--test", metavar="N", type=positive_int, help="posts in test.jsonl", required=True)
    valid = "posts in valid.jsonl, 0 for none"
    add("--valid", metavar="N", type=non_negative_int, help=valid, required=True)
    add("--seed", type=non_negative_int, default=0, help="seed of the random choices")
    add("--out", metavar="DIR", help="folder for train, valid and test.jsonl", required=True)

    add = add_tool(check)
    add("file", metavar="FILE", help="posts")
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
