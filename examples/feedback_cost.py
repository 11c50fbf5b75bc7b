"""What parameters that come back cost: their bytes, and the throughput with and without them.

    python examples/feedback_cost.py CONFIG [section.key=value ...]

It prints, for every edge between processes, the bytes of a step that go forward and back. Then it
measures localpipe beside the same networks whose copies are never refreshed, in windows that take
turns, and prints the median of the paired ratios, and the efficiency.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localpipe import config as configs
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.plan.memory import list_back
from localpipe.plan.whole_plan import WholePlan, make_plan

SYSTEMS = ("localpipe", "frozen-copies")


def main(argv: Sequence[str]) -> int:
    """Print the bytes and the throughput of a configuration; return the exit status."""
    name, *words = argv
    for line in describe_bytes(make_plan(configs.load(name, words))):
        print(line, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "localpipe", "bench", name, *words]
        command += [f"bench.systems=[{','.join(SYSTEMS)}]", "--json", str(target)]
        status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if status:
            return status
        print(describe_pair(json.loads(target.read_text(encoding="utf-8"))["rows"]))
    return 0


def describe_bytes(plan: WholePlan) -> list[str]:
    """Return a line for every edge back between two processes: bytes of a step, and their share.

    Where edges back pass several boundaries, those forward are of the earlier stage's boundary.
    """
    config = plan.config
    ranks: dict[int, int] = {}
    for rank, host in enumerate(assign_hosts(config.replicas, config.pipeline.processes)):
        for stage in host.stages:
            ranks.setdefault(stage, rank)
    lines = []
    for feedback in list_back(plan.plans, plan.costs, config):
        if ranks[feedback.later] == ranks[feedback.earlier]:
            continue
        share = 100 * feedback.bytes_per_step / feedback.forward_bytes
        lines.append(
            f"stage {feedback.earlier} -> {feedback.earlier + 1}: "
            f"{feedback.forward_bytes:,} bytes forward a step; "
            f"{feedback.later} -> {feedback.earlier}: "
            f"{feedback.bytes_per_step:,.0f} bytes back, {share:.3f} %"
        )
    return lines


def describe_pair(rows: Sequence[dict[str, Any]]) -> str:
    """Return the median of the paired ratios, their range, and both efficiencies."""
    refreshed, frozen = (find_row(rows, name) for name in SYSTEMS)
    pairs = zip(refreshed["samples_per_s_runs"], frozen["samples_per_s_runs"], strict=True)
    ratios = [one / other for one, other in pairs]
    return (
        f"samples per second, refreshed / frozen copies: {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} .. {max(ratios):.3f}, {len(ratios)} pairs); "
        f"{refreshed['samples_per_s']:.1f} / {frozen['samples_per_s']:.1f}; "
        f"efficiency {refreshed['efficiency']} / {frozen['efficiency']}"
    )


def find_row(rows: Sequence[dict[str, Any]], system: str) -> dict[str, Any]:
    """Return the row of a system that was measured as configured."""
    return next(row for row in rows if row["system"] == system and row["micro_batches"] is None)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
