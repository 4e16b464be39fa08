import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

import data
from evaluate import normalize, read_posts, run
from tiny import ROOT, lines, write
from tools import dataset
from tools.split import SIDE_NAMES

CMKP = ROOT.parent / "shared" / "data" / "cmkp"
with_cmkp = pytest.mark.skipif(not CMKP.exists(), reason="CMKP's posts are not here")


def tool(*arguments, code=0):
    """`python -m tools.dataset …`, in this process: (what it printed, what it told on stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["tools.dataset", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run(dataset.main)
    assert left.value.code == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def flags(**options):
    """`--name value …`."""
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def as_json(*arguments, **options):
    return json.loads(tool(*arguments, "--json", **options)[0])


def error(*arguments):
    """The one line that a failing call ends in."""
    return tool(*arguments, code=1)[1].splitlines()[-1]


def post(identity, text="a text", keyphrases=("one",), image=None, **others):
    return {"id": identity, "text": text, "image": image, "keyphrases": list(keyphrases), **others}


# --------------------------------------------------------------------------------------------- cmkp


def test_cmkp_round_trip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    addresses = [f"https://x.y/media/{name}.jpg" for name in ("AbC", "AbC", "gone")]
    posts = ["blue flowers<sep>garden;flower", "again<sep>retweet", "日本 语 \u2028 x<sep>语"]
    rows = [f"{text}<sep>{address}" for text, address in zip(posts, addresses, strict=True)]
    rows += ["no address<sep>a", "no address<sep>b", "bad<sep>a;;b<sep>q/z.png"]
    source = write(tmp_path / "src.txt", rows)
    (tmp_path / "pictures").mkdir()
    for name in ("AbC.jpg", "z.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    # The output's folder is a link to a deeper one; image paths must hold for the real folder.
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    out = tmp_path / "link" / "new" / "posts.jsonl"
    printed, told = tool("import", "src.txt", "--images", "pictures", "--out", out, "--json")
    counts = {"posts": 6, "images": 3, "images_missing": 1, "keyphrases": 9, "ids_renamed": 1}
    assert json.loads(printed) == counts | {"map": "", "others": ["address"]} and "gone.jpg" in told
    records = lines(out)
    assert [record["id"] for record in records[:3]] == ["AbC", "AbC-2", "gone"]
    assert len({record["id"] for record in records}) == 6
    images = [record["image"] and (out.parent / record["image"]).resolve() for record in records]
    picture = tmp_path / "pictures" / "AbC.jpg"
    assert images == [picture, picture, None, None, None, tmp_path / "pictures" / "z.png"]
    assert not os.path.isabs(records[0]["image"])
    before, after = (
        [(p["text"], p["keyphrases"]) for _, p in read_posts(f)] for f in (source, out)
    )
    assert before == after
    data.Posts(out)  # opens for prediction
    tool("import", source, "--images", "none", "--out", tmp_path / "bare.jsonl")
    assert [record["image"] for record in lines(tmp_path / "bare.jsonl")] == [None] * 6


def test_new_ids_are_unique_and_leave_others_alone():
    records = [{"id": name} for name in ("x", "x-2", "x", "y", "x", "x-2")]
    assert dataset.make_ids_unique(records) == 3
    assert [record["id"] for record in records] == ["x", "x-2", "x-3", "y", "x-4", "x-2-2"]


# -------------------------------------------------------------------------------------------- stats


def test_stats_by_hand(tmp_path):
    posts = [post("1", "the dogs play", ["Dog", "cat"]), post("2", "", ["cat"])]
    train = write(tmp_path / "train.jsonl", posts)
    Image.new("RGB", (8, 8)).save(tmp_path / "here.png")
    posts = [
        # dog and cats are present; cats and bird unseen
        post("3", "my dog and a cat", ["dog", "CATS", "bird"], "here.png"),
        post("4", "a cat play", ["cat", "play dogs"], "gone.png"),  # cat present, play dogs unseen
        post("5", "two words", ["dog", "dogs", " "]),  # none present, one after stemming
    ]
    test = write(tmp_path / "test.jsonl", posts)
    counts = "posts keyphrases distinct_keyphrases keyphrases_per_post words_per_post present"
    names = ["file", *counts.split(), "absent", "images", "images_missing"]
    overlaps = ["overlap", "overlap_occurrences", "posts_with_unseen"]
    of_train = [str(train), 2, 3, 2, 1.5, 1.5, 1 / 3, 2 / 3, 0, 0]
    of_test = [str(test), 3, 7, 6, 7 / 3, 10 / 3, 3 / 6, 3 / 6, 2, 1, 2 / 6, 3 / 7, 1.0]
    files = [dict(zip(names, of_train, strict=True))]
    files.append(dict(zip(names + overlaps, of_test, strict=True)))
    assert as_json("stats", train, test) == {"overlap": 2 / 6, "files": files}
    assert as_json("stats", train, test, train)["overlap"] == 1  # of the last file
    table = [line.split("  ") for line in tool("stats", train, test)[0].splitlines()]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in table}
    assert cells["overlap"] == ["-", "33.33%"] and cells["words per post"] == ["1.50", "3.33"]
    write(test, [*posts, {"id": "9", "text": None, "keyphrases": []}])
    assert "test.jsonl line 4 (id '9')" in error("stats", train, test)


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
        count = rng.choice([1, 1, 1, 2, 2, 3])
        keyphrases = sorted({f"key {int(2500 ** rng.random())}" for _ in range(count)})
        if rng.random() < 0.4:
            words += keyphrases[0].split()
        record = post(f"p{number}", " ".join(words), keyphrases, f"img/{number}.jpg", mine=number)
        if posts and number % 20 == 0:  # the same text or the same image as another post's
            other, field = rng.choice(posts), rng.choice(["text", "image"])
            record[field] = other[field].upper() if field == "text" else other[field]
        if number % 50 == 0:
            record["text"] = ""  # no text is not the same text
        posts.append(record)
    there = [{**record, "image": f"../a/{record['image']}"} for record in posts[1700:]]
    one = write(folder / "a" / "one.jsonl", posts[:1700])
    return one, write(folder / "b" / "two.jsonl", there)


def written(folder):
    return [lines(folder / f"{name}.jsonl") for name in SIDE_NAMES]


def phrases(posts):
    return {phrase.lower() for record in posts for phrase in record["keyphrases"]}


def overlap_of(part, train):
    return len(phrases(part) & phrases(train)) / len(phrases(part))


def likeness(posts):
    """Words a post, keyphrases a post, share of keyphrases present; not by the tool's own code."""
    found = []
    for record in posts:
        text = list(normalize(record["text"]))
        for phrase in {normalize(phrase) for phrase in record["keyphrases"]}:
            found.append(any(text[i : i + len(phrase)] == list(phrase) for i in range(len(text))))
    words = sum(len(record["text"].split()) for record in posts) / len(posts)
    keyphrases = sum(len(record["keyphrases"]) for record in posts) / len(posts)
    return words, keyphrases, sum(found) / len(found)


def assert_as_asked(before, parts, sizes, overlap=None):
    """The parts have the posts, sizes and means they should; retweets are on one side."""
    train, *held_out = parts
    assert sorted(r["text"] for r in before) == sorted(r["text"] for part in parts for r in part)
    assert [len(part) for part in held_out] == list(sizes)
    whole, sides = likeness(before), {}
    for part in filter(None, held_out):
        assert likeness(part) == pytest.approx(whole, rel=0.2 if overlap is None else 0.1)
        if overlap is not None:
            assert abs(overlap_of(part, train) - overlap) <= 0.005
    for number, part in enumerate(parts):
        for record in part:
            image = record.get("image") and Path(record["image"]).name
            for key in (image, record.get("address"), normalize(record["text"])):
                assert not key or sides.setdefault(key, number) == number
    assert len(sides) < 2 * len(before)  # some are retweets


@pytest.mark.parametrize("overlap, valid, test", [(0.3, 200, 300), (0.8, 100, 400), (0.6, 0, 300)])
def test_split_is_as_asked(corpus, tmp_path, overlap, valid, test):
    before = [record for path in corpus for record in lines(path)]
    options = flags(overlap=overlap, test=test, valid=valid, out=tmp_path / "x")
    result = as_json("split", *corpus, *options)
    parts = written(tmp_path / "x")
    assert_as_asked(before, parts, (valid, test), overlap)
    times = Counter(phrase.lower() for record in before for phrase in record["keyphrases"])
    assert max(times[phrase] for phrase in phrases(parts[2]) - phrases(parts[0])) >= 4
    assert {r["id"]: r for part in parts for r in part}.keys() == {r["id"] for r in before}
    for part in parts:  # nothing but the image's path has changed, and that leads to the same place
        for record in part:
            original = before[record["mine"]]
            assert {**record, "image": None} == {**original, "image": None}
            image = os.path.normpath(tmp_path / "x" / record["image"])
            folder = corpus[record["mine"] >= 1700].parent
            assert image == os.path.normpath(folder / original["image"])
    assert result["overlap"] == result["files"][2]["overlap"]
    if valid:  # else one of the files is empty
        files = (tmp_path / "x" / f"{name}.jsonl" for name in SIDE_NAMES)
        assert result == as_json("stats", *files)
    assert sorted(os.listdir(tmp_path / "x")) == ["test.jsonl", "train.jsonl", "valid.jsonl"]


@pytest.mark.parametrize("overlap", [[], ["--overlap", 0.5]], ids=["random", "overlap"])
def test_split_depends_on_seed_and_posts_but_not_on_their_order(corpus, tmp_path, overlap):
    before = [record for path in corpus for record in lines(path)]
    records = [{**r, "image": f"img/{Path(r['image']).name}"} for r in before]
    one = write(tmp_path / "one.jsonl", records)
    random.Random(1).shuffle(records)
    halves = [write(tmp_path / f"{n}.jsonl", records[n::2]) for n in range(2)]
    outputs = []
    for files, seed in (([one], 0), (halves, 0), ([one], 1)):
        out = tmp_path / str(len(outputs))
        arguments = [*files, *flags(test=300, valid=200, seed=seed, out=out), *overlap]
        if files is halves:  # another process has other hashes of strings, and so orders of sets
            command = [sys.executable, "-m", "tools.dataset", "split", *map(str, arguments)]
            subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        else:
            tool("split", *arguments)
        outputs.append([(out / f"{name}.jsonl").read_bytes() for name in SIDE_NAMES])
    assert outputs[0] == outputs[1] != outputs[2]
    assert_as_asked(before, written(tmp_path / "2"), (200, 300), *overlap[1:])


def test_split_says_what_it_cannot_do(corpus, tmp_path):
    # Every post has the phrase "all" and another one: half of a post's keyphrases are always seen.
    posts = [post(str(n), f"text {n}", ["all", f"key {n}"]) for n in range(60)]
    alike = write(tmp_path / "alike.jsonl", posts)
    message = error("split", alike, *flags(overlap=0, test=9, valid=9, out=tmp_path / "x"))
    assert "no split found with an overlap of 0.00%" in message
    assert "the closest has 10.00% in test and 10.00% in valid" in message
    assert "not as asked: test overlap, valid overlap" in message
    assert not (tmp_path / "x").exists()
    many = flags(test=2000, valid=1000, out=tmp_path)
    assert "nothing to train on" in error("split", *corpus, *many)
    bare = write(tmp_path / "bare.jsonl", [post(str(n), f"text {n}", []) for n in range(20)])
    few = flags(test=3, valid=3, out=tmp_path)
    assert "has a keyphrase" in error("split", bare, *few, "--overlap", 0.5)
    own = write(tmp_path / "train.jsonl", lines(corpus[0]))
    options = flags(test=300, valid=0, out=tmp_path)
    assert "choose another --out" in error("split", own, *options)
    assert lines(own) == lines(corpus[0])


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
    assert abs(overlap_of(test, train) - 0.2) <= 0.005


def test_split_tells_where_groups_do_not_add_up_and_makes_ids_unique(tmp_path):
    posts = [post(str(n), f"text {n}", [f"key {n % 40}"]) for n in range(200)]
    path = write(tmp_path / "in.jsonl", posts)
    options = flags(overlap=0.5, test=100, valid=0, out=tmp_path / "x")
    _, told = tool("split", path, path, path, *options)
    assert "ids used more than once: 400 of them" in told
    assert "not as asked: 99 test posts, not 100" in told
    train, _, test = written(tmp_path / "x")
    assert (len(train), len(test)) == (501, 99)
    assert len({record["id"] for record in train + test}) == 600
    same = write(tmp_path / "same.jsonl", [post(str(n), "the same") for n in range(20)])
    for overlap in ([], ["--overlap", 0.5]):
        message = error("split", same, *overlap, *flags(test=3, valid=0, out=tmp_path / "y"))
        assert "0 test posts, not 3" in message and "stay together" in message
    assert not (tmp_path / "y").exists()


@with_cmkp
@pytest.mark.parametrize("overlap", [0.45, 0.6, 0.8])
def test_split_of_cmkp(tmp_path, overlap):
    files = CMKP / "test_src.txt", CMKP / "valid_src.txt"
    tool("split", *files, *flags(overlap=overlap, test=1000, valid=1000, out=tmp_path))
    before = [p for path in files for _, p in read_posts(path)]
    assert_as_asked(before, written(tmp_path), (1000, 1000), overlap)


def test_keyphrases_are_compared_in_one_form_of_unicode(tmp_path):
    train = write(
        tmp_path / "train.jsonl", [post("1", "a", ["cafe\u0301  x"]), post("2", "b", ["y"])]
    )
    test = write(tmp_path / "test.jsonl", [post("3", "a", ["café x"])])
    assert as_json("stats", train, test)["overlap"] == 1.0
    twice = [post("é", keyphrases=["café", "cafe\u0301"]), post("e\u0301")]
    path = write(tmp_path / "twice.jsonl", [*twice, '{"id": "a", "text": "b", "text": "c"}'])
    told = [problem["problem"] for problem in as_json("check", path, code=1)["problems"]]
    assert "would be lost" in told[0] and "already used on line 1" in told[1]
    assert "the field 'text' is there twice" in told[2]
    entity = write(tmp_path / "html.jsonl", [post("h", keyphrases=["rock &amp; roll"])])
    (problem,) = as_json("check", entity, code=1)["problems"]
    assert "unescape HTML" in problem["problem"]


# -------------------------------------------------------------------------------------------- check


def test_check_finds_all_that_is_wrong(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    Image.effect_noise((200, 200), 50).convert("RGB").save(tmp_path / "cut.jpg")
    os.truncate(tmp_path / "cut.jpg", 2000)
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
        (post("number", cot=1), "'cot'"),
        (post("numbers", keyphrases=[1]), "'keyphrases'"),
        (post(7), "'id' must be"),
        (post("t", text=3), "'text'"),
        (post("i", image=5), "'image'"),
    ]
    both = post("both", keyphrases=[";"], image="gone.png")
    path = write(tmp_path / "posts.jsonl", [*good, *(record for record, _ in bad), "", both])
    result = as_json("check", path, code=1)
    assert result["posts"] == 40 + len(bad) + 1
    assert result["with_image"] == 43 and result["images_read"] == 40
    ids = [row["id"] if isinstance(row, dict) and row["id"] != 7 else None for row, _ in bad]
    expected = [*enumerate(ids, start=41), *[(42 + len(bad), "both")] * 2]
    assert [(p["line"], p["id"]) for p in result["problems"]] == expected
    for problem, (_, words) in zip(result["problems"], bad, strict=False):  # and one more line
        assert words in problem["problem"] and "posts.jsonl" not in problem["problem"]


def test_check_is_content_with_good_posts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    path = write(tmp_path / "posts.jsonl", [post("1", image="good.png"), post("2")])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    counts = dict(posts=2, with_image=1, images_read=1, with_text=2, with_cot=0, keyphrases=2)
    assert as_json("check", "posts.jsonl") == counts | {"problems": []}
    text = write(tmp_path / "src.txt", ["a<sep>b<sep>x/c.jpg", "again<sep>b<sep>x/c.jpg"])
    assert as_json("check", text) == counts | {"with_image": 0, "images_read": 0, "problems": []}
    write(text, ["a<sep>b<sep>x/c.jpg", "nothing"])
    assert [p["line"] for p in as_json("check", text, code=1)["problems"]] == [2]
    assert "no posts" in error("check", write(tmp_path / "empty.jsonl", [""]))


def test_help_is_quick_and_shows_defaults():
    assert "(default: 0.1)" in tool("split", "--help")[0]
    slow = "('torch', 'transformers', 'numpy')"
    for module in ("data", "tools.dataset"):
        code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {slow}))"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
