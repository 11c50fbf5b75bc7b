"""A synthetic chain of blocks that sleep, with messages of a chosen size. It measures the runtime.

Every block sleeps `time_ms` in each training step. The time varies uniformly by +-`jitter`, drawn
anew in every step and block from the stage's own random stream. Each boundary carries
`message_bytes` for a batch of `batch_size`. Blocks have nothing to learn, but the classifiers of
the stages do: a gradient as large as the message would measure the memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from localpipe.config.keys import Blocks, NonNegative, Positive
from localpipe.errors import UserError
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.tasks.classification import Classification

_FLOAT_BYTES = 4
_DEFAULT_BLOCKS = 4


@dataclass(frozen=True)
class ChainClassification(Classification):
    """Classification by the first number of a sample: the rest of a chain's message is ballast."""

    def pool(self, h: Tensor) -> Tensor:
        """Return the first number of every sample, (B, 1). h: (B, 1, 1, features)."""
        return h[..., :1].flatten(1)


class Wait(nn.Module):
    """Sleep, then repeat the first number of each sample: (B, ...) to (B, 1, 1, features).

    The repetition is an expanded view, which takes no memory. wait_s: seconds. jitter: the largest
    deviation from it, as a fraction in 0..1.
    """

    def __init__(self, wait_s: float, jitter: float, features: int) -> None:
        super().__init__()
        self.wait_s = wait_s
        self.jitter = jitter
        self.features = features
        self.jittering = jitter > 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the repeated first numbers.

        It sleeps in training mode only, and not on the meta device. The jitter is drawn from the
        default generator.
        """
        if self.training and not x.is_meta:
            time.sleep(self._draw_wait_s())
        first_numbers = x.flatten(1)[:, 0]
        return first_numbers.view(-1, 1, 1, 1).expand(-1, 1, 1, self.features)

    def _draw_wait_s(self) -> float:
        if not self.jittering:
            return self.wait_s
        deviation = self.jitter * (2 * float(torch.rand(())) - 1)
        return self.wait_s * (1 + deviation)


class ChainHead(nn.Module):
    """A linear layer on the first number of a sample: (B, 1, 1, features) to (B, classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(1, num_classes)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes)."""
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
    blocks: Blocks | None = None,
) -> Blueprint:
    """Return a chain whose block k sleeps time_ms[k] milliseconds.

    It has `blocks` blocks: 4 by default, or as many as `time_ms` lists. One number of `time_ms` is
    that of every block. batch_size: the samples of a message. message_bytes: of a message of this
    size, a multiple of 4 * batch_size. jitter: a fraction of the time, in 0..1. Raises UserError if
    the lists or the size of a message do not fit.
    """
    # One time for every block.
    if isinstance(time_ms, tuple):
        times_ms = time_ms
    else:
        times_ms = (time_ms,) * (blocks or _DEFAULT_BLOCKS)
    if not times_ms or blocks not in (None, len(times_ms)):
        expected = blocks or "one or more"
        raise UserError(
            f"model: model.args.time_ms lists {len(times_ms)} blocks; expected {expected}"
        )

    # A message is a whole number of floats for each sample.
    features, rest = divmod(message_bytes, _FLOAT_BYTES * batch_size)
    if rest or not features:
        raise UserError(
            f"model: message_bytes {message_bytes} is no multiple of {_FLOAT_BYTES * batch_size}, "
            f"one float of each of {batch_size} samples; "
            "change model.args.message_bytes or data.batch_size"
        )

    parts = []
    for index, block_ms in enumerate(times_ms):
        build = partial(Wait, block_ms / 1000, jitter, features)
        parts.append(Block(f"wait{index}", f"wait{index}.", build))
    tail = Block("head", "", partial(ChainHead, num_classes))
    return Blueprint(name, tuple(parts), tail, ChainClassification(num_classes), image)
