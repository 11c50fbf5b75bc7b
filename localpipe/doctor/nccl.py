"""The check of the NCCL library that is loaded."""

from __future__ import annotations

from localpipe.doctor.check import Check
from localpipe.doctor.versions import is_older
from localpipe.pipeline.channels.nccl_library import find_loaded_nccl, torch_nccl_version


def check_nccl() -> Check:
    """Compare the loaded NCCL with the one that torch was built with.

    A warning if the first two numbers of the loaded version are older, never an error. figures:
    `built_with`, `loaded` and `library` (a path or None). Only for a torch built for CUDA.
    """
    expected = torch_nccl_version()
    version, path = find_loaded_nccl()
    figures = {"built_with": expected, "loaded": version, "library": path}
    if is_older(version, expected):
        text = f"{version} is loaded, torch was built with {expected}"
        advice = (
            f"an older NCCL is first on the library path ({path}); remove it from LD_LIBRARY_PATH"
        )
        return Check("NCCL", "warning", text, advice, figures)
    return Check("NCCL", "ok", version, "", figures)
