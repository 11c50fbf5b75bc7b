"""Measures a profile: starts the measuring processes and collects what they found."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from localpipe.config.load import to_dict, update
from localpipe.config.resolved import Resolved
from localpipe.errors import RunError, UserError
from localpipe.pipeline.launch.rank import kill_ranks, start_rank
from localpipe.pipeline.workers.mesh import open_file_store
from localpipe.plan.profile import PROFILE_KEY, REFUSED_KEY, REQUEST_KEY, Profile

WORKER = "localpipe.plan.measure_worker"
_TICK_S = 0.1


def measure_profile(
    config: Resolved,
    stage_counts: Sequence[int],
    workers: int,
    check: Callable[[], None] = lambda: None,
) -> Profile:
    """Measure a configuration for these numbers of stages, with `workers` processes at once.

    stage_counts: at least one, none above the number of blocks. `check` is called ten times a
    second, and what it raises ends the measuring. Raises UserError where a piece cannot be built,
    and RunError with a process's last line if one fails. At the end, also after an error, the
    processes are killed and their folder is removed.
    """
    with ExitStack() as cleanup:
        name = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="localpipe-profile-"))
        folder = Path(name)
        store = open_file_store(folder)
        request = {"config": to_dict(hold_weights(config)), "stage_counts": list(stage_counts)}
        store.set(REQUEST_KEY, json.dumps(request))
        ranks: list[subprocess.Popen[bytes]] = []
        cleanup.callback(kill_ranks, ranks)
        for rank in range(workers):
            ranks.append(_start(rank, workers, folder))
        _wait_for_all(ranks, check)
        for rank, process in enumerate(ranks):
            if process.poll() == 2:
                raise UserError(store.get(REFUSED_KEY).decode())
            if process.poll():
                reason = _read_last_line(folder, rank)
                raise RunError(f"profile: a measuring process failed: {reason}")
        return Profile.from_json(store.get(PROFILE_KEY).decode())


def hold_weights(config: Resolved) -> Resolved:
    """Return the configuration with a learning rate of 0 in every step, for what is only timed.

    A step does the same work, and no rate makes the weights infinite.
    """
    constant = {
        "optim.schedule": "constant",
        "optim.warmup_epochs": 0,
        "optim.warmup_steps": None,
        "optim.min_lr": 0.0,
    }
    return update(config, {"optim.lr": 0.0, **constant})


def _start(rank: int, workers: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start a measuring process, whose standard error goes to a file."""
    with open(_stderr_file(folder, rank), "wb") as stderr:
        return start_rank(WORKER, rank, workers, folder, stderr)


def _wait_for_all(ranks: Sequence[subprocess.Popen[bytes]], check: Callable[[], None]) -> None:
    """Wait until every process has ended, or one has failed."""
    while any(process.poll() is None for process in ranks):
        check()
        time.sleep(_TICK_S)
        if any(process.poll() for process in ranks):
            return


def _stderr_file(folder: Path, rank: int) -> Path:
    return folder / f"stderr_{rank}"


def _read_last_line(folder: Path, rank: int) -> str:
    text = _stderr_file(folder, rank).read_text(encoding="utf-8", errors="replace")
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"
