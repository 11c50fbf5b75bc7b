"""A worker of a training run: it gets the job, assembles its stages, runs them, reports the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

import localpipe
from localpipe import data
from localpipe.config.keys import Config
from localpipe.config.load import to_dict
from localpipe.config.resolved import Resolved
from localpipe.data.identity import RULES
from localpipe.environment import store_outlives_workers
from localpipe.errors import RunError, UserError
from localpipe.networks.weights.pretrained import load_pretrained
from localpipe.output import say
from localpipe.pipeline.channels.channel import Inbox
from localpipe.pipeline.channels.groups import end_groups
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.process import (
    JOB_KEY,
    LOCK_KEY,
    prepare_process,
    report_failure,
    run_and_exit,
    wait_for_job,
)
from localpipe.pipeline.launch.snapshots import SnapshotKeeper, WorkerSnapshot, read_snapshot
from localpipe.pipeline.launch.watchdog import Watchdog
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.stages.weights import weight_lines
from localpipe.pipeline.workers.assemble import build_source, build_stages, join_stages
from localpipe.pipeline.workers.attempt import mark_finished
from localpipe.pipeline.workers.device import peak_memory_bytes
from localpipe.pipeline.workers.edges import Edges
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner, Worker
from localpipe.pipeline.workers.mesh import Mesh, open_run_store, private_dir
from localpipe.pipeline.workers.persistent_edges import PersistentEdges
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.source import never_stop
from localpipe.pipeline.workers.steps import StepSchedule, build_step_schedule
from localpipe.plan.predict import fits_cores
from localpipe.runs.checkpoint import Checkpoints
from localpipe.runs.clock import ClockOffset, compare_clocks
from localpipe.runs.collector import Collector
from localpipe.runs.directory import RunDirectory
from localpipe.runs.lock import read_lock, share_lock
from localpipe.runs.prepare import Prepared, load_init_weights, prepare
from localpipe.runs.recorded_run import network_facts
from localpipe.runs.records import Recorder
from localpipe.runs.summary import print_summary
from localpipe.runs.trace import Trace

_SCHEDULE_KEY, _SUMMARY_KEY = "course", "summary"
_TICK_S = 1.0
_SUMMARY_S, _SUMMARY_TICK_S = 300.0, 0.05
_OTHERS_S, _END_TICK_S = 30.0, 0.005


def main(read_config: Callable[[], Config] | None = None) -> int:
    """Run one worker of a training run. It ends the process with its exit status: 0, 1 or 2.

    read_config: under torchrun, returns the configuration of this rank's command line. Rank 0
    prepares the run, and the others compare theirs with it. None if localpipe's own launcher has
    published the job. Errors do not leave it: they are reported to the launcher or printed.
    """

    def work(mesh: Mesh) -> None:
        if read_config is None:
            run_job(mesh, Job.from_json(mesh.store.get(JOB_KEY).decode()))
            return
        job, prepared = _agree_on_job(mesh, read_config)
        if job is not None:
            run_job(mesh, job, prepared)

    return run_and_exit(work)


def warm_up() -> None:
    """Do what takes a worker of this job long to start, in a spare process without a rank.

    The network is built on the meta device, so that everything is imported. The first call of
    torch's deterministic kernels imports for a second.
    """
    job = Job.from_json(open_run_store(private_dir()).get(JOB_KEY).decode())
    config = job.parse_config()
    torch.use_deterministic_algorithms(bool(config.run.deterministic))
    build_plans(config)


# -- under torchrun: one job for all ranks ------------------------------------------------------


def _agree_on_job(
    mesh: Mesh, read_config: Callable[[], Config]
) -> tuple[Job | None, Prepared | None]:
    """Return the job that rank 0 prepares, None for a finished run, and what it prepared.

    Raises RunError if this rank was started with another command.
    """
    if mesh.rank == 0:
        return _prepare_for_all(mesh, read_config)
    content = json.loads(wait_for_job(mesh))
    if "status" in content:
        os._exit(content["status"])  # rank 0 has printed why
    job = Job(**content)
    _check_same_config(mesh.rank, to_dict(read_config()), job.given)
    return job, None


def _prepare_for_all(
    mesh: Mesh, read_config: Callable[[], Config]
) -> tuple[Job | None, Prepared | None]:
    """Prepare the run as rank 0, and publish its job, or the status with which it ends."""
    try:
        prepared = prepare(read_config(), mesh.world)
    except Exception as error:
        status = 2 if isinstance(error, UserError) else 1
        mesh.store.set(JOB_KEY, json.dumps({"status": status}))
        raise
    for note in prepared.notes:
        say(note)
    run_dir = prepared.config.run.dir
    if prepared.summary is not None:
        print_summary(prepared.summary, run_dir)
        mark_finished(mesh.store)
        mesh.store.set(JOB_KEY, json.dumps({"status": 0}))
        return None, None
    mesh.store.set(LOCK_KEY, read_lock(Path(run_dir)))
    mesh.store.set(JOB_KEY, prepared.job.to_json())
    return prepared.job, prepared


def _check_same_config(rank: int, config: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raise RunError for the first key in which a rank's configuration is not rank 0's."""
    for section, keys in config.items():
        for key, value in keys.items():
            if value != first[section][key]:
                raise RunError(
                    f"config: rank {rank} was started with {section}.{key} {value!r}, rank 0 with "
                    f"{first[section][key]!r}; start every node with the same command"
                )


# -- the work -----------------------------------------------------------------------------------


def run_job(mesh: Mesh, job: Job, prepared: Prepared | None = None) -> None:
    """Run this worker's stages to their end, and return when every worker has ended.

    prepared: what rank 0 has prepared under torchrun, else None. With it, this worker also shows
    the run and writes its summary. Raises RunError, naming stage and step, if the run fails, and
    NeighbourLostError or CrashError, which are RunErrors. After a stop, rank 0 of torchrun raises
    RunError.
    """
    config = job.parse_config()
    directory = RunDirectory(config.run.dir)
    lock = _hold_lock(mesh, directory, prepared)
    prepare_process(config, mesh.rank)
    timer = PhaseTimer()
    if config.run.trace:
        timer.trace = Trace()
    watchdog = Watchdog(mesh, timer, config.run.timeout_s, _report_death, config.recovers)
    watchdog.start()

    # Under torchrun there is no launcher of localpipe's own, so rank 0 collects.
    collecting: _CollectorThread | None = None
    if prepared is not None:
        collecting = _CollectorThread(prepared)
        collecting.start()
    worker = assemble(mesh, config, job, timer, watchdog.stop_requested.is_set)
    _run(worker, mesh, directory)

    # The summary needs the end of every stage and the memory of every worker.
    _report_end(worker, mesh, fits_cores(config))
    mesh.barrier("end")
    may_start_again = not mesh.local and store_outlives_workers()
    if collecting is not None:
        collecting.finish(mesh)
    elif may_start_again:
        _wait_for_summary(mesh)
    end_groups()
    watchdog.end()
    lock.close()
    if may_start_again:
        _exit_in_order(mesh)


def _exit_in_order(mesh: Mesh) -> None:
    """Let rank 0 exit last, and at once if torchrun asks for it."""
    if mesh.rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _wait_for_others(mesh)
    else:
        _mark_end(mesh)


def _wait_for_others(mesh: Mesh) -> None:
    """Wait as rank 0, after the summary is written, until all other workers are about to exit.

    If one of them is killed before that, torchrun must find rank 0 running: a node whose workers
    have ended with status 0 does not start again, and the killed worker's node would wait for it.
    It waits 30 s at most.
    """
    keys = [_ended_key(rank) for rank in range(1, mesh.world)]
    deadline = time.monotonic() + _OTHERS_S
    with contextlib.suppress(RuntimeError):  # the store is lost, and nothing else is
        while keys and not mesh.store.check(keys):
            if time.monotonic() > deadline:
                return
            time.sleep(_END_TICK_S)


def _mark_end(mesh: Mesh) -> None:
    """Tell rank 0 that this worker is about to exit."""
    with contextlib.suppress(RuntimeError):  # the store is lost, and nothing else is
        mesh.store.set(_ended_key(mesh.rank), "1")


def _ended_key(rank: int) -> str:
    """Return the key that a worker writes just before it exits with status 0."""
    return f"ended/{rank}"


def _wait_for_summary(mesh: Mesh) -> None:
    """Wait until rank 0 has written the summary. Raises RunError after 300 s without it.

    If rank 0 dies before that, torchrun must find the workers of every node running or failed: a
    node whose workers have ended with status 0 does not start again. So a request to stop does not
    end the wait either: it comes from rank 0's node if that has failed, and the watchdog ends this
    process 15 s after it.
    """
    deadline = time.monotonic() + _SUMMARY_S
    while not mesh.store.check([_SUMMARY_KEY]):
        if time.monotonic() > deadline:
            raise RunError(
                f"run: rank 0 has not written the summary within {_SUMMARY_S:g} s; "
                "look at what its node printed"
            )
        time.sleep(_SUMMARY_TICK_S)


def _report_death(cause: str) -> None:
    report_failure("run", cause, "")


def _hold_lock(mesh: Mesh, directory: RunDirectory, prepared: Prepared | None) -> IO[str]:
    """Return the lock of the run directory, taken by rank 0 or shared with the launcher."""
    if prepared is not None:
        return prepared.lock
    if mesh.local:
        return share_lock(directory.path)
    # Another machine may see another directory.
    return share_lock(directory.path, mesh.store.get(LOCK_KEY).decode())


def _run(worker: Worker, mesh: Mesh, directory: RunDirectory) -> None:
    """Run the loop, and write this worker's part of the trace, even if the run fails."""
    trace = worker.timer.trace
    if not isinstance(trace, Trace):
        worker.run()
        return
    clock: ClockOffset | None = None
    if mesh.local:
        clock = ClockOffset()
    try:
        worker.run()
        # At the end, because clocks drift and the buffer holds the latest spans.
        clock = compare_clocks(mesh)
    finally:
        trace.write(directory.path, mesh.rank, clock)


def _report_end(worker: Worker, mesh: Mesh, has_cores: bool) -> None:
    """Put the end of the first replicas' stages and this worker's peak memory into the store."""
    if worker.timer.replica == 0:
        for runner in worker.runners:
            end = json.dumps(_end_facts(runner, has_cores))
            mesh.store.set(f"end/{runner.stage.plan.stage}", end)
    peak = peak_memory_bytes(worker.runners[0].stage.device)
    mesh.store.set(f"peak/{mesh.rank}", str(peak))


def _end_facts(runner: StageRunner, has_cores: bool) -> dict[str, Any]:
    """Return what the summary needs of a stage."""
    throughput = runner.throughput
    weights = averaged_weights = weight_lines(runner.stage.weights())
    averages = runner.stage.averaged_weights()
    if averages is not None:
        averaged_weights = weight_lines(averages)
    return {
        "loss": runner.meter.mean_loss(),
        "busy_s": runner.meter.busy_s,
        "pace": {
            "samples": throughput.samples,
            "wall_s": throughput.wall_s,
            "compute_s": throughput.compute_s,
        },
        "weights": weights,
        "averaged_weights": averaged_weights,
        "step": runner.context.timer.step,
        "has_cores": has_cores,
    }


class _CollectorThread(threading.Thread):
    """Shows a run from rank 0 while the main thread trains, and writes the summary at the end."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(name="collector", daemon=True)
        self._run_dir = prepared.config.run.dir
        self._collector = Collector(prepared)
        self._finished = threading.Event()

    def run(self) -> None:
        while not self._finished.wait(_TICK_S):
            self._collector.tick()

    def finish(self, mesh: Mesh) -> None:
        """Write and print the summary, after every stage has ended; raise RunError after a stop."""
        self._finished.set()
        self.join()
        try:
            has_finished = self._collector.finish(mesh.store)
            if has_finished:
                mark_finished(mesh.store)
        finally:
            mesh.store.set(_SUMMARY_KEY, "1")
        if not has_finished:
            raise RunError(f"stopped; the same command goes on in {self._run_dir}")


# -- assembling ---------------------------------------------------------------------------------


def assemble(
    mesh: Mesh,
    config: Resolved,
    job: Job,
    timer: PhaseTimer,
    stop_requested: Callable[[], bool] = never_stop,
) -> Worker:
    """Return this worker: its stages, joined to each other and to their neighbours, restored.

    Every worker of the mesh calls it, because neighbours connect inside. stop_requested: called
    after every step by the worker of the first stage. job: a `start_step` above 0 loads that
    checkpoint. Raises RunError if that checkpoint is gone or of other weights, and UserError for a
    damaged one or for data that cannot be loaded.
    """
    directory = RunDirectory(config.run.dir)
    stages = build_stages(mesh, config, timer)
    edges = Edges(mesh, config, stages[0].device, timer.mark_connect)
    past: WorkerSnapshot | None = None
    if config.recovers:
        # This worker may go on in place of another one.
        timer.step = job.start_step
        past = read_snapshot(private_dir(), mesh.rank)
        handled, positions = 0, {}
        if past is not None:
            handled, positions = past.handled, past.positions
        device = stages[0].device
        edges = PersistentEdges(mesh, config, device, private_dir(), handled, positions)
    schedule, source = _open_source(mesh, config, job, stages[0], stop_requested, edges)
    rates = LearningRateSchedule(config.optim, schedule.steps_per_epoch)
    context = RunnerContext(rates, timer, None, None, config.run.log_every)

    # Records and checkpoints are those of the first replicas.
    is_first_replica = timer.replica == 0
    if is_first_replica:
        recorder = Recorder(directory.metrics_file, job.started, job.elapsed_s)
        if past is not None:
            recorder.skip_written(stage.plan.stage for stage in stages)
        context.recorder = recorder
        context.checkpoints = Checkpoints(
            directory.path, config.stages, config.run.keep_checkpoints, config.recovers
        )
        context.facts = _state_facts(config, job)

    with_probes = config.run.probe == "linear" and is_first_replica
    runners = join_stages(stages, source, context, edges, with_probes)
    if past is not None:
        past.restore(runners, timer)
    else:
        _restore(runners, directory, job, config)
    if isinstance(edges, PersistentEdges):
        return Worker(runners, timer, SnapshotKeeper(mesh, config, runners, edges, past))
    return Worker(runners, timer)


def _state_facts(config: Resolved, job: Job) -> dict[str, Any]:
    """Return what the manifest of a checkpoint states beside its step."""
    return {
        "localpipe": localpipe.__version__,
        "torch": torch.__version__,
        "data_sha256": job.data_sha256,
        "data_rules": RULES,
        **network_facts(config),
        "classes": config.data.classes,
        "data_changed": job.data_changed,
        "left_out": list(job.left_out),
    }


def _open_source(
    mesh: Mesh,
    config: Resolved,
    job: Job,
    stage: Stage,
    stop_requested: Callable[[], bool],
    edges: Edges,
) -> tuple[StepSchedule, Inbox | None]:
    """Return the step schedule, and the source of batches if this worker hosts the first stage.

    The other workers read the schedule from the store, so they load no data.
    """
    if not stage.plan.is_first:
        return StepSchedule(**json.loads(mesh.store.get(_SCHEDULE_KEY))), None
    dataset = data.load(config.data, config.run.seed, left_out=job.left_out)
    if job.data_sha256 not in ("", dataset.sha256):
        raise UserError(
            f"data: rank {mesh.rank} reads other data in {config.data.root} than the run was "
            "prepared with; give every node the same data, and leave them alone while a run starts"
        )
    schedule = build_step_schedule(config, dataset)
    mesh.store.set(_SCHEDULE_KEY, json.dumps(vars(schedule)))
    source = build_source(
        config,
        stage,
        dataset,
        schedule,
        job.start_step,
        config.run.checkpoint_every_s,
        stop_requested,
        edges.handled,
        edges.past_flags,
    )
    return schedule, source


def _read_first_weights(config: Resolved) -> Mapping[str, Tensor]:
    """Return the weights of model.weights or run.init_from by name, nothing without both."""
    pretrained = load_pretrained(config.model)
    if pretrained is not None:
        return pretrained.file.tensors
    if config.run.init_from is not None:
        return load_init_weights(config.run.init_from)
    return {}


def _restore(
    runners: list[StageRunner], directory: RunDirectory, job: Job, config: Resolved
) -> None:
    """Load the checkpoint of a run that continues, or the weights that a new one begins with."""
    if not job.start_step:
        init_weights = _read_first_weights(config)
        for runner in runners:
            runner.stage.take_weights(init_weights)
        return

    checkpoint = directory.newest_checkpoint()
    if checkpoint is None or checkpoint.step != job.start_step:
        raise RunError(
            f"checkpoint: step {job.start_step} was to be resumed, "
            f"but it is gone from {directory.path}; run the same command again"
        )
    for runner in runners:
        state = checkpoint.load_stage(runner.stage.plan.stage)
        runner.load_checkpoint_state(state, checkpoint.step)
