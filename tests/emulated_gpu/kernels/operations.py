"""Operations of aten: each has a function that puts the CPU's own one into the stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.emulated_gpu.kernels.aliases import (
    alias,
    device_of,
    is_cuda,
    shape_key,
    to_cpu,
    to_meta,
)
from tests.emulated_gpu.kernels.queue import Queue
from tests.emulated_gpu.kernels.random_numbers import RandomNumbers

Kernel = Callable[..., Any]


class Operation:
    """One operation on CUDA tensors. A call returns at once, and its results are filled later.

    It works on aliases of the same bytes. New results are allocated by torch's own allocator, with
    the shapes that the meta function gives.
    """

    def __init__(self, op: Any, queue: Queue, random: RandomNumbers) -> None:
        self._op, self._queue, self._random = op, queue, random
        self._label: bytes = op.name().encode()
        self._arguments = op._schema.arguments
        self._returns = op._schema.returns
        names = [argument.name for argument in self._arguments]
        self._is_random = "generator" in names or op.name().startswith("aten::rand")
        self._written = [i for i, argument in enumerate(self._arguments) if _is_written(argument)]
        self._outs = [names[i] for i in self._written if self._arguments[i].is_out]
        returns_new = any(not _is_written(value) for value in self._returns)
        self._is_in_place = bool(self._written) and not returns_new
        self._results: dict[object, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operation as torch's dispatcher asks for it."""
        args = tuple(map(self._as_tensor, range(len(args)), args))
        self._resize_outs(args, kwargs)
        values, spec = pytree.tree_flatten((args, kwargs))
        device = device_of(values)
        cpu_values = [to_cpu(value) for value in values]
        cpu_args, cpu_kwargs = pytree.tree_unflatten(cpu_values, spec)
        cpu_kwargs.pop("pin_memory", None)
        compute = self._bind(cpu_args, cpu_kwargs, device)
        used = [cpu for value, cpu in zip(values, cpu_values, strict=True) if is_cuda(value)]
        if self._is_in_place:
            written = [self._argument(i, cpu_args, cpu_kwargs) for i in self._written]
            self._queue.put(compute, device, used, pytree.tree_leaves(written), self._label)
            return self._returned_arguments(args, kwargs)

        # New tensors: their shapes, their memory, and later their values.
        shapes = self._result_shapes(values, spec, (cpu_args, cpu_kwargs), device)
        made = pytree.tree_map(lambda shape: _allocate(shape, device), shapes)
        targets = [to_cpu(leaf) for leaf in pytree.tree_leaves(made)]

        def fill() -> None:
            found = pytree.tree_leaves(compute())
            # A result that is not asked for is None, or has no elements: statistics in an
            # evaluation, or one gradient of two.
            for target, value in zip(targets, found, strict=True):
                if isinstance(target, Tensor) and isinstance(value, Tensor) and value.numel():
                    target.copy_(value)

        self._queue.put(fill, device, used, targets, self._label)
        return made

    def _as_tensor(self, index: int, value: Any) -> Any:
        """Return an argument as its schema wants it: the dispatcher has made a number of one."""
        is_number = isinstance(value, int | float | complex)
        if is_number and str(self._arguments[index].type) == "Tensor":
            return torch.tensor(value)
        return value

    def _bind(self, args: Any, kwargs: Any, device: torch.device) -> Callable[[], Any]:
        """Return the CPU function of a call."""
        if not self._is_random:
            return lambda: self._op(*args, **kwargs)
        kwargs.pop("generator", None)
        make_generator = self._random.draw(device)
        return lambda: self._op(*args, **kwargs, generator=make_generator())

    def _resize_outs(self, args: Any, kwargs: Any) -> None:
        """Give `out=` tensors without elements the shape of the result."""
        if not any(
            isinstance(kwargs.get(out), Tensor) and not kwargs[out].numel() for out in self._outs
        ):
            return
        meta_args, meta_kwargs = pytree.tree_map(to_meta, (args, kwargs))
        meta_kwargs.pop("generator", None)
        self._op(*meta_args, **meta_kwargs)
        for out in self._outs:
            if kwargs[out].shape != meta_kwargs[out].shape:
                kwargs[out].resize_(meta_kwargs[out].shape)

    def _argument(self, index: int, args: Any, kwargs: Any) -> Any:
        if index < len(args):
            return args[index]
        return kwargs.get(self._arguments[index].name)

    def _returned_arguments(self, args: Any, kwargs: Any) -> Any:
        """Return the arguments that an operation in place returns, as its schema says."""
        results = []
        for value in self._returns:
            for index in self._written:
                written = self._arguments[index].alias_info
                if written.before_set == value.alias_info.before_set:
                    results.append(self._argument(index, args, kwargs))
                    break
        if not results:
            return None
        return results[0] if len(results) == 1 else tuple(results)

    def _result_shapes(self, values: list[Any], spec: Any, cpu: Any, device: torch.device) -> Any:
        """Return the results on the meta device. Calls that look the same share them."""
        key = spec, tuple(shape_key(value) for value in values)
        if key in self._results:
            return self._results[key]
        args, kwargs = pytree.tree_unflatten([to_meta(value) for value in values], spec)
        for name in ("pin_memory", "generator"):
            kwargs.pop(name, None)
        try:
            shapes = self._op(*args, **kwargs)
        except NotImplementedError:
            # Without a meta function the operation is computed twice.
            torch.cuda.current_stream(device).synchronize()
            shapes = self._op(*cpu[0], **cpu[1])
        self._results[key] = shapes
        return shapes


def _is_written(value: Any) -> bool:
    return value.alias_info is not None and value.alias_info.is_write


def _allocate(shape: Any, device: torch.device) -> Any:
    if not isinstance(shape, Tensor):
        return shape
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device)


# -- operations that are not as the others ------------------------------------------------------


def make_native_dropout(queue: Queue, random: RandomNumbers) -> Kernel:
    """Return dropout with its mask. The CPU's own one takes no generator."""

    def native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        result, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        source, values, kept = alias(x), alias(result), alias(mask)
        make_generator = random.draw(x.device)
        scale = 1 / (1 - p) if p < 1 else 0.0

        def drop() -> None:
            kept.copy_(torch.rand(source.shape, generator=make_generator()) >= p)
            values.copy_(source * kept * scale)

        queue.put(drop, x.device, [source], [values, kept], b"aten::native_dropout")
        return result, mask

    return native_dropout


def make_copy(original: Any, queue: Queue) -> Kernel:
    """Return `copy_`: torch's own one for plain copies, which are the runtime's, or the CPU's."""
    op = torch.ops.aten.copy_.default

    def copy_(keys: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        is_kernel = target.is_cuda and source.is_cuda and target.device == source.device
        if not is_kernel or _is_plain_copy(target, source):
            result: Tensor = original.call_boxed(keys, target, source, non_blocking)
            return result
        to, from_ = alias(target), alias(source)
        queue.put(lambda: op(to, from_), target.device, [from_], [to], b"aten::copy_")
        return target

    return copy_


def _is_plain_copy(target: Tensor, source: Tensor) -> bool:
    is_same = target.dtype == source.dtype and target.shape == source.shape
    return is_same and target.stride() == source.stride() and target.is_contiguous()


def nonzero(x: Tensor) -> Tensor:
    """Return the indices of elements that are not zero. The host waits for their number."""
    torch.cuda.current_stream(x.device).synchronize()
    return alias(x).nonzero().to(x.device)


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal. The host waits."""
    torch.cuda.current_stream(a.device).synchronize()
    return torch.equal(to_cpu(a), to_cpu(b))


def choose_attention(*args: Any, **kwargs: Any) -> int:
    """Return the number of the attention that is made of other operations."""
    return 0
