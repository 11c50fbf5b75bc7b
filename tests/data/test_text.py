"""Text as bytes and as files of tokens: windows, splits, digests, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localpipe import config as configs
from localpipe import data
from localpipe.data.dataset import Dataset, check_labels
from localpipe.data.text.byte_files import TextFile, split_files
from localpipe.data.text.windows import Windows
from localpipe.errors import UserError


def load(**keys: Any) -> Dataset:
    given = configs.parse({"data": {"length": 4, **keys}}, "test")
    return data.load(given.data, 0)


def read_all(dataset: Dataset, split: str) -> dict[str, Any]:
    samples = getattr(dataset, split)
    return dict(samples.read(np.arange(len(samples))))


def write_files(folder: Path, count: int = 20) -> Path:
    """Write files of different texts, some in a folder, and one hidden file."""
    (folder / "deep").mkdir(parents=True)
    for number in range(count):
        place = folder / "deep" if number % 2 else folder
        (place / f"{number}.txt").write_bytes(bytes([number]) * (10 + number))
    (folder / ".hidden").write_bytes(b"hidden text")
    return folder


def write_tokens(folder: Path, dtype: str = "<u2", train: int = 11, largest: int = 99) -> Path:
    folder.mkdir(exist_ok=True)
    tokens = np.arange(train, dtype=dtype)
    tokens[-1] = largest
    tokens.tofile(folder / "train.bin")
    np.arange(9, dtype=dtype).tofile(folder / "val.bin")
    return folder


def test_windows_do_not_overlap_and_their_targets_are_one_token_later() -> None:
    windows = Windows.cut(np.arange(10, dtype=np.uint8), 3)
    batch = windows.read(np.arange(len(windows)))
    assert batch["input"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert batch["target"].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert batch["input"].dtype == batch["target"].dtype == np.int64
    assert batch["input"].flags.c_contiguous and batch["target"].flags.c_contiguous
    # The last token is a target only.
    assert len(Windows.cut(np.arange(9, dtype=np.uint8), 3)) == 2


def test_windows_are_taken_by_index() -> None:
    windows = Windows.cut(np.arange(100, dtype=np.uint16), 3)
    taken = windows.take(np.array([7, 2])).take(np.array([1]))
    assert taken.read(np.array([0]))["input"].tolist() == [[6, 7, 8]]


def test_the_end_of_a_single_file_is_its_test_split(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(100)))
    dataset = load(name="bytes", root=str(tmp_path / "text"))
    assert len(dataset.train) == 22 and len(dataset.test) == 2
    assert read_all(dataset, "test")["input"].tolist() == [[90, 91, 92, 93], [94, 95, 96, 97]]
    assert dataset.facts.task == "next_token" and dataset.facts.sample == (4,)
    assert dataset.num_classes == 256
    half = load(name="bytes", root=str(tmp_path / "text"), test=0.5)
    assert len(half.test) == 12


def test_a_file_is_held_out_by_its_content_alone(tmp_path: Path) -> None:
    files = [TextFile(f"{number}", bytes([number])) for number in range(100)]
    train, test = split_files(files, 0.2)
    assert 10 < len(test) < 30 and len(train) + len(test) == 100
    fewer, held_out = split_files(files[:50], 0.2)
    assert [file for file in held_out if file not in test] == []
    assert [file for file in fewer if file not in train] == []
    renamed = [TextFile(f"{number}", bytes([number])) for number in reversed(range(100))]
    assert {file.content for file in split_files(renamed, 0.2)[1]} == {f.content for f in test}


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_both_splits_get_a_file(share: float) -> None:
    files = [TextFile("a", b"a"), TextFile("b", b"b")]
    train, test = split_files(files, share)
    assert len(train) == len(test) == 1


def test_a_folder_is_read_below_without_hidden_files(tmp_path: Path) -> None:
    dataset = load(name="bytes", root=str(write_files(tmp_path / "texts")), length=1)
    content = {*read_all(dataset, "train")["input"].flatten().tolist()}
    content |= {*read_all(dataset, "test")["input"].flatten().tolist()}
    assert content == set(range(20))


def test_the_digest_covers_the_content(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "texts")
    before = load(name="bytes", root=str(folder)).sha256
    assert load(name="bytes", root=str(folder)).sha256 == before
    (folder / "0.txt").write_bytes(b"other text")
    assert load(name="bytes", root=str(folder)).sha256 != before


def test_null_is_the_library_of_python() -> None:
    dataset = load(name="bytes", root=None, length=256)
    assert len(dataset.train) > 5 * len(dataset.test) > 1000
    text = bytes(read_all(dataset, "train")["input"].astype(np.uint8).flatten().tolist())
    assert b"import sys" in text


def test_validation_windows_are_held_out_of_training(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(100)))
    dataset = load(name="bytes", root=str(tmp_path / "text"), validation=5)
    assert len(dataset.train) == 17 and dataset.validation is not None
    first = {row[0] for row in read_all(dataset, "train")["input"].tolist()}
    assert first.isdisjoint(row[0] for row in read_all(dataset, "validation")["input"].tolist())


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_files_of_tokens_are_mapped(tmp_path: Path, dtype: str) -> None:
    keys: dict[str, Any] = {"uint16": {}, "uint32": {"token_dtype": "uint32"}}
    name = np.dtype(dtype).name
    folder = write_tokens(tmp_path / "tokens", dtype)
    dataset = load(name="tokens", root=str(folder), vocabulary=100, **keys[name])
    assert isinstance(dataset.train, Windows) and isinstance(dataset.train.tokens, np.memmap)
    assert read_all(dataset, "train")["input"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(dataset.test) == 2 and dataset.num_classes == 100


def test_a_large_vocabulary_has_numbers_of_four_bytes(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "tokens", "<u4", largest=70_000)
    dataset = load(name="tokens", root=str(folder), vocabulary=70_001, length=5)
    assert read_all(dataset, "train")["target"][-1, -1] == 70_000


def test_the_digest_of_tokens_covers_the_content(tmp_path: Path) -> None:
    digests = set()
    for largest in (98, 99):
        folder = write_tokens(tmp_path / "tokens", largest=largest)
        digests.add(load(name="tokens", root=str(folder), vocabulary=100).sha256)
    assert len(digests) == 2


def refuse(tmp_path: Path, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(**keys)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(("data: ", "config: "))
    return text.replace(str(tmp_path), "")


def test_text_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").write_bytes(b"short")
    assert "there is no /none" in refuse(tmp_path, name="bytes", root=str(tmp_path / "none"))
    text = refuse(tmp_path, name="bytes", root=str(tmp_path / "empty"))
    assert "holds no file with a byte" in text
    text = refuse(tmp_path, name="bytes", root=str(tmp_path / "short"))
    assert "the training split of /short has 4 bytes; expected at least 5" in text
    assert "data.augment crop" in refuse(tmp_path, name="bytes", root=None, augment="crop")
    assert "data.root is null, but npz" in refuse(tmp_path, name="npz", root=None)


def test_tokens_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "tokens")
    keys: dict[str, Any] = {"name": "tokens", "root": str(folder), "vocabulary": 100}
    assert "needs data.vocabulary" in refuse(tmp_path, name="tokens", root=str(folder))
    text = refuse(tmp_path, **{**keys, "vocabulary": 99})
    assert "token 10 of /tokens/train.bin, read as uint16, is 99" in text
    text = refuse(tmp_path, **{**keys, "token_dtype": "uint32"})
    assert "has 22 bytes, no multiple of 4" in text
    assert "data.test is 0.5" in refuse(tmp_path, **keys, test=0.5)
    text = refuse(tmp_path, **keys, length=10)
    assert "val.bin has 9 tokens; expected at least 11" in text
    (folder / "val.bin").write_bytes(b"")
    assert "val.bin has 0 tokens" in refuse(tmp_path, **keys)
    (folder / "val.bin").unlink()
    assert "cannot read /tokens/val.bin: No such file" in refuse(tmp_path, **keys)


def test_fewer_outputs_than_tokens_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(100)))
    dataset = load(name="bytes", root=str(tmp_path / "text"))
    with pytest.raises(UserError, match="bytes needs 256 outputs, but model.num_classes is 100"):
        check_labels(dataset, 100)
