"""The pages: nothing in a post becomes markup, marks and counts are the evaluator's, curves are what was logged."""

import base64
import hashlib
import io
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

import pages
import train
from evaluate import UserError, score

VOID = {"meta", "img", "input", "path", "polyline", "circle"}


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

    def shape(self):
        return [(tag, tuple(attrs)) for tag, attrs, _ in self.elements]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pages.py", *map(str, arguments)])
    return pages.main()


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    """gallery(posts, predictions, *options): the pages, in order."""

    def make(posts, predictions, *options, out="gallery.html"):
        write(tmp_path / "test.jsonl", posts)
        write(tmp_path / "preds.jsonl", predictions)
        run(
            monkeypatch,
            "gallery",
            tmp_path / "preds.jsonl",
            tmp_path / "test.jsonl",
            "--out",
            tmp_path / out,
            "--workers",
            1,
            *options,
        )
        stem = Path(out).stem
        names = [out] + [f"{stem}-{number}.html" for number in range(2, 9)]
        return [Page(tmp_path / name) for name in names if (tmp_path / name).exists()]

    return make


# ----------------------------------------------------------------------------------------------------- gallery


def random_posts(count, seed=0):
    """Posts and predictions with plurals, repetitions, empty phrases, invalid words and posts without keyphrases."""
    draw = random.Random(seed)
    words = [
        "cat",
        "cats",
        "running",
        "run",
        "blue flower",
        "blue flowers",
        "a , b",
        "<unk>",
        "",
        " ",
        "東京",
        "東 京",
        "new kit",
    ]
    posts, predictions = [], []
    for number in range(count):
        phrases = [draw.choice(words) for _ in range(draw.randint(0, 4))]
        posts.append(
            {
                "id": f"post {number}",
                "text": " ".join(draw.choices(words, k=5)),
                "image": None,
                "keyphrases": phrases,
            }
        )
        guesses = [draw.choice(words) for _ in range(draw.randint(0, 4))]
        predictions.append(
            {
                "id": f"post {number}",
                "keyphrases": guesses,
                "think": draw.choice([None, "", " ", "so"]),
                "tokens": draw.randint(1, 60),
            }
        )
    return posts, predictions


def test_marks_and_counts_are_the_evaluators(gallery, tmp_path):
    posts, predictions = random_posts(300)
    train = ["cat", "new kit", "", "東京"]
    write(tmp_path / "train.jsonl", [{"id": "t", "text": "", "keyphrases": train}])
    (page,) = gallery(posts, predictions[::-1], "--train", tmp_path / "train.jsonl")
    scores = score(predictions, posts, train)

    html = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    articles = html.split("<article")[1:]
    assert len(articles) == 300
    count = lambda article, kind: article.count(f'<li class="{kind}">')
    scored = [article for article in articles if count(article, "found") + count(article, "missed")]
    assert len(scored) == scores["all"]["posts"] < 300
    for measure, hit, miss in (("P@M", "right", "wrong"), ("R@M", "found", "missed")):
        shares = [
            count(article, hit) / max(1, count(article, hit) + count(article, miss))
            for article in scored
        ]
        assert sum(shares) / len(shares) == pytest.approx(scores["all"][measure])
    assert (
        html.count('<li class="found">') + html.count('<li class="missed">')
        == scores["all"]["keyphrases"]
    )
    unseen = [
        item
        for item in re.findall('<li class="(?:found|missed)">.*?</li>', html)
        if ">unseen<" in item
    ]
    assert len(unseen) == scores["unseen"]["keyphrases"] > 0

    kinds = [attrs["data-kinds"].split() for attrs, _ in page.all("article")]
    total = lambda kind: sum(kind in found for found in kinds)
    assert total("right") + total("wrong") == scores["all"]["posts"]
    assert total("right") / scores["all"]["posts"] == pytest.approx(scores["all"]["P@1"])
    assert (
        total("unseen") == scores["unseen"]["posts"]
        and total("unseen") + total("seen") == scores["all"]["posts"]
    )
    of_scored = [found for found in kinds if "right" in found or "wrong" in found]
    assert sum("reasoned" in found for found in of_scored) / len(of_scored) == pytest.approx(
        scores["all"]["reasoned"]
    )
    offered = {attrs["value"]: text for attrs, text in page.all("input")}
    assert list(offered) == ["", "right", "wrong", "seen", "unseen", "reasoned", "direct"]
    for kind in offered:
        assert not kind or f"{kind} {total(kind)}" in [text for _, text in page.all("label")]

    cells = [text for _, text in page.all("td")]
    for name in ("all", "present", "absent", "seen", "unseen", "absent_unseen"):
        entry = scores[name]
        percent = [f"{100 * entry[key]:.1f}" for key in ("F1@1", "F1@M", "reasoned")]
        assert cells[:5] == [
            str(entry["posts"]),
            *percent[:2],
            f"{entry['tokens']:.1f}",
            percent[2],
        ]
        cells = cells[5:]
    assert not cells
    # A phrase without words is never a seen one, whatever the training file holds.
    empty, cat = pages.marks({"keyphrases": ["", "cat"]}, {"keyphrases": []}, {(), ("cat",)})[0]
    assert empty == ("", "wrong", True) and cat == ("cat", "wrong", False)


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
]


def hostile_posts(texts, broken="broken.png"):
    posts = [
        {
            "id": f"{number} {text}",
            "text": text,
            "image": broken if number % 2 else None,
            "keyphrases": [text, "a"],
        }
        for number, text in enumerate(texts)
    ]
    predictions = [
        {
            "id": post["id"],
            "keyphrases": [post["text"]],
            "think": post["text"],
            "tokens": 3,
            "output": "",
        }
        | ({"cut": True} if number % 3 else {})
        for number, post in enumerate(posts)
    ]
    predictions[-1] |= {"error": texts[-1]}
    return posts, predictions


def test_hostile_text_stays_text(gallery, tmp_path):
    """The page has the same elements and attributes as one of harmless words, and shows the text as it stands."""
    (hostile,) = gallery(*hostile_posts(HOSTILE))
    (tmp_path / "bro'ken<b>.png").write_bytes(b"\x89PNG\r\n\x1a\n no")
    (named,) = gallery(*hostile_posts(HOSTILE, "bro'ken<b>.png"))
    (harmless,) = gallery(*hostile_posts([f"word{number}" for number in range(len(HOSTILE))]))
    assert hostile.shape() == harmless.shape() == named.shape()
    visible = lambda text: re.sub("[\0\a\x1b\ud800\udfff]", "\ufffd", text)
    assert [text for _, text in hostile.all("p", **{"class": "text"})] == list(
        map(visible, HOSTILE)
    )
    assert [text for _, text in hostile.all("bdi")].count(
        visible(HOSTILE[1])
    ) == 2  # a reference and a prediction
    assert "".join(text for _, text in hostile.all("details")).count("alert(1)") == 2
    assert all(attrs.get("dir") == "auto" for attrs, _ in hostile.all("p", **{"class": "text"}))
    assert "bro'ken<b>.png: not a readable image" in named.all("small", dir="auto")[0][1]
    assert str(tmp_path) not in (tmp_path / "gallery.html").read_text()


def test_images_are_small_copies_inside_the_page(gallery, tmp_path):
    red = Image.new("RGB", (1000, 600), "red")
    red.save(tmp_path / "red.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "red.jpg").read_bytes()[:300])
    images = ["red.jpg", "broken.jpg", "none.jpg", None, str(tmp_path / "red.jpg")]
    posts = [
        {"id": str(number), "text": "t", "image": image, "keyphrases": ["k"]}
        for number, image in enumerate(images)
    ]
    (page,) = gallery(posts, [{"id": post["id"], "keyphrases": ["k"]} for post in posts])
    pictures = page.all("img")
    assert len(pictures) == 2 and all(attrs["alt"] for attrs, _ in pictures)
    for attrs, _ in pictures:
        kind, _, code = attrs["src"].partition(",")
        assert kind == "data:image/webp;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(code)))
        assert (
            picture.size == (320, 192)
            and picture.convert("RGB").resize((1, 1)).getpixel((0, 0))[0] > 240
        )
    blank = [text for _, text in page.all("p", **{"class": "blank"})]
    assert blank == [
        "image can’t be read broken.jpg: not a readable image",
        "image can’t be read none.jpg: no such file",
        "no image",
    ]


def test_the_page_loads_nothing_and_runs_only_its_own_script(gallery, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    posts = [
        {"id": str(number), "text": "see https://x.example", "image": "a.png", "keyphrases": ["k"]}
        for number in range(5)
    ]
    for page in gallery(
        posts, [{"id": post["id"], "keyphrases": []} for post in posts], "--page-size", "2"
    ):
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
            assert (
                f"{tag}-src 'sha256-{digest}'" in policy
                and "url(" not in text
                and "http" not in text
            )


def test_pages_add_up_to_all_posts(gallery, tmp_path):
    posts, predictions = random_posts(8)
    name = "gal <1> #%20.html"
    assert len(gallery(posts, predictions, "--page-size", "1", out=name)) == 8
    foreign = tmp_path / "gal <1> #%20-8.html"
    foreign.write_text("<p>mine</p>")
    found = gallery(posts, predictions, "--page-size", "3", out=name)[:3]
    # Pages 4 to 7 of the longer gallery are gone; what is not a page of ours stays.
    left = [number for number in range(2, 9) if (tmp_path / f"gal <1> #%20-{number}.html").exists()]
    assert left == [2, 3, 8]
    assert [len(page.all("article")) for page in found] == [3, 3, 2]
    assert [text for page in found for _, text in page.all("h2")] == [
        f"Post {n + 1} post {n}" for n in range(8)
    ]
    assert [len(page.all("table")) for page in found] == [1, 0, 0]
    for index, page in enumerate(found):
        links = [attrs for attrs, _ in page.all("a") if "data-counts" in attrs]
        assert [unquote(link["href"]) for link in links] == [
            name,
            "gal <1> #%20-2.html",
            "gal <1> #%20-3.html",
        ]
        assert [("aria-current" in link) for link in links] == [
            number == index for number in range(3)
        ]
        for link, other in zip(links, found):
            groups = [group.split() for group in link["data-counts"].split(",")]
            kinds = [attrs["data-kinds"].split() for attrs, _ in other.all("article")]
            assert sorted(kinds) == sorted(
                found for count, *found in groups for _ in range(int(count))
            )


def test_text_files_have_a_gallery_too(tmp_path, monkeypatch):
    """CMKP's formats tell neither images nor reasoning nor tokens."""
    (tmp_path / "src.txt").write_text(
        "a cat<sep>cats;pets<sep>https://x.example/abc.jpg\nb<sep>dogs\n"
    )
    (tmp_path / "pred.txt").write_text("cat;dog\n\n")
    out = tmp_path / "g.html"
    run(
        monkeypatch,
        "gallery",
        tmp_path / "pred.txt",
        tmp_path / "src.txt",
        "--out",
        out,
        "--workers",
        1,
    )
    page = Page(out)
    assert [attrs["data-kinds"] for attrs, _ in page.all("article")] == ["right", "wrong"]
    found = [attrs["class"] for attrs, _ in page.all("li") if "class" in attrs]
    assert found == ["found", "missed", "right", "wrong", "missed"]
    assert [text for _, text in page.all("h2")] == ["Post 1 abc", "Post 2"]


# ------------------------------------------------------------------------------------------------------ curves


def step_line(step, **values):
    return {
        "step": step,
        "epoch": 0,
        "loss": 8 / step,
        "cot_share": 0.25,
        "plain_loss": 4 / step,
        "lr": 1e-3 * step,
        "samples": 4,
        "tokens": 40 * step,
        "seconds": 60,
    } | values


def evaluation(step, f1, tokens, unseen=None):
    entry = lambda value: {
        "posts": 0 if value is None else 5,
        "F1@1": value or 0.0,
        "tokens": tokens,
    }
    return {"step": step, "valid": {"posts": 5, "all": entry(f1), "unseen": entry(unseen)}}


def make_run(folder, lines, settings=None, choices=None):
    folder.mkdir()
    write(folder / "log.jsonl", lines)
    (folder / "settings.json").write_text(json.dumps(settings or {"mode": "dynamic", "gamma": 0.4}))
    if choices is not None:
        write(folder / "choices.jsonl", choices)
    return folder


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """curves(run, …): {title of a chart: {name of a line: its points as (step, value)}}, and the Page."""

    def make(*runs):
        run(monkeypatch, "curves", *runs, "--out", tmp_path / "curves.html")
        page, charts = Page(tmp_path / "curves.html"), {}
        for tag, attrs, text in page.elements:
            if tag == "h3":
                lines = charts["".join(text)] = {}
            elif tag == "svg" and "data-x" in attrs:
                axes = [
                    [float(part) for part in attrs[axis].split()] for axis in ("data-x", "data-y")
                ]
            elif tag == "polyline":
                lines[attrs["data-name"]] = [
                    tuple(map(value_at, axes, map(float, point.split(","))))
                    for point in attrs["points"].split()
                ]
        return charts, page

    return make


def value_at(axis, place):
    """The number that stands at a place of an axis (low, high, start, end, whether logarithmic)."""
    low, high, start, end, log = axis
    share = (place - start) / (end - start)
    return low * (high / low) ** share if log else low + share * (high - low)


def near(points, wanted, of):
    """Lines as drawn are as logged, to a two hundredth of the axis or of the value."""
    assert len(points) == len(wanted)
    for (step, value), (wanted_step, wanted_value) in zip(points, wanted):
        assert abs(step - wanted_step) < of / 1000
        assert value == pytest.approx(
            wanted_value, rel=5e-3, abs=5e-3 * max(value for _, value in wanted)
        )


def test_curves_are_what_was_logged(curves, tmp_path):
    steps = range(1, 31)
    one = make_run(
        tmp_path / "one",
        [step_line(step) for step in steps]
        + [evaluation(15, 0.25, 9, 0.5), evaluation(30, 0.75, 12, 0.125)],
    )
    two = make_run(
        tmp_path / "two",
        [step_line(step, plain_loss=None, cot_share=1) for step in steps]
        + [evaluation(30, 0.5, 7)],
        {"mode": "cot"},
    )
    charts, page = curves(one, two)
    assert list(charts) == [
        "Loss",
        "Loss of the plain answer, L(ys)",
        "Samples on CoT",
        "F1@1",
        "F1@1, unseen keyphrases",
        "Tokens generated per post",
        "Tokens trained on per post",
        "Learning rate",
    ]
    for title, of_one, of_two in (
        ("Loss", [(s, 8 / s) for s in steps], [(s, 8 / s) for s in steps]),
        ("Loss of the plain answer, L(ys)", [(s, 4 / s) for s in steps], None),
        ("Samples on CoT", [(s, 25) for s in steps], [(s, 100) for s in steps]),
        ("F1@1", [(15, 25), (30, 75)], [(30, 50)]),
        ("F1@1, unseen keyphrases", [(15, 50), (30, 12.5)], None),
        ("Tokens generated per post", [(15, 9), (30, 12)], [(30, 7)]),
        ("Tokens trained on per post", [(s, 10 * s) for s in steps], [(s, 10 * s) for s in steps]),
        ("Learning rate", [(s, 1e-3 * s) for s in steps], [(s, 1e-3 * s) for s in steps]),
    ):
        assert list(charts[title]) == ["one"] + ["two"] * (of_two is not None), title
        near(charts[title]["one"], of_one, 30)
        if of_two:
            near(charts[title]["two"], of_two, 30)
    assert len(page.all("circle")) == 3 + 2 + 3  # evaluations are marked
    cells = [text for _, text in page.all("td")]
    assert cells == [
        "dynamic",
        "0.4",
        "30",
        "30.0",
        f"{8 / 30:.3f}",
        "25.0",
        "75.0",
        "12.5",
        "12.0",
        "cot",
        "–",
        "30",
        "30.0",
        f"{8 / 30:.3f}",
        "100.0",
        "50.0",
        "–",
        "7.0",
    ]
    swatches = [
        attrs["stroke-dasharray"] for attrs, _ in page.all("path") if "stroke-dasharray" in attrs
    ]
    assert len(set(swatches)) == 2  # told apart without colours


def test_long_logs_are_thinned_to_means(curves, tmp_path):
    draw = random.Random(0)
    losses = [draw.uniform(1, 5) for _ in range(10_000)]
    log = [step_line(step, loss=loss) for step, loss in enumerate(losses, start=1)]
    charts, _ = curves(make_run(tmp_path / "run", log))
    points = charts["Loss"]["run"]
    assert len(points) == 200
    for number, (step, value) in enumerate(points):
        assert step == pytest.approx(50 * number + 25.5, abs=15)
        assert value == pytest.approx(sum(losses[50 * number : 50 * number + 50]) / 50, abs=0.03)
    assert (tmp_path / "curves.html").stat().st_size < 100_000


def test_what_is_no_number_is_left_out(curves, tmp_path):
    odd = [math.nan, math.inf, None, "x", True, 1e300]
    run_folder = make_run(
        tmp_path / "run",
        [step_line(step) for step in range(1, 5)]
        + [step_line(5 + number, loss=value, samples=0) for number, value in enumerate(odd)],
    )
    with open(run_folder / "log.jsonl", "a") as log:
        log.write("\n" + json.dumps(step_line(50)))  # torn before its line end
    charts, page = curves(run_folder)
    near(charts["Loss"]["run"], [(step, 8 / step) for step in range(1, 5)], 10)
    assert (
        len(charts["Learning rate"]["run"]) == 10
        and len(charts["Tokens trained on per post"]["run"]) == 4
    )
    assert "Nothing was logged of: F1@1; " in page.all("p", **{"class": "missing"})[0][1]
    assert (
        "nan"
        not in (tmp_path / "curves.html")
        .read_text()
        .split("</style>")[1]
        .split("<script>")[0]
        .lower()
    )


def test_axes_have_ticks_that_a_reader_can_use():
    draw = random.Random(0)
    for _ in range(2000):
        low = draw.choice([0, 10 ** draw.uniform(-9, 9)])
        high = low + 10 ** draw.uniform(-9, 9)
        for log in (False, True):
            if log and not low:
                continue
            axis = pages.Axis(low, high, 194, 12, log)
            assert axis.low <= low < high <= axis.high or not high - low > 1e-9 * high
            assert 2 <= len(axis.ticks) <= (20 if log else 7) and axis.ticks == sorted(
                set(axis.ticks)
            )
            assert 12 <= axis.place(high) <= axis.place(low) <= 194
    assert list(map(pages.tick_text, [0, 0.0005, 2e-5, 0.25, 5, 2500, 20_000, 1.5e6])) == [
        "0",
        "5e-4",
        "2e-5",
        "0.25",
        "5",
        "2,500",
        "20k",
        "1.5M",
    ]
    assert pages.Axis(0, 900, 0, 1, snug=True).ticks == [0, 250, 500, 750]
    assert pages.Axis(0.3, 7, 0, 1, log=True).ticks == [0.2, 0.5, 1, 2, 5, 10]
    assert pages.Axis(3, 3, 0, 1).place(3) == 0.5


def test_choices_show_losses_gamma_and_switches(curves, tmp_path):
    """Three epochs of four samples, two a step: a and b reason in the second epoch, b turns back in the third."""
    told = [
        {"a": False, "b": False, "c": False, "d": False},
        {"a": True, "b": True, "c": False, "d": False},
        {"a": True, "b": False, "c": False, "d": False},
    ]
    choices = [
        {
            "step": 2 * epoch + 1 + number // 2,
            "id": identity,
            "plain_loss": 0.2 if reasons else 2.0,
            "reasons": reasons,
        }
        for epoch, of_epoch in enumerate(told)
        for number, (identity, reasons) in enumerate(of_epoch.items())
    ]
    log = [step_line(step) for step in range(1, 7)]
    run_folder = make_run(tmp_path / "run", log, choices=choices)
    plain = make_run(
        tmp_path / "cot",
        log,
        {"mode": "cot"},
        [choice | {"plain_loss": None} for choice in choices],
    )
    with open(run_folder / "choices.jsonl", "a") as file:
        file.write('{"step": 6, "id": "a", "plain')
    charts, page = curves(run_folder, plain)
    assert list(charts)[-3:] == [
        "L(ys) of the samples: run",
        "Switched to reasoning",
        "Switched back to the plain answer",
    ]
    near(charts["Switched to reasoning"]["run"], [(3, 100), (4, 0), (5, 0), (6, 0)], 6)
    near(charts["Switched back to the plain answer"]["run"], [(3, 0), (4, 0), (5, 50), (6, 0)], 6)
    median = [value for _, value in charts["L(ys) of the samples: run"]["median"]]
    assert [value == pytest.approx(2, rel=0.3) for value in median] == [
        True,
        True,
        False,
        True,
        False,
        True,
    ]

    (svg,) = [
        attrs
        for attrs, _ in page.all("svg", **{"class": "plot"})
        if "Distribution" in attrs["aria-label"]
    ]
    axis = [float(part) for part in svg["data-y"].split()]
    (gamma,) = [
        float(re.search(r"M\S+ (\S+)H", attrs["d"])[1])
        for attrs, _ in page.all("path", **{"class": "gamma"})
    ]
    assert value_at(axis, gamma) == pytest.approx(0.4, rel=0.01)
    cells = [
        cell
        for attrs, _ in page.all("path", **{"class": "heat"})
        for cell in attrs["d"].split("z")
        if cell
    ]
    assert (
        len(cells) == 5 + 2
    )  # a row at 2.0 in every step but the third, one at 0.2 in the third and the fifth
    for cell in cells:
        left, top, right, bottom = map(
            float, re.fullmatch(r"M(\S+) (\S+)H(\S+)V(\S+)H\S+", cell).groups()
        )
        assert any(
            value_at(axis, bottom) <= loss * 1.01 and loss <= value_at(axis, top) * 1.01
            for loss in (0.2, 2.0)
        )


def test_hostile_runs_stay_text(curves, tmp_path):
    name = "<∕title><script x=\"1\" y='2'>alert(1)"
    log = [step_line(1), step_line(2), evaluation(2, 0.5, 3)]
    choice = {"step": 1, "plain_loss": 1, "reasons": True}
    settings = {"mode": "</td></table><b>\u202e", "gamma": '"x'}
    _, hostile = curves(make_run(tmp_path / name, log, settings, [choice | {"id": "</svg>"}]))
    _, harmless = curves(
        make_run(tmp_path / "harmless", log, {"mode": "sft"}, [choice | {"id": "x"}])
    )
    assert hostile.shape() == harmless.shape()
    assert (
        hostile.all("td")[0][1] == "</td></table><b>\u202e"
        and name in hostile.all("th", scope="row")[0][1]
    )
    assert {attrs["data-name"] for attrs, _ in hostile.all("polyline")} == {name, "median"}
    assert not [
        attrs
        for _, attrs, _ in hostile.elements
        if "href" in attrs or "src" in attrs or "style" in attrs
    ]


# ----------------------------------------------------------------------------------------------- mistakes, and help


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, capsys):
    posts = write(
        tmp_path / "test.jsonl",
        [
            {"id": "1", "text": "t", "image": None, "keyphrases": ["k"]},
            {"id": "2", "text": "t", "image": 5, "keyphrases": ["k"]},
        ],
    )
    good = write(tmp_path / "good.jsonl", [{"id": "1", "text": "t", "keyphrases": ["k"]}])
    preds = write(
        tmp_path / "preds.jsonl", [{"id": "1", "keyphrases": ["k"]}, {"id": "2", "keyphrases": []}]
    )
    one = write(tmp_path / "one.jsonl", [{"id": "1", "keyphrases": ["k"]}])
    log = [step_line(1)]
    fine = make_run(tmp_path / "fine", log)
    make_run(tmp_path / "empty", [])
    make_run(tmp_path / "foreign", [{"loss": 1}])
    make_run(tmp_path / "scoreless", [{"step": 1, "valid": {"all": 3}}])
    make_run(tmp_path / "strange", log, choices=[{"step": 1, "id": 7}])
    (make_run(tmp_path / "torn", log) / "settings.json").write_text("{")
    (make_run(tmp_path / "bad", log) / "log.jsonl").write_text("{}x\n")
    for arguments, message in (
        (["gallery", tmp_path / "none.jsonl", good], "none.jsonl: no such file"),
        (["gallery", one, posts], "no prediction for 1 of 2 posts .*--allow-missing"),
        (["gallery", preds, good], "1 of 2 ids are not in"),
        (["gallery", preds, posts], "test.jsonl line 2 .id 2.: the field 'image'"),
        (["gallery", one, good, "--out", good], "good.jsonl: one of the files to read"),
        (["gallery", one, good, "--out", tmp_path], "a folder; --out"),
        (["gallery", one, good, "--out", good / "x.html"], "can't be written"),
        (["curves", tmp_path / "none"], "none: no log.jsonl in it"),
        (["curves", tmp_path / "empty"], "no training step in it yet"),
        (["curves", tmp_path / "foreign"], "log.jsonl line 1: no 'step'"),
        (["curves", tmp_path / "scoreless"], "log.jsonl line 1: an evaluation without"),
        (["curves", tmp_path / "strange"], "choices.jsonl line 1: no 'id'"),
        (["curves", tmp_path / "torn"], "settings.json: not JSON"),
        (["curves", tmp_path / "bad"], "log.jsonl line 1: not a line of JSON"),
        (["curves", fine, "--out", fine / "log.jsonl"], "log.jsonl: one of the files to read"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *arguments)
    assert json.loads((fine / "log.jsonl").read_text()) == step_line(1)
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob(".*"))


def test_the_command_line_needs_no_torch(tmp_path):
    root = Path(pages.__file__).parent

    def python(*arguments, folder=root):
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=folder
        )

    helped = python("pages.py", "gallery", "--help")
    assert helped.returncode == 0 and "(default: 500)" in helped.stdout
    loaded = python(
        "-c", "import pages, sys; print([m for m in ('torch', 'PIL', 'numpy') if m in sys.modules])"
    )
    assert loaded.stdout.strip() == "[]"
    failed = python(str(root / "pages.py"), "curves", "none", folder=tmp_path)
    assert failed.returncode == 1 and failed.stderr.startswith("error: none: no log.jsonl")
    assert failed.stderr.count("\n") == 1


# ----------------------------------------------------------------------------- what train.py --log-choices writes


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def few(world):
    """A file of 24 training posts: three steps of eight an epoch."""
    return write(world / "few.jsonl", lines(world / "train.jsonl")[:24])


def test_logged_choices_add_up_to_the_log(train_on, few, curves):
    options = ["--gamma", "6.6", "--log-choices"]  # the toy's first losses are around it
    run_folder = train_on("run", *options, "--micro-batch", "3", posts=few)
    choices = lines(run_folder / "choices.jsonl")
    everybody = sorted(post["id"] for post in lines(few))
    for epoch in (0, 1):
        assert (
            sorted(choice["id"] for choice in choices if (choice["step"] - 1) // 3 == epoch)
            == everybody
        )
    for step in lines(run_folder / "log.jsonl"):
        here = [choice for choice in choices if choice["step"] == step["step"]]
        assert len(here) == step["samples"]
        assert sum(choice["plain_loss"] for choice in here) / len(here) == pytest.approx(
            step["plain_loss"], abs=2e-6
        )
        assert sum(choice["reasons"] for choice in here) / len(here) == step["cot_share"]
        assert all(choice["reasons"] == (choice["plain_loss"] < 6.6) for choice in here)
    assert 0 < sum(choice["reasons"] for choice in choices) < len(choices)
    assert "Choices" in [text for _, text in curves(run_folder)[1].all("h2")]
    cot = train_on("cot", "--mode", "cot", "--log-choices", "--epochs", "1", posts=few)
    assert {
        (choice["plain_loss"], choice["reasons"]) for choice in lines(cot / "choices.jsonl")
    } == {(None, True)}


def test_a_resumed_run_has_the_choices_of_the_whole_one(train_on, few, monkeypatch):
    import checkpoint

    whole = train_on("whole", "--log-choices", posts=few)
    save = checkpoint.save

    def save_once(run_folder, step, *rest):
        if step == 6:  # after the steps of the second epoch were logged
            raise KeyboardInterrupt
        return save(run_folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save_once)
    with pytest.raises(KeyboardInterrupt):
        train_on("stopped", "--log-choices", posts=few)
    monkeypatch.undo()
    stopped = whole.parent / "stopped"
    assert lines(stopped / "choices.jsonl")[-1]["step"] == 6
    with open(stopped / "choices.jsonl", "a") as file:
        file.write('{"step": 7, "id"')
    torn = (stopped / "choices.jsonl").read_bytes()
    train_on("stopped", "--log-choices", "--resume", posts=few)
    assert lines(stopped / "choices.jsonl") == lines(whole / "choices.jsonl")
    # Without the setting nothing is written; what lies behind the step is dropped all the same.
    (stopped / "choices.jsonl").write_bytes(torn)
    choices = train.Choices(stopped / "choices.jsonl", 3, False, checkpoint.Processes("cpu"))
    choices.add(None, None, None)
    choices.write(4)
    choices.close()
    first_epoch = [choice for choice in lines(whole / "choices.jsonl") if choice["step"] <= 3]
    assert lines(stopped / "choices.jsonl") == first_epoch
