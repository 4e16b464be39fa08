"""The curves are what was logged, and what a run's name or settings hold stays text."""

import json
import math
import random
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from conftest import ROOT
from evaluate import UserError
from tools import curves

TITLES = {quantity: title for quantity, title, _ in curves.PANELS}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def step_line(step, **values):
    losses = {"loss": 8 / step, "plain_loss": 4 / step, "cot_share": 0.25}
    counts = {"samples": 4, "tokens": 40 * step, "seconds": 60}
    return {"step": step, "epoch": 0, "lr": 1e-3 * step} | losses | counts | values


def evaluation(step, f1, tokens, unseen=None):
    def entry(value):
        return {"posts": 0 if value is None else 5, "F1@1": value or 0.0, "tokens": tokens}

    return {"step": step, "valid": {"posts": 5, "all": entry(f1), "unseen": entry(unseen)}}


def make_run(folder, log, settings=None, choices=None):
    folder.mkdir()
    write(folder / "log.jsonl", log)
    (folder / "settings.json").write_text(json.dumps(settings or {"mode": "dynamic", "gamma": 0.4}))
    if choices is not None:
        write(folder / "choices.jsonl", choices)
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, arguments)])
    return curves.main()


def charts_of(*folders):
    """{logged quantity: {run: its points as (step, value)}} without those that no run has."""
    logs = [curves.read_log(folder, folder.name) for folder in folders]
    charts = {
        quantity: {log.name: log.lines[quantity] for log in logs if quantity in log.lines}
        for quantity in TITLES
    }
    return {quantity: chart for quantity, chart in charts.items() if chart}


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(run, …, out=NAME): the matplotlib figure that the command has written."""
    pytest.importorskip("matplotlib")
    figures, drawn = [], curves.draw
    monkeypatch.setattr(curves, "draw", lambda logs: figures.append(drawn(logs)) or figures[-1])

    def command(*folders, out="curves.png"):
        run(monkeypatch, *folders, "--out", tmp_path / out)
        return figures[-1]

    return command


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def drawn(axes):
    """{label: [(x, y)]} of the lines of a chart that have points."""
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    return {label: line for label, line in points.items() if not math.isnan(line[0][1])}


def near(points, expected):
    assert len(points) == len(expected)
    for point, other in zip(points, expected, strict=True):
        assert point == pytest.approx(other)


def two_runs(tmp_path):
    steps = range(1, 31)
    evaluations = [evaluation(15, 0.25, 9, 0.5), evaluation(30, 0.75, 12, 0.125)]
    one = make_run(tmp_path / "one", [*map(step_line, steps), *evaluations])
    log = [step_line(step, plain_loss=None, cot_share=1) for step in steps]
    two = make_run(tmp_path / "two", [*log, evaluation(30, 0.5, 7)], {"mode": "cot"})
    return one, two


def test_curves_are_what_was_logged(tmp_path):
    steps = range(1, 31)
    charts = charts_of(*two_runs(tmp_path))
    assert list(charts) == "loss plain_loss cot_share all unseen generated tokens lr".split()
    for quantity, of_one, of_two in (
        ("loss", [(s, 8 / s) for s in steps], [(s, 8 / s) for s in steps]),
        ("plain_loss", [(s, 4 / s) for s in steps], None),
        ("cot_share", [(s, 25) for s in steps], [(s, 100) for s in steps]),
        ("all", [(15, 25), (30, 75)], [(30, 50)]),
        ("unseen", [(15, 50), (30, 12.5)], None),
        ("generated", [(15, 9), (30, 12)], [(30, 7)]),
        ("tokens", [(s, 10 * s) for s in steps], [(s, 10 * s) for s in steps]),
        ("lr", [(s, 1e-3 * s) for s in steps], [(s, 1e-3 * s) for s in steps]),
    ):
        assert list(charts[quantity]) == ["one"] + ["two"] * (of_two is not None), quantity
        near(charts[quantity]["one"], of_one)
        if of_two:
            near(charts[quantity]["two"], of_two)


def test_the_table_says_where_runs_ended(tmp_path):
    one, two = two_runs(tmp_path)
    logs = [curves.read_log(folder, folder.name) for folder in (one, two)]
    head, *rows = curves.summary(logs).splitlines()
    loss = f"{8 / 30:.3f}"
    assert head.split() == "run mode gamma steps minutes loss on_CoT F1@1 unseen tokens".split()
    assert [row.split() for row in rows] == [
        ["one", "dynamic", "0.4", "30", "30.0", loss, "25.0", "75.0", "12.5", "12.0"],
        ["two", "cot", "–", "30", "30.0", loss, "100.0", "50.0", "–", "7.0"],
    ]


def test_the_figure_shows_what_was_logged(draw, tmp_path, capsys):
    folders = two_runs(tmp_path)
    charts = charts_of(*folders)
    figure = draw(*folders)
    assert titles(figure) == [TITLES[quantity] for quantity in charts]
    for axes, chart in zip(figure.axes, charts.values(), strict=True):
        assert list(drawn(axes)) == list(chart)
        for name, points in drawn(axes).items():
            near(points, chart[name])
        assert axes.get_xlim() == (0, 30) and axes.get_xlabel() == "step"
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 2 + ["linear"] * 6
    for quantity in ("cot_share", "all", "unseen"):
        assert figure.axes[list(charts).index(quantity)].get_ylim() == (0, 100)
    marked = [line for axes in figure.axes for line in axes.get_lines() if line.get_marker() == "."]
    assert sum((~np_isnan(line)).sum() for line in marked) == 3 + 2 + 3  # evaluations are marked
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    looks = [(line.get_linestyle(), line.get_color()) for line in legend.get_lines()]
    assert len({dash for dash, _ in looks}) == 2  # told apart without colors
    for index, line in enumerate(figure.axes[2].get_lines()):
        assert (line.get_linestyle(), line.get_color()) == looks[index]
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and 20_000 < len(picture) < 300_000
    printed = capsys.readouterr()
    assert printed.out.startswith("run ") and printed.out.count("\n") == 3
    assert printed.err.endswith("curves.png: one, two\n")


def np_isnan(line):
    import numpy as np

    return np.isnan(line.get_ydata().astype(float))


def test_long_logs_are_thinned_to_means(tmp_path):
    draw = random.Random(0)
    losses = [draw.uniform(1, 5) for _ in range(10_000)]
    log = [step_line(step, loss=loss) for step, loss in enumerate(losses, start=1)]
    points = charts_of(make_run(tmp_path / "run", log))["loss"]["run"]
    assert len(points) == 200
    for number, (step, value) in enumerate(points):
        assert step == pytest.approx(50 * number + 25.5)
        assert value == pytest.approx(sum(losses[50 * number : 50 * number + 50]) / 50)


def test_what_is_no_number_is_left_out(tmp_path):
    odd = [math.nan, math.inf, None, "x", True, 1e300]
    log = [step_line(step) for step in range(1, 5)]
    log += [step_line(5 + number, loss=value, samples=0) for number, value in enumerate(odd)]
    folder = make_run(tmp_path / "run", log)
    with open(folder / "log.jsonl", "a") as file:
        file.write("\n" + json.dumps(step_line(50)))  # torn before its line end
    charts = charts_of(folder)
    near(charts["loss"]["run"], [(step, 8 / step) for step in range(1, 5)])
    assert len(charts["lr"]["run"]) == 10 and len(charts["tokens"]["run"]) == 4
    assert "all" not in charts
    assert "nan" not in curves.summary([curves.read_log(folder, "run")])


def test_axes_have_ticks_that_a_reader_can_use(draw, tmp_path):
    choose = random.Random(0)
    for number in range(12):
        low = choose.choice([0, 10 ** choose.uniform(-9, 9)])
        high = low + 10 ** choose.uniform(-9, 9)
        last = choose.choice([2, 3, 30, 10**4, 10**6])
        log = [{"step": 1, "loss": high}, {"step": last, "loss": low}]
        figure = draw(make_run(tmp_path / f"run {number}", log))
        axes = figure.axes[0]
        bottom, top = axes.get_ylim()
        assert bottom <= max(low, high / 1e6) <= high <= top
        for axis, limits in ((axes.yaxis, (bottom, top)), (axes.xaxis, axes.get_xlim())):
            ticks = [tick for tick in axis.get_ticklocs() if limits[0] <= tick <= limits[1]]
            assert 2 <= len(ticks) <= 12
            labels = [text.get_text() for text in axis.get_ticklabels()]
            assert len(set(labels)) == len(labels)
            assert all(float(label.replace(",", "").replace("−", "-")) >= 0 for label in labels)


TOLD = [
    {"a": False, "b": False, "c": False, "d": False},
    {"a": True, "b": True, "c": False, "d": False},
    {"a": True, "b": False, "c": False, "d": False},
]


def run_with_choices(folder):
    """Three epochs of four samples, two a step.

    a and b reason in the second epoch, b turns back in the third.
    """
    choices = [
        {"step": 2 * epoch + 1 + number // 2, "id": identity, "reasons": reasons}
        for epoch, told in enumerate(TOLD)
        for number, (identity, reasons) in enumerate(told.items())
    ]
    for choice in choices:
        choice["plain_loss"] = 0.2 if choice["reasons"] else 2.0
    make_run(folder, [step_line(step) for step in range(1, 7)], choices=choices)
    with open(folder / "choices.jsonl", "a") as file:
        file.write('{"step": 6, "id": "a", "plain')
    return folder, choices


def test_choices_tell_losses_and_switches(tmp_path):
    folder, choices = run_with_choices(tmp_path / "run")
    log = curves.read_log(folder, "run")
    near(log.lines["to_reasoning"], [(3, 100), (4, 0), (5, 0), (6, 0)])
    near(log.lines["back"], [(3, 0), (4, 0), (5, 50), (6, 0)])
    near(log.lines["median"], [(1, 2), (2, 2), (3, 0.2), (4, 2), (5, 1.1), (6, 2)])
    expected = [[choice["step"], choice["plain_loss"]] for choice in choices]
    assert log.losses.tolist() == expected
    nothing = [choice | {"plain_loss": None} for choice in choices]
    plain = make_run(tmp_path / "cot", [step_line(1)], {"mode": "cot"}, nothing)
    log = curves.read_log(plain, "cot")
    assert not len(log.losses) and not {"median", "to_reasoning", "back"} & set(log.lines)


def test_choices_are_drawn_with_median_and_gamma(draw, tmp_path):
    folder, choices = run_with_choices(tmp_path / "run")
    nothing = [choice | {"plain_loss": None} for choice in choices]
    log = [step_line(step) for step in range(1, 7)]
    figure = draw(folder, make_run(tmp_path / "cot", log, {"mode": "cot"}, nothing))
    switches = [TITLES["to_reasoning"], TITLES["back"]]
    assert titles(figure)[-3:] == [*switches, "L(yₛ) of the samples: run"]
    assert list(drawn(figure.axes[-2])) == list(drawn(figure.axes[-3])) == ["run"]
    axes = figure.axes[-1]
    near(drawn(axes)["median"], [(1, 2), (2, 2), (3, 0.2), (4, 2), (5, 1.1), (6, 2)])
    assert {value for _, value in drawn(axes)["gamma 0.4"]} == {0.4}
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == ["median", "gamma 0.4"]
    (mesh,) = axes.collections
    shares, corners = mesh.get_array().filled(0), mesh.get_coordinates()
    cells = {}
    for row, column in zip(*shares.nonzero(), strict=True):
        (left, low), (right, high) = corners[row, column], corners[row + 1, column + 1]
        (loss,) = [loss for loss in (0.2, 2.0) if low <= loss * 1.0001 and loss <= high * 1.0001]
        cells[(left + right) / 2, loss] = shares[row, column]
    # Losses of 2.0 in every step but the third, of 0.2 in the third and the fifth.
    expected = {(step, 2.0): 1.0 for step in (1, 2, 4, 6)}
    assert cells == expected | {(3, 0.2): 1.0, (5, 0.2): 0.5, (5, 2.0): 0.5}


def test_hostile_runs_stay_text(draw, tmp_path, capsys):
    name = "_<∕title><script x=\"1\" y='2'>alert(1) $x^2$ \\frac{ \n\a"
    log = [step_line(1), step_line(2), evaluation(2, 0.5, 3)]
    choice = {"step": 1, "plain_loss": 1, "reasons": True}
    settings = {"mode": "</td></table><b>\u202e", "gamma": '"x'}
    hostile = make_run(tmp_path / name, log, settings, [choice | {"id": "</svg>"}])
    figure = draw(hostile, out="hostile.svg")
    shown = "_<∕title><script x=\"1\" y='2'>alert(1) $x^2$ \\frac{ \\x07"
    shortened = f"{shown[:14]}…{shown[-17:]}"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [shortened]
    assert titles(figure)[-1].endswith(shortened)
    assert not any(text.get_parse_math() for text in legend.get_texts())
    printed = capsys.readouterr().out
    assert "</td></table><b>\\u202e" in printed and printed.count("\n") == 2

    harmless = make_run(tmp_path / "harmless", log, {"mode": "sft"}, [choice | {"id": "x"}])
    draw(harmless, out="harmless.svg")
    hostile_tags, tags = (
        {element.tag for element in ElementTree.parse(tmp_path / f"{name}.svg").iter()}
        for name in ("hostile", "harmless")
    )
    assert hostile_tags == tags and not any(tag.endswith("}script") for tag in tags)


def test_pictures_are_the_same_every_time(draw, tmp_path):
    folder, _ = run_with_choices(tmp_path / "run")
    for suffix in ("png", "SVG"):
        draw(folder, folder, out=f"a.{suffix}")
        draw(folder, folder, out=f"b.{suffix}")
        picture = (tmp_path / f"a.{suffix}").read_bytes()
        assert picture == (tmp_path / f"b.{suffix}").read_bytes()
        assert 20_000 < len(picture) < 600_000
    assert b"<svg" in picture and b"dc:date" not in picture


def test_many_runs_with_long_names(draw, tmp_path):
    names = [f"{'run ' * 50}{number}" for number in range(25)]
    figure = draw(*(make_run(tmp_path / name, [step_line(1), step_line(2)]) for name in names))
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(set(shown)) == 25 and max(map(len, shown)) == 32
    assert len({(line.get_linestyle(), line.get_color()) for line in legend.get_lines()}) == 20
    assert figure.axes[0].get_position().height > 0.1


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch):
    log = [step_line(1)]
    fine = make_run(tmp_path / "fine", log)
    make_run(tmp_path / "empty", [])
    make_run(tmp_path / "foreign", [{"loss": 1}])
    make_run(tmp_path / "scoreless", [{"step": 1, "valid": {"all": 3}}])
    make_run(tmp_path / "strange", log, choices=[{"step": 1, "id": 7}])
    (make_run(tmp_path / "torn", log) / "settings.json").write_text("{")
    (make_run(tmp_path / "bad", log) / "log.jsonl").write_text("{}x\n")
    for arguments, message in (
        (["none"], "none: no log.jsonl in it"),
        (["empty"], "no training step in it yet"),
        (["foreign"], "log.jsonl line 1: no 'step'"),
        (["scoreless"], "log.jsonl line 1: an evaluation without"),
        (["strange"], "choices.jsonl line 1: no 'id'"),
        (["torn"], "settings.json: can't be read"),
        (["bad"], "log.jsonl line 1: not a line of JSON"),
        (["fine", "--out", fine / "log.jsonl"], "log.jsonl: one of the files to read"),
        (["fine", "--out", tmp_path], "a folder; --out"),
        (["fine", "--out", "curves.html"], "curves.html: --out must end in .png or .svg"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, tmp_path / arguments[0], *arguments[1:])
    assert json.loads((fine / "log.jsonl").read_text()) == step_line(1)
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob(".*"))


def python(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command_line_needs_no_torch(tmp_path):
    helped = python("-m", "tools.curves", "--help")
    assert helped.returncode == 0 and "(default: curves.png)" in helped.stdout
    heavy = "[m for m in ('torch', 'PIL', 'numpy', 'matplotlib') if m in sys.modules]"
    loaded = python("-c", f"import tools.curves, sys; print({heavy})")
    assert loaded.stdout.strip() == "[]"
    failed = python("-m", "tools.curves", "none")
    assert failed.returncode == 1 and failed.stderr.startswith("error: none: no log.jsonl")
    assert failed.stderr.count("\n") == 1


def test_a_missing_matplotlib_is_told_in_one_line(tmp_path):
    program = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv[0] = 'curves.py'\n"
        "from tools import curves; curves.run(curves.main)"
    )
    folder = make_run(tmp_path / "run", [step_line(1)])
    failed = python("-c", program, folder, "--out", tmp_path / "curves.png")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: ") and "pip install matplotlib" in failed.stderr
    assert failed.stdout.startswith("run ")  # the table needs no picture
    assert not (tmp_path / "curves.png").exists()


def test_logged_choices_add_up_to_the_log(train_on, world):
    few = write(world / "few.jsonl", lines(world / "train.jsonl")[:24])  # three steps an epoch
    options = ["--gamma", "6.6", "--log-choices"]  # the toy's first losses are around it
    folder = train_on("run", *options, "--micro-batch", "3", posts=few)
    choices = lines(folder / "choices.jsonl")
    everybody = sorted(post["id"] for post in lines(few))
    for epoch in (0, 1):
        here = [choice["id"] for choice in choices if (choice["step"] - 1) // 3 == epoch]
        assert sorted(here) == everybody
    for step in lines(folder / "log.jsonl"):
        here = [choice for choice in choices if choice["step"] == step["step"]]
        assert len(here) == step["samples"]
        mean = sum(choice["plain_loss"] for choice in here) / len(here)
        assert mean == pytest.approx(step["plain_loss"], abs=2e-6)
        assert sum(choice["reasons"] for choice in here) / len(here) == step["cot_share"]
        assert all(choice["reasons"] == (choice["plain_loss"] < 6.6) for choice in here)
    assert 0 < sum(choice["reasons"] for choice in choices) < len(choices)
    log = curves.read_log(folder, "run")
    assert len(log.losses) == len(choices) and {"median", "to_reasoning"} <= set(log.lines)
    cot = train_on("cot", "--mode", "cot", "--log-choices", "--epochs", "1", posts=few)
    told = {(choice["plain_loss"], choice["reasons"]) for choice in lines(cot / "choices.jsonl")}
    assert told == {(None, True)}
