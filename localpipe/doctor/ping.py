"""Pings between two processes, over gloo and over NCCL: latency and bandwidth."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from localpipe.doctor.check import MIB, Check
from localpipe.environment import leave_nccl_to_watchdogs
from localpipe.errors import first_line
from localpipe.fields import Field, Schema
from localpipe.pipeline.channels.channel import Endpoint, Inbox, Outbox
from localpipe.pipeline.channels.gloo import GlooReceiver, GlooSender
from localpipe.pipeline.channels.groups import connect_nccl, end_groups
from localpipe.pipeline.channels.message import Header, Kind
from localpipe.pipeline.channels.nccl import transfer
from localpipe.pipeline.workers.device import device_time_s
from localpipe.pipeline.workers.mesh import open_file_store

_LIMIT_S = 10.0  # a ping that takes longer has not connected its two processes
_SMALL = Schema((Field("h.0", (16,), "float32"),), 1)
_LARGE = Schema((Field("h.0", (4 * MIB,), "float32"),), 1)
_ROUNDS = 200  # of small messages
_LARGE_MESSAGES = 16

# One rank's part of a ping: (rank, folder of the store, pipe for the figures of rank 0).
RankFunction = Callable[[int, str, Any], None]


def ping_gloo() -> Check:
    """Ping between two processes over the loopback, as an edge between machines sends.

    It forks, so call it before CUDA is initialised. An error if a process raises or none answers
    within 10 s. figures: `latency_us` (one way) and `bandwidth_bytes_per_s`.
    """
    figures = run_two_ranks("fork", _run_gloo_rank, _LIMIT_S)
    advice = "the loopback must be up: ip link set lo up"
    return _make_check("gloo ping", figures, advice)


def ping_nccl() -> Check:
    """Ping between the first two CUDA devices, in two new processes.

    With fewer than two devices it is ok and not made. An error if a process raises or none answers
    within 40 s. figures: as of `ping_gloo`, empty if it was not made.
    """
    if torch.cuda.device_count() < 2:
        return Check("NCCL ping", "ok", "not made: it takes two devices")
    figures = run_two_ranks("spawn", _run_nccl_rank, 4 * _LIMIT_S)
    advice = "run it again with NCCL_DEBUG=WARN; in Docker, give --shm-size=1g --ulimit memlock=-1"
    return _make_check("NCCL ping", figures, advice)


def _make_check(name: str, figures: dict[str, Any] | None, advice: str) -> Check:
    if figures is None:
        return Check(name, "error", "no answer", advice)
    if "error" in figures:
        return Check(name, "error", figures["error"], advice)
    latency_us = figures["latency_us"]
    bandwidth = figures["bandwidth_bytes_per_s"] / 1e9
    text = f"{latency_us:.0f} us one way, {bandwidth:.2f} GB/s in messages of 16 MiB"
    return Check(name, "ok", text, "", figures)


# -- two ranks -------------------------------------------------------------------------------------


def run_two_ranks(
    start_method: str, run_rank: RankFunction, limit_s: float
) -> dict[str, Any] | None:
    """Run both ranks of a ping, each in a process of its own, and return the first thing sent.

    start_method: `fork` or `spawn`, which needs a `run_rank` that pickles. run_rank: called as
    (rank, folder of the store, pipe). It sends figures into the pipe. Returns them, {"error": line}
    if a rank raised, or None after `limit_s` seconds. Both processes are killed before it returns.
    """
    context = multiprocessing.get_context(start_method)
    receiver, sender = context.Pipe(duplex=False)
    process_class: Any = context.Process  # type: ignore[attr-defined]
    with (
        tempfile.TemporaryDirectory(prefix="localpipe-doctor-") as folder,
        warnings.catch_warnings(),
    ):
        # Python warns of a fork when there are threads; the children use none of them.
        warnings.simplefilter("ignore")
        processes = []
        for rank in (0, 1):
            arguments = (run_rank, rank, folder, sender)
            processes.append(process_class(target=_run_rank_safely, args=arguments, daemon=True))
        for process in processes:
            process.start()

        # Both processes end here, even if one of them hangs.
        try:
            if not receiver.poll(limit_s):
                return None
            figures: dict[str, Any] = receiver.recv()
            return figures
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run_rank_safely(run_rank: RankFunction, rank: int, folder: str, results: Any) -> None:
    """Run one rank; send the first line of its error, if any."""
    try:
        run_rank(rank, folder, results)
    except Exception as error:
        results.send({"error": first_line(error)})
    # The other rank may still be reading, so this one lives until the parent kills both.
    time.sleep(_LIMIT_S)


def _compute_figures(round_trips_s: list[float], nbytes: int, duration_s: float) -> dict[str, Any]:
    """Return the median of half a round trip, and the bandwidth of `nbytes` in `duration_s`."""
    return {
        "latency_us": 5e5 * statistics.median(round_trips_s),
        "bandwidth_bytes_per_s": nbytes / duration_s,
    }


# -- gloo ------------------------------------------------------------------------------------------


def _run_gloo_rank(rank: int, folder: str, results: Any) -> None:
    """Send small messages in both directions, then large ones from rank 0 to rank 1."""
    store = open_file_store(Path(folder))
    torch.set_num_threads(1)
    # Both ranks connect the edges in the same order.
    if rank == 0:
        figures = _send_pings(
            forward=_connect_gloo_sender(store, "there", _SMALL),
            backward=_connect_gloo_receiver(store, "back", _SMALL),
            large=_connect_gloo_sender(store, "large", _LARGE),
        )
        results.send(figures)
    else:
        _return_pings(
            forward=_connect_gloo_receiver(store, "there", _SMALL),
            backward=_connect_gloo_sender(store, "back", _SMALL),
            large=_connect_gloo_receiver(store, "large", _LARGE),
        )


def _connect_gloo_sender(store: dist.Store, name: str, schema: Schema) -> GlooSender:
    return GlooSender(_make_endpoint(store, name, schema))


def _connect_gloo_receiver(store: dist.Store, name: str, schema: Schema) -> GlooReceiver:
    return GlooReceiver(_make_endpoint(store, name, schema))


def _make_endpoint(store: dist.Store, name: str, schema: Schema) -> Endpoint:
    return Endpoint(
        store=dist.PrefixStore(name, store),
        schema=schema,
        depth=2,
        neighbour="the other side",
        device=torch.device("cpu"),
        is_local=True,
        facts={},
    )


def _send_pings(forward: Outbox, backward: Inbox, large: Outbox) -> dict[str, Any]:
    """Measure round trips of small messages and the time of the large ones, as rank 0."""
    header = Header(Kind.TRAIN, 1, 1, 1)
    small, block = torch.zeros(1, 16), torch.zeros(1, 4 * MIB)
    round_trips_s = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        forward.send(header, {"h.0": small})
        backward.receive()
        round_trips_s.append(time.perf_counter() - start)

    # A small message says that the last large one has arrived.
    start = time.perf_counter()
    for _ in range(_LARGE_MESSAGES):
        large.send(header, {"h.0": block})
    backward.receive()
    duration_s = time.perf_counter() - start
    return _compute_figures(round_trips_s, _LARGE_MESSAGES * _LARGE.nbytes, duration_s)


def _return_pings(forward: Inbox, backward: Outbox, large: Inbox) -> None:
    """Return every small message, and a small one after all large ones, as rank 1."""
    header = Header(Kind.TRAIN, 1, 1, 1)
    small = torch.zeros(1, 16)
    for _ in range(_ROUNDS):
        forward.receive()
        backward.send(header, {"h.0": small})
    for _ in range(_LARGE_MESSAGES):
        large.receive()
    backward.send(header, {"h.0": small})


# -- NCCL ------------------------------------------------------------------------------------------


def _run_nccl_rank(rank: int, folder: str, results: Any) -> None:
    """Send the same tensors between the first two CUDA devices."""
    leave_nccl_to_watchdogs()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = connect_nccl(open_file_store(Path(folder)), rank, 2, device, is_edge=True)
    figures = measure_trips(group, rank, device)
    end_groups()
    if rank == 0:
        results.send(figures)


def measure_trips(group: Any, rank: int, device: torch.device) -> dict[str, Any]:
    """Send tensors from rank 0 to rank 1, which answers with a small one; return the figures.

    group: of two ranks, which both call this. device: of the tensors. The figures, those of
    `ping_gloo`, mean something in rank 0 only. torch's RuntimeError passes through.
    """
    small = torch.zeros(16, device=device)
    block = torch.zeros(4 * MIB, device=device)

    def measure_trip(tensor: torch.Tensor, count: int) -> float:
        start = device_time_s()
        for _ in range(count):
            transfer(group, tensor, rank, sender=0)
        transfer(group, small, rank, sender=1)
        return device_time_s() - start

    # The first trip connects the devices and is not measured.
    measure_trip(block, 1)
    round_trips_s = [measure_trip(small, 1) for _ in range(_ROUNDS)]
    duration_s = measure_trip(block, _LARGE_MESSAGES)
    return _compute_figures(round_trips_s, _LARGE_MESSAGES * block.nbytes, duration_s)
