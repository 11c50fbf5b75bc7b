"""Random streams: the generators of torch, numpy and Python follow from the seed alone."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from localpipe import seeds
from localpipe.config.user_code import import_user_code
from localpipe.networks.user_network import user_blueprint
from localpipe.pipeline.channels.message import Header, Kind, Message
from tests.harness import differences, run, settings
from tests.pipeline.stages.test_stage import stages_of


def draw() -> list[float]:
    """Return one number of each generator: torch's, numpy's uniform and normal, and Python's."""
    return [float(torch.rand(())), np.random.rand(), np.random.randn(), random.random()]


class Noisy(nn.Module):
    """Adds noise of numpy and a shift of Python, in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.is_meta:
            return x
        noise = torch.from_numpy(np.random.standard_normal(tuple(x.shape))).float()
        return x + 0.1 * noise + random.random()


def drawn(num_classes: int = 10) -> nn.Sequential:
    """Return a network whose weights numpy and Python draw, and whose blocks draw in training."""

    def block(inputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), Noisy())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    network = nn.Sequential(block(3), block(8), block(8), head)
    with torch.no_grad():
        for parameter in network.parameters():
            values = np.random.normal(0, 0.1, tuple(parameter.shape)) + random.gauss(0, 0.01)
            parameter.copy_(torch.as_tensor(values))
    return network


def test_a_stream_seeds_all_three_generators() -> None:
    seeds.enter_stream(5, "stage", 1)
    first = draw()
    draw()
    seeds.enter_stream(5, "stage", 1)
    assert draw() == first
    seeds.enter_stream(5, "stage", 2)
    assert all(a != b for a, b in zip(first, draw(), strict=True))


def test_torchs_own_stream_is_the_one_of_its_seed() -> None:
    """It was so before numpy and Python were seeded, and dropout must stay as it was."""
    seeds.enter_stream(0, "stage", 0, 0, 1)
    expected = torch.rand(
        4, generator=torch.Generator().manual_seed(seeds.derive(0, "stage", 0, 0, 1))
    )
    assert torch.equal(torch.rand(4), expected)


def test_half_a_pair_of_normal_numbers_does_not_outlive_a_stream() -> None:
    """numpy and Python draw normal numbers in pairs, and keep the second."""
    found = []
    for draws in (0, 1):
        seeds.enter_stream(0, "other")
        for _ in range(draws):
            np.random.randn()
            random.gauss(0, 1)
        seeds.enter_stream(0, "stage")
        found.append((np.random.randn(), random.gauss(0, 1)))
    assert found[0] == found[1]


def test_a_unit_is_drawn_from_its_seed_and_leaves_the_generators_alone() -> None:
    seeds.enter_stream(1)
    expected = draw()

    seeds.enter_stream(1)
    first = seeds.build_unit(0, "block", draw)
    assert draw() == expected
    assert seeds.build_unit(0, "block", draw) == first
    assert (
        seeds.build_unit(0, "other", draw) != first and seeds.build_unit(1, "block", draw) != first
    )


def test_a_unit_inside_a_unit_takes_no_draw_of_the_outer_one() -> None:
    alone = seeds.build_unit(0, "outer", draw)

    def build() -> list[float]:
        seeds.build_unit(0, "inner", draw)
        return draw()

    assert seeds.build_unit(0, "outer", build) == alone


def test_a_unit_that_cannot_be_built_leaves_the_generators_alone() -> None:
    def fail() -> None:
        draw()
        raise ValueError

    seeds.enter_stream(1)
    expected = draw()
    seeds.enter_stream(1)
    with pytest.raises(ValueError):
        seeds.build_unit(0, "block", fail)
    assert draw() == expected


def test_checking_a_users_network_draws_nothing_of_the_callers() -> None:
    seeds.enter_stream(1)
    expected = draw()
    seeds.enter_stream(1)
    user_blueprint("tests.test_seeds:drawn", (3, 8, 8), 10, {})
    assert draw() == expected


def test_what_a_module_draws_while_it_is_imported_is_the_same_in_every_process(
    tmp_path: Path,
) -> None:
    found = []
    for number in (1, 2):
        path = tmp_path / f"drawing_{number}.py"
        path.write_text(
            "import random\nimport numpy as np\nnumbers = [np.random.rand(), random.random()]\n"
            "def get():\n    return numbers\n"
        )
        seeds.enter_stream(number)
        found.append(import_user_code(f"{path}:get", "model.name")())
        assert draw()[1:] != found[-1]
    sys.path[:] = [each for each in sys.path if each != str(tmp_path)]
    assert found[0] == found[1]


def test_weights_and_noise_of_numpy_and_python_do_not_depend_on_the_processes(
    tmp_path: Path,
) -> None:
    one, three = (
        run(
            settings(
                tmp_path / str(processes),
                model={"name": "tests.test_seeds:drawn"},
                pipeline={"stages": 3, "processes": processes},
                data={"samples": 32},
            )
        )
        for processes in (1, 3)
    )
    assert differences(one, three) == []


def test_noise_of_numpy_and_python_follows_from_stage_and_step_alone(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"name": "tests.test_seeds:drawn"},
        "pipeline": {"stages": 3},
    }
    stage = stages_of(settings(tmp_path, **sections))[1]
    fields = {"h.0": torch.randn(4, 8, 8, 8), "target": torch.zeros(4, dtype=torch.int64)}

    def output(step: int) -> Tensor:
        return stage.forward(Message(Header(Kind.TRAIN, step, 1, 4), fields))

    first = output(1)
    draw()  # somebody else
    assert torch.equal(first, output(1))
    assert not torch.equal(first, output(2))
