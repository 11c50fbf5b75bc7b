"""An objective of the user's own: what is wrong with it is told in one line, before training begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from localpipe.config.user_code import describe_exception
from localpipe.errors import UserError
from localpipe.fields import Field
from localpipe.methods.objective import LocalLoss, Site

T = TypeVar("T")
_ROWS = 2


def build_user_objective(
    name: str, build: Callable[[Any, Site], LocalLoss], options: Any, site: Site
) -> LocalLoss:
    """Build an objective, named as the configuration names it."""
    where = f"for stage {site.stage}, whose output has shape {site.shape}"
    return _told(f"objective: {name} cannot be built {where}", lambda: build(options, site))


def check_user_objective(
    name: str, objective: LocalLoss, stage: int, shape: tuple[int, ...], received: Sequence[Field]
) -> None:
    """Try an objective of a stage on the meta device; raise UserError where it gives no logits, or no scalar loss."""

    def empty(shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
        return torch.empty(_ROWS, *shape, dtype=getattr(torch, dtype), device="meta")

    h = empty(shape)
    fields = {field.name: empty(field.shape, field.dtype) for field in received}
    wrong = f"objective: {name} fails at stage {stage}, tried without values on an output of shape {tuple(h.shape)}"
    with torch.no_grad():
        logits = _told(wrong, lambda: objective.exit(h))
        loss = _told(wrong, lambda: objective(h, fields))
    wanted = (_ROWS, objective.task.num_classes)
    if logits is not None and tuple(logits.shape) != wanted:
        raise UserError(
            f"objective: {name}'s exit gives {tuple(logits.shape)} for {_ROWS} images; expected {wanted}"
        )
    if tuple(loss.shape) != ():
        raise UserError(
            f"objective: {name}'s loss has shape {tuple(loss.shape)}; expected one number, the batch's mean"
        )


def _told(wrong: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{wrong}: {describe_exception(error)}") from error
