"""Numbers for the tensors of a forward pass. A tensor that is written in place gets a new one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from localpipe.networks.recorded.memory_format import memory_order
from localpipe.networks.recorded.tape import TensorFacts


class TensorNumbers:
    """Gives numbers to tensors and keeps all of them alive, so that no id comes twice."""

    def __init__(self) -> None:
        self.facts: dict[int, TensorFacts] = {}
        self._by_id: dict[int, int] = {}
        self._requires_grad: dict[int, bool] = {}
        self._on_storage: dict[int, list[Tensor]] = {}
        self._alive: list[object] = []

    def find(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor as it is now, or None if it has none."""
        return self._by_id.get(id(tensor))

    def find_all(self, values: Sequence[object]) -> list[int]:
        """Return the numbers of those values that are numbered tensors."""
        numbers = (self._by_id.get(id(value)) for value in values if isinstance(value, Tensor))
        return [number for number in numbers if number is not None]

    def assign(self, tensor: Tensor, is_state: bool = False) -> int:
        """Return a new number for a tensor. A parameter or buffer keeps its name instead."""
        number = len(self.facts)
        storage = tensor.untyped_storage()._cdata
        if not is_state:
            if id(tensor) not in self._by_id:
                self._on_storage.setdefault(storage, []).append(tensor)
            self._by_id[id(tensor)] = number
        self._alive.append(tensor)
        shape = tuple(tensor.shape)
        self.facts[number] = TensorFacts(shape, memory_order(tensor), tensor.dtype, storage)
        self._requires_grad[number] = tensor.requires_grad
        return number

    def keep(self, value: object) -> None:
        """Keep an object alive until the end of the recording."""
        self._alive.append(value)

    def note_requires_grad(self, tensor: Tensor) -> None:
        """Accept that a tensor's `requires_grad` was set by a step."""
        number = self.find(tensor)
        if number is not None:
            self._requires_grad[number] = tensor.requires_grad

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether a numbered tensor got its gradient where no step is recorded."""
        return tensor.requires_grad != self._requires_grad[self._by_id[id(tensor)]]

    def others_on_storage(self, tensors: Sequence[Tensor], direct: set[int]) -> list[Tensor]:
        """Return the numbered tensors on the memory of `tensors` whose ids are not in `direct`."""
        storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        others = []
        for storage in storages:
            for other in self._on_storage.get(storage, ()):
                if id(other) not in direct:
                    others.append(other)
        return others
