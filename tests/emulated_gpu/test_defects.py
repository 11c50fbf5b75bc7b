"""Planted defects: the race checker reports each, in a program whose results may well be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulated_gpu.defects import defect_names
from tests.emulated_gpu.machine import Machine, Settings

_EDGE = ("pipeline.processes=2", "pipeline.depth=2")
_ONE = ("pipeline.processes=1",)
# More than the loader reads before the first is copied.
_MANY_BATCHES = (*_ONE, "optim.epochs=6")
_REPLICAS = ("pipeline.stages=2", "pipeline.replicas=2", "pipeline.processes=2")
_CAPTURED = ("pipeline.processes=1", "run.capture=graphs")

# Where each defect is, and words of the report.
_CASES = {
    "slot_received_too_early": (_EDGE, "NCCL receive"),
    "slot_sent_too_early": (_EDGE, "NCCL send"),
    "event_before_transfer": (_EDGE, "NCCL send"),
    "header_copied_too_early": (_EDGE, "NCCL receive"),
    "header_read_too_early": (_EDGE, "the host reads or writes pinned memory"),
    "one_slot_for_two_messages": (_EDGE, "NCCL receive"),
    "one_header_for_all_slots": (_EDGE, "the host writes pinned memory"),
    "message_written_on_another_stream": (_EDGE, "copy"),
    "slot_called_free_by_another_stream": (_EDGE, "NCCL receive"),
    "one_pinned_buffer_for_two_batches": (_MANY_BATCHES, "the host writes pinned memory"),
    "batch_copied_on_another_stream": (_ONE, "copy"),
    "loss_read_too_early": (_ONE, "the host reads or writes pinned memory"),
    "gradients_used_too_early": (_REPLICAS, "NCCL all-reduce"),
    "graph_replayed_on_another_stream": (_CAPTURED, "aten::"),
    "warm_up_not_awaited": (_CAPTURED, "copy"),
}


def test_every_planted_defect_has_a_case() -> None:
    assert defect_names().keys() == _CASES.keys()
    assert len(_CASES) >= 10


@pytest.mark.parametrize("defect", _CASES)
def test_a_planted_defect_is_reported(machine: Machine, tmp_path: Path, defect: str) -> None:
    words, report = _CASES[defect]
    # The first race ends the process.
    result = machine.train(tmp_path / "run", *words, settings=Settings(races=2, defect=defect))
    assert result.status == 1
    assert any(report in race for race in result.races), result.text
