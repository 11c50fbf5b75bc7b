"""The energy that a device has used, as the driver's library NVML tells it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = "libnvidia-ml.so.1"


class NvmlError(Exception):
    """NVML is not there, or does not tell it. The text is the reason, in one line."""


def open_energy_meter(device: int, library: Any = None) -> Callable[[], float]:
    """Return a function that returns the joules that a CUDA device has used so far.

    Only differences have a meaning. device: its number for torch. library: a ctypes.CDLL of NVML,
    None for that of the driver. Raises NvmlError without the library, and where the device does not
    count its energy. It initialises CUDA.
    """
    if library is None:
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError:
            raise NvmlError(f"there is no NVML ({_LIBRARY})") from None
    _check_status(library, library.nvmlInit_v2(), "nvmlInit")
    handle = ctypes.c_void_p()
    # By its UUID, because the numbers of NVML know nothing of CUDA_VISIBLE_DEVICES.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    status = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
    _check_status(library, status, f"no device {uuid}")

    def read_joules() -> float:
        millijoules = ctypes.c_ulonglong()
        status = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        _check_status(library, status, "the device's energy")
        return millijoules.value / 1000

    read_joules()
    return read_joules


def _check_status(library: Any, status: int, action: str) -> None:
    if status == 0:
        return
    describe = library.nvmlErrorString
    describe.restype = ctypes.c_char_p
    reason = (describe(status) or b"").decode(errors="replace")
    raise NvmlError(f"NVML: {action}: {reason or f'error {status}'}")
