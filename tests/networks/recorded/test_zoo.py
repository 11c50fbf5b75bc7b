"""The table of networks: a row for each, appended once."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import ROOT


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return examples/zoo.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    spec = importlib.util.spec_from_file_location("zoo", ROOT / "examples" / "zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "zoo", module)
    spec.loader.exec_module(module)
    return module


def test_rows_are_appended_once(zoo: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "zoo.jsonl"
    arguments = ["torchvision", "--only", "shufflenet_v2_x0_5", "--out", str(out)]
    assert zoo.main(arguments) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    for key in ("names", "training", "evaluation", "copied", "orders", "gradients"):
        assert row[key] is True, key
    assert (row["blocks"], row["calls"], row["size"]) == (18, "same", 32)

    assert zoo.main(arguments) == 0
    assert len(out.read_text().splitlines()) == 1
    table = out.with_suffix(".md").read_text()
    assert "1 of 1 networks are cut, 1 of them equal in all columns." in table
    assert "torchvision.models.detection" in table


def test_a_network_that_cannot_be_cut_has_a_reason(zoo: ModuleType) -> None:
    def build(size: int | None) -> None:
        raise ValueError("no such size")

    network = zoo.ZooNetwork("torch", "none", build, zoo._images)
    row = zoo.try_network(network)
    assert row.refused == "ValueError: no such size" and row.blocks is None
    assert "- `none`: ValueError: no such size." in zoo.make_table(
        [vars(row) | {"library": "timm"}]
    )
