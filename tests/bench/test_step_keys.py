"""Every key that shapes a step, in every mode of `bench`; above all several messages of a step."""

from __future__ import annotations

import json
import traceback
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from localpipe.bench.launch import describe_machine
from localpipe.bench.remarks import describe_accumulation, describe_notes, list_commands
from localpipe.bench.request import (
    check_any_runs,
    choose_cut,
    group_requests,
    system_config,
)
from localpipe.bench.rows import Measured, Row, build_rows, label_row
from localpipe.bench.systems.batches import Batches, Targets
from localpipe.bench.systems.local import LocalStages
from localpipe.bench.systems.spec import Cut, SystemRequest
from localpipe.cli.command_line import main
from localpipe.config.load import parse_resolved, to_dict, to_yaml, update
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.pipeline.channels.message import Message
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.stage import Stage, train_step
from localpipe.pipeline.workers.mesh import Mesh, open_file_store
from tests.forked_ranks import CONTEXT
from tests.harness import settings

HALVES: Cut = ((0, 1), (2, 4))
SGR = {"objective": {"name": "dgl"}, "reconcile": {"distance": "cosine"}}
# What each key changes in two stages on two processes.
KEYS: dict[str, dict[str, dict[str, Any]]] = {
    "accumulate": {"optim": {"accumulate": 4}},
    "accumulate, more messages than an edge holds": {
        "optim": {"accumulate": 16},
        "data": {"batch_size": 64},
    },
    "accumulate, two stages a worker": {"optim": {"accumulate": 2}, "pipeline": {"stages": 4}},
    "accumulate, sgr": {"optim": {"accumulate": 2}, "method": SGR},
    "replicas": {"pipeline": {"stages": 1, "replicas": 2}},
    "replicas, accumulate": {
        "pipeline": {"stages": 1, "replicas": 2},
        "optim": {"accumulate": 2},
        "data": {"batch_size": 32},
    },
    "checkpointing": {"run": {"checkpointing": "block"}},
    "bf16": {"run": {"precision": "bf16"}},
    "wire_dtype": {"pipeline": {"wire_dtype": "bf16"}},
    "probe": {"run": {"probe": "linear"}},
    "probe, accumulate": {"run": {"probe": "linear"}, "optim": {"accumulate": 2}},
    "channels_last": {"run": {"channels_last": True}},
}


def configured(folder: Path, **keys: dict[str, Any]) -> Resolved:
    """Return two stages on two processes; keys: sections that override it."""
    keys = {
        **keys,
        "pipeline": {"stages": 2, "processes": 2, **keys.get("pipeline", {})},
        "data": {"augment": "none", "samples": 64, **keys.get("data", {})},
    }
    return settings(folder, **keys)


def run_system(mesh: Mesh, config: Resolved, request: SystemRequest) -> None:
    """Build a system's part, warm it up, and run a step of every kind of window."""
    prepare_process(config)
    system = request.spec.build(mesh, config, request)
    system.warm_up()
    system.trial_step()
    for step in system.window_steps().values():
        step()
    assert all(value.isfinite().all() for value in system.weights().values())
    mesh.barrier("done")
    system.close()


def _work(rank: int, folder: Path, cases: list[tuple[str, dict[str, Any], SystemRequest]]) -> None:
    store = open_file_store(folder)
    for name, values, request in cases:
        mesh = Mesh(rank, 2, dist.PrefixStore(name, store), local=True)
        try:
            run_system(mesh, parse_resolved(values, "test"), request)
        except Exception:
            (folder / "error.txt").write_text(f"{name}\n{traceback.format_exc()}")
            raise


@pytest.mark.parametrize("system", ["localpipe", "localpipe, 2", "gpipe", "ddp"])
def test_a_system_of_two_processes_runs_with_every_key_that_shapes_a_step(
    system: str, tmp_path: Path
) -> None:
    requests = {
        "localpipe": SystemRequest("localpipe"),
        "localpipe, 2": SystemRequest("localpipe", 2),
        "gpipe": SystemRequest("gpipe", 4, HALVES),
        "ddp": SystemRequest("ddp"),
    }
    request, cases = requests[system], []
    for name, keys in KEYS.items():
        config = system_config(request, configured(tmp_path, **keys))
        cases.append((name, to_dict(config), request))
    workers = [
        CONTEXT.Process(target=_work, args=(rank, tmp_path, cases), daemon=True)
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    error = tmp_path / "error.txt"
    assert not error.exists(), error.read_text()
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("system", ["sequential", "e2e", "checkpoint"])
def test_a_system_of_one_process_runs_with_every_key_that_shapes_a_step(
    system: str, key: str, tmp_path: Path
) -> None:
    request = SystemRequest(system)
    network = "small"
    if system == "checkpoint":
        network = "normalised"  # recomputed blocks cannot begin in place
    model = {"name": f"tests.sample_networks:{network}"}
    config = system_config(request, configured(tmp_path, model=model, **KEYS[key]))
    run_system(Mesh(0, 1, open_file_store(tmp_path), local=True), config, request)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run.capture=graphs"], "run.capture is graphs, which cpu does not have"),
        (["run.capture=graphs", "optim.accumulate=4"], "does not go with optim.accumulate"),
        (["--memory", "optim.accumulate=4"], "set optim.accumulate=1"),
    ],
)
def test_what_a_mode_cannot_measure_is_one_line_and_status_2(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(configured(tmp_path)))
    assert main(["bench", str(file), *words]) == 2
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert expected in lines[-1] and "Traceback" not in error
    assert [line for line in lines if line.startswith("localpipe: ")] == [lines[-1]]


# -- a step of several messages --------------------------------------------------------------------


def one_process(folder: Path, **keys: dict[str, Any]) -> LocalStages:
    """Return both stages in this process, warmed up."""
    config = configured(folder, **{"pipeline": {"processes": 1}, **keys})
    prepare_process(config)
    mesh = Mesh(0, 1, open_file_store(folder), local=True)
    system = LocalStages(mesh, config, SystemRequest("sequential"))
    system.warm_up()
    return system


def test_a_step_and_its_bound_take_all_messages_and_update_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = one_process(tmp_path, optim={"accumulate": 4})
    trained: list[tuple[int, int, int, bool]] = []

    def record(stage: Stage, message: Message, *rest: Any) -> Any:
        header = message.header
        trained.append((header.part, stage.plan.stage, header.count, header.ends_step))
        return train_step(stage, message, *rest)

    monkeypatch.setattr("localpipe.bench.systems.local.train_step", record)
    monkeypatch.setattr("localpipe.pipeline.workers.loop.train_step", record)
    expected = [(part, stage, 4, part == 3) for part in range(4) for stage in range(2)]
    for step in (system.step, system.window_steps()["bound"]):
        trained.clear()
        step()
        assert trained == expected


def test_a_probe_learns_in_a_step_and_in_its_bound(tmp_path: Path) -> None:
    system = one_process(tmp_path, run={"probe": "linear"})
    for step in system.window_steps().values():
        before = []
        for runner in system.runners:
            assert runner.probe is not None
            before.append(json.dumps(_as_lists(runner.probe.state())))
        step()
        for runner, state in zip(system.runners, before, strict=True):
            assert runner.probe is not None
            assert json.dumps(_as_lists(runner.probe.state())) != state


def _as_lists(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _as_lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_lists(item) for item in value]
    return value


def test_the_peers_batches_are_whole_whatever_localpipe_accumulates(tmp_path: Path) -> None:
    config = configured(tmp_path, optim={"accumulate": 4})
    image, target, _ = Batches(config).next()
    assert len(image) == len(target) == len(Targets(config).next()[0]) == 16


def test_localpipe_accumulates_as_many_messages_as_its_peers_have_micro_batches(
    tmp_path: Path,
) -> None:
    def requests(**keys: Any) -> list[list[tuple[str, int | None]]]:
        systems = {"systems": ["localpipe", "gpipe", "e2e"], "micro_batches": [1, 2, 4]}
        config = configured(tmp_path, bench={**systems, **keys.pop("bench", {})}, **keys)
        groups = group_requests(config)
        return [[(one.system, one.micro_batches) for one in group] for group in groups]

    own = ("localpipe", None)
    assert requests() == [
        [own, ("e2e", None), ("gpipe", 1)],
        [own, ("localpipe", 2), ("gpipe", 2)],
        [own, ("localpipe", 4), ("gpipe", 4)],
    ]
    assert requests(optim={"accumulate": 4})[2] == [own, ("gpipe", 4)]
    assert requests(bench={"systems": ["localpipe"]}) == [[own]]


def test_messages_that_are_too_small_are_a_note_and_no_error(tmp_path: Path) -> None:
    config = configured(tmp_path)
    checked = choose_cut(SystemRequest("localpipe", 8), config, {})
    assert checked.note is not None and "leaves 2 of 16 images a message" in checked.note
    assert choose_cut(SystemRequest("localpipe", 4), config, {}).note is None


# -- the rows --------------------------------------------------------------------------------------


def measured(config: Resolved, request: SystemRequest, wall_s: float, peak: int) -> Measured:
    response = {
        "wall_s": wall_s,
        "busy": wall_s,
        "receive": 0.0,
        "send": 0.0,
        "cpu": wall_s,
        "peak_memory_bytes": peak,
    }
    windows = {"step": [[response, response]]}
    if request.spec.is_subject:
        windows["bound"] = windows["step"]
    return Measured(request, system_config(request, config), 5, [64, 64], windows, None)


def rows_of(config: Resolved) -> list[Row]:
    group = [
        measured(config, SystemRequest("localpipe"), 1.0, 100),
        measured(config, SystemRequest("localpipe", 4), 1.25, 75),
        measured(config, SystemRequest("gpipe", 4, HALVES), 2.0, 90),
    ]
    return build_rows(group, "localpipe bench x.yaml", predicted=[80.0])


def test_the_row_of_accumulated_messages_is_that_of_a_whole_step(tmp_path: Path) -> None:
    whole, four, peer = rows_of(configured(tmp_path))
    assert (whole["system"], whole["micro_batches"]) == ("localpipe", None)
    assert (four["system"], four["micro_batches"]) == ("localpipe", 4)
    assert four["samples_per_s"] == four["bound_samples_per_s"] == 5 * 16 / 1.25
    assert four["command"] == "localpipe bench x.yaml optim.accumulate=4 --systems localpipe"
    assert four["saved_activation_bytes_per_sample"] == [
        nbytes // 4 for nbytes in whole["saved_activation_bytes_per_sample"]
    ]
    # Four headers, and the same tensors.
    assert whole["wire_bytes_per_step"] < four["wire_bytes_per_step"]
    assert four["wire_bytes_per_step"] <= whole["wire_bytes_per_step"] + 3 * 1024
    assert whole["predicted_samples_per_s"] == 80.0 and four["predicted_samples_per_s"] is None
    assert peer["micro_batches"] == 4


def test_the_remarks_tell_the_two_rows_of_localpipe_apart(tmp_path: Path) -> None:
    config = configured(tmp_path)
    rows = rows_of(config)
    assert [label_row(row) for row in rows] == ["localpipe", "localpipe, 4", "gpipe"]
    (line,) = describe_accumulation(rows)
    assert line.startswith("localpipe, 4 accumulated messages: 0.80x the speed of localpipe")
    assert "0.75x the memory a process, 0.25x the memory saved for backward" in line
    (note, _) = describe_notes(rows, config)
    assert "micro-batches of 4 samples" in note and "messages of 16, 4 in localpipe" in note


def test_a_command_names_localpipe_once_however_many_groups_there_are(tmp_path: Path) -> None:
    config = configured(tmp_path)
    rows = rows_of(config)
    eight = {**rows[2], "micro_batches": 8}
    assert list_commands([*rows, rows[0], eight], config, "bench x.yaml") == [
        "bench x.yaml --micro-batches 4 --systems localpipe|gpipe",
        "bench x.yaml --micro-batches 8 --systems localpipe|gpipe",
        "localpipe bench x.yaml optim.accumulate=4 --systems localpipe",
    ]
    configured_four = update(config, {"optim.accumulate": 4})
    assert len(list_commands(rows, configured_four, "bench x.yaml")) == 1


def test_bench_prints_a_row_of_four_messages_beside_the_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A profile takes seconds, and tells nothing here.
    monkeypatch.setattr("localpipe.bench.request.can_predict", lambda given: False)
    file, target = tmp_path / "c.yaml", tmp_path / "rows.json"
    file.write_text(to_yaml(configured(tmp_path)))
    words = ["--systems", "localpipe,gpipe", "--windows", "1", "--window-s", "0.01"]
    assert main(["bench", str(file), *words, "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [(row["system"], row["micro_batches"]) for row in rows] == [
        ("localpipe", None),
        ("localpipe", 4),
        ("gpipe", 4),
    ]
    assert all(row["samples_per_s"] > 0 and row["note"] is None for row in rows)
    output = capsys.readouterr().out
    assert "localpipe, 4 " in output and "localpipe, 4 accumulated messages: " in output


def test_the_machine_names_the_device_that_the_stages_ran_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "a GPU")
    on_gpu: Any = types.SimpleNamespace(run=types.SimpleNamespace(device="cuda"))
    assert describe_machine(configured(tmp_path))["device"] == "cpu"
    assert describe_machine(on_gpu)["device"] == "a GPU"


def test_systems_that_cannot_run_are_refused_where_no_other_does(tmp_path: Path) -> None:
    config = settings(tmp_path, pipeline={"stages": 4, "processes": 4})
    seconds = {2: [1.0] * 6}
    checked = choose_cut(SystemRequest("1f1b", 2), config, seconds)
    assert checked.note == "2 micro-batches are fewer than its 4 stages"
    with pytest.raises(UserError, match="no system of bench.systems can run here .1f1b: 2 micro"):
        check_any_runs([checked])
    check_any_runs([checked, choose_cut(SystemRequest("gpipe", 2), config, seconds)])
