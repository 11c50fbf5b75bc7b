"""The processes of one system, the commands to them, and their measurements."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from localpipe.bench import worker
from localpipe.bench.rows import Measured
from localpipe.bench.systems.spec import SystemRequest
from localpipe.bench.turns import CommandSender
from localpipe.bench.worker import REQUEST_KEY
from localpipe.config.load import to_dict
from localpipe.config.resolved import Resolved
from localpipe.errors import RunError
from localpipe.output import show_progress
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.launcher import Workers
from localpipe.pipeline.launch.rank import RankNetwork
from localpipe.plan.measure import hold_weights

_BUILD_S, _WINDOW_S = 600.0, 300.0  # a response later than that never comes
_TRACED_STEPS = 14


class StopRequested(Exception):  # noqa: N818  # no error: a signal requested it
    """A signal requested a stop during a benchmark. `args[0]` is the signal's number."""


class SystemProcesses:
    """The processes of one system. They start here, and run until `end`, a failure or `close`.

    config: of this system's workers, one for each of `pipeline.processes`. find_signal: returns the
    signal that requested a stop from any system of the group, or 0. It is called while a response
    is awaited. The attributes `request`, `config`, `note` and `workers` are for reading.

    A failure of a worker, or a missing response, is never raised. Then `note` has its cause in one
    line, the processes are killed, and all methods but `collect` do nothing. `build`,
    `run_windows`, `trace` and `end` raise StopRequested if `find_signal` returns a signal. The
    processes then run until `close`.

    networks: by rank, of links that are shaped, or none. Make it in the main thread, because it
    handles signals.
    """

    def __init__(
        self,
        request: SystemRequest,
        config: Resolved,
        find_signal: Callable[[], int],
        networks: Sequence[RankNetwork] = (),
    ) -> None:
        self.request = request
        self.config = config
        self.note: str | None = None
        self._find_signal = find_signal
        self._steps = 0  # of a window
        self._kinds: list[str] = []
        self._lags: list[float] = []  # by rank, seconds after the first one at a window's start
        self._saved_bytes: list[int | None] = []
        self._windows: dict[str, list[list[dict[str, Any]]]] = {}  # by kind, window, rank
        self._spans: list[list[Any]] = []  # by rank

        # Start them. Leaving the stack kills what still runs.
        values = to_dict(hold_weights(config))
        job = Job(values, values, 0, 0.0, time.time())
        with contextlib.ExitStack() as resources:
            workers = Workers(config, job, worker.__name__, networks=networks)
            self.workers = resources.enter_context(workers)
            self.workers.store.set(REQUEST_KEY, json.dumps(asdict(request)))
            self._sender = CommandSender(self.workers.folder, config.pipeline.processes)
            resources.callback(self._sender.close)
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Kill the processes that still run. It may be called again. Then only `collect` works."""
        self._resources.close()

    def build(self, window_s: float, min_steps: int = 1) -> None:
        """Build the system, warm it up, and decide the steps of its windows.

        Call it once, before the other commands. window_s: seconds of a window. A window has as many
        steps as the slowest worker needs for it, but at least `min_steps` of the system and
        `min_steps`. It waits up to 600 s, and raises StopRequested.
        """
        show_progress(f"building {self.request.system}")
        responses = self._send(_BUILD_S, do="build")
        if responses is None:
            return
        step_times = [response["step_s"] for response in responses]
        steps = math.ceil(window_s / max(step_times))
        self._steps = max(self.request.spec.min_steps, min_steps, steps)
        self._kinds = responses[0]["kinds"]
        self._lags = window_lags(responses)
        self._saved_bytes = [response["saved"] for response in responses]

    def run_windows(self) -> None:
        """Run one window of every kind that the system has, and store the responses for `collect`.

        The kinds follow `System.window_steps` in order. Without `build` it does nothing. It raises
        StopRequested.
        """
        for kind in self._kinds:
            self.run_window(kind, kind)

    def run_window(self, kind: str, name: str | None, steps: int | None = None) -> None:
        """Run one window of a kind, and store the responses under a name for `collect`.

        kind: one of `System.window_steps`, else a failure. name: None stores nothing. steps: None
        for those that `build` decided. It raises StopRequested.
        """
        steps = steps or self._steps
        responses = self._send(_WINDOW_S, do=kind, steps=steps, lags=self._lags)
        if responses is None:
            return
        if name is not None:
            self._windows.setdefault(name, []).append(responses)
        # Without channels, the workers do not end in the phase of a pipeline.
        if kind != "bound":
            self._lags = window_lags(responses)

    def limit_sending(self, bytes_per_s: float | None) -> None:
        """Let every worker send at most so many bytes a second on each connection; None: no limit.

        It raises StopRequested.
        """
        self._send(_WINDOW_S, do="limit", bytes_per_s=bytes_per_s)

    def trace(self) -> None:
        """Run 14 steps and store every worker's spans for `collect`. A second call replaces them.

        Call `build` before it. It raises StopRequested.
        """
        responses = self._send(_WINDOW_S, do="trace", steps=_TRACED_STEPS)
        if responses is not None:
            self._spans = [response["spans"] for response in responses]

    def end(self) -> None:
        """Let every worker release its system and end, and wait for that.

        Call it last: afterwards only `collect` and `close` may be called. After a failure it does
        nothing. A worker that fails or does not respond within 300 s is a failure, with its cause
        in `note`. It raises StopRequested, and nothing else.
        """
        self._send(_WINDOW_S, do="end")

    def collect(self) -> Measured:
        """Return the measurements so far, also after a failure, `end` or `close`.

        Its lists are this object's own, not copies. Before `build` they are empty, and `steps` is
        0.
        """
        return Measured(
            self.request,
            self.config,
            self._steps,
            self._saved_bytes,
            self._windows,
            self.note,
            self._spans,
        )

    def _send(self, timeout_s: float, **command: Any) -> list[dict[str, Any]] | None:
        """Return every worker's response, or None if the system has failed."""
        if self.note is not None:
            return None
        try:
            return self._sender.send(command, timeout_s, self._check)
        except RunError as error:
            self.note = str(error)
            self.close()
            return None

    def _check(self) -> None:
        signal = self._find_signal()
        if signal:
            raise StopRequested(signal)
        cause = self.workers.cause()
        if cause is not None:
            raise RunError(cause.partition("\n")[0])


def window_lags(responses: Sequence[dict[str, Any]]) -> list[float]:
    """Return by rank how long after the first one it ended: a pipeline continues in that phase.

    responses: of one window by rank, at least one, whose `ended` is in seconds of the monotonic
    clock. The result is in seconds, and the smallest one is 0. Stages that all begin at once, as
    they never do in training, would wait for each other's cores for many steps.
    """
    ends = [response["ended"] for response in responses]
    first = min(ends)
    return [end - first for end in ends]
