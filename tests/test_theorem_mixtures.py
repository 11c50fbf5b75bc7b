"""The theorem under augmentation and mixtures, and one gradient for replicas and accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe import config as configs
from localpipe import data
from localpipe.config.keys import Config
from localpipe.config.load import as_resolved
from localpipe.config.resolved import Resolved
from localpipe.data.dataset import limit_classes
from localpipe.pipeline.channels.message import Flag, Header, Kind, Message
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.source import BatchSource
from localpipe.pipeline.workers.steps import StepSchedule, build_step_schedule
from localpipe.plan.resolve_here import resolve_here
from localpipe.results.evaluate import evaluate
from localpipe.results.export import export, load
from localpipe.runs.directory import RunDirectory
from tests.harness import digests, kill_after_a_checkpoint, settings, train

CHANGES = "randaugment,colour,erasing,cutout:3"
CASES: dict[str, dict[str, Any]] = {
    "changes": {"augment": f"crop_flip,{CHANGES}"},
    "mixup": {"augment": f"crop_flip,{CHANGES},mixup:0.8"},
    "cutmix": {"augment": "crop,cutmix"},
    "both": {"augment": "mixup:0.4,cutmix:0.6"},
}
INFOPRO = {"objective": {"name": "infopro", "image_weight": [1, 1], "task_weight": [1, 1]}}


def given(folder: Path, case: str, **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"name": "tests.sample_networks:small"},
        "method": {**INFOPRO, "context": {"mode": "R1E"}},
        "pipeline": {"stages": 4, "processes": 1},
        "data": {"name": "synthetic", "samples": 44, "image_size": 8, "batch_size": 16},
        "optim": {"lr": 0.05, "epochs": 2, "schedule": "cosine_step"},
        "run": {"dir": str(folder), "threads": 1, "device": "cpu"},
    }
    base["data"] |= CASES[case]
    for section, keys in sections.items():
        base[section] = {**base[section], **keys}
    return configs.parse(base, "test")


def resolved(folder: Path, case: str, **pipeline: int) -> Resolved:
    config = given(folder, case, pipeline=pipeline)
    return resolve_here(config, data.load(config.data, 0))


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the digest of every case, with all stages in one process."""
    folder = tmp_path_factory.mktemp("sequential")
    jobs = [resolved(folder / "run", case) for case in CASES]
    found = digests(jobs, 1, folder / "digests")
    assert len(set(found)) == len(CASES)
    return found


@pytest.mark.parametrize(("processes", "depth"), [(2, 1), (4, 4)])
def test_any_processes_and_depth_give_one_digest(
    tmp_path: Path, sequential: list[str], processes: int, depth: int
) -> None:
    jobs = [resolved(tmp_path / "run", case, processes=processes, depth=depth) for case in CASES]
    assert digests(jobs, processes, tmp_path / "digests") == sequential


def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    summaries = []
    for name in ("whole", "killed"):
        config = given(tmp_path / name, "mixup", run={"checkpoint_every_s": 0})
        if name == "killed":
            kill_after_a_checkpoint(config, tmp_path / "store")
        assert train(config) == 0
        summary = RunDirectory(tmp_path / name).summary()
        assert summary is not None
        summaries.append(summary)
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]


def test_a_run_on_mixtures_is_evaluated_and_exported(tmp_path: Path) -> None:
    config = given(tmp_path / "run", "both")
    assert train(config) == 0
    directory = RunDirectory(tmp_path / "run")
    summary = directory.summary()
    assert summary is not None
    recorded = directory.recorded_config(None)
    assert recorded.data.augment == ("mixup:0.4", "cutmix:0.6")
    found = evaluate(tmp_path / "run", recorded, needs_predictions=True)
    assert found.stages[-1]["accuracy"] == summary["test_accuracy"]
    assert found.predictions is not None
    target = tmp_path / "net.pt"
    export(tmp_path / "run", as_resolved(recorded), target, None)
    network = load(target, trust=True)
    assert network(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, 10)


# -- one gradient ---------------------------------------------------------------------------------

PLAIN = "tests.sample_networks:plain"
GREEDY = {"objective": {"name": "greedy"}}
BATCH = 16


def list_messages(
    config: Resolved, replicas: int, accumulate: int, replica: int
) -> Iterator[Message]:
    """Yield the training messages of the first step, as a replica of the first stage gets them."""
    dataset = limit_classes(
        data.load(config.data, config.run.seed), config.task, config.model.num_classes
    )
    schedule = StepSchedule(
        44, 2, BATCH, 1, accumulate=accumulate, replicas=replicas, widest=replicas
    )
    source = BatchSource(dataset, schedule.headers(0, replica), config.run.seed, float("inf"))
    while (message := source.receive()).header.step == 1:
        if message.header.kind is Kind.TRAIN:
            yield message


def sum_gradients(config: Resolved, replicas: int, accumulate: int) -> dict[str, torch.Tensor]:
    """Return the gradient of every stage after the first step, summed over the replicas."""
    sums: dict[str, torch.Tensor] = {}
    for replica in range(replicas):
        blueprint, plans = build_plans(config)
        stages = [Stage(plan, blueprint, config) for plan in plans]
        for stage in stages:
            for module in (stage.blocks, stage.objective, stage.entry):
                module.double()
        for message in list_messages(config, replicas, accumulate, replica):
            add_gradients(stages, message)
        for stage in stages:
            for name, parameter in zip(stage.weights(), stage.parameters(), strict=True):
                assert parameter.grad is not None and parameter.grad.dtype == torch.float64
                sums[name] = sums.get(name, 0) + parameter.grad
    return sums


def add_gradients(stages: list[Stage], message: Message) -> None:
    """Run a message through all stages, without an update of their weights."""
    header = Header(**{**vars(message.header), "flags": Flag.MORE})
    fields = dict(message.fields)
    for name, tensor in fields.items():
        if tensor.is_floating_point():
            fields[name] = tensor.double()
    for stage in stages:
        message = Message(header, fields)
        h = stage.forward(message)
        fields = dict(stage.outgoing(message, h, None))
        stage.update(stage.local_loss(message, h), message, 0.0)


@pytest.mark.parametrize("augment", ["mixup:0.8", "cutmix", "crop_flip,randaugment,erasing,mixup"])
def test_replicas_and_accumulated_messages_give_the_gradient_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: str
) -> None:
    # Losses and boundaries convert to fp32, whose rounding would hide what is wrong.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = settings(
        tmp_path,
        model={"name": PLAIN},
        data={"samples": 44, "augment": augment, "batch_size": BATCH},
        method=GREEDY,
        pipeline={"stages": 3},
    )
    whole = sum_gradients(config, 1, 1)
    for replicas, accumulate in ((2, 1), (1, 4), (2, 2)):
        parts = sum_gradients(config, replicas, accumulate)
        for key, gradient in whole.items():
            assert gradient.any(), key
            torch.testing.assert_close(parts[key], gradient, atol=1e-10, rtol=1e-10)


def test_the_steps_of_a_schedule_are_those_that_mixtures_are_made_of(tmp_path: Path) -> None:
    """A reader cuts an epoch into steps by itself."""
    config = settings(tmp_path, data={"samples": 44, "augment": "mixup", "batch_size": BATCH})
    dataset = data.load(config.data, 0)
    assert dataset.batch == build_step_schedule(config, dataset).batch == BATCH
    rows = [
        rows
        for header, rows in build_step_schedule(config, dataset).headers(0)
        if header.kind is Kind.TRAIN and header.epoch == 1
    ]
    assert [found.start % BATCH for found in rows] == [0] * len(rows)


def test_mixtures_codes_and_parameters_that_come_back_go_together(tmp_path: Path) -> None:
    method = {
        "objective": {"name": "dgl"},
        "context": {"mode": "R1E"},
        "feedback": {"mode": "block", "every": 2, "lag": 4},
    }
    weights = set()
    for processes, depth in ((1, 2), (2, 1), (4, 8)):
        folder = tmp_path / str(processes)
        pipeline = {"processes": processes, "depth": depth, "wire_dtype": "int4"}
        train(given(folder, "both", method=method, pipeline=pipeline))
        summary = RunDirectory(folder).summary()
        assert summary is not None
        weights.add(summary["weights_sha256"])
    assert len(weights) == 1
