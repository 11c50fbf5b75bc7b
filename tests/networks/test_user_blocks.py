"""What a user's network may not be: each is one line, before a worker starts."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.user_network import user_blueprint
from localpipe.pipeline.stages.stage_plan import plan_stages


class Calls(nn.Module):
    """A layer that applies a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def block(inputs: int, layer: nn.Module | None = None) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU()]
    if layer is not None:
        layers.append(layer)
    return nn.Sequential(*layers)


def head() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def with_layer(function: Any, before: Any = None) -> nn.Sequential:
    """Return three blocks and a head; the second ends with a function, the third undoes it."""
    third = block(8)
    if before is not None:
        third = nn.Sequential(Calls(before), *third)
    return nn.Sequential(block(3), block(8, Calls(function)), third, head())


def tuples() -> nn.Sequential:
    return with_layer(lambda _, x: (x, x), lambda _, pair: pair[0])


def dicts() -> nn.Sequential:
    return with_layer(lambda _, x: {"x": x}, lambda _, named: named["x"])


def tuple_in_training() -> nn.Sequential:
    return with_layer(
        lambda layer, x: (x, x) if layer.training else x,
        lambda _, x: x[0] if isinstance(x, tuple) else x,
    )


def tuple_in_evaluation() -> nn.Sequential:
    return with_layer(
        lambda layer, x: x if layer.training else (x, x),
        lambda _, x: x[0] if isinstance(x, tuple) else x,
    )


def tuple_logits() -> nn.Sequential:
    return nn.Sequential(block(3), nn.Sequential(head(), Calls(lambda _, x: (x, x))))


def integer_logits() -> nn.Sequential:
    return nn.Sequential(block(3), nn.Sequential(head(), Calls(lambda _, x: x.long())))


def reads_values() -> nn.Sequential:
    return with_layer(lambda _, x: x / 2 if x.max().item() > 1 else x)


def fails_in_evaluation() -> nn.Sequential:
    return with_layer(lambda layer, x: x if layer.training else x[:, :, :, :, 0])


def one_batch_size() -> nn.Sequential:
    return with_layer(lambda _, x: x.view(2, 8, 8, 8))


def lazy() -> nn.Sequential:
    return nn.Sequential(block(3), nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))


def lazy_norm() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(block(3), nn.LazyBatchNorm2d(affine=False)), head())


def ran_lazy() -> nn.Sequential:
    network = lazy()
    network(torch.zeros(1, 3, 8, 8))
    return network


class Extra(nn.Module):
    """Keeps a number beside its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def get_extra_state(self) -> Any:
        return {"calls": 3}


def extra_state() -> nn.Sequential:
    return nn.Sequential(block(3), block(8, Extra()), head())


def named(name: str) -> nn.Sequential:
    children = [("stem", block(3)), (name, block(8)), ("head", head())]
    return nn.Sequential(OrderedDict(children))


def flat_aux() -> nn.Sequential:
    children = [("stem", block(3)), ("aux", nn.Conv2d(8, 8, 1)), ("exit", head())]
    return nn.Sequential(OrderedDict(children))


@functools.cache
def cached() -> nn.Sequential:
    return with_layer(lambda _, x: x)


STEM = block(3)
WITHOUT_STATE = nn.ReLU()


def cached_stem() -> nn.Sequential:
    return nn.Sequential(STEM, block(8), head())


def cached_activation() -> nn.Sequential:
    return nn.Sequential(block(3, WITHOUT_STATE), block(8, WITHOUT_STATE), head())


WIDTHS = [8, 4]


def grows() -> nn.Sequential:
    WIDTHS.append(WIDTHS[-1] + 1)
    middle = nn.Sequential(nn.Conv2d(8, WIDTHS[-1], 1), nn.Conv2d(WIDTHS[-1], 8, 1))
    return nn.Sequential(block(3), middle, head())


def counting() -> nn.Sequential:
    norm = nn.BatchNorm2d(8, momentum=None)
    return nn.Sequential(block(3, norm), block(8), head())


def integers() -> nn.Sequential:
    return with_layer(lambda _, x: x.long(), lambda _, x: x.float())


def complex_numbers() -> nn.Sequential:
    return with_layer(lambda _, x: torch.fft.fft2(x), lambda _, x: torch.fft.ifft2(x).real)


def folded() -> nn.Sequential:
    return with_layer(
        lambda _, x: torch.cat([x, x]), lambda _, x: x[: len(x) // 2] + x[len(x) // 2 :]
    )


def sequence_first() -> nn.Sequential:
    """The second dimension of its sequences has two entries, as the first batch has."""
    return with_layer(
        lambda _, x: x[:, :, :2, 0].permute(2, 0, 1),
        lambda _, x: x.permute(1, 2, 0)[..., None].expand(-1, -1, -1, 8),
    )


def shape_of_the_mode() -> nn.Sequential:
    return with_layer(lambda layer, x: x[:, :, :4] if layer.training else x)


def blueprint(function: str, **args: Any) -> Blueprint:
    return user_blueprint(f"{__name__}:{function}", (3, 8, 8), 10, args)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("tuples", "child 1 of .* gives tuple in training; expected one tensor"),
        ("dicts", "child 1 of .* gives dict in training; expected one tensor"),
        ("tuple_in_training", "child 1 of .* gives tuple in training"),
        ("tuple_in_evaluation", "child 1 of .* gives tuple in evaluation"),
        ("tuple_logits", "child 1 of .* gives tuple in training"),
        ("integer_logits", "gives int64 numbers; expected one floating-point logit a class"),
        ("reads_values", "child 1 fails in training: RuntimeError: .*may not read any"),
        ("fails_in_evaluation", "child 1 fails in evaluation: IndexError"),
        ("one_batch_size", "child 1 fails in training: RuntimeError"),
        ("lazy", "1.1 of .* is a LazyLinear, .*; give them, or run the network on an image"),
        ("lazy_norm", "0.1 of .* is a LazyBatchNorm2d"),
        ("extra_state", r"1\.2\._extra_state of .* is dict in its state_dict; .* in buffers"),
        ("cached", "returns the same child 0 at every call; .*inside the function, without"),
        ("cached_stem", "returns the same child 0 at every call"),
        ("grows", "returns another architecture at every call"),
    ],
)
def test_what_stages_cannot_train_is_one_line_that_names_the_child(
    function: str, text: str
) -> None:
    with pytest.raises(UserError, match=f"^model: .*{text}") as caught:
        blueprint(function)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["aux", "context", "exit"])
def test_a_child_with_the_name_of_localpipes_networks_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"child {name} of .*; give the child another name"):
        blueprint("named", name=name)


@pytest.mark.parametrize("function", ["flat_aux", "ran_lazy", "cached_activation"])
def test_what_collides_with_nothing_is_accepted(function: str) -> None:
    assert len(blueprint(function).blocks) in (1, 2)


def test_a_refused_network_keeps_its_values() -> None:
    for function, module in (("cached", cached()), ("cached_stem", STEM)):
        with pytest.raises(UserError):
            blueprint(function)
        assert not any(parameter.is_meta for parameter in module.parameters())


def test_a_batch_norm_that_averages_over_all_batches_has_shapes() -> None:
    network = blueprint("counting")
    assert network.shapes() == [(8, 8, 8), (8, 8, 8)]
    (stem,) = network.build([0], 0)
    assert isinstance(stem, nn.Sequential) and isinstance(stem[2], nn.BatchNorm2d)
    assert stem[2].momentum is None


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("integers", "gives int64 numbers"),
        ("complex_numbers", "gives complex64 numbers"),
        ("folded", r"gives the shape \(4, 8, 8, 8\) for 2 images"),
        ("sequence_first", r"gives the shape \(2, 4, 8\) for 4 images"),
        ("shape_of_the_mode", r"gives the shape .* in training and .* in evaluation"),
    ],
)
def test_what_cannot_cross_is_refused_where_the_network_is_cut_and_only_there(
    function: str, text: str
) -> None:
    network = blueprint(function)
    assert len(plan_stages(network, 2, (0,), 4)) == 2
    with pytest.raises(UserError, match=f"^model: block 1 of .*{text}.*move the cut$"):
        plan_stages(network, 2, (1,), 4)
