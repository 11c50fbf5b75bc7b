"""Edges back over shared memory and over gloo: a send never waits, and steps come in order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from localpipe.config.resolved import ResolvedFeedback
from localpipe.errors import RunError
from localpipe.pipeline.workers.feedback import (
    BackReader,
    BackWriter,
    back_depth,
    snapshot_schema,
)
from tests.pipeline.channels.test_channel import Thread, carried, shake

__all__ = ["carried"]  # the fixture that chooses what carries an edge


def values(step: int) -> dict[str, Tensor]:
    """Return parameters of a step: a matrix, a vector and a number."""
    torch.manual_seed(step)
    return {"weight": torch.randn(4, 3), "bias": torch.randn(4), "scale": torch.randn(())}


def joined(folder: Path, depth: int) -> tuple[BackWriter, BackReader]:
    keys = {"schema": snapshot_schema(values(0)), "depth": depth}
    sender, receiver = shake(folder, keys, keys)
    assert sender.error is None and receiver.error is None
    return BackWriter(sender.result), BackReader(receiver.result)


@pytest.mark.parametrize(("lag", "every"), [(1, 1), (3, 1), (5, 2), (4, 2), (2, 4), (16, 16)])
def test_a_send_back_waits_for_no_reader(tmp_path: Path, lag: int, every: int) -> None:
    """The reader is as late as it can be: it begins a step when the writer ends the same one."""
    feedback = ResolvedFeedback(mode="block", lag=lag, every=every)
    writer, reader = joined(tmp_path, back_depth(feedback))
    taken = 0
    for step in range(1, 4 * (lag + every)):
        due = feedback.due(step)
        if due is not None:
            found = reader.read(due)
            assert found.keys() == values(due).keys()
            assert all(torch.equal(found[name], value) for name, value in values(due).items())
            taken += 1
        if feedback.is_sent(step):
            sent = values(step)
            written = Thread(lambda step=step, sent=sent: writer.write(step, sent))  # type: ignore[misc]
            assert written.ended().error is None
    # Nobody closes the edge: what is left in it is dropped.
    assert taken > 2


def test_parameters_of_another_step_are_refused(tmp_path: Path) -> None:
    writer, reader = joined(tmp_path, 1)
    writer.write(4, values(4))
    with pytest.raises(RunError, match="parameters of step 4 came back, expected those of step 3"):
        reader.read(3)
