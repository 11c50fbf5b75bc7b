"""The axes, freely combined.

One result for any number of processes, isolation, and which tensors cross a boundary.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe.config.keys import Config
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.methods.context import context_sources
from localpipe.pipeline.channels.channel import MemoryChannel
from localpipe.pipeline.channels.message import Message
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.notes import plan_notes
from tests.harness import digests, settings
from tests.pipeline.stages.test_stage import batch, stages_of

OBJECTIVES: dict[str, dict[str, Any]] = {
    "greedy": {"name": "greedy"},
    "dgl": {"name": "dgl"},
    "dgl-1c2f": {"name": "dgl", "head": "1c2f"},
    "predsim": {"name": "predsim"},
    "infopro": {
        "name": "infopro",
        "task": "softmax",
        "image_weight": [5, 1],
        "task_weight": [0.5, 1],
    },
    "infopro-contrast": {
        "name": "infopro",
        "task": "contrast",
        "image_weight": [5, 0],
        "task_weight": [0, 2],
    },
    "auglocal": {"name": "auglocal", "aux_depth": 2},
}
CONTEXTS = ["none", "E", "R1", "R1E"]
RECONCILES = ["none", "cosine"]
COMBINATIONS = list(product(OBJECTIVES, CONTEXTS, RECONCILES))


def combined(folder: Path, objective: str, mode: str, distance: str, **sections: Any) -> Resolved:
    method = {
        "objective": OBJECTIVES[objective],
        "context": {"mode": mode},
        "reconcile": {"distance": distance},
    }
    sections = {
        "model": {"name": "resnet8"},
        "data": {"samples": 32},
        "optim": {"epochs": 1},
        **sections,
    }
    sections["data"] = {"samples": 32, "batch_size": 16, **sections["data"]}
    return settings(folder / "run", method=method, **sections)


def test_every_combination_gives_one_digest_on_1_2_and_4_processes(tmp_path: Path) -> None:
    def jobs(processes: int) -> list[Config]:
        pipeline = {"stages": 4, "processes": processes, "depth": processes}
        every = [
            combined(tmp_path / f"{i}-{processes}", *axes, pipeline=pipeline)
            for i, axes in enumerate(COMBINATIONS)
        ]
        # The tests' own network has dropout, in-place layers after boundaries, and blocks that
        # cannot be rebuilt.
        own = combined(
            tmp_path / f"own-{processes}",
            "auglocal",
            "R1E",
            "cosine",
            pipeline=pipeline,
            model={"name": "tests.sample_networks:small"},
        )
        deep = combined(
            tmp_path / f"deep-{processes}", "infopro", "R16", "cosine", pipeline=pipeline
        )
        both = combined(tmp_path / f"both-{processes}", "dgl", "R2E", "l2", pipeline=pipeline)
        return [*every, own, deep, both]

    found = {
        processes: digests(jobs(processes), processes, tmp_path / f"all-{processes}")
        for processes in (1, 2, 4)
    }
    names = ["+".join(axes) for axes in COMBINATIONS] + ["own", "deep", "both"]
    assert [
        name for name, one, two in zip(names, found[1], found[2], strict=True) if one != two
    ] == []
    assert [
        name for name, one, four in zip(names, found[1], found[4], strict=True) if one != four
    ] == []
    assert len(set(found[1])) == len(names), "two combinations computed the same"


@pytest.mark.parametrize("axes", COMBINATIONS, ids="+".join)
def test_the_loss_of_a_stage_moves_its_own_parameters_alone(
    tmp_path: Path, axes: tuple[str, str, str]
) -> None:
    check_isolation(combined(tmp_path, *axes))


def check_isolation(resolved: Resolved) -> None:
    """Take one step through all stages, and check that gradients stay inside each stage."""
    stages = stages_of(resolved)
    message = batch(resolved)
    for own, stage in enumerate(stages):
        h = stage.forward(message)
        loss = stage.local_loss(message, h)
        gradient = stage.boundary_gradient(loss, h) if stage.sends_gradient else None
        stage.add_distance(loss, message).backward()
        for other, neighbour in enumerate(stages):
            touched = [p for p in neighbour.parameters() if p.grad is not None]
            assert bool(touched) == (other == own), (
                f"loss of stage {own}, parameters of stage {other}"
            )
        if stage.adapter is not None:
            assert all(
                p.grad is not None and p.grad.isfinite().all() for p in stage.adapter.parameters()
            )
        for parameter in stage.parameters():
            parameter.grad = None
        outgoing = stage.outgoing(message, h, gradient)
        assert not any(tensor.requires_grad for tensor in outgoing.values())
        if stage.plan.sends is not None:
            channel = MemoryChannel(stage.plan.sends, 1)
            channel.send(message.header, outgoing)
            message = channel.receive()


def crossing(
    folder: Path, objective: str, mode: str, distance: str, stages: int = 4
) -> list[list[str]]:
    resolved = combined(folder, objective, mode, distance, pipeline={"stages": stages})
    _, plans = build_plans(resolved)
    return [[field.name for field in plan.sends.fields] for plan in plans if plan.sends is not None]


def test_a_stage_passes_on_only_what_a_later_stage_reads(tmp_path: Path) -> None:
    assert crossing(tmp_path, "dgl", "none", "none") == [
        ["h.0", "target"],
        ["h.1", "target"],
        ["h.2", "target"],
    ]
    with_image = [
        ["h.0", "target", "image"],
        ["h.1", "target", "image"],
        ["h.2", "target", "image"],
    ]
    assert crossing(tmp_path, "dgl", "E", "none") == with_image
    r1 = [["h.0", "target", "image"], ["h.1", "target", "ctx.0"], ["h.2", "target", "ctx.1"]]
    assert crossing(tmp_path, "dgl", "R1", "none") == r1
    r2 = [
        ["h.0", "target", "image"],
        ["h.1", "target", "image", "ctx.0"],
        ["h.2", "target", "ctx.0", "ctx.1"],
    ]
    assert crossing(tmp_path, "dgl", "R2", "none") == r2
    # The reconstruction of the last local stage has weight 0, and the last stage needs no image.
    infopro = [["h.0", "target", "image"], ["h.1", "target"], ["h.2", "target"]]
    assert crossing(tmp_path, "infopro-contrast", "none", "none") == infopro
    sgr = [["h.0", "target", "grad.0"], ["h.1", "target", "grad.1"], ["h.2", "target", "grad.2"]]
    assert crossing(tmp_path, "dgl", "none", "cosine") == sgr


@pytest.mark.parametrize(
    ("mode", "stage", "expected"),
    [
        ("R1", 1, ["r_image"]),
        ("R1", 3, ["r_ctx_1"]),
        ("R1E", 1, ["e_image"]),
        ("R1E", 3, ["r_ctx_1", "e_image"]),
        ("R4", 3, ["r_ctx_1", "r_ctx_0", "r_image"]),
        ("R2E", 4, ["r_ctx_2", "r_ctx_1", "e_image"]),
        ("E", 0, []),
    ],
)
def test_the_sources_of_a_context(mode: str, stage: int, expected: list[str]) -> None:
    assert [source.name for source in context_sources(mode, stage)] == expected


def test_weight_0_is_no_reconciliation_to_the_bit(tmp_path: Path) -> None:
    def with_reconcile(folder: str, reconcile: dict[str, Any]) -> Resolved:
        method = {"objective": {"name": "dgl"}, "reconcile": reconcile}
        return settings(
            tmp_path / folder,
            method=method,
            model={"name": "resnet8"},
            data={"samples": 32},
            optim={"epochs": 1},
        )

    reconciles: list[dict[str, Any]] = [
        {"distance": "none"},
        {"distance": "cosine", "weight": 0},
        {"distance": "cosine", "weight": 0.5},
    ]
    none, zero, half = digests(
        [with_reconcile(str(i), r) for i, r in enumerate(reconciles)], 1, tmp_path / "all"
    )
    assert none == zero != half


def test_the_probe_changes_no_other_weight(tmp_path: Path) -> None:
    jobs = [
        combined(tmp_path / probe, "dgl", "E", "none", run={"probe": probe})
        for probe in ("none", "linear")
    ]
    without, with_probe = digests(jobs, 1, tmp_path / "all")
    assert without == with_probe


def test_one_stage_says_which_axes_change_nothing(tmp_path: Path) -> None:
    note = (
        "note: one stage has no neighbour; "
        "method.reconcile cosine and method.context R1E change nothing"
    )
    assert plan_notes(combined(tmp_path, "dgl", "R1E", "cosine", pipeline={"stages": 1})) == [note]
    assert plan_notes(combined(tmp_path, "dgl", "none", "none", pipeline={"stages": 1})) == []
    assert plan_notes(combined(tmp_path, "dgl", "R1E", "cosine")) == []


def test_a_head_that_large_images_have_no_use_for_is_refused(tmp_path: Path) -> None:
    given = {"name": "infopro", "head": "2c2f"}
    large = settings(tmp_path, method={"objective": given}, data={"image_size": 128, "samples": 40})
    with pytest.raises(
        UserError, match="images of 128 pixels and more have ImageNet's head; got .* 2c2f"
    ):
        stages_of(large)


def test_l2_is_refused_unless_every_local_loss_is_a_cross_entropy(tmp_path: Path) -> None:
    for objective in ("predsim", "infopro", "infopro-contrast"):
        with pytest.raises(UserError, match="choose cosine"):
            combined(tmp_path, objective, "none", "l2")
    for objective in ("greedy", "dgl", "auglocal"):
        combined(tmp_path, objective, "none", "l2")


def test_what_came_in_stays_as_it_was_where_it_is_sent_on(tmp_path: Path) -> None:
    """The first layer of the tests' network writes in place. The next stage must not see it."""
    resolved = combined(
        tmp_path, "dgl", "R1", "cosine", model={"name": "tests.sample_networks:small"}
    )
    stages = stages_of(resolved)
    message = batch(resolved)
    for stage in stages[:3]:
        before = {name: tensor.clone() for name, tensor in message.fields.items()}
        h = stage.forward(message)
        gradient = stage.boundary_gradient(stage.local_loss(message, h), h)
        merged = before.get(stage.plan.input)
        assert all(torch.equal(tensor, message.fields[name]) for name, tensor in before.items())
        channel = MemoryChannel(stage.plan.sends, 1)  # type: ignore[arg-type]
        channel.send(message.header, stage.outgoing(message, h, gradient))
        message = Message(message.header, channel.receive().fields)
        if stage.plan.stage == 1 and stage.adapter is not None and merged is not None:
            assert (message.fields["ctx.0"] - merged).min() >= 0, (
                "what is merged is added, and encoders end in a ReLU"
            )


def test_a_stage_behind_flat_activations_has_no_context(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rule"):
        flat = settings(
            tmp_path,
            model={"name": "tests.sample_networks:flat"},
            method={"context": {"mode": "E"}},
        )
        blueprint, plans = build_plans(flat)
        for plan in plans:
            Stage(plan, blueprint, flat, "meta")
