"""Composed pieces are the network bit for bit: outputs, gradients, buffers, draws, aten calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from localpipe.networks.recorded.memory_format import memory_order
from localpipe.networks.recorded.recording import Recording, RecordingError, record
from tests.networks.recorded import networks
from tests.networks.recorded.equality import check_equal, compose, images, record_network, tokens
from tests.networks.recorded.networks import Body, Residual
from tests.sample_networks import Guided

IMAGES = images(3, 8, 8)


def conv(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True))


def bodies(kind: type[Body]) -> Body:
    """Return a body of four residual blocks."""
    return kind(*(Residual() for _ in range(4)))


@pytest.mark.parametrize(
    "kind",
    [
        networks.Body,
        networks.InPlace,
        networks.Views,
        networks.Contexts,
        networks.Custom,
        networks.Counting,
        networks.PlainTensor,
        networks.Positions,
    ],
)
def test_bodies_of_residual_blocks(kind: type[Body]) -> None:
    # Values that depend on sizes alone are computed once, when they decide.
    recording = check_equal(bodies(kind), IMAGES, same_calls=kind is not networks.Positions)
    assert recording.names == ("stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert recording.tail_name == "fc"


def test_batch_normalisation_without_momentum() -> None:
    network = networks.residual(momentum=None)
    check_equal(network, IMAGES)
    assert network.blocks[0].bn1.momentum is None


def test_blocks_that_draw_from_python_draw_again() -> None:
    network = Body(*(networks.RandomBlock() for _ in range(2)))
    recording = record_network(network, IMAGES)
    network.eval()
    draws = [compose(recording.pieces(network))(*IMAGES(2)) for _ in range(2)]
    assert not torch.equal(*draws)


def test_a_tensor_that_the_first_call_keeps() -> None:
    # The network makes it once, the pieces make it in every call.
    recording = check_equal(bodies(networks.Caching), IMAGES, same_calls=False)
    assert len(recording.names) == 5


def test_places_are_the_same_in_training_and_evaluation() -> None:
    network = Body(*(Residual() for _ in range(3)))
    recording = record_network(network, IMAGES)
    assert recording.names == ("stem", "blocks.0", "blocks.1", "blocks.2")
    shifted = check_equal(networks.Shifted(*(Residual() for _ in range(3))), IMAGES)
    for training, evaluation in _piece_modules(shifted):
        assert training == evaluation


def _piece_modules(recording: Recording) -> list[tuple[list[str], list[str]]]:
    """Return the modules that every piece calls, in training and in evaluation."""
    modules = []
    for programs in recording._programs:
        both = []
        for is_training in (True, False):
            steps = [instruction.step for instruction in programs[is_training].instructions]
            both.append([step.module for step in steps if step.module is not None])
        modules.append((both[0], both[1]))
    return modules


def test_a_module_that_is_called_twice_stays_in_one_piece() -> None:
    recording = check_equal(bodies(networks.Twice), IMAGES)
    assert recording.names == ("stem", "blocks.0", "blocks.1", "blocks.3")


def test_layers_of_a_plain_sequential() -> None:
    network = nn.Sequential(
        conv(3), nn.Sequential(conv(3), conv(3)), nn.Flatten(), nn.Linear(192, 4)
    )
    network[0] = nn.Sequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(1))
    recording = check_equal(network, IMAGES)
    assert recording.names == ("0", "1.0", "1.1") and recording.tail_name == "3"


def test_a_permuted_boundary_comes_with_its_order() -> None:
    network = Body(*(networks.Permuted() for _ in range(3)))
    recording = check_equal(network, IMAGES)
    orders = [output.order for output in recording.outputs]
    assert orders == [(), (1, 2, 0), (1, 2, 0), (1, 2, 0)]
    pieces = recording.pieces(network.eval())
    assert pieces[1](pieces[0](*IMAGES(2))).stride() == (512, 1, 64, 8)


def test_the_order_in_memory_is_the_one_of_the_kernels() -> None:
    # The last map has one place, where the order shows in strides alone.
    network = Body(*(networks.Downsample() for _ in range(3))).eval()
    recording = record_network(network, IMAGES)
    assert [output.order for output in recording.outputs] == [(1, 2, 0)] * 4
    h = IMAGES(2)[0]
    for piece, output in zip(recording.pieces(network), recording.outputs, strict=False):
        h = piece(h)
        assert memory_order(h) == output.order


def test_a_transformer_without_images() -> None:
    network = networks.Language(is_tied=False)
    # Every piece makes the mask again, so there are more calls.
    recording = check_equal(network, tokens(5), lambda output: output["logits"], same_calls=False)
    assert recording.names == ("embed", "blocks.0", "blocks.1", "blocks.2")


def test_a_vision_transformer() -> None:
    recording = check_equal(networks.Tokens(), IMAGES)
    layers = tuple(f"encoder.layers.{index}" for index in range(3))
    assert recording.names == ("patch", *layers)
    assert {output.shape for output in recording.outputs} == {(17, 8)}


@pytest.mark.parametrize("is_always", [True, False])
@pytest.mark.parametrize("crossing", [1, 2])
def test_an_auxiliary_classifier_is_kept_in_training_where_it_is_asked_for(
    crossing: int, is_always: bool
) -> None:
    network = networks.Auxiliary(*(conv() for _ in range(4)))
    network.is_always = is_always
    recording = record_network(network, IMAGES, crossing=crossing, extra_names=("aux",))
    assert not recording.unused
    # After later blocks the input of the auxiliary classifier crosses too, in both modes alike.
    crosses = crossing == 2 and is_always
    wide = ("aux", "blocks.2", "blocks.3") if crosses else ()
    assert recording.names == ("stem", "blocks.0", "blocks.1", *wide)
    run_pieces = compose(recording.pieces(network.train()))
    outputs, expected = run_pieces(*IMAGES(2)), network(*IMAGES(2))
    assert torch.equal(outputs[0], expected["out"]) and torch.equal(outputs[1], expected["aux"])

    # An evaluation does not run it, unless its output crosses.
    calls: list[None] = []
    network.aux[1].register_forward_hook(lambda *_: calls.append(None))
    outputs = compose(recording.pieces(network.eval()))(*IMAGES(2))
    assert len(calls) == crosses and torch.equal(outputs, network(*IMAGES(2))["out"])


LARGE = images(3, 12, 20)


def test_an_evaluation_may_have_inputs_of_another_size() -> None:
    network = Guided()
    recording = record_network(network, IMAGES, evaluation_sample=LARGE)
    assert recording.names == ("stem", "early", "middle", "late")
    assert [output.shape for output in recording.outputs] == [(8, 4, 4)] * 4
    assert [output.shape for output in recording.resized_outputs] == [(8, 6, 10)] * 4
    pieces = recording.pieces(network)
    for is_training, sample in ((True, IMAGES), (False, LARGE), (False, IMAGES)):
        network.train(is_training)
        for piece in pieces:
            piece.train(is_training)
        assert torch.equal(compose(pieces)(*sample(2)), network(*sample(2))["out"])
        # A whole network's pieces do the same under a copy.
        copied = copy.deepcopy(pieces)
        assert torch.equal(compose(copied)(*sample(2)), network(*sample(2))["out"])


def test_a_network_without_a_cut_may_have_inputs_of_another_size() -> None:
    network = Guided()
    recording = record_network(network, IMAGES, is_whole=True, evaluation_sample=LARGE)
    pieces = recording.pieces(network.eval())
    for sample in (IMAGES, LARGE):
        assert torch.equal(compose(pieces)(*sample(2)), network(*sample(2))["out"])


def test_a_cut_where_both_sizes_have_one_shape_is_left_out() -> None:
    network = networks.Pooled()
    assert record_network(network, IMAGES).names == ("stem", "first")
    recording = record_network(network, IMAGES, evaluation_sample=LARGE)
    assert recording.names == ("stem",)
    pieces = recording.pieces(network.eval())
    for sample in (IMAGES, LARGE):
        assert torch.equal(compose(pieces)(*sample(2)), network(*sample(2)))


def test_an_auxiliary_classifier_is_dropped_in_training() -> None:
    network = networks.Auxiliary(*(conv() for _ in range(4)))
    recording = record_network(network, IMAGES)
    assert recording.unused == ("aux.0.weight", "aux.0.bias", "aux.1.weight", "aux.1.bias")
    pieces = recording.pieces(network)
    names = [name for piece in pieces for name in piece.state_dict()]
    assert sorted(names) == sorted(network.state_dict())
    assert "aux.0.running_mean" in pieces[-1].state_dict()

    before = network.aux[0].running_mean.clone()
    assert torch.equal(compose(pieces)(*IMAGES(2)), network.eval()(*IMAGES(2))["out"])
    assert torch.equal(network.aux[0].running_mean, before)


@pytest.mark.parametrize("kind", [networks.LongSkip, networks.WrittenSkip])
def test_a_skip_travels_beside_the_main_tensor(kind: type[Body]) -> None:
    recording = check_equal(
        bodies(kind), IMAGES, crossing=2, same_calls=kind is not networks.WrittenSkip
    )
    assert [len(output.companions) for output in recording.outputs] == [0, 1, 1, 1, 0]


def test_a_companion_is_never_written_into() -> None:
    network = bodies(networks.WrittenSkip).eval()
    pieces = record_network(network, IMAGES, crossing=2).pieces(network)
    main, skip = pieces[1](pieces[0](*IMAGES(2)))
    before = skip.clone()
    _, written = pieces[2](main.clone(), skip)
    assert torch.equal(skip, before) and not torch.equal(written, before)


def test_a_unet_is_cut_where_two_tensors_are_alive() -> None:
    recording = check_equal(networks.UNet(), IMAGES, crossing=2)
    assert recording.names == ("down1", "down2", "middle", "up2", "up1")
    assert [len(output.companions) for output in recording.outputs] == [0, 1, 1, 0, 0]
    assert record_network(networks.UNet(), IMAGES).names == ("down1", "down2.0", "up1")


def test_two_windows_on_one_memory_do_not_cross() -> None:
    recording = check_equal(networks.Windows(), IMAGES, crossing=2)
    assert recording.names == ("stem", "right")


@pytest.mark.parametrize("crossing", [3, 8])
def test_a_unet_is_cut_anywhere(crossing: int) -> None:
    recording = check_equal(networks.UNet(), IMAGES, crossing=crossing)
    assert len(recording.names) == 5


def test_tied_weights_stay_in_one_piece() -> None:
    network = networks.Language(is_tied=True)
    with pytest.raises(RecordingError, match="embed.weight = lm_head.weight"):
        record_network(network, tokens(5))


def test_recording_leaves_modes_generators_and_hooks_alone() -> None:
    network = bodies(networks.Body).to("meta")
    network.blocks[1].eval()
    modes = [module.training for module in network.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    recording = record(network, (3, 8, 8))
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in network.modules()] == modes
    for module in network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert recording.names[1] == "blocks.0"


def test_a_batch_of_any_size_is_the_same_tape() -> None:
    def sizes(output: Any) -> Any:
        return output["logits"]

    check_equal(
        networks.Language(is_tied=False), tokens(3), sizes, batches=(1, 3, 7), same_calls=False
    )
