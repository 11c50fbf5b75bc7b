"""What a benchmark measures: the systems, side by side in groups, and the cut of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from localpipe.bench.peer_cuts import best_cut
from localpipe.bench.picture import PICTURES
from localpipe.bench.predictions import ThroughputPredictions
from localpipe.bench.systems.spec import SystemRequest, find_system
from localpipe.config import registry
from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import update
from localpipe.config.resolved import Resolved, count_stages, take_workers
from localpipe.data.dataset import Dataset
from localpipe.errors import UserError, suggest
from localpipe.files import check_output_path
from localpipe.output import show_progress
from localpipe.plan.predict import can_predict, profile_for
from localpipe.plan.resolve_here import resolve_here

_ALL = "all"
_NEVER = 1_000_000  # steps, more than a benchmark makes
_SUGGESTED_COUNTS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class CheckedRequest:
    """One system to measure. `note` is why it cannot be measured, or None if it can be."""

    request: SystemRequest
    note: str | None = None


# -- before anything is measured ----------------------------------------------------------------


def check_request(config: Config, target: Path | None, picture: Path | None) -> None:
    """Check what can be known before anything is measured. It writes nothing.

    target: of --json. picture: of --picture. None where a file is not requested. A file that exists
    is fine. Raises UserError for an unknown system, a picture that is not .png, .svg or .pdf, a
    path that is a folder, or a missing folder. Raises UserError too for a number of micro-batches
    that does not divide the batch, where a requested system has them.
    """
    names = _requested_names(config)
    for name in names:
        if name not in registry.SYSTEMS:
            raise UserError(
                f"bench: there is no system {name!r}; {suggest(name, tuple(registry.SYSTEMS))}"
            )

    # The numbers of micro-batches, where a system has them.
    one_process = config.pipeline.processes == 1 or count_stages(config) == 1
    if _have_micro_batches(names) and not one_process and config.model.name != "chain":
        for count in config.bench.micro_batches:
            check_count(count, config.data.batch_size)

    # The files.
    if picture is not None and picture.suffix not in PICTURES:
        raise UserError(
            f"bench: --picture {picture} has no known ending; expected {', '.join(PICTURES)}"
        )
    for option, path in (("--json", target), ("--picture", picture)):
        if path is not None:
            check_output_path(f"bench: {option}", path)


def _requested_names(config: Config) -> Sequence[str]:
    if config.bench.systems == _ALL:
        return tuple(registry.SYSTEMS)
    return config.bench.systems


def _have_micro_batches(names: Sequence[str]) -> bool:
    return any(find_system(name).has_micro_batches for name in names)


def check_count(count: int, batch: int) -> None:
    """Raise UserError for a number of micro-batches that does not divide the batch."""
    fitting = []
    for number in _SUGGESTED_COUNTS:
        if number <= batch and batch % number == 0:
            fitting.append(str(number))
    # A batch that none of them divides is measured whole, or image by image.
    advice = f"try {', '.join(fitting or ['1', str(batch)])}"
    if count > batch:
        raise UserError(
            f"bench: bench.micro_batches {count} is more than the {batch} samples of a batch; "
            f"{advice}"
        )
    if batch % count:
        raise UserError(
            f"bench: bench.micro_batches {count} does not divide data.batch_size {batch}; {advice}"
        )


def resolve_request(
    config: Config, dataset: Dataset
) -> tuple[Resolved, ThroughputPredictions | None]:
    """Return the resolved configuration and, if localpipe is measured, its predicted throughput.

    The second one is None without localpipe, or where a stage has several replicas. For a
    prediction or `cuts: time` a profile is measured, with a line of progress. Where only peers are
    measured, localpipe's cut plays no part: a measured cut becomes `equal`. Raises UserError as
    `resolve_here` and for an unknown system, RunError if measuring fails.
    """
    specs = [find_system(name) for name in _requested_names(config)]
    if all(spec.is_peer for spec in specs) and config.pipeline.cuts in MEASURED:
        config = update(config, {"pipeline.cuts": "equal"})
    predicts = any(spec.is_subject for spec in specs) and can_predict(config)
    if predicts or config.pipeline.cuts == "time":
        show_progress("measuring the blocks of localpipe's stages")
    profile = profile_for(config, dataset, predicts, None)
    resolved = resolve_here(config, dataset, profile=profile)
    if not predicts or profile is None:
        return resolved, None
    return resolved, ThroughputPredictions(resolved, profile)


def make_cut_explicit(command: str, config: Config, resolved: Resolved) -> str:
    """Return the command with a measured cut as a key, so that one row alone has the same cut.

    The key `pipeline.cuts=` is added only where the cut of `config` is `time` or `memory`. Else the
    command is unchanged. resolved: the same configuration, resolved.
    """
    cuts = resolved.pipeline.cuts
    if config.pipeline.cuts not in MEASURED or not isinstance(cuts, tuple):
        return command
    value = ",".join(map(str, cuts)) or "equal"
    return f"{command} pipeline.cuts={value}"


# -- the systems --------------------------------------------------------------------------------


def group_requests(config: Resolved) -> list[list[SystemRequest]]:
    """Return the systems that are measured side by side: a group for each number of micro-batches.

    Groups follow `bench.micro_batches`, systems the order of the table. Systems without
    micro-batches are in the first group only, but localpipe is in every group if it is requested,
    as configured and with as many accumulated messages. Without a system that has micro-batches
    there is one group, and localpipe is as configured. No request has a cut yet. Raises UserError
    as `list_systems`.
    """
    names = list_systems(config)
    counts = config.bench.micro_batches
    has_pipelines = _have_micro_batches(names)
    if not has_pipelines:
        counts = counts[:1]
    groups = []
    for index, count in enumerate(counts):
        group = []
        for name in names:
            spec = find_system(name)
            if spec.has_micro_batches:
                group.append(SystemRequest(name, count))
            elif index == 0 or spec.is_subject:
                group.append(SystemRequest(name))
            # The peers' micro-batches have a counterpart: messages that make one update.
            is_new = count not in (1, config.optim.accumulate)
            if spec.is_subject and has_pipelines and is_new:
                group.append(SystemRequest(name, count))
        groups.append(group)
    return groups


def list_systems(config: Resolved) -> list[str]:
    """Return the names of the systems to measure, in the order of the table, each once.

    With `bench.systems: all`, systems that the configuration rules out are left out. Systems listed
    by name raise UserError where they are unknown, need a second process or copies, train a network
    that only waits, or cannot freeze blocks or clip gradients. UserError too where a system splits
    the batch and the processes do not divide it.
    """
    if config.bench.systems == _ALL:
        return [name for name in registry.SYSTEMS if _makes_sense(name, config)]
    for name in config.bench.systems:
        _check_system(name, config)
    return [name for name in registry.SYSTEMS if name in config.bench.systems]


def _check_system(name: str, config: Resolved) -> None:
    """Raise UserError for a system that the configuration rules out."""
    spec, processes = find_system(name), config.pipeline.processes
    if spec.needs_two_processes and processes == 1:
        raise UserError(
            f"bench: {name} needs two processes or more; set pipeline.processes and pipeline.stages"
        )
    if spec.freezes_copies and not config.feeds_back:
        raise UserError(
            f"bench: {name} is localpipe without refreshed copies, and there are none; "
            "set method.feedback.mode and two stages, or leave it out of bench.systems"
        )
    if spec.splits_batch and config.data.batch_size % processes:
        raise UserError(
            f"bench: data.batch_size {config.data.batch_size} is not divisible by {name}'s "
            f"{processes} processes; change one of them"
        )
    if spec.has_micro_batches and config.only_waits:
        raise UserError(
            f"bench: {name} cannot train a {config.model.name}, whose blocks only wait and "
            "have no gradient; leave it out of bench.systems"
        )
    if config.model.freeze and not spec.trains_frozen:
        raise UserError(
            f"bench: {name} cannot freeze blocks, and model.freeze is "
            f"{list(config.model.freeze)}; leave it out of bench.systems"
        )
    if config.optim.clip is not None and not spec.clips_gradients:
        raise UserError(
            f"bench: {name} cannot clip by the norm of the whole network, and optim.clip is "
            f"{config.optim.clip:g}; leave it out of bench.systems, or set optim.clip=null"
        )


def _makes_sense(name: str, config: Resolved) -> bool:
    """Return whether a system is among `all` of a configuration."""
    spec = find_system(name)
    # In a network that only waits, peers have nothing to compute.
    if spec.is_peer and config.only_waits:
        return False
    if spec.freezes_copies and not config.feeds_back:
        return False
    if config.model.freeze and not spec.trains_frozen:
        return False
    if config.optim.clip is not None and not spec.clips_gradients:
        return False
    return config.pipeline.processes > 1 or not spec.needs_two_processes


def choose_cut(
    request: SystemRequest, config: Resolved, block_seconds: Mapping[int, Sequence[float]]
) -> CheckedRequest:
    """Return the request with a cut of its own for a pipeline of micro-batches.

    Other requests stay as they are. block_seconds: of every block, by the number of micro-batches.
    Nothing is raised for a system that cannot run: the result has a note where the processes do not
    divide the batch of a system that splits it, or outnumber the blocks as stages, or the
    micro-batches of a system that needs one a stage, or where localpipe cannot accumulate so many
    messages. Without `block_seconds` it has a note too, because blocks give several tensors then.
    Raises KeyError where they lack the request's number.
    """
    spec, processes = request.spec, config.pipeline.processes
    if spec.splits_batch and config.data.batch_size % processes:
        batch = config.data.batch_size
        return CheckedRequest(request, f"{processes} processes do not divide the batch of {batch}")
    if request.micro_batches is None:
        return CheckedRequest(request)
    if spec.is_subject:
        return CheckedRequest(request, _find_accumulation_problem(request, config))
    if spec.fills_pipeline and request.micro_batches < processes:
        note = f"{request.micro_batches} micro-batches are fewer than its {processes} stages"
        return CheckedRequest(request, note)
    if not block_seconds:
        return CheckedRequest(request, "blocks give several tensors, and its stages send one")
    seconds = block_seconds[request.micro_batches]
    try:
        cut = best_cut(seconds, processes, spec.stages_per_worker)
    except UserError as error:
        return CheckedRequest(request, str(error))
    return CheckedRequest(replace(request, cut=cut))


def check_any_runs(requests: Sequence[CheckedRequest]) -> None:
    """Raise UserError if no system can be measured, with the reason of each."""
    reasons = []
    for checked in requests:
        if checked.note is not None:
            reasons.append(f"{checked.request.system}: {checked.note}")
    if len(reasons) == len(requests):
        raise UserError(
            f"bench: no system of bench.systems can run here ({', '.join(reasons)}); "
            "choose others, or change bench.micro_batches or pipeline.processes"
        )


def _find_accumulation_problem(request: SystemRequest, config: Resolved) -> str | None:
    """Return why localpipe cannot make a step of so many messages, or None where it can."""
    try:
        system_config(request, config)
    except UserError as error:
        return str(error)
    return None


def system_config(request: SystemRequest, config: Resolved) -> Resolved:
    """Return the configuration of a system's workers: localpipe's is unchanged, others are a copy.

    localpipe with a number of micro-batches accumulates so many messages. With frozen copies
    nothing is due before the end. Others have one replica of every stage, and a stage for every
    process where the processes are more. A system of one process has one, with the threads of all
    processes together unless it declares otherwise. config: localpipe's. Raises UserError where
    localpipe cannot accumulate so many messages.
    """
    spec = request.spec
    if spec.is_subject and request.micro_batches is not None:
        return update(config, {"optim.accumulate": request.micro_batches})
    if spec.is_subject:
        return config
    if spec.freezes_copies:
        never = {"lag": _NEVER, "every": _NEVER}
        return update(config, {"method.feedback": {**config.method.feedback.model_dump(), **never}})
    processes = config.pipeline.processes
    keys: dict[str, object] = {"pipeline.replicas": 1}
    if spec.one_process:
        processes = 1
        keys.update(take_workers(config, 1))
        if config.run.device == "cpu":
            keys["pipeline.devices"] = None  # all threads have all cores
        keys["run.threads"] = config.threads[0]
        if spec.uses_all_threads:
            keys["run.threads"] = sum(config.threads)
    if processes > config.stages:
        # localpipe's processes are replicas. A peer has its own cut, or none.
        keys.update({"pipeline.stages": processes, "pipeline.cuts": "equal"})
    return update(config, keys)
