"""Checks of the processor cores and of the variables that set the number of threads."""

from __future__ import annotations

import torch

from localpipe.doctor.check import Check
from localpipe.environment import affinity_cores, available_cores, cpu_quota, read_variables

_COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_BINDING_VARIABLES = ("OMP_PROC_BIND", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
_NOT_BOUND = ("false", "none", "disabled")


def check_cores() -> Check:
    """Compare the cores that this process may use with the quota of its container.

    A warning if the quota is smaller, never an error. figures: `cores` (int, of the affinity) and
    `quota` (cores as a float, None without one).
    """
    cores, quota = affinity_cores(), cpu_quota()
    figures = {"cores": cores, "quota": quota}
    if quota is not None and quota < cores:
        usable = available_cores()
        text = f"{cores}, but the container may use {quota:g} at a time"
        advice = f"auto counts {usable}; keep workers x run.threads at {usable} if you set them"
        return Check("cores", "warning", text, advice, figures)
    return Check("cores", "ok", str(cores), "", figures)


def check_threads() -> Check:
    """Look for variables that bind the threads of all workers to the same cores.

    A warning if OMP_PROC_BIND, KMP_AFFINITY or GOMP_CPU_AFFINITY binds threads, never an error.
    figures: `torch` (its number of threads) and `environment` ({name: value} of the variables that
    are set).
    """
    variables = read_variables(_COUNT_VARIABLES + _BINDING_VARIABLES)
    settings = [f"{name}={value}" for name, value in variables.items()]
    settings_text = ", ".join(settings) or "no variable set"
    text = f"torch takes {torch.get_num_threads()}; {settings_text}"
    figures = {"torch": torch.get_num_threads(), "environment": variables}
    binding = []
    for name in _BINDING_VARIABLES:
        if variables.get(name, "false").lower() not in _NOT_BOUND:
            binding.append(name)
    if binding:
        advice = f"unset {' '.join(binding)}: it ties the threads of all workers to the same cores"
        return Check("threads", "warning", text, advice, figures)
    return Check("threads", "ok", f"{text}; a worker's own number is run.threads", "", figures)
