import gzip
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import evaluate
from evaluate import (
    MEASURES,
    UserError,
    align,
    compare,
    intervals,
    normalize,
    parse_line,
    read_jsonl,
    read_predictions,
    read_references,
    resample,
    score,
    statistics,
    stem,
    table,
    train_keyphrases,
)

HERE = Path(__file__).parent
CMKP = HERE.parent.parent / "shared" / "data" / "cmkp" / "test_src.txt"


def one(keyphrases, references, text="", train=None):
    """The scores of a single post."""
    return score([{"keyphrases": keyphrases}], [{"text": text, "keyphrases": references}], train)


def run_script(*arguments, script=HERE.parent / "evaluate.py", **options):
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **options)


def write_lines(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


POSTS = [
    {
        "id": "p1",
        "text": "blue flowers in the stone wall",
        "keyphrases": ["blue flower", "gardening"],
    },
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
    pairs = [
        line.split(" ")
        for line in (HERE / "porter_nltk.txt").read_text(encoding="utf-8").splitlines()
    ]
    assert len({word for word, _ in pairs}) >= 20_000
    assert [
        (word, stem(word), expected) for word, expected in pairs if stem(word) != expected
    ] == []


@pytest.mark.parametrize(
    "word", ["y" * 5000, "a" * 5000 + "ing", "*" * 5000 + "ed", "s" * 5000, "ingedly" * 700]
)
def test_stemmer_survives_long_words(word):
    assert word.startswith(stem(word)[:-1])


@pytest.mark.parametrize(
    "phrase, words",
    [
        ("Wildflower Hours", ("wildflow", "hour")),
        ("  two\t words \n", ("two", "word")),
        ("", ()),
        ("   ", ()),
        ("北京 Dogs天气", ("北", "京", "dog", "天", "气")),
        ("寿司がスキ々", ("寿", "司", "が", "ス", "キ", "々")),
        ("\U00020000\U0002a700", ("\U00020000", "\U0002a700")),
        ("한국 음식", ("한국", "음식")),  # Hangul is written with spaces
        ("أخبار عاجلة", ("أخبار", "عاجلة")),
        ("😀 cats🐈", ("😀", "cats🐈")),
        ("全角\u3000空白", ("全", "角", "空", "白")),
        ("<unk> , .", ("<unk>", ",", ".")),
    ],
)
def test_normalize(phrase, words):
    assert normalize(phrase) == words


@pytest.mark.parametrize(
    "phrase", ["Café Müller", "naïve cafés", "がぎぐ", "한국어", "Ångström ñandú", "İzmir", "Ệ"]
)
def test_composed_and_decomposed_letters_match(phrase):
    composed, decomposed = (
        unicodedata.normalize("NFC", phrase),
        unicodedata.normalize("NFD", phrase),
    )
    assert composed != decomposed and normalize(composed) == normalize(decomposed)
    assert one([decomposed], [composed], text=f"oh {decomposed} !")["present"]["F1@M"] == 1


# -------------------------------------------------------------------------- the arithmetic, by hand


def test_precision_and_recall_at_k():
    scores = one(["x", "a", "y", "b", "z", "c", "w"], ["a", "b", "c", "d"])["all"]
    expected = {
        "P@1": 0,
        "P@3": 1 / 3,
        "P@5": 2 / 5,
        "P@M": 3 / 7,
        "R@1": 0,
        "R@3": 1 / 4,
        "R@5": 2 / 4,
        "R@M": 3 / 4,
        "F1@1": 0,
        "F1@3": 2 / 7,
        "F1@5": 4 / 9,
        "F1@M": 6 / 11,
        "MAP@1": 0,
        "MAP@3": (1 / 2) / 4,
        "MAP@5": (1 / 2 + 2 / 4) / 4,
        "NDCG@1": 0,
        "NDCG@3": (1 / math.log2(3)) / (1 + 1 / math.log2(3) + 1 / 2),
        "NDCG@5": (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 1 / 2),
    }
    assert list(expected) == MEASURES
    assert {name: scores[name] for name in MEASURES} == pytest.approx(expected)


def test_fewer_predictions_than_k_divide_by_their_number():
    scores = one(["a", "x"], ["a", "b", "c"])["all"]
    assert (scores["P@1"], scores["P@3"], scores["P@5"], scores["P@M"]) == (1, 1 / 2, 1 / 2, 1 / 2)


def test_no_prediction_scores_zero():
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


def test_case_and_plurals_match():
    assert one(["DOGS of Twitter"], ["dog of twitter"])["all"]["F1@M"] == 1


def test_duplicate_predictions_are_dropped_and_the_first_kept():
    scores = one(["x", "dog", "Dogs", "dogs", "cat"], ["dog", "cat"])["all"]
    assert (scores["P@3"], scores["P@M"]) == (2 / 3, 2 / 3)
    assert scores["MAP@5"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_duplicate_references_are_dropped():
    scores = one(["dog"], ["dog", "Dogs", "cat"])["all"]
    assert scores["R@M"] == 1 / 2 and scores["keyphrases"] == 2


@pytest.mark.parametrize("phrase", [",", ".", "<unk>", "<UNK>", "a , b", "storm .", "new <unk>"])
def test_phrases_with_invalid_words_are_dropped(phrase):
    assert one([phrase, "dog"], ["dog"])["all"]["P@1"] == 1


@pytest.mark.parametrize("phrase", ["a, b", "storm.", "!", "<number>", "unk"])
def test_other_punctuation_is_kept(phrase):
    assert one([phrase, "dog"], ["dog"])["all"]["P@1"] == 0


def test_an_empty_phrase_is_a_wrong_prediction_and_absent():
    scores = one(["", "dog", " "], ["dog", "cat"], text="dog  days", train=["", "x"])
    assert (scores["all"]["P@1"], scores["all"]["P@M"]) == (0, 1 / 2)
    assert scores["present"]["P@1"] == 1  # the empty phrase is not among the present ones
    assert (scores["absent"]["P@1"], scores["absent"]["P@M"]) == (0, 0)
    assert scores["unseen"]["P@M"] == 1 / 2  # it is unseen, whatever the training file holds


def test_an_empty_reference_is_none():
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
    for phrase, present in [
        ("blue flower", 1),
        ("flowers blue", 0),
        ("blue stone", 0),
        ("wall", 1),
        ("the", 1),
        ("low", 0),
        ("stone walls forever", 0),
        ("stoning wall", 1),
    ]:
        scores = one([phrase], [phrase], text)
        assert (scores["present"]["posts"], scores["absent"]["posts"]) == (present, 1 - present), (
            phrase
        )


def test_classes_filter_references_and_predictions():
    scores = one(
        ["x", "dog", "cat", "wind"], ["dog", "cat"], text="the dog in the wind", train=["Cats", "x"]
    )
    present, absent = scores["present"], scores["absent"]
    assert (present["P@1"], present["P@M"], present["R@1"], present["keyphrases"]) == (
        1,
        1 / 2,
        1,
        1,
    )
    assert (absent["P@1"], absent["P@3"], absent["R@3"], absent["keyphrases"]) == (0, 1 / 2, 1, 1)
    seen, unseen = scores["seen"], scores["unseen"]
    assert (seen["P@M"], seen["R@M"]) == (1 / 2, 1)  # x, cat
    assert (unseen["P@1"], unseen["P@M"], unseen["R@M"]) == (1, 1 / 2, 1)  # dog, wind
    assert scores["absent_unseen"]["posts"] == 0 and scores["absent_unseen"]["F1@M"] == 0


def test_absent_and_unseen():
    scores = one(["x", "y", "dog"], ["dog", "y", "z"], text="dog", train=["x"])["absent_unseen"]
    assert (scores["P@1"], scores["P@M"], scores["R@M"], scores["keyphrases"]) == (1, 1, 1 / 2, 2)


def test_a_class_is_scored_over_the_posts_that_have_it():
    scores = score(
        [{"keyphrases": ["dog"]}, {"keyphrases": ["dog"]}],
        [{"text": "a dog", "keyphrases": ["dog"]}, {"text": "a dog", "keyphrases": ["cat"]}],
    )
    assert (scores["present"]["posts"], scores["present"]["P@1"]) == (1, 1)
    assert (scores["absent"]["posts"], scores["absent"]["P@1"]) == (1, 0)


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
    bare = score([{"keyphrases": prediction["keyphrases"]} for prediction in PREDICTIONS], POSTS)
    assert "tokens" not in bare["all"] and "reasoned" not in bare["all"]
    partly = score(
        [PREDICTIONS[0], {"keyphrases": []}, PREDICTIONS[2]], POSTS
    )  # only those that tell count
    assert partly["all"]["tokens"] == 8.5 and partly["all"]["reasoned"] == 1 / 2


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError):
        score(PREDICTIONS[:2], POSTS)


@pytest.mark.parametrize(
    "train, expected", [(["ＡＢ", "北京天气"], 1), (["北京 天气"], 1), (["天气北京"], 0)]
)
def test_chinese(train, expected):
    scores = one(["北京天气", "下雨"], ["北京天气"], text="今天北京天气不好", train=train)
    assert scores["present"]["F1@1"] == 1 and scores["seen"]["posts"] == expected


# ---------------------------------------------------------------------- an oracle written otherwise


def oracle(predictions, references, train):
    """The definitions, post by post, in exact fractions where they are fractions."""

    def forms(phrases):
        result = []
        for phrase in phrases:
            form = tuple(stem(word) for word in phrase.lower().split())
            if form not in result:
                result.append(form)
        return result

    known = forms(train)

    def belongs(name, form, words):
        present = any(form and words[i : i + len(form)] == list(form) for i in range(len(words)))
        seen = form != () and form in known
        return {
            "all": True,
            "present": present,
            "absent": not present,
            "seen": seen,
            "unseen": not seen,
            "absent_unseen": not present and not seen,
        }[name]

    result = {}
    for name in ("all", "present", "absent", "seen", "unseen", "absent_unseen"):
        rows = []
        for prediction, reference in zip(predictions, references, strict=True):
            words = [stem(word) for word in reference["text"].lower().split()]
            answers = [
                form
                for form in forms(reference["keyphrases"])
                if form and belongs(name, form, words)
            ]
            guesses = [
                form
                for form in forms(prediction["keyphrases"])
                if not {",", ".", "<unk>"} & set(form) and belongs(name, form, words)
            ]
            if not answers:
                continue
            right = [guess in answers for guess in guesses]
            row = {"answers": len(answers)}
            for k in (1, 3, 5, "M"):
                top = right if k == "M" else right[:k]
                row[f"P@{k}"] = Fraction(sum(top), len(top)) if top else Fraction(0)
                row[f"R@{k}"] = Fraction(sum(top), len(answers))
            for k in (1, 3, 5):
                row[f"MAP@{k}"] = sum(
                    (
                        Fraction(sum(right[: i + 1]), i + 1)
                        for i in range(min(k, len(right)))
                        if right[i]
                    ),
                    Fraction(0),
                ) / len(answers)
                gain = sum(1 / math.log2(i + 2) for i, hit in enumerate(right[:k]) if hit)
                ideal = sorted(right, reverse=True)[:k]
                best = sum(1 / math.log2(i + 2) for i, hit in enumerate(ideal) if hit)
                row[f"NDCG@{k}"] = gain / best if best else 0
            rows.append(row)
        entry = {"posts": len(rows), "keyphrases": sum(row["answers"] for row in rows)}
        for measure in MEASURES:
            if not measure.startswith("F1"):
                entry[measure] = float(sum(row[measure] for row in rows) / len(rows)) if rows else 0
        for k in (1, 3, 5, "M"):
            p, r = entry[f"P@{k}"], entry[f"R@{k}"]
            entry[f"F1@{k}"] = 2 * p * r / (p + r) if p + r else 0
        result[name] = entry
    return result


VOCABULARY = (
    "dog dogs Dog cat storms storm hour play playing wildflower sky skies , . <unk> new york"
).split()


def random_data(seed, posts=40):
    rng = random.Random(seed)

    def phrase():
        return " ".join(rng.choices(VOCABULARY, k=rng.choice([0, 1, 1, 1, 2, 2, 3])))

    references = [
        {
            "text": " ".join(rng.choices(VOCABULARY, k=rng.randrange(12))),
            "keyphrases": [phrase() for _ in range(rng.randrange(1, 5))],
        }
        for _ in range(posts)
    ]
    predictions = [
        {
            "keyphrases": [
                rng.choice(reference["keyphrases"]) if rng.random() < 0.3 else phrase()
                for _ in range(rng.randrange(8))
            ]
        }
        for reference in references
    ]
    return predictions, references, [phrase() for _ in range(10)]


@pytest.mark.parametrize("seed", range(25))
def test_score_equals_the_oracle(seed):
    predictions, references, train = random_data(seed)
    scores, expected = score(predictions, references, train), oracle(predictions, references, train)
    for name, entry in expected.items():
        assert {key: scores[name][key] for key in entry} == pytest.approx(entry, abs=1e-12), name


def test_the_classes_of_the_random_data_are_not_empty():
    entries = oracle(*random_data(0))
    assert all(entry["posts"] > 3 and 0 < entry["F1@M"] < 1 for entry in entries.values())


# --------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("seed", range(5))
def test_order_of_posts_is_irrelevant(seed):
    predictions, references, train = random_data(seed)
    order = random.Random(seed).sample(range(len(references)), len(references))
    one_way, other_way = (
        score(p, r, train)
        for p, r in (
            (predictions, references),
            ([predictions[i] for i in order], [references[i] for i in order]),
        )
    )
    for name in list(one_way)[1:]:
        assert one_way[name] == pytest.approx(other_way[name], abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_between_0_and_1_and_perfect_predictions_score_1_at_M(seed):
    predictions, references, train = random_data(seed)
    for entry in list(score(predictions, references, train).values())[1:]:
        assert all(0 <= entry[measure] <= 1 for measure in MEASURES)
    clean = [
        {
            **post,
            "keyphrases": [
                phrase
                for phrase in post["keyphrases"]
                if phrase.strip() and not {",", ".", "<unk>"} & set(phrase.split())
            ]
            or ["zebra"],
        }
        for post in references
    ]
    for entry in list(score(clean, clean, train).values())[1:]:
        assert entry["posts"] and {entry[f"{name}@M"] for name in ("P", "R", "F1")} == {1}


@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_phrase_appended_never_raises_precision(seed):
    predictions, references, train = random_data(seed)
    worse = [
        {"keyphrases": [*prediction["keyphrases"], "utter nonsense"]} for prediction in predictions
    ]
    before, after = score(predictions, references, train), score(worse, references, train)
    assert after["all"]["P@M"] < before["all"]["P@M"]
    for name in list(before)[1:]:
        assert (
            after[name]["P@M"] <= before[name]["P@M"] and after[name]["R@M"] == before[name]["R@M"]
        )


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


@pytest.mark.parametrize(
    "at_once", [4_000_000, 60]
)  # one chunk, and 5 rounds at a time of the same numbers
@pytest.mark.parametrize("name", ["all", "present", "absent"])
def test_bootstrap_recomputes_the_ratio_over_resampled_posts(monkeypatch, at_once, name):
    monkeypatch.setattr(evaluate, "NUMBERS_AT_ONCE", at_once)
    predictions, references, _ = random_data(7, posts=12)
    expected = []
    for draw in np.random.default_rng([5, 0]).integers(12, size=(20, 12)):
        entry = score([predictions[i] for i in draw], [references[i] for i in draw])[name]
        expected.append([entry[measure] for measure in MEASURES])
    assert np.mean(expected) > 0.05
    samples = resample(statistics(predictions, references), 12, 20, seed=5)[name]
    assert samples == pytest.approx(np.array(expected), abs=1e-12)


def test_rounds_of_all_chunks_add_up():
    assert evaluate.chunks(1000, 3_000_000) == [1] * 1000
    assert (
        sum(evaluate.chunks(1001, 5372)) == 1001
        and max(evaluate.chunks(1001, 5372)) * 5372 <= 4_000_000
    )


def test_randomisation_test_tells_a_difference_from_none():
    first, second = two_systems(better=0.5)
    column = MEASURES.index("F1@1")
    assert compare(first, second, 300, 999, seed=0)["all"][column] == 1 / 1000
    first, second = two_systems(better=0.0)
    assert compare(first, second, 300, 999, seed=0)["all"][column] > 0.05
    assert set(compare(first, first, 300, 99, seed=0)["all"]) == {1.0}


def test_randomisation_test_by_hand():
    # One post of two differs: swapping it changes the sign of the difference, not its size.
    references = [{"text": "", "keyphrases": ["a"]}] * 2
    good, bad = ([{"keyphrases": ["a"]}, {"keyphrases": [second]}] for second in "ax")
    p = compare(statistics(good, references), statistics(bad, references), 2, 50, seed=0)["all"]
    assert set(p) == {1.0}
    # Ten posts differ, all one way: only 2 of 1024 swaps reach that difference.
    references = [{"text": "", "keyphrases": ["a"]}] * 10
    good, bad = ([{"keyphrases": [phrase]}] * 10 for phrase in "ax")
    p = compare(statistics(good, references), statistics(bad, references), 10, 20_000, seed=0)[
        "all"
    ]
    assert p[MEASURES.index("F1@1")] == pytest.approx(2 / 1024, abs=0.001)


# -------------------------------------------------------------------------------------------- files


def test_jsonl_yields_lines_offsets_and_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\r\n  \n{"b": 1}\n{"c": "\xe2\x80\xa8"}')
    rows = list(read_jsonl(path))
    assert [(number, record) for number, _, record in rows] == [
        (1, {"a": "é"}),
        (4, {"b": 1}),
        (5, {"c": "\u2028"}),
    ]
    raw = path.read_bytes()
    for number, offset, record in rows:
        assert parse_line(path, number, raw[offset:].split(b"\n")[0] + b"\n") == record


@pytest.mark.parametrize(
    "content, part",
    [
        (b'{"a": 1}\n{"a": \n', "line 2"),
        (b"[1, 2]\n", "line 1: a JSON object"),
        (b'"text"\n', "line 1"),
        (b"7\n", "7"),
        (b'{"a": "\xff"}\n', "line 1: not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (gzip.compress(b'{"a": 1}\n'), "gzip"),
        (b"[" * 100_000 + b"]" * 100_000, "deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "line 1"),
        (b"\x00\n", "line 1"),
        (b'{"a": 1} {"b": 2}\n', "line 1"),
    ],
)
def test_jsonl_names_the_line_that_is_wrong(tmp_path, content, part):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_jsonl(path))
    assert (
        str(path) in str(error.value) and part in str(error.value) and len(str(error.value)) < 400
    )


def test_jsonl_of_no_file_and_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        list(read_jsonl(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match="a folder"):
        list(read_jsonl(tmp_path))


def test_jsonl_streams(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"a": 1}, "not json"])
    rows = read_jsonl(path)
    assert next(rows)[2] == {"a": 1}
    with pytest.raises(UserError):
        next(rows)


def test_cmkp_text(tmp_path):
    path = write_lines(
        tmp_path / "src.txt", ["a b ; c<sep>x;y z <sep>http://host/D0wn_-9.jpg", " t<sep>k "]
    )
    first, second = read_references(path)
    assert (first["text"], first["id"], first["keyphrases"]) == ("a b ; c", "D0wn_-9", ["x", "y z"])
    assert (second["text"], second["id"], second["keyphrases"]) == ("t", None, ["k"])
    assert list(train_keyphrases(path)) == ["x", "y z", "k"]


def test_cmkp_predictions(tmp_path):
    path = tmp_path / "preds.txt"
    path.write_bytes(b"a;b c\r\n\r\n;;x;\r\n\xe2\x80\xa8y")
    assert [prediction["keyphrases"] for prediction in read_predictions(path)] == [
        ["a", "b c"],
        [],
        ["", "", "x", ""],
        ["\u2028y"],
    ]


@pytest.mark.parametrize("name", ["preds", "preds.txt", "preds.jsonl"])
def test_jsonl_is_recognised_by_its_content(tmp_path, name):
    path = write_lines(tmp_path / name, ["", *PREDICTIONS])
    assert read_predictions(path) == PREDICTIONS


def test_failed_posts_are_empty_predictions(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        [
            {"id": "p1", "error": "image unreadable"},
            {"id": "p2", "keyphrases": ["a"], "error": None},
        ],
    )
    assert [prediction["keyphrases"] for prediction in read_predictions(path)] == [[], ["a"]]


@pytest.mark.parametrize(
    "record",
    [
        {"keyphrases": []},
        {"id": 7, "keyphrases": []},
        {"id": "a"},
        {"id": "a", "keyphrases": "x;y"},
        {"id": "a", "keyphrases": [1]},
        {"id": "a", "keyphrases": None},
        {"id": "a", "keyphrases": [], "think": 7},
        {"id": "a", "keyphrases": [], "tokens": "7"},
        {"id": "a", "keyphrases": [], "tokens": float("nan")},
        {"id": "a", "keyphrases": [], "tokens": -1},
        {"id": "a", "keyphrases": [], "tokens": True},
        {"id": "a", "keyphrases": [], "tokens": 10**400},
    ],
)
def test_bad_predictions_are_named(tmp_path, record):
    path = write_lines(tmp_path / "p.jsonl", [PREDICTIONS[0], record])
    with pytest.raises(UserError, match="p.jsonl line 2: "):
        read_predictions(path)


@pytest.mark.parametrize(
    "record",
    [
        {"id": "a", "keyphrases": []},
        {"id": "a", "text": None, "keyphrases": []},
        {"text": "", "keyphrases": []},
        {"id": "a", "text": "x", "keyphrases": [None]},
    ],
)
def test_bad_references_are_named(tmp_path, record):
    path = write_lines(tmp_path / "r.jsonl", [POSTS[0], record])
    with pytest.raises(UserError, match="r.jsonl line 2: "):
        read_references(path)


def test_align_by_id_and_by_line():
    assert align(PREDICTIONS[::-1], POSTS) == PREDICTIONS
    text = [{"id": None, "keyphrases": [name]} for name in "abc"]
    assert align(text, POSTS) == text
    cmkp = [{**post, "address": f"http://host/{post['id']}.jpg"} for post in POSTS]
    assert (
        align(PREDICTIONS[::-1], cmkp) == PREDICTIONS
    )  # the names of the images are these predictions' ids
    others = [{**prediction, "id": f"line {i}"} for i, prediction in enumerate(PREDICTIONS)]
    assert align(others, cmkp) == others


# --------------------------------------------------------------------------------- the command line


@pytest.fixture
def files(tmp_path):
    """The same posts and predictions as JSONL and as CMKP's text."""
    guesses = [";".join(prediction["keyphrases"]) for prediction in PREDICTIONS]
    posts = [
        f"{post['text']}<sep>{';'.join(post['keyphrases'])}<sep>http://host/{post['id']}.jpg"
        for post in POSTS
    ]
    contents = {
        "preds.jsonl": PREDICTIONS[::-1],
        "preds.txt": guesses,
        "test.jsonl": POSTS,
        "test.txt": posts,
    }
    return {name: write_lines(tmp_path / name, rows) for name, rows in contents.items()}


@pytest.mark.parametrize("predictions", ["preds.jsonl", "preds.txt"])
@pytest.mark.parametrize("references", ["test.jsonl", "test.txt"])
@pytest.mark.parametrize("train", ["test.jsonl", "test.txt"])
def test_all_combinations_of_formats_give_the_same(files, predictions, references, train):
    done = run_script(files[predictions], files[references], "--train", files[train], "--json")
    assert (done.returncode, done.stderr) == (0, "")
    scores = json.loads(done.stdout)
    expected = score(
        PREDICTIONS, POSTS, [phrase for post in POSTS for phrase in post["keyphrases"]]
    )
    if predictions == "preds.txt":
        for entry in list(expected.values())[1:]:
            entry.pop("tokens", None), entry.pop("reasoned", None)
    assert scores == expected


def test_table_shows_percent(files):
    done = run_script(files["preds.jsonl"], files["test.jsonl"], "--train", files["test.txt"])
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0].split() == ["all", "present", "absent", "seen", "unseen", "absent+unseen"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert cells["posts"] == ["3", "2", "2", "3", "0", "0"]
    assert cells["keyphrases"] == ["5", "2", "3", "5", "0", "0"]
    assert cells["P@1"] == ["33.33", "100.00", "0.00", "66.67", "-", "-"]
    assert cells["tokens"][:3] == ["7.0", "8.0", "8.5"] and cells["reasoned"][0] == "33.33"
    assert len({len(line) for line in lines}) == 1 and set(MEASURES) <= set(cells)
    assert (
        done.stdout == table(score(PREDICTIONS, POSTS, train_keyphrases(files["test.txt"]))) + "\n"
    )


def test_bootstrap_option(files):
    arguments = [files["preds.txt"], files["test.txt"], "--json", "--bootstrap", 50]
    first, again, other = (run_script(*arguments, "--seed", seed) for seed in (1, 1, 2))
    assert first.stdout == again.stdout != other.stdout
    scores = json.loads(first.stdout)
    for name in ("all", "present", "absent"):
        assert set(scores[name]["interval"]) == set(MEASURES)
        assert all(low <= high for low, high in scores[name]["interval"].values())
    arguments = [*arguments[:2], *arguments[3:], "--seed", 1, "--train", files["test.txt"]]
    lines = run_script(*arguments).stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("95% CI  "))
    row = next(line.split() for line in lines[start:] if line.startswith("F1@1 "))
    low, high = scores["all"]["interval"]["F1@1"]
    assert row[:2] == ["F1@1", f"{100 * low:.1f}-{100 * high:.1f}"]
    assert max(map(len, lines)) <= 80


def test_against_flips_its_sign(files, tmp_path):
    other = write_lines(tmp_path / "other.txt", ["gardening", "dog", "weather;storm hour"])
    there, back = (
        json.loads(run_script(ours, files["test.jsonl"], "--against", theirs, "--json").stdout)
        for ours, theirs in ((files["preds.jsonl"], other), (other, files["preds.jsonl"]))
    )
    for name in ("all", "present", "absent"):
        assert set(there["against"][name]) == set(MEASURES)
        for measure, pair in there["against"][name].items():
            mirrored = back["against"][name][measure]
            assert (
                pair["score"] == back[name][measure] and mirrored["score"] == there[name][measure]
            )
            assert (
                pair["difference"]
                == -mirrored["difference"]
                == there[name][measure] - back[name][measure]
            )
            assert pair["interval"] == pytest.approx([-end for end in mirrored["interval"][::-1]])
            assert pair["p"] == mirrored["p"] and 0 < pair["p"] <= 1
    assert there["against"]["all"]["F1@1"]["difference"] < 0 and "interval" in there["all"]
    shown = run_script(files["preds.jsonl"], files["test.jsonl"], "--against", other).stdout
    head, *rows = (line.split() for line in shown.splitlines())
    assert head == "measure ours other difference 95% interval p".split()
    assert [row[:2] for row in rows] == [
        [name, measure] for name in ("all", "present", "absent") for measure in ("F1@1", "F1@M")
    ]
    for name, measure, ours, theirs, difference, low, _, high, p in rows:
        pair = there["against"][name][measure]
        figures = there[name][measure], pair["score"], *pair["interval"]
        assert [ours, theirs, low, high] == [f"{100 * figure:.2f}" for figure in figures]
        assert difference == f"{100 * pair['difference']:+.2f}" and p == f"{pair['p']:.4f}"
    whole = run_script(files["preds.jsonl"], files["test.jsonl"], "--against", other, "--all")
    blocks = whole.stdout.split("\n\n")
    assert len(blocks) == 3 and blocks[0].split("\n")[0].split() == head
    assert "NDCG@5" in blocks[0] and [block.split()[0] for block in blocks[1:]] == ["all", "95%"]


def assert_error(done, *parts):
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


def test_missing_duplicate_and_unknown_ids(files, tmp_path):
    def score_of(*predictions):
        return run_script(write_lines(tmp_path / "p.jsonl", predictions), files["test.jsonl"])

    first, second, third = PREDICTIONS
    assert_error(score_of(first, third), "p.jsonl", "'p2'", "1 of 3", "--allow-missing")
    assert_error(
        score_of(*PREDICTIONS, {"id": "p9", "keyphrases": []}), "p.jsonl", "'p9'", "test.jsonl"
    )
    assert_error(score_of(first, second, third, second), "p.jsonl", "'p2' on lines 2 and 4")
    doubled = write_lines(tmp_path / "r.jsonl", [*POSTS, POSTS[0]])
    assert_error(run_script(files["preds.jsonl"], doubled), "r.jsonl", "'p1' on lines 1 and 4")
    many = [{"id": f"n{i}", "keyphrases": []} for i in range(9)]
    assert_error(score_of(*many), "'n0', 'n1', 'n2' and 6 more")


def test_unequal_line_counts(files, tmp_path):
    short, long = (write_lines(tmp_path / f"{n}.txt", ["a"] * n) for n in (2, 5))
    assert_error(run_script(short, files["test.txt"]), "2.txt", "1 of 3 posts", "line 3")
    done = run_script(long, files["test.jsonl"])
    assert_error(done, "5.txt", "2 of 5 lines not in", "(3 posts)", "line 4")
    assert_error(run_script(long, files["test.jsonl"], "--allow-missing"), "line 4")


def test_allow_missing_scores_empty_predictions(files, tmp_path):
    partial = write_lines(tmp_path / "p.jsonl", PREDICTIONS[1:])
    scores = json.loads(
        run_script(partial, files["test.jsonl"], "--allow-missing", "--json").stdout
    )
    expected = score([{"keyphrases": []}, *PREDICTIONS[1:]], POSTS)
    assert scores == expected and scores["all"]["posts"] == 3
    short = write_lines(tmp_path / "p.txt", ["blue flower"])
    scores = json.loads(run_script(short, files["test.txt"], "--allow-missing", "--json").stdout)
    assert scores["all"]["P@1"] == pytest.approx(1 / 3)
    unknown = write_lines(tmp_path / "u.jsonl", [{"id": "p9", "keyphrases": []}])
    assert_error(run_script(unknown, files["test.jsonl"], "--allow-missing"), "'p9'")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"no separator\n",
        b"a<sep>b<sep>c<sep>d\n",
        b"\xff\xfe\n",
        b'{"id": 1}\n',
        b"{\n",
        b'{"id"\n',
        b"\x1f\x8b\x08\x00",
        b'[{"id": "a"}]\n',
        b"{}\n",
        b'{"id": "\\ud800", "text": "", "keyphrases": ["\\ud800"]}\n',
        b'{"id": "a", "text": "", "keyphrases": ["x"]}\n' * 2,
        b"\xef\xbb\xbf",
        b'{"a":' * 9999,
    ],
)
def test_no_traceback_on_any_bad_file(files, tmp_path, content):
    path = tmp_path / "bad"
    path.write_bytes(content)
    for arguments in (
        (files["preds.txt"], path),
        (files["preds.txt"], files["test.txt"], "--train", path),
        (path, files["test.txt"]),
        (files["preds.txt"], files["test.txt"], "--against", path),
    ):
        done = run_script(*arguments)
        assert "Traceback" not in done.stderr
        if done.returncode:
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert (
        run_script(files["preds.txt"], path).returncode == 1
    )  # none of these is a file of three posts


def test_swapped_arguments_are_explained(files):
    assert_error(run_script(files["test.txt"], files["preds.txt"]), "preds.txt line 1", "<sep>")
    assert_error(
        run_script(files["test.txt"], files["test.txt"]), "line 1", "predictions come first"
    )
    swapped = run_script(files["test.jsonl"], files["preds.jsonl"])
    assert_error(swapped, "preds.jsonl line 1: a prediction, not a post; predictions come first")


def test_missing_files_and_folders(files, tmp_path):
    assert_error(run_script(tmp_path / "none.txt", files["test.txt"]), "none.txt: no such file")
    assert_error(run_script(tmp_path, files["test.txt"]), "a folder")


@pytest.mark.parametrize(
    "arguments", ["--bootstrap -1", "--bootstrap x", "--seed 1.5", "--nothing", "--all"]
)
def test_bad_options(files, arguments):
    done = run_script(files["preds.txt"], files["test.txt"], *arguments.split())
    assert done.returncode == 2 and done.stderr.startswith("evaluate.py: error: ")
    assert done.stderr.endswith("; see evaluate.py --help\n") and done.stderr.count("\n") == 1


def test_help_shows_defaults_without_numpy():
    command = [sys.executable, "-X", "importtime", evaluate.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "default: 0" in done.stdout and "numpy" not in done.stderr


def test_works_when_copied_alone(files, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    copy = shutil.copy(evaluate.__file__, folder)
    arguments = [files["preds.jsonl"], files["test.txt"], "--against", files["preds.txt"]]
    done = run_script(*arguments, script=copy, cwd=folder)
    assert done.returncode == 0 and "F1@M" in done.stdout and done.stderr == ""


def test_other_scripts_and_emoji_from_files(tmp_path):
    posts = [
        {
            "id": "1",
            "text": "天气 😀 أخبار Cafe\u0301s",
            "keyphrases": ["天气", "😀", "أخبار", "café"],
        }
    ]
    references = tmp_path / "r.jsonl"
    references.write_text(json.dumps(posts[0], ensure_ascii=False) + "\n", encoding="utf-8")
    predictions = write_lines(tmp_path / "p.txt", ["天 气;😀;أخبار;CAFÉS"])
    scores = json.loads(run_script(predictions, references, "--json").stdout)
    assert scores["present"]["F1@M"] == 1 and scores["present"]["keyphrases"] == 4


# ---------------------------------------------------------------------------------------- run(main)


@pytest.mark.parametrize(
    "body, code, stderr",
    [
        ("pass", 0, ""),
        ("return 3", 3, ""),
        ("raise evaluate.UserError('a.txt:\\nbad')", 1, "error: a.txt: bad\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise BrokenPipeError", 1, ""),
    ],
)
def test_run(tmp_path, body, code, stderr):
    lines = ["import evaluate", "def main():", f"    {body}", "evaluate.run(main)"]
    script = write_lines(tmp_path / "s.py", lines)
    done = run_script(script=script, env={"PYTHONPATH": str(HERE.parent)})
    assert (done.returncode, done.stderr) == (code, stderr)


def test_closed_pipe_is_quiet(tmp_path):
    script = write_lines(
        tmp_path / "s.py",
        ["import evaluate, sys", "sys.stdin.read()", "evaluate.run(lambda: print('x' * 100_000))"],
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(HERE.parent)},
    )
    process.stdout.close()
    process.stdin.close()
    assert process.wait() == 1 and process.stderr.read() == b""


def test_interrupt_is_quiet(tmp_path):
    script = write_lines(
        tmp_path / "s.py",
        [
            "import evaluate, time",
            "def main():",
            "    print('ready', flush=True)",
            "    time.sleep(60)",
            "evaluate.run(main)",
        ],
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(HERE.parent)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and process.stderr.read() == b""


# --------------------------------------------------------------------------------------- real posts


@pytest.mark.skipif(not CMKP.exists(), reason="the posts of CMKP are not here")
def test_real_posts_of_cmkp():
    references = read_references(CMKP)
    perfect = score(references, references)
    assert (
        len(references) == perfect["posts"] == 5372
        and len({post["id"] for post in references}) == 5372
    )
    assert {perfect[name]["F1@M"] for name in ("all", "present", "absent")} == {1}
    assert (
        perfect["present"]["keyphrases"] + perfect["absent"]["keyphrases"]
        == perfect["all"]["keyphrases"]
    )


def test_failed_posts_are_told(tmp_path):
    """A post whose image infer.py could not read scores as one without keyphrases, and is named."""
    posts, predictions = tmp_path / "posts.jsonl", tmp_path / "preds.jsonl"
    posts.write_text('{"id": "a", "text": "", "keyphrases": ["x"]}\n')
    predictions.write_text('{"id": "a", "keyphrases": [], "error": "no such file"}\n')
    command = [sys.executable, evaluate.__file__, predictions, posts, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == f"{predictions}: 1 post failed, scored as wrong\n"
    assert json.loads(done.stdout)["all"]["F1@1"] == 0
