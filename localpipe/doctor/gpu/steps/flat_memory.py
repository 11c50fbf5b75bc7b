"""Memory after a few steps and after a thousand: in one process, and over NCCL."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from localpipe.bench.systems.local import WARM_UP_STEPS
from localpipe.doctor.gpu.commands import checked_words, train_all
from localpipe.doctor.gpu.device_work import build_stages, resolve_words
from localpipe.doctor.gpu.step_context import StepContext
from localpipe.doctor.gpu.steps.nccl_edges import find_ranks

_MAX_RATIO = 1.02  # of the memory after the first steps


def run(context: StepContext) -> None:
    """Add a finding for the stages of one process, and one for the ranks of a pipeline."""
    context.note_machine()
    _check_one_process(context)
    if context.size.flat_ranks:
        _check_ranks(context)


def _check_one_process(context: StepContext) -> None:
    """Run all stages in this process, with loader and loop, and compare the allocator's figures."""
    few, many = context.size.flat_steps
    config = resolve_words([*checked_words(context), "pipeline.processes=1"])
    stages = build_stages(config)
    for _ in range(few - WARM_UP_STEPS):
        stages.step()
    before = _read_memory()
    for _ in range(many - few):
        stages.step()
    after = _read_memory()

    is_flat = all(
        after[key] <= _MAX_RATIO * before[key] for key in ("peak_bytes", "allocated_bytes")
    )
    text = f"peak {_format_mib(before['peak_bytes'])} up to step {few}"
    text += f", {_format_mib(after['peak_bytes'])} later"
    text += f"; allocated {_format_mib(before['allocated_bytes'])} at step {few}"
    text += f", {_format_mib(after['allocated_bytes'])} at step {many}"
    add = context.add_ok if is_flat else context.add_failure
    add("one process", text, steps=[few, many], before=before, after=after)


def _read_memory() -> dict[str, int]:
    """Return bytes of the allocator and of this process, and let the peak begin anew."""
    torch.cuda.synchronize()
    figures = {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "allocated_bytes": torch.cuda.memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "resident_bytes": psutil.Process().memory_info().rss,
    }
    torch.cuda.reset_peak_memory_stats()
    return figures


def _check_ranks(context: StepContext) -> None:
    """Train a few and many steps over NCCL, and compare the peaks of the ranks."""
    ranks = find_ranks(context)
    if ranks.problem is not None:
        context.add_absence("over NCCL", ranks.problem)
        return
    runs: dict[str, list[str]] = {}
    for steps in context.size.flat_steps:
        runs[f"{steps} steps"] = [
            *checked_words(context),
            f"pipeline.stages={max(4, ranks.count)}",
            f"pipeline.processes={ranks.count}",
            "pipeline.backend=nccl",
            f"optim.epochs={steps}",
            f"optim.max_steps={steps}",
            f"run.evaluate_every={steps}",
        ]
    ends = train_all(context, runs, context.left_s, ranks.variables)
    peaks: list[list[int]] = []
    for name, end in ends.items():
        if end.result is None:
            context.add_failure("over NCCL", f"{name}: {end.problem}")
            return
        peaks.append(list(end.result["peak_memory_bytes"]))
    few, many = peaks
    is_flat = all(last <= _MAX_RATIO * first for first, last in zip(few, many, strict=True))
    first_steps, last_steps = context.size.flat_steps
    text = f"{ranks.text}: peak {_format_mib(max(few))} in {first_steps} steps, "
    text += f"{_format_mib(max(many))} in {last_steps}"
    figures: dict[str, Any] = {"steps": [first_steps, last_steps], "peak_bytes": peaks}
    add = context.add_ok if is_flat else context.add_failure
    add("over NCCL", text, **figures)


def _format_mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
