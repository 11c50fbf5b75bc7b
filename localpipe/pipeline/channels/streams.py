"""CUDA streams of localpipe's own. torch's come from a pool of 32 a device and may be the same."""

from __future__ import annotations

import torch

from localpipe.errors import RunError

_POOL = 32  # streams of one priority that torch makes for a device, and hands out in turn
_taken: dict[int, torch.cuda.Stream] = {}  # by their handle; they live as long as the process


def take_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of a device that no other caller has.

    Two users of one stream would wait for each other: a receive that is posted holds up all that
    comes after it. Raises RunError where torch has no more of them.
    """
    for _ in range(_POOL):
        stream = torch.cuda.Stream(device)
        if stream.cuda_stream not in _taken:
            _taken[stream.cuda_stream] = stream
            return stream
    raise RunError(
        f"nccl: a worker has more than the {_POOL} streams that torch gives to a device; "
        "begin a new run with fewer replicas next to each other, or with pipeline.backend=gloo"
    )
