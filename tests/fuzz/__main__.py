"""Draw configurations and data folders, and run them: each is accepted or refused in one line.

    python -m tests.fuzz [--seed 0] [--minutes 40] [--configs 5000] [--train 200] [--folders 500]
    python -m tests.fuzz --seed 0 --only configs/17

Every case depends on the seed and its number alone. A traceback, a failure of several lines and a
hang are faults. Each is printed with the words that repeat it. Exits 1 with faults.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.fuzz.cases import Outcome, Task
from tests.fuzz.children import Child

_SLOW_S = 30.0


@dataclass
class Tally:
    """Counts of what came of the cases."""

    cases: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    trained: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)  # of faults, and the first case of each

    def add(self, task: Task, outcome: Outcome) -> None:
        """Count a case."""
        self.cases[task.family] += 1
        self.accepted[task.family] += outcome.accepted
        self.trained[task.family] += outcome.trained
        self.lines.update(re.sub(r"\d+", "N", line)[:160] for line in outcome.said)
        if outcome.fault is not None:
            self.faults.append(task.name)

    def summarise(self, seconds: float) -> str:
        """Return the line at the end."""
        parts = [
            f"{count} {family}, {self.accepted[family]} accepted, {self.trained[family]} trained"
            for family, count in self.cases.items()
        ]
        kinds = f"{len(self.lines)} kinds of refusals"
        found = f"{len(self.faults)} faults of {len(self.kinds)} kinds"
        return "; ".join([*parts, kinds, found, f"{seconds / 60:.1f} minutes"])

    def first_of_kind(self, task: Task, fault: str) -> str:
        """Return the name of the first case with a fault of the same kind, which may be this."""
        return self.kinds.setdefault(_find_kind(fault), task.name)


def _find_kind(fault: str) -> str:
    """Return what faults of one cause have in common: the place that raised, or the words."""
    places = re.findall(r'File "\S*/localpipe/(\S+)", line \d+, in (\w+)', fault)
    lines = [line for line in fault.splitlines() if line.strip()]
    if places:
        return f"{places[-1]} {re.split('[:(]', lines[-1])[0]}"
    return re.sub(r"'[^']*'|\d+", "", lines[-1])[:80]


def fuzz(
    child: Child, seed: int, configs: int, train: int, folders: int, end: float = float("inf")
) -> Iterator[tuple[Task, Outcome]]:
    """Yield every case of the fuzz with its outcome, until `end` of time.monotonic.

    train: how many accepted configurations train, spread over all. Of folders one in ten does.
    """
    trained = 0
    for family, number in _mix(configs, folders):
        trains = number % 10 == 0
        if family == "configs":
            trains = trained * configs < train * (number + 1)
        task = Task(family, number, seed, trains)
        outcome = child.run(task)
        if family == "configs":
            trained += outcome.trained
        yield task, outcome
        if time.monotonic() > end:
            return


def _mix(configs: int, folders: int) -> Iterator[tuple[str, int]]:
    """Yield the family and the number of every case, with the folders spread over all."""
    done = 0
    for position in range(configs + folders):
        if (position + 1) * folders // (configs + folders) > done:
            yield "folders", done
            done += 1
        else:
            yield "configs", position - done


def main(argv: Sequence[str] | None = None) -> int:
    """Run the fuzz, print its faults, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=40.0, help="stop after so long")
    parser.add_argument("--configs", type=int, default=5000)
    parser.add_argument("--train", type=int, default=200, help="of the accepted configurations")
    parser.add_argument("--folders", type=int, default=500)
    parser.add_argument("--only", metavar="configs/N", help="run one case, with its training")
    parser.add_argument("--lines", action="store_true", help="print every kind of refusal")
    arguments = parser.parse_args(argv)

    begin = time.monotonic()
    tally = Tally()
    with Child() as child:
        if arguments.only:
            family, _, number = arguments.only.partition("/")
            task = Task(family, int(number), arguments.seed, trains=True)
            cases: Iterator[tuple[Task, Outcome]] = iter([(task, child.run(task))])
        else:
            counts = (arguments.seed, arguments.configs, arguments.train, arguments.folders)
            cases = fuzz(child, *counts, end=begin + 60 * arguments.minutes)
        last = begin
        for task, outcome in cases:
            tally.add(task, outcome)
            now = time.monotonic()
            if now - last > _SLOW_S:
                print(f"slow: {task.name} took {now - last:.0f} s", flush=True)
            last = now
            if outcome.fault is not None:
                _print_fault(task, outcome.fault, tally.first_of_kind(task, outcome.fault))
    if arguments.lines:
        for line, count in tally.lines.most_common():
            print(f"{count:5}  {line}")
    print(tally.summarise(time.monotonic() - begin))
    return 1 if tally.faults else 0


def _print_fault(task: Task, fault: str, first: str) -> None:
    """Print a fault with the command that repeats it, on a terminal of any encoding.

    first: the first case of the same kind, whose fault was printed whole.
    """
    text = f"\n== python -m tests.fuzz --seed {task.seed} --only {task.name}\n{fault}"
    if first != task.name:
        text = f"== {task.name}: as {first}"
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
