"""Cluster files, placement by links, and the counts that a forecast rests on."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.cluster.block_costs import balance_blocks, measure_blocks
from localpipe.plan.cluster.machines import load_cluster
from localpipe.plan.costs import count_costs
from localpipe.plan.memory import parameter_memory, worker_memory
from tests import ROOT
from tests.harness import resolved

CLUSTERS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))

TWO: dict[str, Any] = {
    "name": "two",
    "devices": {"gpu": {"memory_bytes": 16e9, "flop_per_s": {"fp32": 1e13}, "achievable": 0.5}},
    "wires": {
        "bus": {"bytes_per_s": 1e10, "latency_s": 1e-5},
        "net": {"bytes_per_s": 1e9, "latency_s": 1e-4},
    },
    "nodes": {
        "a": {"device": "gpu", "count": 2, "wire": "bus"},
        "b": {"device": "gpu", "count": 2, "wire": "bus"},
    },
    "links": [{"between": ["a", "b"], "wire": "net"}],
}


def changed(**parts: Any) -> dict[str, Any]:
    return {**TWO, **parts}


def written(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_shipped_cluster_is_read_and_joined_and_says_where_its_figures_come_from(
    path: Path,
) -> None:
    found = load_cluster(path)
    devices = found.all_devices
    assert len(devices) >= 4
    pairs = itertools.combinations(devices, 2)
    assert all(found.find_link(a, b) is not None for a, b in pairs)
    assert all({"fp32", "bf16"} == set(spec.flop_per_s) for spec in found.devices.values())
    comments = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "ASSUMED" in comments
    assert (
        "achievable" in comments and "memory, peaks" in comments
    ) or "devices, nvlink, mtbf: as in" in comments


def test_the_devices_of_a_node_are_neighbours_and_copies_have_numbers(tmp_path: Path) -> None:
    nodes = {
        "rack": {"device": "gpu", "count": 2, "wire": "bus", "copies": 2},
        "desk": {"device": "gpu"},
    }
    found = load_cluster(
        written(
            tmp_path, changed(nodes=nodes, links=[{"between": ["rack", "rack"], "wire": "net"}])
        )
    )
    devices = found.all_devices
    assert [device.machine for device in devices] == [
        "rack.0",
        "rack.0",
        "rack.1",
        "rack.1",
        "desk",
    ]
    assert found.find_link_name(devices[0], devices[1]) == "bus"
    assert found.find_link_name(devices[1], devices[2]) == "net"
    assert found.find_link(devices[3], devices[4]) is None


def test_a_pairs_own_link_goes_before_the_one_between_all(tmp_path: Path) -> None:
    links = [{"between": "all", "wire": "net"}, {"between": ["b", "a"], "wire": "bus"}]
    found = load_cluster(written(tmp_path, changed(links=links)))
    assert found.find_link_name(found.all_devices[0], found.all_devices[3]) == "bus"


GPU = TWO["devices"]["gpu"]
MISTAKES: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], "must be a mapping"),
    "missing part": ({"name": "x"}, "devices is missing"),
    "unknown key": (changed(link=[]), "did you mean links?"),
    "unknown key of a device": (
        changed(devices={"gpu": {**GPU, "memory": 1}}),
        "did you mean devices.gpu.memory_bytes?",
    ),
    "unknown precision": (
        changed(devices={"gpu": {**GPU, "flop_per_s": {"fp8": 1.0}}}),
        "flop_per_s.fp8",
    ),
    "a share above 1": (
        changed(devices={"gpu": {**GPU, "achievable": 1.5}}),
        "devices.gpu.achievable must be less than",
    ),
    "no memory": (
        changed(devices={"gpu": {**GPU, "memory_bytes": 0}}),
        "devices.gpu.memory_bytes must be greater than 0",
    ),
    "a text for a number": (
        changed(restart_s="soon"),
        "restart_s must be a valid number; got 'soon'",
    ),
    "unknown device": (changed(nodes={"a": {"device": "gpo"}}), "did you mean gpu?"),
    "unknown wire": (changed(links=[{"between": "all", "wire": "nett"}]), "did you mean net?"),
    "unknown node": (
        changed(links=[{"between": ["a", "c"], "wire": "net"}]),
        "links.0.between names 'c'",
    ),
    "a link of one end": (changed(links=[{"between": ["a"], "wire": "net"}]), "links.0.between"),
    "no nodes": (changed(nodes={}), "nodes must"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_cluster_is_one_line_with_its_key(mistake: str, tmp_path: Path) -> None:
    data, message = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        load_cluster(written(tmp_path, data))
    assert (
        message in str(caught.value)
        and "\n" not in str(caught.value)
        and str(caught.value).startswith("cluster: ")
    )


def test_a_cluster_that_is_not_there_or_no_yaml_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cluster: cannot read"):
        load_cluster(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="cluster: .* is not YAML"):
        load_cluster(tmp_path / "bad.yaml")


# -- the counts ------------------------------------------------------------------------------------


def settings(stages: int = 1, **optim: Any) -> Resolved:
    data = {
        "name": "synthetic",
        "image_size": 32,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "batch_size": 100,
    }
    sections = {
        "model": {"name": "resnet20", "num_classes": 10},
        "method": "dgl",
        "data": data,
        "optim": optim,
    }
    return resolved({**sections, "pipeline": {"stages": stages, "depth": 3}})


def test_the_blocks_of_the_backbone_add_up_to_the_network_end_to_end() -> None:
    blueprint, plans = build_plans(settings())
    (whole,) = count_costs(blueprint, plans, settings())
    blocks = measure_blocks(blueprint)
    assert len(blocks) == len(blueprint.blocks)
    assert sum(block.params for block in blocks) == whole.params
    assert sum(block.macs for block in blocks) == whole.macs
    assert sum(block.train_macs for block in blocks) == whole.train_macs
    assert sum(block.saved_bytes for block in blocks) == pytest.approx(
        whole.activation_bytes_per_sample, rel=1e-3
    )
    assert blocks[0].outputs == 16 * 32 * 32 and blocks[-1].outputs == 64 * 8 * 8


def test_a_balanced_cut_has_the_smallest_worst_stage_or_edge() -> None:
    rng = random.Random(0)
    for _ in range(100):
        blocks = rng.randint(2, 9)
        stages = rng.randint(1, blocks)
        seconds = [float(rng.randint(1, 9)) for _ in range(blocks)]
        edges = [float(rng.choice([0, 0, 8, 20])) for _ in range(blocks)]

        def worst(
            cuts: tuple[int, ...], seconds: list[float] = seconds, edges: list[float] = edges
        ) -> float:
            starts = [0, *(cut + 1 for cut in cuts)]
            parts = [
                sum(seconds[a:b]) for a, b in zip(starts, [*starts[1:], len(seconds)], strict=True)
            ]
            return max([*parts, *(edges[cut] for cut in cuts)])

        best = min(worst(cuts) for cuts in itertools.combinations(range(blocks - 1), stages - 1))
        found = balance_blocks(seconds, edges, stages)
        assert len(found) == stages - 1 and worst(found) == best


def test_memory_is_counted_by_kind() -> None:
    resolved = settings(3)
    blueprint, plans = build_plans(resolved)
    costs = count_costs(blueprint, plans, resolved)
    one = worker_memory(plans[1:2], costs[1:2], resolved)
    params = costs[1].params + costs[1].aux_params
    assert (one.weights_bytes, one.gradients_bytes, one.optimizer_bytes) == (4 * params,) * 3
    assert one.activations_bytes == 100 * costs[1].activation_bytes_per_sample
    receives, sends = plans[1].receives, plans[1].sends
    assert receives is not None and sends is not None
    incoming, outgoing = receives.nbytes, sends.nbytes
    assert one.buffers_bytes == 2 * incoming + 3 * outgoing
    assert one.total_bytes == 3 * 4 * params + one.activations_bytes + one.buffers_bytes
    both = worker_memory(plans[1:], costs[1:], resolved)
    assert both.activations_bytes == max(
        one.activations_bytes, 100 * costs[2].activation_bytes_per_sample
    )
    assert both.buffers_bytes == 2 * incoming + 4 * outgoing
    assert (
        worker_memory(plans[1:2], costs[1:2], resolved, replicas=2).activations_bytes * 2
        == one.activations_bytes
    )


def test_the_optimizers_state_is_counted() -> None:
    assert parameter_memory(10, settings(name="adamw")).optimizer_bytes == 80
    assert parameter_memory(10, settings(momentum=0.0, nesterov=False)).optimizer_bytes == 0
