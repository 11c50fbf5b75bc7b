"""The long run on emulated GPUs: `python -m tests.emulated_gpu.grid --seeds 20 --log FILE`.

Under every seed of the delays it trains with 1, 2 and 4 processes, depth 1, 2 and 8, and with
replicas. All runs of a group must end, with one digest, and without a race. `bench` measures
localpipe and its peers at the end. Each case is one line. The status is 1 if one of them failed.

Odd seeds run with the race checker. Even ones let events pass as early as they do, and of these
every second one lets a send end before it is received.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.emulated_gpu.build import missing_part
from tests.emulated_gpu.machine import Machine, Settings

_DEPTHS = (1, 2, 8)
_DELAY_US = 300
_SYSTEMS = (
    "localpipe", "sequential", "e2e-1", "e2e", "checkpoint", "ddp", "gpipe", "1f1b", "interleaved",
    "zb",
)  # fmt: skip
_SYNC = "pipeline.batch_norm=sync"
_GROUPS = {
    "plain": (),
    "captured": ("run.capture=graphs",),
    "context and reconciliation": (
        "method={objective: {name: dgl}, context: R1E, reconcile: cosine}",
    ),
    "feedback": (
        "method={objective: dgl, feedback: {mode: block, every: 2, lag: 3}}",
        "optim.epochs=2",
    ),
    "two replicas": ("pipeline.replicas=2", "pipeline.stages=2", _SYNC),
    "replicas 1, 2, 1": ("pipeline.replicas=[1,2,1]", "pipeline.stages=3", _SYNC),
}


@dataclass(frozen=True)
class Case:
    """One training run of a group. Its digest is that of all others in the group."""

    group: str
    processes: int
    depth: int

    @property
    def words(self) -> list[str]:
        """The keys that it trains with."""
        places = [f"pipeline.processes={self.processes}", f"pipeline.depth={self.depth}"]
        return [*_GROUPS[self.group], *places]

    def __str__(self) -> str:
        return f"{self.group}, {self.processes} processes, depth {self.depth}"


def list_cases() -> list[Case]:
    """Return the cases of one seed. One process has no edges, so that its depth is 1."""
    cases = []
    for group in ("plain", "captured"):
        cases.append(Case(group, 1, 1))
        cases += [Case(group, processes, depth) for processes in (2, 4) for depth in _DEPTHS]
    cases += [Case("context and reconciliation", processes, 2) for processes in (1, 4)]
    cases += [Case("feedback", processes, depth) for processes in (1, 4) for depth in (1, 2)]
    cases += [Case("two replicas", processes, depth) for processes in (2, 4) for depth in _DEPTHS]
    cases += [Case("replicas 1, 2, 1", 4, depth) for depth in _DEPTHS]
    return cases


def settings_of(seed: int) -> Settings:
    """Return how the devices behave under a seed, as this module's first lines say."""
    is_checked = seed % 2 == 1
    return Settings(int(is_checked), _DELAY_US, seed, buffered_sends=seed % 4 == 2)


class Log:
    """Lines that go to standard output and to a file, and the number of failures among them."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self.failures = 0

    def write(self, line: str, problem: str = "") -> None:
        """Write a line, with its problem, "" for none."""
        if problem:
            self.failures += 1
            line = f"{line}: FAILED: {problem}"
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


def train_all(machine: Machine, seeds: range, log: Log) -> None:
    """Train every case under every seed."""
    digests: dict[str, str] = {}
    for seed in seeds:
        settings = settings_of(seed)
        for case in list_cases():
            with tempfile.TemporaryDirectory() as folder:
                start = time.monotonic()
                result = machine.train(Path(folder) / "run", *case.words, settings=settings)
            digest = str(result.summary.get("weights_sha256", ""))[:16]
            expected = digests.setdefault(case.group, digest)
            problem = ""
            if result.status != 0 or not digest:
                problem = f"status {result.status}: {result.text.strip()[-2000:]}"
            elif digest != expected:
                problem = f"the digest differs from {expected}"
            elif result.races:
                problem = "; ".join(result.races)
            checked = "checked" if settings.races else "not checked for races"
            sends = ", buffered sends" if settings.buffered_sends else ""
            seconds = time.monotonic() - start
            log.write(f"seed {seed} ({checked}{sends}), {case}: {digest}, {seconds:.1f} s", problem)


def measure_all(machine: Machine, log: Log) -> None:
    """Run the benchmark of localpipe and its peers. Its figures mean nothing here."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        words = machine.train_command(Path(folder) / "run", "pipeline.processes=2")[1:]
        options = ["--systems", ",".join(_SYSTEMS), "--windows", "1", "--window-s", "0.5"]
        command = ["bench", *words, *options, "--json", str(file)]
        result = machine.call("run_command", *command, settings=Settings(races=1))
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
    if result.status != 0:
        log.write("bench", f"status {result.status}: {result.text.strip()[-2000:]}")
    for row in rows:
        is_measured = row["samples_per_s"] is not None
        log.write(f"bench, {row['system']}", "" if is_measured else str(row["note"]))
    log.write("bench, races", "; ".join(result.races))


def list_arguments(argv: Sequence[str] | None) -> Iterator[str]:
    """Yield the words of the command, for the log."""
    yield "python -m tests.emulated_gpu.grid"
    yield from sys.argv[1:] if argv is None else argv


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; return 1 if anything failed, and 2 where no GPU can be emulated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="the last seed (20)")
    parser.add_argument("--first-seed", type=int, default=1, help="the first one (1)")
    parser.add_argument("--log", type=Path, required=True)
    arguments = parser.parse_args(argv)
    reason = missing_part()
    if reason is not None:
        print(f"no GPU is emulated: {reason}", file=sys.stderr)
        return 2
    start = time.monotonic()
    log = Log(arguments.log)
    log.write(" ".join(list_arguments(argv)))
    log.write(
        f"torch {torch.__version__}, emulated: true, delays up to {_DELAY_US} us and 20 times"
    )
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder))
        try:
            train_all(machine, range(arguments.first_seed, arguments.seeds + 1), log)
            measure_all(machine, log)
        finally:
            machine.close()
    minutes = (time.monotonic() - start) / 60
    log.write(f"{machine.cases} cases in {minutes:.0f} minutes, {log.failures} failed")
    return int(log.failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
