"""InfoPro's published coefficients: the weights of both loss terms by network, data and cut."""

from __future__ import annotations

from typing import Any

from localpipe.networks.cuts import cut_blocks

Pair = tuple[float, float]
Pairs = tuple[Pair, Pair]
OFF = (0.0, 0.0)
ALIKE = (1.0, 1.0)


def published_weights(network: str, data: str, cuts: str | tuple[int, ...], stages: int) -> Pairs:
    """Return ((image first, last), (task first, last)) of the reference, or the general pairs where it has none."""
    general = ((5.0, 0.5), (0.0, 1.0)) if stages > 2 else ((5.0, 5.0), (1.0, 1.0))
    return PUBLISHED.get((data, network, _ends(network, cuts, stages)), general)


def _rows(
    data: str, network: str, *rows: tuple[str | tuple[int, ...], int, float, float, float, float]
) -> dict[Any, Pairs]:
    return {
        (data, network, _ends(network, cuts, k)): ((i0, i1), (t0, t1))
        for cuts, k, i0, t0, i1, t1 in rows
    }


def _ends(network: str, cuts: str | tuple[int, ...], stages: int) -> Any:
    """Return the last block of every stage but the last, however the cut is spelled, where a published table needs it."""
    blocks = BLOCKS.get(network, 0)
    if cuts not in ("equal", "layerwise") or stages > blocks:
        return cuts
    return tuple(last for _, last in cut_blocks(blocks, stages, cuts)[:-1])


BLOCKS = {"resnet32": 16, "resnet110": 55}  # of the networks whose equal cuts are in the tables
# (cut, stages, first image, first task, last image, last task), as the released commands have them, tuned for contrast but
# ImageNet's, which are for softmax; with two stages the first pair is the only one. The explicit cuts are the papers'
# hand-made ones, balanced by memory; ImageNet's lie behind blocks of the second layer, at 512 channels of 28x28.
PUBLISHED: dict[Any, Pairs] = {
    **_rows(
        "cifar10", "resnet32",
        ("equal", 2, 5, 1, 5, 1), ("equal", 4, 6, 0, 1, 2), ("equal", 8, 5, 0, 0, 2), ("equal", 16, 5, 0.05, 0.2, 0.5),
        ((4,), 2, 5, 0.1, 5, 0.1), ((3, 5, 8), 4, 5, 0, 0, 0.1), ((2, 3, 4, 7, 8, 12, 13), 8, 5, 0, 0, 2),
    ),
    **_rows(
        "cifar10", "resnet110",
        ("equal", 2, 5, 0.5, 5, 0.5), ("equal", 4, 1, 0, 0, 1), ("equal", 8, 5, 0, 0, 1), ("equal", 16, 5, 0, 0.5, 1),
        ((15,), 2, 5, 0.1, 5, 0.1), ((10, 21), 3, 5, 0, 5, 0.1), ((7, 15, 27), 4, 5, 0, 5, 0.1),
    ),
    **_rows(
        "stl10", "resnet110",
        ("equal", 2, 10, 1, 10, 1), ("equal", 4, 20, 0.2, 5, 2), ("equal", 8, 20, 0.2, 5, 1), ("equal", 16, 20, 0.5, 10, 0.1),
        ((15,), 2, 20, 1, 20, 1), ((9, 20), 3, 20, 0.5, 5, 2), ((7, 15, 27), 4, 20, 0.5, 10, 1),
    ),
    **_rows(
        "svhn", "resnet110",
        ("equal", 2, 1, 0.1, 1, 0.1), ("equal", 4, 5, 0, 0.5, 1), ("equal", 8, 5, 0, 0.5, 2), ("equal", 16, 5, 0.2, 0.5, 1),
    ),
    **_rows("imagenet", "resnet101", ((4,), 2, 5, 0.75, 5, 0.75)),
    **_rows("imagenet", "resnet152", ((9,), 2, 5, 1, 5, 1)),
    **_rows("imagenet", "resnext101_32x8d", ((6,), 2, 5, 0.75, 5, 0.75)),
}  # fmt: skip
