"""What a profile predicts for a configuration: its own cut beside the equal and the balanced one, and one stage more."""

from __future__ import annotations

import math
from pathlib import Path

from localpipe import config as configs
from localpipe import job, metrics, planner
from localpipe import profile as profiles
from localpipe.data import Dataset
from localpipe.errors import UserError
from localpipe.planner import Prediction
from localpipe.profile import Profile
from localpipe.sections import MEASURED, Config

THIS = "this"


def profile_for(
    given: Config, dataset: Dataset, measure: bool, file: Path | None
) -> Profile | None:
    """Return the profile that `plan` predicts from: measured (and written to `file`), or read from it, or none."""
    if not measure and file is None and given.pipeline.cuts != "time":
        return None
    resolved = job.resolve(_unmeasured(given), dataset)
    if file is not None and not measure:
        found = profiles.read(file)
        if (difference := found.fits(resolved)) is not None:
            raise UserError(
                f"profile: {file} is of another configuration: {difference}; measure again"
            )
        return found
    stages = configs.stage_count(given)
    blueprint, _ = job.plans_of(resolved, job.image_of(resolved))
    counts = [count for count in (stages, stages + 1) if count <= len(blueprint.blocks)]
    found = job.measured(resolved, counts)
    if file is not None:
        metrics.write_whole(file, found.to_json())
    return found


def knows(given: Config) -> bool:
    """Return whether a profile can predict a configuration: it knows one replica of every stage."""
    replicas = given.pipeline.replicas
    return replicas == 1 or (not isinstance(replicas, int) and max(replicas) == 1)


def of(resolved: Config, profile: Profile) -> Prediction:
    """Return the prediction of a resolved configuration's own cut."""
    assert isinstance(resolved.pipeline.processes, int), "resolved"
    return _predict(resolved, profile, resolved.pipeline.processes)


def predictions(resolved: Config, profile: Profile) -> dict[str, Prediction]:
    """Return the predictions of this cut, of `equal` and `time`, and of `time` with one stage and process more."""
    if max(configs.replicas_of(resolved)) > 1:
        raise UserError(
            "profile: a prediction knows one replica of every stage; set pipeline.replicas=1, or use --cluster"
        )
    stages, processes = resolved.pipeline.stages, resolved.pipeline.processes
    assert stages is not None and isinstance(processes, int)
    found = {THIS: of(resolved, profile)}
    found["equal"] = _predict(_cut(resolved, stages, "equal"), profile, processes)
    found["time"] = _predict(
        _cut(resolved, stages, job.time_cuts(profile, stages)), profile, processes
    )
    following = stages + 1
    if str(following) in profile.loss_s:
        another = processes + (processes == stages)
        name = f"time, {following} stages" + (
            f" on {another} processes" if another > processes else ""
        )
        found[name] = _predict(
            _cut(resolved, following, job.time_cuts(profile, following)), profile, another
        )
    return found


def per_stage(one: Prediction) -> list[str]:
    """Return a line of predicted step times, and who is slowest."""
    slowest = max(range(len(one.stage_s)), key=lambda stage: one.stage_s[stage])
    times = " ".join(f"{1000 * seconds:.2f}" for seconds in one.stage_s)
    return [f"predicted step of each stage, ms: {times}; stage {slowest} is the slowest"]


def _unmeasured(given: Config) -> Config:
    measured = given.pipeline.cuts in MEASURED
    return configs.update(given, {"pipeline.cuts": "equal"}) if measured else given


def _cut(resolved: Config, stages: int, cuts: str | tuple[int, ...]) -> Config:
    told = list(cuts) if isinstance(cuts, tuple) else cuts
    processes = (
        min(stages, resolved.pipeline.processes)
        if resolved.pipeline.processes != "auto"
        else "auto"
    )
    return configs.update(
        resolved,
        {"pipeline.stages": stages, "pipeline.cuts": told, "pipeline.processes": processes},
    )


def _predict(resolved: Config, profile: Profile, processes: int) -> Prediction:
    _, plans = job.plans_of(resolved, job.image_of(resolved))
    sent = [plan.sends.nbytes for plan in plans if plan.sends is not None]
    cores = math.inf if job.only_waits(resolved) else job.cores()
    return planner.predict(
        profile, [(plan.first, plan.last) for plan in plans], sent, processes, cores
    )
