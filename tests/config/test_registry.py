"""One file and one line in a table add each of eight things, from outside the package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from localpipe import config as configs
from localpipe import data
from localpipe.bench.request import list_systems
from localpipe.bench.systems.spec import SystemRequest
from localpipe.bench.worker import serve
from localpipe.cli.command_line import main
from localpipe.config import reference, registry
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.pipeline.stages.captured import stage_class
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.edges import Edges
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner, Worker
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.source import BatchSource
from localpipe.pipeline.workers.steps import build_step_schedule
from tests import ROOT
from tests.harness import settings, train_here

TOY = """
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from localpipe.bench.systems.spec import System, SystemSpec
from localpipe.bench.systems.step_timer import StepTimer
from localpipe.cli.command import Command
from localpipe.config import registry
from localpipe.config.registry import look_up
from localpipe.data.images import RawDataset, Recipe, split_from_arrays
from localpipe.methods.objective import LocalLoss
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.pipeline.channels.channel import ChannelBackend, MemoryChannel
from localpipe.pipeline.stages.optimizer import OptimizerSpec
from localpipe.tasks.classification import Classification


class Objective(LocalLoss):
    @dataclass(frozen=True)
    class Options:
        scale: float = 1.0

    def __init__(self, options, site):
        super().__init__()
        self.task = site.blueprint.task
        self.scale = options.scale
        features = self.task.features(site.shape)
        self.head = site.unit("head", lambda: nn.Linear(features, self.task.num_classes))

    def exit(self, h):
        return self.head(self.task.pool(h)) * self.scale


class SmoothTask(Classification):
    def losses(self, outputs, target):
        return nn.functional.cross_entropy(
            outputs.float(), target, reduction="none", label_smoothing=0.1
        )


def network(name, image, num_classes, *, width: int = 4):
    task = look_up(registry.TASKS, "smooth", "toy")(num_classes)
    blocks = (
        Block("first", "first.", lambda: nn.Conv2d(image[0], width, 3, padding=1)),
        Block("second", "second.", lambda: nn.Conv2d(width, width, 3, padding=1)),
    )
    size = width * image[1] * image[2]
    tail = Block("tail", "tail.", lambda: nn.Sequential(nn.Flatten(), nn.Linear(size, num_classes)))
    return Blueprint(name, blocks, tail, task, image)


def load_stripes(config):
    labels = np.arange(config.samples) % 2
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    images[labels == 1, ::2] = 255
    split = split_from_arrays(images, labels)
    return RawDataset(split, split, 2, Recipe("none", 0, "zero"))


def build_sign_sgd(optim, parameters, is_captured):
    class SignSGD(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad.sign(), alpha=-float(group["lr"]))

    return SignSGD(parameters, lr=0.0)


SIGN = OptimizerSpec(build_sign_sgd, ("lr", "momentum"), lambda optim: 0)

CHANNELS = {}


def open_end(endpoint):
    key = endpoint.schema
    return CHANNELS.setdefault(key, MemoryChannel(endpoint.schema, endpoint.depth))


BACKEND = ChannelBackend("here", ("cpu",), False, open_end, open_end)


class Quadratic(System):
    def __init__(self, mesh, config, request):
        self.timer = StepTimer()
        self.point = torch.ones(3, requires_grad=True)

    def step(self):
        (gradient,) = torch.autograd.grad((self.point**2).sum(), self.point)
        self.point.data.sub_(gradient, alpha=0.1)

    def weights(self):
        return {"point": self.point}


SYSTEM = SystemSpec(build=Quadratic, one_process=True)


def print_reversed(arguments):
    print(arguments.text[::-1])
    return 0


def add_text(parser):
    parser.add_argument("text")


COMMAND = Command("print a text backwards", add_text, print_reversed)
"""


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the file with one toy of each kind on the path, as a user's package would be."""
    (tmp_path / "toy_members.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_members", raising=False)


def add(monkeypatch: pytest.MonkeyPatch, table: str, name: str, attribute: str) -> None:
    """Add one line to a table of the registry."""
    line = {name: f"toy_members:{attribute}"}
    monkeypatch.setattr(registry, table, {**getattr(registry, table), **line})


def has_changed(config: Resolved, stages: list[Stage]) -> bool:
    """Return whether training has changed the first parameter of every stage."""
    blueprint, plans = build_plans(config)
    for plan, stage in zip(plans, stages, strict=True):
        initial = dict(stage_class(config)(plan, blueprint, config).weights())
        trained = dict(stage.weights())
        name = next(iter(trained))
        if torch.equal(initial[name], trained[name]):
            return False
    return True


def test_importing_the_configuration_imports_no_torch() -> None:
    code = "import localpipe.config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize(
    "table",
    ["OBJECTIVES", "MODELS", "DATASETS", "TASKS", "OPTIMIZERS", "BACKENDS", "SYSTEMS", "COMMANDS"],
)
def test_every_line_of_a_table_names_something(table: str) -> None:
    entries = getattr(registry, table)
    for name in entries:
        assert registry.look_up(entries, name, "test") is not None


def test_a_wrong_name_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"^config: optim.name has no 'sdg'; did you mean sgd\?$"):
        registry.look_up(registry.OPTIMIZERS, "sdg", "config: optim.name")


def test_an_objective_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "OBJECTIVES", "toy", "Objective")
    method = {"objective": {"name": "toy", "scale": 0.5}}
    config = settings(tmp_path, method=method, optim={"max_steps": 2})
    assert has_changed(config, train_here(config))
    with pytest.raises(UserError, match="did you mean method.objective.scale"):
        configs.parse({"method": {"objective": {"name": "toy", "scael": 1}}}, "test")


def test_a_network_and_a_task_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "MODELS", "two_convolutions", "network")
    add(monkeypatch, "TASKS", "smooth", "SmoothTask")
    model = {"name": "two_convolutions", "args": {"width": 6}}
    config = settings(tmp_path, model=model, pipeline={"stages": 2}, optim={"max_steps": 2})
    stages = train_here(config)
    assert has_changed(config, stages)
    assert type(build_plans(config)[0].task).__name__ == "SmoothTask"


def test_a_data_set_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "DATASETS", "stripes", "load_stripes")
    sections = {"name": "stripes", "samples": 32, "image_size": "auto", "augment": "auto"}
    config = settings(tmp_path, data=sections, optim={"max_steps": 2})
    assert config.model.num_classes == 2 and config.data.augment == "none"
    assert has_changed(config, train_here(config))


def test_an_optimizer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = {"name": "sign", "max_steps": 2}
    with pytest.raises(UserError, match=r"optim.name must be one of sgd, adamw \(test\)"):
        configs.parse({"optim": optim}, "test")
    add(monkeypatch, "OPTIMIZERS", "sign", "SIGN")
    with pytest.raises(UserError, match="one of sgd, adamw, sign .*got 'sing'; did you mean sign"):
        configs.parse({"optim": {"name": "sing"}}, "test")
    config = settings(tmp_path, optim=optim)
    assert has_changed(config, train_here(config))
    rows = {key: (choices, help_text) for key, choices, _, help_text in reference.list_keys()}
    assert rows["optim.name"][0] == "one of sgd, adamw, sign"
    assert rows["optim.momentum"][1] == "of sgd, sign"
    assert rows["optim.nesterov"][1] == "of sgd"
    assert rows["optim.weight_decay"][1] == "on the parameters of optim.decay; of sgd, adamw"
    assert rows["optim.eps"][1] == "added to the denominator; of adamw"


def test_a_back_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "BACKENDS", "here", "BACKEND")
    pipeline = {"stages": 2, "backend": "here"}
    config = settings(tmp_path, pipeline=pipeline, optim={"max_steps": 2})
    stages = train_over_edges(config)
    assert has_changed(config, stages)
    assert len(sys.modules["toy_members"].CHANNELS) == 1


def train_over_edges(config: Resolved) -> list[Stage]:
    """Train two stages in one process over the edges of two workers."""
    edges = Edges(Mesh(0, 2, dist.HashStore(), local=True), config, torch.device("cpu"))
    blueprint, plans = build_plans(config)
    first, last = (stage_class(config)(plan, blueprint, config) for plan in plans)
    outbox = edges.open_outbox(first.plan, 0)
    inbox = edges.open_inbox(last.plan, 0)

    dataset = data.load(config.data, config.run.seed)
    schedule = build_step_schedule(config, dataset)
    rate = LearningRateSchedule(config.optim, schedule.steps_per_epoch)
    context = RunnerContext(rate, PhaseTimer(), None, None)
    source = BatchSource(dataset, schedule.headers(0), config.run.seed, float("inf"))
    runners = [
        StageRunner(first, source, outbox, context),
        StageRunner(last, inbox, None, context),
    ]
    Worker(runners, context.timer).run()
    return [first, last]


def test_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(monkeypatch, "COMMANDS", "reverse", "COMMAND")
    assert main(["reverse", "abc"]) == 0
    assert capsys.readouterr().out == "cba\n"
    assert main(["revers", "abc"]) == 2
    assert "did you mean reverse?" in capsys.readouterr().err


class Commands:
    """A launcher's commands to one worker of the benchmark, and the worker's responses."""

    def __init__(self, *commands: dict[str, Any]) -> None:
        self.commands = commands
        self.responses: list[dict[str, Any]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.commands)

    def respond(self, **values: Any) -> None:
        self.responses.append(values)


def test_a_benchmark_system_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, pipeline={"stages": 2, "processes": 1})
    assert "quadratic" not in list_systems(config)
    add(monkeypatch, "SYSTEMS", "quadratic", "SYSTEM")
    assert list_systems(config)[-1] == "quadratic"
    window = {"do": "step", "steps": 2, "lags": [0.0]}
    commands: Any = Commands({"do": "build"}, window, {"do": "end"})
    mesh = Mesh(0, 1, dist.HashStore(), local=True)
    serve(mesh, config, SystemRequest("quadratic"), commands)
    built, measured, _ = commands.responses
    assert built["kinds"] == ["step"] and built["saved"] is not None
    assert measured["wall_s"] > 0
