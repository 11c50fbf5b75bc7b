"""The papers' rows: every command in the heads of configs/papers is planned, and documented."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from localpipe import config as configs
from localpipe.config import shipped
from localpipe.config.keys import Config
from localpipe.config.load import to_dict
from localpipe.config.resolved import Resolved, count_stages
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.stages import stage_plan
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_blueprint
from tests import harness

ROOT = Path(__file__).parent.parent
FILES = [name for name in shipped.list_names() if name.startswith("papers/")]
SIZES = {
    "cifar10": (32, 32), "cifar100": (32, 32), "svhn": (32, 32), "stl10": (96, 96),
    "imagenet": (224, 224), "cityscapes": (512, 1024),
}  # fmt: skip
# The weights of these rows go with their batch or their crop.
OWN_WEIGHTS = ("K = 2, InfoPro softmax, batch 12", "K = 2, InfoPro softmax, 640 x 1280")


def read_rows(name: str) -> Iterator[tuple[str, str, str]]:
    """Yield (row, figure to reach, words) of a file's head, the words as on a command line."""
    path = shipped.find_path(name)
    assert path is not None
    lines = path.read_text(encoding="utf-8").replace("\n#     ", " ").split("\n")
    for about, words in zip(lines, lines[1:], strict=False):
        if re.match(r"#   \S", words):
            row, _, figure = about.removeprefix("# ").rpartition(": ")
            yield row, figure, words.removeprefix("#   ")


ROWS = [(name, *row) for name in FILES for row in read_rows(name)]


def resolve_row(name: str, words: str) -> tuple[Config, Resolved]:
    """Return the configuration of a row as it is given, and resolved without its data."""
    given = configs.load(name, shlex.split(words))
    return given, harness.resolved(to_dict(given), (3, *SIZES[given.data.name]))


def test_every_file_has_rows_and_names_itself() -> None:
    assert len(FILES) >= 20 and {name for name, *_ in ROWS} == set(FILES)
    for name in FILES:
        path = shipped.find_path(name)
        assert path is not None
        text = path.read_text(encoding="utf-8")
        assert f"# localpipe train {name} and the words of a row:" in text
        assert configs.load(name).run.dir == f"runs/{path.stem}"


@pytest.mark.parametrize("name", FILES)
def test_every_row_can_be_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The rows of a file have few networks, whose shapes take most of the time.
    blueprints: dict[str, Blueprint] = {}

    def build_once(config: Resolved) -> Blueprint:
        model = repr(config.model)
        if model not in blueprints:
            blueprints[model] = build_blueprint(config)
        return blueprints[model]

    monkeypatch.setattr(stage_plan, "build_blueprint", build_once)
    for row, _, words in read_rows(name):
        given, config = resolve_row(name, words)
        blueprint, plans = stage_plan.build_plans(config)
        assert blueprint.name == config.model.name and len(plans) == count_stages(given), row
        published = re.match(r"K = (\d+)", row)
        if published:
            assert len(plans) == int(published[1]), row
        # The last local loss is built: what it refuses, it refuses here.
        Stage(plans[max(len(plans) - 2, 0)], blueprint, config, "meta")


def test_the_cut_on_cityscapes_is_the_released_one() -> None:
    """It lies after block 12 of layer3, whose output has 1024 channels at an eighth of the side."""
    name = "papers/infopro_table5_deeplabv3_cityscapes"
    _, config = resolve_row(name, "pipeline.cuts=20 method=infopro method.objective.task=softmax")
    _, plans = stage_plan.build_plans(config)
    assert plans[0].blocks[-1] == "backbone.layer3.12"
    assert plans[0].output_shape == (1024, 64, 128)


def test_every_row_is_in_the_table_of_the_documentation() -> None:
    table = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \| (.*) \| `localpipe train (\S+) (.*)` \| .* \|$", table, re.M)
    assert sorted((name, row, figure, words) for row, figure, name, words in rows) == sorted(ROWS)


def test_published_figures_are_those_of_the_reference() -> None:
    figures = {(name.removeprefix("papers/"), row): figure for name, row, figure, _ in ROWS}
    table2 = "infopro_table2_resnet32_cifar10"
    assert figures[table2, "K = 16, InfoPro contrast"] == "12.75 +- 0.11"
    assert figures["infopro_table2_resnet110_svhn", "K = 8, greedy"] == "5.75 +- 0.10"
    assert figures["infopro_table5_deeplabv3_cityscapes", "K = 2, InfoPro softmax"] == "79.37"
    assert figures["infopro_table4_resnet152_imagenet", "K = 2, InfoPro softmax"] == "21.45 / 5.84"
    assert figures["dgl_vgg13_imagenet", "K = 4, DGL"] == "67.8 / 88.0"
    assert figures["man_resnet32_cifar10", "K = 16, DGL + MAN"] == "9.11"
    assert figures["man_resnet32_cifar10", "K = 8, InfoPro + MAN"] == "9.32"
    assert figures["predsim_vgg11b_cifar10", "K = 11, predsim, 3x"] == "3.97"
    assert figures["predsim_vgg8b_svhn", "K = 8, sim"] == "1.89"
    assert figures["dgl_simple_cnn_cifar10", "K = 4, MLP-SR, learning curves"] == "89.86"
    assert figures["auglocal_resnet110_cifar10", "AugLocal, d = 6"] == "93.96 accuracy"


def test_coefficients_are_those_that_are_published_for_the_row() -> None:
    """Where a file writes weights of InfoPro, they are the defaults for its data and its cut."""
    for name, row, _, words in ROWS:
        if not name.startswith("papers/infopro_") or "InfoPro" not in row or "densenet" in name:
            continue
        if row in OWN_WEIGHTS:
            continue
        given, config = resolve_row(name, words)
        cls, options = given.objective
        plain = cls.Options(task=options.task)
        cuts = config.pipeline.cuts
        default = cls.resolved(plain, given.model.name, given.data.name, cuts, count_stages(given))
        assert (options.image_weight, options.task_weight) == (
            default.image_weight, default.task_weight
        ), row  # fmt: skip


def test_the_rows_of_man_have_the_copies_of_the_paper() -> None:
    for name, row, _, words in ROWS:
        if not row.endswith("+ MAN"):
            continue
        _, config = resolve_row(name, words)
        feedback = config.method.feedback
        assert (feedback.mode, feedback.every, feedback.lag) == ("block", 16, 16)
        assert (feedback.momentum, feedback.combine) == (0.995, "sum")
        assert config.method.objective["name"] == ("infopro" if "InfoPro" in row else "dgl")


def test_the_rows_of_predsim_have_a_stage_a_hidden_layer_and_one_more() -> None:
    for name, row, _, words in ROWS:
        if not name.startswith("papers/predsim_"):
            continue
        given, config = resolve_row(name, words)
        args = given.model.args
        if row.startswith("global loss"):
            assert (count_stages(given), args["slope"], args["zero_start"]) == (1, 0, False), row
            continue
        # Local losses have a LeakyReLU, but for pred, and classifiers that begin at 0.
        loss = config.method.objective["loss"]
        assert config.pipeline.cuts == "layerwise" and f", {loss}" in row
        assert args["zero_start"] and config.method.objective["zero_start"]
        assert args["slope"] == (0 if loss == "pred" else 0.01), row
