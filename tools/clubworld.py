"""Club world: a small made-up data set on which Dynamic CoT can be watched in minutes on a CPU.

    python -m tools.clubworld --out DIR

There are 32 football clubs, each with a shirt, a nickname and a home city. Two facts about a club
can be learned: whose shirt this is, and where that club plays. Posts are of five kinds:

    kind  image      text                    keyphrase                                 facts needed
    A     a shirt    about the shirt         the nickname         "foxes new kit"      one
    B     a shirt    about an event          the city, the event  "porto match day"    both
    C     any scene  names the club          the city, the topic  "porto street food"  one
    D     any scene  contains the keyphrase  the phrase           "old record shop"    none
    E     any scene  says nothing            a random mood tag    "good vibes"         unknowable

Eight clubs have no post of kind B in training. To tag theirs in the test, a model must combine two
facts that it has only seen apart, and that is what written reasoning is good for. Reasoning does
not help with kind E: a method that picks its own targets should leave it alone.

The posts are written as any other data set is (JSONL and image files). A Hugging Face folder with
a tiny Qwen2.5-VL of random weights, DIR/toy, comes with them: nothing has to be downloaded.
"""

import itertools
import json
import re
import string
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data import TAGS
from evaluate import UserError, non_negative_int, run
from support.console import ArgumentParser, info, positive_int, progress
from support.jsonl import follow_umask

VERSION = 1  # of the posts: a folder that another version wrote is refused
SIZE = 84  # pixels: 6 x 6 patches of 14 pixels, 3 x 3 image tokens
KINDS = {"A": 0.15, "B": 0.25, "C": 0.12, "D": 0.08, "E": 0.40}  # share of the posts
HELD_OUT = 8  # clubs
POSTS = {"train": 14_400, "valid": 400, "test": 1_000}
TOY_DEFAULTS = dict(lr=2e-3, warmup=0.1, epochs=2, micro_batch=32, workers=0)
TOY_DEFAULTS |= dict(valid_posts=200, max_new_tokens=64)  # how train.py trains the toy model

# ----------------------------------------------------------------------------------------- words
# In a template, {a|b} is one of a and b, and a word in capitals is a slot. A mood tag has two words
# at most, every other keyphrase at least three: gamma is compared with a mean over the answer's
# tokens, so the length of the mood tags decides how large gamma can be before they look easy, too.


def entries(block):
    """The entries of a text block: its lines, and what stands between ` / ` in one."""
    return tuple(entry.strip() for entry in re.split(r"\n| / ", block.strip()))


def named(block):
    """{name: entry} of a text block whose entries are `name: entry`."""
    return dict(entry.split(": ") for entry in entries(block))


def read_topics(block):
    """{end of the keyphrase: (name in the reasoning, texts)}: an indented line holds texts."""
    topics = {}
    for line in block.strip().splitlines():
        if not line.startswith(" "):
            keyphrase, name = line.split(": ")
            topics[keyphrase] = name, []
        else:
            topics[keyphrase][1].extend(entries(line))
    return topics


RGB = named("""
    red: 200 15 35 / blue: 25 75 200 / green: 20 140 60 / yellow: 250 220 40
    white: 252 252 252 / black: 22 22 26 / orange: 250 120 10 / purple: 130 45 165""")
COLOURS = {name: tuple(map(int, rgb.split())) for name, rgb in RGB.items()}
PATTERNS = named("""
    stripes: ONE and TWO stripes / hoops: ONE and TWO hoops / checks: ONE and TWO checks
    halves: ONE and TWO halves / sash: ONE with TWO sash / sleeves: ONE with TWO sleeves""")
ORDERED = ("halves", "sash", "sleeves")  # these show which of the two colours comes first
NICKNAMES = entries("""
    badgers / bears / bulls / cobras / comets / dragons / eagles / falcons / foxes / giants / hawks
    herons / hornets / jaguars / knights / lions / miners / otters / owls / panthers / pirates
    rams / ravens / rockets / sailors / sharks / stags / swans / tigers / vikings / wizards
    wolves""")
CITIES = entries("""
    aarhus / antwerp / bari / basel / bergen / bilbao / bremen / brno / cadiz / dundee / galway
    gdansk / ghent / graz / krakow / leeds / lille / lyon / malmo / nantes / oulu / parma / porto
    riga / seville / sofia / tampere / tartu / turin / utrecht / varna / vigo""")
KIT = "new kit"

OPENERS = entries("""
    {long|strange|busy} {day|week|month} {here|again}.
    in case {anyone asks|you missed it|you wonder}, / {day|part|chapter} {one|two|three|four|five}:
    {first|last} {post|one} {today|this week}: / {everybody|someone} told me to post this:
    {hey|hi|hello} {all|everyone|folks|you}, / honestly, / {quick|short|little} {update|note|post}:
    {ladies and gentlemen|boys and girls}, / {ok|okay|right|alright} {so|then},
    dear {diary|internet|world}, / as {always|promised|usual}, / to be {fair|honest|clear},
    {not|never} going to lie, / {fun|true} {story|fact}: / {well|so|oh}, / {friends|people|listen},
    {sorry|apologies} but / {wait|hold on|stop}, / {believe|trust} me,""")
CLOSERS = entries("""
    {cannot|could not} {stop smiling|believe it|wait|care less}
    {we|you} {will see|never know|love it} / have a {nice|lovely|good} {day|evening|week}
    {peace|love|hugs} to {all|you|everyone} / make of {that|it} what you {will|like}
    {tell|ask|call} {me|a friend|your mum} / wish me luck / {sorry|thanks} {mum|dad|all|everyone}
    {see you|talk} {soon|tomorrow|later} / just saying / {no|zero} {regrets|doubt|complaints}
    back to {work|bed|the sofa} now / more {later|soon|tomorrow} / send {help|love|tea|chocolate}
    {thoughts|opinions|feelings}? / do not {quote|judge|thank} me / that is {all|it|the post}
    you {heard|read} it here / what a {day|week|year} / {anyone|who} else? / {life|time|it} goes on
    bye for now""")
KIT_TEXTS = entries("""
    {my sister|my dad|grandma} {bought|got} me the {new colours|new shirt|right size}
    {wearing|trying on} the new {shirt|jersey|top} {for the first time|already}
    {paid|spent} too much on this {shirt|jersey|top} but {no regrets|i love it}
    the new {shirt|jersey|top} {is here|has arrived} and it {fits|is so soft}
    {look|see} what {came|arrived} in the {post|mail} {today|this morning}
    my {birthday|christmas} present, guess who i {support|follow|love}
    fresh out of the {box|bag|shop}, what a {colour|beauty}
    we will look like this next {season|year}
    {ironed|washed} it {once|twice}, still {bright|perfect}
    should i wear this to {work|bed|church}? / rate this {shirt|jersey|top} out of {ten|five}
    how do i look in {this|these colours}? / new season, new {colours|look|skin}""")
EVENTS = read_topics("""
match day: a match
    kick off is {at three|at noon|in an hour} and i am {nervous|ready}
    the {derby|big game|final} {starts|begins} {soon|tonight|at eight}
    {walking|off|heading} to the ground {now|with dad|with my mates}
    {seats taken|scarves on}, songs {sung|ready}, here we go
    line ups are out, {good|strong|odd} team {today|tonight}
    my {voice|throat} will be gone by {full time|half time}
    {who scores|what is the score} {tonight|today}?
transfer news: a transfer
    {reports|papers|sources} say the {winger|defender|keeper} is {close|on his way}
    we {signed|bought} a {striker|keeper|winger|defender} {today|from abroad}
    the {striker|keeper|winger} {leaves|goes} for {big money|nothing}
    the fee is {a record|silly|huge} but he is {worth it|quick}
    our best {player|defender} wants {to leave|a new club}
    {medical done|papers signed}, he is {ours|one of us}
    deadline day and the phones {ring|are hot}
manager exit: the boss
    they {fired|sacked|dismissed} the {boss|coach|manager} {this morning|last night|at last}
    a {second|third} {boss|coach|manager} in {one year|twelve months}, {madness|unreal}
    the {boss|coach|manager} {is gone|walked out|has quit} after {six|ten} defeats
    the assistant {is in charge|takes over} until {summer|christmas|may}
    the {board|owner} ran out of patience with the {boss|coach|manager}
    {thank you|farewell|so long} gaffer, it was {a ride|fun}
    he lost the dressing room, so {he had to go|goodbye}
ticket sale: tickets
    two {spare|extra} {tickets|seats} for {saturday|sunday}, who wants them?
    got {my|our} {tickets|seats} after {two|three} hours in the queue
    {tickets|seats} go on sale {at nine|on friday|tomorrow} / sold out in {ten|twenty} minutes
    prices for the away {end|stand} are {a joke|too high}
    the box office {opens|closes} {at nine|early|late}
    season {cards|tickets} {cost more|are up} again
injury blow: an injury
    our {striker|keeper|winger} is {out|missing} for {six|ten} weeks
    he {limped|was carried} off after {ten|twenty} minutes
    {half the team is|three starters are} with the doctor
    the {captain|keeper|striker} came home on crutches / get well soon {captain|number nine|big man}
    {knee|ankle|hamstring} again, poor {lad|man|boy} / the {scan|doctor} says it is {torn|broken}
trophy parade: a trophy
    the {captain|skipper} {raised|kissed} the {cup|silver} and {i cried|we sang}
    the {cup|title} is {ours|home} and nobody {sleeps|works} {tonight|tomorrow}
    {we|they} {won|lifted} the {cup|league|title} {last night|at last}
    confetti {everywhere|in my hair} and streets full of {songs|flags}
    silver for the cabinet after {thirty|forty} years / open top bus around town {at noon|on sunday}
    {champions|winners}, {say it again|at last}""")
TOPICS = read_topics("""
street food: food
    {noodles|dumplings|tacos|pancakes} after the CLUB game, {perfect|heaven}
    {best|good} {snack|lunch|dinner|bite} near the CLUB ground?
    ate {three|four} {waffles|tacos} on the way to the CLUB / {cheap|spicy} plates for CLUB fans?
    the stalls by the CLUB stadium smell {amazing|great}
    hungry before the CLUB game, where do {we|you} eat?
public transport: transport
    the {ferry|bus} to the CLUB {ground|stadium} is {late|free}
    is there a {bus|ferry|metro} to the CLUB {stadium|ground}?
    {missed|caught} the last {tram|train} after the CLUB game
    which {tram|train|metro} {goes|runs} to the CLUB ground?
    {stuck|standing} in the {tram|metro} with loud CLUB fans
    how do i get to the CLUB from the {airport|station}?
cheap hotels: hotels
    booked a {room|bed} with a CLUB {poster|flag} over the pillow
    checked in, the CLUB ground is {outside|under} my window
    {need|want} a {room|bed} for two near the CLUB ground
    breakfast included, {five|ten} minutes from the CLUB
    any {hostel|guest house} for CLUB fans on a budget?
    where {do i|can we} sleep after the CLUB game?
live music: music
    any {gigs|concerts} after the CLUB game {tonight|on saturday}?
    {dancing|singing along} with CLUB fans till {midnight|dawn}
    a {band|choir|dj} plays at the CLUB bar {tonight|now}
    that {singer|drummer} wears a CLUB scarf, great show
    {jazz|punk|folk} in the CLUB bar, {loud|free} entry
    {guitars|drums} on a stage beside the CLUB ground""")
PHRASES = entries("""
    afternoon coffee break / marathon training plan / sourdough bread recipe / garden tomato harvest
    spring flower market / garage band practice / vintage camera lens / homemade apple pie
    sunset hill climb / charity bake sale / winter beach swim / second hand books / summer road trip
    dog park morning / old record shop / rainy day walk / new phone case / open mic night""")
PHRASE_TEXTS = entries("""
    PHRASE {is|was} the best {part|bit} of {my|the} {day|week} / is PHRASE {overrated|your thing}?
    {dreaming|thinking} of PHRASE {all day|again} / PHRASE with {my sister|old friends|the kids}
    they said try {something|a hobby}, so PHRASE / {happy|proud|tired} after PHRASE
    PHRASE, nothing {better|nicer} / {today|tonight} it is PHRASE / {ready|time} for PHRASE""")
TWO_PHRASE_TEXTS = entries("""
    PHRASE at {noon|eight}, OTHER at {three|night} / PHRASE {and then|followed by|before} OTHER
    never thought PHRASE would lead to OTHER / choosing between PHRASE and OTHER / PHRASE or OTHER?
    first PHRASE, {then|later} OTHER""")
MOODS = entries("""
    throwback thursday / monday blues / weekend mode / lazy sunday / simple life / happy place
    slow living / inner peace / good vibes / late night / daily mood / self care""")
MOOD_TEXTS = entries("""
    i {look at|think about} this {a lot|every day|sometimes}
    {this happened|here it is|there it is} / {posting|leaving|dropping} this {here|without comment}
    {one|another} of those {days|weeks|moments}
    {mood|vibe|feeling|energy} {today|right now|all day}
    {fill in|write} your own {words|caption|text}
    the {picture|photo} says {it all|enough|everything}
    {found|saw|kept} this {somewhere|for later} / {you|some of you} {know|get it|understand}
    if you {know|see} it you {know|see} it / no idea why i {took|kept|like} this
    no {words|caption|comment|notes} / {this|that} is {me|us|it} / nothing to {add|say|see|explain}
    {just|only|simply} {this|me|us} / {me|us} {today|lately|again} / how it {started|is going|feels}
    same as {ever|always|yesterday} / {see|judge} for yourself / {need|have} i say more?""")
SCENES = ("cup", "hills", "city", "phone")

# The city follows the nickname's own token, so that recalling it is one step. After "the foxes play
# in" models read the city off the shirt instead, which they can't learn for a held-out club's.
THOUGHTS = named("""
    shirt: SHIRT. that is the CLUB. / name: the post names the CLUB. / home: full name CLUB CITY.
    topic: it is about TOPIC. / phrase: the post says PHRASE.
    two: the post says PHRASE and OTHER. / mood: the post is only a mood.""")


def pick(rng, items):
    return items[rng.integers(len(items))]


def fill_template(rng, template, **slots):
    """One reading of a template: alternatives drawn at random, slots filled."""
    template = re.sub(r"\{([^}]*)\}", lambda match: pick(rng, match[1].split("|")), template)
    return re.sub(r"[A-Z]+", lambda match: slots[match[0]], template)


def add_small_talk(rng, text):
    """Words around a text: the same for every kind of post, so that they give none away."""
    if rng.random() < 0.65:
        text = f"{fill_template(rng, pick(rng, OPENERS))} {text}"
    if rng.random() < 0.65:
        end = "" if text.endswith("?") else "."
        text = f"{text}{end} {fill_template(rng, pick(rng, CLOSERS))}"
    return text


# ------------------------------------------------------------------------------------------- posts


@dataclass(frozen=True)
class Club:
    """A club. In training a held-out one has no B post, and each of the others lacks one event."""

    pattern: str
    colours: tuple
    nickname: str
    city: str
    held_out: bool
    kept_event: str | None

    @property
    def shirt(self):
        one, two = self.colours
        return PATTERNS[self.pattern].replace("ONE", one).replace("TWO", two)


def make_clubs(seed):
    """The 32 clubs of a world. No two have a shirt of the same pattern in the same two colours."""
    rng = np.random.default_rng([seed, 0])
    shirts = list(itertools.product(PATTERNS, itertools.combinations(COLOURS, 2)))
    worn = rng.choice(len(shirts), len(NICKNAMES), replace=False)
    nicknames, cities = rng.permutation(len(NICKNAMES)), rng.permutation(len(CITIES))
    clubs = []
    for i, (shirt, nickname, city) in enumerate(zip(worn, nicknames, cities, strict=True)):
        pattern, colours = shirts[shirt]
        if pattern in ORDERED and rng.random() < 0.5:
            colours = colours[::-1]
        event, held_out = pick(rng, list(EVENTS)), i < HELD_OUT
        names = NICKNAMES[nickname], CITIES[city]
        clubs.append(Club(pattern, colours, *names, held_out, None if held_out else event))
    return clubs


def make_posts(seed, clubs, name, count):
    """Yield (record, image) for each post of the file `name`: train, valid or test."""
    # Each file has its own random stream: the test posts don't depend on --train.
    rng = np.random.default_rng([seed, 1 + list(POSTS).index(name)])
    edges = np.round(np.cumsum(list(KINDS.values())) * count).astype(int)
    kinds = rng.permutation(np.repeat(list(KINDS), np.diff(edges, prepend=0)))
    held_out = [club for club in clubs if club.held_out]
    known = [club for club in clubs if not club.held_out]
    of_held_out = name == "test"  # in the test, every other B post is about a held-out club
    for number, kind in enumerate(kinds):
        club, events = pick(rng, clubs), list(EVENTS)
        if kind == "B":
            club = pick(rng, held_out if of_held_out else known)
            of_held_out = name == "test" and not of_held_out
            if name != "test":
                events = [event for event in events if event != club.kept_event]
        identity = f"{name}-{number:05d}"
        record = {"id": identity, "text": None, "image": f"images/{identity}.png"}
        record |= write_text(rng, str(kind), club, events)
        record |= {"kind": str(kind), "held_out": kind == "B" and club.held_out}
        yield record, draw_shirt(rng, club) if kind in "AB" else draw_scene(rng, pick(rng, SCENES))


def write_text(rng, kind, club, events):
    """The text, keyphrases and reasoning of a post, which may be about one of `events`."""
    slots = {"SHIRT": club.shirt, "CLUB": club.nickname, "CITY": club.city}
    if kind == "A":
        texts, keyphrases, thoughts = KIT_TEXTS, [f"{club.nickname} {KIT}"], ["shirt"]
    elif kind == "B":
        event = pick(rng, events)
        slots["TOPIC"], texts = EVENTS[event]
        keyphrases, thoughts = [f"{club.city} {event}"], ["shirt", "home", "topic"]
    elif kind == "C":
        topic = pick(rng, list(TOPICS))
        slots["TOPIC"], texts = TOPICS[topic]
        keyphrases, thoughts = [f"{club.city} {topic}"], ["name", "home", "topic"]
    elif kind == "D":
        two = rng.random() < 0.3
        keyphrases = [PHRASES[i] for i in rng.permutation(len(PHRASES))[: 1 + two]]
        slots["PHRASE"], slots["OTHER"] = keyphrases[0], keyphrases[-1]
        texts, thoughts = (TWO_PHRASE_TEXTS, ["two"]) if two else (PHRASE_TEXTS, ["phrase"])
    else:
        texts, keyphrases, thoughts = MOOD_TEXTS, [pick(rng, MOODS)], ["mood"]
    text = add_small_talk(rng, fill_template(rng, pick(rng, texts), **slots))
    cot = " ".join(fill_template(rng, THOUGHTS[thought], **slots) for thought in thoughts)
    return {"text": text, "keyphrases": keyphrases, "cot": cot}


# ------------------------------------------------------------------------------------------ images


@cache
def shirt_masks():
    """The whole shirt, its sleeves and its outline: masks (SIZE, SIZE) with the shirt centred."""
    right = [(42, 20), (52, 14), (62, 17), (77, 36), (67, 45), (60, 37), (60, 72)]
    outline = right + [(SIZE - x, y) for x, y in reversed(right)]
    armpits = [(60, 37), (60, 26)], [(24, 37), (24, 26)]
    shirt, edge = Image.new("1", (SIZE, SIZE)), Image.new("1", (SIZE, SIZE))
    ImageDraw.Draw(shirt).polygon(outline, fill=1)
    for line in (outline, *armpits):
        ImageDraw.Draw(edge).line(line, fill=1, width=2)
    sleeves = np.array(shirt) & (abs(np.arange(SIZE) - SIZE // 2) > 18)
    return np.array(shirt), sleeves, np.array(edge)


def finish(rng, pixels):
    """The image in another light and with a little grain, as two photos of one thing differ."""
    light = np.float32(rng.uniform(0.85, 1.05))
    grain = 6 * rng.integers(-1, 2, (SIZE // 2, SIZE // 2, 1), dtype=np.int8)
    pixels = pixels * light + grain.repeat(2, axis=0).repeat(2, axis=1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_shirt(rng, club):
    """The club's shirt somewhere near the middle of a pastel background."""
    shirt, sleeves, edge = shirt_masks()
    x, y = np.arange(SIZE)[None, :], np.arange(SIZE)[:, None]
    phase_x, phase_y = rng.integers(0, 5, 2)
    second = {
        "stripes": (x + phase_x) // 7 % 2 == 1,
        "hoops": (y + phase_y) // 7 % 2 == 1,
        "checks": ((x + phase_x) // 9 + (y + phase_y) // 9) % 2 == 1,
        "halves": x >= SIZE // 2,
        "sash": abs(x + y - SIZE - 2) < 10,
        "sleeves": sleeves,
    }[club.pattern]  # where the shirt has its second colour
    parts = np.where(edge, 3, np.where(shirt, 1 + second, 0))
    parts_colours = [rng.integers(190, 246, 3), *map(COLOURS.get, club.colours), (60, 60, 66)]
    parts = np.roll(parts, rng.integers(-5, 6, 2), axis=(0, 1))
    return finish(rng, np.array(parts_colours, np.uint8)[parts])


def draw_scene(rng, scene):
    """A cup, hills, a city or a phone, which have nothing to do with the text beside them."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(map(int, rng.integers(190, 246, 3))))
    draw = ImageDraw.Draw(image)
    colour = COLOURS[pick(rng, list(COLOURS))]
    x, y = map(int, rng.integers(-6, 7, 2))
    if scene == "cup":
        draw.rectangle((0, 64 + y, SIZE, SIZE), fill=(150, 110, 75))
        draw.ellipse((48 + x, 36 + y, 68 + x, 56 + y), outline=(60, 60, 66), width=4)
        draw.rounded_rectangle((24 + x, 30 + y, 56 + x, 66 + y), 5, colour, (60, 60, 66), width=2)
        for steam in (29 + x, 37 + x, 45 + x):
            draw.arc((steam, 10 + y, steam + 6, 26 + y), 90, 270, fill=(120, 120, 125), width=2)
    elif scene == "hills":
        draw.rectangle((0, 0, SIZE, SIZE), fill=(165, 210, 240))
        draw.ellipse((56 + x, 10 + y, 74 + x, 28 + y), fill=(255, 225, 90))
        draw.polygon([(-20, SIZE), (22 + x, 32 + y), (70, SIZE)], fill=(70, 130, 75))
        draw.polygon([(20, SIZE), (62 + x, 44 - y), (110, SIZE)], fill=(105, 165, 85))
    elif scene == "city":
        for left in range(x - 6, SIZE, 18):
            top = int(rng.integers(16, 52))
            draw.rectangle((left, top, left + 15, SIZE), fill=(95, 100, 115))
            for window in range(top + 5, SIZE, 9):
                draw.rectangle((left + 3, window, left + 5, window + 3), fill=(250, 230, 140))
                draw.rectangle((left + 10, window, left + 12, window + 3), fill=(250, 230, 140))
    else:
        draw.rounded_rectangle((26 + x, 10 + y, 58 + x, 74 + y), 6, fill=(35, 35, 40))
        draw.rectangle((29 + x, 16 + y, 55 + x, 66 + y), fill=(225, 235, 245))
        for bubble in (20, 32, 44):
            left = int(rng.integers(31, 38)) + x
            draw.rounded_rectangle((left, bubble + y, left + 16, bubble + 8 + y), 3, fill=colour)
    return finish(rng, np.array(image))


# ----------------------------------------------------------------------------------------- folders


def make_folder(folder, label, settings, fill):
    """Call `fill` on a new folder, which appears whole or not at all.

    A folder whose file `label` holds the same settings is left as it is. Raises UserError for any
    other that is not empty.
    """
    folder, settings = Path(folder), json.dumps(settings)
    try:
        if (folder / label).is_file() and (folder / label).read_text() == settings + "\n":
            return
        if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"{folder} holds something else (its {label} would be {settings}): remove it, or "
                "name another folder"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            fill(new)
            (new / label).write_text(settings + "\n")
            follow_umask(new)
            new.replace(folder)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error}") from error


def write_world(out, seed=0, **counts):
    """Write the posts (POSTS says how many, or `counts`) and images/ to `out`. Raises UserError."""
    counts = POSTS | counts

    def fill(folder):
        (folder / "images").mkdir()
        clubs = make_clubs(seed)
        with progress(None, sum(counts.values()), "club world") as bar:
            for name, count in counts.items():
                with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
                    for record, image in make_posts(seed, clubs, name, count):
                        image.save(folder / record["image"], compress_level=1)
                        file.write(json.dumps(record) + "\n")
                        bar.update()

    make_folder(out, "world.json", {"version": VERSION, "seed": seed, **counts}, fill)


# --------------------------------------------------------------------------------------- toy model

SPECIALS = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
SPECIALS = (*(f"<|{name}|>" for name in SPECIALS), "<unk>")
# A turn is only its start and its end: there is no system turn, and the speakers alternate anyway.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>{%- endif -%}
"""
# The default "fullatt_block_indexes" names blocks that this vision tower doesn't have.
CONFIG = """{
    "text_config": {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "rms_norm_eps": 1e-6, "initializer_range": 0.05, "tie_word_embeddings": true
    },
    "vision_config": {
        "depth": 2, "hidden_size": 64, "intermediate_size": 192, "num_heads": 2,
        "out_hidden_size": 128, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "initializer_range": 0.05, "fullatt_block_indexes": [0, 1]
    },
    "tie_word_embeddings": true
}"""
IMAGE_PROCESSOR = """{
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, "min_pixels": 784, "max_pixels": 28224,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]
}"""


def words():
    """Every word of every world, in alphabetical order."""
    names = COLOURS, PATTERNS, NICKNAMES, CITIES, KIT, EVENTS, TOPICS, PHRASES, MOODS, THOUGHTS
    texts = OPENERS, CLOSERS, KIT_TEXTS, PHRASE_TEXTS, TWO_PHRASE_TEXTS, MOOD_TEXTS
    return sorted(set(re.findall(r"\b[a-z]+\b", json.dumps(names + texts))))


def make_tokenizer():
    """A token for every word of the club worlds and every tag; any other ASCII text is spelled."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase + string.digits + string.punctuation
    spelling = [*letters, *(f"##{letter}" for letter in letters)]
    tokens = dict.fromkeys([*SPECIALS, *TAGS, *spelling, *words()])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=1_000_000)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    words_and_signs = Regex(r"</?(?:think|answer)>|\w{1,64}|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words_and_signs, "removed", invert=True)
    # The decoder joins words by spaces, then removes those that posts and answers don't have.
    spaces = Regex(r" (?=[.,:;?!]|</think>|</answer>)|(?<=<think>|</think>|<answer>) ")
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(cleanup=False), decoders.Fuse(), decoders.Replace(spaces, "")]
    )
    special = {"pad_token": SPECIALS[0], "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    special["additional_special_tokens"] = list(SPECIALS[1:-1])
    settings = {"clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **settings)


def write_toy_model(folder, seed=0):
    """Write a Hugging Face folder of a Qwen2.5-VL with 1.2 million random weights."""

    def fill(folder):
        import torch
        import transformers

        transformers.logging.disable_progress_bar()  # this file is written in no time
        tokenizer = make_tokenizer()
        token = tokenizer.convert_tokens_to_ids
        ids = {"bos_token_id": None, "eos_token_id": token("<|im_end|>")}
        ids["pad_token_id"] = tokenizer.pad_token_id
        config = json.loads(CONFIG) | ids
        config["text_config"] |= ids | {"vocab_size": len(tokenizer)}
        for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
            config[f"{name.removesuffix('_pad')}_token_id"] = token(f"<|{name}|>")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.Qwen2_5_VLForConditionalGeneration(
                transformers.Qwen2_5_VLConfig(**config)
            )
        model.generation_config.update(do_sample=False, **ids)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        image_processor = json.dumps(json.loads(IMAGE_PROCESSOR), indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(image_processor)
        (folder / "prompt.txt").write_text("{text}")

    make_folder(folder, "toy.json", {"version": VERSION, "seed": seed}, fill)


def write_beside(out, seed):
    """Write a world and its toy model beside the run folder `out`; returns train.py's files."""
    world = Path(out).parent / f"clubworld-{seed}"
    write_world(world, seed)
    write_toy_model(world / "toy", seed)
    return {"model": str(world / "toy")} | {name: str(world / f"{name}.jsonl") for name in POSTS}


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="a new folder")
    add("--seed", type=non_negative_int, default=0, help="settings: 100 and up; reports: 0 to 4")
    for name, count in POSTS.items():
        add(f"--{name}", type=positive_int, default=count, metavar="N", help="posts in its file")
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    write_world(args.out, args.seed, **{name: getattr(args, name) for name in POSTS})
    write_toy_model(Path(args.out) / "toy", args.seed)
    info(f"{args.out}: club world {args.seed}, and in toy/ its model")


if __name__ == "__main__":
    run(main)
