"""The edges of a worker that may be replaced: rings that its launcher has made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from localpipe.config.resolved import Resolved
from localpipe.environment import compares_replay
from localpipe.fields import Schema
from localpipe.pipeline.channels.channel import Inbox, Outbox
from localpipe.pipeline.channels.persistent_ring import (
    PersistentReceiver,
    PersistentRing,
    PersistentSender,
    create_ring,
)
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.pipeline.workers.edges import Edges
from localpipe.pipeline.workers.mesh import Mesh, assign_hosts


def edge_folder(folder: Path, receiver: int) -> Path:
    """Return the folder of the edge to a rank from the rank before it."""
    return folder / f"edge_{receiver}"


def list_edges(config: Resolved, plans: Sequence[StagePlan]) -> list[tuple[int, Schema]]:
    """Return the rank that receives and the schema of every edge between two workers, in order."""
    edges = []
    for rank, host in enumerate(assign_hosts(config.replicas, config.pipeline.processes)):
        if rank > 0:
            edges.append((rank, plans[host.stages[0]].receives))
    return edges


def create_edges(folder: Path, config: Resolved, plans: Sequence[StagePlan]) -> None:
    """Make the rings of all edges of a run in its private folder.

    plans: of all stages. Raises OSError without room for them.
    """
    slots = config.pipeline.replay
    assert slots is not None, "the configuration recovers"
    for receiver, schema in list_edges(config, plans):
        create_ring(edge_folder(folder, receiver), schema, slots)


class PersistentEdges(Edges):
    """Opens a worker's ends of the rings. Nothing waits for the other ends.

    folder: the private folder of the run. handled: the messages that this worker's snapshot covers.
    `inbox` and `outbox` are None where the worker has none, or before they are opened.
    """

    def __init__(
        self, mesh: Mesh, config: Resolved, device: torch.device, folder: Path, handled: int
    ) -> None:
        super().__init__(mesh, config, device)
        self.inbox: PersistentReceiver | None = None
        self.outbox: PersistentSender | None = None
        self.handled = handled
        self._folder, self._slots = folder, config.pipeline.replay or 0

    def open_inbox(self, plan: StagePlan, replica: int) -> Inbox:
        """Return the inbox from the previous stage, which goes on after the handled messages.

        Raises RunError if the ring is of other messages.
        """
        folder = edge_folder(self._folder, self._mesh.rank)
        neighbour = self._neighbour_name(plan.stage - 1, replica)
        ring = PersistentRing(folder, plan.receives, self._slots, neighbour)
        copied = [plan.input] if plan.receives.has(plan.input) else []
        self.inbox = PersistentReceiver(folder, ring, self._device, self.handled, copied)
        return self.inbox

    def open_outbox(self, plan: StagePlan, replica: int) -> Outbox:
        """Return the outbox to the next stage, which goes on after the handled messages.

        Raises AssertionError for the last stage, and RunError if the ring is of other messages.
        """
        assert plan.sends is not None
        folder = edge_folder(self._folder, self._mesh.rank + 1)
        neighbour = self._neighbour_name(plan.stage + 1, replica)
        ring = PersistentRing(folder, plan.sends, self._slots, neighbour)
        compares = compares_replay()
        self.outbox = PersistentSender(folder, ring, self._depth, self.handled, compares)
        return self.outbox

    def past_flags(self, number: int) -> int | None:
        """Return the flags that a message had when it left this worker, None if it has not."""
        if self.outbox is None:
            return None
        return self.outbox.published_flags(number)

    @property
    def lost(self) -> int:
        """How many messages the worker before this one had begun, which its snapshot may lack."""
        taken = self.inbox.ring.taken if self.inbox is not None else 0
        sent = self.outbox.ring.published if self.outbox is not None else 0
        return max(taken, sent, self.handled)
