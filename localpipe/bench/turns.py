"""Commands from the launcher to the workers of one system, and their responses.

All other systems sleep in a read until their turn. Each worker has two named pipes in the private
folder that it shares with its launcher: no port, no polling, no spinning.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from localpipe.errors import RunError

_CHECK_S = 0.5  # between two checks that all workers still run
_CHUNK = 1 << 16


class CommandSender:
    """The launcher's end: sends a command to every worker of a system, waits for the responses.

    folder: exists, and is the one of the workers. world: their number. Making it does not wait for
    them. Raises OSError if the pipes cannot be made.
    """

    def __init__(self, folder: Path, world: int) -> None:
        self._commands = []
        self._responses = []
        for rank in range(world):
            # Open for reading and writing, so that opening does not wait for the other end.
            self._commands.append(os.open(_make_pipe(folder, "ask", rank), os.O_RDWR))
            response_flags = os.O_RDWR | os.O_NONBLOCK
            self._responses.append(os.open(_make_pipe(folder, "answer", rank), response_flags))

    def send(
        self, command: dict[str, Any], timeout_s: float, check: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """Send a command to every worker, and return the responses by rank.

        command: values that JSON has, else TypeError. `check` is called after every half second
        without data, and raises where a response will never come. Raises RunError where one is
        missing after `timeout_s`. After an error do not send again: late responses would be taken
        for the next ones. OSError after `close`.
        """
        line = (json.dumps(command) + "\n").encode()
        for descriptor in self._commands:
            os.write(descriptor, line)
        received = dict.fromkeys(self._responses, b"")
        deadline = time.monotonic() + timeout_s
        while True:
            incomplete = [fd for fd, data in received.items() if not data.endswith(b"\n")]
            if not incomplete:
                break
            ready, _, _ = select.select(incomplete, [], [], _CHECK_S)
            for descriptor in ready:
                received[descriptor] += os.read(descriptor, _CHUNK)
            if not ready:
                check()
                if time.monotonic() > deadline:
                    raise RunError(f"no answer within {timeout_s:g} s: it hangs")
        return [json.loads(received[descriptor]) for descriptor in self._responses]

    def close(self) -> None:
        """Close the pipes. A worker that still reads gets the end of the file.

        Call it once: a second call raises OSError. The named pipes stay in the folder.
        """
        for descriptor in (*self._commands, *self._responses):
            os.close(descriptor)


class CommandReceiver:
    """A worker's end: iterates over the commands, one a line.

    Making it waits until the launcher has opened its end. The iteration waits for each command, and
    stops when the launcher closes.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        # Both stay open as long as the process.
        self._commands = open(_make_pipe(folder, "ask", rank), encoding="utf-8")  # noqa: SIM115
        responses = _make_pipe(folder, "answer", rank)
        self._responses = open(responses, "w", encoding="utf-8")  # noqa: SIM115

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._commands:
            yield json.loads(line)

    def respond(self, **values: Any) -> None:
        """Respond to the last command. Call it once for each, because the launcher counts lines.

        values: what JSON has, else TypeError. They become the mapping that `send` returns. Raises
        BrokenPipeError if the launcher has closed.
        """
        self._responses.write(json.dumps(values) + "\n")
        self._responses.flush()


def _make_pipe(folder: Path, name: str, rank: int) -> Path:
    path = folder / f"{name}_{rank}"
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    return path
