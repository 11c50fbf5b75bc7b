"""A profile: measured seconds a step of every piece that a stage can be made of, from which any stage is predicted.

It is measured by as many processes as will compute at once, all timing the same piece at the same time behind a barrier: a
core that has the machine for itself is up to a quarter faster. Equal pieces (same layers, same shapes) are timed once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localpipe.config.load import to_dict
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.files import SCHEMA

REQUEST_KEY, PROFILE_KEY = "profile/asked", "profile/found"
# What a profile depends on beside the network, and a configuration that reads it must share.
_SHARED = ("batch_size", "precision", "threads", "device", "channels_last")
Seconds = tuple[float, ...]


@dataclass(frozen=True)
class Profile:
    """Seconds a step (forward, backward, update) of a batch on one worker, while `workers` of them compute at once.

    lead_s[k][f]: block f with the entry of stage k, which nothing is propagated through (k behind the last row is like the
    last row). block_s[l]: block l behind another block of its stage. loss_s["K"][k][l]: the local loss of stage k of K behind
    block l. tail_s: the network's own head and loss. copy_s_per_byte: one copy of a large tensor. turn_s: what a worker does in
    a stage's turn beside computing.
    """

    network: str
    blocks: tuple[str, ...]
    method: Mapping[str, Any]
    image: tuple[int, ...]
    batch_size: int
    precision: str
    threads: int
    device: str
    channels_last: bool
    torch: str
    workers: int
    lead_s: tuple[Seconds, ...]
    block_s: Seconds
    loss_s: Mapping[str, tuple[Seconds, ...]]
    tail_s: float
    copy_s_per_byte: float
    turn_s: float

    def stage_s(self, first: int, last: int, stage: int, stages: int) -> float:
        """Return the predicted seconds a step of blocks first..last as stage `stage` of `stages`.

        Raise UserError where the profile was not measured for so many stages.
        """
        within = sum(self.block_s[first + 1 : last + 1])
        lead = self.lead_s[min(stage, len(self.lead_s) - 1)][first]
        if stage == stages - 1:
            return lead + within + self.tail_s
        if str(stages) not in self.loss_s:
            raise UserError(
                f"profile: measured for {', '.join(self.loss_s)} stages, not for {stages}; measure again"
            )
        return lead + within + self.loss_s[str(stages)][stage][last]

    def fits(self, config: Resolved) -> str | None:
        """Return what of a resolved configuration the profile was not measured for, or None."""
        mine, theirs = asdict(self), profile_facts(config)
        for key in ("network", "method", *_SHARED):
            if json.dumps(mine[key]) != json.dumps(theirs[key]):
                return f"{key} is {mine[key]!r} there, the configuration has {theirs[key]!r}"
        return None

    def to_json(self) -> str:
        """Return the profile as JSON."""
        return json.dumps(_plain({"schema": SCHEMA, **asdict(self)}), allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Profile:
        """Read what `to_json` wrote."""
        values = {key: _frozen(value) for key, value in json.loads(text).items() if key != "schema"}
        return Profile(**values)


def read_profile(path: Path) -> Profile:
    """Read a profile from a file; raise UserError where it is none."""
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"profile: cannot read {path}: {error.strerror}; make one with plan --measure --profile {path}"
        ) from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"profile: {path} is no profile of this version; make one with plan --measure --profile {path}"
        ) from None


def profile_facts(config: Resolved) -> dict[str, Any]:
    """Return what a profile depends on, of a resolved configuration."""
    network = config.model.name + (f" {json.dumps(config.model.args)}" if config.model.args else "")
    # Weights of the local loss depend on the cut; which of its terms run is measured, so they are left out.
    objective = {
        key: value for key, value in config.method.objective.items() if not key.endswith("_weight")
    }
    method = {**to_dict(config)["method"], "objective": objective}
    return {
        "network": network,
        "method": method,
        "batch_size": config.data.batch_size,
        "precision": config.run.precision,
        "threads": config.run.threads,
        "device": config.run.device,
        "channels_last": config.run.channels_last,
    }


def _plain(value: Any) -> Any:
    """Return a value with null for what cannot be a stage, which JSON has no number for."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(math.nan if item is None else _frozen(item) for item in value)
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, dict) else value
