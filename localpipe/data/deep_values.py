"""Gray images of more than 8 bits: which of them can be read, and their 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Range = tuple[float, float]  # the values of black and of white, the lower one first

# Formats of at most 16 bits for which some versions of Pillow use the mode of 32-bit integers.
_AT_MOST_16_BITS = ("PNG", "PPM")
_SIGNED = "FITS"  # whose 16 bits Pillow reads as unsigned
_J2K_SIZE_MARKER = b"\xff\x4f\xff\x51"  # of the codestream of JPEG 2000
_J2K_BITS_OFFSET = 42  # of the bits a channel, less 1, from the marker
_J2K_HEADER = 2**16  # bytes of a file that hold the marker
_UINT16_MAX = 65535
# Tags of TIFF, and values of them.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO = 0
_UNSIGNED = 1
_UNKNOWN_RANGE = (
    "whose black and white are not known: give their values, as in data.range=[0,1], "
    "or save it with 8 or 16 bits a channel"
)


def is_deep(picture: Image) -> bool:
    """Return whether an opened file has gray values of more than 8 bits."""
    return picture.mode == "F" or picture.mode.startswith("I")


def check_depth(picture: Image, value_range: Range | None) -> None:
    """Raise ValueError with the way out for an opened file whose values cannot become 8 bits.

    These are floats, 32-bit and signed integers without `value_range`, and with it colours of more
    than 8 bits, of which Pillow keeps 8. The file must not be loaded yet.
    """
    if value_range is not None:
        if not is_deep(picture) and _has_deep_colours(picture):
            raise ValueError(
                "it has colours of 16 bits, of which 8 can be read, so data.range does not scale "
                "them: save it with 8 bits a channel, or in gray"
            )
        return
    if picture.mode == "F":
        raise ValueError(f"it holds 32-bit floats, {_UNKNOWN_RANGE}")
    is_wide = picture.mode == "I" and picture.format not in _AT_MOST_16_BITS
    if is_wide or (is_deep(picture) and picture.format == _SIGNED):
        raise ValueError(f"it holds 32-bit or signed integers, {_UNKNOWN_RANGE}")


def find_stretch(picture: Image, value_range: Range | None) -> float:
    """Return the factor by which Pillow will multiply the gray values of an opened file.

    It makes 16 bits of the 9 to 15 that PGM and JPEG 2000 may have. The factor is 1 for other
    formats, and without `value_range`. The file must not be loaded yet.
    """
    if value_range is None or not is_deep(picture):
        return 1.0
    if picture.format == "PPM":
        return _UINT16_MAX / _find_pgm_maximum(picture)
    if picture.format == "JPEG2000":
        return float(2 ** max(0, 16 - _read_j2k_bits(picture)))
    return 1.0


def check_values(picture: Image) -> None:
    """Raise ValueError if a loaded file holds NaN, which is neither black nor white."""
    if picture.mode == "F" and np.isnan(np.asarray(picture)).any():
        raise ValueError("it holds NaN, which is no brightness")


def scale_values(picture: Image, value_range: Range | None, stretch: float) -> NDArray[np.uint8]:
    """Return the values of a loaded deep file as 8 bits, (H, W).

    value_range: what becomes 0 and 255. Values outside are clipped. None for an unsigned file of 16
    bits, whose values are divided by 257. stretch: the file's own, of `find_stretch`.
    """
    tags = getattr(picture, "tag_v2", {})
    values = _as_stored(picture, tags)
    levels: NDArray[Any]
    if value_range is None:
        # A TIFF may have 12 bits.
        largest = (1 << tags.get(_BITS, (16,))[0]) - 1
        whole = values.astype(np.int64)
        levels = (whole * 255 + largest // 2) // largest
    else:
        low, high = value_range
        exact = values.astype(np.float64)
        if stretch != 1:
            exact = np.rint(exact / stretch)
        levels = np.clip(np.rint((exact - low) / (high - low) * 255), 0, 255)

    # A TIFF may have black for the largest value.
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 255 - levels
    return levels.astype(np.uint8)


def _as_stored(picture: Image, tags: Any) -> NDArray[Any]:
    """Return the values of a loaded file with the sign that they have in the file."""
    values = np.asarray(picture)
    if picture.format == _SIGNED and values.dtype.kind == "u":
        return values.astype(np.int16)
    is_unsigned = picture.format == "TIFF" and tags.get(_SAMPLE_FORMAT, (1,))[0] == _UNSIGNED
    if is_unsigned and values.dtype == np.int32:
        return values.view(np.uint32)
    return values


def _has_deep_colours(picture: Image) -> bool:
    """Return whether an opened file, not loaded yet, has several channels of more than 8 bits."""
    if picture.format == "PPM":
        return _find_pgm_maximum(picture) > 255
    if picture.format == "JPEG2000":
        return _read_j2k_bits(picture) > 8
    return any(";16" in str(tile[3]) for tile in _list_tiles(picture))


def _find_pgm_maximum(picture: Image) -> int:
    """Return the largest value that an opened PGM or PPM file may have, as its header says."""
    decoder, _, _, arguments = _list_tiles(picture)[0]
    if decoder.startswith("ppm") and isinstance(arguments, tuple):
        return int(arguments[-1])
    return _UINT16_MAX if is_deep(picture) else 255


def _list_tiles(picture: Image) -> list[Any]:
    """Return Pillow's plan of decoding: (decoder, extents, offset, arguments) of every tile."""
    tiles: list[Any] = getattr(picture, "tile", [])
    return tiles


def _read_j2k_bits(picture: Image) -> int:
    """Return the bits a channel of an opened JPEG 2000 file."""
    file = getattr(picture, "fp")  # noqa: B009  (the type of an opened file has it)
    file.seek(0)
    header = file.read(_J2K_HEADER)
    start = header.index(_J2K_SIZE_MARKER)
    return int(header[start + _J2K_BITS_OFFSET] & 0x7F) + 1
