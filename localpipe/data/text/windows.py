"""Windows of a sequence of tokens: equally long, by index, without overlap.

A window's target is the window one token later:

    tokens   t0 t1 t2 t3 t4 t5 t6 t7 t8 t9        length 3
    input    [t0 t1 t2][t3 t4 t5][t6 t7 t8]
    target   [t1 t2 t3][t4 t5 t6][t7 t8 t9]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localpipe.fields import INPUT


@dataclass(frozen=True)
class Windows:
    """The windows at `rows` (N,) of a sequence of tokens, read by index.

    tokens: one dimension, of any integer type. It may be memory-mapped, and is not copied. length:
    the tokens of a window.
    """

    tokens: NDArray[Any]
    length: int
    rows: NDArray[np.int64]

    @staticmethod
    def cut(tokens: NDArray[Any], length: int) -> Windows:
        """Return all windows of a sequence. The remainder is dropped."""
        count = max(0, (len(tokens) - 1) // length)
        return Windows(tokens, length, np.arange(count, dtype=np.int64))

    @property
    def labels(self) -> None:
        """None: a target is a token for every token."""
        return None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: NDArray[np.int64]) -> Windows:
        """Return the windows at `rows` (B,), in that order, without a copy of the tokens."""
        return Windows(self.tokens, self.length, self.rows[rows])

    def read(self, index: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Return `input` and `target`, (B, length) int64, of the windows at `index` (B,).

        The arrays are new memory. Raises IndexError for an index out of range.
        """
        starts = self.rows[index] * self.length
        places = starts[:, None] + np.arange(self.length + 1)
        # Both lie in memory of their own, as a message wants them.
        tokens = self.tokens[places].astype(np.int64)
        return {
            INPUT: np.ascontiguousarray(tokens[:, :-1]),
            "target": np.ascontiguousarray(tokens[:, 1:]),
        }
