"""The task's metric for every stage's exit and for the whole network, from a run's newest checkpoint, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localpipe import config as configs
from localpipe import data, job, process
from localpipe.channel import MemoryChannel
from localpipe.data import Dataset
from localpipe.loader import Loader, course
from localpipe.optim import Schedule
from localpipe.pulse import Pulse
from localpipe.saved import checkpoint_of, stages_of
from localpipe.sections import Config
from localpipe.worker import Seat, Tools, Worker


class _Verdicts:
    """A recorder that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, kind: str, **values: Any) -> None:
        self.records.append({"kind": kind, **values})


def evaluate(run_dir: Path, config: Config) -> list[dict[str, Any]]:
    """Return one record a stage: accuracy and loss of its exit on the held-out images, through the pipeline's own loop."""
    process.prepare_threads(config)
    checkpoint = checkpoint_of(run_dir)
    # Another data set may have fewer training images than the run took or held out, and none of them is looked at.
    config = configs.update(config, {"data.train_subset": None, "data.validation": 0})
    dataset = data.load(config.data, config.run.seed)
    config = _decided(config, dataset)
    data.check_labels(dataset, int(config.model.num_classes))
    job.check_images(config, dataset)
    stages = stages_of(config, checkpoint)
    todo = course(config, dataset)
    verdicts, pulse = _Verdicts(), Pulse()
    tools = Tools(Schedule(config.optim, max(todo.steps_per_epoch, 1)), pulse, verdicts, None)
    inbox: Any = Loader(dataset, todo.evaluation(checkpoint.step), config.run.seed, float("inf"))
    seats = []
    for stage in stages:
        sends = stage.plan.sends
        outbox = None if sends is None else MemoryChannel(sends, 1)
        seats.append(Seat(stage, inbox, outbox, tools, checkpoint.step))
        inbox = outbox
    Worker(seats, pulse).run()
    return [record for record in verdicts.records if record.get("split") == "test"]


def _decided(config: Config, dataset: Dataset) -> Config:
    """Return the configuration with what an override made `auto` again taken from the data set."""
    size = list(dataset.image[1:])
    found = {
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "image_size": size,
        "augment": dataset.augment,
    }
    return configs.update(
        config,
        {f"data.{key}": v for key, v in found.items() if getattr(config.data, key) == "auto"},
    )
