"""Published counts of the methods on the CIFAR networks: parameters, MACs, saved bytes."""

from __future__ import annotations

from typing import Any

import pytest

from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.costs import StageCost, count_costs
from tests.harness import resolved

INFOPRO = {
    "objective": {
        "name": "infopro",
        "task": "contrast",
        "image_weight": [5, 1],
        "task_weight": [1, 1],
    }
}


def costs(
    network: str, stages: int, method: Any, cuts: Any = "equal", **sections: Any
) -> list[StageCost]:
    """Return the costs of every stage at 32x32 inputs and 10 classes."""
    data = {"name": "synthetic", "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    sections = {
        "model": {"name": network, "num_classes": 10},
        "method": method,
        "data": data,
        **sections,
    }
    config = resolved({**sections, "pipeline": {"stages": stages, "cuts": cuts}})
    return count_costs(*build_plans(config), config)


def total(found: list[StageCost], what: str) -> int:
    return sum(getattr(cost, what) for cost in found)


def kib(found: list[StageCost]) -> float:
    return max(cost.activation_bytes_per_sample for cost in found) / 1024


@pytest.mark.parametrize(
    ("stages", "overhead", "saved"),
    [(2, 7.3, 1991), (3, 12.1, 1670), (4, 26.3, 1158), (8, 57.3, 826), (16, 122, 570)],
)
def test_infopro_on_resnet32_costs_what_was_published(
    stages: int, overhead: float, saved: float
) -> None:
    found = costs("resnet32", stages, INFOPRO)
    assert 100 * total(found, "aux_macs") / total(found, "macs") == pytest.approx(
        overhead, rel=0.01
    )
    assert kib(found) == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize(
    ("cuts", "overhead", "saved"),
    [([15], 1.3, 4337), ([10, 21], 3.3, 3121), ([7, 15, 27], 4.6, 2362)],
)
def test_infopro_on_resnet110_at_balanced_cuts_costs_what_was_published(
    cuts: list[int], overhead: float, saved: float
) -> None:
    found = costs("resnet110", len(cuts) + 1, INFOPRO, cuts)
    assert 100 * total(found, "aux_macs") / total(found, "macs") == pytest.approx(
        overhead, rel=0.01
    )
    assert kib(found) == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize(
    ("mode", "stages", "parameters", "macs", "saved"),
    [
        ("E", 2, 3_912, 5.6, 1741), ("E", 4, 13_512, 19.4, 1133),
        ("E", 8, 29_160, 41.8, 877), ("E", 16, 62_232, 89.1, 733),
        ("R1", 2, 192, None, 1741), ("R1", 4, 2_944, None, 1037),
        ("R1", 8, 8_960, 3.1, 833), ("R1", 16, 21_808, 6.1, 577),
        ("R1E", 4, 16_360, 20.9, 1213), ("R1E", 8, 38_024, 44.8, 1069),
        ("R1E", 16, 83_944, 95.2, 893),
        ("R16", 16, 136_784, 88.4, 5004),
    ],
)  # fmt: skip
def test_a_context_costs_what_was_published(
    mode: str, stages: int, parameters: int, macs: float | None, saved: float
) -> None:
    found = costs(
        "resnet32",
        stages,
        {"objective": {"name": "dgl", "head": "1c2f"}, "context": {"mode": mode}},
    )
    assert total(found, "context_params") == parameters
    if macs is not None:
        assert 100 * total(found, "context_macs") / total(found, "macs") == pytest.approx(
            macs, rel=0.01
        )
    assert kib(found) == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize(
    ("network", "stages", "cuts", "depth", "parameters"),
    [
        ("resnet32", 13, "layerwise", 3, 1_511_608),
        ("resnet32", 11, "layerwise", 5, 1_684_388),
        ("resnet110", 49, "layerwise", 6, 12_466_400),
        ("resnet32", 8, "equal", 3, 947_206),
        ("resnet32", 4, "equal", 3, 427_870),
    ],
)
def test_auglocal_has_the_published_auxiliary_parameters(
    network: str, stages: int, cuts: str, depth: int, parameters: int
) -> None:
    found = costs(
        network,
        stages,
        {"objective": {"name": "auglocal", "aux_depth": depth, "pyramid": 0.5}},
        cuts,
    )
    assert total(found, "aux_params") == parameters


@pytest.mark.parametrize(("stages", "parameters"), [(16, 284_310), (8, 134_982)])
def test_predsim_has_the_published_auxiliary_parameters(stages: int, parameters: int) -> None:
    assert total(costs("resnet32", stages, "predsim"), "aux_params") == parameters


def test_a_built_term_counts_although_its_weight_is_0_and_one_that_is_nowhere_does_not() -> None:
    def infopro(image: list[float], task: list[float]) -> list[StageCost]:
        objective = {"name": "infopro", "image_weight": image, "task_weight": task}
        return costs("resnet20", 4, {"objective": objective})

    head_alone = total(
        costs("resnet20", 4, {"objective": {"name": "dgl", "head": "1c2f"}}), "aux_params"
    )
    both = total(infopro([5, 1], [1, 1]), "aux_params")
    assert total(infopro([5, 0], [0, 1]), "aux_params") == both
    assert total(infopro([0, 0], [1, 1]), "aux_params") == head_alone < both


def test_a_reconciled_stage_without_parameters_is_counted() -> None:
    # Its output has no graph of its own, and its gradient is sent.
    model = {"name": "chain", "num_classes": 10, "args": {"message_bytes": 4096, "blocks": 3}}
    config = resolved(
        {
            "model": model,
            "method": {"reconcile": {"distance": "cosine"}},
            "pipeline": {"stages": 3},
            "data": {"batch_size": 8},
        }
    )
    costs = count_costs(*build_plans(config), config)
    assert [cost.params for cost in costs[:2]] == [0, 0]
