"""A user's Dataset: what is read, what is refused in one line, and that nothing is left over."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from localpipe import data, seeds
from localpipe.config.keys import Data, TaskKeys
from localpipe.data.batches import BatchReader
from localpipe.data.dataset import Dataset, limit_classes
from localpipe.data.samples import Request
from localpipe.data.user.items import BadItemError, ItemFormat, convert_item
from localpipe.data.user.splits import call_function, describe_splits
from localpipe.data.user.user_dataset import UserLoader, UserSplit
from localpipe.data.user.wire import Progress
from localpipe.errors import RunError, UserError

SETS = "tests.data.user.sets"


def load(name: str, **keys: Any) -> Dataset:
    """Return a data set of `sets.py`, read as a run reads it."""
    return data.load(Data(name=f"{SETS}:{name}", **keys), seed=3)


@pytest.fixture
def progress() -> Progress:
    file = os.memfd_create("test")
    os.ftruncate(file, Progress.SIZE)
    return Progress(file)


def describe(name: str, progress: Progress) -> dict[str, Any]:
    """Return what a loader process says of a data set, found in this process."""
    with seeds.preserved_generators():
        return describe_splits(call_function(f"{SETS}:{name}", progress), None)[0]


def read(dataset: Dataset, *requests: Request) -> list[Mapping[str, Tensor]]:
    return list(BatchReader(dataset, seed=3).iterate(requests))


def train(epoch: int, start: int, stop: int) -> Request:
    return Request("train", epoch, slice(start, stop))


@pytest.fixture(scope="module")
def stripes() -> Dataset:
    dataset = load("stripes")
    close(dataset)
    return dataset


def close(dataset: Dataset) -> None:
    """End the processes that a data set keeps until it is dropped."""
    assert dataset.inputs is not None and isinstance(dataset.inputs.loader, UserLoader)
    dataset.inputs.loader.pool.close()


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fail where a test leaves a process of its own."""
    yield
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [child for child in psutil.Process().children() if "loader_process" in words(child)]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"left over: {left}")


def words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


# -- what is read -------------------------------------------------------------------------------


def test_images_of_bytes_are_described_and_measured(stripes: Dataset) -> None:
    assert (stripes.sample, stripes.num_classes) == ((3, 8, 8), 4)
    assert (len(stripes.train), len(stripes.test)) == (90, 30)
    assert stripes.inputs is not None
    assert (stripes.inputs.dtype, stripes.inputs.task) == (None, "classification")
    # Half of 60 and of three times 20, and 120 in an eighth of the rows.
    expected = (29.5 + 28.5 + 120 / 8) / 255
    assert stripes.mean == pytest.approx((expected,) * 3, abs=0.01)
    np.testing.assert_array_equal(stripes.train.labels, np.arange(90) % 4)


def test_mean_and_std_that_are_given_stay() -> None:
    dataset = load("stripes", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert (dataset.mean, dataset.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_batches_do_not_depend_on_the_number_of_loader_processes(stripes: Dataset) -> None:
    requests = [train(1, 0, 16), train(1, 16, 32), Request("test", 1, slice(0, 30)), train(2, 5, 9)]
    one = read(stripes, *requests)
    three = read(load("stripes", workers=3), *requests)
    for first, second in zip(one, three, strict=True):
        assert first.keys() == {"image", "target"}
        assert first["image"].dtype == torch.uint8
        for name in first:
            assert torch.equal(first[name], second[name])


def test_an_item_is_drawn_from_seed_epoch_and_index_alone(stripes: Dataset) -> None:
    order = BatchReader(stripes, seed=3).order(1)
    again = int(np.flatnonzero(BatchReader(stripes, seed=3).order(2) == order[4])[0])
    alone, batch, later = read(stripes, train(1, 4, 5), train(1, 0, 8), train(2, again, again + 1))
    assert torch.equal(alone["image"][0], batch["image"][4])
    assert not torch.equal(alone["image"], later["image"])
    assert torch.equal(alone["target"], later["target"])


def test_rows_that_are_taken_are_items_of_the_users_split() -> None:
    dataset = load("stripes", validation=10, train_subset=20)
    validation, part = dataset.validation, dataset.train
    assert isinstance(validation, UserSplit) and isinstance(part, UserSplit)
    assert (len(validation), len(part)) == (10, 20)
    assert set(validation.rows).isdisjoint(part.rows)
    assert any("data.validation" in note for note in dataset.notes)
    batch, first = read(dataset, Request("validation", 2, slice(0, 10)), train(1, 0, 20))
    np.testing.assert_array_equal(batch["target"], validation.rows % 4)
    order = BatchReader(dataset, seed=3).order(1)
    np.testing.assert_array_equal(first["target"], part.rows[order] % 4)


def test_a_split_that_is_drawn_at_random_is_the_same_in_every_process() -> None:
    first, second = load("subset"), load("subset", workers=2)
    assert first.sha256 == second.sha256
    assert first.classes == ("a", "b", "c", "d")
    np.testing.assert_array_equal(first.train.labels, second.train.labels)
    one, two = read(second, train(1, 0, 9), train(1, 9, 18))
    order = BatchReader(second, seed=3).order(1)
    labels = second.train.labels
    assert labels is not None
    np.testing.assert_array_equal(torch.cat([one["target"], two["target"]]), labels[order[:18]])


@pytest.mark.parametrize(
    ("name", "task", "outputs", "shape", "dtype"),
    [
        ("floats", "classification", 3, (6,), "float32"),
        ("unknown_classes", "classification", 0, (6,), "float32"),
        ("dicts", "classification", 2, (4,), "float32"),
        ("numbers", "regression", 1, (3,), "float32"),
        ("masks", "segmentation", 5, (3, 8, 6), None),
        ("tokens", "next_token", 9, (6,), "int64"),
        ("unclear", "", 2, (4,), "float32"),
    ],
)
def test_the_task_follows_from_the_shapes(
    name: str, task: str, outputs: int, shape: tuple[int, ...], dtype: str | None
) -> None:
    dataset = load(name, vocabulary=9)
    assert dataset.inputs is not None
    assert (dataset.inputs.task, dataset.num_classes) == (task, outputs)
    assert (dataset.sample, dataset.inputs.dtype) == (shape, dtype)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_generator", "item 0 of train differs when it is read twice under one seed"),
        ("empty", "test of .* has no items"),
        ("stream", "train of .* is an IterableDataset .* whose items have no index"),
        ("three", "returned tuple; expected"),
        ("failing", "fails: FileNotFoundError: no folder photos"),
        ("listed_wrong", "item 20 of train has the label 7, expected 0 to 3"),
        ("picture", "item 0 of train has an input of class PIL.Image.Image"),
        ("channels_last", r"looks like \(H, W, C\)"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_a_faulty_data_set_is_refused_before_the_first_step(
    name: str, words: str, progress: Progress
) -> None:
    with pytest.raises(UserError, match=words) as error:
        describe(name, progress)
    assert str(error.value).startswith("data: ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong_shape", r"has an input of shape \(7,\), expected \(6,\) as item 0 of train"),
        ("wrong_dtype", "has a target of float32, expected int64 as item 0 of train"),
        ("raising", "fails with KeyError: 'no file 37'; its traceback is above"),
        ("wrong_label", "has the label 3, expected 0 to 2"),
        ("wrong_device", "has an input on device meta, expected cpu"),
    ],
)
def test_a_faulty_item_ends_the_reading_with_its_index(
    name: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = limit_classes(load(name), TaskKeys(name="classification"), 3)
    with pytest.raises(RunError, match=f"^data: item 37 of train {words}"):
        read(dataset, *[train(1, start, start + 8) for start in range(0, 80, 8)])
    if name == "raising":
        assert 'raise KeyError(f"no file {index}")' in capfd.readouterr().err


def test_a_pixel_that_is_no_class_ends_the_reading_with_its_index() -> None:
    keys = TaskKeys(name="segmentation")
    batch = read(limit_classes(load("squares"), keys, 3), train(1, 0, 80))
    assert batch
    with pytest.raises(RunError, match="^data: item 37 of train has the pixel -1, expected 0 to 2"):
        read(limit_classes(load("wrong_pixel"), keys, 3), train(1, 0, 80))


def test_probabilities_that_do_not_sum_to_1_end_the_reading_with_the_index() -> None:
    dataset = load("wrong_probabilities")
    read(dataset, train(1, 0, 80))  # as numbers they are right
    soft = limit_classes(dataset, TaskKeys(name="classification"), 2)
    with pytest.raises(RunError, match="^data: item 37 of train has a target .* sums to 2, exp"):
        read(soft, train(1, 0, 80))


def test_an_item_that_takes_too_long_ends_the_reading_with_its_index() -> None:
    dataset = load("sleeping", timeout_s=1.0)
    with pytest.raises(RunError, match=r"reading item 37 of train has not ended after .* 1;"):
        read(dataset, train(1, 0, 80))


def test_a_loader_process_that_is_killed_ends_the_reading_with_the_item() -> None:
    dataset = load("dying")
    with pytest.raises(RunError, match="reading item 37 of train: .* was killed by SIGKILL"):
        read(dataset, train(1, 0, 80))


def test_tokens_need_a_vocabulary() -> None:
    with pytest.raises(UserError, match="set data.vocabulary"):
        load("tokens")
    with pytest.raises(UserError, match="item 0 of train has the token 5, expected 0 to 4"):
        load("tokens", vocabulary=5)


# -- an item ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "inputs", "targets"),
    [
        ((torch.zeros(2, dtype=torch.bfloat16), 1), "float32", "int64"),
        ((np.zeros(2, np.float64), True), "float32", "int64"),
        ((np.zeros(2, bool), np.uint8(3)), "float32", "int64"),
        ((np.zeros(2, np.int16), 0.5), "int64", "float32"),
        ([torch.zeros(2), torch.zeros(3)], "float32", "float32"),
        ((torch.zeros(3, 4, 4), torch.full((4, 4), -1)), "float32", "int64"),
        ((torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8)), "float32", "uint8"),
        ({"labels": torch.tensor(1), "x": torch.zeros(2), "id": 3}, "float32", "int64"),
    ],
)
def test_an_item_becomes_two_arrays_of_few_dtypes(item: Any, inputs: str, targets: str) -> None:
    given, target = convert_item(item)
    assert (given.dtype.name, target.dtype.name) == (inputs, targets)
    form = ItemFormat.of((given, target))
    assert ItemFormat.from_json(form.to_json()) == form
    form.check((given, target))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (torch.zeros(2), "is a Tensor; expected"),
        ((1, 2, 3), "is a tuple of 3 values"),
        ({"label": 1}, "is a dict of label"),
        ({"label": 1, "a": torch.zeros(1), "b": torch.zeros(1)}, "is a dict of label, a, b"),
        ((torch.zeros(2, dtype=torch.complex64), 1), "expected real numbers"),
        (("text", 1), "has an input of class builtins.str"),
        ((torch.zeros(2).to_sparse(), 1), "expected a dense tensor"),
    ],
)
def test_an_item_of_another_kind_is_refused(item: Any, words: str) -> None:
    with pytest.raises(BadItemError, match=words):
        convert_item(item)


def test_bytes_that_are_no_image_are_refused() -> None:
    with pytest.raises(BadItemError, match=r"expected an image \(C, H, W\)"):
        ItemFormat.of(convert_item((np.zeros((8, 8), np.uint8), 0)))
