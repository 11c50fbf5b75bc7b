"""Cityscapes (Cordts et al. 2016), listed by torchvision: images of streets with 19 classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from localpipe.config.augmentation import fill_auto
from localpipe.config.keys import Data
from localpipe.data.images import (
    RawSamples,
    configured_size,
    expand_path,
    one_line_reason,
    refuse_npz,
    refuse_test_share,
)
from localpipe.data.normalisation import check_values
from localpipe.data.samples import InputFacts
from localpipe.data.scenes.scene_check import check_scenes
from localpipe.data.scenes.scene_loader import SceneFiles, SceneLoader, all_scenes
from localpipe.data.scenes.view import IGNORED, ViewRecipe
from localpipe.errors import UserError
from localpipe.fields import Field

AUGMENT = "scale_crop_flip"
CROP = (512, 1024)  # height and width, in the reference's main rows
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_IMAGE_END = "_leftImg8bit.png"


def load_cityscapes(config: Data) -> RawSamples:
    """Return the scenes of Cityscapes' splits train and val in data.root, as its archives lie.

    Masks are those of labelIds, with the 19 classes that are evaluated, and 255 elsewhere. Training
    sees crops of data.image_size (512 x 1024), by default after a random scale and flip. An
    evaluation sees whole images. Nothing is downloaded. Raises UserError for a tree that is not
    complete, and for keys that do not fit.
    """
    refuse_npz(config)
    refuse_test_share(config)
    root = expand_path(config.root)
    _check_tree(root, config.root)
    labels, classes = _find_labels()
    pairs = {split: _list_scenes(root, split) for split in ("train", "val")}
    whole = _find_size(config, pairs["val"][0][0])
    scenes = {}
    for split, folder in (("train", "train"), ("test", "val")):
        images, masks = zip(*pairs[folder], strict=True)
        scenes[split] = SceneFiles(images, masks, whole, labels)
    size = configured_size(config) or CROP
    return RawSamples(
        all_scenes(scenes["train"]),
        all_scenes(scenes["test"]),
        num_classes=len(classes),
        inputs=InputFacts(
            sample=(3, *size),
            dtype=None,
            task="segmentation",
            digest=_hash_files(root, pairs["train"] + pairs["val"]),
            loader=_build_loader(config, size),
            target=Field("target", size, "uint8"),
            evaluation_sample=None if whole == size else (3, *whole),
            ignored=IGNORED,
        ),
        classes=classes,
        mean=_MEAN,
        std=_STD,
        augment=AUGMENT,
        check=partial(check_scenes, config, root, scenes),
    )


def _build_loader(config: Data, size: tuple[int, int]) -> SceneLoader:
    """Return the loader of views. What lies beyond an image has the mean colour."""
    mean = _MEAN
    if config.mean != "auto":
        red, green, blue = check_values("mean", config.mean, config, 3)
        mean = (red, green, blue)
    red, green, blue = (min(255, max(0, round(255 * value))) for value in mean)
    is_random = fill_auto(config.augment, AUGMENT) == AUGMENT
    processes = 1 if config.workers == "auto" else config.workers
    return SceneLoader(ViewRecipe(size, is_random, (red, green, blue)), processes, config.timeout_s)


def _check_tree(root: Path, given: str) -> None:
    """Raise UserError for the first folder that is missing."""
    for kind in ("leftImg8bit", "gtFine"):
        for split in ("train", "val"):
            if not (root / kind / split).is_dir():
                raise UserError(
                    f"data: cityscapes is not in {given}: {kind}/{split} is missing; expected the "
                    "folders leftImg8bit and gtFine with train and val; register at "
                    "cityscapes-dataset.com, unpack leftImg8bit_trainvaltest.zip and "
                    "gtFine_trainvaltest.zip in one folder, and set data.root to it"
                )


def _list_scenes(root: Path, split: str) -> list[tuple[str, str]]:
    """Return the paths of every image of a split and of its mask, in the order of the images."""
    from torchvision.datasets import Cityscapes

    try:
        # torchvision lists them in the order of the file system.
        listed = Cityscapes(root, split=split, target_type="semantic")
    except OSError as error:
        raise UserError(
            f"data: cannot list the images of cityscapes in {root}: {one_line_reason(error)}; "
            "expected a folder a city in leftImg8bit and in gtFine; unpack its archives again"
        ) from None
    pairs = []
    for image, (mask, *_) in zip(listed.images, listed.targets, strict=True):
        if image.endswith(_IMAGE_END):
            pairs.append((image, mask))
    pairs.sort()
    if not pairs:
        raise UserError(
            f"data: cityscapes in {root} has no image CITY/*{_IMAGE_END} in leftImg8bit/{split}; "
            "unpack leftImg8bit_trainvaltest.zip again"
        )
    for image, mask in pairs:
        if not os.path.exists(mask):
            raise UserError(
                f"data: {image} has no mask: {mask} is missing; unpack gtFine_trainvaltest.zip "
                "again"
            )
    return pairs


def _find_labels() -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the class of every labelId, and the names of the classes."""
    from torchvision.datasets import Cityscapes

    labels = [IGNORED] * 256
    names = {}
    for label in Cityscapes.classes:
        if not label.ignore_in_eval and 0 <= label.train_id < IGNORED:
            labels[label.id] = label.train_id
            names[label.train_id] = label.name
    return tuple(labels), tuple(names[index] for index in sorted(names))


def _find_size(config: Data, path: str) -> tuple[int, int]:
    """Return (H, W) of whole images, from the header of one."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception as error:  # Pillow's decoders raise errors of many classes
        raise UserError(
            f"data: cannot read {path}: {one_line_reason(error)}; unpack its archive again"
        ) from None
    if config.evaluation_size not in ("auto", None, (height, width)):
        raise UserError(
            f"data: data.evaluation_size is {config.evaluation_size}, but the images of "
            f"{config.name} are {height} x {width}; set it to auto"
        )
    return height, width


def _hash_files(root: Path, pairs: Sequence[tuple[str, str]]) -> str:
    """Return the SHA-256 of the paths below the root and the sizes of all files."""
    digest = hashlib.sha256()
    for path in (path for pair in pairs for path in pair):
        digest.update(f"{os.path.relpath(path, root)}\t{os.path.getsize(path)}\n".encode())
    return digest.hexdigest()
