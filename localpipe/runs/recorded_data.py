"""What a run has recorded of its data, and whether it may go on with the data as they are now."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localpipe.config.keys import Config
from localpipe.config.load import as_resolved
from localpipe.data.dataset import Dataset, name_classes
from localpipe.data.identity import RULES, describe_classes, describe_files, hash_listing
from localpipe.errors import UserError
from localpipe.files import write_output
from localpipe.runs.checkpoint import Checkpoint
from localpipe.runs.directory import RunDirectory

_NAME_LENGTH = 16  # hexadecimal digits of a digest in a file's name
Change = dict[str, Any]  # of the data: `step` after which it was accepted, digests `from` and `to`


@dataclass(frozen=True)
class RecordedData:
    """What a checkpoint's manifest says of the data that it was made from.

    rules: the version of `identity.RULES`. sha256, classes: None where none is recorded. changes:
    those that were accepted before.
    """

    rules: int
    sha256: str | None
    classes: tuple[str, ...] | None
    changes: tuple[Change, ...]

    @staticmethod
    def from_manifest(manifest: Mapping[str, Any]) -> RecordedData:
        """Return what a manifest of any version says. No key is needed."""
        classes = manifest.get("classes")
        return RecordedData(
            rules=manifest.get("data_rules", 1),
            sha256=manifest.get("data_sha256"),
            classes=None if classes is None else tuple(classes),
            changes=tuple(manifest.get("data_changed", ())),
        )

    def reads_otherwise(self, dataset: Dataset) -> bool:
        """Return whether this version reads other pixels from these image files than the run did.

        The pixels of data in memory are the same in all versions.
        """
        return self.rules != RULES and dataset.identity.listing is not None


def keep_class_names(dataset: Dataset, given: Config, recorded: Config | None) -> Dataset:
    """Return the data of a run with the class names that it has recorded, where they fit.

    So every image keeps its class by name, also where a class has no images now. given: the user's
    configuration, whose own list of names stays. recorded: None for a new run. Data with other
    names are returned as they are, for `check_data` to refuse.
    """
    is_named = isinstance(given.data.classes, tuple)
    if recorded is None or recorded.data.name != given.data.name or is_named:
        return dataset
    names = recorded.data.classes
    if not isinstance(names, tuple) or names == dataset.classes:
        return dataset
    fits = len(names) == dataset.num_classes
    if dataset.classes is not None:
        fits = set(dataset.classes) <= set(names)
    if not fits:
        return dataset
    return name_classes(dataset, names)


def check_data(
    config: Config,
    recorded: Config,
    directory: RunDirectory,
    dataset: Dataset,
    checkpoint: Checkpoint | None,
) -> tuple[Change, ...]:
    """Return the accepted changes of the data of a run, with that of now as the last one.

    config: with data.changed. recorded: the run's own. checkpoint: its newest, None where it has
    none, and then nothing was trained on other data. Raises UserError for other data that are not
    accepted, for other class names, and for image files that earlier versions read otherwise.
    """
    classes = _describe_other_classes(recorded, dataset)
    if checkpoint is None:
        if classes:
            raise UserError(
                f"data: {dataset.name} in {config.data.root} has other classes than the run in "
                f"{directory.path} was started with: {classes}; it has no checkpoint, so begin it "
                "anew with run.resume=never run.overwrite=true"
            )
        return ()

    before = RecordedData.from_manifest(checkpoint.manifest)
    init_from = f"begin another run.dir with its weights: run.init_from={directory.path}"
    if before.reads_otherwise(dataset):
        raise UserError(
            f"data: the run in {directory.path} was made by an earlier version, which read "
            f"transparent, turned and 16-bit image files otherwise; {init_from}"
        )
    if before.sha256 is None or before.sha256 == dataset.sha256:
        return before.changes
    # A network has no output for other classes, whatever is accepted.
    if classes or config.data.changed == "refuse":
        difference = _describe_difference(directory, dataset, before.sha256, classes)
        advice = "go on with these by data.changed=accept, or choose another run.dir"
        if classes:
            advice = f"or {init_from}"
        raise UserError(
            f"data: {dataset.name} in {config.data.root} is not what the run in {directory.path} "
            f"was trained on: {difference}; give it the same data, {advice}"
        )
    change = {"step": checkpoint.step, "from": before.sha256, "to": dataset.sha256}
    return (*before.changes, change)


def _describe_other_classes(recorded: Config, dataset: Dataset) -> str:
    """Return how classes differ from those of a run, "" where its network has their outputs."""
    names, outputs = recorded.data.classes, recorded.model.num_classes
    if isinstance(names, tuple):
        return describe_classes(names, dataset.classes)
    largest = 0
    for split in (dataset.train, dataset.test):
        if split.labels is not None:
            largest = max(largest, int(split.labels.max()))
    if outputs != "auto" and largest >= outputs:
        return f"its largest label is {largest}, and the network has {outputs} outputs"
    return ""


def describe_change(directory: RunDirectory, dataset: Dataset, change: Change) -> str:
    """Return the note on a change of the data that is accepted."""
    difference = _describe_difference(directory, dataset, change["from"])
    return f"note: data.changed=accept: from step {change['step']} on with other data: {difference}"


def keep_normalisation(dataset: Dataset, given: Config, recorded: Config) -> Dataset:
    """Return changed data with the mean and std that the run has recorded, where they are `auto`.

    Raises UserError if the images have another size or other channels than the run's network.
    """
    run = as_resolved(recorded)
    if run.sample != dataset.sample:
        noun = "images" if dataset.inputs is None else "samples"
        raise UserError(
            f"data: {dataset.name} has {noun} of shape {dataset.sample}, the run was made for "
            f"{run.sample}; give it {noun} of that shape, or choose another run.dir"
        )
    if given.data.mean == "auto":
        dataset = dataclasses.replace(dataset, mean=run.data.mean)
    if given.data.std == "auto":
        dataset = dataclasses.replace(dataset, std=run.data.std)
    return dataset


# -- the lists of image files -------------------------------------------------------------------


def write_listing(directory: RunDirectory, dataset: Dataset) -> None:
    """Write the list of the data's image files, named by its digest, if there are such.

    A later resume names by it what has changed. Raises RunError if it cannot be written.
    """
    listing = dataset.identity.listing
    if listing is None or read_listing(directory, dataset.sha256) is not None:
        return
    with contextlib.suppress(OSError):  # writing the file tells what is wrong
        directory.files_folder.mkdir(exist_ok=True)
    # Without a time in its header, so that the same list has the same bytes.
    content = gzip.compress(listing.encode("ascii"), mtime=0)
    write_output(directory.files_folder / _list_name(dataset.sha256), content)


def read_listing(directory: RunDirectory, sha256: str) -> str | None:
    """Return the list of a digest, as `Identity.listing`, or None if it is missing or damaged."""
    try:
        content = (directory.files_folder / _list_name(sha256)).read_bytes()
        listing = gzip.decompress(content).decode("ascii")
    except (OSError, EOFError, ValueError, zlib.error):
        return None
    if hash_listing(listing) != sha256:
        return None
    return listing


def _list_name(sha256: str) -> str:
    return f"{sha256[:_NAME_LENGTH]}.txt.gz"


def _describe_difference(
    directory: RunDirectory, dataset: Dataset, before: str, classes: str = ""
) -> str:
    """Return what differs from the data of a digest, by the names of files where they are known.

    classes: how class names differ, "" where they do not.
    """
    now = dataset.identity.listing
    if now is None:
        return classes or "other labels or images"
    listing = read_listing(directory, before)
    files = "other image files (the run has no list of the ones before)"
    if listing is not None:
        files = describe_files(listing, now)
    return ", ".join(filter(None, [files, classes]))
