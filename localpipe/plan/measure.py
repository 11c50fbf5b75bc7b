"""Measures a profile: starts the measuring processes and collects what they found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from localpipe.config.load import to_dict
from localpipe.config.resolved import Resolved
from localpipe.environment import PARENT, PRIVATE_DIR
from localpipe.errors import RunError
from localpipe.pipeline.workers.mesh import open_file_store
from localpipe.plan.profile import PROFILE_KEY, REQUEST_KEY, Profile

WORKER = "localpipe.plan.measure_worker"  # by name: it stands on floors above
_TICK_S = 0.1


def measure_profile(
    config: Resolved,
    stage_counts: Sequence[int],
    workers: int,
    look: Callable[[], None] = lambda: None,
) -> Profile:
    """Measure a resolved configuration, for these numbers of stages, with `workers` processes at once on this machine.

    `look` is called now and then, and may raise.
    """
    with ExitStack() as cleanup:
        folder = Path(
            cleanup.enter_context(tempfile.TemporaryDirectory(prefix="localpipe-profile-"))
        )
        store = open_file_store(folder)
        store.set(
            REQUEST_KEY,
            json.dumps({"config": to_dict(config), "stage_counts": list(stage_counts)}),
        )
        ours = [_start(rank, workers, folder) for rank in range(workers)]
        for worker in ours:
            cleanup.callback(_end, worker)
        while any(worker.poll() is None for worker in ours):
            look()
            time.sleep(_TICK_S)
            if any(worker.poll() for worker in ours):
                break
        for rank, worker in enumerate(ours):
            if worker.poll():
                raise RunError(f"profile: a measuring process failed: {_last_words(folder, rank)}")
        return Profile.from_json(store.get(PROFILE_KEY).decode())


def _start(rank: int, workers: int, folder: Path) -> subprocess.Popen[bytes]:
    own = {
        PRIVATE_DIR: str(folder),
        PARENT: str(os.getpid()),
        "RANK": str(rank),
        "WORLD_SIZE": str(workers),
    }
    with open(folder / f"stderr_{rank}", "wb") as told:
        words = [sys.executable, "-m", "localpipe.pipeline.launch.start", WORKER]
        return subprocess.Popen(
            words, env={**os.environ, **own}, stderr=told, start_new_session=True
        )


def _end(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is None:
        worker.send_signal(signal.SIGKILL)
    worker.wait()


def _last_words(folder: Path, rank: int) -> str:
    lines = (
        (folder / f"stderr_{rank}")
        .read_text(encoding="utf-8", errors="replace")
        .strip()
        .splitlines()
    )
    return lines[-1] if lines else "it said nothing"
