"""Files of tokens that a tokenizer has written: `train.bin` and `val.bin`, numbers in a row."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localpipe.config.keys import Data
from localpipe.config.resolve import token_dtype
from localpipe.data.images import RawSamples, expand_path, refuse_test_share
from localpipe.data.samples import InputFacts
from localpipe.data.text.windows import Windows
from localpipe.errors import UserError

TRAIN, TEST = "train.bin", "val.bin"
_CHUNK = 2**24  # numbers that are looked at in one go


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens, memory-mapped. digest: of its content."""

    tokens: NDArray[Any]
    digest: bytes


def load_tokens(config: Data) -> RawSamples:
    """Map the windows of data.length tokens of `train.bin` and `val.bin` in the folder data.root.

    The files are little-endian numbers without a header, uint16 or uint32 as data.token_dtype says.
    Both are read once, for their digest and their largest token. Raises UserError for a missing
    file or vocabulary, for a size that is no multiple of a number's, for a file without a window,
    and for a token that the vocabulary lacks.
    """
    refuse_test_share(config)
    vocabulary = config.vocabulary
    if vocabulary is None:
        raise UserError(
            "data: tokens needs data.vocabulary, the number of tokens that there are; set it"
        )
    root = expand_path(config.root)
    dtype = np.dtype(_find_dtype(config))
    train, test = (_open(root / name, dtype, vocabulary, config.length) for name in (TRAIN, TEST))
    digest = hashlib.sha256(train.digest + test.digest).hexdigest()
    return RawSamples(
        train=Windows.cut(train.tokens, config.length),
        test=Windows.cut(test.tokens, config.length),
        num_classes=vocabulary,
        inputs=InputFacts((config.length,), "int64", "next_token", digest),
    )


def _find_dtype(config: Data) -> str:
    """Return numpy's name of the numbers, little-endian."""
    return {"uint16": "<u2", "uint32": "<u4"}[token_dtype(config)]


def _open(path: Path, dtype: np.dtype[Any], vocabulary: int, length: int) -> TokenFile:
    """Map a file and check it; raise UserError as `load_tokens` does."""
    tokens = _map(path, dtype)
    if len(tokens) <= length:
        raise UserError(
            f"data: {path} has {len(tokens)} tokens; expected at least {length + 1}, one more than "
            "data.length; lower it, or give more text"
        )
    # One pass for both, and only a part is in memory at a time.
    digest = hashlib.sha256()
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        digest.update(chunk.tobytes())
        _check_tokens(path, chunk, start, vocabulary)
    return TokenFile(tokens, digest.digest())


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        size = path.stat().st_size
        if size == 0:
            return np.empty(0, dtype)  # which cannot be mapped
        if size % dtype.itemsize:
            raise UserError(
                f"data: {path} has {size} bytes, no multiple of {dtype.itemsize}; expected "
                f"{dtype.name} in a row; set data.token_dtype, or write the file again"
            )
        return np.memmap(path, dtype, mode="r")
    except OSError as error:
        raise UserError(
            f"data: cannot read {path}: {error.strerror}; expected {TRAIN} and {TEST} in "
            "data.root, numbers in a row"
        ) from None


def _check_tokens(path: Path, chunk: NDArray[Any], start: int, vocabulary: int) -> None:
    if int(chunk.max()) < vocabulary:
        return
    place = int(np.argmax(chunk >= vocabulary))
    raise UserError(
        f"data: token {start + place} of {path}, read as {chunk.dtype.name}, is {chunk[place]}; "
        f"expected tokens below data.vocabulary, {vocabulary}; set it, or data.token_dtype"
    )
