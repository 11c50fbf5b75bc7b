"""InfoPro's published coefficients: the weights of both loss terms by network, data and cut."""

from __future__ import annotations

from typing import Any

from localpipe.networks.cuts import cut_blocks

Pair = tuple[float, float]
Pairs = tuple[Pair, Pair]
Cuts = str | tuple[int, ...]
# The cut, stages, and the weights: first image, first task, last image, last task.
Row = tuple[Cuts, int, float, float, float, float]
OFF = (0.0, 0.0)
ALIKE = (1.0, 1.0)
GENERAL = ((5.0, 0.5), (0.0, 1.0))
GENERAL_OF_TWO_STAGES = ((5.0, 5.0), (1.0, 1.0))
# The blocks of the networks whose equal cuts are in the tables.
BLOCKS = {"resnet32": 16, "resnet110": 55}


def published_weights(network: str, data: str, cuts: Cuts, stages: int) -> Pairs:
    """Return ((image first, last), (task first, last)) of the reference.

    cuts: pipeline.cuts. A list and a text that give the same cut are the same. Where the reference
    has none for this network, data set and cut, the pairs are the general ones. It never raises.
    """
    general = GENERAL_OF_TWO_STAGES
    if stages > 2:
        general = GENERAL
    return PUBLISHED.get((data, network, _last_blocks(network, cuts, stages)), general)


def _index_rows(data: str, network: str, *rows: Row) -> dict[Any, Pairs]:
    """Return the rows of a table as (data, network, cut) to pairs of weights."""
    pairs = {}
    for cuts, stages, image_first, task_first, image_last, task_last in rows:
        key = (data, network, _last_blocks(network, cuts, stages))
        pairs[key] = ((image_first, image_last), (task_first, task_last))
    return pairs


def _last_blocks(network: str, cuts: Cuts, stages: int) -> Cuts:
    """Return the last block of every stage but the last, so that two spellings of a cut are equal.

    Networks without a table, and cuts that do not fit, keep their spelling.
    """
    blocks = BLOCKS.get(network, 0)
    if cuts not in ("equal", "layerwise") or stages > blocks:
        return cuts
    bounds = cut_blocks(blocks, stages, cuts)
    return tuple(last for _, last in bounds[:-1])


# (cut, stages, first image, first task, last image, last task), as the released commands have them.
# They were tuned for contrast, and ImageNet's for softmax. With two stages, the first pair is the
# only one. The explicit cuts are the papers' hand-made ones, balanced by memory. ImageNet's lie
# after blocks of the second layer, at 512 channels of 28x28.
PUBLISHED: dict[Any, Pairs] = {
    **_index_rows(
        "cifar10", "resnet32",
        ("equal", 2, 5, 1, 5, 1), ("equal", 4, 6, 0, 1, 2),
        ("equal", 8, 5, 0, 0, 2), ("equal", 16, 5, 0.05, 0.2, 0.5),
        ((4,), 2, 5, 0.1, 5, 0.1), ((3, 5, 8), 4, 5, 0, 0, 0.1),
        ((2, 3, 4, 7, 8, 12, 13), 8, 5, 0, 0, 2),
    ),
    **_index_rows(
        "cifar10", "resnet110",
        ("equal", 2, 5, 0.5, 5, 0.5), ("equal", 4, 1, 0, 0, 1),
        ("equal", 8, 5, 0, 0, 1), ("equal", 16, 5, 0, 0.5, 1),
        ((15,), 2, 5, 0.1, 5, 0.1), ((10, 21), 3, 5, 0, 5, 0.1), ((7, 15, 27), 4, 5, 0, 5, 0.1),
    ),
    **_index_rows(
        "stl10", "resnet110",
        ("equal", 2, 10, 1, 10, 1), ("equal", 4, 20, 0.2, 5, 2),
        ("equal", 8, 20, 0.2, 5, 1), ("equal", 16, 20, 0.5, 10, 0.1),
        ((15,), 2, 20, 1, 20, 1), ((9, 20), 3, 20, 0.5, 5, 2), ((7, 15, 27), 4, 20, 0.5, 10, 1),
    ),
    **_index_rows(
        "svhn", "resnet110",
        ("equal", 2, 1, 0.1, 1, 0.1), ("equal", 4, 5, 0, 0.5, 1),
        ("equal", 8, 5, 0, 0.5, 2), ("equal", 16, 5, 0.2, 0.5, 1),
    ),
    **_index_rows("imagenet", "resnet101", ((4,), 2, 5, 0.75, 5, 0.75)),
    **_index_rows("imagenet", "resnet152", ((9,), 2, 5, 1, 5, 1)),
    # Of batches of 8 and crops of 512 x 1024. The first stage ends with layer3.12.
    **_index_rows("cityscapes", "torchvision:deeplabv3_resnet101", ((20,), 2, 1.5, 1, 1.5, 1)),
    **_index_rows("imagenet", "resnext101_32x8d", ((6,), 2, 5, 0.75, 5, 0.75)),
}  # fmt: skip
