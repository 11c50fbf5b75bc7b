"""`localpipe bench`: measures the systems side by side, prints the tables, and writes the files.

Every system has fresh processes. Their windows take turns.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch

from localpipe.bench.measure import measure_group
from localpipe.bench.peer_cuts import has_companions, measure_blocks
from localpipe.bench.picture import draw_picture
from localpipe.bench.processes import StopRequested
from localpipe.bench.request import (
    check_any_runs,
    check_request,
    choose_cut,
    group_requests,
    list_systems,
    make_cut_explicit,
    resolve_request,
)
from localpipe.bench.rows import Measured, Row, build_rows, select_traces
from localpipe.bench.systems.spec import SystemRequest
from localpipe.bench.tables import show_results
from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import to_dict, update
from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset
from localpipe.environment import available_cores
from localpipe.errors import UserError, first_line
from localpipe.files import SCHEMA, write_output
from localpipe.networks.weights.pretrained import load_pretrained
from localpipe.output import show_progress, warn
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.pipeline.workers.device import emulated_key, gpu_name
from localpipe.plan.resolve_here import load_data, resolve_here
from localpipe.runs.prepare import advise_on_takers, check_plan


def run_bench(config: Config, target: Path | None, picture: Path | None, command: str) -> int:
    """Measure the systems side by side and print the tables; return the exit status.

    It is 0, or 1 if no system has figures, or 128 + signal after a stop. target, picture: files to
    write, which replace old ones, or None. command: as typed, without flags. Each row gets its own.
    Raises UserError as `check_request` and `resolve_request`, RunError if the blocks cannot be
    measured or `target` cannot be written. A picture that fails is a line on standard error.
    """
    check_request(config, target, picture)
    try:
        return _run(config, target, picture, command)
    except StopRequested as stop:
        status: int = 128 + stop.args[0]
        return status


def _run(config: Config, target: Path | None, picture: Path | None, command: str) -> int:
    # What is measured.
    config, dataset = load_data(config, load_pretrained(config.model))
    check_batch(config, len(dataset.train))
    _check_unmeasured(config, dataset)
    resolved, predictions = resolve_request(config, dataset)
    check_plan(resolved, dataset)
    groups = group_requests(resolved)
    _check_any_runs(resolved, groups)
    block_seconds = _measure_blocks(resolved, groups)
    command = make_cut_explicit(command, config, resolved)

    measured: list[list[Measured]] = []
    rows: list[list[Row]] = []
    for group in groups:
        requests = [choose_cut(request, resolved, block_seconds) for request in group]
        results = measure_group(resolved, requests, picture is not None, predictions)
        rates: Sequence[float] = ()
        if predictions is not None:
            rates = predictions.samples_per_s
        measured.append(results)
        rows.append(build_rows(results, command, rates))
        # The prediction belongs to the first group: an hour later the machine may be slower.
        predictions = None

    # The files and the tables.
    machine = describe_machine(resolved)
    if target is not None:
        write_output(target, _format_result(resolved, machine, block_seconds, rows), "file")
    show_results(rows, resolved, machine, command)
    if picture is not None:
        traces = select_traces(measured[0], rows[0])
        # The figures are there already, so a picture that fails is no failure of the benchmark.
        try:
            draw_picture(rows, traces, resolved, machine, picture)
        except Exception as error:
            warn(f"localpipe: no picture {picture}: {first_line(error)}")
    has_result = any(row["samples_per_s"] for row in chain.from_iterable(rows))
    return int(not has_result)


def _check_unmeasured(config: Config, dataset: Dataset) -> None:
    """Raise UserError for what can be known before the blocks are measured."""
    if config.pipeline.cuts in MEASURED:
        config = update(config, {"pipeline.cuts": "equal"})
    resolved = resolve_here(config, dataset)
    check_plan(resolved, dataset)
    list_systems(resolved)


def _check_any_runs(config: Resolved, groups: Sequence[Sequence[SystemRequest]]) -> None:
    """Raise UserError if no system can be measured, before the blocks are."""
    requests = list(chain.from_iterable(groups))
    # Whether there is a cut does not depend on the seconds of blocks.
    blueprint = build_blueprint(config)
    seconds = {}
    if not has_companions(blueprint):
        for request in requests:
            if request.micro_batches is not None:
                seconds[request.micro_batches] = [1.0] * len(blueprint.blocks)
    check_any_runs([choose_cut(request, config, seconds) for request in requests])


def check_batch(config: Config, images: int) -> None:
    """Raise UserError where the training images make no batch."""
    batch = config.data.batch_size
    if images < batch:
        choices = [f"set data.batch_size to at most {images}", *advise_on_takers(config)]
        raise UserError(
            f"bench: {images} training images make no batch of {batch}; {', or '.join(choices)}"
        )


def _measure_blocks(
    config: Resolved, groups: Sequence[Sequence[SystemRequest]]
) -> dict[int, list[float]]:
    """Return the seconds of every block, by the numbers of micro-batches that are requested.

    They are empty where blocks give several tensors, which no peer's pipeline carries.
    """
    counts = set()
    for request in chain.from_iterable(groups):
        if request.micro_batches is not None:
            counts.add(request.micro_batches)
    if not counts or has_companions(build_blueprint(config)):
        return {}
    show_progress("measuring the blocks for the peers' cuts")
    return measure_blocks(config, sorted(counts))


def describe_machine(config: Resolved) -> dict[str, Any]:
    """Return the machine of the measurement, for people.

    Keys: `processor`, `cores` (that this process may use), `memory_bytes` (of the machine),
    `device` (`cpu`, or the name of the first GPU where the stages ran on GPUs) and `torch` (its
    version), and `emulated` (true) on the emulated GPU alone. config: of the measurement.
    """
    device = gpu_name(config.run.device) or "cpu"
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
        "torch": torch.__version__,
        **emulated_key(device),
    }


def _format_result(
    config: Resolved,
    machine: dict[str, Any],
    block_seconds: dict[int, list[float]],
    rows: Sequence[Sequence[Row]],
) -> str:
    """Return the content of the file of --json."""
    result = {
        "schema": SCHEMA,
        **emulated_key(machine["device"]),
        "machine": machine,
        "config": to_dict(config),
        "block_seconds": block_seconds,
        "rows": list(chain.from_iterable(rows)),
    }
    return json.dumps(result, indent=1) + "\n"
