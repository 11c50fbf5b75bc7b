"""Images per second of localpipe's loader processes beside torch's DataLoader, in pairs in turn.

    python examples/loader_speed.py

The Dataset is a user's: JPEG images of 256 x 256, cropped and flipped at random. Both loaders read
it with the same transforms, with 1 and with 2 processes. Nothing trains meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from localpipe import data
from localpipe.config.keys import Data
from localpipe.data.batches import BatchReader
from localpipe.data.samples import Request

FOLDER = Path(tempfile.gettempdir()) / "localpipe_loader_speed"
IMAGES, BATCH, WARM_UP = 512, 64, 4


class Photos(Dataset[Any]):
    """JPEG files of a folder, in four classes by their index."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.jpg"))
        self.targets = [index % 4 for index in range(len(self.paths))]
        crop = v2.RandomResizedCrop(224, antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.targets[index]


def make() -> tuple[Photos, Photos]:
    """Return the training and the test images, which are the same here."""
    return Photos(FOLDER), Photos(FOLDER)


def write_photos() -> None:
    """Write the images, smooth and with noise, as photographs are."""
    FOLDER.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(IMAGES):
        coarse = generator.integers(0, 256, (12, 12, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC))
        noise = generator.integers(0, 16, smooth.shape, np.uint8)
        image = Image.fromarray((smooth // 16 * 15 + noise).astype(np.uint8))
        image.save(FOLDER / f"{index:04d}.jpg", quality=90)


def read_with_localpipe(processes: int) -> Iterator[Any]:
    """Yield batches of many epochs from localpipe's loader processes."""
    half = (0.5, 0.5, 0.5)
    name = f"{Path(__file__).resolve()}:make"
    dataset = data.load(Data(name=name, workers=processes, mean=half, std=half), seed=0)
    requests = (
        Request("train", epoch, slice(start, start + BATCH))
        for epoch in itertools.count(1)
        for start in range(0, IMAGES, BATCH)
    )
    return BatchReader(dataset, seed=0).iterate(requests)


def read_with_torch(processes: int) -> Iterator[Any]:
    """Yield batches of many epochs from torch's DataLoader."""
    loader = DataLoader(
        make()[0], BATCH, shuffle=True, num_workers=processes, persistent_workers=True
    )
    while True:
        yield from loader


def measure(batches: Iterator[Any], count: int) -> float:
    """Return images per second of `count` batches, after the first few."""
    for _ in range(WARM_UP):
        next(batches)
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - begin)


def main() -> None:
    """Print the median rates, and the median and the spread of the ratios of the pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batches", type=int, default=24, help="of 64 images, in one window")
    arguments = parser.parse_args()
    write_photos()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print("processes  localpipe  DataLoader  ratio (lowest to highest), images per second")
    for processes in (1, 2):
        pairs = []
        for _ in range(arguments.pairs):
            rates = []
            for read in (read_with_localpipe, read_with_torch):
                batches = read(processes)
                rates.append(measure(batches, arguments.batches))
                batches.close()  # type: ignore[attr-defined]
            pairs.append(rates)
        own, torchs = (statistics.median(rates) for rates in zip(*pairs, strict=True))
        ratios = sorted(first / second for first, second in pairs)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(
            f"{processes:9}  {own:9.0f}  {torchs:10.0f}  {statistics.median(ratios):.2f} ({spread})"
        )


if __name__ == "__main__":
    main()
