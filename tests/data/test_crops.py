"""ImageNet's folders and crops, against torchvision's; files are made in tmp_path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from localpipe.config.keys import Data
from localpipe.data.augment import augment_batch, read_batch
from localpipe.data.crop import DRAWS, crop_box, draw_crops
from localpipe.errors import RunError, UserError
from tests.harness import ImageDataset, load_images

RNG = np.random.default_rng(0)
SIZES = [(40, 60), (61, 33), (50, 50), (300, 20), (20, 300), (1, 1), (7, 2)]  # (height, width)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def folders(root: Path, images: int = 3, test: str = "val") -> Path:
    """Write a tree of two classes, with images of several shapes."""
    for part in ("train", test):
        for name in ("n01", "n02"):
            (root / part / name).mkdir(parents=True)
            for i in range(images):
                picture(30 + 7 * i, 50 - 2 * i).save(root / part / name / f"{i}.png")
    return root


def imagenet(root: Path, **keys: Any) -> ImageDataset:
    return load_images(Data(**{"name": "imagenet", "root": str(root), "image_size": 16, **keys}), 0)


def opened(dataset: ImageDataset, part: str, index: int, root: Path) -> Image.Image:
    return Image.open(root / part / f"n0{index // 3 + 1}" / f"{index % 3}.png")


# --- Where a crop lies


def torchvisions_box(
    image: Image.Image, numbers: list[float], patch: pytest.MonkeyPatch
) -> tuple[int, ...]:
    """Return (top, left, height, width) of torchvision's RandomResizedCrop for these numbers."""
    drawn: Iterator[float] = iter(numbers[:-2])
    placed: Iterator[float] = iter(numbers[-2:])
    with patch.context() as here:
        here.setattr(
            torch.Tensor,
            "uniform_",
            lambda self, low, high: self.fill_(low + (high - low) * next(drawn)),
        )
        here.setattr(
            torch,
            "randint",
            lambda low, high, size: torch.tensor([low + int(next(placed) * (high - low))]),
        )
        found: tuple[int, ...] = transforms.RandomResizedCrop.get_params(
            image, [0.08, 1.0], [3 / 4, 4 / 3]
        )
    return found


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_crop_lies_where_torchvision_would_put_it(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(height, width)
    rows = draw_crops(0, np.arange(50), 1).tolist()
    ours = [crop_box(numbers, height, width) for numbers in rows]
    reference = [torchvisions_box(image, numbers, monkeypatch) for numbers in rows]
    # torchvision computes in 32 bits, so a half may be rounded another way.
    assert np.abs(np.array(ours) - np.array(reference)).max() <= 1
    assert np.mean(np.array(ours) == np.array(reference)) > 0.99
    for top, left, high, wide in ours:
        assert (
            0 <= top <= top + high <= height
            and 0 <= left <= left + wide <= width
            and high > 0
            and wide > 0
        )
    assert len(set(ours)) > 40 or min(height, width) < 21


def test_crops_are_drawn_evenly_and_for_every_image_and_epoch_anew() -> None:
    numbers = draw_crops(0, np.arange(2000), 1)
    assert numbers.shape == (2000, DRAWS) and numbers.min() >= 0 and numbers.max() < 1
    np.testing.assert_allclose(numbers.mean(0), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(DRAWS)).max() < 0.1
    boxes = np.array([crop_box(row, 200, 200) for row in numbers.tolist()])
    areas, ratios = boxes[:, 2] * boxes[:, 3] / 200**2, boxes[:, 3] / boxes[:, 2]
    assert 0.078 < areas.min() < 0.1 and areas.max() > 0.95
    assert 0.73 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.37
    for other in (draw_crops(1, np.arange(2000), 1), draw_crops(0, np.arange(2000), 2)):
        assert not (numbers == other).any()
    assert (draw_crops(0, np.array([5, 3]), 1) == numbers[[5, 3]]).all()


# --- imagenet


def test_imagenets_images_are_torchvisions_crops_of_the_whole_files(tmp_path: Path) -> None:
    dataset = imagenet(folders(tmp_path))
    assert (
        dataset.sample == (3, 16, 16)
        and dataset.num_classes == 2
        and dataset.augment == "resized_crop_flip"
    )
    assert dataset.mean == (0.485, 0.456, 0.406) and dataset.std == (0.229, 0.224, 0.225)
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    usual = transforms.Compose([transforms.Resize(18), transforms.CenterCrop(16)])
    for index, image in enumerate(read_batch(dataset.test, np.arange(6))):
        assert (
            image.transpose(1, 2, 0) == np.asarray(usual(opened(dataset, "val", index, tmp_path)))
        ).all()
    batch = augment_batch(dataset, np.arange(6), 3, 2)
    assert batch.shape == (6, 3, 16, 16) and batch.dtype == np.uint8 and batch.flags.c_contiguous
    flipped = 0
    for index, (image, numbers) in enumerate(
        zip(batch, draw_crops(3, np.arange(6), 2).tolist(), strict=True)
    ):
        whole = opened(dataset, "train", index, tmp_path)
        top, left, high, wide = crop_box(numbers, whole.height, whole.width)
        expected = transforms.functional.resized_crop(whole, top, left, high, wide, [16, 16])
        straight, mirrored = (
            np.asarray(each) for each in (expected, transforms.functional.hflip(expected))
        )
        image = image.transpose(1, 2, 0)
        assert (image == straight).all() or (image == mirrored).all()
        flipped += not (image == straight).all()
    assert 0 < flipped < 6


def test_imagenet_at_its_own_size_is_224_out_of_256(tmp_path: Path) -> None:
    dataset = imagenet(folders(tmp_path, 1), image_size="auto")
    assert dataset.sample == (3, 224, 224)
    usual = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    (image,) = read_batch(dataset.test, np.arange(1))
    with Image.open(tmp_path / "val" / "n01" / "0.png") as whole:
        assert (image.transpose(1, 2, 0) == np.asarray(usual(whole))).all()


def test_a_crop_of_an_image_follows_from_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    dataset = imagenet(folders(tmp_path))
    whole = augment_batch(dataset, np.arange(6), 0, 1)
    index = np.array([4, 1, 4])
    assert (augment_batch(dataset, index, 0, 1) == whole[index]).all()
    for other in (
        augment_batch(dataset, np.arange(6), 1, 1),
        augment_batch(dataset, np.arange(6), 0, 2),
    ):
        assert (other != whole).any(axis=(1, 2, 3)).all()
    some = imagenet(tmp_path, validation=2, train_subset=3)
    assert augment_batch(some, np.arange(3), 0, 1).shape == (3, 3, 16, 16)


def test_imagenet_wants_a_folder_of_classes_for_validation_too(tmp_path: Path) -> None:
    folders(tmp_path, 1, test="test")
    with pytest.raises(
        UserError,
        match=f"val is not a folder; expected {tmp_path}/train and {tmp_path}/val with a fol",
    ):
        imagenet(tmp_path)
    (tmp_path / "val").mkdir()
    picture(8, 8).save(tmp_path / "val" / "ILSVRC2012_val_00000001.png")
    with pytest.raises(
        UserError, match="val has no class folders; expected a folder of images per class"
    ):
        imagenet(tmp_path)
    with pytest.raises(
        UserError, match="data: imagenet cannot be downloaded; set data.download=false"
    ):
        imagenet(tmp_path, download=True)


# --- The same crops of any data set


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_memory_are_cropped_as_files_are(tmp_path: Path, channels: int) -> None:
    x = RNG.integers(0, 256, (6, 12, 10, channels), np.uint8)
    labels = np.arange(6) % 2
    np.savez(tmp_path / "set.npz", x_train=x, y_train=labels, x_test=x, y_test=labels)
    dataset = load_images(
        Data(name="npz", root=str(tmp_path / "set.npz"), augment="resized_crop_flip", validation=1),
        0,
    )
    index = np.arange(5)
    batch = augment_batch(dataset, index, 0, 1)
    assert batch.shape == (5, channels, 12, 10)
    before = read_batch(dataset.train, index)
    for image, row, numbers in zip(batch, before, draw_crops(0, index, 1).tolist(), strict=True):
        top, left, high, wide = crop_box(numbers, 12, 10)
        part = [Image.fromarray(plane[top : top + high, left : left + wide]) for plane in row]
        resized = np.stack(
            [np.asarray(each.resize((10, 12), Image.Resampling.BILINEAR)) for each in part]
        )
        assert (image == resized).all() or (image == resized[..., ::-1]).all()
    assert (read_batch(dataset.train, index) == before).all()


# --- Threads


def test_threads_leave_order_and_bits_as_one_image_at_a_time_has_them(tmp_path: Path) -> None:
    folders(tmp_path, 20, test="test")
    dataset = load_images(Data(name="image_folder", root=str(tmp_path), image_size=8), 0)
    index = RNG.permutation(40)
    together = dataset.train.images.read(index)
    assert (
        together == np.concatenate([dataset.train.images.read(index[i : i + 1]) for i in range(40)])
    ).all()
    assert len({image.tobytes() for image in together}) == 40


def test_the_first_broken_file_of_a_batch_is_named(tmp_path: Path) -> None:
    dataset = imagenet(folders(tmp_path, 20))
    for name in ("3.png", "7.png"):
        (tmp_path / "train" / "n01" / name).write_bytes(b"no image")
    paths = dataset.train.images.paths  # type: ignore[attr-defined]
    index = np.array(
        [i for i, path in enumerate(paths) if path.endswith(("n01/7.png", "n01/3.png"))][::-1]
    )
    with pytest.raises(RunError, match=r"n01/7.png cannot be read as an image \(.*\); mend it"):
        augment_batch(dataset, index, 0, 0)
