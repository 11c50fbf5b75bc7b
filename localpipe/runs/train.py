"""Trains a configuration to its end with localpipe's own launcher."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import closing

from localpipe.config.keys import Config
from localpipe.output import say, warn
from localpipe.pipeline.launch.launcher import Workers
from localpipe.pipeline.launch.recovery import RecoveringWorkers, Recovery
from localpipe.pipeline.workers.feedback import back_schemas
from localpipe.plan.costs import count_costs
from localpipe.plan.memory import recovery_snapshot_bytes
from localpipe.runs.collector import Collector
from localpipe.runs.directory import RunDirectory
from localpipe.runs.prepare import Prepared, prepare
from localpipe.runs.summary import print_summary


def train(given: Config) -> int:
    """Run a job to its end in worker processes, and return the exit status.

    The status is 0 for a finished run, which prints its summary again, and 128 + signal after a
    stop. It is 1 or 2 if a worker failed: the cause was printed to standard error. Only in the main
    thread it handles signals. Raises what `prepare` raises before the workers start,
    RunError if the summary or the trace cannot be written, and KeyboardInterrupt at a second
    signal.
    """
    prepared = prepare(given)
    with prepared.lock:
        return _train(prepared)


def _train(prepared: Prepared) -> int:
    for note in prepared.notes:
        say(note)
    run_dir = prepared.config.run.dir
    if prepared.summary is not None:
        print_summary(prepared.summary, run_dir)
        return 0

    # The collector is closed before more is printed: it gives the terminal back.
    collector = Collector(prepared)
    advise = RunDirectory(run_dir).describe_resume
    with closing(collector), _start_workers(prepared, advise, collector) as workers:
        try:
            status = workers.follow(collector.tick)
        finally:
            collector.close()
        if status != 0:
            return status
        recoveries: Sequence[Recovery] | None = None
        if isinstance(workers, RecoveringWorkers):
            recoveries = workers.list_recoveries()
        if collector.finish(workers.store, recoveries):
            return 0
        warn(f"localpipe: stopped; the same command goes on in {run_dir}")
        return 128 + (workers.stop_signal or signal.SIGTERM)


def _start_workers(prepared: Prepared, advise: Callable[[], str], collector: Collector) -> Workers:
    """Start the workers of a run. The launcher replaces those that die, if that is configured."""
    config, job, module = prepared.config, prepared.job, "localpipe.runs.train_worker"
    if not config.recovers:
        return Workers(config, job, module, advise)
    costs = count_costs(prepared.blueprint, prepared.plans, config)
    snapshots = recovery_snapshot_bytes(costs, config)
    show, plans = collector.show_recovery, prepared.plans
    back = back_schemas(config, prepared.blueprint, plans)
    return RecoveringWorkers(config, job, module, advise, plans, back, snapshots, show)
