"""What tells data sets apart: digests, the list of image files, and the names of classes."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from localpipe.config.keys import Data
from localpipe.data.dataset import name_classes
from localpipe.data.identity import describe_classes, describe_files
from localpipe.errors import UserError
from tests.harness import ImageDataset, load_images

HALF = (0.5, 0.5, 0.5)


def photos(root: Path, classes: str = "cat,dog") -> Path:
    """Write PNGs of 8 x 8, two of every class in both parts."""
    drawn = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in classes.split(","):
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                pixels = drawn.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def load(root: str | Path, **keys: Any) -> ImageDataset:
    keys = {"mean": HALF, "std": HALF, "image_size": 8, **keys}
    return load_images(Data(name="image_folder", root=str(root), **keys), 0)


def listing(root: str | Path, **keys: Any) -> str:
    found = load(root, **keys).identity.listing
    assert found is not None
    return found


# --- image files


def test_the_digest_of_image_files_is_that_of_the_list_of_names_and_sizes(tmp_path: Path) -> None:
    dataset = load(photos(tmp_path))
    lines = ["# class: name, or file: bytes and path below data.root", "class\tcat", "class\tdog"]
    for part in ("train", "test"):
        for file in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
            path = f"{part}/{file}"
            lines.append(f"{(tmp_path / path).stat().st_size}\t{path}")
    assert dataset.identity.listing == "\n".join(lines) + "\n"
    assert dataset.sha256 == hashlib.sha256(dataset.identity.listing.encode()).hexdigest()


def test_the_place_of_the_root_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos(tmp_path / "a")
    sha256 = load(root).sha256
    (tmp_path / "link").symlink_to(root)
    shutil.copytree(root, tmp_path / "b" / "c")
    for place in (f"{root}/", f"{tmp_path}//a", tmp_path / "link", tmp_path / "b" / "c"):
        assert load(place).sha256 == sha256
    monkeypatch.chdir(root)
    assert load(".").sha256 == load("./").sha256 == sha256
    monkeypatch.chdir(tmp_path)
    assert load("a").sha256 == sha256


def test_the_order_in_which_a_folder_is_listed_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = load(photos(tmp_path)).sha256
    scandir = os.scandir

    class Reversed:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self._entries = list(entries)[::-1]

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self._entries

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert load(tmp_path).sha256 == sha256


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_change_of_a_name_or_a_size_is_seen(tmp_path: Path, part: str) -> None:
    root = photos(tmp_path)
    before = listing(root)
    file = root / part / "cat" / "0.png"
    file.rename(file.with_name("9.png"))
    renamed = listing(root)
    expected = f"1 file is gone ({part}/cat/0.png), 1 file is new ({part}/cat/9.png)"
    assert describe_files(before, renamed) == expected
    file.with_name("9.png").rename(file)
    with open(file, "ab") as more:
        more.write(b"\0")
    assert describe_files(before, listing(root)) == f"1 file is of another size ({part}/cat/0.png)"


def test_a_file_of_the_same_size_is_not_told_from_another(tmp_path: Path) -> None:
    """The rule reads no contents: docs/architecture.md says so."""
    sha256 = load(photos(tmp_path)).sha256
    file = tmp_path / "train" / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[::-1])
    assert load(tmp_path).sha256 == sha256


def test_names_that_no_text_file_holds_are_kept_apart(tmp_path: Path) -> None:
    before = listing(photos(tmp_path))
    folder = tmp_path / "train" / "cat"
    odd = [
        b"tab\t.png",
        b"line\nbreak.png",
        b"back\\tslash.png",
        "Käse.png".encode(),
        b"\xff.png",
    ]
    for name in odd:
        shutil.copy(os.fsencode(folder / "0.png"), os.fsencode(folder) + b"/" + name)
    now = listing(tmp_path)
    assert now.isascii() and len(now.splitlines()) == len(before.splitlines()) + len(odd)
    text = describe_files(before, now)
    assert text.startswith("5 files are new (train/cat/Käse.png, ") and text.isprintable()
    assert describe_files(now, now) == ""


def test_a_link_that_leads_nowhere_has_a_line(tmp_path: Path) -> None:
    (photos(tmp_path) / "train" / "cat" / "x.png").symlink_to("nowhere")
    assert "-1\ttrain/cat/x.png\n" in listing(tmp_path)


def test_only_the_first_names_are_told() -> None:
    before = "".join(f"1\ttrain/a/{i}.png\n" for i in range(5))
    text = describe_files(before, "")
    assert text == "5 files are gone (train/a/0.png, train/a/1.png, train/a/2.png, ...)"


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (("a", "b"), ""),
        (("a", "c", "d"), "1 class is gone (b), 2 classes are new (c, d)"),
        (("b", "a"), "its classes are in another order (b, a)"),
        (None, "its 2 classes have no names any more (a, b)"),
    ],
)
def test_how_class_names_differ_is_told(now: tuple[str, ...] | None, text: str) -> None:
    assert describe_classes(("a", "b"), now) == text


def test_classes_are_numbered_later_as_they_would_have_been_at_first(tmp_path: Path) -> None:
    names = ("owl", "dog", "cat")
    root, keys = photos(tmp_path), {"validation": 1, "train_subset": 2}
    named, later = load(root, classes=names, **keys), name_classes(load(root, **keys), names)
    assert later.sha256 == named.sha256 != load(root).sha256
    assert (later.classes, later.num_classes) == (names, 3)
    for part in ("train", "test", "validation"):
        labels = getattr(named, part).labels.tolist()
        assert getattr(later, part).labels.tolist() == labels and 0 not in labels


# --- arrays


def arrays(**changes: Any) -> dict[str, Any]:
    drawn = np.random.default_rng(0)
    images = drawn.integers(0, 256, (40, 8, 8, 3), np.uint8)
    content: dict[str, Any] = {"x_train": images, "x_test": images[:10]}
    content.update({"y_train": np.arange(40) % 4, "y_test": np.arange(10) % 4, **changes})
    return content


def load_npz(folder: Path, keys: dict[str, Any] | None = None, **changes: Any) -> ImageDataset:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "a.npz", **arrays(**changes))
    return load_images(Data(name="npz", root=str(folder / "a.npz"), **(keys or {})), 0)


def digest_of_version_1(content: dict[str, Any]) -> Any:
    digest = hashlib.sha256()
    for part in ("train", "test"):
        digest.update(content[f"y_{part}"].astype("<i8").tobytes())
        digest.update(content[f"x_{part}"][:16].tobytes())
    return digest


def test_the_digest_of_arrays_is_that_of_earlier_versions(tmp_path: Path) -> None:
    expected = digest_of_version_1(arrays()).hexdigest()
    dataset = load_npz(tmp_path)
    assert dataset.sha256 == expected and dataset.identity.listing is None
    # Names of the configuration are no part of the data.
    assert load_npz(tmp_path, {"classes": ("a", "b", "c", "d")}).sha256 == expected


def test_names_in_an_npz_file_are_those_of_its_labels(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d", "é")
    dataset = load_npz(tmp_path, classes=np.array(names))
    assert (dataset.classes, dataset.num_classes, dataset.notes) == (names, 5, ())
    digest = digest_of_version_1(arrays())
    digest.update(b"class\ta\nclass\tb\nclass\tc\nclass\td\nclass\t\\xe9\n")
    assert dataset.sha256 == digest.hexdigest()
    turned = load_npz(tmp_path, {"classes": names[::-1]}, classes=np.array(names))
    assert turned.train.labels[:5].tolist() == [4, 3, 2, 1, 4]


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (np.arange(4), "classes is int64 (4,); expected text (K,)"),
        (np.array([["a", "b"], ["c", "d"]]), "classes is <U1 (2, 2); expected text (K,)"),
        (np.array([b"a", b"b", b"c", b"d"]), "classes is |S1 (4,); expected text (K,)"),
        (np.array(["a", "b", "c", "d"], object), "cannot read classes"),
        (np.array(["a", "b", "c", "b"]), "has the name 'b' 2 times"),
        (np.array(["a", "", "c", "d"]), "has the name '' 1 times"),
        (np.array(["a", "b", "c"]), "has 3 names, but the largest label is 3"),
    ],
)
def test_names_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, classes: Any, reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_npz(tmp_path, classes=classes)
    text = str(caught.value)
    assert reason in text and text.startswith("data: ") and "\n" not in text
    assert "numpy.array(names, str)" in text or "expected" in text or "give a name" in text


def test_labels_that_begin_at_1_are_told(tmp_path: Path) -> None:
    content = arrays()
    later = {name: content[name] + 1 for name in ("y_train", "y_test")}
    dataset = load_npz(tmp_path, **later)
    assert dataset.num_classes == 5
    assert dataset.notes == (
        f"note: {tmp_path}/a.npz: labels begin at 1, so class 0 has no images; "
        "subtract 1 if that is not meant",
    )
    # One image of class 0 is enough.
    later["y_test"][0] = 0
    assert "labels begin" not in "".join(load_npz(tmp_path, **later).notes)


def test_labels_that_are_only_tested_are_told(tmp_path: Path) -> None:
    dataset = load_npz(tmp_path, y_test=np.arange(10))
    assert dataset.num_classes == 10
    assert dataset.notes == (
        f"note: {tmp_path}/a.npz: y_train has no image of the labels 4, 5, 6, 7, 8, ... of y_test",
    )
