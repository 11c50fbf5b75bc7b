"""What cannot be cut is one sentence: the module, the reason, the way out."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from localpipe.networks.recorded.recording import RecordingError, record
from tests.networks.recorded import networks
from tests.networks.recorded.equality import images, record_network, tokens
from tests.networks.recorded.networks import Body

IMAGES = images(3, 8, 8)


def blocks() -> list[nn.Module]:
    return [nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in range(2)]


def scripted() -> Body:
    network = Body(*blocks()).to("meta")
    network.blocks[1] = torch.jit.script(network.blocks[1])
    return network


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "decides": (lambda: networks.Decides(*blocks()), "the forward of Decides .* tensor's values"),
    "item": (lambda: networks.Asks(*blocks()), "the forward of Asks .* tensor's values"),
    "contains": (lambda: networks.Contains(*blocks()), "__contains__"),
    "in a block": (
        lambda: Body(networks.DecidingBlock()),
        r"blocks\.0 \(DecidingBlock\) .* tensor's values",
    ),
    "loop": (lambda: networks.Loops(*blocks()), "loop over the batch"),
    "python": (lambda: networks.PythonRandom(*blocks()), "draws from Python's or numpy's"),
    "numpy": (lambda: networks.NumpyRandom(*blocks()), "draws from Python's or numpy's"),
    "buffer": (lambda: networks.ReplacesBuffer(*blocks()), "in the place of its buffer center"),
    "cache": (
        lambda: networks.Caches(*(networks.CachingBlock() for _ in range(2))),
        "pass each other a Cache",
    ),
    "square": (lambda: networks.SquareBatch(*blocks()), "not linear in the batch"),
    "scripted": (scripted, r"blocks\.1 is a scripted module"),
    "skip": (
        lambda: networks.Reinjects(*blocks()),
        "model.crossing: 2 gives 3 places",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_names_the_module_the_reason_and_the_way_out(case: str) -> None:
    build, expected = REFUSALS[case]
    with pytest.raises(RecordingError) as caught:
        record(build().to("meta"), (3, 8, 8))
    message = str(caught.value)
    assert re.search(expected, message), message
    assert "; " in message and "\n" not in message
    assert message.endswith("blocks()") or "offer blocks()" in message


def test_a_wrong_size_names_the_layer_that_fails() -> None:
    network = Body(*blocks()).to("meta")
    with pytest.raises(RecordingError, match=r"stem \(Conv2d\) fails without values"):
        record(network, (4, 8, 8))
    for module in network.modules():
        assert not module._forward_hooks


def test_tied_weights_leave_no_cut_and_are_named() -> None:
    pattern = "embed.weight = lm_head.weight .* set model.untie: true"
    with pytest.raises(RecordingError, match=pattern):
        record_network(networks.Language(is_tied=True), tokens(5))


def test_a_layout_of_an_unknown_block_names_the_nearest() -> None:
    network = Body(*blocks())
    with pytest.raises(RecordingError, match=r"did you mean blocks\.1\?"):
        record_network(network, IMAGES, layouts={"block.1": "hwc"})
    with pytest.raises(RecordingError, match="expected chw or hwc"):
        record_network(network, IMAGES, layouts={"blocks.1": "td"})


def test_another_architecture_is_refused() -> None:
    recording = record_network(Body(*blocks()), IMAGES)
    with pytest.raises(RecordingError, match=r"has no module blocks\.1"):
        recording.pieces(Body(blocks()[0]))
