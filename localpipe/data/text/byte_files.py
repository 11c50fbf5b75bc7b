"""Text as bytes: one file, a folder of files, or the modules of Python's own library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localpipe.config.keys import Data
from localpipe.data.images import RawSamples, expand_path
from localpipe.data.samples import InputFacts
from localpipe.data.text.windows import Windows
from localpipe.errors import UserError

VOCABULARY = 256
TEST_SHARE = 0.1  # of the files, or of the bytes of a single file, without data.test


@dataclass(frozen=True)
class TextFile:
    """A file that has been read. name: for its place in the order of the files."""

    name: str
    content: bytes

    @property
    def digest_fraction(self) -> float:
        """A number in 0..1 that follows from the content alone."""
        return int(hashlib.sha256(self.content).hexdigest()[:8], 16) / 16**8


def load_bytes(config: Data) -> RawSamples:
    """Read the windows of data.length bytes of a text. Every target is the next byte.

    data.root is a file, or a folder whose files are read in the order of their paths, without
    hidden ones. The files of a split are joined. null stands for the top-level modules of Python's
    own library. Raises UserError for a path that cannot be read, and for a split without a window.
    """
    files = _read_files(config)
    share = TEST_SHARE if config.test is None else config.test
    train, test = _split(files, share, config)
    facts = InputFacts((config.length,), "int64", "next_token", _hash_splits(train, test))
    return RawSamples(
        train=_cut(train, "training", config),
        test=_cut(test, "test", config),
        num_classes=VOCABULARY,
        inputs=facts,
    )


def split_files(
    files: Sequence[TextFile], share: float
) -> tuple[Sequence[TextFile], Sequence[TextFile]]:
    """Return the training files and the test files, each in their order.

    files: at least two. A file is held out by its content alone, so that other files do not move
    it. Both splits get one file at least. share: of the files that are held out.
    """
    ranked = sorted(files, key=lambda file: file.digest_fraction)
    chosen = [file for file in ranked[:-1] if file.digest_fraction < share] or ranked[:1]
    names = {file.name for file in chosen}
    train = [file for file in files if file.name not in names]
    return train, [file for file in files if file.name in names]


def _split(files: Sequence[TextFile], share: float, config: Data) -> tuple[bytes, bytes]:
    """Return the bytes of both splits. The end of a single file is its test split."""
    if len(files) > 1:
        train, test = split_files(files, share)
        return _join(train), _join(test)
    if not files:
        raise UserError(
            f"data: {_describe(config)} holds no file with a byte in it; set data.root to a file, "
            "or to a folder of files"
        )
    content = files[0].content
    size = round(len(content) * (1 - share))
    return content[:size], content[size:]


def _join(files: Sequence[TextFile]) -> bytes:
    return b"".join(file.content for file in files)


def _hash_splits(train: bytes, test: bytes) -> str:
    digest = hashlib.sha256()
    for content in (train, test):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _cut(content: bytes, split: str, config: Data) -> Windows:
    """Return the windows of a split; raise UserError where there is none."""
    if len(content) <= config.length:
        raise UserError(
            f"data: the {split} split of {_describe(config)} has {len(content)} bytes; expected at "
            f"least {config.length + 1}, one more than data.length; lower it, or give more text"
        )
    return Windows.cut(np.frombuffer(content, np.uint8), config.length)


def _describe(config: Data) -> str:
    return config.root or "Python's own library"


def _read_files(config: Data) -> list[TextFile]:
    """Return the files of data.root that are not empty, in the order of their paths."""
    root = expand_path(config.root)
    if not config.root:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(path.name for path in root.glob("*.py"))
    elif root.is_dir():
        names = _list_names(root)
    elif root.exists():
        root, names = root.parent, [root.name]
    else:
        raise UserError(
            f"data: there is no {config.root}; set data.root to a file or a folder of text, or to "
            "null for Python's own library"
        )
    files = [_read_file(root, name) for name in names]
    return [file for file in files if file.content]


def _list_names(root: Path) -> list[str]:
    """Return the paths below a folder of all files in it, sorted, without hidden ones."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                names.append(path.relative_to(root).as_posix())
    return sorted(names)


def _read_file(root: Path, name: str) -> TextFile:
    try:
        return TextFile(name, (root / name).read_bytes())
    except OSError as error:
        raise UserError(
            f"data: cannot read {root / name}: {error.strerror}; make it readable, or take it away"
        ) from None
