"""Folders of image files: what is data in them, how large it is, and what is broken."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from localpipe import data
from localpipe.config.keys import Config, Data
from localpipe.config.load import parse
from localpipe.data import image_files
from localpipe.data.dataset import Dataset
from localpipe.data.decode import broken_image
from localpipe.errors import UserError
from localpipe.plan.whole_plan import make_plan
from localpipe.runs.prepare import prepare

RNG = np.random.default_rng(0)
HALF = (0.5, 0.5, 0.5)  # with a given mean, load decodes the first image alone


def noise(height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def photos(root: Path, test: str = "test", images: int = 2) -> Path:
    """Write PNGs of 8 x 8, two classes and both parts."""
    for part in ("train", test):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(images):
                noise().save(root / part / name / f"{i}.png")
    return root


def load(root: Path, check_files: bool = False, **keys: Any) -> Dataset:
    keys = {"mean": HALF, "std": HALF, **keys}
    return data.load(Data(name="image_folder", root=str(root), **keys), 0, check_files)


def refusal(root: Path, check_files: bool = False, **keys: Any) -> str:
    """Return the one line with which load refuses a folder."""
    with pytest.raises(UserError) as caught:
        load(root, check_files, **keys)
    text = str(caught.value)
    assert text.startswith("data: ") and "\n" not in text and not text.endswith(".")
    return text


def paths(dataset: Dataset) -> list[str]:
    found: list[str] = dataset.train.images.paths  # type: ignore[attr-defined]
    return found


# --- what is data


def test_the_digest_of_plain_images_of_one_size_is_that_of_earlier_versions(tmp_path: Path) -> None:
    dataset = load(photos(tmp_path))
    labels = np.array([0, 0, 1, 1], "<i8").tobytes()
    assert dataset.sha256 == hashlib.sha256(2 * labels).hexdigest()


def test_files_are_in_the_order_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    photos(tmp_path)
    for name in ("a", "a.b", "a/x", "b", "B", "a-b/c"):
        folder = tmp_path / "train" / "cat" / name
        folder.mkdir(parents=True)
        for file in ("2.PNG", "10.png", "1.png"):
            noise().save(folder / file)
    assert paths(load(tmp_path)) == [path for path, _ in ImageFolder(tmp_path / "train").samples]


def test_every_suffix_of_an_image_is_read(tmp_path: Path) -> None:
    photos(tmp_path)
    for i, suffix in enumerate(("gif", "jfif", "webp", "tif", "jp2", "BMP", "tga", "ico", "mpo")):
        noise(16, 16).save(tmp_path / "train" / "dog" / f"more_{i}.{suffix}")
    dataset = load(tmp_path)
    assert dataset.train.labels.tolist() == [0] * 2 + [1] * 11
    assert dataset.train.images.read(np.arange(13)).shape == (13, *dataset.image[1:], 3)


def test_files_that_are_left_out_are_counted_in_a_note(tmp_path: Path) -> None:
    photos(tmp_path)
    train = tmp_path / "train"
    for name in ("cat/a.txt", "cat/b.txt", "dog/c.csv", "dog/README", "labels.txt"):
        (train / name).write_text("no image")
    (train / "cat" / ".DS_Store").touch()  # nobody asks for it
    (train / "cat" / "._0.png").touch()
    noise().save(train / "loose.png")
    dataset = load(tmp_path, image_size=8)
    assert dataset.notes == (
        f"note: {train}: left out as no images of a class: 7 files (3 .txt, 1 .csv, 1 hidden, "
        "1 outside the class folders, 1 without suffix)",
    )
    assert len(dataset.train.labels) == 4
    assert load(photos(tmp_path / "clean"), image_size=8).notes == ()


def test_hidden_folders_are_not_data(tmp_path: Path) -> None:
    photos(tmp_path)
    for name in (
        "train/.cache", "train/__MACOSX/cat", "train/cat/.ipynb_checkpoints", "train/dog/.git/x"
    ):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
        noise().save(tmp_path / name / "copy.png")
    dataset = load(tmp_path)
    assert dataset.num_classes == 2 and len(dataset.train.labels) == 4


@pytest.mark.parametrize(
    ("link", "target"),
    [("cat/self", "."), ("cat/up", ".."), ("cat/top", "../.."), ("all", "."), ("cat/a/b", "..")],
)
def test_a_link_that_leads_back_multiplies_no_images(
    tmp_path: Path, link: str, target: str
) -> None:
    photos(tmp_path)
    place = tmp_path / "train" / link
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(target)
    dataset = load(tmp_path)
    assert dataset.num_classes == 2 and len(dataset.train.labels) == 4


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_a_link_to_a_pipe_or_a_device_is_no_image(tmp_path: Path, target: str) -> None:
    root = photos(tmp_path)
    os.mkfifo(root / "train" / "cat" / "pipe")
    (root / "train" / "cat" / "odd.png").symlink_to(target)
    dataset = load(root, check_files=True)
    assert [Path(path).name for path in paths(dataset)] == ["0.png", "1.png"] * 2
    assert "1 .png" in dataset.notes[0]


def test_two_links_that_lead_to_each_other_end(tmp_path: Path) -> None:
    photos(tmp_path)
    (tmp_path / "train" / "cat" / "x").symlink_to("../dog")
    (tmp_path / "train" / "dog" / "x").symlink_to("../cat")
    # A link to another folder is followed, and from there the link back is not.
    assert load(tmp_path).train.labels.tolist() == [0] * 4 + [1] * 4


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    photos(tmp_path)
    os.mkfifo(tmp_path / "train" / "cat" / "live.png")
    assert len(load(tmp_path, check_files=True).train.labels) == 4


# --- the test part


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_the_test_part_has_four_names(tmp_path: Path, name: str) -> None:
    assert len(load(photos(tmp_path, test=name)).test.labels) == 4


def test_a_second_test_part_is_not_read_and_told(tmp_path: Path) -> None:
    photos(tmp_path)
    (tmp_path / "val" / "fish").mkdir(parents=True)
    (note,) = load(tmp_path, image_size=8).notes
    assert note == f"note: {tmp_path}/val is not read; the tests use test"


def test_a_missing_part_says_what_to_move_where(tmp_path: Path) -> None:
    start = f"expected {tmp_path}/train and {tmp_path}/test with a folder of images per class; "
    assert refusal(tmp_path).endswith(start + "set data.root to the folder that holds both")
    (tmp_path / "cat").mkdir()
    assert refusal(tmp_path).endswith(
        start + "move the class folders into train, and some images of every class into test"
    )
    (tmp_path / "train").mkdir()
    (tmp_path / "cat").rename(tmp_path / "train" / "cat")
    noise().save(tmp_path / "train" / "cat" / "0.png")
    noise().save(tmp_path / "train" / "cat" / "1.png")
    assert refusal(tmp_path).endswith(start + "move some images of every class from train to test")
    # As told.
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "train/cat/0.png").rename(tmp_path / "test/cat/0.png")
    assert load(tmp_path).num_classes == 1


# --- the automatic size


@pytest.mark.parametrize(
    ("sizes", "expected", "reason"),
    [
        ([(8, 8)] + [(96, 96)] * 3, (96, 96), "the size of 3 of 4 training images"),
        ([(64, 48)] * 2 + [(30, 40)] * 2, (64, 48), "the size of 2 of 4 training images"),
        ([(30, 40)] * 2 + [(64, 48)] * 2, (64, 48), "the size of 2 of 4 training images"),
        (
            [(30, 40), (50, 90), (70, 60), (8, 200)], (30, 30),
            "the median shorter side of 4 training images, at most 224",
        ),
        (
            [(300, 260)] * 4, (224, 224),
            "the median shorter side of 4 training images, at most 224",
        ),
    ],
)  # fmt: skip
def test_the_automatic_size_is_that_of_most_images_or_a_square(
    tmp_path: Path, sizes: list[tuple[int, int]], expected: tuple[int, int], reason: str
) -> None:
    photos(tmp_path)
    files = sorted((tmp_path / "train").glob("*/*.png"))
    for file, (height, width) in zip(files, sizes, strict=True):
        noise(height, width).save(file)
    dataset = load(tmp_path)
    assert dataset.image == (3, *expected)
    (note,) = dataset.notes
    assert note == f"note: data.image_size: auto is {expected[0]} x {expected[1]}, {reason}"


def test_the_automatic_size_is_that_of_turned_images(tmp_path: Path) -> None:
    photos(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in (tmp_path / "train").glob("*/*.png"):
        noise(20, 30).save(file.with_suffix(".jpg"), exif=exif)
        file.unlink()
    assert load(tmp_path).image == (3, 30, 20)


# --- what is broken


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_a_file_that_is_cut_is_found_before_the_start(
    tmp_path: Path, kind: str, share: float
) -> None:
    photos(tmp_path)
    file = tmp_path / "test" / "dog" / "1.png"
    noise(64, 64).save(file, format=kind)
    load(tmp_path, check_files=True)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    text = refusal(tmp_path, check_files=True)
    assert text.startswith(f"data: 1 of 8 image files cannot be read: {file} (")
    assert text.endswith("); mend them, or remove them for a new run")


def test_all_broken_files_are_listed_at_once(tmp_path: Path) -> None:
    photos(tmp_path, images=4)
    files = [tmp_path / part / "cat" / f"{i}.png" for part in ("train", "test") for i in (1, 2, 3)]
    for file in files:
        file.write_bytes(b"")
    (tmp_path / "test" / "dog" / "gone.png").symlink_to("nowhere.png")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "test" / "dog" / "floats.tif")
    text = refusal(tmp_path, check_files=True)
    assert text.startswith("data: 8 of 18 image files cannot be read: ")
    assert all(str(file) in text for file in files[:5]) and " and 3 more; mend them" in text
    # Removing them is enough, as told.
    for file in (*files, tmp_path / "test/dog/gone.png", tmp_path / "test/dog/floats.tif"):
        file.unlink()
    assert len(load(tmp_path, check_files=True).train.labels) == 5


def test_of_much_data_only_the_headers_are_checked_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "_DECODED_BYTES", 100)
    photos(tmp_path)
    cut = tmp_path / "test" / "dog" / "1.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    (note,) = load(tmp_path, check_files=True, image_size=8).notes
    told = "note: 8 image files are too many to decode before the start; the headers of"
    assert note == f"{told} 8 were checked"
    # Of very many files those of the test split are checked.
    monkeypatch.setattr(image_files, "_CHECKED_FILES", 7)
    assert load(tmp_path, check_files=True, image_size=8).notes == (f"{told} 4 were checked",)
    cut.write_bytes(b"no image")
    assert str(cut) in refusal(tmp_path, check_files=True)


def test_animations_are_counted_in_a_note(tmp_path: Path) -> None:
    photos(tmp_path)
    noise().save(tmp_path / "train/cat/x.gif", save_all=True, append_images=[noise(), noise()])
    (note,) = load(tmp_path, check_files=True, image_size=8).notes
    assert note == (
        "note: of 1 of 9 image files, which are animations or have several pages, only the first "
        "image is used"
    )


def test_an_image_that_breaks_later_is_named_with_advice_that_does_not_end_the_run() -> None:
    assert str(broken_image("a/0.png", OSError("image file is truncated"))) == (
        "data: a/0.png cannot be read as an image (image file is truncated); "
        "mend it, or remove it for a new run"
    )


# --- a run


def configuration(root: Path, run_dir: Path, **keys: Any) -> Config:
    values = {
        "model": {"name": "resnet8"},
        "method": "greedy",
        "pipeline": {"stages": 2, "processes": 1},
        "data": {"name": "image_folder", "root": str(root), "batch_size": 4, **keys},
        "optim": {"epochs": 1},
        "run": {"dir": str(run_dir), "device": "cpu", "threads": 1},
    }
    return parse(values, "test")


def test_a_run_finds_a_broken_test_image_before_it_begins_and_prints_the_notes(
    tmp_path: Path,
) -> None:
    given = configuration(photos(tmp_path / "photos", images=4), tmp_path / "run")
    broken = tmp_path / "photos" / "test" / "dog" / "3.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:90])
    with pytest.raises(UserError, match=r"1 of 16 image files cannot be read: .*dog/3.png"):
        prepare(given)
    assert not (tmp_path / "run" / "config.yaml").exists()
    broken.write_bytes(whole)
    prepared = prepare(given)
    prepared.lock.close()
    expected = "note: data.image_size: auto is 8 x 8, the size of 8 of 8 training images"
    assert prepared.notes[0] == expected
    assert make_plan(given).data_notes == (expected,)


def test_a_resume_keeps_the_recorded_size_and_mean_of_an_image_folder(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", images=4)
    earlier = configuration(root, tmp_path / "run", image_size=6, mean=HALF, std=HALF)
    prepare(earlier).lock.close()
    prepared = prepare(configuration(root, tmp_path / "run"))
    prepared.lock.close()
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert recorded["image_size"] == prepared.config.data.image_size == 6
    assert tuple(recorded["mean"]) == HALF
