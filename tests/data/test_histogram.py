"""The values of image files are counted once, and kept while the files are the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from localpipe.config.keys import Data
from localpipe.data.folders import image_folder
from localpipe.data.verify import progress
from tests.data.test_image_folders import noise, photos
from tests.harness import load_images


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the files that are decoded, by name."""
    decoded: list[str] = []
    original = image_folder._decode

    def decode(path: str, *arguments: Any) -> Any:
        decoded.append(path)
        return original(path, *arguments)

    monkeypatch.setattr(image_folder, "_decode", decode)
    return decoded


def measure(root: Path, **keys: Any) -> tuple[Any, Any]:
    """Return data.mean and data.std of a folder for `auto`."""
    config = Data(name="image_folder", root=str(root), **{"image_size": 8, **keys})
    dataset = load_images(config, 0)
    return dataset.mean, dataset.std


def compute(files: list[Path]) -> tuple[list[float], list[float]]:
    """Return mean and std of image files by numpy."""
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]) / 255
    axes = (0, 1, 2)
    return pixels.mean(axes).tolist(), pixels.std(axes).tolist()


def test_the_files_are_decoded_once(tmp_path: Path, reads: list[str]) -> None:
    root = photos(tmp_path)
    files = sorted((root / "train").rglob("*.png"))
    mean, std = measure(root)
    expected_mean, expected_std = compute(files)
    assert mean == pytest.approx(expected_mean) and std == pytest.approx(expected_std)
    assert sorted(reads) == [str(file) for file in files]
    reads.clear()
    assert measure(root) == (mean, std)
    assert reads == []


def test_relative_paths_are_the_same_files(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        measure(photos(tmp_path / name / "photos"))
    reads.clear()
    monkeypatch.chdir(tmp_path / "a")
    assert measure(Path("photos")) == measure(tmp_path / "a" / "photos")
    assert reads == []


@pytest.mark.parametrize("change", ["pixels", "new", "gone"])
def test_changed_files_are_counted_again(tmp_path: Path, reads: list[str], change: str) -> None:
    root = photos(tmp_path)
    before = measure(root)
    if change == "gone":
        (root / "train" / "cat" / "0.png").unlink()
    else:
        file = root / "train" / "cat" / ("0.png" if change == "pixels" else "new.png")
        noise().save(file)
        os.utime(file, ns=(1, 1))  # of two files written at once the times may be equal
    reads.clear()
    after = measure(root)
    files = sorted((root / "train").rglob("*.png"))
    assert after != before and len(reads) == len(files)
    assert list(after[0]) == pytest.approx(compute(files)[0])


@pytest.mark.parametrize(
    "keys", [{"image_size": 4}, {"background": "black"}, {"train_subset": 2}, {"validation": 2}]
)
def test_other_images_of_the_same_files_are_counted_by_themselves(
    tmp_path: Path, reads: list[str], keys: dict[str, Any]
) -> None:
    root = photos(tmp_path)
    measure(root)
    reads.clear()
    expected = measure(root, **keys)
    assert reads
    reads.clear()
    assert measure(root, **keys) == expected and not reads


@pytest.mark.parametrize("harm", ["none", "damaged", "other", "file", "relative"])
def test_without_a_cache_that_works_the_values_are_right(
    tmp_path: Path, reads: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    root = photos(tmp_path)
    expected = measure(root)
    (kept,) = cache.rglob("*.npy")
    if harm == "damaged":
        kept.write_bytes(kept.read_bytes()[:100])
    if harm == "other":
        np.save(kept, np.ones((1, 256), np.int64))
    if harm == "file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    if harm == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("HOME", "relative")
    reads.clear()
    assert measure(root) == expected
    assert bool(reads) == (harm != "none")


def test_what_takes_long_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("_QUIET_S", "_SHOWN_S", "_PRINTED_S"):
        monkeypatch.setattr(progress, name, 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    root = photos(tmp_path)
    measure(root)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["measuring data.mean and data.std: 4 of 4 (100 %), 0 s left"]
    measure(root)
    assert capsys.readouterr().err == ""
