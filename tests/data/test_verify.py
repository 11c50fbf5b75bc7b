"""Image files are checked before the first step: what is broken, what is cached and left out."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from localpipe.config.keys import Config, Data
from localpipe.config.load import parse, update
from localpipe.data.folders import decode
from localpipe.data.verify import cache as caches
from localpipe.data.verify import check, choice, progress
from localpipe.data.verify.choice import BOTH, TEST
from localpipe.errors import RunError, UserError
from localpipe.plan.whole_plan import make_plan
from localpipe.results.evaluate import evaluate
from localpipe.runs.directory import RunDirectory
from localpipe.runs.prepare import prepare
from tests import harness
from tests.data.test_image_folders import HALF, configuration, noise, photos
from tests.harness import ImageDataset, load_images

ADVICE = "mend or remove them, or set data.skip_broken=true"
KEPT = "mend them, or remove them and go on without them by data.changed=accept"


def load(root: Path, splits: tuple[str, ...] = BOTH, **keys: Any) -> ImageDataset:
    keys = {"mean": HALF, "std": HALF, "image_size": 8, **keys}
    left_out = keys.pop("left_out", None)
    return load_images(Data(name="image_folder", root=str(root), **keys), 0, splits, left_out)


def refusal(root: Path, splits: tuple[str, ...] = BOTH, **keys: Any) -> str:
    """Return the one line with which load refuses a folder."""
    with pytest.raises(UserError) as caught:
        load(root, splits, **keys)
    text = str(caught.value)
    assert text.startswith("data: ") and "\n" not in text and not text.endswith(".")
    return text


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


# --- what is broken


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_a_file_that_is_cut_is_found_before_the_start(
    tmp_path: Path, kind: str, share: float
) -> None:
    photos(tmp_path)
    file = tmp_path / "test" / "dog" / "1.png"
    noise(64, 64).save(file, format=kind)
    assert len(load(tmp_path).test.labels) == 4
    cut(file, share)
    text = refusal(tmp_path)
    assert text.startswith(f"data: 1 of 8 image files cannot be read: {file} (")
    assert text.endswith(f"); {ADVICE}")
    # Either advice helps.
    assert len(load(tmp_path, skip_broken=True).test.labels) == 3
    file.unlink()
    assert len(load(tmp_path).test.labels) == 3


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_is_found_broken_exactly_where_it_cannot_be_read(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    photos(tmp_path)
    file = tmp_path / "test" / "dog" / "1.png"
    noise(40, 56).save(file, format="JPEG", **options)
    content = file.read_bytes()
    whole = load(tmp_path, image_size=(40, 56)).test.images.read(np.array([3]))
    found = 0
    for size in [*range(0, len(content), 211), *range(len(content) - 20, len(content))]:
        file.write_bytes(content[:size])
        try:
            pixels = load(tmp_path, (), image_size=(40, 56)).test.images.read(np.array([3]))
        except RunError:
            found += 1
            assert "1 of 8" in refusal(tmp_path)
        else:  # a last byte that no decoder needs
            assert (pixels == whole).all() and size > len(content) - 20
            load(tmp_path)
    assert found > 10


def test_all_broken_files_are_listed_at_once(tmp_path: Path) -> None:
    photos(tmp_path, images=4)
    files = [tmp_path / part / "cat" / f"{i}.png" for part in ("train", "test") for i in (1, 2, 3)]
    for file in files:
        file.write_bytes(b"")
    (tmp_path / "test" / "dog" / "gone.png").symlink_to("nowhere.png")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "test" / "dog" / "floats.tif")
    text = refusal(tmp_path)
    assert text.startswith("data: 8 of 18 image files cannot be read: ")
    assert all(str(file) in text for file in files[:5]) and f" and 3 more; {ADVICE}" in text
    assert len(load(tmp_path, skip_broken=True).train.labels) == 5
    # Removing them is enough, as told.
    for file in (*files, tmp_path / "test/dog/gone.png", tmp_path / "test/dog/floats.tif"):
        file.unlink()
    assert len(load(tmp_path).train.labels) == 5


def test_imagenet_is_checked_too(tmp_path: Path) -> None:
    photos(tmp_path, test="val")
    (tmp_path / "val" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 8 image files cannot be read: .*val/dog/1.png \("):
        load_images(Data(name="imagenet", root=str(tmp_path)), 0, BOTH)


def test_animations_are_counted_in_a_note(tmp_path: Path) -> None:
    photos(tmp_path)
    noise().save(tmp_path / "train/cat/x.gif", save_all=True, append_images=[noise(), noise()])
    expected = (
        "note: of 1 of 9 image files, which are animations or have several pages, only the first "
        "image is used",
    )
    assert load(tmp_path).notes == expected
    assert load(tmp_path).notes == expected  # from the cache
    assert load(tmp_path, verify="headers").notes == expected


# --- how much is checked


def test_data_verify_says_how_much_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path)
    broken = tmp_path / "test" / "dog" / "1.png"
    cut(broken, 0.8)
    for verify in ("auto", "full"):
        assert str(broken) in refusal(tmp_path, verify=verify)
    assert load(tmp_path, verify="headers").notes == load(tmp_path, verify="none").notes == ()
    assert load_images(Data(name="image_folder", root=str(tmp_path)), 0).verify == "full"
    # Of many files only the headers are read, and a note says so.
    monkeypatch.setattr(choice, "_DECODED_FILES", 7)
    assert load(tmp_path).notes == (
        "note: data.verify: auto is headers, because 8 image files are more than 7: "
        "their pixels are not checked",
    )
    assert load(tmp_path).verify == "headers"
    assert str(broken) in refusal(tmp_path, verify="full")
    broken.write_bytes(b"no image")
    assert str(broken) in refusal(tmp_path)
    assert load(tmp_path, verify="none").notes == ()


def test_an_evaluation_checks_the_test_images_alone(tmp_path: Path) -> None:
    photos(tmp_path)
    cut(tmp_path / "train" / "cat" / "0.png", 0)
    assert load(tmp_path, TEST).sample == (3, 8, 8)
    cut(tmp_path / "test" / "cat" / "0.png", 0)
    assert "1 of 4 image files" in refusal(tmp_path, TEST)


def test_leaving_out_what_nobody_looks_for_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.skip_broken .* set data\.verify=auto"):
        parse({"data": {"skip_broken": True, "verify": "none"}}, "test")


# --- what is left out


def test_a_file_that_is_left_out_counts_nowhere(tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        photos(tmp_path / name, images=3)
    for file in (tmp_path / "whole").rglob("*.png"):
        (tmp_path / "broken" / file.relative_to(tmp_path / "whole")).write_bytes(file.read_bytes())
    # Its header says another size, so it would change the automatic one, mean and deviation.
    names = [f"train/{name}/big_{i}.png" for name in ("cat", "dog") for i in range(4)]
    for name in names:
        noise(20, 20).save(tmp_path / "broken" / name)
        cut(tmp_path / "broken" / name, 0.9)
    keys: dict[str, Any] = {"image_size": "auto", "mean": "auto", "std": "auto"}
    whole = load(tmp_path / "whole", **keys)
    left = load(tmp_path / "broken", skip_broken=True, **keys)
    assert left.sample == whole.sample and left.sha256 == whole.sha256
    assert (left.mean, left.std, left.notes[0]) == (whole.mean, whole.std, whole.notes[0])
    assert left.train.labels.tolist() == whole.train.labels.tolist()
    rows = np.arange(6)
    assert (left.train.images.read(rows) == whole.train.images.read(rows)).all()
    assert left.left_out == tuple(names) and whole.left_out == ()
    assert left.notes[1].startswith(
        f"note: 8 of 20 image files cannot be read and are left out: {tmp_path}/broken/{names[0]} ("
    )
    assert left.notes[1].endswith(") and 3 more")
    # A worker is told what to leave out, and looks at nothing.
    given = load(tmp_path / "broken", (), left_out=names, skip_broken=True, **keys)
    assert given.mean == left.mean and given.left_out == left.left_out


def test_names_of_files_are_those_below_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "photos")
    cut(tmp_path / "photos/test/dog/1.png", 0)
    for folder, root in ((tmp_path, "photos"), (tmp_path / "photos", "."), (tmp_path, "photos/")):
        monkeypatch.chdir(folder)
        assert load(Path(root), skip_broken=True).left_out == ("test/dog/1.png",)
    assert load(tmp_path / "photos", skip_broken=True).left_out == ("test/dog/1.png",)


def test_a_class_or_a_test_split_without_an_image_that_can_be_read_is_refused(
    tmp_path: Path,
) -> None:
    photos(tmp_path)
    for i in range(2):
        cut(tmp_path / "train" / "dog" / f"{i}.png", 0)
    text = refusal(tmp_path, skip_broken=True)
    start = f"data: no training image of class 'dog' can be read, as {tmp_path}/train/dog/0.png ("
    assert text.startswith(start)
    assert text.endswith("); mend one, or remove the folders of the class")
    for part in ("train", "test"):
        os.rename(tmp_path / part / "dog", tmp_path / f"{part}_dog")
    assert load(tmp_path, skip_broken=True).num_classes == 1
    for i in range(2):
        cut(tmp_path / "test" / "cat" / f"{i}.png", 0)
    text = refusal(tmp_path, skip_broken=True)
    assert text.startswith(f"data: no test image can be read, as {tmp_path}/test/cat/0.png (")


# --- the cache


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the files that the check opens, by name."""
    opened: list[str] = []
    original = decode.open_image

    def open_image(path: str) -> Image.Image:
        opened.append(path)
        return original(path)

    monkeypatch.setattr(check, "open_image", open_image)
    return opened


def count(reads: list[str], root: Path, splits: tuple[str, ...] = BOTH, **keys: Any) -> int:
    """Return how many files a check opens."""
    reads.clear()
    load(root, splits, **keys)
    return len(reads)


def test_a_file_is_checked_again_only_where_it_has_changed(
    tmp_path: Path, reads: list[str]
) -> None:
    photos(tmp_path)
    assert count(reads, tmp_path) == 8
    assert count(reads, tmp_path) == 0
    noise(9, 9).save(tmp_path / "test" / "dog" / "1.png")
    noise(9, 9).save(tmp_path / "test" / "dog" / "2.png")
    assert count(reads, tmp_path) == 2
    os.utime(tmp_path / "test" / "dog" / "1.png", ns=(1, 1))
    assert count(reads, tmp_path) == 1
    # Broken files are never known.
    cut(tmp_path / "test" / "dog" / "1.png", 0)
    for _ in range(2):
        assert count(reads, tmp_path, skip_broken=True) == 1


def test_headers_are_less_than_pixels(tmp_path: Path, reads: list[str]) -> None:
    photos(tmp_path)
    assert count(reads, tmp_path, verify="headers") == 8
    assert count(reads, tmp_path, verify="headers") == 0
    assert count(reads, tmp_path, verify="full") == 8
    assert count(reads, tmp_path, verify="headers") == 0
    assert count(reads, tmp_path, verify="full") == 0


def test_other_checks_and_other_folders_have_caches_of_their_own(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    photos(tmp_path / "a")
    photos(tmp_path / "b")
    assert count(reads, tmp_path / "a") == count(reads, tmp_path / "b") == 8
    assert count(reads, tmp_path / "a") == 0
    assert len(list(cache.rglob("*.npz"))) == 2
    monkeypatch.setattr(check, "_VERSION", 0)
    assert count(reads, tmp_path / "a") == 8


def test_an_evaluation_keeps_what_is_known_of_training_images(
    tmp_path: Path, reads: list[str], cache: Path
) -> None:
    photos(tmp_path)
    assert count(reads, tmp_path) == 8
    noise(9, 9).save(tmp_path / "test" / "dog" / "1.png")
    assert count(reads, tmp_path, TEST) == 1
    assert count(reads, tmp_path) == 0
    # A check of both splits forgets what is no longer there.
    (tmp_path / "test" / "dog" / "1.png").unlink()
    noise(9, 9).save(tmp_path / "test" / "dog" / "0.png")
    load(tmp_path)
    with np.load(next(cache.rglob("*.npz"))) as content:
        assert len(content["keys"]) == 7


@pytest.mark.parametrize("harm", ["damaged", "empty", "other", "folder", "readonly", "no home"])
def test_without_a_cache_that_works_every_file_is_checked(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, cache: Path, harm: str
) -> None:
    photos(tmp_path)
    load(tmp_path)
    file = next(cache.rglob("*.npz"))
    if harm == "damaged":
        content = bytearray(file.read_bytes())
        content[200] ^= 255
        file.write_bytes(content)
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "other":
        np.savez(file, keys=np.arange(3), facts=np.zeros(2))
    elif harm == "folder":
        file.unlink()
        file.mkdir()
    elif harm == "readonly":  # root may write into any folder, but not below a file
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert count(reads, tmp_path) == 8
    is_mended = harm in ("damaged", "empty", "other")
    assert count(reads, tmp_path) == (0 if is_mended else 8)


def test_two_checks_at_once_lose_nothing_that_either_has_found(tmp_path: Path) -> None:
    photos(tmp_path)
    keys = caches.file_keys([str(path) for path in tmp_path.rglob("*.png")], tmp_path, "x")
    first, second = caches.VerifiedFiles(tmp_path), caches.VerifiedFiles(tmp_path)
    nothing = np.zeros(len(keys), np.uint8)
    one, other = nothing.copy(), nothing.copy()
    one[:5], other[4:] = caches.READ, caches.DECODED
    first.add(keys, one, keeps_others=True)
    second.add(keys, other, keeps_others=False)
    assert first.find(keys).tolist() == [1, 1, 1, 1, 3, 2, 2, 2]


def test_an_interrupted_check_goes_on_where_it_was(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path, images=10)
    monkeypatch.setattr(caches, "_AT_ONCE", 4)
    original, calls = progress.FileProgress.add, []

    def interrupt(shown: Any, files: int) -> None:
        calls.append(files)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(shown, files)

    monkeypatch.setattr(progress.FileProgress, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert count(reads, tmp_path) == 40 - 12
    assert count(reads, tmp_path) == 0


# --- what a user sees of it


def show(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, term: str) -> Callable[[Path], str]:
    """Return a function that checks a folder slowly, and returns what is on standard error."""

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    def look(root: Path) -> str:
        stream = Stream()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr(caches, "_AT_ONCE", 2)
        for name in ("_QUIET_S", "_SHOWN_S", "_PRINTED_S"):
            monkeypatch.setattr(progress, name, 0)
        load(root)
        return stream.getvalue()

    return look


def test_a_long_check_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "a")
    shown = show(monkeypatch, True, "xterm")(tmp_path / "a")
    states = shown.split("\r\033[K")
    assert states[2].startswith("checking image files: 4 of 8 (50 %), ")
    assert states[2].endswith(" s left")
    assert len(states) == 6 and states[-1] == "" and "\n" not in shown
    photos(tmp_path / "b")
    printed = show(monkeypatch, True, "dumb")(tmp_path / "b")
    assert len(printed.splitlines()) == 4 and "\033" not in printed and "\r" not in printed


def test_a_short_check_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(photos(tmp_path))
    assert capsys.readouterr().err == ""


# --- a run


def small_run(root: Path, run_dir: Path, **keys: Any) -> Config:
    given = configuration(root, run_dir, image_size=8, mean=HALF, std=HALF, **keys)
    return update(given, {"run.checkpoint_every_s": 0.0, "optim.max_steps": 1})


def manifest(run_dir: Path) -> dict[str, Any]:
    checkpoint = RunDirectory(run_dir).newest_checkpoint()
    assert checkpoint is not None
    return dict(checkpoint.manifest)


def notes(given: Config) -> tuple[str, ...]:
    prepared = prepare(given)
    prepared.lock.close()
    return prepared.notes


def test_a_run_leaves_out_the_same_files_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    root, run_dir = photos(tmp_path / "photos", images=4), tmp_path / "run"
    broken, late = root / "train/dog/1.png", root / "test/cat/2.png"
    whole = broken.read_bytes()
    cut(broken, 0.9)
    given = small_run(root, run_dir, skip_broken=True)
    assert harness.train(given) == 0
    assert manifest(run_dir)["left_out"] == ["train/dog/1.png"]
    # It is the result of a folder without the file.
    os.rename(broken, tmp_path / "away.png")
    assert harness.train(small_run(root, tmp_path / "other")) == 0
    digest = [RunDirectory(path).summary() for path in (run_dir, tmp_path / "other")]
    assert digest[0] is not None and digest[1] is not None
    assert digest[0]["weights_sha256"] == digest[1]["weights_sha256"]
    assert manifest(tmp_path / "other")["left_out"] == []

    # Mended, it stays out. Broken since, a file is refused, and mending it helps, as told.
    broken.write_bytes(whole)
    longer = update(given, {"optim.max_steps": None, "data.verify": "full"})
    assert "note: 1 image file is left out, as when the run began: train/dog/1.png" in notes(longer)
    good = late.read_bytes()
    late.write_bytes(bytes(len(good)))
    with pytest.raises(UserError) as caught:
        prepare(longer)
    assert str(late) in str(caught.value) and str(caught.value).endswith(KEPT)
    late.write_bytes(good)
    assert notes(longer)
    late.unlink()
    accepted = notes(update(longer, {"data.changed": "accept"}))
    assert any("1 file is gone (test/cat/2.png)" in note for note in accepted)


def test_a_run_without_a_checkpoint_decides_anew(tmp_path: Path) -> None:
    root, run_dir = photos(tmp_path / "photos", images=4), tmp_path / "run"
    given = small_run(root, run_dir, skip_broken=True)
    for name in ("train/dog/1.png", "test/dog/1.png"):
        cut(root / name, 0)
        prepared = prepare(given)
        prepared.lock.close()
    assert prepared.job.left_out == ("train/dog/1.png", "test/dog/1.png")
    assert json.loads(prepared.job.to_json())["left_out"] == list(prepared.job.left_out)


def test_plan_and_evaluation_agree_with_training_on_what_is_left_out(tmp_path: Path) -> None:
    root, run_dir = photos(tmp_path / "photos", images=4), tmp_path / "run"
    cut(root / "train/cat/0.png", 0.5)  # the very first image
    cut(root / "test/dog/1.png", 0.5)
    given = small_run(root, run_dir)
    with pytest.raises(UserError, match=ADVICE):
        prepare(given)
    assert make_plan(given).config.sample == (3, 8, 8)  # which checks nothing
    given = update(given, {"data.skip_broken": True, "data.mean": "auto"})
    assert any("are left out" in note for note in make_plan(given).data_notes)
    assert harness.train(given) == 0
    recorded = RunDirectory(run_dir).config()
    assert {record["samples"] for record in evaluate(run_dir, recorded).stages} == {7}
    with pytest.raises(UserError, match=ADVICE):
        evaluate(run_dir, update(recorded, {"data.skip_broken": False}))
