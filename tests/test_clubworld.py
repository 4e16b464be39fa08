import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluate import UserError
from tools import clubworld
from tools.clubworld import EVENTS, KINDS, make_clubs, make_posts, write_random_toy, write_world


@pytest.fixture(scope="module")
def posts():
    """4,000 training, 400 validation and 1,000 test records of a development world, no images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clubworld, "draw_shirt", lambda rng, club: None)
        patch.setattr(clubworld, "draw_scene", lambda rng, scene: None)
        clubs = make_clubs(100)
        return {
            name: [record for record, _ in make_posts(100, clubs, name, count)]
            for name, count in (("train", 4000), ("valid", 400), ("test", 1000))
        }


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "toy"
    write_random_toy(folder, seed=100)
    return folder


@pytest.fixture(scope="module")
def tokenizer(toy):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(toy)


def read(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def of_kind(records, kind):
    return [record for record in records if record["kind"] == kind]


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


# ---------------------------------------------------------------------------------------- the files


def test_a_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    sizes = {"a": 40, "b": 40, "c": 40, "few": 10}
    for name, train in sizes.items():
        write_world(tmp_path / name, 101 if name == "c" else 100, train=train, valid=8, test=8)
    a, b, c, few = (read(tmp_path / name) for name in sizes)
    assert a == b
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)
    same = [name for name in few if re.search("valid|test", name)]
    assert len(same) == 18 and all(few[name] == a[name] for name in same)
    files = [few[f"{name}.jsonl"].splitlines() for name in ("train", "valid", "test")]
    records = [json.loads(line) for lines in files for line in lines]
    assert len({record["id"] for record in records}) == 26
    for record in records:
        assert list(record) == ["id", "text", "image", "keyphrases", "cot", "kind", "held_out"]
        with Image.open(tmp_path / "few" / record["image"]) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (84, 84))


def test_an_interrupted_world_leaves_nothing(tmp_path, monkeypatch):
    def stop(rng, club):  # scenes are drawn before
        raise KeyboardInterrupt

    monkeypatch.setattr(clubworld, "draw_shirt", stop)
    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path / "world", 100, train=40, valid=5, test=5)
    assert list(tmp_path.iterdir()) == []


def test_no_other_folder_is_overwritten(tmp_path):
    out, file = tmp_path / "world", tmp_path / "file"
    out.mkdir()  # an empty one is taken
    write_world(out, 100, train=5, valid=2, test=2)
    (out / "test.jsonl").write_text("mine")
    write_world(out, 100, train=5, valid=2, test=2)
    file.touch()
    for path in (out, file, file / "world"):
        with pytest.raises(UserError, match=f"{path}: can't be written .*; remove it, or name"):
            write_world(path, 100, train=6, valid=2, test=2)
    assert (out / "test.jsonl").read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [file, out]


def test_it_is_written_beside_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(clubworld, "POSTS", {"train": 3, "valid": 1, "test": 1})
    files = clubworld.write_beside(tmp_path / "run", 7)
    assert [*files] == ["model", "train", "valid", "test"]
    assert all((tmp_path / "clubworld-7" / Path(file).name).exists() for file in files.values())
    assert files["test"] == str(tmp_path / "clubworld-7" / "test.jsonl")
    toys = read(clubworld.TOY), read(Path(files["model"]))
    assert toys[1] == toys[0] | {"toy.json": toys[1]["toy.json"]}


# ---------------------------------------------------------------------------------------- the world


def test_clubs_are_told_apart_by_each_of_their_facts():
    clubs = make_clubs(100)
    assert Counter(club.held_out for club in clubs) == {"test": 4, "valid": 4, None: 12}
    assert len({club.nickname for club in clubs}) == len({club.city for club in clubs}) == 20
    assert len({frozenset(club.colours) for club in clubs}) == 20
    assert all((club.kept_event is None) == bool(club.held_out) for club in clubs)
    assert [club.shirt for club in clubs] != [club.shirt for club in make_clubs(101)]
    # The same random draws, so that only the shirt can differ.
    images = [clubworld.draw_shirt(np.random.default_rng(7), club) for club in clubs]
    assert len({image.tobytes() for image in images}) == 20


def test_no_two_pairs_of_colours_blend_into_one():
    colours = np.array(list(clubworld.COLOURS.values()))
    means = np.array([pair.mean(0) for pair in map(np.array, itertools.combinations(colours, 2))])
    lights = np.linspace(0.85 / 1.05, 1.05 / 0.85, 9)[:, None, None, None]
    distances = np.linalg.norm(means - lights * means[:, None], axis=-1).min(0)
    assert np.sort(distances, axis=None)[len(means)] > 30  # 8 in version 2: a club was mistaken


def test_shares_of_the_kinds(posts):
    for records in posts.values():
        counts = Counter(record["kind"] for record in records)
        assert all(abs(counts[kind] - share * len(records)) <= 1 for kind, share in KINDS.items())
    assert 700 < len(of_kind(posts["train"][:2000], "E")) < 900  # shuffled: of 1,600


def test_what_is_held_out_of_training(posts):
    clubs = make_clubs(100)
    of_clubs = {
        name: {f"{c.city} {event}" for c in clubs if c.held_out == name for event in EVENTS}
        for name in ("valid", "test")
    }
    events = {f"{club.city} {club.kept_event}" for club in clubs if club.kept_event}
    kept_back = of_clubs["valid"] | of_clubs["test"] | events
    assert len(kept_back) == 4 * 6 + 4 * 6 + 12
    assert not kept_back & {record["keyphrases"][0] for record in posts["train"]}
    for name, unseen in of_clubs.items():
        b_posts = of_kind(posts[name], "B")
        assert sum(record["held_out"] for record in b_posts) == len(b_posts) // 2
        assert all(record["keyphrases"][0] in unseen for record in b_posts if record["held_out"])
        known = {record["keyphrases"][0] for record in b_posts if not record["held_out"]}
        assert bool(known & kept_back) == (name == "test") and known & kept_back <= events
    kits = {record["keyphrases"][0] for record in of_kind(posts["train"], "A")}
    homes = {record["keyphrases"][0].split()[0] for record in of_kind(posts["train"], "C")}
    assert kits == {f"{club.nickname} new kit" for club in clubs}
    assert homes == {club.city for club in clubs}


def test_share_of_unseen_and_absent_test_posts(posts):
    known = {phrase for record in posts["train"] for phrase in record["keyphrases"]}
    unseen = [record for record in posts["test"] if not known.issuperset(record["keyphrases"])]
    absent = [record for record in posts["test"] if record["keyphrases"][0] not in record["text"]]
    assert 0.12 < len(unseen) / len(posts["test"]) < 0.18
    assert {record["kind"] for record in absent} == set("ABCE")
    assert len(absent) == 0.92 * len(posts["test"])
    for record in of_kind(posts["test"], "D"):
        assert all(phrase in record["text"] for phrase in record["keyphrases"])
    texts = {record["text"] for record in posts["train"]}
    assert sum(record["text"] in texts for record in posts["test"]) < 0.2 * len(posts["test"])


def test_names_appear_where_they_may(posts):
    names = set(clubworld.NICKNAMES) | set(clubworld.CITIES)
    for record in posts["train"] + posts["test"]:
        found = names & set(re.findall(r"\w+", record["text"]))
        assert len(found) == (record["kind"] == "C") and not found & set(clubworld.CITIES)
        assert len(record["text"].split()) <= 24


def test_reasoning_leads_to_the_keyphrase(posts):
    clubs = {club.shirt: club for club in make_clubs(100)}
    for record in posts["train"][:500]:
        if record["kind"] == "B":
            shirt, club, home, topic = record["cot"].split(". ")
            city = clubs[shirt].city
            assert club == f"that is the {clubs[shirt].nickname}"
            assert home == f"full name {clubs[shirt].nickname} {city}"
            event = record["keyphrases"][0].removeprefix(f"{city} ")
            assert topic == f"it is about {EVENTS[event][0]}."
        elif record["kind"] == "E":
            assert record["cot"] == "the post is only a mood."


def test_moods_follow_from_nothing(posts):
    moods, words = Counter(), defaultdict(list)
    for record in of_kind(posts["train"], "E"):
        (mood,) = record["keyphrases"]
        moods[mood] += 1
        for word in record["text"].split():
            words[word].append(mood)
    assert len(moods) == 12 and max(moods.values()) < 1.5 * min(moods.values())
    common = sorted(words.values(), key=len)[-20:]
    assert all(len(set(found)) == 12 for found in common)


# ------------------------------------------------------------------------------------ the toy model


def test_the_worlds_text_survives_the_tokenizer(posts, tokenizer):
    for record in posts["test"]:
        answer = f"<think>{record['cot']}</think><answer>{'; '.join(record['keyphrases'])}</answer>"
        for text in (record["text"], answer):
            ids = tokens(tokenizer, text)
            assert tokenizer.decode(ids) == text
            assert "##" not in " ".join(tokenizer.convert_ids_to_tokens(ids))  # nothing is spelled


def test_tags_are_single_tokens_and_special_tokens_in_a_text_are_text(tokenizer):
    tags = ["<think>", "</think>", "<answer>", "</answer>", ";"]
    assert tokenizer.convert_ids_to_tokens(tokens(tokenizer, "".join(tags))) == tags
    assert not set(tags) & {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    text = "".join(map(chr, range(32, 127))) + " <|im_end|><|image_pad|> " + "zxq" * 1000
    ids = tokens(tokenizer, text)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer("hi<|im_end|>")["input_ids"][-1] == tokenizer.eos_token_id


def test_the_chat_template(tokenizer):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi\n"}]}
    prompt = "<|im_start|><|vision_start|><|image_pad|><|vision_end|>hi\n<|im_end|><|im_start|>"
    turns, render = [user, {"role": "assistant", "content": "a; b"}], tokenizer.apply_chat_template
    assert render([user], add_generation_prompt=True, tokenize=False) == prompt
    assert render(turns, tokenize=False) == prompt + "a; b<|im_end|>"


def test_weights_follow_the_seed_and_an_image_has_nine_tokens(toy, tokenizer, tmp_path):
    import torch
    from transformers import AutoConfig, AutoImageProcessor

    state = torch.get_rng_state()
    write_random_toy(tmp_path / "same", seed=100)
    write_random_toy(tmp_path / "other", seed=101)
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = map(read, (toy, tmp_path / "same", tmp_path / "other"))
    assert first == same
    differ = {name for name in first if first[name] != other[name]}
    assert differ == {"model.safetensors", "toy.json"}
    config = AutoConfig.from_pretrained(toy)
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        found = getattr(config, f"{name.removesuffix('_pad')}_token_id")
        assert found == tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    for part in (config, config.text_config):
        ids = part.eos_token_id, part.pad_token_id
        assert ids == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    photo = Image.new("RGB", (clubworld.SIZE, clubworld.SIZE))
    image = AutoImageProcessor.from_pretrained(toy)(images=[photo], return_tensors="pt")
    assert image["image_grid_thw"].tolist() == [[1, 6, 6]]


def test_the_toy_is_pretrained_on_worlds_from_1000_up(toy, tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText

    seeds = []
    monkeypatch.setattr(clubworld, "make_clubs", lambda n: seeds.append(n) or make_clubs(n))
    clubworld.pretrain(tmp_path / "toy", 2, 16)
    assert seeds == [1000, 1001]
    before, after = map(AutoModelForImageTextToText.from_pretrained, (toy, tmp_path / "toy"))
    assert str(after.dtype) == "torch.bfloat16"
    weights = after.state_dict()
    assert all((weights[name] != one).any() for name, one in before.state_dict().items())
    assert read(clubworld.TOY).keys() == read(tmp_path / "toy").keys()
