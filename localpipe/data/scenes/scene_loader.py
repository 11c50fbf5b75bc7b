"""Scenes that are read by index, and the loader that reads and crops them ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localpipe.data.images import one_line_reason
from localpipe.data.samples import Request, Samples
from localpipe.data.scenes.view import ViewRecipe, draw_views, view_scene
from localpipe.data.user.pool import LoaderPool
from localpipe.data.user.wire import ArrayFormat, Arrays, ArrayWriter, Content, Progress
from localpipe.errors import RunError
from localpipe.fields import IMAGE

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class SceneFiles:
    """The N scenes of a split, as files.

    images, masks: paths, N each. size: (H, W) of whole images. labels: the class of every byte of a
    mask, or IGNORED, 256 numbers.
    """

    images: tuple[str, ...]
    masks: tuple[str, ...]
    size: tuple[int, int]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class SceneSamples:
    """The scenes at `rows` (B,) of some files."""

    files: SceneFiles
    rows: NDArray[np.int64]

    @property
    def labels(self) -> None:
        """None: a target is a mask."""
        return None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: NDArray[np.int64]) -> SceneSamples:
        """Return the scenes at `rows` (B,), in that order."""
        return replace(self, rows=self.rows[rows])

    def read(self, index: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Return whole scenes: `image` (B, 3, H, W) and `target` (B, H, W), uint8.

        Raises RunError for a file that cannot be read, or of another size.
        """
        request = _write_request(Request("test", 0, slice(0)), self, index, 0, None)
        return _read_here(request)


@dataclass(frozen=True)
class SceneLoader:
    """Reads batches of scenes: views of them for training, and else whole images.

    recipe: of the views. processes: how many read, 0 for a thread of this one. timeout_s: for a
    batch.
    """

    recipe: ViewRecipe
    processes: int
    timeout_s: float

    def with_classes(self, count: int, ignored: int | None = None) -> SceneLoader:
        """Return the loader itself: its masks have no other classes than the data set."""
        return self

    def read(
        self, requests: Iterable[tuple[Request, Samples, NDArray[np.int64]]], seed: int
    ) -> Iterator[Mapping[str, Tensor]]:
        """Yield the batch of every request, as `BatchLoader.read` says.

        The view of a training image depends on (seed, epoch, index). So no batch depends on the
        number of processes.
        """
        contents = (self._write(*request, seed) for request in requests)
        if self.processes == 0:
            for content in contents:
                arrays = _read_here(content)
                yield {name: torch.from_numpy(array) for name, array in arrays.items()}
            return
        pool = LoaderPool("scenes", self.timeout_s)
        try:
            pool.grow(self.processes)
            for _, tensors in pool.answer(contents):
                yield tensors
        finally:
            pool.close()

    def _write(
        self, request: Request, samples: Samples, index: NDArray[np.int64], seed: int
    ) -> Content:
        assert isinstance(samples, SceneSamples), "every split is one"
        recipe = self.recipe if request.split == "train" else None
        return _write_request(request, samples, index, seed, recipe)


def _write_request(
    request: Request,
    samples: SceneSamples,
    index: NDArray[np.int64],
    seed: int,
    recipe: ViewRecipe | None,
) -> Content:
    files, rows = samples.files, samples.rows[index].tolist()
    return {
        "kind": "scenes",
        "split": request.split,
        "epoch": request.epoch,
        "seed": seed,
        # The index in the files, from which the random numbers come.
        "indices": rows,
        "images": [files.images[row] for row in rows],
        "masks": [files.masks[row] for row in rows],
        "size": files.size,
        "labels": files.labels,
        "recipe": None if recipe is None else asdict(recipe),
    }


def read_scenes(request: Content, writer: ArrayWriter, progress: Progress) -> Content:
    """Write the arrays of a request of `SceneLoader`. It runs in a loader process.

    Raises RunError for the first file that cannot be read.
    """
    arrays = writer.allocate(_find_formats(request))
    with progress.mark(request["split"], next(iter(request["indices"]), 0)):
        _fill_arrays(request, arrays)
    return {}


def _read_here(request: Content) -> Arrays:
    """Return the arrays of a request, read in this process."""
    arrays = {}
    for name, form in _find_formats(request).items():
        arrays[name] = np.empty(form.shape, form.dtype)
    _fill_arrays(request, arrays)
    return arrays


def _find_formats(request: Content) -> dict[str, ArrayFormat]:
    size = request["size"] if request["recipe"] is None else request["recipe"]["size"]
    count = len(request["indices"])
    return {
        IMAGE: ArrayFormat((count, 3, *size), "uint8"),
        "target": ArrayFormat((count, *size), "uint8"),
    }


def _fill_arrays(request: Content, arrays: Arrays) -> None:
    """Read the scenes of a request into its arrays."""
    labels = np.array(request["labels"], np.uint8)
    recipe = _read_recipe(request["recipe"])
    numbers = draw_views(request["seed"], np.array(request["indices"], np.int64), request["epoch"])
    for row, paths in enumerate(zip(request["images"], request["masks"], strict=True)):
        image, mask = _open_scene(*paths, labels)
        if recipe is None:
            _check_size(paths[0], image, request["size"])
            pixels, classes = np.asarray(image), np.asarray(mask)
        else:
            pixels, classes = view_scene(image, mask, recipe, numbers[row].tolist())
        arrays[IMAGE][row] = pixels.transpose(2, 0, 1)
        arrays["target"][row] = classes


def _read_recipe(content: Mapping[str, Any] | None) -> ViewRecipe | None:
    if content is None:
        return None
    return ViewRecipe(tuple(content["size"]), content["is_random"], tuple(content["background"]))


def check_scene(image_path: str, mask_path: str, size: Sequence[int] | None) -> None:
    """Read the headers of an image and of its mask.

    size: (H, W) that the image must have, None for any. Raises RunError for a file that cannot be
    read, a mask that does not fit its image, and another size.
    """
    with _open_file(image_path) as image, _open_file(mask_path) as mask:
        _check_mask(mask_path, mask, image)
        if size is not None:
            _check_size(image_path, image, size)


def _open_scene(image_path: str, mask_path: str, labels: NDArray[np.uint8]) -> tuple[Image, Image]:
    """Return an image in red, green and blue, and its mask of classes."""
    from PIL import Image

    image = _load_image(image_path).convert("RGB")
    mask = _load_image(mask_path)
    _check_mask(mask_path, mask, image)
    return image, Image.fromarray(labels[np.asarray(mask)])


def _load_image(path: str) -> Image:
    with _open_file(path) as file:
        try:
            file.load()
        except Exception as error:  # Pillow's decoders raise errors of many classes
            raise _unreadable(path, error) from None
        return file


def _open_file(path: str) -> Image:
    """Open an image, and read its header alone."""
    from PIL import Image

    try:
        return Image.open(path)
    except Exception as error:  # Pillow's decoders raise errors of many classes
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> RunError:
    return RunError(f"data: cannot read {path}: {one_line_reason(error)}; unpack its archive again")


def _check_mask(path: str, mask: Image, image: Image) -> None:
    if mask.mode not in ("L", "P"):
        raise RunError(
            f"data: {path} has pixels of mode {mask.mode}; expected a mask of one byte a "
            "pixel, its labelIds; unpack its archive again"
        )
    if mask.size != image.size:
        raise RunError(
            f"data: {path} is {_describe_size(mask)}, but its image is "
            f"{_describe_size(image)}; unpack both archives again"
        )


def _check_size(path: str, image: Image, size: Sequence[int]) -> None:
    if (image.height, image.width) != tuple(size):
        raise RunError(
            f"data: {path} is {_describe_size(image)}, but images in an evaluation are "
            f"{size[0]} x {size[1]}; give images of one size"
        )


def _describe_size(image: Image) -> str:
    return f"{image.height} x {image.width}"


def all_scenes(files: SceneFiles) -> SceneSamples:
    """Return all scenes of some files, in their order."""
    return SceneSamples(files, np.arange(len(files.images)))
