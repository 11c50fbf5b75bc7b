"""A data set as configured: read, split, with its normalisation and the order of an epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.config import registry
from localpipe.config.augmentation import MASKED, Augment, fill_auto, list_words
from localpipe.config.keys import Data, Level, TaskKeys
from localpipe.config.resolve import DataFacts
from localpipe.config.user_code import is_user_code
from localpipe.data.augment import ImageRecipe
from localpipe.data.folders.class_folders import FoundFiles
from localpipe.data.folders.file_loader import FileLoader, find_loader
from localpipe.data.folders.image_folder import FileImages
from localpipe.data.identity import Identity
from localpipe.data.images import (
    Images,
    ImageSubset,
    RawDataset,
    RawSamples,
    Recipe,
    Split,
    configured_size,
)
from localpipe.data.normalisation import Values, check_values, find_moments
from localpipe.data.samples import FixedIdentity, InputFacts, Samples
from localpipe.data.verify.choice import BOTH, choose_files, decide_level
from localpipe.data.verify.histogram import count_values
from localpipe.errors import RunError, UserError, suggest
from localpipe.fields import Field

S = TypeVar("S", bound=Samples | Split)


@dataclass(frozen=True)
class Dataset:
    """A data set as configured, without any value that is still `auto`.

    `mean` and `std` have one number per channel. identity: of both splits, before validation images
    are held out.
    """

    name: str
    train: Split | Samples
    test: Split | Samples
    validation: Split | Samples | None  # held out of train
    num_classes: int
    sample: tuple[int, ...]  # (C, H, W) of an image
    mean: Values  # of images in 0..1
    std: Values
    augment: Augment  # words of data.augment, without `auto`
    padding: int
    padding_mode: str  # reflect | zero
    identity: Identity | FixedIdentity
    classes: tuple[str, ...] | None = None  # the name of every label
    notes: tuple[str, ...] = ()  # lines for the user, in the order to print
    verify: Level = "full"  # of the image files
    left_out: tuple[str, ...] = ()  # image files that are not read, as paths below data.root
    inputs: InputFacts | None = None  # of samples that are no images with a class
    batch: int = 1  # images of a step, which mixtures are made of
    soft_classes: int | None = None  # that a target has a probability of each of, None for an index
    loader: FileLoader | None = None  # of image files; threads of the worker read them without it

    @property
    def image(self) -> tuple[int, ...]:
        """The shape (C, H, W) of an image, by the name that users of images know."""
        return self.sample

    @property
    def recipe(self) -> ImageRecipe:
        """How the training images are augmented, one by one."""
        return ImageRecipe(self.augment, self.padding, self.padding_mode, self.mean)

    @property
    def sha256(self) -> str:
        """The digest that tells data sets apart, in hexadecimal. See `Identity`."""
        return self.identity.sha256

    @property
    def facts(self) -> DataFacts:
        """The values that a configuration's `auto` keys take from the data set."""
        facts = DataFacts(
            self.sample,
            self.num_classes,
            self.mean,
            self.std,
            self.augment,
            self.classes,
            self.verify,
            class_weights=balance_classes(self.train.labels, self.num_classes),
        )
        if self.inputs is None:
            return dataclasses.replace(
                facts,
                padding=self.padding,
                padding_mode=self.padding_mode,
                files=count_files(self.train),
            )
        target = self.inputs.target
        return dataclasses.replace(
            facts,
            dtype=self.inputs.dtype,
            task=self.inputs.task,
            evaluation_sample=self.inputs.evaluation_sample,
            has_loader=self.inputs.loader is not None,
            class_weights=self.inputs.class_weights or facts.class_weights,
            has_probabilities=target is not None and _is_row_of_numbers(target),
        )


def count_files(split: Split | Samples) -> int:
    """Return how many images of a split are files that are decoded, 0 for other images."""
    images = split.images if isinstance(split, Split) else None
    while isinstance(images, ImageSubset):
        images = images.images
    return len(split) if isinstance(images, FileImages) else 0


def _is_row_of_numbers(target: Field) -> bool:
    return target.dtype == "float32" and len(target.shape) == 1


def load(
    config: Data,
    seed: int,
    check: Collection[str] = (),
    left_out: Sequence[str] | None = None,
    statistics: tuple[Values, Values] | None = None,
) -> Dataset:
    """Read a data set, hold out data.validation images and take data.train_subset of the rest.

    `seed` selects the validation images and the subset. Where mean or std is `auto` and none is
    published, every training image is read once. check: the splits whose image files are checked
    first, as data.verify says. left_out: the image files that a run leaves out, as paths below
    data.root. None where they are not known yet: with data.skip_broken both splits are checked
    then, to leave out the broken ones. statistics: mean and std of `auto`, before the published
    ones, for images of as many channels.

    Raises UserError for an unknown name, a missing or damaged file, sizes that do not fit, and
    memory that does not suffice.
    """
    loader = registry.find_data_loader(config.name, "config: data.name")
    if left_out is None and config.skip_broken:
        check = BOTH
    try:
        raw: RawDataset | FoundFiles[RawDataset] | RawSamples
        if is_user_code(config.name):
            raw = loader(config, statistics)
        else:
            raw = loader(config)
        if isinstance(raw, RawSamples):
            if raw.check is not None:
                raw = dataclasses.replace(raw, notes=raw.notes + raw.check(check))
            return resolve_samples(config, raw, seed)
        names: tuple[str, ...] = ()
        level: Level = "full"
        if isinstance(raw, FoundFiles):
            level = decide_level(raw.total, config)
            raw, names = choose_files(raw, config, check, left_out)
        raw = _take_statistics(raw, statistics)
        dataset = resolve_raw(config, raw, seed)
        return dataclasses.replace(dataset, notes=raw.notes, verify=level, left_out=names)
    except RunError as error:  # a broken image is the user's to correct, before the run starts
        raise UserError(str(error)) from None
    except MemoryError:
        raise UserError(
            f"data: {config.name} does not fit into memory; take fewer or smaller images"
        ) from None


def epoch_order(dataset_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch's training images, a permutation of range(dataset_size), int64.

    It depends on the three arguments alone.
    """
    return seeds.permutation(seed, dataset_size, "order", epoch)


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Raise UserError if a label is not below `num_classes`, so that no output stands for it.

    The splits are read in the order train, validation, test. The first too large label is reported.
    Negative labels are not looked for. Where a sample has no class of its own, the number of the
    data set's is compared.
    """
    if dataset.train.labels is None and num_classes < dataset.num_classes:
        raise UserError(
            f"data: {dataset.name} needs {dataset.num_classes} outputs, but model.num_classes is "
            f"{num_classes}; set model.num_classes to at least {dataset.num_classes}, or to auto"
        )
    prefix = ""
    if dataset.name == "npz":
        prefix = "y_"
    splits = (("train", dataset.train), ("train", dataset.validation), ("test", dataset.test))
    for name, split in splits:
        if split is None or split.labels is None or len(split) == 0:
            continue
        largest = int(split.labels.max())
        if largest >= num_classes:
            raise UserError(
                f"data: {dataset.name}: the largest label in {prefix}{name} is {largest}, "
                f"but model.num_classes is {num_classes}; "
                f"set model.num_classes to at least {largest + 1}, or to auto"
            )


def limit_classes(dataset: Dataset, task: TaskKeys, num_classes: int) -> Dataset:
    """Return a data set whose targets are what a task takes.

    Every class index is checked when it is read, where labels are known only then. Others were
    checked by `check_labels`. Labels of images become probabilities of classes where the task takes
    those. Targets of other tasks than classification and segmentation stay as they are.
    """
    inputs = dataset.inputs
    if inputs is None and task.targets == "probabilities" and task.name == "classification":
        return dataclasses.replace(dataset, soft_classes=num_classes)
    has_classes = task.name in ("classification", "segmentation")
    if inputs is None or inputs.loader is None or not has_classes:
        return dataset
    ignored = task.ignore_index if task.name == "segmentation" else None
    loader = inputs.loader.with_classes(num_classes, ignored)
    return dataclasses.replace(dataset, inputs=dataclasses.replace(inputs, loader=loader))


def name_classes(dataset: Dataset, names: tuple[str, ...]) -> Dataset:
    """Return a data set whose labels are positions in `names`, as data.classes would have made it.

    Every image keeps its class by name. names: they hold all of the data set's own. Where it has
    none, they name the indices. Raises ValueError if a name is missing.
    """
    identity = dataset.identity
    if isinstance(identity, FixedIdentity):
        return dataclasses.replace(dataset, classes=names)
    validation = dataset.validation
    if validation is not None:
        validation = _relabel_split(validation, dataset.classes, names)
    return dataclasses.replace(
        dataset,
        train=_relabel_split(dataset.train, dataset.classes, names),
        test=_relabel_split(dataset.test, dataset.classes, names),
        validation=validation,
        num_classes=len(names),
        identity=dataclasses.replace(identity, raw=_relabel(identity.raw, names)),
        classes=names,
    )


def resolve_raw(config: Data, raw: RawDataset, seed: int) -> Dataset:
    """Return what was loaded as configured, without `auto` and without notes.

    Validation images and a subset are drawn with `seed`. Raises UserError as `load` does.
    """
    height, width, channels = raw.train.images.shape
    if configured_size(config) not in (None, (height, width)):
        raise UserError(
            f"data: data.image_size is {config.image_size}, "
            f"but the images of {config.name} are {height} x {width}; set it to auto"
        )

    _refuse_masks_augmentation(config)
    raw = _match_classes(config, raw)

    # Validation images leave first, so that a subset of any size leaves them alone.
    train, validation = _hold_out(raw.train, config, seed)
    train = _take_subset(train, config, seed)
    mean, std = _normalisation(config, raw.recipe, train.images, channels)
    padding, padding_mode = raw.recipe.padding, raw.recipe.padding_mode
    if config.padding is not None and config.padding != "auto":
        padding = config.padding
    if config.padding_mode is not None and config.padding_mode != "auto":
        padding_mode = config.padding_mode
    dataset = Dataset(
        name=config.name,
        train=train,
        test=raw.test,
        validation=validation,
        num_classes=raw.num_classes,
        sample=(channels, height, width),
        mean=mean,
        std=std,
        augment=fill_auto(config.augment, raw.recipe.augment),
        padding=padding,
        padding_mode=padding_mode,
        identity=Identity(raw, config.root),
        classes=raw.classes,
        batch=config.batch_size,
    )
    loader = find_loader(config, raw.train.images, dataset.recipe)
    return dataclasses.replace(dataset, loader=loader)


def resolve_samples(config: Data, raw: RawSamples, seed: int) -> Dataset:
    """Return samples as configured. Validation samples and a subset are drawn with `seed`.

    Raises UserError as `load` does, and for a key that is for images alone.
    """
    _refuse_image_keys(config, raw.augment)
    _refuse_other_names(config, raw)
    mean, std = _choose_statistics(config, raw)
    train, validation = raw.train, raw.validation
    if validation is None:
        train, validation = _hold_out(raw.train, config, seed)
    return Dataset(
        name=config.name,
        train=_take_subset(train, config, seed),
        test=raw.test,
        validation=validation,
        num_classes=raw.num_classes,
        sample=raw.inputs.sample,
        mean=mean,
        std=std,
        augment=fill_auto(config.augment, raw.augment),
        padding=0,
        padding_mode="zero",
        identity=FixedIdentity(raw.inputs.digest),
        classes=raw.classes,
        notes=raw.notes,
        inputs=raw.inputs,
    )


def _refuse_masks_augmentation(config: Data) -> None:
    """Raise UserError for a word of data.augment that is for images with masks."""
    if MASKED in list_words(config.augment):
        raise UserError(
            f"data: data.augment {MASKED} is for images with a class a pixel, as those of "
            f"cityscapes, and {config.name} has a class an image; set data.augment=auto"
        )


def _choose_statistics(config: Data, raw: RawSamples) -> tuple[Values, Values]:
    """Return mean and std of samples: the configured ones for images of bytes, else their own."""
    mean, std = raw.mean, raw.std
    if raw.inputs.dtype is not None:
        return mean, std
    channels = raw.inputs.sample[0]
    if config.mean != "auto":
        mean = check_values("mean", config.mean, config, channels)
    if config.std != "auto":
        std = check_values("std", config.std, config, channels)
    return mean, std


def _refuse_image_keys(config: Data, own: str) -> None:
    """Raise UserError for a key that says how localpipe reads and augments images.

    own: the word of data.augment that the samples' own loader reads.
    """
    if config.augment not in ("auto", "none", own):
        words = ", ".join(list_words(config.augment))
        raise UserError(
            f"data: data.augment {words} is for images that localpipe reads itself, and "
            f"{config.name} gives its own samples; set data.augment=none"
        )
    for key in ("padding", "padding_mode"):
        if getattr(config, key) not in ("auto", None):
            raise UserError(
                f"data: data.{key} is for images that localpipe crops itself, and {config.name} "
                f"gives its own samples; set data.{key}=auto"
            )


def _refuse_other_names(config: Data, raw: RawSamples) -> None:
    """Raise UserError for names in data.classes where the samples have others, or none."""
    names = config.classes
    if isinstance(names, tuple) and names != raw.classes:
        described = f"classes {list(raw.classes)}" if raw.classes else "no classes with names"
        raise UserError(
            f"data: data.classes has the names {list(names)}, but {config.name} has {described}; "
            "leave data.classes out"
        )


def balance_classes(labels: NDArray[np.int64] | None, num_classes: int) -> Values | None:
    """Return the weight of every class, N / (classes * its samples), 0 for a class without any.

    labels: (N,), or None, for which None is returned.
    """
    if labels is None or len(labels) == 0:
        return None
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.zeros(len(counts))
    np.divide(len(labels), len(counts) * counts, out=weights, where=counts > 0)
    return tuple(weights.tolist())


def _take_statistics(raw: RawDataset, statistics: tuple[Values, Values] | None) -> RawDataset:
    """Return the data with other published mean and std, if they are for as many channels."""
    if statistics is None or len(statistics[0]) != raw.train.images.shape[2]:
        return raw
    mean, std = statistics
    return dataclasses.replace(raw, recipe=dataclasses.replace(raw.recipe, mean=mean, std=std))


def _match_classes(config: Data, raw: RawDataset) -> RawDataset:
    """Return a data set whose labels follow data.classes, where that is a list of names.

    Where the data have names too, every image keeps its class by name. Else the list names the
    indices. Raises UserError for a name of the data that the list lacks, and for another number of
    names than classes.
    """
    names = config.classes
    if not isinstance(names, tuple) or names == raw.classes:
        return raw
    if raw.classes is None:
        if len(names) != raw.num_classes:
            raise UserError(
                f"data: data.classes has {len(names)} names, but {config.name} has "
                f"{raw.num_classes} classes; give one name a class"
            )
        return dataclasses.replace(raw, classes=names)
    unknown = [name for name in raw.classes if name not in names]
    if unknown:
        raise UserError(
            f"data: {config.name} in {config.root} has a class {unknown[0]!r}, "
            f"which is not one of data.classes; {suggest(unknown[0], names)}"
        )
    return _relabel(raw, names)


def _relabel(raw: RawDataset, names: tuple[str, ...]) -> RawDataset:
    """Return a data set whose labels are positions in `names`, which hold all of its own."""
    train, test = (_relabel_split(split, raw.classes, names) for split in (raw.train, raw.test))
    return dataclasses.replace(raw, train=train, test=test, num_classes=len(names), classes=names)


def _relabel_split(
    split: Split | Samples, classes: tuple[str, ...] | None, names: tuple[str, ...]
) -> Split:
    """Return a split whose labels are positions in `names`. They stay where `classes` is None."""
    assert isinstance(split, Split), "only images have names of their own classes"
    if classes is None:
        return split
    index = np.array([names.index(name) for name in classes], np.int64)
    return Split(split.images, index[split.labels])


def _hold_out(train: S, config: Data, seed: int) -> tuple[S, S | None]:
    """Return the remaining training images, in their own order, and the validation images."""
    size = len(train)
    count = config.validation
    if count == 0:
        return train, None
    if count >= size:
        raise UserError(
            f"data: data.validation is {count}, but {config.name} has {size} training images; "
            f"set it to at most {size - 1}"
        )
    rows = seeds.permutation(seed, size, "validation")
    validation = train.take(rows[:count])
    return train.take(np.sort(rows[count:])), validation  # type: ignore[return-value]


def _take_subset(train: S, config: Data, seed: int) -> S:
    """Return the first data.train_subset images of a permutation.

    A smaller subset is therefore part of a larger one.
    """
    size = len(train)
    count = config.train_subset
    if count is None:
        return train
    if count > size:
        rest = ""
        if config.validation:
            rest = " left after data.validation"
        raise UserError(
            f"data: data.train_subset is {count}, but {config.name} has {size} training images"
            f"{rest}; set it to at most {size}"
        )
    return train.take(seeds.permutation(seed, size, "subset")[:count])  # type: ignore[return-value]


def _normalisation(
    config: Data, recipe: Recipe, images: Images, channels: int
) -> tuple[Values, Values]:
    """Return mean and std: the configured ones, else the published ones, else those of `images`."""
    mean = recipe.mean
    if config.mean != "auto":
        mean = check_values("mean", config.mean, config, channels)
    std = recipe.std
    if config.std != "auto":
        std = check_values("std", config.std, config, channels)
    if mean is not None and std is not None:
        return mean, std

    measured_mean, measured_std = find_moments(count_values(images))
    if mean is None:
        mean = measured_mean
    if std is None:
        std = measured_std
    return mean, std
