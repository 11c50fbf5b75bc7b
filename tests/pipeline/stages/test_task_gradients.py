"""The gradient of a step on masks and numbers: the same for any split of its rows, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe.config.resolved import Resolved
from localpipe.pipeline.channels.message import Flag, Header, Kind, Message
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.steps import StepSchedule
from tests.harness import settings

ROWS = 8
SIZE = 8
METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"objective": {"name": "greedy"}},
    "auglocal": {"objective": {"name": "auglocal", "aux_depth": 2, "aux_min_depth": 2}},
    "l2": {"objective": {"name": "greedy"}, "reconcile": {"distance": "l2"}},
    "cosine": {"objective": {"name": "greedy"}, "reconcile": {"distance": "cosine"}},
}
TASKS: list[tuple[str, dict[str, Any], str]] = [
    ("shapes", {"average": "all"}, "places"),
    ("shapes", {"average": "valid"}, "places"),
    ("areas", {"loss": "huber"}, "plain"),
]
CASES = [
    (task, method) for task in TASKS for method in METHODS if (task[0], method) != ("areas", "l2")
]
# Pixels of every sample that have no class. The cosine leaves samples without a gradient out.
IGNORED = (0, SIZE * SIZE, 1, 60, 0, 63, 30, 8)


def configured(
    folder: Path, name: str, task: dict[str, Any], network: str, method: str
) -> Resolved:
    return settings(
        folder,
        model={"name": f"tests.sample_networks:{network}"},
        data={"name": name, "image_size": SIZE, "augment": "none"},
        task=task,
        method=METHODS[method],
        pipeline={"stages": 3},
    )


def draw_fields(stage: Stage, is_cosine: bool) -> dict[str, torch.Tensor]:
    """Return the fields of a message in float64. One sample in two has hardly a valid pixel."""
    generator = torch.Generator().manual_seed(0)
    fields = {}
    for field in stage.plan.receives.fields:
        shape = (ROWS, *field.shape)
        if field.dtype == "uint8":
            high = stage.task.num_classes if field.name == "target" else 256
            fields[field.name] = torch.randint(0, high, shape, generator=generator).byte()
        else:
            fields[field.name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    if stage.task.reads == "place":
        target = fields["target"].flatten(1)
        for row, ignored in enumerate(IGNORED):
            if ignored == SIZE * SIZE and is_cosine:
                ignored -= 1
            target[row, :ignored] = 255
    return fields


def sum_gradients(
    config: Resolved, position: int, schedules: Sequence[StepSchedule]
) -> dict[str, torch.Tensor]:
    """Return the sum over replicas of the gradients of a stage after the first step."""
    sums: dict[str, torch.Tensor] = {}
    for replica, schedule in enumerate(schedules):
        blueprint, plans = build_plans(config)
        stage = Stage(plans[position], blueprint, config)
        for module in (stage.blocks, stage.objective, stage.entry):
            module.double()
        fields = draw_fields(stage, config.method.reconcile.distance == "cosine")
        for header, rows in schedule.headers(0, replica):
            if header.kind is Kind.TRAIN:
                add_gradients(stage, header, {name: fields[name][rows] for name in fields})
        for name, parameter in zip(stage.weights(), stage.parameters(), strict=True):
            assert parameter.grad is not None and parameter.grad.dtype == torch.float64
            sums[name] = sums.get(name, 0) + parameter.grad
    return sums


def add_gradients(stage: Stage, header: Header, fields: dict[str, torch.Tensor]) -> None:
    """Run a message's step, without the update of the weights."""
    values = {**vars(header), "flags": Flag.MORE}
    message = Message(Header(**values), fields)
    h = stage.forward(message)
    loss = stage.local_loss(message, h)
    stage.update(stage.add_distance(loss, message), message, 0.0)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(("case", "method"), CASES, ids=str)
def test_replicas_and_accumulated_messages_give_the_gradient_of_the_batch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[str, dict[str, Any], str],
    method: str,
    position: int,
) -> None:
    # Losses and boundaries convert to fp32, whose rounding would hide what is wrong.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = configured(tmp_path, *case, method)
    whole = sum_gradients(config, position, [StepSchedule(ROWS, 2, ROWS, 1)])
    replicas = StepSchedule(ROWS, 2, ROWS, 1, replicas=2, widest=2)
    accumulated = StepSchedule(ROWS, 2, ROWS, 1, accumulate=4)
    for schedules in ([replicas, replicas], [accumulated]):
        parts = sum_gradients(config, position, schedules)
        for key, gradient in whole.items():
            assert gradient.any(), key
            torch.testing.assert_close(parts[key], gradient, atol=1e-10, rtol=1e-10)
