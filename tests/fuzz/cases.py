"""The cases of the fuzz: what is drawn for a number, the commands that it runs, its verdict."""

from __future__ import annotations

import os
import random
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.commands import Ended, enter_folder, find_fault, read_all_images, run_command
from tests.fuzz.configurations import FILE, Case, make_configuration
from tests.fuzz.folders import make_data

FAMILIES = {"configs": make_configuration, "folders": make_data}
_TRAINING = ("run.dir=run", "optim.max_steps=2", "run.overwrite=true")
# Each is run on the directory of a finished run by one case of four.
_AFTERWARDS = (
    ("eval", "run", "--json"),
    ("export", "run", "-o", "weights.pt"),
    ("report", "run"),
    ("compare", "run", "--json"),
)


@dataclass(frozen=True)
class Task:
    """A case to run: its family, its number, and whether it trains if it is accepted."""

    family: str
    number: int
    seed: int
    trains: bool

    @property
    def name(self) -> str:
        """The name of the case on the command line of the fuzz."""
        return f"{self.family}/{self.number}"


@dataclass(frozen=True)
class Outcome:
    """What came of a case. `fault` is None where nothing is wrong, else it has several lines.

    said: the lines of commands that were refused. trained: whether a run was started.
    """

    accepted: bool
    trained: bool
    said: tuple[str, ...]
    fault: str | None


def run_case(task: Task, folder: Path) -> Outcome:
    """Make a case in an empty folder, run its commands there, and judge them."""
    enter_folder(folder)
    dice = random.Random(f"{task.seed} {task.name}")
    case = FAMILIES[task.family](dice, folder)
    Path(FILE).write_bytes(case.text)
    said: list[str] = []
    steps = 0
    for command, ended, statuses in _run_commands(task, case, dice):
        steps += 1
        fault = find_fault(ended, statuses, is_json="--json" in command)
        if fault is not None:
            return Outcome(steps > 1, steps > 1, tuple(said), describe(case, command, fault))
        if ended.status != 0:
            said.append(f"{ended.status} {ended.line}")
    return Outcome(not said or steps > 1, task.trains and steps > 1, tuple(said), None)


def _run_commands(
    task: Task, case: Case, dice: random.Random
) -> Iterator[tuple[list[str], Ended, tuple[int, ...]]]:
    """Run the commands of a case, each as long as the one before it had status 0.

    Yields the words, the end, and the statuses beside 0 that are allowed.
    """
    words = list(case.words)
    plan = ["plan", FILE, *words]
    if dice.random() < 0.7:
        plan.append("--json")
    ended = run_command(plan)
    yield plan, ended, (2,)
    if ended.status != 0:
        return
    if task.family == "folders":
        ended = read_all_images(FILE, words)
        yield ["(load)", FILE, *words], ended, (2,)
    if ended.status != 0 or not task.trains:
        return

    # The same command again finds a finished run.
    train = ["train", FILE, *words, *_TRAINING]
    ended = run_command(train)
    yield train, ended, (1, 2)
    if ended.status != 0:
        return
    if dice.random() < 0.5:
        yield train, run_command(train), (1, 2)
        return
    after = list(dice.choice(_AFTERWARDS))
    yield after, run_command(after), (1, 2)


def describe(case: Case, command: list[str], fault: str) -> str:
    """Return a fault with the command and the file that repeat it."""
    text = case.text[:3000].decode("utf-8", "backslashreplace")
    shown = "".join(f"    {line}\n" for line in text.splitlines())
    words = os.fsencode(shlex.join(command)).decode("utf-8", "backslashreplace")
    return f"localpipe {words[:3000]}\n{FILE}:\n{shown}{fault}"
