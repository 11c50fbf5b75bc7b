"""The one reader of a run directory: configuration, records, summary, trace, checkpoints, lock."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from localpipe.config.explain import quote, spell_override
from localpipe.config.keys import Config
from localpipe.config.load import apply_overrides, parse, parse_resolved, to_dict
from localpipe.config.resume import (
    FREE_KEYS,
    RECORDED_ADVICE,
    add_later_keys,
    join_overrides,
    read_recorded,
)
from localpipe.config.user_code import is_user_code
from localpipe.config.yaml_file import read_yaml
from localpipe.errors import UserError, first_line
from localpipe.runs.checkpoint import FOLDER, Checkpoint, list_checkpoints, newest_checkpoint
from localpipe.runs.lock import LOCK_FILE, acquire_lock
from localpipe.runs.recorded_run import Record, RecordedRun
from localpipe.runs.records import read_records
from localpipe.runs.trace import TRACE_FILE

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
FILES_FOLDER = "files"
_READER_ADVICE = "give the directory of a run"
# The keys that may name code of the user's own.
_CODE_KEYS = (
    "model.name",
    "data.name",
    "task.name",
    "method.objective",
    "method.objective.name",
)


class RunDirectory:
    """The directory of one run, which need not exist.

    It reads nothing before a method is called.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))

    @property
    def title(self) -> str:
        """The path as text, for people. `.` and `..` are the name of the folder they stand for."""
        if self.path.name in ("", ".."):
            return self.path.resolve().name
        return str(self.path)

    @property
    def config_file(self) -> Path:
        """The file of the resolved configuration, whether it exists or not."""
        return self.path / CONFIG_FILE

    @property
    def metrics_file(self) -> Path:
        """The file of the records, whether it exists or not."""
        return self.path / METRICS_FILE

    @property
    def summary_file(self) -> Path:
        """The file of the summary, which exists when the run has made all its steps."""
        return self.path / SUMMARY_FILE

    @property
    def trace_file(self) -> Path:
        """The file of the trace, which a run with run.trace writes at its end."""
        return self.path / TRACE_FILE

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of the checkpoints, whether it exists or not."""
        return self.path / FOLDER

    @property
    def files_folder(self) -> Path:
        """The folder of the lists of its data's image files, whether it exists or not."""
        return self.path / FILES_FOLDER

    @property
    def names(self) -> list[str]:
        """The names of its files and folders in sorted order, without the lock and hidden ones.

        The list is empty if the path is no directory.
        """
        if not self.path.is_dir():
            return []
        names = [path.name for path in self.path.iterdir()]
        return sorted(name for name in names if name != LOCK_FILE and not name.startswith("."))

    # -- reading --------------------------------------------------------------------------------

    def config(
        self,
        code: Collection[str] | None = (),
        overrides: Sequence[str] = (),
        free: Collection[str] = FREE_KEYS,
        reads_data: bool = False,
    ) -> Config:
        """Return the run's configuration with `section.key=value` overrides applied.

        code: names of user code (`package.module:name`) that may be imported, or None for any. What
        an override names may be imported too. free: the keys that overrides may change. reads_data:
        whether the command reads data, so that the code of a user's data set is imported. Raises
        UserError if there is no run, if it names other code, if its configuration is damaged, if an
        override is wrong, or if it contradicts the record (see `join_overrides`).
        """
        named = _read_code_names(overrides)
        if code is not None:
            code = {*code, *named.values()}
        recorded = self.recorded_config(code)
        # What is imported later, when the network, its task and the data are built.
        code_names = {"model.name": recorded.model.name, "task.name": recorded.task.name}
        if reads_data:
            code_names["data.name"] = recorded.data.name
        for key, name in code_names.items():
            is_named = key in named or code is None or name in code
            if is_user_code(name) and not is_named:
                raise UserError(
                    f"run: {self.path} names code of its own, {name}; say --trust to import it, "
                    f"or name it again: {spell_override(key, name)}"
                )
        if not overrides:
            return recorded
        sections = apply_overrides(to_dict(recorded), overrides)
        given = parse(sections, str(self.config_file))
        return join_overrides(given, recorded, str(self.path), free)

    def recorded_config(self, code: Collection[str] | None = ()) -> Config:
        """Return the configuration as the run recorded it. It imports no network.

        code: names of user objectives that may be imported, or None for any. Raises UserError if
        there is no run, if it names another objective of a user, or if a key is missing or wrong.
        """
        self.check()
        return read_recorded(self.config_file, code)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records in the order of metrics.jsonl. See `read_records`.

        Yields nothing if there is no file.
        """
        return read_records(self.metrics_file)

    def summary(self) -> Record | None:
        """Return the summary, or None if the run has not made all its steps.

        Raises UserError if summary.json cannot be read or is not JSON.
        """
        return _read_json(self.summary_file)

    def finished_summary(self, steps: int) -> Record | None:
        """Return the summary if the run has made exactly `steps` steps, else None.

        A summary that cannot be read is None too, because a resume writes it again.
        """
        try:
            summary = self.summary()
        except UserError:  # a resume writes it again
            return None
        if summary is None or summary.get("steps") != steps:
            return None
        return summary

    def trace(self) -> Record | None:
        """Return the Chrome trace (see `build_chrome_trace`), or None if there is no trace.json.

        Raises UserError if the file cannot be read or is not JSON.
        """
        return _read_json(self.trace_file)

    def newest_checkpoint(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None if there is none.

        Raises UserError if it is damaged.
        """
        return newest_checkpoint(self.path)

    def describe_resume(self) -> str:
        """Return what the same command does next: it goes on from a checkpoint, or starts again."""
        folders = list_checkpoints(self.checkpoint_folder)
        if not folders:
            return "there is no checkpoint yet, so the same command starts again"
        return f"the same command goes on from step {int(folders[-1].name.removeprefix('step_'))}"

    def require_checkpoint(self) -> Checkpoint:
        """Return the newest complete checkpoint.

        Raises UserError if there is none, or if it is damaged.
        """
        checkpoint = self.newest_checkpoint()
        if checkpoint is None:
            raise UserError(
                f"checkpoint: {self.path} holds no complete checkpoint yet; train it first"
            )
        return checkpoint

    def read(self) -> RecordedRun:
        """Return what the run has recorded, without importing code that it names.

        Raises UserError if there is no run, or if the configuration, the summary or the trace is
        damaged. Lines of metrics.jsonl that are no record are left out. Raises UserError if that
        file is no text.
        """
        self.check()
        data = read_yaml(self.config_file, advice=RECORDED_ADVICE)
        add_later_keys(data)
        config = parse_resolved(data, str(self.config_file), imports_user_code=False)
        records = tuple(self.records())
        return RecordedRun(self.path, config, records, self.summary(), self.trace())

    # -- what it is -----------------------------------------------------------------------------

    def check(self) -> None:
        """Raise UserError if this is not the directory of a run: it has no config.yaml."""
        if not self.config_file.exists():
            raise self.error(_READER_ADVICE)

    def error(self, advice: str) -> UserError:
        """Return (not raise) the error for a directory that is not a run's.

        advice: the end of the message, which says what to do.
        """
        names = self.names
        content = "nothing"
        if names:
            content = repr(names[0])
        elif self.path.is_file():
            content = "a file"
        return UserError(
            f"run: {self.path} is not a run directory: found {content}, "
            f"expected {CONFIG_FILE} and {METRICS_FILE}; {advice}"
        )

    def lock(self) -> IO[str]:
        """Take the directory for a new run, and return the open file that holds its lock.

        Makes the directory. Raises UserError if another run has it for 30 s. See `acquire_lock`.
        """
        return acquire_lock(self.path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex. Raises OSError if it cannot be read."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_code_names(overrides: Sequence[str]) -> Mapping[str, str]:
    """Return the overrides that may name code of the user's own, by key."""
    names = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in _CODE_KEYS:
            names[key] = value
    return names


def _read_json(path: Path) -> Record | None:
    """Return a JSON file's mapping, or None if there is no file; raise UserError if unreadable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"run: cannot read {path}: {first_line(error)}; {_advise_on_json(path)}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"run: {path} holds {quote(content)}, expected a mapping; {_advise_on_json(path)}"
        )
    return content


def _advise_on_json(path: Path) -> str:
    """Return what to do about a damaged summary or trace."""
    if path.name == SUMMARY_FILE:  # a resume of the finished run writes it again
        return "remove it, or train again with the same command"
    return "remove it"
