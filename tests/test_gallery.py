"""The gallery: nothing in a post becomes markup, and marks and counts are the evaluator's."""

import base64
import io
import random
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from evaluate import UserError, normalize, score, table
from tiny import call, write
from tools import gallery

VOID = {"meta", "img"}


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

    def kinds(self):
        """What the filters know of each post."""
        return [attrs["data-kinds"].split() for attrs, _ in self.all("article")]


@pytest.fixture
def make_pages(tmp_path, monkeypatch):
    """make_pages(posts, predictions, *options): the pages, in order."""

    def make(posts, predictions, *options, out="gallery.html"):
        files = write(tmp_path / "preds.jsonl", predictions), write(tmp_path / "test.jsonl", posts)
        call(monkeypatch, gallery, *files, "--out", tmp_path / out, *options)
        names = [out] + [f"{Path(out).stem}-{number}.html" for number in range(2, 9)]
        return [Page(tmp_path / name) for name in names if (tmp_path / name).exists()]

    return make


def test_a_failed_post_says_why_and_did_not_answer_directly(make_pages):
    posts = [{"id": name, "text": "a", "image": None, "keyphrases": ["b"]} for name in "xyz"]
    nothing = {"keyphrases": [], "think": None, "output": "", "tokens": 0}
    predictions = [{"id": name, **nothing, "tokens": 5} for name in "xy"]
    predictions.append({"id": "z", **nothing, "error": "image z.jpg: no such file"})
    predictions[1]["cut"] = True
    (page,) = make_pages(posts, predictions)
    facts = page.texts("p", **{"class": "quiet"})[1:]  # the first is the legend
    direct = "answered directly · 5 tokens"
    assert facts == [direct, f"{direct} · cut off", "failed: image z.jpg: no such file"]
    assert page.kinds() == [["wrong", "direct"], ["wrong", "direct"], ["wrong"]]


WORDS = "cat;cats;running;run;blue flower;blue flowers;a , b;<unk>;; ;東京;東 京;new kit".split(";")


def random_posts(count):
    """Posts and predictions with plurals, repetitions, empty phrases and invalid words.

    Some posts have no keyphrases.
    """
    draw, posts, predictions = random.Random(0), [], []
    for number in range(count):
        identity = {"id": f"post {number}"}
        phrases, guesses = (draw.choices(WORDS, k=draw.randint(0, 4)) for _ in range(2))
        text = " ".join(draw.choices(WORDS, k=5))
        posts.append(identity | {"text": text, "image": None, "keyphrases": phrases})
        answer = {"think": draw.choice([None, "", " ", "so"]), "tokens": draw.randint(1, 60)}
        predictions.append(identity | {"keyphrases": guesses} | answer)
    return posts, predictions


def test_marks_and_filters_are_the_evaluators():
    posts, predictions = random_posts(300)
    train = ["cat", "new kit", "", "東京"]
    scores = score(predictions, posts, train)
    known = set(map(normalize, train))
    pairs = zip(posts, predictions, strict=True)
    shown = [gallery.describe_post(1, *pair, known) for pair in pairs]

    def count(post, *kinds):
        return sum(mark.kind in kinds for mark in post["predicted"] + post["references"])

    scored = [post for post in shown if count(post, "found", "missed")]
    assert len(scored) == scores["all"]["posts"] < 300
    for measure, hit, miss in (("P@M", "right", "wrong"), ("R@M", "found", "missed")):
        shares = [count(post, hit) / max(1, count(post, hit, miss)) for post in scored]
        assert sum(shares) / len(shares) == pytest.approx(scores["all"][measure])
    references = [mark for post in shown for mark in post["references"]]
    counted = [mark for mark in references if mark.kind in ("found", "missed")]
    assert len(counted) == scores["all"]["keyphrases"]
    assert sum(mark.unseen for mark in counted) == scores["unseen"]["keyphrases"] > 0

    def total(kind, posts=shown):
        return sum(kind in post["kinds"] for post in posts)

    assert total("right") + total("wrong") == total("unseen") + total("seen") == len(scored)
    assert total("right") / len(scored) == pytest.approx(scores["all"]["P@1"])
    assert total("unseen") == scores["unseen"]["posts"]
    assert total("reasoned", scored) / len(scored) == pytest.approx(scores["all"]["reasoned"])
    # A phrase without words is never a seen one, whatever the training file holds.
    marks = gallery.marks({"keyphrases": ["", "cat"]}, {"keyphrases": []}, {(), ("cat",)})
    assert marks[0] == [("", "wrong", True), ("cat", "wrong", False)]


def test_the_page_has_the_scores_and_the_filters(make_pages, tmp_path):
    posts, predictions = random_posts(50)
    train = write(tmp_path / "train.jsonl", [{"id": "t", "text": "", "keyphrases": ["cat"]}])
    (page,) = make_pages(posts, predictions[::-1], "--train", train)
    scores = score(predictions, posts, ["cat"])
    assert [text for _, text in page.all("pre")] == [table(scores)]
    offered = " ".join(page.texts("option"))
    assert offered == "all right wrong all seen unseen all reasoned direct"
    (style,) = page.texts("style")
    for kind in ("right", "wrong", "seen", "unseen", "reasoned", "direct"):
        hidden = f"article:not([data-kinds~={kind}]) {{ display: none; }}"
        assert f"body:has(option[value={kind}]:checked) {hidden}" in style


HOSTILE = [
    "</script><script>alert(1)</script>",
    '" onmouseover="alert(1)" x=\'',
    "<img src=https://x.example/y.png>",
    "&lt;b&gt; &amp; &#60; --> <!-- ]]> <![CDATA[",
    "</article></main></body>",
    "\u202eright to left \u2067\u2066 isolates",
    "x" * 10_000,
    "nul \0 bell \a escape \x1b[31m half \ud800 pair \udfff",
    "שלום עולם مرحبا",
    "a\n\nb\u2028c",
    "${x} ` {% raw %} {# x #} {{ 7 * 7 }}",
]


def hostile_posts(texts, broken="broken.png"):
    posts, predictions = [], []
    for number, text in enumerate(texts):
        post = {"id": f"{number} {text}", "image": broken if number % 2 else None}
        posts.append(post | {"text": text, "keyphrases": [text, "a"]})
        answer = {"keyphrases": [text], "think": text, "tokens": 3, "cut": number % 3 > 0}
        predictions.append({"id": post["id"]} | answer)
    predictions[-1]["error"] = texts[-1]
    return posts, predictions


def visible(text):
    """As the page has it: a lone surrogate, which has no UTF-8, is shown as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def test_hostile_text_stays_text(make_pages, tmp_path):
    """The page has the elements and attributes of one of harmless words, and shows the text."""
    (hostile,) = make_pages(*hostile_posts(HOSTILE))
    (tmp_path / "bro'ken<b>.png").write_bytes(b"\x89PNG\r\n\x1a\n no")
    (named,) = make_pages(*hostile_posts(HOSTILE, "bro'ken<b>.png"))
    (harmless,) = make_pages(*hostile_posts([f"word{number}" for number in range(len(HOSTILE))]))
    assert hostile.shape() == harmless.shape() == named.shape()
    texts = hostile.all("p", **{"class": "text"})
    assert [text for _, text in texts[::2]] == list(map(visible, HOSTILE))
    assert [text for _, text in texts[1::2]] == list(map(visible, HOSTILE))  # the reasoning
    assert all(attrs.get("dir") == "auto" for attrs, _ in texts)
    # A reference and a prediction.
    assert [text for _, text in hostile.all("bdi")].count(visible(HOSTILE[1])) == 2
    problem = named.texts("p", **{"class": "blank"})[1]
    assert problem.startswith("bro'ken<b>.png: not a readable image")
    assert str(tmp_path) not in (tmp_path / "gallery.html").read_text()


def test_images_are_small_copies_inside_the_page(make_pages, tmp_path):
    Image.new("RGB", (1000, 600), "red").save(tmp_path / "red.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "red.jpg").read_bytes()[:300])
    images = ["red.jpg", "broken.jpg", "none.jpg", None, str(tmp_path / "red.jpg")]
    posts, predictions = random_posts(len(images))
    for post, image in zip(posts, images, strict=True):
        post["image"] = image
    (page,) = make_pages(posts, predictions)
    pictures = page.all("img")
    assert len(pictures) == 2 and all(attrs["alt"] for attrs, _ in pictures)
    for attrs, _ in pictures:
        kind, _, code = attrs["src"].partition(",")
        assert kind == "data:image/webp;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(code)))
        assert picture.size == (320, 192)
        assert picture.convert("RGB").resize((1, 1)).getpixel((0, 0))[0] > 240
    assert page.texts("p", **{"class": "blank"}) == [
        "broken.jpg: not a readable image (JPEG, PNG, GIF, WEBP, BMP, TIFF, AVIF)",
        "none.jpg: no such file",
        "no image",
    ]


def test_pages_add_up_to_all_posts_load_nothing_and_run_no_script(make_pages):
    posts, predictions = random_posts(8)
    name = "gal <1> #%20.html"
    found = make_pages(posts, predictions, "--page-size", "3", out=name)
    assert [len(page.all("article")) for page in found] == [3, 3, 2]
    titles = [text for page in found for text in page.texts("h2")]
    assert titles == [f"{n + 1} post {n}" for n in range(8)]
    assert [len(page.all("pre")) for page in found] == [1, 0, 0]
    names = [name, "gal <1> #%20-2.html", "gal <1> #%20-3.html"]
    for index, page in enumerate(found):
        assert page.texts("nav") == [f"Page {index + 1} of 3: 1 2 3"] * 2  # above and below
        assert [unquote(attrs["href"]) for attrs, _ in page.all("a")] == names * 2
        ((attrs, _),) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
        nonce = page.all("style")[0][0]["nonce"]
        assert " ".join(attrs["content"].split()) == (
            f"default-src 'none'; img-src data:; style-src 'nonce-{nonce}'; base-uri 'none'"
        )
    (again,) = make_pages(posts, predictions)
    assert again.all("style")[0][0]["nonce"] != nonce  # which no post can know


def test_text_files_have_a_gallery_too(tmp_path, monkeypatch):
    """CMKP's formats tell neither images nor reasoning nor tokens."""
    posts, predictions, out = (tmp_path / name for name in ("src.txt", "pred.txt", "g.html"))
    posts.write_text("a cat<sep>cats;pets<sep>https://x.example/abc.jpg\nb<sep>dogs\n")
    predictions.write_text("cat;dog\n\n")
    call(monkeypatch, gallery, predictions, posts, "--out", out)
    page = Page(out)
    assert page.kinds() == [["right"], ["wrong"]]
    found = [attrs.get("class") for attrs, _ in page.all("dd")]
    assert found == ["found", "missed", "right", "wrong", "missed", None]
    assert page.texts("h2") == ["1 abc", "2"]
    assert page.texts("option") == ["all", "right", "wrong"]


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch):
    record = {"text": "t", "image": None, "keyphrases": ["k"]}
    two = [record | {"id": "1"}, record | {"id": "2", "image": 5}]
    posts = write(tmp_path / "test.jsonl", two)
    good = write(tmp_path / "good.jsonl", [{"id": "1", "text": "t", "keyphrases": ["k"]}])
    both = [{"id": "1", "keyphrases": ["k"]}, {"id": "2", "keyphrases": []}]
    preds, one = write(tmp_path / "preds.jsonl", both), write(tmp_path / "one.jsonl", both[:1])
    for arguments, message in (
        ([one, posts], "no prediction for 1 of 2 posts .*--allow-missing"),
        ([preds, posts], "test.jsonl line 2: the field 'image'"),
        ([one, good, "--out", good], "--out takes one that ends in .html"),
    ):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, gallery, *arguments)
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob(".*"))
