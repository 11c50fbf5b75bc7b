"""InfoPro (Wang et al., ICLR 2021): keep what the input says, and what the label says, in every stage's output.

The surrogate of the paper's information-theoretic loss: weight_1 * reconstruction + weight_2 * task, each weight moving in a
straight line from its first to its last value over the local stages. Reconstruction is the binary cross-entropy between a
decoder's image and the augmented input in 0..1; the task term is a head's cross-entropy, or a supervised contrast.

For tokens nothing is published: here decoder and head see the patch tokens folded to their grid, without the class token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from localpipe.config.keys import NonNegative, as_tuple
from localpipe.errors import UserError
from localpipe.methods.heads import build_head
from localpipe.methods.infopro_coefficients import ALIKE, OFF, Pair, published_weights
from localpipe.methods.objective import LocalLoss, Site, full_precision, interpolate
from localpipe.networks.layers import conv_bn_relu, init_convolutions

PROJECTION = 128
TEMPERATURE = 0.07
LARGE = 128  # image sides from here on have the decoder and head of ImageNet
DEFAULT_HEAD: Final = "1c2f"
Weights = Annotated[Literal["auto"] | tuple[NonNegative, NonNegative], BeforeValidator(as_tuple)]


class Decoder(nn.Module):
    """Bilinear upsampling of h to the image, then two 3x3 convolutions; (B, C, h, w) to logits (B, 3, H, W).

    The released code's decoder for CIFAR, SVHN and STL-10.
    """

    def __init__(self, channels: int, image: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = image[1:]
        hidden = 12
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, image[0], 3, padding=1),
        )
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.layers(
            F.interpolate(h, self.size, mode="bilinear", align_corners=True)
        )
        return logits


class LargeDecoder(nn.Module):
    """The released code's decoder for ImageNet; (B, C, h, w) to logits (B, 3, H, W).

    A 1x1 convolution to 128 channels, then three times bilinear upsampling and a 3x3 convolution, to 32, 12 and the image's
    channels: twice to double the side, but no further than the image's, at last to the image's.
    """

    def __init__(self, shape: tuple[int, ...], image: tuple[int, int, int]) -> None:
        super().__init__()
        once, twice = (
            tuple(min(n * h, side) for h, side in zip(shape[1:], image[1:], strict=True))
            for n in (2, 4)
        )
        self.layers = nn.Sequential(
            nn.Conv2d(shape[0], 128, 1), nn.BatchNorm2d(128), nn.ReLU(inplace=True),
            _upsampling(once), nn.Conv2d(128, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
            _upsampling(twice), nn.Conv2d(32, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            _upsampling(image[1:]), nn.Conv2d(12, image[0], 3, padding=1),
        )  # fmt: skip
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.layers(h)
        return logits


def _upsampling(size: tuple[int, ...]) -> nn.Module:
    return nn.Upsample(size, mode="bilinear", align_corners=True)


class LargeHead(nn.Module):
    """The released code's head for ImageNet: 1x1, two strided 3x3 and a 1x1 convolution to 2048 channels, pooled."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        widths = ((channels, 128, 1, 1), (128, 256, 3, 2), (256, 512, 3, 2), (512, 2048, 1, 1))
        self.layers = nn.Sequential(
            *(layer for i, o, k, s in widths for layer in conv_bn_relu(i, o, k, s))
        )
        self.fc = nn.Linear(2048, outputs)
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.fc(self.layers(h).mean((2, 3)))
        return out


def supervised_contrast(z: Tensor, y: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Supervised contrastive loss of one view per image (Khosla et al. 2020, eq. 2; as used by InfoPro).

    z: (B, D) projections, L2-normalised here. y: (B,) class indices. Returns the mean over all B anchors; an anchor without
    a positive adds 0, and a batch without one gives 0.
    """
    z = F.normalize(z.float(), dim=1)
    with full_precision(z):
        alike = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    others = alike.masked_fill(itself, float("-inf"))
    log_share = alike - torch.logsumexp(others, dim=1, keepdim=True)
    positive = (y[:, None] == y[None, :]) & ~itself
    count = positive.sum(1)
    per_anchor = -log_share.masked_fill(~positive, 0.0).sum(1) / count.clamp_min(1)
    return per_anchor.mean()


class InfoPro(LocalLoss):
    """Reconstruct the input and serve the task, with weights that move over the local stages.

    Without reconstruction (`image_weight` [0, 0]) it is ContSup's local loss; the task's weight is then 1 at every stage.
    """

    @dataclass(frozen=True)
    class Options:
        """`image_weight` and `task_weight` are [first, last]; auto takes the published pair where there is one."""

        task: Annotated[
            Literal["softmax", "contrast"],
            Field(
                description="the task term: cross-entropy, or a supervised contrast, which gives stages no exit"
            ),
        ] = "softmax"
        head: Annotated[
            Literal["0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f"],
            Field(
                description="the task term's network: N convolutions and M linear layers, NcMf; images of 128 pixels and more "
                "have ImageNet's in its place"
            ),
        ] = DEFAULT_HEAD
        image_weight: Annotated[
            Weights, Field(description="[first, last] weight of the reconstruction")
        ] = "auto"
        task_weight: Annotated[
            Weights, Field(description="[first, last] weight of the task term")
        ] = "auto"

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        self.task, self.contrast = site.blueprint.task, options.task == "contrast"
        self.replicas = site.replicas
        image, shape = site.blueprint.image, site.map
        if len(shape) != 3:
            raise site.refuse("infopro")
        self.image_weight, self.task_weight = stage_weights(options, site.stage, site.stages)
        large = min(image[1:]) >= LARGE
        self.decoder: nn.Module | None = None
        self.head: nn.Module | None = None
        if _built(options.image_weight):
            make = (
                (lambda: LargeDecoder(shape, image))
                if large
                else (lambda: Decoder(shape[0], image))
            )
            self.decoder = site.unit("decoder", lambda: site.folded(make()))
        if _built(options.task_weight):
            outputs = PROJECTION if self.contrast else self.task.num_classes
            if large and options.head != DEFAULT_HEAD:
                raise UserError(
                    f"objective: images of {LARGE} pixels and more have ImageNet's head; got method.objective.head "
                    f"{options.head}; leave it out"
                )
            if large:
                self.head = site.unit("head", lambda: site.folded(LargeHead(shape[0], outputs)))
            else:
                self.head = build_head(options.head, site, outputs)

    @staticmethod
    def needs_image(options: Options, stage: int, stages: int) -> bool:
        """Return whether the reconstruction runs at a local stage."""
        return stage_weights(options, stage, stages)[0] != 0

    @staticmethod
    def is_cross_entropy(options: Options) -> bool:
        """Return whether only the softmax term is there."""
        return options.task == "softmax" and not _built(options.image_weight)

    @staticmethod
    def is_over_pairs(options: Options) -> bool:
        """Return whether the task term is the contrast."""
        return options.task == "contrast" and _built(options.task_weight)

    @staticmethod
    def resolved(
        options: Options, network: str, data: str, cuts: str | tuple[int, ...], stages: int
    ) -> Options:
        """Return the published weights for a network, a data set and a cut, or the general ones, where they are auto.

        Raise UserError where a stage would have no loss.
        """
        image, task = published_weights(network, data, cuts, stages)
        image = image if options.image_weight == "auto" else options.image_weight
        task = ALIKE if image == OFF else task
        decided = replace(
            options,
            image_weight=image,
            task_weight=task if options.task_weight == "auto" else options.task_weight,
        )
        idle = [
            stage for stage in range(stages - 1) if stage_weights(decided, stage, stages) == OFF
        ]
        if idle:
            raise UserError(
                f"config: method.objective gives stage {idle[0]} of {stages} no loss: there image_weight {list(image)} and "
                f"task_weight {list(decided.task_weight)} are both 0; give either a value above 0 there"
            )
        return decided

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum.

        h: (B, C, H, W) or (B, T, D); fields["image"]: (B, 3, H, W) uint8; fields["target"]: (B,).
        """
        loss = h.new_zeros((), dtype=torch.float32)
        if self.decoder is not None and self.image_weight:
            image = fields["image"].float() / 255
            loss = loss + self.image_weight * F.binary_cross_entropy_with_logits(
                self.decoder(h).float(), image
            )
        if self.head is not None and self.task_weight:
            out, target = self.head(h), fields["target"]
            if self.contrast:
                term = supervised_contrast(
                    self.replicas.gathered(out), self.replicas.gathered(target)
                )
            else:
                term = self.task.loss(out, target)
            loss = loss + self.task_weight * term
        return loss

    def exit(self, h: Tensor) -> Tensor | None:
        """Return the head's logits, or None where it projects, or was never trained."""
        if self.head is None or self.contrast or not self.task_weight:
            return None
        logits: Tensor = self.head(h)
        return logits


def stage_weights(options: InfoPro.Options, stage: int, stages: int) -> tuple[float, float]:
    """Return the reconstruction's and the task's weight at a local stage."""
    assert options.image_weight != "auto" and options.task_weight != "auto", (
        "resolved before a stage is built"
    )
    return interpolate(options.image_weight, stage, stages), interpolate(
        options.task_weight, stage, stages
    )


def _built(pair: Literal["auto"] | Pair) -> bool:
    return pair != OFF
