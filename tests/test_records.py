"""Other people's records: what the scripts say of them, and --map, which reads them."""

import io
import json
import random
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import data
import gen_cot
import infer
import train
from evaluate import UserError, read_lines
from server import Server, write_posts
from support.images import MAX_PIXELS
from support.records import converted, parse_map
from tiny import train_alone, words
from tools import dataset
from tools.check import check_line, collect, image_problem, print_check
from tools.posts import read_entries

POST = {"id": "p0", "text": "two spare tickets", "image": None, "keyphrases": ["ticket sale"]}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, *records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path


def but(*without, **others):
    """POST without some fields and with others."""
    return {name: value for name, value in POST.items() if name not in without} | others


def three(record):
    """A file of three posts that are all like `record`, the ids p0 to p2 if they are strings."""
    records = [dict(record) for _ in range(3)]
    for number, one in enumerate(records):
        if isinstance(one.get("id"), str):
            one["id"] = f"p{number}"
    return "".join(json.dumps(one) + "\n" for one in records).encode()


def check(path, *options):
    """(exit code, what it printed) of `python -m tools.dataset check`, or its error."""
    out = io.StringIO()
    arguments = ["check", str(path), "--workers", "1", *options]
    try:
        with redirect_stdout(out):
            code = dataset.check(dataset.parse_args(arguments))
    except UserError as error:
        return 1, str(error)
    return code, out.getvalue()


def check_here(path):
    """`check` without its pool of processes, which take a while to start."""
    lines = [(line, offset) for line, offset, _ in read_lines(path)]
    results = [check_line(str(path), False, None, *line) for line in lines]
    counts, found = collect(lines, results, True)
    out = io.StringIO()
    with redirect_stdout(out):
        print_check(len(lines), counts, found, as_json=False)
    return 1 if found else 0, out.getvalue()


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


DIALOGUE = {"id": "p0", "conversations": [{"from": "human", "value": "<image>\nGive hashtags."}]}
OPENAI = {"id": "p0", "messages": [{"role": "user", "content": "Give hashtags."}]}
NO_IMAGE = "no post has an 'image', but {!r} looks like one"
NO_COT = "no post has a 'cot', but {!r} looks like one"
NO_TEXT = "the field 'text' is missing"
NEEDS = "a training post needs at least one keyphrase"
NOT_JSONL = "line 1: not JSONL, but "
ADDRESS = "is an address or data, not a file name"
SAVE = "save the images and write their file names"

# The file's records or bytes, what is said of them, and the mend. Where the kind begins with
# "warning" train.py goes on, where it ends with "training" infer.py has nothing to say.
KINDS = {
    "image_path": (
        "warning",
        but("image", image_path="images/0.jpg"),
        NO_IMAGE,
        "image=image_path",
    ),
    "images": ("warning", but("image", images=["images/0.jpg"]), NO_IMAGE, "image=images"),
    "img": ("warning", but("image", img="0.jpg"), NO_IMAGE, "image=img"),
    "photo": ("warning", but("image", photo="a/0"), NO_IMAGE, "image=photo"),
    "pictureFile": ("warning", but(pictureFile="a/0.PNG"), NO_IMAGE, "image=pictureFile"),
    "file_name": ("warning", but("image", file_name="0.jpg"), NO_IMAGE, "image=file_name"),
    "image_url": ("warning", but("image", image_url="http://a.b/0.jpg"), NO_IMAGE, "has addresses"),
    "reasoning": ("warning training", but(reasoning="for sale"), NO_COT, "cot=reasoning"),
    "rationale": ("warning training", but(rationale="for sale"), NO_COT, "cot=rationale"),
    "<image>": ("warning", but(text="<image>\ntickets"), "<image> in the text", "remove it"),
    "caption": ("error", but("text", caption="tickets"), NO_TEXT, "text=caption"),
    "tweet": ("error", but("text", tweet="tickets"), NO_TEXT, "text=tweet"),
    "post": ("error", but("text", post="tickets"), NO_TEXT, "text=post"),
    "content": ("error", but("text", content="tickets"), NO_TEXT, "text=content"),
    "null": ("error", but(text=None), "the field 'text' must be a string", "text=text"),
    "hashtags": ("training", but("keyphrases", hashtags=["#a"]), NEEDS, "keyphrases=hashtags"),
    "labels": ("training", but("keyphrases", labels=["a"]), NEEDS, "keyphrases=labels"),
    "tags": ("training", but("keyphrases", tags="a, b"), NEEDS, "keyphrases=tags"),
    "keywords": ("training", but("keyphrases", keywords="a"), NEEDS, "keyphrases=keywords"),
    "keyphrase": ("training", but("keyphrases", keyphrase="a"), NEEDS, "keyphrases=keyphrase"),
    "one string": ("error", but(keyphrases="a; b"), "a list of strings", "keyphrases=keyphrases"),
    "objects": ("error", but(keyphrases=[{"text": "a"}]), "must be a list of strings", ""),
    "#": ("training", but(keyphrases=["#a"]), "begins with a hash sign", "keyphrases=keyphrases"),
    "a;b": ("training", but(keyphrases=["a;b"]), "semicolon", "keyphrases=keyphrases"),
    "number": ("error", but(id=7), "the field 'id' must be a string", "id=id"),
    "no id": ("error", but("id"), "the field 'id' is missing", "give each post one"),
    "list": ("error", but(image=["0.jpg"]), "must be one file name or null", "image=image"),
    "object": ("error", but(image={"path": "0.jpg"}), "must be one file name", "image=image"),
    "two images": ("error", but(image=["0.jpg", "1.jpg"]), "must be one file name or null", ""),
    "address": ("error", but(image="https://example.org/0.jpg"), ADDRESS, SAVE),
    "data": ("error", but(image="data:image/png;base64,iVBORw0KGgo="), ADDRESS, SAVE),
    "gone": (
        "missing",
        but(image="images/0.jpg"),
        "images/0.jpg",
        "begin at the folder of the file",
    ),
    "moved": ("missing", but(image="C:\\a\\here.jpg"), "here.jpg", "write images/here.jpg"),
    "folder": ("missing", but(image="images"), "folder", "begin at the folder of the file"),
    "ShareGPT": ("error", DIALOGUE, NO_TEXT, "'conversations' is a dialogue"),
    "messages": ("error", OPENAI, NO_TEXT, "'messages' is a dialogue"),
    "within": ("error", {"data": [POST]}, "'id' is missing", "seem to be in the field 'data'"),
    "by name": ("error", {"p0": POST, "p1": POST}, "'id' is missing", "inside this one"),
    "JSON": ("file", json.dumps([POST], indent=2).encode(), NOT_JSONL + "a JSON list", "data.md"),
    "list of JSON": ("file", json.dumps([POST]).encode(), NOT_JSONL + "a JSON list", "data.md"),
    "pretty": ("file", json.dumps(POST, indent=1).encode(), "JSON over several lines", "data.md"),
    "CSV": ("file", b"id,text\np0,tickets\n", NOT_JSONL + "a table (CSV)", "data.md"),
    "TSV": ("file", b"id\ttext\np0\ttickets\n", NOT_JSONL + "a table with tabs", "data.md"),
    "YAML": ("file", b"- id: p0\n  text: a, b\n", NOT_JSONL + "YAML", "data.md"),
    "XML": ("file", b"<posts>\n", NOT_JSONL + "XML", "data.md"),
    "Parquet": ("file", b"PAR1\x15\x04\n", "line 1: not UTF-8, but a Parquet file", "data.md"),
    "zip": ("file", b"PK\x03\x04\x14\n", "a zip archive", "unpack it first"),
    "tar": ("file", b"a.jsonl".ljust(257, b"\0") + b"ustar\n", "a tar archive", "unpack it first"),
    "UTF-16": ("file", json.dumps(POST).encode("utf-16"), "text in UTF-16", "save it as UTF-8"),
    "CMKP": ("file", b"tickets<sep>ticket sale<sep>x/0.jpg\n", "CMKP's text", "dataset cmkp"),
    "good": ("nothing", POST, "", ""),
    "mark": ("nothing", b"\xef\xbb\xbf" + three(POST), "", ""),
    "no image": ("nothing", but(url="https://example.org/status/1", likes=3), "", ""),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_said_of_a_file(tmp_path, capsys, name):
    kind, content, said, mend = KINDS[name]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "here.jpg").touch()
    path = tmp_path / "posts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else three(content))
    said = said.format(name)
    code, printed = check(path) if kind == "file" else check_here(path)
    for_training, for_prediction = (opened(path, flag, capsys) for flag in (True, False))
    if kind == "nothing":
        assert code == 0 and "0 problems" in printed
    else:
        assert code == 1 and said in printed and mend in printed
    if kind == "nothing":
        assert for_training == for_prediction == ""
        return
    assert f"{path}" in for_training and said in for_training and mend in for_training
    assert for_training.startswith("warning: " if "warning" in kind else "error: ")
    if "training" in kind:
        assert for_prediction == ""
    elif kind == "missing":  # prediction tells it of every post
        assert for_prediction == for_training.replace("error", "warning") + "\n"
    else:
        assert for_prediction == for_training


def test_check_reads_images_at_the_size_of_training(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr("tools.check.load_image", lambda path, max_pixels: sizes.append(max_pixels))
    assert image_problem(tmp_path, "0.jpg") is None and sizes == [MAX_PIXELS]


def test_check_groups_what_is_wrong_by_kind(tmp_path):
    records = [but(id=f"p{n}", keyphrases=[f"#{n}a"]) for n in range(1234)]
    records += [but(id="t", text=None), but(id="t", cot="why", image="gone.jpg")]
    code, printed = check(write(tmp_path / "posts.jsonl", *records))
    counts, hashes, text, image, double, total = printed.split("\n\n")
    assert counts == (
        "1,236 posts: 1 naming an image (0 can be read), 1,235 with a text, 1 with a cot; "
        "1,236 keyphrases"
    )
    first, *places, mend = hashes.splitlines()
    assert first == "1,234 x a keyphrase begins with a hash sign"
    assert [place.split(":")[0] for place in places] == [
        f"  line {n + 1} (id 'p{n}')" for n in range(3)
    ]
    assert "the keyphrase '#0a' begins with a hash sign" in places[0]
    assert mend.startswith("  -> remove") and mend.count("--map keyphrases=keyphrases") == 1
    assert text.startswith("1 x the field 'text' must be a string")
    assert double.startswith("1 x an id is used twice\n  line 1236 (id 't'): this id was already")
    assert image.startswith("1 x none of the images is there\n  line 1236 (id 't'): the image")
    assert total == "1,236 posts, 1,237 problems of 4 kinds\n" and code == 1
    _, printed = check(write(tmp_path / "one.jsonl", but(text="<image>")))
    assert printed.endswith("\n1 post, 1 problem\n")


def test_what_one_post_has_is_no_mistake_of_the_others(tmp_path, capsys):
    """Other fields are kept and ignored where the file has ours."""
    (tmp_path / "0.jpg").touch()
    mine = but(image="0.jpg", image_url="http://a.b/0.jpg", cot="why", reasoning="why", tags=["a"])
    path = write(tmp_path / "posts.jsonl", mine, mine | but("cot", id="p1") | {"image": None})
    assert opened(path, True, capsys) == ""
    _, printed = check(path)
    assert "looks like" not in printed


def test_only_some_posts_of_a_long_file_are_looked_over(tmp_path, capsys):
    posts = [but(id=f"p{n}", image="gone.jpg", image_url="x") for n in range(5000)]
    (tmp_path / "here.jpg").touch()
    for number in range(0, 5000, 100):
        posts[number]["image"] = "here.jpg"
    assert opened(write(tmp_path / "posts.jsonl", *posts), True, capsys) == ""
    posts[0]["image"] = "http://a.b/0.jpg"
    path = write(tmp_path / "posts.jsonl", *posts)
    assert "posts.jsonl line 1: the image 'http://a.b/0.jpg'" in opened(path, False, capsys)
    few = [but(id=f"p{n}", image="gone.jpg" if n == 0 else None) for n in range(200)]
    path = write(tmp_path / "posts.jsonl", *few)  # training skips as many
    assert opened(path, True, capsys).startswith("warning: ")


def test_the_lines_of_python_in_the_docs(tmp_path, monkeypatch, capsys):
    """docs/data.md's ways to JSONL, run as they stand there, and what they write."""
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    table, dialogue = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "posts.csv").write_text('\ufeffid,text,keyphrases\n1,"ä, b",x; y\n2,,z\n', "utf-8")
    turns = [{"from": "human", "value": "<image>\nhello"}, {"from": "gpt", "value": "x, y"}]
    roles = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "z"}]
    talks = [{"id": 7, "conversations": turns, "image": None}, {"messages": roles}]
    write(tmp_path / "dialogues.jsonl", *talks)
    monkeypatch.chdir(tmp_path)
    for code, texts in ((table, ["ä, b", ""]), (dialogue, ["hello", "hello"])):
        exec(code, {})
        posts = data.Posts(tmp_path / "posts.jsonl", True, {"keyphrases": "keyphrases"})
        assert [post["text"] for post in posts] == texts
        assert [post["keyphrases"] for post in posts] == [["x", "y"], ["z"]]


# ------------------------------------------------------------------------------------------- --map


@pytest.mark.parametrize(
    "text, names",
    [
        ("text=caption", {"text": "caption"}),
        (" text = a b , keyphrases=x=y", {"text": "a b", "keyphrases": "x=y"}),
        ("caption=text", None),
        ("text", None),
        ("text=", None),
        ("", None),
        ("text=a,text=b", None),
    ],
)
def test_the_option(text, names, capsys):
    arguments = ["--data", "x", "--out", "y", "--map", text]
    if names is not None:
        assert infer.parse_args(arguments).map == names == parse_map(text)
        return
    with pytest.raises(SystemExit):
        infer.parse_args(arguments)
    error = capsys.readouterr().err
    assert "OURS=THEIRS, such as text=caption" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "field, value, ours",
    [
        ("keyphrases", "a; b", ["a", "b"]),
        ("keyphrases", "#TicketSale #Saturday", ["TicketSale", "Saturday"]),
        ("keyphrases", "a, b", ["a", "b"]),
        ("keyphrases", '["a", "b, c"]', ["a", "b, c"]),
        ("keyphrases", ["#a", "a", "paris, france", "u.s.", "c;d"], "a|paris, france|u.s.|c|d"),
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
    if field == "keyphrases" and isinstance(ours, str):
        ours = ours.split("|")
    assert converted(field, value) == ours


def test_mapped_keyphrases_can_be_trained_on_and_good_ones_stay_as_they_are():
    draw = random.Random(0)
    pieces = [
        "#foxes",
        "a b",
        "c#",
        "u.s.",
        "“heroes”",
        "- foxes",
        "tags: foxes",
        "1. foxes",
        "x\ny",
    ]
    pieces += [
        "2. kit",
        "paris, france",
        "#1 fan",
        "• x",
        "end.",
        "[a]",
        "日本",
        "a;b",
        "  ",
        "Foxes",
    ]
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
        write(world / f"their_{name}.jsonl", *records)
    return world


MAP = "--map text=tweet,image=photos,keyphrases=hashtags"


def test_training_on_other_names_is_the_same_training(theirs, tmp_path, capsys):
    def run(name, posts, *options):
        files = ["--train", theirs / posts, "--valid", theirs / posts.replace("train", "test")]
        sizes = "--epochs 0.5 --batch-size 16 --workers 0 --max-new-tokens 4 --valid-posts 4"
        files += ["--model", theirs / "toy", "--out", tmp_path / name]
        _, _, folder = train_alone(*files, sizes, *options)
        return [
            {
                key: value
                for key, value in line.items()
                if "second" not in key and key != "memory_gb"
            }
            for line in lines(folder / "log.jsonl")
        ]

    ours = run("ours", "train.jsonl")
    mapped = run("theirs", "their_train.jsonl", MAP)
    for one, other in zip(ours, mapped, strict=True):
        assert one.get("loss") == other.get("loss") and one.get("all") == other.get("all")
    with pytest.raises(UserError, match="map was {'text': 'tweet'.*, is None"):
        run("theirs", "train.jsonl", "--resume")
    with pytest.raises(UserError, match="map was .*'photos'.*, is {'text': 'tweet'}"):
        run("theirs", "train.jsonl", "--resume --map text=tweet")
    assert run("theirs", "their_train.jsonl", MAP, "--resume") == mapped
    with pytest.raises(UserError, match="train_digest|content|train.*was"):
        write(theirs / "their_train.jsonl", *lines(theirs / "their_train.jsonl")[::-1])
        run("theirs", "their_train.jsonl", MAP, "--resume")


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
    assert not dataset.rename(dataset.parse_args(words("rename", source, MAP, "--out", out)))
    before, after = lines(theirs / "test.jsonl"), lines(out)
    for one, other in zip(before, after, strict=True):
        assert (out.parent / other["image"]).resolve() == (theirs / one["image"]).resolve()
        assert {**one, "image": 0} == {**other, "image": 0}
    assert "renamed.jsonl: 12 posts" in capsys.readouterr().out
    with pytest.raises(UserError, match="choose another --out"):
        dataset.rename(dataset.parse_args(words("rename", source, MAP, "--out", source)))
    code, printed = check(source, *MAP.split())
    assert code == 0 and printed.startswith("12 posts: 12 with an image, 12 with a text")
    figures = [
        dataset.figures_of(read_entries(path, names))
        for path, names in ((source, parse_map(MAP.split()[1])), (theirs / "test.jsonl", None))
    ]
    assert figures[0] == figures[1]


def test_a_teacher_reads_other_names(tmp_path):
    posts = write_posts(tmp_path, 4, images=0)
    before = lines(posts)
    renamed = {"text": "tweet", "keyphrases": "tags"}
    write(posts, *({renamed.get(k, k): v for k, v in post.items()} for post in before))

    def ask(server, *options):
        options = ["--out", tmp_path / "cot.jsonl", "--model x --base-url", server.url, *options]
        return gen_cot.write_reasoning(gen_cot.parse_args(words(posts, *options)))

    with Server() as server:
        with pytest.raises(UserError, match="try --map text=tweet,keyphrases=tags|tags,text=tweet"):
            ask(server)
        assert ask(server, "--map text=tweet,keyphrases=tags") == 0
        assert ask(server, "--map text=tweet,keyphrases=tags") == 0 and len(server.log) == 4
    after = lines(tmp_path / "cot.jsonl")
    assert [{k: v for k, v in r.items() if k not in ("cot", "teacher")} for r in after] == before
    data.Posts(tmp_path / "cot.jsonl", for_training=True)


def test_a_name_that_is_not_there(tmp_path, capsys):
    path = write(tmp_path / "posts.jsonl", but("text", caption="a"), but(id="p1"))
    with pytest.raises(UserError) as error:
        data.Posts(path, names={"text": "captoin"})
    assert str(error.value) == (
        f"{path} line 1 (id 'p0'): the field 'captoin' of --map text=captoin is missing; it must "
        "be a string (empty if there is none); try --map text=caption"
    )
    posts = data.Posts(path, names={"text": "caption", "cot": "rationale"})
    assert [posts[index]["text"] for index in range(2)] == ["a", "two spare tickets"]
    assert capsys.readouterr().err == (
        f"warning: {path}: no post tried has the field 'rationale' of --map cot=rationale\n"
    )


@pytest.mark.parametrize("script", ["train", "infer", "gen_cot"])
def test_records_are_judged_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, script):
    """No model is where --model points: a script that looked for it first would say so."""
    path, out = tmp_path / "posts.jsonl", ["--out", tmp_path / "out", "--model", tmp_path / "none"]
    arguments = {
        "train": ["--train", path, "--mode sft", *out],
        "infer": ["--data", path, *out],
        "gen_cot": [path, "--base-url http://127.0.0.1:9/v1 --max-retries 0", *out],
    }
    main = {"train": train, "infer": infer, "gen_cot": gen_cot}[script].main
    monkeypatch.setattr(sys, "argv", [script, *words(*arguments[script])])
    write(path, DIALOGUE)
    with pytest.raises(UserError, match="'conversations' is a dialogue"):
        main()
    write(path, but(image="http://example.org/0.jpg"))
    with pytest.raises(UserError, match="is an address"):
        main()
    write(path, but("image", image_path="0.jpg"))
    capsys.readouterr()
    if script == "gen_cot":  # no server answers there
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--dry-run"])
        assert not main()
    else:
        with pytest.raises(UserError, match="none"):
            main()
    assert "warning" in capsys.readouterr().err
