"""Installs the CPU functions in every process under the emulation, once it has imported torch.

Python imports this module at its start, because its folder is in PYTHONPATH.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_ROOT = str(Path(__file__).resolve().parents[3])


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch as usual, and makes its import install the functions at the end."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        _run_afterwards(spec)
        return spec


def _run_afterwards(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    run_torch = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run_torch(module)
        if _ROOT not in sys.path:
            sys.path.append(_ROOT)
        from tests.emulated_gpu.kernels.install import install

        install()

    loader.exec_module = exec_module


if "libcudart.so.13" in os.environ.get("LD_PRELOAD", ""):
    sys.meta_path.insert(0, _AfterTorch())
