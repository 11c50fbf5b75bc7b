"""Plans, predictions and forecasts of steps that have several messages, and what a profile fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from localpipe import config as configs
from localpipe import data
from localpipe.cli.command_line import main
from localpipe.config.load import to_yaml, update
from localpipe.config.resolved import Resolved
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan import measure_worker
from localpipe.plan.cluster.forecast import Forecast, forecast_on_cluster
from localpipe.plan.cluster.tables import _format_system
from localpipe.plan.costs import count_costs
from localpipe.plan.measure_worker import PieceSteps
from localpipe.plan.memory import worker_memory
from localpipe.plan.notes import statistics_notes
from localpipe.plan.predict import predict
from localpipe.plan.profile import Profile, profile_facts
from localpipe.plan.resolve_here import resolve_here
from tests.harness import settings
from tests.plan.cluster.test_forecast import SECTIONS
from tests.plan.cluster.test_machines import GPU, changed, written
from tests.plan.test_balanced_cuts import profile

FOUR = {"accumulate": 4}


def test_a_worker_holds_the_activations_of_one_message(tmp_path: Path) -> None:
    whole, four = settings(tmp_path), settings(tmp_path, optim=FOUR)
    memory = []
    for config in (whole, four):
        blueprint, plans = build_plans(config)
        costs = count_costs(blueprint, plans, config)
        memory.append(worker_memory(plans[1:2], costs[1:2], config))
    assert memory[1].activations_bytes * 4 == memory[0].activations_bytes
    assert memory[1].buffers_bytes < memory[0].buffers_bytes
    assert memory[1].weights_bytes == memory[0].weights_bytes


def test_plan_prints_the_memory_of_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(settings(tmp_path)))
    found = []
    for words in ([], ["optim.accumulate=4"]):
        assert main(["plan", str(file), *words, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["stages"])
    for whole, four in zip(*found, strict=True):
        assert four["memory"]["activations_bytes"] * 4 == whole["memory"]["activations_bytes"]
    assert main(["plan", str(file), "optim.accumulate=4"]) == 0
    printed = capsys.readouterr().out
    assert "at batch 16, in 4 messages" in printed
    statistics = "its running statistics move once a message, 4 times an update"
    assert statistics in " ".join(printed.split())
    assert main(["plan", str(file)]) == 0
    assert "running statistics" not in capsys.readouterr().out


def test_no_note_speaks_of_statistics_where_no_network_has_them(tmp_path: Path) -> None:
    keys = {"name": "vit_tiny", "args": {"patch": 4, "depth": 4, "width": 16, "heads": 2}}
    method = {"objective": {"name": "greedy"}}
    config = settings(tmp_path, model=keys, method=method, optim=FOUR)
    blueprint, plans = build_plans(config)
    stages = [Stage(plan, blueprint, config, "meta") for plan in plans]
    assert statistics_notes(config, stages) == []


# -- profiles --------------------------------------------------------------------------------------


def test_a_piece_is_timed_on_all_messages_of_a_step_and_one_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    forward, local_loss, update_weights = (
        Stage.forward,
        Stage.local_loss,
        measure_worker._run_update,
    )

    def note_forward(stage: Stage, message: Any) -> Any:
        events.append(f"forward {message.header.count}")
        return forward(stage, message)

    def note_loss(stage: Stage, message: Any, h: Any) -> Any:
        events.append(f"loss {len(h)}")
        return local_loss(stage, message, h)

    def note_update(optimizer: Any) -> None:
        events.append("update")
        update_weights(optimizer)

    monkeypatch.setattr(Stage, "forward", note_forward)
    monkeypatch.setattr(Stage, "local_loss", note_loss)
    monkeypatch.setattr(measure_worker, "_run_update", note_update)
    steps = PieceSteps(settings(tmp_path, optim=FOUR), "cpu")
    for step, passes in (
        (steps.lead(0, 0), ["forward 4"] * 4),
        (steps.block(2), ["forward 4"] * 4),
        (steps.loss(1, 4, 2), ["loss 4"] * 4),
    ):
        events.clear()
        assert step() > 0
        assert events == [*passes, "update"]


def test_every_message_pays_its_turn_and_its_copy() -> None:
    bounds, costs = [(0, 1), (2, 3)], {"copy_s_per_byte": 1e-6, "turn_s": 0.002}
    one = predict(profile(**costs), bounds, [1000], 2, 4)
    four = predict(profile(**costs, accumulate=4), bounds, [1000], 2, 4)
    assert one.samples_per_s == pytest.approx(16 / (0.039 + 0.003))
    assert four.samples_per_s == pytest.approx(16 / (0.039 + 4 * 0.003))


def fitting_profile(config: Resolved) -> Profile:
    """Return a profile that says it was measured for a configuration."""
    blueprint, _ = build_plans(config)
    blocks = tuple(block.name for block in blueprint.blocks)
    return profile(**profile_facts(config), image=blueprint.sample, blocks=blocks)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "image": ({"data.image_size": 16}, "image is (3, 8, 8) there, the configuration has (3, 16, "),
    "blocks": ({"model.name": "tests.sample_networks:plain"}, "network is"),
    "accumulate": ({"optim.accumulate": 4}, "accumulate is 1 there, the configuration has 4"),
    "checkpointing": ({"run.checkpointing": "block"}, "checkpointing is 'none' there"),
    "optimizer": ({"optim.name": "adamw", "optim.nesterov": False}, "optimizer is 'sgd' there"),
    "probe": ({"run.probe": "linear"}, "probe is 'none' there, the configuration has 'linear'"),
    "kernels": ({"run.deterministic": False}, "deterministic is True there"),
    "classes": ({"model.num_classes": 100}, "num_classes is 10 there, the configuration has 100"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_profile_fits_only_what_it_was_measured_for(other: str, tmp_path: Path) -> None:
    config = settings(tmp_path, pipeline={"stages": 2})
    found = fitting_profile(config)
    assert found.mismatch(config) is None
    assert Profile.from_json(found.to_json()).mismatch(config) is None
    keys, expected = OTHERS[other]
    assert expected in (found.mismatch(update(config, keys)) or "")


def test_a_profile_of_other_blocks_under_the_same_name_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path)
    found = dataclasses.replace(fitting_profile(config), blocks=("a", "b"))
    assert "blocks is ('a', 'b') there" in (found.mismatch(config) or "")


def test_a_profile_of_an_older_version_fits_whole_batches(tmp_path: Path) -> None:
    config = settings(tmp_path)
    values = json.loads(fitting_profile(config).to_json())
    for key in (
        "accumulate",
        "checkpointing",
        "optimizer",
        "num_classes",
        "probe",
        "deterministic",
    ):
        del values[key]
    old = Profile.from_json(json.dumps(values))
    assert old.mismatch(config) is None
    assert "accumulate is 1 there" in (old.mismatch(update(config, {"optim.accumulate": 4})) or "")


# -- clusters --------------------------------------------------------------------------------------


def forecast(path: Path, **optim: Any) -> Forecast:
    """Return the forecast of a small network on a cluster's file."""
    given = configs.parse({**SECTIONS, "optim": {"epochs": 10, **optim}}, "test")
    dataset = data.load(given.data, 0)
    resolved = resolve_here(given, dataset)
    blueprint, plans = build_plans(resolved)
    costs = count_costs(blueprint, plans, resolved)
    return forecast_on_cluster(given, resolved, dataset, blueprint, plans, costs, path)


def test_a_forecast_of_four_messages_is_as_fast_and_holds_a_quarter_of_the_activations(
    tmp_path: Path,
) -> None:
    fast = {name: {"bytes_per_s": 1e12, "latency_s": 0.0} for name in ("bus", "net")}
    path = written(tmp_path, changed(wires=fast))
    whole, four = forecast(path), forecast(path, accumulate=4)
    assert (whole.rows[0].micro_batches, four.rows[0].micro_batches) == (None, 4)
    assert four.rows[0].samples_per_s == pytest.approx(whole.rows[0].samples_per_s)
    assert four.rows[0].bound_samples_per_s == pytest.approx(whole.rows[0].bound_samples_per_s)
    assert four.rows[0].efficiency == pytest.approx(whole.rows[0].efficiency)
    for one, other in zip(whole.workers, four.workers, strict=True):
        assert other.memory.activations_bytes * 4 == one.memory.activations_bytes
        assert other.compute_s * 4 == pytest.approx(one.compute_s)
    # The peers know no messages.
    assert four.rows[1:] == whole.rows[1:]


def test_a_slow_link_costs_every_message_its_latency(tmp_path: Path) -> None:
    slow = {name: {"bytes_per_s": 1e12, "latency_s": 1.0} for name in ("bus", "net")}
    path = written(tmp_path, changed(wires=slow))
    whole, four = forecast(path).rows[0], forecast(path, accumulate=4).rows[0]
    assert whole.samples_per_s == pytest.approx(64 / 2.0, rel=1e-3)
    assert four.samples_per_s == pytest.approx(64 / 8.0, rel=1e-3)


def test_the_table_says_that_a_run_never_ends(tmp_path: Path) -> None:
    # Every device fails long before the first checkpoint.
    for mtbf_s, expected in ((0.01, "never"), (4.0, "hardly\never")):
        path = written(tmp_path, changed(devices={"gpu": {**GPU, "mtbf_s": mtbf_s}}))
        row = forecast(path).rows[0]
        assert row.run_s is None
        assert _format_system(row)[6] == expected
