"""The study: a recorded row is not trained again, and the table has what was measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

STUDY = runpy.run_path(str(ROOT / "examples/study.py"))
against, main, read, table = (STUDY[name] for name in ("against", "main", "read", "table"))

TINY = [
    "data.name=digits", "data.train_subset=256", "data.mean=auto", "data.std=auto",
    "data.augment=none", "optim.max_steps=2", "model.name=resnet8", "pipeline.stages=2",
]  # fmt: skip


def gave(row: str, seed: int, accuracy: float) -> dict[str, Any]:
    return {
        "row": row, "seed": seed, "test_accuracy": accuracy,
        "probe_accuracy_per_stage": [0.5, accuracy],
        "train_macs_per_sample": 2e8, "inference_macs_per_sample": 7e7,
        "saved_activation_bytes_per_sample": [1024, 2048], "cpu_s": 400,
    }  # fmt: skip


def test_a_row_is_written_down_once_and_goes_into_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--rows",
        "dgl",
        "--dir",
        str(tmp_path / "runs"),
        "--table",
        str(tmp_path / "study.md"),
        *TINY,
    ]
    assert main(words) == 0
    assert "dgl, seed 0: done" in capsys.readouterr().out
    (found,) = read(tmp_path / "study.jsonl")
    assert (
        found["row"] == "dgl"
        and len(found["weights_sha256"]) == 64
        and len(found["probe_accuracy_per_stage"]) == 2
    )
    assert (
        f"| dgl | {100 * found['test_accuracy']:.1f} (1) |" in (tmp_path / "study.md").read_text()
    )
    assert main(words) == 0
    assert capsys.readouterr().out == "" and len(read(tmp_path / "study.jsonl")) == 1


def test_a_row_that_fails_is_told_and_not_written_down(tmp_path: Path) -> None:
    words = [
        "--rows",
        "dgl",
        "--dir",
        str(tmp_path / "runs"),
        "--table",
        str(tmp_path / "study.md"),
        "data.root=none.npz",
    ]
    assert main(words) == 1
    assert (
        not (tmp_path / "study.jsonl").exists()
        and "Not run yet: end to end; " in (tmp_path / "study.md").read_text()
    )


def test_a_small_difference_of_one_seed_is_not_resolved() -> None:
    lines = table(
        [gave("dgl", 0, 0.62), gave("greedy", 0, 0.60), gave("auglocal d=3", 0, 0.70)]
    ).splitlines()
    assert "| greedy | 60.0 (1) | -2.0, not resolved |" in "\n".join(lines)
    assert "| auglocal d=3 | 70.0 (1) | +8.0 |" in "\n".join(lines)


def test_several_seeds_have_a_mean_and_a_deviation() -> None:
    found = [gave("dgl", seed, accuracy) for seed, accuracy in enumerate((0.61, 0.62, 0.63))]
    assert "| dgl | 62.0 +- 1.0 (3) |  |" in table(found)


def test_a_difference_is_taken_seed_by_seed_and_resolved_where_its_interval_leaves_out_0() -> None:
    dgl = {0: 60.0, 1: 62.0, 2: 67.0}
    assert against({0: 61.0, 1: 63.1, 2: 68.2}, dgl) == "+1.1 +- 0.1"
    assert against({0: 62.0, 1: 62.0, 2: 69.0}, dgl) == "+1.3 +- 1.2, not resolved"
    assert against({1: 65.0}, dgl) == "+3.0" and against({2: 69.9}, dgl) == "+2.9, not resolved"
    assert against({7: 65.0}, dgl) == ""


def test_the_committed_table_is_that_of_the_committed_rows() -> None:
    docs = ROOT / "docs"
    found = read(docs / "study.jsonl")
    assert found and (docs / "study.md").read_text().startswith(table(found))
    assert all(json.dumps(row) for row in found)


# --- The study of the codecs

CODECS = runpy.run_path(str(ROOT / "examples/codec_study.py"))


def coded(codec: str, seed: int, accuracy: float, exported: float) -> dict[str, Any]:
    return {
        "method": "dgl", "codec": codec, "seed": seed, "accuracy": accuracy,
        "exported_accuracy": exported,
    }  # fmt: skip


def test_codecs_are_compared_in_pairs_of_a_seed_with_an_interval() -> None:
    results = [
        coded("fp32", 0, 0.60, 0.60), coded("fp32", 1, 0.64, 0.64), coded("fp32", 2, 0.62, 0.62),
        coded("int8", 0, 0.59, 0.61), coded("int8", 1, 0.64, 0.63), coded("int8", 2, 0.61, 0.62),
        coded("int4", 1, 0.50, 0.40),
    ]  # fmt: skip
    lines = CODECS["table"](results)
    assert lines[2] == "| dgl | fp32 | 62.00 (3) | +0.00 +- 0.00 | 62.00 |"
    # Differences -1, 0, -1: deviation 0.577, t of two degrees 4.303, over the root of three.
    assert lines[3] == "| dgl | int8 | 61.33 (3) | -0.67 +- 1.43 | 62.00 |"
    assert lines[4] == "| dgl | int4 | 50.00 (1) | -14.00 | 40.00 |"


def test_a_codec_is_trained_once_and_evaluated_without_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = tmp_path / "runs", tmp_path / "codec_study.jsonl"
    namespace = CODECS["main"].__globals__
    monkeypatch.setitem(namespace, "METHODS", {"dgl": "method=dgl"})
    monkeypatch.setitem(namespace, "CODECS", ("int4",))
    words = ["--seeds", "0", "--dir", str(folder), "--results", str(results), *TINY]
    assert CODECS["main"](words) == 0
    (found,) = CODECS["read"](results)
    assert found["codec"] == "int4" and 0 <= found["exported_accuracy"] <= 1
    config = (folder / "dgl-int4-0" / "config.yaml").read_text()
    assert "wire_dtype: int4" in config
    capsys.readouterr()
    assert CODECS["main"](words) == 0
    assert "seed 0:" not in capsys.readouterr().out and len(CODECS["read"](results)) == 1
