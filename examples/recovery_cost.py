"""What it costs to replace a worker that dies alone, and to be ready for it.

    python examples/recovery_cost.py CONFIG [--kills 3] [--pairs 0] [section.key=value ...]

Trains CONFIG with run.recover=stage, without and with a spare process. The worker in the middle is
killed --kills times in each run. The table has the seconds until the launcher knew, until the new
process had its snapshot and its edges, and until it had computed again what was lost. The last
column is the longest time for which a worker that was left alone waited for a message.

With --pairs N, N pairs of runs, with recovery and without it, are trained in turn. The ratio of
their training speeds is printed, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from localpipe.environment import PRIVATE_DIR

_WAITS = ("receive", "send")
_TICK_S = 0.02


def train(
    config: str, overrides: Sequence[str], run_dir: Path, *more: str
) -> subprocess.Popen[bytes]:
    """Start a training run and return its process."""
    words = [sys.executable, "-m", "localpipe", "train", config, *overrides, *more]
    return subprocess.Popen([*words, f"run.dir={run_dir}"], stdout=subprocess.DEVNULL)


def find_workers(launcher: subprocess.Popen[bytes]) -> dict[int, int]:
    """Return the process numbers of a run's workers by rank, as their heartbeats tell them."""
    workers = {}
    for child in psutil.Process(launcher.pid).children():
        folder = Path(child.environ()[PRIVATE_DIR])
        for note in folder.glob("note_beat_*"):
            workers[int(note.name.rpartition("_")[2])] = json.loads(note.read_text())["pid"]
        break
    return workers


def read_records(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a run that goes on."""
    path = run_dir / "metrics.jsonl"
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            yield json.loads(line)


def count_records(run_dir: Path) -> int:
    """Return how many training records the run has of its last stage so far."""
    stages = [each["stage"] for each in read_records(run_dir) if each["kind"] == "train"]
    return stages.count(max(stages, default=0))


def kill_middle(launcher: subprocess.Popen[bytes], run_dir: Path, kills: int) -> int:
    """Kill the worker in the middle, each time after two more records; return its rank."""
    rank, seen = 0, 0
    while kills and launcher.poll() is None:
        time.sleep(_TICK_S)
        # The last stage has a new record when the worker of the kill before has been replaced.
        now = count_records(run_dir)
        if now >= seen + 2:
            workers = find_workers(launcher)
            rank = len(workers) // 2
            os.kill(workers[rank], signal.SIGKILL)
            kills, seen = kills - 1, now
    if launcher.wait() != 0:
        raise SystemExit("the run failed")
    return rank


def longest_wait_s(run_dir: Path, rank: int) -> float:
    """Return the longest time for which a worker of another rank waited, by the run's trace."""
    trace = json.loads((run_dir / "trace.json").read_text(encoding="utf-8"))
    waits = [
        event["dur"] / 1e6
        for event in trace["traceEvents"]
        if event["name"] in _WAITS and event["tid"] != rank and event["args"]["step"] > 1
    ]
    return max(waits, default=0.0)


def print_recoveries(config: str, overrides: Sequence[str], kills: int) -> None:
    """Print the table of recoveries, without and with a spare process."""
    names = ("detect", "ready", "replay", "steps", "others waited")
    print(f"{'':10}" + "".join(f"{name:>15}" for name in names))
    for spares in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            keys = ["run.recover=stage", f"run.spares={spares}", "run.trace=true"]
            keys.append(f"run.max_recoveries={kills}")
            rank = kill_middle(train(config, overrides, run_dir, *keys), run_dir, kills)
            summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
            waited_s = longest_wait_s(run_dir, rank)
        for each in summary["recoveries"]:
            cells = [f"{each[key]:.2f} s" for key in ("detect_s", "ready_s", "replay_s")]
            cells += [str(each["replayed_steps"]), f"{waited_s:.2f} s"]
            label = "a spare" if spares else "no spare"
            print(f"{label:10}" + "".join(f"{cell:>15}" for cell in cells))


def measure_speed(config: str, overrides: Sequence[str], recover: str) -> float:
    """Return the training samples a second of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        if train(config, overrides, run_dir, f"run.recover={recover}").wait() != 0:
            raise SystemExit("the run failed")
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return float(summary["train_samples_per_s"])


def print_overhead(config: str, overrides: Sequence[str], pairs: int) -> None:
    """Print the ratio of the speeds with recovery and without, over pairs of runs in turn."""
    ratios = []
    for number in range(pairs):
        order = ("stage", "none") if number % 2 else ("none", "stage")
        speeds = {recover: measure_speed(config, overrides, recover) for recover in order}
        ratios.append(speeds["stage"] / speeds["none"])
    print(
        f"speed with recovery / without: median {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}, {pairs} pairs)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=0)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.kills:
        print_recoveries(arguments.config, arguments.overrides, arguments.kills)
    if arguments.pairs:
        print_overhead(arguments.config, arguments.overrides, arguments.pairs)


if __name__ == "__main__":
    main()
