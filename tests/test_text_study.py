"""The text study: its rivals count what they say, and its table has what was measured."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import ROOT

STUDY: dict[str, Any] = runpy.run_path(str(ROOT / "examples/text_study.py"))


def cut(text: bytes, length: int = 4) -> np.ndarray[Any, Any]:
    """Return the windows of a text with one byte more each, (N, length + 1)."""
    count = (len(text) - 1) // length
    rows = [list(text[i * length : (i + 1) * length + 1]) for i in range(count)]
    return np.array(rows, np.int64)


def count_by_hand(train: np.ndarray[Any, Any], test: np.ndarray[Any, Any]) -> float:
    """Return the bits per byte of the smoothed model, byte by byte."""
    followers: dict[bytes, list[int]] = {}
    for window in train.tolist():
        for place in range(1, len(window)):
            for order in range(min(place, 2) + 1):
                context = bytes(window[place - order : place])
                followers.setdefault(context, []).append(window[place])
    bits = []
    for window in test.tolist():
        for place in range(1, len(window)):
            probability = 1 / 256
            for order in range(min(place, 2) + 1):
                seen = followers.get(bytes(window[place - order : place]), [])
                if seen:
                    different = len(set(seen))
                    total = len(seen) + different
                    own = seen.count(window[place]) / total
                    probability = own + different / total * probability
            bits.append(-np.log2(probability))
    return float(np.mean(bits))


def test_the_model_of_two_bytes_is_that_of_witten_and_bell() -> None:
    generator = np.random.default_rng(0)
    train, test = (
        cut(bytes(generator.integers(97, 101, size=size).tolist())) for size in (300, 80)
    )
    found = STUDY["count_order_2"](train, test)
    assert found == pytest.approx(count_by_hand(train, test))
    assert found < 8


def test_xz_counts_what_the_test_bytes_add() -> None:
    text = bytes(np.random.default_rng(0).integers(0, 256, 4001).tolist())
    known, other = cut(text), cut(text[::-1])
    assert STUDY["count_xz"](known, known) < 0.5 < 7 < STUDY["count_xz"](known, other)


def test_a_row_is_written_down_once_and_goes_into_the_table(tmp_path: Path) -> None:
    table = tmp_path / "text_study.md"
    words = ["--rows", "xz -9", "dgl, 2 stages", "--dir", str(tmp_path), "--table", str(table)]
    words += ["data.train_subset=64", "data.length=32", "optim.max_steps=2", "run.threads=1"]
    words += ["model.args={depth: 4, width: 8, heads: 2}"]
    assert STUDY["main"](words) == 0
    results = STUDY["read"](table.with_suffix(".jsonl"))
    assert [result["row"] for result in results] == ["xz -9", "dgl, 2 stages"]
    assert len(results[1]["per_stage"]) == 2 and results[1]["steps"] == 2
    assert STUDY["main"](words) == 0
    assert STUDY["read"](table.with_suffix(".jsonl")) == results
    assert f"| dgl, 2 stages | {results[1]['bits_per_byte']:.3f} | 1 |" in table.read_text()


def test_seeds_are_a_mean_with_a_deviation() -> None:
    rows = [
        {"row": "end to end", "seed": seed, "bits_per_byte": bits, "per_stage": [bits],
         "test_accuracy": 0.5}
        for seed, bits in enumerate((2.0, 2.2))
    ]  # fmt: skip
    assert "| end to end | 2.100 +- 0.141 | 2 | 50.0 +- 0.0 % | 2.100 |" in STUDY["table"](rows)
