"""Checkpoints that are complete or absent, written by every stage for itself, without a control plane.

checkpoints/.step_00000400.partial/stage_0.pt ...   while stages write, each when the mark passes it
checkpoints/step_00000400/stage_0.pt ... manifest.json   after the last stage has seen that all are on disk
"""

from __future__ import annotations

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
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"checkpoint: cannot read {file}: {reason}; {_advice(self.path)}") from None
        return state


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
            with open(target.with_suffix(".tmp"), "wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            target.with_suffix(".tmp").rename(target)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise RunError(f"checkpoint: cannot write {target}: {reason}; earlier checkpoints are untouched") from None

    def commit(self, step: int, facts: Mapping[str, Any]) -> None:
        """Declare a step complete: manifest, one rename, then older checkpoints go."""
        partial, final = self._partial(step), self.folder / _name(step)
        sizes = {stage_file(i): (partial / stage_file(i)).stat().st_size for i in range(self.stages)}
        manifest = {"schema": 1, "step": step, "stages": self.stages, "files": sizes, **facts}
        try:
            with open(partial / MANIFEST, "w", encoding="utf-8") as file:
                json.dump(manifest, file)
                file.flush()
                os.fsync(file.fileno())
            if final.exists():  # a resumed run may come to the same step again
                shutil.rmtree(final)
            partial.rename(final)
            _sync_folder(self.folder)
        except OSError as error:
            raise RunError(f"checkpoint: cannot commit {final}: {error.strerror}; earlier ones are untouched") from None
        for old in complete(self.folder)[: -self.keep]:
            hidden = old.with_name(f".{old.name}.old")
            old.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

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


def newest(run_dir: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None; raise UserError when it is damaged."""
    folders = complete(run_dir / FOLDER)
    if not folders:
        return None
    path = folders[-1]
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sizes = dict(manifest["files"])
        int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"checkpoint: {path / MANIFEST} is damaged; {_advice(path)}") from None
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes"
            raise UserError(f"checkpoint: {file} is {state}, expected {size} bytes; {_advice(path)}")
    return Checkpoint(path, manifest)


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
