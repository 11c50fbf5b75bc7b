"""What a key changes: every one changes a run's weights, or its figures, or is listed here."""

from __future__ import annotations

from collections.abc import Mapping

from localpipe.config.resume import FREE_KEYS
from tests.sweep.trial import Trial
from tests.sweep.values import GPT, STRIPES, Value

_TEXT = (
    "data.name=bytes", "data.root={sweep}/text", "data.augment=none",
    "model.name=gpt", f"model.args={GPT}",
)  # fmt: skip
_USERS_DATA = (f"data.name={STRIPES}", "data.augment=none", "data.image_size=auto")
# What must stand beside a key, for its effect to be seen.
BESIDE: Mapping[str, tuple[str, ...]] = {
    "method.reconcile.weight": ("method.reconcile.distance=cosine",),
    "method.feedback.lag": ("method.feedback.mode=block",),
    "method.feedback.every": ("method.feedback.mode=block",),
    "method.feedback.momentum": ("method.feedback.mode=block",),
    "method.feedback.combine": ("method.feedback.mode=block",),
    "model.crossing": ("model.name=tests.sample_networks:Forked",),
    "task.average": (
        "data.name=shapes", "model.name=tests.sample_networks:places", "data.augment=none",
    ),
    "task.aux_weight": (
        "data.name=shapes", "model.name=tests.sample_networks:Guided", "data.augment=none",
    ),
    "task.loss": ("data.name=areas", "data.augment=none"),
    "data.length": _TEXT,
    "data.workers": _USERS_DATA,
    "data.timeout_s": _USERS_DATA,
    "optim.milestones": ("optim.schedule=step",),
    "optim.factor": ("optim.schedule=step",),
    "optim.betas": ("optim.name=adamw",),
    "optim.eps": ("optim.name=adamw",),
    # A system that needs it is among the values.
    "bench.systems": ("method.feedback.mode=block",),
    "pipeline.batch_norm": ("pipeline.replicas=2", "pipeline.processes=2"),
}  # fmt: skip
# Keys that change no weights, each with the reason. Those that a resume may change are FREE_KEYS.
NOTHING: Mapping[str, str] = {
    "task.ignore_index": "a mask of the sweep has pixels of 255, which no other value ignores",
    "model.untie": "no network of the sweep has tied weights",
    "data.vocabulary": "files of tokens need it: a value of data.name sets it",
    "data.token_dtype": "tokens of the sweep are uint16, and are refused as uint32",
    "data.classes": "names of classes: the model card shows them",
    "data.extra": "svhn alone has an extra split",
    "data.background": "no image of the sweep is transparent",
    "data.range": "no image of the sweep has more than 8 bits",
    "data.skip_broken": "no image of the sweep is broken",
    "data.download": "only torchvision's data sets are fetched",
    "run.deterministic": "kernels of the CPU are deterministic",
    "optim.ema": "an average is beside the weights, which learn as without it",
    "run.evaluate_every": "which steps are evaluated",
    "run.probe": "a probe learns from what stages send, and beside them",
    "optim.stages": "reserved",
    "run.stop_when": "reserved",
}
# Free keys that shape a result all the same, if they end a run early.
_SHAPES = "optim.max_steps"
# Free keys that may change the last bits of weights, each with the reason.
ROUNDING: Mapping[str, str] = {
    "run.threads": "kernels of torch add in another order with another number of threads",
}


def is_free(key: str) -> bool:
    """Return whether no value of a key may change a run's weights."""
    return (key in FREE_KEYS and key != _SHAPES) or key in NOTHING


def beside(value: Value) -> list[Value]:
    """Return the values that must stand beside a value, for its effect to be seen."""
    return [Value((word,)) for word in BESIDE.get(value.key, ())]


class Effects:
    """What values have changed: whether any value of a key changed a run's weights."""

    def __init__(self) -> None:
        self._has_changed: dict[str, bool] = {}

    def add(self, value: Value, trial: Trial, digest: str) -> str | None:
        """Note what a value changed; return what is wrong, or None.

        digest: of the weights without the value.
        """
        if value.key in ROUNDING:
            return None
        changed = trial.summary["weights_sha256"] != digest
        if is_free(value.key):
            return f"{value} changes the weights" if changed else None
        self._has_changed[value.key] = self._has_changed.get(value.key, False) or changed
        return None

    def list_idle(self) -> list[str]:
        """Return the keys that should change something, and of which no value did."""
        return [key for key, changed in self._has_changed.items() if not changed]
