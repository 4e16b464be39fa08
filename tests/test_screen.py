"""What a run shows: header, bar, validation, end, the word on the toy; the page of transcripts."""

import io
import itertools
import json
import re
import shlex
import sys
import time

import numpy as np
import pytest
from PIL import Image

import evaluate
import gen_cot
import infer
import make_transcripts
import train
from data import Posts
from evaluate import read_lines
from support import bars
from support.bars import WITHOUT_RATE, Bar, busy, reading_progress
from support.checkpoint import read_pointer
from support.images import from_club_world
from support.log import TrainingLog
from support.screen import bar_text
from tiny import words
from tools.clubworld import SCENES, draw_scene, draw_shirt, make_clubs


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(monkeypatch, module, *arguments):
    """`python MODULE ARGUMENTS` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    return module.main() or 0


def paragraphs(text):
    """{label: text} of a header's paragraphs, each on one line."""
    return dict(re.findall(r"^(\S.{9}) (.*)$", text.replace("\n" + " " * 11, " "), re.MULTILINE))


# ------------------------------------------------------------------------------------- a whole run


def test_the_header_the_validation_and_the_end_of_a_run(world, tmp_path, monkeypatch, capsys):
    """Its figures are those of the files; its three commands run as they are printed."""
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "my own files"  # what has to be quoted
    folder.mkdir()
    records = lines(world / "train.jsonl")[:32]
    for record in records:
        record["image"] = str(world / record["image"])
    for record in records[:5]:
        record["image"] = None
    for record in records[3:10]:
        record["cot"] = " "
    records[0]["keyphrases"] = ["one", "two", "three", "four"]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    posts, valid = folder / "train.jsonl", world / "valid.jsonl"
    files = ["--train", posts, "--valid", valid, "--model", world / "toy", "--out", folder / "run"]
    sizes = "--epochs 0.75 --batch-size 8 --workers 0 --max-new-tokens 6 --freeze-vision"
    assert call(monkeypatch, train, *words(*files, sizes, "--valid-posts 4 --lr 2e-3")) == 0
    shown = capsys.readouterr().err.replace("\r", "\n")
    header = paragraphs(shown)
    phrases = sum(len(record["keyphrases"]) for record in records)
    assert header["Posts     "] == (
        f"{posts}: 32 posts, 27 with an image, 25 with reasoning, {phrases / 32:.1f} keyphrases "
        "per post"
    )
    assert header["Validation"].startswith(f"{valid}: 8 posts, all with an image, all with")
    assert header["Validation"].endswith("; the first 4 are used")
    from safetensors import safe_open

    last = read_pointer(folder / "run" / "last")
    with safe_open(last / "model.safetensors", "pt") as weights:
        sizes = {name: weights.get_tensor(name).numel() for name in weights.keys()}  # noqa: SIM118
    trained = sum(size for name, size in sizes.items() if "visual" not in name)
    assert header["Model     "] == (
        f"{world / 'toy'}: {sum(sizes.values()) / 1e6:.2f} million parameters, "
        f"{f'{trained / 1e6:.2f} million' if trained >= 1e6 else f'{trained:,}'} of them trained"
    )
    assert header["Device    "] == "CPU, float32, 1 rank"
    assert header["Steps     "].startswith(
        "3 with 8 posts each, 0.75 epochs; mode dynamic, gamma 0.4"
    )
    assert header["Writes    "] == str(folder / "run")
    assert f"saving {last} … 00:0" in shown

    (line,) = [line for line in lines(folder / "run" / "log.jsonl") if "valid" in line]
    scores = line["valid"]
    told = re.search(
        r"^epoch 0\.75  step 3  F1@1 (\S+) all, (\S+) unseen  (\S+) tokens a post, (\d+)% reasoned"
        r"(?:  (\d+) cut off)?  \(best\)$",
        shown,
        re.MULTILINE,
    )
    expected = [f"{100 * scores[name]['F1@1']:.1f}" for name in ("all", "unseen")]
    expected += [f"{scores['all']['tokens']:.1f}", f"{100 * scores['all']['reasoned']:.0f}"]
    assert list(told.groups()) == [*expected, str(scores["cut"]) if scores["cut"] else None]

    end = paragraphs(shown[shown.index("Done ") :])
    assert re.fullmatch(r"in \d+ s, peak memory \d+\.\d GiB", end["Done      "])
    assert end["Best, last"] == f"{last}: F1@1 {expected[0]} all, {expected[1]} unseen"
    commands = {name: shlex.split(end[f"{name:<10}"]) for name in ("Predict", "Score", "Curves")}
    assert commands["Predict"][:2] == ["python", "infer.py"]
    assert call(monkeypatch, infer, *commands["Predict"][2:], "--workers", "0") == 0
    header = paragraphs(capsys.readouterr().err.replace("\r", "\n"))
    assert header["Model     "].startswith(f"{last}: {sum(sizes.values()) / 1e6:.2f} million")
    assert header["Writes    "] == str(folder / "run" / "preds.jsonl")
    assert commands["Score"][:2] == ["python", "evaluate.py"]
    assert call(monkeypatch, evaluate, *commands["Score"][2:]) == 0
    assert capsys.readouterr().out.split("\n")[1].split()[:2] == ["posts", "8"]
    assert commands["Curves"][:3] == ["python", "-m", "tools.curves"]
    pytest.importorskip("matplotlib", reason="curves need the optional package")
    from tools import curves

    assert call(monkeypatch, curves, *commands["Curves"][3:]) == 0
    assert (folder / "run" / "curves.png").is_file()


def test_an_evaluation_that_is_not_the_best_and_one_without_unseen_keyphrases(tmp_path, capsys):
    args = train.parse_args(["--train", "t", "--batch-size", "10"])
    scores = {name: {"posts": 2, "F1@1": 0.5} for name in ("all", "unseen")} | {"cut": 0}
    scores["all"] |= {"tokens": 15.24, "reasoned": 0.584}
    scores["unreadable"] = 3
    from support.distributed import Ranks

    with Ranks("cpu") as ranks, TrainingLog(args, tmp_path, 0, 9, 25, ranks) as log:
        log.add_evaluation(3, scores)
        scores["unseen"]["posts"] = scores["unreadable"] = 0
        log.add_evaluation(7, scores)
    shown = re.findall(r"epoch .*", capsys.readouterr().err)
    both = "F1@1 50.0 all, 50.0 unseen  15.2 tokens a post, 58% reasoned  3 images unreadable"
    assert shown == [
        f"epoch 1  step 3  {both}  (best)",
        "epoch 2.33  step 7  F1@1 50.0 all  15.2 tokens a post, 58% reasoned",
    ]


# ------------------------------------------------------------------------------------------- bars


def bar_at(clock, **options):
    """A Bar whose clock is `clock[0]`, on a terminal of its own."""
    bar = Bar(file=io.StringIO(), **options)
    bar._time, bar.start_t = lambda: clock[0], clock[0]
    return bar


def test_no_forecast_from_a_slow_first_step():
    """A first step of 100 s, and then one a second: of 900 there are 15 minutes to go, not 25 h."""
    clock = [0.0]
    bar = bar_at(clock, total=901, bar_format=WITHOUT_RATE, ncols=80)
    for seconds in (100, 1, 1):
        assert "<?]" in str(bar) or seconds == 1
        clock[0] += seconds
        bar.n += 1
        shown = str(bar)
        assert ("<?]" in shown) == (seconds == 100), shown
    assert "3/901 [01:42<14:58]" in shown
    bar.close()
    resumed = bar_at(clock, total=10, initial=4)
    assert "4/10 [00:00<?, ?it/s]" in str(resumed)
    resumed.n, clock[0] = 5, clock[0] + 9
    assert "5/10 [00:09<?, ?it/s]" in str(resumed)
    resumed.n, clock[0] = 6, clock[0] + 2
    assert "6/10 [00:11<00:08,  2.00s/it]" in str(resumed)
    resumed.close()


@pytest.mark.parametrize("loss, share, speed", [(0.337, 0.583, 12_345), (12.3456, 1, 999.4)])
def test_the_training_bar_fits_80_columns(loss, share, speed):
    """A long run of the largest data set, five epochs of 10,332 steps, after ten hours."""
    clock = [0.0]
    for columns in (79, 59, None):  # tqdm leaves the last column free
        bar = bar_at(clock, total=51_660, bar_format=WITHOUT_RATE, ncols=columns)
        bar.n = 1
        str(bar)
        bar.n, clock[0] = 25_831, clock[0] + 37_425
        bar.set_postfix_str(bar_text(loss, share, speed), refresh=False)
        shown = str(bar)
        whole = (
            f"loss {loss:.3f}, {share:.0%} on CoT, {'12.3k' if speed > 1e3 else '999'} tokens/s]"
        )
        assert "25831/51660 [10:23:45<10:2" in shown
        assert shown.endswith(whole) == (columns != 59), shown
        assert columns is None or len(shown) <= columns
        bar.close()


def test_a_bar_goes_on_while_nothing_comes_and_busy_says_what_for(monkeypatch):
    monkeypatch.setattr(bars, "TICK", 0.01)
    screen = io.StringIO()
    with busy("loading the weights", file=screen) as bar:
        for _ in range(1000):
            if screen.getvalue().count("loading the weights … 00:") > 2:
                break
            time.sleep(0.01)
    assert screen.getvalue().count("loading the weights … 00:") > 2
    assert bar.closed.is_set() and screen.getvalue().endswith("\r")  # nothing of it is left
    assert make_transcripts.screen(screen.getvalue(), 80) == [""]


def test_reading_a_file_passes_its_lines_on_and_counts_its_bytes(tmp_path, monkeypatch):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f"line {number}\n" for number in range(2500)))
    made = []
    monkeypatch.setattr(bars, "Bar", lambda **options: made.append(Bar(**options)) or made[0])
    found, places = [], []
    for item in reading_progress(read_lines(path), path):
        found.append(item)
        places.append(made[0].n)
    assert found == list(read_lines(path)) and made[0].total == path.stat().st_size
    offsets = [offset for _, offset, _ in found]
    assert [places[0], places[1000], places[-1]] == [0, offsets[999], offsets[1999]]


# -------------------------------------------------------------------------------- the other headers


def test_gen_cot_says_what_it_sends_where(world, tmp_path, monkeypatch, capsys):
    from server import Server

    monkeypatch.setenv("COLUMNS", "200")
    data, out = world / "valid.jsonl", tmp_path / "cot.jsonl"
    with Server() as server:
        args = ["--out", out, "--model", "teacher", "--base-url", server.url, "--workers", "3"]
        call(monkeypatch, gen_cot, *map(str, [data, *args]))
    header = paragraphs(capsys.readouterr().err.replace("\r", "\n"))
    assert header["Posts     "].startswith(
        f"{data}: 8 posts, all with an image, all with reasoning"
    )
    assert header["Model     "] == f"teacher at {server.url}/chat/completions, 3 requests at a time"
    assert header["Writes    "] == str(out)


# --------------------------------------------------------------------------------------- the toy


def photos():
    """Pictures of 84 x 84 pixels that are no drawings: gradients, noise, JPEG, one colour."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:240, 0:320] / 240
    for noise, quality, way in itertools.product((0, 3, 25), (30, 90), (0, 3, 4)):
        slopes = rng.uniform(-150, 150, (2, 3))
        colours = x[..., None] * slopes[0] + y[..., None] * slopes[1] + rng.uniform(60, 200, 3)
        colours += rng.normal(0, noise, colours.shape)
        image = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        image = Image.open(file).convert("RGB")
        yield image.resize((84, 84), way)
        yield image.crop((0, 0, 84, 84))
        yield image.convert("L").convert("RGB").resize((84, 84), way)
    for colour in ("white", "black", (120, 130, 200)):
        yield Image.new("RGB", (84, 84), colour)


def test_drawings_of_the_club_world_are_told_from_photos():
    rng, count = np.random.default_rng(1), 0
    for seed in (0, 1, 100):
        for club in make_clubs(seed):
            for _ in range(3):
                assert from_club_world(draw_shirt(rng, club))
                count += 1
        for scene in 40 * SCENES:
            assert from_club_world(draw_scene(rng, scene))
    assert count == 3 * 32 * 3
    assert not [image for image in photos() if from_club_world(image)]
    assert not from_club_world(draw_scene(rng, "cup").resize((168, 168)))


def test_the_toy_says_that_it_is_one(world, train_on, tmp_path, monkeypatch, capsys):
    """One line for a photo, none for its own world's pictures; with every checkpoint of a toy."""
    run = train_on("run", "--epochs 0.1")
    photo = tmp_path / "my photo.jpg"
    next(photos()).resize((300, 200)).save(photo)
    drawn = Posts(world / "test.jsonl").image_path(lines(world / "test.jsonl")[0])
    capsys.readouterr()
    for image, told in ((photo, True), (drawn, False), ("none", False)):
        post = [str(image), "it's two\nlines", "--model", str(run), "--max-new-tokens", "4"]
        assert call(monkeypatch, infer, *post) == 0
        shown = capsys.readouterr().err.splitlines()
        shown = [line for line in shown if "cut off" not in line]
        assert len(shown) == told
        if told:
            assert "this model knows only the club world; a real photo needs a real" in shown[0]
            command = shlex.split(shown[0].partition("model: ")[2])
            assert command[2:4] == [str(photo), "it's two lines"]
            assert command[4:] == ["--model", "Qwen/Qwen2.5-VL-3B-Instruct"]

    records = lines(world / "test.jsonl")[:3]
    for record in records:
        record["image"] = str(world / record["image"])
    for name, told in (("drawn", 0), ("photo", 1)):
        if told:
            records[1]["image"] = records[2]["image"] = str(photo)
        posts = tmp_path / f"{name}.jsonl"
        posts.write_text("".join(json.dumps(record) + "\n" for record in records))
        files = ["--data", posts, "--out", tmp_path / f"{name}.preds", "--model", world / "toy"]
        assert call(monkeypatch, infer, *words(*files, "--workers 0 --max-new-tokens 2")) == 0
        shown = capsys.readouterr().err
        assert shown.count("knows only the club world") == told
        if told:
            assert "knows only the club world" in shown.splitlines()[-1]


def test_another_model_is_not_taken_for_the_toy(world, tmp_path, capsys):
    from support.screen import say_toy

    next(photos()).save(tmp_path / "photo.jpg")
    record = {"text": "a"}
    say_toy(tmp_path, [record], lambda _: tmp_path / "photo.jpg")
    assert capsys.readouterr().err == ""
    say_toy(world / "toy", [record], lambda _: tmp_path / "none.jpg")  # an error of its own
    assert capsys.readouterr().err == ""
    say_toy(world / "toy", [record], lambda _: tmp_path / "photo.jpg")
    assert "knows only the club world" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- transcripts


def shape(text):
    """A transcript without its figures, bars and line breaks, and without the machine's name."""
    text = re.sub(r"Device .*", "", text)
    text = re.sub(r"peak memory .*", "", text)
    text = re.sub(r"\s+|\(best\s*\)", "", text)
    return re.sub(r"\|[█▏▎▍▌▋▊▉]*\|", "||", re.sub(r"\d[\d.,:]*[kM]?", "0", text))


def test_the_transcripts_in_the_docs_are_what_runs_show(tmp_path):
    page = make_transcripts.PAGE.read_text(encoding="utf-8")
    documented = dict(re.findall(r"## ([^\n]*)\n\n```text\n(.*?)\n```\n", page, re.DOTALL))
    found = make_transcripts.transcripts(tmp_path)
    assert list(documented) == list(found)
    for title, shown in found.items():
        assert shape(documented[title]) == shape("\n".join(shown)), title
        assert max(map(len, shown)) <= 80
