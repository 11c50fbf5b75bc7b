"""Images per second of localpipe's loader processes beside torch's DataLoader, in pairs in turn.

    python examples/loader_speed.py                  # a folder of images, and a user's Dataset
    python examples/loader_speed.py --read folder    # the first one alone

The images are JPEG of 256 x 256, a random part of each is resized to 224 x 224, and half of them
are mirrored. localpipe reads them as `data.name=image_folder` with its own crops, or as a user's
Dataset with torchvision's v2 transforms. torch's DataLoader reads that Dataset. Each has 1 process,
and then 2. Nothing trains meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
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
IMAGES, BATCH, WARM_UP, CLASSES = 512, 64, 4, 4
HALF = (0.5, 0.5, 0.5)


class Photos(Dataset[Any]):
    """JPEG files of a folder, in four classes by their folders."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("train/*/*.jpg"))
        self.targets = [int(path.parent.name) for path in self.paths]
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
    for label in range(CLASSES):
        (FOLDER / "train" / str(label)).mkdir(parents=True, exist_ok=True)
    test = FOLDER / "test"
    if not test.exists():
        test.symlink_to("train")
    generator = np.random.default_rng(0)
    for index in range(IMAGES):
        coarse = generator.integers(0, 256, (12, 12, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC))
        noise = generator.integers(0, 16, smooth.shape, np.uint8)
        image = Image.fromarray((smooth // 16 * 15 + noise).astype(np.uint8))
        image.save(FOLDER / "train" / str(index % CLASSES) / f"{index:04d}.jpg", quality=90)


def read_folder(processes: int) -> Iterator[Any]:
    """Yield batches of many epochs of the folder from localpipe's loader processes."""
    return read_with_localpipe(
        Data(
            name="image_folder",
            root=str(FOLDER),
            image_size=224,
            augment="resized_crop_flip",
            workers=processes,
            mean=HALF,
            std=HALF,
        )
    )


def read_user(processes: int) -> Iterator[Any]:
    """Yield batches of many epochs of the Dataset from localpipe's loader processes."""
    name = f"{Path(__file__).resolve()}:make"
    return read_with_localpipe(Data(name=name, workers=processes, mean=HALF, std=HALF))


def read_with_localpipe(config: Data) -> Iterator[Any]:
    """Yield batches of many epochs of a data set."""
    dataset = data.load(config, seed=0)
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


def compare(read: Callable[[int], Iterator[Any]], pairs: int, batches: int) -> None:
    """Print the median rates, and the median and the spread of the ratios of the pairs."""
    for processes in (1, 2):
        pair_rates = []
        for _ in range(pairs):
            rates = []
            for reader in (read, read_with_torch):
                iterator = reader(processes)
                rates.append(measure(iterator, batches))
                iterator.close()  # type: ignore[attr-defined]
            pair_rates.append(rates)
        localpipe_rate, torch_rate = map(statistics.median, zip(*pair_rates, strict=True))
        ratios = sorted(first / second for first, second in pair_rates)
        rates_text = f"{localpipe_rate:9.0f}  {torch_rate:10.0f}"
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"{processes:9}  {rates_text}  {statistics.median(ratios):.2f} ({spread})")


READERS = {"folder": read_folder, "user": read_user}


def main() -> None:
    """Print a table for every way to read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", choices=READERS, help="this one alone")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batches", type=int, default=24, help="of 64 images, in one window")
    arguments = parser.parse_args()
    write_photos()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for name, read in READERS.items():
        if arguments.read not in (None, name):
            continue
        print(f"\n{name}: images per second")
        print("processes  localpipe  DataLoader  ratio (lowest to highest)")
        compare(read, arguments.pairs, arguments.batches)


if __name__ == "__main__":
    main()
