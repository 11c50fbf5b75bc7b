"""A machine with emulated GPUs, on which the tests train."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.emulated_gpu.build import build, environment
from tests.emulated_gpu.cases import DEFECT, RACE
from tests.emulated_gpu.fork_server import ForkedProcess, Server

LIMIT_S = 240.0  # of a case: a hang fails it
FAULT_STATUS = 86  # of a process in which two ranks disagree, or a kernel fails
_TINY = (
    "model.name=tests.sample_networks:small", "data.name=synthetic", "data.samples=72",
    "data.image_size=8", "data.batch_size=16", "data.augment=crop_flip", "pipeline.stages=4",
    "optim.epochs=1", "run.device=cuda", "run.deterministic=true", "run.threads=1",
    "run.timeout_s=120", "run.log_every=2",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How the GPUs of a case behave.

    races: 1 reports races, and 2 ends a process at its first one. delay_us: the most that most
    operations are late, by `seed`. buffered_sends: whether sends end before they are received.
    defect: one to plant into the workers. rank: which the delays depend on; workers have their own.
    devices: the number of GPUs, None for the machine's.
    """

    races: int = 0
    delay_us: int = 0
    seed: int = 1
    buffered_sends: bool = False
    defect: str | None = None
    rank: int | None = None
    devices: int | None = None

    def variables(self) -> dict[str, str]:
        """Return the environment variables that say so to a process."""
        values = {
            "EMULATED_GPU_RACES": str(self.races),
            "EMULATED_GPU_DELAY_US": str(self.delay_us),
            "EMULATED_GPU_SEED": str(self.seed),
            "EMULATED_GPU_BUFFERED_SENDS": str(int(self.buffered_sends)),
        }
        if self.defect is not None:
            values[DEFECT] = self.defect
        if self.rank is not None:
            values["RANK"] = str(self.rank)
        if self.devices is not None:
            values["EMULATED_GPU_DEVICES"] = str(self.devices)
        return values


PROMPT = Settings()


@dataclass(frozen=True)
class Result:
    """How a process has ended, and all that it printed, with its workers."""

    status: int
    text: str

    @property
    def races(self) -> list[str]:
        """What the race checker has reported, each operation pair once, without process ids."""
        found = {line.split(RACE)[1] for line in self.text.splitlines() if RACE in line}
        return sorted(found)


@dataclass(frozen=True)
class Training(Result):
    """A training run, with its summary, which is empty if it did not end."""

    summary: dict[str, Any]

    @property
    def digest(self) -> str:
        """The SHA-256 of the weights. Fails if the run did not end well."""
        assert self.status == 0, self.text
        return str(self.summary["weights_sha256"])


class Machine:
    """Emulated GPUs and a server that forks processes which use them. `close` ends it.

    folder: for what processes print. devices: the number of GPUs. It counts its cases.
    """

    def __init__(self, folder: Path, devices: int = 4) -> None:
        start = time.monotonic()
        self._folder = folder
        self._numbers = itertools.count(1)
        self._server = Server(
            {**environment(build()), "EMULATED_GPU_DEVICES": str(devices)}, folder
        )
        self.cases = 0
        self.start_s = time.monotonic() - start

    def close(self) -> None:
        """End the server."""
        self._server.close()

    def cpu_s(self) -> float:
        """Return the seconds of CPU time that the cases took."""
        return self._server.cpu_s()

    def begin(
        self, function: str, *arguments: Any, settings: Settings = PROMPT
    ) -> tuple[ForkedProcess, Path]:
        """Start a function of `cases`; return the process, and the file of what it prints."""
        self.cases += 1
        output = self._folder / f"output_{next(self._numbers)}.txt"
        name = f"tests.emulated_gpu.cases:{function}"
        return self._server.start(name, arguments, output, settings.variables()), output

    @staticmethod
    def finish(process: ForkedProcess, output: Path, limit_s: float = LIMIT_S) -> Result:
        """Wait for the end of a process. One that hangs is killed, and has status -9."""
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
        assert process.returncode is not None
        return Result(process.returncode, output.read_text(errors="replace"))

    def call(
        self,
        function: str,
        *arguments: Any,
        settings: Settings = PROMPT,
        limit_s: float = LIMIT_S,
    ) -> Result:
        """Run a function of `cases` to its end. One that takes longer than `limit_s` hangs."""
        process, output = self.begin(function, *arguments, settings=settings)
        return self.finish(process, output, limit_s)

    def train(self, run_dir: Path, *words: str, settings: Settings = PROMPT) -> Training:
        """Train a tiny network on the emulated GPUs. words: keys that override its own."""
        command = self.train_command(run_dir, *words)
        result = self.call("run_command", *command, settings=settings)
        file = run_dir / "summary.json"
        summary = json.loads(file.read_text()) if file.exists() else {}
        return Training(result.status, result.text, summary)

    @staticmethod
    def train_command(run_dir: Path, *words: str) -> list[str]:
        """Return the words of a command that trains the tiny network."""
        return ["train", "demo", *_TINY, f"run.dir={run_dir}", *words]
