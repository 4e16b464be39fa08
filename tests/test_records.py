"""Other people's records: what the scripts say of them, and --map, which reads them."""

import random
import shlex
import subprocess
import sys

import pytest

import data
import gen_cot
import infer
import train
from evaluate import UserError
from server import Server, write_posts
from support.records import converted, parse_map
from test_data_tools import tool
from tiny import ROOT, call, lines, train_alone, words, write
from tools import dataset
from tools.posts import read_entries

POST = {"id": "p0", "text": "two spare tickets", "image": None, "keyphrases": ["ticket sale"]}


def but(*without, **others):
    """POST without some fields and with others."""
    return {name: value for name, value in POST.items() if name not in without} | others


def opened(path, for_training, capsys):
    """What a script says when it opens the posts: warnings, and the error that it ends in."""
    capsys.readouterr()
    try:
        data.Posts(path, for_training)
        error = ""
    except UserError as told:
        error = f"error: {told}"
        assert "\n" not in error
    return capsys.readouterr().err + error


MAPS = "the record has {}; --map {}=NAME"
CAPTION, TAGS = but("text", caption="a"), but("keyphrases", hashtags=["#a"])
# The records, what is said of them, and whether only training says so (None: infer.py warns).
KINDS = {
    "caption": (CAPTION, MAPS.format("id, image, keyphrases, caption", "text"), False),
    "null": (but(text=None), "the field 'text' must be a string (empty if there is none)", False),
    "no id": (but("id"), "the field 'id' must be a string that is not empty, not None", False),
    "one string": (but(keyphrases="a; b"), "'keyphrases' must be a list of strings", False),
    "list": (but(image=["0.jpg"]), "must be one file name or null", False),
    "hashtags": (TAGS, MAPS.format("id, text, image, hashtags", "keyphrases"), True),
    "#": (but(keyphrases=["#a"]), "the keyphrase '#a' would be lost", True),
    "gone": (but(image="images/0.jpg"), "the image 'images/0.jpg'", None),
    "address": (but(image="https://example.org/0.jpg"), "example.org/0.jpg", None),
    "folder": (but(image="images"), "the image 'images'", None),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_said_of_records(tmp_path, capsys, name):
    record, said, only_training = KINDS[name]
    (tmp_path / "images").mkdir()
    path = write(tmp_path / "posts.jsonl", [record])
    printed, told = tool("check", path, code=1)
    assert said in printed + told
    for_training, for_prediction = (opened(path, flag, capsys) for flag in (True, False))
    assert f"error: {path}" in for_training and said in for_training
    assert ("error: " in for_prediction) == (only_training is False)
    assert (said in for_prediction) == (not only_training)


def test_a_file_without_images_is_warned_of_once(tmp_path, capsys):
    path = write(tmp_path / "posts.jsonl", [but(), but("image", id="p1", photo="0.jpg")])
    assert opened(path, True, capsys) == (
        f"warning: {path}: no post has an 'image'; the first has id, text, image, keyphrases; "
        "--map image=NAME names it\n"
    )
    (tmp_path / "0.jpg").touch()
    path = write(tmp_path / "posts.jsonl", [but(image="0.jpg"), but(id="p1", image="gone.jpg")])
    assert opened(path, True, capsys) == ""
    few = [but(id=f"p{n}", image="gone.jpg" if n == 0 else None) for n in range(200)]
    path = write(tmp_path / "posts.jsonl", few)  # training skips as many
    assert opened(path, True, capsys).startswith("warning: ")


def test_check_groups_what_is_wrong_by_kind(tmp_path):
    records = [but(id=f"p{n}", keyphrases=[f"#{n}a"]) for n in range(1234)]
    records += [but(id="t", text=None), but(id="t", cot="why", image="gone.jpg")]
    printed, _ = tool("check", write(tmp_path / "posts.jsonl", records), code=1)
    counts, hashes, text, image, double, total = printed.split("\n\n")
    said = "1 naming an image (0 can be read), 1,235 with a text, 1 with a cot; 1,236 keyphrases"
    assert counts == f"1,236 posts: {said}"
    first, *places = hashes.splitlines()
    assert first == "1,234 x a keyphrase would be lost"
    starts = [f"  line {n + 1} (id 'p{n}'): the keyphrase '#{n}a' would be lost" for n in range(3)]
    assert len(places) == 3 and all(map(str.startswith, places, starts))
    assert "hash signs" in places[0] and places[0].count("--map keyphrases=keyphrases") == 1
    assert text.startswith("1 x the field 'text' must be a string")
    assert double.startswith("1 x an id is used twice\n  line 1236 (id 't'): this id was already")
    assert image.startswith("1 x an image: no such file\n  line 1236 (id 't'): the image 'gone")
    assert total == "1,236 posts, 1,237 problems\n"


# ------------------------------------------------------------------------------------------- --map


def test_the_option(capsys):
    assert parse_map("text=caption") == {"text": "caption"}
    assert parse_map(" text = a b , keyphrases=x=y") == {"text": "a b", "keyphrases": "x=y"}
    for text in ("caption=text", "text", "text=", "", "text=a,text=b"):
        with pytest.raises(SystemExit):
            infer.parse_args(["--data", "x", "--out", "y", "--map", text])
        error = capsys.readouterr().err
        assert "OURS=THEIRS, such as text=caption" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "field, value, ours",
    [
        ("keyphrases", "a; b", ["a", "b"]),
        ("keyphrases", "#TicketSale #Saturday", ["TicketSale", "Saturday"]),
        ("keyphrases", "a, b", ["a", "b"]),
        ("keyphrases", '["a", "b, c"]', ["a", "b, c"]),
        ("keyphrases", ["#a", "a", "x, y", "u.s.", "c;d"], ["a", "x, y", "u.s.", "c", "d"]),
        ("keyphrases", None, []),
        ("keyphrases", [1], [1]),
        ("image", ["0.jpg"], "0.jpg"),
        ("image", [{"path": "0.jpg", "bytes": None}], "0.jpg"),
        ("image", [], None),
        ("image", ["0.jpg", "1.jpg"], ["0.jpg", "1.jpg"]),
        ("image", {"path": None, "bytes": "x"}, {"path": None, "bytes": "x"}),
        ("id", 12, "12"),
        ("id", True, True),
        ("text", None, ""),
        ("cot", None, None),
    ],
)
def test_what_a_value_becomes(field, value, ours):
    assert converted(field, value) == ours


def test_mapped_keyphrases_can_be_trained_on_and_good_ones_stay_as_they_are():
    draw = random.Random(0)
    pieces = "#foxes|a b|c#|u.s.|“heroes”|- foxes|tags: foxes|1. foxes|x\ny|2. kit|paris, france"
    pieces = (pieces + "|#1 fan|• x|end.|[a]|日本|a;b|  |Foxes").split("|")
    good = 0
    for _ in range(3000):
        phrases = draw.sample(pieces, draw.randint(1, 4))
        mapped = converted("keyphrases", phrases)
        data.check_keyphrases(mapped, "here")
        try:
            data.check_keyphrases(phrases, "here")
        except UserError:
            continue
        good += 1
        assert mapped == phrases
    assert good > 100


@pytest.fixture(scope="session")
def theirs(world):
    """The club world's training and test posts in other people's names."""
    for name in ("train", "test"):
        records = []
        for record in lines(world / f"{name}.jsonl"):
            image, tags = record.pop("image"), record.pop("keyphrases")
            record |= {"tweet": record.pop("text"), "photos": [image] if image else []}
            records.append(record | {"hashtags": "; ".join(f"#{tag}" for tag in tags)})
        write(world / f"their_{name}.jsonl", records)
    return world


MAP = "--map text=tweet,image=photos,keyphrases=hashtags"


def test_training_on_other_names_is_the_same_training(theirs, tmp_path, capsys):
    def run(name, posts, *options):
        files = ["--train", theirs / posts, "--valid", theirs / posts.replace("train", "test")]
        sizes = "--epochs 0.5 --batch-size 16 --workers 0 --max-new-tokens 4 --valid-posts 4"
        files += ["--model", theirs / "toy", "--out", tmp_path / name]
        _, _, folder = train_alone(*files, sizes, *options)
        log = lines(folder / "log.jsonl")
        same = [key for line in log for key in line if "second" not in key and key != "memory_gb"]
        return [{key: line.get(key) for key in same} for line in log]

    ours = run("ours", "train.jsonl")
    mapped = run("theirs", "their_train.jsonl", MAP)
    for one, other in zip(ours, mapped, strict=True):
        assert one.get("loss") == other.get("loss") and one.get("all") == other.get("all")
    with pytest.raises(UserError, match="map was {.*'text': 'tweet'}, is {'text': 'tweet'}"):
        run("theirs", "train.jsonl", "--map text=tweet --resume")
    assert run("theirs", "their_train.jsonl", MAP, "--resume") == mapped


def test_the_commands_that_a_mapped_run_prints_work(theirs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a run"
    files = ["--train", theirs / "their_train.jsonl", "--valid", theirs / "their_test.jsonl"]
    sizes = "--epochs 0.1 --workers 0 --max-new-tokens 3", MAP
    arguments = words(*files, "--model", theirs / "toy", "--out", out, *sizes)
    assert not call(monkeypatch, train, *arguments)
    printed = capsys.readouterr().err.splitlines()
    commands = [row[10:] for row in printed if row[:10].strip() in ("Predict", "Import", "Score")]
    assert len(commands) == 3
    for command in commands:
        command = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1].split()[:2] == ["posts", "12"]


def test_predicting_and_scoring_posts_in_other_names(theirs, tmp_path, capsys):
    def predict(posts, out, *options):
        files = ["--data", theirs / posts, "--out", tmp_path / out, "--model", theirs / "toy"]
        options = "--workers 0 --max-new-tokens 3", *options
        code = infer.infer_file(infer.parse_args(words(*files, *options)))
        return code, (tmp_path / out).read_text()

    ours = predict("test.jsonl", "ours.jsonl")
    assert predict("their_test.jsonl", "theirs.jsonl", MAP) == ours == (0, ours[1])
    assert predict("their_test.jsonl", "theirs.jsonl", MAP) == ours  # nothing is left to do
    with pytest.raises(UserError, match=r"made with something else \(map\)"):
        predict("their_test.jsonl", "theirs.jsonl", "--map text=tweet")
    source = theirs / "their_test.jsonl"
    (tmp_path / "far").mkdir()
    out = tmp_path / "far" / "renamed.jsonl"
    assert not dataset.import_posts(dataset.parse_args(words("import", source, MAP, "--out", out)))
    before, after = lines(theirs / "test.jsonl"), lines(out)
    for one, other in zip(before, after, strict=True):
        assert (out.parent / other["image"]).resolve() == (theirs / one["image"]).resolve()
        assert {**one, "image": 0} == {**other, "image": 0}
    assert "--map text=tweet,keyphrases=hashtags,image=photos\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already; choose another --out"):
        dataset.import_posts(dataset.parse_args(words("import", source, "--out", source)))
    printed, _ = tool("check", source, *MAP.split())
    assert printed.startswith("12 posts: 12 with an image, 12 with a text")
    mapped = dataset.figures_of(read_entries(source, parse_map(MAP.split()[1])))
    assert mapped == dataset.figures_of(read_entries(theirs / "test.jsonl"))


def test_a_teacher_reads_other_names(tmp_path):
    posts = write_posts(tmp_path, 4, images=0)
    before = lines(posts)
    renamed = {"text": "tweet", "keyphrases": "tags"}
    write(posts, [{renamed.get(k, k): v for k, v in post.items()} for post in before])

    def ask(server, *options):
        options = ["--out", tmp_path / "cot.jsonl", "--model x --base-url", server.url, *options]
        return gen_cot.write_reasoning(gen_cot.parse_args(words(posts, *options)))

    with Server() as server:
        with pytest.raises(UserError, match="--map text=NAME"):
            ask(server)
        assert ask(server, "--map text=tweet,keyphrases=tags") == 0
        assert ask(server, "--map text=tweet,keyphrases=tags") == 0 and len(server.log) == 4
    after = lines(tmp_path / "cot.jsonl")
    assert [{k: v for k, v in r.items() if k not in ("cot", "teacher")} for r in after] == before
    data.Posts(tmp_path / "cot.jsonl", for_training=True)


def test_a_record_in_our_own_names_is_read_with_a_map_too(tmp_path):
    path = write(tmp_path / "posts.jsonl", [but("text", caption="a"), but(id="p1")])
    posts = data.Posts(path, names={"text": "caption"})
    assert [posts[index]["text"] for index in range(2)] == ["a", "two spare tickets"]


@pytest.mark.parametrize("script", ["train", "infer", "gen_cot"])
def test_records_are_judged_before_a_model_is_loaded(tmp_path, monkeypatch, script):
    """No model is where --model points: a script that looked for it first would say so."""
    path, out = tmp_path / "posts.jsonl", ["--out", tmp_path / "out", "--model", tmp_path / "none"]
    arguments = {
        "train": ["--train", path, "--mode sft", *out],
        "infer": ["--data", path, *out],
        "gen_cot": [path, "--base-url http://127.0.0.1:9/v1 --max-retries 0", *out],
    }
    module = {"train": train, "infer": infer, "gen_cot": gen_cot}[script]
    write(path, [but("text", caption="a")])
    with pytest.raises(UserError, match="--map text=NAME"):
        call(monkeypatch, module, *words(*arguments[script]))
