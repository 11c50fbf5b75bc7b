"""Random streams as pure functions: no draw of a run depends on earlier draws.

Weights depend on (seed, unit), dropout on (seed, stage, replica, step), data on (seed, epoch,
index). The first two seed the global generators of torch, numpy and Python, so code that draws from
any of them is covered. A generator object of a module's own is not.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

T = TypeVar("T")
_MASK = (1 << 63) - 1
_MASK_32 = (1 << 32) - 1


def derive(seed: int, *parts: object) -> int:
    """Return 63 bits that depend on the seed and every part: an integer from 0 to 2**63 - 1.

    Parts count by their text, so 1 and "1" are the same. Their order matters.
    """
    text = "\x1f".join(str(part) for part in (seed, *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MASK


class HostState:
    """The state of numpy's and Python's global generators, as they were when it was made."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: dict[str, Any] = np.random.get_state(legacy=False)

    def is_current(self) -> bool:
        """Return whether nobody has drawn or seeded since: both generators are in this state."""
        if random.getstate() != self._python:
            return False
        # Compared as text, for the state holds arrays and numbers, nested.
        return pickle.dumps(np.random.get_state(legacy=False)) == pickle.dumps(self._numpy)

    def restore(self) -> None:
        """Set both generators to this state. It may be called again."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def enter_stream(seed: int, *parts: object) -> None:
    """Seed the default generators that any module's dropout uses: torch's, numpy's and Python's.

    The seed is `derive(seed, *parts)`. numpy takes its low 32 bits. CUDA's generators are seeded
    only if this process has used CUDA.
    """
    # torch.manual_seed also queues a seed, with a traceback, for every kind of missing device.
    number = derive(seed, *parts)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    _seed_host(number)


def build_unit(seed: int, unit: str, build: Callable[[], T]) -> T:
    """Return what `build` constructs on the CPU, its weights drawn from (seed, unit).

    `build` is called once, and may draw from torch, numpy and Python. The generators' states are
    the same after it, also if it raises. Its errors pass through. Draws on CUDA are not covered.
    """
    number = derive(seed, "unit", unit)
    with preserved_generators():
        torch.default_generator.manual_seed(number)
        _seed_host(number)
        return build()


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Enter a context that ends with the generators as they were: torch's CPU, numpy, Python."""
    state = HostState()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            state.restore()


@contextmanager
def seeded_host(*parts: object) -> Iterator[None]:
    """Enter a context in which numpy's and Python's generators begin at a seed of the parts.

    They are as before after it. torch's generators are left alone.
    """
    state = HostState()
    _seed_host(derive(0, *parts))
    try:
        yield
    finally:
        state.restore()


def _seed_host(number: int) -> None:
    random.seed(number)
    np.random.seed(number & _MASK_32)


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


def uniform_numbers(
    seed: int, index: NDArray[np.int64], count: int, *parts: object
) -> NDArray[np.float64]:
    """Return (B, count) float64 random numbers in [0, 1), a new array.

    index: (B,). A row depends on (seed, parts, its index) alone.
    """
    columns = [uniform_bits(seed, index, *parts, number) for number in range(count)]
    bits = np.stack(columns, 1) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def permutation(seed: int, size: int, *parts: object) -> NDArray[np.int64]:
    """Return a permutation of range(size) that depends on seed and parts alone, with any numpy.

    (size,) int64, a new array. It is empty for size 0.
    """
    bits = uniform_bits(seed, np.arange(size, dtype=np.int64), *parts)
    return np.argsort(bits, kind="stable").astype(np.int64)
