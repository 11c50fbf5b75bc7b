"""What the codecs of `pipeline.wire_dtype` cost in accuracy, on the protocol of the study.

    python examples/codec_study.py [section.key=value ...] [--seeds 0 1 2]

ResNet-32 in 8 stages is trained by dgl and by auglocal with messages of fp32, int8 and int4. Runs
of a seed have the same weights and order of the data, so their differences are taken in pairs, with
a 95 % interval by t. Beside each stands the accuracy of the network as it is exported, which codes
nothing. A finished run is appended to docs/codec_study.jsonl, and is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

PROTOCOL = "configs/study/base.yaml"
METHODS = {
    "dgl": "method=dgl",
    "auglocal d=3": "method={objective: {name: auglocal, aux_depth: 3}}",
}
CODECS = ("fp32", "int8", "int4")
_CONFIDENCE = 0.95
_KEYS = ("weights_sha256", "localpipe", "torch")
Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Train what has no result yet, and print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="codec_study", description="the accuracy of every codec")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dir", type=Path, default=Path("runs/codec_study"))
    parser.add_argument("--results", type=Path, default=Path("docs/codec_study.jsonl"))
    arguments, overrides = parser.parse_known_args(argv)
    finished = {
        (result["method"], result["codec"], result["seed"]) for result in read(arguments.results)
    }
    for seed in arguments.seeds:
        for method in METHODS:
            for codec in CODECS:
                if (method, codec, seed) in finished:
                    continue
                new_result = _train(method, codec, seed, arguments.dir, overrides)
                print(f"{method}, {codec}, seed {seed}: {new_result['accuracy']:.4f}", flush=True)
                with open(arguments.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(new_result) + "\n")
    print("\n".join(table(read(arguments.results))))
    return 0


def read(path: Path) -> list[Result]:
    """Return the results in order; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _train(method: str, codec: str, seed: int, folder: Path, overrides: Sequence[str]) -> Result:
    """Train one run to its end, and evaluate its network without a codec."""
    name = f"{method}-{codec}-{seed}".replace(" ", "_").replace("=", "")
    run_dir = folder / name
    keys = [f"run.seed={seed}", f"run.dir={run_dir}", f"pipeline.wire_dtype={codec}"]
    _call("train", PROTOCOL, METHODS[method], "pipeline.processes=1", *overrides, *keys)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    text = _call("eval", str(run_dir), "pipeline.wire_dtype=fp32", "--json")
    result: Result = {"method": method, "codec": codec, "seed": seed}
    result["accuracy"] = summary["test_accuracy"]
    result["exported_accuracy"] = json.loads(text.splitlines()[-1])["metric"]["value"]
    for key in _KEYS:
        result[key] = summary[key]
    return result


def _call(*words: str) -> str:
    """Return the standard output of a command of localpipe. Raises where it fails."""
    command = [sys.executable, "-m", "localpipe", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def table(results: Sequence[Result]) -> list[str]:
    """Return the lines of the table as Markdown, in points of accuracy."""
    lines = [
        "| method | codec | accuracy % (n) | against fp32 (95 % interval) | exported % |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        base = _list_accuracies(results, method, "fp32", "accuracy")
        for codec in CODECS:
            accuracy = _list_accuracies(results, method, codec, "accuracy")
            if not accuracy:
                continue
            exported = _list_accuracies(results, method, codec, "exported_accuracy")
            cells = [
                method,
                codec,
                f"{statistics.mean(accuracy.values()):.2f} ({len(accuracy)})",
                describe_difference([accuracy[s] - base[s] for s in accuracy if s in base]),
                f"{statistics.mean(exported.values()):.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def describe_difference(differences: Sequence[float]) -> str:
    """Return the mean of paired differences and the half-width of its interval, if it has one."""
    if not differences:
        return ""
    mean, count = statistics.mean(differences), len(differences)
    if count == 1:
        return f"{mean:+.2f}"
    quantile = float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1))
    half_width = quantile * statistics.stdev(differences) / math.sqrt(count)
    return f"{mean:+.2f} +- {half_width:.2f}"


def _list_accuracies(
    results: Sequence[Result], method: str, codec: str, key: str
) -> dict[int, float]:
    """Return an accuracy in per cent, by seed."""
    accuracies = {}
    for result in results:
        if (result["method"], result["codec"]) == (method, codec):
            accuracies[result["seed"]] = 100 * result[key]
    return accuracies


if __name__ == "__main__":
    raise SystemExit(main())
