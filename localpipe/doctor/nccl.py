"""The check of the NCCL library that is loaded."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from localpipe.doctor.check import Check
from localpipe.doctor.versions import is_older


def check_nccl() -> Check:
    """Compare the loaded NCCL with the one that torch was built with.

    A warning if the first two numbers of the loaded version are older, never an error. figures:
    `built_with`, `loaded` and `library` (a path or None). Only for a torch built for CUDA.
    """
    expected = _torch_nccl_version()
    version, path = find_loaded_nccl()
    figures = {"built_with": expected, "loaded": version, "library": path}
    if is_older(version, expected):
        text = f"{version} is loaded, torch was built with {expected}"
        advice = (
            f"an older NCCL is first on the library path ({path}); remove it from LD_LIBRARY_PATH"
        )
        return Check("NCCL", "warning", text, advice, figures)
    return Check("NCCL", "ok", version, "", figures)


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
    return _torch_nccl_version(), None


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


def _torch_nccl_version() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))
