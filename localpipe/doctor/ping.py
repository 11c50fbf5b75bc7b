"""A two-rank ping over gloo or NCCL: latency and rate of a link."""

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

from localpipe.doctor.check import Check
from localpipe.fields import Field, Schema
from localpipe.pipeline.channels.gloo import GlooReceiver, GlooSender
from localpipe.pipeline.channels.groups import connect_nccl
from localpipe.pipeline.channels.message import Header, Kind
from localpipe.pipeline.workers.mesh import open_file_store

_MIB = 1 << 20
_LIMIT_S = 10.0  # of a ping: more means that the two processes do not find each other
_SMALL = Schema((Field("h.0", (16,), "float32"),), 1)
_LARGE = Schema((Field("h.0", (4 * _MIB,), "float32"),), 1)
_ROUNDS, _LARGE_MESSAGES = 200, 16


# -- two ranks --------------------------------------------------------------------------------------------------------


def _gloo_ping() -> Check:
    return _ping_check(
        "gloo ping", "fork", _gloo_side, "the loopback must be up: ip link set lo up"
    )


def _nccl_ping() -> Check:
    if torch.cuda.device_count() < 2:
        return Check("NCCL ping", "ok", "not made: it takes two devices")
    advice = "run it again with NCCL_DEBUG=WARN; in Docker, give --shm-size=1g --ulimit memlock=-1"
    return _ping_check("NCCL ping", "spawn", _nccl_side, advice, 4 * _LIMIT_S)


def _ping_check(
    name: str,
    context: str,
    side: Callable[[int, str, Any], None],
    advice: str,
    limit_s: float = _LIMIT_S,
) -> Check:
    told = _two_ranks(context, side, limit_s)
    if told is None or "error" in told:
        return Check(name, "error", "no answer" if told is None else told["error"], advice)
    found = f"{told['latency_us']:.0f} us one way, {told['bandwidth_bytes_per_s'] / 1e9:.2f} GB/s in messages of 16 MiB"
    return Check(name, "ok", found, "", told)


def _two_ranks(
    context: str, side: Callable[[int, str, Any], None], limit_s: float
) -> dict[str, Any] | None:
    """Run both sides of a ping in processes of their own; return what side 0 found, None after `limit_s`."""
    processes = multiprocessing.get_context(context)
    mine, theirs = processes.Pipe(duplex=False)
    with (
        tempfile.TemporaryDirectory(prefix="localpipe-doctor-") as folder,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of forking beside threads: the children use none of them
        process_class: Any = processes.Process  # type: ignore[attr-defined]
        pair = [
            process_class(target=_side, args=(side, rank, folder, theirs), daemon=True)
            for rank in (0, 1)
        ]
        for process in pair:
            process.start()
        try:
            return mine.recv() if mine.poll(limit_s) else None
        finally:
            for process in pair:
                process.kill()
                process.join()


def _side(side: Callable[[int, str, Any], None], rank: int, folder: str, results: Any) -> None:
    try:
        side(rank, folder, results)
    except Exception as error:
        results.send({"error": str(error).splitlines()[0]})
    time.sleep(_LIMIT_S)  # the other side may still be reading; the parent ends both


def _gloo_side(rank: int, folder: str, results: Any) -> None:
    """Send small messages to and fro, then large ones in one direction, over edges as training has them between machines."""
    store = open_file_store(Path(folder))
    torch.set_num_threads(1)

    def edge(name: str, schema: Schema, sends: bool) -> Any:
        own = dist.PrefixStore(name, store)
        if sends:
            return GlooSender(own, schema, 2, "the other side", True, {})
        return GlooReceiver(own, schema, "the other side", True, {})

    there, back = edge("there", _SMALL, rank == 0), edge("back", _SMALL, rank == 1)
    large = edge("large", _LARGE, rank == 0)
    small, block = torch.zeros(1, 16), torch.zeros(1, 4 * _MIB)
    header = Header(Kind.TRAIN, 1, 1, 1)
    if rank == 1:
        for _ in range(_ROUNDS):
            there.receive()
            back.send(header, {"h.0": small})
        for _ in range(_LARGE_MESSAGES):
            large.receive()
        back.send(header, {"h.0": small})
        return
    trips = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        there.send(header, {"h.0": small})
        back.receive()
        trips.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(_LARGE_MESSAGES):
        large.send(header, {"h.0": block})
    back.receive()
    results.send(_figures(trips, _LARGE_MESSAGES * _LARGE.nbytes, time.perf_counter() - began))


def _nccl_side(rank: int, folder: str, results: Any) -> None:
    """Do the same between the first two CUDA devices."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = connect_nccl(open_file_store(Path(folder)), rank, 2, device)
    small, block = (torch.zeros(size, device=f"cuda:{rank}") for size in (16, 4 * _MIB))

    def pass_on(tensor: torch.Tensor, sender: int) -> None:
        work = (
            group.send([tensor], 1, 0)
            if rank == sender
            else group.recv([tensor], 0 if rank else 1, 0)
        )
        work.wait()

    def trip(tensor: torch.Tensor, count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            pass_on(tensor, 0)
        pass_on(small, 1)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    trip(block, 1)
    trips = [trip(small, 1) for _ in range(_ROUNDS)]
    took = trip(block, _LARGE_MESSAGES)
    if rank == 0:
        results.send(_figures(trips, _LARGE_MESSAGES * block.nbytes, took))


def _figures(round_trips: list[float], sent_bytes: int, took_s: float) -> dict[str, Any]:
    return {
        "latency_us": 5e5 * statistics.median(round_trips),
        "bandwidth_bytes_per_s": sent_bytes / took_s,
    }
