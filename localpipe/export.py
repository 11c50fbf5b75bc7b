"""One plain state_dict out of a run: the whole network, or the network up to a stage with that stage's own exit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from localpipe.config import Config
from localpipe.errors import RunError, UserError
from localpipe.saved import checkpoint_of, stages_of

SUFFIXES = (".pt", ".safetensors")


def export(run_dir: Path, config: Config, target: Path, exit_stage: int | None) -> int:
    """Write a state_dict with the names of the plain network; return how many tensors it has.

    With `exit_stage` only the blocks up to that stage are written, and its auxiliary network as `exit.*`.
    """
    if target.suffix not in SUFFIXES:
        raise UserError(
            f"export: {target} ends in {target.suffix or 'nothing'!r}; expected one of {', '.join(SUFFIXES)}"
        )
    checkpoint = checkpoint_of(run_dir)
    stages = stages_of(config, checkpoint)
    if exit_stage is not None and not 0 <= exit_stage < len(stages):
        raise UserError(f"export: --exit {exit_stage} is no stage; expected 0 to {len(stages) - 1}")
    weights: dict[str, Tensor] = {}
    for stage in stages[: len(stages) if exit_stage is None else exit_stage + 1]:
        auxiliary = f"aux.{stage.plan.stage}."
        for name, tensor in stage.weights().items():
            if not name.startswith(auxiliary):
                weights[name] = tensor.contiguous()
            elif stage.plan.stage == exit_stage:
                weights[f"exit.{name.removeprefix(auxiliary)}"] = tensor.contiguous()
    _write(target, weights, {"step": str(checkpoint.step), "model": config.model.name})
    return len(weights)


def _write(target: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".pt":
            torch.save(weights, part)
        else:
            save_file(weights, str(part), metadata={"format": "pt", **metadata})
        part.replace(target)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise RunError(f"export: cannot write {target}: {error}") from None
