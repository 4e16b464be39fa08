"""Self-contained HTML pages to look at: a gallery of predictions, and training curves.

    python pages.py gallery preds.jsonl test.jsonl --train train.jsonl --out gallery.html
    python pages.py curves out/a out/b --out curves.html

Everything a page needs is in it, pictures as small copies, and nothing is loaded from anywhere. What people
wrote in their posts stays text, whatever it holds.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import math
import os
import re
import signal
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import data
from evaluate import (
    INVALID_WORDS,
    UserError,
    align,
    normalize,
    parse_line,
    read_lines,
    read_predictions,
    read_references,
    read_rows,
    run,
    score,
    train_keyphrases,
)

# ------------------------------------------------------------------------------------------------- any page

NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def esc(value):
    """Any value as text for an element or a quoted attribute; what HTML can't hold becomes U+FFFD."""
    return html.escape(NOT_TEXT.sub("\ufffd", str(value)))


MADE_BY = '<meta name="generator" content="pages.py {tool}">'


def page(tool, title, style, body, script):
    """A whole page. Its policy lets it load nothing, and run no script but this one."""
    style = STYLE + style
    allowed = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (style, script)
    ]
    policy = (
        f"default-src 'none'; img-src data:; style-src {allowed[0]}; script-src {allowed[1]}; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{MADE_BY.format(tool=tool)}
<title>{esc(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def check_out(pages, inputs):
    """Raise UserError where a page to write is a folder, or one of the files that are read."""
    inputs = {Path(file).resolve() for file in inputs}
    for path in pages:
        if path.is_dir():
            raise UserError(f"{path}: a folder; --out is the page to write")
        if path.resolve() in inputs:
            raise UserError(f"{path}: one of the files to read; choose another --out")


STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f6f5f2; --card: #fff; --ink: #1f1e1b; --quiet: #66635b; --line: #dedbd3; --accent: #285b87;
  --good: #1a6a3c; --good-ground: #e9f4ec; --bad: #a2351f; --bad-ground: #fbeeea; --new: #6a3d9a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #161615; --card: #1f1f1d; --ink: #e9e7e1; --quiet: #a5a298; --line: #3a3935; --accent: #8dbbe6;
    --good: #7fcf9b; --good-ground: #1b2e22; --bad: #f29a86; --bad-ground: #38211c; --new: #c9a6f0;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.75rem 1rem 3rem; max-width: 78rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere;
}
@media (min-width: 48rem) { body { padding: 2.5rem 2rem 4rem; } }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; font-weight: 650; letter-spacing: -.015em; }
h1 + p { margin: .35rem 0 0; color: var(--quiet); max-width: 46rem; }
a { color: var(--accent); text-underline-offset: .15em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
.scroll { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-size: clamp(.84rem, 3.4vw, .9rem); font-variant-numeric: tabular-nums; }
caption { padding-bottom: .35rem; text-align: left; font-size: .85rem; color: var(--quiet); }
th, td { padding: .35rem 0 .35rem clamp(.7rem, 2vw, 1.5rem); text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--quiet); font-weight: 500; }
tbody th { font-weight: 500; }
.away { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
"""

# ----------------------------------------------------------------------------- the gallery: what the scores see


class Mark(NamedTuple):
    """A keyphrase as the scores see it."""

    phrase: str
    kind: str  # of a prediction: right, wrong; of a reference: found, missed; of either: repeated, ignored
    unseen: bool


def marks(prediction, reference, known):
    """([Mark of each prediction], [Mark of each reference]) of a post, by the rules of `evaluate.statistics`.

    Of equal phrases the first counts; an empty reference and a prediction with an invalid word don't. `known`
    are the normalized keyphrases of the training data, None where there is no such data.
    """
    predicted = [(phrase, normalize(phrase)) for phrase in prediction["keyphrases"]]
    wanted = [(phrase, normalize(phrase)) for phrase in reference["keyphrases"]]
    valid = {words for _, words in predicted if INVALID_WORDS.isdisjoint(words)}
    right = valid.intersection(words for _, words in wanted if words)

    def marked(phrases, counts, hit, miss):
        before = set()
        for phrase, words in phrases:
            if not counts(words):
                kind = "ignored"
            elif words in before:
                kind = "repeated"
            else:
                kind = hit if words in right else miss
            before.add(words)
            yield Mark(phrase, kind, known is not None and not (words and words in known))

    return list(marked(predicted, valid.__contains__, "right", "wrong")), list(
        marked(wanted, bool, "found", "missed")
    )


def kinds(prediction, reference, known):
    """What the filters know of a post: a tuple with right or wrong, seen or unseen, reasoned or direct.

    right: its first prediction is (as P@1 has it); unseen: it has an unseen reference. A kind that can't be
    told isn't there.
    """
    predicted, wanted = marks(prediction, reference, known)
    wanted = [mark for mark in wanted if mark.kind in ("found", "missed")]
    found = []
    if wanted:
        found.append(
            next((mark.kind for mark in predicted if mark.kind in ("right", "wrong")), "wrong")
        )
        if known is not None:
            found.append("unseen" if any(mark.unseen for mark in wanted) else "seen")
    if "think" in prediction:
        found.append("reasoned" if (prediction["think"] or "").strip() else "direct")
    return tuple(found)


# --------------------------------------------------------------------------------------- the gallery: pictures

LONGEST = 320  # pixels of a small copy: sharp on a phone, about 10 kB


def small_copy(path):
    """(data URL, None) of a picture no longer than LONGEST, or (None, why it can't be read)."""
    from PIL import Image

    try:
        image = data.load_image(
            path, LONGEST * LONGEST // 4
        )  # four times this is what it keeps of a large JPEG
    except data.Unreadable as error:
        # Pillow's own words name the whole path; a page may go where the folders are nobody's business.
        return None, f"{path.name}: {str(error).partition(':')[0]}"
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=72, method=2)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}", None


def small_copies(pool, paths):
    """`small_copy` of every path that isn't None, in order; (None, None) for the others."""
    copies = pool.map(small_copy, [path for path in paths if path is not None], chunksize=8)
    return [next(copies) if path is not None else (None, None) for path in paths]


# ------------------------------------------------------------------------------------------- the gallery's HTML

SIGNS = {"right": "✓", "wrong": "✗", "found": "✓", "missed": "○", "repeated": "–", "ignored": "–"}
NOTES = {"repeated": "repeated", "ignored": "not counted"}


def phrases_html(marked):
    if not marked:
        return '<p class="none">none</p>'
    items = []
    for mark in marked:
        note = f" <small>{NOTES[mark.kind]}</small>" if mark.kind in NOTES else ""
        unseen = ' <small class="new">unseen</small>' if mark.unseen else ""
        said = "" if note else f'<span class="away">{mark.kind}: </span>'
        text = f"<bdi>{esc(mark.phrase)}</bdi>" if mark.phrase.strip() else "<i>empty</i>"
        items.append(
            f'<li class="{mark.kind}"><span aria-hidden="true">{SIGNS[mark.kind]}</span>{said}{text}'
            f"{note}{unseen}</li>"
        )
    return f'<ul class="phrases">{"".join(items)}</ul>'


def post_html(number, post, prediction, picture, known):
    """One post as an article; `picture` is `small_copy`'s pair."""
    predicted, wanted = marks(prediction, post, known)
    source, reason = picture
    if source:
        figure = f'<img src="{source}" alt="The image of the post" loading="lazy" decoding="async">'
    elif reason:
        figure = f'<p class="blank">image can’t be read <small dir="auto">{esc(reason)}</small></p>'
    else:
        figure = '<p class="blank">no image</p>'
    text = f'<p class="text" dir="auto">{esc(post["text"])}</p>'
    if not post["text"].strip():
        text = '<p class="none">no text</p>'
    reasoning = ""
    if think := (prediction.get("think") or "").strip():
        reasoning = f'<details><summary>Reasoning</summary><p dir="auto">{esc(think)}</p></details>'
    facts = []
    if "think" in prediction and not think:
        facts.append("answered directly")
    if "tokens" in prediction:
        facts.append(f"{prediction['tokens']:,} token{'' if prediction['tokens'] == 1 else 's'}")
    if "note" in prediction:
        facts.append(f"<strong><bdi>{esc(prediction['note'])}</bdi></strong>")
    name = f" <bdi>{esc(post['id'])}</bdi>" if post["id"] else ""
    return f"""<article class="post" id="post-{number}" data-kinds="{" ".join(kinds(prediction, post, known))}">
<h2><span class="away">Post </span><b>{number:,}</b>{name}</h2>
<div class="picture">{figure}</div>
<div class="words">{text}</div>
<div class="answers"><h3>Reference</h3>{phrases_html(wanted)}<h3>Predicted</h3>{phrases_html(predicted)}</div>
<div class="foot">{reasoning}<p>{" · ".join(facts)}</p></div>
</article>
"""


COLUMNS = (
    "posts",
    "F1@1",
    "F1@M",
    "tokens",
    "reasoned",
)  # what a phone has room for; evaluate.py prints them all


def scores_html(scores):
    """The scores as a table, a row a class that has posts."""

    def cell(entry, key):
        if key not in entry:
            return "–"
        if key == "posts":
            return f"{entry[key]:,}"
        return f"{entry[key] if key == 'tokens' else 100 * entry[key]:.1f}"

    rows = [
        (name.replace("_", " + "), entry)
        for name, entry in scores.items()
        if name != "posts" and entry["posts"]
    ]
    columns = [key for key in COLUMNS if any(key in entry for _, entry in rows)]
    head = "".join(f'<th scope="col">{key}</th>' for key in columns)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell(entry, key)}</td>" for key in columns)}</tr>'
        for name, entry in rows
    )
    return f"""<div class="scroll" role="region" aria-label="Scores" tabindex="0"><table>
<caption>Scores in percent, generated tokens a post</caption>
<thead><tr><th scope="col"><span class="away">keyphrases</span></th>{head}</tr></thead>
<tbody>{body}</tbody>
</table></div>
"""


FILTERS = [
    ("First keyphrase", ["right", "wrong"]),
    ("Keyphrases", ["seen", "unseen"]),
    ("Answer", ["reasoned", "direct"]),
]


def filters_html(counts):
    """Radio buttons for the kinds that occur; shown by the script, as they do nothing without it."""
    totals = Counter()
    for found, count in counts.items():
        totals.update(dict.fromkeys(found, count))
    groups = []
    for number, (legend, names) in enumerate(FILTERS):
        if not any(totals[name] for name in names):
            continue
        buttons = "".join(
            f'<label><input type="radio" name="filter-{number}" value="{name}"{"" if name else " checked"}>'
            f"<span>{name or 'all'}{f' <small>{totals[name]:,}</small>' if name else ''}</span></label>"
            for name in ["", *names]
        )
        groups.append(f"<fieldset><legend>{legend}</legend>{buttons}</fieldset>")
    return f'<form class="filters" hidden>{"".join(groups)}<p role="status"></p></form>'


def href(name):
    return esc(quote(os.fsencode(name)))


def step_html(names, current):
    """Links to the pages before and behind."""
    if len(names) == 1:
        return ""

    def link(to, rel, text):
        return f'<a rel="{rel}" href="{href(names[to])}">{text}</a>' if 0 <= to < len(names) else ""

    before, behind = link(current - 1, "prev", "← Previous"), link(current + 1, "next", "Next →")
    return f'<p class="step">{before}<span>Page {current + 1} of {len(names)}</span>{behind}</p>'


def pages_html(names, counts, current):
    """Links to all pages, each with how many posts of which kinds it holds, for the script's sake."""
    links = []
    for index, (name, count) in enumerate(zip(names, counts)):
        held = ",".join(" ".join([str(posts), *found]) for found, posts in count.items())
        here = ' aria-current="page"' if index == current else ""
        links.append(f'<li><a href="{href(name)}" data-counts="{held}"{here}>{index + 1}</a></li>')
    return f'<ol class="pages"{"" if len(names) > 1 else " hidden"}>{"".join(links)}</ol>'


GALLERY_STYLE = """
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0 0 1rem; padding: 0; list-style: none;
  font-size: .85rem; color: var(--quiet); }
.filters { display: flex; flex-wrap: wrap; gap: .75rem 1.5rem; align-items: end; margin: 0 0 1.25rem; }
fieldset { display: flex; margin: 0; padding: 0; border: 0; min-width: 0; }
legend { padding: 0; margin-bottom: .25rem; font-size: .8rem; color: var(--quiet); }
fieldset label span { display: block; padding: .3rem .75rem; border: 1px solid var(--line); margin-left: -1px;
  background: var(--card); font-size: .9rem; cursor: pointer; }
fieldset label:first-of-type span { margin-left: 0; border-radius: .5rem 0 0 .5rem; }
fieldset label:last-of-type span { border-radius: 0 .5rem .5rem 0; }
fieldset small { color: var(--quiet); font-variant-numeric: tabular-nums; }
fieldset input { position: absolute; opacity: 0; }
fieldset input:checked + span { background: var(--ink); border-color: var(--ink); color: var(--card); }
fieldset input:checked + span small { color: inherit; }
fieldset input:focus-visible + span { outline: 2px solid var(--accent); outline-offset: 2px; }
.filters p { margin: 0 0 .35rem; font-size: .9rem; color: var(--quiet); }
.step { display: flex; gap: .25rem 1.25rem; margin: 1.25rem 0; font-size: .9rem; color: var(--quiet); }
.pages { display: flex; flex-wrap: wrap; gap: .25rem; margin: 0; padding: 0; list-style: none; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
.pages a { display: block; min-width: 2.4em; padding: .25rem .4rem; text-align: center; text-decoration: none;
  border: 1px solid var(--line); border-radius: .35rem; background: var(--card); }
.pages [aria-current] { background: var(--ink); border-color: var(--ink); color: var(--card); }
.pages .empty:not([aria-current]) { color: var(--quiet); background: none; border-style: dashed; }
.posts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
.post { display: grid; grid-template: "head head" auto "picture words" auto "answers answers" auto "foot foot" 1fr
  / 6.5rem minmax(0, 1fr); gap: .6rem 1rem; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .75rem; content-visibility: auto; contain-intrinsic-size: auto 20rem; }
@media (min-width: 40rem) {
  .post { grid-template: "picture head" auto "picture words" auto "picture answers" auto "picture foot" 1fr
    / 10rem minmax(0, 1fr); gap: .5rem 1.25rem; }
}
.post h2 { grid-area: head; max-height: 4rem; overflow-y: auto; margin: 0; font-size: .8rem; font-weight: 400;
  color: var(--quiet); }
.post h2 b { font-weight: 600; color: var(--ink); margin-right: .35rem; }
.picture { grid-area: picture; }
.picture img, .blank { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: .4rem; }
.picture img { background: var(--ground); }
.blank { display: flex; flex-direction: column; justify-content: center; margin: 0; padding: .5rem; overflow: hidden;
  text-align: center; font-size: .85rem; line-height: 1.35; color: var(--quiet); border: 1px dashed var(--line); }
.words { grid-area: words; min-width: 0; }
.words p { margin: 0; }
.text { max-height: 24rem; overflow-y: auto; white-space: pre-line; }
.none { margin: 0; color: var(--quiet); font-style: italic; }
.answers { grid-area: answers; display: grid; grid-template-columns: 5.2rem minmax(0, 1fr); gap: .35rem .5rem;
  align-items: baseline; }
h3 { margin: 0; font-size: .8rem; font-weight: 400; color: var(--quiet); }
.phrases { display: flex; flex-wrap: wrap; gap: .3rem; margin: 0; padding: 0; list-style: none; }
.phrases li { max-width: 100%; max-height: 8rem; overflow-y: auto; padding: .05rem .5rem .1rem;
  border: 1px solid var(--line); border-radius: .4rem; font-size: .92rem; }
.phrases li > span:first-child { margin-right: .35em; font-size: .85em; }
.phrases .right { color: var(--good); background: var(--good-ground); border-color: currentColor; font-weight: 600; }
.phrases .wrong { color: var(--bad); background: var(--bad-ground); border: 1px dashed currentColor; }
.phrases .found > span { color: var(--good); }
.phrases .repeated, .phrases .ignored { color: var(--quiet); border-style: dotted; }
.phrases small { font-size: .78rem; font-weight: 400; }
.phrases .new { margin-left: .15rem; padding: 0 .3rem; border: 1px solid currentColor; border-radius: 1rem;
  color: var(--new); }
.foot { grid-area: foot; display: flex; flex-wrap: wrap; gap: .15rem 1rem; align-content: start; min-width: 0;
  font-size: .85rem; color: var(--quiet); }
.foot p { margin: 0; min-width: 0; }
.foot strong { color: var(--bad); font-weight: 500; }
summary { cursor: pointer; color: var(--accent); width: fit-content; }
details { min-width: 0; }
details[open] { flex-basis: 100%; }
details p { margin: .25rem 0 .5rem; padding-inline-start: .75rem; border-inline-start: 2px solid var(--line);
  color: var(--ink); font-size: .95rem; white-space: pre-line; }
"""

GALLERY_SCRIPT = """
const form = document.querySelector('.filters'), buttons = [...form.querySelectorAll('input')];
const posts = [...document.querySelectorAll('.post')], pages = [...document.querySelectorAll('.pages a')];
const current = pages.findIndex(link => link.hasAttribute('aria-current'));
const every = (kinds, wanted) => wanted.every(kind => kinds.includes(kind));
const held = (link, wanted) => link.dataset.counts.split(',').map(group => group.split(' '))
  .reduce((sum, [count, ...kinds]) => sum + (every(kinds, wanted) ? Number(count) : 0), 0);
function show() {
  const wanted = buttons.filter(button => button.checked && button.value).map(button => button.value);
  const hash = wanted.length ? '#' + wanted.join('+') : '#', counts = pages.map(link => held(link, wanted));
  for (const post of posts) post.hidden = !every(post.dataset.kinds.split(' '), wanted);
  pages.forEach((link, index) => {
    link.hash = hash;
    link.classList.toggle('empty', !counts[index]);
  });
  for (const link of document.querySelectorAll('.step a')) {
    const there = link.rel === 'next'
      ? counts.findIndex((count, index) => count && index > current)
      : counts.findLastIndex((count, index) => count && index < current);
    link.hidden = there < 0;
    if (there >= 0) link.href = pages[there].href;
  }
  const all = counts.reduce((sum, count) => sum + count, 0).toLocaleString('en');
  form.querySelector('p').textContent = all + (all === '1' ? ' post' : ' posts') +
    (pages.length > 1 ? `, ${counts[current].toLocaleString('en')} of them on this page` : '');
  return hash;
}
function read() {
  const wanted = location.hash.slice(1).split('+');
  for (const button of buttons) button.checked = !button.value || wanted.includes(button.value);
  show();
}
form.addEventListener('change', () => history.replaceState(null, '', show()));
form.addEventListener('submit', event => event.preventDefault());
addEventListener('hashchange', read);
form.hidden = false;
read();
"""

# --------------------------------------------------------------------------------------------- the gallery's files


def page_name(out, number):
    """gallery.html, gallery-2.html, …"""
    return out.name if number == 1 else f"{out.stem}-{number}{out.suffix}"


def read_images(path):
    """Where each post's image is, None for a post without one. Raises UserError."""
    images = []
    for line, row in read_rows(path):
        image = (
            data.to_record(path, line, row)["image"] if isinstance(row, str) else row.get("image")
        )
        if not isinstance(image, str | None):
            raise UserError(
                f"{path} line {line} (id {row['id']}): the field 'image' must be a file name or null"
            )
        images.append(Path(path).parent / image if image else None)
    return images


def add_notes(predictions, path):
    """Give the predictions of a file what went wrong with them, infer.py's "error" and "cut", as "note"."""
    for prediction, (_, row) in zip(predictions, read_rows(path)):
        if isinstance(row, dict) and (row.get("error") or row.get("cut")):
            prediction["note"] = str(row.get("error") or "cut off")


def short_name(path):
    """A file's or folder's name with that of the folder it is in: a page need not tell where the rest is."""
    return "/".join(Path(os.path.abspath(path)).parts[-2:])


def head_html(args, scores, counts):
    """(head of the first page, head of the others)."""
    predictions, posts = (
        f"<bdi>{esc(short_name(file))}</bdi>" for file in (args.predictions, args.posts)
    )
    title = f"""<header><h1>Predicted keyphrases</h1>
<p>{predictions} for the {scores["posts"]:,} posts of {posts}</p></header>
"""
    signs = ["✓ right, or found", "✗ wrong", "○ missed", "– not counted, or a repetition"]
    if args.train:
        signs.append(f"unseen: not a keyphrase of <bdi>{esc(short_name(args.train))}</bdi>")
    legend = (
        f'<ul class="legend">{"".join(f"<li>{sign}</li>" for sign in signs)}</ul>'
        + filters_html(counts)
    )
    return title + scores_html(scores) + legend, title + legend


def remove_rest(out, pages):
    """Remove what an earlier gallery of the same name left behind the last page."""
    mark = MADE_BY.format(tool="gallery").encode()
    while (rest := out.parent / page_name(out, pages + 1)).is_file():
        with open(rest, "rb") as file:
            if mark not in file.read(1000):
                break
        rest.unlink()
        pages += 1


def gallery(args):
    """Write the gallery's pages, all or none of them."""
    out = Path(args.out)
    posts = read_references(args.posts)
    predictions = read_predictions(args.predictions)
    add_notes(predictions, args.predictions)
    predictions = align(predictions, posts, args.allow_missing, (args.predictions, args.posts))
    train = set(train_keyphrases(args.train)) if args.train else None
    known = None if train is None else set(map(normalize, train))
    images = read_images(args.posts)

    starts = range(0, len(posts), args.page_size)
    names = [page_name(out, number) for number in range(1, len(starts) + 1)]
    check_out(
        [out.parent / name for name in names],
        filter(None, [args.predictions, args.posts, args.train]),
    )
    found = [kinds(prediction, post, known) for prediction, post in zip(predictions, posts)]
    counts = [Counter(found[start : start + args.page_size]) for start in starts]
    first_head, other_head = head_html(
        args, score(predictions, posts, train), sum(counts, Counter())
    )

    title = f"Predicted keyphrases: {short_name(args.predictions)}"
    pool = ProcessPoolExecutor(
        args.workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    bar = data.progress(None, len(posts), "gallery")
    try:
        with (
            data.made(out.parent, out),
            tempfile.TemporaryDirectory(dir=out.parent, prefix=".gallery.") as temporary,
        ):
            for current, start in enumerate(starts):
                at = range(start, min(start + args.page_size, len(posts)))
                pictures = small_copies(pool, [images[index] for index in at])
                articles = "".join(
                    post_html(index + 1, posts[index], predictions[index], picture, known)
                    for index, picture in zip(at, pictures)
                )
                bar.update(len(at))
                head, step = other_head if current else first_head, step_html(names, current)
                body = (
                    f'{head}{step}\n<main class="posts">\n{articles}</main>\n'
                    f"{step}{pages_html(names, counts, current)}"
                )
                data.write_whole(
                    Path(temporary) / names[current],
                    page("gallery", title, GALLERY_STYLE, body, GALLERY_SCRIPT),
                )
            for name in names:  # nothing can fail for want of space here
                os.replace(Path(temporary) / name, out.parent / name)
            remove_rest(out, len(names))
    except BrokenProcessPool:
        raise UserError(
            f"{args.posts}: a process that reads images was killed, for want of memory perhaps; "
            "try fewer --workers"
        ) from None
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    data.say(
        f"{out}: {len(posts):,} posts"
        + (f" on {len(names)} pages, to {names[-1]}" if len(names) > 1 else "")
    )


# ------------------------------------------------------------------------------------ curves: what runs have logged


class Run(NamedTuple):
    """What a run's folder tells.

    steps: {"step", "loss", "plain_loss", "cot_share", "lr", "tokens" (a post), "seconds"}, a float a training step;
    valid: {"step", "all", "unseen" (F1@1), "tokens" (a post)}, a float an evaluation. NaN where nothing was logged.
    """

    folder: Path
    name: str
    settings: dict
    steps: dict
    valid: dict


def number(value):
    """A logged value as a float; NaN for what isn't a number, and for what no axis could show."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if usable else math.nan


def log_lines(path):
    """Iterate over (where, dict with a "step") of a run's log; a torn last line is left out. Raises UserError."""
    for line, _, raw in read_lines(path):
        if raw.endswith(b"\n") and raw.strip():
            record, where = parse_line(path, line, raw), f"{path} line {line}"
            if not number(record.get("step")) >= 0:
                raise UserError(f"{where}: no 'step' in it; is this a log that train.py wrote?")
            yield where, record


def read_run(folder, name):
    """The Run in a folder. Raises UserError."""
    folder = Path(folder)
    log, file = folder / "log.jsonl", folder / "settings.json"
    if not log.is_file():
        raise UserError(f"{folder}: no log.jsonl in it; name the folder of a run, train.py's --out")
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(
            f"{file}: not JSON ({error}); without the file the curves are drawn all the same"
        ) from None
    steps = {
        key: [] for key in ("step", "loss", "plain_loss", "cot_share", "lr", "tokens", "seconds")
    }
    valid = {key: [] for key in ("step", "all", "unseen", "tokens")}
    for where, record in log_lines(log):
        if "valid" in record:
            try:
                entries = {key: record["valid"].get(key, {}) for key in ("all", "unseen")}
                row = {
                    key: entry["F1@1"] if entry.get("posts") else None
                    for key, entry in entries.items()
                }
                row["tokens"] = entries["all"].get("tokens")
            except (AttributeError, KeyError):
                raise UserError(f"{where}: an evaluation without the evaluator's scores") from None
            columns = valid
        else:
            tokens, samples = number(record.get("tokens")), number(record.get("samples"))
            row, columns = record | {"tokens": tokens / samples if samples > 0 else None}, steps
        for key, column in columns.items():
            column.append(number(record["step"] if key == "step" else row.get(key)))
    return Run(folder, name, settings if isinstance(settings, dict) else {}, steps, valid)


POINTS = 200  # of a line, at most


def thin(steps, values):
    """At most POINTS (step, value): means over equal stretches of steps, of what is a number."""
    import numpy as np

    steps, values = np.array(steps), np.array(values)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(steps):
        return []
    width = math.ceil((steps.max() - steps.min() + 1) / POINTS)
    stretch = ((steps - steps.min()) // width).astype(int)
    count = np.bincount(stretch)
    means = [
        np.bincount(stretch, column)[count > 0] / count[count > 0] for column in (steps, values)
    ]
    return list(zip(*(mean.tolist() for mean in means)))


# ---------------------------------------------------------------------------------------- curves: what is switched

COLUMNS_OF_STEPS, ROWS_A_DECADE = 60, 12
LEAST_LOSS, DECADES = 1e-4, 6  # a loss beyond is counted in the first or last row


class Choices(NamedTuple):
    """What a run's choices.jsonl tells, by equal stretches of steps.

    steps: the middle of each stretch; losses: for each a list of counts of samples by L(y_s), in rows of equal
    width on a logarithmic scale from LEAST_LOSS up; to_reasoning, back: shares of the samples seen before whose
    choice is now another, NaN where none was seen before.
    """

    steps: list
    losses: list
    to_reasoning: list
    back: list


def read_choices(run):
    """The Choices of a run; None where it has no choices.jsonl, or no L(y_s) in it (mode cot). Raises UserError."""
    path, last = run.folder / "choices.jsonl", max(run.steps["step"], default=0)
    if not path.is_file() or not last:
        return None
    width = math.ceil(last / COLUMNS_OF_STEPS)
    columns, rows = math.ceil(last / width), DECADES * ROWS_A_DECADE
    losses = [[0] * rows for _ in range(columns)]
    again, turned, back = ([0] * columns for _ in range(3))
    before = {}
    for where, record in data.progress(log_lines(path), None, f"{run.name}/choices.jsonl", "line"):
        identity, reasons = record.get("id"), record.get("reasons")
        if not isinstance(identity, str) or not isinstance(reasons, bool):
            raise UserError(
                f"{where}: no 'id' or 'reasons' in it; is this what train.py --log-choices wrote?"
            )
        column = min(max(0, int(record["step"]) - 1) // width, columns - 1)
        loss = number(record.get("plain_loss"))
        if loss >= 0:
            row = math.floor(math.log10(max(loss, LEAST_LOSS) / LEAST_LOSS) * ROWS_A_DECADE)
            losses[column][min(row, rows - 1)] += 1
        if identity in before:
            again[column] += 1
            turned[column] += reasons and not before[identity]
            back[column] += before[identity] and not reasons
        before[identity] = reasons
    if not any(map(any, losses)):
        return None
    share = lambda counts: [
        count / seen if seen else math.nan for count, seen in zip(counts, again)
    ]
    middles = [min(column * width + (width + 1) / 2, last) for column in range(columns)]
    return Choices(middles, losses, share(turned), share(back))


def edge(row):
    """The loss at which a row of Choices.losses begins."""
    return LEAST_LOSS * 10 ** (row / ROWS_A_DECADE)


def median(counts):
    """The median loss of a column of Choices.losses."""
    half = sum(counts) / 2
    for row, count in enumerate(counts):
        if count and half <= count:
            return edge(row + half / count)
        half -= count
    return math.nan


# ------------------------------------------------------------------------------------------------ curves: plain SVG

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 390, 12, 194  # of the plot within it
DASHES = ("", "7 3", "2 3", "9 3 2 3")
COLOURS = 8


class Axis:
    """Where numbers stand between two places of a drawing, evenly or by their logarithm, and its ticks."""

    def __init__(self, low, high, start, end, log=False, snug=False):
        """`snug` ends the axis at low and high, else at the ticks around them."""
        if not high - low > max(1e-30, 1e-9 * max(abs(low), abs(high))):
            low, high = (
                (low / 2, low * 2)
                if log
                else (low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2)
            )
        ticks = log_ticks(low, high) if log else ticks_between(low, high)
        self.low, self.high = (low, high) if snug else (ticks[0], ticks[-1])
        self.ticks = [tick for tick in ticks if self.low <= tick <= self.high]
        self.start, self.end, self.log = start, end, log

    def place(self, value):
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def __str__(self):
        """What the page's script needs to turn places into numbers again."""
        return f"{self.low!r} {self.high!r} {self.start} {self.end} {int(self.log)}"


def ticks_between(low, high):
    """About five round numbers evenly around low and high."""
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(
        step * size for step in (1, 2, 2.5, 5, 10) if step * size >= (high - low) / 4 * 0.999
    )
    return [tick * step for tick in range(math.floor(low / step), math.ceil(high / step) + 1)]


def log_ticks(low, high):
    """Round numbers around low and high: 1, 2, 5, 10, …, or powers of ten where there would be many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for digits in ((1, 2, 5), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        first = max(index for index, tick in enumerate(ticks) if tick <= low)
        last = min(index for index, tick in enumerate(ticks) if tick >= high)
        if last - first < 8:
            break
    return ticks[first : last + 1]


def tick_text(value):
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if 0 < abs(value) < 0.01:
        digits, power = f"{value:.6e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.6g}"


def places(points, x, y):
    return " ".join(f"{x.place(step):.1f},{y.place(value):.2f}" for step, value in points)


def line_svg(index, name, points, x, y, dots=False, kind=""):
    """A run's line, its points marked if there are few."""
    look = f'class="c{index % COLOURS} run-{index}" stroke-dasharray="{dash(index)}"'
    line = f'<polyline {look} data-name="{esc(name)}" points="{places(points, x, y)}"/>'
    if dots:
        line += "".join(
            f'<circle class="c{index % COLOURS} run-{index}" cx="{x.place(step):.1f}" '
            f'cy="{y.place(value):.2f}" r="2.6"/>'
            for step, value in points
        )
    return line


def dash(index):
    """Runs differ in dash, too; the eighth colour is followed by the first with another dash."""
    return DASHES[(index + index // COLOURS) % len(DASHES)]


def chart_html(title, note, said, x, y, inside):
    """A figure with axes around what is drawn `inside`; `said` is what a screen reader says of it."""
    grid = []
    for tick in y.ticks:
        at = f"{y.place(tick):.1f}"
        grid.append(
            f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/><text x="{LEFT - 7}" y="{at}" dy=".35em" '
            f'text-anchor="end">{tick_text(tick)}</text>'
        )
    for tick in x.ticks:
        at = f"{x.place(tick):.1f}"
        grid.append(
            f'<path class="tick" d="M{at} {BOTTOM}v4"/><text x="{at}" y="{BOTTOM + 17}" '
            f'text-anchor="middle">{tick_text(tick)}</text>'
        )
    return f"""<figure>
<figcaption><h3>{title}</h3><p>{note}</p></figcaption>
<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{esc(said)}"
  data-x="{x}" data-y="{y}">
{"".join(grid)}<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>
<text x="{RIGHT}" y="{HEIGHT - 5}" text-anchor="end">step</text>
{inside}
<path class="guide" d="M0 {TOP}V{BOTTOM}" hidden />
</svg>
<p class="readout" aria-live="polite" hidden></p>
</figure>
"""


# ----------------------------------------------------------------------------------------------- curves: the page


class Panel(NamedTuple):
    """A chart over all runs."""

    title: str
    note: str
    source: str  # steps or valid
    key: str
    percent: bool = False
    log: bool = False  # where the values span a decade


PANELS = [
    Panel("Loss", "training", "steps", "loss", log=True),
    Panel(
        "Loss of the plain answer, L(y<sub>s</sub>)", "training", "steps", "plain_loss", log=True
    ),
    Panel("Samples on CoT", "training, percent", "steps", "cot_share", percent=True),
    Panel("F1@1", "validation, percent", "valid", "all", percent=True),
    Panel("F1@1, unseen keyphrases", "validation, percent", "valid", "unseen", percent=True),
    Panel("Tokens generated per post", "validation", "valid", "tokens"),
    Panel("Tokens trained on per post", "training, prompt and answer", "steps", "tokens"),
    Panel("Learning rate", "training", "steps", "lr"),
]


def panel_html(panel, runs, x):
    """The panel's chart, or "" where no run has logged it."""
    lines, factor = {}, 100 if panel.percent else 1
    for index, run in enumerate(runs):
        columns = getattr(run, panel.source)
        if points := thin(columns["step"], columns[panel.key]):
            lines[index] = [(step, factor * value) for step, value in points]
    if not lines:
        return ""
    values = [value for points in lines.values() for _, value in points]
    low, high = min(values), max(values)
    if panel.percent:
        y = Axis(0, 100, BOTTOM, TOP)
    elif panel.log and low > 0 and high > 10 * low:
        y = Axis(max(low, high / 1e9), high, BOTTOM, TOP, log=True)
    else:
        y = Axis(min(0, low), high, BOTTOM, TOP)
    title = re.sub("<.*?>", "", panel.title)
    said = "; ".join(
        f"{runs[index].name} from {points[0][1]:.3g} at step {points[0][0]:.0f} "
        f"to {points[-1][1]:.3g} at step {points[-1][0]:.0f}"
        for index, points in lines.items()
    )
    inside = "".join(
        line_svg(index, runs[index].name, points, x, y, dots=panel.source == "valid")
        for index, points in lines.items()
    )
    return chart_html(panel.title, panel.note, f"{title}, {panel.note}: {said}", x, y, inside)


SHADES = 8


def losses_html(index, run, choices, y):
    """L(y_s) of a run's samples over training: cells whose colour tells how many there are, the median, and gamma."""
    last = max(run.steps["step"])
    x = Axis(0, last, LEFT, RIGHT, snug=True)
    shares = [[count / max(1, sum(column)) for count in column] for column in choices.losses]
    most = max(map(max, shares))
    cells = [[] for _ in range(SHADES + 1)]
    width = math.ceil(last / COLUMNS_OF_STEPS)
    for column, rows in enumerate(shares):
        left, right = x.place(column * width), x.place(min((column + 1) * width, last))
        for row, share in enumerate(rows):
            if share:
                top, bottom = y.place(edge(row + 1)), y.place(edge(row))
                cells[math.ceil(SHADES * math.sqrt(share / most))].append(
                    f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}z"
                )
    heat = "".join(
        f'<path class="heat" fill-opacity="{shade / SHADES:.3g}" d="{"".join(paths)}"/>'
        for shade, paths in enumerate(cells)
        if paths
    )
    middle = [
        (step, median(column)) for step, column in zip(choices.steps, choices.losses) if any(column)
    ]
    inside = heat + f'<polyline class="median" data-name="median" points="{places(middle, x, y)}"/>'
    note = "training; the stronger the colour, the more samples; the line is their median"
    gamma = number(run.settings.get("gamma"))
    if run.settings.get("mode") == "dynamic" and y.low < gamma < y.high:
        at = f"{y.place(gamma):.1f}"
        inside += (
            f'<path class="gamma" d="M{LEFT} {at}H{RIGHT}"/><text class="gamma" x="{RIGHT - 4}" y="{at}" '
            f'dy="-.4em" text-anchor="end">gamma {tick_text(gamma)}</text>'
        )
    said = (
        f"Distribution of the plain answer's loss in {run.name}: the median goes from {middle[0][1]:.3g} to "
        f"{middle[-1][1]:.3g} at step {last:.0f}"
    )
    figure = chart_html(
        f"L(y<sub>s</sub>) of the samples: <bdi>{esc(run.name)}</bdi>", note, said, x, y, inside
    )
    return f'<div class="run-{index}">{figure}</div>'


def switches_html(runs, all_choices, x):
    """Shares of samples whose choice is another than the last time, to reasoning and back."""
    charts = []
    for title, key in (
        ("Switched to reasoning", "to_reasoning"),
        ("Switched back to the plain answer", "back"),
    ):
        lines = {}
        for index, choices in all_choices.items():
            if points := thin(choices.steps, getattr(choices, key)):
                lines[index] = [(step, 100 * share) for step, share in points]
        if lines:
            y = Axis(
                0, max(1, *(share for points in lines.values() for _, share in points)), BOTTOM, TOP
            )
            said = "; ".join(
                f"{runs[index].name} up to {max(share for _, share in points):.3g}"
                for index, points in lines.items()
            )
            inside = "".join(
                line_svg(index, runs[index].name, points, x, y) for index, points in lines.items()
            )
            charts.append(
                chart_html(
                    title,
                    "since the epoch before, percent of the samples",
                    f"{title}, percent: {said}",
                    x,
                    y,
                    inside,
                )
            )
    return "".join(charts)


def runs_html(runs):
    """The legend, a table: each run's line, settings, and where it ended."""

    def last(points, show):
        return show(points[-1][1]) if points else "–"

    def percent(share):
        return f"{100 * share:.1f}"

    rows = []
    for index, run in enumerate(runs):
        steps, valid = run.steps, run.valid
        seconds = sum(second for second in steps["seconds"] if second == second)
        mode = run.settings.get("mode", "–")
        cells = [
            esc(mode),
            esc(run.settings.get("gamma", "–")) if mode == "dynamic" else "–",
            f"{max(steps['step'], default=0):,.0f}",
            f"{seconds / 60:,.1f}",
            last(thin(steps["step"], steps["loss"]), "{:.3f}".format),
            last(thin(steps["step"], steps["cot_share"]), percent),
            *(last(thin(valid["step"], valid[key]), percent) for key in ("all", "unseen")),
            last(thin(valid["step"], valid["tokens"]), "{:.1f}".format),
        ]
        swatch = (
            f'<svg class="swatch" viewBox="0 0 34 8" aria-hidden="true"><path class="c{index % COLOURS}" '
            f'stroke-dasharray="{dash(index)}" d="M0 4H34"/></svg>'
        )
        rows.append(
            f'<tr><th scope="row"><label><input type="checkbox" checked data-run="run-{index}" hidden>{swatch}'
            f"<bdi>{esc(run.name)}</bdi></label></th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    titles = ["mode", "gamma", "steps", "minutes", "loss", "on CoT", "F1@1", "unseen", "tokens"]
    return f"""<div class="scroll" role="region" aria-label="Runs" tabindex="0"><table>
<caption>Where each run stands: the last points of its curves</caption>
<thead><tr><th scope="col">run</th>{"".join(f'<th scope="col">{title}</th>' for title in titles)}</tr></thead>
<tbody>{"".join(rows)}</tbody>
</table></div>
"""


CURVES_STYLE = """
:root {
  --c0: #1f6fb2; --c1: #c2571a; --c2: #2d8045; --c3: #a13d8e;
  --c4: #8a6d00; --c5: #b3273a; --c6: #0f7f86; --c7: #5b54c0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --c0: #6db3f2; --c1: #f2975c; --c2: #6fcb8a; --c3: #e58fd3;
    --c4: #d9bc4a; --c5: #f2808d; --c6: #5fc9cf; --c7: #a9a3f5;
  }
}
.c0 { --line-colour: var(--c0); } .c1 { --line-colour: var(--c1); } .c2 { --line-colour: var(--c2); }
.c3 { --line-colour: var(--c3); } .c4 { --line-colour: var(--c4); } .c5 { --line-colour: var(--c5); }
.c6 { --line-colour: var(--c6); } .c7 { --line-colour: var(--c7); }
h2 { margin: 2rem 0 .75rem; font-size: 1.1rem; font-weight: 600; }
th label { display: inline-flex; align-items: center; gap: .5rem; cursor: pointer; }
th input { margin: 0; accent-color: var(--accent); }
th bdi { display: inline-block; width: max-content; max-width: 12rem; white-space: normal; }
.swatch { flex: none; width: 2.1rem; height: .5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { position: relative; margin: 0; padding: .9rem .75rem .6rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .75rem; }
figcaption { padding: 0 .25rem .35rem; }
h3 { margin: 0; font-size: 1rem; font-weight: 600; }
h3 sub { font-size: .75em; line-height: 0; }
figcaption p { margin: 0; font-size: .82rem; color: var(--quiet); }
.plot { display: block; width: 100%; height: auto; touch-action: pan-y; font-size: 12px; }
.plot text { fill: var(--quiet); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis, .tick, .guide { stroke: var(--quiet); stroke-width: 1; }
.guide { stroke-dasharray: 2 2; }
polyline, .swatch path { fill: none; stroke: var(--line-colour); stroke-width: 1.8; stroke-linejoin: round; }
circle { fill: var(--line-colour); }
.heat { fill: var(--c0); }
.median { stroke: var(--ink); stroke-width: 1.4; }
path.gamma { stroke: var(--bad); stroke-width: 1.4; stroke-dasharray: 6 3; }
.plot text.gamma { fill: var(--bad); font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 3; }
.readout { position: absolute; z-index: 1; inset: calc(100% - .75rem) .75rem auto; margin: 0; padding: .4rem .6rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem; font-size: .85rem;
  font-variant-numeric: tabular-nums; box-shadow: 0 2px 8px rgb(0 0 0 / .12); white-space: pre-line; }
.missing { color: var(--quiet); font-size: .9rem; }
"""

CURVES_SCRIPT = """
for (const box of document.querySelectorAll('th input')) {
  box.hidden = false;
  box.addEventListener('change', () => document.querySelectorAll('.' + box.dataset.run)
    .forEach(part => part.toggleAttribute('hidden', !box.checked)));
}
for (const plot of document.querySelectorAll('.plot')) {
  const [x, y] = [plot.dataset.x, plot.dataset.y].map(text => text.split(' ').map(Number));
  const value = ([low, high, start, end, log], place) => {
    const share = (place - start) / (end - start);
    return log ? low * (high / low) ** share : low + share * (high - low);
  };
  const shown = number => Number(number.toPrecision(3)).toLocaleString('en', {maximumSignificantDigits: 3});
  const guide = plot.querySelector('.guide'), readout = plot.parentElement.querySelector('.readout');
  let at = null;
  const hide = () => {
    at = null;
    for (const part of [guide, readout]) part.toggleAttribute('hidden', true);
  };
  const show = place => {
    at = Math.min(Math.max(place, x[2]), x[3]);
    const lines = [...plot.querySelectorAll('polyline:not([hidden])')].map(line => [line.dataset.name,
      [...line.points].reduce((best, point) => Math.abs(point.x - at) < Math.abs(best.x - at) ? point : best)]);
    if (!lines.length) return hide();
    guide.setAttribute('transform', `translate(${at})`);
    readout.textContent = [`step ${Math.round(value(x, at)).toLocaleString('en')}`,
      ...lines.map(([name, point]) => `\\u2068${name}\\u2069: ${shown(value(y, point.y))}`)].join('\\n');
    for (const part of [guide, readout]) part.toggleAttribute('hidden', false);
  };
  const pointed = event => {
    const box = plot.getBoundingClientRect();
    show((event.clientX - box.left) / box.width * plot.viewBox.baseVal.width);
  };
  plot.addEventListener('pointerdown', pointed);
  plot.addEventListener('pointermove', pointed);
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('blur', hide);
  plot.addEventListener('keydown', event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (event.key === 'Escape') hide();
    if (!step) return;
    event.preventDefault();
    show((at ?? (step > 0 ? x[2] : x[3])) + step * (x[3] - x[2]) / 50);
  });
}
"""


def curves(args):
    """Write the page of curves."""
    out, names = Path(args.out), [Path(os.path.abspath(folder)).name for folder in args.runs]
    if len(set(names)) < len(names):
        names = args.runs
    check_out(
        [out],
        [
            Path(folder) / name
            for folder in args.runs
            for name in ("log.jsonl", "settings.json", "choices.jsonl")
        ],
    )
    runs = [read_run(folder, name) for folder, name in zip(args.runs, names)]
    last = max((step for run in runs for step in run.steps["step"]), default=0)
    if not last:
        raise UserError(
            f"{runs[0].folder / 'log.jsonl'}: no training step in it yet; try again when there is one"
        )
    x = Axis(0, last, LEFT, RIGHT, snug=True)
    charts = [panel_html(panel, runs, x) for panel in PANELS]
    absent = [panel.title for panel, chart in zip(PANELS, charts) if not chart]
    body = (
        "<header><h1>Training curves</h1>\n"
        f"<p>A line has at most {POINTS} points, each the mean of a stretch of steps.</p></header>\n"
        f'<main>\n{runs_html(runs)}<h2>Curves</h2>\n<div class="charts">\n{"".join(charts)}</div>\n'
    )
    if absent:
        body += f'<p class="missing">Nothing was logged of: {"; ".join(absent)}.</p>\n'
    all_choices = {index: found for index, run in enumerate(runs) if (found := read_choices(run))}
    if all_choices:
        rows = [
            row
            for found in all_choices.values()
            for column in found.losses
            for row, count in enumerate(column)
            if count
        ]
        y = Axis(edge(min(rows)), edge(max(rows) + 1), BOTTOM, TOP, log=True)
        body += (
            f'<h2>Choices</h2>\n<div class="charts">\n'
            f"{''.join(losses_html(index, runs[index], found, y) for index, found in all_choices.items())}"
            f"{switches_html(runs, all_choices, x)}</div>\n"
        )
    with data.made(out.parent, out):
        title = f"Training curves: {', '.join(names)}"
        data.write_whole(out, page("curves", title, CURVES_STYLE, f"{body}</main>", CURVES_SCRIPT))
    data.say(f"{out}: {', '.join(names)}")


# ------------------------------------------------------------------------------------------- the command line


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    tools = parser.add_subparsers(required=True, metavar="gallery | curves")

    def tool(function, what):
        sub = tools.add_parser(
            function.__name__, help=what, description=what, formatter_class=data.HelpFormatter
        )
        sub.set_defaults(tool=function)
        return partial(sub.add_argument, default=argparse.SUPPRESS), sub.add_argument

    needed, optional = tool(gallery, "show predictions beside posts and references, with filters")
    needed("predictions", help="predictions, as evaluate.py reads them")
    needed("posts", help="the posts they are for: JSONL, or CMKP's text (which has no images)")
    optional("--train", metavar="FILE", help="training posts, to tell unseen keyphrases")
    optional(
        "--out",
        metavar="FILE",
        default="gallery.html",
        help="the page; further ones are numbered beside it",
    )
    optional("--page-size", metavar="N", type=data.count, default=500, help="posts on a page")
    optional(
        "--allow-missing",
        action="store_true",
        help="show posts without a prediction, as empty predictions",
    )
    optional(
        "--workers",
        type=data.count,
        default=os.cpu_count() or 1,
        help="processes that read the images",
    )

    needed, optional = tool(
        curves, "show the training curves of runs, and which samples switched when"
    )
    needed("runs", metavar="RUN", nargs="+", help="a run's folder, train.py's --out")
    optional("--out", metavar="FILE", default="curves.html", help="the page")
    return parser.parse_args()


def main():
    args = read_arguments()
    return args.tool(args)


if __name__ == "__main__":
    run(main)
