"""Local losses with copies of a later stage's parameters, which come back a fixed lag late.

    block (MAN, MAN++)     h ─┬─▶ next, trained ───┬─ + ─▶ the local loss
                              └─▶ average, moved ──┘

    readout (SOLO)         h ─▶ the loss's own layers ─▶ adapter, trained ─▶ readout, refreshed

`block` puts two copies of the next stage's first block in front of the local loss, which then sees
the resolution of that block (Su et al., MAN, ECCV 2024; MAN++, TPAMI 2026). One copy is trained.
The other one is a moving average of the block itself: it is not trained, and gradients go through
it to the activation. Their batch normalisations have buffers of their own.

`readout` ends the local exit in a copy of the network's own last Linear, which is not trained here
(SOLO, 2026). A private adapter precedes it: a layer norm, a Linear to its width, a temperature.

Parameters come back, no activation and no gradient does. All copies start from their own initial
weights, and from the loaded ones where the run begins with weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localpipe.config.keys import Feedback
from localpipe.errors import UserError
from localpipe.fields import ITEM_BYTES, dtype_name
from localpipe.methods.objective import LocalLoss, Site
from localpipe.networks.blueprint import BlockOutput, Blueprint

_INNER = "loss."  # the names of the loss's own parts have no such prefix outside
_HALVES = (torch.float16, torch.bfloat16)


class FeedbackLoss(LocalLoss):
    """A local loss with copies of later parameters.

    loss: the local loss itself. Its parts keep the names that they have without copies. sources:
    the prefixes of the copies, and of what they copy in the whole network.
    """

    def __init__(self, loss: LocalLoss, sources: Mapping[str, str]) -> None:
        super().__init__()
        self.task = loss.task
        self.loss = loss
        self.sources = dict(sources)
        self.register_state_dict_post_hook(_remove_inner_prefix)
        self.register_load_state_dict_pre_hook(_add_inner_prefix)

    def front(self, h: Tensor) -> Tensor:
        """Return what the loss itself is called with. Here it is h, (B, *shape)."""
        return h

    @abstractmethod
    def list_copies(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the copies that `refresh` moves, by the names that their originals have."""

    @abstractmethod
    def refresh(self, parameters: Mapping[str, Tensor]) -> None:
        """Take the parameters of a later stage, by the names that they have there.

        They may be on the host. Raises KeyError where one is missing.
        """

    def exit(self, h: Tensor) -> Tensor | None:
        """Return the logits of the loss's classifier, or None where it has none."""
        return self.loss.exit(self.front(h))

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the full weighted local loss, a scalar."""
        loss: Tensor = self.loss(self.front(h), fields)
        return loss


class BlockFeedback(FeedbackLoss):
    """A local loss after the sum of two copies of the next block.

    learned, average: the copies. takes, gives: what the block reads and gives. momentum: of the
    average, from one refresh to the next. scaled: whether the sum is weighted by a trained number.
    writes: whether the block writes into its input.
    """

    def __init__(
        self,
        loss: LocalLoss,
        copies: tuple[nn.Module, nn.Module],
        prefix: str,
        takes: BlockOutput,
        gives: BlockOutput,
        momentum: float,
        scaled: bool = False,
        writes: bool = False,
    ) -> None:
        super().__init__(loss, {"next.": prefix, "average.": prefix})
        self.next, self.average = copies
        self.average.requires_grad_(False)
        self.takes, self.gives = takes, gives
        self.momentum = momentum
        self.scale: nn.Parameter | None = None
        if scaled:
            self.scale = nn.Parameter(torch.ones(()))
        self._writes = writes

    def front(self, h: Tensor) -> Tensor:
        """Return the sum of both copies' outputs, in standard form. h: (B, *shape)."""
        x = self.takes.from_standard(h)
        # Both read the same tensor, and the first one may write into it.
        learned = self.next(x.clone() if self._writes else x)
        average = self.average(x)
        if self.scale is not None:
            learned, average = self.scale * learned, (2 - self.scale) * average
        y: Tensor = learned + average
        if y.dtype in _HALVES:
            y = y.float()  # as every activation that a local loss gets
        return self.gives.to_standard(y)

    def list_copies(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the average's parameters."""
        return self.average.named_parameters()

    @torch.no_grad()
    def refresh(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the average towards the block's parameters."""
        for name, value in self.list_copies():
            newest = parameters[name].to(value.device)
            value.mul_(self.momentum).add_(newest, alpha=1 - self.momentum)


class SharedReadout(nn.Module):
    """A trained adapter and a readout that another module holds: (..., features) to (..., outputs).

    The adapter is a layer norm, a Linear to the readout's width, and a temperature.
    """

    def __init__(self, features: int, readout: nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.linear = nn.Linear(features, readout.in_features)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        # In a tuple, so that it is no part of this module.
        self._readout = (readout,)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self._readout[0](self.linear(self.norm(features)))
        return logits * torch.exp(-self.log_temperature)


class ReadoutFeedback(FeedbackLoss):
    """A local loss whose exit ends in a copy of the network's own last Linear.

    loss: its exit calls `readout` already. prefix: of that Linear in the whole network.
    """

    def __init__(self, loss: LocalLoss, readout: nn.Linear, prefix: str) -> None:
        super().__init__(loss, {"readout.": prefix})
        self.readout = readout.requires_grad_(False)

    def list_copies(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of the readout's copy."""
        return self.readout.named_parameters()

    @torch.no_grad()
    def refresh(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace the copy's values."""
        for name, value in self.list_copies():
            value.copy_(parameters[name])


def find_own_loss(objective: LocalLoss) -> LocalLoss:
    """Return the local loss itself, without the copies where it has some."""
    if isinstance(objective, FeedbackLoss):
        return objective.loss
    return objective


def build_with_feedback(
    feedback: Feedback, site: Site, build: Callable[[Site], LocalLoss]
) -> LocalLoss:
    """Return the local loss of a site, with the copies that `method.feedback` asks for.

    build: makes the loss itself for a site. With `block` it gets the site after the next block.
    Copies are built as the site's units `next`, `average` and `readout`. After the network's last
    block there is nothing to copy, and the loss comes back as it is. Raises UserError for blocks
    with several crossing tensors, for a tail without a Linear, and for a loss without a classifier.
    """
    if feedback.mode == "block" and site.last_block + 1 < len(site.blueprint.blocks):
        return _build_block_feedback(feedback, site, build)
    if feedback.mode == "readout":
        return _build_readout_feedback(site, build(site))
    return build(site)


def _build_block_feedback(
    feedback: Feedback, site: Site, build: Callable[[Site], LocalLoss]
) -> LocalLoss:
    blueprint, index = site.blueprint, site.last_block + 1
    takes, gives = blueprint.input(index), blueprint.output(index)
    if takes.companions or gives.companions:
        raise UserError(
            f"method: feedback block copies block {blueprint.blocks[index].name} of "
            f"{blueprint.name}, which takes or gives several tensors; expected one that takes and "
            "gives one; move the cut, or set method.feedback.mode=none"
        )

    def copy_block() -> nn.Module:
        return blueprint.build_new_blocks([index])[0]

    copies = site.unit("next", copy_block), site.unit("average", copy_block)
    for name, parameter in copies[0].named_parameters():
        if dtype_name(parameter.dtype) not in ITEM_BYTES:
            raise UserError(
                f"method: feedback block copies {name} of block {blueprint.blocks[index].name}, "
                f"which is {dtype_name(parameter.dtype)}; expected one of {', '.join(ITEM_BYTES)}; "
                "set method.feedback.mode=none"
            )
    loss = build(replace(site, last_block=index, shape=gives.standard_shape))
    _check_names(loss, ("next", "average", "scale"))
    return BlockFeedback(
        loss,
        copies,
        blueprint.blocks[index].prefix,
        takes,
        gives,
        momentum=feedback.momentum**feedback.every,
        scaled=feedback.combine == "scaled",
        writes=_writes_input(blueprint, index),
    )


def _writes_input(blueprint: Blueprint, index: int) -> bool:
    """Return whether a block writes into its input, True where that cannot be tried."""
    (block,) = blueprint.build_meta([index])
    takes = blueprint.input(index)
    x = takes.from_standard(torch.empty(2, *takes.standard_shape, device="meta"))
    version = x._version
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            block(x)
    except Exception:  # a user's block may raise anything
        return True
    return x._version != version


def find_readout(tail: nn.Module) -> tuple[str, nn.Linear] | None:
    """Return the last Linear of the network's own head and its name in it, None without one.

    The name is "" where the head is a Linear itself.
    """
    found = None
    for name, module in tail.named_modules():
        if isinstance(module, nn.Linear):
            found = (name, module)
    return found


def _build_readout_feedback(site: Site, loss: LocalLoss) -> LocalLoss:
    blueprint = site.blueprint
    found = find_readout(blueprint.build_meta([len(blueprint.blocks)])[0])
    if found is None:
        raise UserError(
            f"method: feedback readout copies the last Linear of the head of {blueprint.name}, "
            "which has none; choose another model.name, or set method.feedback.mode=none"
        )
    name, last = found
    has_bias = last.bias is not None
    readout = site.unit(
        "readout", lambda: nn.Linear(last.in_features, last.out_features, bias=has_bias)
    )
    _check_names(loss, ("readout",))
    _replace_classifier(site, loss, readout)
    return ReadoutFeedback(loss, readout, f"{blueprint.tail.prefix}{name}.".lstrip("."))


def _replace_classifier(site: Site, loss: LocalLoss, readout: nn.Linear) -> None:
    """Replace the last Linear of a loss with the readout's outputs by a `SharedReadout`."""
    path = None
    for name, module in loss.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == readout.out_features:
            path = name
    if not path:
        raise UserError(
            f"method: feedback readout ends the exit of stage {site.stage} in a Linear of "
            f"{readout.out_features} outputs, and its local loss has none; choose dgl or greedy, "
            "or set method.feedback.mode=none"
        )
    parent, _, attribute = path.rpartition(".")
    features = loss.get_submodule(path).in_features
    assert isinstance(features, int)
    shared = site.unit("adapter", partial(SharedReadout, features, readout))
    setattr(loss.get_submodule(parent), attribute, shared)


def _check_names(loss: LocalLoss, names: tuple[str, ...]) -> None:
    """Raise UserError where a loss of a user's own has a part by the name of a copy."""
    for key in loss.state_dict():
        first = key.partition(".")[0]
        if first in names:
            raise UserError(
                f"objective: {type(loss).__name__} has a part {first}, a name that method.feedback "
                "gives to its copies; rename it"
            )


def _remove_inner_prefix(
    loss: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    """Rename the entries of a state_dict, in their order, to the names without copies."""
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix).removeprefix(_INNER)
        state[prefix + name] = state.pop(key)


def _add_inner_prefix(loss: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the entries of a state_dict to the names of the modules."""
    assert isinstance(loss, FeedbackLoss)
    copies = tuple(loss.sources)
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if not name.startswith(copies) and name not in loss._parameters:
            state[f"{prefix}{_INNER}{name}"] = state.pop(key)
