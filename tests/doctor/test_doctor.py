"""What doctor finds on this machine, and that it minds what is wrong."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe.cli.command_line import main
from localpipe.doctor.check import Check
from localpipe.doctor.doctor import run_check
from localpipe.doctor.memory import check_locked_memory, check_shared_memory
from localpipe.doctor.ping import measure_trips, ping_nccl, run_two_ranks
from localpipe.doctor.versions import is_older
from localpipe.pipeline.channels.groups import connect_gloo
from localpipe.pipeline.channels.nccl_library import nccl_version
from localpipe.pipeline.workers.mesh import open_file_store


def report(
    capsys: pytest.CaptureFixture[str], *words: str, status: int = 0
) -> dict[str, dict[str, Any]]:
    assert main(["doctor", "--json", *words]) == status
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1
    assert report["status"] == max(
        (c["status"] for c in report["checks"]), key=("ok", "warning", "error").index
    )
    assert all(check["advice"] for check in report["checks"] if check["status"] != "ok")
    return {check["name"]: check for check in report["checks"]}


@pytest.fixture(autouse=True)
def no_interface_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_two_processes_exchange_messages_and_a_file_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, "--dir", str(tmp_path))
    ping, disk = found["gloo ping"]["figures"], found["disk"]["figures"]
    assert (
        found["gloo ping"]["status"] == "ok"
        and ping["latency_us"] > 0
        and ping["bandwidth_bytes_per_s"] > 1e6
    )
    assert disk["write_bytes_per_s"] > 0 and list(tmp_path.iterdir()) == []
    names = {
        "versions",
        "torchvision",
        "CUDA",
        "cores",
        "threads",
        "memory",
        "shared memory",
        "locked memory",
        "network",
    }
    assert names <= found.keys()


def test_quick_leaves_out_the_pings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--quick", "--dir", str(tmp_path))
    assert not any("ping" in name for name in found) and found["disk"]["status"] != "error"


def test_what_is_in_the_way_is_an_error_and_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    found = report(capsys, "--quick", "--dir", "/proc", status=1)
    assert {name for name, check in found.items() if check["status"] == "error"} == {
        "versions",
        "network",
        "disk",
    }
    assert (
        "no interface eth99" in found["network"]["advice"]
        and "torch>=2.11" in found["versions"]["advice"]
    )


def test_a_line_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    assert main(["doctor", "--quick", "--dir", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "warning threads" in shown
        and "unset OMP_PROC_BIND" in shown
        and "ready; the warnings" in shown
    )


def test_a_check_that_raises_is_its_own_finding() -> None:
    def fail() -> Check:
        raise ValueError("no such file\nand more")

    check = run_check("memory", fail)
    assert (check.name, check.status, check.found) == ("memory", "error", "no such file")


def _ping_over_gloo(rank: int, folder: str, results: Any) -> None:
    group = connect_gloo(open_file_store(Path(folder)), rank, 2, local=True)
    figures = measure_trips(group, rank, torch.device("cpu"))
    if rank == 0:
        results.send(figures)


def test_each_rank_of_a_ping_sends_to_the_other_one() -> None:
    """NCCL's ping over gloo, which refuses a message to oneself as NCCL hangs in one."""
    figures = run_two_ranks("fork", _ping_over_gloo, 60)
    assert figures is not None and figures.get("bandwidth_bytes_per_s", 0) > 0, figures


@pytest.mark.parametrize("devices", [0, 1])
def test_one_device_has_no_nccl_ping_and_is_ready(
    devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    check = ping_nccl()
    assert (check.status, check.found) == ("ok", "not made: it takes two devices")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_answer_a_nccl_ping() -> None:
    check = ping_nccl()
    assert check.status == "ok" and check.figures["latency_us"] > 0, check


def test_a_ping_without_an_answer_ends_in_time() -> None:
    assert run_two_ranks("fork", lambda *_: None, 0.2) is None
    result = run_two_ranks("fork", lambda *_: 1 / 0, 20)  # type: ignore[arg-type]
    assert result == {"error": "division by zero"}


def test_containers_are_told_what_nccl_wants() -> None:
    small = check_shared_memory(64 << 20, devices=2)
    assert small.status == "warning" and "--shm-size=1g" in small.advice
    assert (
        check_shared_memory(64 << 20, devices=0).status
        == check_shared_memory(1 << 30, devices=2).status
        == "ok"
    )
    assert check_locked_memory(8 << 20, devices=1).status == "warning"
    assert (
        check_locked_memory(resource.RLIM_INFINITY, devices=1).status
        == check_locked_memory(8 << 20, devices=0).status
        == "ok"
    )


def test_the_number_of_the_loaded_nccl_is_read() -> None:
    class Library:
        def __init__(self, number: int) -> None:
            self.number = number

        def ncclGetVersion(self, pointer: Any) -> None:  # noqa: N802 - NCCL's own name
            pointer._obj.value = self.number

    assert nccl_version(Library(23007)) == "2.30.7"
    assert nccl_version(Library(2708)) == "2.7.8"
    assert (
        is_older("2.9.9", "2.28.9")
        and not is_older("2.30.1", "2.28.9")
        and not is_older("2.28.1", "2.28.9")
    )


def test_doctor_takes_directories_only_and_no_other_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["--dir", "nowhere"], ["run.seed=1"], ["--jsn"]):
        assert main(["doctor", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
