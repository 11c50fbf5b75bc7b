"""The speed of the codecs of `pipeline.wire_dtype` on this machine, on one thread.

    python examples/codec_speed.py [MIB]

A message of MIB MiB of fp32 numbers, 4 by default, is encoded and decoded again and again. The
table has the median and the slowest tenth, in GB of fp32 numbers a second.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from localpipe.fields import Field
from localpipe.pipeline.stages.codecs import CODECS

_SAMPLES = 64
_REPEATS = 100


def measure_s(call: Callable[[], object]) -> tuple[float, float]:
    """Return the median seconds of a call, and those that a tenth of the calls exceeds."""
    for _ in range(5):
        call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times), statistics.quantiles(times, n=10)[-1]


def main(arguments: list[str]) -> None:
    """Print the table."""
    mib = float(arguments[0]) if arguments else 4.0
    torch.set_num_threads(1)
    numbers = int(mib * 2**20) // (4 * _SAMPLES)
    field = Field("h.0", (numbers,), "float32")
    x = torch.randn(_SAMPLES, numbers)
    print(f"{_SAMPLES} samples of {numbers} fp32 numbers, {x.nbytes / 2**20:.1f} MiB, one thread")
    print(f"{'':6} {'bytes of fp32':>14} {'encode, GB/s':>16} {'decode, GB/s':>16}")
    for name, codec in CODECS.items():
        if name == "fp32":
            continue  # nothing is done
        coded = codec.encode(field, x)
        share = sum(tensor.nbytes for tensor in coded.values()) / x.nbytes
        speeds = []
        for call in (partial(codec.encode, field, x), partial(codec.decode, field, coded)):
            median_s, slow_s = measure_s(call)
            speeds.append(f"{x.nbytes / median_s / 1e9:8.2f} ({x.nbytes / slow_s / 1e9:.2f})")
        print(f"{name:6} {100 * share:12.1f} % {speeds[0]:>16} {speeds[1]:>16}")


if __name__ == "__main__":
    main(sys.argv[1:])
