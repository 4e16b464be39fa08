"""Draw the method as docs/images/method.png, on a post of the club world.

python -m docs.images.method
"""

import itertools
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data import cot_answer, plain_answer
from tools.clubworld import POSTS, make_clubs, make_posts

NUMBER = 2  # of the post in the training file of world 0
INK, BLUE, GREEN, WHITE = "#24292f", "#0969da", "#1a7f37", "#ffffff"


def write(draw, x, y, text, colour=INK, anchor="la"):
    draw.text((x, y), text, colour, ImageFont.load_default(28), anchor=anchor, spacing=8)


def box(draw, corners, title, colour, text, columns):
    """A frame with a title and, below it, a text in lines of so many columns."""
    x, y, _, _ = corners
    draw.rounded_rectangle(corners, 16, WHITE, colour, 4)
    write(draw, x + 24, y + 20, title, colour)
    write(draw, x + 24, y + 72, "\n".join(textwrap.wrap(text, columns, break_on_hyphens=False)))


def arrow(draw, points, label=None, colour=INK):
    """Lines through the points, the last one to the right, with a head and a label above it."""
    draw.line(points, colour, 4)
    x, y = points[-1]
    draw.polygon([(x, y), (x - 18, y - 10), (x - 18, y + 10)], colour)
    if label:
        write(draw, x - 24, y - 16, label, colour, "rs")


def main():
    posts = make_posts(0, make_clubs(0), "train", POSTS["train"])
    record, photo = next(itertools.islice(posts, NUMBER, None))
    plain = plain_answer(record["keyphrases"])
    # The space is a place for a line break.
    reasoned = cot_answer(record["cot"], record["keyphrases"]).replace("><", "> <")
    image = Image.new("RGB", (2000, 550), WHITE)
    draw = ImageDraw.Draw(image)

    box(draw, (20, 90, 440, 510), "a post", INK, "", 1)
    image.paste(photo.resize((220, 220), Image.Resampling.NEAREST), (120, 160))
    write(draw, 44, 404, textwrap.fill(record["text"], 28))
    arrow(draw, [(440, 300), (520, 300)])
    probe = f"L(y_s): the mean loss of the tokens of {plain}"
    box(draw, (520, 190, 900, 410), "probe, no gradient", INK, probe, 22)
    arrow(draw, [(900, 300), (980, 300)])
    draw.polygon([(980, 300), (1120, 190), (1260, 300), (1120, 410)], WHITE, INK, 4)
    write(draw, 1120, 300, "L(y_s) < 0.4?", anchor="mm")
    arrow(draw, [(1120, 190), (1120, 150), (1360, 150)], "yes: easy", GREEN)
    arrow(draw, [(1120, 410), (1120, 460), (1360, 460)], "no: hard", BLUE)
    box(draw, (1360, 20, 1980, 280), "train on y_c: reason, then answer", GREEN, reasoned, 38)
    box(draw, (1360, 390, 1980, 530), "train on y_s: answer", BLUE, plain, 38)
    image.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
