"""Pictures as people upload them: what is read, and what is refused before it is decoded."""

import os
import resource
import shutil
import struct
import subprocess
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from support.images import Unreadable, load_image


def test_alpha_goes_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 10**6).getpixel((1, 1)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.save(tmp_path / "b.png", transparency=0)
    assert load_image(tmp_path / "b.png", 10**6).getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 0x8080, np.uint16)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 10**6).getpixel((1, 1)) == (128, 128, 128)


@pytest.mark.parametrize("depth", [2, 4, 16])
@pytest.mark.parametrize("colour", [0, 2])
def test_values_of_other_scales_are_refused(tmp_path, depth, colour):
    """A transparent colour in other than 8 bits, and what has no known white."""
    if colour == 2 and depth < 16:
        pytest.skip("PNG has no such kind")
    transparent = (b"tRNS", struct.pack(">H", 0) * (3 if colour else 1))
    row = b"\0" + bytes(4 * depth // 8 * (3 if colour else 1))
    (tmp_path / "a.png").write_bytes(png(4, 1, depth, colour, packed(row, 1), transparent))
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.ones((4, 4), np.int32)).save(tmp_path / "i.tif")
    Image.fromarray(np.ones((4, 4), np.uint16)).save(tmp_path / "s.tif")
    for name in ("a.png", "f.tif", "i.tif", "s.tif"):
        with pytest.raises(Unreadable, match="save it as 8-bit"):
            load_image(tmp_path / name, 10**6)


@pytest.mark.parametrize("shrink", [1, 4])
@pytest.mark.parametrize(
    "orientation, corner", [*enumerate([(0, 0), (1, 0), (1, 1), (0, 1)] * 2, start=1)]
)
def test_a_photo_is_turned_upright(tmp_path, orientation, corner, shrink):
    """One red corner, stored at the top left, and shown where the EXIF orientation puts it.

    A photo far larger than it may be is turned after it was decoded at a quarter of its size.
    """
    pixels = np.zeros((1500, 2000, 3), np.uint8)
    pixels[:750, :1000, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    picture = load_image(tmp_path / "a.jpg", {1: 10**6, 4: 40_000}[shrink])
    size = width, height = [n // shrink for n in (2000, 1500)][:: 1 if orientation < 5 else -1]
    assert [*picture.size] == size
    red = set()
    for x, y in ((0, 0), (0, 1), (1, 0), (1, 1)):
        middle = (x * width // 2 + width // 4, y * height // 2 + height // 4)
        if picture.getpixel(middle)[0] > 200:
            red.add((x, y))
    assert red == {corner}


def png(width, height, bits, color, rows, *extra):
    def chunk(kind, body):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


def packed(row, times):
    pack = zlib.compressobj(9)
    return b"".join(pack.compress(row) for _ in range(times)) + pack.flush()


def saved(folder, name, **options):
    Image.effect_noise((80, 60), 50).convert("RGB").save(folder / name, **options)
    return (folder / name).read_bytes()


def not_to_be_read(folder):
    """Names of files in `folder` that are no readable pictures, and a part of the reason."""
    whole = {kind: saved(folder, f"whole.{kind}") for kind in ("jpg", "png", "gif", "webp")}
    files = {
        f"torn{part}.{kind}": (content[: int(len(content) * part)], "not a readable image")
        for kind, content in whole.items()
        for part in (0.02, 0.5, 0.9)
    }
    bomb = b"k\0\0" + packed(bytes(10**6), 300)
    saved(folder, "a.eps")
    animation = b"ANIM" + struct.pack("<I", 6) + bytes(6)
    canvas = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + b"\xfe\x3f\0" * 2 + animation
    riff = b"RIFF" + struct.pack("<I", len(canvas)) + canvas
    sizes = (54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    bitmap = b"BM" + struct.pack("<IHHIIiiHHIIiiII", *sizes)
    files |= {
        "empty.jpg": (b"", "JPEG, PNG"),
        "text.jpg": (b"hello", "JPEG, PNG"),
        "page.png": (b"<!DOCTYPE html><p>", "JPEG, PNG"),
        "a.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "JPEG, PNG"),
        "eps.jpg": ((folder / "a.eps").read_bytes(), "JPEG, PNG"),
        "50k.png": (png(50_000, 50_000, 1, 0, packed(bytes(6251), 50_000)), "pixels"),
        "9k.png": (png(9000, 9000, 1, 0, packed(bytes(1126), 9000)), "9000 x 9000 pixels"),
        "ztxt.png": (png(1, 1, 8, 0, packed(bytes(2), 1), (b"zTXt", bomb)), "too large"),
        "iccp.png": (png(1, 1, 8, 0, packed(bytes(2), 1), (b"iCCP", bomb)), "too large"),
        "canvas.webp": (riff, "pixels"),
        "canvas.gif": (whole["gif"][:6] + b"\xff\xff\xff\xff" + whole["gif"][10:], "pixels"),
        "huge.bmp": (bitmap, "pixels"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    os.symlink("loop.jpg", folder / "loop.jpg")
    odd = {
        "folder.jpg": "not a regular",
        "fifo.jpg": "not a regular",
        "/dev/zero": "not a regular",
        "loop.jpg": "no such file",
        "gone.jpg": "no such file",
        "a\0b.jpg": "no such file",
        "a" * 5000: "no such file",
        "\ud800.jpg": "no such file",
    }
    return {name: reason for name, (_, reason) in files.items()} | odd


def test_pictures_that_cannot_be_read(tmp_path):
    """Memory and time show that none was decoded first."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reasons, start = not_to_be_read(tmp_path), time.process_time()
    for name, reason in reasons.items():
        with pytest.raises(Unreadable) as error:
            load_image(tmp_path / name, 10**6)
        assert reason in str(error.value), (name, str(error.value))
    assert time.process_time() - start < 10
    # In KB; 50,000 x 50,000 pixels would be 2.5 GB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


def test_no_other_program_is_started_for_a_picture(tmp_path, monkeypatch):
    saved(tmp_path, "a.eps")
    shutil.copy(tmp_path / "a.eps", tmp_path / "a.jpg")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    for name in ("a.eps", "a.jpg"):
        with pytest.raises(Unreadable):
            load_image(tmp_path / name, 10**6)


def test_odd_pictures_that_are_read(tmp_path):
    def red(*size):
        return Image.new("RGB", size, (200, 30, 10))

    for name, size in (("dot", (1, 1)), ("tall", (1, 20_000)), ("wide", (20_000, 1))):
        red(*size).save(tmp_path / f"{name}.png")
    red(9, 9).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    red(9, 9).convert("RGBA").save(tmp_path / "alpha.png")
    red(9, 9).save(tmp_path / "a.bmp")
    red(9, 9).save(tmp_path / "progressive.jpg", quality=100, progressive=True)
    rows = packed(b"\0" + b"\xc8\xc8\x1e\x1e\x0a\x0a" * 9, 9)
    (tmp_path / "rgb16.png").write_bytes(png(9, 9, 16, 2, rows))
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 200, 30, 10])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    palette.save(tmp_path / "palette.gif", transparency=0)
    frames = dict(save_all=True, append_images=[Image.new("RGB", (9, 9), "blue")] * 2)
    red(9, 9).save(tmp_path / "moving.png", duration=9, **frames)
    red(9, 9).save(tmp_path / "moving.gif", duration=9, **frames)
    red(9, 9).save(tmp_path / "moving.webp", lossless=True, **frames)
    red(9, 9).save(tmp_path / "pages.tiff", **frames)
    jpeg = saved(tmp_path, "noise.jpg")
    torn = b"Exif\0\0II*\0\xff\xff\xff\xffgarbage"  # metadata without tags
    exif = b"\xff\xe1" + struct.pack(">H", 2 + len(torn)) + torn
    (tmp_path / "exif.jpg").write_bytes(jpeg[:2] + exif + jpeg[2:])
    assert load_image(tmp_path / "exif.jpg", 10**6).size == (80, 60)
    for path in set(tmp_path.iterdir()) - {tmp_path / "exif.jpg", tmp_path / "noise.jpg"}:
        picture = load_image(path, 10**6)
        assert picture.mode == "RGB" and max(picture.size) <= 200 * min(picture.size), path
        assert np.abs(np.asarray(picture, int) - (200, 30, 10)).max() <= 12, path
