"""The steps of `localpipe doctor --gpu` in their order, each with its share of the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_STEPS = "localpipe.doctor.gpu.steps"


@dataclass(frozen=True)
class GpuStep:
    """One step: a question, and the function that answers it in a process of its own.

    share_s: its seconds, were all steps to run in eight minutes. Other times are divided in the
    same ratio. function: `module:function`, called with a StepContext.
    """

    name: str
    question: str
    share_s: float
    function: str


# What matters most comes first, because a machine may be lent for a few minutes.
STEPS = (
    GpuStep(
        "versions",
        "which versions, devices and links are here?",
        35,
        f"{_STEPS}.versions:run",
    ),
    GpuStep(
        "exactness",
        "does one process repeat its own weights, bit for bit?",
        40,
        f"{_STEPS}.exactness:run",
    ),
    GpuStep(
        "nccl",
        "do several processes over NCCL give the weights of one?",
        70,
        f"{_STEPS}.nccl_edges:run",
    ),
    GpuStep(
        "flat memory",
        "is memory the same after 1,000 steps?",
        55,
        f"{_STEPS}.flat_memory:run",
    ),
    GpuStep(
        "infopro memory",
        "does InfoPro save the memory that its paper says?",
        30,
        f"{_STEPS}.infopro_memory:run",
    ),
    GpuStep(
        "loader",
        "does the loader keep up with the device?",
        25,
        f"{_STEPS}.loader_rate:run",
    ),
    GpuStep(
        "throughput",
        "how fast are the stages, beside the peers?",
        140,
        f"{_STEPS}.throughput:run",
    ),
    GpuStep(
        "energy",
        "how much energy does a sample take?",
        25,
        f"{_STEPS}.energy:run",
    ),
    GpuStep(
        "accuracy",
        "what does ResNet-32 reach on CIFAR-10 in the time that is left?",
        60,
        f"{_STEPS}.accuracy:run",
    ),
)


def limit_s(left_s: float, step: GpuStep, later: Sequence[GpuStep]) -> float:
    """Return the seconds that a step may take: its share of the time that is left.

    left_s: for the step and all later ones. So the time that a step does not use belongs to those
    after it, and a step that uses all of its time takes none of theirs.
    """
    shares_s = step.share_s + sum(other.share_s for other in later)
    return max(0.0, left_s) * step.share_s / shares_s
