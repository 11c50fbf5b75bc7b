"""Cityscapes: what is read of a tree in its format, by threads and processes, and refusals."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from localpipe.cli.command_line import main
from localpipe.config.keys import Data
from localpipe.data.batches import BatchReader
from localpipe.data.dataset import Dataset, load
from localpipe.data.evaluation import load_evaluation
from localpipe.data.samples import Request
from localpipe.data.scenes.cityscapes import load_cityscapes
from localpipe.data.verify.choice import BOTH, TEST
from localpipe.errors import RunError, UserError
from tests.data.scenes.tree import SIZE, save, write_tree

NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
    "motorcycle", "bicycle",
)  # fmt: skip
# The classes of the ids that the tree has.
CLASSES = {7: 0, 23: 10, 26: 13, 1: 255, 31: 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("cityscapes"), train=5, val=3)


def read(root: Path, check: Sequence[str] = (), **keys: Any) -> Dataset:
    values: dict[str, Any] = {"name": "cityscapes", "root": str(root), "image_size": (32, 64)}
    return load(Data(**{**values, "workers": 0, "batch_size": 2, **keys}), 0, check)


def find_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the images of a split and their masks, found without torchvision."""
    pairs = []
    for image in sorted((root / "leftImg8bit" / split).glob("*/*.png")):
        name = image.name.replace("_leftImg8bit", "_gtFine_labelIds")
        pairs.append((image, root / "gtFine" / split / image.parent.name / name))
    return pairs


def test_evaluations_see_whole_images_in_the_order_of_their_paths(root: Path) -> None:
    dataset = read(root)
    assert dataset.classes == NAMES and dataset.num_classes == 19
    assert dataset.facts.sample == (3, 32, 64)
    assert dataset.facts.evaluation_sample == (3, *SIZE)
    assert dataset.facts.task == "segmentation" and dataset.augment == "scale_crop_flip"
    batch = BatchReader(dataset, 0).read_test(slice(0, 3))
    for row, (image, mask) in enumerate(find_pairs(root, "val")):
        expected = np.asarray(Image.open(image)).transpose(2, 0, 1)
        assert np.array_equal(batch["image"][row], expected)
        ids = np.asarray(Image.open(mask))
        classes = np.vectorize(CLASSES.get)(ids)
        assert np.array_equal(batch["target"][row], classes)
    assert len(dataset.test) == 3


def test_crops_depend_on_seed_epoch_and_index_alone(root: Path) -> None:
    dataset = read(root, validation=1)
    requests = [
        Request("train", 1, slice(0, 2)),
        Request("train", 1, slice(2, 4)),
        Request("validation", 1, slice(0, 1)),
        Request("train", 2, slice(0, 4)),
    ]
    batches = list(BatchReader(dataset, 3).iterate(requests))
    assert [tuple(batch["image"].shape) for batch in batches] == [
        (2, 3, 32, 64), (2, 3, 32, 64), (1, 3, *SIZE), (4, 3, 32, 64)
    ]  # fmt: skip
    order = BatchReader(dataset, 3).order(1)
    crops = torch.cat([batches[0]["image"], batches[1]["image"]])
    reader = BatchReader(dataset, 3)
    (whole,) = reader.iterate([Request("train", 1, slice(0, 4))])
    assert torch.equal(whole["image"], crops)
    again = {int(index): crop for index, crop in zip(order, crops, strict=True)}
    for index, crop in zip(reader.order(2), batches[3]["image"], strict=True):
        assert not torch.equal(crop, again[int(index)])

    # Processes give the same bytes.
    processes = read(root, validation=1, workers=1)
    for batch, other in zip(batches, BatchReader(processes, 3).iterate(requests), strict=True):
        assert torch.equal(batch["image"], other["image"])
        assert torch.equal(batch["target"], other["target"])


def test_equal_sizes_need_no_second_one(root: Path) -> None:
    assert read(root, image_size=SIZE).facts.evaluation_sample is None


def test_the_digest_tells_trees_apart(root: Path, tmp_path: Path) -> None:
    assert read(root).sha256 == read(write_tree(tmp_path / "same", 5, 3)).sha256
    assert read(root).sha256 != read(write_tree(tmp_path / "other", 4, 3)).sha256


def test_a_small_image_lies_on_the_mean_colour(tmp_path: Path) -> None:
    write_tree(tmp_path, size=(8, 16))
    batch = BatchReader(read(tmp_path, augment="none"), 0).read_train(1, slice(0, 2))
    assert batch["image"].shape == (2, 3, 8, 16)  # read by itself, it is whole
    (batch,) = BatchReader(read(tmp_path, augment="none"), 0).iterate(
        [Request("train", 1, slice(0, 1))]
    )
    colour = torch.tensor([124, 116, 104], dtype=torch.uint8)
    assert torch.equal(batch["image"][0, :, -1, -1], colour)
    assert batch["target"][0, -1, -1] == 255 and (batch["target"][0, :8, :16] != 255).any()


def remove_masks(root: Path) -> None:
    shutil.rmtree(root / "gtFine")


def remove_a_mask(root: Path) -> None:
    find_pairs(root, "train")[1][1].unlink()


def remove_images(root: Path) -> None:
    for image, _ in find_pairs(root, "val"):
        image.unlink()


def put_a_file_for_a_city(root: Path) -> None:
    (root / "leftImg8bit" / "val" / "notes.txt").write_text("")


def break_the_first_image(root: Path) -> None:
    find_pairs(root, "val")[0][0].write_bytes(b"no image")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (remove_masks, "cityscapes is not in .*: gtFine/train is missing; .* register at"),
        (remove_a_mask, r"bonn_000003_000019_leftImg8bit.png has no mask: .*_labelIds.png is miss"),
        (remove_images, r"has no image CITY/\*_leftImg8bit.png in leftImg8bit/val"),
        (put_a_file_for_a_city, "cannot list the images of cityscapes .* Not a directory"),
        (break_the_first_image, "cannot read .*leftImg8bit.png: cannot identify image file"),
    ],
)
def test_an_incomplete_tree_is_refused(
    tmp_path: Path, change: Callable[[Path], None], text: str
) -> None:
    change(write_tree(tmp_path))
    with pytest.raises(UserError, match=text):
        read(tmp_path)


def shrink_a_mask(root: Path) -> None:
    save(find_pairs(root, "val")[1][1], np.zeros((4, 4), np.uint8))


def colour_a_mask(root: Path) -> None:
    save(find_pairs(root, "val")[1][1], np.zeros((*SIZE, 3), np.uint8))


def shrink_a_scene(root: Path) -> None:
    for path, shape in zip(find_pairs(root, "val")[1], ((8, 8, 3), (8, 8)), strict=True):
        save(path, np.zeros(shape, np.uint8))


def break_an_image(root: Path) -> None:
    find_pairs(root, "val")[1][0].write_bytes(b"no image")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (shrink_a_mask, "labelIds.png is 4 x 4, but its image is 80 x 160"),
        (colour_a_mask, "labelIds.png has pixels of mode RGB; expected a mask of one byte"),
        (shrink_a_scene, "leftImg8bit.png is 8 x 8, but images in an evaluation are 80 x 160"),
        (break_an_image, "cannot read .*leftImg8bit.png: cannot identify image file"),
    ],
)
def test_a_wrong_file_is_named_when_it_is_read(
    tmp_path: Path, change: Callable[[Path], None], text: str
) -> None:
    change(write_tree(tmp_path))
    dataset = read(tmp_path)
    with pytest.raises(RunError, match=text):
        BatchReader(dataset, 0).read_test(slice(0, 2))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (shrink_a_mask, "labelIds.png is 4 x 4, but its image is 80 x 160"),
        (colour_a_mask, "labelIds.png has pixels of mode RGB; expected a mask of one byte"),
        (shrink_a_scene, "leftImg8bit.png is 8 x 8, but images in an evaluation are 80 x 160"),
        (break_an_image, "1 of 12 files of cityscapes cannot be read: .*leftImg8bit.png .cannot "
         "identify image file.*; unpack their archives again"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_found_before_the_first_step(
    tmp_path: Path, change: Callable[[Path], None], text: str
) -> None:
    change(write_tree(tmp_path))
    for splits in (BOTH, TEST):
        with pytest.raises(UserError, match=text if splits == BOTH else text.replace("12", "4")):
            read(tmp_path, splits)
    assert len(read(tmp_path, ("train",)).train) == 4
    assert len(read(tmp_path, BOTH, verify="none").train) == 4


@pytest.mark.parametrize("verify", ["auto", "headers"])
def test_a_cut_file_is_found_where_pixels_are_read(tmp_path: Path, verify: str) -> None:
    image = find_pairs(write_tree(tmp_path), "train")[0][0]
    image.write_bytes(image.read_bytes()[:5000])
    if verify == "headers":
        assert len(read(tmp_path, BOTH, verify=verify).train) == 4
        return
    with pytest.raises(UserError, match=f"1 of 12 files .*{re.escape(str(image))}"):
        read(tmp_path, BOTH, verify=verify)


def test_a_training_image_may_have_a_size_of_its_own_that_no_evaluation_sees(
    tmp_path: Path,
) -> None:
    for path, shape in zip(
        find_pairs(write_tree(tmp_path), "train")[1], ((99, 99, 3), (99, 99)), strict=True
    ):
        save(path, np.zeros(shape, np.uint8))
    assert len(read(tmp_path, BOTH).train) == 4
    with pytest.raises(UserError, match="99 x 99, but images in an evaluation are 80 x 160"):
        read(tmp_path, BOTH, validation=1)


def test_an_evaluation_checks_its_files(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "tree")
    break_an_image(tmp_path / "tree")
    with pytest.raises(UserError, match="1 of 6 files of cityscapes cannot be read"):
        load_evaluation(
            Data(name="cityscapes", root=str(tmp_path / "tree"), image_size=(32, 64)), 19
        )


PLACES = "model.name=tests.sample_networks:Guided"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["task.ignore_index=null"], "a mask has a pixel of 255, .*ignore_index, which is null"),
        (["model.num_classes=18"], "cityscapes needs 19 outputs"),
        (["data.augment=crop_flip"], "cityscapes gives its own samples; set data.augment=none"),
        (["data.evaluation_size=[8, 16]"], r"data.evaluation_size is \(8, 16\), but the images of"),
        (["method.context.mode=E"], r"are \(3, 32, 64\) in training and \(3, 80, 160\) in an eval"),
        (["data.name=digits", "data.image_size=auto", "data.augment=scale_crop_flip"],
         "data.augment scale_crop_flip is for images with a class a pixel"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path, words: list[str], text: str
) -> None:
    base = [PLACES, "data.name=cityscapes", f"data.root={root}", "data.image_size=[32, 64]"]
    base += ["data.augment=auto", "data.batch_size=2", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", "demo", *base, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(text, line), line


def test_the_loader_is_that_of_the_configuration(root: Path) -> None:
    raw = load_cityscapes(Data(name="cityscapes", root=str(root), workers=3, mean=(0.0, 0.5, 1.0)))
    loader: Any = raw.inputs.loader
    assert (loader.processes, loader.recipe.size) == (3, (512, 1024))
    assert loader.recipe.background == (0, 128, 255) and loader.recipe.is_random
