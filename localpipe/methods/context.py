"""ContSup's context (2023): what a stage sees beside its predecessor's output, past the chain that loses information.

At the boundary in front of stage k the received activation h becomes h + M(context), and M, the adapter, belongs to stage
k: trained by its loss, kept at inference. Mode E encodes the image; Rn the n most recent merged activations, the image
counting as the oldest; RnE both, the image once.

For tokens nothing is published: here an encoder of the image (E, or the oldest source of Rn) adds to the patch tokens alone,
and a merged activation passes a layer norm and a linear layer, class token included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localpipe.networks.layers import init_convolutions, pool_to
from localpipe.tasks.layout import Grid, Unfold

IMAGE = "image"


@dataclass(frozen=True)
class Source:
    """One thing an adapter reads: a field of the message, through the image encoder or a 1x1 encoder."""

    field: str
    encodes_image: bool

    @property
    def name(self) -> str:
        """The encoder's name in the state_dict."""
        return ("e_" if self.encodes_image else "r_") + self.field.replace(".", "_")


def context_sources(mode: str, stage: int) -> tuple[Source, ...]:
    """Return what the adapter in front of a stage reads, most recent first; nothing for stage 0.

    `ctx.j` is the merged activation at boundary j, the input of stage j + 1; n beyond what exists is truncated.
    """
    if mode == "none" or stage == 0:
        return ()
    match = re.fullmatch(r"(?:R(\d+))?(E?)", mode)
    assert match is not None, "checked by the configuration"
    count, with_image = int(match[1] or 0), bool(match[2])
    merged = [Source(f"ctx.{j}", False) for j in range(stage - 2, -1, -1)]
    if with_image:
        return (*merged[:count], Source(IMAGE, True))
    return tuple([*merged, Source(IMAGE, False)][:count])


class ImageEncoder(nn.Module):
    """Two 3x3 convolutions at full resolution, pooled last; (B, 3, H, W) to (B, C, h, w)."""

    def __init__(self, channels: int, outputs: int, side: tuple[int, int]) -> None:
        super().__init__()
        hidden = 12
        self.side = side
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True),
            nn.Conv2d(hidden, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return pool_to(self.layers(x), self.side)


class FeatureEncoder(nn.Module):
    """A 1x1 convolution, pooled last; (B, inputs, H, W) to (B, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int, side: tuple[int, int]) -> None:
        super().__init__()
        self.side = side
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return pool_to(self.layers(x), self.side)


class TokenEncoder(nn.Sequential):
    """A layer norm and a linear layer; (B, T, inputs) to (B, T, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.LayerNorm(inputs), nn.Linear(inputs, outputs))


def build_encoder(
    source: Source, shape: tuple[int, ...], output: tuple[int, ...], grid: Grid | None
) -> nn.Module:
    """Return the encoder of a source of `shape` for activations of shape `output`, (C, H, W), or (T, D) on a grid."""
    if len(shape) == len(output) == 2:
        return TokenEncoder(shape[1], output[1])
    make = ImageEncoder if source.encodes_image else FeatureEncoder
    if len(output) == 3:
        return make(shape[0], output[0], (output[1], output[2]))
    assert grid is not None, "checked by the stage"
    return nn.Sequential(make(shape[0], output[1], grid.side), Unfold(grid))


class Adapter(nn.Module):
    """The sum of a stage's encoders; the merge is an addition out of place."""

    def __init__(
        self,
        read: Sequence[Source],
        shapes: Mapping[str, tuple[int, ...]],
        output: tuple[int, ...],
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        for source in read:
            self.add_module(source.name, build_encoder(source, shapes[source.field], output, grid))
        self._read = tuple(read)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the message that the adapter reads."""
        return tuple(source.field for source in self._read)

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return h + the context, (B, C, H, W) or (B, T, D) like h. `fields` holds the sources, the image normalised."""
        encoded = [getattr(self, source.name)(fields[source.field]) for source in self._read]
        return h + (encoded[0] if len(encoded) == 1 else torch.stack(encoded).sum(0))
