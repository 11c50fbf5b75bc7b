"""One image file as a person sees it: upright, with 8 bits a channel, on a background."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from localpipe.config.keys import Data
from localpipe.data.deep_values import (
    Range,
    check_depth,
    check_values,
    find_stretch,
    is_deep,
    scale_values,
)
from localpipe.data.images import one_line_reason
from localpipe.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow recognises these, but leaves their pixels to other programs. EPS would start Ghostscript.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
# Further images of these formats are previews or layers, and not frames or pages.
_WITH_EXTRAS = ("MPO", "PSD")
_ORIENTATION = 0x0112  # in EXIF
_SIDEWAYS = (5, 6, 7, 8)  # the orientations that exchange height and width

Colour = tuple[int, int, int]  # RGB of 0..255


@dataclass(frozen=True)
class Rendering:
    """How stored values become colours, as data.range and data.background say.

    value_range: the values of black and white in files of more than 8 bits. background: what is
    below transparent pixels.
    """

    value_range: Range | None = None
    background: Colour = (255, 255, 255)


DEFAULT_RENDERING = Rendering()


def find_rendering(config: Data) -> Rendering:
    """Return the rendering that the keys of a data set ask for. They are checked already."""
    from PIL import ImageColor

    colour = config.background
    if isinstance(colour, str):
        red, green, blue = ImageColor.getrgb(colour)[:3]
        colour = (red, green, blue)
    return Rendering(config.range, colour)


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


def to_rgb(picture: Image, rendering: Rendering = DEFAULT_RENDERING) -> Image:
    """Return what a person sees of an opened file, as a new RGB image of 8 bits a channel.

    16-bit values are divided by 257, or scaled by the range of `rendering` like any of more than 8
    bits. EXIF's orientation is applied, and transparency is laid on the background. Of an animation
    it is the first frame. The opened file may be changed.

    Raises ValueError as `load_pixels`, and errors of any class for a damaged file.
    """
    stretch = find_stretch(picture, rendering.value_range)
    load_pixels(picture, rendering)
    _turn_upright(picture)
    if is_deep(picture):
        return _render_deep(picture, rendering, stretch)
    if _is_transparent(picture):
        return _lay_on(picture, rendering.background)
    return picture.convert("RGB")


def check_mode(picture: Image, rendering: Rendering = DEFAULT_RENDERING) -> None:
    """Raise ValueError with the way out for pixels of which nobody knows how they look.

    The header of an opened file is enough, and it must not be loaded yet.
    """
    check_depth(picture, rendering.value_range)
    if picture.mode == "LAB":
        raise ValueError("it has Lab colours, which Pillow does not convert: save it as RGB")


def load_pixels(picture: Image, rendering: Rendering) -> None:
    """Decode an opened file. Raises ValueError as `check_mode`, and for values that are NaN.

    Raises errors of any class for a damaged file.
    """
    check_mode(picture, rendering)
    picture.load()
    check_values(picture)


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


def _render_deep(picture: Image, rendering: Rendering, stretch: float) -> Image:
    """Return a loaded gray image of more than 8 bits as RGB."""
    from PIL import Image

    pixels = scale_values(picture, rendering.value_range, stretch)
    image = Image.fromarray(pixels).convert("RGB")
    # One value may be transparent.
    transparent = picture.info.get("transparency")
    if transparent is not None:
        image.paste(rendering.background, mask=Image.fromarray(np.asarray(picture) == transparent))
    return image


def _is_transparent(picture: Image) -> bool:
    if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
        return True
    palette = picture.palette
    return picture.mode == "P" and palette is not None and palette.mode.endswith("A")


def _lay_on(picture: Image, background: Colour) -> Image:
    from PIL import Image

    if picture.mode == "La":  # which Pillow converts in two steps only
        picture = picture.convert("LA")
    front = picture.convert("RGBA")
    back = Image.new("RGBA", front.size, (*background, 255))
    return Image.alpha_composite(back, front).convert("RGB")
