"""The keys that a resumed run may change, and how its recorded configuration joins the new one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from localpipe.config.augmentation import fits_auto
from localpipe.config.explain import quote, spell_override
from localpipe.config.keys import Config
from localpipe.config.load import expand_method, parse, to_dict, update
from localpipe.config.resolve import auto_schedule
from localpipe.config.user_code import is_user_code
from localpipe.config.yaml_file import read_yaml
from localpipe.errors import UserError

# The keys that do not shape the result.
FREE_KEYS = frozenset(
    [
        "model.crossing_untrained",
        "model.download",
        "pipeline.processes",
        "pipeline.depth",
        "pipeline.backend",
        "pipeline.devices",
        "pipeline.memory",
        "pipeline.replay",
        "data.root",
        "data.download",
        "data.verify",
        "data.changed",
        "data.workers",
        "data.timeout_s",
        "optim.max_steps",
        "run.dir",
        "run.device",
        "run.threads",
        "run.checkpointing",
        "run.resume",
        "run.overwrite",
        "run.checkpoint_every_s",
        "run.keep_checkpoints",
        "run.timeout_s",
        "run.recover",
        "run.max_recoveries",
        "run.spares",
        "run.log_every",
        "run.trace",
        "run.wandb",
        "bench.systems",
        "bench.micro_batches",
        "bench.windows",
        "bench.window_s",
    ]
)

# What to do about a run's configuration that cannot be read.
RECORDED_ADVICE = "restore it, or choose another run directory"
# The keys that `eval` may change too. They choose images and arithmetic, and no network.
EVALUATION_KEYS = FREE_KEYS | {
    "data.name",
    "data.batch_size",
    "data.drop_last",
    "data.augment",
    "data.padding",
    "data.padding_mode",
    "data.extra",
    "data.mean",
    "data.std",
    "data.train_subset",
    "data.validation",
    "data.image_size",
    "data.samples",
    "data.token_dtype",
    "data.test",
    "data.range",
    "data.background",
    "data.skip_broken",
    "pipeline.wire_dtype",
    "run.precision",
    "run.capture",
    "run.channels_last",
    "run.deterministic",
}

# The keys that follow from others where they are null: from the cuts, the data set, the network.
_FOLLOWING_KEYS = frozenset(
    [
        "pipeline.stages",
        "data.classes",
        "data.shape",
        "data.dtype",
        "data.image_size",
        "data.padding",
        "data.padding_mode",
        "model.blocks",
        "model.library",
    ]
)
# The keys of images. A run on other inputs does not use them, and does not record them.
_IMAGE_KEYS = frozenset(["data.image_size", "data.mean", "data.std"])

# The keys of later versions, with what they are for a run of a version that did not have them.
ADDED_KEYS: dict[str, Any] = {
    "pipeline.devices": None,
    "pipeline.memory": None,
    "pipeline.replay": None,
    "run.recover": "none",
    "run.max_recoveries": 3,
    "run.spares": 0,
    "model.crossing": 1,
    "model.layout": {},
    "model.untie": False,
    "model.blocks": None,
    "model.library": None,
    "model.weights": None,
    "model.weights_sha256": None,
    "model.download": False,
    "model.freeze": [],
    "data.classes": None,
    "data.verify": "full",
    "data.skip_broken": False,
    "data.test": None,
    "data.range": None,
    "data.background": "white",
    "data.changed": "refuse",
    "model.crossing_untrained": "refuse",
    "data.shape": None,
    "data.dtype": None,
    "data.evaluation_size": None,
    "task.name": "classification",
    "task.targets": "index",
    "task.label_smoothing": 0.0,
    "task.class_weights": "none",
    "task.ignore_index": 255,
    "task.average": "all",
    "task.aux_weight": 0.4,
    "task.loss": "mse",
    "task.args": {},
    "data.vocabulary": None,
    "data.length": 256,
    "data.token_dtype": "uint16",
    "data.workers": 1,
    "data.timeout_s": 600.0,
    "data.padding": None,
    "data.padding_mode": None,
    "data.extra": False,
    "optim.betas": [0.9, 0.999],
    "optim.eps": 1e-8,
    "optim.decay": "all",
    "optim.clip": None,
    "optim.min_lr": 0.0,
    "optim.milestones": None,
    "optim.factor": 0.1,
    "optim.warmup_steps": None,
    "optim.ema": None,
    "method.feedback": {
        "mode": "none",
        "lag": 16,
        "every": 16,
        "momentum": 0.995,
        "combine": "sum",
    },
}

# The border of crops, pixels and what they are, of runs that did not record it.
OLD_BORDERS: dict[str, tuple[int, str]] = {
    "cifar10": (4, "reflect"),
    "cifar100": (4, "reflect"),
    "digits": (2, "zero"),
    "image_folder": (4, "reflect"),
    "imagenet": (28, "reflect"),
    "npz": (4, "reflect"),
    "stl10": (4, "zero"),
    "svhn": (2, "zero"),
    "synthetic": (4, "reflect"),
}

# The schedules whose learning rate of a step does not depend on optim.epochs.
OPEN_SCHEDULES = frozenset(["constant", "multistep"])


def read_recorded(path: Path, user_code: Collection[str] | None = ()) -> Config:
    """Read the configuration that a run wrote into its own directory.

    path: the file. The objective may be a user's code. It is imported only where `user_code` holds
    its name, or is None. Raises UserError for code that is not imported, for a file that cannot be
    read, is refused by `parse`, or lacks a key. Options within method.objective, context,
    reconcile and feedback are not looked for.
    """
    data = read_yaml(path, advice=RECORDED_ADVICE)
    expand_method(data)
    objective = _find_objective_name(data)
    may_import = user_code is None or objective in user_code
    if is_user_code(objective) and not may_import:
        raise UserError(
            f"run: {path.parent} names code of its own, {objective}; name it again: "
            f"{spell_override('method.objective.name', objective)} "
            "(eval and export also take --trust)"
        )

    # A key without a value would get today's default, and another result.
    add_later_keys(data)
    config = parse(data, str(path))
    for section, keys in to_dict(config).items():
        recorded = data.get(section) or {}
        for name in keys:
            if name not in recorded:
                raise UserError(
                    f"config: {path} lacks {section}.{name}; it is damaged, or another version's; "
                    "add the key, or begin another run.dir with its weights: "
                    f"run.init_from={path.parent}"
                )
    return config


def add_later_keys(data: Any) -> None:
    """Add the keys of later versions to the content of a run's configuration, in place.

    data: the sections as they were read. What is no mapping is left alone.
    """
    if not isinstance(data, dict):
        return
    data.setdefault("task", {})
    _add_image_keys(data.get("data"))
    for added, value in ADDED_KEYS.items():
        section, name = added.split(".")
        if isinstance(data.get(section), dict):
            data[section].setdefault(name, value)


def _add_image_keys(section: Any) -> None:
    """Add what a run of an earlier version did with images, to its section `data`, in place.

    Its data.workers was for data sets of a user's own alone: threads decoded image files.
    """
    if not isinstance(section, dict) or "padding" in section:
        return
    name = section.get("name")
    if name in ("image_folder", "imagenet"):
        section["workers"] = 0
    if isinstance(name, str) and name in OLD_BORDERS:
        section["padding"], section["padding_mode"] = OLD_BORDERS[name]


def flatten(config: Config) -> dict[str, Any]:
    """Return `{"section.key": value}`, and of the method `{"method.axis.key": value}`.

    Values are those of `to_dict`, so tuples are lists. `model.args` and `optim.stages` stay
    mappings.
    """
    flat = {}
    for section, keys in to_dict(config).items():
        for key, value in keys.items():
            if section != "method":
                flat[f"{section}.{key}"] = value
                continue
            for name, option in value.items():
                flat[f"method.{key}.{name}"] = option
    return flat


def join_recorded(config: Config, recorded: Config, run_dir: str) -> Config:
    """Return the recorded configuration of a run with the free keys of the user's new one.

    The free keys are FREE_KEYS. For every key, `auto` in the new one stands for the recorded value,
    and so does null for a key that follows from others. optim.epochs is free too, where no learning
    rate depends on it. optim.max_steps is not, where it is the length of the schedule. run_dir: for
    the error alone. The result has the class of `recorded`. Raises UserError if a key that is not
    free differs from the record. Names are compared first.
    """
    free_keys = FREE_KEYS
    if recorded.optim.schedule in OPEN_SCHEDULES:
        free_keys |= {"optim.epochs"}
    elif recorded.optim.epochs is None:
        free_keys -= {"optim.max_steps"}
    old_values, new_values = flatten(recorded), flatten(config)
    for key in sorted(old_values.keys() | new_values.keys(), key=_names_first):
        old, new = old_values.get(key), new_values.get(key)
        follows = key in _FOLLOWING_KEYS and new is None
        if key in free_keys or new == "auto" or follows or new == old:
            continue
        if key in _IMAGE_KEYS and recorded.data.shape is not None and not old:
            continue
        if key == "data.augment" and fits_auto(new, old):
            continue  # the data set's own words stand in the list
        if key == "optim.schedule" and auto_schedule(config) == old:
            continue  # cosine_epoch stands for what ImageNet's rate brings
        if key == "task.class_weights" and new == "balanced" and isinstance(old, list | tuple):
            continue  # the run has recorded the numbers
        if key in ("optim.epochs", "optim.max_steps"):
            raise UserError(_describe_length(key, new, old, recorded, run_dir))
        raise UserError(
            f"config: {key} is {quote(new)}, but the run in {run_dir} was started with "
            f"{quote(old)}; give {spell_override(key, old)}, or another run.dir"
        )

    free = {key: new_values[key] for key in free_keys if new_values[key] != "auto"}
    return update(recorded, free)


def _describe_length(key: str, new: Any, old: Any, recorded: Config, run_dir: str) -> str:
    """Return the error for another length under a schedule whose rates depend on it."""
    return (
        f"config: {key} is {quote(new)}, but the run in {run_dir} was started with "
        f"{quote(old)}, and the rates of {recorded.optim.schedule} depend on it; "
        f"give {quote(old)}, or begin another run.dir with its weights: "
        f"run.init_from={run_dir}"
    )


def join_overrides(
    config: Config, recorded: Config, run_dir: str, free: Collection[str] = FREE_KEYS
) -> Config:
    """Return the configuration of a run, with the overrides of a command that reads the run.

    config: the recorded one with the overrides. free: the keys that the command may change.
    `auto` for another key stands for the recorded value. The names of the classes may be given
    where none are recorded. A user's code may have moved to another file or module. run_dir: for
    errors alone. Raises UserError if another key differs from the record, names first, and for
    more names than classes.
    """
    old_values, new_values = flatten(recorded), flatten(config)
    sections = to_dict(config)
    if recorded.data.classes is None:
        free = {*free, "data.classes"}
        _check_class_names(config, recorded, run_dir)
    for key in sorted(old_values.keys() | new_values.keys(), key=_names_first):
        old, new = old_values.get(key), new_values.get(key)
        if key in free or new == old or _is_moved_code(old, new):
            continue
        follows_from_cuts = key == "pipeline.stages" and new is None
        if new != "auto" and not follows_from_cuts:
            raise UserError(
                f"config: {key} is {quote(new)}, but the run in {run_dir} was trained with "
                f"{quote(old)}; leave it out"
            )
        *path, name = key.split(".")
        section = sections
        for part in path:
            section = section[part]
        section[name] = old
    return parse(sections, "recorded configuration")


def _check_class_names(config: Config, recorded: Config, run_dir: str) -> None:
    """Raise UserError if data.classes has more names than the run has classes."""
    names, count = config.data.classes, recorded.model.num_classes
    if isinstance(names, tuple) and isinstance(count, int) and len(names) > count:
        raise UserError(
            f"config: data.classes has {len(names)} names, but the run in {run_dir} has {count} "
            "classes; give one name a class, in the order of the outputs"
        )


def _is_moved_code(old: Any, new: Any) -> bool:
    """Return whether both values name a user's function or class of the same name."""
    if not isinstance(old, str) or not isinstance(new, str):
        return False
    both_are_code = is_user_code(old) and is_user_code(new)
    return both_are_code and old.rpartition(":")[2] == new.rpartition(":")[2]


def _find_objective_name(data: Any) -> str:
    """Return the objective's name in the content of a file, "" where it holds none."""
    for key in ("method", "objective", "name"):
        if not isinstance(data, dict):
            return ""
        data = data.get(key)
    if not isinstance(data, str):
        return ""
    return data


def _names_first(key: str) -> tuple[bool, str]:
    """Return the sort key that puts names first: another objective has other options."""
    return not key.endswith(".name"), key
