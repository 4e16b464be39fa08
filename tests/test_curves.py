"""The curves are what was logged, and what a run's name or settings hold stays text."""

import json
import math
import sys

import numpy as np
import pytest

from evaluate import UserError
from tiny import call, lines, write
from tools import curves


def step_line(step, **values):
    losses = {"loss": 8 / step, "plain_loss": 4 / step, "cot_share": 0.25}
    return {"step": step, "samples": 4, "tokens": 40 * step, "seconds": 60} | losses | values


def evaluation(step, f1, tokens, unseen=0.0, posts=5):
    scores = {"all": {"posts": 5, "F1@1": f1, "tokens": tokens}}
    return {"step": step, "valid": scores | {"unseen": {"posts": posts, "F1@1": unseen}}}


def make_run(folder, log, settings=None, choices=None):
    folder.mkdir()
    write(folder / "log.jsonl", log)
    (folder / "settings.json").write_text(json.dumps(settings or {"mode": "dynamic", "gamma": 0.4}))
    if choices is not None:
        write(folder / "choices.jsonl", choices)
    return folder


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(run, …, out=NAME): {title: chart} of the figure that the command has written."""
    pytest.importorskip("matplotlib")
    figures, drawn = [], curves.draw
    monkeypatch.setattr(curves, "draw", lambda logs: figures.append(drawn(logs)) or figures[-1])

    def command(*folders, out="curves.png"):
        call(monkeypatch, curves, *folders, "--out", tmp_path / out)
        return {axes.get_title(loc="left"): axes for axes in figures[-1].axes}

    return command


def near(points, expected):
    assert np.array(points) == pytest.approx(np.array(expected), nan_ok=True)


def test_curves_and_table_are_what_was_logged(draw, tmp_path, capsys):
    """A dynamic run with two evaluations, and one of mode cot with one and a torn last line."""
    steps = range(1, 31)
    evaluations = [evaluation(15, 0.25, 9, 0.5), evaluation(30, 0.75, 12, 0.125)]
    one = make_run(tmp_path / "one", [*map(step_line, steps), *evaluations])
    log = [step_line(step, plain_loss=None, cot_share=1) for step in steps]
    two = make_run(tmp_path / "two", [*log, evaluation(30, 0.5, 7, posts=0)], {"mode": "cot"})
    with open(two / "log.jsonl", "a") as file:
        file.write('{"step": 31, "loss": 9')
    charts = draw(one, two)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == "run mode gamma steps minutes loss on_CoT F1@1 unseen tokens".split()
    assert [row.split() for row in rows] == [
        [str(one), "dynamic", "0.4", "30", "30.0", "0.2667", "25", "75", "12.5", "12"],
        [str(two), "cot", "–", "30", "30.0", "0.2667", "100", "50", "–", "7"],
    ]
    expected = {
        "loss": ([(s, 8 / s) for s in steps], [(s, 8 / s) for s in steps]),
        "plain_loss": ([(s, 4 / s) for s in steps], None),
        "cot_share": ([(s, 25) for s in steps], [(s, 100) for s in steps]),
        "all": ([(15, 25), (30, 75)], [(30, 50)]),
        "unseen": ([(15, 50), (30, 12.5)], None),
        "generated": ([(15, 9), (30, 12)], [(30, 7)]),
        "tokens": ([(s, 10 * s) for s in steps], [(s, 10 * s) for s in steps]),
    }
    assert list(charts) == [curves.PANELS[quantity] for quantity in expected]
    looks = set()
    for quantity, points in expected.items():
        axes = charts[curves.PANELS[quantity]]
        for line, of_run in zip(axes.get_lines(), points, strict=True):
            near(line.get_xydata(), of_run or [(math.nan, math.nan)])
        looks.add(tuple((line.get_linestyle(), line.get_color()) for line in axes.get_lines()))
        assert axes.get_yscale() == ("log" if "loss" in quantity else "linear")
    assert len(looks) == 1  # a run looks the same in all charts
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [str(one), str(two)]
    assert len({dash for dash, _ in looks.pop()}) == 2  # told apart without colors
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_long_logs_are_thinned_to_means_and_what_is_no_number_is_left_out(tmp_path):
    values = np.random.default_rng(0).uniform(1, 5, 12_000)
    log = [step_line(step, loss=loss) for step, loss in enumerate(values, start=1)]
    log += [step_line(12_001, loss=math.nan), step_line(12_002, loss=math.inf)]
    points = curves.read_log(make_run(tmp_path / "run", log), "run").lines["loss"]
    middles = 100 * np.arange(120) + 50.5
    near(points, np.transpose([middles, values.reshape(120, 100).mean(1)]))


def test_choices_are_drawn_with_median_and_gamma(draw, tmp_path):
    draws = np.random.default_rng(0).uniform(0.1, 3, (6, 40))
    choices = [
        {"step": step, "id": str(number), "plain_loss": value, "use_cot": value < 0.4}
        for step, values in enumerate(draws.tolist(), start=1)
        for number, value in enumerate(values)
    ]
    log = [step_line(step) for step in range(1, 7)]
    folder = make_run(tmp_path / "run", log, choices=choices)
    nothing = [choice | {"plain_loss": None} for choice in choices]
    charts = draw(folder, make_run(tmp_path / "cot", log, {"mode": "cot"}, nothing))
    *_, last = charts
    assert last == f"L(yₛ) of {folder}" and len(charts) == 5
    (median,), (gamma,) = charts[last].get_lines(), charts[last].patches
    near(median.get_xydata(), list(enumerate(np.median(draws, axis=1), start=1)))
    assert (gamma.get_y(), gamma.get_height(), gamma.get_label()) == (0.4, 0, "gamma 0.4")
    (mesh,) = charts[last].collections
    counts, corners = mesh.get_array().filled(0), mesh.get_coordinates()
    for step, values in enumerate(draws, start=1):  # a column a step: all samples in their cells
        assert corners[0, step - 1, 0] < step < corners[0, step, 0]
        expected, _ = np.histogram(values, corners[:, 0, 1])
        assert counts[:, step - 1].tolist() == expected.tolist() and sum(expected) == 40


def test_gammas_of_samples_are_a_band(draw, tmp_path):
    choices = [
        {"step": step, "id": "a", "plain_loss": 1, "use_cot": False, "gamma": gamma}
        for step, gamma in enumerate((0.1, 0.3, 0.2), start=1)
    ]
    settings = {"mode": "dynamic", "gamma": "auto"}
    folder = make_run(tmp_path / "run", [step_line(1), step_line(3)], settings, choices)
    (band,) = draw(folder)[f"L(yₛ) of {folder}"].patches
    near([band.get_y(), band.get_height()], [0.1, 0.2])
    assert band.get_label() == "gamma auto"


def test_hostile_runs_stay_text(draw, tmp_path, capsys):
    name = "_<∕title><script x=\"1\" y='2'>alert(1) $x^2$ \\frac{ 東京 \n\a"
    choice = {"step": 1, "id": "</svg>", "plain_loss": 1, "use_cot": True}
    folder = make_run(tmp_path / name, [step_line(1), step_line(2)], None, [choice])
    charts = draw(folder, out="hostile.svg")
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 2 and "Glyph" not in printed.err
    (legend,) = next(iter(charts.values())).figure.legends
    (text,) = legend.get_texts()
    assert text.get_text().endswith("'2'>alert(1) \\$x^2\\$ \\frac{ 東京 \\x07")  # no formula
    assert b"<script" not in (tmp_path / "hostile.svg").read_bytes()


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch):
    log = [step_line(1)]
    make_run(tmp_path / "fine", log)
    make_run(tmp_path / "empty", [])
    make_run(tmp_path / "strange", log, choices=[{"step": 1, "id": 7}])
    for arguments, message in (
        (["empty"], "no training step in its log yet"),
        (["strange"], "choices.jsonl: can't be read .'plain_loss'.; did"),
        (["fine", "--out", "curves.html"], "curves.html: --out must end in .png or .svg"),
    ):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, curves, tmp_path / arguments[0], *arguments[1:])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        call(monkeypatch, curves, tmp_path / "fine", "--out", tmp_path / "curves.png")
    assert not list(tmp_path.glob("*.png"))


def test_logged_choices_add_up_to_the_log(train_on, world):
    few = write(world / "few.jsonl", lines(world / "train.jsonl")[:24])
    options = ["--gamma", "6.6", "--log-choices"]  # the toy's first losses are around it
    folder = train_on("run", *options, "--micro-batch", "3", posts=few)
    choices = lines(folder / "choices.jsonl")
    ids = [choice["id"] for choice in choices]  # of two epochs
    for of_epoch in (ids[:24], ids[24:]):
        assert sorted(of_epoch) == sorted(post["id"] for post in lines(few))
    for step in lines(folder / "log.jsonl"):
        here = [choice for choice in choices if choice["step"] == step["step"]]
        assert len(here) == step["samples"]
        mean = sum(choice["plain_loss"] for choice in here) / len(here)
        assert mean == pytest.approx(step["plain_loss"], abs=2e-6)
        assert sum(choice["use_cot"] for choice in here) / len(here) == step["cot_share"]
        assert all(one["use_cot"] == (one["plain_loss"] < one["gamma"] == 6.6) for one in here)
    assert 0 < sum(choice["use_cot"] for choice in choices) < len(choices)
    cot = train_on("cot", "--mode", "cot", "--log-choices", "--epochs", "1", posts=few)
    told = {(choice["plain_loss"], choice["use_cot"]) for choice in lines(cot / "choices.jsonl")}
    assert told == {(None, True)}
