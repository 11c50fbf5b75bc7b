"""Trains small networks with an earlier commit's code and with this one, and compares to the bit.

    python tests/compare_with_baseline.py [--baseline 8dac677] [--only WORD]

It checks the commit out into a temporary worktree, and trains every case with both codes at once.
It prints one line a case: the name, both digests of the weights, and `equal`, or `DIFFERENT` with
the figures that differ. The status is 1 if any differs or fails. The cases name nothing but what
`localpipe` itself shows, so that files may move inside the package. It takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BASELINE = "8dac677"
ROOT = Path(__file__).resolve().parent.parent
DIGEST = "weights_sha256"
COMPARED = (
    DIGEST,
    "data_sha256",
    "test_accuracy",
    "test_accuracy_per_stage",
    "probe_accuracy_per_stage",
    "loss_per_stage",
    "steps",
)

# A mapping of sections, or a file and the words that replace its keys.
Case = dict[str, Any] | list[str]
Results = dict[str, dict[str, Any]]

SMALL = "tests/recorded/runs/small.yaml"
USER = "custom_objective.py"

CASES: dict[str, Case] = {
    "dgl, K=4": {
        "model": {"name": "resnet8"},
        "method": "dgl",
        "pipeline": {"stages": 4, "processes": 2},
    },
    "infopro contrast, R1E, 2 replicas": {
        "model": {"name": "resnet8"},
        "method": {
            "objective": {"name": "infopro", "task": "contrast"},
            "context": {"mode": "R1E"},
        },
        "pipeline": {"stages": 2, "processes": 2, "replicas": 2},
    },
    "sgr, accumulate=2": {
        "model": {"name": "resnet8"},
        "method": "sgr",
        "pipeline": {"stages": 3, "processes": 2},
        "optim": {"accumulate": 2},
    },
    "auglocal, checkpointing=block": {
        "model": {"name": "resnet14"},
        "method": "auglocal",
        "pipeline": {"stages": 4, "processes": 2},
        "run": {"checkpointing": "block"},
    },
    "vit, adamw, wire bf16": {
        "model": {"name": "vit_tiny", "args": {"patch": 8}},
        "method": "greedy",
        "pipeline": {"stages": 2, "processes": 2, "wire_dtype": "bf16"},
        "optim": {"name": "adamw", "lr": 0.001},
    },
    "a user's code, probe=linear": {
        "model": {"name": f"{USER}:blocks"},
        "method": {"objective": {"name": f"{USER}:Prototypes", "temperature": 0.5}},
        "pipeline": {"stages": 2, "processes": 2},
        "run": {"probe": "linear"},
    },
    "the stopped run, resumed": [
        SMALL,
        "method=contsup",
        "method.reconcile=cosine",
        "data.train_subset=320",
        "pipeline.processes=2",
        "run.dir=stopped",
    ],
}

# What the user's file says at its end.
CHECK = """
import os
import localpipe
assert localpipe.__file__.startswith(os.environ["PYTHONPATH"]), localpipe.__file__
"""

# What every mapping begins with: two epochs of two steps.
COMMON: dict[str, dict[str, Any]] = {
    "data": {"name": "digits", "batch_size": 32, "train_subset": 64},
    "optim": {"lr": 0.05, "schedule": "cosine_step", "epochs": 2},
    "run": {"device": "cpu", "threads": 1, "deterministic": True, "log_every": 1},
}


def main() -> int:
    """Compare all cases; return 1 if any differs."""
    parser = argparse.ArgumentParser(description="compare this code with an earlier commit's")
    parser.add_argument("--baseline", default=BASELINE, help=f"the commit ({BASELINE})")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with WORD in their name")
    parser.add_argument("--train", metavar="FILE", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    names = [name for name in CASES if asked.only in name]
    if asked.train is not None:
        return train_all(names, Path(asked.train))
    with tempfile.TemporaryDirectory(prefix="localpipe-baseline-") as folder:
        with worktree(asked.baseline, Path(folder, "code")) as old_code:
            user_file = old_code / "examples" / USER
            workers = [
                start(code, Path(folder, name), user_file, asked.only)
                for name, code in (("old", old_code), ("new", ROOT))
            ]
            statuses = [worker.wait() for worker in workers]
        if any(statuses):
            return 1
        old, new = (read(Path(folder, name, "results.json")) for name in ("old", "new"))
    width = max(map(len, names), default=0)
    verdicts = {name: verdict(old[name], new[name]) for name in names}
    for name in names:
        print(f"{name:<{width}}  {digest(old[name])}  {digest(new[name])}  {verdicts[name]}")
    return int(any(result != "equal" for result in verdicts.values()))


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Yield a checkout of a commit, and remove it at the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def start(code: Path, folder: Path, user_file: Path, only: str) -> subprocess.Popen[bytes]:
    """Start a process that trains all cases in a new folder with the code of a checkout."""
    shutil.copytree(ROOT / "tests" / "recorded" / "runs", folder / "tests" / "recorded" / "runs")
    shutil.copytree(ROOT / "tests" / "recorded" / "runs" / "stopped", folder / "stopped")
    # The workers import the user's file, so it is there that they tell whose code they run.
    (folder / USER).write_text(user_file.read_text(encoding="utf-8") + CHECK, encoding="utf-8")
    own = {"PYTHONPATH": f"{code}{os.sep}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, "--train", str(folder / "results.json"), "--only", only]
    return subprocess.Popen(words, cwd=folder, env={**os.environ, **own}, stdout=subprocess.DEVNULL)


def train_all(names: list[str], target: Path) -> int:
    """Train cases with the code that PYTHONPATH leads to; write the compared figures of each."""
    import localpipe

    expected = Path(os.environ["PYTHONPATH"], "localpipe", "__init__.py")
    assert Path(localpipe.__file__) == expected, f"{localpipe.__file__} is not {expected}"
    results: Results = {}
    for name in names:
        try:
            summary = localpipe.train(localpipe.configuration(*given(name)))
        except (localpipe.UserError, localpipe.RunError) as error:
            results[name] = {"error": str(error)}
        else:
            results[name] = {key: summary.get(key) for key in COMPARED}
    target.write_text(json.dumps(results), encoding="utf-8")
    return 0


def given(name: str) -> list[Any]:
    """Return what `localpipe.configuration` takes for a case."""
    case = CASES[name]
    if isinstance(case, list):
        return case
    sections = {**COMMON, **case}
    for section, keys in COMMON.items():
        sections[section] = {**keys, **case.get(section, {})}
    sections["run"]["dir"] = f"runs/{list(CASES).index(name)}"
    return [sections]


def verdict(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return `equal`, or in what two results differ, or why one failed."""
    for whose, result in (("old", old), ("new", new)):
        if "error" in result:
            return f"DIFFERENT: the {whose} code failed: {result['error']}"
    different = [key for key in COMPARED if old[key] != new[key]]
    return f"DIFFERENT: {', '.join(different)}" if different else "equal"


def digest(result: dict[str, Any]) -> str:
    """Return the first letters of the weights' digest."""
    return f"{result.get(DIGEST) or '-':.12}"


def read(file: Path) -> Results:
    found: Results = json.loads(file.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main())
