"""The emulated device itself: its kernels, graphs, delays and race checker."""

from __future__ import annotations

import pytest

from tests.emulated_gpu.machine import Machine, Settings


@pytest.mark.parametrize(
    "program",
    ["compute_as_the_cpu_does", "draw_in_graphs_as_eagerly", "refuse_what_capture_forbids"],
)
def test_the_device_computes_and_captures(machine: Machine, program: str) -> None:
    result = machine.call("run_program", program)
    assert result.status == 0, result.text


def test_delays_follow_from_seed_rank_stream_and_operation(machine: Machine) -> None:
    def delays(seed: int, rank: int) -> list[str]:
        settings = Settings(delay_us=1000, seed=seed, rank=rank)
        result = machine.call("run_program", "print_delays", 2, 20, settings=settings)
        assert result.status == 0, result.text
        return [line for line in result.text.splitlines() if line.startswith("delays")]

    first = delays(1, 0)
    assert len(set(first[0].split())) > 10 and first[0] != first[1]
    assert delays(1, 0) == first
    assert delays(2, 0) != first
    assert delays(1, 3) != first


@pytest.mark.parametrize(
    ("program", "report"),
    [
        ("write_and_read_on_two_streams", "aten::sum.dim_IntList on stream"),
        ("fill_a_pinned_buffer_too_early", "the host writes pinned memory"),
        ("read_a_pinned_buffer_too_early", "the host reads or writes pinned memory"),
    ],
)
def test_a_race_is_reported_once_and_the_program_goes_on(
    machine: Machine, program: str, report: str
) -> None:
    result = machine.call("run_program", program, settings=Settings(races=1))
    assert result.status == 0, result.text
    assert len(result.races) == 1 and report in result.races[0], result.text


@pytest.mark.parametrize(
    "program", ["write_and_read_in_order", "use_pinned_buffers_in_order", "query_an_event"]
)
def test_what_is_ordered_is_no_race(machine: Machine, program: str) -> None:
    result = machine.call("run_program", program, settings=Settings(races=1))
    assert result.status == 0, result.text
    assert result.races == [], result.text
