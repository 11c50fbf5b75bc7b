"""How a stage's time divides: computing, waiting for a message, waiting to send."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from localpipe.pipeline.workers.mesh import rank_of
from localpipe.runs.directory import RunDirectory


@dataclass(frozen=True)
class Share:
    """Shares of the wall clock, 0..1, of one stage; `others` is what the other stages of its worker compute."""

    stage: int
    rank: int
    busy: float
    receive: float
    send: float
    others: float

    @property
    def rest(self) -> float:
        """What is left: evaluations, checkpoints, records."""
        return max(0.0, 1 - self.busy - self.receive - self.send - self.others)


def stage_shares(ledger: RunDirectory) -> list[Share]:
    """Return every stage's shares, medians over its training records but the first; nothing where one has no record yet."""
    processes = ledger.config.pipeline.processes
    assert isinstance(processes, int)
    found: list[dict[str, float]] = []
    for stage in range(ledger.stages):
        records = list(ledger.of("train", stage))
        records = records[1:] or records  # the first holds the start
        if not records:
            return []
        keys = ("busy", "receive_wait", "send_wait")
        found.append(
            {key: statistics.median(float(record[key]) for record in records) for key in keys}
        )
    ranks = [rank_of(stage, 0, ledger.config.replicas, processes) for stage in range(ledger.stages)]
    together = {
        rank: sum(f["busy"] for f, at in zip(found, ranks, strict=True) if at == rank)
        for rank in ranks
    }
    return [
        Share(stage, rank, f["busy"], f["receive_wait"], f["send_wait"], together[rank] - f["busy"])
        for stage, (rank, f) in enumerate(zip(ranks, found, strict=True))
    ]
