"""The recorder: it runs a network once and writes a tape of calls."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from localpipe.errors import first_line
from localpipe.networks.recorded.autocast_scopes import AutocastScopes
from localpipe.networks.recorded.memory_format import keep_channels_last
from localpipe.networks.recorded.size_values import compute_value
from localpipe.networks.recorded.tape import (
    ModuleCall,
    RecordingError,
    Reference,
    StateReference,
    Step,
    Tape,
    list_leaves,
    map_tree,
)
from localpipe.networks.recorded.tensor_numbers import TensorNumbers
from localpipe.seeds import HostState

# Leaves of arguments that are the same in every forward pass.
_CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), enum.Enum, torch.dtype,
    torch.device, torch.memory_format, torch.layout, torch.Generator,
)  # fmt: skip
# Functions that give Python a tensor's values. A tape would freeze what follows from them.
_VALUE_READERS = frozenset(
    (
        "item", "__bool__", "__int__", "__float__", "__index__", "__complex__", "tolist", "numpy",
        "equal", "allclose", "is_nonzero", "__contains__",
    )
)  # fmt: skip
_RANDOM_WORDS = ("rand", "dropout", "bernoulli", "normal", "uniform", "multinomial", "exponential_")


def find_aliases(network: nn.Module) -> dict[str, str]:
    """Return for every name of a parameter or buffer the first name of the same tensor.

    Call it before `.to("meta")`, which unties tied parameters.
    """
    first_names: dict[int, str] = {}
    tensors = _named_tensors(network)
    for name, tensor in tensors:
        first_names.setdefault(id(tensor), name)
    return {name: first_names[id(tensor)] for name, tensor in tensors}


def _named_tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters, and after them the buffers, by all of their names."""
    return [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]


def draws_random(function: Any) -> bool:
    """Whether a torch function draws random numbers, by its name."""
    name = getattr(function, "__name__", "") or ""
    return any(word in name for word in _RANDOM_WORDS)


@dataclass
class _Reading:
    """The arguments of a call before it was made: as a tree of references, and the tensors."""

    tree: Any
    tensors: list[tuple[Tensor, int]]


class TapeRecorder(TorchFunctionMode):
    """Records what a network does while it runs.

    A module for which `is_closed` is true is one step, whatever it does inside. A strict recorder
    raises RecordingError for what a replay could not repeat. Another one goes on.
    """

    def __init__(
        self,
        network: nn.Module,
        is_closed: Callable[[str, nn.Module], bool],
        aliases: Mapping[str, str],
        is_strict: bool = True,
    ) -> None:
        super().__init__()
        self._network = network
        self._is_closed = is_closed
        self._aliases = aliases
        self._is_strict = is_strict
        self._numbers = TensorNumbers()
        self._steps: list[Step] = []
        self._calls = [ModuleCall("", [])]
        self._stack = [self._calls[0]]  # the open modules that run now
        self._running: list[str] = []  # all modules that run now
        self._closed_depth = 0
        self._readings: list[_Reading] = []  # of the closed module that runs now
        self._autocast = AutocastScopes(lambda: self._closed_depth == 0)
        self._bound: set[int] = set()  # depend on inputs, parameters or random draws
        self._unseen: set[int] = set()
        self._host_state: HostState | None = None

        # The first name of a tied tensor wins, and a parameter wins over a buffer.
        self._names: dict[int, str] = {}
        for name, tensor in [*_named_tensors(network), *_plain_tensors(network)]:
            self._names.setdefault(id(tensor), aliases.get(name, name))
        self._parameters = {
            aliases[name] for name, _ in network.named_parameters(remove_duplicate=False)
        }

    def record(self, inputs: tuple[Tensor, ...]) -> Tape:
        """Run the network once on inputs of the meta device, in its mode, and return the tape.

        Raises RecordingError where the forward pass fails or cannot be repeated.
        """
        for tensor in inputs:
            self._bound.add(self._numbers.assign(tensor))
        self._calls[0].inputs = list(range(len(inputs)))
        buffers = self._list_open_buffers()
        output = self._run(inputs)

        if self._is_strict:
            self._check_host_state()
            self._check_buffers(buffers)
        with torch._C.DisableTorchFunction():
            tree = map_tree(self._refer_tensor, output)
        outputs = [leaf.number for leaf in list_leaves(tree) if isinstance(leaf, Reference)]
        self._calls[0].outputs = outputs
        unseen = frozenset(self._unseen)
        return Tape(self._steps, tree, self._numbers.facts, self._calls, unseen)

    def _run(self, inputs: tuple[Tensor, ...]) -> Any:
        """Return the network's output, after a run in which every call is recorded."""
        self._host_state = HostState()
        with ExitStack() as stack:
            stack.enter_context(self._hooked_modules())
            stack.enter_context(self._autocast.patched())
            stack.enter_context(self._patched_functions())
            try:
                with self, torch.enable_grad():
                    return self._network(*inputs)
            except RecordingError:
                raise
            except Exception as error:
                raise RecordingError(self._describe_failure(error)) from error

    def _describe_failure(self, error: Exception) -> str:
        """Return the sentence for an exception of the network's own forward pass."""
        scripted = self._find_scripted("")
        if scripted is not None and "TorchScript" in str(error):
            return _describe_scripted(scripted)
        where = self._describe(self._running[-1] if self._running else "")
        cause = first_line(error).rstrip(".")
        text = str(error)
        if "meta tensor" in text or "_local_scalar_dense" in text or "Meta" in text:
            return (
                f"{where} needs a tensor's values where none exist ({cause}), as a decision by "
                "values or an operator without a meta kernel does; use sizes or torch.where "
                "instead, or offer blocks()"
            )
        return (
            f"{where} fails without values, on the meta device: {type(error).__name__}: {cause}; "
            "check the size of the images and model.args, or offer blocks()"
        )

    def _find_scripted(self, prefix: str) -> str | None:
        """Return the name of a scripted module inside a module, or None if there is none."""
        module = self._network.get_submodule(prefix)
        for name, inner in module.named_modules(prefix=prefix):
            if isinstance(inner, torch.jit.ScriptModule):
                return str(name)
        return None

    def _describe(self, name: str) -> str:
        """Return a module's name and class as the subject of a sentence."""
        if not name:
            return f"the forward of {type(self._network).__name__}"
        return f"{name} ({type(self._network.get_submodule(name)).__name__})"

    @property
    def _where(self) -> str:
        return self._describe(self._stack[-1].name)

    # -- calls of modules -------------------------------------------------------------------

    @contextmanager
    def _hooked_modules(self) -> Iterator[None]:
        """Enter a context in which the call of every module but the network is recorded."""
        hooks = []
        try:
            for name, module in self._network.named_modules():
                if module is self._network or isinstance(module, torch.jit.ScriptModule):
                    continue
                enter = self._make_enter_hook(name)
                hooks.append(
                    module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
                )
                leave = self._make_leave_hook(name)
                hooks.append(module.register_forward_hook(leave, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _make_enter_hook(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._running.append(name)
            if self._closed_depth or self._is_closed(name, module):
                self._closed_depth += 1
                if self._closed_depth == 1:
                    self._check_host_state()
                    with torch._C.DisableTorchFunction():
                        self._readings.append(self._read((args, kwargs)))
                return

            with torch._C.DisableTorchFunction():
                inputs = self._numbers.find_all(list_leaves((args, kwargs)))
            call = ModuleCall(name, inputs)
            self._stack[-1].items.append(call)
            self._stack.append(call)
            self._calls.append(call)

        return enter

    def _make_leave_hook(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._running.pop()
            if self._closed_depth:
                self._closed_depth -= 1
                if self._closed_depth == 0:
                    # What a closed module draws, it draws again in a replay.
                    if self._is_strict:
                        self._host_state = HostState()
                    with torch._C.DisableTorchFunction():
                        self._note(name, None, output, self._readings.pop())
                return
            call = self._stack.pop()
            with torch._C.DisableTorchFunction():
                call.outputs = self._numbers.find_all(list_leaves(output))

        return leave

    # -- calls of torch functions ------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Record a call of a torch function, unless it belongs to a closed module."""
        kwargs = kwargs or {}
        if self._closed_depth:
            return keep_channels_last(func, args, kwargs, func(*args, **kwargs))
        name = getattr(func, "__name__", "")
        if name == "__set__":
            func(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                self._numbers.note_requires_grad(args[0])
            return None
        if name == "__get__":
            # Sizes, dtypes and devices are asked for more often than anything else.
            output = func(*args, **kwargs)
            if not isinstance(output, Tensor):
                return output
        if name in _VALUE_READERS:
            with torch._C.DisableTorchFunction():
                args, kwargs = map_tree(partial(self._find_value, name), (args, kwargs))
                return func(*args, **kwargs)
        return self._call_step(func, args, kwargs)

    def _call_step(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the output of a function that is one step, whatever it calls inside."""
        with torch._C.DisableTorchFunction():
            tensors = _list_versions((args, kwargs))
            tree = self._try_read((args, kwargs))
        self._closed_depth += 1
        try:
            output = function(*args, **kwargs)
            output = keep_channels_last(function, args, kwargs, output)
        finally:
            self._closed_depth -= 1

        with torch._C.DisableTorchFunction():
            is_written = any(tensor._version != version for tensor, version in tensors)
            if is_written or any(isinstance(leaf, Tensor) for leaf in list_leaves(output)):
                if isinstance(tree, RecordingError):
                    raise tree
                self._note(None, function, output, _Reading(tree, tensors))
        return output

    def _find_value(self, function: str, leaf: Any) -> Any:
        """Return a tensor with values for one that depends on sizes alone, any other leaf as it is.

        Raises RecordingError for all other tensors, because a replay would freeze their values.
        """
        if not isinstance(leaf, Tensor):
            return leaf
        number = self._numbers.find(leaf)
        is_parameter = self._names.get(id(leaf)) in self._parameters
        if number not in self._bound and not is_parameter:
            value = leaf if number is None else compute_value(self._steps, number)
            if value is not None and not value.is_meta:
                return value
        raise RecordingError(
            f"{self._where} decides by a tensor's values ({function}), so no fixed cut exists; use "
            "torch.where, or offer blocks()"
        )

    @contextmanager
    def _patched_functions(self) -> Iterator[None]:
        """Enter a context in which a torch.autograd.Function is one step.

        Its own forward runs without gradients, so what it calls must not be recorded.
        """
        plain = torch.autograd.Function.__dict__["apply"]

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            bound = plain.__get__(None, cls)
            if self._closed_depth:
                return bound(*args, **kwargs)
            return self._call_step(bound, args, kwargs)

        torch.autograd.Function.apply = classmethod(apply)
        try:
            yield
        finally:
            torch.autograd.Function.apply = plain

    # -- notes --------------------------------------------------------------------------------

    def _read(self, tree: Any) -> _Reading:
        """Return the arguments of a call that is about to be made."""
        return _Reading(map_tree(self._refer, tree), _list_versions(tree))

    def _try_read(self, tree: Any) -> Any:
        """Return a tree of references, or the error, which counts only if the call is a step."""
        try:
            return map_tree(self._refer, tree)
        except RecordingError as error:
            return error

    def _note(self, module: str | None, function: Any, output: Any, reading: _Reading) -> None:
        """Append the step of a call that has been made."""
        made = [leaf for leaf in list_leaves(output) if isinstance(leaf, Tensor)]
        written = []
        writes = []
        is_stateful = False
        for place, (tensor, version) in enumerate(reading.tensors):
            if tensor._version == version:
                continue
            if id(tensor) in self._names:
                is_stateful = True
                continue
            written.append(tensor)
            if not any(tensor is other for other in made):
                writes.append((place, self._numbers.assign(tensor)))

        # A write changes what other tensors on the same memory hold.
        direct = {id(tensor) for tensor, _ in reading.tensors} | {id(tensor) for tensor in made}
        shadows = []
        for other in self._numbers.others_on_storage(written, direct):
            old = self._numbers.find(other)
            assert old is not None
            shadows.append((old, self._numbers.assign(other)))
        outputs = [self._numbers.assign(tensor, id(tensor) in self._names) for tensor in made]

        args, kwargs = reading.tree
        step = Step(
            module,
            function,
            args,
            kwargs,
            tuple(outputs),
            tuple(writes),
            tuple(shadows),
            tuple(call.name for call in self._stack[1:]),
            torch.is_grad_enabled(),
            tuple(self._autocast.current),
            bool(written),
            is_stateful,
        )
        if self._binds(step):
            self._bound.update(step.makes)
        self._steps.append(step)
        self._stack[-1].items.append(step)

    def _binds(self, step: Step) -> bool:
        """Whether what a step makes depends on inputs, parameters or random draws."""
        if self._bound.intersection(step.reads) or self._parameters.intersection(step.state):
            return True
        if step.module is None:
            return draws_random(step.function)
        return next(self._network.get_submodule(step.module).parameters(), None) is not None

    def _refer(self, leaf: Any) -> Any:
        """Return what stands for a leaf of the arguments on the tape."""
        if isinstance(leaf, Tensor):
            return self._refer_tensor(leaf)
        if isinstance(leaf, _CONSTANTS) or not self._is_strict:
            return leaf
        if type(leaf).__module__ == "numpy" and hasattr(leaf, "item") and not leaf.shape:
            return leaf.item()
        if isinstance(leaf, nn.Module):
            raise RecordingError(
                f"{self._where} hands the module {type(leaf).__name__} to a function, which hides "
                "its call; call the module itself, or offer blocks()"
            )
        if callable(leaf):
            if not (getattr(leaf, "__module__", None) or "torch").startswith("torch"):
                name = getattr(leaf, "__qualname__", type(leaf).__name__)
                raise RecordingError(
                    f"{self._where} hands the function {name} to another one, which hides what it "
                    "does; call it directly, or offer blocks()"
                )
        elif not type(leaf).__module__.startswith("torch"):
            raise RecordingError(
                f"the modules of {self._where} pass each other a {type(leaf).__qualname__}, which "
                "may hold tensors; pass tensors alone (a cache is off with use_cache), or offer "
                "blocks()"
            )
        self._numbers.keep(leaf)
        return leaf

    def _refer_tensor(self, leaf: Any) -> Any:
        """Return the reference to a tensor. Any other leaf stays as it is."""
        if not isinstance(leaf, Tensor):
            return leaf
        number = self._numbers.find(leaf)
        if number is not None:
            if self._is_strict and self._numbers.is_changed(leaf):
                raise RecordingError(self._describe_unseen(leaf))
            return Reference(number)
        if id(leaf) in self._names:
            return StateReference(self._names[id(leaf)])
        if leaf.requires_grad or leaf.is_meta:
            if self._is_strict:
                raise RecordingError(self._describe_unseen(leaf))
            number = self._numbers.assign(leaf)
            self._unseen.add(number)
            return Reference(number)
        self._numbers.keep(leaf)
        return leaf

    def _describe_unseen(self, tensor: Tensor) -> str:
        """Return the sentence for a tensor that no recorded call has made."""
        shape = tuple(tensor.shape)
        scripted = self._find_scripted(self._stack[-1].name)
        if scripted is not None:
            return _describe_scripted(scripted)
        return (
            f"{self._where} uses a tensor of shape {shape} that no recorded call has made (a "
            "scripted function, or a tensor kept from outside the forward); make it by plain torch "
            "functions inside the forward, register it as a buffer, or offer blocks()"
        )

    # -- checks -------------------------------------------------------------------------------

    def _check_host_state(self) -> None:
        """Raise RecordingError if an open module has drawn from Python's or numpy's generator."""
        if not self._is_strict or self._closed_depth > 1:
            return
        if self._host_state is not None and not self._host_state.is_current():
            raise RecordingError(
                f"{self._where} draws from Python's or numpy's random numbers, which a replay "
                "would freeze; draw from torch's instead, as torch.rand, or offer blocks()"
            )

    def _list_open_buffers(self) -> dict[str, int]:
        """Return the ids of the buffers that lie directly in open modules, by name."""
        buffers = {}
        for path, module in self._network.named_modules():
            if path and self._is_closed(path, module):
                continue
            for name, buffer in module._buffers.items():
                buffers[f"{path}.{name}" if path else name] = id(buffer)
        return buffers

    def _check_buffers(self, before: Mapping[str, int]) -> None:
        """Raise RecordingError if an open module has put a new tensor in a buffer's place."""
        for name, buffer in self._list_open_buffers().items():
            if before.get(name) != buffer:
                where = self._describe(name.rpartition(".")[0])
                raise RecordingError(
                    f"{where} puts a new tensor in the place of its buffer {name}, which a replay "
                    "cannot repeat; let it write into the old one, as buffer.copy_(), or offer "
                    "blocks()"
                )


def _describe_scripted(name: str) -> str:
    return (
        f"{name} is a scripted module, which cannot be recorded; use the plain module before "
        "torch.jit.script, or offer blocks()"
    )


def _list_versions(tree: Any) -> list[tuple[Tensor, int]]:
    """Return the tensors of a tree, each with its number of in-place writes."""
    return [(leaf, leaf._version) for leaf in list_leaves(tree) if isinstance(leaf, Tensor)]


def _plain_tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the tensors that modules hold as plain attributes, by name."""
    tensors = []
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                tensors.append((f"{path}.{name}" if path else name, value))
    return tensors
