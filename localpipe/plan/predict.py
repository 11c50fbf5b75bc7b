"""Predictions of a cut's speed from a profile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import update
from localpipe.config.resolved import Resolved, count_stages
from localpipe.data.dataset import Dataset
from localpipe.environment import available_cores, workers_here
from localpipe.errors import UserError
from localpipe.files import write_whole
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.plan.measured_cuts import measure_here, time_cuts
from localpipe.plan.profile import Profile, read_profile
from localpipe.plan.resolve_here import resolve_here


@dataclass(frozen=True)
class Prediction:
    """What a profile says of a cut. Seconds are those of a step; `efficiency` is against the bound, or None."""

    cuts: tuple[int, ...]
    stage_s: tuple[float, ...]
    samples_per_s: float
    efficiency: float | None

    @property
    def balance(self) -> float:
        """Mean over largest of the stages' seconds: 1 is perfect."""
        return sum(self.stage_s) / len(self.stage_s) / max(self.stage_s)


def predict(
    profile: Profile,
    bounds: Sequence[tuple[int, int]],
    sent_bytes: Sequence[int],
    processes: int,
    cores: float,
) -> Prediction:
    """Predict a cut's speed. bounds: (first, last) of every stage; sent_bytes: of a message behind every stage but the last.

    A worker's step is that of the stages it hosts, their turns, and one copy of each message into its edge. Where the
    workers leave no core idle, the wire's copies on either side are theirs too; where they outnumber the cores, they share
    them. `cores` is infinite for stages that only wait.
    """
    stages = len(bounds)
    each = tuple(profile.stage_s(first, last, k, stages) for k, (first, last) in enumerate(bounds))
    busy = processes * profile.threads >= cores
    compute, working = [], []
    for host in assign_hosts((1,) * stages, processes):
        hosted = host.stages
        compute.append(sum(each[k] for k in hosted))
        sent = sent_bytes[hosted[-1]] * (1 + busy) if hosted[-1] < stages - 1 else 0
        received = sent_bytes[hosted[0] - 1] * busy if hosted[0] else 0
        working.append(
            compute[-1] + len(hosted) * profile.turn_s + (sent + received) * profile.copy_s_per_byte
        )
    step_s = max(*working, sum(working) * profile.threads / cores)
    fits = processes * profile.threads <= cores
    cuts = tuple(last for _, last in bounds[:-1])
    return Prediction(
        cuts, each, profile.batch_size / step_s, max(compute) / step_s if fits else None
    )


THIS = "this"


def profile_for(
    given: Config, dataset: Dataset, measure: bool, file: Path | None
) -> Profile | None:
    """Return the profile that `plan` predicts from: measured (and written to `file`), or read from it, or none."""
    if not measure and file is None and given.pipeline.cuts != "time":
        return None
    resolved = resolve_here(_unmeasured(given), dataset)
    if file is not None and not measure:
        found = read_profile(file)
        if (difference := found.fits(resolved)) is not None:
            raise UserError(
                f"profile: {file} is of another configuration: {difference}; measure again"
            )
        return found
    stages = count_stages(given)
    blueprint, _ = build_plans(resolved)
    counts = [count for count in (stages, stages + 1) if count <= len(blueprint.blocks)]
    found = measure_here(resolved, counts)
    if file is not None:
        write_whole(file, found.to_json())
    return found


def can_predict(given: Config) -> bool:
    """Return whether a profile can predict a configuration: it knows one replica of every stage."""
    replicas = given.pipeline.replicas
    return replicas == 1 or (not isinstance(replicas, int) and max(replicas) == 1)


def predict_own_cut(resolved: Resolved, profile: Profile) -> Prediction:
    """Return the prediction of a resolved configuration's own cut."""
    return _predict(resolved, profile, resolved.pipeline.processes)


def predict_cuts(resolved: Resolved, profile: Profile) -> dict[str, Prediction]:
    """Return the predictions of this cut, of `equal` and `time`, and of `time` with one stage and process more."""
    if max(resolved.replicas) > 1:
        raise UserError(
            "profile: a prediction knows one replica of every stage; set pipeline.replicas=1, or use --cluster"
        )
    stages, processes = resolved.pipeline.stages, resolved.pipeline.processes
    assert stages is not None and isinstance(processes, int)
    found = {THIS: predict_own_cut(resolved, profile)}
    found["equal"] = _predict(_cut(resolved, stages, "equal"), profile, processes)
    found["time"] = _predict(_cut(resolved, stages, time_cuts(profile, stages)), profile, processes)
    following = stages + 1
    if str(following) in profile.loss_s:
        another = processes + (processes == stages)
        name = f"time, {following} stages" + (
            f" on {another} processes" if another > processes else ""
        )
        found[name] = _predict(
            _cut(resolved, following, time_cuts(profile, following)), profile, another
        )
    return found


def fits_cores(config: Resolved) -> bool:
    """Return whether an efficiency can be told here: every worker's threads have a core, or the stages only wait."""
    threads = workers_here(config.pipeline.processes) * config.run.threads
    return threads <= available_cores() or config.only_waits


def describe_stages(one: Prediction) -> list[str]:
    """Return a line of predicted step times, and who is slowest."""
    slowest = max(range(len(one.stage_s)), key=lambda stage: one.stage_s[stage])
    times = " ".join(f"{1000 * seconds:.2f}" for seconds in one.stage_s)
    return [f"predicted step of each stage, ms: {times}; stage {slowest} is the slowest"]


def _unmeasured(given: Config) -> Config:
    measured = given.pipeline.cuts in MEASURED
    return update(given, {"pipeline.cuts": "equal"}) if measured else given


def _cut(resolved: Resolved, stages: int, cuts: str | tuple[int, ...]) -> Resolved:
    told = list(cuts) if isinstance(cuts, tuple) else cuts
    processes = min(stages, resolved.pipeline.processes)
    return update(
        resolved,
        {"pipeline.stages": stages, "pipeline.cuts": told, "pipeline.processes": processes},
    )


def _predict(resolved: Resolved, profile: Profile, processes: int) -> Prediction:
    _, plans = build_plans(resolved)
    sent = [plan.sends.nbytes for plan in plans if plan.sends is not None]
    cores = math.inf if resolved.only_waits else available_cores()
    return predict(profile, [(plan.first, plan.last) for plan in plans], sent, processes, cores)
