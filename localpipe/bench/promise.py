"""What profiles promise of localpipe's speed: one before the windows, one half way, one behind them.

A machine that others share is at times a quarter slower for minutes; the windows see all of it, a single profile does not.
"""

from __future__ import annotations

from collections.abc import Callable

from localpipe import job, prediction
from localpipe.profile import Profile
from localpipe.sections import Config


class Promise:
    """The samples per second that every profile so far predicts of a resolved configuration; the first one is given."""

    def __init__(self, config: Config, first: Profile) -> None:
        self._config = config
        self.samples_per_s: list[float] = []
        self._keep(first)

    def again(self, look: Callable[[], None]) -> None:
        """Measure one more profile, of this number of stages alone; `look` is called now and then, and may raise."""
        stages = self._config.pipeline.stages
        assert stages is not None, "resolved"
        self._keep(job.measured(self._config, [stages], look))

    def _keep(self, profile: Profile) -> None:
        self.samples_per_s.append(prediction.of(self._config, profile).samples_per_s)
