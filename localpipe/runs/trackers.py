"""Where else the metrics go: TensorBoard always, Weights & Biases where it is asked for. Both are conveniences."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from localpipe.errors import UserError

Record = Mapping[str, Any]


class Tracker(Protocol):
    """Takes the records of metrics.jsonl."""

    def add(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Write what is left."""


def check_wandb(project: str | None) -> None:
    """Raise UserError where Weights & Biases is asked for and not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config: run.wandb is {project!r}, but wandb is not installed; pip install wandb, or leave run.wandb out"
        )


def build_trackers(
    run_dir: Path, start_step: int, project: str | None, settings: Mapping[str, Any]
) -> list[Tracker]:
    """Return the trackers of a run that begins behind `start_step`."""
    found: list[Tracker] = [TensorBoard(run_dir / "tensorboard", start_step)]
    if project is not None:
        found.append(WeightsAndBiases(run_dir, start_step, project, settings))
    return found


def scalars(record: Record) -> dict[str, float]:
    """Return what a record has to draw, `{train/loss/stage_0: value}`; nothing where there is no value."""
    if record["kind"] not in ("train", "eval"):
        return {}
    group = record.get("split", record["kind"])
    return {
        f"{group}/{name}/stage_{record['stage']}": value
        for name, value in record.items()
        if isinstance(value, float) and name != "wall_s"
    }


class TensorBoard:
    """Event files, imported late; after a resume the cut steps are purged."""

    def __init__(self, folder: Path, start_step: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(folder), purge_step=start_step + 1 if start_step else None
        )
        self._start_step = start_step

    def add(self, record: Record) -> None:
        if self._writer is None or record.get("step", 0) < self._start_step:
            return
        with self._giving_up():
            for name, value in scalars(record).items():
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            with self._giving_up():
                self._writer.close()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """A full disk is told by what matters, the checkpoints; TensorBoard's files are a convenience."""
        try:
            yield
        except OSError as error:
            self._writer = None
            print(f"localpipe: no more TensorBoard files: {error.strerror}", file=sys.stderr)


class WeightsAndBiases:
    """A run of Weights & Biases a session; those of one run directory are a group. Imported only when asked for.

    Stages record a step at different moments, so `step` is a metric of its own and no axis of W&B's.
    """

    def __init__(
        self, run_dir: Path, start_step: int, project: str, settings: Mapping[str, Any]
    ) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._start_step = start_step
        try:
            self._run = wandb.init(
                project=project,
                name=run_dir.name,
                group=str(run_dir),
                dir=str(run_dir),
                config=dict(settings),
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # no key, no project, no network: W&B has exceptions of its own
            reason = (str(error) or repr(error)).splitlines()[0]
            raise UserError(
                f"config: run.wandb {project!r} cannot be used: {reason}; log in, set WANDB_MODE=offline, or leave it out"
            ) from None

    def add(self, record: Record) -> None:
        found = scalars(record)
        if found and record["step"] >= self._start_step:
            self._run.log({"step": record["step"], **found})

    def close(self) -> None:
        self._run.finish()
