"""What the user says, checked: a YAML file and `section.key=value` words become one frozen Config.

Strict: an unknown key, a wrong type or an impossible combination is a UserError that names the nearest valid word.
An objective's own options are checked against the frozen `Options` dataclass of the class that the registry names.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, create_model

from localpipe import named, registry, shipped, wording, yaml_file
from localpipe.errors import UserError, suggest
from localpipe.sections import Config, Method, Section

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


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` words in order, and check the whole.

    A path that does not exist may be the name of a configuration that comes with localpipe.
    """
    if not Path(path).is_file():
        path = shipped.path_of(str(path)) or path
    data = yaml_file.read_yaml(Path(path))
    _expand_method(data)
    if isinstance(data, dict):
        data["run"] = data.get("run") or {}
        if isinstance(data["run"], dict):
            data["run"].setdefault("dir", f"runs/{Path(path).stem}")
    return parse(overridden(data, overrides), str(path))


def overridden(data: Any, overrides: Sequence[str]) -> Any:
    """Return sections with `section.key=value` words applied in order, `method=NAME` first: what says more goes on top."""
    _expand_method(data)
    for word in sorted(overrides, key=lambda word: word.partition("=")[0].strip() != "method"):
        _override(data, word)
    return data


def parse(data: Any, source: str) -> Config:
    """Check a mapping of sections; `source` is named in every error."""
    if not isinstance(data, dict):
        raise UserError(f"config: {source} must be a mapping of sections; got {wording.show(data)}")
    # `schema` heads the files that a run writes, so that they can be read back like any other.
    data = {str(key): _named(value) for key, value in data.items() if key != "schema"}
    _expand_method(data)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise UserError(wording.explain(Config, error.errors(), source)) from None
    config = _with_objective(config, source)
    _check_combinations(config, source)
    return config


def _named(section: Any) -> Any:
    """Return a section with texts as keys, so that a number among them is told as an unknown key; null is empty."""
    if section is None:
        return {}
    return (
        {str(key): value for key, value in section.items()}
        if isinstance(section, dict)
        else section
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dicts and lists, JSON and YAML ready."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML that `load` reads back unchanged."""
    return yaml.safe_dump({"schema": 1, **to_dict(config)}, sort_keys=False)


def read_recorded(path: Path, own_code: Collection[str] | None = ()) -> Config:
    """Read the configuration that a run wrote into its own directory; every key must be there.

    An objective of the user's own is code, imported only where `own_code` holds its name, or is None.
    """
    data = yaml_file.read_yaml(path)
    _expand_method(data)
    objective = _objective_name(data)
    if named.is_own(objective) and own_code is not None and objective not in own_code:
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


def update(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a copy with `section.key` entries replaced; the result is checked again."""
    data = to_dict(config)
    for key, value in values.items():
        section, _, name = key.partition(".")
        data[section][name] = value
    return parse(data, "resolved configuration")


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


def resumed(given: Config, recorded: Config, where: str) -> Config:
    """Join what the user gives now with what a run recorded: `auto` reads the record, a shaping key must equal it."""
    before, now = flatten(recorded), flatten(given)
    # Names first: what differs under another objective's name follows from it.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (not key.endswith(".name"), key)):
        old, new = before.get(key), now.get(key)
        derived = key == "pipeline.stages" and new is None
        if key in FREE_KEYS or new == "auto" or derived or new == old:
            continue
        raise UserError(
            f"config: {key} is {wording.show(new)}, but the run in {where} was started with {wording.show(old)}; "
            "give the recorded value, or another run.dir"
        )
    free = {key: now[key] for key in FREE_KEYS if now[key] != "auto"}
    return update(recorded, free)


def keys() -> list[tuple[str, str, Any, str]]:
    """Return (key, choices, default, help) of every key, in the order of the file."""
    rows = []
    for section, field in Config.model_fields.items():
        rows += _rows(section, typing.cast(type[BaseModel], field.annotation))
    return rows


def _rows(prefix: str, model: type[BaseModel]) -> list[tuple[str, str, Any, str]]:
    rows = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _rows(f"{prefix}.{name}", field.annotation)
        else:
            expected = wording.expected(wording.annotation(model, [name]))
            rows.append((f"{prefix}.{name}", expected, field.default, field.description or ""))
    return rows


def objective_keys(name: str) -> list[tuple[str, str, Any, str]]:
    """Return (key, choices, default, help) of an objective's own options."""
    cls = registry.objective(name, "config: method.objective.name")
    return _rows("method.objective", _options_model(cls.Options))


def _expand_method(data: Any) -> None:
    """Turn a method's name into its point on the axes, and an axis's name into its mapping."""
    if not isinstance(data, dict):
        return
    method = data.get("method")
    if isinstance(method, str):
        if method not in registry.METHODS:
            raise UserError(
                f"config: method has no {method!r}; {suggest(method, registry.METHODS)}"
            )
        data["method"] = {axis: dict(options) for axis, options in registry.METHODS[method].items()}
    method = data.get("method")
    if isinstance(method, dict):
        for axis, key in (("objective", "name"), ("context", "mode"), ("reconcile", "distance")):
            if isinstance(method.get(axis), str):
                method[axis] = {key: method[axis]}


def _override(data: Any, word: str) -> None:
    if not isinstance(data, dict):
        return  # `parse` says what is wrong with it
    key, equals, text = word.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"command line: {word!r} is not an override; expected section.key=value")
    try:
        value = yaml.load(text, Loader=yaml_file.Loader)
    except yaml.YAMLError:
        raise UserError(
            f"command line: the value of {key} is not YAML: {text!r}; put it in quotes"
        ) from None
    if path == ["method"]:
        data["method"] = value
        _expand_method(data)
        return
    node: Any = data
    for part in path[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(
                f"command line: {key} goes below a key that is no section; expected section.key=value"
            )
    if path == ["method", "objective", "name"] and node.get("name") != value:
        node.clear()  # another objective has other options
    node[path[-1]] = value
    _expand_method(data)


def _with_objective(config: Config, source: str) -> Config:
    """Fill in the objective's defaults, checked against its own Options."""
    given = dict(config.method.objective)
    name = given.pop("name", Method().objective["name"])
    if not isinstance(name, str):
        advice = suggest(str(name), registry.OBJECTIVES)
        raise UserError(
            f"config: method.objective.name must be text ({source}); got {wording.show(name)}; {advice}"
        )
    cls = registry.objective(name, f"config: method.objective.name ({source})")
    options = _options_model(cls.Options)
    full = _checked(given, options, "method.objective", name, source).model_dump(mode="json")
    method = config.method.model_copy(update={"objective": {"name": name, **full}})
    return config.model_copy(update={"method": method})


def _checked(
    given: Mapping[str, Any], options: type[BaseModel], prefix: str, owner: str, source: str
) -> BaseModel:
    """Return what the owner of these options gets; raise UserError for an unknown key or a wrong value."""
    known = options.model_fields
    for key in given.keys() - known.keys():
        advice = (
            suggest(key, known, f"{prefix}.") if known else f"{owner} has no options of its own"
        )
        raise UserError(f"config: {prefix}.{key} is not a known key ({source}); {advice}")
    try:
        return options.model_validate(_tuples(given))
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        expected = wording.expected(wording.annotation(options, [key]))
        if key not in given:
            raise UserError(
                f"config: {prefix}.{key} has no default ({source}); give it, {expected}"
            ) from None
        raise UserError(
            f"config: {prefix}.{key} must be {expected} ({source}); got {wording.show(given[key])}"
        ) from None


def arguments(function: Any, config: Config) -> dict[str, Any]:
    """Return `model.args` checked against the keyword-only parameters of a registered network's function.

    A function that asks for `batch_size` gets the configuration's own.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    asked = {
        each.name: (hints[each.name], each.default)
        for each in parameters
        if each.kind is each.KEYWORD_ONLY
    }
    facts = {"batch_size": config.data.batch_size}
    own = {name: what for name, what in asked.items() if name not in facts}
    options = create_model("Arguments", __base__=Section, **typing.cast(dict[str, Any], own))
    given = _checked(config.model.args, options, "model.args", config.model.name, config.model.name)
    return {**dict(given), **{name: fact for name, fact in facts.items() if name in asked}}


def _options_model(options: Any) -> type[BaseModel]:
    """Make a strict model of an objective's Options, so that its keys are checked like every other key."""
    hints = typing.get_type_hints(options, include_extras=True)
    fields = {
        field.name: (hints[field.name], _default(field)) for field in dataclasses.fields(options)
    }
    return create_model("Options", __base__=Section, **typing.cast(dict[str, Any], fields))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ... if field.default is dataclasses.MISSING else field.default


def _check_combinations(config: Config, source: str) -> None:
    pipeline, data, optim = config.pipeline, config.data, config.optim

    def refuse(what: str) -> None:
        raise UserError(f"config: {what} ({source})")

    if data.name not in registry.DATASETS:
        refuse(f"data.name has no {data.name!r}; {suggest(data.name, registry.DATASETS)}")
    if config.model.name not in registry.MODELS and not named.is_own(config.model.name):
        advice = suggest(config.model.name, registry.MODELS)
        refuse(
            f"model.name has no {config.model.name!r}; {advice} (or name a function of yours, package.module:function)"
        )
    if isinstance(pipeline.cuts, tuple):
        if pipeline.stages is not None and pipeline.stages != len(pipeline.cuts) + 1:
            refuse(
                f"pipeline.cuts {list(pipeline.cuts)} makes {len(pipeline.cuts) + 1} stages, but pipeline.stages is "
                f"{pipeline.stages}; leave one of them out"
            )
        if list(pipeline.cuts) != sorted(set(pipeline.cuts)):
            refuse(f"pipeline.cuts must rise; got {list(pipeline.cuts)}")
    if data.batch_size < 2:
        refuse("data.batch_size must be at least 2, batch normalisation needs two images; got 1")
    stages = stage_count(config)
    if isinstance(pipeline.replicas, tuple) and len(pipeline.replicas) != stages:
        refuse(
            f"pipeline.replicas lists {len(pipeline.replicas)} stages, but there are {stages}; give one number for each"
        )
    replicas = replicas_of(config)
    for count in replicas:
        if data.batch_size % count or data.batch_size < 2 * count:
            refuse(
                f"pipeline.replicas {count} does not divide data.batch_size {data.batch_size} into at least two images "
                "each; choose another batch size, or another number of replicas"
            )
    if pipeline.processes != "auto" and (wrong := misfit(pipeline.processes, replicas)):
        refuse(f"pipeline.processes is {pipeline.processes}, but {wrong}")
    _check_accumulation(optim.accumulate, data.batch_size, max(replicas), refuse)
    rows = data.batch_size // optim.accumulate
    for count in replicas:
        if rows % count:
            refuse(
                f"pipeline.replicas {count} does not divide a message of {rows} images, data.batch_size over "
                "optim.accumulate; choose another optim.accumulate"
            )
    _check_capture(config, refuse)
    if config.run.checkpointing != "none" and reconciles(config):
        refuse(
            "run.checkpointing saves nothing with method.reconcile, whose double backward pass holds what is computed "
            "again; set run.checkpointing=none, or leave method.reconcile out"
        )
    if optim.stages:
        refuse("optim.stages is reserved for a later version; leave it out")
    if config.run.stop_when is not None:
        refuse("run.stop_when is reserved for a later version; leave it out")
    if config.method.reconcile.distance == "l2" and not _is_cross_entropy(config):
        refuse(
            "method.reconcile.distance l2 needs local losses that are one cross-entropy each, so that gradients have a "
            f"scale; {config.method.objective['name']} as set is not, choose cosine"
        )
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        refuse(
            "optim.nesterov needs a momentum above 0; got optim.momentum 0; set optim.nesterov=false"
        )
    if isinstance(data.std, tuple) and any(value <= 0 for value in data.std):
        refuse(f"data.std must be above 0 in every channel; got {list(data.std)}")


def _check_accumulation(
    messages: int, batch_size: int, replicas: int, refuse: Callable[[str], None]
) -> None:
    """Refuse messages so small that a remainder of an epoch may not divide into such with two images a replica."""
    least = 4 * replicas - 1
    if batch_size % messages:
        refuse(
            f"optim.accumulate {messages} does not divide data.batch_size {batch_size}; choose a divisor"
        )
    if messages > 1 and batch_size // messages < least:
        refuse(
            f"optim.accumulate {messages} leaves {batch_size // messages} of {batch_size} images a message, expected at "
            f"least {least} with {replicas} {'replicas' if replicas > 1 else 'replica'}; lower optim.accumulate"
        )


def _check_capture(config: Config, refuse: Callable[[str], None]) -> None:
    capture = config.run.capture
    if capture == "none":
        return
    others = (
        ("method.reconcile", reconciles(config)),
        ("pipeline.replicas", max(replicas_of(config)) > 1),
        ("run.checkpointing", config.run.checkpointing != "none"),
        ("optim.accumulate", config.optim.accumulate > 1 and capture == "graphs"),
    )
    for key, used in others:
        if used:
            refuse(
                f"run.capture {capture} does not go with {key}; set run.capture=none, or leave {key} out"
            )


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
    }


def objective_of(config: Config) -> tuple[Any, Any]:
    """Return the class of the objective and its options."""
    given = dict(config.method.objective)
    cls = registry.objective(given.pop("name"), "config: method.objective.name")
    return cls, cls.Options(**_tuples(given))


def _is_cross_entropy(config: Config) -> bool:
    cls, options = objective_of(config)
    return bool(cls.is_cross_entropy(options))


def reconciles(config: Config) -> bool:
    """Return whether neighbouring gradients are reconciled: weight 0 is the axis off, and one stage has no neighbour."""
    reconcile = config.method.reconcile
    return reconcile.distance != "none" and reconcile.weight > 0 and stage_count(config) > 1


def stage_count(config: Config) -> int:
    """Return the number of stages that the configuration asks for."""
    if isinstance(config.pipeline.cuts, tuple):
        return len(config.pipeline.cuts) + 1
    return config.pipeline.stages if config.pipeline.stages is not None else 4


def replicas_of(config: Config) -> tuple[int, ...]:
    """Return the number of replicas of every stage."""
    replicas = config.pipeline.replicas
    return replicas if isinstance(replicas, tuple) else (replicas,) * stage_count(config)


def misfit(processes: int, replicas: tuple[int, ...]) -> str | None:
    """Say why a number of workers cannot host every replica of every stage; None where it can.

    A worker hosts stages of one replica; where stages have different numbers of replicas, one of one stage.
    """
    everything = sum(replicas)
    if processes > everything:
        return f"{len(replicas)} stages with {list(replicas)} replicas are all there is to run; set it to at most {everything}"
    if len(set(replicas)) > 1 and processes != everything:
        return f"with different numbers of replicas {list(replicas)} every one has a worker of its own; set it to {everything}"
    if processes % replicas[0] and len(set(replicas)) == 1:
        return f"{replicas[0]} replicas need workers of their own; set it to a multiple of {replicas[0]}"
    return None
