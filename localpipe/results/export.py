"""One file out of a run, for use, and back: weights, a program that runs without localpipe, and a model card beside them.

net.pt, net.safetensors   a state_dict with the names of the plain network, and what `load` builds it from
net.pt2                   where it is more than the plain network, or asked for: the network itself, by torch.export
net.md                    the model card, with what was measured
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import localpipe
from localpipe.config.load import as_resolved
from localpipe.config.resolved import Resolved
from localpipe.config.user_code import describe_exception, is_user_code
from localpipe.errors import RunError, UserError
from localpipe.results.exported import (
    Description,
    Network,
    build_exported,
    describe_network,
    has_exit,
)
from localpipe.results.model_card import card_text
from localpipe.runs.checkpoint import Checkpoint
from localpipe.runs.directory import read_config, require_checkpoint

SUFFIXES = (".pt", ".safetensors", ".pt2")
_KEY = "localpipe"


def export(run_dir: Path, config: Resolved, target: Path, exit_stage: int | None) -> list[Path]:
    """Write a run's network, or the network up to a stage with that stage's exit; return the files written."""
    if target.suffix not in SUFFIXES:
        raise UserError(
            f"export: {target} ends in {target.suffix or 'nothing'!r}; expected one of {', '.join(SUFFIXES)}"
        )
    checkpoint = require_checkpoint(run_dir)
    stages = config.pipeline.stages
    assert stages is not None
    if exit_stage is not None and not 0 <= exit_stage < stages:
        raise UserError(f"export: --exit {exit_stage} is no stage; expected 0 to {stages - 1}")
    description = _described(config, exit_stage, checkpoint)
    built = _restored(description, checkpoint)
    written = []
    if target.suffix != ".pt2":
        about = description.to_json(step=checkpoint.step, localpipe=localpipe.__version__)
        _write(target, _writer(target, built, about))
        written.append(target)
    if (
        target.suffix == ".pt2" or not description.is_plain or target.with_suffix(".pt2").exists()
    ):  # none stays stale
        written.append(target.with_suffix(".pt2"))
        _write(written[-1], _program_writer(built, config))
    text = card_text(
        run_dir, config, description, built, checkpoint.step, [path.name for path in written]
    )
    _write(target.with_suffix(".md"), lambda part: _write_text(part, text))
    return [*written, target.with_suffix(".md")]


def load(file: str | Path, *, trust: bool = False) -> nn.Module:
    """Return the network in a file that `localpipe export` wrote, or of a run directory, in evaluation mode, on the CPU.

    It takes images (B, C, H, W), uint8 as they are stored, or floats that are normalised already (a .pt2 takes uint8 only),
    and gives (B, classes) logits. `trust` lets it import code that the file names. Raises UserError for any other file.
    """
    path = Path(file)
    if path.is_dir():
        return _restored(
            describe_network(as_resolved(read_config(path, (), trust)), None),
            require_checkpoint(path),
        )
    if not path.is_file():
        raise UserError(
            f"load: there is no {path}; give what `localpipe export` wrote, or a run directory"
        )
    if path.suffix == ".pt2":
        return _load_program(path)
    weights, text = _read(path)
    try:
        description = Description.from_json(text)
        _check_trust(path, description, trust)
        built = build_exported(description, str(path))
        built.load_state_dict(weights)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"load: {path} does not hold the network that it describes: {describe_exception(error)}"
        ) from None
    return built


def _restored(description: Description, checkpoint: Checkpoint) -> Network:
    built = build_exported(description, str(checkpoint.path))
    weights = _weights(checkpoint, description)
    built.load_state_dict({name: weights[name] for name in built.state_dict()})
    return built


def _described(config: Resolved, exit_stage: int | None, checkpoint: Checkpoint) -> Description:
    """Return the description, with the probe as the exit where a stage has none of its own."""
    description = describe_network(config, exit_stage)
    index = description.exit
    if index is None or has_exit(config, index):
        return description
    return Description(
        description.config, index, probe=checkpoint.stage(index).get("probe") is not None
    )


def _weights(checkpoint: Checkpoint, description: Description) -> dict[str, Tensor]:
    """Return what of a checkpoint the described network has, under its names there."""
    last = int(checkpoint.manifest["stages"]) - 1 if description.exit is None else description.exit
    weights: dict[str, Tensor] = {}
    for index in range(last + 1):
        state = checkpoint.stage(index)
        auxiliary = f"aux.{index}."
        named_here: dict[str, Tensor] = state["weights"]
        weights.update(
            {name: tensor for name, tensor in named_here.items() if not name.startswith(auxiliary)}
        )
        if index == description.exit:
            own = {
                name.removeprefix(auxiliary): t
                for name, t in named_here.items()
                if name.startswith(auxiliary)
            }
            found = state["probe"]["network"] if description.probe else own
            weights.update({f"exit.{name}": tensor for name, tensor in found.items()})
    return weights


def _writer(target: Path, built: Network, text: str) -> Callable[[Path], None]:
    weights = OrderedDict(
        (name, tensor.contiguous()) for name, tensor in built.state_dict().items()
    )

    def write(part: Path) -> None:
        if target.suffix == ".pt":
            # The place that a state_dict has for what is not a weight; load_state_dict passes it by.
            weights._metadata = OrderedDict({"": {"version": 1, _KEY: text}})  # type: ignore[attr-defined]
            torch.save(weights, part)
        else:
            part.write_bytes(safetensors.torch.save(dict(weights), {"format": "pt", _KEY: text}))

    return write


def _program_writer(built: Network, config: Resolved) -> Callable[[Path], None]:
    mean, size = config.data.mean, config.data.image_size
    assert isinstance(mean, tuple) and not isinstance(size, str)
    height, width = size if isinstance(size, tuple) else (size, size)
    example = torch.zeros(2, len(mean), height, width, dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                built, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
    except Exception as error:  # whatever a user's network makes of it
        raise RunError(
            f"export: torch.export cannot follow {config.model.name}: {describe_exception(error)}"
        ) from None
    return lambda part: torch.export.save(program, str(part))


def _write_text(part: Path, text: str) -> None:
    part.write_text(text, encoding="utf-8")


def _write(target: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that its name appears only when it is whole."""
    part = target.with_name(f".part.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(target)
    except (OSError, RuntimeError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise RunError(f"export: cannot write {target}: {error}") from None


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Return the weights of a file and the description that it holds, unpickling nothing but tensors."""
    foreign = UserError(
        f"load: {path} was not written by `localpipe export`; load it with torch or safetensors"
    )
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {}).get(_KEY)
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            text = getattr(weights, "_metadata", {}).get("", {}).get(_KEY)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        AttributeError,
        SafetensorError,
        pickle.UnpicklingError,
    ):
        raise foreign from None
    if not isinstance(text, str):
        raise foreign
    return weights, text


def _load_program(path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(str(path))
    except (
        Exception
    ) as error:  # zip, JSON and torch's own reader each have their own for a damaged file
        raise UserError(
            f"load: {path} is no program that can be read: {describe_exception(error)}"
        ) from None
    loaded: nn.Module = program.module()
    return loaded


def _check_trust(path: Path, description: Description, trust: bool) -> None:
    config = description.config
    for key, name in (
        ("model.name", config["model"]["name"]),
        ("objective", config["method"]["objective"]["name"]),
    ):
        if is_user_code(name) and not trust:
            raise UserError(
                f"load: {path} names code of its own, {key} {name}; say trust=True to import it"
            )


def metadata(file: str | Path) -> dict[str, Any]:
    """Return what a file that `localpipe export` wrote says of itself: model, cut, context, mean and std, step."""
    read: dict[str, Any] = json.loads(_read(Path(file))[1])
    return read
