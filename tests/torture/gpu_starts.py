"""Start runs on GPUs again and again, and show where the processes of one that hangs are.

    python -m tests.torture.gpu_starts --starts 200

One emulated start once hung before its first heartbeat. A run of two steps that has not ended after
`--dump-after` seconds is ended, and every process of it prints the stacks of its threads. Prints a
line a start. Exits 1 when a run hung or failed, and 2 without a CUDA device, a real one or the one
that tests emulate.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

_DUMP_S = 5.0  # for a process to write its stacks
_WORDS = (
    "model.name=resnet8 data.name=synthetic data.samples=40 data.image_size=16 data.batch_size=16 "
    "optim.epochs=1 run.device=cuda run.threads=1"
)


def main() -> int:
    """Start the runs; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dump-after", type=float, default=60.0, metavar="S")
    given = parser.parse_args()
    if torch.cuda.device_count() < given.processes:
        print(f"gpu_starts: {given.processes} CUDA devices are needed", file=sys.stderr)
        return 2
    bad = 0
    for number in range(given.starts):
        outcome = _start(given.processes, given.dump_after)
        bad += outcome.partition(" ")[0] != "ended"
        print(f"start {number + 1} of {given.starts}: {outcome}", flush=True)
    print(f"{bad} of {given.starts} starts hung or failed")
    return int(bad > 0)


def _start(processes: int, dump_after_s: float) -> str:
    """Run once. Return `ended`, `failed` or `hung`, with the seconds and what was printed."""
    with tempfile.TemporaryDirectory(prefix="gpu-starts-") as folder:
        output = Path(folder) / "output"
        words = f"{_WORDS} pipeline.stages={processes} pipeline.processes={processes}".split()
        command = [sys.executable, "-m", "localpipe", "train", "demo", *words]
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        begin = time.monotonic()
        with open(output, "wb") as file:
            run = subprocess.Popen(
                [*command, f"run.dir={folder}/run"],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            try:
                status: int | None = run.wait(dump_after_s)
            except subprocess.TimeoutExpired:
                status = None
                _dump(run)
        seconds = time.monotonic() - begin
        if status == 0:
            return f"ended after {seconds:.1f} s"
        text = output.read_text(encoding="utf-8", errors="replace")
        outcome = "hung" if status is None else f"failed with {status}"
        return f"{outcome} after {seconds:.1f} s\n{text}"


def _dump(run: subprocess.Popen[bytes]) -> None:
    """Let every process of a run write the stacks of its threads, and end them all.

    Workers come first: without its launcher a worker is killed at once.
    """
    processes = psutil.Process(run.pid).children(recursive=True)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGABRT)
    psutil.wait_procs(processes, _DUMP_S)
    run.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(_DUMP_S)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    run.kill()
    run.wait()


if __name__ == "__main__":
    raise SystemExit(main())
