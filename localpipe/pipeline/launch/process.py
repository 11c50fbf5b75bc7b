"""The process of a worker: it joins the mesh, works, and reports how it ended."""

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
from localpipe.environment import (
    launched_rank,
    leave_nccl_to_watchdogs,
    private_folder,
    set_default,
)
from localpipe.errors import (
    CrashError,
    NeighbourLostError,
    RunError,
    UserError,
    first_line,
)
from localpipe.output import warn
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.notes import StoreNotes, open_notes
from localpipe.pipeline.launch.watchdog import ABORT
from localpipe.pipeline.stages.precision import set_precision_flags
from localpipe.pipeline.workers.attempt import JobFinishedError
from localpipe.pipeline.workers.device import check_listed_devices, describe_memory_error
from localpipe.pipeline.workers.mesh import Mesh, join_mesh

JOB_KEY, LOCK_KEY = "job", "lock"
# The watchdogs of other nodes need this long to read the abort reason, while its store lives.
_ABORT_S = 2.0
_TICK_S = 0.1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def run_worker(work: Callable[[Mesh, Job], None]) -> int:
    """Run one worker that localpipe's own launcher started, with its job, and end the process.

    For workers of any kind: of a benchmark, of a measurement. work(mesh, job) is called once. Its
    failure, and one of reading the job, ends as in `run_and_exit`. It never returns.
    """

    def work_on_job(mesh: Mesh) -> None:
        work(mesh, Job.from_json(mesh.store.get(JOB_KEY).decode()))

    return run_and_exit(work_on_job)


def run_and_exit(work: Callable[[Mesh], None]) -> int:
    """Join the mesh, work, report a failure, and end the process with its exit status.

    It never returns, and runs no destructors or exit handlers. 0: `work` returned, or the run had
    ended before this worker was started again. 2: UserError. 1:
    any other Exception, or SystemExit with any code. A KeyboardInterrupt passes through. A failure
    goes to the launcher and, across machines, to the other workers.
    """
    mesh: Mesh | None = None
    try:
        mesh = join_mesh(_end_attempt)
        work(mesh)
    except JobFinishedError:
        warn("the run had ended when torchrun started this worker again")
    except (Exception, SystemExit) as error:
        kind = _failure_kind(error)
        line = str(error) or repr(error)
        reason = describe_memory_error(error)
        if reason is not None:
            kind, line = "run", f"rank {launched_rank()}: {reason}"
        report_failure(kind, line, traceback.format_exc())
        if mesh is not None and kind != "peer":
            _abort_other_nodes(mesh, line)
        _flush_and_exit(2 if isinstance(error, UserError) else 1)
    _flush_and_exit(0)
    return 0


def prepare_process(config: Resolved, rank: int = 0) -> None:
    """Set what shapes the bits and the speed of this process's arithmetic, and how NCCL fails.

    Its core, threads, deterministic kernels, CUDA's flags, and glibc's use of freed memory. Call it
    before the first CUDA call, since cuBLAS reads its setting once. rank: of the worker.
    """
    leave_nccl_to_watchdogs()
    _keep_own_core(config, rank)
    torch.set_num_threads(config.threads[rank])
    torch.use_deterministic_algorithms(bool(config.run.deterministic))
    # This makes cuBLAS deterministic. cuBLAS reads it when it starts.
    set_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_precision_flags(config)
    # A debugging aid of deterministic algorithms, which writes every new tensor twice.
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False
    # Keep freed memory: else glibc gives every large activation back to the kernel, and page
    # faults take a fifth of a step.
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _keep_own_core(config: Resolved, rank: int) -> None:
    """Keep this process on the core that pipeline.devices gives its worker, as `cpu:1`.

    Raises UserError where this machine has no such core, or no such GPU: torchrun's workers are on
    machines that the launcher does not see.
    """
    if config.pipeline.devices is None:
        return
    name = config.pipeline.devices[rank]
    check_listed_devices([name], config.pipeline.backend)
    kind, _, number = name.partition(":")
    if kind == "cpu" and number:
        os.sched_setaffinity(0, {int(number)})


def publish_job(store: dist.Store, job: Job) -> None:
    """Put the job into the store, where every worker reads it.

    Raises TypeError if the job holds other values than JSON's.
    """
    store.set(JOB_KEY, job.to_json())


def wait_for_job(mesh: Mesh) -> str:
    """Return what rank 0 has published as the job. Ends the process if the run is aborted.

    It waits as long as rank 0 prepares the run. No watchdog runs yet, and the store may outlive
    rank 0: torchrun keeps it for the next attempt. Raises RunError if the store is lost.
    """
    notes = open_notes(mesh)
    try:
        while not mesh.store.check([JOB_KEY]):
            if notes.get(ABORT) is not None:
                _flush_and_exit(1)
            time.sleep(_TICK_S)
        return mesh.store.get(JOB_KEY).decode()
    except RuntimeError as error:
        raise RunError(f"mesh: lost the launcher: {first_line(error)}") from None


# -- how a worker ends badly --------------------------------------------------------------------


def report_failure(kind: str, line: str, trace: str) -> None:
    """Write the failure for the launcher; print it where there is no launcher of localpipe's own.

    kind: `user`, `peer`, `run` or `crash`. line: the message. trace: the traceback, which is used
    for a crash only. It is printed too if the launcher's folder is gone. A user's mistake is
    printed by rank 0 alone. A second failure of a rank replaces the first.
    """
    if kind != "crash":
        trace = ""
    folder = private_folder()
    rank = launched_rank()
    if folder is not None:
        record = {"rank": rank, "kind": kind, "line": line, "trace": trace, "time": time.time()}
        # If the launcher has removed the folder, the failure is printed.
        with contextlib.suppress(OSError):
            failure_file(folder, rank).write_text(json.dumps(record), encoding="utf-8")
            return
    if kind != "user" or rank == 0:
        warn(f"{trace}localpipe: {line}")


def failure_file(folder: Path, rank: int) -> Path:
    """Return the file in which a rank reports its failure, in the launcher's private folder."""
    return folder / f"error_{rank}.json"


def _failure_kind(error: BaseException) -> str:
    """Return the kind of a failure. Only a `peer` is never the first cause."""
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, NeighbourLostError):
        return "peer"
    if isinstance(error, CrashError):
        return "crash"
    if isinstance(error, RunError):
        return "run"
    return "crash"


def _end_attempt(store: dist.Store) -> None:
    """Let workers of an attempt that is over end, where they still run on other nodes."""
    StoreNotes(store).put(ABORT, "torchrun has started workers again")


def _abort_other_nodes(mesh: Mesh, line: str) -> None:
    """Let the workers of other nodes end at once and quietly.

    Their torchrun learns nothing from this node's.
    """
    if mesh.local:
        return
    with contextlib.suppress(RuntimeError, OSError):
        open_notes(mesh).put(ABORT, line)
        time.sleep(_ABORT_S)


def _flush_and_exit(status: int) -> None:
    """End without destructors.

    Threads of a store or of gloo may still be inside a call, or wait for a neighbour.
    """
    for stream in (sys.stdout, sys.stderr):
        # What was printed may have nowhere to go, which is no failure of the work.
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
    os._exit(status)
