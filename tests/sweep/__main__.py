"""Run the sweep: `python -m tests.sweep --minutes 60`. Exits 1 if anything is wrong."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from tests.sweep.documentation import try_documentation
from tests.sweep.fixtures import write_fixtures
from tests.sweep.forks.runner import Runner
from tests.sweep.known import KNOWN
from tests.sweep.log import Log, describe_commit
from tests.sweep.refused import REFUSED_FILE, read_refusals, write_refusals
from tests.sweep.sweep import Sweep

ENVIRONMENT = {
    "WANDB_MODE": "offline",
    "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "1000", "NO_COLOR": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def main() -> int:
    """Try every value, then rows of pairs, as far as the minutes go."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="as far as it gets (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows (0)")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time (2)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write the log there too")
    parser.add_argument(
        "--refused",
        type=Path,
        metavar="FILE",
        default=REFUSED_FILE,
        help="combinations that were refused before: tried first, written at the end "
        "(tests/sweep/refused.json)",
    )
    parser.add_argument("--rows-only", action="store_true", help="leave out every value alone")
    asked = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    log = Log(asked.log)
    log.say(f"commit {describe_commit()}, seed {asked.seed}, {asked.minutes:g} minutes")
    with tempfile.TemporaryDirectory(prefix="localpipe-sweep-") as folder:
        runner = Runner(Path(folder))
        write_fixtures(runner)
        sweep = Sweep(runner, log, asked.seed, asked.jobs)

        def is_over() -> bool:
            return log.minutes > float(asked.minutes)

        if not asked.rows_only:
            sweep.try_values(is_over)
        sweep.try_refusals(read_refusals(asked.refused, sweep.values), is_over)
        sweep.try_rows(is_over)
        write_refusals(asked.refused, sweep.refusals)
        if not asked.rows_only:
            try_documentation(Path(folder), log, is_over)
    if runner.lost:
        log.say(f"{runner.lost} commands run again, whose status was lost")
    for known in KNOWN:
        log.say(f"known {known.oracle} {known.pattern}, {log.known[known]} times: {known.reason}")
    log.say(f"{len(log.findings)} faults")
    return int(bool(log.findings))


if __name__ == "__main__":
    raise SystemExit(main())
