"""Draw the method as docs/images/method.png, on a post of the club world.

python -m docs.images.method
"""

import itertools
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data import cot_answer, plain_answer
from tools.clubworld import POSTS, make_clubs, make_posts

NUMBER = 26  # of the post in the training file of world 0
WIDTH, HEIGHT, SCALE = 1000, 275, 2
INK, GREY, BLUE, GREEN, WHITE = "#24292f", "#6e7781", "#0969da", "#1a7f37", "#ffffff"


def scaled(*values):
    return [SCALE * value for value in values]


def write(draw, x, y, text, size=14, colour=INK, anchor="la"):
    font = ImageFont.load_default(SCALE * size)
    draw.text(scaled(x, y), text, colour, font, anchor=anchor, spacing=SCALE * 4)


def box(draw, corners, title, colour, text, columns):
    """A frame with a title and, below it, a text in lines of so many columns."""
    x, y, _, _ = corners
    draw.rounded_rectangle(scaled(*corners), SCALE * 8, WHITE, colour, SCALE * 2)
    write(draw, x + 12, y + 10, title, 15, colour)
    write(draw, x + 12, y + 36, "\n".join(textwrap.wrap(text, columns, break_on_hyphens=False)))


def arrow(draw, points, label=None, colour=INK):
    """Lines through the points, the last one to the right, with a head and a label above it."""
    draw.line(scaled(*itertools.chain(*points)), colour, SCALE * 2)
    x, y = points[-1]
    draw.polygon(scaled(x, y, x - 9, y - 5, x - 9, y + 5), colour)
    if label:
        write(draw, x - 12, y - 8, label, 14, colour, "rs")


def main():
    posts = make_posts(0, make_clubs(0), "train", POSTS["train"])
    record, photo = next(itertools.islice(posts, NUMBER, None))
    plain = plain_answer(record["keyphrases"])
    # The space is a place for a line break.
    reasoned = cot_answer(record["cot"], record["keyphrases"]).replace("><", "> <")
    image = Image.new("RGB", scaled(WIDTH, HEIGHT), WHITE)
    draw = ImageDraw.Draw(image)

    box(draw, (10, 45, 220, 255), "a post", INK, "", 1)
    image.paste(photo.resize(scaled(110, 110), Image.Resampling.NEAREST), scaled(60, 80))
    write(draw, 22, 202, textwrap.fill(record["text"], 28))
    arrow(draw, [(220, 150), (260, 150)])
    probe = f"L(y_s): the mean loss of the tokens of {plain}"
    box(draw, (260, 95, 450, 205), "probe, no gradient", INK, probe, 22)
    arrow(draw, [(450, 150), (490, 150)])
    draw.polygon(scaled(490, 150, 560, 95, 630, 150, 560, 205), WHITE, INK, SCALE * 2)
    write(draw, 560, 150, "L(y_s) < 0.4?", 14, INK, "mm")
    arrow(draw, [(560, 95), (560, 75), (680, 75)], "yes: easy", GREEN)
    arrow(draw, [(560, 205), (560, 230), (680, 230)], "no: hard", BLUE)
    box(draw, (680, 10, 990, 140), "train on y_c: reason, then answer", GREEN, reasoned, 38)
    box(draw, (680, 195, 990, 265), "train on y_s: answer", BLUE, plain, 38)
    image.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
