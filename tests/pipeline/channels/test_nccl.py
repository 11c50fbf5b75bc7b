"""NCCL's edges, as far as no GPU is needed: the back end of their groups, and its arguments."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from localpipe.config.load import update
from localpipe.errors import RunError
from localpipe.pipeline.channels import groups
from localpipe.pipeline.channels.groups import FOREVER, connect_nccl, end_groups
from localpipe.pipeline.channels.nccl import NCCL
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers import edges
from localpipe.pipeline.workers.edges import Edges
from localpipe.pipeline.workers.mesh import Mesh
from tests.harness import settings
from tests.pipeline.channels.test_channel import Thread

DEVICE = torch.device("cuda", 0)
HANGS = 9  # the size of a group that does not end
ENDED: list[int] = []


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let groups be made without NCCL, and ended without a device."""
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Legacy, raising=False)
    monkeypatch.setattr(dist, "ProcessGroupNCCL2", None, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(groups, "_open_groups", [])
    ENDED.clear()


class Legacy:
    """Stands for torch's older back end, which is bound to its device when it connects."""

    class Options:
        """Takes what is set."""

        def __init__(self, is_high_priority_stream: bool) -> None:
            self.is_high_priority_stream = is_high_priority_stream
            self.config = SimpleNamespace(max_ctas=None)

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.given = (rank, size, options)
        self.connected: torch.device | None = None

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.connected = device

    def shutdown(self) -> None:
        """End, unless the group is one that hangs."""
        rank, size, _ = self.given
        if size == HANGS:
            threading.Event().wait()
        ENDED.append(rank)


class Bound:
    """Stands for the newer one of torch 2.15."""

    def __init__(
        self, store: Any, rank: int, size: int, options: Any, device: torch.device
    ) -> None:
        """__init__(self, store, rank, size, options, device)"""
        self.given, self.connected = (rank, size, options), device


class Unbound:
    """Stands for the newer one of torch 2.14, which takes no device."""

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        """__init__(self, store, rank, size, options)"""
        raise AssertionError("made without its device")


@pytest.mark.parametrize(
    ("newer", "switch", "kind"),
    [
        (None, None, Legacy),
        (Unbound, None, Legacy),
        (Unbound, "1", Legacy),
        (Bound, None, Bound),
        (Bound, "0", Legacy),
    ],
)
def test_groups_are_made_by_a_back_end_that_is_bound_to_its_device(
    fake_torch: None,
    monkeypatch: pytest.MonkeyPatch,
    newer: Any,
    switch: str | None,
    kind: type,
) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL2", newer, raising=False)
    monkeypatch.delenv("TORCH_DIST_USE_NCCL2", raising=False)
    if switch is not None:
        monkeypatch.setenv("TORCH_DIST_USE_NCCL2", switch)
    group = connect_nccl(dist.HashStore(), 1, 2, DEVICE)
    assert type(group) is kind and isinstance(group, Legacy | Bound)
    assert group.connected == DEVICE
    rank, size, options = group.given
    assert (
        (rank, size) == (1, 2) and options._timeout == FOREVER and options.is_high_priority_stream
    )


def test_edges_alone_get_few_multiprocessors(fake_torch: None) -> None:
    edge = connect_nccl(dist.HashStore(), 0, 2, DEVICE, is_edge=True)
    replicas = connect_nccl(dist.HashStore(), 0, 2, DEVICE)
    assert edge.given[2].config.max_ctas == 4
    assert replicas.given[2].config.max_ctas is None


def test_groups_end_in_the_order_in_which_they_were_connected(fake_torch: None) -> None:
    for rank in (3, 1, 2):
        connect_nccl(dist.HashStore(), rank, 4, DEVICE)
    end_groups()
    assert ENDED == [3, 1, 2]
    end_groups()
    assert ENDED == [3, 1, 2]


def test_a_group_that_does_not_end_is_left(
    fake_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_END_S", 0.1)
    connect_nccl(dist.HashStore(), 1, 2, DEVICE)
    connect_nccl(dist.HashStore(), 2, HANGS, DEVICE)
    end_groups()
    assert ENDED == [1]


@pytest.mark.parametrize(
    ("fact", "here", "there"), [("NCCL", "2.30.7", "2.29.3"), ("NCCL group", "nccl", "nccl2")]
)
def test_the_handshake_compares_nccl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fact: str, here: str, there: str
) -> None:
    """Two libraries that differ hang in their first operation, or in connecting."""
    config = update(settings(tmp_path, pipeline={"stages": 2}), {"pipeline.backend": "nccl"})
    _, plans = build_plans(config)
    store, ends = dist.HashStore(), []
    for rank, value in enumerate((here, there)):
        spec = replace(NCCL, state_facts=partial(dict, {fact: value}))
        monkeypatch.setattr(edges, "find_backend", {"nccl": spec}.get)
        mesh = Mesh(rank, 2, store, local=True)
        ends.append(Edges(mesh, config, DEVICE))
    sender = Thread(lambda: ends[0].open_outbox(plans[0], 0))
    receiver = Thread(lambda: ends[1].open_inbox(plans[1], 0))
    text = f"handshake with stage 1 (rank 1): {fact} is {there!r} there, expected {here!r}; start"
    assert isinstance(sender.ended().error, RunError) and str(sender.ended().error).startswith(text)
    assert isinstance(receiver.ended().error, RunError)


def test_nccl_states_its_version_and_its_back_end(fake_torch: None) -> None:
    assert NCCL.state_facts().keys() == {"NCCL", "NCCL group"}
    assert NCCL.state_facts()["NCCL group"] == "nccl"
