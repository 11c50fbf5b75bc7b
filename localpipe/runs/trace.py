"""The phases of every worker in a bounded buffer, and all of them as one Chrome trace.

A worker writes its part when it ends. The collector joins the parts of all workers on one clock in
RUN_DIR/trace.json, which chrome://tracing and Perfetto open.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from localpipe.files import SCHEMA, write_output
from localpipe.output import warn
from localpipe.pipeline.workers.phase import COMPUTE_PHASES
from localpipe.runs.clock import ClockOffset

TRACE_FILE = "trace.json"
# Spans of a worker, the latest ones: some 3,000 steps of one stage, and 4 MB of memory.
MAX_SPANS = 20_000
KINDS = {
    **dict.fromkeys(COMPUTE_PHASES, "compute"),
    "receive": "wait",
    "data": "wait",
    "send": "send",
    "feedback": "feedback",
    "eval": "eval",
    "save": "save",
}


class Span(NamedTuple):
    """One phase of one stage, in seconds of a monotonic clock.

    phase: a name of `PhaseTimer`, such as `forward`. step: that of the message. Times that
    `trace_rows` reads count from the start of the trace.
    """

    stage: int
    phase: str
    step: int
    begin: float
    end: float


class Trace:
    """The latest `max_spans` spans of one worker, of all its stages."""

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        self._spans: deque[Span] = deque(maxlen=max_spans)
        self._count = 0

    def add(self, stage: int, phase: str, step: int, begin: float, end: float) -> None:
        """Store a span, in place of the oldest if the buffer is full.

        begin, end: seconds of this host's monotonic clock.
        """
        self._spans.append(Span(stage, phase, step, begin, end))
        self._count += 1

    @property
    def spans(self) -> list[Span]:
        """A new list of the spans in the buffer, in the order in which they were added."""
        return list(self._spans)

    def write(self, run_dir: Path, rank: int, clock: ClockOffset | None) -> None:
        """Write this worker's part into the run directory, for `merge_traces`.

        clock: None if its host's clock was never compared. A second call replaces the part. It
        raises no OSError: where it cannot write, it prints a line to standard error. A full disk
        costs no more than the trace.
        """
        part = {
            "rank": rank,
            "clock": None if clock is None else asdict(clock),
            "dropped": self._count - len(self._spans),
            "spans": self.spans,
        }
        try:
            _part_file(run_dir, rank).write_text(json.dumps(part), encoding="utf-8")
        except OSError as error:
            warn(f"localpipe: no trace of rank {rank}: {error.strerror}")


def merge_traces(run_dir: Path) -> bool:
    """Join the workers' parts into trace.json, remove them, and return whether there were any.

    A part that cannot be read is left out. Without parts, a trace.json that exists stays. Raises
    RunError if trace.json cannot be written, and leaves the parts.
    """
    parts = sorted(_read_parts(run_dir), key=lambda part: int(part["rank"]))
    if parts:
        write_output(run_dir / TRACE_FILE, json.dumps(build_chrome_trace(parts)) + "\n")
    for path in _list_part_files(run_dir):
        path.unlink(missing_ok=True)
    return bool(parts)


def build_chrome_trace(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parts as one Chrome trace, in microseconds from the first span.

    A part has `rank`, `clock` (a ClockOffset as a dict, or None), `dropped` (a count) and `spans`
    (fields of Span). The result has `schema`, `displayTimeUnit`, `otherData` and `traceEvents`.
    `pid` numbers the rows, ordered by stage and rank, and `tid` is the rank. A part without a clock
    is only listed in `otherData`. Raises KeyError if a part lacks a key.
    """
    # Every span with its rank and what brings it onto rank 0's clock.
    timed_spans: list[tuple[int, float, Span]] = []
    for part in parts:
        if part["clock"] is not None:
            for span in part["spans"]:
                timed_spans.append((int(part["rank"]), part["clock"]["offset_s"], Span(*span)))
    rows = sorted({(span.stage, rank) for rank, _, span in timed_spans})
    zero_s = min((span.begin + offset_s for _, offset_s, span in timed_spans), default=0.0)

    # First the names of the rows, one for each stage of each worker, then the spans.
    events: list[dict[str, Any]] = []
    for number, (stage, rank) in enumerate(rows):
        events += _name_row(number, stage, rank)
    for rank, offset_s, span in timed_spans:
        start_s = span.begin + offset_s - zero_s
        event = {
            "name": span.phase,
            "cat": KINDS.get(span.phase, "other"),
            "ph": "X",
            "ts": round(1e6 * start_s, 1),
            "dur": round(1e6 * (span.end - span.begin), 1),
            "pid": rows.index((span.stage, rank)),
            "tid": rank,
            "args": {"step": span.step},
        }
        events.append(event)

    workers = []
    for part in parts:
        workers.append({key: part[key] for key in ("rank", "clock", "dropped")})
    return {
        "schema": SCHEMA,
        "displayTimeUnit": "ms",
        "otherData": {"clock": "monotonic, rank 0's host", "workers": workers},
        "traceEvents": events,
    }


@dataclass(frozen=True)
class TraceRow:
    """The spans of one stage on one worker, by their begin.

    The spans keep the clock that they had: `trace_rows` counts from the start of the trace.
    """

    stage: int
    rank: int
    spans: tuple[Span, ...]


def group_spans(rank_spans: Iterable[tuple[int, Span]]) -> tuple[TraceRow, ...]:
    """Return a row for every stage and rank of (rank, span) pairs, by stage, then rank.

    The pairs may have any order. Times stay as they are. Empty without pairs.
    """
    groups: dict[tuple[int, int], list[Span]] = {}
    for rank, span in rank_spans:
        groups.setdefault((span.stage, rank), []).append(span)
    return _build_rows(groups)


def trace_rows(trace: Mapping[str, Any]) -> tuple[TraceRow, ...]:
    """Return the rows of a trace that `build_chrome_trace` made, by stage, then rank.

    Times become seconds from the start of the trace. Empty for a trace without spans. Raises
    KeyError for another program's trace.
    """
    # The events that name a row hold its stage and rank.
    events = trace["traceEvents"]
    keys: dict[int, tuple[int, int]] = {}
    for event in events:
        if event["name"] == "process_name":
            keys[event["pid"]] = event["args"]["stage"], event["args"]["rank"]

    groups: dict[tuple[int, int], list[Span]] = {key: [] for key in keys.values()}
    for event in events:
        if event["ph"] == "X":
            key = keys[event["pid"]]
            start_s = event["ts"] / 1e6
            end_s = start_s + event["dur"] / 1e6
            groups[key].append(Span(key[0], event["name"], event["args"]["step"], start_s, end_s))
    return _build_rows(groups)


def _build_rows(groups: Mapping[tuple[int, int], list[Span]]) -> tuple[TraceRow, ...]:
    """Return a row for each (stage, rank), by stage and rank, its spans by their start."""
    rows = []
    for (stage, rank), spans in sorted(groups.items()):
        ordered = sorted(spans, key=lambda span: span.begin)
        rows.append(TraceRow(stage, rank, tuple(ordered)))
    return tuple(rows)


def _name_row(number: int, stage: int, rank: int) -> Iterator[dict[str, Any]]:
    """Yield the events that name and order a row."""
    name = {"name": f"stage {stage} (rank {rank})", "stage": stage, "rank": rank}
    order = {"sort_index": number}
    for event, args in (("process_name", name), ("process_sort_index", order)):
        yield {"name": event, "ph": "M", "pid": number, "tid": rank, "args": args}


def _part_file(run_dir: Path, rank: int | str) -> Path:
    return run_dir / f".{TRACE_FILE}.rank_{rank}"


def _list_part_files(run_dir: Path) -> Iterator[Path]:
    return run_dir.glob(_part_file(run_dir, "*").name)


def _read_parts(run_dir: Path) -> Iterator[dict[str, Any]]:
    for path in _list_part_files(run_dir):
        with contextlib.suppress(OSError, ValueError):  # a worker died while it wrote
            yield json.loads(path.read_text(encoding="utf-8"))
