"""Whether composed pieces are the network: outputs, gradients, buffers, draws and aten calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from localpipe.networks.recorded.recording import Piece, Recording, find_aliases, record

Sample = Callable[[int], tuple[Tensor, ...]]


class CallLog(TorchDispatchMode):
    """Lists the aten calls inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@dataclass
class Outcome:
    """What one pass leaves: the output, the next random numbers, and the aten calls."""

    output: Tensor
    draw: Tensor
    calls: list[str]


def images(*shape: int) -> Sample:
    """Return a sample of images of a shape, the same for every batch of a size."""

    def sample(batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, *shape, generator=generator),)

    return sample


def tokens(length: int, words: int = 11) -> Sample:
    """Return a sample of sequences of words."""

    def sample(batch: int) -> tuple[Tensor, ...]:
        return (torch.arange(batch * length).reshape(batch, length) % words,)

    return sample


def record_network(network: nn.Module, sample: Sample, **options: Any) -> Recording:
    """Return the recording of a network with values, from a copy on the meta device."""
    aliases = find_aliases(network)
    copied = copy.deepcopy(network).to("meta")

    def meta_sample(batch: int) -> tuple[Tensor, ...]:
        return tuple(tensor.to("meta") for tensor in sample(batch))

    return record(copied, meta_sample, aliases=aliases, **options)


def compose(pieces: Sequence[Piece]) -> Callable[..., Any]:
    """Return the function that calls pieces one after another."""

    def call(*inputs: Tensor) -> Any:
        crossing: Any = inputs
        for piece in pieces:
            crossing = piece(*(crossing if isinstance(crossing, tuple) else (crossing,)))
        return crossing

    return call


def check_equal(
    network: nn.Module,
    sample: Sample,
    find_main: Callable[[Any], Tensor] = lambda output: output,
    same_calls: bool = True,
    batches: Sequence[int] = (1, 2, 5),
    **options: Any,
) -> Recording:
    """Assert that the pieces of a network are the network, bit for bit. Return the recording."""
    recording = record_network(network, sample, **options)
    other = copy.deepcopy(network)
    pieces = recording.pieces(other)
    assert len(pieces) == len(recording.names) + 1 > 1

    # Every name of the state is in one piece.
    names = [name for piece in pieces for name in piece.state_dict()]
    assert sorted(names) == sorted(network.state_dict())

    for is_training in (True, False):
        network.train(is_training)
        for piece in pieces:
            piece.train(is_training)
        for batch in batches:
            network.zero_grad()
            other.zero_grad()
            plain = _run(lambda *x: find_main(network(*x)), sample(batch))
            cut = _run(compose(pieces), sample(batch))
            assert torch.equal(plain.output, cut.output), (is_training, batch)
            assert torch.equal(plain.draw, cut.draw)
            if same_calls:
                assert plain.calls == cut.calls
            _check_state(network, other)
    return recording


def _run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Outcome:
    """Run a forward and a backward pass under one seed."""
    torch.manual_seed(7)
    with CallLog() as log:
        output = function(*inputs)
    draw = torch.rand(3)
    weights = torch.linspace(0, 1, output.numel()).view(output.shape)
    output.backward(weights.to(output.dtype))
    return Outcome(output.detach(), draw, log.calls)


def _check_state(network: nn.Module, other: nn.Module) -> None:
    """Assert that gradients and buffers are equal."""
    buffers = dict(other.named_buffers())
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    parameters = dict(other.named_parameters())
    for name, parameter in network.named_parameters():
        expected, gradient = parameter.grad, parameters[name].grad
        assert (expected is None) == (gradient is None), name
        assert expected is None or gradient is None or torch.equal(expected, gradient), name
