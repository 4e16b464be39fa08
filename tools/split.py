"""How `python -m tools.dataset split` assigns posts to train, valid and test.

At random (`random_split`), or so that train lacks some keyphrases of test and valid (`resplit`):
keyphrases are held out (`HoldOut`), then groups of posts are swapped (`Swaps`).
"""

import os
import random
from collections import defaultdict

import numpy as np

from evaluate import UserError, percent
from tools.posts import share

SIDES = TRAIN, VALID, TEST = range(3)
SIDE_NAMES = ("train", "valid", "test")
OVERLAP_TOLERANCE = 0.005
MEANS = ("words a post", "keyphrases a post", "share present")  # should be those of all posts
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


def fill(side, size, order, sizes):
    """Move groups, in this order, from train to test and valid as long as `sizes` has room.

    side, size: (G,), the side of each group, which is changed, and its posts.
    """
    for which in (TEST, VALID):
        room = sizes[which] - size[side == which].sum()
        for group in order if room else ():
            if side[group] == TRAIN and size[group] <= room:
                side[group], room = which, room - size[group]


def random_split(entries, sizes, seed):
    """Split groups of posts at random: an array with TRAIN, VALID or TEST for each entry."""
    of_post = np.array(group_posts(entries))
    size = np.bincount(of_post)
    side = np.zeros(len(size), dtype=int)  # TRAIN is 0
    fill(side, size, random.Random(seed).sample(range(len(size)), len(size)), sizes)
    return side[of_post]


# -------------------------------------------------------------------- keyphrases that train lacks


class Groups:
    """The groups of posts that a split keeps together, G of them, and their keyphrases, as arrays.

    of_post: the group of each post.
    pair_group, pair_phrase: the distinct pairs of a group and one of its keyphrases.
    sums: (G, 5), a group's posts, words, keyphrases, keyphrases present and keyphrases scored.
    size: (G,), a group's posts.

    Raises UserError where no post has a keyphrase.
    """

    def __init__(self, entries):
        phrases = {}  # keyphrase -> its number
        self.of_post = np.array(group_posts(entries))
        pairs = {
            (group, phrases.setdefault(phrase, len(phrases)))
            for group, entry in zip(self.of_post.tolist(), entries, strict=True)
            for phrase in entry.phrases
        }
        if not pairs:
            raise UserError("none of the posts has a keyphrase; a split by keyphrases needs some")
        self.phrases = len(phrases)
        self.pair_group, self.pair_phrase = np.array(sorted(pairs)).T
        rows = [(1, e.words, len(e.phrases), e.present, e.scored) for e in entries]
        self.sums = np.zeros((self.of_post.max() + 1, 5), dtype=int)
        np.add.at(self.sums, self.of_post, rows)
        self.size = self.sums[:, 0]

    def count(self, side):
        """(3, phrases), how many groups of each side have each keyphrase; `side` is (G,)."""
        cells = side[self.pair_group] * self.phrases + self.pair_phrase
        return np.bincount(cells, minlength=3 * self.phrases).reshape(3, self.phrases)


def overlap_of(count, which):
    """The share of one side's distinct keyphrases that train has, too; see `Groups.count`."""
    here, there = count[which] > 0, count[TRAIN] > 0
    return share((here & there).sum(), here.sum())


class HoldOut:
    """Splits of groups in which some keyphrases are held out: all posts that have them leave train.

    Keyphrases are held out in a random order, in which a keyphrase of n posts comes late with
    weight n ** sharpness: a sharper order favours rare ones. The rest of test and valid are posts
    whose keyphrases train has, too. A split is an array (G,) of TRAIN, VALID or TEST.
    """

    def __init__(self, groups, sizes, sharpness, seed):
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
        side, _ = self.deal(0)
        while too_many - enough > 1:
            held = (enough + too_many) // 2
            dealt = self.deal(held)
            if dealt is None or dealt[1] < overlap:
                too_many = held
            else:
                enough, side = held, dealt[0]
        fill(side, self.groups.size, self.fillers.tolist(), self.sizes)
        return side

    def deal(self, held):
        """(split, overlap) with `held` keyphrases held out; the overlap of test and valid is alike.

        None where they have no room for the posts of these keyphrases.
        """
        size, found = self.groups.size, None
        low, high = 0 if self.sizes[VALID] else 1, 1  # bounds of test's share of these posts
        for _ in range(10):
            to_test = (low + high) / 2
            side = (self.first < held) * (VALID + (self.dice < to_test))  # TRAIN is 0
            room = [self.sizes[which] - size[side == which].sum() for which in SIDES]
            for which in (TEST, VALID):
                rest = self.fillers[side[self.fillers] == TRAIN]
                side[rest[size[rest].cumsum() <= room[which]]] = which
            count = self.groups.count(side)
            of_test, of_valid = overlap_of(count, TEST), overlap_of(count, VALID)
            if min(room[VALID], room[TEST]) >= 0:
                found = side, max(of_test, of_valid)
            if room[VALID] < 0 or room[TEST] >= 0 and of_test > of_valid:
                low = to_test
            else:
                high = to_test
        return found


def means(sums):
    """The figures that MEANS names, of a row of Groups.sums."""
    posts, words, keyphrases, present, scored = sums
    return share(words, posts), share(keyphrases, posts), share(present, scored)


class Swaps:
    """Swaps groups of the same size between the sides until a split is as asked."""

    def __init__(self, groups, side, overlap, likeness):
        self.groups, self.side, self.overlap, self.likeness = groups, side, overlap, likeness
        self.checked = [which for which in (TEST, VALID) if which in side]
        self.whole = means(groups.sums.sum(axis=0))
        self.sums = np.array([groups.sums[side == which].sum(axis=0) for which in SIDES])
        self.count = groups.count(side)
        ends = np.bincount(groups.pair_group, minlength=len(side)).cumsum()
        self.phrases = np.split(groups.pair_phrase, ends[:-1])  # of each group

    def move(self, group, to):
        """Move a group to another side."""
        for which, sign in ((self.side[group], -1), (to, 1)):
            self.sums[which] += sign * self.groups.sums[group]
            self.count[which, self.phrases[group]] += sign
        self.side[group] = to

    def misfits(self):
        """{figure of a side: how far it is from what it should be, in tolerances}."""
        found = {}
        for which in self.checked:
            side, overlap = SIDE_NAMES[which], overlap_of(self.count, which)
            found[f"{side} overlap"] = abs(overlap - self.overlap) / OVERLAP_TOLERANCE
            for name, mean, target in zip(MEANS, means(self.sums[which]), self.whole, strict=True):
                found[f"{side} {name}"] = abs(mean / target - 1) / self.likeness if target else 0
        return found

    def badness(self):
        """0 where every figure is well within its tolerance."""
        return sum(max(0, misfit - 0.5) for misfit in self.misfits().values())

    def search(self, seed):
        """Try random swaps and keep those that help."""
        rng, size, same_size = random.Random(seed), self.groups.size.tolist(), defaultdict(list)
        for group, posts in enumerate(size):
            same_size[posts].append(group)
        outside = np.flatnonzero(self.side != TRAIN).tolist()
        best, tries = self.badness(), 0
        while best and tries < PATIENCE:
            tries += 1
            position = rng.randrange(len(outside))
            one = outside[position]
            other = rng.choice(same_size[size[one]])
            here, there = self.side[one], self.side[other]
            self.move(one, there)
            self.move(other, here)
            if (now := self.badness()) < best:
                best, tries = now, 0
                outside[position] = other if there == TRAIN else one
            else:
                self.move(one, here)
                self.move(other, there)


def resplit(entries, overlap, sizes, seed, likeness):
    """Split posts so that few of the keyphrases of test and valid are in train: MMKP-V2's idea.

    Of the orders in which keyphrases can be held out, the one that favours rare keyphrases least is
    taken: rare ones cost few posts, and so reach lower overlaps, but test should have unseen ones
    of all sorts. Returns what `random_split` does. Raises UserError where no split found has this
    overlap (within OVERLAP_TOLERANCE) and sides that are like the whole (within `likeness`).
    """
    groups, attempts = Groups(entries), []
    for sharpness in (1, 2, 4, 8):
        side = HoldOut(groups, sizes, sharpness, seed).split(overlap)
        swaps = Swaps(groups, side, overlap, likeness)
        swaps.search(seed)
        if max(swaps.misfits().values(), default=0) <= 1:
            return swaps.side[groups.of_post]
        attempts.append(swaps)
    closest = min(attempts, key=lambda swaps: max(swaps.misfits().values()))
    missed = ", ".join(name for name, misfit in closest.misfits().items() if misfit > 1)
    has = {SIDE_NAMES[which]: overlap_of(closest.count, which) for which in closest.checked}
    reached = " and ".join(f"{percent(reached)}% in {side}" for side, reached in has.items())
    raise UserError(
        f"no split found with an overlap of {percent(overlap)}%; the closest has {reached} (not as "
        f"asked: {missed}). Ask for that overlap, other sizes or a larger --likeness"
    )
