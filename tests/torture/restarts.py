"""Kill workers under `torchrun --max-restarts`, and check that the run ends undisturbed.

    python -m tests.torture.restarts --kills 24 --seed 0

The kills are at the start, in training, in an evaluation, while saving, at any moment of the end,
and after the summary is written. Every second run gets two. One torchrun starts the workers, or two
with a c10d rendezvous, or two with a static one. Prints one row a run. Exits 1 when anything was
not as promised. The class `Agents` also serves test_restarts.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.torture.kills import (
    SMALL,
    Started,
    differences,
    find_free_port,
    last_step,
    records,
    summary,
    wrong_checkpoints,
)

LAUNCHERS = ("one", "c10d", "static")
MOMENTS = ("start", "training", "evaluation", "saving", "end", "exit")
ENOUGH_S = 300.0
_MARK = "LOCALPIPE_TORTURE"


class Agents:
    """One job under one torchrun or two of this machine, each with two workers.

    launcher: one of LAUNCHERS. restarts: torchrun's --max-restarts. keys: over SMALL, with `__` for
    the dot.
    """

    def __init__(self, run_dir: Path, launcher: str, restarts: int, **keys: Any) -> None:
        self.run_dir = run_dir
        self.mark = uuid.uuid4().hex
        self._folder = tempfile.TemporaryDirectory(prefix="torture-")
        given = {**SMALL, **{key.replace("__", "."): value for key, value in keys.items()}}
        config = Path(self._folder.name) / "empty.yaml"
        config.write_text("{}\n", encoding="utf-8")
        job = ["train", str(config), *(f"{key}={value}" for key, value in given.items())]
        self._files: list[Path] = []
        self.agents: list[subprocess.Popen[bytes]] = []
        for number, words in enumerate(_agent_words(launcher)):
            self._files.append(Path(self._folder.name) / f"said_{number}")
            command = [sys.executable, "-m", "torch.distributed.run", *words]
            command += ["--max-restarts", str(restarts), "--nproc-per-node", "2"]
            command += ["-m", "localpipe", *job, f"run.dir={run_dir}"]
            with open(self._files[-1], "wb") as said:
                self.agents.append(
                    subprocess.Popen(
                        command,
                        stdout=said,
                        stderr=said,
                        stdin=subprocess.DEVNULL,
                        env={**os.environ, "OMP_NUM_THREADS": "1", _MARK: self.mark},
                    )
                )

    @property
    def running(self) -> bool:
        """Whether every torchrun still runs."""
        return all(agent.poll() is None for agent in self.agents)

    @property
    def said(self) -> str:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in self._files)

    def workers(self) -> dict[int, psutil.Process]:
        """Return the living workers by rank."""
        found = {}
        for agent in self.agents:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(agent.pid).children():
                    with contextlib.suppress(psutil.Error, OSError, KeyError):
                        if child.status() != psutil.STATUS_ZOMBIE:
                            found[int(child.environ()["RANK"])] = child
        return found

    def until(self, condition: Callable[[], bool], timeout_s: float = ENOUGH_S) -> bool:
        """Wait for a condition; return whether it came true before a torchrun had ended."""
        end = time.monotonic() + timeout_s
        while self.running and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.02)
        return False

    def wait(self, timeout_s: float = ENOUGH_S) -> list[int]:
        """Wait for the end of all; return their exit statuses."""
        end = time.monotonic() + timeout_s
        return [agent.wait(max(end - time.monotonic(), 0.1)) for agent in self.agents]

    def __enter__(self) -> Agents:
        return self

    def __exit__(self, *_: object) -> None:
        workers = list(self.workers().values())
        for agent in self.agents:
            if agent.poll() is None:
                agent.kill()
            agent.wait()
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.kill()
        self._folder.cleanup()


def _agent_words(launcher: str) -> list[list[str]]:
    """Return what is particular to each torchrun of a launcher."""
    if launcher == "one":
        return [["--standalone"]]
    endpoint = f"127.0.0.1:{find_free_port()}"
    both = ["--nnodes", "2", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1"]
    if launcher == "c10d":
        return [[*both, "--rdzv-backend", "c10d", "--rdzv-id", "torture"]] * 2
    return [[*both, "--rdzv-backend", "static", "--node-rank", str(node)] for node in range(2)]


@dataclass
class Row:
    """One run, its kills, and what was not as promised."""

    run: int
    launcher: str
    blows: list[str] = field(default_factory=list)
    took_s: float = 0.0
    wrong: list[str] = field(default_factory=list)
    said: str = ""

    def text(self) -> str:
        verdict = "; ".join(self.wrong) or "as promised"
        return (
            f"{self.run:3d}  {self.launcher:8}  {', '.join(self.blows):44}  "
            f"{self.took_s:5.1f}  {verdict}"
        )


HEAD = f"run  launcher  {'killed':44}   in s  verdict"


def _evaluations(run_dir: Path) -> int:
    return len([record for record in records(run_dir) if record["kind"] == "eval"])


def wait_for(moment: str, started: Agents, dice: random.Random) -> bool:
    """Wait for a moment of MOMENTS; return False if a torchrun has ended before."""
    run_dir = started.run_dir
    if moment == "start":
        return started.until(lambda: bool(started.workers())) and _pause(dice.uniform(0, 5))
    if moment == "training":
        reached = last_step(run_dir) + dice.randrange(1, 24)
        return started.until(lambda: last_step(run_dir) >= reached)
    if moment == "evaluation":
        before = _evaluations(run_dir) + 4 * dice.randrange(3)
        return started.until(lambda: _evaluations(run_dir) > before)
    if moment == "end":
        last = SMALL["optim.epochs"]
        return started.until(
            lambda: any(r["kind"] == "eval" and r["epoch"] == last for r in records(run_dir))
        ) and _pause(dice.uniform(0, 0.3))
    if moment == "exit":
        return started.until((run_dir / "summary.json").exists) and _pause(dice.uniform(0, 0.3))
    folder = run_dir / "checkpoints"
    left_over = {path.name for path in folder.glob(".step_*")}
    return started.until(
        lambda: bool({path.name for path in folder.glob(".step_*")} - left_over)
    ) and _pause(dice.uniform(0, 0.05))


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def strike(started: Agents, dice: random.Random, before: set[int]) -> tuple[str, set[int]] | None:
    """Kill a worker that is not among `before` (process numbers); return its name and all numbers.

    None if none runs any more.
    """
    workers = {rank: one for rank, one in started.workers().items() if one.pid not in before}
    with contextlib.suppress(psutil.NoSuchProcess):
        if started.running and workers:
            rank = dice.choice(sorted(workers))
            numbers = before | {one.pid for one in workers.values()}
            workers[rank].kill()
            return f"rank {rank}", numbers
    return None


def _wait_for_new(started: Agents, before: set[int]) -> bool:
    """Wait for a worker that is not among `before`; return False if a torchrun has ended first."""
    return started.until(lambda: any(one.pid not in before for one in started.workers().values()))


def disturb(row: Row, moments: Sequence[str], run_dir: Path, dice: random.Random) -> None:
    """Run the job to its end, with one kill at each of the moments, and write down what came."""
    began = time.monotonic()
    with Agents(run_dir, row.launcher, len(moments)) as started:
        numbers: set[int] = set()
        for moment in moments:
            if not _wait_for_new(started, numbers) or not wait_for(moment, started, dice):
                break
            struck = strike(started, dice, numbers)
            if struck is None:
                break
            victim, numbers = struck
            row.blows.append(f"{moment} {victim} step {last_step(run_dir)}")
        try:
            statuses = started.wait()
            if any(statuses):
                row.wrong.append(f"exit status {statuses}")
        except subprocess.TimeoutExpired:
            row.wrong.append(f"no end within {ENOUGH_S:g} s")
        row.said = started.said
    row.took_s = time.monotonic() - began


def judge(row: Row, run_dir: Path, undisturbed: Path) -> None:
    """Compare what a run has left with an undisturbed one."""
    if not (run_dir / "summary.json").exists():
        row.wrong.append("no summary")
        return
    row.wrong += wrong_checkpoints(run_dir) + differences(run_dir, undisturbed)


def torture(folder: Path, kills: int, seed: int, launchers: Sequence[str]) -> Iterator[Row]:
    """Yield every run, until so many kills have been dealt out."""
    dice = random.Random(seed)
    undisturbed = folder / "undisturbed"
    with Started(undisturbed) as started:
        if started.wait(180) != 0:
            raise SystemExit(f"the undisturbed run failed:\n{started.err}")
    print(f"undisturbed: {summary(undisturbed)['weights_sha256']}\n{HEAD}", flush=True)

    # Every launcher meets every moment, alone or as the first of two.
    dealt = 0
    for run, (moment, launcher) in enumerate(
        itertools.cycle(itertools.product(MOMENTS, launchers)), start=1
    ):
        if dealt >= kills:
            return
        moments = [moment]
        if run % 2 == 0 and moment not in ("end", "exit"):
            moments.append(dice.choice(MOMENTS))
        row, run_dir = Row(run, launcher), folder / f"run_{run}"
        disturb(row, moments, run_dir, dice)
        judge(row, run_dir, undisturbed)
        dealt += len(row.blows)
        shutil.rmtree(run_dir, ignore_errors=True)
        yield row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS)
    arguments = parser.parse_args(argv)
    failed = total = kills = 0
    with tempfile.TemporaryDirectory(prefix="localpipe-torture-") as folder:
        for row in torture(Path(folder), arguments.kills, arguments.seed, arguments.launchers):
            print(row.text(), flush=True)
            total, kills = total + 1, kills + len(row.blows)
            if row.wrong:
                failed += 1
                lines = row.said.splitlines()[-60:]
                print("".join(f"       | {line}\n" for line in lines), end="", flush=True)
    print(f"{kills} kills; {failed} of {total} runs are not as promised")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
