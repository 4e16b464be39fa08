import json
import math
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import evaluate
from evaluate import (
    CJK,
    MEASURES,
    compare,
    intervals,
    normalize,
    normalize_cmkp,
    resample,
    score,
    statistics,
    stem,
)

HERE = Path(__file__).parent
STEMS = (HERE / "porter_nltk.txt").read_text(encoding="utf-8").splitlines()
STEMS = dict(line.split(" ") for line in STEMS)  # NLTK's
CLASSES = "all", "present", "absent", "seen", "unseen", "absent_unseen"


def one(keyphrases, references, text="", train=None):
    """The scores of a single post."""
    return score([{"keyphrases": keyphrases}], [{"text": text, "keyphrases": references}], train)


POSTS = [
    {"id": "p1", "text": "blue flowers in the wall", "keyphrases": ["blue flower", "gardening"]},
    {"id": "p2", "text": "my dogs play", "keyphrases": ["dog"]},
    {"id": "p3", "text": "storm over town", "keyphrases": ["storm hour", "weather"]},
]
PREDICTIONS = [
    {"id": "p1", "keyphrases": ["blue flowers", "hour"], "think": "Petals.", "tokens": 12},
    {"id": "p2", "keyphrases": ["cat", "dogs"], "think": None, "tokens": 4},
    {"id": "p3", "keyphrases": ["wind"], "think": "", "tokens": 5},
]


# -------------------------------------------------------------------------------------------- words


def test_stemmer_equals_nltk():
    assert len(STEMS) >= 20_000
    assert {word: stem(word) for word in STEMS} == STEMS


def test_stemmer_survives_long_words():
    for word in ("y" * 5000, "a" * 5000 + "ing", "*" * 5000 + "ed", "ingedly" * 700):
        assert word.startswith(stem(word)[:-1])


@pytest.mark.parametrize(
    "phrase, words",
    [
        ("  Wildflower\t Hours \n", "wildflow hour"),
        ("   ", ""),
        ("北京 Dogs天气", "北 京 dog 天 气"),
        ("寿司がスキ々", "寿 司 が ス キ 々"),
        ("\U00020000\U0002a700", "\U00020000 \U0002a700"),
        ("한국 음식", "한국 음식"),  # Hangul is written with spaces
        ("أخبار عاجلة 😀 cats🐈", "أخبار عاجلة 😀 cats🐈"),
        ("全角\u3000空白", "全 角 空 白"),
        ("<unk> , .", "<unk> , ."),
    ],
)
def test_words(phrase, words):
    assert normalize(phrase) == normalize_cmkp(phrase) == tuple(words.split())


@pytest.mark.parametrize(
    "raw, words",
    [
        ("a walk, (long) walk; walk: walk! walk? walk…", "a walk long walk walk walk walk walk"),
        ("#Foxes ＃foxes, “foxes” «foxes» „foxes“ 'foxes' `foxes`", "fox " * 7),
        (
            "「北京」。 “test”北京 ¿qué? مرحبا، हिन्दी। ｈｉ！",
            "北 京 test 北 京 qué مرحبا हिन्दी ｈｉ",
        ),
        (
            "c++ c# #c# (c++), u.s. u.s, don't a.b -x @me $5.",
            "c++ c# c# c++ u. u. don't a.b -x @me $5",
        ),
        ("... # !! :-) & ” ❤! ##", "... # !! :-) & ” ❤ ##"),
        ("rock &amp; roll &#35;1", "rock & roll 1"),
    ],
)
def test_words_of_raw_text_lose_what_surrounds_them(raw, words):
    assert normalize(raw) == tuple(words.split())
    assert normalize_cmkp(raw) == tuple(map(stem, " ".join(CJK.split(raw)).lower().split()))


@pytest.mark.parametrize(
    "phrase", ["Café Müller", "naïve cafés", "がぎぐ", "한국어", "Ångström ñandú", "İzmir", "Ệ"]
)
def test_composed_and_decomposed_letters_match(phrase):
    composed, decomposed = (unicodedata.normalize(form, phrase) for form in ("NFC", "NFD"))
    assert composed != decomposed and normalize(composed) == normalize(decomposed)
    assert one([decomposed], [composed], text=f"oh {decomposed} !")["present"]["F1@M"] == 1


# -------------------------------------------------------------------------- the arithmetic, by hand


def test_precision_and_recall_at_k():
    scores = one(["x", "a", "y", "b", "z", "c", "w"], ["a", "b", "c", "d"])["all"]
    first, third, ideal = 1 / math.log2(3), 1 / math.log2(5), 1 + 1 / math.log2(3) + 1 / 2
    expected = {"P@1": 0, "P@3": 1 / 3, "P@5": 2 / 5, "P@M": 3 / 7}
    expected |= {"R@1": 0, "R@3": 1 / 4, "R@5": 2 / 4, "R@M": 3 / 4}
    expected |= {"F1@1": 0, "F1@3": 2 / 7, "F1@5": 4 / 9, "F1@M": 6 / 11}
    expected |= {"MAP@1": 0, "MAP@3": (1 / 2) / 4, "MAP@5": (1 / 2 + 2 / 4) / 4}
    expected |= {"NDCG@1": 0, "NDCG@3": first / ideal, "NDCG@5": (first + third) / ideal}
    assert list(expected) == MEASURES
    assert {name: scores[name] for name in MEASURES} == pytest.approx(expected)


def test_fewer_predictions_than_k_divide_by_their_number():
    scores = one(["a", "x"], ["a", "b", "c"])["all"]
    assert (scores["P@1"], scores["P@3"], scores["P@5"], scores["P@M"]) == (1, 1 / 2, 1 / 2, 1 / 2)
    assert all(one([], ["a"])["all"][name] == 0 for name in MEASURES)


def test_f1_is_the_harmonic_mean_of_the_macro_means():
    # P@1 is 1 and 0, R@1 is 1/4 and 0: means 1/2 and 1/8. The mean of the posts' F1 would be 1/5.
    predictions = [{"keyphrases": ["a"]}, {"keyphrases": ["x"]}]
    references = [{"text": "", "keyphrases": list("abcd")}, {"text": "", "keyphrases": ["b"]}]
    scores = score(predictions, references)["all"]
    assert scores["F1@1"] == pytest.approx(2 * (1 / 2) * (1 / 8) / (1 / 2 + 1 / 8))
    assert scores["posts"] == 2 and scores["keyphrases"] == 5


def test_ndcg_ideal_sorts_all_predictions_made_and_then_cuts():
    # The fourth guess is the only correct one: the ideal order has it first, NDCG@3 never sees it.
    scores = one(["x", "y", "z", "a"], ["a", "b"])["all"]
    assert scores["NDCG@3"] == 0
    assert scores["NDCG@5"] == pytest.approx((1 / math.log2(5)) / 1)


def test_duplicate_predictions_are_dropped_and_the_first_kept():
    scores = one(["x", "dog", "Dogs", "dogs", "cat"], ["dog", "cat"])["all"]
    assert (scores["P@3"], scores["P@M"]) == (2 / 3, 2 / 3)
    assert scores["MAP@5"] == pytest.approx((1 / 2 + 2 / 3) / 2)

    scores = one(["dog"], ["dog", "Dogs", "cat"])["all"]  # and duplicate references
    assert scores["R@M"] == 1 / 2 and scores["keyphrases"] == 2


def test_phrases_with_invalid_words_are_dropped_and_other_punctuation_is_kept():
    for phrase in (",", ".", "<unk>", "<UNK>", "a , b", "storm .", "new <unk>"):
        assert one([phrase, "dog"], ["dog"])["all"]["P@1"] == 1, phrase
    for phrase in ("a, b", "storm.", "!", "<number>", "unk"):
        assert one([phrase, "dog"], ["dog"])["all"]["P@1"] == 0, phrase


def test_an_empty_phrase_is_a_wrong_and_absent_prediction_and_no_reference():
    scores = one(["", "dog", " "], ["dog", "cat"], text="dog  days", train=["", "x"])
    assert (scores["all"]["P@1"], scores["all"]["P@M"]) == (0, 1 / 2)
    assert scores["present"]["P@1"] == 1  # the empty phrase is not among the present ones
    assert (scores["absent"]["P@1"], scores["absent"]["P@M"]) == (0, 0)
    assert scores["unseen"]["P@M"] == 1 / 2  # it is unseen, whatever the training file holds
    scores = one(["dog", ""], ["dog", ""])["all"]
    assert scores["keyphrases"] == 1 and scores["R@M"] == 1 and scores["P@M"] == 1 / 2


def test_posts_without_a_reference_are_not_scored():
    scores = score(
        [{"keyphrases": ["x"]}, {"keyphrases": ["a"]}],
        [{"text": "", "keyphrases": []}, {"text": "", "keyphrases": ["a"]}],
    )
    assert scores["posts"] == 2 and scores["all"]["posts"] == 1 and scores["all"]["P@1"] == 1


def test_present_means_consecutive_stemmed_words():
    text = "The Blue Flowers of stone walls"
    cases = {"blue flower": 1, "flowers blue": 0, "blue stone": 0, "wall": 1, "the": 1}
    cases |= {"low": 0, "stone walls forever": 0, "stoning wall": 1}
    for phrase, present in cases.items():
        scores = one([phrase], [phrase], text)
        found = scores["present"]["posts"], scores["absent"]["posts"]
        assert found == (present, 1 - present), phrase


def test_classes_filter_references_and_predictions():
    phrases, text = ["x", "dog", "cat", "wind"], "the dog in the wind"
    scores = one(phrases, ["dog", "cat"], text, train=["Cats", "x"])

    def found(name, *measures):
        return [scores[name][measure] for measure in measures]

    assert found("present", "P@1", "P@M", "R@1", "keyphrases") == [1, 1 / 2, 1, 1]
    assert found("absent", "P@1", "P@3", "R@3", "keyphrases") == [0, 1 / 2, 1, 1]
    assert found("seen", "P@M", "R@M") == [1 / 2, 1]  # x, cat
    assert found("unseen", "P@1", "P@M", "R@M") == [1, 1 / 2, 1]  # dog, wind
    assert found("absent_unseen", "posts", "F1@M") == [0, 0]


def test_keys_of_the_scores():
    plain, full = score(PREDICTIONS, POSTS), score(PREDICTIONS, POSTS, ["dog"])
    assert list(plain) == ["posts", "all", "present", "absent"]
    assert list(full) == [*plain, "seen", "unseen", "absent_unseen"]
    for entry in list(full.values())[1:]:
        assert list(entry)[:2] == ["posts", "keyphrases"] and set(MEASURES) < set(entry)
    assert full["posts"] == 3 and json.loads(json.dumps(full)) == full


def test_tokens_and_reasoned_where_the_predictions_tell():
    scores = score(PREDICTIONS, POSTS)
    assert scores["all"]["tokens"] == 7 and scores["all"]["reasoned"] == pytest.approx(1 / 3)
    assert scores["present"]["tokens"] == 8 and scores["present"]["reasoned"] == 1 / 2
    bare = score([{"keyphrases": []}] * 3, POSTS)["all"]
    assert "tokens" not in bare and "reasoned" not in bare
    # Only those that tell count.
    partly = score([PREDICTIONS[0], {"keyphrases": []}, PREDICTIONS[2]], POSTS)
    assert partly["all"]["tokens"] == 8.5 and partly["all"]["reasoned"] == 1 / 2


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError):
        score(PREDICTIONS[:2], POSTS)


def test_chinese():
    for train, expected in ((["ＡＢ", "北京天气"], 1), (["北京 天气"], 1), (["天气北京"], 0)):
        scores = one(["北京天气", "下雨"], ["北京天气"], text="今天北京天气不好", train=train)
        assert scores["present"]["F1@1"] == 1 and scores["seen"]["posts"] == expected


# ---------------------------------------------------------------------- an oracle written otherwise


def is_cjk(character):
    name = unicodedata.name(character, "")
    kinds = "CJK UNIFIED", "CJK COMPATIBILITY IDEO", "HIRAGANA", "KATAKANA"
    return character in "々〇" or any(kind in name for kind in kinds)


def words_of(text):
    """A text's words, stemmed by NLTK where it knows the word."""
    text = "".join(f" {c} " if is_cjk(c) else c for c in unicodedata.normalize("NFC", text))
    return [STEMS.get(word) or stem(word) for word in text.lower().split()]


def belongs(name, words, text, known):
    """Whether a keyphrase is of the class `name`."""
    starts = range(len(text) if words else 0)
    present = any(text[start : start + len(words)] == words for start in starts)
    seen = words != [] and words in known
    found = {"present": present, "absent": not present, "seen": seen, "unseen": not seen}
    return (found | {"all": True, "absent_unseen": not present and not seen})[name]


def oracle(predictions, references, train):
    """{class: {measure: score}}: the definitions, post by post, slowly."""
    known = [words_of(phrase) for phrase in train]
    measures = {name: [] for name in CLASSES}
    for prediction, reference in zip(predictions, references, strict=True):
        text = words_of(reference["text"])
        wanted, made = (
            {tuple(words): words for words in map(words_of, row["keyphrases"])}.values()
            for row in (reference, prediction)
        )
        for name in CLASSES:
            answers = [w for w in wanted if w and belongs(name, w, text, known)]
            guesses = [w for w in made if not {",", ".", "<unk>"} & set(w)]
            guesses = [w for w in guesses if belongs(name, w, text, known)]
            if answers:
                right = [guess in answers for guess in guesses]
                measures[name].append(of_a_post(right, len(answers)))
    return {name: means(rows) for name, rows in measures.items()}


def of_a_post(right, wanted):
    """Every measure but F1 of a post from whether each prediction is right."""
    row = {"keyphrases": wanted}
    for k in (1, 3, 5, "M"):
        top = right if k == "M" else right[:k]
        row[f"P@{k}"] = sum(top) / len(top) if top else 0
        row[f"R@{k}"] = sum(top) / wanted
    for k in (1, 3, 5):
        ranks = [rank for rank, hit in enumerate(right[:k], start=1) if hit]
        row[f"MAP@{k}"] = sum(sum(right[:rank]) / rank for rank in ranks) / wanted
        ideal = range(1, min(k, sum(right)) + 1)
        gain, best = (sum(1 / math.log2(rank + 1) for rank in order) for order in (ranks, ideal))
        row[f"NDCG@{k}"] = gain / best if best else 0
    return row


def means(rows):
    entry = {name: sum(row[name] for row in rows) / max(1, len(rows)) for name in of_a_post([], 1)}
    entry |= {"posts": len(rows), "keyphrases": sum(row["keyphrases"] for row in rows)}
    for k in (1, 3, 5, "M"):
        p, r = entry[f"P@{k}"], entry[f"R@{k}"]
        entry[f"F1@{k}"] = 2 * p * r / (p + r) if p + r else 0
    return entry


def assert_equals_the_oracle(scores, *arguments):
    for name, entry in oracle(*arguments).items():
        assert {key: scores[name][key] for key in entry} == pytest.approx(entry, abs=1e-12), name


VOCABULARY = (
    "dog dogs Dog cat storms storm hour play playing wildflower sky skies , . <unk> new york"
).split()


def random_data(seed, posts=40):
    rng = random.Random(seed)

    def phrase():
        return " ".join(rng.choices(VOCABULARY, k=rng.choice([0, 1, 1, 1, 2, 2, 3])))

    predictions, references = [], []
    for _ in range(posts):
        keyphrases = [phrase() for _ in range(rng.randrange(1, 5))]
        text = " ".join(rng.choices(VOCABULARY, k=rng.randrange(12)))
        references.append({"text": text, "keyphrases": keyphrases})
        guesses = [rng.choice([phrase(), phrase(), rng.choice(keyphrases)]) for _ in range(7)]
        predictions.append({"keyphrases": guesses[: rng.randrange(8)]})
    return predictions, references, [phrase() for _ in range(10)]


@pytest.mark.parametrize("seed", range(10))
def test_score_equals_the_oracle(seed):
    arguments = random_data(seed)
    assert_equals_the_oracle(score(*arguments, normalize_cmkp), *arguments)
    entries = oracle(*arguments).values()
    assert all(entry["posts"] > 3 and 0 < entry["F1@M"] < 1 for entry in entries)


# ------------------------------------------------------------------------------------- significance


def two_systems(posts=300, better=0.0):
    rng = random.Random(1)
    references = [{"text": "", "keyphrases": rng.sample("abcdefgh", 2)} for _ in range(posts)]

    def predict(reference, lead):
        known = reference["keyphrases"][:1] if rng.random() < lead else []
        return {"keyphrases": [*known, *rng.sample("abcdefgh", 2)]}

    systems = [[predict(reference, lead) for reference in references] for lead in (better, 0)]
    return [statistics(system, references) for system in systems]


def test_bootstrap_is_seeded_and_surrounds_the_score():
    part, _ = two_systems(better=0.5)
    samples = resample(part, 300, 400, seed=3)["all"]
    assert np.array_equal(samples, resample(part, 300, 400, seed=3)["all"])
    assert not np.array_equal(samples, resample(part, 300, 400, seed=4)["all"])
    value = evaluate.figures(part["all"].values.mean(axis=0))[MEASURES.index("F1@1")]
    low, high = intervals(samples)["F1@1"]
    # The standard error of P@1, for the width to be right and not only there.
    error = part["all"].values[:, 0].std() / math.sqrt(300)
    hits = intervals(samples)["P@1"]
    assert low < value < high
    assert hits[1] - hits[0] == pytest.approx(2 * 1.96 * error, rel=0.2)


# One chunk, and 5 rounds at a time of the same numbers.
@pytest.mark.parametrize("at_once", [4_000_000, 60])
@pytest.mark.parametrize("name", ["all", "present", "absent"])
def test_bootstrap_recomputes_the_ratio_over_resampled_posts(monkeypatch, at_once, name):
    monkeypatch.setattr(evaluate, "NUMBERS_AT_ONCE", at_once)
    predictions, references, _ = random_data(3, posts=12)
    expected = []
    for draw in np.random.default_rng([5, 0]).integers(12, size=(20, 12)):
        entry = score([predictions[i] for i in draw], [references[i] for i in draw])[name]
        expected.append([entry[measure] for measure in MEASURES])
    assert np.mean(expected) > 0.05
    samples = resample(statistics(predictions, references), 12, 20, seed=5)[name]
    assert samples == pytest.approx(np.array(expected), abs=1e-12)


def test_rounds_of_all_chunks_add_up():
    assert evaluate.chunks(1000, 3_000_000) == [1] * 1000
    chunks = evaluate.chunks(1001, 5372)
    assert sum(chunks) == 1001 and max(chunks) * 5372 <= 4_000_000


def test_randomisation_test_tells_a_difference_from_none():
    first, second = two_systems(better=0.5)
    column = MEASURES.index("F1@1")
    assert compare(first, second, 300, 999, seed=0)["all"][column] == 1 / 1000
    first, second = two_systems(better=0.0)
    assert compare(first, second, 300, 999, seed=0)["all"][column] > 0.05
    assert set(compare(first, first, 300, 99, seed=0)["all"]) == {1.0}


def test_randomisation_test_by_hand():
    def p_values(posts, rounds, letters):
        references = [{"text": "", "keyphrases": ["a"]}] * posts
        good, bad = ([{"keyphrases": [p]} for p in row] for row in ("a" * posts, letters))
        systems = statistics(good, references), statistics(bad, references)
        return compare(*systems, posts, rounds, seed=0)["all"]

    # One post of two differs: swapping it changes the sign of the difference, not its size.
    assert set(p_values(2, 50, "ax")) == {1.0}
    # Ten posts differ, all one way: only 2 of 1024 swaps reach that difference.
    p = p_values(10, 20_000, "x" * 10)[MEASURES.index("F1@1")]
    assert p == pytest.approx(2 / 1024, abs=0.001)
