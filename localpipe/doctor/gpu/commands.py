"""Runs of `localpipe train` and `localpipe bench` that a step starts, waits for, and compares."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localpipe.doctor.gpu.step_context import StepContext
from localpipe.doctor.gpu.step_process import describe_failure, start_process, wait
from localpipe.pipeline.launch.rank import kill_ranks

_MODULE = "localpipe.doctor.gpu.command_main"


@dataclass(frozen=True)
class CommandEnd:
    """How a command ended: the JSON that it has written, or None and the problem in one line."""

    result: Mapping[str, Any] | None
    problem: str = ""


def checked_words(context: StepContext) -> list[str]:
    """Return the keys of the small runs whose weights are compared, in 4 stages."""
    size = context.size
    return [
        f"model.name={size.checked}",
        "data.name=synthetic",
        f"data.samples={size.samples}",
        f"data.image_size={size.image}",
        f"data.batch_size={size.batch}",
        "pipeline.stages=4",
        "optim.epochs=2",
        "run.device=cuda",
        "run.deterministic=true",
        "run.threads=1",
    ]


def train_all(
    context: StepContext,
    runs: Mapping[str, Sequence[str]],
    limit_s: float,
    variables: Mapping[str, str] | None = None,
) -> dict[str, CommandEnd]:
    """Train several configurations at the same time, and return their summaries by name.

    runs: the `section.key=value` words of each, beside those of the configuration `demo`. limit_s:
    after it, what still runs is killed. variables: environment variables that all of them get.
    """
    folders = {name: context.folder / name.replace(" ", "_") for name in runs}
    processes = {}
    try:
        for name, words in runs.items():
            run_words = [*words, f"run.dir={folders[name]}"]
            processes[name] = _start(context, name, {"do": "train", "words": run_words}, variables)
        end_s = time.monotonic() + limit_s
        for process in processes.values():
            wait(process, end_s - time.monotonic())
        ends = {}
        for name, process in processes.items():
            ends[name] = _read_end(
                process, _log_file(context, name), folders[name] / "summary.json"
            )
        return ends
    finally:
        kill_ranks(list(processes.values()))


def bench(context: StepContext, name: str, words: Sequence[str], limit_s: float) -> CommandEnd:
    """Run `localpipe bench` on some words, and return the content of its JSON file.

    limit_s: after it, the benchmark is killed.
    """
    target = context.folder / f"{name.replace(' ', '_')}.json"
    request = {"do": "bench", "words": list(words), "target": str(target)}
    process = _start(context, name, request, None)
    try:
        wait(process, limit_s)
        return _read_end(process, _log_file(context, name), target)
    finally:
        kill_ranks([process])


def _start(
    context: StepContext, name: str, request: Mapping[str, Any], variables: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    return start_process(
        _MODULE, json.dumps(request), _log_file(context, name), dict(variables or {})
    )


def _log_file(context: StepContext, name: str) -> Path:
    return context.folder / f"{name.replace(' ', '_')}.log"


def _read_end(process: subprocess.Popen[bytes], log: Path, target: Path) -> CommandEnd:
    if process.poll() is None:
        return CommandEnd(None, "it did not end in its time, and was killed")
    if process.returncode != 0:
        return CommandEnd(None, describe_failure(process.returncode, log))
    return CommandEnd(json.loads(target.read_text(encoding="utf-8")))


def compare_weights(
    context: StepContext, name: str, first: CommandEnd, second: CommandEnd, description: str
) -> None:
    """Add a finding: whether two runs have the same weights, bit for bit.

    description: the two runs in words, for the text.
    """
    digests = []
    for end in (first, second):
        if end.result is None:
            context.add_failure(name, end.problem)
            return
        digests.append(end.result["weights_sha256"][:16])
    if digests[0] == digests[1]:
        context.add_ok(name, f"{description}: equal weights ({digests[0]})", digests=digests)
    else:
        text = f"{description}: other weights ({digests[0]} and {digests[1]})"
        context.add_failure(name, text, digests=digests)
