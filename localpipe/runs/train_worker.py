"""A worker of a training run: agree on the job, assemble the stages, run the loop, report the end."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import localpipe
from localpipe import data
from localpipe.config.keys import Config
from localpipe.config.load import to_dict
from localpipe.config.resolved import Resolved
from localpipe.errors import RunError, UserError
from localpipe.pipeline.channels.channel import Inbox
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.process import (
    JOB_KEY,
    LOCK_KEY,
    _report,
    _run_and_exit,
    prepare_process,
)
from localpipe.pipeline.launch.watchdog import Watchdog
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.weights import weight_lines
from localpipe.pipeline.workers.assemble import build_stages, join_stages
from localpipe.pipeline.workers.device import peak_memory_bytes
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner, Worker
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.source import BatchSource
from localpipe.pipeline.workers.steps import StepSchedule, step_schedule
from localpipe.plan.predict import fits_cores
from localpipe.runs.checkpoint import Checkpoints, newest_checkpoint
from localpipe.runs.clock import ClockOffset, compare_clocks
from localpipe.runs.collector import Collector
from localpipe.runs.directory import METRICS_FILE
from localpipe.runs.lock import hold_shared, read_holder
from localpipe.runs.prepare import prepare, read_old_weights
from localpipe.runs.records import Recorder
from localpipe.runs.trace import Trace


def main(given: Callable[[], Config] | None = None) -> int:
    """Run one worker of a training run; return its exit status. `given` reads this rank's command line, under torchrun."""

    def work(place: Mesh) -> None:
        told, prepared = _agree_on_job(place, given)
        if told is not None:
            _run_job(place, told, prepared)

    return _run_and_exit(work)


# -- agreeing on the job ------------------------------------------------------------------------------------------


def _agree_on_job(place: Mesh, given: Callable[[], Config] | None) -> tuple[Job | None, Any]:
    """Return the job: read what the launcher decided, or, under torchrun, let rank 0 decide and compare."""
    if given is None:
        return Job.from_json(place.store.get(JOB_KEY).decode()), None
    if place.rank == 0:
        return _decide_for_all(place, given)
    told = json.loads(place.store.get(JOB_KEY))
    if "status" in told:
        os._exit(told["status"])  # rank 0 has said why
    received = Job.from_json(json.dumps(told))
    _compare(place.rank, to_dict(given()), received.given)
    return received, None


def _decide_for_all(place: Mesh, given: Callable[[], Config]) -> tuple[Job | None, Any]:
    try:
        prepared = prepare(given(), place.world)
    except Exception as error:
        place.store.set(JOB_KEY, json.dumps({"status": 2 if isinstance(error, UserError) else 1}))
        raise
    for note in prepared.notes:
        print(note, flush=True)
    if prepared.summary is not None:
        from localpipe.runs.summary import print_summary

        print_summary(prepared.summary, prepared.config.run.dir)
        place.store.set(JOB_KEY, json.dumps({"status": 0}))
        return None, None
    place.store.set(LOCK_KEY, read_holder(Path(prepared.config.run.dir)))
    place.store.set(JOB_KEY, prepared.job.to_json())
    return prepared.job, prepared


def _compare(rank: int, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for section, keys in mine.items():
        for key, value in keys.items():
            if value != theirs[section][key]:
                raise RunError(
                    f"config: rank {rank} was started with {section}.{key} {value!r}, rank 0 with "
                    f"{theirs[section][key]!r}; start every node with the same command"
                )


def _lock_of_rank_0(place: Mesh) -> str | None:
    """Return what the run's lock tells on rank 0, for a worker that may be on another machine."""
    return None if place.local else place.store.get(LOCK_KEY).decode()


# -- the work -----------------------------------------------------------------------------------------------------


def _run_job(place: Mesh, decided: Job, prepared: Any) -> None:
    config = decided.parsed()
    run_dir = Path(config.run.dir)
    held = prepared.lock if prepared is not None else hold_shared(run_dir, _lock_of_rank_0(place))
    prepare_process(config)
    pulse = PhaseTimer(trace=Trace() if config.run.trace else None)
    watch = Watchdog(place, pulse, config.run.timeout_s, lambda line: _report("run", line, ""))
    watch.start()
    tail = _collect(place, config, prepared, decided) if prepared is not None else None
    worker = assemble(place, config, decided, pulse, watch.stop_requested.is_set)
    _run(worker, place, run_dir)
    for seat in worker.seats:
        if pulse.replica == 0:
            place.store.set(
                f"end/{seat.stage.plan.stage}", json.dumps(_end_facts(seat, fits_cores(config)))
            )
    place.store.set(f"peak/{place.rank}", str(peak_memory_bytes(worker.seats[0].stage.device)))
    place.barrier("end")
    watch.end()
    if tail is not None:
        tail()
    held.close()


def _run(worker: Worker, place: Mesh, run_dir: Path) -> None:
    """Run the loop, and leave this worker's part of the trace, if any, also where the run fails."""
    trace = worker.pulse.trace
    if not isinstance(trace, Trace):
        worker.run()
        return
    compared = ClockOffset() if place.local else None
    try:
        worker.run()
        compared = compare_clocks(
            place
        )  # at the end, where the spans that were kept are: clocks drift
    finally:
        trace.write(run_dir, place.rank, compared)


def assemble(
    place: Mesh,
    config: Resolved,
    decided: Job,
    pulse: PhaseTimer,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Worker:
    """Build the stages that this worker hosts and join them to each other and to their neighbours."""
    run_dir = Path(config.run.dir)
    stages = build_stages(place, config, pulse)
    todo, loader = _course(place, config, decided, stop_requested, stages[0])
    first = pulse.replica == 0  # what is written down is the first replicas'
    tools = RunnerContext(
        LearningRateSchedule(config.optim, todo.steps_per_epoch),
        pulse,
        Recorder(run_dir / METRICS_FILE, decided.started, decided.elapsed_s) if first else None,
        Checkpoints(run_dir, stages[0].plan.stages, config.run.keep_checkpoints) if first else None,
        config.run.log_every,
        {
            "localpipe": localpipe.__version__,
            "torch": torch.__version__,
            "data_sha256": decided.data_sha256,
        },
    )
    seats = join_stages(place, config, stages, loader, tools)
    _restore(run_dir, decided, seats, config.run.init_from)
    return Worker(seats, pulse)


def _course(
    place: Mesh, config: Resolved, decided: Job, stop_requested: Callable[[], bool], stage: Stage
) -> tuple[StepSchedule, Inbox | None]:
    """Return the course and, where a worker hosts the first stage, the loader; the others learn the course from it."""
    key = "course"
    if not stage.plan.is_first:
        return StepSchedule(**json.loads(place.store.get(key))), None
    dataset = data.load(config.data, config.run.seed)
    todo = step_schedule(config, dataset)
    place.store.set(key, json.dumps(vars(todo)))
    begun = (decided.start_step, todo.epoch(decided.start_step))
    schedule = todo.headers(decided.start_step, stage.replicas.index)
    every = config.run.checkpoint_every_s
    pinned = stage.device.type == "cuda"
    agree = stage.replicas.first_says
    return todo, BatchSource(
        dataset, schedule, config.run.seed, every, stop_requested, begun, agree, pinned
    )


def _restore(run_dir: Path, decided: Job, seats: list[StageRunner], init_from: str | None) -> None:
    """Load the checkpoint that the run goes on from, or the old weights that a new run begins with."""
    if not decided.start_step:
        if init_from is not None:
            weights = read_old_weights(init_from)
            for seat in seats:
                seat.stage.take_weights(weights)
        return
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None or checkpoint.step != decided.start_step:
        raise RunError(
            f"checkpoint: step {decided.start_step} was to be resumed, but it is gone from {run_dir}"
        )
    for seat in seats:
        state = checkpoint.stage(seat.stage.plan.stage)
        seat.stage.load_state(state)
        seat.meter.load_state(state["meter"])
        if seat.probe is not None:
            seat.probe.load_state(state["probe"])
        seat.saved = seat.committed = checkpoint.step


def _end_facts(seat: StageRunner, has_cores: bool) -> dict[str, Any]:
    """Return what the summary needs of a stage."""
    stage, pace = seat.stage, seat.pace
    return {
        "loss": seat.meter.mean_loss(),
        "busy_s": seat.meter.busy_s,
        "pace": {"samples": pace.samples, "wall_s": pace.wall_s, "compute_s": pace.compute_s},
        "weights": weight_lines(stage.weights()),
        "step": seat.tools.pulse.step,
        "has_cores": has_cores,
    }


def _collect(place: Mesh, config: Resolved, prepared: Any, decided: Job) -> Callable[[], None]:
    """Under torchrun, rank 0 shows the run and writes its summary; return what to call when all stages have ended."""
    collector = Collector(config, prepared.course, decided)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(1.0):
            collector.tick()

    thread = threading.Thread(target=follow, name="collector", daemon=True)
    thread.start()

    def finish() -> None:
        ended.set()
        thread.join()
        if not collector.finish(place.store):
            raise RunError(f"stopped; the same command goes on in {config.run.dir}")

    return finish
