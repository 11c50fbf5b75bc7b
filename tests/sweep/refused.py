"""The combinations that earlier sweeps saw refused, in a file.

To find the smallest refused part of a row takes some ten commands, to look at it again takes one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.sweep.array import Item
from tests.sweep.values import Value

COMMAND = "command"  # the factor beside the keys
REFUSED_FILE = Path(__file__).with_name("refused.json")
Combination = Sequence[Item]  # values of different keys, and perhaps a command


def read_refusals(path: Path, values: Mapping[str, Sequence[Value]]) -> list[Combination]:
    """Return the combinations of a file, without those of values that are in no table any more.

    values: {key: values}. An empty list without the file.
    """
    if not path.exists():
        return []
    known = {str(value): value for key in values for value in values[key]}
    combinations: list[Combination] = []
    for words in json.loads(path.read_text(encoding="utf-8")):
        items = [_read_item(word, known) for word in words]
        if None not in items:
            combinations.append([item for item in items if item is not None])
    return combinations


def _read_item(word: str, known: Mapping[str, Value]) -> Item | None:
    if word.startswith("["):
        return COMMAND, word.strip("[]")
    value = known.get(word)
    return None if value is None else (value.key, value)


def write_refusals(path: Path, combinations: Iterable[Combination]) -> None:
    """Write combinations of two items or more in a fixed order, each once.

    A single value that is refused is found without the file.
    """
    rows = {tuple(map(_show_item, items)) for items in combinations if len(items) > 1}
    lines = ",\n".join(json.dumps(row) for row in sorted(rows))
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _show_item(item: Item) -> str:
    key, value = item
    return f"[{value}]" if key == COMMAND else str(value)
