"""`localpipe bench` on the devices: stages eager, captured and compiled, beside the peers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localpipe.doctor.gpu.commands import bench
from localpipe.doctor.gpu.device_work import speed_words
from localpipe.doctor.gpu.machine import find_compiling_problem
from localpipe.doctor.gpu.step_context import StepContext

_MAX_PROCESSES = 4
_PEERS = "ddp,gpipe,1f1b,zb"


@dataclass(frozen=True)
class _BenchCall:
    """One call of the benchmark. share: of the step's time. problem: why it cannot run, or None."""

    name: str
    words: Sequence[str]
    share: float
    problem: str | None = None


def run(context: StepContext) -> None:
    """Add a finding for every row of every benchmark, and one for each that cannot run."""
    calls = list(_list_calls(context))
    for index, call in enumerate(calls):
        if call.problem is not None:
            context.add_absence(call.name, call.problem)
            continue
        shares = sum(other.share for other in calls[index:] if other.problem is None)
        limit_s = context.left_s * call.share / shares
        words = [*speed_words(context), *call.words, *_list_window_words(context)]
        end = bench(context, call.name, words, limit_s)
        if end.result is None:
            context.add_failure(call.name, end.problem)
            continue
        for row in end.result["rows"]:
            _add_row(context, call.name, row)


def _list_calls(context: StepContext) -> Iterator[_BenchCall]:
    """Yield the calls in their order. What compiles is last, because it takes longest."""
    devices = len(context.machine["devices"])
    graphs = "run.capture=graphs"
    yield _BenchCall("eager", [_name_systems("sequential,e2e,checkpoint")], 2.5)
    yield _BenchCall("captured", [_name_systems("sequential"), graphs], 1.5)

    problem = None
    if devices < 2:
        problem = "localpipe's pipeline, GPipe, 1F1B, zero bubble, DDP: there is one device"
    processes = min(devices, _MAX_PROCESSES)
    several = [f"pipeline.processes={processes}", f"bench.micro_batches=[{processes}]"]
    peers = [*several, _name_systems(f"localpipe,{_PEERS}")]
    yield _BenchCall("several devices", peers, 4.0, problem)
    captured = [*several, _name_systems("localpipe"), graphs]
    yield _BenchCall("several devices, captured", captured, 1.5, problem)

    compiled = [_name_systems("sequential"), "run.capture=compile"]
    yield _BenchCall("compiled", compiled, 2.0, find_compiling_problem(context.machine))


def _name_systems(names: str) -> str:
    return f"bench.systems=[{names}]"


def _list_window_words(context: StepContext) -> list[str]:
    size = context.size
    return [f"bench.windows={size.windows}", f"bench.window_s={size.window_s}"]


def _add_row(context: StepContext, call: str, row: Mapping[str, Any]) -> None:
    """Add a row of the benchmark as a finding, with the row itself as its figures."""
    name = f"{call}: {row['system']}"
    if row["micro_batches"] is not None:
        name += f", {row['micro_batches']} messages or micro-batches"
    if row["samples_per_s"] is None:
        context.add_failure(name, row["note"], **row)
        return
    peak = max(row["peak_memory_bytes"]) / 2**20
    text = f"{row['samples_per_s']:,.0f} samples/s, {peak:,.0f} MiB"
    if row["processes"] > 1:
        text += f" a process, {row['processes']} processes"
    if row["efficiency"] is not None:
        text += f", {row['efficiency']:.3f} of its bound"
    context.add_ok(name, text, **row)
