"""The process of a worker: join the mesh, work, and report how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from localpipe.config.resolved import Resolved
from localpipe.environment import PRIVATE_DIR
from localpipe.errors import CrashError, PeerLostError, RunError, UserError
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.notes import open_notes
from localpipe.pipeline.launch.watchdog import ABORT
from localpipe.pipeline.stages.precision import set_precision_flags
from localpipe.pipeline.workers.mesh import Mesh, join_mesh

JOB_KEY, LOCK_KEY = "job", "lock"
_HEARD_S = 2.0  # what the watchers of other nodes need to hear the word that ends a run, while its store lives
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def run_worker(work: Callable[[Mesh, Job], None]) -> int:
    """Run one worker of another kind, that localpipe's own launcher started; return its exit status."""
    return _run_and_exit(
        lambda place: work(place, Job.from_json(place.store.get(JOB_KEY).decode()))
    )


def _run_and_exit(work: Callable[[Mesh], None]) -> int:
    """Join the mesh, work, and leave word of how it ended."""
    place: Mesh | None = None
    try:
        place = join_mesh()
        work(place)
    except (Exception, SystemExit) as error:
        kind, line = _kind(error), str(error) or repr(error)
        _report(kind, line, traceback.format_exc())
        if place is not None and kind != "peer":
            _tell_other_nodes(place, line)
        _flush_and_exit(2 if isinstance(error, UserError) else 1)
    _flush_and_exit(0)
    return 0


def prepare_process(config: Resolved) -> None:
    """Set what shapes the bits and the speed of this process's arithmetic."""
    torch.set_num_threads(config.run.threads)
    torch.use_deterministic_algorithms(bool(config.run.deterministic))
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # what makes cuBLAS deterministic; read when it starts
    set_precision_flags(config)
    # A debugging aid that comes with deterministic algorithms and writes every new tensor twice.
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False
    # Keep freed memory: else glibc gives every large activation back and page faults take a fifth of a step.
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def publish_job(store: dist.Store, decided: Job) -> None:
    """Tell the workers of localpipe's own launcher what was decided."""
    store.set(JOB_KEY, decided.to_json())


# -- how a worker ends badly --------------------------------------------------------------------------------------


def _kind(error: BaseException) -> str:
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, PeerLostError):
        return "peer"
    return "run" if isinstance(error, RunError) and not isinstance(error, CrashError) else "crash"


def _report(kind: str, line: str, trace: str) -> None:
    """Leave word for the launcher, or, under torchrun, say it."""
    private = os.environ.get(PRIVATE_DIR)
    rank = int(os.environ.get("RANK", "0"))
    told = trace if kind == "crash" else ""
    if private is not None:
        record = {"rank": rank, "kind": kind, "line": line, "trace": told, "time": time.time()}
        with contextlib.suppress(OSError):  # the folder is gone: say it here
            Path(private, f"error_{rank}.json").write_text(json.dumps(record), encoding="utf-8")
            return
    if kind != "user" or rank == 0:
        print(f"{told}localpipe: {line}", file=sys.stderr, flush=True)


def _tell_other_nodes(place: Mesh, line: str) -> None:
    """Let the workers of other nodes end at once and quietly: their torchrun learns nothing from this node's."""
    if not place.local:
        with contextlib.suppress(RuntimeError, OSError):
            open_notes(place).put(ABORT, line)
            time.sleep(_HEARD_S)


def _flush_and_exit(status: int) -> None:
    """End without destructors: threads of a store or of gloo may still be inside a call, or wait for a neighbour."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
