"""The scopes of `torch.autocast` that a network's own forward enters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from localpipe.networks.recorded.tape import AutocastScope


class AutocastScopes:
    """Knows the open scopes, outermost first, while `torch.autocast` is patched.

    is_watching: whether a scope that begins now counts.
    """

    def __init__(self, is_watching: Callable[[], bool]) -> None:
        self.current: list[AutocastScope] = []
        self._is_watching = is_watching

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Enter a context in which every scope is known.

        torch has no scope for the meta device. A scope of the input's own device type becomes one
        of the CPU, which leaves tensors of the meta device alone.
        """
        kind: Any = torch.autocast
        plain = (kind.__init__, kind.__enter__, kind.__exit__)
        begin, enter, leave = plain
        scopes = self

        def begin_scope(
            self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any
        ) -> None:
            begin(self, "cpu" if device_type == "meta" else device_type, dtype, *args, **kwargs)
            known = None if device_type == "meta" else device_type
            self.recorded_scope = AutocastScope(known, dtype, self._enabled)

        def enter_scope(self: Any) -> Any:
            if scopes._is_watching():
                # A scope that was made before the patch lacks the attribute.
                scope = getattr(self, "recorded_scope", None)
                if scope is None:
                    scope = AutocastScope(self.device, self.fast_dtype, self._enabled)
                scopes.current.append(scope)
            return enter(self)

        def leave_scope(self: Any, *error: Any) -> Any:
            if scopes._is_watching() and scopes.current:
                scopes.current.pop()
            return leave(self, *error)

        kind.__init__, kind.__enter__, kind.__exit__ = begin_scope, enter_scope, leave_scope
        try:
            yield
        finally:
            kind.__init__, kind.__enter__, kind.__exit__ = plain
