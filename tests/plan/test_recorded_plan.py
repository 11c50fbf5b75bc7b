"""Plans of networks with layouts, orders in memory and several tensors at a cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.trial import find_untrained, try_stages
from localpipe.plan.cluster.block_costs import measure_blocks
from localpipe.plan.costs import StageCost, count_costs
from localpipe.plan.measure_worker import PieceSteps
from localpipe.plan.notes import auxiliary_notes, untrained_notes
from localpipe.plan.tables import describe_crossings, plan_json
from tests.hand_made import NAMES, settings
from tests.harness import train_here

pytestmark = pytest.mark.usefixtures("hand_made")

GREEDY = {"objective": {"name": "greedy"}}


def configure(folder: Path, name: str, **sections: Any) -> Resolved:
    return settings(folder / "run", name, **{"method": GREEDY, **sections})


def costs_of(config: Resolved) -> list[StageCost]:
    return count_costs(*build_plans(config), config)


def crossings(config: Resolved) -> list[str]:
    return describe_crossings(build_plans(config)[1])


def test_a_layout_is_shown_where_the_shape_does_not_say_it(tmp_path: Path) -> None:
    assert crossings(configure(tmp_path, "hand_hwc"))[0] == (
        "0 -> 1: h.0 4x4x8 float32 hwc, target int64 (0.5 KiB a sample)"
    )
    assert "h.0 8x64 float32 ct," in crossings(configure(tmp_path, "hand_sequence"))[0]
    assert "h.0 16x4x4 float32," in crossings(configure(tmp_path, "hand_permuted"))[0]


def test_companions_are_shown(tmp_path: Path) -> None:
    assert crossings(configure(tmp_path, "hand_skips"))[1] == (
        "1 -> 2: h.1 16x2x2 float32, h.1.1 8x8x8 float32, h.1.2 16x2x2 int64, h.1.3 16x2x2 bool, "
        "target int64 (2.8 KiB a sample)"
    )


def test_json_has_layouts_and_orders_only_where_they_are_not_plain(tmp_path: Path) -> None:
    def first_field(name: str) -> dict[str, Any]:
        config = configure(tmp_path, name)
        _, plans = build_plans(config)
        field: dict[str, Any] = plan_json(plans, costs_of(config))["stages"][0]["sends"][0]
        return field

    plain = {"name": "h.0", "dtype": "float32"}
    assert first_field("hand_hwc") == {**plain, "shape": (4, 4, 8), "layout": "hwc"}
    assert first_field("hand_permuted") == {**plain, "shape": (16, 4, 4), "order": (1, 2, 0)}
    assert first_field("hand_skips") == {**plain, "shape": (8, 4, 4)}


@pytest.mark.parametrize("name", NAMES)
def test_costs_do_not_depend_on_the_cut(tmp_path: Path, name: str) -> None:
    totals = []
    for stages in (1, 4):
        costs = costs_of(configure(tmp_path, name, pipeline={"stages": stages}))
        totals.append((sum(c.params for c in costs), sum(c.macs for c in costs)))
    assert totals[0] == totals[1] and totals[0][1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_saves_bytes(tmp_path: Path, name: str) -> None:
    peaks = []
    for checkpointing in ("none", "block"):
        sections = {"pipeline": {"stages": 1}, "run": {"checkpointing": checkpointing}}
        (cost,) = costs_of(configure(tmp_path, name, **sections))
        peaks.append(cost.activation_bytes_per_sample)
    assert 0 < peaks[1] < peaks[0]


@pytest.mark.parametrize("name", NAMES)
def test_cuts_are_balanced_by_memory(tmp_path: Path, name: str) -> None:
    sections = {"pipeline": {"stages": 3, "cuts": "memory"}}
    cuts = configure(tmp_path, name, **sections).pipeline.cuts
    assert isinstance(cuts, tuple) and len(cuts) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_forecast_counts_the_blocks(tmp_path: Path, name: str) -> None:
    blueprint, _ = build_plans(configure(tmp_path, name))
    outputs = [cost.outputs for cost in measure_blocks(blueprint)]
    assert len(outputs) == len(blueprint.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_every_piece_is_measured(tmp_path: Path, name: str) -> None:
    config = configure(tmp_path, name, run={"probe": "linear"})
    steps = PieceSteps(config, "cpu")
    count = steps.pieces.blocks
    assert steps.lead(0, 0)() > 0
    assert all(steps.block(index)() > 0 for index in range(1, count))
    assert all(steps.loss(1, 4, last)() > 0 for last in range(1, count - 2))
    # The network's own head, twice: no step frees what the next one needs.
    step = steps.loss(3, 4, count - 1)
    assert step() > 0 and step() > 0


def test_a_parameter_that_no_loss_reaches_is_refused(tmp_path: Path) -> None:
    config = configure(tmp_path, "hand_unreached")
    blueprint, plans = build_plans(config)
    with pytest.raises(UserError) as caught:
        try_stages(config, blueprint, plans)
    text = str(caught.value)
    assert "b0.side.weight and 1 more of stage 0" in text and "\n" not in text
    assert "model.freeze" in text and "model.crossing_untrained=allow" in text


def test_a_cut_elsewhere_reaches_every_parameter(tmp_path: Path) -> None:
    config = configure(tmp_path, "hand_unreached", pipeline={"cuts": [1, 2], "stages": 3})
    assert len(try_stages(config, *build_plans(config))) == 3


def test_frozen_parameters_may_stay_unreached(tmp_path: Path) -> None:
    config = configure(tmp_path, "hand_unreached")
    blueprint, plans = build_plans(config)
    stage = Stage(plans[0], blueprint, config, "meta")
    assert find_untrained(stage) == ["b0.side.weight", "b0.side.bias"]
    for parameter in stage.blocks[0].side.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    assert find_untrained(stage) == []


def test_an_unreached_parameter_that_is_allowed_stays_as_it_was(tmp_path: Path) -> None:
    model = {"name": "hand_unreached", "crossing_untrained": "allow"}
    config = configure(tmp_path, "hand_unreached", model=model)
    stages = try_stages(config, *build_plans(config))
    assert untrained_notes(stages) == [
        "note: no local loss reaches b0.side.weight and 1 more of stage 0; "
        "they stay as they were initialised"
    ]
    first = train_here(config)[0].weights()
    initial = Stage(first_plan(config), build_plans(config)[0], config).weights()
    assert torch.equal(first["b0.side.weight"], initial["b0.side.weight"])
    assert not torch.equal(first["b0.conv.weight"], initial["b0.conv.weight"])


def first_plan(config: Resolved) -> Any:
    return build_plans(config)[1][0]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_these_networks_is_reached(tmp_path: Path, name: str) -> None:
    config = configure(tmp_path, name)
    assert untrained_notes(try_stages(config, *build_plans(config))) == []


def notes_of(config: Resolved) -> list[str]:
    blueprint, plans = build_plans(config)
    return auxiliary_notes(config, blueprint, plans, count_costs(blueprint, plans, config))


def test_auxiliary_networks_larger_than_the_network_are_noted(tmp_path: Path) -> None:
    method = {"objective": {"name": "dgl", "head": "1c3f"}}
    (note,) = notes_of(configure(tmp_path, "hand_unreached", method=method))
    assert note == (
        "note: the auxiliary network of stage 0 has 21,162 parameters, more than the whole "
        "network's 2,098, as at 2 more stages; method.objective.head=2c2f has 6,986"
    )


def test_smaller_auxiliary_networks_are_not_noted(tmp_path: Path) -> None:
    assert notes_of(configure(tmp_path, "hand_permuted")) == []


def test_an_objective_without_heads_is_compared_with_greedy(tmp_path: Path) -> None:
    method = {"objective": {"name": "infopro"}}
    config = configure(tmp_path, "hand_hwc", method=method)
    blueprint, plans = build_plans(config)
    costs = [replace(cost, params=1) for cost in count_costs(blueprint, plans, config)]
    (note,) = auxiliary_notes(config, blueprint, plans, costs)
    assert "method.objective.head=" in note
    config = configure(tmp_path, "hand_hwc", method={"objective": {"name": "predsim"}})
    costs = [replace(cost, params=1) for cost in count_costs(blueprint, plans, config)]
    (note,) = auxiliary_notes(config, blueprint, plans, costs)
    assert "method.objective.name=greedy has" in note
