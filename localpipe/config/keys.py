"""The sections of a configuration: every key with its type, its default and a line of help."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PrivateAttr,
)
from pydantic_core import CoreSchema, core_schema

from localpipe.config import registry
from localpipe.config.augmentation import WORDS, write_words
from localpipe.config.yaml_file import load_yaml

# No larger number is meant, and none that is not larger overflows 64 bits. It is in no text.
LARGEST = 10**12
Auto = Literal["auto"]
Whole = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
Level = Literal["full", "headers", "none"]  # how image files are checked
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Blocks = Annotated[int, Field(ge=1, le=2000)]  # of a network, which is built block by block
Replicas = Annotated[int, Field(ge=1, le=10_000)]  # each is a process
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS.update({"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40})
_NUMBER = r"-?(\d+\.?\d*|\.\d+)"


def as_tuple(value: Any) -> Any:
    """Return a tuple for a YAML list, a whole number, or the text `3,7,10` of a command line.

    The numbers of a text are int or float, as YAML reads them. A whole number gives a tuple of one.
    Any other value, also a boolean or a single float, is returned unchanged, for pydantic to
    refuse.
    """
    if isinstance(value, str) and re.fullmatch(rf"\s*{_NUMBER}(\s*,\s*{_NUMBER})*\s*", value):
        return tuple(load_yaml(f"[{value}]"))
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return list_to_tuple(value)


def _cuts_to_tuple(value: Any) -> Any:
    """Return a tuple for what `as_tuple` takes, and for the text `layer1.2,layer3.5` of names."""
    if isinstance(value, str) and "," in value:
        numbers = as_tuple(value)
        if isinstance(numbers, tuple):
            return numbers
        return tuple(name.strip() for name in value.split(","))
    return as_tuple(value)


def _number_or_tuple(value: Any) -> Any:
    """Return a whole number unchanged, and a tuple for a YAML list or the text `1,2,1`."""
    if isinstance(value, int):
        return value
    return as_tuple(value)


def _names_to_tuple(value: Any) -> Any:
    """Return a tuple for a YAML list, or for the text `stem,layer1` of a command line.

    A whole number is the name of a child of an nn.Sequential. It becomes a text.
    """
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(","))
    if isinstance(value, int):
        value = [value]
    if not isinstance(value, list):
        return value
    return tuple(_number_to_text(item) for item in value)


def _number_to_text(item: Any) -> Any:
    if isinstance(item, int) and not isinstance(item, bool):
        return str(item)
    return item


def _read_size(value: Any) -> Any:
    """Return the bytes of a text as `24GiB`, `512MiB` or `12GB`, and another value unchanged."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]i?)?B?\s*", value)
    if match is None:
        return value
    number, unit = match.groups()
    return int(float(number) * _UNITS[unit or ""])


def _null_to_empty(value: Any) -> Any:
    return "" if value is None else value


def list_to_tuple(value: Any) -> Any:
    """Return a tuple for a YAML list, and any other value unchanged. Items are not converted."""
    if isinstance(value, list):
        return tuple(value)
    return value


@dataclass(frozen=True)
class TableName:
    """The annotation of a text that must be a name of a registry table, or one of `words`.

    table: the name of the table in localpipe.config.registry, as `OPTIMIZERS`.
    """

    table: str
    words: tuple[str, ...] = ()
    takes_list: bool = False

    def list_choices(self) -> list[str]:
        """Return what the key accepts, `words` first, then the names of the table in its order."""
        return [*self.words, *getattr(registry, self.table)]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.list_choices():
            raise ValueError(f"{name!r} is not one of {self.list_choices()}")
        return name


@dataclass(frozen=True)
class Described:
    """The annotation of a value that errors describe in these words."""

    text: str


@dataclass(frozen=True)
class AugmentWords(TableName):
    """The annotation of data.augment: a word, or several in a list or a text with commas."""

    table: str = ""
    takes_list: bool = True

    def list_choices(self) -> list[str]:
        """Return the words. Those that take a number have a default one."""
        return [*self.words, *WORDS]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._write, handler(source))

    def _write(self, value: Any) -> Any:
        written = write_words(value)
        if not self.words and "auto" in (written if isinstance(written, tuple) else (written,)):
            raise ValueError("auto is decided")
        return written


def _read_interval(value: Any) -> Any:
    """Return the number for `N epochs`, `N steps` for a number of steps, else the value itself."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([1-9][0-9]*)\s*(epoch|step)s?\s*", value)
    if match is None:
        return value
    number, unit = match.groups()
    if unit == "epoch":
        return int(number)
    return f"{number} steps"


def _expand_path(path: str) -> str:
    """Return a path with its leading ~ replaced. pydantic refuses it for a ValueError."""
    if "\0" in path:
        raise ValueError("no name of a file has a null byte")
    return os.path.expanduser(path)


# Steps between evaluations. Epochs are a whole number.
STEP_INTERVAL = r"^[1-9][0-9]{0,11} steps$"
CONTEXT_MODES = r"^(none|E|R[1-9][0-9]*E?)$"
# Cuts that the launcher replaces by an explicit list.
MEASURED = ("memory", "time")
Cuts = Annotated[
    Literal["equal", "layerwise", "memory", "time"] | tuple[Count, ...] | tuple[str, ...],
    BeforeValidator(_cuts_to_tuple),
]
# Names of blocks become numbers when the network is known.
NumberedCuts = Literal["equal", "layerwise", "memory", "time"] | tuple[Count, ...]
Layouts = dict[str, Literal["chw", "hwc", "td", "ct", "d"]]
Size = Annotated[
    Auto | Positive | tuple[Positive, Positive],
    BeforeValidator(list_to_tuple),
]
DEVICES = r"^(cpu|(cpu|cuda):(0|[1-9][0-9]{0,4}))$"
DeviceName = Annotated[str, Field(pattern=DEVICES)]
DeviceNames = Annotated[
    tuple[DeviceName, ...], Field(min_length=1), BeforeValidator(_names_to_tuple)
]
Bytes = Annotated[Positive, BeforeValidator(_read_size), Described("sizes, as 24GiB")]
Budgets = Annotated[tuple[Bytes, ...], Field(min_length=1), BeforeValidator(_names_to_tuple)]
MicroBatches = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)]
Names = Annotated[
    Literal["all"] | tuple[str, ...],
    BeforeValidator(list_to_tuple),
]
# A file or folder. A leading ~ is the home directory: a shell leaves `key=~/x` as it is.
FilePath = Annotated[str, AfterValidator(_expand_path)]
ClassNames = Annotated[tuple[str, ...], BeforeValidator(list_to_tuple)]
BlockNames = Annotated[tuple[str, ...], BeforeValidator(_names_to_tuple)]
Words = Annotated[str | tuple[str, ...], AugmentWords(words=("auto",))]
Channels = Annotated[Auto | tuple[float, ...], BeforeValidator(as_tuple)]
Share = Annotated[float, Field(gt=0, lt=1)]
Shape = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)]
Range = Annotated[tuple[float, float], BeforeValidator(as_tuple)]
Betas = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
    BeforeValidator(as_tuple),
]
# Epochs from 1, or null for the rule of runs that began before there were milestones.
Milestones = Annotated[Auto | None | tuple[Positive, ...], BeforeValidator(as_tuple)]
Interval = Annotated[
    Positive | Annotated[str, Field(pattern=STEP_INTERVAL)], BeforeValidator(_read_interval)
]
Byte = Annotated[int, Field(ge=0, le=255)]
Colour = Annotated[str | tuple[Byte, Byte, Byte], BeforeValidator(list_to_tuple)]


class Section(BaseModel):
    """A frozen mapping that accepts its own keys alone, and only values of their types.

    The constructor raises pydantic's ValidationError. `config.load` and `config.parse` make it a
    UserError.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    """The network: a name from the registry, or a user's own `package.module:function`."""

    name: str = Field(
        "resnet32",
        description="a network's name; torchvision:NAME, timm:NAME or transformers:FILE.json; or "
        "package.module:function, or file.py:function, that returns an nn.Module",
    )
    num_classes: Auto | Positive = Field("auto", description="classes; auto takes the data set's")
    args: dict[str, Any] = Field({}, description="keyword arguments of the network")
    crossing: Annotated[int, Field(ge=1, le=8)] = Field(
        1, description="tensors that may cross a cut of a network that comes as one object"
    )
    crossing_untrained: Literal["refuse", "allow"] = Field(
        "refuse",
        description="whether parameters that no local loss reaches, because their output only "
        "crosses beside the main tensor, end the run or stay as they are",
    )
    layout: Layouts = Field(
        {},
        description="what the dimensions of a block's output are, {block: chw, hwc, td, ct or d}, "
        "where it is not found rightly",
    )
    untie: bool = Field(
        False, description="copy weights that blocks share, so that they can be cut apart"
    )
    blocks: Auto | None | BlockNames = Field(
        "auto",
        description="names of the blocks of a network that comes as one object, which a run "
        "records; null for others",
    )
    library: Auto | None | str = Field(
        "auto", description="the library of the network with its version, which a run records"
    )
    weights: FilePath | None = Field(
        None,
        description="a .pt or .safetensors file with a state_dict of the network, "
        "or a name of published weights, as DEFAULT",
    )
    weights_sha256: str | None = Field(
        None, description="SHA-256 of the file of model.weights; a run writes it into config.yaml"
    )
    download: bool = Field(False, description="fetch named weights that are not in the cache")
    freeze: BlockNames = Field(
        (),
        description="blocks that are not trained: their names, or dotted prefixes of names, "
        "as [stem, layer1]",
    )


class TaskKeys(Section):
    """What the network is trained for. A task reads its own keys, and `train --keys` names them."""

    name: str = Field(
        "auto",
        description="a task's name, or package.module:Class of your own; auto is the data set's",
    )
    targets: Literal["auto", "index", "probabilities"] = Field(
        "auto",
        description="what classification learns of a sample: the index of its class, or a "
        "probability of every class; auto is what the data have",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of a target that is spread over all classes"
    )
    class_weights: Annotated[
        Literal["none", "balanced"] | tuple[NonNegative, ...], BeforeValidator(as_tuple)
    ] = Field(
        "none",
        description="weight of every class in the loss; balanced is the inverse of its share",
    )
    ignore_index: int | None = Field(
        255, description="value of a target's places that do not count, null for none"
    )
    average: Literal["all", "valid"] = Field(
        "all",
        description="what the sum over the valid places of a sample is divided by: all its places, "
        "or the valid ones",
    )
    aux_weight: NonNegative = Field(
        0.4,
        description="weight in the loss of the output `aux` of a network that has one, as "
        "torchvision's with model.args {aux_loss: true}; 0 leaves it out",
    )
    loss: Literal["mse", "mae", "huber"] = Field("mse", description="the distance to the target")
    args: dict[str, Any] = Field({}, description="options of a task of your own")


class Context(Section):
    """What a stage sees beside its predecessor's output (ContSup)."""

    mode: Annotated[str, Field(pattern=CONTEXT_MODES)] = Field(
        "none", description="none, E, Rn or RnE, as R1, R1E, R16"
    )


class Reconcile(Section):
    """How a stage's input gradient is drawn to the sender's (SGR)."""

    distance: Literal["none", "cosine", "l2"] = Field(
        "none", description="distance between neighbouring gradients"
    )
    weight: NonNegative = Field(0.1, description="its weight in the local loss")


class Feedback(Section):
    """Which parameters of a later stage come back, late (MAN, MAN++, SOLO's readout)."""

    mode: Literal["none", "block", "readout"] = Field(
        "none",
        description="copies of the next stage's first block in front of the local loss (MAN), or "
        "of the network's last Linear at the end of its exit (SOLO)",
    )
    lag: Auto | Positive = Field(
        "auto",
        description="steps by which they come late; auto is the smallest multiple of `every` from "
        "which on no stage waits up to depth 4",
    )
    every: Positive = Field(16, description="steps between two of them")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.995, description="of the block's moving average, a step"
    )
    combine: Literal["sum", "scaled"] = Field(
        "sum",
        description="what the local loss sees of the trained copy x and the average y: x + y "
        "(MAN), or s x + (2 - s) y with s trained (MAN++)",
    )


class Method(Section):
    """A point on the four axes: objective, context, reconcile, feedback."""

    objective: dict[str, Any] = Field(
        {"name": "dgl"}, description="the local loss by its name, and its own options"
    )
    context: Context = Context()
    reconcile: Reconcile = Reconcile()
    feedback: Feedback = Feedback()


class Pipeline(Section):
    """Where the network is cut and who runs which part."""

    stages: Blocks | None = Field(
        None, description="gradient-isolated stages; an explicit list of cuts defines it, else 4"
    )
    processes: Auto | Positive = Field(
        "auto", description="workers; auto is one a device, or a core, up to the stages"
    )
    replicas: Annotated[Replicas | tuple[Replicas, ...], BeforeValidator(_number_or_tuple)] = Field(
        1,
        description="copies of every stage that share a batch, "
        "or a list with a number for each stage",
    )
    batch_norm: Literal["local", "sync"] = Field(
        "local", description="statistics of a replica's own rows, or of the whole batch"
    )
    backend: Annotated[str, TableName("BACKENDS", words=("auto",))] = Field(
        "auto", description="what edges run over; auto is nccl between GPUs and gloo on the CPU"
    )
    depth: Annotated[int, Field(ge=1, le=1000)] = Field(
        2, description="messages in flight on an edge; never changes a result"
    )
    cuts: Cuts = Field(
        "equal",
        description="equal, layerwise, memory or time (balanced), "
        "or the 0-based last block of every stage but the last",
    )
    devices: None | DeviceNames = Field(
        None,
        description="one for each worker by its rank: cuda:1, cpu, or cpu:1 for one core of its "
        "own; null gives each the next GPU of its machine, or the CPU",
    )
    memory: None | Budgets = Field(
        None,
        description="bytes that each worker may use, as 24GiB; cuts memory balances by them, and "
        "other cuts must fit",
    )
    replay: Auto | None | Positive = Field(
        "auto",
        description="messages that an edge keeps for a worker that is replaced, with "
        "run.recover=stage; auto is as many as fit 256 MiB an edge, up to 64",
    )
    wire_dtype: Literal["fp32", "bf16", "fp16", "int8", "int4"] = Field(
        "fp32",
        description="of activations, contexts and gradients that cross a boundary; "
        "int8 and int4 have an fp32 scale for every 64 numbers of a sample",
    )


class Data(Section):
    """The data set and how its images become batches."""

    name: str = Field(
        "digits",
        description="a data set's name; or package.module:function, or file.py:function, that "
        "returns your own (train, test)",
    )
    root: Annotated[FilePath, BeforeValidator(_null_to_empty)] = Field(
        "data",
        description="the folder or file it is read from; null with bytes is Python's own library",
    )
    classes: Auto | None | ClassNames = Field(
        "auto",
        description="names of the classes in the order of their indices; "
        "auto takes the data's own, null where they have none",
    )
    batch_size: Positive = Field(
        128, description="images of an update, over all its messages and all replicas"
    )
    shape: Auto | None | Shape = Field(
        "auto", description="of an input that is no image of bytes, which a run records; else null"
    )
    dtype: Auto | None | Literal["float32", "int64"] = Field(
        "auto", description="of an input that is no image of bytes, which a run records; else null"
    )
    evaluation_size: Annotated[
        Auto | None | tuple[Positive, Positive], BeforeValidator(list_to_tuple)
    ] = Field(
        "auto",
        description="height and width of images in an evaluation, where they are not those in "
        "training, which a run records; else null",
    )
    vocabulary: Positive | None = Field(
        None, description="how many tokens there are, where a data set of tokens does not say it"
    )
    length: Positive = Field(256, description="tokens of a sample of bytes and tokens")
    token_dtype: Literal["auto", "uint16", "uint32"] = Field(
        "auto",
        description="of the numbers in the files of tokens; auto is uint16 up to a vocabulary of "
        "65536",
    )
    workers: Auto | Count = Field(
        "auto",
        description="processes that load a data set of your own or cityscapes, or decode and "
        "augment image files; auto is the cores that the workers' threads leave, 1 to 8; with 0 "
        "threads of the worker read image files, as auto has it up to 10,000 of them",
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        600.0,
        description="seconds that an item of a data set of your own may take, or a batch of "
        "image files",
    )
    drop_last: bool = Field(False, description="leave out an epoch's last, shorter batch")
    augment: Words = Field(
        "auto",
        description="augmentation of training images, a word or a list: a crop, then changes of "
        "an image, then mixtures of two; resized_crop_flip is ImageNet's; WORD:NUMBER sets the "
        "number of a change or a mixture",
    )
    padding: Auto | None | Count = Field(
        "auto", description="pixels on every side of an image that crop and crop_flip crop from"
    )
    padding_mode: Auto | None | Literal["reflect", "zero"] = Field(
        "auto", description="what those pixels are; auto of both is the data set's own"
    )
    extra: bool = Field(False, description="train on the images of svhn's `extra` split too")
    mean: Channels = Field("auto", description="per channel, of images in 0..1")
    std: Channels = Field("auto", description="per channel, of images in 0..1")
    train_subset: Positive | None = Field(
        None, description="train on the first N images of a seeded permutation"
    )
    validation: Count = Field(0, description="training images held out to choose best_* on")
    test: Share | None = Field(
        None,
        description="share of the images of every class that is the test split, "
        "of image_folder and imagenet without a folder of test images; of bytes, a share of the "
        "files, 0.1 by default",
    )
    download: bool = Field(False, description="let torchvision fetch the data set")
    image_size: Size | None = Field(
        "auto",
        description="height and width (or one number for both) of images of image_folder, "
        "imagenet, synthetic, shapes and areas, and of crops of cityscapes; else what is found",
    )
    range: Range | None = Field(
        None,
        description="values of black and white in image files of more than 8 bits; "
        "null divides 16 bits by 257, and refuses floats and 32 bits",
    )
    background: Colour = Field(
        "white",
        description="colour below transparent pixels of image files: a name, '#rrggbb' in quotes, "
        "or [r, g, b]",
    )
    samples: Positive = Field(1024, description="training images of synthetic, shapes and areas")
    verify: Literal["auto", "full", "headers", "none"] = Field(
        "auto",
        description="how image files are checked before the first step: full decodes them, "
        "headers reads their headers; auto is full up to 100,000 files",
    )
    skip_broken: bool = Field(
        False, description="leave out the image files that cannot be read when the run begins"
    )
    changed: Literal["refuse", "accept"] = Field(
        "refuse",
        description="what a resumed run does with other data than its checkpoint was made from; "
        "accept goes on with the data as they are now",
    )


class Optim(Section):
    """How every stage's optimizer moves."""

    name: Annotated[str, TableName("OPTIMIZERS")] = Field(
        "sgd", description="the optimizer of every stage"
    )
    lr: Auto | NonNegative = Field(
        "auto",
        description="peak learning rate; auto is 0.8 * batch_size / 1024 (imagenet: 0.4), adamw's "
        "is 5e-4 * batch_size / 512; a tenth of it with model.weights",
    )
    # `train --keys` names the optimizers that read these.
    momentum: NonNegative = Field(0.9)
    nesterov: bool = Field(True)
    betas: Betas = Field(
        (0.9, 0.999), description="decay of the running means of the gradient and of its square"
    )
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1e-8, description="added to the denominator"
    )
    weight_decay: NonNegative = Field(1e-4, description="on the parameters of optim.decay")
    decay: Literal["all", "matrices"] = Field(
        "all",
        description="parameters with weight decay; matrices leaves out those of fewer than two "
        "dimensions, as of norms and biases",
    )
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="largest norm of a stage's gradient, over all its parameters"
    )
    schedule: Literal[
        "cosine_epoch",
        "cosine_epoch_from_0",
        "cosine_step",
        "poly",
        "step",
        "multistep",
        "constant",
    ] = Field(
        "cosine_epoch",
        description="of the rate; cosine_epoch_from_0 is ImageNet's, which begins at the peak: "
        "with lr auto, cosine_epoch is that one on imagenet; poly has the power 0.9",
    )
    min_lr: NonNegative = Field(
        0.0, description="the rate at the end of the schedules cosine_step and poly"
    )
    milestones: Milestones = Field(
        "auto",
        description="the first epoch of every lower rate, counted from 1, of the schedules "
        "multistep and step; auto is half and three quarters of the epochs with step; null with "
        "step is the rule of older runs, an epoch later",
    )
    factor: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="what multiplies the rate at every milestone"
    )
    warmup_epochs: Auto | NonNegative = Field(
        "auto",
        description="auto is min(10, epochs // 16), and 0 with warmup_steps, without epochs, "
        "and on imagenet with lr auto",
    )
    warmup_steps: Count | None = Field(
        None, description="steps of a linear warm-up, in place of warmup_epochs"
    )
    epochs: Positive | None = Field(
        160,
        description="passes over the training images; null makes the schedule max_steps long, "
        "and what counts epochs in it counts steps",
    )
    max_steps: Positive | None = Field(
        None, description="stop early; the schedule stays as it is, unless epochs is null"
    )
    accumulate: Positive = Field(
        1, description="messages of one update; each carries batch_size / accumulate images"
    )
    ema: Share | None = Field(
        None,
        description="decay of a moving average of the trained parameters, from their initial "
        "values, after every step; it is what is evaluated and exported",
    )
    stages: dict[int, Any] = Field({}, description="reserved: settings of single stages")


class Run(Section):
    """Where and how a run happens, and what it leaves."""

    dir: FilePath = Field("runs/default", description="the run directory")
    seed: Whole = Field(0, description="of weights, data order, augmentation and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="what the stages run on")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32", description="of the arithmetic; losses and weights are fp32; tf32 is for CUDA"
    )
    checkpointing: Literal["none", "block"] = Field(
        "none",
        description="block keeps only the blocks' inputs "
        "and computes the rest again for the backward pass",
    )
    capture: Literal["none", "graphs", "compile"] = Field(
        "none",
        description="a stage's step as two CUDA graphs, or its networks through torch.compile",
    )
    channels_last: bool = Field(
        False, description="channels-last convolutions; messages are contiguous all the same"
    )
    threads: Annotated[
        Auto | Positive | tuple[Positive, ...], BeforeValidator(_number_or_tuple)
    ] = Field(
        "auto",
        description="threads of a worker, or a list with a number for each; auto shares the cores",
    )
    deterministic: Auto | bool = Field(
        "auto", description="deterministic kernels; auto is true on the CPU"
    )
    probe: Literal["none", "linear"] = Field(
        "none",
        description="a linear probe on every stage's output; "
        "with replicas, of the first one's rows",
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="go on from the last checkpoint, or want a new directory"
    )
    overwrite: bool = Field(
        False,
        description="with resume=never, throw away the run in the directory, and nothing else",
    )
    checkpoint_every_s: NonNegative = Field(60.0, description="seconds between checkpoints")
    keep_checkpoints: Positive = Field(2, description="complete checkpoints that are kept")
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        120.0, description="a worker without progress for so long has hung"
    )
    recover: Literal["none", "stage"] = Field(
        "none",
        description="what happens when a worker is killed or hangs: the run ends, or its stages "
        "alone go on in a new process (of one machine, without torchrun)",
    )
    max_recoveries: Count = Field(
        3, description="how often a worker is replaced before the run ends, with recover=stage"
    )
    spares: Annotated[int, Field(ge=0, le=8)] = Field(
        0,
        description="processes that stand ready with torch imported to replace a worker, with "
        "recover=stage",
    )
    evaluate_every: Interval = Field(
        1,
        description="epochs between evaluations, or `N steps`; one always follows the last step",
    )
    log_every: Positive = Field(10, description="steps between training records")
    init_from: FilePath | None = Field(
        None, description="a run directory to take old weights from, as far as they fit"
    )
    trace: bool = Field(
        False, description="write trace.json, a Chrome trace of all workers on one clock"
    )
    wandb: str | None = Field(
        None, description="a Weights & Biases project to log to, beside TensorBoard"
    )
    stop_when: str | None = Field(None, description="reserved: stop on a condition")


class Bench(Section):
    """What `bench` measures; no key of it touches a training run."""

    systems: Names = Field("all", description="rows of the table, or all that make sense")
    micro_batches: MicroBatches = Field(
        (4,),
        description="micro-batches of the peers that have them, each measured; "
        "beside them localpipe accumulates as many messages",
    )
    windows: Positive = Field(8, description="windows of each system, in turn, there and back")
    window_s: Annotated[float, Field(gt=0)] = Field(3.0, description="seconds of a window")


class Config(Section):
    """A whole configuration. `config.load` and `config.parse` make one that is checked.

    The constructor checks keys and types alone, and leaves `objective` unset.
    """

    model: Model = Model()
    task: TaskKeys = TaskKeys()
    method: Method = Method()
    pipeline: Pipeline = Pipeline()
    data: Data = Data()
    optim: Optim = Optim()
    run: Run = Run()
    bench: Bench = Bench()

    _objective: Any = PrivateAttr(None)

    @property
    def objective(self) -> tuple[Any, Any]:
        """The objective's class and its Options.

        They are looked up once, when the configuration is checked. Raises AssertionError if they
        were not: see `has_objective`.
        """
        assert self._objective is not None, "config.load and config.parse set it"
        objective: tuple[Any, Any] = self._objective
        return objective

    @property
    def has_objective(self) -> bool:
        """Whether the objective's class was looked up.

        It was not if this is a recorded configuration with user code that was not imported. It was
        not either if the constructor made the configuration.
        """
        return self._objective is not None
