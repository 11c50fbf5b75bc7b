"""Profile: the measured seconds of every piece of a stage, from which stages are predicted.

It is measured by as many processes as will compute at once. All of them time the same piece at the
same time, after a barrier: a core that has the machine for itself is up to a quarter faster. Equal
pieces (same layers, same shapes) are timed once.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from localpipe.config.load import to_dict
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.files import SCHEMA
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.pipeline.workers.device import emulated_key, gpu_name

REQUEST_KEY, PROFILE_KEY, REFUSED_KEY = "profile/asked", "profile/found", "profile/refused"
# What a profile depends on beside the network. A configuration that reads it must share these.
_SHARED = (
    "batch_size",
    "precision",
    "threads",
    "device",
    "channels_last",
    "accumulate",
    "checkpointing",
    "optimizer",
    "clips",
    "averages",
    "num_classes",
    "probe",
    "deterministic",
    "gpu",
    "capture",
    "wire_dtype",
    "devices",
)
# What a profile of a worker consists of.
SECONDS = (
    "lead_s",
    "block_s",
    "loss_s",
    "tail_s",
    "copy_s_per_byte",
    "turn_s",
    "encode_s_per_byte",
    "decode_s_per_byte",
)
# Compared also where the profile has null.
_ALWAYS_COMPARED = ("gpu", "devices")
Seconds = tuple[float, ...]


@dataclass(frozen=True)
class Profile:
    """Seconds a step (forward, backward, update) of a batch on one worker, while `workers` compute.

    lead_s[k][f]: block f with the entry of stage k, whose input needs no gradient. A stage after
    the last row is like the last row. block_s[l]: block l after another block of its stage.
    loss_s["K"][k][l]: the local loss of stage k of K after block l, for k < K - 1. tail_s: the
    network's own head and loss. All are NaN for what cannot be a piece of a stage. copy_s_per_byte:
    one copy of a large tensor. turn_s: what a worker does in a stage's turn beside computing.

    blocks: names. method: the configuration's, without the weights of the losses. image: (C, H, W).
    torch: its version. accumulate: messages of a step, whose passes and one update are timed.
    With a probe, `loss_s` and `tail_s` hold its step. gpu: the model of the first GPU, None on the
    CPU. checkpointing, optimizer, num_classes, probe, deterministic, clips, averages, capture and
    wire_dtype are None where an older version wrote the profile.

    devices: pipeline.devices. each: where workers have devices or threads of their own, a mapping
    for every worker of the fields of seconds, whose own values are then the first worker's.
    """

    network: str
    blocks: tuple[str, ...]
    method: Mapping[str, Any]
    image: tuple[int, ...]
    batch_size: int
    precision: str
    threads: int | tuple[int, ...]
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
    accumulate: int = 1
    checkpointing: str | None = None
    optimizer: str | None = None
    num_classes: int | None = None
    probe: str | None = None
    deterministic: bool | None = None
    clips: bool | None = None
    averages: bool | None = None
    gpu: str | None = None
    capture: str | None = None
    wire_dtype: str | None = None
    encode_s_per_byte: float = 0.0
    decode_s_per_byte: float = 0.0
    devices: tuple[str, ...] | None = None
    each: tuple[Mapping[str, Any], ...] | None = None

    def of_worker(self, rank: int) -> Profile:
        """Return the profile with the seconds of one worker, itself where all are alike."""
        if self.each is None:
            return self
        return replace(self, each=None, **self.each[rank])

    def count_threads(self, processes: int) -> tuple[int, ...]:
        """Return the threads of each of the workers."""
        if isinstance(self.threads, tuple):
            return self.threads[:processes]
        return (self.threads,) * processes

    def stage_s(self, first: int, last: int, stage: int, stages: int) -> float:
        """Return the predicted seconds a step of blocks first..last as stage `stage` of `stages`.

        It is NaN where these blocks cannot be that stage. Raises UserError where the profile was
        not measured for so many stages, but never for the last stage.
        """
        inner = sum(self.block_s[first + 1 : last + 1])
        lead = self.lead_s[min(stage, len(self.lead_s) - 1)][first]
        if stage == stages - 1:
            return lead + inner + self.tail_s
        if str(stages) not in self.loss_s:
            counts = ", ".join(self.loss_s)
            raise UserError(
                f"profile: measured for {counts} stages, not for {stages}; "
                "measure again with plan --measure"
            )
        return lead + inner + self.loss_s[str(stages)][stage][last]

    def codec_s(self, encoded_bytes: int, decoded_bytes: int) -> float:
        """Return the seconds a step of a stage's codec, with `accumulate` messages a step.

        The bytes are those of fp32 tensors that the stage encodes and decodes for a message.
        """
        message_s = encoded_bytes * self.encode_s_per_byte
        message_s += decoded_bytes * self.decode_s_per_byte
        return self.accumulate * message_s

    def mismatch(self, config: Resolved) -> str | None:
        """Return what of a resolved configuration the profile was not measured for, or None.

        It is a clause on the first difference of the image's shape, of the blocks' names, or of
        what `profile_facts` returns. What an older version did not write is not compared, nor is
        torch's version. But a profile of a GPU that it does not name is taken for another one's.
        Raises UserError as `build_blueprint`.
        """
        measured, configured = asdict(self), profile_facts(config)
        blueprint = build_blueprint(config)
        configured["image"] = blueprint.sample
        configured["blocks"] = [block.name for block in blueprint.blocks]
        for key in ("network", "image", "blocks", "method", *_SHARED):
            if measured[key] is None and key not in _ALWAYS_COMPARED:
                continue
            # As JSON, where a tuple is a list: the profile may have been read from a file.
            if json.dumps(measured[key]) != json.dumps(configured[key]):
                return (
                    f"{key} is {measured[key]!r} there, the configuration has {configured[key]!r}"
                )
        return None

    def to_json(self) -> str:
        """Return the profile as one line of JSON, with null for what cannot be a stage.

        It has the fields and `schema`, and `emulated` (true) of the emulated GPU alone.
        """
        head = {"schema": SCHEMA, **emulated_key(self.gpu)}
        values = _nan_to_none({**head, **asdict(self)})
        return json.dumps(values, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Profile:
        """Read what `to_json` wrote. Lists become tuples, and null in a list becomes NaN.

        Raises ValueError for text that is no JSON, TypeError for missing or other keys,
        AttributeError or TypeError if it is no mapping. Values are not checked, and `schema` and
        `emulated` are ignored.
        """
        values = json.loads(text)
        values.pop("schema", None)
        values.pop("emulated", None)
        return Profile(**{key: _none_to_nan(value) for key, value in values.items()})


def read_profile(path: Path) -> Profile:
    """Read a profile from a file.

    Raises UserError where the file cannot be read or is no profile. For whom it was measured is not
    checked: see `mismatch`.
    """
    advice = f"make one with plan --measure --profile {shlex.quote(str(path))}"
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"profile: cannot read {path}: {error.strerror}; {advice}") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"profile: {path} is no profile of this version; {advice}") from None


def profile_facts(config: Resolved) -> dict[str, Any]:
    """Return what a profile of a resolved configuration depends on.

    Keys: `network` (name and arguments), `method` (a copy without the weights of the losses),
    `batch_size`, `precision`, `threads`, `device`, `channels_last`, `accumulate`,
    `checkpointing`, `optimizer` (its name), `num_classes`, `probe`, `deterministic`, `clips` and
    `averages` (whether optim.clip and optim.ema are set), `gpu` (the model of this machine's first
    GPU, None on the CPU), `capture`, `wire_dtype` and `devices`.
    """
    network = config.model.name
    if config.model.args:
        network += f" {json.dumps(config.model.args)}"

    return {
        "network": network,
        "method": _method_facts(config),
        "batch_size": config.data.batch_size,
        "precision": config.run.precision,
        "threads": config.run.threads,
        "device": config.run.device,
        "channels_last": config.run.channels_last,
        "accumulate": config.optim.accumulate,
        "checkpointing": config.run.checkpointing,
        "optimizer": config.optim.name,
        "num_classes": config.model.num_classes,
        "probe": config.run.probe,
        "deterministic": config.run.deterministic,
        "clips": config.optim.clip is not None,
        "averages": config.optim.ema is not None,
        "gpu": gpu_name(config.run.device),
        "capture": config.run.capture,
        "wire_dtype": config.pipeline.wire_dtype,
        "devices": config.pipeline.devices,
    }


def _method_facts(config: Resolved) -> dict[str, Any]:
    """Return the section `method`, without what costs no time of its own."""
    # The coefficients of a local loss depend on the cut. Which of its terms run is measured, so
    # they are left out here.
    method: dict[str, Any] = to_dict(config)["method"]
    for key in list(method["objective"]):
        if key.endswith("_weight"):
            del method["objective"][key]
    # When parameters come back costs nothing that is measured.
    feedback = method.pop("feedback")
    if feedback["mode"] != "none":
        method["feedback"] = {key: feedback[key] for key in ("mode", "combine")}
    return method


def _nan_to_none(value: Any) -> Any:
    """Replace NaN, for which JSON has no number, inside lists and mappings."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_none(item) for item in value]
    return value


def _none_to_nan(value: Any) -> Any:
    """Replace null by NaN and lists by tuples, inside lists and mappings."""
    if isinstance(value, dict):
        return {key: _none_to_nan(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    items = []
    for item in value:
        items.append(math.nan if item is None else _none_to_nan(item))
    return tuple(items)
