"""What values of keys name: images, a run to begin from, and a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.sweep.forks.runner import Runner
from tests.sweep.trial import BASE

FIRST = "first"  # the run directory that run.init_from names
WEIGHTS = "weights.pt"  # the file that model.weights names
_CLASSES = "abcdefghij"


def write_fixtures(runner: Runner) -> None:
    """Write the files into the sweep's folder, and train the run of base.yaml."""
    _write_images(runner.folder)
    _write_texts(runner.folder)
    result = runner.run("train", BASE, f"run.dir={runner.folder / FIRST}")
    assert result.status == 0, result.stdout + result.stderr
    target = runner.folder / WEIGHTS
    result = runner.run("export", str(runner.folder / FIRST), "-o", str(target))
    assert result.status == 0, result.stdout + result.stderr


def _write_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 20), ("test", 10)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % 10
    np.savez(folder / "images.npz", **arrays)

    # Half of the training images may be taken for testing, and 13 and a validation part are left.
    for part, count in (("train", 40), ("test", 10)):
        images = generator.integers(0, 256, (count, 8, 12, 3), dtype=np.uint8)
        for index, image in enumerate(images):
            target = folder / "images" / part / _CLASSES[index % 10]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(target / f"{index}.png")


def _write_texts(folder: Path) -> None:
    """Write a text of some windows of data.length, and files of tokens below 60."""
    generator = np.random.default_rng(0)
    (folder / "text").write_bytes(generator.integers(97, 123, 8000, dtype=np.uint8).tobytes())
    (folder / "tokens").mkdir(exist_ok=True)
    for name, count in (("train.bin", 7000), ("val.bin", 1000)):
        generator.integers(0, 60, count).astype("<u2").tofile(folder / "tokens" / name)
