"""Kill workers of a run that recovers, and check that the others never notice.

    python -m tests.torture.kills --recover stage --kills 100 --seed 0

A run gets several blows. Afterwards it must have ended like an undisturbed one: the same digest, no
record missing or twice, the same processes for the workers that were left alone, as many turns of
each of their stages, and nothing in shared memory. Every message that is computed again is compared
with the one that was sent. The helpers above `torture` also serve tests/pipeline/launch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import signal
import statistics
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from localpipe.environment import COMPARE_REPLAY, PRIVATE_DIR

EVALUATION = 12  # messages: 360 test images in batches of 32
STEPS = 8  # of an epoch
KEYS: dict[str, Any] = {
    "run__recover": "stage",
    "run__max_recoveries": 99,
    "run__trace": "true",
    "run__timeout_s": 15,
}


class Watched:
    """A run of torture.kills.Started, watched through its rings."""

    def __init__(self, started: Any, processes: int, epochs: int) -> None:
        self.started, self.processes, self.epochs = started, processes, epochs
        self.pids: dict[int, list[int]] = {rank: [] for rank in range(processes)}
        self.folder: Path | None = None

    @property
    def messages(self) -> int:
        """How many messages a whole run has: steps, evaluations and the stop."""
        return self.epochs * (STEPS + EVALUATION) + 1

    def look(self) -> dict[int, psutil.Process]:
        """Return the workers by rank, and remember their process numbers."""
        workers: dict[int, psutil.Process] = self.started.workers()
        workers = {rank: worker for rank, worker in workers.items() if rank >= 0}
        self._find_spares(workers)
        for rank, worker in workers.items():
            if worker.pid not in self.pids[rank] and worker.status() != psutil.STATUS_ZOMBIE:
                self.pids[rank].append(worker.pid)
            with contextlib.suppress(psutil.Error, KeyError):
                self.folder = self.folder or Path(worker.environ()[PRIVATE_DIR])
        return workers

    def _find_spares(self, workers: dict[int, psutil.Process]) -> None:
        """Add the workers that were spare processes: their environment does not name their rank."""
        for rank in range(self.processes):
            if self.folder is not None and rank not in workers:
                with contextlib.suppress(OSError, ValueError, psutil.Error):
                    note = (self.folder / f"note_beat_{rank}").read_text(encoding="utf-8")
                    workers[rank] = psutil.Process(json.loads(note)["pid"])

    def counts(self, receiver: int) -> tuple[int, int, int]:
        """Return how many messages to a rank are published, taken and saved."""
        if self.folder is None:
            return 0, 0, 0
        with contextlib.suppress(OSError, struct.error):
            page = (self.folder / f"edge_{receiver}" / "ring").open("rb").read(192)
            published, taken, saved = (struct.unpack_from("<Q", page, 64 * i)[0] for i in range(3))
            return published, taken, saved
        return 0, 0, 0

    def progress(self) -> int:
        """Return how many messages the first worker has sent."""
        return self.counts(1)[0]

    def until(self, condition: Callable[[], bool], timeout_s: float = 240.0) -> bool:
        """Wait for a condition while the run goes on; return whether it came true."""

        def holds() -> bool:
            self.look()
            return condition()

        found: bool = self.started.until(holds, timeout_s)
        return found


@dataclass
class Run:
    """One run, its blows, and what was not as promised."""

    number: int
    processes: int
    stages_each: str
    blows: list[str] = field(default_factory=list)
    struck: set[int] = field(default_factory=set)
    took_s: float = 0.0
    wrong: list[str] = field(default_factory=list)
    said: str = ""
    recoveries: list[dict[str, Any]] = field(default_factory=list)

    def row(self) -> str:
        blows = "; ".join(self.blows)
        verdict = "; ".join(self.wrong) or "as promised"
        return f"{self.number:3d}  {self.processes}  {self.took_s:6.1f}  {verdict}  [{blows}]"


HEAD = "run  n    in s  verdict  [blows: moment, ranks, messages sent by the first worker]"


def strike(
    run: Run, watched: Watched, moment: str, ranks: Sequence[int], number: int, gap_s: float = 0.0
) -> bool:
    """Send a signal to workers, with a pause between them; return whether all were there."""
    workers = watched.look()
    if not all(rank in workers for rank in ranks):
        return False
    sent = watched.progress()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            workers[rank].send_signal(number)
            run.struck.add(rank)
        time.sleep(gap_s)
    run.blows.append(f"{moment} {','.join(map(str, ranks))} @{sent}")
    return True


def blow(run: Run, watched: Watched, moment: str, dice: random.Random) -> bool:
    """Wait for a moment and strike; return False if the run had ended before."""
    last = watched.processes - 1
    everyone = list(range(watched.processes))
    if moment in ("any", "small"):
        return _reach_any(watched, dice) and strike(
            run, watched, moment, [dice.choice(everyone)], signal.SIGKILL
        )
    if moment == "stopped":
        return _reach_any(watched, dice) and strike(
            run, watched, moment, [dice.choice(everyone)], signal.SIGSTOP
        )
    if moment == "neighbours":
        first = dice.randrange(last)
        pair = [first, first + 1]
        dice.shuffle(pair)
        return _reach_any(watched, dice) and strike(
            run, watched, moment, pair, signal.SIGKILL, dice.uniform(0, 0.05)
        )
    if moment == "recovering":
        return _strike_twice(run, watched, dice)
    where, _, name = moment.partition(" ")
    rank = 0 if where == "first" else last
    if name == "end":
        return _strike_end(run, watched, moment, rank)
    return _reach(watched, name, rank, dice) and strike(
        run, watched, moment, [rank], signal.SIGKILL
    )


def _strike_twice(run: Run, watched: Watched, dice: random.Random) -> bool:
    """Kill a worker, and then the one that replaces it, at any moment of its recovery."""
    rank = dice.randrange(watched.processes)
    if not _reach_any(watched, dice):
        return False
    before = len(watched.pids[rank])
    if not strike(run, watched, "recovering", [rank], signal.SIGKILL):
        return False
    if not watched.until(lambda: len(watched.pids[rank]) > before):
        return False
    time.sleep(dice.uniform(0, 6))
    return strike(run, watched, "again", [rank], signal.SIGKILL)


def _strike_end(run: Run, watched: Watched, moment: str, rank: int) -> bool:
    """Kill a worker as soon as it has the last message, before all have ended."""
    receiver, which = (1, 0) if rank == 0 else (rank, 1)
    if not watched.until(lambda: watched.counts(receiver)[which] >= watched.messages - 4):
        return False
    worker = watched.look().get(rank)
    while worker is not None and watched.started.running:
        if watched.counts(receiver)[which] >= watched.messages:
            worker.kill()
            run.struck.add(rank)
            run.blows.append(f"{moment} {rank}")
            return True
    return False


def _reach_any(watched: Watched, dice: random.Random) -> bool:
    """Wait for a moment a few messages ahead."""
    sent = watched.progress() + dice.randrange(1, STEPS + EVALUATION)
    return watched.until(lambda: watched.progress() >= sent) and _pause(dice.uniform(0, 0.1))


def _reach(watched: Watched, name: str, rank: int, dice: random.Random) -> bool:
    """Wait for a moment by its name."""
    if name == "start":
        return watched.until(lambda: rank in watched.look()) and _pause(dice.uniform(0, 4))
    receiver = max(rank, 1)  # an edge of the rank
    if name == "save":
        folder = watched.started.run_dir / "checkpoints"
        before = {path.name for path in folder.glob(".step_*")}
        return watched.until(
            lambda: bool({path.name for path in folder.glob(".step_*")} - before)
        ) and _pause(dice.uniform(0, 0.1))
    assert name == "evaluation"
    number = watched.counts(receiver)[1] + 1
    while number % (STEPS + EVALUATION) <= STEPS:
        number += 1
    number += dice.randrange(EVALUATION - 2)
    return watched.until(lambda: watched.counts(receiver)[1] >= number)


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return True


# -- what a run has left behind -------------------------------------------------------------------


def turns(run_dir: Path) -> dict[int, Counter[tuple[str, int]]]:
    """Return how often every stage was in a phase of computing, by (phase, step)."""
    trace = json.loads((run_dir / "trace.json").read_text(encoding="utf-8"))
    stages: dict[int, int] = {}
    for event in trace["traceEvents"]:
        if event["name"] == "process_name":
            stages[event["pid"]] = event["args"]["stage"]
    found: dict[int, Counter[tuple[str, int]]] = {}
    for event in trace["traceEvents"]:
        if event["name"] in ("forward", "update", "eval"):
            counter = found.setdefault(stages[event["pid"]], Counter())
            counter[event["name"], event["args"]["step"]] += 1
    return found


def judge(run: Run, watched: Watched, undisturbed: Path) -> None:
    """Compare what a run has left with an undisturbed one."""
    from tests.torture.kills import differences, summary, wrong_checkpoints

    run_dir = watched.started.run_dir
    if not (run_dir / "summary.json").exists():
        run.wrong.append("no summary")
        return
    run.wrong += wrong_checkpoints(run_dir) + differences(run_dir, undisturbed)
    run.recoveries = summary(run_dir)["recoveries"]
    for rank, pids in watched.pids.items():
        if rank not in run.struck and len(set(pids)) != 1:
            causes = [each["cause"] for each in run.recoveries]
            run.wrong.append(f"rank {rank} was left alone and had processes {pids}: {causes}")
    expected, found = turns(undisturbed), turns(run_dir)
    size, extra = divmod(len(expected), watched.processes)
    sizes = [size + (rank < extra) for rank in range(watched.processes)]
    bounds = list(itertools.accumulate(sizes, initial=0))
    for rank in set(range(watched.processes)) - run.struck:
        for stage in range(bounds[rank], bounds[rank + 1]):
            if found.get(stage) != expected[stage]:
                run.wrong.append(f"stage {stage} of rank {rank} had other turns")
    if watched.folder is not None and watched.folder.exists():
        run.wrong.append(f"{watched.folder} is left")


def disturb(
    run: Run,
    moments: Sequence[str],
    run_dir: Path,
    undisturbed: Path,
    dice: random.Random,
    epochs: int,
    **keys: Any,
) -> None:
    """Run the job to its end with a blow at each of the moments, and judge it."""
    from tests.torture.kills import Started

    began = time.monotonic()
    given = {
        **KEYS,
        "pipeline__processes": run.processes,
        "optim__epochs": epochs,
        **keys,
    }
    with Started(run_dir, env={COMPARE_REPLAY: "1"}, **given) as started:
        watched = Watched(started, run.processes, epochs)
        for moment in moments:
            if not blow(run, watched, moment, dice):
                run.blows.append(f"({moment}: too late)")
                break
        watched.until(lambda: False)
        status = started.process.poll()
        if status != 0:
            run.wrong.append(f"exit status {status}")
        run.said = started.err + started.out
    run.took_s = time.monotonic() - began
    judge(run, watched, undisturbed)


def list_moments(kills: int) -> list[str]:
    """Return the moments of so many blows, of 113 in the proportions of the promise."""
    ends = [f"{rank} {name}" for name in ("start", "save", "evaluation", "end") for rank in _ENDS]
    whole = [*["any"] * 50, *["neighbours"] * 10, *["recovering"] * 10, *ends * 5]
    whole += [*["small"] * 3, *["stopped"] * 10]
    random.Random(1).shuffle(whole)
    return whole[:kills]


_ENDS = ("first", "last")


def plan_runs(moments: Sequence[str]) -> Iterator[list[str]]:
    """Yield the moments of each run: in time's order, with at most three in the middle."""
    begin = [moment for moment in moments if moment.endswith("start")]
    end = [moment for moment in moments if moment.endswith(" end")]
    small = [moment for moment in moments if moment == "small"]
    middle = [moment for moment in moments if moment not in begin + end + small]
    while middle or begin or end or small:
        run = []
        if begin:
            run.append(begin.pop())
        if small:
            run.append(small.pop())
        else:
            run += [middle.pop() for _ in range(min(5, len(middle)))]
        if end:
            run.append(end.pop())
        yield run


def torture(folder: Path, kills: int, seed: int) -> Iterator[Run]:
    """Yield every run, until so many blows have been dealt out."""
    from tests.torture.kills import Started

    dice = random.Random(seed)
    epochs = 6
    undisturbed = folder / "undisturbed"
    with Started(undisturbed, run__trace="true", optim__epochs=epochs) as started:
        if started.wait(400) != 0:
            raise SystemExit(f"the undisturbed run failed:\n{started.err}")
    print(HEAD, flush=True)
    for number, moments in enumerate(plan_runs(list_moments(kills)), start=1):
        processes = (2, 3, 4)[number % 3]
        keys: dict[str, Any] = {"pipeline__replay": 8} if "small" in moments else {}
        keys["run__spares"] = number % 2
        run = Run(number, processes, str(keys.get("pipeline__replay", "auto")))
        run_dir = folder / f"run_{number}"
        disturb(run, moments, run_dir, undisturbed, dice, epochs, **keys)
        shutil.rmtree(run_dir, ignore_errors=True)
        yield run


def print_costs(runs: Sequence[Run]) -> None:
    """Print what the recoveries have cost, in seconds."""
    found = [each for run in runs for each in run.recoveries if each["replay_s"] is not None]
    for key in ("detect_s", "ready_s", "replayed_steps", "replay_s"):
        values = [each[key] for each in found]
        if values:
            print(f"{key}: median {statistics.median(values):.2f}, most {max(values):.2f}")
