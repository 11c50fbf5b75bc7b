"""One command in this process, and what is wrong with how it ended."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import traceback
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from localpipe import RunError, UserError, data
from localpipe import config as configs
from localpipe.cli import main
from localpipe.data.batches import BatchReader
from localpipe.data.verify.choice import BOTH
from localpipe.pipeline.launch import launcher
from tests.forked_ranks import start_rank

_LONGEST = 4000  # signs of an error's line
_TOLD = ("localpipe: ", "note: ")  # how lines on standard error begin after a success
_LINE = re.compile(r"localpipe: ([^\s:][^:]*: \S.*)\n")


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status, None after an exception, and what it printed."""

    status: int | None
    out: str
    err: str

    @property
    def line(self) -> str:
        """What a failed command said, without the name of the program."""
        return self.err.strip().removeprefix("localpipe: ")


def prepare_fuzz() -> None:
    """Let commands of this process start ranks by fork, and download nothing."""
    setattr(launcher, "start_rank", start_rank)  # noqa: B010 - the launcher's own import
    urllib.request.urlopen = _refuse_download


def _refuse_download(*_: Any, **__: Any) -> NoReturn:
    raise urllib.error.URLError("the fuzz downloads nothing")


def run_command(words: Sequence[str]) -> Ended:
    """Run localpipe with words in this process."""
    out, err = _open_stream("strict"), _open_stream("backslashreplace")
    status: int | None = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as ended:
            status = int(ended.code or 0) if isinstance(ended.code, int | None) else 1
        except BaseException:  # all of it is a fault, KeyboardInterrupt of a user's code too
            traceback.print_exc(file=err)
    return Ended(status, _read(out), _read(err))


def _open_stream(errors: str) -> io.TextIOWrapper:
    """Return a stream in memory that encodes what is printed, as a terminal's does."""
    return io.TextIOWrapper(io.BytesIO(), "utf-8", errors, newline="", write_through=True)


def _read(stream: io.TextIOWrapper) -> str:
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


def find_fault(ended: Ended, statuses: Collection[int], is_json: bool = False) -> str | None:
    """Return what is wrong with the end of a command, None for nothing.

    statuses: those that are allowed beside 0. is_json: whether it prints JSON. A failure is one
    line of printable signs, `localpipe: where: what`. A success may tell notes beside JSON.
    """
    if ended.status is None:
        return f"traceback\n{ended.err}"
    if ended.status == 0:
        strange = [line for line in ended.err.splitlines() if not line.startswith(_TOLD)]
        if strange:
            return f"noise on standard error\n{ended.err[:_LONGEST]}"
        if is_json:
            return _find_fault_of_json(ended.out)
        return None
    if ended.status not in statuses:
        return f"status {ended.status}\n{ended.err}"
    return find_fault_of_line(ended.err)


def find_fault_of_line(text: str) -> str | None:
    """Return what is wrong with the text of a failure on standard error, None for nothing."""
    if not _LINE.fullmatch(text):
        return f"no line of the form `where: what`\n{text[:_LONGEST]}"
    if not text[:-1].isprintable():
        return f"signs that cannot be printed\n{text[:-1]!r}"
    if len(text) > _LONGEST:
        return f"a line of {len(text)} signs\n{text[:300]}"
    return None


def _find_fault_of_json(text: str) -> str | None:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        return f"what is printed is no JSON: {error}\n{text[:_LONGEST]}"
    return None


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def read_all_images(file: str, words: Sequence[str]) -> Ended:
    """Load the data of a configuration with its files checked, and read every image.

    The result is that of a command.
    """
    err = _open_stream("backslashreplace")
    status: int | None = None
    with contextlib.redirect_stderr(err):
        try:
            config = configs.load(file, words)
            dataset = data.load(config.data, config.run.seed, BOTH)
            reader = BatchReader(dataset, config.run.seed)
            reader.read_train(1, slice(0, len(dataset.train)))
            reader.read_test(slice(0, len(dataset.test)))
            assert np.isfinite([*dataset.mean, *dataset.std]).all()
            status = 0
        except (UserError, RunError) as error:
            print(f"localpipe: {error}", file=err)
            status = 2
        except BaseException:  # all of it is a fault
            traceback.print_exc(file=err)
    return Ended(status, "", _read(err))


def enter_folder(folder: Path) -> None:
    """Make a folder the working directory, and the home."""
    os.chdir(folder)
    os.environ["HOME"] = str(folder)
