"""The dtype of what crosses a boundary."""

from __future__ import annotations

BOUNDARY_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
