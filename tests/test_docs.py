"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from localpipe import config, job, registry
from localpipe.planner import measure
from tests.pipeline import settings

ROOT = Path(__file__).parent.parent


def test_the_objective_that_contributing_shows_works_as_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(from dataclasses.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "shown_in_contributing.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "OBJECTIVES", {**registry.OBJECTIVES, "linear": "shown_in_contributing:Linear"})
    method = {"objective": {"name": "linear", "bias": False}, "context": {"mode": "E"}, "reconcile": {"distance": "l2"}}
    resolved = settings(tmp_path / "run", method=method)
    costs = measure(*job.plans_of(resolved, job.image_of(resolved)), resolved)
    assert [cost.aux_params for cost in costs] == [5120, 5120, 1280, 0]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/house.md", "docs/report.md", "docs/prediction.md"]
)
def test_every_file_that_a_page_links_to_is_there(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_configuration_that_the_readme_names_is_there_and_parses() -> None:
    named = set(re.findall(r"[\w/]+\.yaml", (ROOT / "README.md").read_text()))
    assert len(named) >= 4
    for name in named:
        config.load(ROOT / name) if name.startswith(("configs", "examples")) else None
