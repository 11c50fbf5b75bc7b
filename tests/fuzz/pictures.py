"""Image files, sound and odd, each written to a path by a function of (path, dice)."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

Writer = Callable[[bytes, random.Random], None]


def write_sound(path: bytes, dice: random.Random, mode: str = "RGB") -> None:
    """Write an 8 x 8 image as PNG, whatever the path's suffix is."""
    _write(path, encode(_noise(dice, 8, 8, mode)))


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the bytes of an image file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _noise(dice: random.Random, height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(dice.randrange(2**32)).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def _write(path: bytes, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def _of_bytes(content: bytes) -> Writer:
    return lambda path, dice: _write(path, content)


def _of_size(height: int, width: int) -> Writer:
    return lambda path, dice: _write(path, encode(_noise(dice, height, width)))


def _of_mode(mode: str, kind: str = "PNG") -> Writer:
    return lambda path, dice: _write(path, encode(_noise(dice, 8, 8, mode), kind))


def _of_array(dtype: str, kind: str) -> Writer:
    def write(path: bytes, dice: random.Random) -> None:
        values = np.arange(64).reshape(8, 8).astype(dtype)
        _write(path, encode(Image.fromarray(values), kind))

    return write


def _cut_short(path: bytes, dice: random.Random) -> None:
    kind = dice.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"))
    content = encode(_noise(dice, 16, 16), kind)
    _write(path, content[: dice.randrange(len(content))])


def _spoil(path: bytes, dice: random.Random) -> None:
    kind = dice.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"))
    content = bytearray(encode(_noise(dice, 16, 16), kind))
    for _ in range(dice.choice((1, 3, 20))):
        content[dice.randrange(len(content))] = dice.randrange(256)
    _write(path, bytes(content))


def _animate(path: bytes, dice: random.Random) -> None:
    frames = [_noise(dice, 8, 8) for _ in range(3)]
    kind = dice.choice(("GIF", "PNG", "TIFF", "WEBP"))
    _write(path, encode(frames[0], kind, save_all=True, append_images=frames[1:]))


def _turn(path: bytes, dice: random.Random) -> None:
    exif = Image.Exif()
    exif[0x0112] = dice.choice((0, 1, 6, 8, 99))
    _write(path, encode(_noise(dice, 8, 12), "JPEG", exif=exif))


def claim_size(width: int, height: int, rows: int = 0) -> Writer:
    """Return a writer of a PNG whose header claims a size, with `rows` rows of black after it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes((width + 1) * rows))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        parts.append(struct.pack(">I", len(content)) + name + content + checksum)
    return _of_bytes(b"".join(parts))


def _folder(path: bytes, dice: random.Random) -> None:
    os.mkdir(path)
    if dice.random() < 0.5:
        write_sound(os.path.join(path, b"inner.png"), dice)


def _link(target: bytes) -> Writer:
    def write(path: bytes, dice: random.Random) -> None:
        with contextlib.suppress(FileExistsError):
            os.symlink(target, path)

    return write


def _pipe(path: bytes, dice: random.Random) -> None:
    os.mkfifo(path)


def _link_to_pipe(path: bytes, dice: random.Random) -> None:
    os.mkfifo(path + b".pipe")
    os.symlink(os.path.basename(path) + b".pipe", path)


# Kinds that decode, in the first list, and others.
SOUND: tuple[Writer, ...] = (
    write_sound,
    _of_mode("L"), _of_mode("1"), _of_mode("P"), _of_mode("RGBA"), _of_mode("LA"),
    _of_mode("CMYK", "JPEG"), _of_mode("L", "JPEG"), _of_mode("YCbCr", "JPEG"),
    _of_mode("RGB", "WEBP"), _of_mode("RGB", "TIFF"), _of_mode("P", "GIF"),
    _of_array("uint16", "PNG"), _of_array("uint16", "TIFF"), _of_size(8, 12), _of_size(1, 1),
    _of_size(1, 300), _of_size(300, 1), _of_size(2, 2), _animate, _turn,
)  # fmt: skip
ODD: tuple[Writer, ...] = (
    _of_bytes(b""), _of_bytes(b"not an image\n"), _of_bytes(b"\x89PNG\r\n\x1a\n"),
    _of_bytes(b"P5 1000000000 1000000000 255\n"), _of_bytes(b"P6 8 8 65536\n"),
    _of_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"), _of_bytes(b"GIF89a"),
    _of_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), _of_bytes(b"\xff\xd8\xff\xe0"),
    _of_bytes(bytes(range(256)) * 4), _of_bytes(b"BM" + b"\xff" * 60), _of_bytes(b"\0" * 5000),
    _cut_short, _cut_short, _spoil, _spoil, _spoil, claim_size(100_000, 100_000), claim_size(0, 0),
    claim_size(13_000, 13_000), claim_size(2**31 - 1, 2**31 - 1), claim_size(9000, 10_000, 10_000),
    _of_array("float32", "TIFF"), _of_array("int32", "TIFF"), _of_mode("LAB", "TIFF"), _folder,
    _link(b"nowhere.png"), _link(b"."), _link(b".."), _link(b"/dev/zero"), _link(b"/dev/null"),
    _link(b"0.png"), _link(b"/proc/self/mem"), _pipe, _link_to_pipe,
)  # fmt: skip
