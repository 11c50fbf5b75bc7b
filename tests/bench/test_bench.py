"""The benchmark: every system trains, peers are plain back-propagation, rows have the measures."""

from __future__ import annotations

import itertools
import re
import threading
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from localpipe import config as configs
from localpipe import data as datasets
from localpipe.bench import peer_cuts
from localpipe.bench.launch import describe_machine
from localpipe.bench.measure import measure_group, take_turns
from localpipe.bench.memory import MemoryCase, memory_cases, memory_row, run_memory
from localpipe.bench.memory_step import build_training_step
from localpipe.bench.peer_cuts import best_cut
from localpipe.bench.picture import draw_picture
from localpipe.bench.processes import window_lags
from localpipe.bench.remarks import describe_leads
from localpipe.bench.request import (
    CheckedRequest,
    list_systems,
    make_cut_explicit,
    resolve_request,
    system_config,
)
from localpipe.bench.rows import Measured, build_rows, select_traces
from localpipe.bench.systems.batches import Batches
from localpipe.bench.systems.local import _count_edges_ahead
from localpipe.bench.systems.plain import choose_segments, count_plain_saved_bytes
from localpipe.bench.systems.spec import Cut, SystemRequest
from localpipe.bench.systems.step_timer import StepTimer
from localpipe.bench.tables import (
    build_cost_table,
    build_speed_table,
    format_cut,
    format_shares,
    show_results,
)
from localpipe.bench.turns import CommandReceiver, CommandSender
from localpipe.bench.worker import run_window, trace_steps
from localpipe.config import registry
from localpipe.config.keys import Config
from localpipe.config.load import parse_resolved, to_dict, to_yaml, update
from localpipe.config.resolved import Resolved
from localpipe.errors import RunError, UserError
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.boundary import build_entry
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.pipeline.workers.mesh import Mesh, open_file_store
from localpipe.pipeline.workers.phase import COMPUTE_PHASES
from localpipe.plan.resolve_here import resolve_here
from tests import ROOT
from tests.forked_ranks import CONTEXT
from tests.harness import settings

STEPS = 3
TWO: Cut = ((0, 1), (2, 4))
FOUR: Cut = ((0, 0), (1, 2), (3, 3), (4, 4))
PEERS = [
    SystemRequest("gpipe", 4, TWO),
    SystemRequest("1f1b", 4, TWO),
    SystemRequest("interleaved", 4, FOUR),
    SystemRequest("zb", 4, FOUR),
    SystemRequest("ddp"),
]
# What a timeline of one more step holds; end to end and ddp have none.
PHASES: dict[str, set[str]] = {
    **dict.fromkeys(("localpipe", "sequential"), set(COMPUTE_PHASES)),
    **dict.fromkeys(("gpipe", "1f1b", "interleaved", "zb"), {"forward", "update"}),
}


def settled(folder: Path, network: str, **keys: Any) -> Resolved:
    data = {"augment": "none", "samples": 64}
    return settings(
        folder, model={"name": network}, pipeline={"stages": 2, "processes": 2}, data=data, **keys
    )


def trained(mesh: Mesh, config: Resolved, asked: SystemRequest) -> dict[str, Tensor]:
    """Return the weights that this worker has after a few steps of a system."""
    prepare_process(config)
    system = asked.spec.build(mesh, config, asked)
    for _ in range(STEPS):
        system.step()
    spent = system.timer.read()
    assert spent["busy"] is None or spent["busy"] > 0
    weights = {name: value.clone() for name, value in system.weights().items()}
    computed = {span.phase for span in trace_steps(system, 1)} & set(COMPUTE_PHASES)
    assert computed == PHASES.get(asked.system, set())
    mesh.barrier("trained")
    system.close()
    return weights


def _work(
    rank: int, folder: Path, values: list[dict[str, Any]], asked: list[SystemRequest]
) -> None:
    store = open_file_store(folder)
    for index, (each, request) in enumerate(itertools.product(values, asked)):
        mesh = Mesh(rank, 2, dist.PrefixStore(str(index), store), local=True)
        torch.save(
            trained(mesh, parse_resolved(each, "test"), request), folder / f"{index}_{rank}.pt"
        )


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Weights by network and system after a few steps in two processes."""
    folder = tmp_path_factory.mktemp("bench")
    asked = [*PEERS, SystemRequest("localpipe")]
    networks = ("tests.sample_networks:flat", "tests.sample_networks:small")
    values = [to_dict(settled(folder, network)) for network in networks]
    workers = [
        CONTEXT.Process(target=_work, args=(rank, folder, values, asked), daemon=True)
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    found = {}
    for index, (network, request) in enumerate(itertools.product(networks, asked)):
        parts = [torch.load(folder / f"{index}_{rank}.pt") for rank in range(2)]
        found[network.partition(":")[2], request.system] = {**parts[0], **parts[1]}
    return found


def alone(folder: Path, config: Resolved, system: str) -> dict[str, Tensor]:
    one = system_config(SystemRequest(system), config)
    return trained(Mesh(0, 1, open_file_store(folder), local=True), one, SystemRequest(system))


def by_hand(config: Resolved) -> dict[str, Tensor]:
    """Return the weights of plain back-propagation, written out."""
    blueprint = build_blueprint(config)
    parts = nn.Sequential(*blueprint.build(range(len(blueprint.parts)), config.run.seed))
    optim = config.optim
    optimizer = torch.optim.SGD(
        parts.parameters(), momentum=optim.momentum, nesterov=True, weight_decay=optim.weight_decay
    )
    batches = Batches(config)
    for _ in range(STEPS):
        image, target, rate = batches.next()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(parts(build_entry(config)(image)), target).backward()
        optimizer.step()
    return parts.state_dict()


@pytest.mark.parametrize("system", [asked.system for asked in PEERS])
def test_a_peer_of_two_processes_has_the_weights_of_plain_back_propagation(
    system: str, by_two: dict[tuple[str, str], dict[str, Tensor]], tmp_path: Path
) -> None:
    reference = by_hand(settled(tmp_path, "tests.sample_networks:flat"))
    found = by_two["flat", system]
    assert found.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("system", ["e2e", "checkpoint"])
def test_a_peer_of_one_process_has_the_weights_of_plain_back_propagation(
    system: str, tmp_path: Path
) -> None:
    config = settled(tmp_path, "tests.sample_networks:flat")
    found = alone(tmp_path, config, system)
    for name, value in by_hand(config).items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_the_sequential_row_trains_what_the_pipeline_trains(
    by_two: dict[tuple[str, str], dict[str, Tensor]], tmp_path: Path
) -> None:
    config = settled(tmp_path, "tests.sample_networks:small")
    found = alone(tmp_path, update(config, {"run.threads": 1}), "sequential")
    pipeline = by_two["small", "localpipe"]
    assert found.keys() == pipeline.keys() and any(name.startswith("aux.") for name in found)
    for name, value in found.items():
        torch.testing.assert_close(pipeline[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("system", [asked.system for asked in PEERS])
def test_a_peer_trains_blocks_that_normalise_drop_out_and_write_in_place(
    system: str, by_two: dict[tuple[str, str], dict[str, Tensor]], tmp_path: Path
) -> None:
    blueprint = build_blueprint(settled(tmp_path, "tests.sample_networks:small"))
    before = nn.Sequential(*blueprint.build(range(len(blueprint.parts)), 0)).state_dict()
    after = by_two["small", system]
    assert after.keys() == before.keys()
    assert all(value.isfinite().all() for value in after.values())
    assert all(
        not torch.equal(after[name], before[name]) for name in before if name.endswith("weight")
    )


# -- cuts ------------------------------------------------------------------------------------------


def test_the_best_cut_has_the_least_busy_busiest_worker() -> None:
    costs = [5.0, 1.0, 1.0, 1.0, 4.0, 2.0]
    assert best_cut(costs, 2, 1) == ((0, 2), (3, 5))
    halves = best_cut(costs, 2, 2)
    assert sum(sum(costs[a : b + 1]) for a, b in halves[::2]) == 7 and len(halves) == 4


def test_many_blocks_are_cut_by_the_smallest_largest_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [float(1 + (7 * i) % 5) for i in range(9)]

    def largest(cut: Cut) -> float:
        return max(sum(costs[a : b + 1]) for a, b in cut)

    tried = best_cut(costs, 4, 1)
    monkeypatch.setattr(peer_cuts, "_MAX_TRIED_CUTS", 0)
    found = best_cut(costs, 4, 1)
    assert [i for a, b in found for i in range(a, b + 1)] == list(range(9)) and len(found) == 4
    assert largest(found) == largest(tried)


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="3 blocks make no 4 stages"):
        best_cut([1.0, 1.0, 1.0], 2, 2)


def test_a_chain_has_nothing_for_pipelines_of_micro_batches_and_for_memory(tmp_path: Path) -> None:
    given = configs.load(ROOT / "configs/bench/chain_2.yaml", ["bench.systems=[gpipe,e2e]"])
    config, _ = resolve_request(given, datasets.load(given.data, 0))
    with pytest.raises(UserError, match="gpipe cannot train a chain"):
        list_systems(config)
    assert list_systems(update(config, {"bench.systems": ["e2e", "localpipe"]})) == [
        "localpipe",
        "e2e",
    ]
    with pytest.raises(UserError, match="--memory cannot count a chain"):
        run_memory(given, None)


@pytest.mark.parametrize(
    ("replicas", "processes", "edges"), [(1, 3, [2, 1, 0]), (2, 6, [2, 1, 0, 2, 1, 0]), (1, 1, [0])]
)
def test_replicas_of_a_stage_warm_up_for_the_same_number_of_steps(
    replicas: int, processes: int, edges: list[int], tmp_path: Path
) -> None:
    pipeline = {"stages": 3, "processes": processes, "replicas": replicas}
    config = settings(tmp_path, pipeline=pipeline)
    store = dist.HashStore()
    meshes = [Mesh(rank, processes, store, local=True) for rank in range(processes)]
    assert [_count_edges_ahead(mesh, config) for mesh in meshes] == edges


# -- turns -----------------------------------------------------------------------------------------


def test_only_who_is_asked_answers(tmp_path: Path) -> None:
    sender = CommandSender(tmp_path, 2)

    def serve(rank: int) -> None:
        receiver = CommandReceiver(tmp_path, rank)
        for command in receiver:
            receiver.respond(rank=rank, twice=2 * command["number"])
            if command["number"] == 3:
                return

    threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for number in (1, 2, 3):
        answers = sender.send({"number": number}, 30, lambda: None)
        assert answers == [{"rank": 0, "twice": 2 * number}, {"rank": 1, "twice": 2 * number}]
    for thread in threads:
        thread.join(10)
    sender.close()


def test_an_answer_that_never_comes_ends_the_waiting(tmp_path: Path) -> None:
    def dead() -> None:
        raise RunError("rank 0 was killed by SIGKILL")

    sender = CommandSender(tmp_path, 1)
    with pytest.raises(RunError, match="SIGKILL"):
        sender.send({}, 30, dead)
    with pytest.raises(RunError, match="no answer within 0.1 s"):
        sender.send({}, 0.1, lambda: None)
    sender.close()


def test_a_window_begins_in_the_phase_in_which_the_last_one_ended() -> None:
    assert window_lags([{"ended": 7.5}, {"ended": 7.25}, {"ended": 8.0}]) == [0.25, 0.0, 0.75]


def test_a_worker_waits_its_lag_before_a_window_and_not_within_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[object] = []

    def read_clock() -> float:
        done.append("clock")
        return 0.0

    monkeypatch.setattr("localpipe.bench.worker.time.sleep", done.append)
    monkeypatch.setattr("localpipe.bench.worker.time.perf_counter", read_clock)
    run_window(StepTimer(), lambda: done.append("step"), 2, 0.25)
    assert done == [0.25, "clock", "step", "step", "clock"]


def test_windows_go_there_and_back_and_a_promise_is_kept_half_way_and_behind() -> None:
    done: list[str] = []
    group: Any = []
    for name in ("ddp", "e2e"):
        run_windows = partial(done.append, name)
        group.append(types.SimpleNamespace(request=SystemRequest(name), run_windows=run_windows))
    predictions: Any = types.SimpleNamespace(measure_again=lambda look: done.append("again"))
    take_turns(group, 4, predictions)
    assert " ".join(done) == "ddp e2e e2e ddp again ddp e2e e2e ddp again"


# -- rows ------------------------------------------------------------------------------------------


def measured(
    folder: Path, asked: SystemRequest, walls: list[list[float]], note: str | None = None
) -> Measured:
    """Return what two workers would have answered; walls by window and rank."""
    config = system_config(asked, settled(folder, "tests.sample_networks:flat"))
    window = [
        [
            {
                "wall_s": wall,
                "busy": 0.8 * wall,
                "receive": 0.1 * wall,
                "send": None,
                "cpu": wall,
                "peak_memory_bytes": 7,
            }
            for wall in ranks
        ]
        for ranks in walls
    ]
    kinds = {"step": window, "bound": window} if asked.system == "localpipe" else {"step": window}
    return Measured(asked, config, 5, [32, 64], {} if note else kinds, note)


def test_rows_go_by_the_slowest_worker_and_pair_windows(tmp_path: Path) -> None:
    group = [
        measured(tmp_path, SystemRequest("localpipe"), [[1.0, 2.0], [1.0, 4.0], [2.0, 1.0]]),
        measured(tmp_path, SystemRequest("gpipe", 4, TWO), [[4.0, 1.0], [4.0, 4.0], [1.0, 4.0]]),
        measured(tmp_path, SystemRequest("zb", 4), [], "5 blocks make no 6 stages"),
    ]
    ours, gpipe, zb = build_rows(group, "localpipe bench x.yaml")
    samples = 5 * 16
    assert (
        ours["samples_per_s_runs"] == [samples / 2, samples / 4, samples / 2]
        and ours["samples_per_s"] == samples / 2
    )
    assert ours["ratio_to_best_peer_runs"] == [2.0, 1.0, 2.0] and ours["ratio_to_best_peer"] == 2.0
    assert ours["efficiency_runs"] == [1.0, 1.0, 1.0] and ours["bound_from"] == "paired"
    assert ours["balance"] == pytest.approx(5.5 / 7) and ours["busy"] == pytest.approx([0.8, 0.8])
    assert gpipe["send_wait"] is None and gpipe["saved_activation_bytes_per_sample"] == [32, 64]
    assert gpipe["wire_bytes_per_step"] == 2 * 16 * 16 * 4  # 16 floats a sample, there and back
    assert gpipe["cut"] == [1] and gpipe["command"].endswith("--systems gpipe --micro-batches 4")
    assert zb["samples_per_s"] is None and zb["note"] == "5 blocks make no 6 stages"


def test_what_a_profile_promised_stands_beside_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = [
        measured(tmp_path, SystemRequest("localpipe"), [[1.0, 2.0]]),
        measured(tmp_path, SystemRequest("gpipe", 4, TWO), [[4.0, 1.0]]),
    ]
    ours, peer = build_rows(group, "localpipe bench x.yaml", predicted=[44.0, 20.0, 50.0])
    assert ours["samples_per_s"] == 40 and ours["predicted_over_measured"] == pytest.approx(1.1)
    assert peer["predicted_samples_per_s"] is None
    config = settled(tmp_path, "tests.sample_networks:flat")
    show_results(
        [[ours, peer]],
        config,
        {"cores": 2, "device": "cpu", "torch": "2"},
        "localpipe bench x.yaml",
    )
    assert (
        "predicts 44.0 samples/s of localpipe: +10.0 % against the 40.0 measured "
        "(profiles: 44.0 20.0 50.0)" in capsys.readouterr().out
    )


def test_many_processes_are_told_as_a_range() -> None:
    assert (
        format_shares([0.91, 0.9]) == "91 90"
        and format_shares([0.91, 0.9, 0.8, 0.7, 0.6]) == "60 .. 91"
    )
    assert format_cut(range(15)) == "each of 16 blocks" and format_cut((1, 5, 9)) == "1 5 9"


def test_the_tables_fit_a_terminal_of_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("localpipe", "checkpoint", "interleaved")
    counts = {"interleaved": (4, FOUR)}
    group = [
        measured(tmp_path, SystemRequest(name, *counts.get(name, ())), [[0.01, 0.02]] * 2)
        for name in names
    ]
    found = build_rows(group, "localpipe bench x.yaml")
    for row in found:
        row.update(
            samples_per_s=12345.6, samples_per_s_runs=[12345.6, 12399.9], peak_memory_bytes=[2**34]
        )
    with Console(width=80).capture() as shown:
        for one in (build_speed_table(found, "resnet32"), build_cost_table(found)):
            Console(width=80).print(one)
    output = capsys.readouterr().out + shown.get()
    assert "12345.6 .. 12399.9" in output and "16,384" in output and "\u2026" not in output
    assert max(map(len, output.splitlines())) <= 80


def test_a_measured_cut_is_in_the_command_of_a_row_alone(tmp_path: Path) -> None:
    given = update(settled(tmp_path, "tests.sample_networks:flat"), {"pipeline.cuts": "time"})
    config = update(given, {"pipeline.cuts": [3]})
    command = make_cut_explicit("localpipe bench x.yaml", given, config)
    assert command == "localpipe bench x.yaml pipeline.cuts=3"
    (tmp_path / "x.yaml").write_text(to_yaml(given))
    assert configs.load(tmp_path / "x.yaml", command.split()[3:]).pipeline.cuts == (3,)
    assert make_cut_explicit("localpipe bench x.yaml", config, config) == "localpipe bench x.yaml"


def test_only_localpipe_needs_its_own_cut_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localpipe.plan.predict.measure_here", lambda *_: pytest.fail("measured"))
    given = update(settled(tmp_path, "tests.sample_networks:flat"), {"pipeline.cuts": "time"})
    dataset = datasets.load(given.data, 0)
    config, predictions = resolve_request(
        update(given, {"bench.systems": ["gpipe", "e2e"]}), dataset
    )
    assert predictions is None and config.pipeline.cuts == "equal"


def test_the_picture_has_timelines_of_localpipe_and_of_the_fastest_pipeline(tmp_path: Path) -> None:
    def with_spans(
        asked: SystemRequest, walls: list[list[float]], phases: tuple[str, ...]
    ) -> Measured:
        spans = [
            [
                [rank, phase, step, step + 0.1 * i, step + 0.1 * (i + 1)]
                for step in (1, 2, 3)
                for i, phase in phases_of
            ]
            for rank, phases_of in enumerate([list(enumerate(phases))] * 2)
        ]
        return replace(measured(tmp_path, asked, walls), spans=spans)

    group = [
        with_spans(
            SystemRequest("localpipe"),
            [[1.0, 1.0]],
            ("receive", "forward", "send", "loss", "update"),
        ),
        with_spans(SystemRequest("gpipe", 4, TWO), [[4.0, 4.0]], ("forward", "update")),
        with_spans(SystemRequest("1f1b", 4, TWO), [[2.0, 2.0]], ("forward", "update")),
        with_spans(SystemRequest("e2e"), [[2.0, 2.0]], ()),
    ]
    found = build_rows(group, "localpipe bench x.yaml")
    traces = select_traces(group, found)
    assert list(traces) == ["localpipe", "1f1b"]
    config, machine = (
        settled(tmp_path, "tests.sample_networks:flat"),
        {"cores": 2, "device": "cpu", "torch": "2"},
    )
    draw_picture([found], traces, config, machine, tmp_path / "b.svg")
    drawn = (tmp_path / "b.svg").read_text()
    bars = [re.findall(rf'id="bar-{stage}-\d+-update-(\d)"', drawn) for stage in (0, 1)]
    assert bars == [["1", "2", "3"] * 2] * 2  # of both


def test_the_cost_of_jitter_is_paired_with_the_steady_windows(tmp_path: Path) -> None:
    jittering = measured(tmp_path, SystemRequest("localpipe"), [[2.0, 2.0], [4.0, 4.0], [5.0, 5.0]])
    steady = measured(
        tmp_path, SystemRequest("localpipe"), [[1.0, 1.0], [3.0, 3.0], [4.0, 4.0]]
    ).windows["step"]
    jittering.windows["steady"] = steady
    (row,) = build_rows([jittering], "localpipe bench x.yaml")
    assert row["jitter_cost"] == pytest.approx(1 - 3 / 4)


def test_the_verdict_names_the_peer_that_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = [
        measured(tmp_path, SystemRequest("localpipe"), [[2.0, 2.0]] * 2),
        measured(tmp_path, SystemRequest("ddp"), [[1.0, 1.0]] * 2),
        measured(tmp_path, SystemRequest("zb", 4), [], "it hangs"),
    ]
    found = build_rows(group, "localpipe bench x.yaml")
    assert "ddp is faster than localpipe: 2.00x" in describe_leads(found)
    config = settled(tmp_path, "tests.sample_networks:flat")
    show_results(
        [found], config, {"cores": 2, "device": "cpu", "torch": "2"}, "localpipe bench x.yaml"
    )
    output = capsys.readouterr().out
    assert "ddp is faster than localpipe" in output and "note: zb: it hangs" in output


def test_one_process_gets_the_threads_of_all(tmp_path: Path) -> None:
    config = update(settled(tmp_path, "tests.sample_networks:flat"), {"run.threads": 3})
    found = {name: system_config(SystemRequest(name), config) for name in registry.SYSTEMS}
    threads = {name: (each.pipeline.processes, each.run.threads) for name, each in found.items()}
    assert threads["e2e"] == threads["sequential"] == threads["checkpoint"] == (1, 6)
    assert threads["e2e-1"] == (1, 3) and threads["ddp"] == threads["zb"] == threads[
        "localpipe"
    ] == (2, 3)


# -- memory ----------------------------------------------------------------------------------------


def memory_case(stages: int) -> tuple[MemoryCase, Config]:
    given = configs.load(ROOT / "configs/bench/memory_resnet110.yaml", ["data.samples=32"])
    given = update(given, {"data.batch_size": 16})
    dataset = datasets.load(given.data, 0)
    blueprint = build_blueprint(resolve_here(update(given, {"pipeline.stages": 1}), dataset))
    wanted = ("infopro", "balanced", stages) if stages > 1 else ("e2e", "", 1)
    for case in memory_cases(given, dataset, blueprint, {}):
        if (case.method, case.cuts, case.stages) == wanted:
            return case, given
    raise AssertionError(wanted)


def test_memory_prints_the_published_bytes_of_resnet110(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localpipe.bench.memory.choose_segments", lambda blueprint, config: 28)
    (whole, _), (four, _) = memory_case(1), memory_case(4)
    blueprint = build_blueprint(whole.config)
    end_to_end, balanced = (
        memory_row(case, blueprint, is_published=True) for case in (whole, four)
    )
    assert end_to_end["saved_activation_bytes_per_sample"] / 1024 == pytest.approx(8253, rel=0.05)
    assert balanced["saved_activation_bytes_per_sample"] / 1024 == pytest.approx(2362, rel=0.05)
    assert end_to_end["published_gb"] == 9.40 and balanced["published_gb"] == 3.52
    assert balanced["published_against_e2e"] == pytest.approx(-0.626, abs=0.001)


def test_checkpointing_saves_bytes_and_its_best_number_of_segments_is_found(tmp_path: Path) -> None:
    config = settled(tmp_path, "resnet14")
    blueprint = build_blueprint(config)
    best = choose_segments(blueprint, config)
    by_count = {count: count_plain_saved_bytes(blueprint, config, count) for count in (1, 2, best)}
    assert best > 1 and by_count[best] == min(by_count.values()) < by_count[1]


def test_memory_takes_what_only_a_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts are made without it, and the peak is measured with it."""
    plain = configs.load(ROOT / "configs/bench/memory_resnet110.yaml", ["data.samples=32"])
    dataset = datasets.load(plain.data, 0)
    blueprint = build_blueprint(resolve_here(update(plain, {"pipeline.stages": 1}), dataset))
    keys = {"run.precision": "tf32", "run.capture": "graphs", "run.device": "cuda"}
    given = update(plain, keys)
    case = next(memory_cases(given, dataset, blueprint, {}))
    run = case.config.run
    assert (run.device, run.precision, run.capture) == ("cpu", "fp32", "none")

    measured: list[Resolved] = []

    def measure(config: Resolved, *_: Any) -> None:
        measured.append(config)

    monkeypatch.setattr("localpipe.bench.memory.measure_cuda_peak", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory_row(case, blueprint, False, given.run.precision)
    assert (measured[0].run.device, measured[0].run.precision) == ("cuda", "tf32")


class FakeProcesses:
    """Stands for the processes of a system, and counts those that are alive."""

    alive = 0
    most = 0

    def __init__(self, request: SystemRequest, config: Resolved, find_signal: Any) -> None:
        self.request, self.config = request, config
        self.workers = types.SimpleNamespace(stop_signal=0)
        FakeProcesses.alive += 1
        FakeProcesses.most = max(FakeProcesses.most, FakeProcesses.alive)

    def build(self, window_s: float) -> None:
        """Do nothing."""

    def run_windows(self) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Free what the processes hold."""
        FakeProcesses.alive -= 1

    def collect(self) -> Measured:
        """Return no figures."""
        return Measured(self.request, self.config, 0, [], {}, None)


@pytest.mark.parametrize(("device", "most"), [("cpu", 3), ("cuda", 1)])
def test_no_system_holds_memory_of_a_device_that_another_is_measured_on(
    device: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = update(settings(tmp_path, pipeline={"stages": 2}), {"run.device": device})
    monkeypatch.setattr("localpipe.bench.measure.SystemProcesses", FakeProcesses)
    monkeypatch.setattr(FakeProcesses, "most", 0)
    names = ("e2e", "localpipe", "sequential")
    again: list[str] = []
    predictions = types.SimpleNamespace(measure_again=lambda _: again.append("once more"))
    requests = [CheckedRequest(SystemRequest(name)) for name in names]
    measured = measure_group(config, requests, False, predictions)  # type: ignore[arg-type]
    assert [one.request.system for one in measured] == ["localpipe", "sequential", "e2e"]
    assert (FakeProcesses.most, FakeProcesses.alive) == (most, 0)
    assert len(again) == 2, "the profile is measured half way and after the last window"


def test_the_device_of_a_benchmark_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    config = settings(tmp_path)
    assert describe_machine(config)["device"] == "cpu"
    assert describe_machine(update(config, {"run.device": "cuda"}))["device"] == "H200"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_memory_row_really_trains(device: str, tmp_path: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = settled(
        tmp_path,
        "resnet8",
        method={"objective": {"name": "infopro"}, "reconcile": {"distance": "cosine"}},
    )
    blueprint = build_blueprint(config)
    for segments in (None, 1, 2):
        build_training_step(config, blueprint, segments, device)()
