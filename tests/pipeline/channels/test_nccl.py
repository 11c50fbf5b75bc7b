"""NCCL's edges, as far as no GPU is needed: the back end of their groups, and its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from localpipe.pipeline.channels.groups import FOREVER, connect_nccl

DEVICE = torch.device("cuda", 0)


class Legacy:
    """Stands for torch's older back end, which is bound to its device when it connects."""

    class Options:
        """Takes what is set."""

        def __init__(self, is_high_priority_stream: bool) -> None:
            self.is_high_priority_stream = is_high_priority_stream

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.given = (rank, size, options)
        self.connected: torch.device | None = None

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.connected = device


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
    monkeypatch: pytest.MonkeyPatch, newer: Any, switch: str | None, kind: type
) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Legacy, raising=False)
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
