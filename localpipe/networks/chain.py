"""A synthetic chain: blocks that wait instead of computing, and move messages of a chosen size. It measures the runtime.

Every block waits `time_ms` in each training step, spread by a uniform share of +-`jitter` that is drawn anew in every step
and block from the stage's own random stream. Each boundary carries `message_bytes` for a batch of `batch_size`. Blocks have
nothing to learn, the classifiers of the stages do: a gradient as large as the message would measure the memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from localpipe.config.keys import NonNegative, Positive
from localpipe.errors import UserError
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.tasks.classification import Classification

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Tick(Classification):
    """Classification by the first number of a sample: the rest of a chain's message is ballast."""

    def pool(self, h: Tensor) -> Tensor:
        """Return (B, 1). h: (B, 1, 1, features)."""
        return h[..., :1].flatten(1)


class Wait(nn.Module):
    """(B, ...) to (B, 1, 1, features): the first number of a sample everywhere (without memory), behind the wait."""

    def __init__(self, wait_s: float, jitter: float, features: int) -> None:
        super().__init__()
        self.wait_s, self.jitter, self.features = wait_s, jitter, features
        self.jittering = jitter > 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not x.is_meta:
            time.sleep(self._drawn_s())
        return x.flatten(1)[:, 0].view(-1, 1, 1, 1).expand(-1, 1, 1, self.features)

    def _drawn_s(self) -> float:
        spread = self.jitter * (2 * float(torch.rand(())) - 1) if self.jittering else 0.0
        return self.wait_s * (1 + spread)


class Head(nn.Module):
    """A linear layer on the first number of every sample; (B, 1, 1, features) to (B, classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(1, num_classes)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.fc(h[..., :1].flatten(1))
        return logits


def chain_blueprint(
    name: str,
    image: tuple[int, int, int],
    num_classes: int,
    *,
    batch_size: int,
    time_ms: NonNegative | tuple[NonNegative, ...] = 20.0,
    message_bytes: Positive = 2**20,
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.0,
    blocks: Positive | None = None,
) -> Blueprint:
    """Return a chain of `blocks` blocks (4, or as many as `time_ms` lists), block k waiting time_ms[k] milliseconds."""
    times = time_ms if isinstance(time_ms, tuple) else (time_ms,) * (blocks or 4)
    if not times or blocks not in (None, len(times)):
        raise UserError(
            f"model: model.args.time_ms lists {len(times)} blocks; expected {blocks or 'one or more'}"
        )
    features, rest = divmod(message_bytes, _FLOAT_BYTES * batch_size)
    if rest or not features:
        raise UserError(
            f"model: message_bytes {message_bytes} is no multiple of {_FLOAT_BYTES * batch_size}, one float of each of "
            f"{batch_size} samples; change model.args.message_bytes or data.batch_size"
        )
    parts = [
        Block(f"wait{k}", f"wait{k}.", partial(Wait, t / 1000, jitter, features))
        for k, t in enumerate(times)
    ]
    tail = Block("head", "", partial(Head, num_classes))
    return Blueprint(name, tuple(parts), tail, Tick(num_classes), image)
