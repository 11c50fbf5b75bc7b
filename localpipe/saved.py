"""A run directory opened again: its configuration and its newest complete checkpoint, for `eval` and `export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localpipe import config as configs
from localpipe import job, registry
from localpipe.checkpoint import Checkpoint, newest
from localpipe.errors import UserError
from localpipe.sections import Config
from localpipe.stage import Stage


def read_config(run_dir: Path, overrides: Sequence[str], trust: bool) -> Config:
    """Return a run's configuration with overrides; code that it names is imported only when the user names it or trusts it."""
    if not (run_dir / job.CONFIG_FILE).exists():
        raise UserError(f"run: {run_dir} holds no {job.CONFIG_FILE}; give the directory of a run")
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    own = {"model.name", "method.objective", "method.objective.name"}
    recorded = configs.read_recorded(
        run_dir / job.CONFIG_FILE, None if trust else {given[key] for key in own & given.keys()}
    )
    config = configs.load(run_dir / job.CONFIG_FILE, overrides) if overrides else recorded
    if recorded.model.name not in registry.MODELS and not trust and "model.name" not in given:
        raise UserError(
            f"run: {run_dir} names code of its own, {recorded.model.name}; say --trust to import it, or name it "
            f"again: model.name={recorded.model.name}"
        )
    return config


def checkpoint_of(run_dir: Path) -> Checkpoint:
    """Return the newest complete checkpoint of a run; raise UserError when there is none."""
    checkpoint = newest(run_dir)
    if checkpoint is None:
        raise UserError(f"checkpoint: {run_dir} holds no complete checkpoint yet; train it first")
    return checkpoint


def stages_of(config: Config, checkpoint: Checkpoint) -> list[Stage]:
    """Return every stage of a run with the weights of a checkpoint."""
    blueprint, plans = job.plans_of(config, job.image_of(config))
    stages = [Stage(plan, blueprint, config) for plan in plans]
    for stage in stages:
        state: dict[str, Any] = checkpoint.stage(stage.plan.stage)
        stage.load_weights(state["weights"])
    return stages
