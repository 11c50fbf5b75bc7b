"""Counts the bytes that autograd holds for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes:
    """The distinct storages that autograd holds, in bytes, and their peak.

    `ignored` are tensors that count for something else: parameters and buffers. All that share
    their storage are ignored. `peak` is the most since the beginning and never falls.
    """

    def __init__(self, ignored: Sequence[Tensor]) -> None:
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._holders: dict[int, int] = {}
        self._now = self.peak = 0

    def hooks(self) -> saved_tensors_hooks:
        """Return a context in which every tensor that autograd saves is counted.

        Each call returns a new one, and all count together. A tensor counts until its graph is
        freed, also after the context.
        """
        return saved_tensors_hooks(self.hold, lambda holder: holder.tensor)

    def hold(self, tensor: Tensor) -> SavedTensor:
        """Count a saved tensor's storage until what is returned goes away.

        A storage that is held several times counts once. The result's `tensor` is the same tensor.
        """
        return SavedTensor(tensor, self)

    def add(self, key: int, nbytes: int) -> None:
        """Count one more holder of a storage. `SavedTensor` calls it.

        Only the first holder adds bytes. key: the address of the storage. nbytes: its size.
        """
        if key in self._ignored:
            return
        if self._holders.setdefault(key, 0) == 0:
            self._now += nbytes
            self.peak = max(self.peak, self._now)
        self._holders[key] += 1

    def remove(self, key: int, nbytes: int) -> None:
        """Count one holder less. The last one takes the bytes away. `SavedTensor` calls it.

        Raises KeyError for a storage that `add` never had.
        """
        if key in self._ignored:
            return
        self._holders[key] -= 1
        if self._holders[key] == 0:
            self._now -= nbytes


class SavedTensor:
    """A tensor that autograd saved; its storage counts as long as this object lives."""

    def __init__(self, tensor: Tensor, count: SavedBytes) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self._count = tensor, count
        self._key, self._nbytes = storage._cdata, storage.nbytes()
        count.add(self._key, self._nbytes)

    def __del__(self) -> None:
        self._count.remove(self._key, self._nbytes)


@contextmanager
def fuse_attention() -> Iterator[None]:
    """Enter a context in which attention on the meta device saves what a device's kernel saves.

    The plain formula saves far more. It stays for a call with a mask, dropout or another option
    than `is_causal`. It stays too where torch's flash attention is switched off, as a stage does
    for a double backward. It replaces the function of torch.nn.functional: a mode of torch would
    not hold inside a backward pass, where checkpointed blocks run again.
    """
    attention = F.scaled_dot_product_attention

    def attend_fused(*args: Any, **kwargs: Any) -> Any:
        is_plain = len(args) != 3 or kwargs.keys() - {"is_causal"}
        is_fused = not is_plain and torch.backends.cuda.flash_sdp_enabled()
        if not is_fused or args[0].device.type != "meta":
            return attention(*args, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)[0]

    F.scaled_dot_product_attention = attend_fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
