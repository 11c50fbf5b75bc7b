"""What a local loss writes into. It gets copies of that, and nothing else is copied.

The first layer of a head or of a copied block may write into its input in place. But the input of a
local loss is read after it: the activation is sent, a probe learns from it, and the gradient at it
is a message too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from localpipe import seeds
from localpipe.errors import RunError
from localpipe.methods.objective import LocalLoss
from localpipe.networks.blueprint import to_meta
from localpipe.pipeline.channels.message import empty_rows
from localpipe.pipeline.stages.codecs import FP32
from localpipe.pipeline.stages.replicas import Replicas
from localpipe.pipeline.stages.stage_plan import StagePlan, activation_fields

ACTIVATION = "h"  # no field has this name
_ROWS = 2


def find_written_inputs(
    objective: LocalLoss, plan: StagePlan, replicas: Replicas, kept: Sequence[object]
) -> frozenset[str]:
    """Return the names of what a local loss writes into: `h`, and fields of the message.

    A copy of the objective is tried on the meta device, without values. The objective itself and
    the generators stay as they are, and replicas are not called. `kept` are objects that the copy
    shares with the objective. Where the copy cannot be made or run, all names are returned.
    """
    output, *companions = activation_fields(plan.output, plan.gives, FP32)
    h = empty_rows(output, _ROWS)
    inputs = {ACTIVATION: h if plan.is_last else plan.gives.to_standard(h)}
    for field in [*plan.receives.fields, *companions]:
        inputs[field.name] = empty_rows(field, _ROWS)
    h = inputs[ACTIVATION]
    fields = {name: tensor for name, tensor in inputs.items() if name != ACTIVATION}
    versions = {name: tensor._version for name, tensor in inputs.items()}

    try:
        with seeds.preserved_generators(), torch.no_grad():
            _copy_without_values(objective, replicas, kept)(h, fields)
    except Exception:
        return frozenset(inputs)
    return frozenset(name for name, tensor in inputs.items() if tensor._version != versions[name])


def copy_inputs(
    names: frozenset[str], h: Tensor, fields: Mapping[str, Tensor]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return h and the fields, with copies of those in `names`. A copy of h keeps the graph.

    Without a name, both come back as they are. Names that `fields` lacks are ignored.
    """
    if ACTIVATION in names:
        h = h.clone()
    written = [name for name in fields if name in names]
    if written:
        fields = {**fields, **{name: fields[name].clone() for name in written}}
    return h, fields


def input_versions(h: Tensor, fields: Mapping[str, Tensor]) -> dict[str, int]:
    """Return torch's count of the writes into h and into every field, by name."""
    versions = {name: tensor._version for name, tensor in fields.items()}
    versions[ACTIVATION] = h._version
    return versions


def check_unwritten(stage: int, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Raise RunError if a count of `input_versions` has changed: the trial missed a write."""
    for name, version in before.items():
        if after[name] != version:
            raise RunError(
                f"the loss of stage {stage} wrote into its input {name} in place; it did not where "
                "it was tried without values; expected every step to write the same; "
                "use operations that are not in place there, as nn.ReLU(inplace=False)"
            )


def _copy_without_values(
    objective: LocalLoss, replicas: Replicas, kept: Sequence[object]
) -> LocalLoss:
    """Return a copy of the objective on the meta device, for a single replica."""
    memo: dict[int, Any] = {id(replicas): Replicas()}
    for shared in kept:
        memo[id(shared)] = shared
    for parameter in objective.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in objective.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    trial = copy.deepcopy(objective, memo)
    to_meta(trial)
    return trial
