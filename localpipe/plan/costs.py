"""What a plan costs, found on the meta device without a worker: parameters, MACs, bytes that autograd holds.

MACs are those of convolutions and linear layers, as the literature on local learning counts them; attention's own products
(scores, and the mixing of values) are left out. `train_macs` counts every product of a training step, attention's too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from localpipe.config.resolved import Resolved
from localpipe.fields import Field
from localpipe.methods.objective import LocalLoss
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.plan.flops import count_flops
from localpipe.plan.pieces import Pieces

BATCH = 64
# Linear layers are products of two matrices, whatever the batch's dimensions; products of batches of matrices are attention's.
_LAYERS = frozenset({torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm})


@dataclass(frozen=True)
class StageCost:
    """What one stage costs, per sample; `params` and `macs` are the backbone's own, `aux_*` live in training only."""

    params: int
    macs: int
    aux_params: int
    aux_macs: int
    context_params: int
    context_macs: int
    activation_bytes_per_sample: int
    train_macs: int


class SavedBytes:
    """Counts the distinct storages that autograd holds, and their peak."""

    def __init__(self, ignored: Sequence[Tensor]) -> None:
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._holders: dict[int, int] = {}
        self._now = self.peak = 0

    def hold(self, tensor: Tensor) -> _Holder:
        """Count a saved tensor's storage until the holder goes away."""
        return _Holder(tensor, self)

    def add(self, key: int, nbytes: int) -> None:
        if key in self._ignored:
            return
        if self._holders.setdefault(key, 0) == 0:
            self._now += nbytes
            self.peak = max(self.peak, self._now)
        self._holders[key] += 1

    def remove(self, key: int, nbytes: int) -> None:
        if key in self._ignored:
            return
        self._holders[key] -= 1
        if self._holders[key] == 0:
            self._now -= nbytes


class _Holder:
    def __init__(self, tensor: Tensor, count: SavedBytes) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self._count = tensor, count
        self._key, self._nbytes = storage._cdata, storage.nbytes()
        count.add(self._key, self._nbytes)

    def __del__(self) -> None:
        self._count.remove(self._key, self._nbytes)


class FusedAttention(TorchFunctionMode):
    """Lets the meta device hold for backward what a device's fused attention does; the plain formula holds far more.

    Where the stage asks for the plain formula (a double backward), it stays.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        plain = len(args) != 3 or kwargs or not torch.backends.cuda.flash_sdp_enabled()
        if function is F.scaled_dot_product_attention and not plain:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return function(*args, **(kwargs or {}))


def count_costs(
    blueprint: Blueprint, plans: Sequence[StagePlan], config: Resolved
) -> list[StageCost]:
    """Return the cost of every stage from one real training step of it on the meta device, at a batch of 64."""
    return [_measure(Stage(plan, blueprint, config, "meta"), config) for plan in plans]


def count_saved_bytes(
    blueprint: Blueprint, config: Resolved, stages: int
) -> Callable[[int, int, int], float]:
    """Return the function (first, last, stage) -> bytes a sample that autograd holds in the step of a candidate stage.

    A sum over its pieces, each run once on the meta device: exact but under reconcile, whose double backward is left out.
    """
    pieces = Pieces(blueprint, config)
    known: dict[str, int] = {}

    def once(key: str, find: Callable[[], int]) -> int:
        if key not in known:
            known[key] = find()
        return known[key]

    def lead(stage: int, first: int) -> int:
        return once(pieces.lead_key(stage, first), lambda: _held(pieces.lead(stage, first, "meta")))

    def block(index: int) -> int:
        def find() -> int:
            stage = min(index - 1, 1)
            return _held(pieces.stage(index - 1, index, stage, stage + 2, "meta")) - lead(
                stage, index - 1
            )

        return once(f"{pieces.block_key(index - 1)} {pieces.block_key(index)}", find)

    @cache
    def loss(stage: int, last: int) -> int:
        def find() -> int:
            found = pieces.loss(stage, stages, last, "meta")
            return _held(found, with_loss=True) - _held(found)

        return once(pieces.loss_key(stage, stages, last), find)

    def cost(first: int, last: int, stage: int) -> float:
        within = sum(block(index) for index in range(first + 1, last + 1))
        return (lead(stage, first) + within + loss(stage, last)) / BATCH

    return cost


def _held(stage: Stage, with_loss: bool = False) -> int:
    """Return the bytes of a batch that autograd holds after a forward pass, or behind the local loss."""
    message = _message(stage.plan)
    saved = SavedBytes([*stage.parameters(), *stage.weights().values()])
    with saved_tensors_hooks(saved.hold, lambda holder: holder.tensor), FusedAttention():
        h = stage.forward(message)
        loss = stage.local_loss(message, h) if with_loss else h
        found = saved.peak
    del h, loss
    return found


def _measure(stage: Stage, config: Resolved) -> StageCost:
    message = _message(stage.plan)
    training = _train(stage, message, config)
    with count_flops() as whole:
        h = stage.forward(message).detach()
    adapter = _layers(whole) - _macs_of(lambda: stage.blocks(_input(stage.plan)))
    auxiliary = sum(_auxiliary(stage.objective, h, message.fields))
    own = [
        *stage.blocks.parameters(),
        *(stage.objective.parameters() if stage.plan.is_last else ()),
    ]
    return StageCost(
        params=sum(p.numel() for p in own),
        macs=_layers(whole) - adapter + (auxiliary if stage.plan.is_last else 0),
        aux_params=sum(p.numel() for p in stage.auxiliary()),
        aux_macs=0 if stage.plan.is_last else auxiliary,
        context_params=sum(p.numel() for p in stage.adapter.parameters())
        if stage.adapter is not None
        else 0,
        context_macs=adapter,
        activation_bytes_per_sample=training[0],
        train_macs=training[1],
    )


def _train(stage: Stage, message: Message, config: Resolved) -> tuple[int, int]:
    """Return the peak of saved bytes and the MACs of one real training step, per sample."""
    # What the message brought counts where autograd holds it, as in the published figures; the message's buffer does not.
    saved = SavedBytes([*stage.parameters(), *stage.weights().values()])
    with (
        count_flops() as counter,
        saved_tensors_hooks(saved.hold, lambda holder: holder.tensor),
        FusedAttention(),
    ):
        h = stage.forward(message)
        loss = stage.local_loss(message, h)
        if stage.sends_gradient:
            stage.boundary_gradient(loss, h)
        loss = stage.reconciled(loss, message)
        if stage.optimizer is not None:
            loss.backward()
    peak = saved.peak
    if config.run.checkpointing == "block":
        peak = max(peak, _recomputed(stage))
    return peak // BATCH, _macs(counter)


def _recomputed(stage: Stage) -> int:
    """Return the peak of saved bytes while blocks are run again: the inputs up to a block, and what the block saves.

    torch holds what it computes again out of sight of the hooks that count the rest.
    """
    saved = SavedBytes([*stage.parameters(), *stage.weights().values()])
    x, held = _input(stage.plan), []
    for block in stage.blocks:
        held.append(saved.hold(x))
        # Held detached: a saved output would hold the graph that holds it, and no backward pass comes to free it.
        with saved_tensors_hooks(
            lambda tensor: saved.hold(tensor.detach()), lambda holder: holder.tensor
        ):
            x = block(x.clone()).detach()
    return saved.peak


def _auxiliary(objective: LocalLoss, h: Tensor, fields: Mapping[str, Tensor]) -> Iterator[int]:
    """Yield the MACs of every auxiliary network as the loss runs it; on the bare activation where a weight of 0 leaves it out.

    What the loss computes beside its networks, as the products of pairs, is in no published count.
    """
    found: dict[nn.Module, int] = {}
    running: list[FlopCounterMode] = []

    def begin(network: nn.Module, _: Any) -> None:
        running.append(count_flops().__enter__())

    def end(network: nn.Module, *_: Any) -> None:
        counter = running.pop()
        counter.__exit__(None, None, None)
        found[network] = found.get(network, 0) + _layers(counter)

    networks = list(objective.children())
    hooks = [network.register_forward_pre_hook(begin) for network in networks]
    hooks += [network.register_forward_hook(end) for network in networks]
    with torch.no_grad():
        objective(h, fields)
    for hook in hooks:
        hook.remove()
    for network in networks:
        yield found[network] if network in found else _macs_of(partial(network, h))


def _macs_of(call: Callable[[], object]) -> int:
    with count_flops() as counter, torch.no_grad():
        call()
    return _layers(counter)


def _input(plan: StagePlan) -> Tensor:
    return torch.empty(BATCH, *plan.input_shape, device="meta")


def _message(plan: StagePlan) -> Message:
    fields = {field.name: _meta(field) for field in plan.receives.fields}
    return Message(Header(Kind.TRAIN, 1, 1, BATCH), fields)


def _meta(field: Field) -> Tensor:
    return torch.empty(BATCH, *field.shape, dtype=getattr(torch, field.dtype), device="meta")


def _layers(counter: FlopCounterMode) -> int:
    """Return the MACs of convolutions and linear layers, per sample."""
    counts = counter.get_flop_counts().get("Global", {})
    return sum(count for kernel, count in counts.items() if kernel in _LAYERS) // 2 // BATCH


def _macs(counter: FlopCounterMode) -> int:
    """Return the MACs of everything, per sample."""
    return int(counter.get_total_flops()) // 2 // BATCH
