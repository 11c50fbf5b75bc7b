"""What tells a data set apart: its digest, and for image files the list that is hashed."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from localpipe.data.folders.image_folder import DECODERS, FileImages
from localpipe.data.images import ArrayImages, RawDataset, expand_path

# The version of the digest, and of how the pixels of image files are read. Version 1 hashed the
# labels of image files alone. It laid no transparency on white, turned no image, and clipped
# 16-bit values.
RULES = 2
_HASHED_IMAGES = 16  # of each split, enough to distinguish data sets
_HEAD = "# class: name, or file: bytes and path below data.root\n"
_CLASS = "class"
_CHUNK = 4096  # files that one thread looks at in one go
_NO_SIZE = -1  # of a file that cannot be looked at, as a link that leads nowhere
_NAMED = 3  # files in a message


@dataclass(frozen=True)
class Identity:
    """What tells a data set apart. It is found when it is first asked for.

    raw: the complete data set, with labels as data.classes says. root: data.root.
    """

    raw: RawDataset
    root: str

    @cached_property
    def listing(self) -> str | None:
        """The list of class names and image files, None for images in memory.

        It is ASCII and the same on every machine: a line `class NAME` for each class in order, then
        a line `BYTES PATH` for each file in the order of reading, with tabs between.
        """
        paths: list[str] = []
        for split in (self.raw.train, self.raw.test):
            if not isinstance(split.images, FileImages):
                return None
            paths += split.images.paths
        lines = [f"{_CLASS}\t{_escape(name)}\n" for name in self.raw.classes or ()]
        # The paths begin like any other path below data.root.
        start = len(str(expand_path(self.root) / "_")) - 1
        for path, size in zip(paths, _read_sizes(paths), strict=True):
            lines.append(f"{size}\t{_escape(path[start:])}\n")
        return _HEAD + "".join(lines)

    @cached_property
    def sha256(self) -> str:
        """The digest in hexadecimal, the same on every machine.

        Of image files it is that of `listing`. Else it covers all labels, some images, and class
        names that the user gave with the arrays.
        """
        if self.listing is not None:
            return hash_listing(self.listing)
        digest = hashlib.sha256()
        for split in (self.raw.train, self.raw.test):
            digest.update(split.labels.astype("<i8").tobytes())
            if isinstance(split.images, ArrayImages):
                first = np.arange(min(_HASHED_IMAGES, len(split.images)))
                digest.update(split.images.read(first).tobytes())
        # Published names stay out, so that the digests of earlier versions count.
        if self.raw.has_own_names:
            for name in self.raw.classes or ():
                digest.update(f"{_CLASS}\t{_escape(name)}\n".encode())
        return digest.hexdigest()


def hash_listing(listing: str) -> str:
    """Return the digest of a data set of image files, from its `Identity.listing`."""
    return hashlib.sha256(listing.encode()).hexdigest()


def describe_files(before: str, now: str) -> str:
    """Return how one `Identity.listing` differs from another, in its files.

    It is one line without a full stop, as `1 file is gone (train/cat/1.png)`, and "" where all
    files are the same. Raises ValueError for a text that is no listing.
    """
    old_sizes, new_sizes = _parse_sizes(before), _parse_sizes(now)
    gone = [path for path in old_sizes if path not in new_sizes]
    new = [path for path in new_sizes if path not in old_sizes]
    kept = [path for path in old_sizes if path in new_sizes]
    resized = [path for path in kept if old_sizes[path] != new_sizes[path]]
    parts = []
    for paths, what in ((gone, "gone"), (new, "new"), (resized, "of another size")):
        if paths:
            files = "1 file is" if len(paths) == 1 else f"{len(paths)} files are"
            parts.append(f"{files} {what} ({list_some(paths)})")
    return ", ".join(parts)


def describe_classes(before: tuple[str, ...], now: tuple[str, ...] | None) -> str:
    """Return how class names differ, in one line without a full stop, "" where they do not."""
    if now is None:
        return f"its {len(before)} classes have no names any more ({list_some(before)})"
    parts = []
    gone = [name for name in before if name not in now]
    new = [name for name in now if name not in before]
    for names, what in ((gone, "gone"), (new, "new")):
        if names:
            classes = "1 class is" if len(names) == 1 else f"{len(names)} classes are"
            parts.append(f"{classes} {what} ({list_some(names)})")
    if not parts and before != now:
        parts.append(f"its classes are in another order ({list_some(now)})")
    return ", ".join(parts)


def list_some(names: Sequence[str]) -> str:
    """Return the first few names in one line, in a form that can be printed."""
    listed = ", ".join(name if name.isprintable() else _escape(name) for name in names[:_NAMED])
    if len(names) > _NAMED:
        listed += ", ..."
    return listed


def _read_sizes(paths: Sequence[str]) -> list[int]:
    """Return the sizes of files in bytes. Many threads ask, because a network's disk is slow."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(DECODERS, "sizes") as pool:
        sizes = list(pool.map(_read_chunk, chunks))
    return [size for chunk in sizes for size in chunk]


def _read_chunk(paths: Sequence[str]) -> list[int]:
    sizes = []
    for path in paths:
        try:
            sizes.append(os.stat(path).st_size)
        except OSError:  # it is reported when it is opened
            sizes.append(_NO_SIZE)
    return sizes


def _parse_sizes(listing: str) -> dict[str, int]:
    """Return the size of every file by its path, in their order."""
    sizes: dict[str, int] = {}
    for line in listing.splitlines():
        kind, _, name = line.partition("\t")
        if not line.startswith("#") and kind != _CLASS:
            sizes[codecs.decode(name, "unicode_escape")] = int(kind)
    return sizes


def _escape(name: str) -> str:
    """Return a name in ASCII, without tabs and line breaks. Names that are no UTF-8 are kept."""
    return name.encode("unicode_escape").decode("ascii")
