"""The pipeline of one process: its stages, joined in memory or by edges, and their batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset, limit_classes
from localpipe.pipeline.channels.channel import Inbox, MemoryChannel, Outbox
from localpipe.pipeline.stages.captured import stage_class
from localpipe.pipeline.stages.probe import Probe
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.device import Upload, check_own_device, select_worker_device
from localpipe.pipeline.workers.edges import Edges
from localpipe.pipeline.workers.feedback import join_feedback
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.source import BatchSource, has_no_past, never_stop
from localpipe.pipeline.workers.steps import StepSchedule


def build_stages(mesh: Mesh, config: Resolved, timer: PhaseTimer) -> list[Stage]:
    """Return the stages that this worker hosts, each connected to its other replicas.

    They come in order, and nothing joins them to each other yet. Waits for the other replicas. The
    timer gets the worker's replica and first stage, and watches the replicas' collectives. Raises
    UserError for a configuration that cannot be built, and RunError without a route to another
    replica.
    """
    host = mesh.find_host(config.replicas)
    timer.replica, timer.stage = host.replica, host.stages[0]
    device = select_worker_device(config, mesh.rank, mesh.local_rank)
    check_own_device(mesh.store, mesh.rank, mesh.world, device, config.pipeline.backend)
    blueprint, plans = build_plans(config)
    replicas = []
    for stage in host.stages:
        count = config.replicas[stage]
        replicas.append(
            mesh.connect_replicas(
                stage, host.replica, count, timer.mark_reduce, timer.mark_connect, device
            )
        )

    def has_pending_collective() -> bool:
        return any(connection.has_pending_collective() for connection in replicas)

    timer.has_pending_collective = has_pending_collective
    build_stage = stage_class(config)
    stages = []
    for stage, connection in zip(host.stages, replicas, strict=True):
        stages.append(build_stage(plans[stage], blueprint, config, device, connection))
    blueprint.drop_waiting_parts()
    return stages


def build_source(
    config: Resolved,
    stage: Stage,
    dataset: Dataset,
    schedule: StepSchedule,
    start_step: int = 0,
    save_every_s: float = math.inf,
    stop_requested: Callable[[], bool] = never_stop,
    handled: int = 0,
    past_flags: Callable[[int], int | None] = has_no_past,
) -> BatchSource:
    """Return the source of the messages after a step, for one replica of the first stage.

    stage: that replica. start_step: the newest finished step, or 0. save_every_s: seconds between
    checkpoints. stop_requested: called before every step, and true ends the run there. handled: how
    many messages after that step have passed the stage already. past_flags: the flags that a
    message has had, by its number after that step, or None. A thread begins to read batches at
    once.
    """
    headers = schedule.headers(start_step, stage.replicas.index)
    start = start_step, schedule.epoch(start_step)
    for header, _ in itertools.islice(headers, handled):
        start = header.step, header.epoch

    def find_past_flags(number: int) -> int | None:
        return past_flags(handled + number)

    return BatchSource(
        limit_classes(dataset, config.task, config.model.num_classes),
        headers,
        config.run.seed,
        save_every_s,
        stop_requested,
        start=start,
        agree=stage.replicas.broadcast_first,
        pin_memory=stage.device.type == "cuda",
        past_flags=find_past_flags,
    )


def join_stages(
    stages: Sequence[Stage],
    source: Inbox | None,
    context: RunnerContext,
    edges: Edges | None = None,
    with_probes: bool = False,
    saved_step: int = -1,
) -> list[StageRunner]:
    """Return the runners of a process's consecutive stages, in order.

    stages: at least one. The stages are joined in memory to each other, and by `edges` to their
    neighbours in other processes. It waits for those. Without edges, all stages of the pipeline are
    here, else it raises AssertionError. source: the batches of the first stage, or None if another
    process hosts it. with_probes: each stage gets a Probe. saved_step: the newest step on disk, or
    -1. Raises RunError if a neighbour has another version or configuration.
    """
    device = stages[0].device
    inbox = source
    if source is not None and device.type == "cuda":
        inbox = Upload(source, device)
    runners = []
    for stage, next_stage in zip(stages, [*stages[1:], None], strict=True):
        # Both ends of an edge wait for each other, so edges are opened in the order of the stages.
        if inbox is None:
            assert edges is not None, "another process hosts the previous stage"
            inbox = edges.open_inbox(stage.plan, stage.replicas.index)
        outbox: Outbox | None = None
        next_inbox: Inbox | None = None
        if next_stage is not None:
            outbox = next_inbox = _open_memory_channel(stage, edges)
        elif not stage.plan.is_last:
            assert edges is not None, "another process hosts the next stage"
            outbox = edges.open_outbox(stage.plan, stage.replicas.index)
        probe = None
        if with_probes:
            shape = stage.plan.gives.standard_shape
            probe = Probe(shape, stage.task, stage.seed, stage.plan.stage, stage.device)
        runners.append(StageRunner(stage, inbox, outbox, context, saved_step, probe))
        inbox = next_inbox
    for runner, ends in zip(runners, join_feedback(stages, edges), strict=True):
        runner.feedback = ends
    return runners


def _open_memory_channel(stage: Stage, edges: Edges | None) -> MemoryChannel:
    """Return the channel from a stage to the next one, in the same process."""
    schema = stage.plan.sends
    assert schema is not None
    if edges is not None:
        schema = edges.schema(schema, stage.plan.stage)
    # The stages of a process take turns, so that one message is in flight at most.
    return MemoryChannel(schema, 1, stage.device)
