"""Versions, devices and links: the checks of the plain doctor, the topology, Triton, NVML."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from importlib import metadata

from localpipe.doctor.check import Check
from localpipe.doctor.doctor import check_machine
from localpipe.doctor.gpu.nvml import NvmlError, open_energy_meter
from localpipe.doctor.gpu.step_context import StepContext
from localpipe.errors import first_line

_TOPOLOGY = ("nvidia-smi", "topo", "-m")
_TOPOLOGY_LIMIT_S = 20.0


def run(context: StepContext) -> None:
    """Add a finding for every check of `localpipe doctor`, and for what only GPUs have."""
    # A ping may take all the time, so what takes none comes first. The ping over gloo forks, so
    # nothing may initialise CUDA before it.
    _add_topology(context)
    _add_triton(context)
    for check in check_machine(False, context.folder):
        _add_check(context, check)
    _add_nvml(context)


def _add_check(context: StepContext, check: Check) -> None:
    text = check.found
    if check.status != "ok":
        text = f"{check.status}: {check.found}; {check.advice}"
    add = context.add_ok
    if check.status == "error":
        add = context.add_failure
    add(check.name, text, **check.figures)


def _add_topology(context: StepContext) -> None:
    """Add the links between devices, cores and network cards, as nvidia-smi draws them."""
    if shutil.which(_TOPOLOGY[0]) is None:
        context.add_absence("topology", "there is no nvidia-smi")
        return
    try:
        result = subprocess.run(
            _TOPOLOGY, capture_output=True, text=True, timeout=_TOPOLOGY_LIMIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        context.add_absence("topology", first_line(error))
        return
    lines = [line.rstrip() for line in result.stdout.replace("\t", "  ").splitlines()]
    context.add_ok("topology", "drawn below the table", lines=[line for line in lines if line])


def _add_triton(context: StepContext) -> None:
    if importlib.util.find_spec("triton") is None:
        context.add_absence("Triton", "it is not installed, so run.capture=compile has no kernels")
        return
    version = metadata.version("triton")
    context.add_ok("Triton", version, triton=version)


def _add_nvml(context: StepContext) -> None:
    """Add whether the driver's library tells the energy of the first device."""
    context.note_machine()  # it initialises CUDA
    try:
        open_energy_meter(0)
    except NvmlError as error:
        context.add_absence("NVML", str(error))
        return
    context.add_ok("NVML", "tells the energy of a device")
