"""Who did what when: the phases of every worker, kept in a bounded buffer and merged into one Chrome trace.

A worker writes its part when it ends; the collector puts the parts of all workers on one clock, in RUN_DIR/trace.json
(chrome://tracing and Perfetto open it).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from localpipe.files import SCHEMA, write_whole
from localpipe.pipeline.workers.phase import COMPUTE
from localpipe.runs.clock import ClockOffset

TRACE_FILE = "trace.json"
KEPT = 20_000  # spans of a worker, the latest: some 3,000 steps of one stage, and 4 MB of memory
KINDS = {
    **dict.fromkeys(COMPUTE, "compute"),
    "receive": "wait",
    "data": "wait",
    "send": "send",
    "eval": "eval",
    "save": "save",
}


class Span(NamedTuple):
    """One phase of one stage, in seconds of a monotonic clock; `step` is the message's."""

    stage: int
    phase: str
    step: int
    begin: float
    end: float


class Trace:
    """The latest spans of one worker."""

    def __init__(self, kept: int = KEPT) -> None:
        self._spans: deque[Span] = deque(maxlen=kept)
        self._added = 0

    def add(self, stage: int, phase: str, step: int, begin: float, end: float) -> None:
        """Keep a span, in place of the oldest where the buffer is full."""
        self._spans.append(Span(stage, phase, step, begin, end))
        self._added += 1

    @property
    def spans(self) -> list[Span]:
        """The spans that are kept, in order."""
        return list(self._spans)

    def write(self, run_dir: Path, rank: int, clock: ClockOffset | None) -> None:
        """Write this worker's part; `clock` is None where its host's clock was never compared.

        A disk that is full is told by what matters, the checkpoints: here it costs no more than the trace.
        """
        part = {
            "rank": rank,
            "clock": None if clock is None else asdict(clock),
            "dropped": self._added - len(self._spans),
            "spans": self.spans,
        }
        try:
            _part(run_dir, rank).write_text(json.dumps(part), encoding="utf-8")
        except OSError as error:
            print(f"localpipe: no trace of rank {rank}: {error.strerror}", file=sys.stderr)


def merge_traces(run_dir: Path) -> bool:
    """Join the parts that workers have left into trace.json and remove them; return whether there were any."""
    parts = sorted(_parts(run_dir), key=lambda part: int(part["rank"]))
    if parts:
        write_whole(run_dir / TRACE_FILE, json.dumps(chrome_trace(parts)) + "\n")
    for path in run_dir.glob(_part(run_dir, "*").name):
        path.unlink(missing_ok=True)
    return bool(parts)


def chrome_trace(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parts as one Chrome trace; microseconds from the first span. A part without a clock is only listed."""
    timed = [part for part in parts if part["clock"] is not None]
    spans = [(part, Span(*span)) for part in timed for span in part["spans"]]
    rows = sorted({(span.stage, int(part["rank"])) for part, span in spans})
    zero = min((span.begin + part["clock"]["offset_s"] for part, span in spans), default=0.0)
    events = [
        event for number, (stage, rank) in enumerate(rows) for event in _names(number, stage, rank)
    ]
    for part, span in spans:
        begin = span.begin + part["clock"]["offset_s"] - zero
        events.append(
            {
                "name": span.phase,
                "cat": KINDS.get(span.phase, "other"),
                "ph": "X",
                "ts": round(1e6 * begin, 1),
                "dur": round(1e6 * (span.end - span.begin), 1),
                "pid": rows.index((span.stage, part["rank"])),
                "tid": part["rank"],
                "args": {"step": span.step},
            }
        )
    workers = [{key: part[key] for key in ("rank", "clock", "dropped")} for part in parts]
    return {
        "schema": SCHEMA,
        "displayTimeUnit": "ms",
        "otherData": {"clock": "monotonic, rank 0's host", "workers": workers},
        "traceEvents": events,
    }


@dataclass(frozen=True)
class TraceRow:
    """What one stage did on one worker, in seconds from the beginning of the trace, in order."""

    stage: int
    rank: int
    spans: tuple[Span, ...]


def group_spans(spans: Iterable[tuple[int, Span]]) -> tuple[TraceRow, ...]:
    """Return the rows of (rank, span) pairs, by stage and rank."""
    found: dict[tuple[int, int], list[Span]] = {}
    for rank, span in spans:
        found.setdefault((span.stage, rank), []).append(span)
    ordered = {
        place: tuple(sorted(of_one, key=lambda span: span.begin))
        for place, of_one in sorted(found.items())
    }
    return tuple(TraceRow(stage, rank, kept) for (stage, rank), kept in ordered.items())


def trace_rows(trace: Mapping[str, Any]) -> tuple[TraceRow, ...]:
    """Return the rows of a trace that `chrome` made, by stage and rank."""
    events = trace["traceEvents"]
    places = {event["pid"]: event["args"] for event in events if event["name"] == "process_name"}
    spans: dict[int, list[Span]] = {number: [] for number in places}
    for event in events:
        if event["ph"] == "X":
            begin, stage = event["ts"] / 1e6, places[event["pid"]]["stage"]
            spans[event["pid"]].append(
                Span(stage, event["name"], event["args"]["step"], begin, begin + event["dur"] / 1e6)
            )
    found = (
        TraceRow(
            place["stage"], place["rank"], tuple(sorted(spans[number], key=lambda span: span.begin))
        )
        for number, place in places.items()
    )
    return tuple(sorted(found, key=lambda row: (row.stage, row.rank)))


def _names(number: int, stage: int, rank: int) -> Iterator[dict[str, Any]]:
    """Yield what names and orders a row."""
    name = {"name": f"stage {stage} (rank {rank})", "stage": stage, "rank": rank}
    for what, args in (("process_name", name), ("process_sort_index", {"sort_index": number})):
        yield {"name": what, "ph": "M", "pid": number, "tid": rank, "args": args}


def _part(run_dir: Path, rank: int | str) -> Path:
    return run_dir / f".{TRACE_FILE}.rank_{rank}"


def _parts(run_dir: Path) -> Iterator[dict[str, Any]]:
    for path in run_dir.glob(_part(run_dir, "*").name):
        with contextlib.suppress(OSError, ValueError):  # a worker that died while it wrote
            yield json.loads(path.read_text(encoding="utf-8"))
