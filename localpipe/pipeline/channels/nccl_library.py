"""The NCCL library that this process has loaded, which may be another one than torch's."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch


def find_loaded_nccl() -> tuple[str, str | None]:
    """Return the version and the path of the NCCL library that this process has loaded.

    It may be another one than torch was built with. The path is None, and the version torch's, if
    no library of that name is loaded.
    """
    # A line of this file ends in the path of a loaded library.
    fields = Path("/proc/self/maps").read_text(encoding="utf-8").split()
    for path in fields:
        if "libnccl" in path:
            return nccl_version(ctypes.CDLL(path)), path
    return torch_nccl_version(), None


def nccl_version(library: Any) -> str:
    """Return the version of a loaded NCCL library, such as `2.30.7`.

    library: a ctypes.CDLL. Raises AttributeError if it has no `ncclGetVersion`.
    """
    number = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(number))
    # 2.8 and older are numbered 2708 for 2.7.8, newer ones 23007 for 2.30.7.
    thousands = 1000
    if number.value >= 10000:
        thousands = 10000
    major, rest = divmod(number.value, thousands)
    return f"{major}.{rest // 100}.{number.value % 100}"


def torch_nccl_version() -> str:
    """Return the version of NCCL that torch was built with. Only for a torch built for CUDA."""
    return ".".join(map(str, torch.cuda.nccl.version()))
