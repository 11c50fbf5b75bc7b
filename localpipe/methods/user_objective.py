"""Checks of a user's own objective: each mistake becomes one line, before training begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from localpipe.config.user_code import call_user_code
from localpipe.errors import UserError
from localpipe.fields import Field, dtype_name
from localpipe.methods.objective import LocalLoss, Site

_ROWS = 2


def build_user_objective(
    name: str, build: Callable[[Any, Site], LocalLoss], options: Any, site: Site
) -> LocalLoss:
    """Return build(options, site), which is a user's class called.

    name: the objective's in the configuration. Raises UserError with it if `build` raises any
    Exception or SystemExit. A UserError of `build` itself comes through as it is. Raises UserError
    too where the result has no `task`, a layer without shapes, or state that is no tensor.
    """
    failure = (
        f"objective: {name} cannot be built "
        f"for stage {site.stage}, whose output has shape {site.shape}"
    )
    objective = call_user_code(failure, lambda: build(options, site))
    _check_parts(name, objective)
    return objective


def check_user_objective(
    name: str, objective: LocalLoss, stage: int, shape: tuple[int, ...], received: Sequence[Field]
) -> None:
    """Run an objective of a stage on the meta device, and raise UserError where it is wrong.

    Its exit must return None or logits (B, classes), and its loss must be a scalar. Both are called
    once, the exit first, without gradients, on a batch of two. objective: on the meta device.
    shape: of the stage's output, per sample. received: the fields of a message.
    """
    # A batch of empty tensors, as the stage would hand them over.
    h = _empty_batch(shape)
    fields = {field.name: _empty_batch(field.shape, field.dtype) for field in received}

    failure = (
        f"objective: {name} fails at stage {stage}, "
        f"tried without values on an output of shape {tuple(h.shape)}"
    )
    with torch.no_grad():
        logits = call_user_code(failure, lambda: objective.exit(h))
        loss = call_user_code(failure, lambda: objective(h, fields))

    expected = (_ROWS, *objective.task.output_shape)
    if logits is not None and not isinstance(logits, Tensor):
        raise UserError(
            f"objective: {name}'s exit gives {type(logits).__name__}; expected logits, a tensor "
            f"{expected}, or None without a classifier"
        )
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        kind = dtype_name(loss.dtype) if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(
            f"objective: {name}'s loss is {kind}; expected a tensor of one floating-point number"
        )
    if logits is not None and tuple(logits.shape) != expected:
        raise UserError(
            f"objective: {name}'s exit gives {tuple(logits.shape)} for {_ROWS} images; "
            f"expected {expected}"
        )
    if tuple(loss.shape) != ():
        raise UserError(
            f"objective: {name}'s loss has shape {tuple(loss.shape)}; "
            "expected one number, the batch's mean"
        )


def _check_parts(name: str, objective: LocalLoss) -> None:
    """Raise UserError where `task` is missing, a layer has no shapes, or state is no tensor."""
    if getattr(objective, "task", None) is None:
        raise UserError(
            f"objective: {name} has no task; set self.task = site.blueprint.task in __init__"
        )
    for path, tensor in [*objective.named_parameters(), *objective.named_buffers()]:
        if is_lazy(tensor):
            raise UserError(
                f"objective: {name}'s {path} has no shape before it runs; expected layers with "
                "their sizes; site.shape and site.example() tell them"
            )
    for key, value in objective.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"objective: {name}'s {key} is {type(value).__name__} in its state_dict; expected "
                "tensors alone, which a checkpoint holds; keep this state in buffers"
            )


def _empty_batch(shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
    return torch.empty(_ROWS, *shape, dtype=getattr(torch, dtype), device="meta")
