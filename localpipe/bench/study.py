"""`make study`: every method on one small protocol, two rows side by side; the table goes into docs/study.md.

    python -m localpipe.bench.study [--seeds 0 1 2] [--rows NAME ...] [section.key=value ...]

Same seed, same backbone weights and data order in every row. What a finished row gave is written down beside the table, one
JSON object a line, and not trained again, on whatever machine the study goes on; a row that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from scipy import stats

from localpipe.files import write_whole

PROTOCOL = "configs/study/base.yaml"
_KEPT = (
    "test_accuracy",
    "probe_accuracy_per_stage",
    "train_macs_per_sample",
    "inference_macs_per_sample",
    "saved_activation_bytes_per_sample",
    "weights_sha256",
    "localpipe",
    "torch",
)
RESOLVED = 3.0  # points of accuracy; less, with one seed, says nothing
_INSIDE = 0.95  # of the interval of a difference between several seeds
_DGL_1C2F = "method={objective: {name: dgl, head: 1c2f}"
_AUGLOCAL = "method={objective: {name: auglocal, aux_depth: 3}"
_INFOPRO = (
    "image_weight: [5, 0], task_weight: [0, 2]"  # the published pair for ResNet-32, CIFAR-10, K = 8
)
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
    parser.add_argument(
        "--beside", type=int, default=2, metavar="N", help="rows at once, a core each"
    )
    told, overrides = parser.parse_known_args(argv)
    ledger = told.table.with_suffix(".jsonl")
    known = {(found["row"], found["seed"]) for found in read(ledger)}
    work = [(name, seed) for seed in told.seeds for name in told.rows if (name, seed) not in known]
    told.table.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with ThreadPoolExecutor(told.beside) as side_by_side:
        training = [
            side_by_side.submit(_train, name, seed, told.dir, overrides) for name, seed in work
        ]
        for ended in as_completed(training):
            found = ended.result()
            failed |= found is None
            if found is not None:
                with open(ledger, "a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                write_whole(told.table, table(read(ledger), overrides))
    write_whole(told.table, table(read(ledger), overrides))
    return int(failed)


def read(ledger: Path) -> list[dict[str, Any]]:
    """Return what has been written down, in order; nothing where there is no file yet."""
    return (
        [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
        if ledger.exists()
        else []
    )


def run_dir(folder: Path, name: str, seed: int) -> Path:
    """Return the run directory of a row and a seed."""
    return folder / f"{name.replace(' ', '_').replace(',', '').replace('=', '')}-seed{seed}"


def _train(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Train a row to its end; return what it gave, or None when it failed."""
    target = run_dir(folder, name, seed)
    words = [
        PROTOCOL,
        *ROWS[name],
        *overrides,
        f"run.seed={seed}",
        f"run.dir={target}",
        "pipeline.processes=1",
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.log", "a", encoding="utf-8") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "localpipe", "train", *words], stdout=log, stderr=log
        )
        _, ended, used = os.wait4(started.pid, 0)
    status = started.returncode = os.waitstatus_to_exitcode(ended)
    spent = Path(f"{target}.cpu_s")
    with open(spent, "a", encoding="utf-8") as file:  # what an interrupted run has used counts too
        file.write(f"{used.ru_utime + used.ru_stime:.1f}\n")
    print(
        f"{name}, seed {seed}: {'done' if status == 0 else f'status {status}, see {target}.log'}",
        flush=True,
    )
    if status != 0:
        return None
    summary = json.loads((target / "summary.json").read_text(encoding="utf-8"))
    cpu_s = sum(map(float, spent.read_text(encoding="utf-8").split()))
    return {
        "row": name,
        "seed": seed,
        **{key: summary[key] for key in _KEPT},
        "cpu_s": round(cpu_s),
    }


def table(found: Sequence[dict[str, Any]], overrides: Sequence[str] = ()) -> str:
    """Return the table of every row that has at least one finished seed, as Markdown."""
    lines = [
        "# The methods beside each other",
        "",
        f"Protocol: `{' '.join([PROTOCOL, *overrides])}`; command: `make study`. Accuracy is the whole network's on the test",
        "images behind the last epoch, mean +- sample deviation (n seeds). A difference is taken seed by seed; it is",
        f"*not resolved* under {RESOLVED:g} points with one seed, and with several if its 95 % interval (by t) holds 0.",
        "MACs are millions a sample; CPU seconds are the whole run's, all processes and the evaluation included, on a machine",
        "that did other work beside. `study.jsonl` holds what each row gave, one JSON object a line.",
        "",
        "| row | accuracy % (n) | against dgl | train MMACs | inference MMACs | KiB saved | CPU s | probe of each stage % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs = {name: [run for run in found if run["row"] == name] for name in ROWS}
    lines += [_row(name, own, runs["dgl"]) for name, own in runs.items() if own]
    missing = [name for name, own in runs.items() if not own]
    if missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _row(name: str, runs: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    accuracy = list(_accuracy(runs).values())
    first = runs[0]
    cells = [
        name,
        f"{statistics.mean(accuracy):.1f}{_spread(accuracy)} ({len(accuracy)})",
        "" if name == "dgl" else against(_accuracy(runs), _accuracy(reference)),
        f"{first['train_macs_per_sample'] / 1e6:.0f}",
        f"{first['inference_macs_per_sample'] / 1e6:.0f}",
        f"{max(first['saved_activation_bytes_per_sample']) / 1024:,.0f}",
        f"{statistics.mean(run['cpu_s'] for run in runs):.0f}",
        " ".join(f"{100 * probe:.0f}" for probe in first["probe_accuracy_per_stage"] or []),
    ]
    return f"| {' | '.join(cells)} |"


def against(accuracy: dict[int, float], reference: dict[int, float]) -> str:
    """Return the mean difference over the seeds that both have, its deviation, and whether it is resolved.

    The same seed gives both the same weights and the same order of the data, so they are compared in pairs."""
    differences = [accuracy[seed] - reference[seed] for seed in accuracy if seed in reference]
    if not differences:
        return ""
    said = f"{statistics.mean(differences):+.1f}{_spread(differences)}"
    return (
        said
        if abs(statistics.mean(differences)) >= _uncertain(differences)
        else f"{said}, not resolved"
    )


def _uncertain(differences: list[float]) -> float:
    count = len(differences)
    if count == 1:
        return RESOLVED
    standard_errors = float(stats.t.ppf((1 + _INSIDE) / 2, count - 1))
    return standard_errors * statistics.stdev(differences) / math.sqrt(count)


def _accuracy(runs: list[dict[str, Any]]) -> dict[int, float]:
    return {run["seed"]: 100 * run["test_accuracy"] for run in runs}


def _spread(values: list[float]) -> str:
    return f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""


if __name__ == "__main__":
    raise SystemExit(main())
