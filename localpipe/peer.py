"""Calls to another process: what they raise means that the other side is gone, unless it is this side's own device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from localpipe.errors import PeerLostError

T = TypeVar("T")
_OWN_DEVICE = (torch.AcceleratorError, torch.OutOfMemoryError)


def guard(peer: str, call: Callable[[], T]) -> T:
    """Run a call to a peer; raise PeerLostError in place of what torch raises when the peer is gone."""
    try:
        return call()
    except _OWN_DEVICE:
        raise
    except RuntimeError as error:
        raise PeerLostError(f"lost {peer}: {str(error).splitlines()[0]}") from None
