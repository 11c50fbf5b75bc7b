"""What a resume may change, and how the recorded configuration joins the new one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from localpipe.config.explain import quote
from localpipe.config.keys import Config
from localpipe.config.load import _expand_method, parse, to_dict, update
from localpipe.config.user_code import is_user_code
from localpipe.config.yaml_file import read_yaml
from localpipe.errors import UserError

# A resume may change these; every other key shapes the result.
_FREE = (
    "pipeline: processes depth backend",
    "data: root download",
    "optim: max_steps",
    "run: dir device threads checkpointing resume overwrite checkpoint_every_s keep_checkpoints timeout_s log_every",
    "run: trace wandb",
    "bench: systems micro_batches windows window_s",
)
FREE_KEYS = frozenset(
    f"{section}.{key}"
    for section, keys in (row.split(": ") for row in _FREE)
    for key in keys.split()
)


def read_recorded(path: Path, own_code: Collection[str] | None = ()) -> Config:
    """Read the configuration that a run wrote into its own directory; every key must be there.

    An objective of the user's own is code, imported only where `own_code` holds its name, or is None.
    """
    data = read_yaml(path)
    _expand_method(data)
    objective = _objective_name(data)
    if is_user_code(objective) and own_code is not None and objective not in own_code:
        raise UserError(
            f"run: {path.parent} names code of its own, {objective}; name it again: method.objective.name={objective} "
            "(eval and export also take --trust)"
        )
    config = parse(data, str(path))
    for section, keys in to_dict(config).items():
        for name in keys.keys() - (data.get(section) or {}).keys():
            raise UserError(
                f"config: {path} lacks {section}.{name}; it is damaged, or another version's; choose another run.dir"
            )
    return config


def _objective_name(data: Any) -> str:
    """Return the objective's name in a file that may hold anything."""
    for key in ("method", "objective", "name"):
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, str) else ""


def flatten(config: Config) -> dict[str, Any]:
    """Return `{"section.key": value}`, one level into the method's axes."""
    flat = {}
    for section, keys in to_dict(config).items():
        for key, value in keys.items():
            if section == "method":
                flat.update({f"method.{key}.{name}": inner for name, inner in value.items()})
            else:
                flat[f"{section}.{key}"] = value
    return flat


def join_recorded(given: Config, recorded: Config, where: str) -> Config:
    """Join what the user gives now with what a run recorded: `auto` reads the record, a shaping key must equal it."""
    before, now = flatten(recorded), flatten(given)
    # Names first: what differs under another objective's name follows from it.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (not key.endswith(".name"), key)):
        old, new = before.get(key), now.get(key)
        derived = key == "pipeline.stages" and new is None
        if key in FREE_KEYS or new == "auto" or derived or new == old:
            continue
        raise UserError(
            f"config: {key} is {quote(new)}, but the run in {where} was started with {quote(old)}; "
            "give the recorded value, or another run.dir"
        )
    free = {key: now[key] for key in FREE_KEYS if now[key] != "auto"}
    return update(recorded, free)
