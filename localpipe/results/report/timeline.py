"""The part of a trace that shows a pipeline at work: some steps in steady state, and how far the stages overlap in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from localpipe.pipeline.workers.phase import COMPUTE
from localpipe.runs.trace import Span, TraceRow

STEPS = 10
_INTERRUPTS = ("eval", "save", "start", "compile", "end")  # what no steady state holds


@dataclass(frozen=True)
class Window:
    """Spans of every row between two moments; seconds of the trace."""

    begin: float
    end: float
    rows: tuple[TraceRow, ...]
    first_step: int  # of the last stage
    last_step: int

    @property
    def computing(self) -> float:
        """Return how many workers compute at once, on average."""
        busy = sum(
            span.end - span.begin
            for row in self.rows
            for span in row.spans
            if span.phase in COMPUTE
        )
        return busy / (self.end - self.begin)

    @property
    def overlap(self) -> float:
        """Return the share of the window in which at least two workers compute."""
        computing = [
            span for row in self.rows for span in row.spans if span.phase in COMPUTE
        ]  # one at a time in a worker
        moments = sorted(
            [(span.begin, 1) for span in computing] + [(span.end, -1) for span in computing]
        )
        together, at_work = 0.0, 0
        for (moment, step), (following, _) in pairwise(moments):
            at_work += step
            together += following - moment if at_work >= 2 else 0.0
        return together / (self.end - self.begin)


def steady_window(rows: Sequence[TraceRow], steps: int = STEPS) -> Window | None:
    """Return `steps` training steps from the middle of the longest time without evaluation, checkpoint or start.

    The steps are the last stage's. None where no step was trained; fewer steps where there are not so many.
    """
    if not rows:
        return None
    last = _steps(rows[-1])
    if not last:
        return None
    interrupts = sorted(
        (s.begin, s.end) for row in rows for s in row.spans if s.phase in _INTERRUPTS
    )
    calm = max((_within(last, *gap) for gap in _gaps(interrupts)), key=len, default=[]) or last
    first = max(0, (len(calm) - steps) // 2)
    shown = calm[first : first + steps]
    return _cut(rows, shown)


def last_steps(rows: Sequence[TraceRow], steps: int) -> Window | None:
    """Return the last `steps` steps of a synchronous pipeline, from the first one's first span to the last one's last."""
    last = max((span.step for row in rows for span in row.spans), default=None)
    if last is None:
        return None
    first = max(last - steps, min(span.step for row in rows for span in row.spans) - 1) + 1
    kept = [
        TraceRow(row.stage, row.rank, tuple(span for span in row.spans if span.step >= first))
        for row in rows
    ]
    spans = [span for row in kept for span in row.spans]
    return Window(
        min(span.begin for span in spans), max(span.end for span in spans), tuple(kept), first, last
    )


def _steps(row: TraceRow) -> list[tuple[float, float, int]]:
    """Return (begin, end, step) of the row's training steps: from the wait for a message to the next wait."""
    found: list[tuple[float, float, int]] = []
    begin = row.spans[0].begin
    for span in row.spans:
        if span.phase in ("receive", "data"):
            begin = span.begin
        elif span.phase == "update":
            found.append((begin, span.end, span.step))
    return found


def _gaps(intervals: Sequence[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """Yield what lies between intervals that are sorted by their beginnings."""
    covered = float("-inf")
    for begin, end in intervals:
        yield covered, begin
        covered = max(covered, end)
    yield covered, float("inf")


def _within(
    steps: Iterable[tuple[float, float, int]], begin: float, end: float
) -> list[tuple[float, float, int]]:
    return [step for step in steps if begin <= step[0] and step[1] <= end]


def _cut(rows: Sequence[TraceRow], steps: Sequence[tuple[float, float, int]]) -> Window:
    begin, end = steps[0][0], steps[-1][1]

    def clipped(span: Span) -> Span:
        return span._replace(begin=max(span.begin, begin), end=min(span.end, end))

    cut = tuple(
        TraceRow(
            row.stage,
            row.rank,
            tuple(clipped(span) for span in row.spans if span.begin < end and span.end > begin),
        )
        for row in rows
    )
    return Window(begin, end, cut, steps[0][2], steps[-1][2])
