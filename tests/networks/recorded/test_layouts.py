"""Layouts follow from the first layer with weights that reads a tensor."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from tests.networks.recorded import networks
from tests.networks.recorded.equality import Sample, images, record_network, tokens
from tests.networks.recorded.networks import Body

IMAGES = images(3, 8, 8)


class ToMap(nn.Module):
    """A block that makes a map of tokens before its convolution: (B, T, D) in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D)."""
        y = x.transpose(1, 2).reshape(x.shape[0], 8, 8, 8)
        output: Tensor = x + self.conv(y).flatten(2).transpose(1, 2)
        return output


class TokenMaps(Body):
    """Tokens between blocks of convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.fc(x.mean(1))
        return output


class MixTokens(nn.Module):
    """A block that mixes tokens before features, without a norm: (B, T, D) in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(64, 64)
        self.features = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D)."""
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        output: Tensor = x + self.features(x)
        return output


class Flattens(nn.Module):
    """A convolution whose map is flattened before the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        self.hidden = nn.Linear(8 * 16, 16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        output: Tensor = self.fc(self.hidden(self.features(x).flatten(1)).relu())
        return output


CASES: dict[str, tuple[nn.Module, Sample, list[str]]] = {
    "map": (networks.residual(), IMAGES, ["chw"] * 5),
    "permuted": (Body(*(networks.Permuted() for _ in range(2))), IMAGES, ["chw"] * 3),
    "channels last": (
        networks.Hwc(*(networks.ChannelsLast() for _ in range(2))),
        IMAGES,
        ["hwc"] * 3,
    ),
    "tokens": (networks.Tokens(), IMAGES, ["td"] * 4),
    "words": (networks.Language(is_tied=False), tokens(5), ["td"] * 4),
    "sequence": (networks.Sequence(), IMAGES, ["ct"] * 3),
    "token maps": (TokenMaps(ToMap(), ToMap()), IMAGES, ["td"] * 3),
    "mixed tokens": (TokenMaps(MixTokens(), MixTokens()), IMAGES, ["td"] * 3),
    "flattened": (Flattens(), IMAGES, ["chw"] * 2),
    "features": (nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 4)),
                 IMAGES, ["d"] * 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layouts(case: str) -> None:
    network, sample, expected = CASES[case]
    recording = record_network(network, sample)
    assert [output.layout for output in recording.outputs] == expected


def test_a_layout_can_be_given() -> None:
    recording = record_network(networks.residual(), IMAGES, layouts={"blocks.1": "hwc"})
    assert [output.layout for output in recording.outputs] == ["chw", "chw", "hwc", "chw", "chw"]


def test_boundaries_that_would_carry_two_tensors_are_listed() -> None:
    recording = record_network(networks.UNet(), IMAGES)
    assert recording.wide_boundaries
    assert all(count == 2 for _, count in recording.wide_boundaries)


def test_functional_batch_normalisations_are_listed() -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 1), networks.FunctionalNorm())
    recording = record_network(Body(block, networks.Residual()), IMAGES)
    assert recording.functional_batch_norms == ("blocks.0.1",)
