"""Builds the stages that a worker hosts and joins them to each other and to their neighbours."""

from __future__ import annotations

from localpipe.config.resolved import Resolved
from localpipe.pipeline.channels.channel import Inbox, MemoryChannel, Outbox
from localpipe.pipeline.stages.captured import stage_class
from localpipe.pipeline.stages.probe import Probe
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.device import Upload, select_device
from localpipe.pipeline.workers.edges import Edges
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.phase import PhaseTimer


def build_stages(place: Mesh, config: Resolved, pulse: PhaseTimer) -> list[Stage]:
    """Build the stages that this worker hosts, each joined to its replicas."""
    replicas = config.replicas
    host = place.host(replicas)
    pulse.replica, pulse.stage = host.replica, host.stages[0]
    where = select_device(config.run.device, place.local_rank)
    blueprint, plans = build_plans(config)
    kind = stage_class(config)
    joined = [
        place.replicas(k, host.replica, replicas[k], pulse.waiting, where) for k in host.stages
    ]
    pulse.queued = lambda: any(each.queued() for each in joined)
    return [
        kind(plans[k], blueprint, config, where, own)
        for k, own in zip(host.stages, joined, strict=True)
    ]


def join_stages(
    place: Mesh, config: Resolved, stages: list[Stage], loader: Inbox | None, tools: RunnerContext
) -> list[StageRunner]:
    """Seat a worker's stages in a row, joined in memory to each other and by edges to its neighbours."""
    where = stages[0].device
    edges = Edges(place, config, where)
    seats = []
    inbox = Upload(loader, where) if loader is not None and where.type == "cuda" else loader
    for position, stage in enumerate(stages):
        plan = stage.plan
        if inbox is None:
            inbox = edges.inbox(plan, stage.replicas.index)
        outbox: Outbox | None = None
        following: Inbox | None = None
        if plan.sends is not None and position + 1 < len(stages):
            outbox = following = MemoryChannel(
                edges.schema(plan.sends, plan.stage), 1, where
            )  # stages of a process take turns
        elif plan.sends is not None:
            outbox = edges.outbox(plan, stage.replicas.index)
        probe = None
        if config.run.probe == "linear" and tools.recorder is not None:
            probe = Probe(plan.output_shape, stage.task, config.run.seed, plan.stage, where)
        seats.append(StageRunner(stage, inbox, outbox, tools, probe=probe))
        inbox = following
    return seats
