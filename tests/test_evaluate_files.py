import gzip
import json
import shutil
import signal
import subprocess
import sys

import pytest

import evaluate
from evaluate import (
    MEASURES,
    UserError,
    align,
    parse_line,
    read_jsonl,
    read_predictions,
    read_references,
    score,
    table,
    train_keyphrases,
)
from test_evaluate import HERE, POSTS, PREDICTIONS, run_script, write_lines

CMKP = HERE.parent.parent / "shared" / "data" / "cmkp" / "test_src.txt"


# -------------------------------------------------------------------------------------------- files


def test_jsonl_yields_lines_offsets_and_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\r\n  \n{"b": 1}\n{"c": "\xe2\x80\xa8"}')
    rows = list(read_jsonl(path))
    assert [(number, record) for number, _, record in rows] == [
        (1, {"a": "é"}),
        (4, {"b": 1}),
        (5, {"c": "\u2028"}),
    ]
    raw = path.read_bytes()
    for number, offset, record in rows:
        assert parse_line(path, number, raw[offset:].split(b"\n")[0] + b"\n") == record


@pytest.mark.parametrize(
    "content, part",
    [
        (b'{"a": 1}\n{"a": \n', "line 2"),
        (b"[1, 2]\n", "line 1: a JSON object"),
        (b'"text"\n', "line 1"),
        (b"7\n", "7"),
        (b'{"a": "\xff"}\n', "line 1: not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (gzip.compress(b'{"a": 1}\n'), "not UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "not a line of JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not a line of JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "line 1"),
        (b"\x00\n", "line 1"),
        (b'{"a": 1} {"b": 2}\n', "line 1"),
    ],
)
def test_jsonl_names_the_line_that_is_wrong(tmp_path, content, part):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_jsonl(path))
    assert (
        str(path) in str(error.value) and part in str(error.value) and len(str(error.value)) < 400
    )


def test_jsonl_of_no_file_and_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        list(read_jsonl(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match="is a directory"):
        list(read_jsonl(tmp_path))


def test_jsonl_streams(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"a": 1}, "not json"])
    rows = read_jsonl(path)
    assert next(rows)[2] == {"a": 1}
    with pytest.raises(UserError):
        next(rows)


def test_cmkp_text(tmp_path):
    path = write_lines(
        tmp_path / "src.txt", ["a b ; c<sep>x;y z <sep>http://host/D0wn_-9.jpg", " t<sep>k "]
    )
    first, second = read_references(path)
    assert (first["text"], first["id"], first["keyphrases"]) == ("a b ; c", "D0wn_-9", ["x", "y z"])
    assert (second["text"], second["id"], second["keyphrases"]) == ("t", None, ["k"])
    assert list(train_keyphrases(path)) == ["x", "y z", "k"]


def test_cmkp_predictions(tmp_path):
    path = tmp_path / "preds.txt"
    path.write_bytes(b"a;b c\r\n\r\n;;x;\r\n\xe2\x80\xa8y")
    assert [prediction["keyphrases"] for prediction in read_predictions(path)] == [
        ["a", "b c"],
        [],
        ["", "", "x", ""],
        ["\u2028y"],
    ]


@pytest.mark.parametrize("name", ["preds", "preds.txt", "preds.jsonl"])
def test_jsonl_is_recognised_by_its_content(tmp_path, name):
    path = write_lines(tmp_path / name, ["", *PREDICTIONS])
    assert read_predictions(path) == PREDICTIONS


def test_failed_posts_are_empty_predictions(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        [
            {"id": "p1", "error": "image unreadable"},
            {"id": "p2", "keyphrases": ["a"], "error": None},
        ],
    )
    assert [prediction["keyphrases"] for prediction in read_predictions(path)] == [[], ["a"]]


@pytest.mark.parametrize(
    "record",
    [
        {"keyphrases": []},
        {"id": 7, "keyphrases": []},
        {"id": "a"},
        {"id": "a", "keyphrases": "x;y"},
        {"id": "a", "keyphrases": [1]},
        {"id": "a", "keyphrases": None},
        {"id": "a", "keyphrases": [], "think": 7},
        {"id": "a", "keyphrases": [], "tokens": "7"},
        {"id": "a", "keyphrases": [], "tokens": float("nan")},
        {"id": "a", "keyphrases": [], "tokens": -1},
        {"id": "a", "keyphrases": [], "tokens": True},
        {"id": "a", "keyphrases": [], "tokens": 10**400},
    ],
)
def test_bad_predictions_are_named(tmp_path, record):
    path = write_lines(tmp_path / "p.jsonl", [PREDICTIONS[0], record])
    with pytest.raises(UserError, match="p.jsonl line 2: "):
        read_predictions(path)


@pytest.mark.parametrize(
    "record",
    [
        {"id": "a", "keyphrases": []},
        {"id": "a", "text": None, "keyphrases": []},
        {"text": "", "keyphrases": []},
        {"id": "a", "text": "x", "keyphrases": [None]},
    ],
)
def test_bad_references_are_named(tmp_path, record):
    path = write_lines(tmp_path / "r.jsonl", [POSTS[0], record])
    with pytest.raises(UserError, match="r.jsonl line 2: "):
        read_references(path)


def test_align_by_id_and_by_line():
    assert align(PREDICTIONS[::-1], POSTS) == PREDICTIONS
    text = [{"id": None, "keyphrases": [name]} for name in "abc"]
    assert align(text, POSTS) == text
    cmkp = [{**post, "address": f"http://host/{post['id']}.jpg"} for post in POSTS]
    assert (
        align(PREDICTIONS[::-1], cmkp) == PREDICTIONS
    )  # the names of the images are these predictions' ids
    others = [{**prediction, "id": f"line {i}"} for i, prediction in enumerate(PREDICTIONS)]
    assert align(others, cmkp) == others


# --------------------------------------------------------------------------------- the command line


@pytest.fixture
def files(tmp_path):
    """The same posts and predictions as JSONL and as CMKP's text."""
    guesses = [";".join(prediction["keyphrases"]) for prediction in PREDICTIONS]
    posts = [
        f"{post['text']}<sep>{';'.join(post['keyphrases'])}<sep>http://host/{post['id']}.jpg"
        for post in POSTS
    ]
    contents = {
        "preds.jsonl": PREDICTIONS[::-1],
        "preds.txt": guesses,
        "test.jsonl": POSTS,
        "test.txt": posts,
    }
    return {name: write_lines(tmp_path / name, rows) for name, rows in contents.items()}


@pytest.mark.parametrize("predictions", ["preds.jsonl", "preds.txt"])
@pytest.mark.parametrize("references", ["test.jsonl", "test.txt"])
@pytest.mark.parametrize("train", ["test.jsonl", "test.txt"])
def test_all_combinations_of_formats_give_the_same(files, predictions, references, train):
    done = run_script(files[predictions], files[references], "--train", files[train], "--json")
    assert (done.returncode, done.stderr) == (0, "")
    scores = json.loads(done.stdout)
    expected = score(
        PREDICTIONS, POSTS, [phrase for post in POSTS for phrase in post["keyphrases"]]
    )
    if predictions == "preds.txt":
        for entry in list(expected.values())[1:]:
            entry.pop("tokens", None), entry.pop("reasoned", None)
    assert scores == expected


def test_table_shows_percent(files):
    done = run_script(files["preds.jsonl"], files["test.jsonl"], "--train", files["test.txt"])
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0].split() == ["all", "present", "absent", "seen", "unseen", "absent+unseen"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert cells["posts"] == ["3", "2", "2", "3", "0", "0"]
    assert cells["keyphrases"] == ["5", "2", "3", "5", "0", "0"]
    assert cells["P@1"] == ["33.33", "100.00", "0.00", "66.67", "-", "-"]
    assert cells["tokens"][:3] == ["7.0", "8.0", "8.5"] and cells["reasoned"][0] == "33.33"
    assert len({len(line) for line in lines}) == 1 and set(MEASURES) <= set(cells)
    assert (
        done.stdout == table(score(PREDICTIONS, POSTS, train_keyphrases(files["test.txt"]))) + "\n"
    )


def test_bootstrap_option(files):
    arguments = [files["preds.txt"], files["test.txt"], "--json", "--bootstrap", 50]
    first, again, other = (run_script(*arguments, "--seed", seed) for seed in (1, 1, 2))
    assert first.stdout == again.stdout != other.stdout
    scores = json.loads(first.stdout)
    for name in ("all", "present", "absent"):
        assert set(scores[name]["interval"]) == set(MEASURES)
        assert all(low <= high for low, high in scores[name]["interval"].values())
    arguments = [*arguments[:2], *arguments[3:], "--seed", 1, "--train", files["test.txt"]]
    lines = run_script(*arguments).stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("95% CI  "))
    row = next(line.split() for line in lines[start:] if line.startswith("F1@1 "))
    low, high = scores["all"]["interval"]["F1@1"]
    assert row[:2] == ["F1@1", f"{100 * low:.1f}-{100 * high:.1f}"]
    assert max(map(len, lines)) <= 80


def test_against_flips_its_sign(files, tmp_path):
    other = write_lines(tmp_path / "other.txt", ["gardening", "dog", "weather;storm hour"])
    there, back = (
        json.loads(run_script(ours, files["test.jsonl"], "--against", theirs, "--json").stdout)
        for ours, theirs in ((files["preds.jsonl"], other), (other, files["preds.jsonl"]))
    )
    for name in ("all", "present", "absent"):
        assert set(there["against"][name]) == set(MEASURES)
        for measure, pair in there["against"][name].items():
            mirrored = back["against"][name][measure]
            assert (
                pair["score"] == back[name][measure] and mirrored["score"] == there[name][measure]
            )
            assert (
                pair["difference"]
                == -mirrored["difference"]
                == there[name][measure] - back[name][measure]
            )
            assert pair["interval"] == pytest.approx([-end for end in mirrored["interval"][::-1]])
            assert pair["p"] == mirrored["p"] and 0 < pair["p"] <= 1
    assert there["against"]["all"]["F1@1"]["difference"] < 0 and "interval" in there["all"]
    shown = run_script(files["preds.jsonl"], files["test.jsonl"], "--against", other).stdout
    head, *rows = (line.split() for line in shown.splitlines())
    assert head == "measure ours other difference 95% interval p".split()
    assert [row[:2] for row in rows] == [
        [name, measure] for name in ("all", "present", "absent") for measure in ("F1@1", "F1@M")
    ]
    for name, measure, ours, theirs, difference, low, _, high, p in rows:
        pair = there["against"][name][measure]
        figures = there[name][measure], pair["score"], *pair["interval"]
        assert [ours, theirs, low, high] == [f"{100 * figure:.2f}" for figure in figures]
        assert difference == f"{100 * pair['difference']:+.2f}" and p == f"{pair['p']:.4f}"
    whole = run_script(files["preds.jsonl"], files["test.jsonl"], "--against", other, "--all")
    blocks = whole.stdout.split("\n\n")
    assert len(blocks) == 3 and blocks[0].split("\n")[0].split() == head
    assert "NDCG@5" in blocks[0] and [block.split()[0] for block in blocks[1:]] == ["all", "95%"]


def assert_error(done, *parts):
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


def test_missing_duplicate_and_unknown_ids(files, tmp_path):
    def score_of(*predictions):
        return run_script(write_lines(tmp_path / "p.jsonl", predictions), files["test.jsonl"])

    first, second, third = PREDICTIONS
    assert_error(score_of(first, third), "p.jsonl", "'p2'", "1 of 3", "--allow-missing")
    assert_error(
        score_of(*PREDICTIONS, {"id": "p9", "keyphrases": []}), "p.jsonl", "'p9'", "test.jsonl"
    )
    assert_error(score_of(first, second, third, second), "p.jsonl", "'p2' on lines 2 and 4")
    doubled = write_lines(tmp_path / "r.jsonl", [*POSTS, POSTS[0]])
    assert_error(run_script(files["preds.jsonl"], doubled), "r.jsonl", "'p1' on lines 1 and 4")
    many = [{"id": f"n{i}", "keyphrases": []} for i in range(9)]
    assert_error(score_of(*many), "'n0', 'n1', 'n2' and 6 more")


def test_unequal_line_counts(files, tmp_path):
    short, long = (write_lines(tmp_path / f"{n}.txt", ["a"] * n) for n in (2, 5))
    assert_error(run_script(short, files["test.txt"]), "2.txt", "1 of 3 posts", "line 3")
    done = run_script(long, files["test.jsonl"])
    assert_error(done, "5.txt", "2 of 5 lines not in", "(3 posts)", "line 4")
    assert_error(run_script(long, files["test.jsonl"], "--allow-missing"), "line 4")


def test_allow_missing_scores_empty_predictions(files, tmp_path):
    partial = write_lines(tmp_path / "p.jsonl", PREDICTIONS[1:])
    scores = json.loads(
        run_script(partial, files["test.jsonl"], "--allow-missing", "--json").stdout
    )
    expected = score([{"keyphrases": []}, *PREDICTIONS[1:]], POSTS)
    assert scores == expected and scores["all"]["posts"] == 3
    short = write_lines(tmp_path / "p.txt", ["blue flower"])
    scores = json.loads(run_script(short, files["test.txt"], "--allow-missing", "--json").stdout)
    assert scores["all"]["P@1"] == pytest.approx(1 / 3)
    unknown = write_lines(tmp_path / "u.jsonl", [{"id": "p9", "keyphrases": []}])
    assert_error(run_script(unknown, files["test.jsonl"], "--allow-missing"), "'p9'")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"no separator\n",
        b"a<sep>b<sep>c<sep>d\n",
        b"\xff\xfe\n",
        b'{"id": 1}\n',
        b"{\n",
        b'{"id"\n',
        b"\x1f\x8b\x08\x00",
        b'[{"id": "a"}]\n',
        b"{}\n",
        b'{"id": "\\ud800", "text": "", "keyphrases": ["\\ud800"]}\n',
        b'{"id": "a", "text": "", "keyphrases": ["x"]}\n' * 2,
        b"\xef\xbb\xbf",
        b'{"a":' * 9999,
    ],
)
def test_no_traceback_on_any_bad_file(files, tmp_path, content):
    path = tmp_path / "bad"
    path.write_bytes(content)
    for arguments in (
        (files["preds.txt"], path),
        (files["preds.txt"], files["test.txt"], "--train", path),
        (path, files["test.txt"]),
        (files["preds.txt"], files["test.txt"], "--against", path),
    ):
        done = run_script(*arguments)
        assert "Traceback" not in done.stderr
        if done.returncode:
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert (
        run_script(files["preds.txt"], path).returncode == 1
    )  # none of these is a file of three posts


def test_swapped_arguments_are_explained(files):
    assert_error(run_script(files["test.txt"], files["preds.txt"]), "preds.txt line 1", "<sep>")
    assert_error(
        run_script(files["test.txt"], files["test.txt"]), "line 1", "predictions come first"
    )
    swapped = run_script(files["test.jsonl"], files["preds.jsonl"])
    assert_error(swapped, "preds.jsonl line 1: a prediction, not a post; predictions come first")


def test_missing_files_and_folders(files, tmp_path):
    assert_error(run_script(tmp_path / "none.txt", files["test.txt"]), "none.txt: no such file")
    assert_error(run_script(tmp_path, files["test.txt"]), "is a directory")


@pytest.mark.parametrize(
    "arguments", ["--bootstrap -1", "--bootstrap x", "--seed 1.5", "--nothing", "--all"]
)
def test_bad_options(files, arguments):
    done = run_script(files["preds.txt"], files["test.txt"], *arguments.split())
    assert done.returncode == 2 and done.stderr.startswith("evaluate.py: error: ")
    assert done.stderr.endswith("; see evaluate.py --help\n") and done.stderr.count("\n") == 1


def test_help_shows_defaults_without_numpy():
    command = [sys.executable, "-X", "importtime", evaluate.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "default: 0" in done.stdout and "numpy" not in done.stderr


def test_works_when_copied_alone(files, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    copy = shutil.copy(evaluate.__file__, folder)
    arguments = [files["preds.jsonl"], files["test.txt"], "--against", files["preds.txt"]]
    done = run_script(*arguments, script=copy, cwd=folder)
    assert done.returncode == 0 and "F1@M" in done.stdout and done.stderr == ""


def test_other_scripts_and_emoji_from_files(tmp_path):
    posts = [
        {
            "id": "1",
            "text": "天气 😀 أخبار Cafe\u0301s",
            "keyphrases": ["天气", "😀", "أخبار", "café"],
        }
    ]
    references = tmp_path / "r.jsonl"
    references.write_text(json.dumps(posts[0], ensure_ascii=False) + "\n", encoding="utf-8")
    predictions = write_lines(tmp_path / "p.txt", ["天 气;😀;أخبار;CAFÉS"])
    scores = json.loads(run_script(predictions, references, "--json").stdout)
    assert scores["present"]["F1@M"] == 1 and scores["present"]["keyphrases"] == 4


# ---------------------------------------------------------------------------------------- run(main)


@pytest.mark.parametrize(
    "body, code, stderr",
    [
        ("pass", 0, ""),
        ("return 3", 3, ""),
        ("raise evaluate.UserError('a.txt:\\nbad')", 1, "error: a.txt: bad\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise BrokenPipeError", 1, ""),
    ],
)
def test_run(tmp_path, body, code, stderr):
    lines = ["import evaluate", "def main():", f"    {body}", "evaluate.run(main)"]
    script = write_lines(tmp_path / "s.py", lines)
    done = run_script(script=script, env={"PYTHONPATH": str(HERE.parent)})
    assert (done.returncode, done.stderr) == (code, stderr)


def test_closed_pipe_is_quiet(tmp_path):
    script = write_lines(
        tmp_path / "s.py",
        ["import evaluate, sys", "sys.stdin.read()", "evaluate.run(lambda: print('x' * 100_000))"],
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(HERE.parent)},
    )
    process.stdout.close()
    process.stdin.close()
    assert process.wait() == 1 and process.stderr.read() == b""


def test_interrupt_is_quiet(tmp_path):
    script = write_lines(
        tmp_path / "s.py",
        [
            "import evaluate, time",
            "def main():",
            "    print('ready', flush=True)",
            "    time.sleep(60)",
            "evaluate.run(main)",
        ],
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(HERE.parent)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and process.stderr.read() == b""


# --------------------------------------------------------------------------------------- real posts


@pytest.mark.skipif(not CMKP.exists(), reason="the posts of CMKP are not here")
def test_real_posts_of_cmkp():
    references = read_references(CMKP)
    perfect = score(references, references)
    assert (
        len(references) == perfect["posts"] == 5372
        and len({post["id"] for post in references}) == 5372
    )
    assert {perfect[name]["F1@M"] for name in ("all", "present", "absent")} == {1}
    assert (
        perfect["present"]["keyphrases"] + perfect["absent"]["keyphrases"]
        == perfect["all"]["keyphrases"]
    )


def test_failed_posts_are_told(tmp_path):
    """A post whose image infer.py could not read scores as one without keyphrases, and is named."""
    posts, predictions = tmp_path / "posts.jsonl", tmp_path / "preds.jsonl"
    posts.write_text('{"id": "a", "text": "", "keyphrases": ["x"]}\n')
    predictions.write_text('{"id": "a", "keyphrases": [], "error": "no such file"}\n')
    command = [sys.executable, evaluate.__file__, predictions, posts, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == f"{predictions}: 1 post failed, scored as wrong\n"
    assert json.loads(done.stdout)["all"]["F1@1"] == 0
