"""Images as people upload them: read, turned upright, in RGB, within limits of size."""

import base64
import io
import os
import warnings

# Pillow knows more formats; some of them run other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
MOST_PIXELS = 64_000_000  # of a decoded image: about 1 GB of memory, and 4 s
LONGEST_SIDE = 200  # times the shorter one; image processors refuse thinner pictures
TOKEN_SIDE = 28  # pixels of one image token's side (Qwen2-VL, Qwen2.5-VL)
MAX_PIXELS = 512 * TOKEN_SIDE * TOKEN_SIDE
NO_FILE = "no such file"


class Unreadable(Exception):
    """An image that can't be read; the text says why."""


def load_image(path, max_pixels):
    """The picture in `path` as upright RGB (PIL): an animation's first frame, alpha over white.

    A JPEG far larger than `max_pixels` is decoded at a half, a quarter or an eighth of its size.
    The image processor does the rest of the scaling, with the model's own resampling. Raises
    Unreadable.
    """
    from PIL import Image, UnidentifiedImageError

    if not os.path.exists(path):
        raise Unreadable(NO_FILE)
    if not os.path.isfile(path):  # reading a FIFO would block for ever
        raise Unreadable(f"not a regular file{', but a folder' * os.path.isdir(path)}")
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
                image.load()
                image = to_rgb(upright(image))
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable(f"not a readable image ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Unreadable(f"too large: {error}") from None
    except Exception as error:  # Pillow's plugins raise all kinds of errors for a broken file
        raise Unreadable(f"not a readable image: {type(error).__name__}: {error}") from None
    longest = LONGEST_SIDE * min(image.size)
    if max(image.size) > longest:
        image = image.resize((min(image.width, longest), min(image.height, longest)))
    return image


def upright(image):
    """The image turned as its EXIF orientation says."""
    from PIL.Image import Transpose

    # ImageOps.exif_transpose rewrites all metadata, and fails where they are damaged.
    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
    orientations = dict(enumerate(turns.split(), start=2))
    turn = orientations.get(image.getexif().get(0x0112))
    return image.transpose(Transpose[turn]) if turn else image


def to_rgb(image):
    """The image in mode RGB: numbers of more than 8 bits scaled to 8, alpha over white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(to_8_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_8_bits(image):
    """The values of a picture of 16 or 32 bits as an array of bytes.

    White is 1 for floats up to 1, else 255, 65535, or the largest value, whichever is enough.
    """
    import numpy as np

    values, tags = np.asarray(image), getattr(image, "tag_v2", {})  # a TIFF's tags
    if image.mode == "I" and values.min(initial=0) < 0 and tags.get(339, (1,))[0] == 1:
        values = values.view(np.uint32)  # Pillow has no mode for 32 bits without a sign
    largest = float(values.max(initial=0, where=np.isfinite(values)))
    if image.mode == "F" and largest < 2:  # a filter may have passed 1 a little
        white = 1
    else:
        white = next((white for white in (255, 65535) if largest <= white), largest)
    values = values.astype(np.float32) / np.float32(white / 255)
    values = np.nan_to_num(values).clip(0, 255).round().astype(np.uint8)
    return 255 - values if tags.get(262) == 0 else values  # this TIFF's 0 is white


def from_club_world(image):
    """Whether an RGB picture is one that tools.clubworld draws, by its size and its grain.

    Flat areas get -6, 0 or 6 on all colours of each square of 2 x 2 pixels. Photos scaled to this
    size have no such steps: at most 1 in 250 squares, where a drawing has 7 or more.
    """
    import numpy as np

    if image.size != (84, 84):
        return False
    pixels = np.asarray(image, np.int16)
    squares = pixels[::2, ::2]  # (42, 42, 3)
    flat = (pixels == squares.repeat(2, axis=0).repeat(2, axis=1)).all(2)
    flat = flat.reshape(42, 2, 42, 2).all((1, 3))
    step = squares[:, 1:] - squares[:, :-1]  # between neighbours in a row
    grain = (step == step[..., :1]).all(2) & np.isin(step[..., 0], (-12, -6, 6, 12))
    return bool((grain & flat[:, 1:] & flat[:, :-1]).mean() > 0.01)


def fit(image, max_pixels, side=TOKEN_SIDE):
    """The image scaled to whole tokens, squares of `side` pixels: as many as `max_pixels` has."""
    from PIL import Image

    shrink = (image.width * image.height / max_pixels) ** 0.5
    most = max(1, max_pixels // side**2)  # of a thin picture, which is at least one token wide
    size = [min(most, max(1, int(length / shrink / side))) * side for length in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


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
    try:
        image.save(buffer, "JPEG", quality=90)
    except OSError as error:  # a JPEG's sides have at most 65,500 pixels
        raise Unreadable(f"can't be sent as JPEG: {error}") from None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
