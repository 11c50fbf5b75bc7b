"""The text study: one small decoder of bytes, trained in several ways, beside two plain rivals.

    python examples/text_study.py [section.key=value ...] [--seeds 0 1 2] [--rows NAME ...]

All rows have the data, the network and the steps of `configs/gpt_bytes.yaml`. A finished row is
appended to docs/text_study.jsonl, one JSON object a line, and is not trained again. The table goes
to docs/text_study.md.

The rivals see the same training bytes. One is a model of the last two bytes, whose counts are
smoothed by the method of Witten and Bell (1991). The other is `xz -9`: what the test bytes add to
the compressed training bytes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localpipe import config as configs
from localpipe import data
from localpipe.data.dataset import epoch_order
from localpipe.data.text.windows import Windows
from localpipe.files import write_output
from localpipe.runs.directory import RunDirectory

PROTOCOL = "gpt_bytes"
# The keys of every row, on top of the protocol's.
ROWS: dict[str, tuple[str, ...]] = {
    "end to end": ("pipeline.stages=1", "pipeline.cuts=equal"),
    "dgl, 2 stages": ("method=dgl", "pipeline.cuts=[2]", "pipeline.stages=2"),
    "dgl, 4 stages": ("method=dgl",),
    "dgl + readout, 4 stages": ("method={objective: dgl, feedback: readout}",),
    "auglocal, 2 stages": ("method=auglocal", "pipeline.cuts=[2]", "pipeline.stages=2"),
    "auglocal, 4 stages": ("method=auglocal",),
}
RIVALS = ("order-2 bytes", "xz -9")
_BYTES = 256
_FIGURES = ("test_accuracy", "wall_s", "steps", "weights_sha256", "localpipe", "torch")
Bytes = NDArray[np.int64]


def main(argv: Sequence[str] | None = None) -> int:
    """Train the rows that have no result yet, and write the table; return the exit status."""
    arguments, overrides = _build_parser().parse_known_args(argv)
    results = arguments.table.with_suffix(".jsonl")
    finished = {(result["row"], result["seed"]) for result in read(results)}
    for seed in arguments.seeds:
        for name in arguments.rows:
            if (name, seed) in finished:
                continue
            result = measure(name, seed, arguments.dir, overrides)
            if result is None:
                return 1
            # Every result is written at once, because the study may be stopped.
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            write_output(arguments.table, table(read(results)).encode())
    write_output(arguments.table, table(read(results)).encode())
    return 0


def _build_parser() -> argparse.ArgumentParser:
    names = [*RIVALS, *ROWS]
    parser = argparse.ArgumentParser(prog="text_study", description="a decoder of bytes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=names, choices=names, metavar="ROW")
    parser.add_argument("--dir", type=Path, default=Path("runs/text_study"))
    parser.add_argument("--table", type=Path, default=Path("docs/text_study.md"))
    return parser


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results in order; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Return the result of a row, or None if its training failed."""
    if name not in RIVALS:
        return _train(name, seed, folder, overrides)
    train, test = read_bytes(seed, overrides)
    bits = count_order_2(train, test) if name == RIVALS[0] else count_xz(train, test)
    print(f"{name}, seed {seed}: {bits:.4f} bits per byte", flush=True)
    return {"row": name, "seed": seed, "bits_per_byte": bits}


def _train(name: str, seed: int, folder: Path, overrides: Sequence[str]) -> dict[str, Any] | None:
    run_dir = folder / f"{name.replace(', ', '_').replace(' ', '_')}-seed{seed}"
    words = [*ROWS[name], "pipeline.processes=1", *overrides]
    words += [f"run.seed={seed}", f"run.dir={run_dir}"]
    command = [sys.executable, "-m", "localpipe", "train", PROTOCOL, *words]
    if subprocess.run(command, check=False).returncode != 0:
        return None
    summary = RunDirectory(run_dir).summary()
    assert summary is not None, "the run has ended"
    bits = summary["test_bits_per_byte_per_stage"]
    figures = {key: summary[key] for key in _FIGURES}
    return {"row": name, "seed": seed, "bits_per_byte": bits[-1], "per_stage": bits, **figures}


# -- the rivals ---------------------------------------------------------------------------------


def read_bytes(seed: int, overrides: Sequence[str]) -> tuple[Bytes, Bytes]:
    """Return the windows of training and of test that the networks read, (N, length + 1) each."""
    config = configs.load(PROTOCOL, [*overrides, f"run.seed={seed}"])
    dataset = data.load(config.data, seed)
    # The steps may end before the first epoch does.
    order = epoch_order(len(dataset.train), seed, 1)
    steps = config.optim.max_steps or len(order)
    train = dataset.train.take(order[: steps * config.data.batch_size])
    return _join_windows(train), _join_windows(dataset.test)


def _join_windows(split: Any) -> Bytes:
    """Return the inputs of a split's windows with the last target each, in their text's order."""
    assert isinstance(split, Windows), "a text"
    batch = Windows(split.tokens, split.length, np.sort(split.rows)).read(np.arange(len(split)))
    windows: Bytes = np.concatenate([batch["input"], batch["target"][:, -1:]], axis=1)
    return windows


def count_order_2(train: Bytes, test: Bytes) -> float:
    """Return the bits per byte of a model of the last two bytes, at the test windows' targets.

    The first target of a window has one byte before it. Witten and Bell: a context that was seen n
    times, before u different bytes, gives the shorter context's model the weight u / (n + u). Below
    the shortest one, every byte is as likely.
    """
    probability = np.full(test[:, 1:].shape, 1 / _BYTES)
    for order in (0, 1, 2):
        keys, values = _list_contexts(train, order)
        joint = np.bincount(keys * _BYTES + values, minlength=_BYTES ** (order + 1))
        counts = joint.reshape(-1, _BYTES)
        seen, different = counts.sum(1), (counts > 0).sum(1)
        keys, values = _list_contexts(test, order)
        # A context that was never seen leaves the shorter one's probability.
        total = seen[keys] + different[keys]
        shorter_share = np.divide(different[keys], total, out=np.ones(len(keys)), where=total > 0)
        seen_values, zeros = counts[keys, values], np.zeros(len(keys))
        order_share = np.divide(seen_values, total, out=zeros, where=total > 0)
        start = max(order - 1, 0)
        shape = probability[:, start:].shape
        shorter = probability[:, start:]
        probability[:, start:] = order_share.reshape(shape) + shorter_share.reshape(shape) * shorter
    return float(-np.log2(probability).mean())


def _list_contexts(windows: Bytes, order: int) -> tuple[Bytes, Bytes]:
    """Return the contexts of so many bytes as numbers, and the bytes after them."""
    start = max(order, 1)
    keys = np.zeros(windows[:, start:].shape, np.int64)
    for back in range(order, 0, -1):
        keys = keys * _BYTES + windows[:, start - back : windows.shape[1] - back]
    return keys.ravel(), windows[:, start:].ravel()


def count_xz(train: Bytes, test: Bytes) -> float:
    """Return the bits by which a test byte makes the compressed training bytes longer."""
    train_size = len(lzma.compress(_join_text(train), preset=9))
    whole_size = len(lzma.compress(_join_text(train, test), preset=9))
    return 8 * (whole_size - train_size) / len(_join_text(test))


def _join_text(*splits: Bytes) -> bytes:
    return b"".join(split[:, :-1].astype(np.uint8).tobytes() for split in splits)


# -- the table ----------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the page: one line a row, the mean over the seeds and the sample deviation."""
    lines = [
        "# The text study\n",
        "Made by `python examples/text_study.py` from [text_study.jsonl](text_study.jsonl). Every",
        "network is that of `configs/gpt_bytes.yaml`. [text.md](text.md) says what the rows are.\n",
        "| row | bits per byte | seeds | accuracy of a byte | of every stage's exit |",
        "|---|---|---|---|---|",
    ]
    for name in (*RIVALS, *ROWS):
        row_results = [result for result in results if result["row"] == name]
        if row_results:
            lines.append(_format_row(name, row_results))
    return "\n".join(lines) + "\n"


def _format_row(name: str, row_results: Sequence[dict[str, Any]]) -> str:
    bits = [result["bits_per_byte"] for result in row_results]
    cells = [name, _format_mean(bits, 3), str(len(row_results)), "", ""]
    if "test_accuracy" in row_results[0]:
        accuracies = [100 * result["test_accuracy"] for result in row_results]
        cells[3] = f"{_format_mean(accuracies, 1)} %"
        per_stage = zip(*[result["per_stage"] for result in row_results], strict=True)
        cells[4] = ", ".join(f"{statistics.mean(values):.3f}" for values in per_stage)
    return f"| {' | '.join(cells)} |"


def _format_mean(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2 or math.isnan(values[0]):
        return text
    return f"{text} +- {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
