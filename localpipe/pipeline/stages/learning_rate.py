"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from localpipe.config.keys import Optim

_WARMUP_START = 0.01


@dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate of every step of a run of `optim.epochs` epochs.

    `optim.max_steps` ends a run early, and the schedule stays the same. steps_per_epoch: at least
    1. optim: without `auto` in lr and warmup_epochs.
    """

    optim: Optim
    steps_per_epoch: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1, by `optim.schedule`.

        Steps after the last epoch are not refused. Raises AssertionError if lr or warmup_epochs is
        `auto`, and ZeroDivisionError if steps_per_epoch is 0.
        """
        optim = self.optim
        assert optim.lr != "auto" and optim.warmup_epochs != "auto", "resolved before a run"
        peak = optim.lr
        epochs = optim.epochs
        warmup = optim.warmup_epochs
        epoch = (step - 1) // self.steps_per_epoch + 1
        if optim.schedule == "cosine_epoch":
            return _cosine_epoch(peak, epoch, epochs, warmup)

        # The other schedules begin with a linear warm-up.
        warmup_steps = warmup * self.steps_per_epoch
        if step <= warmup_steps:
            return peak * step / warmup_steps
        if optim.schedule == "cosine_epoch_from_0":
            # The papers' rate on ImageNet (InfoPro, AugLocal; released code). Epochs count from 0,
            # so the last epoch still moves the weights.
            return _half_cosine(peak, (epoch - 1 - warmup) / max(epochs - warmup, 1))
        if optim.schedule == "cosine_step":
            steps = max(epochs * self.steps_per_epoch - warmup_steps, 1)
            return _half_cosine(peak, (step - 1 - warmup_steps) / steps)
        if optim.schedule == "step":
            decays = (epoch > epochs // 2) + (epoch > epochs * 3 // 4)
            return float(peak * 0.1**decays)
        return peak


def _half_cosine(peak: float, progress: float) -> float:
    """Return a rate that falls from the peak at progress 0 to 0 at progress 1.

    Before that, in the rest of an epoch in which the warm-up ends, it is the peak.
    """
    return 0.5 * peak * (1 + math.cos(math.pi * max(progress, 0.0)))


def _cosine_epoch(peak: float, epoch: int, epochs: int, warmup: float) -> float:
    """Return the papers' rate of an epoch from 1 (InfoPro, ContSup, AugLocal; released code).

    Half a cosine that is exactly 0 in the last epoch. In the first `warmup` epochs it is blended
    with a rate of 0.01.
    """
    rate = 0.5 * peak * (1 + math.cos(math.pi * epoch / epochs))
    if epoch > warmup:
        return rate
    return rate * (epoch - 1) / warmup + _WARMUP_START * (warmup + 1 - epoch) / warmup
