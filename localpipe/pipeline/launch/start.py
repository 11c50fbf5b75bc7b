"""Starts one worker: `python -m localpipe.pipeline.launch.start MODULE`.

The process is bound to its launcher's life first, then the module with the slow imports is loaded.
"""

from __future__ import annotations

import importlib
import sys

from localpipe.environment import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    raise SystemExit(importlib.import_module(sys.argv[1]).main())
