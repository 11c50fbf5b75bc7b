"""The process of one step of `localpipe doctor --gpu`: it reads its request and calls a function.

The doctor starts it, kills it at its end, and reads its findings.
"""

from __future__ import annotations

import importlib
import json
import sys

from localpipe.doctor.gpu.step_context import StepContext, StepRequest
from localpipe.errors import RunError, UserError
from localpipe.output import warn


def main() -> int:
    """Run the step that standard input describes, and return 0, or 1 after an error.

    The error is the last line of standard error.
    """
    request = StepRequest(**json.load(sys.stdin))
    module, _, function = request.function.partition(":")
    context = StepContext(request)
    try:
        getattr(importlib.import_module(module), function)(context)
    except (UserError, RunError) as error:
        warn(str(error))
        return 1
    return 0
