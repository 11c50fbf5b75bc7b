"""Reads the files of scenes before a run, to find those that cannot be used."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from localpipe.config.keys import Data
from localpipe.data.folders.image_folder import DECODERS
from localpipe.data.scenes.scene_loader import SceneFiles, check_scene
from localpipe.data.verify.choice import find_problems, list_problems
from localpipe.errors import RunError, UserError


def check_scenes(
    config: Data, root: Path, scenes: Mapping[str, SceneFiles], splits: Collection[str]
) -> tuple[str, ...]:
    """Read the images and masks of some splits, as data.verify says, and return notes.

    scenes: of the splits train and test. Good files are remembered, as those of other folders.
    Raises UserError that lists the files that cannot be read, or says which mask or image does not
    fit.
    """
    paths: list[str] = []
    for split in splits:
        paths += [*scenes[split].images, *scenes[split].masks]
    total = sum(2 * len(files.images) for files in scenes.values())
    problems, notes = find_problems(paths, root, total, config)
    if problems:
        raise UserError(
            f"data: {len(problems)} of {len(paths)} files of {config.name} cannot be read: "
            f"{list_problems(problems)}; unpack their archives again"
        )
    if config.verify != "none":
        for split in splits:
            is_whole = split == "test" or bool(config.validation)
            _check_pairs(scenes[split], is_whole)
    return notes


def _check_pairs(files: SceneFiles, is_whole: bool) -> None:
    """Raise UserError for the first image that its mask or the evaluation does not fit.

    is_whole: an evaluation sees images of this split.
    """
    size: Sequence[int] | None = files.size if is_whole else None
    try:
        # Headers are enough, and threads wait for a slow disk together.
        with ThreadPoolExecutor(DECODERS, "scenes") as pool:
            for _ in pool.map(partial(check_scene, size=size), files.images, files.masks):
                pass
    except RunError as error:
        raise UserError(str(error)) from None
