"""A child process that runs cases one after another, and is replaced if it dies or hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

from tests.fuzz.cases import Outcome, Task, run_case

LIMIT_S = 180.0  # of a case; a plan takes one second, a run a few
_MEMORY_BYTES = 3 << 30  # of each process: what is absurd fails at once, and harms no neighbour
_KEPT_BYTES = 4000  # of what a case left on standard error
_CONTEXT = multiprocessing.get_context("spawn")


class Child:
    """Runs cases in a process of its own. A context: leaving it ends the process."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._folder = tempfile.TemporaryDirectory(prefix="localpipe-fuzz-")
        self._start()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._folder.cleanup()

    def run(self, task: Task) -> Outcome:
        """Run a case. A process that dies or hangs is its fault."""
        self._pipe.send(task)
        try:
            if self._pipe.poll(self._limit_s + 10):
                outcome: Outcome = self._pipe.recv()
                return outcome
            reason = f"hangs: no end after {self._limit_s:g} s"
        except EOFError:
            self._process.join(10)
            reason = f"the process died with status {self._process.exitcode}"
        self._end()
        stack = self._errors.read_text(encoding="utf-8", errors="replace")[-_KEPT_BYTES:]
        self._start()
        return Outcome(True, False, (), f"{reason}\n{stack}")

    def _start(self) -> None:
        self._errors = Path(self._folder.name) / "stderr.txt"
        self._errors.write_bytes(b"")
        self._pipe, theirs = _CONTEXT.Pipe()
        arguments = (theirs, Path(self._folder.name), self._limit_s)
        self._process = _CONTEXT.Process(target=_serve, args=arguments)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it has imported everything, which is not part of a case

    def _end(self) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, folder: Path, limit_s: float) -> None:
    """Be the child: run the cases that come through a pipe until it is closed."""
    os.setsid()
    errors = os.open(folder / "stderr.txt", os.O_WRONLY | os.O_APPEND)
    os.dup2(errors, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    warnings.simplefilter("ignore", DeprecationWarning)
    # After the limits, because the server of ranks inherits them.
    from tests.fuzz.commands import prepare_fuzz

    prepare_fuzz()
    pipe.send("ready")
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        case_folder = Path(tempfile.mkdtemp(dir=folder))
        faulthandler.dump_traceback_later(limit_s, file=errors)
        try:
            outcome = run_case(task, case_folder)
        finally:
            faulthandler.cancel_dump_traceback_later()
        pipe.send(outcome)
        os.chdir(folder)
        shutil.rmtree(os.fsencode(case_folder), ignore_errors=True)
