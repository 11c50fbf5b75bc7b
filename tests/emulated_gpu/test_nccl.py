"""The emulated NCCL between two processes: values, waits, mismatches and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.emulated_gpu.machine import FAULT_STATUS, Machine, Result


def run_ranks(
    machine: Machine, folder: Path, program: str, *arguments: Any, last: int = 1
) -> list[Result]:
    """Run a program on two ranks; return how each has ended.

    last: the rank that ends by itself where the other one waits for it without end.
    """
    ranks = [
        machine.begin("run_program", program, str(folder), rank, *arguments) for rank in (0, 1)
    ]
    results: list[Result] = []
    for rank in (last, 1 - last):
        process, output = ranks[rank]
        if results and results[0].status == FAULT_STATUS:
            process.kill()
        results.append(machine.finish(process, output))
    return results if last == 0 else results[::-1]


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("use_collectives", "the collectives are right"),
        ("end_together", "the group has ended"),
    ],
)
def test_both_ranks_do_it(machine: Machine, tmp_path: Path, program: str, text: str) -> None:
    for result in run_ranks(machine, tmp_path, program):
        assert result.status == 0 and text in result.text, result.text


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("post_two_receives", "the stream has waited"),
        ("abort_a_receive", "the receive has ended"),
    ],
)
def test_a_posted_receive_occupies_its_stream(
    machine: Machine, tmp_path: Path, program: str, text: str
) -> None:
    sender, receiver = run_ranks(machine, tmp_path, program)
    assert sender.status == receiver.status == 0, sender.text + receiver.text
    assert text in receiver.text


def test_a_message_of_another_size_ends_the_process_with_both_sizes(
    machine: Machine, tmp_path: Path
) -> None:
    _, receiver = run_ranks(machine, tmp_path, "send_and_receive", 4, 8)
    assert receiver.status == FAULT_STATUS
    expected = "rank 0 has a send or receive of 16 bytes, expected a send or receive of 32 bytes"
    assert expected in receiver.text


def test_a_message_of_the_same_size_arrives(machine: Machine, tmp_path: Path) -> None:
    for result in run_ranks(machine, tmp_path, "send_and_receive", 4, 4):
        assert result.status == 0 and "it has arrived" in result.text, result.text


def test_an_unknown_type_ends_the_process(machine: Machine, tmp_path: Path) -> None:
    for result in run_ranks(machine, tmp_path, "send_and_receive", 4, 4, "float8_e4m3fn"):
        assert result.status in (FAULT_STATUS, -9)
        if result.status == FAULT_STATUS:
            assert "unknown type 10" in result.text, result.text


def test_different_collectives_end_the_process_with_both(machine: Machine, tmp_path: Path) -> None:
    ends = run_ranks(machine, tmp_path, "use_different_collectives")
    text = "".join(end.text for end in ends)
    # torch makes broadcasts of a gather into a list.
    assert "has an all-reduce of 16 bytes" in text and "expected a broadcast of 16 bytes" in text


def test_the_ping_of_the_doctor_comes_back(machine: Machine) -> None:
    result = machine.call("run_program", "ping_over_nccl")
    assert result.status == 0 and "the ping has come back" in result.text, result.text
