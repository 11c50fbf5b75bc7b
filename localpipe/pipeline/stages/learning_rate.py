"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from localpipe.config.keys import Optim

WARMUP_START = 0.01  # the rate of the first epoch of cosine_epoch with a warm-up
_POWER = 0.9


@dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate of every step of a run of `optim.epochs` epochs.

    `optim.max_steps` ends a run early, and the schedule stays the same. Where `optim.epochs` is
    None, the schedule is `max_steps` steps long, and what counts epochs in it counts steps.
    steps_per_epoch: at least 1. optim: without `auto` in lr and warmup_epochs.
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
        epochs, length = self._find_length()
        warmup = optim.warmup_epochs * (self.steps_per_epoch // length)
        if optim.schedule == "cosine_epoch" and optim.warmup_steps is None:
            return _cosine_epoch(optim.lr, (step - 1) // length + 1, epochs, warmup)

        # The other schedules begin with a linear warm-up, and so does every one in steps.
        warmup_steps = warmup * length
        if optim.warmup_steps is not None:
            warmup, warmup_steps = optim.warmup_steps / length, optim.warmup_steps
        if step <= warmup_steps:
            return optim.lr * step / warmup_steps
        if optim.schedule in ("cosine_step", "poly"):
            steps = max(epochs * length - warmup_steps, 1)
            return self._rate_by_step((step - 1 - warmup_steps) / steps)
        return self._rate_by_epoch((step - 1) // length + 1, epochs, warmup)

    def _find_length(self) -> tuple[int, int]:
        """Return the epochs of the schedule, and the steps of one."""
        if self.optim.epochs is not None:
            return self.optim.epochs, self.steps_per_epoch
        assert self.optim.max_steps is not None, "checked with the configuration"
        return self.optim.max_steps, 1

    def _rate_by_epoch(self, epoch: int, epochs: int, warmup: float) -> float:
        """Return the rate of a schedule that holds it within an epoch, after the warm-up."""
        optim = self.optim
        assert optim.lr != "auto"
        if optim.schedule == "cosine_epoch":
            return _cosine_epoch(optim.lr, epoch, epochs, 0)
        if optim.schedule == "cosine_epoch_from_0":
            # The papers' rate on ImageNet (InfoPro, AugLocal; released code). Epochs count from 0,
            # so the last epoch still moves the weights.
            return _half_cosine(optim.lr, (epoch - 1 - warmup) / max(epochs - warmup, 1))
        if optim.schedule in ("step", "multistep"):
            return self._rate_by_milestones(optim.lr, epoch, epochs)
        return optim.lr

    def _rate_by_milestones(self, peak: float, epoch: int, epochs: int) -> float:
        """Return the peak times the factor of every milestone up to an epoch, counted from 1."""
        milestones = self.optim.milestones
        assert milestones != "auto", "resolved before a run"
        if milestones is None:
            # A run of the schedule step that began before its drops were counted from 1.
            milestones = (epochs // 2 + 1, epochs * 3 // 4 + 1)
        drops = sum(epoch >= milestone for milestone in milestones)
        return float(peak * self.optim.factor**drops)

    def _rate_by_step(self, progress: float) -> float:
        """Return the rate of a schedule that falls to `min_lr`, at a progress from 0 to 1."""
        optim = self.optim
        assert optim.lr != "auto"
        height = optim.lr - optim.min_lr
        if optim.schedule == "poly":
            # InfoPro's rate on Cityscapes.
            return optim.min_lr + height * float(max(1 - progress, 0.0) ** _POWER)
        return optim.min_lr + _half_cosine(height, progress)


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
    return rate * (epoch - 1) / warmup + WARMUP_START * (warmup + 1 - epoch) / warmup
