"""The image files below a folder that has one folder for each class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localpipe.data.decode import image_suffixes
from localpipe.data.images import expand_path, one_line_reason
from localpipe.errors import UserError, suggest
from localpipe.output import one_line

_MAC_ARCHIVE = "__MACOSX"  # unpacked beside what was archived; it holds no images
_LISTED = 5  # kinds of files that are left out, in a note


@dataclass(frozen=True)
class ClassFolders:
    """The image files in a folder of class folders, and the class of each, labels: (N,).

    notes: lines for the user, on files that are left out.
    """

    paths: list[str]
    labels: NDArray[np.int64]
    classes: list[str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """The names of the folders and of the image files in a folder, in any order."""

    folders: list[str]
    images: list[str]


def find_part(root: str, names: Sequence[str]) -> str:
    """Return the first of `names` that is a folder in data.root, else the first name."""
    for name in names:
        if (expand_path(root) / name).is_dir():
            return name
    return names[0]


def scan_classes(root: str, part: str, test: str) -> ClassFolders:
    """Return the image files of root/part; `test` is the name of the test part.

    Classes are numbered by their sorted names, and files are sorted within them. Hidden files and
    folders are not data, nor are files whose suffix is no image's. A link to a folder that holds
    the link is not followed. Raises UserError if the folder is missing or cannot be read, has no
    class folders, or a class has no images.
    """
    folder = expand_path(root) / part
    scan = _Scan()
    try:
        if not folder.is_dir():
            raise UserError(_describe_missing(root, folder, test))
        top = scan.list_folder(str(folder), ())
        classes = sorted(top.folders)
        if not classes:
            raise UserError(
                f"data: {folder} has no class folders; expected a folder of images per class"
            )
        scan.leave_out("outside the class folders", len(top.images))
        by_class = [scan.walk_class(os.path.join(folder, name)) for name in classes]
    except OSError as error:
        raise UserError(f"data: cannot read {folder} ({one_line_reason(error)})") from None

    # A class without images would be a class that no test can measure.
    for name, paths in zip(classes, by_class, strict=True):
        if not paths:
            raise UserError(f"data: {folder / name} has no images; fill or remove it")
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in by_class])
    paths = [path for paths in by_class for path in paths]
    return ClassFolders(paths, labels.astype(np.int64), classes, scan.describe(folder))


def list_folder(folder: Path) -> tuple[Listing, tuple[str, ...]]:
    """Return what lies directly in a folder, and a note on the files that are no images.

    Hidden files and folders are left out. Raises UserError if the folder cannot be read.
    """
    scan = _Scan()
    try:
        listing = scan.list_folder(str(folder), ())
    except OSError as error:
        raise UserError(f"data: cannot read {folder} ({one_line_reason(error)})") from None
    return listing, scan.describe(folder)


def number_classes(found: ClassFolders, names: Sequence[str], folder: str) -> ClassFolders:
    """Return class folders whose labels are positions in `names`, with a note on names it lacks.

    folder: what was scanned. Raises UserError for a class folder that is not named.
    """
    unknown = sorted(set(found.classes) - set(names))
    if unknown:
        raise UserError(
            f"data: {folder} has a class {unknown[0]!r}, which is not one of the "
            f"{len(names)} that are trained; {suggest(unknown[0], names)}"
        )
    notes = found.notes
    lacking = [name for name in names if name not in set(found.classes)]
    if lacking:
        listed = one_line(", ".join(lacking[:_LISTED]))
        if len(lacking) > _LISTED:
            listed += ", ..."
        count = f"{len(lacking)} of {len(names)} classes"
        notes += (f"note: {folder} has no images of {count} ({listed})",)
    index = np.array([list(names).index(name) for name in found.classes], np.int64)
    return ClassFolders(found.paths, index[found.labels], list(names), notes)


class _Scan:
    """Lists folders, and counts the files that it leaves out, by what they are."""

    def __init__(self) -> None:
        self._left_out: Counter[str] = Counter()

    def walk_class(self, folder: str) -> list[str]:
        """Return the image files at any depth below the folder of a class."""
        parent = os.path.realpath(os.path.dirname(folder))
        listed: dict[str, list[str]] = {}
        self._walk(folder, (parent,), listed)
        # The order is torchvision's: folders by their whole paths, then files by name.
        return [
            os.path.join(path, name) for path in sorted(listed) for name in sorted(listed[path])
        ]

    def list_folder(self, folder: str, above: tuple[str, ...]) -> Listing:
        """List one folder. above: the real paths of the folders that led to it.

        Raises OSError if it cannot be read.
        """
        folders, images = [], []
        above = (*above, os.path.realpath(folder))
        with os.scandir(folder) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".")
                if entry.is_dir():
                    is_data = not hidden and entry.name != _MAC_ARCHIVE
                    if is_data and not _leads_back(entry, above):
                        folders.append(entry.name)
                elif self._is_image(entry, hidden):
                    images.append(entry.name)
        return Listing(folders, images)

    def leave_out(self, what: str, files: int = 1) -> None:
        """Count files as left out; `what` is a suffix, or says why."""
        if files:
            self._left_out[what] += files

    def describe(self, folder: Path) -> tuple[str, ...]:
        """Return a note on what was left out, or nothing."""
        if not self._left_out:
            return ()
        counts = sorted(self._left_out.items(), key=lambda item: (-item[1], item[0]))
        listed = ", ".join(f"{count} {name}" for name, count in counts[:_LISTED])
        if len(counts) > _LISTED:
            listed += ", ..."
        files = self._left_out.total()
        return (f"note: {folder}: left out as no images of a class: {_plural(files)} ({listed})",)

    def _walk(self, folder: str, above: tuple[str, ...], listed: dict[str, list[str]]) -> None:
        """Add the image files of a folder, and of every folder below, to `listed`."""
        listing = self.list_folder(folder, above)
        listed[folder] = listing.images
        above = (*above, os.path.realpath(folder))
        for name in listing.folders:
            self._walk(os.path.join(folder, name), above, listed)

    def _is_image(self, entry: os.DirEntry[str], hidden: bool) -> bool:
        """Return whether a file is to be read as an image; count it if it is left out."""
        suffix = os.path.splitext(entry.name)[1].lower()
        has_suffix = suffix in image_suffixes()
        # A hidden file is the system's, or a copy of another; only images among them are told of.
        if hidden:
            self.leave_out("hidden", int(has_suffix))
            return False
        # A link that leads nowhere is a broken image; reading a pipe would never end.
        if has_suffix and (entry.is_file() or entry.is_symlink()):
            return True
        self.leave_out(suffix or "without suffix")
        return False


def _leads_back(entry: os.DirEntry[str], above: Iterable[str]) -> bool:
    """Return whether a folder is a link to what holds one of the folders `above` it."""
    if not entry.is_symlink():
        return False
    target = os.path.realpath(entry.path)
    return any(os.path.join(path, "").startswith(os.path.join(target, "")) for path in above)


def _describe_missing(root: str, folder: Path, test: str) -> str:
    """Return the error for a part that is missing, with advice for what is there."""
    top = expand_path(root)
    advice = "set data.root to the folder that holds both"
    if (top / "train").is_dir():
        advice = f"move some images of every class from train to {test}"
    elif top.is_dir() and not (top / test).exists() and any(map(Path.is_dir, top.iterdir())):
        advice = f"move the class folders into train, and some images of every class into {test}"
    return (
        f"data: {folder} is not a folder; expected {root}/train and {root}/{test} "
        f"with a folder of images per class; {advice}"
    )


def _plural(files: int) -> str:
    if files == 1:
        return "1 file"
    return f"{files} files"
