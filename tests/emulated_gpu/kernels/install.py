"""Registers the CPU functions with torch's dispatcher, in place of CUDA's kernels."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tests.emulated_gpu.kernels.operations import (
    Operation,
    choose_attention,
    equal,
    make_copy,
    make_native_dropout,
    nonzero,
)
from tests.emulated_gpu.kernels.queue import Queue
from tests.emulated_gpu.kernels.random_numbers import RandomNumbers

# These only allocate, look at a tensor's shape, or wait: torch's own ones run.
_KEPT = frozenset(
    (
        "_efficientzerotensor", "_has_same_storage_numel", "_local_scalar_dense",
        "_nested_tensor_from_mask", "_pin_memory", "_reshape_alias", "alias", "as_strided",
        "detach", "empty.memory_format", "empty_strided", "is_pinned", "is_set_to", "isfinite",
        "record_stream", "resize_", "set_", "set_.source_Storage",
        "set_.source_Storage_storage_offset", "set_.source_Tensor", "unfold", "view", "view.dtype",
        "view_as_complex", "view_as_real",
    )
)  # fmt: skip
# cuDNN is not there: the operations above it get a function of their own.
_ADDED = frozenset(("convolution", "convolution_backward"))
_LIBRARIES: list[torch.library.Library] = []  # their registrations end with them


def install() -> None:
    """Register all functions. It calls nothing of CUDA, so that the process may still fork."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    library = torch.library.Library("aten", "IMPL")
    queue = Queue()
    random = RandomNumbers(queue)
    original_copy = torch.library.get_kernel("aten::copy_", "CUDA")
    special = {
        "native_dropout": make_native_dropout(queue, random),
        "nonzero": nonzero,
        "equal": equal,
        "_fused_sdp_choice": choose_attention,
    }
    with warnings.catch_warnings():
        # torch says of each that it replaces a kernel.
        warnings.simplefilter("ignore")
        for name in torch._C._dispatch_get_all_op_names():
            op = _find_replaced(name)
            if op is not None and name.removeprefix("aten::") not in special:
                library.impl(name.removeprefix("aten::"), Operation(op, queue, random), "CUDA")
        for name, kernel in special.items():
            library.impl(name, kernel, "CUDA")
        library.impl("copy_", make_copy(original_copy, queue), "CUDA", with_keyset=True)
    random.follow_graphs()
    _LIBRARIES.append(library)


def _find_replaced(full_name: str) -> Any:
    """Return an operation whose CUDA kernel is to be replaced, or None."""
    if not full_name.startswith("aten::"):
        return None
    name = full_name.removeprefix("aten::")
    base, _, overload = name.partition(".")
    if name in _KEPT or base in ("nonzero", "copy_") or "cudnn" in name or "miopen" in name:
        return None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CUDA")
    if not has_kernel and name not in _ADDED:
        return None
    try:
        op = getattr(getattr(torch.ops.aten, base), overload or "default")
    except AttributeError:
        return None
    # Views share the bytes of their argument already.
    for value in op._schema.returns:
        if value.alias_info is not None and not value.alias_info.is_write:
            return None
    return op
