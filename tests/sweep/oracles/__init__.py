"""What must be true of any command: one file a noun, one function an oracle.

An oracle gets a trial, runs its command, and notes in the trial what is wrong. It raises
RefusedError where the command is refused in one line, FailedError after it has noted a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.sweep.oracles.benches import check_bench, check_bench_memory
from tests.sweep.oracles.digests import check_digests
from tests.sweep.oracles.evaluations import check_eval
from tests.sweep.oracles.exports import check_exits, check_export, check_program
from tests.sweep.oracles.forecasts import check_cluster, check_measured
from tests.sweep.oracles.pages import check_compare, check_report
from tests.sweep.oracles.plans import check_plan
from tests.sweep.oracles.runs import check_run
from tests.sweep.trial import Trial

Oracle = Callable[[Trial], None]

# Of every row.
EVERY: Mapping[str, Oracle] = {
    "train": check_run,
    "digests": check_digests,
    "eval": check_eval,
    "export, load": check_export,
    "plan": check_plan,
}
# One of them for every row: these take longer.
COMMANDS: Mapping[str, Oracle] = {
    "export --exit": check_exits,
    "export .pt2": check_program,
    "report": check_report,
    "compare": check_compare,
    "plan --cluster": check_cluster,
    "plan --measure": check_measured,
    "bench": check_bench,
    "bench --memory": check_bench_memory,
}
ORACLES: Mapping[str, Oracle] = {**EVERY, **COMMANDS}
