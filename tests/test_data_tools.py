import io
import json
import os
import random
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

import data
from evaluate import normalize, read_posts, run
from tools import dataset
from tools.split import SIDE_NAMES

ROOT = Path(__file__).parent.parent
CMKP = ROOT.parent / "shared" / "data" / "cmkp"
with_cmkp = pytest.mark.skipif(not CMKP.exists(), reason="CMKP's posts are not here")


def tool(name, *arguments, code=0, cwd=None):
    """`python -m tools.dataset …`: what it printed. The exit code must be `code`.

    It must not print a traceback. stats and split, called often, run in this process unless a
    folder to run in is given.
    """
    command = [sys.executable, "-m", "tools.dataset", name, *map(str, arguments)]
    if name in ("stats", "split") and cwd is None:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", command[2:])
            with pytest.raises(SystemExit) as left:
                run(dataset.main)
        done = subprocess.CompletedProcess(command, left.value.code, out.getvalue(), err.getvalue())
    else:
        options = {"cwd": cwd or ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def flags(**options):
    """`--name value …`."""
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def as_json(*arguments, **options):
    return json.loads(tool(*arguments, "--json", **options).stdout)


def error(*arguments, **options):
    """The one line that a failing call ends in."""
    return tool(*arguments, code=1, **options).stderr.splitlines()[-1]


def write(path, records):
    lines = [
        record if isinstance(record, str) else json.dumps(record, ensure_ascii=False)
        for record in records
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def post(identity, text="a text", keyphrases=("one",), image=None, **others):
    return {"id": identity, "text": text, "image": image, "keyphrases": list(keyphrases), **others}


# --------------------------------------------------------------------------------------------- cmkp


def test_cmkp_round_trip(tmp_path):
    source = write(
        tmp_path / "src.txt",
        [
            "blue flowers<sep>garden;flower<sep>https://x.y/media/AbC.jpg",
            "again<sep>retweet<sep>https://x.y/media/AbC.jpg",
            "日本 语 \u2028 x<sep>语<sep>https://x.y/media/gone.jpg",
            "no address<sep>a",
            "no address<sep>b",
            "bad<sep>a;;b<sep>q/z.png",
        ],
    )
    for name in ("AbC.jpg", "z.png"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    # The output's folder is a link to a deeper one; image paths must hold for the real folder.
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    out = tmp_path / "link" / "new" / "posts.jsonl"
    done = tool("cmkp", "src.txt", "--images", "pictures", "--out", out, "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {
        "posts": 6,
        "images": 3,
        "images_missing": 3,
        "ids_renamed": 1,
        "unusable": 1,
    }
    assert (
        "gone.jpg" in done.stderr
        and "line 4 has no address" in done.stderr
        and "line 6 (id 'z')" in done.stderr
    )
    records = read(out)
    assert [record["id"] for record in records[:3]] == ["AbC", "AbC-2", "gone"]
    assert len({record["id"] for record in records}) == 6
    assert [record["image"] and (out.parent / record["image"]).resolve() for record in records] == [
        tmp_path / "pictures" / "AbC.jpg",
        tmp_path / "pictures" / "AbC.jpg",
        None,
        None,
        None,
        tmp_path / "pictures" / "z.png",
    ]
    assert not os.path.isabs(records[0]["image"])
    before, after = (
        [(p["text"], p["keyphrases"]) for _, p in read_posts(path)] for path in (source, out)
    )
    assert before == after
    data.Posts(out)  # opens for prediction
    tool("cmkp", source, "--out", tmp_path / "bare.jsonl")
    assert [record["image"] for record in read(tmp_path / "bare.jsonl")] == [None] * 6


def test_new_ids_are_unique_and_leave_others_alone():
    records = [{"id": name} for name in ("x", "x-2", "x", "y", "x", "x-2")]
    assert dataset.make_ids_unique(records) == 3
    assert [record["id"] for record in records] == ["x", "x-2", "x-3", "y", "x-4", "x-2-2"]


def test_cmkp_says_what_is_wrong(tmp_path):
    source = write(tmp_path / "src.txt", ["a<sep>b<sep>c.jpg", "no separator"])
    assert "src.txt line 2" in error("cmkp", source, "--out", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert "no such file" in error(
        "cmkp", tmp_path / "nothing.txt", "--out", tmp_path / "out.jsonl"
    )
    good = write(tmp_path / "good.txt", ["a<sep>b<sep>c.jpg"])
    assert "folder" in error(
        "cmkp", good, "--images", tmp_path / "nowhere", "--out", tmp_path / "out.jsonl"
    )
    assert "can't be written" in error("cmkp", good, "--out", good / "below" / "out.jsonl")
    assert "JSONL already" in error(
        "cmkp", write(tmp_path / "a.jsonl", [post("1")]), "--out", tmp_path / "b.jsonl"
    )


# -------------------------------------------------------------------------------------------- stats


def test_stats_by_hand(tmp_path):
    train = write(
        tmp_path / "train.jsonl",
        [post("1", "the dogs play", ["Dog", "cat"]), post("2", "", ["cat"])],
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "here.png")
    test = write(
        tmp_path / "test.jsonl",
        [
            post(
                "3", "my dog and a cat", ["dog", "CATS", "bird"], "here.png"
            ),  # dog, cats present; cats, bird unseen
            post(
                "4", "a cat play", ["cat", "play dogs"], "gone.png"
            ),  # cat present; play dogs unseen
            post("5", "two words", ["dog", "dogs", " "]),
        ],
    )  # none present, one after stemming
    assert as_json("stats", train, test) == {
        "overlap": 2 / 6,
        "files": [
            {
                "file": str(train),
                "posts": 2,
                "keyphrases": 3,
                "distinct_keyphrases": 2,
                "keyphrases_per_post": 1.5,
                "words_per_post": 1.5,
                "present": 1 / 3,
                "absent": 2 / 3,
                "images": 0,
                "images_missing": 0,
            },
            {
                "file": str(test),
                "posts": 3,
                "keyphrases": 7,
                "distinct_keyphrases": 6,
                "keyphrases_per_post": 7 / 3,
                "words_per_post": 10 / 3,
                "present": 3 / 6,
                "absent": 3 / 6,
                "images": 2,
                "images_missing": 1,
                "overlap": 2 / 6,
                "overlap_occurrences": 3 / 7,
                "posts_with_unseen": 1.0,
            },
        ],
    }
    assert as_json("stats", train, test, train)["overlap"] == 1  # of the last file
    table = tool("stats", train, test).stdout
    assert "33.33%" in table and "words per post" in table
    tool("stats", train)
    assert "test.jsonl line 4 (id '9')" in error(
        "stats", train, write(test, [*read(test), {"id": "9", "text": None, "keyphrases": []}])
    )
    assert "no posts" in error("stats", train, write(tmp_path / "empty.jsonl", []))


@with_cmkp
def test_stats_of_cmkp():
    valid, test = CMKP / "valid_src.txt", CMKP / "test_src.txt"
    result = as_json("stats", valid, test)
    assert f"{result['overlap']:.4f}" == "0.7001"
    assert [figures["posts"] for figures in result["files"]] == [5370, 5372]
    assert result["files"][1]["distinct_keyphrases"] == 2534


# -------------------------------------------------------------------------------------------- split


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """3,000 posts in two folders, keyphrases as common as 1 / rank, some in the text; retweets."""
    rng, folder = random.Random(5), tmp_path_factory.mktemp("corpus")
    posts = []
    for number in range(3000):
        words = [f"w{int(500 ** rng.random())}" for _ in range(rng.randint(5, 25))]
        keyphrases = list(
            {f"key {int(2500 ** rng.random())}" for _ in range(rng.choice([1, 1, 1, 2, 2, 3]))}
        )
        if rng.random() < 0.4:
            words += keyphrases[0].split()
        record = post(f"p{number}", " ".join(words), keyphrases, f"img/{number}.jpg", mine=number)
        if number % 3 == 0:
            record["cot"] = f"thought {number}"
        if posts and number % 20 == 0:  # the same text or the same image as another post's
            other = rng.choice(posts)
            field = rng.choice(["text", "image"])
            record[field] = other[field].upper() if field == "text" else other[field]
        if number % 50 == 0:
            record["text"] = ""  # no text is not the same text
        posts.append(record)
    shared = [
        {**record, "image": os.path.relpath(folder / "a" / record["image"], folder / "b")}
        for record in posts
    ]
    return write(folder / "a" / "one.jsonl", posts[:1700]), write(
        folder / "b" / "two.jsonl", shared[1700:]
    )


def written(folder):
    return [read(folder / f"{name}.jsonl") for name in ("train", "valid", "test")]


def phrases(posts):
    return {phrase.lower() for record in posts for phrase in record["keyphrases"]}


def likeness(posts):
    """Words a post, keyphrases a post, share of keyphrases present; not by the tool's own code."""
    found = []
    for record in posts:
        text = list(normalize(record["text"]))
        for phrase in {normalize(phrase) for phrase in record["keyphrases"]}:
            found.append(any(text[i : i + len(phrase)] == list(phrase) for i in range(len(text))))
    return (
        sum(len(record["text"].split()) for record in posts) / len(posts),
        sum(len(record["keyphrases"]) for record in posts) / len(posts),
        sum(found) / len(found),
    )


def assert_as_asked(before, parts, overlap, sizes):
    train, *held_out = parts
    assert sorted(r["text"] for r in before) == sorted(r["text"] for part in parts for r in part)
    assert [len(part) for part in held_out] == list(sizes)
    whole = likeness(before)
    for part in held_out:
        assert abs(len(phrases(part) & phrases(train)) / len(phrases(part)) - overlap) <= 0.005
        assert likeness(part) == pytest.approx(whole, rel=0.1)
    sides = {}
    for number, part in enumerate(parts):
        for record in part:
            for key in (
                record.get("image") and Path(record["image"]).name,
                record.get("address"),
                normalize(record["text"]),
            ):
                assert not key or sides.setdefault(key, number) == number


@pytest.mark.parametrize(
    "overlap, valid, test", [(0.3, 200, 300), (0.4492, 300, 300), (0.8, 100, 400)]
)
def test_split_is_as_asked(corpus, tmp_path, overlap, valid, test):
    before = [record for path in corpus for record in read(path)]
    options = flags(overlap=overlap, test=test, valid=valid, out=tmp_path / "x")
    result = as_json("split", *corpus, *options)
    parts = written(tmp_path / "x")
    assert_as_asked(before, parts, overlap, (valid, test))
    assert {r["id"]: r for part in parts for r in part}.keys() == {r["id"] for r in before}
    for part in parts:  # nothing but the image's path has changed, and that leads to the same place
        for record in part:
            original = before[record["mine"]]
            assert {**record, "image": None} == {**original, "image": None}
            image = os.path.normpath(tmp_path / "x" / record["image"])
            folder = corpus[record["mine"] >= 1700].parent
            assert image == os.path.normpath(folder / original["image"])
    assert result["overlap"] == result["files"][2]["overlap"]
    assert result == as_json(
        "stats", *(tmp_path / "x" / f"{name}.jsonl" for name in ("train", "valid", "test"))
    )
    assert sorted(os.listdir(tmp_path / "x")) == ["test.jsonl", "train.jsonl", "valid.jsonl"]


def test_split_depends_on_seed_and_posts_but_not_on_their_order(corpus, tmp_path):
    records = [
        {**record, "image": str(path.parent / record["image"])}
        for path in corpus
        for record in read(path)
    ]
    random.Random(1).shuffle(records)
    turned = (
        write(tmp_path / "p" / "two.jsonl", records[1000:]),
        write(tmp_path / "p" / "one.jsonl", records[:1000]),
    )
    as_they_were = [
        write(tmp_path / "q" / "all.jsonl", sorted(records, key=lambda record: record["mine"]))
    ]
    outputs = []
    # Another process has other hashes of strings, and so another order of sets.
    for files, seed, cwd in (
        (as_they_were, 0, None),
        (turned, 0, tmp_path),
        (as_they_were, 1, None),
    ):
        out = tmp_path / str(len(outputs))
        options = flags(overlap=0.5, test=300, valid=200, seed=seed, out=out)
        tool("split", *files, *options, cwd=cwd)
        outputs.append([(out / f"{name}.jsonl").read_bytes() for name in SIDE_NAMES])
    assert outputs[0] == outputs[1] != outputs[2]


def test_unseen_keyphrases_are_not_only_the_rarest(corpus, tmp_path):
    tool("split", *corpus, *flags(overlap=0.5, test=300, valid=300, out=tmp_path))
    train, valid, test = written(tmp_path)
    times = [phrase for record in train + valid + test for phrase in record["keyphrases"]]
    assert max(times.count(phrase) for phrase in phrases(test) - phrases(train)) >= 4


def test_split_into_train_and_test_only(corpus, tmp_path):
    tool("split", *corpus, *flags(overlap=0.6, test=300, valid=0, out=tmp_path))
    train, valid, test = written(tmp_path)
    assert (len(train), len(valid), len(test)) == (2700, 0, 300)
    assert abs(len(phrases(test) & phrases(train)) / len(phrases(test)) - 0.6) <= 0.005


def test_split_says_what_it_cannot_do(corpus, tmp_path):
    # Every post has the phrase "all" and another one: half of a post's keyphrases are always seen.
    alike = write(
        tmp_path / "alike.jsonl",
        [post(str(n), f"text {n}", ["all", f"key {n}"]) for n in range(60)],
    )
    message = error("split", alike, *flags(overlap=0, test=9, valid=9, out=tmp_path / "x"))
    assert "no split found with an overlap of 0.00%" in message
    assert "the closest has 10.00% in test and 10.00% in valid" in message
    assert "not as asked: test overlap, valid overlap" in message
    assert not (tmp_path / "x").exists()
    many = flags(test=2000, valid=1000, out=tmp_path)
    for options in (many, [*many, "--overlap", 0.5]):
        assert "nothing to train on" in error("split", *corpus, *options)
    bare = write(tmp_path / "bare.jsonl", [post(str(n), f"text {n}", []) for n in range(20)])
    few = flags(test=3, valid=3, out=tmp_path)
    assert "has a keyphrase" in error("split", bare, *few, "--overlap", 0.5)
    own = write(tmp_path / "train.jsonl", read(corpus[0]))
    options = flags(test=300, valid=0, out=tmp_path)
    assert "choose another --out" in error("split", own, *options)
    assert read(own) == read(corpus[0])
    assert "from 0 to 1" in tool("split", bare, "--overlap", 45, *few, code=2).stderr


def test_split_with_a_larger_likeness(tmp_path):
    # Rare keyphrases have long posts, so that few of test's can be common and its posts as short.
    posts = [post(f"c{n}", f"text {n}", [f"common {n % 20}"]) for n in range(300)]
    posts += [post(f"r{n}", f"text {n} " + "word " * 30, [f"rare {n}"]) for n in range(100)]
    path, options = write(tmp_path / "in.jsonl", posts), flags(overlap=0.2, test=40, valid=0)
    message = error("split", path, *options, "--out", tmp_path / "x")
    assert "words a post" in message and "a larger --likeness" in message
    assert not (tmp_path / "x").exists()
    tool("split", path, *options, "--likeness", 3, "--out", tmp_path / "x")
    train, _, test = written(tmp_path / "x")
    assert abs(len(phrases(test) & phrases(train)) / len(phrases(test)) - 0.2) <= 0.005


def test_split_at_random_keeps_retweets_together(corpus, tmp_path):
    before = [record for path in corpus for record in read(path)]
    sides = []
    for name, files, seed in (
        ("a", corpus, 0),
        ("b", [write(corpus[1].parent / "turned.jsonl", read(corpus[1])[::-1]), corpus[0]], 0),
        ("c", corpus, 1),
    ):
        options = flags(test=300, valid=200, seed=seed, out=tmp_path / name)
        tool("split", *files, *options)
        train, valid, test = written(tmp_path / name)
        assert [len(part) for part in (train, valid, test)] == [2500, 200, 300]
        sides.append({r["mine"]: n for n, part in enumerate((train, valid, test)) for r in part})
        assert sides[-1].keys() == {record["mine"] for record in before}
    assert sides[0] == sides[1] != sides[2]
    together = {}
    for record in before:
        for key in (normalize(record["text"]), record["image"].rpartition("/")[2]):
            if key:
                assert (
                    together.setdefault(key, sides[0][record["mine"]]) == sides[0][record["mine"]]
                )
    assert len(together) < 6000  # some are retweets
    # A random split has the posts' own overlap and means.
    assert likeness(test) == pytest.approx(likeness(before), rel=0.1)
    many = [post(str(n), "the same") for n in range(20)]
    message = error("split", write(tmp_path / "one.jsonl", many), *flags(test=3, valid=0, out="x"))
    assert "--test 3 leaves no test posts" in message and "stay together" in message


def test_split_tells_where_groups_do_not_add_up(tmp_path):
    triples = [
        post(f"{n}-{i}", f"text {n}", [f"key {n % 40}"]) for n in range(200) for i in range(3)
    ]
    options = flags(overlap=0.5, test=100, valid=0, out=tmp_path / "x")
    done = tool("split", write(tmp_path / "in.jsonl", triples), *options)
    assert "99 posts where 100 asked for" in done.stderr
    assert len(read(tmp_path / "x" / "test.jsonl")) == 99


def test_ids_used_in_two_files_become_unique(corpus, tmp_path):
    again = [{**record, "text": record["text"] + " again"} for record in read(corpus[0])]
    twice = write(tmp_path / "again.jsonl", again)
    options = flags(overlap=0.5, test=300, valid=0, out=tmp_path / "x")
    done = tool("split", corpus[0], twice, *options)
    assert "ids used more than once: 1700 of them" in done.stderr
    ids = [record["id"] for part in written(tmp_path / "x") for record in part]
    assert len(set(ids)) == len(ids) == 3400


@with_cmkp
@pytest.mark.parametrize("overlap", [0.45, 0.6, 0.8])
def test_split_of_cmkp(tmp_path, overlap):
    files = CMKP / "test_src.txt", CMKP / "valid_src.txt"
    tool("split", *files, *flags(overlap=overlap, test=1000, valid=1000, out=tmp_path))
    before = [p for path in files for _, p in read_posts(path)]
    assert_as_asked(before, written(tmp_path), overlap, (1000, 1000))


# -------------------------------------------------------------------------------------------- check


def test_check_finds_all_that_is_wrong(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    noise = Image.effect_noise((200, 200), 50).convert("RGB")
    noise.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    good = [post(f"g{n}", image="good.png") for n in range(40)]
    bad = [
        (post("semi", keyphrases=["a;b"]), "semicolon"),
        (post("tag", keyphrases=["</answer>"]), "tag"),
        (post("g1"), "already used on line 2"),
        (post("gone", image="gone.png"), "no such file"),
        (post("cut", image="cut.jpg"), "not a readable image"),
        (post("bare", text=" "), "neither text nor image"),
        ('{"id": "x", ', "not a line of JSON"),
        ("[]", "JSON object"),
        (post("no", keyphrases=[]), "at least one"),
        (post("cot", cot="<think>"), "the reasoning alone"),
        (post(7), "'id' must be"),
        (post("t", text=3), "'text'"),
        (post("i", image=5), "'image'"),
    ]
    path = write(
        tmp_path / "posts.jsonl",
        [
            *good,
            *(record for record, _ in bad),
            "",
            post("both", keyphrases=[";"], image="gone.png"),
        ],
    )
    result = as_json("check", path, "--workers", 2, code=1)
    assert result["posts"] == 40 + len(bad) + 1
    assert result["with_image"] == 43 and result["images_read"] == 40
    expected = [
        (41 + n, record["id"] if isinstance(record, dict) and record["id"] != 7 else None)
        for n, (record, _) in enumerate(bad)
    ]
    line = 42 + len(bad)
    assert [(p["line"], p["id"]) for p in result["problems"]] == expected + [
        (line, "both"),
        (line, "both"),
    ]
    for problem, (_, words) in zip(result["problems"], bad, strict=False):  # and one more line
        assert words in problem["problem"] and "posts.jsonl" not in problem["problem"]
    text = tool("check", path, "--workers", 1, code=1).stdout
    assert (
        "line 41 (id 'semi'): the keyphrase 'a;b'" in text
        and f"{result['posts']} posts, 15 problems" in text
    )


def test_check_is_content_with_good_posts(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    path = write(tmp_path / "posts.jsonl", [post("1", image="good.png"), post("2")])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    counts = {"posts": 2, "with_image": 1, "images_read": 1, "with_text": 2, "with_cot": 0}
    counts["keyphrases"] = 2
    assert as_json("check", "posts.jsonl", cwd=tmp_path) == counts | {"problems": []}
    text = write(tmp_path / "src.txt", ["a<sep>b<sep>x/c.jpg", "again<sep>b<sep>x/c.jpg"])
    assert as_json("check", text) == counts | {"with_image": 0, "images_read": 0, "problems": []}
    write(text, ["a<sep>b<sep>x/c.jpg", "nothing"])
    assert [p["line"] for p in as_json("check", text, code=1)["problems"]] == [2]
    assert "no such file" in error("check", tmp_path / "nothing.jsonl")
    assert "no posts" in error("check", write(tmp_path / "empty.jsonl", [""]))
    assert "from 1 to" in tool("check", path, "--workers", 0, code=2).stderr


def test_help_is_quick_and_shows_defaults():
    assert "split" in tool("--help").stdout
    assert "(default: 0.1)" in tool("split", "--help").stdout
    slow = "('torch', 'transformers', 'numpy')"
    for module in ("data", "tools.dataset"):
        code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {slow}))"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
