"""The image files below a folder that has one folder for each class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.data.folders.decode import image_suffixes
from localpipe.data.images import RawDataset, RawTest, expand_path, one_line_reason
from localpipe.errors import UserError, suggest

_MAC_ARCHIVE = "__MACOSX"  # unpacked beside what was archived; it holds no images
T = TypeVar("T", RawDataset, RawTest)
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
class FoundFiles(Generic[T]):
    """The image files of both splits, before any is read. `build` makes the data set of them.

    root: the folder that holds all of them, data.root. train: without files where the test images
    alone are wanted, and `build` makes a RawTest then.
    """

    root: Path
    train: ClassFolders
    test: ClassFolders
    build: Callable[[ClassFolders, ClassFolders], T]

    @property
    def total(self) -> int:
        """The number of files of both splits."""
        return len(self.train.paths) + len(self.test.paths)

    def name(self, path: str) -> str:
        """Return the path of a file below `root`: `train/dog/1.png`."""
        above = len(str(self.root / "x")) - 1  # letters; `root` may be "."
        return path[above:]

    def without(self, names: Collection[str]) -> FoundFiles[T]:
        """Return the files that have none of the `names`. Their order and classes stay."""
        left_out = frozenset(names)
        splits = []
        for folders in (self.train, self.test):
            is_kept = [self.name(path) not in left_out for path in folders.paths]
            paths = [path for path, kept in zip(folders.paths, is_kept, strict=True) if kept]
            splits.append(replace(folders, paths=paths, labels=folders.labels[is_kept]))
        return replace(self, train=splits[0], test=splits[1])


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


def holds_folders(root: str, part: str) -> bool:
    """Return whether root/part is a folder that has folders, as a part with classes has.

    Raises UserError if it cannot be read.
    """
    folder = expand_path(root) / part
    if not folder.is_dir():
        return False
    try:
        return bool(_Scan().list_folder(str(folder), ()).folders)
    except OSError as error:
        raise _cannot_read(folder, error) from None


def scan_classes(root: str, part: str, test: str | None) -> ClassFolders:
    """Return the image files of root/part, and those of root itself for the part "".

    test: the name of the test part, None if there is to be none. Classes are numbered by their
    sorted names, and files are sorted within them. Hidden files and folders are not data, nor are
    files whose suffix is no image's. A link to a folder that holds the link is not followed. Raises
    UserError if the folder is missing or cannot be read, has no class folders, or a class has no
    images.
    """
    folder = expand_path(root) / part
    scan = _Scan()
    try:
        if not folder.is_dir():
            raise UserError(_describe_missing(root, folder, test))
        top = scan.list_folder(str(folder), ())
        classes = sorted(top.folders)
        if not classes:
            raise UserError(_describe_empty(folder, part == test))
        scan.leave_out("outside the class folders", len(top.images))
        by_class = [scan.walk_class(os.path.join(folder, name)) for name in classes]
    except OSError as error:
        raise _cannot_read(folder, error) from None

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
        notes += (f"note: {folder} has no images of {_count_classes(lacking, names)}",)
    index = np.array([list(names).index(name) for name in found.classes], np.int64)
    return ClassFolders(found.paths, index[found.labels], list(names), notes)


def split_classes(
    found: ClassFolders, share: float, folder: str
) -> tuple[ClassFolders, ClassFolders]:
    """Return the training images and the test images, a `share` of every class, with a note.

    share: above 0 and below 1. A class with two images or more has at least one in each. A single
    image is for training. The choice depends on the class's name and its number of images alone,
    and both keep the order of the files. folder: what was scanned. Raises UserError if no class has
    two images.
    """
    is_test = np.zeros(len(found.paths), bool)
    lacking = []
    for label, name in enumerate(found.classes):
        rows = np.flatnonzero(found.labels == label)
        if len(rows) == 1:
            lacking.append(name)
        if len(rows) < 2:
            continue
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        order = seeds.permutation(0, len(rows), "test", name)
        is_test[rows[order[:count]]] = True
    if not is_test.any():
        raise UserError(
            f"data: data.test takes no image, because no class of {folder} has two; add images"
        )

    note = f"note: data.test: {is_test.sum()} of {len(is_test)} images are the test split"
    if lacking:
        note += f", none of {_count_classes(lacking, found.classes)}"
    train, test = _take_files(found, ~is_test), _take_files(found, is_test)
    return replace(train, notes=found.notes), replace(test, notes=(note,))


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
        # A link that leads nowhere is a broken image. Reading a pipe would never end, nor a device.
        if has_suffix and (entry.is_file() or not os.path.exists(entry.path)):
            return True
        self.leave_out(suffix or "without suffix")
        return False


def _leads_back(entry: os.DirEntry[str], above: Iterable[str]) -> bool:
    """Return whether a folder is a link to what holds one of the folders `above` it."""
    if not entry.is_symlink():
        return False
    target = os.path.realpath(entry.path)
    return any(os.path.join(path, "").startswith(os.path.join(target, "")) for path in above)


def _take_files(found: ClassFolders, is_taken: NDArray[np.bool_]) -> ClassFolders:
    """Return the files and labels where `is_taken` (N,) is true, of the same classes."""
    paths = [found.paths[row] for row in np.flatnonzero(is_taken)]
    return replace(found, paths=paths, labels=found.labels[is_taken])


def _cannot_read(folder: Path, error: OSError) -> UserError:
    return UserError(f"data: cannot read {folder} ({one_line_reason(error)})")


def _describe_missing(root: str, folder: Path, test: str | None) -> str:
    """Return the error for a part that is missing, with advice for what is there."""
    if test is None:
        return (
            f"data: {folder} is not a folder; expected one with a folder of images per class; "
            "set data.root to it"
        )
    top = expand_path(root)
    advice = "set data.root to the folder that holds both"
    if (top / "train").is_dir():
        advice = (
            "set data.test=0.2 to test on a share of every class, "
            f"or move some images of every class from train to {test}"
        )
    elif top.is_dir() and not (top / test).exists() and any(map(Path.is_dir, top.iterdir())):
        advice = (
            "set data.test=0.2 to test on a share of every class, or move "
            f"the class folders into train, and some images of every class into {test}"
        )
    return (
        f"data: {folder} is not a folder; expected {root}/train and {root}/{test} "
        f"with a folder of images per class; {advice}"
    )


def _describe_empty(folder: Path, is_test: bool) -> str:
    """Return the error for a part without class folders, as test images without labels are."""
    text = f"data: {folder} has no class folders; expected a folder of images per class"
    if is_test:
        text += "; set data.test=0.2 to test on a share of train"
    return text


def _count_classes(some: Sequence[str], names: Sequence[str]) -> str:
    """Return how many of all classes `some` are, and what the first of them are called."""
    listed = ", ".join(some[:_LISTED])
    if len(some) > _LISTED:
        listed += ", ..."
    return f"{len(some)} of {len(names)} classes ({listed})"


def _plural(files: int) -> str:
    if files == 1:
        return "1 file"
    return f"{files} files"
