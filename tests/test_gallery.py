"""The gallery: nothing in a post becomes markup, and marks and counts are the evaluator's."""

import base64
import hashlib
import io
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from conftest import ROOT
from evaluate import UserError, score
from tools import gallery

VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """A page as a browser sees it: elements as (tag, attributes), and the text inside each."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for element in self.open:
            element[2].append(text)

    def all(self, tag, **wanted):
        """(attributes, text) of the elements of a tag whose attributes have these words."""
        return [
            (attrs, "".join(text))
            for name, attrs, text in self.elements
            if name == tag
            and all(word in (attrs.get(key) or "").split() for key, word in wanted.items())
        ]

    def texts(self, tag, **wanted):
        """The texts of `all` as a browser shows them: white space is one space."""
        return [" ".join(text.split()) for _, text in self.all(tag, **wanted)]

    def shape(self):
        return [(tag, tuple(attrs)) for tag, attrs, _ in self.elements]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gallery.py", *map(str, arguments)])
    return gallery.main()


@pytest.fixture
def make_pages(tmp_path, monkeypatch):
    """make_pages(posts, predictions, *options): the pages, in order."""

    def make(posts, predictions, *options, out="gallery.html"):
        files = (
            write(tmp_path / "preds.jsonl", predictions),
            write(tmp_path / "test.jsonl", posts),
        )
        run(monkeypatch, *files, "--out", tmp_path / out, "--workers", 2, *options)
        stem = Path(out).stem
        names = [out] + [f"{stem}-{number}.html" for number in range(2, 9)]
        return [Page(tmp_path / name) for name in names if (tmp_path / name).exists()]

    return make


def test_a_failed_post_says_why_and_did_not_answer_directly(make_pages):
    posts = [{"id": name, "text": "a", "image": None, "keyphrases": ["b"]} for name in "xyz"]
    nothing = {"keyphrases": [], "think": None, "output": "", "tokens": 0}
    predictions = [{"id": name, **nothing, "tokens": 5} for name in "xy"]
    predictions.append({"id": "z", **nothing, "error": "image z.jpg: no such file"})
    predictions[1]["cut"] = True
    (page,) = make_pages(posts, predictions)
    feet = page.texts("div", **{"class": "foot"})
    direct = "answered directly · 5 tokens"
    assert feet == [direct, f"{direct} cut off", "failed: image z.jpg: no such file"]
    assert [attrs["data-kinds"] for attrs, _ in page.all("article")] == [
        "wrong direct",
        "wrong direct",
        "wrong",
    ]


WORDS = "cat;cats;running;run;blue flower;blue flowers;a , b;<unk>;; ;東京;東 京;new kit".split(";")


def random_posts(count, seed=0):
    """Posts and predictions with plurals, repetitions, empty phrases and invalid words.

    Some posts have no keyphrases.
    """
    draw = random.Random(seed)
    posts, predictions = [], []
    for number in range(count):
        identity = {"id": f"post {number}"}
        phrases = [draw.choice(WORDS) for _ in range(draw.randint(0, 4))]
        text = " ".join(draw.choices(WORDS, k=5))
        posts.append(identity | {"text": text, "image": None, "keyphrases": phrases})
        guesses = [draw.choice(WORDS) for _ in range(draw.randint(0, 4))]
        think = draw.choice([None, "", " ", "so"])
        tokens = draw.randint(1, 60)
        predictions.append(identity | {"keyphrases": guesses, "think": think, "tokens": tokens})
    return posts, predictions


def test_marks_and_counts_are_the_evaluators(make_pages, tmp_path):
    posts, predictions = random_posts(300)
    train = ["cat", "new kit", "", "東京"]
    write(tmp_path / "train.jsonl", [{"id": "t", "text": "", "keyphrases": train}])
    (page,) = make_pages(posts, predictions[::-1], "--train", tmp_path / "train.jsonl")
    scores = score(predictions, posts, train)

    html = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    articles = html.split("<article")[1:]
    assert len(articles) == 300

    def marked(article, kind):
        return article.count(f'<li class="{kind}">')

    scored = [
        article for article in articles if marked(article, "found") + marked(article, "missed")
    ]
    assert len(scored) == scores["all"]["posts"] < 300
    for measure, hit, miss in (("P@M", "right", "wrong"), ("R@M", "found", "missed")):
        shares = [
            marked(article, hit) / max(1, marked(article, hit) + marked(article, miss))
            for article in scored
        ]
        assert sum(shares) / len(shares) == pytest.approx(scores["all"][measure])
    assert marked(html, "found") + marked(html, "missed") == scores["all"]["keyphrases"]
    items = re.findall('<li class="(?:found|missed)">.*?</li>', html, re.DOTALL)
    unseen = [item for item in items if ">unseen<" in item]
    assert len(unseen) == scores["unseen"]["keyphrases"] > 0

    kinds = [attrs["data-kinds"].split() for attrs, _ in page.all("article")]

    def total(kind):
        return sum(kind in found for found in kinds)

    assert total("right") + total("wrong") == scores["all"]["posts"]
    assert total("right") / scores["all"]["posts"] == pytest.approx(scores["all"]["P@1"])
    assert total("unseen") == scores["unseen"]["posts"]
    assert total("unseen") + total("seen") == scores["all"]["posts"]
    of_scored = [found for found in kinds if "right" in found or "wrong" in found]
    reasoned = sum("reasoned" in found for found in of_scored) / len(of_scored)
    assert reasoned == pytest.approx(scores["all"]["reasoned"])
    offered = list(dict.fromkeys(attrs["value"] for attrs, _ in page.all("input")))
    assert offered == ["", "right", "wrong", "seen", "unseen", "reasoned", "direct"]
    for kind in offered:
        assert not kind or f"{kind} {total(kind)}" in page.texts("label")

    rows = page.texts("th", scope="row")
    assert rows == ["all", "present", "absent", "seen", "unseen", "absent + unseen"]
    cells = page.texts("td")
    for name in ("all", "present", "absent", "seen", "unseen", "absent_unseen"):
        entry = scores[name]
        percent = [f"{100 * entry[key]:.1f}" for key in ("F1@1", "F1@M", "reasoned")]
        count, tokens = str(entry["posts"]), f"{entry['tokens']:.1f}"
        assert cells[:5] == [count, *percent[:2], tokens, percent[2]]
        cells = cells[5:]
    assert not cells
    # A phrase without words is never a seen one, whatever the training file holds.
    marks = gallery.marks({"keyphrases": ["", "cat"]}, {"keyphrases": []}, {(), ("cat",)})
    assert marks[0] == [("", "wrong", True), ("cat", "wrong", False)]


HOSTILE = [
    "</script><script>alert(1)</script>",
    '" onmouseover="alert(1)" x=\'',
    "<img src=https://x.example/y.png>",
    "&lt;b&gt; &amp; &#60;",
    "--> <!-- ]]> <![CDATA[",
    "</article></main></body>",
    "\u202eright to left",
    "\u2067\u2066 isolates",
    "x" * 10_000,
    "nul \0 bell \a escape \x1b[31m",
    "half \ud800 pair \udfff",
    "שלום עולם",
    "مرحبا",
    "a\n\nb\u2028c",
    "{{x}} ${x} `",
    "{% raw %} {# x #} {{ 7 * 7 }}",
]


def hostile_posts(texts, broken="broken.png"):
    posts, predictions = [], []
    for number, text in enumerate(texts):
        identity = {"id": f"{number} {text}"}
        image = broken if number % 2 else None
        posts.append(identity | {"text": text, "image": image, "keyphrases": [text, "a"]})
        prediction = {"keyphrases": [text], "think": text, "tokens": 3, "output": ""}
        cut = {"cut": True} if number % 3 else {}
        predictions.append(identity | prediction | cut)
    predictions[-1] |= {"error": texts[-1]}
    return posts, predictions


def visible(text):
    return re.sub("[\0\a\x1b\ud800\udfff]", "\ufffd", text)


def test_hostile_text_stays_text(make_pages, tmp_path):
    """The page has the elements and attributes of one of harmless words, and shows the text."""
    (hostile,) = make_pages(*hostile_posts(HOSTILE))
    (tmp_path / "bro'ken<b>.png").write_bytes(b"\x89PNG\r\n\x1a\n no")
    (named,) = make_pages(*hostile_posts(HOSTILE, "bro'ken<b>.png"))
    (harmless,) = make_pages(*hostile_posts([f"word{number}" for number in range(len(HOSTILE))]))
    assert hostile.shape() == harmless.shape() == named.shape()
    texts = hostile.all("p", **{"class": "text"})
    assert [text for _, text in texts] == list(map(visible, HOSTILE))
    assert all(attrs.get("dir") == "auto" for attrs, _ in texts)
    # A reference and a prediction.
    assert [text for _, text in hostile.all("bdi")].count(visible(HOSTILE[1])) == 2
    assert "".join(text for _, text in hostile.all("details")).count("alert(1)") == 2
    assert "bro'ken<b>.png: not a readable image" in named.all("small", dir="auto")[0][1]
    assert str(tmp_path) not in (tmp_path / "gallery.html").read_text()


def test_images_are_small_copies_inside_the_page(make_pages, tmp_path):
    Image.new("RGB", (1000, 600), "red").save(tmp_path / "red.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "red.jpg").read_bytes()[:300])
    images = ["red.jpg", "broken.jpg", "none.jpg", None, str(tmp_path / "red.jpg")]
    posts = [
        {"id": str(number), "text": "t", "image": image, "keyphrases": ["k"]}
        for number, image in enumerate(images)
    ]
    (page,) = make_pages(posts, [{"id": post["id"], "keyphrases": ["k"]} for post in posts])
    pictures = page.all("img")
    assert len(pictures) == 2 and all(attrs["alt"] for attrs, _ in pictures)
    for attrs, _ in pictures:
        kind, _, code = attrs["src"].partition(",")
        assert kind == "data:image/webp;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(code)))
        assert picture.size == (320, 192)
        assert picture.convert("RGB").resize((1, 1)).getpixel((0, 0))[0] > 240
    assert page.texts("p", **{"class": "blank"}) == [
        "image can’t be read broken.jpg: not a readable image",
        "image can’t be read none.jpg: no such file",
        "no image",
    ]


def test_the_page_loads_nothing_and_runs_only_its_own_script(make_pages, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    posts = [
        {"id": str(number), "text": "see https://x.example", "image": "a.png", "keyphrases": ["k"]}
        for number in range(5)
    ]
    predictions = [{"id": post["id"], "keyphrases": []} for post in posts]
    for page in make_pages(posts, predictions, "--page-size", "2"):
        for tag, attrs, _ in page.elements:
            assert not {"style", "srcset", "action", "onclick"} & set(attrs)
            assert tag not in ("link", "iframe", "object", "base")
            if "src" in attrs:
                assert attrs["src"].startswith("data:image/webp;base64,")
            if "href" in attrs:
                assert re.fullmatch(r"gallery(-[23])?\.html", attrs["href"])
        ((attrs, _),) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
        policy = attrs["content"]
        assert policy.startswith("default-src 'none'; img-src data:;")
        for tag in ("style", "script"):
            ((_, text),) = page.all(tag)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
            assert "url(" not in text and "http" not in text and len(text) > 1000


def test_pages_add_up_to_all_posts(make_pages, tmp_path):
    posts, predictions = random_posts(8)
    name = "gal <1> #%20.html"
    assert len(make_pages(posts, predictions, "--page-size", "1", out=name)) == 8
    foreign = tmp_path / "gal <1> #%20-8.html"
    foreign.write_text("<p>mine</p>")
    found = make_pages(posts, predictions, "--page-size", "3", out=name)[:3]
    # Pages 4 to 7 of the longer gallery are gone; what is not a page of ours stays.
    left = [number for number in range(2, 9) if (tmp_path / f"gal <1> #%20-{number}.html").exists()]
    assert left == [2, 3, 8]
    assert [len(page.all("article")) for page in found] == [3, 3, 2]
    titles = [text for page in found for text in page.texts("h2")]
    assert titles == [f"Post {n + 1} post {n}" for n in range(8)]
    assert [len(page.all("table")) for page in found] == [1, 0, 0]
    names = [name, "gal <1> #%20-2.html", "gal <1> #%20-3.html"]
    for index, page in enumerate(found):
        links = [attrs for attrs, _ in page.all("a") if "data-counts" in attrs]
        assert [unquote(link["href"]) for link in links] == names
        current = [number for number in range(3) if "aria-current" in links[number]]
        assert current == [index]
        steps = {
            attrs["rel"]: unquote(attrs["href"]) for attrs, _ in page.all("a") if "rel" in attrs
        }
        around = {"prev": index - 1, "next": index + 1}
        assert steps == {rel: names[to] for rel, to in around.items() if 0 <= to < 3}
        for link, other in zip(links, found, strict=True):
            groups = [group.split() for group in link["data-counts"].split(",")]
            kinds = [attrs["data-kinds"].split() for attrs, _ in other.all("article")]
            expected = [kinds for count, *kinds in groups for _ in range(int(count))]
            assert sorted(kinds) == sorted(expected)


def test_text_files_have_a_gallery_too(tmp_path, monkeypatch):
    """CMKP's formats tell neither images nor reasoning nor tokens."""
    posts, predictions, out = (tmp_path / name for name in ("src.txt", "pred.txt", "g.html"))
    posts.write_text("a cat<sep>cats;pets<sep>https://x.example/abc.jpg\nb<sep>dogs\n")
    predictions.write_text("cat;dog\n\n")
    run(monkeypatch, predictions, posts, "--out", out, "--workers", 1)
    page = Page(out)
    assert [attrs["data-kinds"] for attrs, _ in page.all("article")] == ["right", "wrong"]
    found = [attrs["class"] for attrs, _ in page.all("li") if "class" in attrs]
    assert found == ["found", "missed", "right", "wrong", "missed"]
    assert page.texts("h2") == ["Post 1 abc", "Post 2"]


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch):
    record = {"text": "t", "image": None, "keyphrases": ["k"]}
    two = [record | {"id": "1"}, record | {"id": "2", "image": 5}]
    posts = write(tmp_path / "test.jsonl", two)
    good = write(tmp_path / "good.jsonl", [{"id": "1", "text": "t", "keyphrases": ["k"]}])
    both = [{"id": "1", "keyphrases": ["k"]}, {"id": "2", "keyphrases": []}]
    preds, one = write(tmp_path / "preds.jsonl", both), write(tmp_path / "one.jsonl", both[:1])
    for arguments, message in (
        ([tmp_path / "none.jsonl", good], "none.jsonl: no such file"),
        ([one, posts], "no prediction for 1 of 2 posts .*--allow-missing"),
        ([preds, good], "1 of 2 ids not in"),
        ([preds, posts], "test.jsonl line 2 .id 2.: the field 'image'"),
        ([one, good, "--out", good], "good.jsonl: one of the files to read"),
        ([one, good, "--out", tmp_path], "a folder; --out"),
        ([one, good, "--out", good / "x.html"], "can't be written"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *arguments)
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob(".*"))


def python(*arguments, folder=ROOT):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_the_command_line_needs_no_torch(tmp_path):
    helped = python("-m", "tools.gallery", "--help")
    assert helped.returncode == 0 and "(default: 500)" in helped.stdout
    heavy = "[m for m in ('torch', 'PIL', 'numpy', 'jinja2') if m in sys.modules]"
    loaded = python("-c", f"import tools.gallery, sys; print({heavy})")
    assert loaded.stdout.strip() == "[]"
    failed = python("-m", "tools.gallery", tmp_path / "none", tmp_path / "none")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1


def test_a_missing_jinja2_is_told_in_one_line(tmp_path):
    program = (
        "import sys; sys.modules['jinja2'] = None; sys.argv[0] = 'gallery.py'\n"
        "from tools import gallery; gallery.run(gallery.main)"
    )
    failed = python("-c", program, tmp_path / "preds.jsonl", tmp_path / "test.jsonl")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: ") and "pip install jinja2" in failed.stderr
