"""Whole pipelines for the tests: real processes over gloo, forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from localpipe import capture, data, job, mesh, metrics, process
from localpipe import config as configs
from localpipe.channel import MemoryChannel
from localpipe.collector import Collector
from localpipe.job import Job
from localpipe.loader import Loader, course
from localpipe.mesh import Mesh
from localpipe.optim import Schedule
from localpipe.pulse import Pulse
from localpipe.sections import Config
from localpipe.stage import Stage
from localpipe.worker import Seat, Tools, Worker

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["localpipe.process", "localpipe.objectives.infopro", "localpipe.models.own"]
)


def settings(run_dir: Path, **sections: dict[str, Any]) -> Config:
    """Return a resolved configuration of the small network on synthetic images; sections override it."""
    base: dict[str, dict[str, Any]] = {
        "model": {"name": "tests.networks:small"},
        "method": {},
        "pipeline": {"stages": 4, "processes": 1},
        "data": {
            "name": "synthetic",
            "samples": 88,
            "image_size": 8,
            "batch_size": 16,
            "augment": "crop_flip",
        },
        "optim": {"lr": 0.1, "epochs": 2, "schedule": "cosine_step"},
        "run": {"dir": str(run_dir), "threads": 1, "log_every": 2},
    }
    for section, keys in sections.items():
        base[section] = {**base[section], **keys}
    given = configs.parse(base, "test")
    return job.resolve(given, data.load(given.data, given.run.seed))


def run(config: Config) -> dict[int, dict[str, Any]]:
    """Train from the start in `pipeline.processes` processes; return every stage's state."""
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True)
    metrics.begin(run_dir / job.METRICS_FILE, {}, 0, lambda step: False)
    decided = Job(configs.to_dict(config), configs.to_dict(config), 0, 0.0, time.time())
    world = config.pipeline.processes
    assert isinstance(world, int)
    workers = [
        _CONTEXT.Process(target=_work, args=(rank, world, run_dir, decided), daemon=True)
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert config.pipeline.stages is not None
    return {
        stage: torch.load(run_dir / f"state_{stage}.pt") for stage in range(config.pipeline.stages)
    }


def train_here(config: Config) -> list[Stage]:
    """Train all stages in this process, through the worker's own loop; return them."""
    process.prepare_threads(config)
    blueprint, plans = job.plans_of(config, job.image_of(config))
    stages = [capture.stage_class(config)(plan, blueprint, config) for plan in plans]
    dataset = data.load(config.data, config.run.seed)
    todo = course(config, dataset)
    tools = Tools(Schedule(config.optim, todo.steps_per_epoch), Pulse(), None, None)
    inbox: Any = Loader(dataset, todo.headers(0), config.run.seed, float("inf"))
    seats = []
    for stage in stages:
        outbox = None if stage.plan.sends is None else MemoryChannel(stage.plan.sends, 1)
        seats.append(Seat(stage, inbox, outbox, tools))
        inbox = outbox
    Worker(seats, tools.pulse).run()
    return stages


def _work(rank: int, world: int, run_dir: Path, decided: Job) -> None:
    place = Mesh(rank, world, mesh.file_store(run_dir), local=True)
    config = decided.parsed()
    process.prepare_threads(config)
    worker = process.assemble(place, config, decided, Pulse())
    worker.run()
    for seat in worker.seats:
        if seat.stage.replicas.index == 0:
            torch.save(seat.stage.state(), run_dir / f"state_{seat.stage.plan.stage}.pt")
    place.barrier("end")


def train(given: Config) -> int:
    """Do what localpipe's launcher does, with one forked process for all stages, so that it takes no time to start."""
    prepared = job.prepare(configs.update(given, {"pipeline.processes": 1}))
    if prepared.summary is None:
        collector = Collector(prepared.config, prepared.course, prepared.job)
        with tempfile.TemporaryDirectory() as folder:
            worker = _CONTEXT.Process(
                target=_work_like_a_worker, args=(Path(folder), prepared.job), daemon=True
            )
            worker.start()
            worker.join(120)
            assert worker.exitcode == 0 and collector.finish(mesh.file_store(Path(folder)))
    prepared.lock.close()
    return 0


def _work_like_a_worker(folder: Path, decided: Job) -> None:
    process._work(Mesh(0, 1, mesh.file_store(folder), local=True), decided, None)


def digests(jobs: list[Config], processes: int, folder: Path) -> list[str]:
    """Train every configuration in turn in the same processes; return the digest of each one's weights."""
    folder.mkdir(parents=True)
    arguments = [
        (rank, processes, folder, [configs.to_dict(job) for job in jobs])
        for rank in range(processes)
    ]
    workers = [_CONTEXT.Process(target=_work_through, args=each, daemon=True) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
        assert worker.exitcode == 0
    return [
        metrics.digest(
            line for path in folder.glob(f"{index}_*.txt") for line in path.read_text().splitlines()
        )
        for index in range(len(jobs))
    ]


def _work_through(rank: int, world: int, folder: Path, jobs: list[dict[str, Any]]) -> None:
    store = mesh.file_store(folder)
    for index, values in enumerate(jobs):
        place = Mesh(rank, world, dist.PrefixStore(str(index), store), local=True)
        decided = Job(values, values, 0, 0.0, time.time())
        config = decided.parsed()
        process.prepare_threads(config)
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        worker = process.assemble(place, config, decided, Pulse())
        worker.run()
        first = [seat.stage for seat in worker.seats if seat.stage.replicas.index == 0]
        lines = [line for stage in first for line in metrics.digest_lines(stage.weights())]
        (folder / f"{index}_{rank}.txt").write_text("\n".join(lines))
        place.barrier("end")


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the places where two nested states are not equal to the bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [place for key in a for place in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        return [
            place
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for place in differences(x, y, f"{path}/{i}")
        ]
    return [] if a == b else [path]
