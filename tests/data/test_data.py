"""Loaders, splits, constants and augmentation, on files in tmp_path; a refusal is one line."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image

from localpipe import seeds
from localpipe.config.keys import Data
from localpipe.data.augment import augment_batch, pad_images, read_batch
from localpipe.data.batches import BatchReader
from localpipe.data.dataset import check_labels, epoch_order, load
from localpipe.data.digits import enlarge
from localpipe.data.images import Split
from localpipe.errors import RunError, UserError
from tests.harness import ImageDataset, load_images

RNG = np.random.default_rng(0)


def images(n: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    """Return (n, height, width, channels) random bytes."""
    return RNG.integers(0, 256, (n, height, width, channels), np.uint8)


def arrays(n: int = 20, **changes: Any) -> dict[str, Any]:
    """Return the four arrays of a good .npz file, with some replaced, or left out where None."""
    good = {
        "x_train": images(n),
        "y_train": np.arange(n) % 4,
        "x_test": images(6),
        "y_test": np.arange(6) % 4,
    }
    return {name: array for name, array in {**good, **changes}.items() if array is not None}


def write(folder: Path, content: dict[str, Any]) -> str:
    np.savez(folder / "set.npz", **content)
    return str(folder / "set.npz")


def npz(
    folder: Path, content: dict[str, Any] | None = None, seed: int = 0, **keys: Any
) -> ImageDataset:
    return load_images(Data(name="npz", root=write(folder, content or arrays()), **keys), seed)


def synthetic(samples: int = 64, seed: int = 0, **keys: Any) -> ImageDataset:
    return load_images(Data(name="synthetic", samples=samples, **{"image_size": 12, **keys}), seed)


def everything(split: Split) -> np.ndarray:
    return split.images.read(np.arange(len(split)))


def rows(array: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in array}


def refusal(config: Data, seed: int = 0) -> str:
    """Return the one line with which load refuses a configuration."""
    with pytest.raises(UserError) as caught:
        load_images(config, seed)
    text = str(caught.value)
    assert text.startswith("data: ") and "\n" not in text and not text.endswith(".")
    return text


# --- Order and augmentation


def test_order_is_a_permutation_that_follows_from_seed_and_epoch_alone() -> None:
    first = epoch_order(100, 0, 1)
    assert sorted(first.tolist()) == list(range(100))
    assert (first == epoch_order(100, 0, 1)).all()
    assert (first != epoch_order(100, 0, 2)).any() and (first != epoch_order(100, 1, 1)).any()
    assert (first == seeds.permutation(0, 100, "order", 1)).all()


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_augmentation_of_an_image_does_not_depend_on_its_batch(augment: str) -> None:
    dataset = synthetic(augment=augment)
    whole = augment_batch(dataset, np.arange(64), 3, 5)
    index = np.array([7, 60, 7, 0])
    assert (augment_batch(dataset, index, 3, 5) == whole[index]).all()
    assert (augment_batch(dataset, index[:1], 3, 5) == whole[7]).all()


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
@pytest.mark.parametrize(("padding", "mode"), [(2, "zero"), (4, "reflect"), (9, "reflect")])
def test_padded_images_give_the_bytes_of_images_that_a_batch_pads(
    augment: str, padding: int, mode: str
) -> None:
    dataset = dataclasses.replace(synthetic(), augment=augment, padding=padding, padding_mode=mode)
    index = np.array([7, 60, 7, 0])
    few = dataclasses.replace(dataset, train=dataset.train.take(np.arange(63, -1, -1)))
    for each in (dataset, few):
        padded = pad_images(each)
        assert padded is not None
        batch = augment_batch(each, index, 3, 5, padded)
        assert batch.flags.c_contiguous and batch.flags.writeable
        assert (batch == augment_batch(each, index, 3, 5)).all()
    assert augment_batch(dataset, index[:0], 3, 5, pad_images(dataset)).shape[0] == 0


def test_images_are_kept_padded_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("localpipe.data.batches.pad_images", lambda _: calls.append(True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for pin_memory in (False, True):
        reader = BatchReader(synthetic(augment="crop"), 0, pin_memory)
        reader.read_train(1, slice(0, 4))
        reader.read_train(2, slice(0, 4))
    assert calls == [True]
    assert pad_images(synthetic(augment="none")) is None


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmentation_changes_with_seed_and_epoch_and_repeats_with_the_same(augment: str) -> None:
    dataset, index = synthetic(augment=augment), np.arange(64)
    first = augment_batch(dataset, index, 0, 1)
    assert (first == augment_batch(dataset, index, 0, 1)).all()
    for other in (augment_batch(dataset, index, 1, 1), augment_batch(dataset, index, 0, 2)):
        assert (first != other).any(axis=(1, 2, 3)).mean() > 0.9


def test_without_augmentation_the_images_come_as_they_are_channels_first() -> None:
    dataset = synthetic(augment="none")
    batch = augment_batch(dataset, np.arange(64), 0, 1)
    assert batch.flags.c_contiguous and batch.dtype == np.uint8
    assert (batch == everything(dataset.train).transpose(0, 3, 1, 2)).all()


def places(
    original: np.ndarray, result: np.ndarray, padding: int, mode: str
) -> list[tuple[int, int, bool]]:
    """Return every (top, left, flipped) at which `result` is a crop of the padded `original`.

    Both are (C, H, W).
    """
    height, width = original.shape[1:]
    padded = np.pad(original, ((0, 0), (padding, padding), (padding, padding)), mode=mode)  # type: ignore[call-overload]
    found = []
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            sides = ((False, crop), (True, crop[..., ::-1]))
            found += [(top, left, flip) for flip, side in sides if (result == side).all()]
    return found


@pytest.mark.parametrize(
    ("augment", "padding", "mode"),
    [
        ("crop", 2, "zero"),
        ("crop", 4, "reflect"),
        ("crop_flip", 4, "zero"),
        ("crop_flip", 4, "reflect"),
    ],
)
def test_an_augmented_image_is_a_crop_of_the_padded_image(
    augment: str, padding: int, mode: str
) -> None:
    dataset = dataclasses.replace(synthetic(), augment=augment, padding=padding, padding_mode=mode)
    index = np.arange(64)
    result = augment_batch(dataset, index, 0, 1)
    assert result.flags.c_contiguous and result.dtype == np.uint8
    numpy_mode = {"zero": "constant"}.get(mode, mode)
    found = [
        places(a, b, padding, numpy_mode)
        for a, b in zip(read_batch(dataset.train, index), result, strict=True)
    ]
    assert all(len(one) == 1 for one in found)
    tops, lefts, flips = zip(*(one[0] for one in found), strict=True)
    wide = range(2 * padding + 1)
    assert set(tops) == set(wide) and set(lefts) == set(wide)
    assert (
        sum(top == left for top, left in zip(tops, lefts, strict=True)) < 32
    )  # drawn independently
    assert set(flips) == ({False} if augment == "crop" else {False, True})
    assert 0 <= sum(flips) < 48


@pytest.mark.parametrize("side", [1, 3, 4, 5])
def test_an_image_smaller_than_its_padding_can_be_augmented(tmp_path: Path, side: int) -> None:
    dataset = npz(
        tmp_path, arrays(x_train=images(20, side, side, 1), x_test=images(6, side, side, 1))
    )
    assert dataset.augment == "crop_flip" and dataset.padding == 4
    batch = augment_batch(dataset, np.arange(20), 0, 0)
    assert batch.shape == (20, 1, side, side)
    mode = "edge" if side <= 4 else "reflect"
    for before, after in zip(read_batch(dataset.train, np.arange(20)), batch, strict=True):
        assert places(before, after, 4, mode)


def test_an_image_that_is_not_square_keeps_its_shape(tmp_path: Path) -> None:
    dataset = npz(tmp_path, arrays(x_train=images(20, 6, 9), x_test=images(6, 6, 9)))
    assert dataset.sample == (3, 6, 9)
    assert augment_batch(dataset, np.arange(20), 0, 0).shape == (20, 3, 6, 9)
    recorded = Data(name="npz", root=str(tmp_path / "set.npz"), image_size=(6, 9))
    assert load_images(recorded, 0).sample == (3, 6, 9)
    assert "the images of npz are 6 x 9" in refusal(recorded.model_copy(update={"image_size": 6}))


# --- Splits and constants


def test_validation_images_are_held_out_of_train(tmp_path: Path) -> None:
    content = arrays(40, y_train=np.arange(40))
    dataset = npz(tmp_path, content, validation=10)
    assert dataset.validation is not None
    kept, held = set(dataset.train.labels.tolist()), set(dataset.validation.labels.tolist())
    assert len(dataset.validation.images) == 10 and len(dataset.train.images) == 30
    assert kept | held == set(range(40)) and not kept & held
    for split in (dataset.train, dataset.validation):
        assert (everything(split) == content["x_train"][split.labels]).all()
    assert npz(tmp_path, content).validation is None


def test_validation_images_follow_from_the_seed(tmp_path: Path) -> None:
    content = arrays(40, y_train=np.arange(40))

    def held(seed: int) -> list[int]:
        validation = npz(tmp_path, content, seed, validation=10).validation
        assert validation is not None
        labels: list[int] = validation.labels.tolist()
        return labels

    assert held(0) == held(0) != held(1)


def test_a_smaller_subset_is_the_beginning_of_a_larger_one_and_leaves_validation_alone(
    tmp_path: Path,
) -> None:
    content = arrays(40, y_train=np.arange(40))
    small, large = (npz(tmp_path, content, train_subset=n, validation=10) for n in (5, 25))
    whole = npz(tmp_path, content, validation=10)
    assert small.train.labels.tolist() == large.train.labels[:5].tolist()
    assert (everything(large.train) == content["x_train"][large.train.labels]).all()
    assert set(large.train.labels) < set(whole.train.labels) and len(set(large.train.labels)) == 25
    assert (
        large.validation
        and whole.validation
        and (large.validation.labels == whole.validation.labels).all()
    )
    assert (
        small.train.labels.tolist()
        != npz(tmp_path, content, 1, train_subset=5, validation=10).train.labels.tolist()
    )
    assert len(npz(tmp_path, content, train_subset=30, validation=10).train.labels) == 30


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"validation": 20},
            "data: data.validation is 20, but npz has 20 training images; set it to at most 19",
        ),
        (
            {"train_subset": 21},
            "data: data.train_subset is 21, but npz has 20 training images; set it to at most 20",
        ),
        (
            {"train_subset": 16, "validation": 5},
            "npz has 15 training images left after data.validation; set",
        ),
        (
            {"mean": (0.5,)},
            "data: data.mean has 1 numbers, but npz has 3 channels; "
            "give one number a channel, or auto",
        ),
        ({"std": (0.5, 0.5)}, "data: data.std has 2 numbers, but npz has 3 channels"),
        (
            {"mean": (0.5, float("nan"), 0.5)},
            "data: data.mean must be finite numbers; got [0.5, nan, 0.5]",
        ),
        (
            {"std": (0.5, 0.0, 0.5)},
            "data: data.std must be finite numbers above 0; got [0.5, 0.0, 0.5]",
        ),
        (
            {"image_size": 32},
            "data: data.image_size is 32, but the images of npz are 8 x 8; set it to auto",
        ),
    ],
)
def test_a_setting_that_does_not_fit_the_data_is_refused(
    tmp_path: Path, keys: dict[str, Any], line: str
) -> None:
    assert line in refusal(Data(name="npz", root=write(tmp_path, arrays()), **keys))


def test_auto_mean_and_std_are_those_of_the_training_images_alone(tmp_path: Path) -> None:
    content = arrays(300)  # more than are read at a time
    content["x_train"][..., 1] //= 3
    dataset = npz(tmp_path, content, validation=20)
    kept = everything(dataset.train) / 255
    assert len(kept) == 280
    np.testing.assert_allclose(dataset.mean, kept.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, kept.std((0, 1, 2)), rtol=1e-12)


def test_given_mean_and_std_are_taken_each_on_its_own(tmp_path: Path) -> None:
    computed = npz(tmp_path)
    given = npz(tmp_path, mean=(0.1, 0.2, 0.3))
    assert given.mean == (0.1, 0.2, 0.3) and given.std != (0.1, 0.2, 0.3)
    assert all(0.2 < value < 0.4 for value in given.std + computed.std)
    assert npz(tmp_path, std=(0.1, 0.2, 0.3)).std == (0.1, 0.2, 0.3)


def test_a_constant_channel_has_std_one(tmp_path: Path) -> None:
    dataset = npz(tmp_path, arrays(x_train=np.full((20, 8, 8, 3), 51, np.uint8)))
    assert dataset.mean == pytest.approx((0.2, 0.2, 0.2)) and dataset.std == (1.0, 1.0, 1.0)


def test_labels_beyond_the_outputs_of_the_network_are_refused(tmp_path: Path) -> None:
    dataset = npz(tmp_path, arrays(y_test=np.array([0, 1, 2, 3, 12, 0])))
    assert dataset.num_classes == 13
    check_labels(dataset, 13)
    with pytest.raises(
        UserError,
        match="largest label in y_test is 12, but model.num_classes is 10; .* at least 13",
    ):
        check_labels(dataset, 10)
    with pytest.raises(
        UserError, match="data: npz: the largest label in y_train is 3, but model.num_classes is 3"
    ):
        check_labels(dataset, 3)
    with pytest.raises(
        UserError, match="data: digits: the largest label in train is 9, but model.num_classes is 5"
    ):
        check_labels(load_images(Data(), 0), 5)


def test_a_validation_label_beyond_the_outputs_is_refused_too(tmp_path: Path) -> None:
    dataset = npz(tmp_path, arrays(40, y_train=np.arange(40)), validation=10)
    assert dataset.validation is not None
    few = dataclasses.replace(dataset, train=Split(dataset.train.images, np.zeros(30, np.int64)))
    with pytest.raises(UserError, match=f"y_train is {dataset.validation.labels.max()}"):
        check_labels(few, 4)


# --- digits and synthetic


def test_digits_are_split_once_and_for_all_into_1437_and_360() -> None:
    first, second = load_images(Data(), 0), load_images(Data(), 1)
    assert (len(first.train.images), len(first.test.images)) == (1437, 360)
    assert first.sample == (3, 32, 32) and first.num_classes == 10
    assert (first.augment, first.padding, first.padding_mode) == ("crop", 2, "zero")
    for a, b in ((first.train, second.train), (first.test, second.test)):
        assert (everything(a) == everything(b)).all() and (a.labels == b.labels).all()
        assert set(a.labels) == set(range(10))
    assert not rows(everything(first.train)) & rows(everything(first.test))
    # Accuracies of two releases can be compared only while this stands.
    content = everything(first.test).tobytes() + first.test.labels.astype(np.uint8).tobytes()
    assert hashlib.sha256(content).hexdigest().startswith("0bbeaf099d2ff16f")


def test_digits_are_all_of_scikit_learns_with_their_labels_in_the_whole_range() -> None:
    from sklearn import datasets

    dataset, originals = load_images(Data(), 0), datasets.load_digits()
    both = np.concatenate([everything(dataset.train), everything(dataset.test)])
    assert both.min() == 0 and both.max() == 255
    assert (both[..., 0] == both[..., 1]).all() and (both[..., 0] == both[..., 2]).all()
    expected = enlarge(originals.images.astype(int))[..., 0]
    of = {image.tobytes(): label for image, label in zip(expected, originals.target, strict=True)}
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    assert [of[image[..., 0].tobytes()] for image in both] == labels.tolist()


def test_enlarging_is_bilinear_between_the_centres_of_the_pixels() -> None:
    ramp = enlarge(np.tile(np.arange(8), (1, 8, 1)))[0]
    expected = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7) * 255 / 16
    np.testing.assert_allclose(ramp[..., 0], np.tile(expected, (32, 1)), atol=0.5)


def test_digits_ask_to_be_normalised_by_their_own_mean() -> None:
    dataset = load_images(Data(), 0)
    values = everything(dataset.train) / 255
    np.testing.assert_allclose(dataset.mean, values.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(dataset.std, values.std((0, 1, 2)), rtol=1e-9)


@pytest.mark.parametrize(("samples", "test"), [(64, 16), (3, 2)])
def test_synthetic_images_have_the_sizes_asked_for(samples: int, test: int) -> None:
    dataset = synthetic(samples, image_size=11)
    assert synthetic(samples, image_size=(5, 7)).sample == (3, 5, 7)
    assert (len(dataset.train.images), len(dataset.test.images)) == (samples, test)
    assert dataset.sample == (3, 11, 11) and dataset.num_classes == 10 and dataset.augment == "none"
    assert everything(dataset.train).shape == (samples, 11, 11, 3)
    assert synthetic(samples, image_size="auto").sample == (3, 32, 32)


def test_synthetic_images_are_the_same_for_every_seed_and_differ_from_each_other() -> None:
    a, b = synthetic(seed=0), synthetic(seed=1)
    assert (everything(a.train) == everything(b.train)).all()
    assert len(rows(everything(a.train)) | rows(everything(a.test))) == 64 + 16


def test_synthetic_classes_can_be_told_apart_by_their_mean_image() -> None:
    dataset = synthetic(400)
    x, y = everything(dataset.train).astype(float), dataset.train.labels
    means = np.stack([x[y == k].mean(0) for k in range(10)])
    test = everything(dataset.test).astype(float)
    guess = ((test[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert (guess == dataset.test.labels).mean() > 0.95


# --- npz


def test_npz_gives_back_the_arrays_of_the_file(tmp_path: Path) -> None:
    content = arrays()
    dataset = npz(tmp_path, content)
    assert dataset.sample == (3, 8, 8) and dataset.num_classes == 4
    assert (dataset.augment, dataset.padding, dataset.padding_mode) == ("crop_flip", 4, "reflect")
    assert (everything(dataset.train) == content["x_train"]).all()
    assert (everything(dataset.test) == content["x_test"]).all()
    assert (
        dataset.train.labels.dtype == np.int64
        and (dataset.train.labels == content["y_train"]).all()
    )
    picked = dataset.train.images.read(np.array([3, 1, 3]))
    assert picked.flags.c_contiguous and (picked == content["x_train"][[3, 1, 3]]).all()


@pytest.mark.parametrize("trailing", [(), (1,)])
def test_gray_images_have_one_channel_and_column_labels_are_accepted(
    tmp_path: Path, trailing: tuple[int, ...]
) -> None:
    content = arrays(y_train=(np.arange(20, dtype=np.uint8) % 4)[:, None])
    gray = {
        name: content[name][..., 0].reshape(-1, 8, 8, *trailing) for name in ("x_train", "x_test")
    }
    dataset = npz(tmp_path, {**content, **gray})
    assert dataset.sample == (1, 8, 8) and len(dataset.mean) == 1
    assert (everything(dataset.train)[..., 0] == content["x_train"][..., 0]).all()
    assert dataset.train.labels.shape == (20,)


def test_a_fortran_ordered_file_is_read_in_c_order(tmp_path: Path) -> None:
    content = arrays()
    dataset = npz(tmp_path, {**content, "x_train": np.asfortranarray(content["x_train"])})
    batch = dataset.train.images.read(np.arange(5))
    assert batch.flags.c_contiguous and (batch == content["x_train"][:5]).all()


LABELS = np.arange(20) % 4


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"x_train": images(20).astype(np.float32)},
            "x_train is float32 (20, 8, 8, 3); expected uint8 (N, H, W, 3), ",
        ),
        (
            {"x_test": images(6).astype(np.int64)},
            "x_test is int64 (6, 8, 8, 3); expected uint8 (N, H, W, 3), ",
        ),
        (
            {"x_train": images(20).transpose(0, 3, 1, 2)},
            "x_train is uint8 (20, 3, 8, 8); expected uint8 (N, H, W, 3)",
        ),
        ({"x_train": images(20, channels=4)}, "x_train is uint8 (20, 8, 8, 4); expected"),
        ({"x_train": images(20).reshape(20, -1)}, "x_train is uint8 (20, 192); expected"),
        ({"x_train": np.uint8(3)}, "x_train is uint8 (); expected"),
        (
            {"x_train": images(0), "y_train": LABELS[:0]},
            "x_train is empty, uint8 (0, 8, 8, 3); expected",
        ),
        ({"x_test": images(6, 0)}, "x_test is empty, uint8 (6, 0, 8, 3); expected"),
        (
            {"x_test": images(6, 9)},
            "an image of x_train is (8, 8, 3), of x_test (9, 8, 3); expected the same",
        ),
        (
            {"x_test": images(6, channels=1)},
            "an image of x_train is (8, 8, 3), of x_test (8, 8, 1); expected the same",
        ),
        ({"y_train": LABELS[:19]}, "y_train has 19 labels for the 20 images of x_train"),
        ({"y_test": LABELS[:7]}, "y_test has 7 labels for the 6 images of x_test"),
        ({"y_train": LABELS - 1}, "y_train has the label -1; expected 0 .. num_classes - 1"),
        (
            {"y_train": LABELS.astype(np.uint64) + np.uint64(2**63)},
            "y_train has the label 9223372036854775811",
        ),
        (
            {"y_train": LABELS.astype(np.float32)},
            "y_train is float32 (20,); expected integers (N,)",
        ),
        ({"y_train": LABELS * np.nan}, "y_train is float64 (20,); expected integers (N,)"),
        (
            {"y_train": LABELS.astype("timedelta64[s]")},
            "y_train is timedelta64[s] (20,); expected integers (N,)",
        ),
        (
            {"y_train": np.eye(4, dtype=np.int64)[LABELS]},
            "y_train is int64 (20, 4); expected integers (N,)",
        ),
        ({"y_train": np.array(3)}, "y_train is int64 (); expected integers (N,)"),
        (
            {"x_train": None, "X_train": images(20)},
            "has no array x_train; expected x_train, y_train, x_test, y_test",
        ),
        (
            {"y_test": None},
            "expected x_train, y_train, x_test, y_test; got x_train, y_train, x_test",
        ),
        (
            {"y_train": np.array([object()] * 20)},
            "cannot read y_train (Object arrays cannot be loaded",
        ),
    ],
)
def test_npz_refuses_wrong_arrays(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    path = write(tmp_path, arrays(**changes))
    text = refusal(Data(name="npz", root=path))
    assert line in text and path in text


def test_npz_never_unpickles(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    refusal(
        Data(
            name="npz", root=write(tmp_path, arrays(y_train=np.array([Trap()] * 20, dtype=object)))
        )
    )
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap()))
    refusal(Data(name="npz", root=str(tmp_path / "bare.npz")))
    assert not (tmp_path / "sprung").exists()


def test_npz_says_what_is_wrong_with_a_path(tmp_path: Path) -> None:
    good = write(tmp_path, arrays())
    assert f"did you mean {good}?" in refusal(Data(name="npz", root=str(tmp_path / "sets.npz")))
    missing = refusal(Data(name="npz", root=str(tmp_path / "no" / "other.npz")))
    assert "other.npz does not exist; set data.root to an .npz file" in missing
    folder = refusal(Data(name="npz", root=str(tmp_path)))
    assert (
        "is a folder; expected one .npz file with x_train, y_train, x_test, y_test; "
        "set data.root to it" in folder
    )


def test_npz_refuses_a_pipe_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "set.npz")
    with pytest.raises(UserError, match=r"set\.npz is a pipe or a device; set data\.root to an"):
        load_images(Data(name="npz", root=str(tmp_path / "set.npz")), 0)


def test_npz_that_does_not_fit_into_memory_is_not_called_damaged(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000, 9999, 9999, 3), }\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", member)
    with pytest.raises(UserError, match="npz does not fit into memory; take fewer"):
        load_images(Data(name="npz", root=str(tmp_path / "set.npz")), 0)


def test_npz_refuses_every_truncation_of_a_file(tmp_path: Path) -> None:
    whole = Path(write(tmp_path, arrays())).read_bytes()
    cut = tmp_path / "cut.npz"
    for length in (0, 1, 3, 4, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        assert "cut.npz is no .npz file that can be read (" in refusal(
            Data(name="npz", root=str(cut))
        )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_refuses_damaged_bytes_inside_an_array(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "set.npz"
    save(path, **arrays())
    content = bytearray(path.read_bytes())
    content[400:440] = bytes(byte ^ 255 for byte in content[400:440])
    path.write_bytes(content)
    assert f"{path}: cannot read x_train (" in refusal(Data(name="npz", root=str(path)))


def test_npz_refuses_files_of_other_kinds(tmp_path: Path) -> None:
    path, names = tmp_path / "set.npz", "x_train, y_train, x_test, y_test"
    with path.open("wb") as file:
        np.save(file, images(3))
    assert f"holds a single array; expected {names}" in refusal(Data(name="npz", root=str(path)))
    path.write_text("not an archive")
    assert "is no .npz file that can be read (" in refusal(Data(name="npz", root=str(path)))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train", "a text")
    assert "x_train is not an array" in refusal(Data(name="npz", root=str(path)))
    with zipfile.ZipFile(path, "w"):
        pass
    assert f"has no array x_train; expected {names}; got nothing" in refusal(
        Data(name="npz", root=str(path))
    )


# --- torchvision's files


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", "train_32x32.mat"),
        ("stl10", "stl10_binary"),
    ],
)
def test_missing_and_damaged_torchvision_files_are_told_apart(
    tmp_path: Path, name: str, holds: str
) -> None:
    missing = refusal(Data(name=name, root=str(tmp_path)))
    expected = (
        f"{name} is not in {tmp_path}; set data.download=true, "
        f"or data.root to the folder that holds {holds}"
    )
    assert missing == f"data: {expected}"
    (tmp_path / holds).touch() if name == "svhn" else (tmp_path / holds).mkdir()
    damaged = refusal(Data(name=name, root=str(tmp_path)))
    assert f"{name} in {tmp_path} is incomplete or damaged (" in damaged
    assert f"remove {holds} and set data.download=true" in damaged


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: Any) -> None:
        raise OSError("<urlopen error no route\nto host>.")

    monkeypatch.setattr(tv.CIFAR10, "download", offline)
    text = refusal(Data(name="cifar10", root=str(tmp_path), download=True))
    assert (
        f"cannot download cifar10 to {tmp_path} (<urlopen error no route to host>); set data.root"
        in text
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10", "image_folder"])
def test_an_npz_root_under_another_name_points_to_npz(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, arrays())
    assert refusal(Data(name=name, root=path)) == (
        f"data: {path} is an .npz file, {name} is read from a folder; set data.name=npz"
    )


def write_cifar(folder: Path, name: str, x: np.ndarray, y: np.ndarray, key: str) -> None:
    folder.mkdir(exist_ok=True)
    flat = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    (folder / name).write_bytes(pickle.dumps({"data": flat, key: y.tolist()}))


def write_stl(folder: Path, part: str, x: np.ndarray, y: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    x.transpose(0, 3, 2, 1).tofile(folder / f"{part}_X.bin")  # STL-10 is stored column by column
    (y + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")


def write_svhn(folder: Path, part: str, x: np.ndarray, y: np.ndarray) -> None:
    from scipy.io import savemat

    savemat(
        folder / f"{part}_32x32.mat",
        {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y)[:, None]},
    )


def fake_torchvision(
    name: str, folder: Path, patch: pytest.MonkeyPatch, splits: dict[str, Any]
) -> None:
    """Write files in torchvision's formats, and remove the published checksums from its classes."""
    (x, y), (x_test, y_test) = splits["train"], splits["test"]
    if name in ("cifar10", "cifar100"):
        cls = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
        inner, key = (
            folder / cls.base_folder,
            {"cifar10": "labels", "cifar100": "fine_labels"}[name],
        )
        write_cifar(inner, "a", x, y, key)
        write_cifar(inner, "b", x_test, y_test, key)
        (inner / "meta").write_bytes(pickle.dumps({"names": ["x"]}))
        patch.setattr(cls, "train_list", [["a", None]])
        patch.setattr(cls, "test_list", [["b", None]])
        patch.setattr(cls, "meta", {"filename": "meta", "key": "names", "md5": None})
    elif name == "stl10":
        write_stl(folder / "stl10_binary", "train", x, y)
        write_stl(folder / "stl10_binary", "test", x_test, y_test)
        patch.setattr(tv.STL10, "train_list", [["train_X.bin", None], ["train_y.bin", None]])
        patch.setattr(tv.STL10, "test_list", [["test_X.bin", None], ["test_y.bin", None]])
    else:
        write_svhn(folder, "train", x, y)
        write_svhn(folder, "test", x_test, y_test)
        patch.setattr(
            tv.SVHN,
            "split_list",
            {part: ["", f"{part}_32x32.mat", None] for part in ("train", "test", "extra")},
        )


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "side", "classes", "recipe", "mean", "std"),
    [
        ("cifar10", 32, 10, ("crop_flip", 4, "reflect"), (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
        (
            "cifar100",
            32,
            100,
            ("crop_flip", 4, "reflect"),
            (129.3, 124.1, 112.4),
            (68.2, 65.4, 70.4),
        ),
        ("svhn", 32, 10, ("crop", 2, "zero"), (127.5,) * 3, (127.5,) * 3),
        ("stl10", 96, 10, ("crop_flip", 4, "zero"), (127.5,) * 3, (127.5,) * 3),
    ],
)
def test_torchvision_files_are_read_with_their_published_recipe(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    side: int,
    classes: int,
    recipe: tuple[str, int, str],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    splits = {
        part: (images(n, side, side), np.arange(n) % 4) for part, n in (("train", 9), ("test", 5))
    }
    fake_torchvision(name, tmp_path, monkeypatch, splits)
    dataset = load_images(Data(name=name, root=str(tmp_path)), 0)
    for split, (x, y) in ((dataset.train, splits["train"]), (dataset.test, splits["test"])):
        batch = everything(split)
        assert batch.flags.c_contiguous and (batch == x).all()
        assert split.labels.dtype == np.int64 and (split.labels == y).all()
    assert dataset.num_classes == classes and dataset.sample == (3, side, side)
    assert (dataset.augment, dataset.padding, dataset.padding_mode) == recipe
    assert dataset.mean == pytest.approx([value / 255 for value in mean])
    assert dataset.std == pytest.approx([value / 255 for value in std])


def test_the_extra_images_of_svhn_come_after_those_of_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {
        part: (images(n, 32, 32), np.arange(n) % 4) for part, n in (("train", 9), ("test", 5))
    }
    fake_torchvision("svhn", tmp_path, monkeypatch, splits)
    config = Data(name="svhn", root=str(tmp_path), extra=True)
    assert "remove extra_32x32.mat" not in refusal(config)
    assert "that holds extra_32x32.mat" in refusal(config)
    x, y = images(6, 32, 32), np.arange(6) % 4
    write_svhn(tmp_path, "extra", x, y)
    dataset = load_images(config, 0)
    assert (everything(dataset.train) == np.concatenate([splits["train"][0], x])).all()
    assert dataset.train.labels.tolist() == [*(np.arange(9) % 4), *y]
    assert len(dataset.test) == 5
    plain = load_images(Data(name="svhn", root=str(tmp_path)), 0)
    assert len(plain.train) == 9 and plain.sha256 != dataset.sha256


@pytest.mark.parametrize("padding", [1, 3])
@pytest.mark.parametrize("mode", ["reflect", "zero"])
def test_a_border_that_is_asked_for_is_cropped_from(padding: int, mode: str) -> None:
    keys: dict[str, Any] = {"padding": padding, "padding_mode": mode}
    dataset = synthetic(augment="crop", **keys)
    own = replace(synthetic(augment="crop"), padding=padding, padding_mode=mode)
    index = np.arange(64)
    assert (augment_batch(dataset, index, 0, 1) == augment_batch(own, index, 0, 1)).all()
    other = augment_batch(synthetic(augment="crop"), index, 0, 1)
    assert (augment_batch(dataset, index, 0, 1) != other).any()


def test_an_augmentation_that_is_asked_for_replaces_the_recipe() -> None:
    assert load_images(Data(augment="none"), 0).augment == "none"
    flipped = load_images(Data(augment="crop_flip"), 0)
    assert (flipped.augment, flipped.padding, flipped.padding_mode) == ("crop_flip", 2, "zero")


# --- image_folder


def folder_of_images(
    root: Path, size: tuple[int, int] = (10, 8), classes: tuple[str, ...] = ("cat", "dog")
) -> Path:
    """Write two PNGs a class and part, (width, height) = size."""
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(images(1, size[1], size[0])[0]).save(
                    root / part / name / f"{i}.png"
                )
    return root


def test_image_folder_reads_squares_cut_from_the_centre(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path)
    dataset = load_images(Data(name="image_folder", root=str(root), image_size=8), 0)
    assert (
        dataset.sample == (3, 8, 8) and dataset.num_classes == 2 and dataset.augment == "crop_flip"
    )
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    dog = np.asarray(Image.open(tmp_path / "train" / "dog" / "1.png"))
    batch = dataset.train.images.read(np.array([3, 0]))
    assert batch.flags.c_contiguous and (batch[0] == dog[:, 1:9]).all()
    values = everything(dataset.train) / 255
    np.testing.assert_allclose(dataset.mean, values.mean((0, 1, 2)), rtol=1e-9)
    assert augment_batch(dataset, np.arange(4), 0, 0).shape == (4, 3, 8, 8)
    assert dataset.train.images.read(np.arange(0)).shape == (0, 8, 8, 3)


def test_image_folder_resizes_the_shorter_side(tmp_path: Path) -> None:
    folder_of_images(tmp_path)
    for part in ("train", "test"):
        for file in (tmp_path / part).glob("*/*.png"):
            Image.fromarray(np.full((20, 40), 77, np.uint8)).save(
                file
            )  # gray, twice as wide as high
    left, right = np.zeros((20, 40, 3), np.uint8), np.zeros((20, 40, 3), np.uint8)
    left[:, :10], right[:, 30:] = 255, 255  # just what the crop takes away
    Image.fromarray(left | right).save(tmp_path / "train" / "cat" / "0.png")
    dataset = load_images(Data(name="image_folder", root=str(tmp_path), image_size=10), 0)
    batch = everything(dataset.train)
    assert (
        batch.shape == (4, 10, 10, 3) and (batch[1:] == 77).all() and (batch[0, :, 1:-1] == 0).all()
    )


def test_image_folder_fits_images_into_a_rectangle(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path, (10, 8))
    dataset = load_images(Data(name="image_folder", root=str(root), image_size=(8, 6)), 0)
    cat = np.asarray(Image.open(root / "train" / "cat" / "0.png"))
    assert dataset.sample == (3, 8, 6) and (everything(dataset.train)[0] == cat[:, 2:8]).all()


def test_image_folder_caps_the_automatic_size(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path, (300, 260))
    assert load_images(Data(name="image_folder", root=str(root)), 0).sample == (3, 224, 224)


def test_image_folder_decodes_only_what_is_read(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path)
    broken = root / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    dataset = load_images(Data(name="image_folder", root=str(root), mean=HALF, std=HALF), 0)
    dataset.train.images.read(np.array([0, 1, 2]))
    with pytest.raises(
        RunError, match=r"data: .*dog/1.png cannot be read as an image \(.*\); mend it"
    ):
        augment_batch(dataset, np.array([0, 3]), 0, 0)


@pytest.mark.parametrize("bad", ["0.png", "1.png"])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_image_folder_refuses_an_image_that_is_broken_at_the_start(
    tmp_path: Path, bad: str, content: bytes
) -> None:
    root = folder_of_images(tmp_path)
    file = root / "train" / "cat" / bad
    file.write_bytes(content)
    assert f"data: {file} cannot be read as an image (" in refusal(
        Data(name="image_folder", root=str(root))
    )


def test_image_folder_refuses_a_folder_that_is_not_laid_out_as_it_should_be(tmp_path: Path) -> None:
    config = Data(name="image_folder", root=str(tmp_path))
    train, test = tmp_path / "train", tmp_path / "test"
    assert (
        f"{train} is not a folder; expected {tmp_path}/train and {tmp_path}/test with"
        in refusal(config)
    )
    train.mkdir()
    assert f"{train} has no class folders; expected a folder of images per class" in refusal(config)
    (train / "cat").mkdir()
    (train / "cat" / "notes.txt").touch()
    assert f"{train / 'cat'} has no images; fill or remove it" in refusal(config)
    Image.new("RGB", (4, 4)).save(train / "cat" / "0.png")
    assert f"{test} is not a folder" in refusal(config)
    (test / "dog").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(test / "dog" / "0.png")
    assert (
        f"{test} has a class 'dog', which is not one of the 1 that are trained; choose one of cat"
        in refusal(config)
    )


# --- what is left


def test_an_unknown_data_set_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        UserError, match="config: data.name has no 'cifar01'; did you mean cifar10?"
    ):
        load_images(Data(name="cifar01"), 0)


def test_data_that_does_not_fit_into_memory_is_refused() -> None:
    text = refusal(Data(name="synthetic", samples=10**7, image_size=10**4))
    assert text == "data: synthetic does not fit into memory; take fewer or smaller images"


@pytest.mark.parametrize("name", ["shapes", "areas", "bytes"])
@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"classes": ("a", "b")}, "data.classes has the names ['a', 'b'], but NAME has "),
        ({"padding": 1}, "data.padding is for images that localpipe crops itself, and NAME gives "),
        ({"padding_mode": "zero"}, "data.padding_mode is for images that localpipe crops itself"),
    ],
)
def test_samples_refuse_what_they_would_not_record(
    tmp_path: Path, name: str, keys: dict[str, Any], text: str
) -> None:
    (tmp_path / "text").write_bytes(bytes(5000))
    values: dict[str, Any] = {"root": str(tmp_path), "samples": 8, "image_size": 8, **keys}
    if name == "bytes":
        values = {**values, "length": 16, "image_size": None, "test": 0.5}
    with pytest.raises(UserError) as caught:
        load(Data(name=name, **values), 0)
    assert text.replace("NAME", name) in str(caught.value)
    assert str(caught.value).endswith(("; leave data.classes out", "=auto"))
