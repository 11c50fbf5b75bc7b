"""Image files as a person sees them: every mode and format that the installed Pillow writes."""

from __future__ import annotations

import random
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localpipe.config.keys import Data
from localpipe.data import decode
from localpipe.data.folders.decode import (
    DEFAULT_RENDERING,
    Rendering,
    check_mode,
    find_rendering,
    has_more_frames,
    image_suffixes,
    open_image,
    seen_size,
    to_rgb,
)
from tests.fuzz.pictures import claim_size

# A picture's left half is opaque, and its right half is transparent where the mode has that.
GRAY, RED, WHITE, BLUE = (77, 77, 77), (200, 10, 30), (255, 255, 255), (0, 0, 255)
DEEP = 25_700  # 257 * 100, a 16-bit value
MODES = [
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB",
    "I", "F", "I;16", "I;16L", "I;16B", "I;16N",
]  # fmt: skip

# What becomes of each mode, and the colours of both halves, worked out by hand.
PLAIN = {
    "1": WHITE,
    "L": GRAY,
    "P": RED,
    "RGB": RED,
    "RGBX": RED,
    "CMYK": (255, 0, 0),  # no cyan, all magenta and yellow
    "YCbCr": (254, 0, 0),  # 76 + 1.402 * 127, 76 + 0.344 * 43 - 0.714 * 127, 76 - 1.772 * 43
    "HSV": (255, 0, 0),
}
COMPOSITED = {"LA": GRAY, "La": GRAY, "PA": RED, "RGBA": RED, "RGBa": RED}
SCALED = {"I;16": (100,) * 3, "I;16L": (100,) * 3, "I;16B": (100,) * 3, "I;16N": (100,) * 3}
WIDE = ["I", "F", *SCALED]
# Black is 25,650, so DEEP is 50 above it, of 255 up to white.
WITH_KEYS = Rendering((25_650, 25_905), BLUE)
RANGED = (50,) * 3
# The format itself drops transparency.
OPAQUE = {("BMP", "RGBA"), ("DIB", "RGBA"), ("PPM", "RGBA"), ("GIF", "LA")}
# Pillow's writer of these makes 8 bits of everything, and clips what is wider.
CLIPPED = {"AVIF", "GIF", "WEBP"}
NOT_READ = {"EPS", "PALM", "PDF"}
LOSSY = {"AVIF", "JPEG", "MPO", "WEBP"}


def picture(mode: str) -> Image.Image:
    """Return 16 x 16 pixels of a mode, with the colours of the tables above."""
    alpha = Image.new("L", (16, 16), 255)
    alpha.paste(0, (8, 0, 16, 16))
    if mode in ("LA", "La"):
        return Image.merge("LA", (Image.new("L", (16, 16), GRAY[0]), alpha)).convert(mode)
    if mode in ("RGBA", "RGBa"):
        red = Image.new("RGBA", (16, 16), RED)
        red.putalpha(alpha)
        return red.convert(mode)
    if mode in ("P", "PA"):
        palette = Image.new("P", (16, 16), 0)
        palette.putpalette([*RED, 0, 0, 0])
        if mode == "PA":
            palette = palette.convert("PA")
            palette.putalpha(alpha)
        return palette
    if mode.startswith("I;16"):
        order = ">u2" if mode == "I;16B" else "<u2"
        return Image.frombytes(mode, (16, 16), np.full(256, DEEP, order).tobytes())
    values: dict[str, int | tuple[int, ...]] = {
        "1": 1,
        "L": GRAY[0],
        "I": DEEP,
        "F": DEEP,
        "CMYK": (0, 255, 255, 0),
        "YCbCr": (76, 85, 255),
        "HSV": (0, 255, 255),
        "LAB": (100, 0, 0),
        "RGB": RED,
        "RGBX": (*RED, 0),
    }
    return Image.new(mode, (16, 16), values[mode])


def written(folder: Path, kind: str, mode: str) -> Path | None:
    """Return a file of a format and mode, or None if Pillow does not write it."""
    file = folder / f"{kind}.dat"
    try:
        picture(mode).save(file, format=kind)
    except Exception:  # every encoder has errors of its own
        return None
    return file


def outcome(
    kind: str, mode: str, rendering: Rendering
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Return what becomes of a mode in a format: a word, and the colours of both halves."""
    if kind in NOT_READ:
        return "refused", (), ()
    if kind in CLIPPED and mode in WIDE:
        return "plain", WHITE, WHITE
    if rendering.value_range is not None and mode in WIDE:
        return "scaled", RANGED, RANGED
    if kind == "SPIDER":  # which holds floats alone
        if rendering.value_range is None:
            return "refused", (), ()
        return "plain", (0, 0, 0), (0, 0, 0)
    if mode in SCALED or (kind in ("PNG", "PPM") and mode == "I"):
        return "scaled", (100,) * 3, (100,) * 3
    if mode in ("I", "F", "LAB"):
        return "refused", (), ()
    if mode in PLAIN:
        return "plain", PLAIN[mode], PLAIN[mode]
    if (kind, mode) in OPAQUE:
        return "plain", COMPOSITED[mode], COMPOSITED[mode]
    return "composited", COMPOSITED[mode], rendering.background


@pytest.mark.parametrize("rendering", [DEFAULT_RENDERING, WITH_KEYS])
def test_every_mode_and_format_that_pillow_writes_is_scaled_composited_or_refused(
    tmp_path: Path, rendering: Rendering
) -> None:
    Image.init()
    seen: Counter[str] = Counter()
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            file = written(tmp_path, kind, mode)
            # Pillow's writer gives Lab colours to these formats as if they were others.
            if file is None or (mode == "LAB" and kind in CLIPPED):
                continue
            word, left, right = outcome(kind, mode, rendering)
            seen[word] += 1
            if word == "refused":
                with pytest.raises(Exception, match="identify|floats|integers|Lab"):
                    to_rgb(open_image(str(file)), rendering)
                continue
            pixels = np.asarray(to_rgb(open_image(str(file)), rendering)).astype(int)
            middle, end = pixels.shape[0] // 2, pixels.shape[1] - 1
            limit = 4 if kind in LOSSY else 1
            for place, colour in ((0, left), (end, right)):
                wrong = np.abs(pixels[middle, place] - colour).max()
                assert wrong <= limit, f"{kind} {mode}: {pixels[middle, place]}, not {colour}"
    assert seen["plain"] > 60 and seen["composited"] > 15 and seen["scaled"] > 8
    assert seen["refused"] > 10


@pytest.mark.parametrize("big_endian", [False, True])
def test_16_bits_are_divided_by_257_and_rounded(tmp_path: Path, big_endian: bool) -> None:
    values = np.array([[0, 128, 129, 257, 25_700, 32_767, 65_535]], np.uint16)
    expected = [0, 0, 1, 1, 100, 127, 255]  # 128 / 257 is below a half, 129 / 257 above
    kinds = ["png", "tif", "pgm", "jp2"]
    image = Image.fromarray(values)
    if big_endian:
        kinds = ["tif"]
        image = Image.frombytes("I;16B", image.size, values.astype(">u2").tobytes())
    for kind in kinds:
        file = tmp_path / f"deep.{kind}"
        image.save(file)
        pixels = np.asarray(to_rgb(open_image(str(file))))
        assert (pixels == np.array(expected)[None, :, None]).all(), kind


def test_a_deep_gray_png_may_have_a_transparent_value(tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    Image.fromarray(np.array([[257, 514]], np.uint16)).save(file, transparency=257)
    assert np.asarray(to_rgb(open_image(str(file))))[0, :, 0].tolist() == [255, 2]


def test_a_tiff_may_have_black_for_the_largest_value(tmp_path: Path) -> None:
    file = tmp_path / "x.tif"
    Image.fromarray(np.array([[0, 25_700]], np.uint16)).save(file, tiffinfo={262: 0})
    with open_image(str(file)) as opened:
        inverted = opened.tag_v2[262] == 0  # type: ignore[attr-defined]
        levels = np.asarray(to_rgb(opened))[0, :, 0].tolist()
    assert inverted and levels == [255, 155]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    fifth = Image.new("RGBA", (4, 4), (*RED, 51))  # 0.2 of the colour and 0.8 of white
    fifth.save(tmp_path / "rgba.png")
    key = Image.new("RGB", (4, 4), RED)
    key.putpixel((0, 0), (0, 255, 0))
    key.save(tmp_path / "key.png", transparency=(0, 255, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([*RED, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=bytes([51, 255]))
    palette.save(tmp_path / "palette.gif", transparency=0)

    def first(name: str) -> list[int]:
        pixel: list[int] = np.asarray(to_rgb(open_image(str(tmp_path / name))))[0, 0].tolist()
        return pixel

    assert first("rgba.png") == first("palette.png") == [244, 206, 210]
    assert first("key.png") == first("palette.gif") == [255, 255, 255]
    assert np.asarray(to_rgb(open_image(str(tmp_path / "key.png"))))[1, 1].tolist() == list(RED)


def test_an_opaque_image_keeps_every_bit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "rgb.png")
    for name in ("rgba.png", "rgb.png"):
        assert (np.asarray(to_rgb(open_image(str(tmp_path / name)))) == pixels[..., :3]).all()


# EXIF's orientation of a picture whose upper left corner, as a person sees it, is at this corner
# (row, column) of the stored pixels, and whether height and width are exchanged.
CORNERS = {
    1: (0, 0, False), 2: (0, -1, False), 3: (-1, -1, False), 4: (-1, 0, False),
    5: (0, 0, True), 6: (-1, 0, True), 7: (-1, -1, True), 8: (0, -1, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    row, column, is_sideways = CORNERS[orientation]
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :32] = stored[-16:, -32:] = 60
    height, width = (slice(0, 16), slice(-16, None))[row], (slice(0, 32), slice(-32, None))[column]
    stored[height, width] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"turned.{kind}"
    Image.fromarray(stored).save(file, exif=exif, quality=95)
    with open_image(str(file)) as opened:
        size = seen_size(opened)
        pixels = np.asarray(to_rgb(opened))
    assert size == pixels.shape[:2] == ((64, 32) if is_sideways else (32, 64))
    assert pixels[4, 4].min() > 230 and pixels[4, -4].max() < 90 and pixels[-4, 4].max() < 90


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    pixels = np.full((8, 16, 3), 77, np.uint8)
    for exif in (b"Exif\0\0MM\0*\0\0", b"Exif\0\0nothing at all", b"\xff" * 40):
        Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif)
        with open_image(str(tmp_path / "x.jpg")) as opened:
            assert seen_size(opened) == (8, 16)
            assert (np.asarray(to_rgb(opened)) == 77).all()


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif", "avif"])
def test_the_first_frame_is_read(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), (level, level, level)) for level in (40, 140, 240)]
    file = tmp_path / f"x.{kind}"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    with open_image(str(file)) as opened:
        assert has_more_frames(opened)
        assert abs(int(np.asarray(to_rgb(opened))[8, 8, 0]) - 40) < 5
    frames[0].save(file)
    with open_image(str(file)) as opened:
        assert not has_more_frames(opened)


def test_what_nobody_can_scale_is_refused_with_the_way_out(tmp_path: Path) -> None:
    whole = np.array([[0, 70_000]], np.int32)
    texts = {}
    for name, image in (
        ("floats", Image.fromarray(whole.astype(np.float32))),
        ("integers", Image.fromarray(whole)),
        ("Lab", Image.new("LAB", (2, 2))),
    ):
        image.save(tmp_path / f"{name}.tif")
        with open_image(str(tmp_path / f"{name}.tif")) as opened, pytest.raises(ValueError) as seen:
            check_mode(opened)
        texts[name] = str(seen.value)
    way_out = (
        "whose black and white are not known: give their values, as in data.range=[0,1], "
        "or save it with 8 or 16 bits a channel"
    )
    assert texts == {
        "floats": f"it holds 32-bit floats, {way_out}",
        "integers": f"it holds 32-bit or signed integers, {way_out}",
        "Lab": "it has Lab colours, which Pillow does not convert: save it as RGB",
    }


# --- data.range and data.background


def gray(file: Path, low: float, high: float) -> list[int]:
    """Return the gray values of the first row of a file under data.range=[low, high]."""
    with open_image(str(file)) as opened:
        pixels = np.asarray(to_rgb(opened, Rendering((low, high))))
    assert (pixels == pixels[..., :1]).all()
    row: list[int] = pixels[0, :, 0].tolist()
    return row


def test_a_range_scales_rounds_and_clips_floats(tmp_path: Path) -> None:
    file = tmp_path / "x.tif"
    values = [-1.5, -1, 0, 0.25, 1, 3, 3.1, np.inf, -np.inf, 1e38]
    Image.fromarray(np.array([values], np.float32)).save(file)
    # 255 times 0, 0, 1/4, 5/16, 1/2 and 1, and what lies outside is clipped.
    assert gray(file, -1, 3) == [0, 0, 64, 80, 128, 255, 255, 255, 0, 255]
    few = np.array([[0.001, 0.5, 0.0021]], np.float32)
    for kind in ("tif", "pfm"):
        Image.fromarray(few).save(tmp_path / f"y.{kind}")
        assert gray(tmp_path / f"y.{kind}", 0, 1) == [0, 128, 1]  # 0.255, 127.5, 0.5355


@pytest.mark.parametrize(
    ("dtype", "values", "low", "high", "expected"),
    [
        (np.int32, [-500, 0, 500, 70_000], -500, 500, [0, 128, 255, 255]),
        (np.int32, [-(2**31), 0, 2**31 - 1], -(2.0**31), 2.0**31, [0, 128, 255]),
        (np.int16, [-1024, 0, 1023, 3071], -1024, 3071, [0, 64, 127, 255]),  # Hounsfield's units
        (np.uint16, [0, 1000, 4095, 65_535], 0, 4095, [0, 62, 255, 255]),
        (np.uint8, [0, 77, 255], 0, 100, [0, 77, 255]),  # 8 bits are left alone
    ],
)
def test_a_range_scales_integers_of_more_than_8_bits(
    tmp_path: Path, dtype: type, values: list[int], low: float, high: float, expected: list[int]
) -> None:
    file = tmp_path / "x.tif"
    Image.fromarray(np.array([values], np.int32).astype(dtype)).save(file)
    assert gray(file, low, high) == expected


def test_unsigned_32_bits_do_not_become_negative(tmp_path: Path) -> None:
    file = tmp_path / "x.tif"
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    Image.fromarray(values.view(np.int32)).save(file)
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    content = file.read_bytes()
    assert content.count(signed) == 1
    file.write_bytes(content.replace(signed, unsigned))
    assert gray(file, 0, 2**32 - 1) == [0, 128, 255]


def test_the_16_bits_of_fits_are_signed(tmp_path: Path) -> None:
    cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 3", "NAXIS2  = 1", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    file = tmp_path / "x.fits"
    file.write_bytes(header + np.array([-5, 0, 5], ">i2").tobytes().ljust(2880, b"\0"))
    assert gray(file, -5, 5) == [0, 128, 255]
    with open_image(str(file)) as opened, pytest.raises(ValueError, match="signed integers"):
        check_mode(opened)


def test_a_range_is_of_the_values_in_the_file_where_pillow_makes_16_bits_of_12(
    tmp_path: Path,
) -> None:
    values = np.arange(0, 4096, 64).reshape(8, 8)
    expected = np.rint(values / 4095 * 255)
    binary, plain, j2k = tmp_path / "b.pgm", tmp_path / "p.pgm", tmp_path / "x.jp2"
    binary.write_bytes(b"P5 8 8 4095\n" + values.astype(">u2").tobytes())
    plain.write_text("P2 8 8 4095\n" + " ".join(map(str, values.ravel())))
    # The codestream's header says 12 bits instead of 16, which moves its middle to 2,048.
    Image.fromarray((values + 2**15 - 2**11).astype(np.uint16)).save(j2k)
    content = bytearray(j2k.read_bytes())
    content[content.index(b"\xff\x4f\xff\x51") + 42] = 11
    j2k.write_bytes(content)
    for file in (binary, plain, j2k):
        with open_image(str(file)) as opened:
            pixels = np.asarray(to_rgb(opened, Rendering((0, 4095))))[..., 0]
        assert (pixels == expected).all(), file
        with open_image(str(file)) as opened:
            assert abs(np.asarray(to_rgb(opened))[..., 0] - expected).max() <= 1


def test_a_range_keeps_what_a_file_says_of_black_and_of_transparency(tmp_path: Path) -> None:
    values = np.array([[0, 1000, 4000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "inverse.tif", tiffinfo={262: 0})
    assert gray(tmp_path / "inverse.tif", 0, 4000) == [255, 191, 0]
    Image.fromarray(values).save(tmp_path / "x.png", transparency=1000)
    with open_image(str(tmp_path / "x.png")) as opened:
        pixels = np.asarray(to_rgb(opened, Rendering((0, 4000), BLUE)))
    assert pixels[0].tolist() == [[0, 0, 0], list(BLUE), [255, 255, 255]]


def test_nan_is_neither_black_nor_white(tmp_path: Path) -> None:
    file = tmp_path / "x.tif"
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(file)
    with pytest.raises(ValueError, match=r"^it holds NaN, which is no brightness$"):
        gray(file, 0, 1)


def deep_colours(folder: Path, kind: str) -> Path:
    """Write one pixel of RGB with 16 bits a channel."""
    file = folder / f"x.{kind}"
    if kind == "ppm":
        file.write_bytes(b"P6 1 1 65535\n" + bytes([1, 0, 2, 0, 3, 0]))
        return file

    def chunk(name: bytes, content: bytes) -> bytes:
        size, code = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(name + content))
        return size + name + content + code

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes([0, 1, 0, 2, 0, 3, 0])))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    return file


@pytest.mark.parametrize("kind", ["png", "ppm"])
def test_a_range_refuses_deep_colours_of_which_pillow_reads_8_bits(
    tmp_path: Path, kind: str
) -> None:
    file = deep_colours(tmp_path, kind)
    assert np.asarray(to_rgb(open_image(str(file)))).tolist() == [[[1, 2, 3]]]
    with pytest.raises(ValueError, match="so data.range does not scale them: save it with 8 bits"):
        gray(file, 0, 4095)


@pytest.mark.parametrize(
    ("name", "colour"),
    [
        ("white", (255, 255, 255)), ("Black", (0, 0, 0)), ("#808080", (128, 128, 128)),
        ("#fff", (255, 255, 255)), ("#010203ff", (1, 2, 3)), ((9, 8, 7), (9, 8, 7)),
    ],
)  # fmt: skip
def test_a_background_is_a_name_or_numbers(
    tmp_path: Path, name: str | tuple[int, int, int], colour: tuple[int, int, int]
) -> None:
    rendering = find_rendering(Data(background=name))
    Image.new("RGBA", (2, 2), (200, 10, 30, 51)).save(tmp_path / "x.png")
    pixels = np.asarray(to_rgb(open_image(str(tmp_path / "x.png")), rendering)).astype(int)
    # A fifth of the picture, and four fifths of the background.
    expected = [(front + 4 * back) / 5 for front, back in zip((200, 10, 30), colour, strict=True)]
    assert np.abs(pixels - expected).max() <= 1


def test_suffixes_are_those_of_pillow_without_eps_and_without_what_it_does_not_decode() -> None:
    suffixes = image_suffixes()
    assert {".png", ".jpg", ".jfif", ".gif", ".webp", ".avif", ".jp2", ".tif", ".mpo"} <= suffixes
    assert not {".eps", ".ps", ".pdf", ".h5", ".hdf", ".mpg", ".wmf", ".grib"} & suffixes


def test_an_eps_file_is_not_opened_under_another_suffix(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", format="EPS")
    with pytest.raises(Exception, match="cannot identify"):
        open_image(str(tmp_path / "x.png"))


def test_pillow_warns_of_nothing(tmp_path: Path) -> None:
    claim_size(13_000, 13_000)(bytes(tmp_path / "large.png"), random.Random(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode._decoded_formats.cache_clear()
        with decode.open_image(str(tmp_path / "large.png")) as picture:
            assert picture.size == (13_000, 13_000)
    assert caught == []
