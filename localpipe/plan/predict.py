"""Predictions: the speed of a cut, from a measured profile."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import update
from localpipe.config.resolved import Resolved, count_stages, replica_counts, take_workers
from localpipe.data.dataset import Dataset
from localpipe.environment import available_cores, workers_here
from localpipe.errors import UserError
from localpipe.files import write_output
from localpipe.pipeline.stages.stage_plan import (
    StagePlan,
    build_plans,
    find_read_fields,
    gradient_field,
)
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.plan.balanced_cuts import measure_here, time_cuts
from localpipe.plan.profile import Profile, read_profile
from localpipe.plan.resolve_here import resolve_here

THIS = "this"  # the name of a configuration's own cut


@dataclass(frozen=True)
class Prediction:
    """The predicted speed of a cut.

    cuts: the last block of every stage but the last. stage_s: seconds of a step, of every stage.
    `efficiency` is against the bound, None where workers x threads exceed the cores.
    """

    cuts: tuple[int, ...]
    stage_s: tuple[float, ...]
    samples_per_s: float
    efficiency: float | None

    @property
    def balance(self) -> float:
        """Mean over largest of the stages' seconds: 1 is perfect, and for one stage."""
        return sum(self.stage_s) / len(self.stage_s) / max(self.stage_s)


def predict(
    profile: Profile,
    bounds: Sequence[tuple[int, int]],
    sent_bytes: Sequence[int],
    processes: int,
    cores: float,
    coded_bytes: Sequence[tuple[int, int]] = (),
) -> Prediction:
    """Predict the speed of a cut.

    bounds: (first, last) block of every stage. sent_bytes: of a message after every stage but the
    last. A worker's step is that of the stages it hosts, their turns, and one copy of each message
    into its edge. A turn and a copy are for each of a step's messages. Where the workers leave no
    core idle, the edge's copies on both sides are theirs too. Where they outnumber the cores, they
    share them. `cores` is infinite for stages that only wait. processes: at most the stages.
    coded_bytes: the fp32 bytes that every stage encodes and decodes for a message. Without them no
    codec runs.

    Raises UserError where the profile was not measured for so many stages.
    """
    stages = len(bounds)
    threads = profile.count_threads(processes)
    no_core_is_idle = sum(threads) >= cores
    coded_bytes = coded_bytes or [(0, 0)] * stages

    # Per worker: the seconds of its stages, and those with messages and turns.
    stage_s: list[float] = []
    compute_s, busy_s = [], []
    for rank, host in enumerate(assign_hosts((1,) * stages, processes)):
        worker = profile.of_worker(rank)
        for stage in host.stages:
            seconds = worker.stage_s(*bounds[stage], stage, stages)
            stage_s.append(seconds + worker.codec_s(*coded_bytes[stage]))
        compute_s.append(sum(stage_s[stage] for stage in host.stages))
        copied_bytes = _count_copied_bytes(host.stages, sent_bytes, no_core_is_idle)
        message_s = len(host.stages) * worker.turn_s + copied_bytes * worker.copy_s_per_byte
        busy_s.append(compute_s[-1] + profile.accumulate * message_s)

    # The slowest worker sets the pace, or all of them together where they share cores.
    core_s = sum(seconds * count for seconds, count in zip(busy_s, threads, strict=True))
    step_s = max(*busy_s, core_s / cores)
    efficiency = None
    if sum(threads) <= cores:
        efficiency = max(compute_s) / step_s
    cuts = tuple(last for _, last in bounds[:-1])
    return Prediction(cuts, tuple(stage_s), profile.batch_size / step_s, efficiency)


def _count_copied_bytes(stages: range, sent_bytes: Sequence[int], both_sides: bool) -> int:
    """Return the bytes that a worker copies for a message into its edges.

    stages: that it hosts. both_sides: count the copies of the edge's own thread too, at both ends.
    """
    first, last = stages[0], stages[-1]
    nbytes = 0
    if last < len(sent_bytes):
        nbytes += sent_bytes[last] * (1 + both_sides)
    if first > 0:
        nbytes += sent_bytes[first - 1] * both_sides
    return nbytes


def profile_for(
    config: Config, dataset: Dataset, measure: bool, file: Path | None
) -> Profile | None:
    """Return the profile that `plan` predicts from, or None where none is asked for.

    With `measure` it is measured, and written to `file` if that is not None. Else it is read from
    `file`. `cuts: time` measures without being asked if there is no file. It is measured for the
    configured number of stages, and for one more where the blocks allow.

    Raises UserError for a file that is no profile or of another configuration, and as
    `resolve_here`. Raises RunError if the measuring or the writing fails.
    """
    if not measure and file is None and config.pipeline.cuts != "time":
        return None
    if config.pipeline.cuts in MEASURED:
        # A measured cut is decided from the profile, so it cannot be resolved before.
        resolved = resolve_here(update(config, {"pipeline.cuts": "equal"}), dataset)
    else:
        resolved = resolve_here(config, dataset)
    if file is not None and not measure:
        return _read_fitting(file, resolved)

    # One stage more is measured too, so that it can be predicted beside.
    stages = count_stages(config)
    blueprint, _ = build_plans(resolved)
    counts = [count for count in (stages, stages + 1) if count <= len(blueprint.blocks)]
    profile = measure_here(resolved, counts)
    if file is not None:
        write_output(file, profile.to_json(), "file")
    return profile


def _read_fitting(file: Path, resolved: Resolved) -> Profile:
    profile = read_profile(file)
    difference = profile.mismatch(resolved)
    if difference is not None:
        raise UserError(
            f"profile: {file} is of another configuration: {difference}; "
            f"measure again with plan --measure --profile {shlex.quote(str(file))}"
        )
    return profile


def can_predict(config: Config) -> bool:
    """Return whether a profile can predict a configuration.

    It can with one replica of every stage, without run.capture, and without frozen blocks: the
    pieces run as they are, and all are trained.
    """
    runs_as_it_is = config.run.capture == "none" and not config.model.freeze
    return max(replica_counts(config)) == 1 and runs_as_it_is


def check_predictable(config: Config) -> None:
    """Raise UserError for a configuration that no profile can predict, as `can_predict`."""
    if max(replica_counts(config)) > 1:
        raise UserError(
            "profile: a prediction knows one replica of every stage; "
            "set pipeline.replicas=1, or use --cluster"
        )
    if config.run.capture != "none":
        raise UserError(
            "profile: a prediction knows stages that run layer by layer, and run.capture is "
            f"{config.run.capture}; set run.capture=none"
        )
    if config.model.freeze:
        raise UserError(
            "profile: a prediction knows blocks that are trained, and model.freeze is "
            f"{list(config.model.freeze)}; leave model.freeze out"
        )


def predict_own_cut(resolved: Resolved, profile: Profile) -> Prediction:
    """Return the prediction of a resolved configuration's own cut, on its processes.

    Raises UserError where the profile was not measured for its number of stages. That the profile
    is of this configuration is not checked, nor the replicas.
    """
    return _predict(resolved, profile, resolved.pipeline.processes)


def predict_cuts(resolved: Resolved, profile: Profile) -> dict[str, Prediction]:
    """Return predictions by name: this cut, `equal`, `time`, and `time` with one stage more.

    The keys are `this`, `equal`, `time` and then, if the profile has one stage more, `time, K
    stages`. The last one ends in `on N processes` where every stage has its own process, and a
    process is added. Raises UserError as `check_predictable`, and for a profile of other numbers of
    stages.
    """
    check_predictable(resolved)
    stages, processes = resolved.stages, resolved.pipeline.processes
    timed = time_cuts(profile, (1,) * stages, processes)
    predictions = {
        THIS: predict_own_cut(resolved, profile),
        "equal": _predict(_with_cut(resolved, stages, "equal"), profile, processes),
        "time": _predict(_with_cut(resolved, stages, list(timed)), profile, processes),
    }

    # One stage more, on one process more where every stage has its own.
    next_stages = stages + 1
    # Workers that differ are as many as are listed.
    if str(next_stages) in profile.loss_s and (profile.each is None or processes < stages):
        name, workers = f"time, {next_stages} stages", processes
        if processes == stages:
            workers += 1
            name += f" on {workers} processes"
        cut = list(time_cuts(profile, (1,) * next_stages, workers))
        predictions[name] = _predict(_with_cut(resolved, next_stages, cut), profile, workers)
    return predictions


def fits_cores(config: Resolved) -> bool:
    """Return whether an efficiency can be told on this machine.

    The threads of all workers here must not outnumber the cores, unless the stages only wait.
    """
    local_workers = workers_here(config.pipeline.processes)
    # Where listed devices are cores, the process that asks may be kept on one.
    listed_cores = {name for name in config.pipeline.devices or () if name.startswith("cpu:")}
    cores = len(listed_cores) or available_cores()
    return sum(config.threads[:local_workers]) <= cores or config.only_waits


def describe_stages(prediction: Prediction) -> list[str]:
    """Return one line of predicted step times in ms, and which stage is slowest, in a list.

    Of equally slow stages it is the first.
    """
    seconds = prediction.stage_s
    slowest = seconds.index(max(seconds))
    times = " ".join(f"{1000 * value:.2f}" for value in seconds)
    return [f"predicted step of each stage, ms: {times}; stage {slowest} is the slowest"]


def _with_cut(resolved: Resolved, stages: int, cuts: str | list[int]) -> Resolved:
    """Return a configuration with another cut, on as many processes as that allows."""
    processes = min(stages, resolved.pipeline.processes)
    keys = {"pipeline.stages": stages, "pipeline.cuts": cuts}
    return update(resolved, {**keys, **take_workers(resolved, processes)})


def _predict(resolved: Resolved, profile: Profile, processes: int) -> Prediction:
    _, plans = build_plans(resolved)
    bounds = [(plan.first, plan.last) for plan in plans]
    sent_bytes = [plan.sends.nbytes for plan in plans if plan.sends is not None]
    cores = math.inf if resolved.only_waits else available_cores()
    coded_bytes = [count_coded_bytes(plan, resolved) for plan in plans]
    return predict(profile, bounds, sent_bytes, processes, cores, coded_bytes)


def count_coded_bytes(plan: StagePlan, config: Resolved) -> tuple[int, int]:
    """Return the fp32 bytes that a stage encodes and decodes for a message.

    It decodes what it reads: its input, its contexts and a gradient. What it relays it does not.
    """
    batch = plan.receives.batch
    encoded = sum(field.nbytes for field in plan.encoded) * batch
    if plan.is_first:
        return encoded, 0
    boundary = plan.stage - 1
    read = {field.name for field in plan.input_fields if field.dtype == "float32"}
    read |= {gradient_field(boundary)}
    read |= find_read_fields(config, plan.stage, plan.stages) - {config.inputs.name}
    decoded = sum(field.nbytes for field in plan.decoded if field.name in read) * batch
    return encoded, decoded
