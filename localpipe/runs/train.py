"""Trains a configuration to its end with localpipe's own launcher."""

from __future__ import annotations

import signal
import sys

from localpipe.config.keys import Config
from localpipe.pipeline.launch.launcher import Workers
from localpipe.runs.collector import Collector
from localpipe.runs.prepare import prepare
from localpipe.runs.summary import print_summary


def train(given: Config) -> int:
    """Run a job to its end; return the exit status."""
    prepared = prepare(given)
    for note in prepared.notes:
        print(note, flush=True)
    if prepared.summary is not None:
        print_summary(prepared.summary, prepared.config.run.dir)
        return 0
    collector = Collector(prepared.config, prepared.course, prepared.job)
    with Workers(prepared.job, "localpipe.runs.train_worker") as workers:
        try:
            status = workers.follow(collector.tick)
        finally:
            collector.close()
        if status != 0:
            return status
        if collector.finish(workers.store):
            return 0
        print(
            f"localpipe: stopped; the same command goes on in {prepared.config.run.dir}",
            file=sys.stderr,
        )
        return 128 + (workers.asked or signal.SIGTERM)
