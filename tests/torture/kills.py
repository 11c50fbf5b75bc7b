"""Kill a run's processes at random moments, and check that it ends like an undisturbed run.

    python -m tests.torture.kills --kills 25 --seed 0 [--launcher own|torchrun] [--recover stage]

Prints one row a kill and one a finished run. Exits 1 when anything was not as promised. The
helpers above `main` also serve test_failures.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

GONE_S = 30.0  # what is promised: every other process of a run is gone so long after one has died
SMALL: dict[str, Any] = {
    "model.name": "resnet8",
    "pipeline.stages": 4,
    "pipeline.processes": 2,
    "data.name": "digits",
    "data.train_subset": 256,
    "data.batch_size": 32,
    "optim.lr": 0.1,
    "optim.schedule": "cosine_step",
    "optim.warmup_epochs": 1,
    "optim.epochs": 12,
    "run.threads": 1,
    "run.checkpoint_every_s": 0.5,
}
_MARK = "LOCALPIPE_TORTURE"


# -- one start of the command ----------------------------------------------------------------------


class Started:
    """`localpipe train`, started and followed from outside.

    Every process of it has a mark in its environment.

    keys: configuration keys over SMALL, with `__` for the dot: run__timeout_s=5.
    """

    def __init__(
        self,
        run_dir: Path,
        torchrun: bool = False,
        env: Mapping[str, str] | None = None,
        **keys: Any,
    ) -> None:
        self.run_dir, self.torchrun = run_dir, torchrun
        self.mark = uuid.uuid4().hex
        self._said = tempfile.TemporaryDirectory(prefix="torture-")
        self._out, self._err = Path(self._said.name) / "out", Path(self._said.name) / "err"
        begin = [sys.executable, "-m", "localpipe"]
        if torchrun:
            begin = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            begin += ["--master-port", str(find_free_port()), "-m", "localpipe"]
        given = {**SMALL, **{key.replace("__", "."): value for key, value in keys.items()}}
        words = [f"{key}={value}" for key, value in given.items()]
        config = Path(self._said.name) / "empty.yaml"
        config.write_text("{}\n", encoding="utf-8")
        # files and no pipes: whoever outlives the launcher must not keep this process waiting
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                [*begin, "train", str(config), *words, f"run.dir={run_dir}"],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env={**os.environ, _MARK: self.mark, **(env or {})},
            )
        self.began = time.monotonic()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8")

    def processes(self) -> list[psutil.Process]:
        """Return every living process of this start, orphans included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if (
                    process.environ().get(_MARK) == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
        return found

    def workers(self) -> dict[int, psutil.Process]:
        """Return the workers by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children() if self.running else []:
            with contextlib.suppress(psutil.Error, OSError, KeyError):
                found[int(child.environ()["RANK"])] = child
        return found

    def wait(self, timeout_s: float = 120.0) -> int:
        """Wait for the end of the launcher; return its exit status."""
        return self.process.wait(timeout_s)

    def gone(self, timeout_s: float = GONE_S) -> float | None:
        """Wait until no process is left; return the seconds, or None after killing the rest."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if not self.processes():
                self.process.wait()
                return time.monotonic() - began
            time.sleep(0.1)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()
        return None

    def until(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> bool:
        """Wait for a condition; return whether it came true before the run had ended."""
        end = time.monotonic() + timeout_s
        while self.running and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.005)
        return False

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.gone(0.0)
        self._said.cleanup()


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- what a run has left behind --------------------------------------------------------------------


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl.

    A complete line that is not strict JSON raises ValueError.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line, parse_constant=_refuse) for line in lines[:-1]]


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def last_step(run_dir: Path, kind: str = "train") -> int:
    """Return the newest step that metrics.jsonl tells of."""
    return max((record["step"] for record in records(run_dir) if record["kind"] == kind), default=0)


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints that can be seen, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_*"))


def wrong_checkpoints(run_dir: Path) -> list[str]:
    """Return what is wrong with the checkpoints: incomplete, unreadable, NaN in the weights."""
    found = []
    for path in checkpoints(run_dir):
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            for name, file in manifest["files"].items():
                if (path / name).stat().st_size != file["bytes"]:
                    found.append(f"{path.name}/{name} has the wrong size")
                if not _finite(torch.load(path / name, weights_only=True)):
                    found.append(f"{path.name}/{name} holds a number that is not finite")
            if len(manifest["files"]) != manifest["stages"]:
                found.append(
                    f"{path.name} has {len(manifest['files'])} files of {manifest['stages']}"
                )
        except Exception as error:  # whatever it is, the checkpoint cannot be used
            found.append(f"{path.name}: {error!r}")
    return found


def _finite(state: Any) -> bool:
    if isinstance(state, torch.Tensor):
        return bool(torch.isfinite(state).all())
    if isinstance(state, Mapping):
        return all(_finite(value) for value in state.values())
    if isinstance(state, list | tuple):
        return all(_finite(value) for value in state)
    return not isinstance(state, float) or math.isfinite(state)


def summary(run_dir: Path) -> dict[str, Any]:
    """Return summary.json."""
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return found


SAME = (
    "weights_sha256",
    "steps",
    "test_accuracy",
    "best_test_accuracy",
    "best_epoch",
    "test_accuracy_per_stage",
    "loss_per_stage",
)


def differences(run_dir: Path, undisturbed: Path) -> list[str]:
    """Return where a finished run differs from an undisturbed one in what must be equal."""
    found = []
    result, other = summary(run_dir), summary(undisturbed)
    found += [
        f"{key} is {result[key]}, undisturbed {other[key]}"
        for key in SAME
        if result[key] != other[key]
    ]
    seen, expected = _list_records(run_dir), _list_records(undisturbed)
    twice = sorted({key for key in seen if seen.count(key) > 1}, key=str)
    found += [f"metrics: twice {key}" for key in twice]
    found += [f"metrics: missing {key}" for key in sorted(set(expected) - set(seen), key=str)]
    found += [f"metrics: more {key}" for key in sorted(set(seen) - set(expected), key=str)]
    return found


def _list_records(run_dir: Path) -> list[tuple[Any, ...]]:
    """Return what must be in metrics.jsonl once: training records and evaluations."""
    kept = []
    for record in records(run_dir):
        if record["kind"] == "train":
            kept.append(("train", record["step"], record["epoch"], record["stage"], record["lr"]))
        elif record["kind"] == "eval":
            kept.append(
                ("eval", *(v for k, v in sorted(record.items()) if k not in ("kind", "wall_s")))
            )
    return kept


# -- blows -----------------------------------------------------------------------------------------


@dataclass
class Blow:
    """One process killed at one moment, and what was not as promised afterwards."""

    run: int
    moment: str
    victim: str = ""
    after_s: float = 0.0
    step: int = 0
    status: int | None = None
    gone_s: float | None = None
    wrong: list[str] = field(default_factory=list)
    said: str = ""

    def row(self) -> str:
        gone = "never" if self.gone_s is None else f"{self.gone_s:5.1f}"
        verdict = "; ".join(self.wrong) or "as promised"
        return (
            f"{self.run:3d}  {self.moment:10}  {self.victim:8}  {self.after_s:5.1f}  "
            f"{self.step:4d}  {gone:>5}  {self.status!s:>6}  {verdict}"
        )


HEAD = "run  moment      victim     at s  step   gone  status  verdict"


def moments(started: Started, dice: random.Random, whole_s: float) -> dict[str, Callable[[], bool]]:
    """Return what to wait for before a kill, by name.

    Each function returns False when the run has ended before.
    """
    folder = started.run_dir / "checkpoints"

    def sleep(seconds: float) -> bool:
        return (
            not started.until(lambda: time.monotonic() - started.began >= seconds)
            or started.running
        )

    left_over = {
        path.name for path in folder.glob(".step_*")
    }  # of the kill before; swept when the run takes over

    def saving() -> bool:
        skip = dice.randrange(4)
        seen: set[str] = set()

        def writes() -> bool:
            now = {path.name for path in folder.glob(".step_*")}
            left_over.intersection_update(now)
            seen.update(now - left_over)
            return len(seen) > skip

        return started.until(writes) and _pause(dice.uniform(0, 0.05))

    def evaluating() -> bool:
        before, skip = _evaluations(started.run_dir), dice.randrange(4)
        return started.until(lambda: _evaluations(started.run_dir) > before + 4 * skip)

    def ending() -> bool:
        last = SMALL["optim.epochs"]
        return started.until(lambda: _evaluations(started.run_dir, last) > 0) and _pause(
            dice.uniform(0, 0.6)
        )

    return {
        "start-up": lambda: sleep(dice.uniform(0.0, 6.0)),
        "any": lambda: sleep(dice.uniform(0.0, whole_s)),
        "saving": saving,
        "evaluation": evaluating,
        "end": ending,
    }


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def _evaluations(run_dir: Path, epoch: int | None = None) -> int:
    evaluations = [record for record in records(run_dir) if record["kind"] == "eval"]
    return len([record for record in evaluations if epoch is None or record["epoch"] == epoch])


def strike(started: Started, dice: random.Random, blow: Blow) -> bool:
    """Kill the launcher or a worker; return False when the run had ended already."""
    with contextlib.suppress(psutil.NoSuchProcess):
        workers = started.workers()
        choice = dice.choice(["launcher", *(f"rank {rank}" for rank in workers)])
        victim = (
            psutil.Process(started.process.pid)
            if choice == "launcher"
            else workers[int(choice.split()[1])]
        )
        if not started.running or victim.status() == psutil.STATUS_ZOMBIE:
            return False
        blow.after_s, blow.victim = time.monotonic() - started.began, choice
        victim.kill()
        return True
    return False


def judge(started: Started, blow: Blow) -> None:
    """Look at what a blow has left behind."""
    blow.gone_s = started.gone()
    blow.status = started.process.poll()
    blow.said = started.err
    try:
        blow.step = last_step(started.run_dir)
    except ValueError as error:
        blow.wrong.append(f"metrics: {error}")
    if blow.gone_s is None:
        blow.wrong.append(f"processes were left after {GONE_S:g} s")
    blow.wrong += wrong_checkpoints(started.run_dir)
    if started.torchrun:
        if blow.status == 0:
            blow.wrong.append("exit status 0")
    elif blow.victim == "launcher":
        if blow.said:
            blow.wrong.append("stderr is not empty")
    else:
        if blow.status != 1:
            blow.wrong.append("exit status is not 1")
        rank = blow.victim.split()[1]
        if not re.fullmatch(
            rf"localpipe: stages? \d.*: rank {rank} was killed by SIGKILL; .*\n", blow.said
        ):
            blow.wrong.append("stderr is not one line that names stage and rank")


def finish(run: int, run_dir: Path, undisturbed: Path, torchrun: bool) -> Blow:
    """Start the same command undisturbed and compare what it ends with."""
    end = Blow(run, "to its end", "-")
    with Started(run_dir, torchrun) as started:
        try:
            end.status = started.wait(180)
        except subprocess.TimeoutExpired:
            end.wrong.append("no end within 180 s")
        end.after_s = time.monotonic() - started.began
        end.gone_s = started.gone()
        end.said = started.err
        if end.status != 0:
            end.wrong.append("exit status is not 0")
            return end
    end.step = summary(run_dir)["steps"]
    end.wrong += wrong_checkpoints(run_dir) + differences(run_dir, undisturbed)
    return end


def torture(folder: Path, kills: int, seed: int, torchrun: bool) -> Iterator[Blow]:
    """Yield every blow and every end, until so many kills have been dealt out."""
    dice = random.Random(seed)
    undisturbed = folder / "undisturbed"
    began = time.monotonic()
    with Started(undisturbed) as started:
        if started.wait(180) != 0:
            raise SystemExit(f"the undisturbed run failed:\n{started.err}")
    whole_s = time.monotonic() - began
    print(
        f"undisturbed: {whole_s:.1f} s, {summary(undisturbed)['weights_sha256']}\n{HEAD}",
        flush=True,
    )
    run = dealt = 0
    while dealt < kills:
        run += 1
        run_dir = folder / f"run_{run}"
        for _ in range(min(dice.randint(1, 5), kills - dealt)):
            with Started(run_dir, torchrun) as started:
                name, wait = dice.choice(list(moments(started, dice, whole_s).items()))
                blow = Blow(run, name)
                if not wait() or not strike(started, dice, blow):
                    started.gone()
                    break  # it came to its end before the blow
                judge(started, blow)
            dealt += 1
            yield blow
        yield finish(run, run_dir, undisturbed, torchrun)
        shutil.rmtree(run_dir)


def torture_recoveries(kills: int, seed: int) -> int:
    """Print a row for every run that recovers; return 1 if one was not as promised."""
    from tests.torture.recoveries import print_costs
    from tests.torture.recoveries import torture as torture_stages

    runs = []
    with tempfile.TemporaryDirectory(prefix="localpipe-torture-") as folder:
        for run in torture_stages(Path(folder), kills, seed):
            runs.append(run)
            print(run.row(), flush=True)
            if run.wrong:
                lines = run.said.splitlines()[-40:]
                print("".join(f"       | {line}\n" for line in lines), end="", flush=True)
    print_costs(runs)
    failed = sum(bool(run.wrong) for run in runs)
    print(f"{sum(len(run.blows) for run in runs)} blows; {failed} of {len(runs)} runs are wrong")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=("own", "torchrun"), default="own")
    parser.add_argument("--recover", choices=("none", "stage"), default="none")
    arguments = parser.parse_args(argv)
    if arguments.recover == "stage":
        return torture_recoveries(arguments.kills, arguments.seed)
    failed = total = 0
    with tempfile.TemporaryDirectory(prefix="localpipe-torture-") as folder:
        for blow in torture(
            Path(folder), arguments.kills, arguments.seed, arguments.launcher == "torchrun"
        ):
            print(blow.row(), flush=True)
            total += 1
            if blow.wrong:
                failed += 1
                print(
                    "".join(f"       | {line}\n" for line in blow.said.splitlines()[-40:]),
                    end="",
                    flush=True,
                )
    print(f"{failed} of {total} rows are not as promised")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
