"""Notes on a configuration that its table does not show."""

from __future__ import annotations

from localpipe.config.options import call_objective
from localpipe.config.resolved import Resolved


def plan_notes(config: Resolved) -> list[str]:
    """Return lines on keys that change nothing, or that do something a user may not expect.

    They are about neighbours of a single stage, about frozen blocks without weights, and about an
    objective that compares samples under `optim.accumulate`. The list is empty where there is
    nothing to note.
    """
    notes = []
    unused = _axes_without_neighbour(config)
    if unused:
        verb = "change" if len(unused) > 1 else "changes"
        notes.append(f"note: one stage has no neighbour; {' and '.join(unused)} {verb} nothing")
    model = config.model
    if model.freeze and model.weights is None and config.run.init_from is None:
        notes.append(
            "note: model.freeze keeps blocks as they are initialised; set model.weights or "
            "run.init_from to begin with trained ones"
        )
    if config.stages > 1 and config.optim.accumulate > 1 and _compares_samples(config):
        batch = config.data.batch_size
        notes.append(
            f"note: {config.method.objective['name']} compares samples with each other, and sees "
            f"the {batch // config.optim.accumulate} of one message, not the {batch} of an update"
        )
    return notes


def _axes_without_neighbour(config: Resolved) -> list[str]:
    """Return the axes, as `method.AXIS MODE`, that a single stage has no use for."""
    if config.stages > 1:
        return []
    axes = {
        "reconcile": config.method.reconcile.distance,
        "context": config.method.context.mode,
    }
    return [f"method.{axis} {mode}" for axis, mode in axes.items() if mode != "none"]


def _compares_samples(config: Resolved) -> bool:
    objective, options = config.objective
    name = config.method.objective["name"]
    return bool(call_objective(name, lambda: objective.is_over_pairs(options)))
