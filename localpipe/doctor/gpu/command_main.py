"""The process of one command that a step of `localpipe doctor --gpu` runs.

It is `localpipe train` or `localpipe bench` without the command line, so that a run that hangs can
be killed while the step goes on.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from localpipe import config as configs
from localpipe.errors import RunError, UserError
from localpipe.output import warn

_CONFIG = "demo"


def main() -> int:
    """Run the command that standard input describes, and return its exit status.

    It has the keys `do` (`train` or `bench`), `words` and, for `bench`, `target`.
    """
    request = json.load(sys.stdin)
    words = request["words"]
    try:
        config = configs.load(_CONFIG, words)
        if request["do"] == "train":
            from localpipe.runs.train import train

            return train(config)
        from localpipe.bench.launch import run_bench

        command = shlex.join(["localpipe", "bench", _CONFIG, *words])
        return run_bench(config, Path(request["target"]), None, command)
    except UserError as error:
        warn(str(error))
        return 2
    except RunError as error:
        warn(str(error))
        return 1
