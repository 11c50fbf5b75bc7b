"""The architecture of docs/architecture.md: the order of the packages, and its promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "localpipe"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

# Words that only this project once used. No variable, function or class has one in its name.
PRIVATE_WORDS = frozenset(
    (
        "told", "asked", "mine", "theirs", "seat", "seats", "pulse", "course", "ledger", "patience",
        "silence", "verdict", "party", "tools", "pace", "whoever", "whatever", "held", "wanted",
        "judged", "begun",
    )
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Return the file of every module by its name in the package, as `pipeline.stages.stage`."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        files[".".join(parts)] = path
    return files


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def levels() -> dict[str, int]:
    """Return the level of every package and loose module, counted from the bottom of the order."""
    (line,) = re.findall(r"^`(__init__ < .*)`$", PAGE, re.MULTILINE)
    order = {}
    for level, names in enumerate(line.split(" < ")):
        for name in names.split(", "):
            order[name] = level
    return order


def package_of(module: str, order: dict[str, int]) -> str:
    """Return the package that a module belongs to, as the order names it."""
    first_two = ".".join(module.split(".")[:2])
    return first_two if first_two in order else module.split(".")[0]


def imported_modules(module: str) -> Iterator[str]:
    """Yield what a module of the package imports of the package, inside functions too."""
    for node in ast.walk(TREES[module]):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module == "localpipe":
            for alias in node.names:
                yield alias.name if alias.name in MODULES else "__init__"
        elif node.module.startswith("localpipe."):
            yield node.module.removeprefix("localpipe.")


def attributes(tree: ast.AST) -> Iterator[str]:
    """Yield every dotted expression, as `os.environ.get`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def modules_with(pattern: str) -> set[str]:
    """Return the modules in which a dotted expression matches."""
    expression = re.compile(pattern)
    return {
        module
        for module, tree in TREES.items()
        if any(expression.fullmatch(text) for text in attributes(tree))
    }


def test_every_module_has_a_floor_and_imports_go_down() -> None:
    order = levels()
    pairs = set()
    for module in MODULES:
        if module in ("__init__", "__main__"):
            continue
        for other in imported_modules(module):
            pairs.add((package_of(module, order), package_of(other, order)))
    assert {name for pair in pairs for name in pair} - order.keys() == set()
    assert len(pairs) > 60
    upward = [(a, b) for a, b in pairs if a != b and order[a] <= order[b]]
    assert sorted(upward) == []


def test_the_tree_of_the_page_is_the_tree_on_disk() -> None:
    tree = PAGE.split("```")[1]
    drawn = set(re.findall(r"^ +([a-z_]+(?:/|\.py)) ", tree, re.MULTILINE))
    loose = {path.name for path in PACKAGE.glob("*.py")} - {"__main__.py"}
    folders = {path.parent.name + "/" for path in PACKAGE.rglob("__init__.py")}
    folders -= {"localpipe/", "systems/", "report/"}
    assert drawn == loose | folders


def test_no_folder_is_crowded() -> None:
    files = Counter(path.parent for path in MODULES.values())
    assert max(files.values()) <= 16
    assert files[PACKAGE] <= 9


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        (r"os\.(environ|getenv)", {"environment"}),
        (r"dist\.(FileStore|TCPStore|rendezvous)", {"pipeline.workers.mesh"}),
        (r"dist\.(ProcessGroup\w+|init_process_group)", {"pipeline.channels.groups"}),
        (r"[\w.]*\b_?group\.(send|recv)", {"pipeline.channels.gloo", "pipeline.channels.nccl"}),
        (r"[\w.]*\.(allreduce|allgather|broadcast)", {"pipeline.stages.replicas"}),
        (r"pickle\.loads?", set()),
    ],
)
def test_each_danger_has_one_place(pattern: str, places: set[str]) -> None:
    assert modules_with(pattern) == places


def test_nothing_but_tensors_is_unpickled() -> None:
    calls = 0
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls += 1
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True"
    assert calls > 0


def test_shared_memory_is_named_in_one_place() -> None:
    named = {name for name, path in MODULES.items() if '"/dev/shm' in path.read_text()}
    assert {name for name in named if not name.startswith("doctor.")} == {
        "pipeline.channels.shared_memory"
    }


def test_the_configuration_imports_no_torch() -> None:
    code = "import sys, localpipe.config.resolve; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]


def test_public_classes_have_names_of_their_own() -> None:
    names = Counter(
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def bound_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names of a module's variables, arguments, functions, classes and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_private_words_stay_out() -> None:
    uses = []
    for module, tree in TREES.items():
        for name in bound_names(tree):
            words = re.findall(r"[A-Z]?[a-z]+", name)
            if name in PRIVATE_WORDS or any(word.lower() in PRIVATE_WORDS for word in words):
                uses.append(f"{module}: {name}")
    assert uses == []


def test_the_word_behind_stays_out() -> None:
    pattern = re.compile(r"\bbehind\b")
    assert [name for name, path in MODULES.items() if pattern.search(path.read_text())] == []
