"""ContSup's context (2023): what a stage reads beside its predecessor's output.

At the boundary before stage k, the received activation h becomes h + M(context). The adapter M
belongs to stage k. The stage's loss trains it, and inference keeps it. In mode E the context is the
image. In mode Rn it is the n most recent merged activations, and the image counts as the oldest
one. Mode RnE has both, and the image once.

For tokens nothing is published. Here an encoder of the image (E, or the oldest source of Rn) adds
to the patch tokens alone. A merged activation passes a layer norm and a linear layer, class token
included. Between maps and tokens, and between other numbers of tokens, the patches are encoded as a
map. All activations are in their standard form. Where the inputs are tokens themselves, E and the
oldest source of Rn embed them, one row of features a token, so that no token sees a later one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localpipe.fields import IMAGE
from localpipe.networks.layers import init_convolutions, pool_to
from localpipe.tasks.layout import Fold, Grid, Unfold, grid_of, map_shape

_HIDDEN = 12  # channels inside an image encoder


@dataclass(frozen=True)
class Source:
    """A field of the message that an adapter reads, by an image encoder or a 1x1 encoder.

    `field` is `image` or `ctx.j`. `encodes_image` selects the image encoder.
    """

    field: str
    encodes_image: bool

    @property
    def name(self) -> str:
        """The encoder's name in the state_dict: `e_image`, `r_image` or `r_ctx_j`."""
        prefix = "r_"
        if self.encodes_image:
            prefix = "e_"
        return prefix + self.field.replace(".", "_")


def context_sources(mode: str, stage: int, inputs: str = IMAGE) -> tuple[Source, ...]:
    """Return the sources of the adapter before a stage, most recent first. Stage 0 has none.

    mode: `none`, `E`, `Rn` or `RnE`. `ctx.j` is the merged activation at boundary j, the input of
    stage j + 1. Where there are fewer than n, all of them are returned. The image is the last
    source. inputs: the name of its field. Raises AssertionError for another mode.
    """
    if mode == "none" or stage == 0:
        return ()
    match = re.fullmatch(r"(?:R(\d+))?(E?)", mode)
    assert match is not None, "checked by the configuration"
    count = int(match[1] or 0)
    with_image = bool(match[2])
    sources = [Source(f"ctx.{boundary}", False) for boundary in range(stage - 2, -1, -1)]
    if with_image:
        return (*sources[:count], Source(inputs, True))
    sources.append(Source(inputs, False))
    return tuple(sources[:count])


class ImageEncoder(nn.Module):
    """Two 3x3 convolutions at full resolution, pooled last.

    (B, channels, H, W) to (B, outputs, h, w). side: (h, w).
    """

    def __init__(self, channels: int, outputs: int, side: tuple[int, int]) -> None:
        super().__init__()
        self.side = side
        self.layers = nn.Sequential(
            nn.Conv2d(channels, _HIDDEN, 3, padding=1),
            nn.BatchNorm2d(_HIDDEN),
            nn.ReLU(inplace=True),
            nn.Conv2d(_HIDDEN, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the encoded image, (B, outputs, *side)."""
        return pool_to(self.layers(x), self.side)


class FeatureEncoder(nn.Module):
    """A 1x1 convolution, pooled last: (B, inputs, H, W) to (B, outputs, h, w).

    side: (h, w).
    """

    def __init__(self, inputs: int, outputs: int, side: tuple[int, int]) -> None:
        super().__init__()
        self.side = side
        conv = nn.Conv2d(inputs, outputs, 1)
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the encoded features, (B, outputs, *side)."""
        return pool_to(self.layers(x), self.side)


class TokenEncoder(nn.Sequential):
    """A layer norm and a linear layer: (B, T, inputs) to (B, T, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.LayerNorm(inputs), nn.Linear(inputs, outputs))


def has_encoders(
    sources: Sequence[Source],
    shapes: Mapping[str, tuple[int, ...]],
    output: tuple[int, ...],
    grid: Grid | None,
    vocabulary: int | None = None,
) -> bool:
    """Return whether every source has an encoder for the activations of a stage.

    Arguments are those of `Adapter`. Raises KeyError if `shapes` lacks a field.
    """
    return all(_has_encoder(shapes[source.field], output, grid, vocabulary) for source in sources)


def _has_encoder(
    shape: tuple[int, ...], output: tuple[int, ...], grid: Grid | None, vocabulary: int | None
) -> bool:
    if len(shape) == 1:
        # The inputs, which are tokens where there is a vocabulary.
        return vocabulary is not None and len(output) == 2 and shape[0] == output[0]
    if _is_token_pair(shape, output):
        return True
    return len(map_shape(shape, grid)) == len(map_shape(output, grid)) == 3


def _is_token_pair(shape: tuple[int, ...], output: tuple[int, ...]) -> bool:
    """Return whether both are tokens, and as many."""
    return len(shape) == len(output) == 2 and shape[0] == output[0]


def build_encoder(
    source: Source,
    shape: tuple[int, ...],
    output: tuple[int, ...],
    grid: Grid | None,
    vocabulary: int | None = None,
) -> nn.Module:
    """Return the encoder of a source for the activations of a stage.

    shape: of the source, per sample. output: of the activations, (C, H, W), or (T, D) on a grid.
    The source must be as many tokens, tokens on a grid, or a map. vocabulary: of inputs (T,) that
    are tokens themselves, else None. Raises AssertionError where there is no encoder.
    """
    assert _has_encoder(shape, output, grid, vocabulary), "checked by the stage"
    if len(shape) == 1 and vocabulary is not None:
        return nn.Embedding(vocabulary, output[1])
    if _is_token_pair(shape, output):
        return TokenEncoder(shape[1], output[1])
    encoder: type[ImageEncoder | FeatureEncoder] = FeatureEncoder
    if source.encodes_image:
        encoder = ImageEncoder

    # Tokens are folded before the encoder, and unfolded after it.
    channels, *_ = map_shape(shape, grid)
    outputs, height, width = map_shape(output, grid)
    layers: list[nn.Module] = [encoder(channels, outputs, (height, width))]
    source_grid, output_grid = grid_of(shape, grid), grid_of(output, grid)
    if source_grid is not None:
        layers.insert(0, Fold(source_grid))
    if output_grid is not None:
        layers.append(Unfold(output_grid))
    if len(layers) == 1:
        return layers[0]
    return nn.Sequential(*layers)


class Adapter(nn.Module):
    """The sum of a stage's encoders. The merge with h is an addition out of place.

    sources: at least one. shapes: per sample, of every source's field. output: the shape of h, per
    sample. grid: that of the tokens, needed where h is tokens and a source is a map. vocabulary: of
    inputs that are tokens themselves, else None. Raises KeyError if `shapes` lacks a field.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        shapes: Mapping[str, tuple[int, ...]],
        output: tuple[int, ...],
        grid: Grid | None = None,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        for source in sources:
            encoder = build_encoder(source, shapes[source.field], output, grid, vocabulary)
            self.add_module(source.name, encoder)
        self._sources = tuple(sources)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the message that the adapter reads, in the order of the sources."""
        return tuple(source.field for source in self._sources)

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return h + the context, a new tensor with the shape of h.

        h: (B, C, H, W) or (B, T, D). fields: the sources' tensors, the image normalised. Others are
        not read.
        """
        contexts: list[Tensor] = []
        for source in self._sources:
            encoder = getattr(self, source.name)
            contexts.append(encoder(fields[source.field]))
        if len(contexts) == 1:
            return h + contexts[0]
        return h + torch.stack(contexts).sum(0)
