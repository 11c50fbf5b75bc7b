"""Whole pipelines for the tests: real processes over gloo.

They are forked from a server that has imported everything once.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from localpipe import config as configs
from localpipe import data
from localpipe.config.keys import Config
from localpipe.config.load import to_dict, update
from localpipe.config.resolve import DataFacts, Facts, MachineFacts, resolve
from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset
from localpipe.data.images import Split
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.captured import stage_class
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.stages.weights import weight_lines, weights_digest
from localpipe.pipeline.workers.assemble import build_source, join_stages
from localpipe.pipeline.workers.loop import RecordWriter, RunnerContext, Worker
from localpipe.pipeline.workers.mesh import Mesh, open_file_store
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.steps import build_step_schedule
from localpipe.plan.resolve_here import resolve_here
from localpipe.runs import train_worker
from localpipe.runs.collector import Collector
from localpipe.runs.directory import METRICS_FILE
from localpipe.runs.prepare import prepare
from localpipe.runs.records import begin_records
from tests.forked_ranks import CONTEXT


def resolved(
    sections: Mapping[str, Any],
    image: tuple[int, int, int] = (3, 32, 32),
    machine: MachineFacts = MachineFacts(cores=1),  # noqa: B008 - frozen
) -> Resolved:
    """Return a configuration resolved for made-up images of a shape (C, H, W)."""
    given = configs.parse(dict(sections), "test")
    classes = given.model.num_classes
    mean, std = given.data.mean, given.data.std
    facts = DataFacts(
        image,
        10 if classes == "auto" else classes,
        (0.5,) * image[0] if mean == "auto" else mean,
        (0.2,) * image[0] if std == "auto" else std,
        "none" if given.data.augment == "auto" else given.data.augment,
    )
    return resolve(given, Facts(facts, machine))


def settings(run_dir: Path, **sections: dict[str, Any]) -> Resolved:
    """Return a resolved configuration of the small network on synthetic images.

    sections: keys that override it.
    """
    base: dict[str, dict[str, Any]] = {
        "model": {"name": "tests.sample_networks:small"},
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
        base[section] = {**base.get(section, {}), **keys}
    given = configs.parse(base, "test")
    return resolve_here(given, data.load(given.data, given.run.seed))


def run(config: Resolved) -> dict[int, dict[str, Any]]:
    """Train from the start in `pipeline.processes` processes; return every stage's state."""
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True)
    begin_records(run_dir / METRICS_FILE, {}, 0, lambda step: False)
    decided = Job(to_dict(config), to_dict(config), 0, 0.0, time.time())
    world = config.pipeline.processes
    assert isinstance(world, int)
    workers = [
        CONTEXT.Process(target=_work, args=(rank, world, run_dir, decided), daemon=True)
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


def train_here(config: Resolved, recorder: RecordWriter | None = None) -> list[Stage]:
    """Train all stages in this process, through the worker's own loop; return them.

    recorder: gets their records.
    """
    prepare_process(config)
    blueprint, plans = build_plans(config)
    stages = [stage_class(config)(plan, blueprint, config) for plan in plans]
    dataset = data.load(config.data, config.run.seed)
    todo = build_step_schedule(config, dataset)
    context = RunnerContext(
        LearningRateSchedule(config.optim, todo.steps_per_epoch), PhaseTimer(), recorder, None
    )
    source = build_source(config, stages[0], dataset, todo)
    runners = join_stages(stages, source, context)
    Worker(runners, context.timer).run()
    return stages


def _work(rank: int, world: int, run_dir: Path, decided: Job) -> None:
    mesh = Mesh(rank, world, open_file_store(run_dir), local=True)
    config = decided.parse_config()
    prepare_process(config)
    worker = train_worker.assemble(mesh, config, decided, PhaseTimer())
    worker.run()
    for runner in worker.runners:
        if runner.stage.replicas.index == 0:
            torch.save(runner.stage.state(), run_dir / f"state_{runner.stage.plan.stage}.pt")
    mesh.barrier("end")


def train(given: Config, processes: int = 1) -> int:
    """Train as localpipe's launcher does, in forked processes, by default one for all stages.

    Forking takes no time, starting a worker does.
    """
    prepared = prepare(update(given, {"pipeline.processes": processes}))
    if prepared.summary is None:
        collector = Collector(prepared)
        with tempfile.TemporaryDirectory() as folder:
            workers = []
            for rank in range(processes):
                arguments = (Path(folder), prepared.job, rank, processes)
                worker = CONTEXT.Process(target=_work_like_a_worker, args=arguments, daemon=True)
                worker.start()
                workers.append(worker)
            for worker in workers:
                worker.join(120)
                assert worker.exitcode == 0
            assert collector.finish(open_file_store(Path(folder)))
    prepared.lock.close()
    return 0


def _work_like_a_worker(folder: Path, decided: Job, rank: int = 0, world: int = 1) -> None:
    train_worker.run_job(Mesh(rank, world, open_file_store(folder), local=True), decided)


def digests(jobs: Sequence[Config], processes: int, folder: Path) -> list[str]:
    """Train every configuration in turn in the same processes; return the weights' digests."""
    folder.mkdir(parents=True)
    arguments = [
        (rank, processes, folder, [to_dict(job) for job in jobs]) for rank in range(processes)
    ]
    workers = [CONTEXT.Process(target=_work_through, args=each, daemon=True) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
        assert worker.exitcode == 0
    return [
        weights_digest(
            line for path in folder.glob(f"{index}_*.txt") for line in path.read_text().splitlines()
        )
        for index in range(len(jobs))
    ]


def _work_through(rank: int, world: int, folder: Path, jobs: list[dict[str, Any]]) -> None:
    store = open_file_store(folder)
    for index, values in enumerate(jobs):
        mesh = Mesh(rank, world, dist.PrefixStore(str(index), store), local=True)
        decided = Job(values, values, 0, 0.0, time.time())
        config = decided.parse_config()
        prepare_process(config)
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        worker = train_worker.assemble(mesh, config, decided, PhaseTimer())
        worker.run()
        first = [runner.stage for runner in worker.runners if runner.stage.replicas.index == 0]
        lines = [line for stage in first for line in weight_lines(stage.weights())]
        (folder / f"{index}_{rank}.txt").write_text("\n".join(lines))
        mesh.barrier("end")


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the places where two nested states are not equal to the bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [name for key in a for name in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        return [
            name
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for name in differences(x, y, f"{path}/{i}")
        ]
    return [] if a == b else [path]


def kill_after_a_checkpoint(config: Config, folder: Path) -> None:
    """Begin a run in a process of its own, and kill it after its first checkpoint."""
    folder.mkdir()
    prepared = prepare(config)
    prepared.lock.close()
    worker = CONTEXT.Process(target=_work_like_a_worker, args=(folder, prepared.job), daemon=True)
    worker.start()
    checkpoints = Path(config.run.dir) / "checkpoints"
    while not list(checkpoints.glob("step_*/manifest.json")):
        assert worker.is_alive()
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()


class ImageDataset(Dataset):
    """A data set of images with a class each, as the type checker is to see it."""

    train: Split
    test: Split
    validation: Split | None


def load_images(*arguments: Any, **keys: Any) -> ImageDataset:
    """Return what `data.load` gives for a data set of images."""
    return cast(ImageDataset, data.load(*arguments, **keys))
