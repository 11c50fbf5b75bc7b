"""Reads metrics.jsonl while a run writes it, for the live view, the trackers and summary.json."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

from localpipe.files import write_output
from localpipe.pipeline.launch.recovery import Recovery
from localpipe.runs.directory import RunDirectory
from localpipe.runs.prepare import Prepared
from localpipe.runs.progress import View
from localpipe.runs.recorded_run import Record
from localpipe.runs.records import parse_record
from localpipe.runs.summary import build_summary, final_evaluations, print_summary
from localpipe.runs.trace import merge_traces
from localpipe.runs.trackers import build_trackers


class Collector:
    """One for each run: in localpipe's launcher, or in rank 0 under torchrun.

    The workers only append to metrics.jsonl. It opens the trackers and the live view at once. What
    they cannot do is a line on standard error, and no failure of the run.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._config = prepared.config
        self._directory = RunDirectory(prepared.config.run.dir)
        self._offset = 0
        self._evaluations: list[Record] = []
        self._trackers = build_trackers(
            self._directory.path,
            prepared.job.start_step,
            self._config.run.wandb,
            prepared.job.config,
        )
        metric = prepared.blueprint.task.metric
        self._view = View(self._config, prepared.schedule, metric=metric)
        self._is_closed = False

    def tick(self) -> None:
        """Read the records since the last call, give them to the trackers, and show them.

        Call it about once a second. A missing metrics file is no error. After `close`, records
        reach neither a tracker nor the live display.
        """
        for record in self._read_new_records():
            if record["kind"] == "eval":
                self._evaluations.append(record)
            for tracker in self._trackers:
                tracker.add(record)
            self._view.add(record)
        self._view.refresh()

    def close(self) -> None:
        """Read the last records, release the terminal, close the trackers, and merge a trace.

        A trace is merged of the workers' parts. A second call does nothing. Raises RunError if
        trace.json cannot be written.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.tick()
        self._view.close()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []
        if self._config.run.trace:
            merge_traces(self._directory.path)

    def show_recovery(self, recovery: Recovery) -> None:
        """Print that a worker was replaced, in one line, and keep it in the live view."""
        self._view.show_note(str(recovery))

    def finish(self, store: dist.Store, recoveries: Sequence[Recovery] | None = None) -> bool:
        """Write and print the summary if the run is complete, and return whether it is.

        A complete run has made all its steps, and every stage its last evaluation. Call it once,
        when every worker has put its end into the store, because it waits for `end/STAGE` and
        `peak/RANK`. It calls `close`. recoveries: for the summary, None where no worker is
        replaced. Raises RunError if a file cannot be written.
        """
        self.close()
        stages, processes = self._config.stages, self._config.pipeline.processes
        ends = [json.loads(store.get(f"end/{stage}")) for stage in range(stages)]

        # After a stop in the last evaluation, a resume begins with that evaluation.
        steps = self._prepared.schedule.steps
        evaluated = final_evaluations(self._evaluations, steps)
        if ends[-1]["step"] < steps or len(evaluated) < stages:
            return False

        peaks = [int(store.get(f"peak/{rank}")) for rank in range(processes)]
        summary = build_summary(self._prepared, self._evaluations, ends, peaks)
        if recoveries is not None:
            summary["recoveries"] = [recovery.as_json() for recovery in recoveries]
        write_output(self._directory.summary_file, json.dumps(summary, indent=1) + "\n")
        print_summary(summary, str(self._directory.path))
        return True

    def _read_new_records(self) -> Iterator[dict[str, Any]]:
        """Yield the complete lines since the last call."""
        with (
            contextlib.suppress(FileNotFoundError),
            open(self._directory.metrics_file, "rb") as file,
        ):
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                record = parse_record(line)
                if record is not None:
                    yield record
