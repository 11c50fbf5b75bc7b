"""Edges over NCCL: as many ranks as devices, beside one process that runs the same stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from localpipe.doctor.gpu.commands import CommandEnd, checked_words, compare_weights, train_all
from localpipe.doctor.gpu.machine import SHARING_VARIABLES, find_sharing_problem
from localpipe.doctor.gpu.step_context import StepContext

_REFERENCE_SHARE = 0.3  # of the step's time, for the runs of one process


@dataclass(frozen=True)
class _EdgeCase:
    """One pipeline over NCCL, and the run of one process that has to have its weights."""

    name: str
    words: Sequence[str]
    reference: str


def _list_cases(depths: Sequence[int]) -> list[_EdgeCase]:
    cases = [_EdgeCase(f"eager, depth {n}", (f"pipeline.depth={n}",), "eager") for n in depths]
    words = (f"pipeline.depth={depths[-1]}", "run.capture=graphs")
    return [*cases, _EdgeCase(f"captured, depth {depths[-1]}", words, "captured")]


@dataclass(frozen=True)
class Ranks:
    """How many ranks NCCL may have here, and the environment variables that this takes.

    problem: why there can be no second one, else None.
    """

    count: int
    variables: Mapping[str, str]
    text: str
    problem: str | None = None


def find_ranks(context: StepContext) -> Ranks:
    """Return as many ranks as devices, at most `most_ranks`, or two on one where NCCL can."""
    devices = len(context.machine["devices"])
    if devices > 1:
        count = min(devices, context.size.most_ranks)
        return Ranks(count, {}, f"{count} ranks, one a device")
    problem = find_sharing_problem(context.machine)
    return Ranks(2, SHARING_VARIABLES, "2 ranks on one device", problem)


def run(context: StepContext) -> None:
    """Add a finding for every pipeline over NCCL, or why there is none, then one over gloo."""
    ranks = find_ranks(context)
    words = [*checked_words(context), f"pipeline.stages={max(4, ranks.count)}"]
    one_process = [*words, "pipeline.processes=1"]
    references = train_all(
        context,
        {
            "one process eager": one_process,
            "one process captured": [*one_process, "run.capture=graphs"],
        },
        _REFERENCE_SHARE * context.left_s,
    )
    if ranks.problem is not None:
        context.add_absence("NCCL", ranks.problem)
        _compare_gloo(context, words, references["one process eager"])
        return
    cases = _list_cases(context.size.depths)
    for index, case in enumerate(cases):
        # A run may hang: it must not take the time of the others.
        limit_s = context.left_s / (len(cases) - index)
        name = case.name.replace(",", "")
        run_words = [
            *words,
            f"pipeline.processes={ranks.count}",
            "pipeline.backend=nccl",
            *case.words,
        ]
        ends = train_all(context, {name: run_words}, limit_s, ranks.variables)
        reference = references[f"one process {case.reference}"]
        text = f"{ranks.text}, against one process"
        compare_weights(context, case.name, reference, ends[name], text)


def _compare_gloo(context: StepContext, words: Sequence[str], reference: CommandEnd) -> None:
    """Add a finding of two workers that share the device and send over gloo."""
    run_words = [*words, "pipeline.processes=2", "pipeline.backend=gloo"]
    ends = train_all(context, {"gloo": run_words}, context.left_s)
    text = "2 workers on one device, against one process"
    compare_weights(context, "gloo", reference, ends["gloo"], text)
