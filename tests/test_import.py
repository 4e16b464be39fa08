"""`tools.dataset import`: other people's files, and the way from such a file to predictions."""

import csv
import json
import os
import re
import sys

import pytest
from PIL import Image

import infer
import train
from test_data_tools import as_json, error, tool
from tiny import lines


def write_form(form, world, folder):
    """The club world's training posts as other people keep them; returns the file."""
    folder.mkdir()
    rows = []
    for number, record in enumerate(lines(world / "train.jsonl")):
        name = os.path.basename(record["image"])
        picture = f"{record['id']}.png" if form == "by id" else name
        os.link(world / record["image"], folder / picture)
        tags, row = record["keyphrases"], {}
        question, answer = f"<image>\n{record['text']}", ", ".join(tags)
        if form == "llava":
            answer = f"<think>{record['cot']}</think><answer>{answer}</answer>"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            row = {"id": number, "image": name, "conversations": turns}
        elif form == "sharegpt":
            turns = [("system", "tag it"), ("user", question), ("assistant", answer)]
            turns = [{"role": role, "content": content} for role, content in turns]
            row = {"messages": turns, "images": [name]}
        elif form == "by id":
            row = {"id": record["id"], "Text": record["text"], "tags": tags}
        else:
            text = record["text"].replace(" ", ' & "', 1)
            row = {"caption": text, "file_name": name, "hashtags": "; ".join(tags)}
        rows.append(row)
    file = folder / {"csv": "posts.csv", "tsv": "posts.tsv"}.get(form, "posts.json")
    with open(file, "w", encoding="utf-8", newline="") as stream:
        if form in ("csv", "tsv"):
            quoting = {"quoting": csv.QUOTE_NONE, "quotechar": None} if form == "tsv" else {}
            table = csv.DictWriter(stream, rows[0], delimiter=",\t"[form == "tsv"], **quoting)
            table.writeheader()
            table.writerows(rows)
        elif form == "sharegpt":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            json.dump({"version": 1, "data": rows} if form == "by id" else rows, stream)
    return file


@pytest.mark.parametrize("form", ["csv", "tsv", "json list", "llava", "sharegpt", "by id"])
def test_from_a_file_to_predictions_in_three_commands(world, tmp_path, monkeypatch, form):
    file = write_form(form, world, tmp_path / "theirs")
    out, images = tmp_path / "posts.jsonl", ["--images", file.parent] if form == "by id" else []
    result = as_json("import", file, "--out", out, *images)
    posts, before = lines(out), lines(world / "train.jsonl")
    assert result["posts"] == result["images"] == len(before) and not result["images_missing"]
    for ours, theirs in zip(posts, before, strict=True):
        assert ours["keyphrases"] == theirs["keyphrases"]
        assert ours.get("cot") == (theirs["cot"] if form == "llava" else None)
        assert ours["text"].replace('& "', "") == theirs["text"]
        picture = (tmp_path / ours["image"]).read_bytes()
        assert picture == (world / theirs["image"]).read_bytes()
    toy, run = ["--model", world / "toy"], tmp_path / "run"
    sizes = "--mode sft --epochs 0.1 --workers 0 --max-new-tokens 4"
    for script, *arguments in (
        (train, "--train", out, *toy, "--out", run, *sizes.split()),
        (infer, out.parent / posts[0]["image"], posts[0]["text"], "--model", run),
    ):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        assert not script.main()


def test_what_is_unescaped_numbered_found_and_told(tmp_path):
    file, out = tmp_path / "p.csv", tmp_path / "new" / "posts.jsonl"
    rows = [
        "tweet|photo|tags|place",
        "rock &amp; roll|a|#rock &amp; roll|x",
        "b|no.png|y|",
        "c||z|",
    ]
    file.write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.JPG")
    printed, told = tool("import", file, "--out", out, "--images", tmp_path)
    assert "other fields: place\n" in printed
    assert "1 image missing, their posts are text-only now: no.png" in told
    assert (
        "read with --map text=tweet,image=photo,keyphrases=tags\n" in printed
        and '"rock & roll"' in printed
    )
    first, second, third = lines(out)
    assert first["id"] == "1" and first["text"] == "rock & roll" and first["place"] == "x"
    assert first["keyphrases"] == ["rock & roll"]
    assert (out.parent / first["image"]).samefile(tmp_path / "a.JPG")
    assert second["image"] is third["image"] is None
    before = out.read_bytes()
    assert "is there already" in error("import", file, "--out", out) and out.read_bytes() == before
    tool("import", file, "--out", out, "--images", "none", "--replace")
    assert lines(out)[0]["image"] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "text,tags\na,b\nc,d,e\n", "a cell for each name"),
        ("p.csv", "words,tags\na,b\n", "record 1.*'text' must be.*words, .*--map text=NAME"),
        ("p.csv", "text,photo\na,x.png\n --map image=foto", "no record has foto; they have text"),
        ("p.csv", "text,image\na,x.png\n", "none of its images is in .*; --images names"),
        ("p.json", '[{"text": "a"}', "line 1: not a line of JSON"),
        ("p.json", "[1, 2]", "a list of JSON objects is needed"),
        ("p.json", '{"text": "a", "text": "b"}', "'text' is there twice"),
        ("p.csv", "", "no posts|neither JSON nor a table"),
        ("p.csv", "text,tags\n", "no posts in it"),
        ("p.txt", "a<sep>b<sep>c.jpg\nno separator\n", "p.txt line 2: must be text<sep>"),
        ("p.txt", "a<sep>b<sep>c.jpg\n --images nowhere", "nowhere: can't be read .No such"),
    ],
)
def test_what_can_not_be_imported(tmp_path, name, content, message):
    content, _, options = content.partition(" --")
    (tmp_path / name).write_text(content)
    options = f"--{options}".split() if options else []
    told = error("import", tmp_path / name, "--out", tmp_path / "out.jsonl", *options)
    assert re.search(message, told), told
    assert not (tmp_path / "out.jsonl").exists()
