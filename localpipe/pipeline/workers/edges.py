"""The edges of one worker: the channels between its stages' replicas and their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

import localpipe
from localpipe.config.resolved import Resolved
from localpipe.fields import Schema
from localpipe.pipeline.channels.channel import Endpoint, Inbox, Outbox, find_backend
from localpipe.pipeline.channels.resharding import RowGather, RowScatter, neighbour_replicas
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.pipeline.workers.mesh import MarkConnect, Mesh, find_rank, mark_no_connect


@dataclass(frozen=True)
class BackEdge:
    """An edge for parameters, from a replica of a stage back to one of an earlier stage.

    later, earlier: the stages. sender, receiver: their replicas.
    """

    later: int
    sender: int
    earlier: int
    receiver: int

    @property
    def name(self) -> str:
        """The name of the edge in the store."""
        return f"back/{self.later}.{self.sender}-{self.earlier}.{self.receiver}"


class Edges:
    """Opens the channels to other workers. An edge is named by its two ends, stage.replica.

    device: where the stages compute. mark_connect: makes the context in which an edge connects,
    after each end has found the other. `handled` is 0, and more for a worker that goes on in place
    of another one. Raises UserError for an unknown pipeline.backend.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: Resolved,
        device: torch.device,
        mark_connect: MarkConnect = mark_no_connect,
    ) -> None:
        self.handled = 0  # messages that had passed this worker before it began
        self._mesh, self._depth, self._device = mesh, config.pipeline.depth, device
        self._replicas = config.replicas
        self._backend = find_backend(config.pipeline.backend)
        # Edges back never run over NCCL, whose receives would close a circle with the other edges'.
        self._host_backend = find_backend("gloo")
        self._facts = {
            "localpipe": localpipe.__version__,
            "torch": torch.__version__,
            "depth": self._depth,
            "backend": self._backend.name,
            **self._backend.state_facts(),
        }
        self._mark_connect = mark_connect

    def open_inbox(self, plan: StagePlan, replica: int) -> Inbox:
        """Return the inbox through which a replica of a stage receives from the previous stage.

        plan: not that of stage 0. It has one edge for every sender with common rows, and a
        RowGather joins several. Waits for all senders. Open each edge once. Raises RunError if a
        sender has another version or configuration, or without a route.
        """
        sender_stage = plan.stage - 1
        count, senders = self._replicas[plan.stage], self._replicas[sender_stage]
        schema = self.schema(plan.receives, sender_stage)
        inboxes = []
        for sender in neighbour_replicas(replica, count, senders):
            name = _edge_name(sender_stage, sender, replica)
            endpoint = self._endpoint(name, schema, sender_stage, sender)
            inboxes.append(self._backend.open_receiver(endpoint))
        if len(inboxes) == 1:
            return inboxes[0]
        return RowGather(inboxes, schema)

    def open_outbox(self, plan: StagePlan, replica: int) -> Outbox:
        """Return the outbox through which a replica of a stage sends to the next stage.

        It has one edge for every receiver with common rows. A RowScatter divides rows between
        stages with different numbers of replicas. Waits for all receivers. Open each edge once.
        Raises AssertionError for the last stage, and RunError if a receiver has another version or
        configuration, or without a route.
        """
        assert plan.sends is not None
        receiver_stage = plan.stage + 1
        count, receivers = self._replicas[plan.stage], self._replicas[receiver_stage]
        schema = self.schema(plan.sends, plan.stage)
        outboxes = {}
        for receiver in neighbour_replicas(replica, count, receivers):
            name = _edge_name(plan.stage, replica, receiver)
            endpoint = self._endpoint(name, schema, receiver_stage, receiver)
            outboxes[receiver] = self._backend.open_sender(endpoint)
        if count == receivers:
            return outboxes[replica]
        return RowScatter(outboxes, replica, count, receivers)

    def past_flags(self, number: int) -> int | None:
        """Return the flags that a message had when it left this worker, None if it has not."""
        return None

    def open_back_outbox(self, edge: BackEdge, schema: Schema, depth: int) -> Outbox:
        """Return the outbox of an edge back, through host memory whatever the device.

        schema: of one snapshot. depth: snapshots that were sent and not received. Waits for the
        receiver, and raises as `open_outbox`.
        """
        endpoint = self._back_endpoint(edge, schema, depth, edge.earlier, edge.receiver)
        return self._host_backend.open_sender(endpoint)

    def open_back_inbox(self, edge: BackEdge, schema: Schema, depth: int) -> Inbox:
        """Return the inbox of an edge back. Its messages stay on the host.

        Arguments are those of `open_back_outbox`. Waits for the sender, and raises as `open_inbox`.
        """
        endpoint = self._back_endpoint(edge, schema, depth, edge.later, edge.sender)
        return self._host_backend.open_receiver(endpoint)

    def list_back_edges(self, pairs: Sequence[tuple[int, int]]) -> list[BackEdge]:
        """Return the edges back between processes that end in this one, in the order to open them.

        pairs: (later stage, earlier stage), sorted. Replica r of the earlier stage hears replica r
        mod R of the R of the later one. All processes open their edges in one order, so none waits
        for another in a circle.
        """
        edges = []
        for later, earlier in pairs:
            for receiver in range(self._replicas[earlier]):
                sender = receiver % self._replicas[later]
                edge = BackEdge(later, sender, earlier, receiver)
                ends = (self._rank(later, sender), self._rank(earlier, receiver))
                if ends[0] != ends[1] and self._mesh.rank in ends:
                    edges.append(edge)
        return edges

    def schema(self, schema: Schema, stage: int) -> Schema:
        """Return the schema of one edge after a stage, from the schema of the undivided batch.

        stage: the sending one. The fields stay. The batch is divided by the larger number of
        replicas of this stage and the next. That of an evaluation fits one replica, and stays.
        """
        replicas = max(self._replicas[stage : stage + 2])
        return replace(schema, batch=schema.batch // replicas)

    def _endpoint(self, name: str, schema: Schema, stage: int, replica: int) -> Endpoint:
        """Return the endpoint of an edge to a replica of a neighbouring stage."""
        neighbour = self._neighbour_name(stage, replica)
        return Endpoint(
            store=self._mesh.open_edge_store(name, 0),
            schema=schema,
            depth=self._depth,
            neighbour=neighbour,
            device=self._device,
            is_local=self._mesh.shares_memory,
            facts=self._facts,
            mark_connect=partial(self._mark_connect, neighbour),
        )

    def _back_endpoint(
        self, edge: BackEdge, schema: Schema, depth: int, stage: int, replica: int
    ) -> Endpoint:
        """Return the endpoint of an edge back to a replica of a stage."""
        endpoint = self._endpoint(edge.name, schema, stage, replica)
        return replace(endpoint, depth=depth, device=torch.device("cpu"))

    def _rank(self, stage: int, replica: int) -> int:
        return find_rank(stage, replica, self._replicas, self._mesh.world)

    def _neighbour_name(self, stage: int, replica: int) -> str:
        rank = find_rank(stage, replica, self._replicas, self._mesh.world)
        if self._replicas[stage] == 1:
            return f"stage {stage} (rank {rank})"
        return f"stage {stage}, replica {replica} (rank {rank})"


def _edge_name(stage: int, sender: int, receiver: int) -> str:
    return f"{stage}.{sender}-{stage + 1}.{receiver}"
