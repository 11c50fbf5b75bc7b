"""Other places for the metrics: TensorBoard always, Weights & Biases on request.

Both are conveniences: a package that cannot be imported, a disk that is full and a network that is
gone end no run here.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from localpipe.environment import set_default
from localpipe.errors import UserError, first_line
from localpipe.output import warn
from localpipe.runs.recorded_run import Record


class Tracker(Protocol):
    """Gets the records of metrics.jsonl in the order of its lines, those before a resume too."""

    def add(self, record: Record) -> None:
        """Take one record of any kind. It ignores those before the step of the resume."""

    def close(self) -> None:
        """Write what is left. It is called once, and no `add` follows."""


def check_wandb(project: str | None) -> None:
    """Raise UserError if a W&B project is configured and wandb is not installed.

    project: the value of run.wandb. None passes. wandb is not imported, and no login is checked.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config: run.wandb is {project!r}, but wandb is not installed; "
            "pip install wandb, or leave run.wandb out"
        )


def build_trackers(
    run_dir: Path, start_step: int, project: str | None, settings: Mapping[str, Any]
) -> list[Tracker]:
    """Return the trackers of a run that begins after `start_step`, TensorBoard first.

    project: the W&B project, or None for TensorBoard alone. settings: the configuration as a
    mapping, for W&B. A tracker that cannot begin, or fails later, is one line on standard error.
    """
    folder = run_dir / "tensorboard"
    trackers: list[Tracker] = [
        ForgivingTracker("TensorBoard", lambda: TensorBoard(folder, start_step))
    ]
    if project is not None:
        trackers.append(
            ForgivingTracker(
                "Weights & Biases",
                lambda: WeightsAndBiases(run_dir, start_step, project, settings),
            )
        )
    return trackers


class ForgivingTracker:
    """A tracker that may fail. Its first error is one line, and it gets no more records.

    name: for the line. build: makes the tracker, and may raise any Exception too.
    """

    def __init__(self, name: str, build: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        with self._stop_on_error("no"):
            self._tracker = build()

    def add(self, record: Record) -> None:
        """Give a record to the tracker, unless it has failed."""
        if self._tracker is not None:
            with self._stop_on_error("no more"):
                self._tracker.add(record)

    def close(self) -> None:
        """Close the tracker, unless it has failed."""
        if self._tracker is not None:
            with self._stop_on_error("no more"):
                self._tracker.close()

    @contextlib.contextmanager
    def _stop_on_error(self, amount: str) -> Iterator[None]:
        """Leave the tracker alone after any error, for what matters is in metrics.jsonl."""
        try:
            yield
        except Exception as error:
            self._tracker = None
            reason = getattr(error, "strerror", None) or first_line(error)
            warn(f"localpipe: {amount} {self._name}: {reason}; the run goes on without it")


def scalars(record: Record) -> dict[str, float]:
    """Return the values of a record to draw, `{train/loss/stage_0: value}`.

    The group is `train`, `test` or `validation`. Only floats are taken: text, whole numbers,
    missing values and `wall_s` are left out. Empty for a record of another kind than `train` and
    `eval`.
    """
    if record["kind"] not in ("train", "eval"):
        return {}
    group = record.get("split", record["kind"])
    values = {}
    for name, value in record.items():
        if isinstance(value, float) and name != "wall_s":
            values[f"{group}/{name}/stage_{record['stage']}"] = value
    return values


class TensorBoard:
    """TensorBoard's event files. After a resume, the steps that were removed are purged.

    folder: it is made. start_step: 0 for a new run. Raises OSError if the folder cannot be written,
    and what the import of tensorboard raises.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        set_default("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter  # slow, so it is imported late

        purge_step = None
        if start_step:
            purge_step = start_step + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step)
        self._start_step = start_step

    def add(self, record: Record) -> None:
        """Draw the floats of a record. It ignores records before `start_step`.

        Raises OSError if the disk is full.
        """
        if record.get("step", 0) < self._start_step:
            return
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write and close the event files. Raises OSError if the disk is full."""
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for each session. The sessions of a run directory are a group.

    Stages record a step at different moments, so `step` is a metric of its own and no axis of
    W&B's. wandb is imported only if the configuration names a project. Raises UserError if W&B
    cannot begin a run, as without login or network, and ImportError if wandb is not installed.
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
        # No key, no project, no network: W&B has exceptions of its own.
        except Exception as error:
            raise UserError(
                f"config: run.wandb {project!r} cannot be used: {first_line(error)}; "
                "log in, set WANDB_MODE=offline, or leave it out"
            ) from None

    def add(self, record: Record) -> None:
        """Log the floats of a record and its step. It ignores records before `start_step`."""
        values = scalars(record)
        if values and record["step"] >= self._start_step:
            self._run.log({"step": record["step"], **values})

    def close(self) -> None:
        """Finish the W&B run. It may wait for the upload."""
        self._run.finish()
