"""Images as people upload them: read, turned upright, in RGB, within limits of size."""

import base64
import io
import os
import warnings

from PIL import Image, ImageOps

# Pillow knows more formats; some of them run other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
MOST_PIXELS = 64_000_000  # of a decoded image: about 1 GB of memory, and 4 s
LONGEST_SIDE = 200  # times the shorter one; image processors refuse thinner pictures
TOKEN_SIDE = 28  # pixels of one image token's side (Qwen2-VL, Qwen2.5-VL)
MAX_PIXELS = 512 * TOKEN_SIDE * TOKEN_SIDE


class Unreadable(Exception):
    """An image that can't be read; the text says why."""


def load_image(path, max_pixels):
    """The picture in `path` as upright RGB (PIL): an animation's first frame, alpha over white.

    A JPEG far larger than `max_pixels` is decoded at a half, a quarter or an eighth of its size.
    The image processor does the rest of the scaling, with the model's own resampling. Raises
    Unreadable.
    """
    if not os.path.isfile(path):  # reading a FIFO would block for ever
        raise Unreadable("not a regular file" if os.path.exists(path) else "no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; errors still raise
            # Given a path, Pillow maps uncompressed TIFFs into memory, and garbles turned ones.
            with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
                shrink = (image.width * image.height / (4 * max_pixels)) ** 0.5
                if shrink > 1:
                    image.draft(None, (round(image.width / shrink), round(image.height / shrink)))
                if image.width * image.height > MOST_PIXELS:
                    size = f"{image.width} x {image.height}"
                    raise Unreadable(f"{size} pixels are more than {MOST_PIXELS:,}")
                check_depth(image)
                image.load()
                image = to_rgb(ImageOps.exif_transpose(image))
    except Unreadable:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds of errors for a broken file
        raise Unreadable(f"not a readable image ({', '.join(FORMATS)}): {error!r}") from None
    longest = LONGEST_SIDE * min(image.size)
    if max(image.size) > longest:
        image = image.resize((min(image.width, longest), min(image.height, longest)))
    return image


def to_rgb(image):
    """The image in mode RGB: 16 bits scaled to 8, alpha over white."""
    if image.mode.startswith("I;16"):
        import numpy as np

        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def check_depth(image):
    """Raise Unreadable for a picture that is not yet decoded and whose values have other scales.

    White is 255 in 8 bits, and 65,535 in a PNG of 16. A transparent colour, which a PNG without a
    palette may have, is known in 8 bits only.
    """
    png = image.format == "PNG"
    other_scale = image.mode in ("I", "F") or image.mode.startswith("I;16") and not png
    coloured = png and image.mode != "P" and "transparency" in image.info
    if other_scale or coloured and image.tile[0].args not in ("L", "RGB"):
        raise Unreadable(f"its pixels (mode {image.mode}) are not in 8 bits; save it as 8-bit")


def fit(image, max_pixels, side=TOKEN_SIDE):
    """The image scaled to whole tokens, squares of `side` pixels: as many as `max_pixels` has."""
    shrink = (image.width * image.height / max_pixels) ** 0.5
    most = max(1, max_pixels // side**2)  # of a thin picture, which is at least one token wide
    size = [min(most, max(1, int(length / shrink / side))) * side for length in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


def patches(picture, process, size):
    """(pixel_values, image_grid_thw) of a PIL image, whose pixels are within a processor's size."""
    most, side = size["longest_edge"], process.patch_size * process.merge_size
    image = process([picture], size=size, do_resize=True, return_tensors="pt")
    if int(image["image_grid_thw"].prod()) * process.patch_size**2 > most:
        # The processor makes a picture that is thin, or has to grow, larger than it may be.
        image = process([fit(picture, most, side)], do_resize=False, return_tensors="pt")
    return image["pixel_values"], image["image_grid_thw"]


def image_url(path, max_pixels):
    """An image as a data URL of a JPEG without metadata, for a server. Raises Unreadable.

    A larger image is scaled to whole tokens, as the model's own processor would do: a server that
    runs this processor then keeps its size.
    """
    image = load_image(path, max_pixels)
    if max(image.width, TOKEN_SIDE) * max(image.height, TOKEN_SIDE) > max_pixels:
        image = fit(image, max_pixels)
    image.info = {}  # `save` would write a comment again
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
