"""Segmentation: pixel cross-entropy, and mean IoU over the whole set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from localpipe.errors import UserError
from localpipe.fields import Field
from localpipe.tasks.layout import map_shape
from localpipe.tasks.metric import Metric
from localpipe.tasks.task import Outputs, Task

_BYTE = 256
_NEVER = -100  # no target has it


@dataclass(frozen=True)
class Segmentation(Task):
    """The task of one class index a pixel. The metric is the mean IoU of the classes.

    sample: (C, H, W). Pixels of the class `ignore_index` count nowhere. Exits read every place of
    a map, and their outputs are upsampled as InfoPro's are on Cityscapes (Wang et al. 2021).
    """

    metric: ClassVar[Metric] = Metric("mean_iou", "higher", is_fraction=True)
    figures: ClassVar[tuple[str, ...]] = ("mean_iou", "accuracy")
    reads: ClassVar[Literal["sample", "token", "place"]] = "place"
    keys: ClassVar[tuple[str, ...]] = ("ignore_index", "average", "aux_weight")

    def __post_init__(self) -> None:
        if len(self.sample) != 3:
            raise UserError(
                f"task: segmentation takes images (C, H, W), but the inputs have shape "
                f"{self.sample}; choose another task.name or data.name"
            )

    @property
    def _ignored(self) -> int:
        ignored: int | None = getattr(self.options, "ignore_index", 255)
        return _NEVER if ignored is None else ignored

    @property
    def _divides_by_valid(self) -> bool:
        return getattr(self.options, "average", "all") == "valid"

    @property
    def _aux_weight(self) -> float:
        weight: float = getattr(self.options, "aux_weight", 0.4)
        return weight

    @property
    def extra_outputs(self) -> tuple[str, ...]:
        """`aux`, that of an auxiliary head inside the network, unless task.aux_weight is 0."""
        return ("aux",) if self._aux_weight else ()

    @property
    def _size(self) -> tuple[int, int]:
        return self.sample[1], self.sample[2]

    @property
    def target(self) -> Field:
        """The field of the masks: name `target`, shape (H, W) per sample, dtype uint8.

        It is int64 where a class or task.ignore_index does not fit a byte.
        """
        fits = self.num_classes <= _BYTE and (self._ignored == _NEVER or 0 <= self._ignored < _BYTE)
        return Field("target", self._size, "uint8" if fits else "int64")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape per sample of what the network gives: (classes, H, W)."""
        return (self.num_classes, *self._size)

    def check_target(self, target: Tensor) -> None:
        """Raise UserError for a pixel that is no class and not ignored."""
        target = target.long()  # a byte would be compared with the byte of a number, 255 with -1
        wrong = (target < 0) | (target >= self.num_classes)
        wrong &= target != self._ignored
        if not wrong.any():
            return
        ignored = "null" if self._ignored == _NEVER else self._ignored
        raise UserError(
            f"data: a mask has a pixel of {int(target[wrong][0])}, which is no class; expected 0 "
            f"to {self.num_classes - 1}, or task.ignore_index, which is {ignored}; give "
            "task.ignore_index that value, or raise model.num_classes"
        )

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the loss of every sample, (B,), in fp32, differentiable in the outputs.

        outputs: (B, classes, H, W), of any float dtype. target: (B, H, W). A loss is the sum of
        the cross-entropies of the valid pixels over the number of all pixels. With task.average
        `valid` it is over the number of valid ones. It is 0 without a valid pixel. On the CPU,
        torch raises IndexError for a target that is no class and not ignored.
        """
        # On CUDA the kernel for rows is deterministic, and the one for images is not.
        rows = outputs.float().movedim(1, -1).flatten(0, -2)
        labels = target.long()
        losses = F.cross_entropy(
            rows, labels.flatten(), reduction="none", ignore_index=self._ignored
        )
        sums = losses.view(len(target), -1).sum(1)
        if not self._divides_by_valid:
            return sums / math.prod(self._size)
        valid = (labels != self._ignored).flatten(1).sum(1)
        return sums / valid.clamp_min(1)

    def loss(self, outputs: Outputs, target: Tensor) -> Tensor:
        """Return the mean loss of the samples, a scalar.

        outputs: as of `losses`, or a pair of it and the outputs of the network's auxiliary head,
        whose loss is added, times task.aux_weight (0.4, as PSPNet has it, Zhao et al. 2017).
        """
        if isinstance(outputs, Tensor):
            return super().loss(outputs, target)
        main, aux = outputs
        return super().loss(main, target) + self._aux_weight * super().loss(aux, target)

    def measure(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return `confusion`, int64 (classes, classes): the pixels of a class, by their prediction.

        The prediction is the class of the largest output. Ignored pixels are left out.
        """
        classes = self.num_classes
        labels = target.long()
        # The pixels of a class and a prediction have one bin. The last bin is for ignored ones.
        bins = labels * classes + outputs.argmax(1)
        bins = torch.where(labels == self._ignored, classes * classes, bins).flatten()
        counts = bins.new_zeros(classes * classes + 1)
        counts.scatter_add_(0, bins, torch.ones_like(bins))
        return {"confusion": counts[:-1].view(classes, classes)}

    def summarise(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, float | None]:
        """Return `mean_iou` and `accuracy` of the pixels, in 0..1, None without a valid pixel.

        A class that neither the targets nor the outputs have is left out of the mean.
        """
        confusion = sums["confusion"].double()
        right = confusion.diagonal()
        unions = confusion.sum(0) + confusion.sum(1) - right
        is_present = unions > 0
        if not is_present.any():
            return {"mean_iou": None, "accuracy": None}
        mean_iou = (right[is_present] / unions[is_present]).mean()
        return {
            "mean_iou": float(mean_iou),
            "accuracy": float(right.sum() / confusion.sum()),
        }

    def pool(self, h: Tensor) -> Tensor:
        """Return the features of every place, (B, h, w, D), a view.

        h: in its standard form, (B, D, h, w), or (B, T, D) of tokens that have the grid. Other
        shapes are refused by `features`.
        """
        if h.dim() == 4:
            return h.movedim(1, -1)
        assert self.grid is not None, "checked by `features`"
        grid = self.grid.at(h.shape[1])
        assert grid is not None, "checked by `features`"
        rows: Tensor = grid.patches(h).unflatten(1, grid.side)
        return rows

    def features(self, shape: tuple[int, ...]) -> int:
        """Return D, the width of `pool`, for a shape (D, h, w), or (T, D) of tokens on the grid.

        Raises UserError for a shape without places.
        """
        shape = map_shape(shape, self.grid)
        if len(shape) != 3:
            raise UserError(
                f"task: segmentation has no rule for an activation of shape {shape}; expected "
                "(C, H, W), or (T, D) of a network that says how its tokens lie; move the cut"
            )
        return shape[0]

    def to_outputs(self, rows: Tensor) -> Tensor:
        """Return (B, classes, H, W) of (B, h, w, classes), upsampled as bilinear interpolation.

        The corners are aligned.
        """
        maps = rows.movedim(-1, 1)
        if maps.shape[2:] == self._size:
            return maps
        return F.interpolate(maps.float(), self._size, mode="bilinear", align_corners=True)
