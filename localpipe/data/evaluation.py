"""The images of an evaluation: the test images of a run's own data set, or of other data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localpipe.config import registry
from localpipe.config.keys import Data
from localpipe.data.dataset import Dataset, resolve_raw, resolve_samples
from localpipe.data.folders.class_folders import FoundFiles
from localpipe.data.folders.image_folder import FileImages
from localpipe.data.images import RawDataset, RawSamples, RawTest, Split, expand_path
from localpipe.data.verify.choice import TEST, choose_files
from localpipe.errors import RunError, UserError


@dataclass(frozen=True)
class EvaluationData:
    """The test images of a data set, and how they are named.

    dataset: without training images. Without labels every label of it is 0. files: the paths of the
    images from data.root, in their order, or None for images that are no files.
    """

    dataset: Dataset
    has_labels: bool
    files: tuple[str, ...] | None


def load_evaluation(
    config: Data, num_classes: int, left_out: Sequence[str] | None = None
) -> EvaluationData:
    """Read the test images of a data set. No training image is looked at where that is possible.

    config: of a run, or of other data. Where both have names, data.classes gives every class its
    label. Else the labels of the data are kept. num_classes: of the network. `auto` of mean and std
    that are not published is measured on the test images. The files of images are verified first.
    left_out: those that the run leaves out, as paths below data.root, None for other data.
    Raises UserError as `data.load` does, and for labels or names that the network does not have.
    """
    # The test images stand for the training images, from which a shape and moments are taken.
    config = config.model_copy(update={"train_subset": None, "validation": 0})
    try:
        found = _read(config, left_out)
        if isinstance(found, RawSamples):
            return _resolve_samples(config, found, num_classes)
        raw = _name_classes(config, found, num_classes)
        _check_channels(config, raw)
        empty = raw.split.take(np.empty(0, np.int64))
        dataset = resolve_raw(config, _as_dataset(raw, raw.split), seed=0)
    except RunError as error:  # a broken image is the user's to correct
        raise UserError(str(error)) from None
    except MemoryError:
        raise UserError(
            f"data: {config.name} does not fit into memory; take fewer or smaller images"
        ) from None
    _check_labels(dataset, num_classes)
    dataset = dataclasses.replace(dataset, train=empty, notes=raw.notes)
    return EvaluationData(dataset, raw.has_labels, _list_files(config, raw))


def _resolve_samples(config: Data, raw: RawSamples, num_classes: int) -> EvaluationData:
    """Return the test samples of a data set that has no images of bytes with a class."""
    dataset = resolve_samples(config, raw, seed=0)
    if dataset.test.labels is not None:
        _check_labels(dataset, num_classes)
    # A split that was held out is no test image.
    return EvaluationData(dataclasses.replace(dataset, validation=None), True, None)


def _read(config: Data, left_out: Sequence[str] | None) -> RawTest | RawSamples:
    """Return the test images: what reads them alone, else a part of all images.

    Samples that are no images are returned complete.
    """
    if config.name in registry.TEST_READERS:
        reader = registry.look_up(registry.TEST_READERS, config.name, "config: data.name")
        test: RawTest | FoundFiles[RawTest] = reader(config)
        if isinstance(test, FoundFiles):
            test, _ = choose_files(test, config, TEST, left_out)
        return test
    loader = registry.find_data_loader(config.name, "config: data.name")
    raw: RawDataset | RawSamples = loader(config)
    if isinstance(raw, RawSamples):
        if raw.check is not None:
            raw = dataclasses.replace(raw, notes=raw.notes + raw.check(TEST))
        return raw
    return RawTest(raw.test, raw.num_classes, raw.recipe, raw.notes, raw.classes)


def _as_dataset(raw: RawTest, train: Split) -> RawDataset:
    return RawDataset(train, raw.split, raw.num_classes, raw.recipe, (), raw.classes)


def _name_classes(config: Data, raw: RawTest, num_classes: int) -> RawTest:
    """Return the test images with names of their labels where the run or the data have some.

    A note says where classes are matched by their positions.
    """
    names = config.classes
    if not raw.has_labels:
        note = f"note: the images of {config.root} have no labels, so there is no accuracy"
        named = names if isinstance(names, tuple) else None
        return dataclasses.replace(raw, classes=named, notes=(*raw.notes, note))
    if isinstance(names, tuple) and raw.classes is None:
        note = f"note: {config.name} has no names of classes; its labels are taken by position"
        return dataclasses.replace(raw, classes=names, notes=(*raw.notes, note))
    if isinstance(names, tuple) or raw.classes is None:
        return raw

    # A run of an older version, or one on data without names.
    if len(raw.classes) != num_classes:
        raise UserError(
            f"data: {config.root} has {len(raw.classes)} classes, but the run has {num_classes} "
            "and recorded no names, so they cannot be matched; name all of the run's classes "
            "in their order with data.classes=[NAME, NAME, ...]"
        )
    note = (
        f"note: the run recorded no names of classes; those of {config.root} are taken by position"
    )
    return dataclasses.replace(raw, notes=(*raw.notes, note))


def _check_channels(config: Data, raw: RawTest) -> None:
    """Raise UserError for images of another number of channels than the network takes."""
    channels = raw.split.images.shape[2]
    if isinstance(config.mean, tuple) and len(config.mean) != channels:
        raise UserError(
            f"data: the images of {config.name} have {channels} channels, but the run was trained "
            f"on images of {len(config.mean)}; give images with as many"
        )


def _check_labels(dataset: Dataset, num_classes: int) -> None:
    """Raise UserError for a label without an output."""
    labels = dataset.test.labels
    assert labels is not None, "images have a class each"
    largest = int(labels.max())
    if largest >= num_classes:
        raise UserError(
            f"data: {dataset.name}: the largest label of the test images is {largest}, but the run "
            f"has {num_classes} classes; give images of the run's classes"
        )


def _list_files(config: Data, raw: RawTest) -> tuple[str, ...] | None:
    """Return the paths of image files from data.root, or None for images in memory."""
    if not isinstance(raw.split.images, FileImages):
        return None
    root = expand_path(config.root)
    return tuple(os.path.relpath(path, root) for path in raw.split.images.paths)
