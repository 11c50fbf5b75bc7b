"""What a key changes: every one changes a run's weights, or its figures, or is listed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localpipe.config.resume import FREE_KEYS
from tests.sweep.trial import Trial
from tests.sweep.values import VALUES, Value

# A key that shows its effect only beside others.
BESIDE: Mapping[str, tuple[str, ...]] = {
    "method.reconcile.weight": ("method.reconcile.distance=cosine",),
    "pipeline.batch_norm": ("pipeline.replicas=2", "pipeline.processes=2"),
    "run.evaluate_every": ("optim.max_steps=6",),
}
# Keys that change no weights but figures of the summary.
FIGURES: Mapping[str, str] = {
    "run.probe": "the accuracies of probes",
    "run.evaluate_every": "which epochs can be the best",
}
# Keys that change no weights and no figure, each with the reason. Those that a resume may change
# are in config/resume.py: FREE_KEYS.
NOTHING: Mapping[str, str] = {
    "data.classes": "names of classes that have none: the model card shows them",
    "data.download": "only torchvision's data sets are fetched",
    "run.deterministic": "kernels of the CPU are deterministic",
    "run.evaluate_every": "no weights",
}


def figures(trial: Trial) -> dict[str, Any]:
    """Return what a run's summary says that is no measurement of time or memory."""
    varying = ("_s", "_s_per_stage", "_share_per_stage", "efficiency", "peak_memory_bytes", "_from")
    return {
        key: value
        for key, value in trial.summary.items()
        if not key.endswith(varying) and key not in ("config_sha256", "processes", "weights_sha256")
    }


def wrong_effect(value: Value, trial: Trial, plain: Trial) -> str | None:
    """Return what is wrong with the effect of a value, or None.

    trial: with the value. plain: without it.
    """
    key = value.key
    has_moved = trial.summary["weights_sha256"] != plain.summary["weights_sha256"]
    is_free = key in FREE_KEYS or key in NOTHING or key in FIGURES
    if is_free and key != "optim.max_steps":
        return f"{value} changes the weights" if has_moved else None
    if has_moved:
        return None
    return f"{value} changes no weights"


def beside(value: Value) -> list[Value]:
    """Return the values that must stand beside a value, for its effect to be seen."""
    return [Value((word,)) for word in BESIDE.get(value.key, ())]


def without_effect(seen: Mapping[str, bool]) -> list[str]:
    """Return the keys that should change something, and of which no value did."""
    return [key for key in VALUES if seen.get(key) is False]
