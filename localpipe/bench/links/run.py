"""`localpipe bench --link`: every system on links of a rate, beside its own speed on open ones.

    a round:  for every system   open: step, bound   shaped: step

A window has at least ten steps. The steps after a change of the link are not counted: messages may
still wait in queues, or none may.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from localpipe.bench.launch import check_batch, describe_machine
from localpipe.bench.links.predictions import list_edge_bytes
from localpipe.bench.links.rate import LinkRequest, format_rate, parse_link
from localpipe.bench.links.rows import (
    BOUND,
    OPEN,
    SHAPED,
    build_link_rows,
    build_link_table,
    find_step_s,
    label_link_row,
)
from localpipe.bench.links.shaping import BenchLink, open_link
from localpipe.bench.measure import find_signal
from localpipe.bench.peer_cuts import has_companions, measure_blocks
from localpipe.bench.processes import StopRequested, SystemProcesses
from localpipe.bench.request import (
    CheckedRequest,
    check_count,
    choose_cut,
    make_cut_explicit,
    system_config,
)
from localpipe.bench.rows import Measured, Row, list_rates
from localpipe.bench.systems.spec import SystemRequest, find_system
from localpipe.bench.tables import table_console
from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import to_dict, update
from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset
from localpipe.errors import UserError, suggest
from localpipe.files import SCHEMA, check_output_path, write_output
from localpipe.networks.weights.pretrained import load_pretrained
from localpipe.output import show_progress
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.plan.predict import profile_for
from localpipe.plan.resolve_here import load_data, resolve_here
from localpipe.runs.prepare import check_plan

SYSTEMS = ("localpipe", "gpipe", "1f1b", "zb", "ddp")
WIRE_DTYPES = ("fp32", "bf16", "int8", "int4")  # the rows of localpipe
MICRO_BATCHES = (2, 4, 8, 16, 32)
MIN_STEPS = 10  # of a window
_WARM_STEPS = 4  # beside the depth of an edge, after a change of the link
_ALL = "all"


@dataclass(frozen=True)
class LinkCase:
    """One row to measure: a system, or the reason why it cannot be, and its configuration."""

    checked: CheckedRequest
    config: Resolved

    @property
    def label(self) -> str:
        """The row's name in progress lines."""
        request = self.checked.request
        if request.spec.is_subject:
            return f"{request.system} {self.config.pipeline.wire_dtype}"
        if request.micro_batches is None:
            return request.system
        return f"{request.system}, {request.micro_batches} micro-batches"


def run_link_bench(
    config: Config, text: str, target: Path | None, command: str, counts: Sequence[int] | None
) -> int:
    """Measure the systems on a link and print the table; return the exit status.

    It is 0, or 1 if no system has figures, or 128 + signal after a stop. text: of --link. target: a
    file to write, or None. command: as typed, without flags. counts: the numbers of micro-batches
    to choose from, None for 2 to 32. Raises UserError for what cannot be measured, RunError if the
    blocks cannot be measured or `target` cannot be written.
    """
    request = parse_link(text)
    _check_systems(config)
    if target is not None:
        check_output_path("bench: --json", target)
    try:
        return _run(config, request, target, command, counts)
    except StopRequested as stop:
        status: int = 128 + stop.args[0]
        return status


def find_counts(config: Config, typed: Sequence[int] | None) -> Sequence[int] | None:
    """Return the numbers of micro-batches of the flag, or else of the configuration, or None.

    config: as it was loaded, so that it knows which keys were set.
    """
    if typed is None and "micro_batches" in config.bench.model_fields_set:
        return config.bench.micro_batches
    return typed


def _run(
    config: Config,
    request: LinkRequest,
    target: Path | None,
    command: str,
    counts: Sequence[int] | None,
) -> int:
    # What is measured.
    config, dataset = load_data(config, load_pretrained(config.model))
    check_batch(config, len(dataset.train))
    resolved = _resolve(config, dataset)
    check_plan(resolved, dataset)
    _check_config(resolved)
    command = f"{make_cut_explicit(command, config, resolved)} --link {request.text}"

    with open_link(request, resolved.pipeline.processes) as link:
        rows_to_measure = _list_cases(resolved, counts)
        bits_per_s = request.bits_per_s or _find_rate(resolved, link, request)
        bench = _LinkBench(link, bits_per_s, request.delay_s)
        measured = bench.measure([bench.choose_case(row) for row in rows_to_measure])
    show_progress("")

    # The file and the table.
    goodput = bits_per_s * link.payload_share
    rows = build_link_rows(measured, goodput, request.delay_s, command)
    machine = describe_machine(resolved)
    if target is not None:
        facts = {
            "bits_per_s": bits_per_s,
            "goodput_bits_per_s": goodput,
            "delay_s": request.delay_s,
            "how": link.how,
        }
        write_output(target, _format_result(resolved, machine, facts, rows), "file")
    console = table_console()
    console.print(build_link_table(rows, resolved, _describe_link(bits_per_s, request.delay_s)))
    for line in _list_remarks(rows, link.how, machine):
        console.print(line, highlight=False, soft_wrap=True)
    return int(not any(row["samples_per_s"] for row in rows))


def _format_result(
    config: Resolved, machine: Row, link: dict[str, Any], rows: Sequence[Row]
) -> str:
    """Return the content of the file of --json. link: its facts."""
    result = {
        "schema": SCHEMA,
        "machine": machine,
        "config": to_dict(config),
        "link": link,
        "rows": rows,
    }
    return json.dumps(result, indent=1) + "\n"


def _describe_link(bits_per_s: float, delay_s: float) -> str:
    """Return the words of the table's title."""
    text = f"{format_rate(bits_per_s)} each way"
    if delay_s:
        text += f", {1e3 * delay_s:g} ms"
    return text


def _list_remarks(rows: Sequence[Row], how: str, machine: Row) -> list[str]:
    """Return the lines below the table. how: how the links are made, for people."""
    lines = [
        f"links: TCP, {how}; each system beside its own on the same links, open",
        "r: transfer time of a message over the compute time of the slowest stage; of ddp, of its "
        "gradients over a step",
        "predicted: by the simulator, from the computing on the open link, a third of it forward, "
        "scaled to the speed there",
    ]
    if any(row["system"] == "zb" for row in rows):
        lines.append(
            "zb has two stages a worker, so that three messages cross the link for each of 1f1b; "
            "it is predicted as ZB-H1 with messages of their size together"
        )
    for row in rows:
        if row["note"] is not None:
            lines.append(f"{label_link_row(row)}: {row['note']}")
    lines.append(f"{machine['cores']} cores, {machine['device']}, torch {machine['torch']}")
    return lines


# -- before anything is measured ----------------------------------------------------------------


def _check_systems(config: Config) -> None:
    """Raise UserError for a system that has no row here."""
    for name in _requested_systems(config):
        if name not in SYSTEMS:
            raise UserError(f"bench: --link has no system {name!r}; {suggest(name, SYSTEMS)}")


def _requested_systems(config: Config) -> Sequence[str]:
    if config.bench.systems == _ALL:
        return SYSTEMS
    return [name for name in SYSTEMS if name in config.bench.systems] or config.bench.systems


def _resolve(config: Config, dataset: Dataset) -> Resolved:
    """Return the resolved configuration. A cut by time is measured where localpipe has a row."""
    needs_cut = "localpipe" in _requested_systems(config)
    if not needs_cut and config.pipeline.cuts in MEASURED:
        config = update(config, {"pipeline.cuts": "equal"})
    if config.pipeline.cuts == "time":
        show_progress("measuring the blocks of localpipe's stages")
    profile = profile_for(config, dataset, False, None)
    return resolve_here(config, dataset, profile=profile)


def _check_config(config: Resolved) -> None:
    """Raise UserError for a configuration whose processes cannot be joined by such links."""
    if config.pipeline.processes < 2:
        raise UserError(
            "bench: --link needs an edge between two processes, and pipeline.processes is 1; "
            "set pipeline.processes=2, and as many pipeline.stages"
        )
    if max(config.replicas) > 1:
        raise UserError("bench: --link knows one replica of every stage; set pipeline.replicas=1")
    if config.run.device != "cpu":
        raise UserError("bench: --link measures edges over TCP; set run.device=cpu")


def _list_cases(config: Resolved, requested_counts: Sequence[int] | None) -> list[list[LinkCase]]:
    """Return the rows to measure. A row is a list of the numbers of micro-batches to choose from.

    The blocks are measured for the peers' cuts.
    """
    names = _requested_systems(config)
    if config.only_waits:
        names = [name for name in names if not find_system(name).is_peer]
    counts = _list_counts(config, requested_counts)
    seconds: dict[int, list[float]] = {}
    has_pipelines = any(find_system(name).has_micro_batches for name in names)
    if has_pipelines and not has_companions(build_blueprint(config)):
        show_progress("measuring the blocks for the peers' cuts")
        seconds = measure_blocks(config, counts)
    rows = []
    for name in names:
        if find_system(name).is_subject:
            rows += [[case] for case in _list_subject_cases(name, config)]
        else:
            rows.append(_list_peer_cases(name, config, counts, seconds))
    if not rows:
        raise UserError("bench: --link: no system of bench.systems can run here; choose localpipe")
    return rows


def _list_subject_cases(name: str, config: Resolved) -> list[LinkCase]:
    """Return localpipe at every dtype of the wire."""
    cases = []
    for dtype in WIRE_DTYPES:
        case_config = update(config, {"pipeline.wire_dtype": dtype})
        cases.append(LinkCase(CheckedRequest(SystemRequest(name)), case_config))
    return cases


def _list_peer_cases(
    name: str, config: Resolved, counts: Sequence[int], seconds: dict[int, list[float]]
) -> list[LinkCase]:
    """Return a peer at every number of micro-batches, or once where it has none.

    seconds: of every block, by the number of micro-batches.
    """
    requests = [SystemRequest(name)]
    if find_system(name).has_micro_batches:
        requests = [SystemRequest(name, count) for count in counts]
    cases = []
    for request in requests:
        checked = choose_cut(request, config, seconds)
        cases.append(LinkCase(checked, system_config(request, config)))
    return cases


def _list_counts(config: Resolved, requested: Sequence[int] | None) -> list[int]:
    """Return the numbers of micro-batches: those that are requested, or 2 to 32."""
    batch = config.data.batch_size
    if requested is not None:
        for count in requested:
            check_count(count, batch)
        return list(requested)
    counts = [count for count in MICRO_BATCHES if batch % count == 0]
    return counts or [1]


# -- measuring ----------------------------------------------------------------------------------


def _find_rate(config: Resolved, link: BenchLink, request: LinkRequest) -> float:
    """Return the rate in bits a second at which localpipe's fp32 message takes `r` of a stage."""
    assert request.ratio is not None
    config = update(config, {"pipeline.wire_dtype": "fp32"})
    case = LinkCase(CheckedRequest(SystemRequest("localpipe")), config)
    with contextlib.ExitStack() as resources:
        processes = _start([case], link, resources)[0]
        show_progress("measuring localpipe's stages")
        processes.build(config.bench.window_s, MIN_STEPS)
        for _ in range(3):
            processes.run_window(OPEN, None, _count_warm_steps(processes))
            processes.run_window(BOUND, BOUND)
        processes.end()
        measured = processes.collect()
    if measured.note is not None:
        raise UserError(f"bench: --link {request.text}: localpipe failed: {measured.note}")
    stage_s = max(find_step_s(measured, BOUND, "wall_s")) / config.optim.accumulate
    transfer_s = request.ratio * stage_s
    return 8 * max(list_edge_bytes(config)) / transfer_s / link.payload_share


def _count_warm_steps(processes: SystemProcesses) -> int:
    """Return the steps after which queues are as full as they stay."""
    return processes.config.pipeline.depth + _WARM_STEPS


def _start(
    cases: Sequence[LinkCase], link: BenchLink, resources: contextlib.ExitStack
) -> list[SystemProcesses]:
    """Start the processes of several systems, all of which `resources` closes."""
    group: list[SystemProcesses] = []
    for case in cases:
        processes = SystemProcesses(
            case.checked.request, case.config, partial(find_signal, group), link.networks
        )
        resources.callback(processes.close)
        group.append(processes)
    return group


@dataclass(frozen=True)
class _LinkBench:
    """Measures systems on a link of a rate and on the open link in turn."""

    link: BenchLink
    bits_per_s: float
    delay_s: float

    def choose_case(self, cases: Sequence[LinkCase]) -> LinkCase:
        """Return the case of a row that is fastest on the link, or the first one that has a note.

        Every case takes one window of ten steps.
        """
        runnable = [case for case in cases if case.checked.note is None]
        if len(runnable) < 2:
            return (runnable or list(cases))[0]
        rates = {}
        for index, case in enumerate(runnable):
            show_progress(f"trying {case.label}")
            with contextlib.ExitStack() as resources:
                (processes,) = _start([case], self.link, resources)
                processes.build(0.0, MIN_STEPS)
                self._run_shaped(processes)
                self.link.open(processes)
                processes.end()
                measured = processes.collect()
            if measured.note is None:
                rates[index] = list_rates(measured, SHAPED)[0]
        if not rates:
            note = measured.note
            return replace(runnable[-1], checked=replace(runnable[-1].checked, note=note))
        return runnable[max(rates, key=lambda index: rates[index])]

    def measure(self, cases: Sequence[LinkCase]) -> list[Measured]:
        """Return what every system measured, in order. One that fails has a note.

        localpipe's rows take their windows in turn, since they are compared with each other. A peer
        is compared with itself alone. It is started, measured and ended by itself, because all
        systems together would need much memory.
        """
        subjects = [case for case in cases if case.checked.request.spec.is_subject]
        peers = [case for case in cases if not case.checked.request.spec.is_subject]
        measured = []
        for group in (subjects, *[[peer] for peer in peers]):
            if group:
                measured += self._measure_together(group)
        return measured

    def _measure_together(self, cases: Sequence[LinkCase]) -> list[Measured]:
        """Return what systems measured whose processes are there at the same time, in order.

        Rounds run there and back, so that a drift favours none.
        """
        startable = [case for case in cases if case.checked.note is None]
        with contextlib.ExitStack() as resources:
            group = _start(startable, self.link, resources)
            for case, processes in zip(startable, group, strict=True):
                processes.build(case.config.bench.window_s, MIN_STEPS)
            for window in range(cases[0].config.bench.windows):
                order = list(zip(startable, group, strict=True))
                if window % 2:
                    order.reverse()
                for case, processes in order:
                    show_progress(f"window {window + 1}: {case.label}", is_frequent=True)
                    self._run_round(processes)
            for processes in group:
                processes.end()
            results = iter([processes.collect() for processes in group])
        measured = []
        for case in cases:
            if case.checked.note is None:
                measured.append(next(results))
            else:
                checked = case.checked
                measured.append(Measured.missing(checked.request, case.config, checked.note))
        return measured

    def _run_round(self, processes: SystemProcesses) -> None:
        """Run the windows of a system on the open link and on the shaped one."""
        processes.run_window(OPEN, None, _count_warm_steps(processes))
        processes.run_window(OPEN, OPEN)
        if processes.request.spec.is_subject:
            processes.run_window(BOUND, BOUND)
        self._run_shaped(processes)
        self.link.open(processes)

    def _run_shaped(self, processes: SystemProcesses) -> None:
        self.link.shape(processes, self.bits_per_s, self.delay_s)
        processes.run_window(OPEN, None, _count_warm_steps(processes))
        processes.run_window(OPEN, SHAPED)
