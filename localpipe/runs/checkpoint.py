"""Checkpoints that are complete or absent. Every stage writes its own file, without a coordinator.

checkpoints/.step_00000400.partial/stage_0.pt ...        while stages write, each at its save flag
checkpoints/step_00000400/stage_0.pt ... manifest.json   after the last stage has every file on disk
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
from localpipe.files import write_whole

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
HASH = ".sha256"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk.

    path: its folder. manifest: the content of manifest.json, with `schema`, `step`, `stages`, and
    the facts of `commit`. Its `files` are {file name: {"bytes": size, "sha256": digest}}.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The step after which it was saved. KeyError if the manifest has none."""
        return int(self.manifest["step"])

    def load_stage(self, index: int) -> dict[str, Any]:
        """Return the state of one stage, its tensors on the CPU, as `write_stage` got it.

        A run's state has the keys `weights`, `optimizer`, `scaler`, `ema`, `meter`, `probe` and
        `step`. `ema` is None without optim.ema, and missing in runs of older versions.
        Raises UserError if the stage has no file, or if the file is damaged: its SHA-256 is
        checked. Every call reads the file again.
        """
        file = self.path / stage_file(index)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise _unreadable(file, error) from None
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][file.name]["sha256"]:
            raise _damaged(file)
        try:
            state: dict[str, Any] = torch.load(
                io.BytesIO(content), map_location="cpu", weights_only=True
            )
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            raise _damaged(file) from None  # torch's own message advises to load it unsafely
        return state

    def load_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of every stage on the CPU, {name in the whole network: tensor}.

        The weights of an auxiliary network begin with `aux.STAGE.`. Raises UserError if a file is
        missing or damaged.
        """
        weights: dict[str, torch.Tensor] = {}
        for index in range(int(self.manifest["stages"])):
            weights.update(self.load_stage(index)["weights"])
        return weights


class Checkpoints:
    """The checkpoint folder of a run, for writing. It keeps the newest `keep` checkpoints.

    run_dir: the directory of the run. stages: the number of files of a complete checkpoint. keep:
    at least 1. repeats: whether calls may be repeated by a worker that goes on in place of a killed
    one: a stage file that exists is then not written again, and a commit goes on from wherever the
    kill left it. Nothing is made or removed before a method is called.
    """

    def __init__(self, run_dir: Path, stages: int, keep: int = 2, repeats: bool = False) -> None:
        self.folder = run_dir / FOLDER
        self.stages = stages
        self.keep = keep
        self.repeats = repeats

    def write_stage(self, step: int, stage: int, state: Mapping[str, Any]) -> None:
        """Write one stage's state to disk. It counts only after `commit(step)`.

        state: anything that torch.save writes and `weights_only` reads. A second call for the same
        step and stage replaces the file, unless calls are repeated. Makes the folders. Raises
        RunError if the file cannot be written.
        """
        partial = self._partial_folder(step)
        target = partial / stage_file(stage)
        # The order matters: a commit may move the file meanwhile, from the one place to the other.
        if self.repeats and (target.exists() or self._has_committed(step)):
            return
        try:
            partial.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            torch.save(dict(state), content)
            digest = hashlib.sha256(content.getbuffer()).hexdigest()
            write_whole(target.with_suffix(HASH), digest)
            write_whole(target, content.getbuffer())
        except OSError as error:
            raise RunError(
                f"checkpoint: cannot write {target}: {error.strerror}; "
                f"{describe_kept(self.folder.parent)}"
            ) from None

    def commit(self, step: int, facts: Mapping[str, Any]) -> None:
        """Make a step complete: write its manifest, rename its folder, remove older checkpoints.

        Every stage must have called `write_stage(step)` before. facts: further keys of the
        manifest, with values that JSON can hold. A checkpoint of the same step is replaced, unless
        calls are repeated. Raises RunError if a stage's file is missing or the manifest cannot be
        written. Raises OSError if an older checkpoint cannot be removed.
        """
        partial = self._partial_folder(step)
        final = self.folder / _folder_name(step)
        try:
            if not (self.repeats and self._has_committed(step)):
                self._complete(step, partial, final, facts)
            # The notes of the files' hashes go last: without them no commit can be repeated.
            for note in final.glob(f"*{HASH}"):
                note.unlink()
        except OSError as error:
            raise RunError(
                f"checkpoint: cannot commit {final}: {error.strerror}; "
                f"{describe_kept(self.folder.parent)}"
            ) from None
        for old in list_checkpoints(self.folder)[: -self.keep]:
            _remove(old)
        if self.repeats:
            for hidden in self.folder.glob(".step_*.old"):  # of a commit that was killed here
                shutil.rmtree(hidden, ignore_errors=True)

    def _complete(self, step: int, partial: Path, final: Path, facts: Mapping[str, Any]) -> None:
        """Write the manifest of a step and rename its folder."""
        files = {}
        for stage in range(self.stages):
            files[stage_file(stage)] = _read_fingerprint(partial / stage_file(stage))
        manifest = {"schema": 1, "step": step, "stages": self.stages, "files": files, **facts}
        write_whole(partial / MANIFEST, json.dumps(manifest))
        if final.exists():  # a resumed run may reach the same step again
            _remove(final)
        partial.rename(final)
        _sync_folder(self.folder)

    def _has_committed(self, step: int) -> bool:
        """Return whether a checkpoint of a step, or of a later one, is complete."""
        return any(path.name >= _folder_name(step) for path in list_checkpoints(self.folder))

    def remove_partial(self) -> None:
        """Remove the checkpoints that an interrupted run wrote or removed in part.

        Call it before a run starts, and only with the run directory's lock. Complete checkpoints
        stay. It raises nothing: a missing folder and errors of the disk are ignored.
        """
        for folder in self.folder.glob(".step_*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _partial_folder(self, step: int) -> Path:
        return self.folder / f".{_folder_name(step)}.partial"


def evaluated_weights(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights with which a stage is evaluated: the moving average where it has one.

    state: that of `Checkpoint.load_stage`. The tensors are the state's own.
    """
    weights: dict[str, torch.Tensor] = state.get("ema") or state["weights"]
    return weights


def stage_file(index: int) -> str:
    """Return the name of a stage's file inside a checkpoint: `stage_0.pt`."""
    return f"stage_{index}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first.

    folder: the one named `checkpoints` in a run directory. The list is empty if there is no such
    folder. A checkpoint is complete when it has a manifest, whose content is not read.
    """
    return sorted(path for path in folder.glob("step_*") if (path / MANIFEST).exists())


def describe_kept(run_dir: Path) -> str:
    """Return what a run that fails leaves, for its message: its newest complete checkpoint.

    Files are not looked at. It raises nothing.
    """
    folders = list_checkpoints(run_dir / FOLDER)
    if not folders:
        return "no checkpoint was complete yet, so the same command begins anew"
    return f"{folders[-1].name} is untouched, and the same command goes on from it"


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint of a run directory, or None if there is none.

    Raises UserError if its manifest is damaged, or if a file is missing or has another size. Older
    checkpoints are not tried then. `Checkpoint.load_stage` checks the contents of the files.
    """
    folders = list_checkpoints(run_dir / FOLDER)
    if not folders:
        return None

    # The manifest must be a whole one, of this step.
    path = folders[-1]
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
        if path.name != _folder_name(int(manifest["step"])):
            raise ValueError
        if len(sizes) != int(manifest["stages"]):
            raise ValueError
    except OSError as error:
        raise _unreadable(path / MANIFEST, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"checkpoint: {path / MANIFEST} is damaged; {_advice(path)}") from None

    # Every file must have its size. Its content is checked when it is loaded.
    for name, size in sizes.items():
        _check_size(path / name, size)
    return Checkpoint(path, manifest)


def _check_size(file: Path, expected: int) -> None:
    if not file.exists():
        state = "missing"
    else:
        size = file.stat().st_size
        if size == expected:
            return
        state = f"{size} bytes"
    raise UserError(
        f"checkpoint: {file} is {state}, expected {expected} bytes; {_advice(file.parent)}"
    )


def _read_fingerprint(file: Path) -> dict[str, Any]:
    """Return a stage file's size and the hash that its stage wrote next to it."""
    note = file.with_suffix(HASH)
    return {"bytes": file.stat().st_size, "sha256": note.read_text(encoding="ascii")}


def _remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then remove its files, so that none looks complete without them."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _unreadable(file: Path, error: OSError) -> UserError:
    # What cannot be read may be whole: only a file that is gone makes a checkpoint useless.
    advice = "make it readable, and run the same command again"
    if isinstance(error, FileNotFoundError):
        advice = _advice(file.parent)
    return UserError(f"checkpoint: cannot read {file}: {error.strerror}; {advice}")


def _damaged(file: Path) -> UserError:
    return UserError(f"checkpoint: {file} is not what was written; {_advice(file.parent)}")


def _advice(path: Path) -> str:
    """Return what to do about a damaged checkpoint, which the next one cannot be made from."""
    before = [folder for folder in list_checkpoints(path.parent) if folder < path]
    if before:
        return f"remove {path} to go on from the checkpoint before it"
    return f"remove {path} to begin anew, as there is no checkpoint before it"


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
