"""The commands and code of the documentation run as they are."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from localpipe import config as configs
from localpipe import data
from localpipe.bench.request import list_systems, system_config
from localpipe.bench.systems.spec import SystemRequest
from localpipe.bench.worker import run_window
from localpipe.cli.command_line import build_parser, main, parse_arguments
from localpipe.config import reference, registry, shipped
from localpipe.config.load import update
from localpipe.config.resolved import count_stages
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.plan.costs import count_costs
from localpipe.plan.resolve_here import resolve_here
from tests import ROOT, harness
from tests.documents import (
    FENCE,
    MARKS,
    PAGES,
    PLACEHOLDER,
    PROGRAMS,
    SLOW,
    list_commands,
    read_blocks,
    shorten_command,
)
from tests.harness import settings

# How many commands and blocks of a page run here, so that none is skipped by mistake.
SHOWN = {
    "README.md": 16,
    "docs/configuration.md": 2,
    "docs/data.md": 7,
    "docs/export.md": 6,
    "docs/how_it_works.md": 5,
    "docs/methods.md": 3,
    "docs/optimizers.md": 1,
    "docs/own_network.md": 22,
    "docs/papers.md": 1,
    "docs/prediction.md": 2,
    "docs/report.md": 6,
    "docs/tasks.md": 11,
    "docs/text.md": 9,
}
ELSEWHERE = {"docs/clusters.md", "docs/hangs.md"}  # test_pages.py runs their blocks


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that adds a file and a line of CONTRIBUTING.md to a table, under a name."""
    monkeypatch.syspath_prepend(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)

    def install_block(table: str, name: str) -> None:
        (line,) = [block for block in blocks if block.startswith(f'"{name}": ')]
        module, attribute = re.findall(r': "localpipe\.([\w.]+):(\w+)",', line)[0]
        (code,) = [
            block for block in blocks if re.search(rf"^(class )?{attribute}\b", block, re.MULTILINE)
        ]
        file_name = "shown_" + module.rpartition(".")[2]
        (tmp_path / f"{file_name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, file_name, raising=False)
        entries = {**getattr(registry, table), name: f"{file_name}:{attribute}"}
        monkeypatch.setattr(registry, table, entries)

    return install_block


def test_the_objective_that_contributing_shows_works_as_one_file_and_one_line(
    tmp_path: Path, install: Callable[[str, str], None]
) -> None:
    install("OBJECTIVES", "linear")
    method = {
        "objective": {"name": "linear", "bias": False},
        "context": {"mode": "E"},
        "reconcile": {"distance": "l2"},
    }
    resolved = settings(tmp_path / "run", method=method)
    costs = count_costs(*build_plans(resolved), resolved)
    assert [cost.aux_params for cost in costs] == [5120, 5120, 1280, 0]


def test_the_task_that_contributing_shows_works_as_one_file_and_one_line(
    tmp_path: Path, install: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("TASKS", "top_two")
    task = registry.look_up(registry.TASKS, "top_two", "model")(10)
    outputs = torch.arange(10.0).repeat(3, 1)  # the two largest are those of classes 8 and 9
    sums = task.measure(outputs, torch.tensor([9, 8, 7]))
    assert task.summarise(sums, 3) == {"top2": 2 / 3, "accuracy": 1 / 3}

    named = {"task": {"name": "top_two"}, "model": {"name": "resnet8"}}
    resolved = settings(tmp_path / "run", **named, optim={"max_steps": 2})
    blueprint, _ = build_plans(resolved)
    assert type(blueprint.task) is type(task)
    assert len(harness.train_here(resolved)) == 4


def test_the_benchmark_system_that_contributing_shows_works_as_one_file_and_one_line(
    tmp_path: Path, install: Callable[[str, str], None]
) -> None:
    install("SYSTEMS", "accumulated")
    config = settings(tmp_path, bench={"systems": ["localpipe", "accumulated"]})
    assert list_systems(config) == ["localpipe", "accumulated"]
    request = SystemRequest("accumulated")
    mesh = Mesh(0, 1, dist.HashStore(), local=True)
    system = request.spec.build(mesh, system_config(request, config), request)
    before = {name: tensor.clone() for name, tensor in system.weights().items()}
    system.warm_up()
    seconds = run_window(system.timer, system.step, 2, 0.0)
    system.close()
    assert seconds["busy"] is not None and seconds["busy"] > 0
    assert [name for name in before if torch.equal(before[name], system.weights()[name])] == []


def steps(page: str) -> list[tuple[str, str]]:
    """Return what of a page runs here, in order, and then what it names in passing.

    ("file", text), ("python", code), or ("command", words).
    """
    found = []
    for block in read_blocks(page):
        if block.mark == "python":
            is_file = re.match(r"# \w+\.py\n", block.text)
            found.append(("file" if is_file else "python", block.text))
        if block.mark == "sh":
            found += [("command", line) for line in block.lines]
        if block.mark == "sh short":
            found += [("command", shlex.join(shorten_command(line))) for line in block.lines]
    for command in list_commands(page):
        if not SLOW.match(command):
            found.append(("command", shlex.join(shorten_command(command))))
    return found


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of a reader: examples, configurations, and a very short CIFAR-10."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    images, labels = np.zeros((64, 32, 32, 3), np.uint8), np.arange(64) % 10
    np.savez(
        tmp_path / "data/cifar10.npz", x_train=images, y_train=labels, x_test=images, y_test=labels
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("localpipe.runs.train.train", harness.train)
    return tmp_path


def write_photos(root: Path) -> None:
    """Write the folder of images that the README's reader has."""
    for i in range(40):
        folder = root / ("test" if i % 4 == 0 else "train") / "ab"[i % 8 // 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (i, 6 * i, 255 - i)).save(folder / f"{i}.png")


@pytest.mark.parametrize("page", sorted({*PAGES} - ELSEWHERE - {"CHANGELOG.md"}))
def test_what_a_page_shows_runs_in_its_order(page: str, desk: Path) -> None:
    shown = (
        [] if page == "CONTRIBUTING.md" else steps(page)
    )  # whose block is a file of localpipe's, see above
    assert len(shown) == SHOWN.get(page, 0)
    if page == "README.md":
        write_photos(desk / "photos")
    for kind, text in shown:
        if kind == "file":
            (desk / text.splitlines()[0].removeprefix("# ")).write_text(text)
        elif kind == "command":
            assert run_words(shlex.split(text)[1:]) == 0, text
        elif "__main__" in text:
            (desk / "script.py").write_text(text)
            runpy.run_path(str(desk / "script.py"), run_name="__main__")
        else:
            exec(compile(text, page, "exec"), {"__name__": "shown"})


def run_words(words: list[str]) -> object:
    """Run a command in this process; return its exit status."""
    try:
        return main(words)
    except SystemExit as ended:  # of `train --keys`
        return ended.code or 0


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_mark_that_says_how_it_is_tried(page: str) -> None:
    for block in read_blocks(page):
        assert block.mark in MARKS, block
        for line in block.lines:
            if block.mark in ("text", "yaml"):
                assert not is_command(line), f"{line}: mark the block of {page} `sh`"
            if block.mark in ("sh", "sh short") and page not in ELSEWHERE:
                assert line.startswith("localpipe ") and not PLACEHOLDER.search(line), line
            if block.mark == "sh install":
                assert page == "README.md" and line in ("make demo", ". .venv/bin/activate")
            if block.mark == "usage":
                check_usage(line)


def is_command(line: str) -> bool:
    words = line.split()
    if words[0] == "localpipe":
        return words[1:2] != [] and words[1] in registry.COMMANDS
    return words[0] in PROGRAMS or re.match(r"launch/\w", words[0]) is not None


def check_usage(line: str) -> None:
    """A form names a command, and flags that there are."""
    commands = build_parser()[1]
    assert is_command(line) and line.startswith("localpipe "), line
    helps = " ".join(parser.format_help() for parser in commands.values())
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", line):
        assert re.search(rf"{flag}\b", helps), f"{flag}: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_a_command_that_a_page_names_in_passing_is_understood(
    page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    commands = build_parser()[1]
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", (ROOT / page).read_text())):
        words = (
            shlex.split(span)
            if re.match(r"(localpipe|torchrun \S+ \S+ -m localpipe) [a-z]", span)
            else []
        )
        words = words[words.index("localpipe") + 1 :] if words else []
        if not words:
            continue
        assert words[0] in commands, span
        assert all(
            word in commands[words[0]].format_help() for word in words if word.startswith("--")
        ), span
        if (
            len(words) < 2
            or words[1].startswith("-")
            or any(re.search(r"[A-Z]{4,}|[\[|]", word) for word in words)
        ):
            continue  # no whole command
        arguments = parse_arguments(words)
        if hasattr(arguments, "config"):
            configs.load(arguments.config, arguments.overrides)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_to_is_there(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_new_path_of_the_table_of_moved_files_exists() -> None:
    page = (ROOT / "docs/moved.md").read_text()
    modules, tests = page.split("## Tests")
    for folder, text, least in (("localpipe", modules, 100), ("tests", tests, 10)):
        cells = re.findall(r"^\| `[^|]*` \| (.*) \|$", text, re.MULTILINE)
        paths = [path for cell in cells for path in re.findall(r"`([^`]+)`", cell)]
        assert len(paths) > least
        assert [path for path in paths if not (ROOT / folder / path).exists()] == []


def test_the_reference_is_what_the_code_says() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference.format_page(), (
        "run `python -m localpipe.config.reference > docs/configuration.md`"
    )


def test_the_costs_of_the_methods_are_what_plan_counts() -> None:
    rows = re.findall(
        r"^\| ([\w ]+) \| ([\d.]+) \|(.*)\|$", (ROOT / "docs/methods.md").read_text(), re.MULTILINE
    )
    assert {name for name, *_ in rows} == {"end to end", *registry.METHODS}
    for name, macs, rest in rows:
        words = ["data.name=digits", "data.train_subset=null", "data.image_size=auto"]
        words += ["pipeline.stages=1"] if name == "end to end" else [f"method={name}"]
        given = configs.load(ROOT / "configs/study/base.yaml", words)
        resolved = resolve_here(given, data.load(given.data, 0))
        blueprint, plans = build_plans(resolved)
        stages = [Stage(plan, blueprint, resolved, "meta") for plan in plans]
        adapters = [stage.adapter.parameters() for stage in stages if stage.adapter is not None]
        figures = [cell.strip() for cell in rest.split("|")]
        assert figures[0] == f"{sum(p.numel() for stage in stages for p in stage.auxiliary()):,}", (
            name
        )
        assert figures[1].startswith(f"{sum(p.numel() for each in adapters for p in each):,}, "), (
            name
        )
        assert (
            figures[3] == f"{sum(p.sends.nbytes for p in plans if p.sends is not None) / 2**20:.1f}"
        ), name
        if name in ("end to end", "contsup"):  # the rest takes a step of every stage
            costs = count_costs(blueprint, plans, resolved)
            assert macs == f"{sum(cost.train_macs for cost in costs) / 1e6:.1f}", name
            assert figures[1].endswith(f", {sum(cost.context_macs for cost in costs) / 1e6:.1f}"), (
                name
            )
            assert (
                figures[2]
                == f"{max(cost.activation_bytes_per_sample for cost in costs) / 1024:,.0f}"
            ), name


@pytest.mark.parametrize(
    "name", [name for name in shipped.list_names() if not name.startswith(("clusters/", "papers/"))]
)
def test_every_configuration_that_is_shipped_can_be_planned(name: str) -> None:
    path = shipped.find_path(name)
    assert path is not None and shipped.describe(name)
    digits = ["data.name=digits", "data.train_subset=null", "data.image_size=auto"]
    # The text is always there, and no digit is for a decoder.
    given = configs.load(path, [] if name == "gpt_bytes" else digits)
    if isinstance(given.pipeline.cuts, str) and given.pipeline.cuts in ("time", "memory"):
        given = update(
            given, {"pipeline.cuts": "equal"}
        )  # measured cuts take half a minute, and have their own tests
    resolved = resolve_here(given, data.load(given.data, 0))
    _, plans = build_plans(resolved)
    assert len(plans) == count_stages(given)


def test_every_configuration_that_the_readme_names_is_there_and_parses() -> None:
    named = set(re.findall(r"[\w/]+\.yaml", (ROOT / "README.md").read_text()))
    assert len(named) >= 4
    for name in named:
        configs.load(ROOT / name) if name.startswith(("configs", "examples")) else None
