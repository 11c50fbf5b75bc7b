"""Replicas of a stage divide a batch.

The result is close to one replica's where the arithmetic allows it, and always the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe.config.rules import worker_count_error
from localpipe.errors import UserError
from localpipe.pipeline.channels.message import (
    Header,
    Kind,
    Message,
    overlapping_rows,
    replica_rows,
)
from localpipe.pipeline.channels.resharding import RowGather, RowScatter, neighbour_replicas
from localpipe.pipeline.stages.batch_norm import SyncBatchNorm
from localpipe.pipeline.stages.replicas import Replicas
from localpipe.pipeline.workers.mesh import Host, assign_hosts, find_rank
from localpipe.pipeline.workers.steps import StepSchedule
from tests.harness import digests, run, settings

SYNC = {"batch_norm": "sync"}


def test_replicas_share_the_rows_in_their_order() -> None:
    assert [replica_rows(10, r, 4) for r in range(4)] == [
        slice(0, 2),
        slice(2, 5),
        slice(5, 7),
        slice(7, 10),
    ]
    assert overlapping_rows(slice(0, 5), slice(3, 8)) == slice(3, 5)
    assert overlapping_rows(slice(0, 2), slice(5, 8)) == slice(5, 5)


def test_pipelines_of_replicas_take_ranks_one_after_the_other() -> None:
    assert assign_hosts((2, 2, 2), 4) == (
        Host(range(2), 0),
        Host(range(2, 3), 0),
        Host(range(2), 1),
        Host(range(2, 3), 1),
    )
    assert find_rank(2, 1, (2, 2, 2), 4) == 3


def test_stages_with_their_own_numbers_of_replicas_take_ranks_in_the_order_of_stages() -> None:
    assert [str(host) for host in assign_hosts((1, 2, 1), 4)] == [
        "stage 0, replica 0", "stage 1, replica 0", "stage 1, replica 1", "stage 2, replica 0",
    ]  # fmt: skip


@pytest.mark.parametrize("pair", [(1, 1), (1, 3), (2, 3), (4, 2), (3, 3)])
def test_an_edge_joins_exactly_the_replicas_that_share_rows(pair: tuple[int, int]) -> None:
    replicas, neighbours = pair
    for r in range(replicas):
        shared = [
            s
            for s in range(neighbours)
            if overlapping_rows(replica_rows(24, r, replicas), replica_rows(24, s, neighbours))
            != slice(0, 0)
        ]
        full = [
            s
            for s in shared
            if overlapping_rows(replica_rows(24, r, replicas), replica_rows(24, s, neighbours)).stop
            > overlapping_rows(replica_rows(24, r, replicas), replica_rows(24, s, neighbours)).start
        ]
        assert neighbour_replicas(r, replicas, neighbours) == full


class _Tray:
    """Both ends of an edge, without bytes."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, header: Header, fields: Any) -> None:
        self.messages.append(
            Message(header, {name: tensor.clone() for name, tensor in fields.items()})
        )

    def receive(self) -> Message:
        return self.messages.pop(0)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("rows", [12, 7, 6])
def test_what_is_split_by_rows_is_joined_again(rows: int) -> None:
    """Two replicas speak to three; what the three hold together is what the two held."""
    edges = {(r, s): _Tray() for r in range(2) for s in neighbour_replicas(r, 2, 3)}
    batch = torch.arange(rows)
    for r in range(2):
        part = replica_rows(rows, r, 2)
        out = RowScatter({s: edges[r, s] for s in neighbour_replicas(r, 2, 3)}, r, 2, 3)
        out.send(Header(Kind.TRAIN, 1, 1, part.stop - part.start, batch=rows), {"h": batch[part]})
    for s in range(3):
        got = RowGather([edges[r, s] for r in neighbour_replicas(s, 3, 2)]).receive()
        assert torch.equal(got.fields["h"], batch[replica_rows(rows, s, 3)])
        assert got.header.count == len(got.fields["h"])


def test_evaluation_goes_through_the_first_replicas_whole() -> None:
    to = {0: _Tray(), 1: _Tray()}
    RowScatter(to, 0, 1, 2).send(Header(Kind.TEST, 1, 1, 4), {"h": torch.arange(4)})
    assert [len(tray.messages) for tray in to.values()] == [1, 0]
    assert len(to[0].messages[0].fields["h"]) == 4


def test_every_image_is_in_exactly_one_replicas_rows() -> None:
    schedule = StepSchedule(23, 6, 8, epochs=1, replicas=3, widest=3)
    trained = [
        [rows for header, rows in schedule.headers(0, r) if header.kind is Kind.TRAIN]
        for r in range(3)
    ]
    assert sorted(
        i for replica in trained for rows in replica for i in range(rows.start, rows.stop)
    ) == list(range(23))
    kinds = [{header.kind for header, _ in schedule.headers(0, r)} for r in range(3)]
    assert kinds == [{Kind.TRAIN, Kind.TEST}, {Kind.TRAIN}, {Kind.TRAIN}]


def test_remainder_below_two_images_a_replica_is_left_out() -> None:
    assert StepSchedule(19, 6, 16, epochs=1, replicas=2, widest=2).dropped_samples == 3
    assert StepSchedule(20, 6, 16, epochs=1, replicas=2, widest=2).dropped_samples == 0


@pytest.mark.parametrize(
    ("processes", "replicas", "wrong"),
    [(8, (2, 2), "at most 4"), (3, (2, 2), "multiple of 2"), (3, (1, 2, 1), "set it to 4")],
)
def test_workers_that_do_not_fit_are_told_what_would(
    processes: int, replicas: tuple[int, ...], wrong: str
) -> None:
    assert wrong in (worker_count_error(processes, replicas) or "")


@pytest.mark.parametrize(
    ("replicas", "message"), [(3, "does not divide"), ([1, 2], "lists 2 stages")]
)
def test_impossible_replicas_are_refused(tmp_path: Path, replicas: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(tmp_path, pipeline={"stages": 4, "processes": "auto", "replicas": replicas})


def farthest(a: Any, b: Any) -> float:
    """Return the largest difference between two runs' weights."""
    return max(
        float((value - b[stage]["weights"][name]).abs().max())
        for stage, state in a.items()
        for name, value in state["weights"].items()
    )


@pytest.mark.parametrize("replicas", [2, [1, 2, 1]])
def test_without_batch_norm_replicas_are_one_replica_to_rounding(
    tmp_path: Path, replicas: Any
) -> None:
    network = {"name": "tests.sample_networks:plain"}
    method = {"objective": {"name": "greedy"}}
    optim = {"max_steps": 6}
    alone = run(
        settings(tmp_path / "1", model=network, method=method, optim=optim, pipeline={"stages": 3})
    )
    pipeline = {"stages": 3, "replicas": replicas, "processes": 2 if replicas == 2 else 4}
    shared = run(
        settings(tmp_path / "2", model=network, method=method, optim=optim, pipeline=pipeline)
    )
    untrained = run(
        settings(
            tmp_path / "3", model=network, method=method, optim={"lr": 0.0}, pipeline={"stages": 3}
        )
    )
    assert farthest(alone, shared) < 1e-6
    assert farthest(alone, untrained) > 1e-3


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "predsim"},
        {"name": "infopro", "task": "contrast", "head": "0c2f", "image_weight": [0, 0]},
    ],
    ids=["predsim", "contrast"],
)
def test_gradients_of_pairs_are_reconciled_as_one_replica_does_it(
    tmp_path: Path, objective: dict[str, Any]
) -> None:
    """The distance depends on every replica's rows through the gradient.

    So the second backward pass crosses replicas too.
    """
    method = {"objective": objective, "reconcile": {"distance": "cosine", "weight": 1.0}}
    network, optim = {"name": "tests.sample_networks:plain"}, {"max_steps": 1, "lr": 0.1}

    def weights(name: str, method: Any, replicas: int) -> Any:
        pipeline = {"stages": 3, "replicas": replicas, "processes": replicas}
        return run(
            settings(tmp_path / name, model=network, method=method, optim=optim, pipeline=pipeline)
        )

    alone = weights("1", method, 1)
    assert farthest(alone, weights("2", method, 2)) < 1e-6
    assert farthest(alone, weights("apart", {"objective": objective}, 1)) > 1e-3


@pytest.mark.parametrize(
    "method",
    [
        {"objective": {"name": "predsim"}, "context": {"mode": "R1E"}},
        {"objective": {"name": "infopro", "task": "contrast"}},
        {"objective": {"name": "dgl"}, "reconcile": {"distance": "cosine", "weight": 0.5}},
    ],
    ids=["predsim+R1E", "contrast", "sgr"],
)
def test_synchronised_replicas_see_the_whole_batch(tmp_path: Path, method: dict[str, Any]) -> None:
    """Statistics and pairs are over all replicas. Rounding differs, and a few steps amplify it."""
    network = {"name": "tests.sample_networks:normalised"}
    optim = {"max_steps": 3, "lr": 0.01}
    apart = []
    alone = run(
        settings(tmp_path / "1", model=network, method=method, optim=optim, pipeline={"stages": 3})
    )
    for kind in ("sync", "local"):
        pipeline = {"stages": 3, "replicas": 2, "processes": 2, "batch_norm": kind}
        apart.append(
            farthest(
                alone,
                run(
                    settings(
                        tmp_path / kind,
                        model=network,
                        method=method,
                        optim=optim,
                        pipeline=pipeline,
                    )
                ),
            )
        )
    assert apart[0] < 1e-5 < apart[1]


def test_synchronised_statistics_do_not_cancel_where_the_mean_is_large() -> None:
    x = 300 + 0.1 * torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, synchronised = (
        torch.nn.BatchNorm2d(3),
        SyncBatchNorm(torch.nn.BatchNorm2d(3), Replicas()),
    )
    assert torch.allclose(synchronised(x), plain(x), atol=0.01)
    assert torch.allclose(synchronised.running_var, plain.running_var, rtol=1e-4)  # type: ignore[arg-type]


def test_any_processes_and_depth_give_one_digest_with_replicas(tmp_path: Path) -> None:
    methods: list[dict[str, Any]] = [
        {"objective": {"name": "dgl"}},
        {
            "objective": {"name": "predsim"},
            "context": {"mode": "R1E"},
            "reconcile": {"distance": "cosine", "weight": 0.1},
        },
    ]

    def of(processes: int, depth: int) -> list[str]:
        pipeline = {"stages": 4, "replicas": 2, "processes": processes, "depth": depth}
        jobs = [
            settings(tmp_path / f"{processes}-{depth}-{i}", pipeline=pipeline, method=m)
            for i, m in enumerate(methods)
        ]
        return digests(jobs, processes, tmp_path / f"{processes}-{depth}")

    first = of(2, 2)
    assert of(4, 1) == first
    assert of(4, 8) == first
    assert len(set(first)) == 2
