"""What enters a stage and what leaves it: decoding, context, encoding, copies before the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from localpipe.config.resolved import Resolved
from localpipe.fields import IMAGE, INPUT
from localpipe.methods.context import Adapter
from localpipe.pipeline.stages.codecs import Codec
from localpipe.pipeline.stages.stage_plan import (
    StagePlan,
    companion_field,
    context_field,
    gradient_field,
)


class Normalise(nn.Module):
    """Images (B, C, H, W) of values in 0..255 to floats of the data set's mean 0 and deviation 1.

    mean, std: one number per channel, of images in 0..1. Both are buffers outside of state_dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return new fp32 images, (image - mean) / std, of the shape (B, C, H, W) of `image`."""
        return (image.float() - self.mean) / self.std


def build_entry(config: Resolved) -> nn.Module:
    """Return the module before the first block: `Normalise` for images of bytes, else nothing."""
    if config.inputs.name == IMAGE:
        return Normalise(config.data.mean, config.data.std)
    return nn.Identity()


class Boundary:
    """Reads the received fields of one stage and builds the fields that the next stage gets.

    Received tensors are read-only, and the first layer of the blocks may write in place. So the
    blocks get a copy if the stage differentiates its input or sends it on.

    `leaf` is the received activation of this message, if its gradient is needed, else None.
    It is (B, *input_shape). `merged` is the input of the blocks without gradient, in its standard
    form, if a later stage reads it, else None. `read_input` sets both.
    """

    def __init__(
        self,
        plan: StagePlan,
        codec: Codec,
        entry: nn.Module,
        adapter: Adapter | None,
        differentiates_input: bool,
    ) -> None:
        self.leaf: Tensor | None = None
        self.merged: Tensor | None = None
        self._plan = plan
        self._codec = codec
        self._entry = entry
        self._adapter = adapter
        self._differentiates_input = differentiates_input
        self._is_input_read_later = _is_input_read_later(plan)
        self._decoded = {field.name: field for field in plan.decoded}
        self._made = {field.name: field for field in plan.made_fields}
        self._target_dtype = _find_target_dtype(plan)

    def read_input(self, fields: Mapping[str, Tensor], training: bool) -> Tensor:
        """Return the input of the blocks, (B, *input_shape) in fp32, merged with its context.

        fields: the received tensors, encoded. training: whether `leaf` is set, where the stage
        differentiates its input. Each call replaces `leaf` and `merged`. The result may be a window
        on the received tensor. It lies in memory as the boundary says. Raises KeyError if a field
        is missing.
        """
        takes = self._plan.takes
        x = self._read_field(fields, self._plan.input)
        self.leaf = None
        if training and self._differentiates_input:
            self.leaf = x.detach().requires_grad_()
            x = self.leaf.clone()
        if self._adapter is not None:
            sources = {name: self._read_field(fields, name) for name in self._adapter.fields}
            x = takes.from_standard(self._adapter(takes.to_standard(x), sources))
        self.merged = None
        if self._is_input_read_later:
            self.merged = takes.to_standard(x.detach())
            x = x.clone()
        return x

    def read_companions(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the companions of the blocks' input, (B, ...) each, in the dtypes of the network.

        fields: as of `read_input`. They are constants, perhaps windows, and no block writes into
        them. Raises KeyError if one is missing.
        """
        companions = []
        for number, companion in enumerate(self._plan.takes.companions, 1):
            name = companion_field(self._plan.input, number)
            if companion.dtype == "float32":
                companions.append(self._decode(fields, name))
            else:
                companions.append(fields[name])
        return tuple(companions)

    def read_gradient(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the sender's gradient at the received activation, per sample, in fp32.

        Shape (B, *input_shape), perhaps a window. Raises KeyError if the message carries no
        gradient.
        """
        return self._decode(fields, gradient_field(self._plan.stage - 1))

    def build_outgoing(
        self,
        fields: Mapping[str, Tensor],
        h: Tensor,
        gradient: Tensor | None,
        companions: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Return the received fields and, encoded, the raw output, the context and the gradient.

        h: (B, *output_shape). gradient: like h, or None to add none. companions: of h, as the
        blocks gave them. All received names come first, as they are. Then follow `h.STAGE` and its
        companions, `ctx.J` if `merged` is set, and `grad.STAGE`, each as the codec's fields. The
        tensors have no graph, and may share memory with the arguments.
        """
        stage = self._plan.stage
        outgoing = dict(fields)
        if self._target_dtype is not None and "target" in fields:
            # A data set may have masks of int64, which cross as bytes.
            outgoing["target"] = fields["target"].to(self._target_dtype)
        outgoing.update(self._encode(self._plan.output, h.detach()))
        for number, tensor in enumerate(companions, 1):
            outgoing.update(self._encode_companion(tensor, number))
        if self.merged is not None:
            outgoing.update(self._encode(context_field(stage - 1), self.merged))
        if gradient is not None:
            outgoing.update(self._encode(gradient_field(stage), gradient))
        return outgoing

    def _encode_companion(self, tensor: Tensor, number: int) -> dict[str, Tensor]:
        """Return a companion as it crosses. Autocast may have given it another dtype than fp32."""
        name = companion_field(self._plan.output, number)
        dtype: torch.dtype = getattr(torch, self._plan.gives.companions[number - 1].dtype)
        tensor = tensor.detach().to(dtype)
        if dtype == torch.float32:
            return self._encode(name, tensor)
        return {name: tensor}

    def _encode(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return self._codec.encode(self._made[name], tensor)

    def _decode(self, fields: Mapping[str, Tensor], name: str) -> Tensor:
        return self._codec.decode(self._decoded[name], fields)

    def _read_field(self, fields: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in (IMAGE, INPUT):
            return self._decode(fields, name)
        inputs: Tensor = self._entry(fields[name])
        return inputs


def _find_target_dtype(plan: StagePlan) -> torch.dtype | None:
    """Return the dtype of the targets that a stage sends, or None where it sends none."""
    if plan.sends is None:
        return None
    for field in plan.sends.fields:
        if field.name == "target":
            dtype: torch.dtype = getattr(torch, field.dtype)
            return dtype
    return None


def _is_input_read_later(plan: StagePlan) -> bool:
    """Return whether a later stage reads the input of this stage's blocks."""
    if plan.is_first or plan.sends is None:
        return False
    return plan.sends.has(context_field(plan.stage - 1))
