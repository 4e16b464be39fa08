"""Whatever a model writes becomes keyphrases, and what it is taught to write can be read back."""

import json
import random
import re
import time
from itertools import chain
from pathlib import Path

import pytest

from data import TAG, TAGS, check_record, cot_answer, parse_answer, plain_answer
from evaluate import UserError, read_jsonl, read_posts, reasoned

SHARED = Path(__file__).parent.parent.parent / "shared"
PAIR = ["foxes", "kit"]


def post(keyphrases, cot=None):
    return {"id": "a", "text": "a post", "image": None, "keyphrases": keyphrases, "cot": cot}


def refusal(keyphrases, cot=None):
    """Why a training post with these keyphrases is refused, or None."""
    try:
        check_record(post(keyphrases, cot), "posts.jsonl line 1", for_training=True)
    except UserError as error:
        return str(error)


# ------------------------------------------------------------------------------- tags and reasoning


@pytest.mark.parametrize(
    "reply, keyphrases, think",
    [
        # the last <answer> that is not empty
        ("<answer>foxes</answer><think>why</think>", ["foxes"], "why"),
        ("<answer></answer><answer>foxes; kit</answer>", PAIR, None),
        ("<answer><think>why</think>foxes; kit</answer>", PAIR, "why"),
        ("<think>why <answer>foxes; kit</answer></think>", PAIR, "why"),
        ("<think>why</answer></think><answer>foxes; kit", PAIR, "why"),
        ("<think>why</think><answer>foxes; kit</think>", PAIR, "why"),
        # else what follows the last </think>
        ("<think>\n\n</think>\n\nred, so.\n</think>\n\nfoxes; kit", PAIR, "red, so."),
        ("one</think>two</think>foxes; kit", PAIR, "one two"),
        ("<think>why</think>foxes; kit<answer>", PAIR, "why"),
        ("<think>why</think>foxes; kit<think>because", PAIR, "why because"),
        ("<think>why<answer></think>foxes; kit</answer>", PAIR, "why"),
        # else what precedes a <think> that is never closed
        ("krakow match day <think>red red red", ["krakow match day"], "red red red"),
        ("foxes; kit\n<think>", PAIR, None),
        # else nothing
        ("<think>why", [], "why"),
        ("why</think>", [], "why"),
        ("<think>why</think><answer></answer>", [], "why"),
        # tags in capitals, in another script, cut off
        ("＜Think＞why＜/Think＞＜Answer＞foxes; kit＜/Answer＞", PAIR, "why"),
        ("<思考>why</思考><答案>foxes; kit</答案>", PAIR, "why"),
        ("<thinK>why</thinK><anſwer>foxes; kit</anſwer>", PAIR, "why"),
        ("<think>why</think><answer>foxes; kit<", PAIR, "why"),
        ("<think>why</think><answer\nfoxes; kit</answer", PAIR, "why"),
        ("<think>why</thi", [], "why"),
        ("a; b</answer>", ["a", "b"], None),
        # other models' own tags
        ("◁think▷why; so◁/think▷<answer>foxes; kit</answer>", PAIR, "why; so"),
        ("[THINK]why[/THINK]foxes; kit", PAIR, "why"),
        ("<thought>\nwhy</thought>\nfoxes; kit", PAIR, "why"),
        ("<seed:think>why</seed:think>foxes; kit<seed:eos>", PAIR, "why"),
        ("foxes [think]; <3 kit", ["foxes [think]", "<3 kit"], None),
        # tokens of a chat format within them: only those that begin or end a turn end the answer
        ("<think>why<|im_end|>", [], "why"),
        ("<think>a<|ref|>b</think><answer><|begin_of_box|>foxes; kit<|end_of_box|>", PAIR, "ab"),
        ("<answer><|begin_of_box|>foxes<|end_of_box|>; <pad>kit</answer>", PAIR, None),
    ],
)
def test_tags_in_any_order(reply, keyphrases, think):
    assert parse_answer(reply) == (keyphrases, think)


CHAT_FORMATS = """
    {}<|im_end|> / <|im_start|>assistant\\n{}<|im_end|> / <s>{}</s> / {}<|endoftext|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\n{}<|eot_id|> / {}<eos> / <｜Assistant｜>{}
    <start_of_turn>model\\n{}<end_of_turn> / {}<｜end▁of▁sentence｜> / <|assistant|>\\n{}<|end|>
    {}<|im_end|>\\n<|im_start|>user\\nAnother post<|im_end|> / {}<|return|>
    <s> <|im_start|>{}<|eot|>zzz / <|begin_of_text|>{}<|end_of_text|>zzz / <|system|>{}<|user|>zzz
"""


@pytest.mark.parametrize("chat", re.split(" / |\n    ", CHAT_FORMATS.strip()))
def test_tokens_of_chat_formats_are_no_part_of_an_answer(chat):
    reply = "<think>why</think><answer>foxes; kit</answer>"
    assert parse_answer(chat.replace("\\n", "\n").format(reply)) == (PAIR, "why")


def test_reasoned_means_reasoning_that_is_not_blank():
    thoughts = {"why": True, "": False, " \n\u2003": False, None: False}
    assert {think: reasoned({"think": think}) for think in thoughts} == thoughts
    assert not reasoned({"id": "a", "keyphrases": ["a"]})
    # What the parser returns is counted in the same way.
    assert parse_answer("<think>\n</think>a")[1] is None and parse_answer("<think>b</think>a")[1]


# ------------------------------------------------------------------------------ decoration of lists

# Between slashes, with \n for line breaks.
DECORATED = r"""
    **Keyphrases:** foxes; kit / **Keyphrases**: foxes; kit / Hashtags: #foxes #kit
    Key phrases: foxes, kit / 关键词：foxes；kit / 标签：#foxes #kit / 【关键词】foxes；kit
    キーワード：foxes、kit / Palabras clave: foxes; kit
    Sure! Here are the hashtags for this post:\n\n1. foxes\n2. kit / ### Keyphrases\n- foxes\n- kit
    "Tags": "foxes; kit" / 1. foxes\n2. kit / 1) foxes 2) kit / （1）foxes；（2）kit
    1、foxes；2、kit / 1.foxes 2.kit / **1.** foxes\n**2.** kit / ①foxes\n②kit / 1️⃣ foxes\n2️⃣ kit
    #foxes #kit / #foxes# #kit# / ＃foxes＃，＃kit＃ / #foxes#kit / - #foxes\n- #kit
    \#foxes; \#kit / 「foxes」「kit」 / 《foxes》；《kit》 / “foxes”, “kit” / “foxes; kit”
    "foxes", "kit". / `foxes`; `kit` / **foxes**; **kit** / _foxes_; _kit_ / **“foxes”**, kit
    •foxes •kit / -foxes\n-kit / - foxes\n- kit / ["foxes", "kit"] / ```json\n["foxes", "kit"]\n```
    ```foxes; kit``` / {\n  "tags": [\n    "foxes",\n    "kit"\n  ]\n}
    {"reason": "red shirts", "keyphrases": ["foxes", "kit"], "score": 1} / ["foxes", "k\u0069t"]
    {'keyphrases': ['foxes', 'kit']} / keyphrases = ["foxes", "kit"]
    Here you are: ["#foxes", "kit;"]. Anything else? / ["foxes", "kit" / [foxes; kit] / {foxes, kit}
    foxes؛ kit / foxes، kit / foxes; kit. / foxes.\nkit. / foxes; kit;
"""


@pytest.mark.parametrize("line", re.split(" / |\n    ", DECORATED.strip()))
def test_decoration_is_dropped(line):
    reply = line.replace("\\n", "\n")
    assert parse_answer(reply) == (PAIR, None)
    assert parse_answer(f"<think>why</think>\n\n{reply}\n") == (PAIR, "why")
    assert parse_answer(f"<answer>\n{reply}</answer>") == (PAIR, None)


@pytest.mark.parametrize(
    "reply, keyphrases",
    [
        ("red, white; blue", ["red, white", "blue"]),
        ("aa; AA; aa ;  aa", ["aa"]),
        ("花见、春天，樱樱", ["花见", "春天", "樱樱"]),
        ("#世界杯# #足球#", ["世界杯", "足球"]),
        ("#世界杯#阿根廷夺冠", ["世界杯", "阿根廷夺冠"]),
        ('["paris, france", "東京、日本"]', ["paris, france", "東京、日本"]),
        ("['paris, france', 'rock ’n’ roll']", ["paris, france", "rock ’n’ roll"]),
        ("「東京、日本」、「大阪」", ["東京、日本", "大阪"]),
        ("1. paris, france\n2. rome", ["paris, france", "rome"]),
        ("#2024elections; #5g", ["2024elections", "5g"]),
        ('["\\u003cthink\\u003e", "kit"]', ["kit"]),
        ("**<**think**>**; kit", ["kit"]),
    ],
)
def test_lists(reply, keyphrases):
    found = parse_answer(reply)[0]
    assert [phrase for phrase in found if len(phrase) > 1] == keyphrases


PHRASES = """
    2. bundesliga / no. 1 / c# / f# / u.s. / u.s / washington d.c. / ph.d. / #1 fan / 'n sync / 3d
    7" vinyl / the '90s / rock 'n' roll / "a" and "b" / s**t / f*** / mother's day / r&b / 50% / a|b
    10:30 / i <3 you / 5 > 3 / (the) foxes / $5 / @me / at&t / x_y / st. louis / 1,000 likes / c++
    -5 degrees / version 2.0 / <number> days / b.a.t. / foxes [live] / [live] foxes / 1. fc köln
    第1回 / 東京 日本 / 北京・上海 / yahoo! / why? / 🏆 / naïve / it's / № 5
    خبر عاجل / नया साल / שלום עולם / สวัสดี / ΦΙΛΟΣ / ёлка - 2 / 👩‍👩‍👧
"""
PHRASES = re.split(" / |\n    ", PHRASES.strip())


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_stays_a_phrase(phrase):
    others = ["first", phrase, "last"]
    assert parse_answer("; ".join(others))[0] == others
    if "," not in phrase:
        assert parse_answer(phrase)[0] == [phrase]
    for keyphrases in ([phrase], others, [phrase, "x"], ["x", phrase]):
        assert refusal(keyphrases) is None


# ------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    "keyphrases, answer",
    [
        (["paris, france"], "paris, france;"),
        (["1,000 likes"], "1,000 likes;"),
        (["#1 fan", "c#"], "#1 fan; c#"),
        (["foxes", "martin luther king jr."], "foxes; martin luther king jr.;"),
        (["jr.", "sr."], "jr.; sr.;"),
        (["'n sync", "rockin'"], "'n sync; rockin';"),
        (["x <"], "x <;"),
        (["a  b", " c\u3000d "], "a b; c d"),
    ],
)
def test_an_answer_ends_with_a_semicolon_only_where_it_must(keyphrases, answer):
    clean = [" ".join(phrase.split()) for phrase in keyphrases]
    assert refusal(keyphrases) is None and plain_answer(keyphrases) == answer
    assert parse_answer(answer) == (clean, None)
    assert parse_answer(cot_answer(" why ", keyphrases)) == (clean, "why")
    assert parse_answer(f"{answer}<|im_end|>")[0] == clean


@pytest.mark.parametrize(
    "keyphrases, lost",
    [
        (["foxes", "“heroes”"], "“heroes”"),
        (["#foxes", "kit"], "#foxes"),
        (["x", "- foxes"], "- foxes"),
        (["1. bundesliga", "2. bundesliga"], "1. bundesliga"),
        (["keyphrases: foxes"], "keyphrases: foxes"),
        (["《三体》"], "《三体》"),
        (["a <|im_end|>"], "a <|im_end|>"),
        (["＜think＞"], "＜think＞"),
        (["Kit", "x", "kit"], "kit"),
        (["a; b"], "a; b"),
        (["x", "a\nb"], "a\\nb"),
        (["a</THINK>"], "a</THINK>"),
        (["x", " \u3000"], " \\u3000"),
    ],
)
def test_what_cant_be_read_back_is_refused_by_name(keyphrases, lost):
    reason = refusal(keyphrases)
    assert f"posts.jsonl line 1 (id 'a'): the keyphrase '{lost}' would be lost" in reason
    assert "\n" not in reason
    check_record(post(keyphrases), "line 1")  # a post to predict may have it


def test_reasoning_that_would_end_early_is_refused():
    for cot in ("a <Think> b", "so</THINK>", "why<|im_end|>", "＜answer＞", "a</s>", "[THINK]"):
        assert "'cot' is the reasoning alone" in refusal(["x"], cot)
    assert refusal(["x"], "a < b, <3, <number>, answer > think") is None


LETTERS = """
    abcdefgéßøñ абвгд αβγδς خبرعاجل שלום नमस्ते สวัสดี 世界杯足球東京 かなカナー 한국어
    0123456789١٢ 😀🏆👩‍👧
""".split()  # of a script each
ANYWHERE = """
    ' ’ - & / . , 、 ، _ # @ : ! ? % + * ( ) [ ] { } " | = ~ ^ $ · ・ — < > “ ” ‘ « » 「 」 『 』
    《 》 【 】 ` • – ＃ 。 ． ; ； ؛ \\ 1. 2. 2) 1、 ① ** ``` <|im_end|> <think> </answer
    <|begin_of_box|> ◁/think▷ [THINK] keyphrases: 关键词： [" "] \u200b \ufeff \0 \ud800
"""
ANYWHERE = [*ANYWHERE.split(), "- ", "\u2028", "\x85", "\t", "\n"]


def word(draw):
    return "".join(draw.choices(draw.choice(LETTERS), k=draw.randint(1, 5)))


def test_any_keyphrases_are_read_back_or_refused():
    draw = random.Random(1)
    accepted = 0
    for _ in range(4000):
        keyphrases = []
        for _ in range(draw.randint(1, 4)):
            pieces = [draw.choice([word(draw), draw.choice(ANYWHERE)]) for _ in range(4)]
            keyphrases.append(draw.choice(["", " "]).join(pieces[: draw.randint(1, 4)]))
        cot = "".join(draw.choice([word(draw), " ", *"<>/.\n"]) for _ in range(6))
        if refusal(keyphrases, cot):
            continue
        accepted += 1
        clean = [" ".join(phrase.split()) for phrase in keyphrases]
        assert parse_answer(plain_answer(keyphrases)) == (clean, None)
        assert parse_answer(cot_answer(cot, keyphrases)) == (clean, cot.strip() or None)
        assert plain_answer(keyphrases) in ("; ".join(clean), "; ".join(clean) + ";")
    assert accepted > 500


def test_answers_of_cmkp_and_of_the_club_world_are_unchanged(world):
    """And their posts are accepted."""
    paths = [world / "train.jsonl", *(SHARED / "data" / "cmkp").glob("*_src.txt")]
    for path in paths:
        for _, record in read_posts(path):
            keyphrases = [phrase.strip() for phrase in record["keyphrases"]]
            assert refusal(keyphrases, record.get("cot")) is None
            answer = plain_answer(keyphrases)
            assert answer == "; ".join(keyphrases)
            assert parse_answer(answer) == (keyphrases, None)


def test_shared_cases():
    paths = [SHARED / "cases" / name for name in ("replies.jsonl", "keyphrases.jsonl")]
    if not all(path.exists() for path in paths):
        pytest.skip("the shared cases are not here")
    for _, _, case in chain(*map(read_jsonl, paths)):
        if "reply" in case:
            keyphrases, think = parse_answer(case["reply"])
            assert (keyphrases, bool(think)) == (case["keyphrases"], case["reasoned"])
        elif refusal(case["keyphrases"]) is None:
            assert parse_answer(plain_answer(case["keyphrases"]))[0] == case["keyphrases"]


# ---------------------------------------------------------------------------------- mutated replies

KEYPHRASES = """
    foxes / premier league / новый комплект / 世界杯 / 新しいキット / خبر عاجل / 한국 축구
    नया साल / kit / שלום עולם / c# / u.s. / 2. bundesliga / new kit / κύπελλο
"""
KEYPHRASES = re.split(" / |\n    ", KEYPHRASES.strip())
REASONS = ["red shirts so zzz", "красные рубашки zzz", "红色 球衣 zzz"]
REASONS += ["zzz; qqq", "zzz, qqq", "- zzz\n- qqq"]


def wide(name):
    return "".join(chr(ord(c) + 0xFEE0) for c in name)


def decorated(draw, phrases):
    """The phrases of a list in one of the ways in which models write it."""
    quotes = draw.choice("\"\" “” '' `` 「」 『』 《》 «» ****".split() + [""])
    half = len(quotes) // 2
    quoted = [quotes[:half] + phrase + quotes[half:] for phrase in phrases]
    numbered = [f"{i}. {phrase}" for i, phrase in enumerate(quoted, 1)]
    joint, indent = draw.choice(["; ", ";", "；", "\n", "\n\n", " ;\n"]), draw.choice([None, 2])
    lists = [
        joint.join(quoted) + draw.choice(["", "", "", ";", "\n"]),
        json.dumps(phrases, ensure_ascii=draw.random() < 0.5, indent=indent),
        json.dumps({"keyphrases": phrases}, ensure_ascii=False, indent=indent),
        str(phrases),
        "\n".join(draw.choice(["- ", "* ", "•", "· ", "▪"]) + phrase for phrase in quoted),
    ]
    if not any(re.search(r"^\d|#", phrase) for phrase in phrases):
        lists += ["\n".join("#" + phrase for phrase in phrases)]
        lists += [draw.choice(["", " "]).join(f"#{phrase}#" for phrase in phrases)]
    if len(phrases) > 1:
        lists += [draw.choice(["; ", "\n"]).join(numbered)]
        if not any(re.match(r"\d", phrase) for phrase in phrases):
            lists += [" ".join(numbered)]
        lists += ["\n".join(f"{i}、{phrase}" for i, phrase in enumerate(quoted, 1))]
    label = draw.choice(["Keyphrases: ", "**Hashtags:**\n", "关键词：", "The tags:\n\n"])
    text = label * (draw.random() < 0.3) + draw.choice(lists)
    return f"```\n{text}\n```" if draw.random() < 0.1 else text


def mutated(draw, phrases, reason):
    """A reply to which the answer is `phrases`, with its tags moved, doubled, cut and rewritten."""
    answer, kinds = decorated(draw, phrases), [str, str, str.upper, str.title, wide]
    think, end, opened, closed = (draw.choice(kinds)(tag) for tag in TAGS)
    thought = f"{think}{reason}{end}"
    blank = draw.choice(["", "\n", "\n\n", " "])
    inside = f"{opened}{answer}{closed}"
    replies = [
        answer,
        f"{thought}{blank}{answer}",
        f"{thought}{blank}{inside}",
        f"{inside}{blank}{thought}",  # moved
        f"{think}{reason}{inside}{end}",
        f"{opened}{thought}{blank}{answer}{closed}",
        f"{think}{reason}{opened}{end}{answer}{closed}",
        f"{think}{think}{reason}{end}{end}{opened}{opened}{answer}{closed}{closed}",  # doubled
        f"{thought}{reason}{end}{blank}{answer}",
        f"{thought}{opened}{closed}{inside}{opened}{blank}{closed}",
        f"{thought}{opened}{reason}{closed}{inside}",
        f"{reason}{end}{blank}{answer}",  # cut
        f"{reason}{end}{inside}",
        f"{think}{reason}{inside}",
        f"{thought}{opened}{answer}",
        f"{thought}{answer}{closed}",
        f"{answer}\n{think}{reason}",
        f"{thought}{TAGS[2]}{answer}\n{TAGS[3][: draw.randint(1, 8)]}",
        f"{think}{end}{blank}{answer}",
    ]
    reply = draw.choice(replies)
    ends = ["", "", "", "<|im_end|>", "</s>", "<|endoftext|>\n<|im_start|>user\nzzz", "\n\n"]
    return draw.choice(["", "", "\n", "<|im_start|>assistant\n"]) + reply + draw.choice(ends)


def test_ten_thousand_mutated_replies():
    draw = random.Random(2)
    for _ in range(10_000):
        phrases = draw.sample(KEYPHRASES, draw.randint(1, 5))
        reply = mutated(draw, phrases, draw.choice(REASONS))
        keyphrases, think = parse_answer(reply)
        assert keyphrases == phrases, reply
        assert think is None or "zzz" in think and not TAG.search(think), reply


def test_replies_cut_and_shuffled_at_random_give_no_tags():
    draw = random.Random(3)
    for _ in range(3000):
        reply = mutated(draw, draw.sample(KEYPHRASES, 2), "zzz") + mutated(draw, ["kit"], "qqq")
        edges = sorted(draw.randrange(len(reply) + 1) for _ in range(4))
        pieces = [reply[a:b] for a, b in zip([0, *edges], [*edges, None], strict=True)]
        draw.shuffle(pieces)
        keyphrases, think = parse_answer("".join(pieces)[: draw.randint(1, 300)])
        for phrase in [*keyphrases, think or "x"]:
            assert phrase.strip() and not TAG.search(phrase)
        assert not re.search(r"[;；؛\n\r]", "".join(keyphrases))
        assert len({phrase.casefold() for phrase in keyphrases}) == len(keyphrases)


HOSTILE = """
    < <| ＜ 「」 “” 'a' [" [1, { **a a. x 9 _ - #1 \\" <answer>x</answer> [ ** the hashtag key •
""".split()
HOSTILE += [*TAGS, *ANYWHERE, "1. ", "a\n", "a. ", '", ', " ", "[ ", '[" ', "** ", "< ", "the "]
HOSTILE += ["keyphrases\n", "hashtag ", "key ", "• ", "```\n"]


@pytest.mark.parametrize("around", ["{}", '["{}x', "#{}:", "1. a; 2. {}."])
def test_the_time_is_linear_in_the_length(around):
    """All of these take 0.1 s at most; where time is quadratic, 25,000 letters take 15 s."""
    for piece in HOSTILE:
        start = time.process_time()
        parse_answer(around.replace("{}", piece * (25_000 // len(piece))))
        assert time.process_time() - start < 3, piece
