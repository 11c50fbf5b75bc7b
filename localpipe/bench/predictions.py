"""The predicted throughput of localpipe, from profiles that are measured during the benchmark."""

from __future__ import annotations

from collections.abc import Callable

from localpipe.config.resolved import Resolved
from localpipe.plan.balanced_cuts import measure_here
from localpipe.plan.predict import predict_own_cut
from localpipe.plan.profile import Profile


class ThroughputPredictions:
    """The samples per second that every profile so far predicts for a resolved configuration.

    `samples_per_s` has one number for each profile, that of `first` at the beginning. Raises
    UserError if `first` was not measured for the configuration's number of stages.
    """

    def __init__(self, config: Resolved, first: Profile) -> None:
        self._config = config
        self.samples_per_s: list[float] = []
        self._add(first)

    def measure_again(self, check: Callable[[], None]) -> None:
        """Measure one more profile, for this number of stages alone, and append its prediction.

        `check` is called about ten times a second. What it raises ends the measuring. Then nothing
        is appended. Raises RunError if the measuring fails.
        """
        self._add(measure_here(self._config, [self._config.stages], check))

    def _add(self, profile: Profile) -> None:
        self.samples_per_s.append(predict_own_cut(self._config, profile).samples_per_s)
