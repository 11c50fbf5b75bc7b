"""The sweep itself: first every value alone, then rows until every pair has been met."""

from __future__ import annotations

import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from tests.sweep.array import CoveringArray, Item, Pair, Row
from tests.sweep.forks.runner import Runner
from tests.sweep.known import find_known
from tests.sweep.log import Log
from tests.sweep.oracles import COMMANDS, EVERY, ORACLES
from tests.sweep.oracles.effects import Effects, beside
from tests.sweep.oracles.refusals import advised_words, is_meant, names_a_key
from tests.sweep.reducer import reduce_items
from tests.sweep.refused import COMMAND, Combination
from tests.sweep.trial import FailedError, Finding, RefusedError, Trial, remove_numbers
from tests.sweep.values import VALUES, Value, list_contradictions

T = TypeVar("T")
PREPARE = "prepare"  # what `train` does before its first worker, in place of an oracle
_KIND = 30  # characters of a fault's sentence that say what it is


@dataclass
class Sweep:
    """Tries values and rows, judges them, and notes what is wrong in the log.

    values: {key: values}, the first of each that of base.yaml. every: the oracles of every row.
    commands: the oracles that take turns over rows. jobs: threads, each with a command of its own.
    refusals: the combinations that were refused.
    """

    runner: Runner
    log: Log
    seed: int = 0
    jobs: int = 1
    values: Mapping[str, Sequence[Value]] = field(default_factory=lambda: VALUES)
    every: Sequence[str] = tuple(EVERY)
    commands: Sequence[str] = tuple(COMMANDS)
    rows: int = 0
    refusals: list[Combination] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _effects: Effects = field(default_factory=Effects)
    _plain_digests: dict[str, str] = field(default_factory=dict)
    _number: int = 0
    _seen: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        factors: dict[str, Sequence[Value | str]] = dict(self.values)
        factors[COMMAND] = self.commands
        keys = [key for key in self.values if not key.startswith("bench.")]
        self.array = CoveringArray(factors, self.seed, keys)
        for pair in list_contradictions(self.values):
            self.array.forbid((value.key, value) for value in pair)

    # -- the parts ------------------------------------------------------------------------------

    def try_values(self, is_over: Callable[[], bool]) -> None:
        """Try every value alone, through the oracles of every row, and look at its effect."""
        values = [value for key in self.values for value in self.values[key][1:]]

        if not self._try_all(values, self.try_value, is_over):
            self._report_idle_keys()
        self.log.say(f"every value alone: {self._describe()}")

    def try_value(self, value: Value) -> None:
        """Judge the run of one value, and what it changes."""
        trial = self._trial([*beside(value), value])
        try:
            if self._judge(trial, self.every) is None:
                self._check_effect(value, trial)
        except RefusedError as refused:
            self._forbid(trial, refused, {})
        self._clean(trial)

    def try_refusals(
        self, combinations: Sequence[Combination], is_over: Callable[[], bool]
    ) -> None:
        """Judge what an earlier sweep saw refused, and forbid what still is. Nothing is reduced.

        Those that are not reached before the time is over stay among the refusals.
        """
        self.refusals += self._try_all(combinations, self.try_refusal, is_over)
        self.log.say(f"every refusal of before: {self._describe()}")

    def try_refusal(self, combination: Combination) -> None:
        """Judge the refusal of a combination. One that is accepted now is left to the rows."""
        first = {values[0] for values in self.values.values()}
        changed = [item for _, item in combination if isinstance(item, Value) and item not in first]
        command = dict(combination).get(COMMAND)
        trial = self._trial(changed)
        try:
            for name in self.every if command is None else [str(command)]:
                self._consult(trial, name)
        except RefusedError as refused:
            self._add_refusal(refused, changed, combination, trial.oracle)
        self._clean(trial)

    def try_rows(self, is_over: Callable[[], bool], most: int = sys.maxsize) -> None:
        """Try rows until every pair is met or refused, the time is over, or `most` are tried."""

        def work() -> None:
            while not is_over() and self.rows < most:
                with self._lock:
                    row = self.array.make_row()
                if row is None:
                    break
                self.try_row(row)

        self._in_threads(work)
        self.log.say(self._describe())

    def try_row(self, row: Row) -> None:
        """Judge one row: its pairs are met, or what refuses it is forbidden."""
        with self._lock:
            pairs = self.array.meet(row)  # other threads need not try them meanwhile
        trial = self._trial(self._changed(row))
        try:
            failing = self._judge(trial, [*self.every, str(row[COMMAND])])
        except RefusedError as refused:
            with self._lock:
                self.array.reopen(pairs)
            self._forbid(trial, refused, row)
        else:
            self._count_row(pairs, failing)
        self._clean(trial)

    def _count_row(self, pairs: list[Pair], failing: list[Value] | None) -> None:
        """Count a row, or leave its pairs to others, without the values that fail."""
        with self._lock:
            if failing:
                self.array.reopen(pairs)
                self.array.forbid((value.key, value) for value in failing)
            self.rows += 1
            if self.rows % 10 == 0:
                self.log.say(self._describe())

    def _try_all(
        self, items: Sequence[T], try_item: Callable[[T], None], is_over: Callable[[], bool]
    ) -> list[T]:
        """Try items in threads until the time is over, and return those that are left."""
        left = deque(items)

        def work() -> None:
            while not is_over():
                try:
                    item = left.popleft()
                except IndexError:
                    break
                try_item(item)

        self._in_threads(work)
        return list(left)

    def _in_threads(self, work: Callable[[], None]) -> None:
        """Work in `jobs` threads; an error of one passes through at the end."""
        with ThreadPoolExecutor(self.jobs) as threads:
            for done in [threads.submit(work) for _ in range(self.jobs)]:
                done.result()

    def _describe(self) -> str:
        array = self.array
        return (
            f"{self.rows} rows, {self.runner.commands} commands; of {array.pairs} pairs "
            f"{array.met} met, {array.refused} refused, {array.unmet} fit into no row, "
            f"{array.open} open; {len(self.log.findings)} faults, {len(self.log.known)} known"
        )

    # -- judging --------------------------------------------------------------------------------

    def _judge(self, trial: Trial, oracles: Iterable[str]) -> list[Value] | None:
        """Let oracles look at a trial, and note what they find. Raises RefusedError.

        Returns the values that keep its run from being trained, or None: without a run nothing
        else can be said.
        """
        for name in oracles:
            before = len(trial.findings)
            self._consult(trial, name)
            found = trial.findings[before:]
            if name == "train" and "trained" not in vars(trial):
                return self._note(found[:1], trial)
            self._note([finding for finding in found if not self._count_known(finding)][:1], trial)
        return None

    def _consult(self, trial: Trial, name: str) -> None:
        trial.oracle = name
        try:
            ORACLES[name](trial)
        except FailedError:
            pass
        except RefusedError:
            raise
        except (KeyError, ValueError, OSError, IndexError, TypeError) as error:
            trial.findings.append(
                Finding(name, f"localpipe {name}", f"{type(error).__name__}: {error}")
            )

    def _check_effect(self, value: Value, trial: Trial) -> None:
        """Compare the run of a value with the one without it."""
        plain = beside(value)
        words = " ".join(map(str, plain))
        if words not in self._plain_digests:
            other = self._trial(plain)
            self._plain_digests[words] = other.summary["weights_sha256"]
            self._clean(other)
        wrong = self._effects.add(value, trial, self._plain_digests[words])
        if wrong is not None:
            self._judge_finding(Finding("effect", trial.trained.command, wrong), trial.values)

    def _report_idle_keys(self) -> None:
        for key in self._effects.list_idle():
            finding = Finding("effect", "localpipe train", f"no value of {key} changes the weights")
            self._judge_finding(finding, self.values[key][1:])

    def _note(self, findings: Sequence[Finding], trial: Trial) -> list[Value]:
        """Note the first fault of an oracle, and return the values of its smallest command.

        The others of the same trial follow from it, or are seen again when it is corrected.
        """
        smallest = list(trial.values)
        for finding in findings:
            shows = partial(self._shows, finding)
            if not shows(trial.values):
                self._add(finding, trial.values, "not seen a second time: ")
                continue
            smallest = reduce_items(trial.values, shows)
            if not self._count_known(finding):
                self._add(finding, smallest)
        return smallest

    def _shows(self, finding: Finding, values: Sequence[Value]) -> bool:
        """Return whether some values show the same fault."""
        trial = self._trial(values)
        try:
            for name in dict.fromkeys(("train", finding.oracle)):
                self._consult(trial, name)
        except RefusedError:
            return False
        finally:
            self._clean(trial)
        return any(self._is_same(finding, other) for other in trial.findings)

    def _count_known(self, finding: Finding) -> bool:
        """Return whether a fault is known, and count it."""
        known = find_known(finding)
        if known is not None:
            self.log.known[known] += 1
        return known is not None

    def _is_same(self, finding: Finding, other: Finding) -> bool:
        return finding.oracle == other.oracle and _kind(finding) == _kind(other)

    def _add(self, finding: Finding, values: Sequence[Value], note: str = "") -> None:
        key = (finding.oracle, f"{_kind(finding)} {' '.join(map(str, values))}")
        if key in self._seen:
            return
        self._seen.add(key)
        words = " ".join(str(value) for value in values)
        self.log.add(finding, f"{note}{finding.oracle} of base.yaml {words}")

    # -- refusals -------------------------------------------------------------------------------

    def _forbid(self, trial: Trial, refused: RefusedError, row: Row) -> None:
        """Find the smallest combination that is refused, look at it, and forbid it.

        row: its values, and those of base.yaml where it has none.
        """
        oracle = trial.oracle
        # Most runs are refused before the first worker starts, which takes no time to see.
        if oracle == "train" and self._refusal(trial.values, PREPARE) == refused.sentence:
            oracle = PREPARE

        def shows(values: Sequence[Value]) -> bool:
            return self._refusal(values, oracle) == refused.sentence

        likely = [value for value in trial.values if names_a_key(str(refused), [value])]
        smallest = reduce_items(trial.values, shows, likely)
        if not names_a_key(str(refused), smallest):
            # The values of base.yaml are refused too. Here it is those that the sentence names.
            smallest += [value for value in likely if value not in smallest]
        items: list[Item] = [(value.key, value) for value in smallest]
        items += self._needed_items(smallest, row, oracle, refused.sentence)
        if oracle in self.commands:
            items.append((COMMAND, oracle))
        assert items, f"the run of base.yaml is refused: {refused}"
        self._add_refusal(refused, smallest, items, oracle)

    def _add_refusal(
        self,
        refused: RefusedError,
        smallest: Sequence[Value],
        items: Combination,
        oracle: str,
    ) -> None:
        """Forbid a combination that is refused, and judge the refusal.

        smallest: its values that are not of base.yaml.
        """
        with self._lock:
            self.array.forbid(items)
            self.refusals.append(items)
        self._check_refusal(refused, smallest, items, oracle)

    def _needed_items(
        self, smallest: Sequence[Value], row: Row, oracle: str, sentence: str
    ) -> list[Item]:
        """Return the values of base.yaml that a refusal needs: another value ends it.

        Only keys that the sentence names are looked at.
        """
        keys = {value.key for value in smallest}
        needed: list[Item] = []
        for key, (first, *others) in self.values.items():
            is_base = row.get(key, first) == first and key not in keys
            if not is_base or not names_a_key(sentence, [first]):
                continue
            if any(self._refusal([*smallest, other], oracle) is None for other in others):
                needed.append((key, first))
        return needed

    def _refusal(self, values: Sequence[Value], oracle: str) -> str | None:
        """Return the sentence with which values are refused by an oracle's commands, or None."""
        trial = self._trial(values)
        try:
            if oracle == PREPARE:
                trial.prepare()
            else:
                self._consult(trial, oracle)
        except RefusedError as refused:
            return refused.sentence
        except FailedError:
            pass
        finally:
            self._clean(trial)
        return None

    def _check_refusal(
        self,
        refused: RefusedError,
        smallest: Sequence[Value],
        items: Combination,
        oracle: str,
    ) -> None:
        """Look whether a refusal is meant, names a key that causes it, and gives advice that helps.

        items: what was forbidden, `smallest` and what it needs of base.yaml and of the command.
        """
        sentence = str(refused)
        words = []
        for key, item in items:
            if key == COMMAND:
                words.append(f"[{item}]")
            elif isinstance(item, Value):
                words += item.words
        self.log.say(f"refused: {' '.join(words)}\n         {sentence}")
        wrong = []
        if not is_meant(words):
            wrong.append("not in refusals.MEANT")
        if not names_a_key(sentence, smallest):
            wrong.append("names no key of its cause")
        for advised in advised_words(sentence):
            again = self._refusal([*smallest, Value(advised)], oracle) or ""
            if remove_numbers(again) == remove_numbers(refused.sentence):
                wrong.append(f"the advice {' '.join(advised)} does not help")
        for text in wrong:
            finding = Finding("refusal", refused.result.command, f"{text}: {sentence}")
            self._judge_finding(finding, smallest)

    def _judge_finding(self, finding: Finding, values: Sequence[Value]) -> None:
        """Note a finding that is as small as it gets, unless it is known."""
        if not self._count_known(finding):
            self._add(finding, values)

    # -- trials ---------------------------------------------------------------------------------

    def _trial(self, values: Sequence[Value]) -> Trial:
        with self._lock:
            self._number += 1
            return Trial(self.runner, list(values), self._number)

    def _clean(self, trial: Trial) -> None:
        for path in self.runner.folder.glob(f"*_{trial.number}"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(f"{trial.run_dir}_again", ignore_errors=True)

    def _changed(self, row: Row) -> list[Value]:
        """Return the values of a row that are not those of base.yaml, in the order of the keys."""
        return [
            value
            for key, values in self.values.items()
            for value in values[1:]
            if row.get(key) == value
        ]


def _kind(finding: Finding) -> str:
    """Return what a fault says before its figures differ."""
    return remove_numbers(finding.text)[:_KIND]
