"""The edges of one worker: which channels join a replica of a stage to those of its neighbours, and what each carries."""

from __future__ import annotations

from dataclasses import replace

import torch

import localpipe
from localpipe.config.resolved import Resolved
from localpipe.fields import Schema
from localpipe.pipeline.channels.channel import Inbox, Outbox
from localpipe.pipeline.channels.gloo import GlooReceiver, GlooSender
from localpipe.pipeline.channels.nccl import NcclReceiver, NcclSender
from localpipe.pipeline.channels.resharding import RowGather, RowScatter, neighbour_replicas
from localpipe.pipeline.channels.shared_memory import open_receiver, open_sender
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.pipeline.workers.mesh import Mesh, rank_of


class Edges:
    """Makes channels to other workers. An edge is named by its two ends, stage.replica."""

    def __init__(self, place: Mesh, config: Resolved, device: torch.device) -> None:
        self._place, self._depth, self._device = place, config.pipeline.depth, device
        self._nccl = device.type == "cuda" and config.pipeline.backend != "gloo"
        self._replicas = config.replicas
        self._facts = {
            "localpipe": localpipe.__version__,
            "torch": torch.__version__,
            "depth": self._depth,
        }
        self._facts["backend"] = "nccl" if self._nccl else "gloo"

    def inbox(self, plan: StagePlan, replica: int) -> Inbox:
        """Return where a replica of a stage hears its predecessor."""
        before = plan.stage - 1
        froms = neighbour_replicas(replica, self._replicas[plan.stage], self._replicas[before])
        schema = self.schema(plan.receives, before)
        inboxes = [self._receiver(schema, before, s, replica) for s in froms]
        return inboxes[0] if len(inboxes) == 1 else RowGather(inboxes)

    def outbox(self, plan: StagePlan, replica: int) -> Outbox:
        """Return where a replica of a stage speaks to its successor."""
        assert plan.sends is not None
        mine, others = self._replicas[plan.stage], self._replicas[plan.stage + 1]
        schema = self.schema(plan.sends, plan.stage)
        to = {
            s: self._sender(schema, plan.stage, replica, s)
            for s in neighbour_replicas(replica, mine, others)
        }
        return to[replica] if mine == others else RowScatter(to, replica, mine, others)

    def schema(self, whole: Schema, stage: int) -> Schema:
        """Return what an edge behind a stage carries of the whole batch."""
        return replace(whole, batch=whole.batch // max(self._replicas[stage : stage + 2]))

    def _receiver(self, schema: Schema, stage: int, sender: int, receiver: int) -> Inbox:
        store, peer = (
            self._place.edge_store(_name(stage, sender, receiver), 0),
            self._peer(stage, sender),
        )
        if self._nccl:
            return NcclReceiver(store, schema, peer, self._device, self._facts)
        if self._place.local:
            return open_receiver(store, schema, peer, self._facts, self._device)
        return GlooReceiver(store, schema, peer, False, self._facts, self._device)

    def _sender(self, schema: Schema, stage: int, sender: int, receiver: int) -> Outbox:
        store, peer = (
            self._place.edge_store(_name(stage, sender, receiver), 0),
            self._peer(stage + 1, receiver),
        )
        if self._nccl:
            return NcclSender(store, schema, self._depth, peer, self._device, self._facts)
        if self._place.local:
            return open_sender(store, schema, self._depth, peer, self._facts)
        return GlooSender(store, schema, self._depth, peer, False, self._facts)

    def _peer(self, stage: int, replica: int) -> str:
        rank = rank_of(stage, replica, self._replicas, self._place.world)
        named = (
            f"stage {stage}" if self._replicas[stage] == 1 else f"stage {stage}, replica {replica}"
        )
        return f"{named} (rank {rank})"


def _name(stage: int, sender: int, receiver: int) -> str:
    return f"{stage}.{sender}-{stage + 1}.{receiver}"
