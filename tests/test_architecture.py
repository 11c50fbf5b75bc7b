"""The house as docs/house.md draws it: every module has its floor, and imports go down, or along it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests import ROOT


def floors() -> dict[str, int]:
    """Return the floor of every module and package by its name."""
    drawn = (ROOT / "docs" / "house.md").read_text(encoding="utf-8").split("```")[1]
    found: dict[str, int] = {}
    floor = -1
    for line in drawn.strip().splitlines():
        if begins := re.match(r"floor (\d+)", line):
            floor, line = int(begins[1]), line[begins.end() :]
        words = re.split(r"\s{2,}", line.strip())
        found.update(
            {word.rstrip("/"): floor for word in words if re.fullmatch(r"[a-z_]+/?", word)}
        )
    return found


def imports() -> Iterator[tuple[str, str]]:
    """Yield (module, imported module) of the package, a package counting as one module."""
    for path in (ROOT / "localpipe").rglob("*.py"):
        own = path.relative_to(ROOT / "localpipe").with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").split(".")[0] == "localpipe"
            ):
                inside = (node.module or "").split(".")[1:2]
                yield from ((own, name) for name in inside or [alias.name for alias in node.names])


def test_every_module_has_a_floor_and_imports_go_down() -> None:
    floor = floors()
    pairs = [(own, other) for own, other in imports() if own not in ("__init__", "__main__", other)]
    assert len(pairs) > 300
    assert {name for pair in pairs for name in pair} - floor.keys() == set()
    assert [(own, other) for own, other in pairs if floor[own] < floor[other]] == []
