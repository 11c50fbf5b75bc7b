"""An ensemble of a run's exits: the classifiers of all stages, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localpipe.errors import UserError
from localpipe.methods.objective import LocalLoss
from localpipe.pipeline.stages.stage import Stage
from localpipe.tasks.task import Task, measure_batch

# How the exit of stage k is weighted, relative to the others. Nothing of it is published for the
# methods here: that probabilities, and not logits, are averaged is ours.
WEIGHTS = ("mean", "2^k")


def find_weight(name: str, stage: int) -> float:
    """Return the weight of a stage's exit, before all are divided by their sum.

    name: one of WEIGHTS. With `2^k` every exit weighs as much as those before it and one more.
    """
    assert name in WEIGHTS
    return 1.0 if name == "mean" else 2.0**stage


@dataclass(frozen=True)
class EnsembleResult:
    """What the ensemble reached: its weighting, the stages in it, and the figures of the task.

    figures: `loss` and the task's, None where the images have no labels.
    """

    weights: str
    stages: tuple[int, ...]
    figures: dict[str, float | None]

    def as_json(self) -> dict[str, Any]:
        """Return `weights`, `stages` and the figures."""
        return {"weights": self.weights, "stages": list(self.stages), **self.figures}


@dataclass
class ExitEnsemble:
    """Averages the class probabilities of all exits while stages of one process evaluate.

    Stages run in turn on every message, so one batch is held at a time. An exit that gives None is
    left out. The stages are observed, not changed: each of their exits calls this first.
    """

    stages: Sequence[Stage]
    weights: str
    _batch_sum: Tensor | None = field(default=None, init=False)
    _weight_sum: float = field(default=0.0, init=False)
    _members: set[int] = field(default_factory=set, init=False)
    _averages: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for stage in self.stages:
            _observe_exit(stage.objective, partial(self._add, stage.plan.stage))

    def _add(self, stage: int, outputs: Tensor | None) -> None:
        """Take the outputs of a stage for the current batch, (B, classes)."""
        if outputs is not None:
            weight = find_weight(self.weights, stage)
            weighted = weight * outputs.double().softmax(1)
            self._batch_sum = weighted if self._batch_sum is None else self._batch_sum + weighted
            self._weight_sum += weight
            self._members.add(stage)
        if stage == len(self.stages) - 1:
            assert self._batch_sum is not None, "the network's own head always has outputs"
            self._averages.append((self._batch_sum / self._weight_sum).float())
            self._batch_sum, self._weight_sum = None, 0.0

    def result(self, task: Task, targets: NDArray[Any] | None) -> EnsembleResult:
        """Return the figures over all samples so far.

        targets: (N, ...) in the order of the samples, or None without labels. Raises UserError
        where no stage but the last has an exit.
        """
        members = tuple(sorted(self._members))
        if len(members) < 2:
            raise UserError(
                "eval: --ensemble averages the exits of the stages, but no stage before the last "
                "one has an exit that was trained; leave it out"
            )
        figures: dict[str, float | None] = dict.fromkeys(("loss", *task.figures))
        if targets is not None:
            # The logarithm of probabilities is a logit of them.
            logits = torch.cat(self._averages).clamp_min(torch.finfo(torch.float32).tiny).log()
            sums = measure_batch(task, logits, torch.from_numpy(np.ascontiguousarray(targets)))
            figures["loss"] = float(sums["loss"]) / len(logits)
            figures.update(task.summarise(sums, len(logits)))
        return EnsembleResult(self.weights, members, figures)


def _observe_exit(objective: LocalLoss, observe: Any) -> None:
    """Let an objective's `exit` hand what it gives to a function, before it returns it."""
    original = objective.exit

    def exit(*inputs: Tensor) -> Tensor | None:
        outputs = original(*inputs)
        observe(outputs)
        return outputs

    setattr(objective, "exit", exit)  # noqa: B010 - it takes what any exit takes
