"""Measures the systems of one group: all are started, then they run their windows in turn.

On GPUs each system is started, measured and ended before the next one. A system that waits for its
turn would hold its memory on the device, where there is less than of the host's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

from localpipe.bench.predictions import ThroughputPredictions
from localpipe.bench.processes import StopRequested, SystemProcesses
from localpipe.bench.request import CheckedRequest, system_config
from localpipe.bench.rows import Measured
from localpipe.config import registry
from localpipe.config.resolved import Resolved
from localpipe.output import show_progress


def measure_group(
    config: Resolved,
    requests: Sequence[CheckedRequest],
    is_traced: bool,
    predictions: ThroughputPredictions | None,
) -> list[Measured]:
    """Return what every system of a group measured, in the order of the table of systems.

    is_traced: run a few more steps for a timeline. predictions: measured again among the windows,
    or None. A request with a note is not started, and a system that fails while it runs raises
    nothing: `Measured.note` has the cause. Raises StopRequested for a signal, and RunError if a
    prediction cannot be measured. All processes are killed at the end, also then.
    """
    measured = []
    startable = []
    for checked in requests:
        if checked.note is None:
            startable.append(checked)
        else:
            measured.append(_describe_missing(checked, config))
    for group in _split_into_groups(startable, config):
        # The prediction is of localpipe, and is measured among the windows of one group.
        group_predictions = None
        if any(checked.request.spec.is_subject for checked in group):
            group_predictions, predictions = predictions, None
        measured += _measure_together(config, group, is_traced, group_predictions)
    show_progress("")
    order = list(registry.SYSTEMS)
    return sorted(measured, key=lambda result: order.index(result.request.system))


def _split_into_groups(
    requests: Sequence[CheckedRequest], config: Resolved
) -> list[Sequence[CheckedRequest]]:
    """Return the systems that are started together: all on the CPU, each alone on GPUs."""
    if config.run.device == "cuda":
        return [[checked] for checked in requests]
    return [requests]


def _measure_together(
    config: Resolved,
    requests: Sequence[CheckedRequest],
    is_traced: bool,
    predictions: ThroughputPredictions | None,
) -> list[Measured]:
    """Return what the systems measured that run at the same time. None of them has a note."""
    with contextlib.ExitStack() as resources:
        # Start them all, so that every window has the same processes around it.
        group: list[SystemProcesses] = []
        find_stop = partial(find_signal, group)
        for checked in requests:
            workers_config = system_config(checked.request, config)
            processes = SystemProcesses(checked.request, workers_config, find_stop)
            resources.callback(processes.close)
            group.append(processes)

        for processes in group:
            processes.build(config.bench.window_s)
        take_turns(group, config.bench.windows, predictions)
        for processes in group:
            if is_traced:
                processes.trace()
            processes.end()
        return [processes.collect() for processes in group]


def _describe_missing(checked: CheckedRequest, config: Resolved) -> Measured:
    """Return what is known of a system that cannot be measured."""
    workers_config = config
    if not checked.request.spec.is_subject:
        workers_config = system_config(checked.request, config)
    return Measured.missing(checked.request, workers_config, checked.note)


def take_turns(
    group: Sequence[SystemProcesses], windows: int, predictions: ThroughputPredictions | None
) -> None:
    """Let every system run its windows, there and back, so that a drift favours none.

    windows: of each system. Every second window runs the group in reverse. The prediction is
    measured again half way and after the last window, once if there is only one. Raises
    StopRequested and RunError as `measure_group`.
    """
    for window in range(windows):
        order = list(group)
        if window % 2:
            order.reverse()
        for index, processes in enumerate(order):
            text = f"window {window + 1} of {windows}: {processes.request.system}"
            show_progress(text, is_frequent=index > 0)
            processes.run_windows()
        if predictions is not None and window + 1 in (windows // 2, windows):
            show_progress("measuring the blocks of localpipe's stages again")
            predictions.measure_again(partial(_raise_stop, group))


def _raise_stop(group: Sequence[SystemProcesses]) -> None:
    signal = find_signal(group)
    if signal:
        raise StopRequested(signal)


def find_signal(group: Sequence[SystemProcesses]) -> int:
    """Return the signal that requested a stop, or 0. The group that started last receives it."""
    return max((processes.workers.stop_signal for processes in group), default=0)
