"""Two workers over rings, in one process and in turn: either of them goes on from its snapshot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from localpipe import data
from localpipe.config.resolved import Resolved
from localpipe.environment import COMPARE_REPLAY, PRIVATE_DIR
from localpipe.pipeline.channels.persistent_ring import PersistentRing
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.launch.snapshots import SnapshotKeeper, read_snapshot
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.assemble import build_source, join_stages
from localpipe.pipeline.workers.feedback import back_schemas
from localpipe.pipeline.workers.loop import RunnerContext
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.persistent_edges import (
    PersistentEdges,
    back_folder,
    back_slots,
    create_edges,
)
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.steps import build_step_schedule
from tests.harness import settings, train_here

LAST = -1  # stands for the last message, with Flag.STOP


class Process:
    """A worker that makes one turn at a time. A killed one is dropped, and another one begins."""

    def __init__(self, config: Resolved, folder: Path, rank: int) -> None:
        mesh = Mesh(rank, 2, dist.HashStore(), local=True)
        past = read_snapshot(folder, rank)
        self.handled = 0 if past is None else past.handled
        positions = {} if past is None else past.positions
        cpu = torch.device("cpu")
        edges = PersistentEdges(mesh, config, cpu, folder, self.handled, positions)

        blueprint, plans = build_plans(config)
        hosted = mesh.find_host(config.replicas).stages
        self.stages = [Stage(plans[stage], blueprint, config) for stage in hosted]
        dataset = data.load(config.data, config.run.seed)
        schedule = build_step_schedule(config, dataset)
        source = None
        if rank == 0:
            source = build_source(
                config,
                self.stages[0],
                dataset,
                schedule,
                handled=self.handled,
                past_flags=edges.past_flags,
            )
        rates = LearningRateSchedule(config.optim, schedule.steps_per_epoch)
        context = RunnerContext(rates, PhaseTimer(), None, None)
        self.runners = join_stages(self.stages, source, context, edges)
        if past is not None:
            past.restore(self.runners, context.timer)
        self.keeper = SnapshotKeeper(mesh, config, self.runners, edges, past)

    def turn(self) -> bool:
        """Handle one message; return whether another one follows."""
        more = True
        for runner in self.runners:
            more = runner.turn()
        self.keeper.count_message(is_last=not more)
        self.handled += 1
        return more


def run_with_kills(
    config: Resolved, folder: Path, kills: Mapping[int, Sequence[int]]
) -> list[Stage]:
    """Run two workers in turn; drop some ranks after a message. Return the stages at the end."""
    blueprint, plans = build_plans(config)
    create_edges(folder, config, plans, back_schemas(config, blueprint, plans))
    workers = [Process(config, folder, rank) for rank in range(2)]
    more, handled = True, 0
    while more:
        for worker in workers:
            more = worker.turn()
        handled += 1
        for rank in kills.get(handled if more else LAST, ()):
            workers[rank] = Process(config, folder, rank)
        for worker in workers:
            while worker.handled < handled:
                assert worker.turn() == (more or worker.handled < handled)
    return [*workers[0].stages, *workers[1].stages]


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "codes, contexts and gradients": {
        "method": {"context": "E", "reconcile": "cosine"},
        "pipeline": {"wire_dtype": "int8"},
    },
    "several messages a step": {"optim": {"accumulate": 2}},
    "a block that comes back": {
        "method": {"feedback": {"mode": "block", "lag": 2, "every": 1}},
    },
    "a readout that comes back": {
        "method": {"feedback": {"mode": "readout", "lag": 3, "every": 2}},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_two_workers_end_alike_whoever_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """One, the other, both at once, and one again at once. The last message is among the moments.

    Every message that is computed again is compared with the one in the ring.
    """
    monkeypatch.setenv(PRIVATE_DIR, str(tmp_path))
    monkeypatch.setenv(COMPARE_REPLAY, "1")
    keys = {**CASES[case], "run": {"recover": "stage"}}
    keys["optim"] = {"epochs": 2, **keys.get("optim", {})}
    pipeline = {"stages": 3, "processes": 2, "depth": 1, **keys.get("pipeline", {})}
    keys["pipeline"] = {**pipeline, "replay": 10}
    config = settings(tmp_path / "run", **keys)
    prepare_process(config)
    kills = {1: [0], 3: [1], 6: [0, 1], 7: [1, 0], 11: [0], 12: [0], LAST: [1, 0]}
    stages = run_with_kills(config, tmp_path, kills)

    keys["pipeline"] = {**pipeline, "processes": 1}
    expected = train_here(settings(tmp_path / "alone", **{**keys, "run": {"recover": "none"}}))
    for stage, other in zip(stages, expected, strict=True):
        weights = stage.weights()
        for name, value in other.weights().items():
            assert torch.equal(weights[name], value), name
    note = json.loads((tmp_path / "note_caught_up_0").read_text())
    assert note["step"] > 0


def test_a_snapshot_covers_what_came_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the ring of an edge back would be full some time."""
    monkeypatch.setenv(PRIVATE_DIR, str(tmp_path))
    config = settings(
        tmp_path / "run",
        method={"feedback": {"mode": "block", "lag": 1, "every": 1}},
        pipeline={"stages": 2, "processes": 2, "depth": 1, "replay": 6},
        run={"recover": "stage"},
    )
    blueprint, plans = build_plans(config)
    schemas = back_schemas(config, blueprint, plans)
    create_edges(tmp_path, config, plans, schemas)
    workers = [Process(config, tmp_path, rank) for rank in range(2)]
    saved = []
    for _ in range(6):
        for worker in workers:
            worker.turn()
        folder = back_folder(tmp_path, 1, 0)
        ring = PersistentRing(folder, schemas[1, 0], back_slots(config), "stage 1")
        saved.append(ring.saved)
    # Step n takes the parameters after step n - 1, and every third step writes a snapshot.
    assert saved == [0, 0, 2, 2, 2, 5]
