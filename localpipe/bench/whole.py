"""Whole stages, each timed by all measuring processes at once: what a profile's sum of pieces promises, measured."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial

from localpipe.config.load import to_dict, update
from localpipe.config.resolved import Resolved
from localpipe.errors import RunError
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.launcher import Workers
from localpipe.pipeline.launch.process import prepare_process, run_worker
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.plan.measure_worker import PieceTimer, Step, make_message

ASKED, FOUND = "cuts", "seconds"  # the store's keys
Cut = tuple[int, ...]  # the last block of every stage but the last


def main() -> int:
    """Time the stages of every cut that the launcher asks for; the first process leaves the seconds in the store."""
    return run_worker(_measure)


def seconds(config: Resolved, wanted: Sequence[Cut], workers: int) -> list[list[float]]:
    """Return the seconds of a step of every stage of every cut; a resolved configuration of as many stages.

    Stage by stage, the cuts in turn, so that a drifting machine does not decide between them.
    """
    own = to_dict(update(config, {"pipeline.processes": workers}))
    with Workers(Job(own, own, 0, 0.0, time.time()), __name__) as processes:
        processes.store.set(ASKED, json.dumps(wanted))
        if processes.follow(lambda: None):
            raise RunError("balance: the stages could not be measured")
        found: list[list[float]] = json.loads(processes.store.get(FOUND))
    return found


def _measure(place: Mesh, decided: Job) -> None:
    config = decided.parsed()
    prepare_process(config)
    wanted = [tuple(cut) for cut in json.loads(place.store.get(ASKED))]
    clock = PieceTimer(place)
    found: list[list[float]] = [[] for _ in wanted]
    for number in range(len(wanted[0]) + 1):
        for cut, times in zip(wanted, found, strict=True):
            times.append(clock.time(f"{cut} {number}", partial(_step, config, cut, number)))
    if place.rank == 0:
        place.store.set(FOUND, json.dumps(found))
    place.barrier("end")


def _step(config: Resolved, cut: Cut, number: int) -> Step:
    """Return the step of one stage: forward, local loss, backward, update, on a message that it holds."""
    cutting = update(config, {"pipeline.cuts": list(cut)})
    blueprint, plans = build_plans(cutting)
    stage = Stage(plans[number], blueprint, cutting, "cpu")
    message = make_message(stage)

    def step() -> float:
        begin = time.perf_counter()
        h = stage.forward(message)
        loss = stage.local_loss(message, h)
        if stage.sends_gradient:
            stage.boundary_gradient(loss, h)
        stage.update(stage.reconciled(loss, message), message, 0.0)
        return time.perf_counter() - begin

    return step
