"""The image files that a run reads: those that were found, without the broken ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from localpipe.config.keys import Data, Level
from localpipe.data.folders.class_folders import FoundFiles, T
from localpipe.data.folders.decode import find_rendering
from localpipe.data.verify.check import check_files
from localpipe.errors import UserError

BOTH, TEST = ("train", "test"), ("test",)  # the splits whose files are checked
_DECODED_FILES = 100_000  # at most, with data.verify=auto
_LISTED = 5  # files in an error or a note


def choose_files(
    found: FoundFiles[T], config: Data, splits: Collection[str], left_out: Sequence[str] | None
) -> tuple[T, tuple[str, ...]]:
    """Return the data set of the files that a run reads, and the names of those it leaves out.

    splits: those whose files are checked as data.verify says: BOTH, TEST or (). left_out: what a
    run has left out from its beginning, as names below data.root. None for a run that begins: then
    data.skip_broken leaves out what is broken. Raises UserError that lists the broken files, or
    where a class or the tests would have no image.
    """
    notes: tuple[str, ...] = ()
    if left_out:
        found = found.without(left_out)
        notes = (
            f"note: {_count(left_out)} left out, as when the run began: {_list_some(left_out)}",
        )
    broken, check_notes = _find_broken(found, config, splits)
    notes += check_notes
    if broken:
        checked = sum(len(getattr(found, split).paths) for split in splits)
        listed = list_problems(broken)
        start = f"{len(broken)} of {checked} image files cannot be read"
        if left_out is not None:
            raise UserError(
                f"data: {start}: {listed}; mend them, or remove them and go on without them by "
                "data.changed=accept"
            )
        if not config.skip_broken:
            raise UserError(
                f"data: {start}: {listed}; mend or remove them, or set data.skip_broken=true"
            )
        notes += (f"note: {start} and are left out: {listed}",)
        left_out = [found.name(path) for path in broken]
        found = _leave_out(found, broken, left_out)
    raw = found.build(found.train, found.test)
    return replace(raw, notes=raw.notes + notes), tuple(left_out or ())


def decide_level(total: int, config: Data) -> Level:
    """Return data.verify, or for `auto` what the number of all image files decides."""
    if config.verify != "auto":
        return config.verify
    if total <= _DECODED_FILES:
        return "full"
    return "headers"


def _find_broken(
    found: FoundFiles[T], config: Data, splits: Collection[str]
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Return why files cannot be read, by their paths, and notes on the files of `splits`."""
    paths: list[str] = []
    for split in splits:
        paths += getattr(found, split).paths
    return find_problems(paths, found.root, found.total, config)


def find_problems(
    paths: Sequence[str], root: Path, total: int, config: Data
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Return why files cannot be read, by their paths, and notes on them, as data.verify says.

    paths: below `root`, of the splits to check. total: the image files of all splits.
    """
    if config.verify == "none" or not paths:
        return {}, ()
    notes: tuple[str, ...] = ()
    level = decide_level(total, config)
    if config.verify == "auto" and level == "headers":
        notes = (
            f"note: data.verify: auto is headers, because {total:,} image files are more "
            f"than {_DECODED_FILES:,}: their pixels are not checked",
        )

    checked = check_files(
        paths,
        root,
        find_rendering(config),
        decodes=level == "full",
        are_all=len(paths) == total,
    )
    if checked.several:
        notes += (
            f"note: of {checked.several} of {len(paths)} image files, which are animations or have "
            "several pages, only the first image is used",
        )
    return {paths[row]: reason for row, reason in sorted(checked.problems.items())}, notes


def _leave_out(
    found: FoundFiles[T], broken: Mapping[str, str], names: Collection[str]
) -> FoundFiles[T]:
    """Return the files without the broken ones, which have `names`.

    Raises UserError if a class has no training image left, or if no test image is left.
    """
    kept = found.without(names)
    lost = sorted(set(found.train.labels.tolist()) - set(kept.train.labels.tolist()))
    if lost:
        row = int(np.flatnonzero(found.train.labels == lost[0])[0])
        path, name = found.train.paths[row], found.train.classes[lost[0]]
        raise UserError(
            f"data: no training image of class {name!r} can be read, as {path} ({broken[path]}); "
            "mend one, or remove the folders of the class"
        )
    if not kept.test.paths:
        path = found.test.paths[0]
        raise UserError(f"data: no test image can be read, as {path} ({broken[path]}); mend some")
    return kept


def _count(files: Sequence[str]) -> str:
    if len(files) == 1:
        return "1 image file is"
    return f"{len(files)} image files are"


def list_problems(problems: Mapping[str, str]) -> str:
    """Return the first files with their reasons, and how many more there are."""
    return _list_some([f"{path} ({reason})" for path, reason in problems.items()])


def _list_some(files: Sequence[str]) -> str:
    """Return the first files, and how many more there are."""
    listed = ", ".join(files[:_LISTED])
    if len(files) > _LISTED:
        listed += f" and {len(files) - _LISTED} more"
    return listed
