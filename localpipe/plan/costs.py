"""The cost of every stage, counted on the meta device without a worker.

Parameters, MACs, and the bytes that autograd holds. MACs are those of convolutions and linear
layers, as the literature on local learning counts them: attention's own products (the scores and
the weighted sum of values) are left out. `train_macs` counts every product of a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.methods.context import context_sources
from localpipe.methods.feedback import FeedbackLoss
from localpipe.methods.objective import LocalLoss
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.message import Kind, Message, empty_rows
from localpipe.pipeline.stages.blocks import split_activation
from localpipe.pipeline.stages.stage import Stage, mark_nothing, send_nothing, train_step
from localpipe.pipeline.stages.stage_plan import StagePlan, refuse_sizes
from localpipe.pipeline.workers.trial import build_empty_message
from localpipe.plan.flops import count_flops
from localpipe.plan.pieces import Pieces
from localpipe.plan.saved_bytes import SavedBytes, fuse_attention

BATCH = 64
# A linear layer multiplies two matrices, whatever the batch's dimensions. Products of batches of
# matrices are attention's.
_LAYERS = frozenset({torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm})


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage, per sample.

    `params` and `macs` are the backbone's own, with the network's head in the last stage. `macs`
    are of a forward pass. `aux_*` exist in training only, and are 0 in the last stage. `context_*`
    are the adapter's, 0 without one. `activation_bytes_per_sample` is the peak that autograd holds,
    rounded down. `train_macs` counts every product of a training step. `frozen_params` are those of
    `params` that model.freeze keeps from training. `copied_params` are those of `aux_params` that
    come from a later stage and are not trained here. `shared_bytes` are the bytes of what earlier
    stages copy of this one. Both are 0 without `method.feedback`.
    """

    params: int
    macs: int
    aux_params: int
    aux_macs: int
    context_params: int
    context_macs: int
    activation_bytes_per_sample: int
    train_macs: int
    frozen_params: int = 0
    copied_params: int = 0
    shared_bytes: int = 0


def count_costs(
    blueprint: Blueprint, plans: Sequence[StagePlan], config: Resolved
) -> list[StageCost]:
    """Return the cost of every stage, in order, from one real training step of it at a batch of 64.

    plans: all stages of `build_plans`. It runs on the meta device, so nothing is computed.
    Raises UserError for shapes that torch cannot represent.
    """
    with refuse_sizes(config):
        return [count_stage(Stage(plan, blueprint, config, "meta"), config) for plan in plans]


def count_stage(stage: Stage, config: Resolved) -> StageCost:
    """Return the cost of one stage that lies on the meta device.

    config: the one that the stage was built with. The stage runs a training step and is not needed
    afterwards. An auxiliary network that the loss leaves out runs on h alone. What a user's network
    raises passes through.
    """
    is_last = stage.plan.is_last
    message = empty_message(stage.plan)
    saved_bytes, train_macs = _count_training_step(stage, message, config)

    # Forward MACs: all of them, then the adapter's and the auxiliary networks' share.
    with count_flops() as counter:
        h = stage.forward(message).detach()
    forward_macs = _sum_layer_macs(counter)
    block_macs = _macs_of(lambda: stage.blocks(*_make_empty_input(stage.plan)))
    adapter_macs = forward_macs - block_macs
    head_macs = _count_auxiliary_macs(stage.objective, *stage.objective_inputs(message, h))

    # The last stage's head is the network's own, every other one is auxiliary.
    params = _count_parameters(stage.blocks)
    if is_last:
        params += _count_parameters(stage.objective)
    return StageCost(
        params=params,
        macs=block_macs + head_macs if is_last else block_macs,
        aux_params=0 if is_last else _count_parameters(stage.objective),
        aux_macs=0 if is_last else head_macs,
        context_params=_count_parameters(stage.adapter),
        context_macs=adapter_macs,
        activation_bytes_per_sample=saved_bytes,
        train_macs=train_macs,
        frozen_params=sum(_count_parameters(stage.blocks[i]) for i in stage.frozen),
        copied_params=sum(value.numel() for value in stage.copied_parameters().values()),
        shared_bytes=sum(value.nbytes for value in stage.shared_parameters().values()),
    )


def count_saved_bytes(
    blueprint: Blueprint, config: Resolved, stages: int
) -> Callable[[int, int, int], float]:
    """Return a function (first, last, stage) that gives a candidate stage's saved bytes per sample.

    Blocks first..last are both included. It is the sum over the stage's pieces, each run once on
    the meta device. It is exact except under `reconcile`, whose double backward is left out.
    stages: their number, by which a stage's loss is chosen.
    """
    pieces = Pieces(blueprint, config)
    if pieces.frozen:
        return _FrozenPieceBytes(pieces, stages).bytes_per_sample
    return _PieceBytes(pieces, stages).bytes_per_sample


class ParameterCounts:
    """The parameters of every piece of a network; equal pieces are counted once.

    stages: their number, by which a stage's loss is chosen.
    """

    def __init__(self, pieces: Pieces, stages: int) -> None:
        self._pieces, self._stages = pieces, stages
        self._counts: dict[str, tuple[int, int]] = {}

    def cost(self, first: int, last: int, stage: int, saved_bytes: int) -> StageCost:
        """Return the parameters and bytes of blocks first..last as stage `stage`, no MACs.

        All parameters are in `params` and `frozen_params`. saved_bytes: per sample.
        """
        counts = [self._count_lead(stage, first), self._count_loss(stage, last)]
        for index in range(first + 1, last + 1):
            counts.append(self._count_lead(1, index, is_block=True))
        params = sum(count for count, _ in counts)
        frozen = sum(count for _, count in counts)
        return StageCost(params, 0, 0, 0, 0, 0, saved_bytes, 0, frozen)

    def _count_lead(self, stage: int, index: int, is_block: bool = False) -> tuple[int, int]:
        """Return all and the frozen parameters of a block, with the stage's adapter if it leads."""
        key = self._pieces.block_key(index) if is_block else self._pieces.lead_key(stage, index)
        if key not in self._counts:
            piece = self._pieces.lead(min(stage, index), index, "meta")
            params = _count_parameters(piece.blocks)
            frozen = params if piece.frozen else 0
            if not is_block:
                params += _count_parameters(piece.adapter)
            self._counts[key] = params, frozen
        return self._counts[key]

    def _count_loss(self, stage: int, last: int) -> tuple[int, int]:
        key = f"loss {stage} {last}"
        if key not in self._counts:
            piece = self._pieces.loss(stage, self._stages, last, "meta")
            self._counts[key] = _count_parameters(piece.objective), 0
        return self._counts[key]


class _PieceBytes:
    """The bytes that autograd holds for each piece of a batch; equal pieces are counted once."""

    def __init__(self, pieces: Pieces, stages: int) -> None:
        self._pieces, self._stages = pieces, stages
        self._counts: dict[str, int] = {}
        # The key of a loss is found by building a stage, so it is kept as well.
        self._loss_keys: dict[tuple[int, int], str] = {}

    def bytes_per_sample(self, first: int, last: int, stage: int) -> float:
        """Return the bytes a sample of blocks first..last as stage `stage`."""
        nbytes = self._count_lead(stage, first) + self._count_loss(stage, last)
        for index in range(first + 1, last + 1):
            nbytes += self._count_block(index)
        return nbytes / BATCH

    def _count_lead(self, stage: int, first: int) -> int:
        key = self._pieces.lead_key(stage, first)
        if key not in self._counts:
            self._counts[key] = _count_forward_bytes(self._pieces.lead(stage, first, "meta"))
        return self._counts[key]

    def _count_block(self, index: int) -> int:
        """Return what a block and the one before it save, less what the one before saves alone."""
        key = f"{self._pieces.block_key(index - 1)} {self._pieces.block_key(index)}"
        if key not in self._counts:
            stage = min(index - 1, 1)
            pair = self._pieces.stage(index - 1, index, stage, stage + 2, "meta")
            self._counts[key] = _count_forward_bytes(pair) - self._count_lead(stage, index - 1)
        return self._counts[key]

    def _count_loss(self, stage: int, last: int) -> int:
        if (stage, last) not in self._loss_keys:
            self._loss_keys[stage, last] = self._pieces.loss_key(stage, self._stages, last)
        key = self._loss_keys[stage, last]
        if key not in self._counts:
            piece = self._pieces.loss(stage, self._stages, last, "meta")
            self._counts[key] = _count_forward_bytes(piece, with_loss=True)
            self._counts[key] -= _count_forward_bytes(piece)
        return self._counts[key]


class _FrozenPieceBytes(_PieceBytes):
    """The same for a network with frozen blocks.

    What a piece holds depends on whether its input has a graph. It has none after frozen blocks
    alone, unless an adapter or a reconciled gradient stands before them.
    """

    def __init__(self, pieces: Pieces, stages: int) -> None:
        super().__init__(pieces, stages)
        axes = {
            "method.context": {"mode": "none"},
            "method.reconcile": {"distance": "none"},
        }
        self._bare_pieces = Pieces(pieces.blueprint, update(pieces.config, axes))

    def bytes_per_sample(self, first: int, last: int, stage: int) -> float:
        """Return the bytes a sample of blocks first..last as stage `stage`."""
        nbytes = self._count_lead(stage, first)
        for index in range(first + 1, last + 1):
            nbytes += self._count_next_block(index, self._has_graph(stage, first, index))
        nbytes += self._count_last_loss(stage, last, self._has_graph(stage, first, last + 1))
        return nbytes / BATCH

    def _has_graph(self, stage: int, first: int, index: int) -> bool:
        """Return whether the input of a block, or of the loss, has a graph in a stage."""
        config = self._pieces.config
        if stage > 0 and (config.reconciles or context_sources(config.method.context.mode, stage)):
            return True
        return any(self._is_trained(before) for before in range(first, index))

    def _is_trained(self, index: int) -> bool:
        state = self._pieces.blueprint.state[index]
        return index not in self._pieces.frozen and len(state) > 0

    def _count_next_block(self, index: int, has_graph: bool) -> int:
        """Return the bytes of a block after another one. has_graph: whether its input has one."""
        keys = (self._pieces.block_key(index - 1), self._pieces.block_key(index))
        key = f"{keys} {has_graph}"
        if key not in self._counts:
            stage = min(index - 1, 1)
            # A trained block before it gives the graph by itself.
            input_has_graph = has_graph and not self._is_trained(index - 1)
            pair = self._bare_pieces.stage(index - 1, index, stage, stage + 2, "meta")
            single = self._bare_pieces.lead(stage, index - 1, "meta")
            self._counts[key] = _count_forward_bytes(pair, has_graph=input_has_graph)
            self._counts[key] -= _count_forward_bytes(single, has_graph=input_has_graph)
        return self._counts[key]

    def _count_last_loss(self, stage: int, last: int, has_graph: bool) -> int:
        """Return the bytes of a stage's loss. has_graph: whether its input has one."""
        key = f"loss {stage} {last} {has_graph}"
        if key not in self._counts:
            piece = self._pieces.loss(stage, self._stages, last, "meta")
            # The blocks of stage 0 are all in its piece.
            input_has_graph = has_graph and stage > 0
            self._counts[key] = _count_forward_bytes(piece, True, input_has_graph)
            self._counts[key] -= _count_forward_bytes(piece, False, input_has_graph)
        return self._counts[key]


def _count_forward_bytes(stage: Stage, with_loss: bool = False, has_graph: bool = False) -> int:
    """Return the bytes of a batch that autograd holds after the forward pass or the local loss.

    has_graph: whether the received activation has a graph.
    """
    message = empty_message(stage.plan)
    if has_graph:
        # A block may write into its input, which no leaf allows.
        name = stage.plan.input
        x = message.fields[name].requires_grad_().clone()
        message = replace(message, fields={**message.fields, name: x})
    saved = SavedBytes([*stage.parameters(), *stage.weights().values()])
    with saved.hooks(), fuse_attention():
        h = stage.forward(message)
        # The loss stays alive up to here: its graph is what is counted.
        loss = stage.local_loss(message, h) if with_loss else h
        peak = saved.peak
    del h, loss
    return peak


def _count_training_step(stage: Stage, message: Message, config: Resolved) -> tuple[int, int]:
    """Return the peak of saved bytes and the MACs of one real training step, per sample."""
    # The received activation counts where autograd holds it, as in the published figures. The
    # message's buffer does not.
    saved = SavedBytes([*stage.parameters(), *stage.weights().values()])
    with count_flops() as counter, saved.hooks(), fuse_attention():
        train_step(stage, message, 0.0, send_nothing, mark_nothing)
    peak = saved.peak
    if config.run.checkpointing == "block":
        peak = max(peak, _count_recomputation_bytes(stage))
    return peak // BATCH, int(counter.get_total_flops()) // 2 // BATCH


def _count_recomputation_bytes(stage: Stage) -> int:
    """Return the peak of saved bytes while blocks are run again.

    It is the inputs up to a block and what this block saves. torch hides what it computes again
    from the hooks that count the rest.
    """
    saved = SavedBytes([*stage.parameters(), *stage.weights().values()])
    inputs = []
    companions: Sequence[Tensor]
    x, *companions = _make_empty_input(stage.plan)

    # Tensors are held detached: a saved output would hold the graph that holds it.
    def hold(tensor: Tensor) -> Any:
        return saved.hold(tensor.detach())

    for block in stage.blocks:
        inputs += [saved.hold(tensor) for tensor in (x, *companions)]
        hooks = saved_tensors_hooks(hold, lambda holder: holder.tensor)
        with hooks, fuse_attention(), stage.precision():
            x, companions = _run_without_graph(block, x.clone(), companions)
    return saved.peak


def _run_without_graph(
    block: nn.Module, x: Tensor, companions: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return what a block gives, without its graph, which is freed."""
    main, output_companions = split_activation(block(x, *companions))
    return main.detach(), [tensor.detach() for tensor in output_companions]


def _count_auxiliary_macs(objective: LocalLoss, h: Tensor, fields: Mapping[str, Tensor]) -> int:
    """Return the MACs of the auxiliary networks as the loss runs them, per sample.

    A network that a coefficient of 0 leaves out runs once on the bare activation. What the loss
    computes beside its networks, as products of pairs, is in no published count.
    """
    macs: dict[nn.Module, int] = {}
    counters: list[FlopCounterMode] = []

    # A counter runs while a network runs; networks may be nested.
    def begin(network: nn.Module, _: Any) -> None:
        counters.append(count_flops().__enter__())

    def end(network: nn.Module, *_: Any) -> None:
        counter = counters.pop()
        counter.__exit__(None, None, None)
        macs[network] = macs.get(network, 0) + _sum_layer_macs(counter)

    if isinstance(objective, FeedbackLoss):
        # The copies always run, and the loss gets what they give.
        with torch.no_grad():
            front_macs = _macs_of(lambda: objective.front(h))
            return front_macs + _count_auxiliary_macs(objective.loss, objective.front(h), fields)
    networks = list(objective.children())
    hooks = [network.register_forward_pre_hook(begin) for network in networks]
    hooks += [network.register_forward_hook(end) for network in networks]
    with torch.no_grad():
        objective(h, fields)
    for hook in hooks:
        hook.remove()

    # The network's own head always runs, and it alone takes companions.
    for network in networks:
        if network not in macs:
            macs[network] = _macs_of(partial(network, h))
    return sum(macs.values())


def _macs_of(call: Callable[[], object]) -> int:
    with count_flops() as counter, torch.no_grad():
        call()
    return _sum_layer_macs(counter)


def _sum_layer_macs(counter: FlopCounterMode) -> int:
    """Return the MACs of convolutions and linear layers, per sample."""
    counts = counter.get_flop_counts().get("Global", {})
    flops = sum(count for kernel, count in counts.items() if kernel in _LAYERS)
    return flops // 2 // BATCH


def _count_parameters(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(parameter.numel() for parameter in module.parameters())


def empty_message(plan: StagePlan) -> Message:
    """Return a training message of 64 samples on the meta device, as `build_empty_message`."""
    return build_empty_message(plan, Kind.TRAIN, BATCH)


def _make_empty_input(plan: StagePlan) -> list[Tensor]:
    """Return the main tensor and its companions, without values, as the blocks take them."""
    return [empty_rows(field, BATCH) for field in plan.input_fields]
