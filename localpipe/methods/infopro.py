"""InfoPro (Wang et al., ICLR 2021): a loss on what h keeps of the input and the label.

It is the surrogate of the paper's information-theoretic loss:

    loss = weight_1 * reconstruction + weight_2 * task

Each weight moves in a straight line from its first to its last value over the local stages.
Reconstruction is the binary cross-entropy between a decoder's image and the augmented input in
0..1. The task term is a head's cross-entropy, or a supervised contrastive loss.

For tokens nothing is published. Here decoder and head get the patch tokens folded to their grid,
without the class token.
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
from localpipe.fields import IMAGE
from localpipe.methods.heads import build_head
from localpipe.methods.infopro_coefficients import ALIKE, OFF, Pair, published_weights
from localpipe.methods.objective import LocalLoss, Site, full_precision, interpolate
from localpipe.networks.layers import conv_bn_relu, init_convolutions, normalise_rows

PROJECTION = 128
TEMPERATURE = 0.07
LARGE = 128  # images of this side and more have the decoder and head of ImageNet
DEFAULT_HEAD: Final = "1c2f"
Weights = Annotated[Literal["auto"] | tuple[NonNegative, NonNegative], BeforeValidator(as_tuple)]


class Decoder(nn.Module):
    """Bilinear upsampling of h to the image, then two 3x3 convolutions.

    (B, C, h, w) to logits (B, 3, H, W). It is the released code's decoder for CIFAR, SVHN and
    STL-10. image: the shape (3, H, W), or with other channels.
    """

    def __init__(self, channels: int, image: tuple[int, ...]) -> None:
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
        """Return the logits of the image, (B, *image)."""
        upsampled = F.interpolate(h, self.size, mode="bilinear", align_corners=True)
        logits: Tensor = self.layers(upsampled)
        return logits


class LargeDecoder(nn.Module):
    """The released code's decoder for ImageNet: (B, C, h, w) to logits (B, 3, H, W).

    A 1x1 convolution to 128 channels comes first. Three times follow bilinear upsampling and a 3x3
    convolution, to 32, to 12 and to the image's channels. The first two double the side, but not
    beyond the image's. The third has the image's side.
    """

    def __init__(self, shape: tuple[int, ...], image: tuple[int, ...]) -> None:
        super().__init__()
        doubled = _enlarge(shape[1:], 2, image[1:])
        quadrupled = _enlarge(shape[1:], 4, image[1:])
        layers: list[nn.Module] = [nn.Conv2d(shape[0], 128, 1)]
        layers += [nn.BatchNorm2d(128), nn.ReLU(inplace=True)]
        layers += [_build_upsampling(doubled), nn.Conv2d(128, 32, 3, padding=1)]
        layers += [nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
        layers += [_build_upsampling(quadrupled), nn.Conv2d(32, 12, 3, padding=1)]
        layers += [nn.BatchNorm2d(12), nn.ReLU(inplace=True)]
        layers += [_build_upsampling(image[1:]), nn.Conv2d(12, image[0], 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits of the image, (B, *image)."""
        logits: Tensor = self.layers(h)
        return logits


def _enlarge(size: tuple[int, ...], factor: int, limit: tuple[int, ...]) -> tuple[int, ...]:
    """Return (height, width) times a factor, each at most its limit."""
    return tuple(min(factor * side, most) for side, most in zip(size, limit, strict=True))


def _build_upsampling(size: tuple[int, ...]) -> nn.Module:
    return nn.Upsample(size, mode="bilinear", align_corners=True)


class LargeHead(nn.Module):
    """The released code's head for ImageNet: (B, channels, H, W) to (B, outputs).

    A 1x1, two strided 3x3 and a 1x1 convolution to 2048 channels, then pooling and a linear layer.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_bn_relu(channels, 128, 1),
            *conv_bn_relu(128, 256, 3, stride=2),
            *conv_bn_relu(256, 512, 3, stride=2),
            *conv_bn_relu(512, 2048, 1),
        )
        self.fc = nn.Linear(2048, outputs)
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        """Return the outputs, (B, outputs), one for each sample."""
        features = self.layers(h).mean((2, 3))
        out: Tensor = self.fc(features)
        return out


def supervised_contrastive_loss(z: Tensor, y: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return the supervised contrastive loss of one view per image, a scalar in fp32.

    Source: Khosla et al. 2020, eq. 2, as used by InfoPro. z: (B, D) projections, L2-normalised
    here. y: (B,) class indices. The result is the mean over all B anchors. An anchor without a
    positive adds 0, and a batch without any gives 0. It is differentiable in z.
    """
    z = normalise_rows(z.float(), eps=1e-12)
    with full_precision(z):
        similarities = z @ z.T / temperature  # (B, B)
    is_self = torch.eye(len(z), dtype=torch.bool, device=z.device)

    # The log-probability of a sample among all samples but the anchor itself.
    logits = similarities.masked_fill(is_self, float("-inf"))
    log_probabilities = similarities - torch.logsumexp(logits, dim=1, keepdim=True)

    # Its mean over the anchor's positives: the other samples of its class.
    is_positive = (y[:, None] == y[None, :]) & ~is_self
    positives = is_positive.sum(1)
    sums = -log_probabilities.masked_fill(~is_positive, 0.0).sum(1)
    return (sums / positives.clamp_min(1)).mean()


class InfoPro(LocalLoss):
    """Reconstruction of the input and the task term, with weights that move over the local stages.

    Without reconstruction (`image_weight` [0, 0]) it is ContSup's local loss. Then the task's
    weight is 1 at every stage, where it is auto. The constructor takes resolved options. It raises
    UserError for activations that are no map and no tokens on a grid, and for a head that large
    images do not have. It also does for a contrast of samples without classes, and for a
    reconstruction of inputs that are no images of bytes.
    """

    @dataclass(frozen=True)
    class Options:
        """`image_weight` and `task_weight` are [first, last], or auto for the published pair."""

        task: Annotated[
            Literal["softmax", "contrast"],
            Field(
                description="the task term: cross-entropy, "
                "or a supervised contrast, which gives stages no exit"
            ),
        ] = "softmax"
        head: Annotated[
            Literal["0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f"],
            Field(
                description="the task term's network: N convolutions and M linear layers, NcMf; "
                "images of 128 pixels and more have ImageNet's, or Cityscapes', in its place"
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
        self.task = site.blueprint.task
        self.contrast = options.task == "contrast"
        self.replicas = site.replicas
        if site.reads_tokens:
            raise UserError(
                "objective: infopro is for images, and the task reads tokens; choose greedy, dgl "
                "or auglocal"
            )
        if len(site.map) != 3:
            raise site.refuse("infopro")
        if InfoPro.is_over_pairs(options) and not self.task.has_labels:
            raise site.refuse_task("infopro's contrast")
        if _has_term(options.image_weight):
            _check_images(site)
        self.image_weight, self.task_weight = stage_weights(options, site.stage, site.stages)
        # Both are None where their term has weight 0 at every stage.
        self.decoder: nn.Module | None = None
        self.head: nn.Module | None = None
        if _has_term(options.image_weight):
            self.decoder = _build_decoder(site)
        if _has_term(options.task_weight):
            outputs = self.task.num_classes
            if self.contrast:
                outputs = PROJECTION
            self.head = _build_head(options.head, site, outputs)

    @staticmethod
    def needs_image(options: Options, stage: int, stages: int) -> bool:
        """Return whether the reconstruction runs at a local stage, where its weight is not 0.

        Raises AssertionError if a weight of the options is still auto.
        """
        image_weight, _ = stage_weights(options, stage, stages)
        return image_weight != 0

    @staticmethod
    def is_cross_entropy(options: Options) -> bool:
        """Return whether the softmax term is the only one.

        It is False while `image_weight` is auto.
        """
        return options.task == "softmax" and not _has_term(options.image_weight)

    @staticmethod
    def is_over_pairs(options: Options) -> bool:
        """Return whether there is a task term, and it is the contrastive loss.

        A `task_weight` of auto counts as a task term.
        """
        return options.task == "contrast" and _has_term(options.task_weight)

    @staticmethod
    def resolved(
        options: Options, network: str, data: str, cuts: str | tuple[int, ...], stages: int
    ) -> Options:
        """Return the options with weights in place of auto: the published or the general ones.

        The published ones are those of a network, a data set and a cut. Without reconstruction, a
        `task_weight` of auto is [1, 1]. Weights that are set stay. Raises UserError if both weights
        are 0 at a local stage.
        """
        published_image, published_task = published_weights(network, data, cuts, stages)
        image_weight = options.image_weight
        if image_weight == "auto":
            image_weight = published_image
        task_weight = options.task_weight
        if task_weight == "auto":
            task_weight = published_task
            # The published task weights go with a reconstruction.
            if image_weight == OFF:
                task_weight = ALIKE
        resolved = replace(options, image_weight=image_weight, task_weight=task_weight)

        for stage in range(stages - 1):
            if stage_weights(resolved, stage, stages) == OFF:
                raise UserError(
                    f"config: method.objective gives stage {stage} of {stages} no loss: "
                    f"there image_weight {list(image_weight)} and task_weight {list(task_weight)} "
                    "are both 0; give either a value above 0 there"
                )
        return resolved

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum, a scalar in fp32. A term of weight 0 does not run.

        h: (B, C, H, W) or (B, T, D). fields["image"]: (B, 3, H, W) in 0..255. fields["target"]:
        (B,). A field is read only if its term runs, and is then missed with KeyError.
        """
        loss = h.new_zeros((), dtype=torch.float32)
        if self.decoder is not None and self.image_weight:
            image = fields["image"].float() / 255
            logits = self.decoder(h).float()
            reconstruction = F.binary_cross_entropy_with_logits(logits, image)
            loss = loss + self.image_weight * reconstruction
        if self.head is not None and self.task_weight:
            loss = loss + self.task_weight * self._task_term(self.head(h), fields["target"])
        return loss

    def _task_term(self, out: Tensor, target: Tensor) -> Tensor:
        """Return the unweighted task term. out: logits or projections. target: (B,)."""
        if not self.contrast:
            return self.task.loss(out, target)
        # The pairs are those of the full batch, over all replicas.
        projections = self.replicas.gathered(out)
        return supervised_contrastive_loss(projections, self.replicas.gathered(target))

    def exit(self, h: Tensor) -> Tensor | None:
        """Return the logits, (B, classes), or None where no classifier is trained.

        A head of the contrast gives projections, so it is none. The head is not trained where the
        task term has weight 0 at this stage.
        """
        if self.head is None or self.contrast or not self.task_weight:
            return None
        logits: Tensor = self.head(h)
        return logits


def _check_images(site: Site) -> None:
    """Raise UserError unless the inputs are images of bytes, whose range is known."""
    inputs = site.blueprint.inputs
    if inputs.name != IMAGE:
        raise UserError(
            f"objective: infopro reconstructs images of bytes, but the inputs are {inputs.dtype} "
            f"of shape {inputs.shape}; set method.objective.image_weight: [0, 0], or choose "
            "another objective"
        )


def _is_large(site: Site) -> bool:
    """Return whether the images have the decoder and head of ImageNet."""
    sample = site.blueprint.sample
    return len(sample) == 3 and min(sample[1:]) >= LARGE


def _build_decoder(site: Site) -> nn.Module:
    shape, image = site.map, site.blueprint.sample
    if _is_large(site):
        return site.unit("decoder", lambda: site.folded(LargeDecoder(shape, image)))
    return site.unit("decoder", lambda: site.folded(Decoder(shape[0], image)))


def _build_head(kind: str, site: Site, outputs: int) -> nn.Module:
    """Return the head of the task term.

    Raise UserError where large images have no head of this kind.
    """
    if not _is_large(site):
        return build_head(kind, site, outputs)
    if kind != DEFAULT_HEAD:
        raise UserError(
            f"objective: images of {LARGE} pixels and more have ImageNet's head; "
            f"got method.objective.head {kind}; leave it out"
        )
    if site.reads_places:
        return build_head("mlp", site)  # that of Cityscapes
    return site.unit("head", lambda: site.folded(LargeHead(site.map[0], outputs)))


def stage_weights(options: InfoPro.Options, stage: int, stages: int) -> tuple[float, float]:
    """Return the reconstruction's and the task's weight at a local stage.

    stage: 0 .. stages - 2. Raises AssertionError if a weight of the options is auto.
    """
    image_weight, task_weight = options.image_weight, options.task_weight
    assert image_weight != "auto" and task_weight != "auto", "resolved before a stage is built"
    return interpolate(image_weight, stage, stages), interpolate(task_weight, stage, stages)


def _has_term(pair: Literal["auto"] | Pair) -> bool:
    return pair != OFF
