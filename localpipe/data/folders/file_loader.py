"""Image files that loader processes decode and augment, a batch each, ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localpipe.config.keys import Data
from localpipe.data.augment import ImageRecipe, augment_images, read_channels_first
from localpipe.data.folders.decode import Rendering
from localpipe.data.folders.image_folder import FITS, FileImages
from localpipe.data.images import Images, ImageSubset
from localpipe.data.user.pool import LoaderPool
from localpipe.data.user.wire import ArrayFormat, ArrayWriter, Content, Progress


@dataclass(frozen=True)
class FileRequest:
    """A batch of images that will be read.

    split: its name. images: of the split. index: (B,), of the images. epoch: of training images,
    which are augmented.
    """

    split: str
    images: Images
    index: NDArray[np.int64]
    epoch: int


@dataclass(frozen=True)
class FileLoader:
    """Reads batches of image files in loader processes, with the bytes that threads would give.

    processes: how many read. timeout_s: for a batch. recipe: of the training images.
    """

    processes: int
    timeout_s: float
    recipe: ImageRecipe

    def read(self, requests: Iterable[FileRequest], seed: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the images of every request, (B, C, H, W), in order. Requests are read ahead.

        The processes start here, and end with the iterator. Raises RunError for a broken file, for
        a process that dies, and for a batch that takes too long.
        """
        pool = LoaderPool("image files", self.timeout_s)
        contents = (self._write_request(request, seed) for request in requests)
        try:
            pool.grow(self.processes)
            for _, arrays in pool.answer(contents):
                yield arrays["input"].numpy()
        finally:
            pool.close()

    def _write_request(self, request: FileRequest, seed: int) -> Content:
        files, rows = find_files(request.images, request.index)
        return {
            "kind": "files",
            "split": request.split,
            "epoch": request.epoch,
            "seed": seed,
            "indices": request.index.tolist(),
            "paths": [files.paths[row] for row in rows.tolist()],
            "size": files.size,
            "fit": files.fit.__name__,
            "rendering": asdict(files.rendering),
            "recipe": asdict(self.recipe) if request.split == "train" else None,
        }


def find_loader(config: Data, images: Images, recipe: ImageRecipe) -> FileLoader | None:
    """Return the loader of a split's image files, None where threads of the worker read them.

    data.workers is their number. None are asked for by 0, nor by `auto`, which is decided later.
    """
    if not isinstance(images, FileImages) or config.workers in ("auto", 0):
        return None
    assert isinstance(config.workers, int)
    return FileLoader(config.workers, config.timeout_s, recipe)


def find_files(images: Images, index: NDArray[np.int64]) -> tuple[FileImages, NDArray[np.int64]]:
    """Return the files that images are read from, and where those at `index` (B,) are among them.

    images: image files, or a subset of them.
    """
    while isinstance(images, ImageSubset):
        index = images.rows[index]
        images = images.images
    assert isinstance(images, FileImages), "only image files have a loader"
    return images, index


def read_files(request: Content, writer: ArrayWriter, progress: Progress) -> Content:
    """Write the array `input` (B, 3, H, W) of a `FileRequest`. It runs in a loader process.

    Raises RunError for the first broken file.
    """
    indices: list[int] = request["indices"]
    size: tuple[int, int] = tuple(request["size"])
    arrays = writer.allocate({"input": ArrayFormat((len(indices), 3, *size), "uint8")})
    if not indices:
        return {}
    fit, rendering = FITS[request["fit"]], _read_rendering(request["rendering"])
    images = FileImages(request["paths"], size, fit, rendering, threads=1)
    rows = np.arange(len(indices))
    with progress.mark(request["split"], indices[0]):
        if request["recipe"] is None:
            arrays["input"][...] = read_channels_first(images, rows)
        else:
            recipe = _read_recipe(request["recipe"])
            arrays["input"][...] = augment_images(
                recipe, images, rows, np.array(indices), request["seed"], request["epoch"]
            )
    return {}


def _read_rendering(content: dict[str, Any]) -> Rendering:
    limits, background = content["value_range"], content["background"]
    return Rendering(None if limits is None else tuple(limits), tuple(background))


def _read_recipe(content: dict[str, Any]) -> ImageRecipe:
    words = content["augment"]
    augment = words if isinstance(words, str) else tuple(words)
    return ImageRecipe(**{**content, "augment": augment, "mean": tuple(content["mean"])})
