"""The benchmark on networks with layouts, orders in memory and several tensors at a cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from localpipe.bench.peer_cuts import has_companions
from localpipe.bench.request import choose_cut
from localpipe.bench.systems.part import Part
from localpipe.bench.systems.spec import SystemRequest
from localpipe.pipeline.stages.boundary import build_entry
from localpipe.pipeline.stages.stage import Stage, TailLoss
from localpipe.pipeline.stages.stage_plan import build_plans
from tests.hand_made import NAMES, settings

pytestmark = pytest.mark.usefixtures("hand_made")


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_end_to_end_training_has_the_networks_own_gradients(
    tmp_path: Path, name: str, segments: int
) -> None:
    """One stage is plain back-propagation, which the peer computes too."""
    config = settings(tmp_path / "run", name, pipeline={"stages": 1, "processes": 1})
    blueprint, (plan,) = build_plans(config)
    stage = Stage(plan, blueprint, config)
    assert isinstance(stage.objective, TailLoss)
    part = Part(blueprint, 0, len(blueprint.blocks) - 1, config)
    part.segments = segments
    image = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    target = torch.arange(8)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        blueprint.task.loss(part(build_entry(config)(image)), target).backward()
        torch.manual_seed(1)
        activation = stage.blocks(stage.entry(image))
        h, *companions = activation if isinstance(activation, tuple) else (activation,)
        blueprint.task.loss(stage.objective.exit(h, *companions), target).backward()
    gradients = [parameter.grad for parameter in part.parameters()]
    for gradient, parameter in zip(gradients, stage.parameters(), strict=True):
        assert gradient is not None and parameter.grad is not None
        assert torch.equal(gradient, parameter.grad)


def test_a_pipeline_of_micro_batches_has_a_note_where_blocks_give_several_tensors(
    tmp_path: Path,
) -> None:
    config = settings(tmp_path / "run", "hand_skips", pipeline={"stages": 2, "processes": 2})
    blueprint, _ = build_plans(config)
    assert has_companions(blueprint)
    checked = choose_cut(SystemRequest("gpipe", 4), config, {})
    assert checked.note == "blocks give several tensors, and its stages send one"


@pytest.mark.parametrize("name", ["hand_hwc", "hand_permuted"])
def test_other_networks_have_pipelines(tmp_path: Path, name: str) -> None:
    blueprint, _ = build_plans(settings(tmp_path / "run", name))
    assert not has_companions(blueprint)
