"""The process of a worker, whoever launched it: join, assemble the stages it hosts, run the loop, report the end.

localpipe's own launcher starts `main` through localpipe.launched; under torchrun the command line comes here directly.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import localpipe
from localpipe import capture, clock, data, device, job, lock, mesh, precision
from localpipe import config as configs
from localpipe.channel import Inbox, MemoryChannel, Outbox
from localpipe.checkpoint import Checkpoints, newest
from localpipe.collector import Collector
from localpipe.device import Upload
from localpipe.edges import Edges
from localpipe.errors import CrashError, PeerLostError, RunError, UserError
from localpipe.job import Job
from localpipe.launched import PRIVATE_DIR
from localpipe.loader import Course, Loader, course
from localpipe.mesh import Mesh
from localpipe.metrics import Recorder, digest_lines
from localpipe.optim import Schedule
from localpipe.probe import Probe
from localpipe.pulse import Pulse
from localpipe.sections import Config
from localpipe.stage import Stage
from localpipe.trace import Trace
from localpipe.watch import ABORT, Watch
from localpipe.worker import Seat, Tools, Worker

_JOB, _LOCK = "job", "lock"
_HEARD_S = 2.0  # what the watchers of other nodes need to hear the word that ends a run, while its store lives
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def main(given: Callable[[], Config] | None = None) -> int:
    """Run one worker of a training run; return its exit status. `given` reads this rank's command line, under torchrun."""

    def work(place: Mesh) -> None:
        told, prepared = _decide(place, given)
        if told is not None:
            _work(place, told, prepared)

    return _ended(work)


def run_worker(work: Callable[[Mesh, Job], None]) -> int:
    """Run one worker of another kind, that localpipe's own launcher started; return its exit status."""
    return _ended(lambda place: work(place, Job.from_json(place.store.get(_JOB).decode())))


def _ended(work: Callable[[Mesh], None]) -> int:
    """Join the mesh, work, and leave word of how it ended."""
    place: Mesh | None = None
    try:
        place = mesh.join()
        work(place)
    except (Exception, SystemExit) as error:
        kind, line = _kind(error), str(error) or repr(error)
        _report(kind, line, traceback.format_exc())
        if place is not None and kind != "peer":
            _tell_other_nodes(place, line)
        _flush_and_exit(2 if isinstance(error, UserError) else 1)
    _flush_and_exit(0)
    return 0


def prepare_threads(config: Config) -> None:
    """Set what shapes the bits and the speed of this process's arithmetic."""
    assert isinstance(config.run.threads, int)
    torch.set_num_threads(config.run.threads)
    torch.use_deterministic_algorithms(bool(config.run.deterministic))
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # what makes cuBLAS deterministic; read when it starts
    precision.prepare(config)
    # A debugging aid that comes with deterministic algorithms and writes every new tensor twice.
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False
    # Keep freed memory: else glibc gives every large activation back and page faults take a fifth of a step.
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


# -- agreeing on the job ------------------------------------------------------------------------------------------


def _decide(place: Mesh, given: Callable[[], Config] | None) -> tuple[Job | None, Any]:
    """Return the job: read what the launcher decided, or, under torchrun, let rank 0 decide and compare."""
    if given is None:
        return Job.from_json(place.store.get(_JOB).decode()), None
    if place.rank == 0:
        return _decide_for_all(place, given)
    told = json.loads(place.store.get(_JOB))
    if "status" in told:
        os._exit(told["status"])  # rank 0 has said why
    received = Job.from_json(json.dumps(told))
    _compare(place.rank, configs.to_dict(given()), received.given)
    return received, None


def _decide_for_all(place: Mesh, given: Callable[[], Config]) -> tuple[Job | None, Any]:
    try:
        prepared = job.prepare(given(), place.world)
    except Exception as error:
        place.store.set(_JOB, json.dumps({"status": 2 if isinstance(error, UserError) else 1}))
        raise
    for note in prepared.notes:
        print(note, flush=True)
    if prepared.summary is not None:
        from localpipe.view import print_summary

        print_summary(prepared.summary, prepared.config.run.dir)
        place.store.set(_JOB, json.dumps({"status": 0}))
        return None, None
    place.store.set(_LOCK, lock.told(Path(prepared.config.run.dir)))
    place.store.set(_JOB, prepared.job.to_json())
    return prepared.job, prepared


def publish(store: dist.Store, decided: Job) -> None:
    """Tell the workers of localpipe's own launcher what was decided."""
    store.set(_JOB, decided.to_json())


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
    return None if place.local else place.store.get(_LOCK).decode()


# -- the work -----------------------------------------------------------------------------------------------------


def _work(place: Mesh, decided: Job, prepared: Any) -> None:
    config = decided.parsed()
    run_dir = Path(config.run.dir)
    held = prepared.lock if prepared is not None else lock.share(run_dir, _lock_of_rank_0(place))
    prepare_threads(config)
    pulse = Pulse(trace=Trace() if config.run.trace else None)
    watch = Watch(place, pulse, config.run.timeout_s, lambda line: _report("run", line, ""))
    watch.start()
    tail = _collect(place, config, prepared, decided) if prepared is not None else None
    worker = assemble(place, config, decided, pulse, watch.stop_requested.is_set)
    _run(worker, place, run_dir)
    for seat in worker.seats:
        if pulse.replica == 0:
            place.store.set(
                f"end/{seat.stage.plan.stage}", json.dumps(_end_facts(seat, job.fits(config)))
            )
    place.store.set(
        f"peak/{place.rank}", str(device.peak_memory_bytes(worker.seats[0].stage.device))
    )
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
    compared = clock.Clock() if place.local else None
    try:
        worker.run()
        compared = clock.compare(
            place
        )  # at the end, where the spans that were kept are: clocks drift
    finally:
        trace.write(run_dir, place.rank, compared)


def assemble(
    place: Mesh,
    config: Config,
    decided: Job,
    pulse: Pulse,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Worker:
    """Build the stages that this worker hosts and join them to each other and to their neighbours."""
    run_dir = Path(config.run.dir)
    stages = build_stages(place, config, pulse)
    todo, loader = _course(place, config, decided, stop_requested, stages[0])
    first = pulse.replica == 0  # what is written down is the first replicas'
    tools = Tools(
        Schedule(config.optim, todo.steps_per_epoch),
        pulse,
        Recorder(run_dir / job.METRICS_FILE, decided.started, decided.elapsed_s) if first else None,
        Checkpoints(run_dir, stages[0].plan.stages, config.run.keep_checkpoints) if first else None,
        config.run.log_every,
        {
            "localpipe": localpipe.__version__,
            "torch": torch.__version__,
            "data_sha256": decided.data_sha256,
        },
    )
    seats = join_seats(place, config, stages, loader, tools)
    _restore(run_dir, decided, seats, config.run.init_from)
    return Worker(seats, pulse)


def build_stages(place: Mesh, config: Config, pulse: Pulse) -> list[Stage]:
    """Build the stages that this worker hosts, each joined to its replicas."""
    replicas = configs.replicas_of(config)
    host = place.host(replicas)
    pulse.replica, pulse.stage = host.replica, host.stages[0]
    where = device.own(config.run.device, place.local_rank)
    blueprint, plans = job.plans_of(config, job.image_of(config))
    kind = capture.stage_class(config)
    joined = [
        place.replicas(k, host.replica, replicas[k], pulse.waiting, where) for k in host.stages
    ]
    pulse.queued = lambda: any(each.queued() for each in joined)
    return [
        kind(plans[k], blueprint, config, where, own)
        for k, own in zip(host.stages, joined, strict=True)
    ]


def _course(
    place: Mesh, config: Config, decided: Job, stop_requested: Callable[[], bool], stage: Stage
) -> tuple[Course, Inbox | None]:
    """Return the course and, where a worker hosts the first stage, the loader; the others learn the course from it."""
    key = "course"
    if not stage.plan.is_first:
        return Course(**json.loads(place.store.get(key))), None
    dataset = data.load(config.data, config.run.seed)
    todo = course(config, dataset)
    place.store.set(key, json.dumps(vars(todo)))
    begun = (decided.start_step, todo.epoch(decided.start_step))
    schedule = todo.headers(decided.start_step, stage.replicas.index)
    every = config.run.checkpoint_every_s
    pinned = stage.device.type == "cuda"
    agree = stage.replicas.first_says
    return todo, Loader(
        dataset, schedule, config.run.seed, every, stop_requested, begun, agree, pinned
    )


def join_seats(
    place: Mesh, config: Config, stages: list[Stage], loader: Inbox | None, tools: Tools
) -> list[Seat]:
    """Seat a worker's stages in a row, joined in memory to each other and by edges to its neighbours."""
    where = stages[0].device
    edges = Edges(place, config, where)
    seats = []
    inbox = Upload(loader, where) if loader is not None and where.type == "cuda" else loader
    for position, stage in enumerate(stages):
        plan = stage.plan
        if inbox is None:
            inbox = edges.inbox(plan, stage.replicas.index)
        outbox: Outbox | None = None
        following: Inbox | None = None
        if plan.sends is not None and position + 1 < len(stages):
            outbox = following = MemoryChannel(
                edges.schema(plan.sends, plan.stage), 1, where
            )  # stages of a process take turns
        elif plan.sends is not None:
            outbox = edges.outbox(plan, stage.replicas.index)
        probe = None
        if config.run.probe == "linear" and tools.recorder is not None:
            probe = Probe(plan.output_shape, stage.task, config.run.seed, plan.stage, where)
        seats.append(Seat(stage, inbox, outbox, tools, probe=probe))
        inbox = following
    return seats


def _restore(run_dir: Path, decided: Job, seats: list[Seat], init_from: str | None) -> None:
    """Load the checkpoint that the run goes on from, or the old weights that a new run begins with."""
    if not decided.start_step:
        if init_from is not None:
            weights = job.old_weights(init_from)
            for seat in seats:
                seat.stage.take_weights(weights)
        return
    checkpoint = newest(run_dir)
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


def _end_facts(seat: Seat, has_cores: bool) -> dict[str, Any]:
    """Return what the summary needs of a stage."""
    stage, pace = seat.stage, seat.pace
    return {
        "loss": seat.meter.mean_loss(),
        "busy_s": seat.meter.busy_s,
        "pace": {"samples": pace.samples, "wall_s": pace.wall_s, "compute_s": pace.compute_s},
        "weights": digest_lines(stage.weights()),
        "step": seat.tools.pulse.step,
        "has_cores": has_cores,
    }


def _collect(place: Mesh, config: Config, prepared: Any, decided: Job) -> Callable[[], None]:
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


# -- how a worker ends badly --------------------------------------------------------------------------------------


def _kind(error: BaseException) -> str:
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, PeerLostError):
        return "peer"
    return "run" if isinstance(error, RunError) and not isinstance(error, CrashError) else "crash"


def _report(kind: str, line: str, trace: str) -> None:
    """Leave word for the launcher, or, under torchrun, say it."""
    private = os.environ.get(PRIVATE_DIR)
    rank = int(os.environ.get("RANK", "0"))
    told = trace if kind == "crash" else ""
    if private is not None:
        record = {"rank": rank, "kind": kind, "line": line, "trace": told, "time": time.time()}
        with contextlib.suppress(OSError):  # the folder is gone: say it here
            Path(private, f"error_{rank}.json").write_text(json.dumps(record), encoding="utf-8")
            return
    if kind != "user" or rank == 0:
        print(f"{told}localpipe: {line}", file=sys.stderr, flush=True)


def _tell_other_nodes(place: Mesh, line: str) -> None:
    """Let the workers of other nodes end at once and quietly: their torchrun learns nothing from this node's."""
    if not place.local:
        with contextlib.suppress(RuntimeError, OSError):
            place.board().put(ABORT, line)
            time.sleep(_HEARD_S)


def _flush_and_exit(status: int) -> None:
    """End without destructors: threads of a store or of gloo may still be inside a call, or wait for a neighbour."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
