"""Whether `cuts: time` suits workers that differ: `python examples/unequal_cores.py`.

Two workers are kept on a core each, and a process that only spins shares the second core. Then
`pipeline.cuts=time` decides a cut by each worker's own seconds, and every cut is trained, in turn,
there and back. It prints the images a second of every cut, and how close the decided one comes to
the best. Linux, with at least two cores.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from localpipe.config.load import parse
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.plan.resolve_here import load_data, resolve_here


def list_keys(arguments: argparse.Namespace, cores: list[int]) -> list[str]:
    """Return the keys of a run as a command has them, without its cut."""
    return [
        f"model.name={arguments.network}",
        "method=dgl",
        "data.name=synthetic",
        "data.image_size=32",
        f"data.samples={arguments.batch * arguments.steps}",
        f"data.batch_size={arguments.batch}",
        "data.augment=none",
        "optim.epochs=1",
        "pipeline.stages=2",
        "pipeline.processes=2",
        f"pipeline.devices=cpu:{cores[0]},cpu:{cores[1]}",
        "run.threads=1",
    ]


def spin(core: int) -> None:
    """Keep a core busy until the process is killed."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


@contextmanager
def keep_core_busy(core: int) -> Iterator[None]:
    """Give a context in which another process spins on a core."""
    spinner = multiprocessing.Process(target=spin, args=(core,), daemon=True)
    spinner.start()
    try:
        yield
    finally:
        spinner.kill()
        spinner.join()


def run(command: str, keys: list[str]) -> str:
    """Return what a localpipe command prints."""
    arguments = [sys.executable, "-m", "localpipe", command, "demo", *keys]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def decide_cut(keys: list[str], folder: Path) -> int:
    """Return the last block of stage 0 that `cuts: time` decides."""
    frozen = folder / "decided.yaml"
    run("plan", [*keys, "pipeline.cuts=time", "--freeze", str(frozen)])
    cuts: list[int] = yaml.safe_load(frozen.read_text(encoding="utf-8"))["pipeline"]["cuts"]
    return cuts[0]


def time_cut(keys: list[str], cut: int, folder: Path) -> float:
    """Return the images a second of a run with a cut."""
    run_dir = folder / "run"
    run("train", [*keys, f"pipeline.cuts=[{cut}]", f"run.dir={run_dir}", "run.overwrite=true",
                  "run.resume=never"])  # fmt: skip
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return float(summary["train_samples_per_s"])


def count_blocks(network: str) -> int:
    """Return the blocks of a network on images of 32x32."""
    sections = {
        "model": {"name": network},
        "data": {"name": "synthetic", "image_size": 32},
        "run": {"device": "cpu"},
    }
    return len(build_blueprint(resolve_here(*load_data(parse(sections, "network"), None))).blocks)


def main() -> None:
    """Print the images a second of every cut, and the decided one's part of the best."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20", help="as of model.name (resnet20)")
    parser.add_argument("--batch", type=int, default=64, help="images of a step (64)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run (40)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every cut (3)")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    keys = list_keys(arguments, cores)
    with tempfile.TemporaryDirectory() as name, keep_core_busy(cores[1]):
        folder = Path(name)
        decided = decide_cut(keys, folder)
        print(f"cuts time ends stage 0 after block {decided}", flush=True)
        cuts = list(range(count_blocks(arguments.network) - 1))
        rates: dict[int, list[float]] = {cut: [] for cut in cuts}
        for index in range(arguments.rounds):
            for cut in cuts if index % 2 == 0 else reversed(cuts):
                rates[cut].append(time_cut(keys, cut, folder))
    medians = {cut: statistics.median(values) for cut, values in rates.items()}
    best = max(medians, key=lambda cut: medians[cut])
    for cut, rate in medians.items():
        low, high = min(rates[cut]), max(rates[cut])
        mark = " (decided)" if cut == decided else ""
        print(f"after block {cut}: {rate:.0f} images/s ({low:.0f} to {high:.0f}){mark}")
    print(f"the decided cut reaches {medians[decided] / medians[best]:.3f} of the best, {best}")


if __name__ == "__main__":
    main()
