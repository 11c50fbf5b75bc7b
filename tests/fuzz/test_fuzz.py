"""A slice of the fuzz with a fixed seed, and whether the fuzz would see a fault."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from localpipe.config import reference
from tests.fuzz.__main__ import Tally, fuzz
from tests.fuzz.cases import FAMILIES, Task
from tests.fuzz.children import Child
from tests.fuzz.commands import Ended, find_fault
from tests.fuzz.configurations import list_keys, make_configuration


def test_a_slice_has_no_fault() -> None:
    tally = Tally()
    faults = []
    with Child() as child:
        for task, outcome in fuzz(child, seed=1, configs=100, train=3, folders=30):
            tally.add(task, outcome)
            if outcome.fault is not None:
                faults.append(f"{task.name}: {outcome.fault}")
    assert faults == []
    assert tally.trained["configs"] == 3 and tally.accepted["folders"] >= 5
    assert len(tally.lines) >= 30


@pytest.mark.parametrize(
    ("ended", "word"),
    [
        (Ended(None, "", "Traceback\n"), "traceback"),
        (Ended(1, "", "localpipe: data: it is odd; change it\n"), "status 1"),
        (Ended(2, "", "localpipe: data: it is\nodd\n"), "no line"),
        (Ended(2, "", ""), "no line"),
        (Ended(2, "", "localpipe: odd\n"), "no line"),
        (Ended(2, "", "localpipe: data: \x1b[31m\n"), "cannot be printed"),
        (Ended(2, "", f"localpipe: data: {'x' * 5000}\n"), "signs"),
        (Ended(0, '{"loss": NaN}', ""), "NaN is not JSON"),
        (Ended(0, "", ""), "no JSON"),
        (Ended(0, "{}", "x.py:3: UserWarning: odd\n"), "noise"),
    ],
)
def test_a_fault_is_seen(ended: Ended, word: str) -> None:
    assert word in (find_fault(ended, (2,), is_json=True) or "")


def test_one_line_is_no_fault() -> None:
    assert find_fault(Ended(2, "", "localpipe: data: odd; change it\n"), (2,)) is None
    assert find_fault(Ended(0, "{}", ""), (2,), is_json=True) is None
    assert find_fault(Ended(0, "{}", "note: 2 files are left out\n"), (2,), is_json=True) is None


def test_every_key_of_the_table_is_drawn() -> None:
    keys = {key for key, *_ in reference.list_keys()}
    assert keys - {*list_keys()} == {"model.args", "method.objective"}
    drawn = ""
    for number in range(250):
        case = make_configuration(random.Random(number), Path())
        drawn += case.text.decode("utf-8", "replace") + "\n".join(case.words)
    assert [key for key in keys if key.rpartition(".")[2] not in drawn] == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_case_depends_on_its_number_alone(family: str, tmp_path: Path) -> None:
    cases = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        cases.append(FAMILIES[family](random.Random(f"0 {family}/7"), tmp_path / name))
    assert cases[0] == cases[1]


def test_a_dead_process_is_a_fault_and_is_replaced() -> None:
    with Child() as child:
        dead = child.run(Task("no such family", 0, 0, False))
        assert dead.fault is not None and "KeyError" in dead.fault
        assert child.run(Task("configs", 0, 0, False)).fault is None
