"""`plan --cluster` and `plan --freeze`: what the machines would do, and what they cannot."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml

from localpipe import config as configs
from localpipe import data
from localpipe.cli.command_line import main
from localpipe.config.keys import Config
from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.config.resume import flatten
from localpipe.data.dataset import Dataset
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.stages.stage_plan import StagePlan, build_plans
from localpipe.plan.cluster import formulas
from localpipe.plan.cluster.forecast import Forecast, forecast_on_cluster
from localpipe.plan.cluster.machines import load_cluster
from localpipe.plan.cluster.peers import ForecastRow
from localpipe.plan.cluster.placement import ForecastCase, assign_workers
from localpipe.plan.costs import StageCost, count_costs
from localpipe.plan.resolve_here import resolve_here
from localpipe.runs.prepare import prepare
from tests import ROOT
from tests.plan.cluster.test_machines import GPU, changed, written

SECTIONS: dict[str, Any] = {
    "model": {"name": "resnet14", "num_classes": 10},
    "method": "dgl",
    "pipeline": {"stages": 4},
    "data": {
        "name": "synthetic",
        "image_size": 32,
        "batch_size": 64,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
    },
    "optim": {"epochs": 10},
}


Planned: TypeAlias = tuple[
    Config, Resolved, Dataset, Blueprint, tuple[StagePlan, ...], list[StageCost]
]


@pytest.fixture(scope="module")
def planned() -> Planned:
    """What `plan` knows of a small network before it looks at a cluster."""
    given = configs.parse(SECTIONS, "test")
    dataset = data.load(given.data, 0)
    resolved = resolve_here(given, dataset)
    blueprint, plans = build_plans(resolved)
    return given, resolved, dataset, blueprint, plans, count_costs(blueprint, plans, resolved)


def forecast_on(planned: Planned, path: Path, **options: Any) -> Forecast:
    return forecast_on_cluster(*planned, path, **options)


def row(found: Forecast, system: str, micro_batches: int | None = None) -> ForecastRow:
    (only,) = [
        row for row in found.rows if row.system == system and row.micro_batches == micro_batches
    ]
    return only


def speed(row: ForecastRow) -> float:
    """Return the simulated samples per second of a system that fits."""
    assert row.samples_per_s is not None
    return row.samples_per_s


def test_every_system_is_forecast_by_formula_and_by_simulation(
    planned: Planned, tmp_path: Path
) -> None:
    fast = {name: {"bytes_per_s": 1e11, "latency_s": 1e-6} for name in ("bus", "net")}
    found = forecast_on(planned, written(tmp_path, changed(wires=fast)), micro_batches="4,16")
    names = {(row.system, row.micro_batches) for row in found.rows}
    peers = {(name, count) for name in ("zb-h1", "1f1b", "gpipe") for count in (4, 16)}
    assert names == {("localpipe", None), *peers, ("ddp", None), ("e2e", None)}
    for each in found.rows:
        assert each.bound_samples_per_s is not None
        assert speed(each) <= each.bound_samples_per_s * 1.001
        exact = each.system in ("localpipe", "ddp", "e2e", "gpipe")
        assert each.samples_per_s == pytest.approx(
            each.formula_samples_per_s, rel=1e-9 if exact else 0.15
        )
        assert each.run_s == pytest.approx(160 * 64 / speed(each))
    few, many = row(found, "1f1b", 4).efficiency, row(found, "1f1b", 16).efficiency
    assert few is not None and many is not None and few < many < 1


def test_seconds_follow_from_macs_and_edges_from_bytes(planned: Planned, tmp_path: Path) -> None:
    found = forecast_on(planned, written(tmp_path, changed()))
    plans, costs = planned[4:]
    seconds = [64 * cost.train_macs / (1e13 * 0.5 / 2) for cost in costs]
    assert [worker.compute_s for worker in found.workers] == pytest.approx(seconds)
    assert found.workers[1].before_s == pytest.approx(64 * costs[1].macs / (1e13 * 0.5 / 2))
    assert [worker.wire for worker in found.workers] == ["bus", "net", "bus", None]
    assert [worker.devices[0].machine for worker in found.workers] == ["a", "a", "b", "b"]
    sends = plans[1].sends
    assert sends is not None and found.workers[1].transfer_s == sends.nbytes / 1e9
    period = max(*seconds, *(worker.transfer_s + 2 * worker.latency_s for worker in found.workers))
    assert row(found, "localpipe").formula_samples_per_s == pytest.approx(64 / period)
    assert found.bottleneck == "edge 1 -> 2 (net)"


def test_given_seconds_go_before_the_devices_figures(planned: Planned, tmp_path: Path) -> None:
    seconds = ((1.0, 1.0), (1.0, 2.0), (1.0, 1.0), (1.0, 1.0))
    found = forecast_on(planned, written(tmp_path, changed()), seconds=seconds)
    assert row(found, "localpipe").samples_per_s == pytest.approx(64 / 3)
    assert found.bottleneck == "stage 1 (gpu)"
    assert any("measured seconds" in line for line in found.assumptions)


def test_faster_links_and_devices_are_never_slower(planned: Planned, tmp_path: Path) -> None:
    speeds = []
    for times in (1, 16):
        net = {"bytes_per_s": 1e8 * times, "latency_s": 1e-3 / times}
        found = forecast_on(planned, written(tmp_path, changed(wires={"bus": net, "net": net})))
        speeds.append([speed(each) for each in found.rows])
    for slow, fast in zip(speeds, speeds[1:], strict=False):
        assert all(b >= a * (1 - 1e-9) for a, b in zip(slow, fast, strict=True))
    assert speeds[0][0] < speeds[1][0]


def test_fewer_devices_than_stages_host_neighbours_together(
    planned: Planned, tmp_path: Path
) -> None:
    nodes = {"a": {"device": "gpu", "count": 2, "wire": "bus"}}
    found = forecast_on(planned, written(tmp_path, changed(nodes=nodes, links=[])))
    assert [list(worker.stages) for worker in found.workers] == [[0, 1], [2, 3]]
    costs = planned[5]
    speed = 64 / (1e13 * 0.5 / 2)
    first = found.workers[0]
    assert first.before_s == pytest.approx(speed * (costs[0].train_macs + costs[1].macs))
    assert first.compute_s == pytest.approx(speed * (costs[0].train_macs + costs[1].train_macs))


def test_a_proposed_cut_is_as_fast_as_it_was_said_to_be(planned: Planned, tmp_path: Path) -> None:
    wires = {name: {"bytes_per_s": 1e13, "latency_s": 0.0} for name in ("bus", "net")}
    path = written(tmp_path, changed(wires=wires))
    before = forecast_on(planned, path)
    (line,) = [line for line in before.advice if "pipeline.cuts" in line]
    word, percent = line.split(" is predicted ")
    given, _, dataset, *_ = planned
    cut = update(given, {"pipeline.cuts": json.loads(word.split("=")[1]), "pipeline.stages": None})
    resolved = resolve_here(cut, dataset)
    blueprint, plans = build_plans(resolved)
    after = forecast_on(
        (cut, resolved, dataset, blueprint, plans, count_costs(blueprint, plans, resolved)), path
    )
    gain = speed(row(after, "localpipe")) / speed(row(before, "localpipe")) - 1
    assert round(100 * gain) == int(percent.split()[0]) >= 3
    assert not any("pipeline.cuts" in line for line in after.advice)


def test_replicas_share_the_batch_and_add_up_gradients(planned: Planned, tmp_path: Path) -> None:
    _, resolved, _, blueprint, plans, costs = planned
    twice = resolved.model_copy(
        update={"pipeline": resolved.pipeline.model_copy(update={"replicas": 2})}
    )
    machines = load_cluster(written(tmp_path, changed()))
    case = ForecastCase(twice, blueprint, plans, tuple(costs), machines, "test", 10)
    workers = assign_workers(case, None)
    alone = assign_workers(replace(case, config=resolved), 2)
    assert [[device.machine for device in worker.devices] for worker in workers] == [["a", "b"]] * 2
    for worker, single in zip(workers, alone, strict=True):
        assert worker.compute_s == pytest.approx(single.compute_s / 2)
        ring = formulas.ring_all_reduce_s(worker.memory.gradients_bytes, 2, 1e9, 1e-4)
        assert worker.reduce_s == ring > 0
    # A whole pipeline lies on one node: every replica sends its half over a wire of its own.
    sends = plans[1].sends
    assert sends is not None and workers[0].transfer_s == sends.nbytes / 2 / 1e10


def test_what_a_peer_lacks_is_its_own_misfortune(planned: Planned, tmp_path: Path) -> None:
    lonely = {name: {"device": "gpu"} for name in "abcd"}
    chain = [{"between": list(pair), "wire": "net"} for pair in ("ab", "bc", "cd")]
    found = forecast_on(planned, written(tmp_path, changed(nodes=lonely, links=chain)))
    assert row(found, "localpipe").samples_per_s is not None
    assert (
        "no link joins d and a" in str(row(found, "ddp").why_not)
        and row(found, "ddp").samples_per_s is None
    )
    needs = [worker.memory.total_bytes for worker in found.workers]
    small = {**GPU, "memory_bytes": float(max(needs))}
    found = forecast_on(planned, written(tmp_path, changed(devices={"gpu": small})))
    assert row(found, "localpipe").samples_per_s is not None
    assert "do not fit gpu" in str(row(found, "e2e").why_not)


def test_devices_that_fail_make_the_run_longer(planned: Planned, tmp_path: Path) -> None:
    flops = {"fp32": 1e8}
    still = forecast_on(
        planned, written(tmp_path, changed(devices={"gpu": {**GPU, "flop_per_s": flops}}))
    )
    failing = {**GPU, "flop_per_s": flops, "mtbf_s": 20_000}
    often = forecast_on(planned, written(tmp_path, changed(devices={"gpu": failing})))
    for before, after in zip(still.rows, often.rows, strict=True):
        assert after.samples_per_s == before.samples_per_s
        assert after.run_s is not None and before.run_s is not None
        assert after.run_s > before.run_s
        assert after.formula_run_s is not None and before.formula_run_s is not None
        assert after.formula_run_s > before.formula_run_s


MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "missing link": (changed(links=[]), [], "add {between: [a, b], wire: ...} to links"),
    "missing wire": (
        changed(nodes={"a": {"device": "gpu", "count": 4}}, links=[]),
        [],
        "add nodes.a.wire",
    ),
    "too little memory": (
        changed(devices={"gpu": {**GPU, "memory_bytes": 1e6}}),
        [],
        "cluster: stage 0 needs",
    ),
    "too few devices": (
        changed(),
        ["pipeline.stages=6", "pipeline.processes=6"],
        "has 4 devices, and the plan needs 6",
    ),
    "no such precision": (changed(), ["run.precision=bf16"], "gpu has no flop_per_s.bf16"),
    "too many micro-batches": (changed(), ["--micro-batches", "4,65"], "from 1 to the batch's 64"),
    "no number": (changed(), ["--micro-batches", "four"], "--micro-batches four"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_cluster_cannot_do_is_one_line_and_status_2(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machines, words, message = MISTAKES[mistake]
    given = tmp_path / "config.yaml"
    given.write_text(yaml.safe_dump(SECTIONS))
    assert main(["plan", str(given), "--cluster", str(written(tmp_path, machines)), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_too_little_memory_names_the_stage_the_bytes_and_the_way_out(
    planned: Planned, tmp_path: Path
) -> None:
    path = written(tmp_path, changed(devices={"gpu": {**GPU, "memory_bytes": 40e6}}))
    with pytest.raises(
        Exception, match=r"stage 1 needs [\d,]+ bytes, .* has 40,000,000 .*; lower data.batch_size"
    ):
        forecast_on(planned, path)


def test_plan_prints_json_with_memory_and_the_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "config.yaml"
    given.write_text(yaml.safe_dump(SECTIONS))
    path = written(tmp_path, changed(devices={"gpu": {**GPU, "jitter": 0.1, "mtbf_s": 1e6}}))
    assert main(["plan", str(given), "--json", "--cluster", str(path)]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert shown["predicted"] is None
    assert {"weights_bytes", "optimizer_bytes", "activations_bytes", "buffers_bytes"} <= shown[
        "stages"
    ][1]["memory"].keys()
    found = shown["cluster"]
    assert (found["name"], found["devices"], len(found["workers"])) == ("two", 4, 4)
    assert found["systems"][0]["system"] == "localpipe" and found["systems"][0]["cut"] == [0, 2, 4]
    assert found["bottleneck"] and found["assumptions"] and isinstance(found["advice"], list)


def test_a_frozen_configuration_has_every_choice_and_trains(tmp_path: Path) -> None:
    given, frozen = tmp_path / "config.yaml", tmp_path / "frozen.yaml"
    given.write_text(yaml.safe_dump({**SECTIONS, "run": {"dir": str(tmp_path / "run")}}))
    assert main(["plan", str(given), "--freeze", str(frozen), "optim.lr=auto"]) == 0
    loaded = configs.load(frozen)
    flat = flatten(loaded)
    assert [key for key, value in flat.items() if value == "auto" and key != "run.resume"] == []
    assert flat["optim.lr"] == pytest.approx(0.05)
    prepared = prepare(loaded)  # all that `train` does before it starts workers
    assert flatten(prepared.config) == flat and prepared.schedule.steps == 160


def fail_to_plan(*_: Any, **__: Any) -> None:
    raise AssertionError("a plan was made although its file cannot be written")


def test_a_file_that_a_plan_cannot_write_is_told_before_the_plan_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "config.yaml"
    given.write_text(yaml.safe_dump(SECTIONS))
    before = given.read_bytes()
    monkeypatch.setattr("localpipe.plan.whole_plan.make_plan", fail_to_plan)
    cases = [
        (["--freeze", str(given)], "exists"),
        (["--freeze", str(tmp_path / "no" / "x.yaml")], "no folder"),
        (["--measure", "--profile", str(tmp_path / "no" / "p.json")], "no folder"),
        (["--measure", "--profile", str(tmp_path)], "is a folder"),
    ]
    for words, message in cases:
        assert main(["plan", str(given), *words]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert given.read_bytes() == before


def test_the_documentation_shows_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "prediction.md").read_text()
    ((words, shown),) = re.findall(
        r"```sh\n(localpipe plan [^\n]*)\n```\n```text\n(.*?)\n```", page, re.DOTALL
    )
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "110")
    assert main(words.split()[1:]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert shown.splitlines() == printed[printed.index(shown.splitlines()[0]) :]


def test_the_simulation_that_the_documentation_shows_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs" / "prediction.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert f"It prints {capsys.readouterr().out.strip()}." in page


def test_the_cluster_that_the_documentation_shows_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "prediction.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "shown.yaml").write_text(text)
    found = load_cluster(tmp_path / "shown.yaml")
    assert [device.machine for device in found.all_devices] == [
        "workstation.0",
        "workstation.0",
        "workstation.1",
        "workstation.1",
    ]
