"""Random streams as pure functions: nothing in a run depends on what was drawn before.

Weights follow from (seed, unit), dropout from (seed, stage, replica, step), data from (seed, epoch, index).
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
    """Return 63 bits that depend on the seed and every part."""
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & _MASK


def enter_stream(seed: int, *parts: object) -> None:
    """Seed the default generators of the CPU and the devices, so that any module's own dropout draws from here."""
    # torch.manual_seed would also queue a seed, with a traceback, for every kind of device that is not there.
    number = derive(seed, *parts)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def build_seeded(seed: int, unit: str, build: Callable[[], T]) -> T:
    """Build a unit on the CPU by its own constructor under its own seed; the caller's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "unit", unit))
        return build()


def uniform_bits(seed: int, index: NDArray[np.int64], *parts: object) -> NDArray[np.uint64]:
    """Return 64 random bits for every index, by the splitmix64 finaliser (Steele et al. 2014) of (seed, parts, index)."""
    with np.errstate(over="ignore"):
        z = np.uint64(derive(seed, *parts)) + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def permutation(seed: int, size: int, *parts: object) -> NDArray[np.int64]:
    """Return a permutation of range(size) that depends on the seed and the parts alone, on any numpy."""
    bits = uniform_bits(seed, np.arange(size, dtype=np.int64), *parts)
    return np.argsort(bits, kind="stable").astype(np.int64)
