"""One image file as a person sees it: upright, with 8 bits a channel, on white."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from localpipe.data.images import one_line_reason
from localpipe.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow recognises these, but leaves their pixels to other programs. EPS would start Ghostscript.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
# Formats of at most 16 bits for which some versions of Pillow use the mode of 32-bit integers.
_AT_MOST_16_BITS = ("PNG", "PPM")
# Further images of these formats are previews or layers, and not frames or pages.
_WITH_EXTRAS = ("MPO", "PSD")
_ORIENTATION = 0x0112  # in EXIF
_SIDEWAYS = (5, 6, 7, 8)  # the orientations that exchange height and width
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262  # tags
_WHITE_IS_ZERO = 0  # a value of _TIFF_PHOTOMETRIC
_UNKNOWN_RANGE = "whose black and white are not known: save it with 8 or 16 bits a channel"


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of all files that the installed Pillow decodes: `.png` and so on.

    They are in lower case. EPS is left out.
    """
    from PIL import Image

    # An MPO is opened as a JPEG.
    formats = {*_decoded_formats(), "MPO"}
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in formats)


def open_image(path: str) -> Image:
    """Open an image file, and read its header alone.

    Raises errors of any class for a file that is missing, damaged, or no image.
    """
    from PIL import Image

    return Image.open(path, formats=_decoded_formats())


def to_rgb(picture: Image) -> Image:
    """Return what a person sees of an opened file, as a new RGB image of 8 bits a channel.

    16-bit values are divided by 257. EXIF's orientation is applied, and transparency is laid on
    white. Of an animation it is the first frame. The opened file may be changed.

    Raises ValueError as `check_mode`, and errors of any class for a damaged file.
    """
    check_mode(picture)
    picture.load()
    _turn_upright(picture)
    if picture.mode.startswith("I"):
        return _scale_16_bits(picture)
    if _is_transparent(picture):
        return _lay_on_white(picture)
    return picture.convert("RGB")


def check_mode(picture: Image) -> None:
    """Raise ValueError with the way out for pixels of which nobody knows how they look."""
    if picture.mode == "F":
        raise ValueError(f"it holds 32-bit floats, {_UNKNOWN_RANGE}")
    if picture.mode == "I" and picture.format not in _AT_MOST_16_BITS:
        raise ValueError(f"it holds 32-bit or signed integers, {_UNKNOWN_RANGE}")
    if picture.mode == "LAB":
        raise ValueError("it has Lab colours, which Pillow does not convert: save it as RGB")


def seen_size(picture: Image) -> tuple[int, int]:
    """Return (H, W) of what `to_rgb` would return for an opened file, from its header."""
    from PIL import Image

    width, height = picture.size
    # Pillow applies a TIFF's orientation itself.
    if picture.format == "TIFF":
        return height, width
    try:
        # A PNG's own `getexif` would decode the file.
        orientation = Image.Image.getexif(picture).get(_ORIENTATION)
    except Exception:  # damaged EXIF has errors of many classes, and turns nothing
        orientation = None
    if orientation in _SIDEWAYS:
        return width, height
    return height, width


def has_more_frames(picture: Image) -> bool:
    """Return whether an opened file is an animation, or has several pages."""
    if picture.format in _WITH_EXTRAS:
        return False
    return bool(getattr(picture, "is_animated", False))


def broken_image(path: str, error: Exception) -> RunError:
    """Return the error to raise for an image file that cannot be read because of `error`."""
    return RunError(
        f"data: {path} cannot be read as an image ({one_line_reason(error)}); "
        "mend it, or remove it for a new run"
    )


@cache
def _decoded_formats() -> tuple[str, ...]:
    """Return the names of the formats that the installed Pillow decodes, in its own order."""
    from PIL import Image

    # Of a file that is large or odd, but read. Of one that is not read, an error says why.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_DECODED)


def _turn_upright(picture: Image) -> None:
    """Turn a loaded image as EXIF's orientation says, in place."""
    from PIL import ImageOps

    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # damaged EXIF, which other programs ignore too
        return


def _scale_16_bits(picture: Image) -> Image:
    """Return a loaded gray image with 16 bits as RGB with 8 bits: its values divided by 257."""
    from PIL import Image

    # A TIFF may have 12 bits, and black for the largest value.
    tags = getattr(picture, "tag_v2", {})
    largest = (1 << tags.get(_TIFF_BITS, (16,))[0]) - 1
    values = np.asarray(picture).astype(np.int64)
    pixels = ((values * 255 + largest // 2) // largest).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        pixels = 255 - pixels

    # One value may be transparent.
    transparent = picture.info.get("transparency")
    if transparent is not None:
        pixels[values == transparent] = 255
    return Image.fromarray(pixels).convert("RGB")


def _is_transparent(picture: Image) -> bool:
    if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
        return True
    palette = picture.palette
    return picture.mode == "P" and palette is not None and palette.mode.endswith("A")


def _lay_on_white(picture: Image) -> Image:
    from PIL import Image

    if picture.mode == "La":  # which Pillow converts in two steps only
        picture = picture.convert("LA")
    front = picture.convert("RGBA")
    white = Image.new("RGBA", front.size, "white")
    return Image.alpha_composite(white, front).convert("RGB")
