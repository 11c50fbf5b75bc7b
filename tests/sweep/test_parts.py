"""The parts of the sweep: its table of values, its rows, its reducer, and what it can see."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import get_args

import pytest

from localpipe import config as configs
from localpipe.config import reference, registry
from localpipe.config.explain import find_declared_type
from localpipe.config.keys import Config, TableName
from localpipe.config.resume import flatten
from tests.sweep.array import CoveringArray, Item
from tests.sweep.oracles.numbers import impossible_numbers
from tests.sweep.oracles.refusals import advised_words, is_meant, names_a_key
from tests.sweep.oracles.tables import has_row
from tests.sweep.reducer import reduce_items
from tests.sweep.trial import BASE, read_json, remove_numbers, remove_paths
from tests.sweep.values import CHOICES_LEFT_OUT, LEFT_OUT, VALUES, Value, list_contradictions

# -- the table of values --------------------------------------------------------------------------


def test_every_key_has_values_or_a_reason() -> None:
    keys = {key for key, *_ in reference.list_keys()}
    assert keys - VALUES.keys() - LEFT_OUT.keys() == set(), (
        "give them values in tests/sweep/values.py"
    )
    assert (VALUES.keys() | LEFT_OUT.keys()) - keys == set(), "these keys are gone"
    assert VALUES.keys() & LEFT_OUT.keys() == set()
    assert [key for key, values in VALUES.items() if len(values) < 2] == []


def choices(annotation: object) -> set[str]:
    """Return the words that an annotation names."""
    if isinstance(annotation, TableName):
        return set(annotation.list_choices())
    if isinstance(annotation, str):
        return {annotation}
    return {word for part in get_args(annotation) for word in choices(part)}


@pytest.mark.parametrize("key", VALUES)
def test_every_choice_of_a_key_is_tried_or_has_a_reason(key: str) -> None:
    wanted = choices(find_declared_type(Config, key.split(".")))
    wanted |= set({"model.name": registry.MODELS, "data.name": registry.DATASETS}.get(key, ()))
    tried = {value.words[0].partition("=")[2] for value in VALUES[key]}
    left_out = {choice for name, choice in CHOICES_LEFT_OUT if name == key}
    assert wanted - tried - left_out == set()
    assert left_out <= wanted - tried


def test_every_option_of_every_objective_is_set_by_a_value() -> None:
    texts = [str(value) for value in VALUES["method.objective"]]
    for name in registry.OBJECTIVES:
        own = " ".join(text for text in texts if f"name: {name}" in text)
        assert own, name
        for key, *_ in reference.list_objective_keys(name):
            assert f"{key.rpartition('.')[2]}: " in own, (name, key)
    systems = " ".join(map(str, VALUES["bench.systems"]))
    assert [name for name in registry.SYSTEMS if name not in systems] == []


@pytest.mark.parametrize("key", VALUES)
def test_the_first_value_is_that_of_base_yaml(key: str) -> None:
    given = configs.load(BASE)
    assert flatten(configs.load(BASE, VALUES[key][0].words)) == flatten(given)


# -- rows -----------------------------------------------------------------------------------------

FACTORS: dict[str, Sequence[Hashable]] = {"a": (0, 1, 2), "b": (0, 1), "c": (0, 1, 2), "d": (0, 1)}


def all_pairs() -> set[frozenset[Item]]:
    return {
        frozenset({(one, x), (other, y)})
        for one, other in combinations(FACTORS, 2)
        for x in FACTORS[one]
        for y in FACTORS[other]
    }


def cover(refuses: set[frozenset[Item]]) -> tuple[CoveringArray, list[set[Item]]]:
    """Make rows to the end; a row that holds a combination of `refuses` forbids it."""
    array, rows = CoveringArray(FACTORS, 0), []
    while (row := array.make_row()) is not None:
        wrong = [combination for combination in refuses if combination <= row.items()]
        if wrong:
            array.forbid(wrong[0])
            continue
        array.meet(row)
        rows.append(set(row.items()))
    return array, rows


def test_every_pair_stands_in_a_row() -> None:
    array, rows = cover(set())
    assert all(any(pair <= row for row in rows) for pair in all_pairs())
    assert (array.pairs, array.met, array.open) == (len(all_pairs()), len(all_pairs()), 0)
    assert len(rows) < 16  # of 36 rows


def test_what_is_refused_is_left_out_and_counted() -> None:
    pair, triple = {("a", 0), ("b", 0)}, {("a", 1), ("b", 1), ("c", 1)}
    array, rows = cover({frozenset(pair), frozenset(triple), frozenset({("d", 1)})})
    left = [each for each in all_pairs() if each != pair and ("d", 1) not in each]
    assert all(any(each <= row for row in rows) for each in left)
    assert array.refused == 1 + 8 and array.met == len(left)
    assert not any(row >= pair or row >= triple for row in rows)


def test_a_pair_that_only_threes_refuse_ends_the_search() -> None:
    wrong = {frozenset({("a", 0), ("b", 0), ("c", c)}) for c in FACTORS["c"]}
    array, _ = cover(wrong)
    assert (array.unmet, array.open) == (1, 0)


def test_the_same_seed_gives_the_same_rows() -> None:
    assert cover(set())[1] == cover(set())[1]


# -- the reducer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [{7}, {0, 59}, {3, 4, 5, 31}])
def test_a_row_is_reduced_to_what_is_needed(needed: set[int]) -> None:
    trials = []

    def shows(items: Sequence[int]) -> bool:
        trials.append(items)
        return needed <= set(items)

    assert set(reduce_items(range(60), shows)) == needed
    assert len(trials) < 60
    trials.clear()
    assert set(reduce_items(range(60), shows, likely=sorted(needed | {9}))) == needed
    assert len(trials) < 12


# -- what can be seen -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"test_accuracy": 1.01},
        {"test_accuracy_per_stage": [0.5, -0.1]},
        {"peak_memory_bytes": [0]},
        {"rows": [{"samples_per_s": 0.0}]},
        {"loss_per_stage": [float("nan")]},
        {"stages": [{"params": -1}]},
    ],
)
def test_a_number_that_cannot_be_true_is_seen(value: object) -> None:
    assert len(list(impossible_numbers(value))) == 1


def test_numbers_that_can_be_true_pass_and_json_has_no_nan() -> None:
    values = {"test_accuracy": 0.5, "wall_s": 0, "probe_accuracy_per_stage": [None, 1.0]}
    assert list(impossible_numbers(values)) == []
    with pytest.raises(ValueError):
        read_json('{"loss": NaN}')


def test_a_row_of_a_table_is_found_by_its_cells_alone() -> None:
    table = "│ 0 │ 12.0 % │ 5 │\n1  3.5  n"
    assert has_row(table, ["0", "12.0 %", "5"]) and has_row(table, ["1", "3.5"])
    assert not has_row(table, ["0", "2.0 %", "5"]) and not has_row(table, ["0", "3.5"])


def test_values_that_need_other_data_or_networks_contradict_each_other() -> None:
    masks = Value(("task.name=segmentation", "data.name=shapes", "data.augment=none"))
    folder = Value(("data.name=image_folder", "data.root=a"))
    own = Value(("data.name=shapes", "data.augment=crop"))
    others = {"task.name": [masks], "data.name": [folder, own], "data.augment": [Value(("x=1",))]}
    assert list_contradictions(others) == [(masks, folder)]


def test_every_value_goes_with_a_value_of_every_other_key() -> None:
    """Otherwise the pairs of it would fit into no row."""
    apart = {frozenset(pair) for pair in list_contradictions(VALUES)}
    assert len(apart) > 20
    for value in (value for values in VALUES.values() for value in values):
        for key, others in VALUES.items():
            if key != value.key:
                assert any(frozenset((value, other)) not in apart for other in others), (value, key)


def test_a_refusal_is_compared_without_paths_and_its_advice_is_read() -> None:
    sentence = "config: run.precision is tf32, which cpu lacks (/a/b.yaml); set run.precision=fp32"
    assert remove_paths(sentence) == remove_paths(sentence.replace("/a/b", "/c"))
    assert remove_numbers(sentence) == remove_numbers(sentence.replace("32", "64"))
    assert list(advised_words(sentence)) == [("run.precision=fp32",)]
    advice = "set task.name=auto and data.name=a, or model.num_classes=N; give data.root=DIR"
    assert list(advised_words(advice)) == [("task.name=auto", "data.name=a")]
    values = [Value(("run.precision=tf32",)), Value(("run.seed=1",))]
    assert names_a_key(sentence, values[:1]) and not names_a_key(sentence, values[1:])


def test_a_refusal_is_meant_if_a_line_names_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("run.capture=graphs", "pipeline.replicas + pipeline.processes=1")
    monkeypatch.setattr("tests.sweep.oracles.refusals.MEANT", lines)
    assert is_meant(["run.capture=graphs", "run.seed=1"])
    assert is_meant(["pipeline.replicas=2", "pipeline.processes=1"])
    assert not is_meant(["pipeline.replicas=2", "pipeline.processes=2"])
    assert not is_meant(["run.seed=1"])
