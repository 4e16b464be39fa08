"""Files of predictions and posts, and the command line of evaluate.py."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
from itertools import product

import pytest

import evaluate
from evaluate import (
    MEASURES,
    UserError,
    digest,
    read_jsonl,
    read_predictions,
    read_references,
    score,
)
from test_evaluate import HERE, POSTS, PREDICTIONS
from tiny import write

CMKP = HERE.parent.parent / "shared" / "data" / "cmkp" / "test_src.txt"
KNOWN = [phrase for post in POSTS for phrase in post["keyphrases"]]


# -------------------------------------------------------------------------------------------- files


def test_jsonl_yields_lines_offsets_and_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\r\n  \n{"b": 1}\n{"c": "\xe2\x80\xa8"}')
    rows = list(read_jsonl(path))
    found = [(number, record) for number, _, record in rows]
    assert found == [(1, {"a": "é"}), (4, {"b": 1}), (5, {"c": "\u2028"})]
    raw = path.read_bytes()
    for number, offset, record in rows:
        assert evaluate.parse_line(path, number, raw[offset:].split(b"\n")[0] + b"\n") == record


@pytest.mark.parametrize(
    "content, part",
    [
        (b"[1, 2]\n", "line 2: a JSON object"),
        (b'{"a": "\xff"}\n', "line 2: not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (gzip.compress(b'{"a": 1}\n', mtime=0), "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not a line of JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "line 2"),
        (b'{"a": 1} {"b": 2}\n', "line 2"),
    ],
)
def test_jsonl_names_the_line_that_is_wrong(tmp_path, content, part):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"{}\n" + content)
    rows = read_jsonl(path)
    assert next(rows)[2] == {}  # it streams
    with pytest.raises(UserError) as error:
        next(rows)
    text = str(error.value)
    assert str(path) in text and part in text and len(text) < 400


def test_cmkp_text(tmp_path):
    lines = ["a b ; c<sep>x;y z <sep>http://host/D0wn_-9.jpg", " t<sep>k "]
    path = write(tmp_path / "src.txt", lines)
    first, second = read_references(path)
    assert (first["text"], first["id"], first["keyphrases"]) == ("a b ; c", "D0wn_-9", ["x", "y z"])
    assert (second["text"], second["id"], second["keyphrases"]) == ("t", None, ["k"])
    assert list(evaluate.train_keyphrases(path)) == ["x", "y z", "k"]


def test_cmkp_predictions(tmp_path):
    path = tmp_path / "preds.txt"
    path.write_bytes(b"a;b c\r\n\r\n;;x;\r\n\xe2\x80\xa8y")
    found = [prediction["keyphrases"] for prediction in read_predictions(path)]
    assert found == [["a", "b c"], [], ["", "", "x", ""], ["\u2028y"]]


def test_jsonl_is_recognised_by_its_content(tmp_path):
    for name in ("preds", "preds.txt", "preds.jsonl"):
        path = write(tmp_path / name, ["", *PREDICTIONS])
        assert read_predictions(path) == PREDICTIONS


BAD_FIELDS = [("id", None), ("id", 7), ("keyphrases", None), ("keyphrases", "x;y")]
BAD_FIELDS += [("keyphrases", [1]), ("think", 7), ("tokens", "7"), ("tokens", True)]
BAD_FIELDS += [("tokens", float("nan")), ("tokens", 10**400)]
BAD_FIELDS = [(read_predictions, PREDICTIONS, *bad) for bad in BAD_FIELDS]
BAD_FIELDS += [(read_references, POSTS, name, [None]) for name in ("id", "text", "keyphrases")]


@pytest.mark.parametrize("reader, rows, field, value", BAD_FIELDS)
def test_bad_fields_are_named(tmp_path, reader, rows, field, value):
    path = write(tmp_path / "a.jsonl", [rows[0], rows[1] | {field: value}])
    with pytest.raises(UserError, match=f"a.jsonl line 2: the field '{field}'"):
        reader(path)


def test_a_package_that_does_not_fit_another_is_told_in_one_line(capsys):
    def main():
        raise ImportError("Could not import module 'AutoImageProcessor'")

    with pytest.raises(SystemExit, match="1"):
        evaluate.run(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Could not import") and "pip uninstall torchvision" in line


def test_predictions_of_other_posts_under_the_same_ids(tmp_path):
    made = [
        row | {"post": digest(post["text"])} for row, post in zip(PREDICTIONS, POSTS, strict=True)
    ]
    path = write(tmp_path / "p.jsonl", made)
    assert evaluate.align(read_predictions(path), POSTS) == made
    others = [POSTS[0], *(post | {"text": "another"} for post in POSTS[1:])]
    with pytest.raises(UserError, match="other texts than those of 2 of 3 posts .* 'p2', 'p3'"):
        evaluate.align(read_predictions(path), others)
    spelt = [post | {"text": f" {post['text']}  "} for post in POSTS]
    assert evaluate.align(made, spelt) == made
    assert digest("rock &amp; café") == digest("rock & cafe\u0301")


def test_align_by_id_and_by_line():
    assert evaluate.align(PREDICTIONS[::-1], POSTS) == PREDICTIONS
    text = [{"id": None, "keyphrases": [name]} for name in "abc"]
    assert evaluate.align(text, POSTS) == text
    cmkp = [{**post, "address": f"http://host/{post['id']}.jpg"} for post in POSTS]
    # The names of the images are these predictions' ids, and not those of the others.
    assert evaluate.align(PREDICTIONS[::-1], cmkp) == PREDICTIONS
    others = [{**prediction, "id": f"line {i}"} for i, prediction in enumerate(PREDICTIONS)]
    assert evaluate.align(others, cmkp) == others


# --------------------------------------------------------------------------------- the command line


@pytest.fixture
def files(tmp_path):
    """The same posts and predictions as JSONL and as CMKP's text."""
    contents = {"preds.jsonl": PREDICTIONS[::-1], "test.jsonl": POSTS}
    contents["preds.txt"] = [";".join(prediction["keyphrases"]) for prediction in PREDICTIONS]
    contents["test.txt"] = [
        f"{post['text']}<sep>{';'.join(post['keyphrases'])}<sep>http://host/{post['id']}.jpg"
        for post in POSTS
    ]
    return {name: write(tmp_path / name, rows) for name, rows in contents.items()}


@pytest.fixture
def script(monkeypatch, capsys):
    """script(*arguments): the exit code, output and errors of evaluate.py, in this process."""
    monkeypatch.setattr(evaluate.gc, "disable", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            evaluate.run(evaluate.main)
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def scores_of(script):
    """scores_of(*arguments): what evaluate.py prints as JSON."""
    return lambda *arguments: json.loads(script(*arguments, "--json")[1])


@pytest.fixture
def refused(script):
    """refused(arguments, *parts): evaluate.py prints one line of error with these parts."""

    def run(arguments, *parts):
        code, out, err = script(*arguments)
        assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1, err
        assert all(part in err for part in parts), err

    return run


def test_all_combinations_of_formats_give_the_same(files, scores_of):
    bare = [{"keyphrases": prediction["keyphrases"]} for prediction in PREDICTIONS]
    posts = files["test.jsonl"], files["test.txt"]
    for name, predictions in (("preds.jsonl", PREDICTIONS), ("preds.txt", bare)):
        expected = score(predictions, POSTS, KNOWN)
        for references, train in product(posts, posts):
            assert scores_of(files[name], references, "--train", train) == expected


def test_table_shows_percent(files, script):
    code, out, _ = script(files["preds.jsonl"], files["test.jsonl"], "--train", files["test.txt"])
    lines = out.splitlines()
    assert code == 0 and out == evaluate.table(score(PREDICTIONS, POSTS, KNOWN)) + "\n"
    assert lines[0].split() == ["all", "present", "absent", "seen", "unseen", "absent+unseen"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert cells["posts"] == ["3", "2", "2", "3", "0", "0"]
    assert cells["keyphrases"] == ["5", "2", "3", "5", "0", "0"]
    assert cells["P@1"] == ["33.33", "100.00", "0.00", "66.67", "-", "-"]
    assert cells["tokens"][:3] == ["7.0", "8.0", "8.5"] and cells["reasoned"][0] == "33.33"
    assert len({len(line) for line in lines}) == 1 and set(MEASURES) <= set(cells)


def test_bootstrap_option(files, script, scores_of):
    arguments = [files["preds.txt"], files["test.txt"], "--bootstrap", 50, "--seed"]
    scores, again, other = (scores_of(*arguments, seed) for seed in (1, 1, 2))
    assert scores == again != other
    for name in ("all", "present", "absent"):
        assert set(scores[name]["interval"]) == set(MEASURES)
        assert all(low <= high for low, high in scores[name]["interval"].values())
    lines = script(*arguments, 1, "--train", files["test.txt"])[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("95% CI  "))
    row = next(line.split() for line in lines[start:] if line.startswith("F1@1 "))
    low, high = scores["all"]["interval"]["F1@1"]
    assert row[:2] == ["F1@1", f"{100 * low:.1f}-{100 * high:.1f}"]
    assert max(map(len, lines)) <= 80


def test_against_flips_its_sign(files, tmp_path, script, scores_of):
    other = write(tmp_path / "other.txt", ["gardening", "dog", "weather;storm hour"])
    ours, posts = files["preds.jsonl"], files["test.jsonl"]
    there = scores_of(ours, posts, "--against", other)
    back = scores_of(other, posts, "--against", ours)
    for name in ("all", "present", "absent"):
        assert set(there["against"][name]) == set(MEASURES)
        for measure, pair in there["against"][name].items():
            one, two = there[name][measure], back[name][measure]
            mirrored = back["against"][name][measure]
            assert (pair["score"], mirrored["score"]) == (two, one)
            assert pair["difference"] == -mirrored["difference"] == one - two
            assert pair["interval"] == pytest.approx([-end for end in mirrored["interval"][::-1]])
            assert pair["p"] == mirrored["p"] and 0 < pair["p"] <= 1
    assert there["against"]["all"]["F1@1"]["difference"] < 0 and "interval" in there["all"]

    arguments = [ours, posts, "--against", other]
    head, *rows = (line.split() for line in script(*arguments)[1].splitlines())
    assert head == "measure ours other difference 95% interval p".split()
    classes = "all", "present", "absent"
    shown = [[name, measure] for name in classes for measure in ("F1@1", "F1@M")]
    assert [row[:2] for row in rows] == shown
    for name, measure, first, second, difference, low, _, high, p in rows:
        pair = there["against"][name][measure]
        figures = there[name][measure], pair["score"], *pair["interval"]
        assert [first, second, low, high] == [f"{100 * figure:.2f}" for figure in figures]
        assert difference == f"{100 * pair['difference']:+.2f}" and p == f"{pair['p']:.4f}"
    blocks = script(*arguments, "--all")[1].split("\n\n")
    assert len(blocks) == 3 and blocks[0].split("\n")[0].split() == head
    assert "NDCG@5" in blocks[0] and [block.split()[0] for block in blocks[1:]] == ["all", "95%"]


def test_missing_duplicate_and_unknown_ids(files, tmp_path, refused):
    def predictions(*rows):
        return write(tmp_path / "p.jsonl", rows), files["test.jsonl"]

    first, second, third = PREDICTIONS
    unknown = {"id": "p9", "keyphrases": []}
    refused(predictions(first, third), "p.jsonl", "'p2'", "1 of 3", "--allow-missing")
    refused(predictions(*PREDICTIONS, unknown), "p.jsonl", "'p9'", "test.jsonl")
    refused((*predictions(unknown), "--allow-missing"), "'p9'")
    refused(predictions(first, second, third, second), "p.jsonl", "lines 2 and 4", "id 'p2'")
    doubled = write(tmp_path / "r.jsonl", [*POSTS, POSTS[0]])
    refused((files["preds.jsonl"], doubled), "r.jsonl", "lines 1 and 4", "id 'p1'")
    many = [{"id": f"n{i}", "keyphrases": []} for i in range(9)]
    refused(predictions(*many), "'n0', 'n1', 'n2' and 6 more")


def test_unequal_line_counts(files, tmp_path, refused):
    short, long = (write(tmp_path / f"{n}.txt", ["a"] * n) for n in (2, 5))
    refused((short, files["test.txt"]), "2.txt", "1 of 3 posts", "line 3")
    refused((long, files["test.jsonl"]), "5.txt", "2 of 5 lines not among the 3 posts", "line 4")
    refused((long, files["test.jsonl"], "--allow-missing"), "line 4")


def test_allow_missing_scores_empty_predictions(files, tmp_path, scores_of):
    partial = write(tmp_path / "p.jsonl", PREDICTIONS[1:])
    scores = scores_of(partial, files["test.jsonl"], "--allow-missing")
    assert scores == score([{"keyphrases": []}, *PREDICTIONS[1:]], POSTS)
    short = write(tmp_path / "p.txt", ["blue flower"])
    scores = scores_of(short, files["test.txt"], "--allow-missing")
    assert scores["all"]["posts"] == 3 and scores["all"]["P@1"] == pytest.approx(1 / 3)


def test_failed_posts_are_told_and_score_as_wrong(files, tmp_path, script):
    """A post whose image infer.py could not read is one without keyphrases."""
    failed = [{"id": "p1", "error": "image unreadable"}, PREDICTIONS[1], PREDICTIONS[2]]
    path = write(tmp_path / "p.jsonl", failed)
    code, out, err = script(path, files["test.jsonl"], "--json")
    assert (code, err) == (0, f"{path}: 1 post failed, scored as wrong\n")
    assert json.loads(out) == score([{"keyphrases": []}, *PREDICTIONS[1:]], POSTS)


BAD = ["", "\n\n", "no separator", "a<sep>b<sep>c<sep>d", "\ufeff", "\udcff\udcfe", "{", "[1]"]
BAD += ['{"id": 1}', '{"id": "\\ud800", "text": "", "keyphrases": ["\\ud800"]}']


@pytest.mark.parametrize("content", BAD)
def test_no_traceback_on_any_bad_file(files, tmp_path, script, refused, content):
    path = tmp_path / "bad"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    preds, posts = files["preds.txt"], files["test.txt"]
    # None of these is a file of three posts; some are predictions, or keyphrases.
    refused((preds, path))
    for arguments in (("--train", path), ("--against", path), ()):
        arguments = (preds if arguments else path, posts, *arguments)
        if script(*arguments)[0]:
            refused(arguments)


def test_swapped_missing_and_impossible_files_are_explained(files, tmp_path, refused):
    preds, posts, text = files["preds.jsonl"], files["test.jsonl"], files["test.txt"]
    refused((text, files["preds.txt"]), "preds.txt line 1", "<sep>")
    refused((text, text), "line 1", "predictions come first")
    refused((posts, preds), "preds.jsonl line 1: the field 'text' must be a string")
    refused((tmp_path / "none.txt", text), "none.txt: no such file")
    refused((tmp_path, text), "is a directory")


@pytest.mark.parametrize("arguments", ["--bootstrap -1", "--seed 1.5", "--nothing"])
def test_bad_options(files, script, arguments):
    code, _, err = script(files["preds.txt"], files["test.txt"], *arguments.split())
    assert code == 2 and err.startswith("evaluate.py: error: ") and err.count("\n") == 1
    assert err.endswith("; see evaluate.py --help\n")


# ------------------------------------------------------------------------ in a process of their own


def test_help_shows_defaults_without_numpy():
    command = [sys.executable, "-X", "importtime", evaluate.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "default: 0" in done.stdout and "numpy" not in done.stderr


def test_works_when_copied_alone(files, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    command = [sys.executable, shutil.copy(evaluate.__file__, folder), files["preds.jsonl"]]
    command += [files["test.txt"], "--against", files["preds.txt"]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0 and "F1@M" in done.stdout and done.stderr == ""


def test_run(capsys):
    def refuse():
        raise UserError("a.txt:\nbad")

    for main, code in ((lambda: None, 0), (lambda: 3, 3), (refuse, 1)):
        with pytest.raises(SystemExit) as end:
            evaluate.run(main)
        assert end.value.code == code
    assert capsys.readouterr().err == "error: a.txt: bad\n"


@pytest.mark.parametrize("code", [1, 130])
def test_a_closed_pipe_and_an_interrupt_are_quiet(code):
    main = "print('x' * 100_000)" if code == 1 else "print('ready', flush=True) or time.sleep(60)"
    script = f"import evaluate, sys, time; sys.stdin.read(); evaluate.run(lambda: {main})"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(HERE.parent)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE),
    )
    if code == 1:
        process.stdout.close()
    process.stdin.close()
    if code == 130:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
    assert process.wait() == code and process.stderr.read() == b""


# --------------------------------------------------------------------------------------- real posts


@pytest.mark.skipif(not CMKP.exists(), reason="the posts of CMKP are not here")
def test_real_posts_of_cmkp():
    references = read_references(CMKP)
    perfect = score(references, references)
    everything, present, absent = (perfect[name] for name in ("all", "present", "absent"))
    assert len(references) == perfect["posts"] == len({post["id"] for post in references}) == 5372
    assert {entry["F1@M"] for entry in (everything, present, absent)} == {1}
    assert present["keyphrases"] + absent["keyphrases"] == everything["keyphrases"]
