"""The edges of a worker that may be replaced: rings that its launcher has made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from localpipe.pipeline.workers.edges import BackEdge, Edges
from localpipe.pipeline.workers.mesh import Mesh, assign_hosts

_NOTHING: Mapping[Any, Any] = {}


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


def create_edges(
    folder: Path,
    config: Resolved,
    plans: Sequence[StagePlan],
    back_schemas: Mapping[tuple[int, int], Schema] = _NOTHING,
) -> None:
    """Make the rings of all edges of a run in its private folder.

    plans: of all stages. back_schemas: of the edges back, by (later stage, earlier stage). Raises
    OSError without room for them.
    """
    slots = config.pipeline.replay
    assert slots is not None, "the configuration recovers"
    for receiver, schema in list_edges(config, plans):
        create_ring(edge_folder(folder, receiver), schema, slots)
    for (later, earlier), schema in back_schemas.items():
        create_ring(back_folder(folder, later, earlier), schema, back_slots(config))


def back_folder(folder: Path, later: int, earlier: int) -> Path:
    """Return the folder of an edge back between two stages."""
    return folder / f"back_{later}_{earlier}"


def back_slots(config: Resolved) -> int:
    """Return the messages that the ring of an edge back holds, so that a send never waits.

    The earlier stage's snapshot of step s covers what was due up to s. It may be half of
    pipeline.replay messages and the rest of a step old. The later stage is never ahead of the
    earlier one. So what is sent and not covered is of the steps between s - lag and the earlier
    stage's own, of which every `every`-th one is sent. If a send waited for that snapshot, the
    earlier stage might wait for the later one.
    """
    feedback, replay = config.method.feedback, config.pipeline.replay
    assert replay is not None, "the configuration recovers"
    steps = feedback.lag + replay // 2 + config.optim.accumulate
    return steps // feedback.every + 2


class PersistentEdges(Edges):
    """Opens a worker's ends of the rings. Nothing waits for the other ends.

    folder: the private folder of the run. handled: the messages that this worker's snapshot covers.
    positions: where its edges back go on, as of `positions`, by their names. `inbox` and `outbox`
    are None where the worker has none, or before they are opened.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: Resolved,
        device: torch.device,
        folder: Path,
        handled: int,
        positions: Mapping[str, int] = _NOTHING,
    ) -> None:
        super().__init__(mesh, config, device)
        self._config, self._past_positions = config, positions
        self._back_outboxes: dict[BackEdge, PersistentSender] = {}
        self._back_inboxes: dict[BackEdge, PersistentReceiver] = {}
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

    def open_back_outbox(self, edge: BackEdge, schema: Schema, depth: int) -> Outbox:
        """Return the outbox of an edge back. `depth` is not read: no send waits for a reader.

        Raises RunError if the ring is of other messages.
        """
        folder, ring = self._open_back_ring(edge, schema, edge.earlier)
        start = self._past_positions.get(edge.name, 0)
        outbox = PersistentSender(folder, ring, ring.slots, start, compares_replay())
        self._back_outboxes[edge] = outbox
        return outbox

    def open_back_inbox(self, edge: BackEdge, schema: Schema, depth: int) -> Inbox:
        """Return the inbox of an edge back. Its messages stay on the host.

        Raises RunError if the ring is of other messages.
        """
        folder, ring = self._open_back_ring(edge, schema, edge.later)
        start = self._past_positions.get(edge.name, 0)
        inbox = PersistentReceiver(folder, ring, torch.device("cpu"), start)
        self._back_inboxes[edge] = inbox
        return inbox

    def _open_back_ring(
        self, edge: BackEdge, schema: Schema, neighbour: int
    ) -> tuple[Path, PersistentRing]:
        folder = back_folder(self._folder, edge.later, edge.earlier)
        name = self._neighbour_name(neighbour, 0)
        return folder, PersistentRing(folder, schema, back_slots(self._config), name)

    def positions(self, kept: Mapping[int, int]) -> dict[str, int]:
        """Return where the edges back go on after a snapshot that is made now, by their names.

        kept: the parameters that the snapshot holds, by stage. Whoever loads it sends them again,
        under the numbers that they have.
        """
        positions = {}
        for edge, outbox in self._back_outboxes.items():
            positions[edge.name] = outbox.next_number - kept[edge.later]
        for edge, inbox in self._back_inboxes.items():
            positions[edge.name] = inbox.next_number
        return positions

    def save(self, handled: int) -> None:
        """Tell all senders to this worker that its snapshot covers what was received so far.

        handled: the messages that have passed the worker.
        """
        if self.inbox is not None:
            self.inbox.save(handled)
        for inbox in self._back_inboxes.values():
            inbox.save(inbox.next_number)

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
