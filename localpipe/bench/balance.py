"""Is `pipeline.cuts: time` balanced, and is the profile right? The slowest stage under `equal` and `time`, measured.

    python -m localpipe.bench.balance CONFIG [--stages 2,4,8] [--json FILE] [section.key=value ...]

One profile predicts every stage; then every stage is run whole, while the other cores run the same one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localpipe import config as configs
from localpipe import data
from localpipe.bench.launch import describe_machine
from localpipe.bench.tables import plain_table, table_console
from localpipe.bench.whole import seconds
from localpipe.config.keys import Config
from localpipe.config.load import to_dict, update
from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset
from localpipe.errors import RunError, UserError
from localpipe.files import SCHEMA, check_output_path, write_whole
from localpipe.networks.cuts import cut_blocks
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.measured_cuts import measure_here, time_cuts
from localpipe.plan.profile import Profile
from localpipe.plan.resolve_here import resolve_here


def balance_main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0, 2 for a user's mistake, 1 for anything else that fails."""
    parser = argparse.ArgumentParser(prog="python -m localpipe.bench.balance", allow_abbrev=False)
    parser.add_argument(
        "config", help="a YAML configuration, or the name of one that comes with localpipe"
    )
    parser.add_argument(
        "--stages", default="2,4,8", metavar="K,K", help="numbers of stages (2,4,8)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    asked = parser.parse_intermixed_args(argv)
    try:
        counts = [
            int(word) for word in asked.stages.split(",") if word.isdecimal() and int(word) > 0
        ]
        if len(counts) != len(asked.stages.split(",")):
            raise UserError(f"balance: --stages {asked.stages} is no list of numbers; write 2,4,8")
        target = Path(asked.json) if asked.json else None
        if target is not None:
            check_output_path("balance: --json", target)
        _run(configs.load(asked.config, asked.overrides), counts, target)
    except (UserError, RunError) as error:
        print(f"localpipe: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def _run(given: Config, counts: Sequence[int], target: Path | None) -> None:
    dataset = data.load(given.data, given.run.seed)
    resolved = {count: _resolved(given, dataset, count) for count in counts}
    profile = measure_here(resolved[max(counts)], counts)
    rows = [row for count, config in resolved.items() for row in rows_of(config, count, profile)]
    found = {
        "schema": SCHEMA,
        "machine": describe_machine(),
        "config": to_dict(given),
        "rows": rows,
    }
    if target is not None:
        write_whole(target, json.dumps(found, indent=1) + "\n")
    _show(rows, given, profile.workers)


def _resolved(given: Config, dataset: Dataset, stages: int) -> Resolved:
    """Return the configuration for so many stages, a process each, cut equally."""
    keys = {
        "pipeline.stages": stages,
        "pipeline.processes": stages,
        "pipeline.cuts": "equal",
        "pipeline.replicas": 1,
    }
    return resolve_here(update(given, keys), dataset)


def rows_of(config: Resolved, stages: int, profile: Profile) -> list[dict[str, Any]]:
    """Return a row for the equal cut and one for the timed cut, predicted from a profile and measured."""
    _, plans = build_plans(config)
    wanted = {
        "equal": tuple(plan.last for plan in plans[:-1]),
        "time": time_cuts(profile, stages),
    }
    timed = seconds(config, list(wanted.values()), profile.workers)
    rows = []
    for (name, ends), measured in zip(wanted.items(), timed, strict=True):
        bounds = cut_blocks(len(profile.blocks), stages, ends)
        predicted = [
            profile.stage_s(first, last, k, stages) for k, (first, last) in enumerate(bounds)
        ]
        rows.append(
            {
                "stages": stages,
                "cuts": name,
                "cut": list(ends),
                "predicted_s": predicted,
                "stage_s": measured,
            }
        )
    return rows


def _show(rows: Sequence[dict[str, Any]], config: Config, workers: int) -> None:
    on = table_console()
    title = f"{config.model.name}, batch {config.data.batch_size}: {workers} processes time the same stage at once"
    names = (
        "stages",
        "cuts",
        "slowest ms,\nmeasured",
        "predicted",
        "off",
        "mean /\nslowest",
        "stages end at",
    )
    shown = plain_table(title, names)
    for row in rows:
        slowest, promised = max(row["stage_s"]), max(row["predicted_s"])
        shown.add_row(
            str(row["stages"]),
            row["cuts"],
            f"{1000 * slowest:,.2f}",
            f"{1000 * promised:,.2f}",
            f"{100 * (promised / slowest - 1):+.1f} %",
            f"{statistics.mean(row['stage_s']) / slowest:.3f}",
            ",".join(map(str, row["cut"])),
        )
    on.print(shown)
    for equal, timed in zip(rows[::2], rows[1::2], strict=True):
        ratio = max(timed["stage_s"]) / max(equal["stage_s"])
        on.print(
            f"{equal['stages']} stages: the slowest of time / the slowest of equal = {ratio:.3f}",
            highlight=False,
        )


if __name__ == "__main__":
    raise SystemExit(balance_main())
