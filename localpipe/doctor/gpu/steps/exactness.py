"""One process on the device, twice: eager against eager, captured against captured."""

from __future__ import annotations

from localpipe.doctor.gpu.commands import checked_words, compare_weights, train_all
from localpipe.doctor.gpu.step_context import StepContext

_KINDS = {"eager": "run.capture=none", "captured": "run.capture=graphs"}


def run(context: StepContext) -> None:
    """Add a finding for eager runs, one for captured runs, and one that compares the two kinds."""
    context.note_machine()
    runs = {}
    for kind, word in _KINDS.items():
        words = [*checked_words(context), "pipeline.processes=1", word]
        runs[kind] = words
        runs[f"{kind} again"] = words
    # All at the same time: what else runs on a device must not change a result either.
    ends = train_all(context, runs, context.left_s)
    for kind in _KINDS:
        compare_weights(context, kind, ends[kind], ends[f"{kind} again"], "two runs")

    # Graphs may choose other kernels, so the two kinds may differ.
    eager, captured = ends["eager"].result, ends["captured"].result
    if eager is not None and captured is not None:
        is_equal = eager["weights_sha256"] == captured["weights_sha256"]
        text = "equal weights" if is_equal else "other weights, which may be"
        context.add_ok("captured against eager", text, equal=is_equal)
