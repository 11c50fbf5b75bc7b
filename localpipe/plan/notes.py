"""Notes on a configuration that its table does not show."""

from __future__ import annotations

from localpipe.config.resolved import Resolved


def plan_notes(config: Resolved) -> list[str]:
    """Return what a person should know of a configuration that its table does not show."""
    objective, options = config.objective
    if config.pipeline.stages == 1:
        asked = {
            "reconcile": config.method.reconcile.distance,
            "context": config.method.context.mode,
        }
        named = [f"method.{axis} {mode}" for axis, mode in asked.items() if mode != "none"]
        return (
            [
                f"note: one stage has no neighbour; {' and '.join(named)} {'change' if named[1:] else 'changes'} nothing"
            ]
            if named
            else []
        )
    if config.optim.accumulate == 1 or not objective.is_over_pairs(options):
        return []
    rows = config.data.batch_size // config.optim.accumulate
    return [
        f"note: {config.method.objective['name']} compares samples with each other, and sees the {rows} of one message, "
        f"not the {config.data.batch_size} of an update"
    ]
