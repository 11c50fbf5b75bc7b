"""localpipe from Python, the code of a user's own, and what comes with an installation."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import localpipe
from localpipe import config as configs
from localpipe.cli.command_line import main
from localpipe.config import reference, shipped
from localpipe.config.load import to_yaml
from localpipe.config.user_code import find_import_name, import_user_code
from localpipe.environment import PRIVATE_DIR
from localpipe.errors import UserError
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.costs import count_costs
from localpipe.runs.directory import RunDirectory
from localpipe.runs.prepare import prepare
from tests import ROOT, harness, sample_networks
from tests.harness import digests, settings


def python(*words: object, path: Path = ROOT, cwd: Path = ROOT, status: int = 0) -> str:
    """Run Python in a process of its own, with localpipe from `path`; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


# -- the face


def test_the_package_imports_neither_torch_nor_anything_slow_by_itself() -> None:
    code = (
        "import sys, localpipe; "
        "print('torch' in sys.modules, 'pydantic' in sys.modules, 'load' in dir(localpipe))"
    )
    assert python("-c", code).split() == ["False", "False", "True"]


def test_every_name_of_the_face_is_there_and_no_other() -> None:
    assert all(getattr(localpipe, name) is not None for name in localpipe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = localpipe.nothing


def test_a_configuration_from_python_is_the_one_from_a_file(tmp_path: Path) -> None:
    mapping = {"model": {"name": "resnet8"}, "method": "contsup", "run": {"dir": "runs/demo"}}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(mapping))
    words = ["optim.epochs=3", "method.context=E"]
    assert localpipe.configuration(mapping, *words) == configs.load(tmp_path / "demo.yaml", words)
    assert mapping["method"] == "contsup"  # the caller's own
    assert localpipe.configuration("demo").run.dir == "runs/demo"


def test_functions_and_classes_may_stand_for_their_names() -> None:
    method = {"objective": {"name": Mine, "sharp": True}}
    config = localpipe.configuration({"model": {"name": sample_networks.small}, "method": method})
    assert config.model.name == "tests.sample_networks:small"
    assert config.method.objective == {"name": f"{__name__}:Mine", "sharp": True}
    assert import_user_code(config.model.name, "model.name") is sample_networks.small


def test_what_workers_could_not_import_is_refused() -> None:
    def inner() -> None:
        """Not at the top of a module."""

    for thing in (inner, lambda: None):
        with pytest.raises(UserError, match="^api: .*workers cannot import it"):
            localpipe.configuration({"model": {"name": thing}})


def test_train_is_not_called_by_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PRIVATE_DIR, str(tmp_path))
    with pytest.raises(UserError, match="__main__"):
        localpipe.train(settings(tmp_path))


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss of one's own in real workers, the library, and an export without localpipe."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    shown = python("examples/custom_objective.py", cwd=tmp_path)
    assert "accuracy of every exit: [0." in shown
    recorded = (tmp_path / "runs/custom_objective/config.yaml").read_text()
    assert "custom_objective.py:Prototypes" in recorded and str(tmp_path) not in recorded
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    monkeypatch.setattr("localpipe.runs.train.train", harness.train)
    runpy.run_path(str(ROOT / "examples/library.py"), run_name="__main__")
    assert (
        main(
            [
                "train",
                "examples/own_network.yaml",
                "optim.max_steps=2",
                "pipeline.processes=1",
                "run.threads=1",
            ]
        )
        == 0
    )
    for name in ("net.pt", "net.pt2"):
        assert main(["export", "runs/own_network", "--trust", "-o", name]) == 0
        monkeypatch.setattr(sys, "argv", ["load_exported.py", name])
        runpy.run_path("examples/load_exported.py", run_name="__main__")
        assert re.search(r"^\[\d, \d, \d, \d\]$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", ["own_network", "custom_objective"])
def test_the_examples_configurations_can_be_planned(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", f"examples/{name}.yaml", "--json"]) == 0


# -- code of the user's own


class Mine(localpipe.LocalLoss):
    """A loss that is only named here."""

    @dataclass(frozen=True)
    class Options:
        """One option."""

        sharp: bool = False


class NoLoss:
    """Not one."""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:NoLoss", "is no local loss; expected a subclass of localpipe.LocalLoss"),
        (f"{__name__}:Nothing", "has no class 'Nothing'; expected package.module:class"),
        ("nowhere.at_all:Loss", "cannot import nowhere.at_all of method.objective.name"),
        ("nowhere.py:Loss", "cannot import nowhere.py"),
        ("dgll", "did you mean dgl?"),
    ],
)
def test_an_objective_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        configs.parse({"method": {"objective": name}}, "test")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_options_of_ones_own_objective_are_checked() -> None:
    with pytest.raises(UserError, match=r"did you mean method.objective.sharp\?"):
        configs.parse(
            {"method": {"objective": {"name": f"{__name__}:Mine", "sharpp": True}}}, "test"
        )


OWN = """
from dataclasses import dataclass
import torch
from torch import nn
from localpipe import LocalLoss

class Pooled(LocalLoss):
    @dataclass(frozen=True)
    class Options:
        pass
    def __init__(self, options, site):
        super().__init__()
        self.task = site.blueprint.task
        self.head = nn.Linear(self.task.features(site.shape), self.task.num_classes)
    def exit(self, h):
        return self.head(h.mean((2, 3)))

class NoDefault(Pooled):
    @dataclass(frozen=True)
    class Options:
        width: int

class OneArgument(Pooled):
    def __init__(self, options):
        pass

class Forgetful(Pooled):
    def __init__(self, options, site):
        self.head = nn.Linear(3, 3)

class Narrow(Pooled):
    def exit(self, h):
        return super().exit(h)[:, :3]

class Raises(Pooled):
    def exit(self, h):
        raise KeyError("oops")

class ManyLosses(Pooled):
    def forward(self, h, fields):
        return torch.zeros(3)

class NoTask(Pooled):
    def __init__(self, options, site):
        super().__init__(options, site)
        del self.task

class NumberLoss(Pooled):
    def forward(self, h, fields):
        return 3.0

class IntegerLoss(Pooled):
    def forward(self, h, fields):
        return torch.zeros((), dtype=torch.int64)

class TupleExit(Pooled):
    def exit(self, h):
        return (super().exit(h),)
    def forward(self, h, fields):
        return self.exit(h)[0].mean()

class LazyHead(Pooled):
    def __init__(self, options, site):
        super().__init__(options, site)
        self.head = nn.LazyLinear(10)

class ExtraState(Pooled):
    def get_extra_state(self):
        return {"calls": 3}
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoDefault", "method.objective.width has no default"),
        ("OneArgument", "cannot be built for stage 0, whose output has shape .* TypeError: "),
        ("Forgetful", "cannot be built for stage 0, .* AttributeError: "),
        ("Narrow", r"exit gives \(2, 3\) for 2 images; expected \(2, 10\)"),
        ("Raises", "fails at stage 0, tried without values .* KeyError: 'oops'"),
        ("ManyLosses", r"loss has shape \(3,\); expected one number"),
        ("NoTask", "has no task; set self.task = site.blueprint.task"),
        ("NumberLoss", "loss is float; expected a tensor of one floating-point number"),
        ("IntegerLoss", "loss is int64; expected a tensor of one floating-point number"),
        ("TupleExit", r"exit gives tuple; expected logits, a tensor \(2, 10\), or None"),
        ("LazyHead", "head.weight has no shape before it runs"),
        ("ExtraState", "_extra_state is dict in its state_dict; expected tensors alone"),
    ],
)
def test_what_is_wrong_with_ones_own_objective_is_told_before_training(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "losses.py").write_text(OWN)
    with pytest.raises(UserError, match=message) as caught:
        settled = settings(
            tmp_path, method={"objective": {"name": f"{tmp_path / 'losses.py'}:{name}"}}
        )
        count_costs(*build_plans(settled), settled)
    assert "\n" not in str(caught.value)


def test_an_objective_may_shape_what_its_networks_take_and_needs_no_unit_for_one_result(
    tmp_path: Path,
) -> None:
    (tmp_path / "losses.py").write_text(OWN)
    method = {"objective": {"name": f"{tmp_path / 'losses.py'}:Pooled"}}
    jobs = [
        settings(tmp_path / str(count), method=method, pipeline={"stages": 3}) for count in (1, 3)
    ]
    found = [
        digests([each], count, tmp_path / f"work{count}")
        for each, count in zip(jobs, (1, 3), strict=True)
    ]
    assert found[0] == found[1]
    costs = count_costs(*build_plans(jobs[0]), jobs[0])
    assert [cost.aux_macs for cost in costs] == [80, 80, 0]


def test_a_file_is_imported_once_and_finds_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("VALUE = 3\n")
    (tmp_path / "mine.py").write_text(
        "from beside_it import VALUE\n\ndef function():\n    return VALUE\n"
    )
    function = import_user_code(f"{tmp_path / 'mine.py'}:function", "model.name")
    assert (
        function() == 3
        and import_user_code(f"{tmp_path / 'mine.py'}:function", "model.name") is function
    )
    assert find_import_name(function) == f"{tmp_path / 'mine.py'}:function"


@pytest.mark.parametrize("objective", ["{name: 'touches_a_file:Loss'}", "'touches_a_file:Loss'"])
def test_an_objective_that_a_run_directory_names_is_not_imported_unasked(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "touches_a_file.py").write_text("open('imported', 'w').close()\n")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    plain = to_yaml(settings(run_dir)).splitlines()
    start = next(i for i, line in enumerate(plain) if line.startswith("  objective:"))
    end = next(i for i, line in enumerate(plain) if line.startswith("  context:"))
    text = "\n".join([*plain[:start], f"  objective: {objective}", *plain[end:]])
    (run_dir / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "touches_a_file", raising=False)
    for words in ([], ["data.batch_size=8"]):
        with pytest.raises(UserError, match="touches_a_file:Loss; name it again"):
            RunDirectory(run_dir).config(overrides=words)
    given = settings(run_dir)
    with pytest.raises(UserError, match="names code of its own"):
        prepare(given)
    assert not (tmp_path / "imported").exists()
    with pytest.raises(UserError, match="has no class 'Loss'"):
        RunDirectory(run_dir).config(None)
    assert (tmp_path / "imported").exists()


# -- what comes with an installation


def test_a_wheel_holds_the_configurations_and_finds_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE", "localpipe", "configs"):
        os.system(f"cp -r {ROOT / name} {source / name}")
    python(
        "setup.py",
        "--quiet",
        "bdist_wheel",
        "--dist-dir",
        tmp_path / "dist",
        cwd=source,
        path=source,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    listed = python("-m", "localpipe", "configs", path=installed, cwd=tmp_path)
    assert [line.split()[0] for line in listed.splitlines()] == shipped.list_names()
    shown = python(
        "-m", "localpipe", "configs", "bench/cifar10_resnet32_k2", path=installed, cwd=tmp_path
    )
    assert shown == (ROOT / "configs/bench/cifar10_resnet32_k2.yaml").read_text()
    code = "from localpipe import configuration as c; print(c('demo').model.name)"
    assert python("-c", code, path=installed, cwd=tmp_path).strip() == "resnet14"


def test_a_shipped_name_stands_for_its_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        configs.load("demo")
        == configs.load("configs/demo.yaml")
        == configs.load(ROOT / "configs/demo.yaml")
    )
    assert main(["configs", "demoo"]) == 2
    assert "did you mean demo?" in capsys.readouterr().err
    with pytest.raises(UserError, match="`localpipe configs` lists"):
        configs.load("nowhere")


def test_keys_lists_every_key_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--keys"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    every = reference.list_keys()
    assert [row[0] for row in every if f"\n{row[0]}=" not in f"\n{shown}"] == []
    assert "method.objective.pyramid=auto" in shown and "# method.objective.name=greedy" in shown


def test_every_key_has_a_line_of_help() -> None:
    assert [
        key for rows in reference.list_sections().values() for key, _, _, about in rows if not about
    ] == []
