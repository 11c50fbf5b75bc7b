"""A job: the configuration with every `auto` decided, once, before a worker starts, and where the run begins."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import torch

import localpipe
from localpipe import config as configs
from localpipe import data, launched, lock, metrics, optim, planner, precision, registry, tracker
from localpipe import device as devices
from localpipe import profile as profiles
from localpipe.blueprint import Blueprint
from localpipe.checkpoint import Checkpoints, newest
from localpipe.data import Dataset
from localpipe.errors import UserError
from localpipe.loader import Course, course
from localpipe.optim import Schedule
from localpipe.partition import StagePlan, balanced, check_stages, plan
from localpipe.sections import MEASURED, Config
from localpipe.stage import Stage, reads
from localpipe.trace import TRACE_FILE

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
# What a run leaves; what tells that it is one goes last.
_LEFT = (SUMMARY_FILE, TRACE_FILE, "checkpoints", "tensorboard", METRICS_FILE, CONFIG_FILE)


@dataclass(frozen=True)
class Job:
    """What every worker needs to know, sent as JSON. `given` is what the user said, to compare between nodes."""

    config: dict[str, Any]
    given: dict[str, Any]
    start_step: int
    elapsed_s: float
    started: float
    data_sha256: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        return Job(**json.loads(text))

    def parsed(self) -> Config:
        """Return the resolved configuration."""
        return configs.parse(self.config, "resolved configuration")


def blueprint_of(config: Config, image: tuple[int, int, int], num_classes: int) -> Blueprint:
    """Return the blueprint that the configuration names."""
    name = config.model.name
    if name in registry.MODELS:
        function = registry.look_up(registry.MODELS, name, "config: model.name")
        blueprint: Blueprint = function(
            name, image, num_classes, **configs.arguments(function, config)
        )
        return blueprint
    from localpipe.models import own

    return own.blueprint(name, image, num_classes, config.model.args)


def resolve(
    config: Config,
    dataset: Dataset,
    world: int | None = None,
    profile: profiles.Profile | None = None,
) -> Config:
    """Return the configuration with every `auto` replaced and measured cuts made explicit.

    `world` is torchrun's number of workers. `cuts: time` is decided from the profile, measured here where none is given.
    """
    classes = (
        dataset.num_classes if config.model.num_classes == "auto" else config.model.num_classes
    )
    data.check_labels(dataset, classes)
    stages = configs.stage_count(config)
    device = _device(config)
    precision.check(config, device)
    processes = _processes(config, device, world)
    here = launched.workers_here(processes)
    devices.check(device, config.pipeline.backend, here)
    threads = config.run.threads if config.run.threads != "auto" else max(1, cores() // here)
    epochs = config.optim.epochs
    rate, warmup = config.optim.lr, config.optim.warmup_epochs
    resolved = configs.update(
        config,
        {
            "method.objective": _objective(config, stages),
            "model.num_classes": classes,
            "pipeline.stages": stages,
            "pipeline.processes": processes,
            "pipeline.backend": _backend(config, device),
            "data.mean": list(dataset.mean),
            "data.std": list(dataset.std),
            "data.augment": dataset.augment,
            "data.image_size": dataset.image[1]
            if dataset.image[1] == dataset.image[2]
            else list(dataset.image[1:]),
            "optim.lr": 0.8 * config.data.batch_size / 1024 if rate == "auto" else rate,
            "optim.warmup_epochs": optim.auto_warmup(epochs) if warmup == "auto" else warmup,
            "run.device": device,
            "run.threads": threads,
            "run.deterministic": device == "cpu"
            if config.run.deterministic == "auto"
            else config.run.deterministic,
        },
    )
    if config.pipeline.cuts not in MEASURED:
        return resolved
    explicit = configs.update(config, {"pipeline.cuts": list(_decided_cuts(resolved, profile))})
    # The published weights of a local loss go with a cut, so they are looked up again.
    objective = _objective(explicit, stages)
    return configs.update(
        resolved, {"pipeline.cuts": list(explicit.pipeline.cuts), "method.objective": objective}
    )


def _decided_cuts(config: Config, profile: profiles.Profile | None) -> tuple[int, ...]:
    """Return the cut that balances the saved bytes, or the measured seconds, of a resolved configuration's stages."""
    assert isinstance(config.model.num_classes, int) and config.pipeline.stages is not None
    blueprint, stages = (
        blueprint_of(config, image_of(config), config.model.num_classes),
        config.pipeline.stages,
    )
    check_stages(len(blueprint.blocks), stages)
    if config.pipeline.cuts == "memory":
        return balanced(
            len(blueprint.blocks), stages, planner.saved_bytes(blueprint, config, stages)
        )
    found = measured(config, [stages]) if profile is None else profile
    return time_cuts(found, stages)


def time_cuts(profile: profiles.Profile, stages: int) -> tuple[int, ...]:
    """Return the cut whose slowest stage is fastest."""
    return balanced(
        len(profile.blocks), stages, lambda first, last, k: profile.stage_s(first, last, k, stages)
    )


def measured(
    config: Config, stage_counts: Sequence[int], look: Callable[[], None] = lambda: None
) -> profiles.Profile:
    """Measure a resolved configuration with as many processes as will compute at once on this machine.

    `look` is called now and then, and may raise.
    """
    processes, threads = config.pipeline.processes, config.run.threads
    assert isinstance(processes, int) and isinstance(threads, int)
    return profiles.measure(config, stage_counts, min(processes, max(1, cores() // threads)), look)


def fits(config: Config) -> bool:
    """Return whether an efficiency can be told here: every worker's threads have a core, or the stages only wait."""
    processes, threads = config.pipeline.processes, config.run.threads
    assert isinstance(processes, int) and isinstance(threads, int), "resolved before it is asked"
    return launched.workers_here(processes) * threads <= cores() or only_waits(config)


def only_waits(config: Config) -> bool:
    """Return whether the stages wait instead of computing, so that they may outnumber the cores."""
    return config.model.name == "chain"


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) or psutil.cpu_count() or 1


def plans_of(
    config: Config, dataset_image: tuple[int, int, int]
) -> tuple[Blueprint, tuple[StagePlan, ...]]:
    """Return the blueprint and the stage plans of a resolved configuration."""
    assert isinstance(config.model.num_classes, int) and config.pipeline.stages is not None
    blueprint = blueprint_of(config, dataset_image, config.model.num_classes)
    stages = config.pipeline.stages
    cuts, batch = config.pipeline.cuts, config.data.batch_size // config.optim.accumulate
    wire = precision.WIRE[config.pipeline.wire_dtype]

    def read(stage: int) -> frozenset[str]:
        return reads(config, stage, stages)

    return blueprint, plan(blueprint, stages, cuts, batch, read, configs.reconciles(config), wire)


def image_of(config: Config) -> tuple[int, int, int]:
    """Return (C, H, W) of a resolved configuration's images, without its data."""
    mean, size = config.data.mean, config.data.image_size
    assert isinstance(mean, tuple) and not isinstance(size, str)
    height, width = size if isinstance(size, tuple) else (size, size)
    return len(mean), height, width


@dataclass(frozen=True)
class Prepared:
    """A job that may start, or a finished run's summary; `lock` must stay alive as long as the run."""

    job: Job
    config: Config
    course: Course
    lock: IO[str]
    summary: Mapping[str, Any] | None
    notes: tuple[str, ...]


def prepare(given: Config, world: int | None = None) -> Prepared:
    """Check everything that can be known before a worker starts, take the run directory, and decide where to begin."""
    tracker.check(given.run.wandb)
    said, given = given, _with_recorded_cuts(given)
    dataset = data.load(given.data, given.run.seed)
    config = resolve(given, dataset, world)
    stages = check_plan(config, dataset)
    notes = [] if config.run.init_from is None else [_fit(stages, config.run.init_from)]
    run_dir = Path(given.run.dir)
    held = lock.acquire(run_dir)
    _sweep(run_dir)
    config = _recorded(config, given, run_dir, dataset, world)
    checkpoint = newest(run_dir)
    start = checkpoint.step if checkpoint else 0
    if (
        checkpoint is not None
        and checkpoint.manifest.get("data_sha256", dataset.sha256) != dataset.sha256
    ):
        raise UserError(
            f"data: {config.data.name} holds other labels or images than the run in {run_dir} was started with; give it the "
            "same data, or choose another run.dir"
        )
    todo = course(config, dataset)
    if start > todo.steps:
        raise UserError(
            f"run: {run_dir} has already made {start} steps, more than the {todo.steps} asked for; "
            "raise optim.max_steps, or choose another run.dir"
        )
    summary = finished(run_dir, todo.steps)
    notes += planner.notes(config)
    if todo.dropped:
        notes.append(
            f"note: the last {todo.dropped} of {todo.train_size} images are left out of every epoch; "
            "batch normalisation needs two in every replica"
        )
    schedule = Schedule(config.optim, todo.steps_per_epoch)
    if start < todo.steps and not any(
        schedule.rate(step) for step in range(start + 1, todo.steps + 1)
    ):
        notes.append(
            f"note: the learning rate of {config.optim.schedule} is 0 in every step that is left; nothing moves"
        )
    if summary is None:
        (run_dir / SUMMARY_FILE).unlink(missing_ok=True)
        metrics.write_whole(run_dir / CONFIG_FILE, configs.to_yaml(config))
        versions = {"localpipe": localpipe.__version__, "torch": torch.__version__}
        elapsed = metrics.begin(
            run_dir / METRICS_FILE,
            {**versions, "steps": todo.steps},
            start,
            lambda step: todo.evaluates_after(step) and step != start,
        )
        who = f"{config.model.name} on {config.data.name}, {len(stages)} stages, {config.pipeline.processes} processes"
        first = (
            f"resuming {run_dir} after step {start} of {todo.steps}"
            if start
            else f"starting {run_dir}"
        )
        notes.append(f"{first}: {who}")
    else:
        elapsed = 0.0
    job = Job(
        configs.to_dict(config), configs.to_dict(said), start, elapsed, time.time(), dataset.sha256
    )
    return Prepared(job, config, todo, held, summary, tuple(notes))


def _with_recorded_cuts(given: Config) -> Config:
    """Return what the user gave, with a measured cut as the run directory recorded it: a resume never measures again."""
    recorded_file = Path(given.run.dir) / CONFIG_FILE
    if (
        given.pipeline.cuts not in MEASURED
        or given.run.resume == "never"
        or not recorded_file.exists()
    ):
        return given
    recorded = configs.read_recorded(recorded_file)
    if recorded.pipeline.stages != configs.stage_count(given) or not isinstance(
        recorded.pipeline.cuts, tuple
    ):
        return given
    return configs.update(given, {"pipeline.cuts": list(recorded.pipeline.cuts)})


def finished(run_dir: Path, steps: int) -> Mapping[str, Any] | None:
    """Return the summary of a run that has made all its steps, else None."""
    try:
        summary: Mapping[str, Any] = json.loads(
            (run_dir / SUMMARY_FILE).read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return None
    return summary if summary.get("steps") == steps else None


def check_images(config: Config, dataset: Dataset) -> None:
    """Raise UserError when a data set's images are not what a resolved configuration was made for."""
    if dataset.image != image_of(config):
        raise UserError(
            f"data: {dataset.name} has images of shape {dataset.image}, the run was made for {image_of(config)}"
        )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def old_weights(run_dir: str) -> dict[str, torch.Tensor]:
    """Return the weights of another run's newest checkpoint, by their names in the whole network."""
    checkpoint = newest(Path(run_dir))
    if checkpoint is None:
        raise UserError(
            f"run: run.init_from {run_dir} holds no complete checkpoint; give the directory of a run"
        )
    return checkpoint.weights()


def _fit(stages: Sequence[Stage], init_from: str) -> str:
    """Say what of an old run's weights fits, and list the rest."""
    weights = old_weights(init_from)
    taken = {name for stage in stages for name in stage.take_weights(weights)}
    own = {name for stage in stages for name in stage.weights()}
    lines = [f"run.init_from {init_from}: {len(taken)} of {len(own)} tensors taken"]
    for what, names in (("left as initialised", own - taken), ("not used", weights.keys() - taken)):
        if names:
            lines.append(f"  {what}: {', '.join(sorted(names))}")
    return "\n".join(lines)


def check_plan(config: Config, dataset: Dataset) -> list[Stage]:
    """Build every stage on the meta device: what cannot be built is known before a worker starts."""
    blueprint, plans = plans_of(config, dataset.image)
    stages = [Stage(stage_plan, blueprint, config, "meta") for stage_plan in plans]
    if course(config, dataset).steps_per_epoch < 1:
        raise UserError(
            f"data: {len(dataset.train.labels)} training images make no batch of {config.data.batch_size}; "
            "lower data.batch_size, or set data.drop_last=false"
        )
    return stages


def _sweep(run_dir: Path) -> None:
    """Remove what an interrupted run left half-written, also because it may be what fills a full disk."""
    Checkpoints(run_dir, 0).sweep()
    for name in (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, TRACE_FILE):
        for left_over in run_dir.glob(f".{name}.*"):
            left_over.unlink(missing_ok=True)


def _recorded(
    config: Config, given: Config, run_dir: Path, dataset: Dataset, world: int | None
) -> Config:
    """Join a configuration with the one that the run directory holds, if any; refuse or clear what is in the way."""
    there = sorted(
        path.name
        for path in run_dir.iterdir()
        if path.name != "lock" and not path.name.startswith(".")
    )
    if not there:
        return config
    # Whatever it is, it is not a run's to throw away; a lone config.yaml may be the user's.
    if CONFIG_FILE not in there or (given.run.resume == "never" and METRICS_FILE not in there):
        raise UserError(f"run: {run_dir} holds {there[0]!r} and no run; choose another run.dir")
    if given.run.resume == "never":
        if not given.run.overwrite:
            raise UserError(
                f"run: {run_dir} is not empty and run.resume is never; set run.overwrite=true to throw its run "
                "away, or choose another run.dir"
            )
        for name in _LEFT:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(
                missing_ok=True
            )
        return config
    recorded = configs.read_recorded(run_dir / CONFIG_FILE, {given.method.objective["name"]})
    joined = configs.resumed(given, recorded, str(run_dir))
    return resolve(joined, dataset, world)


def _objective(config: Config, stages: int) -> dict[str, Any]:
    """Return the objective's options with its own `auto` values decided."""
    cls, options = configs.objective_of(config)
    resolved = cls.resolved(
        options, config.model.name, config.data.name, config.pipeline.cuts, stages
    )
    return {"name": config.method.objective["name"], **asdict(resolved)}


def _device(config: Config) -> str:
    if config.run.device != "auto":
        return config.run.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _backend(config: Config, device: str) -> str:
    if config.pipeline.backend != "auto":
        return config.pipeline.backend
    return "nccl" if device == "cuda" else "gloo"


def _processes(config: Config, device: str, world: int | None) -> int:
    replicas = configs.replicas_of(config)
    asked = config.pipeline.processes
    if world is not None:
        if wrong := configs.misfit(world, replicas):
            raise UserError(
                f"config: torchrun started {world} workers, but {wrong.replace('set it to', 'start')}"
            )
        return world
    if asked != "auto":
        return asked
    if len(set(replicas)) > 1:
        return sum(replicas)
    pipelines = replicas[0]
    places = torch.cuda.device_count() if device == "cuda" else cores()
    return pipelines * max(1, min(len(replicas), places // pipelines))
