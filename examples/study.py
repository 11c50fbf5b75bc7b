"""`make study`: every method on one small protocol; the table is written to docs/study.md.

    python examples/study.py [section.key=value ...] [--seeds 0 1 2] [--rows NAME ...]

All rows of a seed have the same backbone weights and data order. The result of a finished row is
appended to a file next to the table, one JSON object a line. Such a row is not trained again, on
whatever machine the study continues. A row that was stopped continues from its last checkpoint.
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

from localpipe.files import write_output

PROTOCOL = "configs/study/base.yaml"
RESOLVED = 3.0  # points of accuracy; a smaller difference says nothing with one seed
_CONFIDENCE = 0.95  # of the interval of a difference between several seeds
_SUMMARY_KEYS = (
    "test_accuracy",
    "probe_accuracy_per_stage",
    "train_macs_per_sample",
    "inference_macs_per_sample",
    "saved_activation_bytes_per_sample",
    "weights_sha256",
    "localpipe",
    "torch",
)
_DGL_1C2F = "method={objective: {name: dgl, head: 1c2f}"
_AUGLOCAL = "method={objective: {name: auglocal, aux_depth: 3}"
_PREDSIM = "dim_in_decoder: 2048, zero_start: true, padded_pooling: true"
# The published pair of weights for ResNet-32 on CIFAR-10 in 8 stages.
_INFOPRO = "image_weight: [5, 0], task_weight: [0, 2]"
_INFOPRO_16 = "image_weight: [5, 0.2], task_weight: [0.05, 0.5]"  # and in 16 stages
_K16 = "pipeline.stages=16"
# The keys of every row, on top of the protocol's.
ROWS: dict[str, tuple[str, ...]] = {
    "end to end": ("pipeline.stages=1",),
    "end to end, 24 epochs": ("pipeline.stages=1", "optim.epochs=24", "optim.warmup_epochs=2.4"),
    "greedy": ("method=greedy",),
    "dgl": ("method=dgl",),
    "dgl 1c2f": (_DGL_1C2F + "}",),
    "dgl, its own head": ("method={objective: {name: dgl, head: dgl_mlp_sr}}",),
    "predsim": ("method=predsim",),
    "predsim, as published": (f"method={{objective: {{name: predsim, {_PREDSIM}}}}}",),
    "infopro softmax": (f"method={{objective: {{name: infopro, task: softmax, {_INFOPRO}}}}}",),
    "infopro contrast": (f"method={{objective: {{name: infopro, task: contrast, {_INFOPRO}}}}}",),
    "dgl 1c2f + E": (_DGL_1C2F + ", context: E}",),
    "dgl 1c2f + R1E": (_DGL_1C2F + ", context: R1E}",),
    "auglocal d=3": (_AUGLOCAL + "}",),
    "dgl + SGR": ("method={objective: dgl, reconcile: cosine}",),
    "auglocal + SGR": (_AUGLOCAL + ", reconcile: cosine}",),
    "auglocal + R1E": (_AUGLOCAL + ", context: R1E}",),
    "auglocal + R1E + SGR": (_AUGLOCAL + ", context: R1E, reconcile: cosine}",),
    "dgl + block": ("method={objective: dgl, feedback: block}",),
    "dgl 1c2f + block": (_DGL_1C2F + ", feedback: block}",),
    "infopro softmax + block": (
        f"method={{objective: {{name: infopro, task: softmax, {_INFOPRO}}}, feedback: block}}",
    ),
    "greedy + readout": ("method={objective: greedy, feedback: readout}",),
    "dgl + readout": ("method={objective: dgl, feedback: readout}",),
    # 16 stages. Its end to end is the row above.
    "dgl, K=16": ("method=dgl", _K16),
    "auglocal d=3, K=16": (_AUGLOCAL + "}", _K16),
    "auglocal + R1E, K=16": (_AUGLOCAL + ", context: R1E}", _K16),
    "dgl + block, K=16": ("method={objective: dgl, feedback: block}", _K16),
    # The combinations that were tried.
    "dgl 1c2f + block, K=16": (_DGL_1C2F + ", feedback: block}", _K16),
    "dgl + block scaled, K=16": ("method=man_plusplus", _K16),
    "dgl + R1E + block, K=16": ("method={objective: dgl, context: R1E, feedback: block}", _K16),
    "dgl 1c2f + R1E + block, K=16": (_DGL_1C2F + ", context: R1E, feedback: block}", _K16),
    "dgl + SGR + block, K=16": (
        "method={objective: dgl, reconcile: cosine, feedback: block}",
        _K16,
    ),
    "infopro softmax + block, K=16": (
        f"method={{objective: {{name: infopro, task: softmax, {_INFOPRO_16}}}, feedback: block}}",
        _K16,
    ),
}
# The rows that the others are compared with, of 8 stages and of 16.
_REFERENCE, _REFERENCE_16 = "dgl", "dgl, K=16"


def main(argv: Sequence[str] | None = None) -> int:
    """Train the rows that have no result yet, and write the table; return the exit status."""
    arguments, overrides = _build_parser().parse_known_args(argv)
    results_file = arguments.table.with_suffix(".jsonl")
    finished = {(result["row"], result["seed"]) for result in read(results_file)}
    arguments.table.parent.mkdir(parents=True, exist_ok=True)

    has_failed = False
    with ThreadPoolExecutor(arguments.beside) as threads:
        training = []
        for seed in arguments.seeds:
            for name in arguments.rows:
                if (name, seed) not in finished:
                    training.append(threads.submit(_train, name, seed, arguments.dir, overrides))
        # Every result is written at once, because the study may be stopped.
        for future in as_completed(training):
            result = future.result()
            if result is None:
                has_failed = True
                continue
            with open(results_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            write_output(arguments.table, table(read(results_file), overrides))

    write_output(arguments.table, table(read(results_file), overrides))
    return int(has_failed)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="study", description="every method on one small protocol")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--table", type=Path, default=Path("docs/study.md"))
    text = "rows at once, a core each"
    parser.add_argument("--beside", type=int, default=2, metavar="N", help=text)
    return parser


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results in order; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_dir(folder: Path, name: str, seed: int) -> Path:
    """Return the run directory of a row and a seed."""
    short_name = name.replace(" ", "_").replace(",", "").replace("=", "")
    return folder / f"{short_name}-seed{seed}"


# -- one row ------------------------------------------------------------------------------------


def _train(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Train a row to its end; return its result, or None if it failed."""
    target = run_dir(folder, name, seed)
    keys = [f"run.seed={seed}", f"run.dir={target}", "pipeline.processes=1"]
    target.parent.mkdir(parents=True, exist_ok=True)
    status, used_cpu_s = _run_localpipe(
        ["train", PROTOCOL, *ROWS[name], *overrides, *keys], Path(f"{target}.log")
    )

    # The time of an interrupted run counts too.
    cpu_file = Path(f"{target}.cpu_s")
    with open(cpu_file, "a", encoding="utf-8") as file:
        file.write(f"{used_cpu_s:.1f}\n")
    outcome = "done"
    if status != 0:
        outcome = f"status {status}, see {target}.log"
    print(f"{name}, seed {seed}: {outcome}", flush=True)
    if status != 0:
        return None

    summary = json.loads((target / "summary.json").read_text(encoding="utf-8"))
    cpu_s = sum(map(float, cpu_file.read_text(encoding="utf-8").split()))
    result = {"row": name, "seed": seed}
    for key in _SUMMARY_KEYS:
        result[key] = summary[key]
    result["cpu_s"] = round(cpu_s)
    return result


def _run_localpipe(arguments: Sequence[str], log: Path) -> tuple[int, float]:
    """Run a command of localpipe; return its exit status and CPU seconds of all its processes."""
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "localpipe", *arguments], stdout=file, stderr=file
        )
        _, wait_status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(wait_status)
    return process.returncode, usage.ru_utime + usage.ru_stime


# -- the table ----------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Any]], overrides: Sequence[str] = ()) -> str:
    """Return the table of every row that has at least one finished seed, as Markdown."""
    protocol = " ".join([PROTOCOL, *overrides])
    lines = [
        "# The methods compared",
        "",
        f"Protocol: `{protocol}`; command: `make study`.",
        "Accuracy is the whole network's on the test images after the last epoch,",
        "mean +- sample deviation (n seeds). A difference is taken seed by seed.",
        "Rows of 16 stages are compared with the dgl of 16.",
        f"It is *not resolved* under {RESOLVED:g} points with one seed, and with several",
        "if its 95 % interval (by t) holds 0. MACs are millions a sample.",
        "CPU seconds are the whole run's, all processes and the evaluation included,",
        "on a machine that did other work too.",
        "`study.jsonl` has the result of each row, one JSON object a line.",
        "",
        "| row | accuracy % (n) | against dgl | train MMACs | inference MMACs | KiB saved | CPU s "
        "| probe of each stage % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    # A row for every name with a result; the order is that of ROWS.
    by_row: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
    for result in results:
        if result["row"] in by_row:
            by_row[result["row"]].append(result)
    missing = []
    for name, runs in by_row.items():
        if runs:
            reference = _REFERENCE_16 if name.endswith(", K=16") else _REFERENCE
            lines.append(_format_row(name, runs, reference, by_row[reference]))
        else:
            missing.append(name)
    if missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _format_row(
    name: str,
    runs: list[dict[str, Any]],
    reference_name: str,
    reference: list[dict[str, Any]],
) -> str:
    accuracy = list(_list_accuracies(runs).values())
    first = runs[0]
    difference = ""
    if name != reference_name:
        difference = against(_list_accuracies(runs), _list_accuracies(reference))
    probes = [f"{100 * probe:.0f}" for probe in first["probe_accuracy_per_stage"] or []]
    cells = [
        name,
        f"{statistics.mean(accuracy):.1f}{_format_spread(accuracy)} ({len(accuracy)})",
        difference,
        f"{first['train_macs_per_sample'] / 1e6:.0f}",
        f"{first['inference_macs_per_sample'] / 1e6:.0f}",
        f"{max(first['saved_activation_bytes_per_sample']) / 1024:,.0f}",
        f"{statistics.mean(run['cpu_s'] for run in runs):.0f}",
        " ".join(probes),
    ]
    return f"| {' | '.join(cells)} |"


def against(accuracy: dict[int, float], reference: dict[int, float]) -> str:
    """Return the mean difference in points over the common seeds, its deviation, and a doubt.

    accuracy, reference: by seed. Rows of the same seed have the same weights and order of the data,
    so they are compared in pairs.
    """
    differences = []
    for seed in accuracy:
        if seed in reference:
            differences.append(accuracy[seed] - reference[seed])
    if not differences:
        return ""
    text = f"{statistics.mean(differences):+.1f}{_format_spread(differences)}"
    if abs(statistics.mean(differences)) < _find_uncertainty(differences):
        return f"{text}, not resolved"
    return text


def _find_uncertainty(differences: list[float]) -> float:
    """Return half the confidence interval of the mean, or a fixed value with one seed."""
    count = len(differences)
    if count == 1:
        return RESOLVED
    standard_errors = float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1))
    return standard_errors * statistics.stdev(differences) / math.sqrt(count)


def _list_accuracies(runs: list[dict[str, Any]]) -> dict[int, float]:
    """Return the test accuracy in per cent, by seed."""
    return {run["seed"]: 100 * run["test_accuracy"] for run in runs}


def _format_spread(values: list[float]) -> str:
    if len(values) == 1:
        return ""
    return f" +- {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
