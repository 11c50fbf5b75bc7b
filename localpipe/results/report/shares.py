"""How the time of a stage divides: computing, waiting for a message, waiting to send."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from localpipe.pipeline.workers.mesh import find_rank
from localpipe.runs.recorded_run import Record, RecordedRun


@dataclass(frozen=True)
class Share:
    """Shares of the wall clock of one stage, 0..1.

    busy: it computes. receive, send: it waits to receive or to send. others: the other stages of
    its worker compute.
    """

    stage: int
    rank: int
    busy: float
    receive: float
    send: float
    others: float

    @property
    def rest(self) -> float:
        """The share that is left, at least 0: evaluations, checkpoints, records."""
        return max(0.0, 1 - self.busy - self.receive - self.send - self.others)


def stage_shares(run: RecordedRun) -> list[Share]:
    """Return every stage's shares in order, medians over the training records of first replicas.

    The first record holds the start and is left out where there are more. The list is empty while a
    stage has no record yet.
    """
    config = run.config
    records = [_select_steady_records(run, stage) for stage in range(run.stages)]
    if not all(records):
        return []
    ranks = []
    for stage in range(run.stages):
        ranks.append(find_rank(stage, 0, config.replicas, config.pipeline.processes))

    # The other stages of a worker compute while a stage neither computes nor waits.
    busy = [_median(stage_records, "busy") for stage_records in records]
    busy_of_rank = dict.fromkeys(ranks, 0.0)
    for rank, value in zip(ranks, busy, strict=True):
        busy_of_rank[rank] += value

    shares = []
    for stage, rank in enumerate(ranks):
        receive = _median(records[stage], "receive_wait")
        send = _median(records[stage], "send_wait")
        others = busy_of_rank[rank] - busy[stage]
        shares.append(Share(stage, rank, busy[stage], receive, send, others))
    return shares


def _select_steady_records(run: RecordedRun, stage: int) -> list[Record]:
    records = list(run.of("train", stage))
    return records[1:] or records


def _median(records: Sequence[Record], key: str) -> float:
    return statistics.median(float(record[key]) for record in records)
