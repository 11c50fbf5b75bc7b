"""Image files that loader processes decode: the bytes of threads, in their order, and faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from localpipe import config as configs
from localpipe import data
from localpipe.config.keys import Config, Data
from localpipe.config.resolve import DataFacts, Facts, MachineFacts, resolve
from localpipe.config.resume import add_later_keys
from localpipe.data.batches import BatchReader
from localpipe.data.samples import Request
from localpipe.errors import RunError
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.weights import weight_lines, weights_digest
from localpipe.plan.resolve_here import resolve_here
from tests.harness import ImageDataset, load_images, train_here

EVERY_CHANGE = "resized_crop_flip,randaugment,colour,erasing,cutout"
REQUESTS = [
    Request("train", 1, slice(0, 5)),
    Request("train", 1, slice(5, 8)),
    Request("test", 1, slice(1, 4)),
    Request("validation", 1, slice(0, 2)),
    Request("train", 3, slice(8, 16)),
    Request("train", 1, slice(20, 30)),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two classes, with images of several shapes, some of them transparent."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", 9), ("test", 3)):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                shape = (14 + number, 20 - number, 4 if number % 3 == 0 else 3)
                pixels = generator.integers(0, 256, shape, np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    (folder / "val").symlink_to(folder / "test")  # the name of ImageNet's test split
    return folder


def load(root: Path, workers: Any, name: str = "image_folder", **keys: Any) -> ImageDataset:
    values: dict[str, Any] = {"name": name, "root": str(root), "image_size": 12, "validation": 2}
    values |= {"workers": workers, "batch_size": 8, "background": "red", **keys}
    return load_images(Data(**values), 0)


def read(dataset: ImageDataset) -> list[dict[str, Tensor]]:
    soft = replace(dataset, soft_classes=2 if "mixup:0.2" in dataset.augment else None)
    return list(BatchReader(soft, 3).iterate(iter(REQUESTS)))


@pytest.mark.parametrize(
    ("name", "augment", "workers"),
    [
        ("image_folder", "none", 1),
        ("image_folder", "crop_flip", 2),
        ("imagenet", EVERY_CHANGE, 2),
        ("image_folder", "auto,mixup", 2),
    ],
)
def test_processes_give_the_bytes_of_threads(
    root: Path, name: str, augment: str, workers: int
) -> None:
    keys: dict[str, Any] = {"name": name, "augment": augment, "mean": (0.2, 0.5, 0.6)}
    expected = read(load(root, 0, **keys))
    assert [len(batch["target"]) for batch in expected] == [5, 3, 3, 2, 8, 0]
    dataset = load(root, workers, **keys)
    assert dataset.loader is not None and dataset.loader.processes == workers
    for found, batch in zip(read(dataset), expected, strict=True):
        assert found.keys() == batch.keys()
        for field, tensor in batch.items():
            assert torch.equal(found[field], tensor), field
            assert found[field].dtype == tensor.dtype


def test_images_that_are_no_files_need_no_processes() -> None:
    keys: dict[str, Any] = {"samples": 8, "image_size": 8, "workers": 2}
    assert load_images(Data(name="synthetic", **keys), 0).loader is None


def test_a_broken_file_is_named_as_threads_name_it(root: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).symlink_to(root / part)
    errors = []
    for workers in (0, 1):
        dataset = load(tmp_path, workers, validation=0)
        paths = list(dataset.train.images.paths)  # type: ignore[attr-defined]
        paths[4] = str(tmp_path / "missing.png")
        images = replace(dataset.train.images, paths=paths)  # type: ignore[type-var]
        broken = replace(dataset, train=replace(dataset.train, images=images))
        with pytest.raises(RunError) as caught:
            list(BatchReader(broken, 0).iterate([Request("train", 1, slice(0, 18))]))
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "missing.png" in errors[0] and "\n" not in errors[0]


def test_processes_end_when_their_batches_are_not_wanted_any_more(root: Path) -> None:
    dataset = load(root, 2)
    batches: Iterator[Any] = BatchReader(dataset, 0).iterate(REQUESTS * 20)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(read(dataset)) == len(REQUESTS)


def test_a_run_does_not_depend_on_the_processes_that_decode(root: Path, tmp_path: Path) -> None:
    digests = set()
    for workers in (0, 2):
        config = given(root, tmp_path / str(workers), workers)
        stages = train_here(resolve_here(config, data.load(config.data, 0)))
        digests.add(digest(stages))
    assert len(digests) == 1


def digest(stages: list[Stage]) -> str:
    return weights_digest(line for stage in stages for line in weight_lines(stage.weights()))


def given(root: Path, folder: Path, workers: Any) -> Config:
    sections = {
        "model": {"name": "tests.sample_networks:small"},
        "data": {
            "name": "image_folder", "root": str(root), "image_size": 8, "batch_size": 6,
            "workers": workers, "augment": "crop_flip,colour,cutmix",
        },
        "pipeline": {"stages": 2},
        "optim": {"epochs": 1, "lr": 0.1},
        "run": {"dir": str(folder), "threads": 1, "device": "cpu"},
    }  # fmt: skip
    return configs.parse(sections, "test")


@pytest.mark.parametrize(
    ("files", "cores", "expected"),
    [(0, 16, 1), (500, 16, 0), (20_000, 16, 8), (20_000, 6, 4), (20_000, 3, 0)],
)
def test_auto_takes_processes_for_many_files_where_cores_are_left(
    tmp_path: Path, files: int, cores: int, expected: int
) -> None:
    config = given(tmp_path, tmp_path, "auto")
    facts = DataFacts((3, 8, 8), 2, (0.5,) * 3, (0.2,) * 3, "none", files=files)
    decided = resolve(config, Facts(facts, MachineFacts(cores, local_workers=2)))
    assert decided.data.workers == expected


def test_a_users_own_data_set_has_at_least_one_process(tmp_path: Path) -> None:
    """A run on image files may be evaluated on it, and has recorded none."""
    config = Data(name="tests.data.user.sets:stripes", workers=0, mean=(0.5,) * 3, std=(0.2,) * 3)
    inputs = data.load(config, 0).inputs
    assert inputs is not None and inputs.loader is not None
    assert inputs.loader.processes == 1  # type: ignore[attr-defined]


def test_threads_decode_for_a_run_of_an_earlier_version() -> None:
    for name, padding, workers in (
        ("image_folder", {}, 0), ("image_folder", {"padding": 4}, 1), ("digits", {}, 1),
    ):  # fmt: skip
        content = {"data": {"name": name, "workers": 1, **padding}}
        add_later_keys(content)
        assert content["data"]["workers"] == workers
