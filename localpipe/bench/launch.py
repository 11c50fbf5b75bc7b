"""`localpipe bench`: fresh processes for every system, their windows in turn, a table for a person and a file for a machine."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from localpipe import data
from localpipe.bench import peer_cuts, worker
from localpipe.bench.peer_cuts import MICRO_BATCHES_KEY, best_cut, mean_seconds
from localpipe.bench.picture import PICTURES, draw_picture
from localpipe.bench.rows import OURS, Measured, build_rows, select_traces
from localpipe.bench.systems.shared import Cut, SystemRequest
from localpipe.bench.systems.torch_pipeline import SCHEDULES
from localpipe.bench.tables import show_results
from localpipe.bench.turns import Caller
from localpipe.bench.worker import FAMILIES, REQUEST_KEY
from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import to_dict, update
from localpipe.config.resolved import Resolved, count_stages
from localpipe.data.dataset import Dataset
from localpipe.environment import available_cores
from localpipe.errors import RunError, UserError, suggest
from localpipe.files import SCHEMA, check_output_path, write_whole
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.launcher import Workers
from localpipe.plan.measured_cuts import measure_here
from localpipe.plan.predict import can_predict, predict_own_cut, profile_for
from localpipe.plan.profile import Profile
from localpipe.plan.resolve_here import resolve_here
from localpipe.runs.prepare import check_plan

ALL = tuple(FAMILIES)
ONE_PROCESS = ("sequential", "e2e", "e2e-1", "checkpoint")
_EACH = {"interleaved": 2, "zb": 2}  # stages a worker; 1 for the others
_BUILD_S, _WINDOW_S = 600.0, 300.0  # an answer later than that never comes
_FEWEST = 3  # steps of a window
_FEWEST_QUEUED = 5  # where messages may wait in queues
_TRACED = 14  # steps of a timeline


class _Stopped(Exception):  # noqa: N818  # no error: a signal asked for it
    """Somebody asked the benchmark to stop; its argument is the signal."""


@dataclass
class SystemProcesses:
    """The processes of one system, and what they have answered."""

    asked: SystemRequest
    config: Resolved
    workers: Workers
    caller: Caller
    stopped: Callable[[], int]  # the signal that asked any of the parties to stop, or 0
    leave: Callable[[], None]  # kills what still runs; may be called again
    steps: int = 0
    lags: list[float] = field(
        default_factory=list
    )  # by rank, seconds behind the first one at a window's beginning
    saved: list[int | None] = field(default_factory=list)
    windows: dict[str, list[list[dict[str, Any]]]] = field(
        default_factory=dict
    )  # by kind, window, rank
    spans: list[list[Any]] = field(default_factory=list)  # by rank, of a few steps
    note: str | None = None

    def ask(self, timeout_s: float, **what: Any) -> list[dict[str, Any]]:
        """Return every worker's answer; raise RunError when one has failed."""
        return self.caller.ask(what, timeout_s, self._check)

    def _check(self) -> None:
        if signal := self.stopped():
            raise _Stopped(signal)
        if (cause := self.workers.cause()) is not None:
            raise RunError(cause.splitlines()[0])


def run_bench(given: Config, target: Path | None, picture: Path | None, command: str) -> int:
    """Measure the systems beside each other and print what was found; return the exit status.

    `command` is what was typed, without flags: it makes each row's own.
    """
    check_request(given, target, picture)
    try:
        return _bench(given, target, picture, command)
    except _Stopped as stopped:
        status: int = 128 + stopped.args[0]
        return status


def _bench(given: Config, target: Path | None, picture: Path | None, command: str) -> int:
    dataset = data.load(given.data, given.run.seed)
    config, promise = _decided(given, dataset)
    check_plan(config, dataset)
    if len(dataset.train.labels) < config.data.batch_size:
        raise UserError(
            f"bench: {len(dataset.train.labels)} training images make no batch of {config.data.batch_size}; "
            "lower data.batch_size"
        )
    groups = _groups(config)
    seconds = _profile(
        config, sorted({asked.micro_batches for group in groups for asked in group} - {None})
    )
    exact = _explicit(command, given, config)
    measured: list[list[Measured]] = []
    for group in groups:
        asked = [_prepared(each, config, seconds) for each in group]
        # What is predicted is measured beside the first group: the machine may be another one an hour later.
        measured.append(_measure(config, asked, picture is not None, None if measured else promise))
    promised = [] if promise is None else promise.samples_per_s
    found = [build_rows(each, exact, () if i else promised) for i, each in enumerate(measured)]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": describe_machine(),
        "config": to_dict(config),
        "block_seconds": seconds,
        "rows": [row for group in found for row in group],
    }
    if target is not None:
        write_whole(target, json.dumps(result, indent=1) + "\n")
    show_results(found, config, result["machine"], exact)
    if picture is not None:
        draw_picture(
            found, select_traces(measured[0], found[0]), config, result["machine"], picture
        )
    return 0 if any(row["samples_per_s"] for group in found for row in group) else 1


def describe_machine() -> dict[str, Any]:
    """Say in words what was measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": "cpu",
        "torch": torch.__version__,
    }


# -- what is asked ------------------------------------------------------------------------------------------------


def check_request(given: Config, target: Path | None, picture: Path | None) -> None:
    """Raise UserError for a system that nobody knows, or a file that nobody can write: before anything is measured."""
    for name in () if given.bench.systems == "all" else given.bench.systems:
        if name not in ALL:
            raise UserError(f"bench: there is no system {name!r}; {suggest(name, ALL)}")
    pipelines = given.bench.systems == "all" or any(
        name in SCHEDULES for name in given.bench.systems
    )
    alone = given.pipeline.processes == 1 or count_stages(given) == 1
    if pipelines and not alone and given.model.name != "chain":
        for count in given.bench.micro_batches:  # before anything is measured
            _check_count(count, given.data.batch_size)
    if picture is not None and picture.suffix not in PICTURES:
        raise UserError(
            f"bench: --picture {picture} has no known ending; expected {', '.join(PICTURES)}"
        )
    for flag, file in (("--json", target), ("--picture", picture)):
        if file is not None:
            check_output_path(f"bench: {flag}", file)


def _decided(given: Config, dataset: Dataset) -> tuple[Resolved, Promise | None]:
    """Return the resolved configuration, and what a profile promises of localpipe, if it is asked for.

    Where only peers are asked for, localpipe's cut plays no part, and nothing is measured for it.
    """
    ours = given.bench.systems == "all" or any(name in OURS for name in given.bench.systems)
    if not ours and given.pipeline.cuts in MEASURED:
        given = update(given, {"pipeline.cuts": "equal"})
    measure = (given.bench.systems == "all" or "localpipe" in given.bench.systems) and can_predict(
        given
    )
    if measure or given.pipeline.cuts == "time":
        _say("measuring the blocks of localpipe's stages")
    profile = profile_for(given, dataset, measure, None)
    config = resolve_here(given, dataset, profile=profile)
    return config, Promise(config, profile) if measure and profile is not None else None


def _explicit(command: str, given: Config, config: Resolved) -> str:
    """Return the command with a measured cut spelled out, so that a row alone has the table's."""
    if given.pipeline.cuts not in MEASURED or not isinstance(config.pipeline.cuts, tuple):
        return command
    return f"{command} pipeline.cuts={','.join(map(str, config.pipeline.cuts)) or 'equal'}"


def _groups(config: Resolved) -> list[list[SystemRequest]]:
    """Return what is measured side by side: one group for every number of micro-batches, localpipe in each of them."""
    names, counts = _names(config), config.bench.micro_batches
    if not any(name in SCHEDULES for name in names):
        counts = counts[:1]
    groups = []
    for index, count in enumerate(counts):
        # What has no micro-batches is measured once; localpipe stands beside every number of them.
        kept = [name for name in names if index == 0 or name in SCHEDULES or name == "localpipe"]
        groups.append([SystemRequest(name, count if name in SCHEDULES else None) for name in kept])
    return groups


def _names(config: Resolved) -> list[str]:
    """Return the systems to measure in the order of the table."""
    world, systems = _world(config), config.bench.systems
    if systems == "all":
        if (
            config.model.name == "chain"
        ):  # it only waits: there is nothing that a peer could compute
            return ["localpipe", "sequential"]
        return [name for name in ALL if name in ("localpipe", *ONE_PROCESS) or world > 1]
    for name in systems:
        if world == 1 and name not in ("localpipe", *ONE_PROCESS):
            raise UserError(
                f"bench: {name} needs two processes or more; set pipeline.processes and pipeline.stages"
            )
        if name == "ddp" and config.data.batch_size % world:
            raise UserError(
                f"bench: data.batch_size {config.data.batch_size} is not divisible by ddp's {world} processes; change "
                "one of them"
            )
    return [name for name in ALL if name in systems]


def _check_count(count: int, batch: int) -> None:
    fitting = ", ".join(str(n) for n in (2, 4, 8, 16, 32) if batch % n == 0 and n <= batch)
    if count > batch:
        raise UserError(
            f"bench: bench.micro_batches {count} is more than the {batch} samples of a batch; try {fitting}"
        )
    if batch % count:
        raise UserError(
            f"bench: bench.micro_batches {count} does not divide data.batch_size {batch}; try {fitting}"
        )


def _world(config: Resolved) -> int:
    processes = config.pipeline.processes
    assert isinstance(processes, int), "resolved"
    return processes


def _prepared(
    asked: SystemRequest, config: Resolved, seconds: dict[int, list[float]]
) -> SystemRequest | tuple[SystemRequest, str]:
    """Give a pipeline of micro-batches the cut of its own profile; a note beside what cannot be run."""
    if asked.system == "ddp" and config.data.batch_size % _world(config):
        return (
            asked,
            f"{_world(config)} processes do not divide the batch of {config.data.batch_size}",
        )
    if asked.micro_batches is None:
        return asked
    try:
        found: Cut = best_cut(
            seconds[asked.micro_batches], _world(config), _EACH.get(asked.system, 1)
        )
    except UserError as error:
        return asked, str(error)
    return SystemRequest(asked.system, asked.micro_batches, found)


def system_config(asked: SystemRequest, config: Resolved) -> Resolved:
    """Return the configuration of a system's workers: together, every system but `e2e-1` has the same threads."""
    threads = config.run.threads
    assert isinstance(threads, int), "resolved"
    if asked.system == "localpipe":
        return config
    one = asked.system in ONE_PROCESS
    return update(
        config,
        {
            "pipeline.processes": 1 if one else _world(config),
            "pipeline.replicas": 1,
            "run.threads": threads * _world(config) if one and asked.system != "e2e-1" else threads,
        },
    )


# -- measuring ----------------------------------------------------------------------------------------------------


def _profile(config: Resolved, counts: Sequence[Any]) -> dict[int, list[float]]:
    """Return the seconds of every block at every number of micro-batches, measured while all workers run the same block."""
    if not counts:
        return {}
    _say("measuring the blocks for the peers' cuts")
    decided = Job(to_dict(config), to_dict(config), 0, 0.0, time.time())
    with Workers(decided, peer_cuts.__name__) as workers:
        workers.store.set(MICRO_BATCHES_KEY, json.dumps(counts))
        status = workers.follow(lambda: None)
        if workers.asked:
            raise _Stopped(workers.asked)
        if status:
            raise RunError("bench: the blocks of the network could not be measured")
        told = {
            count: [
                json.loads(workers.store.get(f"seconds/{count}/{rank}"))
                for rank in range(_world(config))
            ]
            for count in counts
        }
    return {count: mean_seconds(each) for count, each in told.items()}


def _measure(
    config: Resolved,
    group: Sequence[SystemRequest | tuple[SystemRequest, str]],
    traced: bool,
    promise: Promise | None,
) -> list[Measured]:
    """Start all systems of a group, and let them take windows in turn; then a few steps for a timeline, if asked."""
    with contextlib.ExitStack() as stack:
        parties: list[SystemProcesses] = []
        refused = [each for each in group if isinstance(each, tuple)]
        for asked in group:
            if isinstance(asked, SystemRequest):
                stopped = partial(_signal, parties)
                parties.append(_start(asked, system_config(asked, config), stopped, stack))
        for party in parties:
            _try(party, lambda party=party: _build(party, config.bench.window_s))
        take_turns(parties, config.bench.windows, promise)
        for party in parties:
            if traced:
                _try(party, lambda party=party: _trace(party))
            _try(party, lambda party=party: party.ask(_WINDOW_S, do="end"))
        _say("")
        measured = [
            Measured(
                party.asked,
                party.config,
                party.steps,
                party.saved,
                party.windows,
                party.note,
                party.spans,
            )
            for party in parties
        ]
        measured += [
            Measured(asked, system_config(asked, config), 0, [], {}, note)
            for asked, note in refused
        ]
        return sorted(measured, key=lambda each: ALL.index(each.asked.system))


def take_turns(parties: Sequence[SystemProcesses], windows: int, promise: Promise | None) -> None:
    """Let every party take its windows, there and back, so that a drift favours nobody.

    A promise is measured again half way and behind them.
    """
    for window in range(windows):
        order = parties[:: -1 if window % 2 else 1]
        for party in order:
            _say(f"window {window + 1} of {windows}: {party.asked.system}", party is not order[0])
            _try(party, lambda party=party: _window(party))
        if promise is not None and window + 1 in (windows // 2, windows):
            _say("measuring the blocks of localpipe's stages again")
            promise.again(lambda: _heed(parties))


def _heed(parties: Sequence[SystemProcesses]) -> None:
    if signal := _signal(parties):
        raise _Stopped(signal)


def _signal(parties: Sequence[SystemProcesses]) -> int:
    """Return the signal that asked for a stop; whoever started last hears it."""
    return max(party.workers.asked for party in parties)


def _start(
    asked: SystemRequest, config: Resolved, stopped: Callable[[], int], stack: contextlib.ExitStack
) -> SystemProcesses:
    decided = Job(to_dict(config), to_dict(config), 0, 0.0, time.time())
    own = stack.enter_context(contextlib.ExitStack())
    workers = own.enter_context(Workers(decided, worker.__name__))
    workers.store.set(REQUEST_KEY, json.dumps(asdict(asked)))
    caller = Caller(workers.private, _world(config))
    own.callback(caller.close)
    return SystemProcesses(asked, config, workers, caller, stopped, own.close)


def _try(party: SystemProcesses, call: Any) -> None:
    """Do something with a system that has not failed yet; a failure becomes its row's note."""
    if party.note is not None:
        return
    try:
        call()
    except RunError as error:
        party.note = str(error)
        party.leave()


def _build(party: SystemProcesses, window_s: float) -> None:
    _say(f"building {party.asked.system}")
    answers = party.ask(_BUILD_S, do="build")
    slowest = max(answer["step_s"] for answer in answers)
    fewest = _FEWEST_QUEUED if party.asked.system == "localpipe" else _FEWEST
    party.steps = max(fewest, math.ceil(window_s / slowest))
    party.lags = window_lags(answers)
    party.saved = [answer["saved"] for answer in answers]


def _window(party: SystemProcesses) -> None:
    kinds = ["step"]
    if party.asked.system == "localpipe":
        jitters = (
            party.config.model.name == "chain" and party.config.model.args.get("jitter", 0) > 0
        )
        kinds += ["steady", "bound"] if jitters else ["bound"]
    for kind in kinds:
        answers = party.ask(_WINDOW_S, do=kind, steps=party.steps, lags=party.lags)
        party.windows.setdefault(kind, []).append(answers)
        if kind != "bound":
            party.lags = window_lags(answers)


def window_lags(answers: Sequence[dict[str, Any]]) -> list[float]:
    """Return by rank how long after the first one it ended: a pipeline goes on as if nothing had been between two windows.

    Stages that all begin at once, as they never do in training, would wait for each other's cores for many steps.
    """
    first = min(answer["ended"] for answer in answers)
    return [answer["ended"] - first for answer in answers]


def _trace(party: SystemProcesses) -> None:
    party.spans = [answer["spans"] for answer in party.ask(_WINDOW_S, do="trace", steps=_TRACED)]


def _say(what: str, often: bool = False) -> None:
    """Tell a person what goes on: at a terminal in one line that the next one replaces, elsewhere what is not said often."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
    elif what and not often:
        print(what, file=sys.stderr, flush=True)


class Promise:
    """The samples per second that every profile so far predicts of a resolved configuration; the first one is given."""

    def __init__(self, config: Resolved, first: Profile) -> None:
        self._config = config
        self.samples_per_s: list[float] = []
        self._keep(first)

    def again(self, look: Callable[[], None]) -> None:
        """Measure one more profile, of this number of stages alone; `look` is called now and then, and may raise."""
        stages = self._config.pipeline.stages
        assert stages is not None, "resolved"
        self._keep(measure_here(self._config, [stages], look))

    def _keep(self, profile: Profile) -> None:
        self.samples_per_s.append(predict_own_cut(self._config, profile).samples_per_s)
