"""The part of a trace that shows a pipeline at work: some steps in steady state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from localpipe.pipeline.workers.phase import COMPUTE_PHASES
from localpipe.runs.trace import Span, TraceRow

STEPS = 10
_INTERRUPTS = ("eval", "save", "start", "compile", "end")  # phases that no steady state has


class StepSpan(NamedTuple):
    """One training step of a row, in seconds of the trace."""

    begin: float
    end: float
    step: int


@dataclass(frozen=True)
class Window:
    """Spans of every row between two moments, in seconds of the trace.

    first_step, last_step: of the last stage in `steady_window`, of all stages in `last_steps`.
    """

    begin: float
    end: float
    rows: tuple[TraceRow, ...]
    first_step: int  # of the last stage
    last_step: int

    @property
    def computing(self) -> float:
        """How many workers compute at once, on average. ZeroDivisionError if begin equals end."""
        busy = sum(span.end - span.begin for span in self._compute_spans())
        return busy / (self.end - self.begin)

    @property
    def overlap(self) -> float:
        """The share of the window, 0..1, in which at least two workers compute.

        Raises ZeroDivisionError if begin equals end.
        """
        # A worker computes one span at a time, so open spans are workers that compute.
        changes = []
        for span in self._compute_spans():
            changes += [(span.begin, 1), (span.end, -1)]
        changes.sort()
        overlap_s, workers = 0.0, 0
        for (moment, change), (following, _) in pairwise(changes):
            workers += change
            if workers >= 2:
                overlap_s += following - moment
        return overlap_s / (self.end - self.begin)

    def _compute_spans(self) -> Iterator[Span]:
        for row in self.rows:
            for span in row.spans:
                if span.phase in COMPUTE_PHASES:
                    yield span


def steady_window(rows: Sequence[TraceRow], steps: int = STEPS) -> Window | None:
    """Return `steps` training steps from the middle of the longest uninterrupted time.

    rows: as `trace_rows` returns them, the last stage last. steps: at least 1. The steps are those
    of the last row. Evaluations, checkpoints and the start interrupt. Spans that reach out of the
    window are clipped. The window is None where the last row trained no step, and shorter where
    there are fewer steps.
    """
    if not rows:
        return None
    last_stage_steps = _list_training_steps(rows[-1])
    if not last_stage_steps:
        return None
    interrupts = []
    for row in rows:
        for span in row.spans:
            if span.phase in _INTERRUPTS:
                interrupts.append((span.begin, span.end))

    # The longest run of steps between two interrupts.
    longest: list[StepSpan] = []
    for begin, end in _find_gaps(sorted(interrupts)):
        between = [step for step in last_stage_steps if begin <= step.begin and step.end <= end]
        longest = max(longest, between, key=len)
    longest = longest or last_stage_steps
    first = max(0, (len(longest) - steps) // 2)
    return _cut_window(rows, longest[first : first + steps])


def last_steps(rows: Sequence[TraceRow], steps: int) -> Window | None:
    """Return the last `steps` steps of a synchronous pipeline, by their numbers.

    rows: in any order. steps: at least 1. The window goes from the first span of these steps to the
    end of their last one. No span is clipped. It is None where no row has spans, and shorter where
    there are fewer steps.
    """
    numbers = [span.step for row in rows for span in row.spans]
    if not numbers:
        return None
    last = max(numbers)
    first = max(last - steps, min(numbers) - 1) + 1
    selected = []
    for row in rows:
        spans = tuple(span for span in row.spans if span.step >= first)
        selected.append(TraceRow(row.stage, row.rank, spans))
    begin = min(span.begin for row in selected for span in row.spans)
    end = max(span.end for row in selected for span in row.spans)
    return Window(begin, end, tuple(selected), first, last)


def _list_training_steps(row: TraceRow) -> list[StepSpan]:
    """Return the row's training steps: from the wait for a message to the end of the update."""
    steps = []
    begin = row.spans[0].begin
    for span in row.spans:
        if span.phase in ("receive", "data"):
            begin = span.begin
        elif span.phase == "update":
            steps.append(StepSpan(begin, span.end, span.step))
    return steps


def _find_gaps(intervals: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield what lies between intervals that are sorted by their beginnings."""
    covered = float("-inf")
    for begin, end in intervals:
        yield covered, begin
        covered = max(covered, end)
    yield covered, float("inf")


def _cut_window(rows: Sequence[TraceRow], steps: Sequence[StepSpan]) -> Window:
    """Return the window of some steps; spans that reach out of it are clipped."""
    begin, end = steps[0].begin, steps[-1].end
    clipped_rows = []
    for row in rows:
        spans = []
        for span in row.spans:
            if span.begin < end and span.end > begin:
                clipped = span._replace(begin=max(span.begin, begin), end=min(span.end, end))
                spans.append(clipped)
        clipped_rows.append(TraceRow(row.stage, row.rank, tuple(spans)))
    return Window(begin, end, tuple(clipped_rows), steps[0].step, steps[-1].step)
