"""The size of what `localpipe doctor --gpu` runs: in full, or tiny, to rehearse without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Networks, batches, steps and seconds of all steps of the doctor.

    checked: the network whose weights are compared, on `samples` made-up images (`image` pixels
    wide) in batches of `batch`. most_ranks: over NCCL, as the network has so many blocks. depths:
    of pipelines over NCCL. flat_steps: the steps after which memory is compared. flat_ranks:
    whether it is compared over NCCL too.
    memory_*: InfoPro's memory. speed_*: throughput, energy and the loader. rate_s: seconds of a
    rate or an energy. window_s, windows: of `localpipe bench`. accuracy_*: CIFAR-10,
    accuracy_epochs at most.
    """

    checked: str
    samples: int
    image: int
    batch: int
    most_ranks: int
    depths: tuple[int, ...]
    flat_steps: tuple[int, int]
    flat_ranks: bool
    memory_network: str
    memory_image: int
    memory_batch: int
    speed_network: str
    speed_image: int
    speed_batch: int
    rate_s: float
    windows: int
    window_s: float
    accuracy_network: str
    accuracy_batch: int
    accuracy_epochs: int


FULL = Size(
    checked="resnet20",
    samples=512,
    image=32,
    batch=64,
    most_ranks=8,
    depths=(1, 4),
    flat_steps=(20, 1000),
    flat_ranks=True,
    memory_network="resnet110",
    memory_image=32,
    memory_batch=1024,
    speed_network="resnet32",
    speed_image=32,
    speed_batch=512,
    rate_s=3.0,
    windows=2,
    window_s=1.0,
    accuracy_network="resnet32",
    accuracy_batch=512,
    accuracy_epochs=160,
)
TINY = Size(
    checked="resnet8",
    samples=24,
    image=8,
    batch=8,
    most_ranks=4,
    depths=(4,),
    flat_steps=(8, 16),
    flat_ranks=False,
    memory_network="resnet32",
    memory_image=16,
    memory_batch=4,
    speed_network="resnet8",
    speed_image=16,
    speed_batch=8,
    rate_s=0.1,
    windows=1,
    window_s=0.02,
    accuracy_network="resnet8",
    accuracy_batch=16,
    accuracy_epochs=1,
)
SIZES: Mapping[str, Size] = {"full": FULL, "tiny": TINY}
