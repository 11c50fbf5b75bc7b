"""What the simulator predicts of a system on a link, from its own speed on the open one.

A prediction is relative: the simulated step without transfers over the simulated step with them.
The computing is scaled so that the step without them is the one that was measured on the open link.
What else takes time there, as cores that are busy with TCP, so counts in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from localpipe.bench.systems.spec import SystemRequest
from localpipe.config.resolved import Resolved
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.plan.cluster.formulas import MicroTiming, Timing, ring_all_reduce_s
from localpipe.plan.cluster.simulate import (
    simulate_ddp,
    simulate_pipeline,
    simulate_synchronous,
)

_FLOAT_BYTES = 4
_FORWARD_SHARE = 1 / 3  # of the computing of a batch: a product has two gradients
_STEPS = 200
_SCHEDULES = {"gpipe": "gpipe", "1f1b": "1f1b", "zb": "zb-h1"}
_FIRST_BUCKET_BYTES, _BUCKET_BYTES = 2**20, 25 * 2**20  # of torch's DistributedDataParallel


def list_edge_bytes(config: Resolved) -> list[int]:
    """Return the bytes of localpipe's message on every edge between two of its processes."""
    _, plans = build_plans(config)
    hosts = assign_hosts(config.replicas, config.pipeline.processes)
    last_stages = {host.stages[-1] for host in hosts}
    return [
        plan.sends.nbytes for plan in plans if plan.sends is not None and plan.stage in last_stages
    ]


def list_link_bytes(config: Resolved, request: SystemRequest) -> list[int]:
    """Return the bytes that cross the links of a peer's pipeline in a step, one way, for each link.

    Worker r of n hosts the stages r, r + n, ... So a link is crossed several times a micro-batch
    where workers host several stages, there by activations and back by their gradients.
    """
    assert request.cut is not None
    shapes = build_blueprint(config).shapes()
    workers = config.pipeline.processes
    links: dict[tuple[int, int], int] = {}
    for stage, (_, last) in enumerate(request.cut[:-1]):
        sender, receiver = stage % workers, (stage + 1) % workers
        nbytes = math.prod(shapes[last]) * _FLOAT_BYTES * config.data.batch_size
        # An activation takes one direction, and its gradient the other one.
        for way in ((sender, receiver), (receiver, sender)):
            links[way] = links.get(way, 0) + nbytes
    return [nbytes for (sender, receiver), nbytes in sorted(links.items()) if sender < receiver]


def predict_localpipe(
    compute_s: Sequence[float],
    edge_bytes: Sequence[int],
    depth: int,
    bytes_per_s: float,
    delay_s: float,
) -> float:
    """Return localpipe's predicted speed on a link, over that on the open one.

    compute_s: seconds of a message by worker. edge_bytes: of a message, by edge.
    """
    edges = len(edge_bytes)
    timing = Timing(
        before_s=tuple(_FORWARD_SHARE * seconds for seconds in compute_s),
        after_s=tuple((1 - _FORWARD_SHARE) * seconds for seconds in compute_s),
        transfer_s=tuple(nbytes / bytes_per_s for nbytes in edge_bytes),
        latency_s=(delay_s,) * edges,
    )
    zeros = (0.0,) * edges
    open_timing = replace(timing, transfer_s=zeros, latency_s=zeros)
    open_s = simulate_pipeline(open_timing, _STEPS, depth).period_s
    return open_s / simulate_pipeline(timing, _STEPS, depth).period_s


def predict_pipeline(
    request: SystemRequest,
    compute_s: Sequence[float],
    link_bytes: Sequence[int],
    bytes_per_s: float,
    delay_s: float,
    open_s: float | None = None,
) -> float:
    """Return the predicted speed of a peer's pipeline on a link, over that on the open one.

    compute_s: seconds of a step by worker, a third of them forward. link_bytes: of
    `list_link_bytes`. open_s: the measured seconds of a step on the open link, to which the
    computing is scaled, None for as it is. Zero bubble is simulated as ZB-H1, with one stage a
    worker.
    """
    assert request.micro_batches is not None
    count, schedule = request.micro_batches, _SCHEDULES[request.system]
    third_s = tuple(seconds / count / 3 for seconds in compute_s)
    zeros = (0.0,) * len(link_bytes)
    no_updates = (0.0,) * len(compute_s)
    open_timing = MicroTiming(third_s, third_s, third_s, no_updates, zeros, zeros)
    simulated_s = simulate_synchronous(schedule, open_timing, count)

    # Transfers that are so much shorter are the same as computing that is longer.
    scale = 1.0 if open_s is None else open_s / simulated_s
    timing = replace(
        open_timing,
        transfer_s=tuple(nbytes / count / bytes_per_s / scale for nbytes in link_bytes),
        latency_s=(delay_s / scale,) * len(link_bytes),
    )
    return simulated_s / simulate_synchronous(schedule, timing, count)


def predict_data_parallel(
    step_s: float, gradient_bytes: int, workers: int, bytes_per_s: float, delay_s: float
) -> float:
    """Return the predicted speed of data parallelism on a link, over that on the open one.

    step_s: of a step on the open link. gradient_bytes: of one replica, in torch's buckets.
    """
    buckets = [min(gradient_bytes, _FIRST_BUCKET_BYTES)]
    rest = gradient_bytes - buckets[0]
    while rest > 0:
        buckets.append(min(rest, _BUCKET_BYTES))
        rest -= buckets[-1]
    reduce_s = [ring_all_reduce_s(nbytes, workers, bytes_per_s, delay_s) for nbytes in buckets]
    forward_s = _FORWARD_SHARE * step_s
    open_s = simulate_ddp(forward_s, step_s - forward_s, 0.0, [])
    return open_s / simulate_ddp(forward_s, step_s - forward_s, 0.0, reduce_s)
