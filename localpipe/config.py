"""What the user says, checked: a YAML file and `section.key=value` words become one frozen Config.

Strict: an unknown key, a wrong type or an impossible combination is a UserError that names the nearest valid word.
An objective's own options are checked against the frozen `Options` dataclass of the class that the registry names.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from localpipe import named, registry, shipped
from localpipe.errors import UserError, suggest

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LEAST_ROWS = 3  # of a message among several of a step: any remainder of an epoch divides into messages of at least two


_NUMBER = r"-?(\d+\.?\d*|\.\d+)"


def _as_tuple(value: Any) -> Any:
    """Accept a YAML list, or the words `3,7,10` of a command line, where a tuple of numbers is meant."""
    if isinstance(value, str) and re.fullmatch(rf"\s*{_NUMBER}(\s*,\s*{_NUMBER})*\s*", value):
        return tuple(yaml.load(f"[{value}]", Loader=_Loader))
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _as_list(value: Any) -> Any:
    """Accept a YAML list, or words like `1,2,1`, where a number or a tuple of numbers is meant."""
    return _as_tuple(value) if not isinstance(value, int) else value


CONTEXT_MODES = r"^(none|E|R[1-9][0-9]*E?)$"
MEASURED = ("memory", "time")  # cuts that the launcher decides and writes down as an explicit list
Cuts = Annotated[Literal["equal", "layerwise", "memory", "time"] | tuple[Count, ...], BeforeValidator(_as_tuple)]


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


Size = Annotated[
    Auto | Positive | tuple[Positive, Positive], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
MicroBatches = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple)]
Names = Annotated[Literal["all"] | tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Channels = Annotated[Auto | tuple[float, ...], BeforeValidator(_as_tuple)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(_Section):
    """The network: a name from the registry, or a user's own `package.module:function`."""

    name: str = Field(
        "resnet32",
        description="a network's name; or package.module:function, or file.py:function, that returns an nn.Sequential",
    )
    num_classes: Auto | Positive = Field("auto", description="classes; auto takes the data set's")
    args: dict[str, Any] = Field({}, description="keyword arguments of the network")


class Context(_Section):
    """What a stage sees beside its predecessor's output (ContSup)."""

    mode: Annotated[str, Field(pattern=CONTEXT_MODES)] = Field(
        "none", description="none, E, Rn or RnE, as R1, R1E, R16"
    )


class Reconcile(_Section):
    """How a stage's input gradient is drawn to the sender's (SGR)."""

    distance: Literal["none", "cosine", "l2"] = Field("none", description="distance between neighbouring gradients")
    weight: NonNegative = Field(0.1, description="its weight in the local loss")


class Method(_Section):
    """A point on the three axes: objective, context, reconcile."""

    objective: dict[str, Any] = Field({"name": "dgl"}, description="the local loss by its name, and its own options")
    context: Context = Context()
    reconcile: Reconcile = Reconcile()


class Pipeline(_Section):
    """Where the network is cut and who runs which part."""

    stages: Positive | None = Field(
        None, description="gradient-isolated stages; an explicit list of cuts defines it, else 4"
    )
    processes: Auto | Positive = Field("auto", description="workers; auto is one a device, or a core, up to the stages")
    replicas: Annotated[Positive | tuple[Positive, ...], BeforeValidator(_as_list)] = Field(
        1, description="copies of every stage that share a batch, or a list with a number for each stage"
    )
    batch_norm: Literal["local", "sync"] = Field(
        "local", description="statistics of a replica's own rows, or of the whole batch"
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto", description="what edges run over; auto is nccl between GPUs and gloo on the CPU"
    )
    depth: Positive = Field(2, description="messages in flight on an edge; never changes a result")
    cuts: Cuts = Field(
        "equal",
        description="equal, layerwise, memory or time (balanced), or the 0-based last block of every stage but the last",
    )
    wire_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of activations, contexts and gradients that cross a boundary"
    )


class Data(_Section):
    """The data set and how its images become batches."""

    name: str = Field("digits", description="a data set's name")
    root: str = Field("data", description="the folder or file it is read from")
    batch_size: Positive = Field(128, description="images of an update, over all its messages and all replicas")
    drop_last: bool = Field(False, description="leave out an epoch's last, shorter batch")
    augment: Literal["auto", "none", "crop_flip", "crop", "resized_crop_flip"] = Field(
        "auto", description="augmentation of training images; resized_crop_flip is ImageNet's"
    )
    mean: Channels = Field("auto", description="per channel, of images in 0..1")
    std: Channels = Field("auto", description="per channel, of images in 0..1")
    train_subset: Positive | None = Field(None, description="train on the first N images of a seeded permutation")
    validation: Count = Field(0, description="training images held out to choose best_* on")
    download: bool = Field(False, description="let torchvision fetch the data set")
    image_size: Size = Field(
        "auto", description="side of the square images of image_folder, imagenet and synthetic; else what is found"
    )
    samples: Positive = Field(1024, description="images of the synthetic data set")


class Optim(_Section):
    """How every stage's optimizer moves."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="the optimizer of every stage")
    lr: Auto | NonNegative = Field("auto", description="peak learning rate; auto is 0.8 * batch_size / 1024")
    momentum: NonNegative = Field(0.9, description="of sgd")
    nesterov: bool = Field(True, description="of sgd")
    weight_decay: NonNegative = Field(1e-4, description="on every parameter")
    schedule: Literal["cosine_epoch", "cosine_epoch_from_0", "cosine_step", "step", "constant"] = Field(
        "cosine_epoch", description="of the rate; cosine_epoch_from_0 is ImageNet's, which begins at the peak"
    )
    warmup_epochs: Auto | NonNegative = Field("auto", description="auto is min(10, epochs // 16)")
    epochs: Positive = Field(160, description="passes over the training images")
    max_steps: Positive | None = Field(None, description="stop early; the schedule stays as it is")
    accumulate: Positive = Field(1, description="messages of one update; each carries batch_size / accumulate images")
    stages: dict[int, Any] = Field({}, description="reserved: settings of single stages")


class Run(_Section):
    """Where and how a run happens, and what it leaves."""

    dir: str = Field("runs/default", description="the run directory")
    seed: int = Field(0, description="of weights, data order, augmentation and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="what the stages run on")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32", description="of the arithmetic; losses and weights are fp32; tf32 is for CUDA"
    )
    checkpointing: Literal["none", "block"] = Field(
        "none", description="block keeps only the blocks' inputs and computes the rest again for the backward pass"
    )
    capture: Literal["none", "graphs", "compile"] = Field(
        "none", description="a stage's step as two CUDA graphs, or its networks through torch.compile"
    )
    channels_last: bool = Field(False, description="channels-last convolutions; messages are contiguous all the same")
    threads: Auto | Positive = Field("auto", description="threads of a worker; auto shares the cores")
    deterministic: Auto | bool = Field("auto", description="deterministic kernels; auto is true on the CPU")
    probe: Literal["none", "linear"] = Field("none", description="a linear probe on every stage's output")
    resume: Literal["auto", "never"] = Field(
        "auto", description="go on from the last checkpoint, or want a new directory"
    )
    overwrite: bool = Field(False, description="with resume=never, throw away what is in the directory")
    checkpoint_every_s: NonNegative = Field(60.0, description="seconds between checkpoints")
    keep_checkpoints: Positive = Field(2, description="complete checkpoints that are kept")
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        120.0, description="a worker without progress for so long has hung"
    )
    evaluate_every: Positive = Field(1, description="epochs between evaluations; one always follows the last step")
    log_every: Positive = Field(10, description="steps between training records")
    init_from: str | None = Field(None, description="a run directory to take old weights from, as far as they fit")
    trace: bool = Field(False, description="write trace.json, a Chrome trace of all workers on one clock")
    wandb: str | None = Field(None, description="a Weights & Biases project to log to, beside TensorBoard")
    stop_when: str | None = Field(None, description="reserved: stop on a condition")


class Bench(_Section):
    """What `bench` measures; no key of it touches a training run."""

    systems: Names = Field("all", description="rows of the table, or all that make sense")
    micro_batches: MicroBatches = Field((4,), description="micro-batches of the peers that have them, each measured")
    windows: Positive = Field(7, description="windows of each system, in turn")
    window_s: Annotated[float, Field(gt=0)] = Field(3.0, description="seconds of a window")


class Config(_Section):
    """A whole configuration."""

    model: Model = Model()
    method: Method = Method()
    pipeline: Pipeline = Pipeline()
    data: Data = Data()
    optim: Optim = Optim()
    run: Run = Run()
    bench: Bench = Bench()


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
    f"{section}.{key}" for section, keys in (row.split(": ") for row in _FREE) for key in keys.split()
)


class _Loader(yaml.SafeLoader):
    """YAML with `1e-4` a number and a key given twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` words in order, and check the whole.

    A path that does not exist may be the name of a configuration that comes with localpipe.
    """
    if not Path(path).is_file():
        path = shipped.path_of(str(path)) or path
    data = read_yaml(Path(path))
    _expand_method(data)
    if isinstance(data, dict):
        data["run"] = data.get("run") or {}
        if isinstance(data["run"], dict):
            data["run"].setdefault("dir", f"runs/{Path(path).stem}")
    return parse(overridden(data, overrides), str(path))


def overridden(data: Any, overrides: Sequence[str]) -> Any:
    """Return sections with `section.key=value` words applied in order."""
    _expand_method(data)
    for word in overrides:
        _override(data, word)
    return data


def parse(data: Any, source: str) -> Config:
    """Check a mapping of sections; `source` is named in every error."""
    if not isinstance(data, dict):
        raise UserError(f"config: {source} must be a mapping of sections; got {_show(data)}")
    # `schema` heads the files that a run writes, so that they can be read back like any other.
    data = {str(key): _named(value) for key, value in data.items() if key != "schema"}
    _expand_method(data)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error.errors(), source)) from None
    config = _with_objective(config, source)
    _check_combinations(config, source)
    return config


def _named(section: Any) -> Any:
    """Return a section with texts as keys, so that a number among them is told as an unknown key; null is empty."""
    if section is None:
        return {}
    return {str(key): value for key, value in section.items()} if isinstance(section, dict) else section


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
    data = read_yaml(path)
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
            f"config: {key} is {_show(new)}, but the run in {where} was started with {_show(old)}; "
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
            expected = _expected(_annotation(model, [name]))
            rows.append((f"{prefix}.{name}", expected, field.default, field.description or ""))
    return rows


def objective_keys(name: str) -> list[tuple[str, str, Any, str]]:
    """Return (key, choices, default, help) of an objective's own options."""
    cls = registry.objective(name, "config: method.objective.name")
    return _rows("method.objective", _options_model(cls.Options))


def read_yaml(path: Path, who: str = "config") -> Any:
    """Return what a YAML file holds, {} where it is empty; `who` speaks in every error."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        advice = "give the path of a YAML file"
        if who == "config":
            near = suggest(path.stem, shipped.names())
            advice = near if near.startswith("did") else f"{advice}, or a name that `localpipe configs` lists"
        raise UserError(f"{who}: cannot read {path}: {reason}; {advice}") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{who}: {path}{line} is not YAML: {_problem(error)}") from None
    return {} if data is None else data


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _expand_method(data: Any) -> None:
    """Turn a method's name into its point on the axes, and an axis's name into its mapping."""
    if not isinstance(data, dict):
        return
    method = data.get("method")
    if isinstance(method, str):
        if method not in registry.METHODS:
            raise UserError(f"config: method has no {method!r}; {suggest(method, registry.METHODS)}")
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
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"command line: the value of {key} is not YAML: {text!r}; put it in quotes") from None
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
            raise UserError(f"command line: {key} goes below a key that is no section; expected section.key=value")
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
        raise UserError(f"config: method.objective.name must be text ({source}); got {_show(name)}; {advice}")
    cls = registry.objective(name, f"config: method.objective.name ({source})")
    options = _options_model(cls.Options)
    full = _checked(given, options, "method.objective", name, source).model_dump(mode="json")
    method = config.method.model_copy(update={"objective": {"name": name, **full}})
    return config.model_copy(update={"method": method})


def _checked(given: Mapping[str, Any], options: type[BaseModel], prefix: str, owner: str, source: str) -> BaseModel:
    """Return what the owner of these options gets; raise UserError for an unknown key or a wrong value."""
    known = options.model_fields
    for key in given.keys() - known.keys():
        advice = suggest(key, known, f"{prefix}.") if known else f"{owner} has no options of its own"
        raise UserError(f"config: {prefix}.{key} is not a known key ({source}); {advice}")
    try:
        return options.model_validate(_tuples(given))
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        expected = _expected(_annotation(options, [key]))
        raise UserError(f"config: {prefix}.{key} must be {expected} ({source}); got {_show(given[key])}") from None


def arguments(function: Any, config: Config) -> dict[str, Any]:
    """Return `model.args` checked against the keyword-only parameters of a registered network's function.

    A function that asks for `batch_size` gets the configuration's own.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    asked = {each.name: (hints[each.name], each.default) for each in parameters if each.kind is each.KEYWORD_ONLY}
    facts = {"batch_size": config.data.batch_size}
    own = {name: what for name, what in asked.items() if name not in facts}
    options = create_model("Arguments", __base__=_Section, **typing.cast(dict[str, Any], own))
    given = _checked(config.model.args, options, "model.args", config.model.name, config.model.name)
    return {**dict(given), **{name: fact for name, fact in facts.items() if name in asked}}


def _options_model(options: Any) -> type[BaseModel]:
    """Make a strict model of an objective's Options, so that its keys are checked like every other key."""
    hints = typing.get_type_hints(options, include_extras=True)
    fields = {field.name: (hints[field.name], field.default) for field in dataclasses.fields(options)}
    return create_model("Options", __base__=_Section, **typing.cast(dict[str, Any], fields))


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
    _check_accumulation(optim.accumulate, data.batch_size, refuse)
    rows = data.batch_size // optim.accumulate
    if optim.accumulate > 1 and any(rows % count or rows < 2 * count for count in replicas):
        refuse(
            f"pipeline.replicas {max(replicas)} does not divide a message of {rows} images, data.batch_size over "
            "optim.accumulate, into at least two each; lower optim.accumulate"
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
        refuse("optim.nesterov needs a momentum above 0; got optim.momentum 0; set optim.nesterov=false")
    if isinstance(data.std, tuple) and any(value <= 0 for value in data.std):
        refuse(f"data.std must be above 0 in every channel; got {list(data.std)}")


def _check_accumulation(messages: int, batch_size: int, refuse: Callable[[str], None]) -> None:
    if batch_size % messages:
        refuse(f"optim.accumulate {messages} does not divide data.batch_size {batch_size}; choose a divisor")
    if messages > 1 and batch_size // messages < LEAST_ROWS:
        refuse(
            f"optim.accumulate {messages} leaves {batch_size // messages} of {batch_size} images a message, expected at "
            f"least {LEAST_ROWS}; lower optim.accumulate"
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
            refuse(f"run.capture {capture} does not go with {key}; set run.capture=none, or leave {key} out")


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


def _explain(errors: list[ErrorDetails], source: str) -> str:
    """Turn pydantic's first error into one line with the key, what was expected and what came."""
    first = errors[0]
    model: Any = Config
    path: list[str] = []
    for part in first["loc"]:
        fields = model.model_fields
        if part not in fields:
            break
        path.append(str(part))
        model = fields[part].annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        prefix = f"{key}." if key else ""
        word = str(first["loc"][len(path)])
        sections = [f"{name}.{word}" for name, section in _sections(model).items() if word in section.model_fields]
        advice = f"did you mean {sections[0]}?" if sections else suggest(word, model.model_fields, prefix)
        return f"config: {prefix}{word} is not a known key ({source}); {advice}"
    if isinstance(model, type) and issubclass(model, BaseModel):
        return f"config: {key} must be a mapping of keys ({source}); got {_show(first['input'])}"
    annotation, value = _annotation(Config, path), _value_at(errors, path)
    near = suggest(value, _choices(annotation)) if isinstance(value, str) else ""
    advice = f"; {near}" if near.startswith("did") else ""
    return f"config: {key} must be {_expected(annotation)} ({source}); got {_show(value)}{advice}"


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the fields of a model that are models themselves."""
    found = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _choices(annotation: Any) -> list[str]:
    """Return the words that an annotation accepts."""
    if typing.get_origin(annotation) is Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return [word for part in typing.get_args(annotation) for word in _choices(part)]


def _annotation(model: Any, path: list[str]) -> Any:
    for part in path[:-1]:
        model = model.model_fields[part].annotation
    field = model.model_fields[path[-1]]
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _value_at(errors: list[ErrorDetails], path: list[str]) -> Any:
    return next((error["input"] for error in errors if len(error["loc"]) >= len(path)), None)


def _expected(annotation: Any) -> str:
    """Say in words what an annotation accepts."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = typing.get_args(annotation)
        limits = [limit for item in metadata for limit in getattr(item, "metadata", [item])]
        words = [f"at least {limit.ge:g}" for limit in limits if getattr(limit, "ge", None) is not None]
        words += [f"at most {limit.le:g}" for limit in limits if getattr(limit, "le", None) is not None]
        if any(getattr(limit, "pattern", None) == CONTEXT_MODES for limit in limits):
            return "one of none, E, Rn, RnE with a number n, as R1 or R4E"
        words += [f"above {limit.gt:g}" for limit in limits if getattr(limit, "gt", None) is not None]
        return " ".join([_expected(inner), *words])
    if origin is Literal:
        choices = [str(choice) for choice in typing.get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(part) for part in typing.get_args(annotation))
    if origin is tuple:
        return "a list of " + _expected(typing.get_args(annotation)[0]).removeprefix("a ").replace("number", "numbers")
    if origin is dict:
        return "a mapping"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(annotation, str(annotation))


def _show(value: Any) -> str:
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
