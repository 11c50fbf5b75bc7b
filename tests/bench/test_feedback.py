"""The benchmark's row without refreshed copies, and the example that prints what they cost."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from localpipe import config as configs
from localpipe.bench.request import list_systems, system_config
from localpipe.bench.systems.spec import SystemRequest
from localpipe.config.load import to_dict, update
from localpipe.errors import UserError
from localpipe.plan.whole_plan import make_plan
from tests import ROOT
from tests.harness import settings

COST = runpy.run_path(str(ROOT / "examples/feedback_cost.py"))
FED_BACK = {"objective": {"name": "dgl"}, "feedback": {"mode": "block", "every": 4}}


def test_frozen_copies_are_measured_only_where_there_are_copies(tmp_path: Path) -> None:
    config = settings(tmp_path, method=FED_BACK)
    assert "frozen-copies" in list_systems(config)
    without = settings(tmp_path, method={"objective": {"name": "dgl"}})
    assert "frozen-copies" not in list_systems(without)
    named = update(without, {"bench.systems": ["localpipe", "frozen-copies"]})
    with pytest.raises(UserError, match="set method.feedback.mode"):
        list_systems(named)


def test_frozen_copies_differ_in_nothing_but_the_refresh(tmp_path: Path) -> None:
    config = settings(tmp_path, method=FED_BACK, pipeline={"stages": 4, "processes": 2})
    frozen = system_config(SystemRequest("frozen-copies"), config)
    assert frozen.method.feedback.due(100_000) is None
    assert not frozen.method.feedback.is_sent(100_000)
    never = {"method.feedback": to_dict(frozen)["method"]["feedback"]}
    assert update(config, never) == frozen and frozen != config


def test_the_example_prints_bytes_of_edges_and_paired_ratios() -> None:
    words = ["data.train_subset=null", "method=man", "pipeline.processes=2", "run.threads=1"]
    plan = make_plan(configs.load(ROOT / "configs/demo.yaml", words))
    (line,) = COST["describe_bytes"](plan)
    assert line.startswith("stage 1 -> 2: ") and " 2 -> 1: " in line
    rows = [
        {
            "system": name,
            "micro_batches": None,
            "samples_per_s": 100.0,
            "samples_per_s_runs": runs,
            "efficiency": 0.97,
        }
        for name, runs in (("localpipe", [90.0, 100.0, 110.0]), ("frozen-copies", [100.0] * 3))
    ]
    assert "frozen copies: 1.000 (0.900 .. 1.100, 3 pairs)" in COST["describe_pair"](rows)
