"""Random streams as pure functions: no draw of a run depends on earlier draws.

Weights depend on (seed, unit), dropout on (seed, stage, replica, step), data on (seed, epoch,
index).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

T = TypeVar("T")
_MASK = (1 << 63) - 1


def derive(seed: int, *parts: object) -> int:
    """Return 63 bits that depend on the seed and every part: an integer from 0 to 2**63 - 1.

    Parts count by their text, so 1 and "1" are the same. Their order matters.
    """
    text = "\x1f".join(str(part) for part in (seed, *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MASK


def enter_stream(seed: int, *parts: object) -> None:
    """Seed the default generators of the CPU and of CUDA, which any module's dropout uses.

    The seed is `derive(seed, *parts)`. CUDA's are seeded only if this process has used CUDA.
    """
    # torch.manual_seed also queues a seed, with a traceback, for every kind of missing device.
    number = derive(seed, *parts)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def build_unit(seed: int, unit: str, build: Callable[[], T]) -> T:
    """Return what `build` constructs on the CPU, its weights drawn from (seed, unit).

    `build` is called once. The state of the CPU's default generator is the same after it, also if
    it raises. Its errors pass through. Draws on CUDA are not covered.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "unit", unit))
        return build()


def uniform_bits(seed: int, index: NDArray[np.int64], *parts: object) -> NDArray[np.uint64]:
    """Return 64 random bits for every index, as splitmix64's finaliser of (seed, parts, index).

    Steele et al. 2014, Fast splittable pseudorandom number generators. index: (B,), not changed.
    The result is a new array of its shape.
    """
    start = np.uint64(derive(seed, *parts))
    counter = index.astype(np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):
        z = start + counter * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def permutation(seed: int, size: int, *parts: object) -> NDArray[np.int64]:
    """Return a permutation of range(size) that depends on seed and parts alone, with any numpy.

    (size,) int64, a new array. It is empty for size 0.
    """
    bits = uniform_bits(seed, np.arange(size, dtype=np.int64), *parts)
    return np.argsort(bits, kind="stable").astype(np.int64)
