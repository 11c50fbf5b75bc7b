"""Folders of image files: what is data in them, how large it is, and what is broken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from localpipe.config.keys import Config, Data
from localpipe.config.load import parse
from localpipe.config.registry import DATASETS
from localpipe.data.crop import DRAWS
from localpipe.data.folders.decode import broken_image
from localpipe.data.verify.choice import BOTH
from localpipe.errors import RunError, UserError
from localpipe.plan.whole_plan import make_plan
from localpipe.runs.prepare import prepare
from tests.harness import ImageDataset, load_images

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


def load(root: Path, check_files: bool = False, **keys: Any) -> ImageDataset:
    keys = {"mean": HALF, "std": HALF, **keys}
    splits = BOTH if check_files else ()
    return load_images(Data(name="image_folder", root=str(root), **keys), 0, splits)


def refusal(root: Path, check_files: bool = False, **keys: Any) -> str:
    """Return the one line with which load refuses a folder."""
    with pytest.raises(UserError) as caught:
        load(root, check_files, **keys)
    text = str(caught.value)
    assert text.startswith("data: ") and "\n" not in text and not text.endswith(".")
    return text


def paths(dataset: ImageDataset) -> list[str]:
    found: list[str] = dataset.train.images.paths  # type: ignore[attr-defined]
    return found


# --- what is data


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
    assert dataset.train.images.read(np.arange(13)).shape == (13, *dataset.sample[1:], 3)


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
    assert len(dataset.train) == 4
    assert load(photos(tmp_path / "clean"), image_size=8).notes == ()


def test_hidden_folders_are_not_data(tmp_path: Path) -> None:
    photos(tmp_path)
    for name in (
        "train/.cache", "train/__MACOSX/cat", "train/cat/.ipynb_checkpoints", "train/dog/.git/x"
    ):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
        noise().save(tmp_path / name / "copy.png")
    dataset = load(tmp_path)
    assert dataset.num_classes == 2 and len(dataset.train) == 4


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
    assert dataset.num_classes == 2 and len(dataset.train) == 4


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
    share = "set data.test=0.2 to test on a share of every class, or move "
    assert refusal(tmp_path).endswith(
        start + share + "the class folders into train, and some images of every class into test"
    )
    # As told, in one way and in the other.
    noise().save(tmp_path / "cat" / "0.png")
    noise().save(tmp_path / "cat" / "1.png")
    assert load(tmp_path, test=0.2).num_classes == 1
    (tmp_path / "train").mkdir()
    (tmp_path / "cat").rename(tmp_path / "train" / "cat")
    text = refusal(tmp_path)
    assert text.endswith(start + share + "some images of every class from train to test")
    assert load(tmp_path, test=0.2).num_classes == 1
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "train/cat/0.png").rename(tmp_path / "test/cat/0.png")
    assert load(tmp_path).num_classes == 1


# --- data.test


def class_folders(root: Path, **images: int) -> Path:
    """Write PNGs of 8 x 8 in class folders without parts: so many of every class."""
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise().save(root / name / f"{i:02}.png")
    return root


def files(split: Any, root: Path) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in split.images.paths]


def test_a_share_of_every_class_is_the_test_split(tmp_path: Path) -> None:
    root = class_folders(tmp_path, cat=10, dog=4, fox=2, hen=1)
    dataset = load(root, test=0.2, image_size=8)
    # A fifth of 10 is 2, of 4 it is 0.8, of 2 at least 1, and a single image is for training.
    assert dataset.test.labels.tolist() == [0, 0, 1, 2]
    assert dataset.train.labels.tolist() == [0] * 8 + [1] * 3 + [2] + [3]
    train, test = files(dataset.train, root), files(dataset.test, root)
    assert train == sorted(train) and test == sorted(test) and len({*train, *test}) == 17
    assert dataset.notes == (
        "note: data.test: 4 of 17 images are the test split, none of 1 of 4 classes (hen)",
    )
    # Written down, so that the choice stays the same in later versions.
    assert test == ["cat/04.png", "cat/07.png", "dog/01.png", "fox/00.png"]


def test_the_share_is_the_same_for_every_seed_and_place(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "a", cat=9, dog=5)
    test = files(load(root, test=0.3).test, root)
    keys = Data(name="image_folder", root=str(root), mean=HALF, std=HALF, test=0.3)
    assert files(load_images(keys, seed=7).test, root) == test
    moved = class_folders(tmp_path / "b" / "train", dog=5, ant=3, cat=9)  # another class too
    found = files(load(tmp_path / "b", test=0.3).test, moved)
    assert [name for name in found if not name.startswith("ant")] == test


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_both_splits_have_images_of_every_class_with_two(tmp_path: Path, share: float) -> None:
    dataset = load(class_folders(tmp_path, cat=5, dog=2), test=share)
    assert set(dataset.train.labels) == set(dataset.test.labels) == {0, 1}
    assert len(dataset.train) + len(dataset.test) == 7


def test_a_share_is_taken_out_of_train_beside_images_without_labels(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", cat=5, dog=5)
    (tmp_path / "test").mkdir()
    noise().save(tmp_path / "test" / "0.png")
    told = f"data: {tmp_path}/test has no class folders; expected a folder of images per class; "
    assert refusal(tmp_path) == told + "set data.test=0.2 to test on a share of train"
    dataset = load(tmp_path, test=0.2, image_size=8)
    assert len(dataset.train) == 8 and len(dataset.test) == 2
    assert all("train" in path for path in paths(dataset))


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_a_share_beside_a_test_part_is_refused(tmp_path: Path, name: str) -> None:
    photos(tmp_path, test=name)
    assert refusal(tmp_path, test=0.25) == (
        f"data: data.test is 0.25, but {tmp_path}/{name} has test images too; "
        "set data.test=null to test on them, or move them away"
    )


def test_a_class_may_be_called_as_a_part_is(tmp_path: Path) -> None:
    dataset = load(class_folders(tmp_path, train=4, bus=4, valid=4), test=0.25)
    assert dataset.classes == ("bus", "train", "valid")
    assert dataset.test.labels.tolist() == [0, 1, 2]


def test_a_share_is_numbered_by_the_classes_of_the_configuration(tmp_path: Path) -> None:
    root = class_folders(tmp_path, cat=3, dog=3)
    dataset = load(root, test=0.2, classes=("dog", "owl", "cat"), image_size=8)
    assert dataset.test.labels.tolist() == [2, 0] and dataset.num_classes == 3
    assert dataset.notes == (
        f"note: {root} has no images of 1 of 3 classes (owl)",
        "note: data.test: 2 of 6 images are the test split",
    )
    text = f"data: {root} has a class 'cat', which is not one of the 1 that are trained; "
    assert refusal(root, test=0.2, classes=("dog",)) == text + "choose one of dog"


def test_a_share_of_nothing_is_refused(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "a", cat=1, dog=1)
    assert refusal(root, test=0.2) == (
        f"data: data.test takes no image, because no class of {root} has two; add images"
    )
    assert refusal(tmp_path / "none", test=0.2) == (
        f"data: {tmp_path}/none is not a folder; expected one with a folder of images per class; "
        "set data.root to it"
    )


def test_imagenet_takes_a_share_too(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", cat=5, dog=5)
    keys = Data(name="imagenet", root=str(tmp_path), image_size=8, test=0.2)
    assert load_images(keys, 0).test.labels.tolist() == [0, 1]
    class_folders(tmp_path / "val", cat=1)
    with pytest.raises(UserError, match="/val has test images too; set data.test=null"):
        load_images(keys, 0)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"image_folder", "imagenet", "bytes"}))
def test_other_data_sets_refuse_a_share(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_images(Data(name=name, test=0.2), 0)
    assert str(caught.value) == (
        f"data: data.test is 0.2, but {name} has a test split of its own; set data.test=null"
    )


# --- data.range and data.background


def test_the_check_of_files_agrees_with_reading_under_a_range(tmp_path: Path) -> None:
    photos(tmp_path)
    file = tmp_path / "test" / "dog" / "1.png"
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(file, format="TIFF")
    way_out = (
        "whose black and white are not known: give their values, as in data.range=[0,1], or save"
    )
    assert f"{file} (it holds 32-bit floats, {way_out}" in refusal(tmp_path, check_files=True)
    dataset = load(tmp_path, check_files=True, range=(0.0, 1.0))
    pixels = dataset.test.images.read(np.array([3]))[0, ..., 0]
    assert (pixels == np.rint(values * np.float64(255))).all()

    values[3, 3] = np.nan
    Image.fromarray(values).save(file, format="TIFF")
    text = refusal(tmp_path, check_files=True, range=(0.0, 1.0))
    assert f"{file} (it holds NaN, which is no brightness); mend or" in text
    # Read without the check, it is a broken image by the same reason.
    with pytest.raises(RunError, match=r"dog/1.png cannot be read as an image \(it holds NaN"):
        load(tmp_path, range=(0.0, 1.0)).test.images.read(np.array([3]))


def test_transparency_is_laid_on_the_background(tmp_path: Path) -> None:
    photos(tmp_path)
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "train" / "cat" / "0.png")
    batch = load(tmp_path, background="#0000ff").train.images.read(np.array([0]))
    assert (batch == (0, 0, 255)).all()
    batch = load(tmp_path).train.images.read_crops(np.array([0]), np.full((1, DRAWS), 0.5))
    assert (batch == 255).all()


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
    assert dataset.sample == dataset.image == (3, *expected)
    (note,) = dataset.notes
    assert note == f"note: data.image_size: auto is {expected[0]} x {expected[1]}, {reason}"


def test_the_automatic_size_is_that_of_turned_images(tmp_path: Path) -> None:
    photos(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in (tmp_path / "train").glob("*/*.png"):
        noise(20, 30).save(file.with_suffix(".jpg"), exif=exif)
        file.unlink()
    assert load(tmp_path).sample == (3, 30, 20)


# --- what is broken


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
