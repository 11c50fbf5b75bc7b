"""The machine as the steps see it: devices, versions, and what it lacks."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from typing import Any

import torch

from localpipe.doctor.versions import is_older
from localpipe.environment import SHARED_GPU, available_cores
from localpipe.pipeline.channels.nccl_library import find_loaded_nccl
from localpipe.pipeline.workers.device import emulated_key

_SHARING_NCCL = "2.30"
# Several ranks on one device: without multicast, and with few blocks, so that all fit at once.
SHARING_VARIABLES = {SHARED_GPU: "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2"}


def describe_machine() -> dict[str, Any]:
    """Return the devices and the versions. It initialises CUDA in this process.

    Keys: `devices` (their names), `emulated` (whether one of them is no real device), `torch`,
    `cuda` and `nccl` (versions), and `cores` (that this process may use).
    """
    names = []
    for device in range(torch.cuda.device_count()):
        names.append(torch.cuda.get_device_name(device))
    return {
        "devices": names,
        "emulated": any(emulated_key(name) for name in names),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": find_loaded_nccl()[0],
        "python": platform.python_version(),
        "cores": available_cores(),
    }


def find_sharing_problem(machine: Mapping[str, Any]) -> str | None:
    """Return why several ranks of NCCL cannot share a device here, None where they can."""
    if is_older(machine["nccl"], _SHARING_NCCL):
        return f"several ranks on one device need NCCL {_SHARING_NCCL}, here is {machine['nccl']}"
    return None


def find_compiling_problem(machine: Mapping[str, Any]) -> str | None:
    """Return why torch.compile cannot work for the devices here, None where it may."""
    if machine["emulated"]:
        return "the emulated device runs no kernels of Triton"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return None
