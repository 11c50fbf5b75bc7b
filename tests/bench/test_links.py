"""The benchmark over links: parsing, how links are made, predictions, rows, and a tiny run."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from localpipe import config as configs
from localpipe.bench.links import pacing, run, shaping
from localpipe.bench.links.pacing import limit_connections
from localpipe.bench.links.predictions import (
    list_edge_bytes,
    list_link_bytes,
    predict_data_parallel,
    predict_localpipe,
    predict_pipeline,
)
from localpipe.bench.links.rate import LinkRequest, format_rate, parse_link
from localpipe.bench.links.rows import build_link_rows, build_link_table
from localpipe.bench.links.run import find_counts, run_link_bench
from localpipe.bench.links.shaping import (
    list_open_commands,
    list_setup_commands,
    list_shape_commands,
    open_link,
)
from localpipe.bench.request import CheckedRequest
from localpipe.bench.rows import Measured
from localpipe.bench.systems.spec import SystemRequest
from localpipe.cli import main
from localpipe.config.load import update
from localpipe.environment import link_environment
from localpipe.errors import UserError
from localpipe.pipeline.launch.rank import RankNetwork
from localpipe.pipeline.workers.mesh import Mesh, join_mesh
from tests.harness import settings

WHY_NOT = shaping.find_missing()
needs_namespaces = pytest.mark.skipif(WHY_NOT is not None, reason=f"no namespaces: {WHY_NOT}")


# --- What is asked for


@pytest.mark.parametrize(
    ("text", "bits_per_s", "ratio", "delay_s"),
    [
        ("100mbit", 1e8, None, 0.0),
        ("1gbit,5ms", 1e9, None, 0.005),
        ("512kbit,20us", 512e3, None, 20e-6),
        ("800bit, 1s", 800.0, None, 1.0),
        (" 1GBit ,0ms", 1e9, None, 0.0),
        ("r=0.9", None, 0.9, 0.0),
        ("r=2,1ms", None, 2.0, 0.001),
    ],
)
def test_a_link_is_a_rate_or_a_ratio_and_a_delay(
    text: str, bits_per_s: float | None, ratio: float | None, delay_s: float
) -> None:
    link = parse_link(text)
    assert (link.bits_per_s, link.ratio) == (bits_per_s, ratio)
    assert link.delay_s == pytest.approx(delay_s)


@pytest.mark.parametrize(
    "text",
    ["", "fast", "100", "100mb", "0mbit", "-1mbit", "1..5mbit", "nanmbit", "r=0", "r=x", "r=inf",
     "100mbit,", "100mbit,5", "100mbit,5min", "r=0.9,0.9", "2.5 gbit"],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_link(text)
    assert str(error.value) == (
        f"bench: --link {text!r} is no link; expected RATE or RATE,DELAY, as 100mbit, or "
        "1gbit,5ms, or r=0.9"
    )


def test_rates_are_for_people() -> None:
    assert format_rate(1e8) == "100 Mbit/s" and format_rate(2.5e9) == "2.5 Gbit/s"
    assert format_rate(123456) == "123.5 kbit/s" and format_rate(80) == "80 bit/s"


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["bench", *words]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    return lines[-1]


CHAIN = "configs/bench/chain_2.yaml"


def test_what_a_link_cannot_measure_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    link = ["--link", "1gbit"]
    assert "--memory has no --link" in refusal(capfd, CHAIN, *link, "--memory")
    assert "draws no --picture" in refusal(capfd, CHAIN, *link, "--picture", "x.png")
    assert "no system 'e2e'" in refusal(capfd, CHAIN, *link, "--systems", "e2e")
    one = "needs an edge between two processes, and pipeline.processes is 1"
    assert one in refusal(capfd, CHAIN, "pipeline.processes=1", *link)
    replicas = ["pipeline.replicas=2", "pipeline.processes=4"]
    assert "one replica of every stage" in refusal(capfd, CHAIN, *replicas, *link)
    peers = ["--systems", "gpipe"]
    assert "no system of bench.systems can run here" in refusal(capfd, CHAIN, *link, *peers)


def test_micro_batches_are_2_to_32_or_as_given(tmp_path: Path) -> None:
    config = settings(tmp_path, pipeline={"stages": 2, "processes": 2})
    assert run._list_counts(config, None) == [2, 4, 8, 16]
    assert run._list_counts(config, [2, 8]) == [2, 8]
    with pytest.raises(UserError, match="3 does not divide data.batch_size 16"):
        run._list_counts(config, [3])
    # Those of the command line or a file count, even where they are the default.
    assert find_counts(configs.parse({"bench": {"windows": 1}}, "test"), None) is None
    assert find_counts(configs.parse({"bench": {"micro_batches": [4]}}, "test"), None) == (4,)
    assert find_counts(configs.parse({"bench": {"micro_batches": [4]}}, "test"), [2]) == [2]


# --- How links are made


def test_namespaces_are_joined_by_a_pair_of_interfaces_for_every_two() -> None:
    text = [" ".join(command) for command in list_setup_commands([11, 22])]
    assert text == [
        "nsenter --net=/proc/11/ns/net ip link set lo up",
        "nsenter --net=/proc/11/ns/net ip addr add 10.77.0.1/32 dev lo label lo:link",
        "nsenter --net=/proc/22/ns/net ip link set lo up",
        "nsenter --net=/proc/22/ns/net ip addr add 10.77.0.2/32 dev lo label lo:link",
        "ip link add to1 netns 11 mtu 1500 type veth peer name to0 netns 22 mtu 1500",
        "nsenter --net=/proc/11/ns/net ip link set to1 up",
        "nsenter --net=/proc/11/ns/net ip route add 10.77.0.2/32 dev to1 src 10.77.0.1",
        "nsenter --net=/proc/22/ns/net ip link set to0 up",
        "nsenter --net=/proc/22/ns/net ip route add 10.77.0.1/32 dev to0 src 10.77.0.2",
    ]
    four = [" ".join(command) for command in list_setup_commands([1, 2, 3, 4])]
    assert len([line for line in four if "ip link add" in line]) == 6


def test_both_directions_are_shaped_by_tbf_and_delayed_by_netem() -> None:
    tbf = "root tbf rate 100000000bit burst 50000b limit 1300000b"
    assert [" ".join(command) for command in list_shape_commands([11, 22], 1e8, 0.0)] == [
        f"nsenter --net=/proc/11/ns/net tc qdisc replace dev to1 {tbf}",
        f"nsenter --net=/proc/22/ns/net tc qdisc replace dev to0 {tbf}",
    ]
    (first, _) = list_shape_commands([11, 22], 1e9, 0.005)
    assert " ".join(first).endswith("root netem delay 5000us rate 1000000000bit limit 100000")
    assert [command[-5:] for command in list_open_commands([11, 22])] == [
        ["qdisc", "del", "dev", "to1", "root"],
        ["qdisc", "del", "dev", "to0", "root"],
    ]


def test_without_namespaces_the_senders_pace_and_a_delay_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shaping, "find_missing", lambda: "only root may make network namespaces")
    with open_link(LinkRequest("1mbit", 1e6, None), 2) as link:
        assert link.networks == (RankNetwork((), "lo"),) * 2
        assert link.how == "paced by the senders, since only root may make network namespaces"
    with (
        pytest.raises(UserError) as error,
        open_link(LinkRequest("1mbit,5ms", 1e6, None, 0.005), 2),
    ):
        pass
    assert str(error.value) == (
        "bench: --link 1mbit,5ms: no delay can be made here (only root may make network "
        "namespaces); expected root, iproute2 and the kernel's module sch_netem; leave the delay "
        "out"
    )


def enter(link: Any, rank: int, command: str) -> str:
    words = [*link.networks[rank].prefix, *command.split()]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@needs_namespaces
def test_shaped_links_carry_the_rate_and_vanish_with_the_context() -> None:
    with pytest.raises(KeyError), open_link(LinkRequest("80mbit", 8e7, None), 3) as link:
        holders = [network.prefix[1].split("/")[2] for network in link.networks]
        assert "tbf" not in enter(link, 0, "tc qdisc show")
        link.shape(None, 8e7, 0.0)  # type: ignore[arg-type]
        for rank in range(3):
            shown = enter(link, rank, "tc qdisc show")
            assert shown.count("tbf") == 2 and shown.count("rate 80Mbit") == 2
        assert "10.77.0.3 dev to2 scope link src 10.77.0.1" in enter(link, 0, "ip route")
        link.open(None)  # type: ignore[arg-type]
        assert "tbf" not in enter(link, 2, "tc qdisc show")
        raise KeyError
    assert not any(Path("/proc", holder).exists() for holder in holders)


def test_pacing_limits_connected_tcp_sockets_alone() -> None:
    def read_rate(connection: socket.socket) -> int:
        number = pacing._MAX_PACING_RATE
        data = connection.getsockopt(socket.SOL_SOCKET, number, 8)
        return int.from_bytes(data, "little")

    with socket.create_server(("127.0.0.1", 0)) as server:
        before = limit_connections(None)
        with socket.create_connection(server.getsockname()) as client:
            other, _ = server.accept()
            with other:
                assert limit_connections(125_000.4) == before + 2
                assert read_rate(client) == read_rate(other) == 125_000
                assert read_rate(server) != 125_000
                assert limit_connections(None) == before + 2
                assert read_rate(client) > 2**31
                client.sendall(b"still open")
                assert other.recv(10) == b"still open"


def test_what_a_worker_on_a_link_sends_never_goes_through_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert Mesh(0, 1, None, True).shares_memory  # type: ignore[arg-type]
    for key, value in link_environment("lo:link").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("LOCALPIPE_PRIVATE_DIR", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    mesh = join_mesh()
    assert mesh.local and not mesh.shares_memory and mesh.rank == 1
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo:link"


# --- Predictions


def test_localpipe_loses_nothing_below_r_1_and_the_ratio_above() -> None:
    predict = partial(predict_localpipe, [1.0, 1.0], depth=2, bytes_per_s=1.0, delay_s=0.0)
    for r in (0.0, 0.9):
        assert predict([r]) == pytest.approx(1.0)  # type: ignore[list-item]
    assert predict([2]) == pytest.approx(0.5)
    # An edge waits for the receiver's word: a round trip for every message.
    late = predict_localpipe([1.0, 1.0], [1], 2, 1.0, 0.5)
    assert late == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("system", "r", "expected"),
    [
        ("1f1b", 0.25, 0.805), ("1f1b", 1.0, 0.508), ("1f1b", 1.5, 0.405),
        ("gpipe", 0.5, 0.843), ("gpipe", 1.0, 0.500),
        ("zb", 0.5, 0.740), ("zb", 1.0, 0.542),
    ],
)  # fmt: skip
def test_peers_lose_what_the_simulator_says(system: str, r: float, expected: float) -> None:
    """With two stages and 32 micro-batches. r: of a message, over a stage's computing."""
    request = SystemRequest(system, 32)
    # A link's bytes of a step take r of the step's seconds.
    relative = predict_pipeline(request, [32.0, 32.0], [round(32_000 * r)], 1000.0, 0.0)
    assert relative == pytest.approx(expected, abs=0.01)


def test_a_slower_open_pipeline_loses_less_to_the_same_link() -> None:
    request = SystemRequest("1f1b", 32)
    arguments = (request, [32.0, 32.0], [32_000], 1000.0, 0.0)
    assert predict_pipeline(*arguments) < 0.55 < 0.65 < predict_pipeline(*arguments, open_s=66.0)


def test_ddp_hides_its_first_buckets_in_the_backward_pass() -> None:
    # One bucket of 0.5 MiB: it is all-reduced after the backward pass, and nothing hides it.
    mib = 2**20
    assert predict_data_parallel(1.0, mib // 2, 2, mib, 0.0) == pytest.approx(1 / 1.5)
    # Two buckets: the first one is reduced during the second half of the backward pass.
    two = predict_data_parallel(3.0, 2 * mib, 2, mib, 0.0)
    assert two == pytest.approx(3 / 4)


def test_links_carry_what_the_cut_sends(tmp_path: Path) -> None:
    """A link of two workers with two stages each is crossed by three boundaries."""
    config = settings(tmp_path, pipeline={"stages": 2, "processes": 2})
    assert list_edge_bytes(update(config, {"pipeline.wire_dtype": "int4"})) < list_edge_bytes(
        config
    )
    one = list_link_bytes(config, SystemRequest("1f1b", 4, ((0, 0), (1, 5))))
    assert one == [8 * 8 * 8 * 4 * 16]
    stages = ((0, 0), (1, 1), (2, 3), (4, 5))
    three = list_link_bytes(config, SystemRequest("zb", 4, stages))
    singles = [list_link_bytes(config, SystemRequest("1f1b", 4, ((0, last), (last + 1, 5))))[0]
               for last in (0, 1, 3)]  # fmt: skip
    assert three == [sum(singles)]


# --- Rows


def window(*wall_s: float, busy: float = 0.0) -> list[dict[str, Any]]:
    return [{"wall_s": seconds, "busy": busy} for seconds in wall_s]


def measured(
    config: Any, request: SystemRequest, unshaped: float, shaped: Sequence[float], note: Any = None
) -> Measured:
    windows = {
        "step": [window(unshaped, unshaped / 2, busy=unshaped) for _ in shaped],
        "shaped": [window(seconds / 3, seconds) for seconds in shaped],
    }
    if request.spec.is_subject:
        windows["bound"] = [window(unshaped / 2, unshaped) for _ in shaped]
    return Measured(request, config, 10, [], {} if note else windows, note)


def test_rows_compare_a_system_with_itself_and_localpipe_with_its_fp32(tmp_path: Path) -> None:
    config = settings(tmp_path, pipeline={"stages": 2, "processes": 2})
    coded = update(config, {"pipeline.wire_dtype": "int8"})
    message_bytes = list_edge_bytes(config)[0]
    group = [
        measured(config, SystemRequest("localpipe"), 10.0, [20.0, 20.0, 25.0]),
        measured(coded, SystemRequest("localpipe"), 12.5, [12.5, 10.0, 12.5]),
        measured(config, SystemRequest("gpipe", 4, ((0, 1), (2, 5))), 10.0, [40.0, 40.0, 40.0]),
        measured(config, SystemRequest("ddp"), 10.0, [80.0, 80.0, 80.0]),
        measured(config, SystemRequest("1f1b", 4), 1.0, [1.0], "it has crashed"),
    ]
    # A message takes twice the seconds of a stage: 2 s a step.
    rows = build_link_rows(group, 8 * message_bytes / 2.0, 0.0, "localpipe bench c.yaml")
    fp32, int8, gpipe, ddp, failed = rows
    assert fp32["open_samples_per_s"] == 16.0 and fp32["samples_per_s"] == 8.0
    assert fp32["relative_runs"] == [0.5, 0.5, 0.4] and fp32["relative"] == 0.5
    assert fp32["r"] == pytest.approx(2.0)
    assert fp32["predicted_relative"] == pytest.approx(0.5)
    assert fp32["predicted_samples_per_s"] == pytest.approx(8.0)
    # Open steps of 4 s: the stage's 1 s of computing is not what limits them.
    slow = measured(config, SystemRequest("localpipe"), 10.0, [40.0])
    slow.windows["step"] = [window(40.0, 20.0)]
    (row,) = build_link_rows([slow], 8 * message_bytes / 2.0, 0.0, "")
    assert row["r"] == pytest.approx(2.0) and row["predicted_relative"] == pytest.approx(1.0)
    assert int8["wire_dtype"] == "int8" and int8["relative"] == 1.0
    assert int8["of_fp32_open"] == pytest.approx(0.8) and fp32["of_fp32_open"] == 0.5
    assert 0.4 < int8["r"] < 0.6 and int8["predicted_relative"] == pytest.approx(1.0)
    assert gpipe["relative"] == 0.25 and gpipe["cut"] == [1] and gpipe["of_fp32_open"] is None
    assert ddp["relative"] == 0.125 and ddp["r"] > 0 and 0 < ddp["predicted_relative"] < 1
    assert failed["note"] == "it has crashed" and failed["relative"] is None
    assert fp32["command"] == "localpipe bench c.yaml --systems localpipe"
    assert gpipe["command"].endswith("--systems gpipe --micro-batches 4")
    table = build_link_table(rows, config, "100 Mbit/s each way")
    assert table.row_count == 5
    assert list(table.columns[3].cells)[4] == ""
    assert list(table.columns[0].cells)[1] == "localpipe int8"
    assert list(table.columns[4].cells)[0] == "0.500 (0.400 .. 0.500)"


# --- The order of the windows


class FakeProcesses:
    """The processes of a system that note what is asked of them, and run nothing."""

    def __init__(self, case: run.LinkCase, done: list[str]) -> None:
        self.request, self.config = case.checked.request, case.config
        self.name, self.done = case.label, done

    def build(self, window_s: float, min_steps: int) -> None:
        assert min_steps == 10
        self.done.append(f"build {self.name}")

    def run_window(self, kind: str, name: str | None, steps: int | None = None) -> None:
        if name is None:
            assert kind == "step" and steps == 2 + 4  # the depth, and four more
        self.done.append(f"{name or 'warm'} {self.name}")

    def end(self) -> None:
        self.done.append(f"end {self.name}")

    def collect(self) -> Measured:
        wall_s = 1.0 if self.request.micro_batches == 8 else 2.0
        windows = {"shaped": [window(wall_s)]}
        return Measured(self.request, self.config, 10, [], windows, None)


class FakeLink:
    """A link that notes when it is shaped and opened."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def shape(self, processes: FakeProcesses, bits_per_s: float, delay_s: float) -> None:
        self.done.append(f"shape {bits_per_s:g}")

    def open(self, processes: FakeProcesses) -> None:
        self.done.append("open")


def fake_bench(monkeypatch: pytest.MonkeyPatch) -> tuple[run._LinkBench, list[str]]:
    done: list[str] = []

    def start(cases: Sequence[run.LinkCase], link: Any, resources: Any) -> list[FakeProcesses]:
        return [FakeProcesses(case, done) for case in cases]

    monkeypatch.setattr(run, "_start", start)
    link: Any = FakeLink(done)
    return run._LinkBench(link, 1e6, 0.0), done


def make_case(config: Any, request: SystemRequest, note: str | None = None) -> run.LinkCase:
    return run.LinkCase(CheckedRequest(request, note), config)


def test_rows_of_localpipe_take_turns_there_and_back_and_a_peer_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, done = fake_bench(monkeypatch)
    keys = {"bench.windows": 2}
    config = update(settings(tmp_path, pipeline={"stages": 2, "processes": 2}), keys)
    coded = update(config, {"pipeline.wire_dtype": "int8"})
    cases = [
        make_case(config, SystemRequest("localpipe")),
        make_case(coded, SystemRequest("localpipe")),
        make_case(config, SystemRequest("zb", 2), "it cannot run"),
        make_case(config, SystemRequest("ddp")),
    ]
    measured = bench.measure(cases)
    assert [one.note for one in measured] == [None, None, "it cannot run", None]
    assert [one.config.pipeline.wire_dtype for one in measured[:2]] == ["fp32", "int8"]

    def own(name: str) -> list[str]:
        return [f"warm {name}", f"step {name}", f"bound {name}", "shape 1e+06", f"warm {name}",
                f"shaped {name}", "open"]  # fmt: skip

    one, two = "localpipe fp32", "localpipe int8"
    ddp = [words for words in own("ddp") if "bound" not in words]
    assert done == [
        f"build {one}", f"build {two}", *own(one), *own(two), *own(two), *own(one),
        f"end {one}", f"end {two}", "build ddp", *ddp, *ddp, "end ddp",
    ]  # fmt: skip


def test_a_pipeline_has_the_micro_batches_that_are_fastest_on_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, done = fake_bench(monkeypatch)
    config = settings(tmp_path, pipeline={"stages": 2, "processes": 2})
    counts = [make_case(config, SystemRequest("gpipe", count)) for count in (2, 8, 16)]
    failed = make_case(config, SystemRequest("gpipe", 4), "it cannot run")
    assert bench.choose_case([failed, *counts]).checked.request.micro_batches == 8
    assert done.count("shape 1e+06") == 3 and "step gpipe, 2 micro-batches" not in done
    done.clear()
    # One that is left is not tried, and where none is left the first one says why.
    assert bench.choose_case([failed, counts[0]]) is counts[0]
    assert bench.choose_case([failed]) is failed and done == []


# --- A tiny run


@pytest.mark.parametrize("is_paced", [pytest.param(False, marks=needs_namespaces), True])
def test_a_tiny_chain_is_measured_open_and_on_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, is_paced: bool
) -> None:
    """int8 alone. What a worker sends on the shaped link goes through the kernel's discipline."""
    monkeypatch.setattr(run, "WIRE_DTYPES", ("int8",))
    if is_paced:
        monkeypatch.setattr(shaping, "find_missing", lambda: "this is a test")
    ratios: list[float] = []
    if not is_paced:
        shape = shaping.KernelLink.shape

        def shape_and_note(self: Any, processes: Any, *arguments: float) -> None:
            shape(self, processes, *arguments)
            if processes is not None:
                ratios.append(arguments[0])

        monkeypatch.setattr(shaping.KernelLink, "shape", shape_and_note)
    args = {"time_ms": 2, "message_bytes": 65536, "blocks": 2}
    words = {
        "model": {"name": "chain", "args": args},
        "method": "greedy",
        "pipeline": {"stages": 2, "processes": 2},
        "data": {"name": "synthetic", "image_size": 8, "batch_size": 8, "augment": "none"},
        "run": {"threads": 1},
        "bench": {"windows": 2, "window_s": 0.05},
    }
    given = configs.parse(words, "test")
    target = tmp_path / "link.json"
    assert run_link_bench(given, "200mbit", target, "localpipe bench c.yaml", None) == 0
    result = json.loads(target.read_text())
    (row,) = result["rows"]
    assert row["system"] == "localpipe" and row["wire_dtype"] == "int8" and row["note"] is None
    assert row["steps_per_window"] >= 10
    assert len(row["relative_runs"]) == 2 and row["relative"] > 0
    assert result["link"]["bits_per_s"] == 2e8
    assert math.isfinite(row["predicted_samples_per_s"])
    printed = capsys.readouterr().out
    if is_paced:
        assert result["link"]["how"] == "paced by the senders, since this is a test"
        assert "paced by the senders" in printed
    else:
        assert result["link"]["how"] == "shaped by the kernel (tc)" and ratios == [2e8, 2e8]
        assert "localpipe int8" in printed and "shaped by the kernel" in printed
