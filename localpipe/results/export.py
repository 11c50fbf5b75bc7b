"""Export: one file out of a run, and back.

net.pt, net.safetensors   a state_dict with the names of the plain network, and its description
net.pt2                   the network itself, by torch.export, where it is more than the plain one
                          or where it is asked for; it runs without localpipe
net.md                    the model card, with what was measured
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping
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
from localpipe.files import check_output_path, write_together
from localpipe.results.exported import (
    Description,
    Network,
    build_exported,
    build_original,
    describe_network,
    has_exit,
)
from localpipe.results.model_card import card_text
from localpipe.runs.checkpoint import Checkpoint, evaluated_weights
from localpipe.runs.directory import RunDirectory

SUFFIXES = (".pt", ".safetensors", ".pt2")
_KEY = "localpipe"  # of the description inside a file


def export(run_dir: Path, config: Resolved, target: Path, exit_stage: int | None) -> list[Path]:
    """Write a run's network, or the network up to a stage with that stage's exit.

    target: the suffix decides what is written, `.pt`, `.safetensors` or `.pt2`. exit_stage: None
    for the whole network. Returns the files written: weights, program (.pt2), model card (.md).
    Files there are replaced, and the folder is made. Raises UserError for an unknown suffix or
    stage, for a path that cannot be written, for a stage without a trained exit, and without a
    complete checkpoint. Raises RunError where torch.export fails, or the disk is full. Nothing is
    written then.
    """
    program, card = target.with_suffix(".pt2"), target.with_suffix(".md")
    _check_request(config, target, exit_stage)
    for path in (target, program, card):
        check_output_path("export: -o", path, makes_folders=True)
    checkpoint = RunDirectory(run_dir).require_checkpoint()
    description = _describe_export(config, exit_stage, checkpoint)
    network = _restore(description, checkpoint)

    # All files are made in memory first, so that none appears without the others.
    text = description.to_json(step=checkpoint.step, localpipe=localpipe.__version__)
    contents: dict[Path, bytes | memoryview] = {}
    if target != program:
        contents[target] = _serialize_weights(target, network, text)
    # A program that an earlier export wrote is written again, so that none is out of date.
    if target == program or not description.is_plain or program.exists():
        contents[program] = _serialize_program(network, config, run_dir, text)
    names = [path.name for path in contents]
    card_content = card_text(run_dir, config, description, network, checkpoint.step, names)
    contents[card] = card_content.encode("utf-8", "backslashreplace")
    _write_files(target, contents)
    return list(contents)


def _check_request(config: Resolved, target: Path, exit_stage: int | None) -> None:
    if target.suffix not in SUFFIXES:
        suffix = target.suffix or "nothing"
        raise UserError(
            f"export: {target} ends in {suffix!r}; expected one of {', '.join(SUFFIXES)}"
        )
    if exit_stage is not None and not 0 <= exit_stage < config.stages:
        last = config.stages - 1
        raise UserError(f"export: --exit {exit_stage} is no stage; expected 0 to {last}")


def load(file: str | Path, *, trust: bool = False, original: bool = False) -> nn.Module:
    """Return the network in a file that `localpipe export` wrote, or of a run directory.

    It is in evaluation mode, on the CPU. It takes images (B, C, H, W), uint8 as they are stored, or
    floats that are normalised already. A .pt2 takes uint8 only. It returns (B, classes) logits.
    Other inputs it takes as they are, as tokens (B, T), and gives the outputs of its task. Its
    attribute `classes` is a tuple of the names of the classes, or None where the data had none.
    `sample` is the shape of an input, without the batch. It computes in fp32, whatever the run's
    precision. trust: lets it import code that the file names, and is ignored for a .pt2. original:
    return the network as an object of the user's or library's own class, which takes normalised
    images alone. Raises UserError for any other or damaged file, for a run without a checkpoint,
    for code that it may not import, and for a file that holds more than the original network.
    """
    path = Path(os.path.expanduser(file))
    if path.is_dir():
        return _load_run(path, trust, original)
    if not path.is_file():
        raise UserError(
            f"load: there is no {path}; give what `localpipe export` wrote, or a run directory"
        )
    if path.suffix == ".pt2":
        if original:
            raise UserError(
                f"load: {path} is a program, which has no class; give a .pt or .safetensors"
            )
        return _load_program(path)
    weights, text = _read_weights(path)
    try:
        description = Description.from_json(text)
        _check_trust(path, description, trust)
        network = _build_network(description, str(path), original)
        _load_weights(network, weights)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"load: {path} does not hold the network that it describes: {describe_exception(error)}"
        ) from None
    return network


def _build_network(description: Description, source: str, original: bool) -> nn.Module:
    if original:
        return build_original(description, source)
    return build_exported(description, source)


def _load_run(path: Path, trust: bool, original: bool) -> nn.Module:
    directory = RunDirectory(path)
    config = as_resolved(directory.config(None if trust else ()))
    description = describe_network(config, None)
    checkpoint = directory.require_checkpoint()
    network = _build_network(description, str(checkpoint.path), original)
    _load_checkpoint(network, checkpoint, description)
    return network


def _restore(description: Description, checkpoint: Checkpoint) -> Network:
    """Return the described network with the weights of a checkpoint."""
    network = build_exported(description, str(checkpoint.path))
    _load_checkpoint(network, checkpoint, description)
    return network


def _load_checkpoint(network: nn.Module, checkpoint: Checkpoint, description: Description) -> None:
    """Load those of a checkpoint's weights that a network has."""
    weights = _select_weights(checkpoint, description)
    _load_weights(network, {name: weights[name] for name in network.state_dict()})


def _load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights. Where they have no metadata, it is the network's own."""
    if not hasattr(weights, "_metadata"):
        metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
        weights = OrderedDict(weights)
        weights._metadata = metadata  # type: ignore[attr-defined]
    network.load_state_dict(weights)


def _describe_export(
    config: Resolved, exit_stage: int | None, checkpoint: Checkpoint
) -> Description:
    """Return the description, with the probe as the exit where a stage has none of its own."""
    description = describe_network(config, exit_stage)
    index = description.exit
    if index is None or has_exit(config, index):
        return description
    has_probe = checkpoint.load_stage(index).get("probe") is not None
    return Description(description.config, index, probe=has_probe)


def _select_weights(checkpoint: Checkpoint, description: Description) -> dict[str, Tensor]:
    """Return the weights of a checkpoint that the described network has, under its names."""
    last = description.exit
    if last is None:
        last = int(checkpoint.manifest["stages"]) - 1
    selected: dict[str, Tensor] = {}
    for index in range(last + 1):
        state = checkpoint.load_stage(index)
        auxiliary = {}
        for name, tensor in evaluated_weights(state).items():
            prefix = f"aux.{index}."
            if name.startswith(prefix):
                auxiliary[name.removeprefix(prefix)] = tensor
            else:
                selected[name] = tensor

        # Only the last stage's auxiliary network, or its probe, goes along: it is the exit.
        if index == description.exit:
            classifier = state["probe"]["network"] if description.probe else auxiliary
            for name, tensor in classifier.items():
                selected[f"exit.{name}"] = tensor
    return selected


def _serialize_weights(target: Path, network: Network, text: str) -> bytes | memoryview:
    """Return the content of a file with the state_dict and the description `text`."""
    weights = OrderedDict()
    for name, tensor in network.state_dict().items():
        weights[name] = tensor.contiguous()
    if target.suffix == ".safetensors":
        return safetensors.torch.save(dict(weights), {"format": "pt", _KEY: text})

    # A state_dict holds here what is not a weight, and load_state_dict ignores it.
    metadata = OrderedDict(network.read_versions())
    metadata[""] = {"version": 1, **metadata.get("", {}), _KEY: text}
    weights._metadata = metadata  # type: ignore[attr-defined]
    content = io.BytesIO()
    torch.save(weights, content)
    return content.getbuffer()


def _serialize_program(
    network: Network, config: Resolved, run_dir: Path, text: str
) -> bytes | memoryview:
    """Return the content of a file with the network as a program; the batch size is free."""
    dtype = torch.uint8  # of images
    if config.data.dtype is not None:
        dtype = getattr(torch, config.data.dtype)
    example = torch.zeros(2, *network.sample, dtype=dtype)
    dynamic_shapes = ({0: torch.export.Dim("batch")},)
    content = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(network, (example,), dynamic_shapes=dynamic_shapes)
            torch.export.save(program, content, extra_files={_KEY: text})
    except Exception as error:  # a user's network may raise anything
        reason = describe_exception(error)
        raise RunError(
            f"export: torch.export cannot follow {config.model.name}: {reason}; nothing was "
            "written; replace len(x) by x.shape[0] in the network, or use it by "
            f"localpipe.load({str(run_dir)!r})"
        ) from None
    return content.getbuffer()


def _write_files(target: Path, contents: Mapping[Path, bytes | memoryview]) -> None:
    """Write the files of the export; raise RunError, and leave none, on failure."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_together(contents)
    except OSError as error:
        raise RunError(
            f"export: cannot write {target}: {error.strerror}; free space, or give another -o"
        ) from None


def _read_weights(path: Path) -> tuple[dict[str, Any], str]:
    """Return the weights of a file and its description, unpickling nothing but tensors."""
    foreign_error = UserError(
        f"load: {path} was not written by `localpipe export`; load it with torch or safetensors"
    )
    try:
        if path.suffix == ".safetensors":
            weights, text = _read_safetensors(path)
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
        raise foreign_error from None
    if not isinstance(text, str):
        raise foreign_error
    return weights, text


def _read_safetensors(path: Path) -> tuple[dict[str, Any], str | None]:
    with safe_open(str(path), framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return weights, text


def _load_program(path: Path) -> nn.Module:
    extra = {_KEY: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(str(path), extra_files=extra)
    # zip, JSON and torch's own reader each raise their own error for a damaged file.
    except Exception as error:
        reason = describe_exception(error)
        raise UserError(f"load: {path} is no program that can be read: {reason}") from None
    module: nn.Module = program.module()
    module.classes = _read_classes(extra[_KEY])  # type: ignore[assignment]
    module.sample = _read_sample(extra[_KEY])  # type: ignore[assignment]
    return module


def _read_classes(text: str | bytes) -> tuple[str, ...] | None:
    """Return the names of the classes in a program's description, None where there are none."""
    try:
        names = json.loads(text)["config"]["data"]["classes"]
        return None if names is None else tuple(names)
    except (ValueError, KeyError, TypeError):  # of an older version, or of other software
        return None


def _read_sample(text: str | bytes) -> tuple[int, ...] | None:
    """Return the shape of an input in a program's description, None where it does not say it."""
    try:
        values = json.loads(text)["config"]["data"]
        if values.get("shape") is not None:
            return tuple(values["shape"])
        size = values.get("evaluation_size") or values["image_size"]
        height, width = size if isinstance(size, list) else (size, size)
        return len(values["mean"]), height, width
    except (ValueError, KeyError, TypeError):
        return None


def _check_trust(path: Path, description: Description, trust: bool) -> None:
    """Raise UserError where a file names code of the user's own and may not import it."""
    config = description.config
    names = {
        "model.name": config["model"]["name"],
        "task.name": config.get("task", {}).get("name", ""),
        "objective": config["method"]["objective"]["name"],
    }
    for key, name in names.items():
        if is_user_code(name) and not trust:
            raise UserError(
                f"load: {path} names code of its own, {key} {name}; say trust=True to import it"
            )


def metadata(file: str | Path) -> dict[str, Any]:
    """Return an exported file's description, without building the network.

    file: a .pt or .safetensors. The keys are `schema`, `config` (sections `model`, `method`,
    `pipeline`, `data`, and `task` where it is no classification), `exit` (a stage or None),
    `probe`, `step` and `localpipe` (a version). Raises UserError for any other file, a .pt2 too,
    and for a missing one.
    """
    values: dict[str, Any] = json.loads(_read_weights(Path(file))[1])
    return values
