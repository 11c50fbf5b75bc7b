"""Small programs on emulated GPUs. Each runs in a process of its own, which fails if it does."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localpipe.doctor import ping
from localpipe.pipeline.channels.groups import connect_nccl
from localpipe.pipeline.workers.mesh import open_file_store

_TICK_S = 0.01
_MANY = 1 << 16


def _gpu() -> torch.device:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _expect_error(text: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no error with {text!r}")


# -- one device ---------------------------------------------------------------------------------


def compute_as_the_cpu_does() -> None:
    """Compare the values and gradients of a few layers with the CPU's."""
    device = _gpu()
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    network = nn.Sequential(*layers)
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    results = []
    for where in (torch.device("cpu"), device):
        network.zero_grad()
        network.to(where)
        loss = nn.functional.cross_entropy(network(x.to(where)), y.to(where))
        loss.backward()
        gradients = [p.grad.cpu() for p in network.parameters() if p.grad is not None]
        results.append([loss.detach().cpu(), *gradients])
    assert len(results[0]) == 7
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def draw_in_graphs_as_eagerly() -> None:
    """Draw dropout masks in a graph: other ones in each replay, the same again from a seed."""
    device = _gpu()
    x = torch.ones(64, 64, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = nn.functional.dropout(x, 0.5)

    def replay_three_times() -> list[Tensor]:
        torch.cuda.manual_seed(7)
        results = []
        for _ in range(3):
            graph.replay()
            results.append(y.cpu())
        return results

    first, again = replay_three_times(), replay_three_times()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    torch.cuda.manual_seed(7)
    assert torch.equal(nn.functional.dropout(x, 0.5).cpu(), first[0])


def refuse_what_capture_forbids() -> None:
    """Wait for the host, leave a stream unjoined, and wait for an event from outside."""
    device = _gpu()
    x = torch.ones(4, device=device)
    outside = torch.cuda.current_stream().record_event()
    other = torch.cuda.Stream()
    with _expect_error("StreamCapture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    with _expect_error("StreamCapture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x.add_(1)
    with _expect_error("StreamCapture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.current_stream().wait_event(outside)
        x.add_(1)


def print_delays(streams: int, operations: int) -> None:
    """Print the delays before the first operations of a few streams."""
    _gpu()
    library = ctypes.CDLL("libcudart.so.13")
    library.emulated_delay_us.argtypes = [ctypes.c_void_p, ctypes.c_ulong]
    for stream in [torch.cuda.Stream() for _ in range(streams)]:
        delays = [library.emulated_delay_us(stream.cuda_stream, i) for i in range(operations)]
        print("delays", *delays)


# -- races --------------------------------------------------------------------------------------


def _write_and_read(is_ordered: bool) -> None:
    device = _gpu()
    x = torch.zeros(_MANY, device=device)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    x.add_(1)
    if is_ordered:
        other.wait_event(torch.cuda.current_stream().record_event())
    with torch.cuda.stream(other):
        total = x.sum()
    torch.cuda.synchronize()
    print("sum", float(total))


def write_and_read_on_two_streams() -> None:
    """Read on another stream what nothing orders before."""
    _write_and_read(False)


def write_and_read_in_order() -> None:
    """Read on another stream after an event."""
    _write_and_read(True)


def fill_a_pinned_buffer_too_early() -> None:
    """Write into pinned memory whose copy is queued."""
    pinned = torch.zeros(_MANY, pin_memory=True)
    pinned.to(_gpu(), non_blocking=True)
    pinned.fill_(1)


def read_a_pinned_buffer_too_early() -> None:
    """Read pinned memory into which a copy is queued."""
    x = torch.ones(_MANY, device=_gpu())
    pinned = torch.zeros(_MANY, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    print("sum", float(pinned.sum()))


def use_pinned_buffers_in_order() -> None:
    """Write and read pinned memory after events, and read what only leaves."""
    device = _gpu()
    pinned = torch.ones(_MANY, pin_memory=True)
    x = pinned.to(device, non_blocking=True)
    assert float(pinned.sum()) == _MANY  # the device reads it too
    torch.cuda.current_stream().record_event().synchronize()
    pinned.fill_(2)
    back = torch.empty(_MANY, pin_memory=True)
    back.copy_(x, non_blocking=True)
    torch.cuda.synchronize()
    assert float(back.sum()) == _MANY


def query_an_event() -> None:
    """Ask whether an event has passed, before and after a wait."""
    x = torch.ones(4, device=_gpu())
    event = torch.cuda.current_stream().record_event()
    time.sleep(0.2)
    assert not event.query(), "the host has not waited, so nothing tells it that the event passed"
    event.synchronize()
    assert event.query() and x.is_cuda


# -- several ranks over NCCL --------------------------------------------------------------------


def _join(folder: str, rank: int, size: int = 2) -> tuple[Any, torch.device]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return connect_nccl(open_file_store(Path(folder)), rank, size, device), device


def use_collectives(folder: str, rank: int) -> None:
    """Add, gather and broadcast tensors of several types over two ranks."""
    import torch.distributed as dist

    group, device = _join(folder, rank)
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
    for dtype in types:
        for op, expected in ((dist.ReduceOp.SUM, 7), (dist.ReduceOp.MAX, 5)):
            x = torch.full((3,), (2, 5)[rank], dtype=dtype, device=device)
            options = dist.AllreduceOptions()
            options.reduceOp = op
            group.allreduce([x], options).wait()
            assert x.tolist() == [expected] * 3, (dtype, op, x)
    x = torch.full((3,), rank, device=device)
    parts = [torch.empty_like(x) for _ in range(2)]
    group.allgather([parts], [x]).wait()
    assert [part.tolist() for part in parts] == [[0] * 3, [1] * 3]
    group.broadcast(x, 0).wait()
    assert x.tolist() == [0] * 3
    print("the collectives are right")


def send_and_receive(
    folder: str, rank: int, sent: int, received: int, dtype: str = "float32"
) -> None:
    """Send some elements, and expect some."""
    group, device = _join(folder, rank)
    if rank == 0:
        group.send([torch.ones(sent, device=device).to(getattr(torch, dtype))], 1, 0).wait()
    else:
        group.recv([torch.zeros(received, device=device).to(getattr(torch, dtype))], 0, 0).wait()
    torch.cuda.synchronize()
    print("it has arrived")


def use_different_collectives(folder: str, rank: int) -> None:
    """Add on one rank, and gather on the other."""
    group, device = _join(folder, rank)
    x = torch.ones(4, device=device)
    if rank == 0:
        group.allreduce([x]).wait()
    else:
        group.allgather([[x.clone(), x.clone()]], [x]).wait()
    torch.cuda.synchronize()


def abort_a_receive(folder: str, rank: int) -> None:
    """Post a receive for a message that nobody sends, and end it by an abort."""
    group, device = _join(folder, rank)
    if rank == 1:
        x = torch.zeros(4, device=device)
        # The group is idle for the host at once. Its stream is not, until the abort.
        work = group.recv([x], 0, 0)
        event = torch.cuda.Event()
        work.wait()
        event.record()
        assert not event.query()
        group.abort()
        event.synchronize()
        print("the receive has ended")


def end_together(folder: str, rank: int) -> None:
    """End a group on rank 0 at once, and on rank 1 later: the first end waits for the other."""
    group, device = _join(folder, rank)
    x = torch.ones(4, device=device)
    (group.send if rank == 0 else group.recv)([x], 1 - rank, 0).wait()
    note = Path(folder) / "rank 1 ends"
    if rank == 1:
        time.sleep(0.5)
        note.touch()
    group.shutdown()
    assert note.exists(), "rank 0 has not waited"
    print("the group has ended")


def post_two_receives(folder: str, rank: int) -> None:
    """Post a receive, and let work of the same stream wait for it as long as it takes."""
    group, device = _join(folder, rank)
    x = torch.ones(4, device=device)
    if rank == 0:
        while not (Path(folder) / "posted").exists():
            time.sleep(_TICK_S)
        group.send([x * 3], 1, 0).wait()
        torch.cuda.synchronize()
        return
    work = group.recv([x], 0, 0)
    work.wait()
    y = x * 2
    done = torch.cuda.current_stream().record_event()
    time.sleep(0.2)
    assert not done.query(), "the stream has not waited for its receive"
    (Path(folder) / "posted").touch()
    assert y.tolist() == [6.0] * 4
    print("the stream has waited")


def ping_over_nccl() -> None:
    """Run the doctor's ping between two devices, in forked processes."""
    figures = ping.run_two_ranks("fork", ping._run_nccl_rank, 120)
    assert figures is not None and figures.keys() == {"latency_us", "bandwidth_bytes_per_s"}, (
        figures
    )
    assert figures["latency_us"] > 0
    print("the ping has come back")
