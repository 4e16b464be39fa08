"""What a run shows: header, bar, validation, end, the word on the toy."""

import json
import re
import shlex
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file

import evaluate
import infer
import train
from data import Posts, TrainingOrder
from support.checkpoint import read_pointer
from support.log import TrainingLog
from tiny import call, lines, words, write


def paragraphs(text):
    """{label: text} of a header's paragraphs, each on one line."""
    return dict(re.findall(r"^(\S.{9}) (.*)$", text.replace("\n" + " " * 11, " "), re.MULTILINE))


def test_the_header_the_validation_and_the_end_of_a_run(world, tmp_path, monkeypatch, capsys):
    """Its figures are those of the files; its three commands run as they are printed."""
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "my own files"  # what has to be quoted
    records = lines(world / "train.jsonl")[:32]
    for record in records:
        record["image"] = str(world / record["image"])
    for record in records[:5]:
        record["image"] = None
    for record in records[3:10]:
        record["cot"] = " "
    records[0]["keyphrases"] = ["one", "two", "three", "four"]
    posts, valid = write(folder / "train.jsonl", records), world / "valid.jsonl"
    files = ["--train", posts, "--valid", valid, "--model", world / "toy", "--out", folder / "run"]
    sizes = "--epochs 0.75 --batch-size 8 --workers 0 --max-new-tokens 6 --freeze-vision"
    assert call(monkeypatch, train, *words(*files, sizes, "--valid-posts 4 --lr 2e-3")) == 0
    shown = capsys.readouterr().err.replace("\r", "\n")
    header = paragraphs(shown)
    phrases = sum(len(record["keyphrases"]) for record in records)
    assert header["Posts     "] == (
        f"{posts}: 32 posts, 27 with an image, 25 with reasoning, {phrases / 32:.1f} keyphrases "
        "a post"
    )
    assert header["Validation"].startswith(f"{valid}: 8 posts, 8 with an image, 8 with reasoning")
    assert header["Validation"].endswith("; the first 4 are used")
    last = read_pointer(folder / "run" / "last")
    sizes = {name: weight.numel() for name, weight in load_file(last / "model.safetensors").items()}
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
    assert f"saving {last} …" in shown

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
    assert end["Best, last"] == f"{last}: validation F1@1 {expected[0]} all, {expected[1]} unseen"
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


def test_evaluations_as_good_as_the_best_with_nothing_right_and_without_unseen_keyphrases(
    tmp_path, capsys
):
    (tmp_path / "valid.jsonl").touch()
    args = train.parse_args(words("--train t --batch-size 10 --valid", tmp_path / "valid.jsonl"))
    scores = {name: {"posts": 2, "F1@1": 0.5} for name in ("all", "unseen")} | {"cut": 0}
    scores["all"]["F1@M"] = 0.5
    scores["all"] |= {"tokens": 15.24, "reasoned": 0.584}
    scores["unreadable"] = 3
    from support.distributed import Ranks

    row, order = train.MODES["dynamic"], TrainingOrder(25, 10, 0, 3)
    for step in (3, 7, 9):
        (tmp_path / f"step-{step}").mkdir()
    with Ranks("cpu") as ranks, TrainingLog(args, row, tmp_path, order, 0, ranks) as log:
        log.add_evaluation(3, scores)
        scores["unseen"]["posts"] = scores["unreadable"] = 0
        log.add_evaluation(7, scores)  # of two that are as good the later one is best
        scores["all"] |= {"F1@1": 0.0, "F1@M": 0.0}
        log.add_evaluation(9, scores)
        log.add_evaluation(10, scores)
    printed = capsys.readouterr().err
    assert printed.count("no keyphrase is right: is the loss still high?") == 1
    shown = re.findall(r"epoch .*", printed)
    both = "F1@1 50.0 all, 50.0 unseen  15.2 tokens a post, 58% reasoned  3 images unreadable"
    assert shown == [
        f"epoch 1  step 3  {both}  (best)",
        "epoch 2.33  step 7  F1@1 50.0 all  15.2 tokens a post, 58% reasoned  (best)",
        "epoch 3  step 9  F1@1 0.0 all  15.2 tokens a post, 58% reasoned",
        "epoch 3.33  step 10  F1@1 0.0 all  15.2 tokens a post, 58% reasoned",
    ]


def test_the_toy_says_that_it_is_one(world, train_on, tmp_path, monkeypatch, capsys):
    """One line for a photo, none for its own world's pictures; with every checkpoint of a toy."""
    run = train_on("run", "--epochs 0.1")
    photo = tmp_path / "my photo.jpg"
    Image.new("RGB", (300, 200)).save(photo)
    drawn = Posts(world / "test.jsonl").image_path(lines(world / "test.jsonl")[0])
    capsys.readouterr()
    for image, told in ((photo, 1), (drawn, 0), ("none", 0)):
        post = [str(image), "it's two\nlines", "--model", str(run), "--max-new-tokens", "4"]
        assert call(monkeypatch, infer, *post) == 0
        assert capsys.readouterr().err.count("this model knows only the club world") == told
    own = shutil.copy(world / "train.jsonl", tmp_path)  # the posts of somebody who has photos
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"train": str(own)}))
    post = [str(photo), "a text", "--model", str(run), "--max-new-tokens", "4"]
    assert call(monkeypatch, infer, *post) == 0 and "knows only" not in capsys.readouterr().err
    record = lines(world / "test.jsonl")[0]
    for image, told in ((photo, 1), (drawn, 0)):
        posts = write(tmp_path / f"{told}.jsonl", [record | {"image": str(image)}])
        files = ["--data", posts, "--out", tmp_path / f"{told}.preds", "--model", world / "toy"]
        assert call(monkeypatch, infer, *words(*files, "--workers 0 --max-new-tokens 2")) == 0
        assert capsys.readouterr().err.count("knows only the club world") == told
