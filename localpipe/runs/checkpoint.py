"""Checkpoints that are complete or absent, written by every stage for itself, without a control plane.

checkpoints/.step_00000400.partial/stage_0.pt ...   while stages write, each when the mark passes it
checkpoints/step_00000400/stage_0.pt ... manifest.json   after the last stage has seen that all are on disk
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localpipe.errors import RunError, UserError

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
HASH = ".sha256"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def stage(self, index: int) -> dict[str, Any]:
        """Return the state of one stage; raise UserError when its file is damaged."""
        file = self.path / stage_file(index)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"checkpoint: cannot read {file}: {error.strerror}; {_advice(self.path)}"
            ) from None
        damaged = UserError(f"checkpoint: {file} is not what was written; {_advice(self.path)}")
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][file.name]["sha256"]:
            raise damaged
        try:
            state: dict[str, Any] = torch.load(
                io.BytesIO(content), map_location="cpu", weights_only=True
            )
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            raise damaged from None  # torch's own words advise to load it unsafely
        return state

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of every stage, by their names in the whole network."""
        named: dict[str, torch.Tensor] = {}
        for index in range(int(self.manifest["stages"])):
            named.update(self.stage(index)["weights"])
        return named


class Checkpoints:
    """The checkpoint folder of a run."""

    def __init__(self, run_dir: Path, stages: int, keep: int = 2) -> None:
        self.folder, self.stages, self.keep = run_dir / FOLDER, stages, keep

    def write_stage(self, step: int, stage: int, state: Mapping[str, Any]) -> None:
        """Put one stage's state on disk; it counts only when the last stage commits the step."""
        partial = self._partial(step)
        target = partial / stage_file(stage)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            torch.save(dict(state), content)
            _write(
                target.with_suffix(HASH), hashlib.sha256(content.getbuffer()).hexdigest().encode()
            )
            _write(target, content.getbuffer())
        except OSError as error:
            raise RunError(
                f"checkpoint: cannot write {target}: {error.strerror}; earlier checkpoints are untouched"
            ) from None

    def commit(self, step: int, facts: Mapping[str, Any]) -> None:
        """Declare a step complete: manifest, one rename, then older checkpoints go."""
        partial, final = self._partial(step), self.folder / _name(step)
        try:
            files = {
                stage_file(i): _fingerprint(partial / stage_file(i)) for i in range(self.stages)
            }
            manifest = {"schema": 1, "step": step, "stages": self.stages, "files": files, **facts}
            _write(partial / MANIFEST, json.dumps(manifest).encode())
            if final.exists():  # a resumed run may come to the same step again
                _remove(final)
            partial.rename(final)
            _sync_folder(self.folder)
        except OSError as error:
            raise RunError(
                f"checkpoint: cannot commit {final}: {error.strerror}; earlier ones are untouched"
            ) from None
        for old in complete(self.folder)[: -self.keep]:
            _remove(old)

    def sweep(self) -> None:
        """Remove what an interrupted run left half-written. Only for a run that holds the lock, before it starts."""
        for left_over in self.folder.glob(".step_*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def _partial(self, step: int) -> Path:
        return self.folder / f".{_name(step)}.partial"


def stage_file(index: int) -> str:
    """Return the name of a stage's file."""
    return f"stage_{index}.pt"


def complete(folder: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / MANIFEST).exists())


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None; raise UserError when it is damaged."""
    folders = complete(run_dir / FOLDER)
    if not folders:
        return None
    path = folders[-1]
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
        if path.name != _name(int(manifest["step"])) or len(sizes) != int(manifest["stages"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"checkpoint: {path / MANIFEST} is damaged; {_advice(path)}") from None
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes"
            raise UserError(
                f"checkpoint: {file} is {state}, expected {size} bytes; {_advice(path)}"
            )
    return Checkpoint(path, manifest)


def _write(target: Path, content: bytes | memoryview) -> None:
    """Write a file so that its name appears only when it is whole."""
    part = target.with_name(f"{target.name}.tmp")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.rename(target)


def _fingerprint(file: Path) -> dict[str, Any]:
    """Return a stage file's size and the hash that its writer left beside it; the note has served then."""
    note = file.with_suffix(HASH)
    fingerprint = {"bytes": file.stat().st_size, "sha256": note.read_text(encoding="ascii")}
    note.unlink()
    return fingerprint


def _remove(checkpoint: Path) -> None:
    """Hide a checkpoint before it goes, so that none is ever seen half."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _advice(path: Path) -> str:
    return f"remove {path} to go on from the checkpoint before it"


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
