"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from localpipe.config.keys import Optim

_WARMUP_START = 0.01


@dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate of a run of `epochs` epochs of `steps_per_epoch` steps, whatever `max_steps` cuts off."""

    optim: Optim
    steps_per_epoch: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        optim = self.optim
        assert optim.lr != "auto" and optim.warmup_epochs != "auto", "resolved before a run"
        peak, epochs, warmup = optim.lr, optim.epochs, optim.warmup_epochs
        epoch = (step - 1) // self.steps_per_epoch + 1
        if optim.schedule == "cosine_epoch":
            return _cosine_epoch(peak, epoch, epochs, warmup)
        ramp = warmup * self.steps_per_epoch
        if step <= ramp:
            return peak * step / ramp
        if optim.schedule == "cosine_epoch_from_0":
            # The papers' rate on ImageNet (InfoPro, AugLocal; released code): epochs counted from 0, so the last one moves.
            return _half_cosine(peak, (epoch - 1 - warmup) / max(epochs - warmup, 1))
        if optim.schedule == "cosine_step":
            progress = (step - 1 - ramp) / max(epochs * self.steps_per_epoch - ramp, 1)
            return _half_cosine(peak, progress)
        if optim.schedule == "step":
            return float(peak * 0.1 ** ((epoch > epochs // 2) + (epoch > epochs * 3 // 4)))
        return peak


def _half_cosine(peak: float, progress: float) -> float:
    return 0.5 * peak * (1 + math.cos(math.pi * progress))


def _cosine_epoch(peak: float, epoch: int, epochs: int, warmup: float) -> float:
    """Return the papers' rate of an epoch, counted from 1 (InfoPro, ContSup, AugLocal; released code).

    Half a cosine that is exactly 0 in the last epoch, blended over the first `warmup` epochs with a rate of 0.01.
    """
    rate = 0.5 * peak * (1 + math.cos(math.pi * epoch / epochs))
    if epoch > warmup:
        return rate
    return rate * (epoch - 1) / warmup + _WARMUP_START * (warmup + 1 - epoch) / warmup
