"""Blocks that are not trained, `model.freeze`: which they are, and how they are frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from localpipe.errors import UserError, suggest
from localpipe.networks.blueprint import Blueprint


def find_frozen_blocks(blueprint: Blueprint, names: Iterable[str]) -> frozenset[int]:
    """Return the positions in `blueprint.blocks` of the blocks that `names` cover.

    A name is that of a block, or a dotted prefix of names of blocks or of their parameters. Raises
    UserError for a prefix that covers a part of a block, for the network's own head, and for an
    unknown name.
    """
    frozen: set[int] = set()
    for name in names:
        frozen |= _find_covered(blueprint, name)
    return frozenset(frozen)


def _find_covered(blueprint: Blueprint, name: str) -> set[int]:
    """Return the positions of the blocks that one name covers."""
    covered = set()
    touched = set()
    for index, (block, state) in enumerate(zip(blueprint.blocks, blueprint.state, strict=False)):
        inside = [_is_below(key, name) for key in state]
        if _is_below(block.name, name) or (inside and all(inside)):
            covered.add(index)
        if any(inside):
            touched.add(index)

    for index in sorted(touched - covered):
        block_name = blueprint.blocks[index].name
        raise UserError(
            f"model: model.freeze {name} is a part of block {block_name} of {blueprint.name}; "
            f"blocks are frozen whole; give {block_name}, or leave {name} out"
        )
    if covered:
        return covered
    tail = blueprint.tail.name
    if _is_below(tail, name) or any(_is_below(key, name) for key in blueprint.state[-1]):
        raise UserError(
            f"model: model.freeze {name} is of the head of {blueprint.name}, which is always "
            "trained; leave it out"
        )
    raise UserError(
        f"model: {blueprint.name} has no block {name!r} for model.freeze; "
        f"{suggest(name, _list_names(blueprint))}"
    )


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _list_names(blueprint: Blueprint) -> set[str]:
    """Return the names of the blocks and all dotted prefixes of them."""
    names = set()
    for block in blueprint.blocks:
        parts = block.name.split(".")
        names |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return names


def freeze_blocks(blocks: Mapping[str, nn.Module], others: Sequence[nn.Module]) -> None:
    """Freeze blocks, by name: evaluation mode, and parameters that require no gradient.

    others: the modules beside them that are trained. Raises UserError where one of them shares a
    parameter with a frozen block.
    """
    owners: dict[int, str] = {}
    for name, block in blocks.items():
        block.eval()
        block.requires_grad_(False)
        for parameter in block.parameters():
            owners[id(parameter)] = name
    for module in others:
        for path, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) in owners:
                raise UserError(
                    f"model: block {owners[id(parameter)]} is frozen and shares {path} with a part "
                    "that is trained; freeze both by model.freeze, or none of them"
                )
