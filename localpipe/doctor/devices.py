"""Checks of the NVIDIA driver, the CUDA devices, and which devices reach each other's memory."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from localpipe.doctor.check import GIB, Check
from localpipe.pipeline.workers.device import emulated_key

_MAX_PAIRS = 8


def check_cuda() -> Check:
    """Compare the driver with the CUDA version that torch was built for.

    A warning if there is a driver and torch sees no device. No driver is ok. figures: `built_for`
    and `driver` (versions or None), and `devices` (their number).
    """
    cuda, driver = torch.version.cuda, _driver_version()
    devices = torch.cuda.device_count()
    figures = {"built_for": cuda, "driver": driver, "devices": devices}
    if devices:
        return Check("CUDA", "ok", f"driver {driver}, torch built for CUDA {cuda}", "", figures)
    if driver is None:
        return Check("CUDA", "ok", "no NVIDIA driver; training runs on the CPU", "", figures)

    # There is a driver, yet torch sees no device.
    advice = "update the driver, or look at CUDA_VISIBLE_DEVICES"
    if cuda is None:
        advice = "install a torch built for CUDA"
    text = f"driver {driver}, but torch (built for CUDA {cuda}) sees no device"
    return Check("CUDA", "warning", text, f"{advice}; in Docker, add --gpus all", figures)


def _driver_version() -> str | None:
    """Return the version of the kernel's NVIDIA driver, or None if there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    first, _, _ = text.partition("\n")
    for part in first.split():
        if part[0].isdigit() and "." in part:
            return part
    return None


def check_devices() -> Check:
    """List the devices and compare them with the architectures that torch has kernels for.

    Call it only with a CUDA device, else it raises ValueError. A warning if a device is newer than
    the newest architecture. figures: `list`, with `name`, `memory_bytes` and `capability` of every
    device.
    """
    lines, figures, capabilities = [], [], []
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        lines.append(_describe_device(properties))
        capability = [properties.major, properties.minor]
        capabilities.append(properties.major * 10 + properties.minor)
        figures.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": capability,
            }
        )

    # Equal devices share a line.
    text = "; ".join(f"{lines.count(line)} x {line}" for line in dict.fromkeys(lines))
    if max(capabilities) > _newest_architecture():
        advice = "this torch has no kernels for them; take a newer one"
        return Check("devices", "warning", text, advice, {"list": figures})
    return Check("devices", "ok", text, "", {"list": figures})


def _describe_device(properties: Any) -> str:
    memory = properties.total_memory / GIB
    capability = f"{properties.major}.{properties.minor}"
    text = f"{properties.name}, {memory:.0f} GiB, compute capability {capability}"
    if emulated_key(properties.name):
        return f"{text} (emulated: true)"
    return text


def _newest_architecture() -> int:
    """Return the newest architecture that torch was built for: 90 for `sm_90`, 0 for none."""
    newest = 0
    for name in torch.cuda.get_arch_list():
        if name.startswith("sm_"):
            number = name.removeprefix("sm_").rstrip("af")
            newest = max(newest, int(number))
    return newest


def check_links() -> Check:
    """List the pairs of devices without peer access. Their messages go through the host.

    A warning if there is such a pair, never an error. One device is ok. figures: `pairs` (their
    number) and `without_peer_access` (pairs of device numbers).
    """
    count = torch.cuda.device_count()
    pairs = list(combinations(range(count), 2))
    without_access = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    figures = {"pairs": len(pairs), "without_peer_access": without_access}
    if not pairs:
        return Check("links", "ok", "one device", "", figures)
    if not without_access:
        text = f"peer access between all {count} devices"
        return Check("links", "ok", text, "", figures)

    pairs_text = ", ".join(f"{a}-{b}" for a, b in without_access[:_MAX_PAIRS])
    if len(without_access) > _MAX_PAIRS:
        pairs_text += ", ..."
    advice = (
        "keep neighbouring stages on devices that have it; `nvidia-smi topo -m` shows the links"
    )
    text = f"no peer access between devices {pairs_text}"
    return Check("links", "warning", text, advice, figures)
