"""What enters a stage: the normalised image, or the received activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """uint8 images (B, C, H, W) to floats of the data set's mean 0 and deviation 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image.float() - self.mean) / self.std
