"""A worker without torch that does what a test has written: its actions, one for each process.

The folder SCRIPT holds `rank_N`, the actions that are left of a rank, one a line.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

SCRIPT = "LOCALPIPE_SCRIPT"


def main() -> int:
    """Take the next action of this rank, and do it."""
    rank, folder = os.environ["RANK"], Path(os.environ["LOCALPIPE_PRIVATE_DIR"])
    script = Path(os.environ[SCRIPT]) / f"rank_{rank}"
    action, *left = script.read_text().split()
    script.write_text("\n".join(left))
    kind = "spare" if "LOCALPIPE_SPARE" in os.environ else "new"
    with open(script.with_name("seen"), "a") as seen:
        seen.write(f"{rank} {action} {kind}\n")
    beat(folder, rank)
    note(folder, f"ready_{rank}", {"time": time.monotonic()})
    note(folder, f"caught_up_{rank}", {"steps": 3, "step": 7, "replay_s": 0.25})
    if action == "kill":
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "suspend":
        os.kill(os.getpid(), signal.SIGSTOP)
    if action in ("hang", "raise"):
        failure = {"rank": int(rank), "kind": "run", "line": "it broke", "trace": "", "time": 0}
        (folder / f"error_{rank}.json").write_text(json.dumps(failure))
        return 75 if action == "hang" else 1
    seconds = float("inf") if action == "wait" else float(action.removeprefix("end"))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        beat(folder, rank)
        time.sleep(0.05)
    return 0


def warm_up() -> None:
    """Note that a spare process has prepared itself."""
    with open(Path(os.environ[SCRIPT]) / "seen", "a") as seen:
        seen.write("warm\n")


def beat(folder: Path, rank: str) -> None:
    note(
        folder,
        f"beat_{rank}",
        {
            "beat": time.monotonic(),
            "phase": "forward",
            "waits": False,
            "age": 4.0,
            "where": f"stage {rank}, replica 0, step 5",
            "step": 5,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        },
    )


def note(folder: Path, key: str, values: object) -> None:
    """Write a note whole."""
    part = folder / f".{key}.part"
    part.write_text(json.dumps(values))
    part.replace(folder / f"note_{key}")
