"""torchvision's networks for segmentation: planned, trained with their auxiliary heads, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans
from tests.harness import settings, train_here


def configured(folder: Path, network: str, name: str = "shapes") -> Resolved:
    return settings(
        folder,
        model={"name": f"torchvision:{network}"},
        data={"name": name, "samples": 4, "image_size": 32, "batch_size": 4, "augment": "none"},
        method={"objective": {"name": "dgl"}},
        pipeline={"stages": 3},
        optim={"epochs": 1},
    )


@pytest.mark.parametrize("network", ["fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_a_network_for_segmentation_gives_the_classes_of_every_pixel(
    tmp_path: Path, network: str
) -> None:
    blueprint, plans = build_plans(configured(tmp_path, network))
    assert blueprint.task.output_shape == (4, 32, 32) and len(plans) == 3
    assert blueprint.build_original is not None
    assert not any("aux" in name for name, _ in blueprint.build_original().named_children())


def test_a_network_for_segmentation_trains_in_stages(tmp_path: Path) -> None:
    for stage in train_here(configured(tmp_path, "lraspp_mobilenet_v3_large")):
        stage.check_finite()


@pytest.mark.parametrize("weight", [0.4, 0.0])
def test_an_auxiliary_head_is_trained_unless_its_weight_is_0(tmp_path: Path, weight: float) -> None:
    config = settings(
        tmp_path,
        model={"name": "tests.sample_networks:Guided"},
        data={"name": "shapes", "samples": 8, "image_size": 16, "batch_size": 4, "augment": "none"},
        pipeline={"stages": 2},
        task={"aux_weight": weight},
        optim={"epochs": 1},
    )
    blueprint, plans = build_plans(config)
    initial = Stage(plans[-1], blueprint, config).weights()
    *_, stage = train_here(config)
    is_moved = {name: not torch.equal(stage.weights()[name], initial[name]) for name in initial}
    assert is_moved == {name: weight > 0 or not name.startswith("aux.") for name in initial}
    assert any("aux.weight" in note for note in blueprint.notes) is (weight == 0)


def test_an_unknown_network_for_segmentation_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean fcn_resnet50"):
        build_blueprint(configured(tmp_path, "fcn_resnet5"))


def test_a_network_for_segmentation_is_refused_for_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a network for segmentation; expected one that"):
        build_blueprint(configured(tmp_path, "fcn_resnet50", "areas"))
