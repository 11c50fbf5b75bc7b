"""`make study`: every method on one small protocol, two rows side by side, resumable; the table goes into docs/study.md.

    python -m localpipe.bench.study [--seeds 0 1 2] [--rows NAME ...] [section.key=value ...]

Same seed, same backbone weights and data order in every row. A row that has finished is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from localpipe import metrics

PROTOCOL = "configs/study/base.yaml"
RESOLVED = 3.0  # points of accuracy; less, with one seed, says nothing

_DGL_1C2F = "method={objective: {name: dgl, head: 1c2f}"
_AUGLOCAL = "method={objective: {name: auglocal, aux_depth: 3}"
_INFOPRO = "image_weight: [5, 0], task_weight: [0, 2]"  # the published pair for ResNet-32, CIFAR-10, K = 8
ROWS: dict[str, tuple[str, ...]] = {
    "end to end": ("pipeline.stages=1",),
    "end to end, 24 epochs": ("pipeline.stages=1", "optim.epochs=24", "optim.warmup_epochs=2.4"),
    "greedy": ("method=greedy",),
    "dgl": ("method=dgl",),
    "dgl 1c2f": (_DGL_1C2F + "}",),
    "predsim": ("method=predsim",),
    "infopro softmax": (f"method={{objective: {{name: infopro, task: softmax, {_INFOPRO}}}}}",),
    "infopro contrast": (f"method={{objective: {{name: infopro, task: contrast, {_INFOPRO}}}}}",),
    "dgl 1c2f + E": (_DGL_1C2F + ", context: E}",),
    "dgl 1c2f + R1E": (_DGL_1C2F + ", context: R1E}",),
    "auglocal d=3": (_AUGLOCAL + "}",),
    "dgl + SGR": ("method={objective: dgl, reconcile: cosine}",),
    "auglocal + SGR": (_AUGLOCAL + ", reconcile: cosine}",),
    "auglocal + R1E": (_AUGLOCAL + ", context: R1E}",),
    "auglocal + R1E + SGR": (_AUGLOCAL + ", context: R1E, reconcile: cosine}",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train what has not been trained yet, and write the table of what has."""
    parser = argparse.ArgumentParser(prog="study", description="every method on one small protocol")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--table", type=Path, default=Path("docs/study.md"))
    told, overrides = parser.parse_known_args(argv)
    work = [(name, seed) for seed in told.seeds for name in told.rows]
    with ThreadPoolExecutor(2) as side_by_side:
        statuses = list(side_by_side.map(lambda each: _train(each[0], each[1], told.dir, overrides), work))
    told.table.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_whole(told.table, table(told.dir, overrides))
    return max(statuses)


def run_dir(folder: Path, name: str, seed: int) -> Path:
    """Return the run directory of a row and a seed."""
    return folder / f"{name.replace(' ', '_').replace(',', '').replace('=', '')}-seed{seed}"


def _train(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> int:
    target = run_dir(folder, name, seed)
    if (target / "summary.json").exists():
        return 0
    words = [
        "train",
        PROTOCOL,
        *ROWS[name],
        *overrides,
        f"run.seed={seed}",
        f"run.dir={target}",
        "pipeline.processes=1",
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.log", "a", encoding="utf-8") as log:
        started = subprocess.Popen([sys.executable, "-m", "localpipe", *words], stdout=log, stderr=log)
        _, ended, used = os.wait4(started.pid, 0)
    status = started.returncode = os.waitstatus_to_exitcode(ended)
    with open(f"{target}.cpu_s", "a", encoding="utf-8") as spent:  # what an interrupted run has used counts too
        spent.write(f"{used.ru_utime + used.ru_stime:.1f}\n")
    print(f"{name}, seed {seed}: {'done' if status == 0 else f'status {status}, see {target}.log'}", flush=True)
    return status


def table(folder: Path, overrides: Sequence[str] = ()) -> str:
    """Return the table of every row that has at least one finished seed, as Markdown."""
    lines = [
        "# The methods beside each other",
        "",
        f"Protocol: `{' '.join([PROTOCOL, *overrides])}`; command: `make study`. Accuracy is the whole network's on the test",
        "images behind the last epoch, mean +- sample deviation (n seeds). A difference under",
        f"{RESOLVED:g} points with one seed is *not resolved*. MACs are millions a sample; CPU seconds are the whole run's,",
        "all processes and the evaluation included.",
        "",
        "| row | accuracy % (n) | against dgl | train MMACs | inference MMACs | KiB saved | CPU s | probe of each stage % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {name: _finished(folder, name) for name in ROWS}
    lines += [_row(name, runs, found["dgl"]) for name, runs in found.items() if runs]
    missing = [name for name, runs in found.items() if not runs]
    if missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _finished(folder: Path, name: str) -> list[dict[str, Any]]:
    pattern = run_dir(folder, name, 0).name.removesuffix("0") + "*"
    found = []
    for path in sorted(folder.glob(f"{pattern}/summary.json")):
        spent = Path(f"{path.parent}.cpu_s").read_text(encoding="utf-8")
        found.append({**json.loads(path.read_text(encoding="utf-8")), "cpu_s": sum(map(float, spent.split()))})
    return found


def _row(name: str, runs: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    accuracy = [100 * run["test_accuracy"] for run in runs]
    spread = f" +- {statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
    first = runs[0]
    cells = [
        name,
        f"{statistics.mean(accuracy):.1f}{spread} ({len(accuracy)})",
        "" if name == "dgl" else _against(accuracy, [100 * run["test_accuracy"] for run in reference]),
        f"{first['train_macs_per_sample'] / 1e6:.0f}",
        f"{first['inference_macs_per_sample'] / 1e6:.0f}",
        f"{max(first['saved_activation_bytes_per_sample']) / 1024:,.0f}",
        f"{statistics.mean(run['cpu_s'] for run in runs):.0f}",
        " ".join(f"{100 * probe:.0f}" for probe in first["probe_accuracy_per_stage"] or []),
    ]
    return f"| {' | '.join(cells)} |"


def _against(accuracy: list[float], reference: list[float]) -> str:
    if not reference:
        return ""
    difference = statistics.mean(accuracy) - statistics.mean(reference)
    resolved = abs(difference) >= RESOLVED or min(len(accuracy), len(reference)) > 1
    return f"{difference:+.1f}" if resolved else f"{difference:+.1f}, not resolved"


if __name__ == "__main__":
    raise SystemExit(main())
