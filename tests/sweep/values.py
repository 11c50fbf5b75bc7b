"""The values of every key that the sweep tries. The first value of a key is that of base.yaml.

`test_values.py` compares the table with config/keys.py: a key, a choice of a key or an option of an
objective that is neither here nor left out with a reason fails the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from localpipe.config import registry

VIT = "{patch: 4, depth: 3, width: 16, heads: 2}"
# A multiple of four bytes for every number of images that the table makes of a message.
CHAIN = "{time_ms: 1, message_bytes: 5376, blocks: 3}"
GPT = "{depth: 3, width: 16, heads: 2}"
# A text and a network for it, which the base's images and their augmentation are not for.
DECODER = f"model.name=gpt | model.args={GPT} | data.augment=none"
TEXT = f"data.root={{sweep}}/text | {DECODER}"
# Masks and numbers, of which the second fits every network of one output a class.
MASKS = "model.name=tests.sample_networks:places | model.args={width: 4} | data.augment=none"
NUMBERS = "data.augment=none"
STRIPES = "tests.data.user.sets:stripes"
OPINIONS = "tests.data.user.sets:opinions"
NAMES = "[a, b, c, d, e, f, g, h, i, j]"


@dataclass(frozen=True)
class Value:
    """A value of one key: the words of a command line, `{sweep}` standing for the sweep's folder.

    The first word sets the key, the others what this value needs.
    """

    words: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.words[0].partition("=")[0]

    def find(self, key: str) -> str | None:
        """Return the word that sets a key, None where the value leaves it alone."""
        return next((word for word in self.words if word.startswith(f"{key}=")), None)

    def __str__(self) -> str:
        return " ".join(self.words)


# A text is `VALUE` or `VALUE | other.key=value | ...`.
_TABLE: Mapping[str, tuple[str, ...]] = {
    "model.name": (
        "resnet8",
        f"vit_tiny | model.args={VIT}",
        f"gpt | model.args={GPT} | data.name=bytes | data.root={{sweep}}/text | data.augment=none",
        f"gpt | data.name=tokens | data.root={{sweep}}/tokens | data.vocabulary=60 | {DECODER}",
        f"chain | model.args={CHAIN}",
        "mlp | model.args={width: 6, dropout: 0.2, slope: 0.01, zero_start: true}",
        "simple_cnn | model.args={depth: 4, width: 4}",
        "tests.sample_networks:small | model.args={width: 4}",
        "tests.sample_networks:Forked | model.args={width: 4}",
        "tests.sample_networks:places | model.args={width: 4} | data.name=shapes | "
        "data.augment=none",
    ),
    "model.crossing": ("1", "2"),
    "model.untie": ("false", "true"),
    "model.num_classes": ("auto", "12"),
    "model.crossing_untrained": ("refuse", "allow"),
    "model.weights": ("null", "{sweep}/weights.pt"),
    "model.download": ("false", "true"),
    "model.freeze": ("[]", "[stem, layer1]"),
    "task.name": (
        "auto",
        "classification",
        f"next_token | data.name=bytes | {TEXT}",
        f"segmentation | data.name=shapes | {MASKS}",
        f"regression | data.name=areas | {NUMBERS}",
    ),
    "task.targets": (
        "auto",
        "index",
        f"probabilities | task.name=classification | data.name={OPINIONS} | data.augment=none | "
        "data.image_size=auto",
    ),
    "task.label_smoothing": ("0", "0.1"),
    "task.class_weights": ("none", "balanced", "[1, 1, 1, 1, 1, 2, 2, 2, 2, 2]"),
    "task.ignore_index": ("255", "-1"),
    "task.average": ("all", "valid"),
    "task.aux_weight": ("0.4", "0"),
    "task.loss": ("mse", "mae", "huber"),
    "method.objective": (
        "{name: dgl}",
        "{name: dgl, head: 1c2f}",
        "{name: dgl, head: dgl_mlp_sr}",
        "{name: dgl, head: dgl_cnn}",
        "{name: greedy}",
        "{name: predsim}",
        "{name: predsim, loss: sim}",
        "{name: predsim, loss: pred, dim_in_decoder: 40, zero_start: true, padded_pooling: true}",
        "{name: infopro, task: softmax, head: 1c1f, image_weight: [1, 0], task_weight: [1, 1]}",
        "{name: infopro, task: contrast}",
        "{name: auglocal, aux_depth: 2, aux_min_depth: 1, pyramid: 0.5}",
    ),
    "method.context.mode": ("none", "E", "R1", "R2E"),
    "method.reconcile.distance": ("none", "cosine", "l2"),
    "method.reconcile.weight": ("0.1", "0", "2.0"),
    "method.feedback.mode": ("none", "block", "readout"),
    "method.feedback.lag": ("1", "auto", "2"),
    "method.feedback.every": ("1", "2"),
    "method.feedback.momentum": ("0.995", "0.5"),
    "method.feedback.combine": ("sum", "scaled"),
    "pipeline.stages": ("2", "1", "3"),
    "pipeline.processes": ("1", "2", "auto"),
    "pipeline.replicas": ("1", "2", "[1, 2]"),
    "pipeline.batch_norm": ("local", "sync"),
    "pipeline.backend": ("auto", "gloo", "nccl"),
    "pipeline.depth": ("2", "1", "5"),
    "pipeline.cuts": ("equal", "layerwise", "memory", "time", "[0]"),
    "pipeline.devices": ("null", "cpu:0,cpu:1 | pipeline.processes=2"),
    "pipeline.memory": ("null", "8GiB,8GiB | pipeline.processes=2"),
    "pipeline.replay": ("auto", "null", "24 | run.recover=stage"),
    "pipeline.wire_dtype": ("fp32", "bf16", "fp16", "int8", "int4"),
    "data.name": (
        "synthetic",
        "digits | data.image_size=auto",
        "npz | data.root={sweep}/images.npz",
        "image_folder | data.root={sweep}/images",
        "image_folder | data.root={sweep}/images/train | data.test=0.5",
        f"bytes | {TEXT}",
        f"shapes | {MASKS}",
        f"areas | {NUMBERS}",
        f"tokens | data.root={{sweep}}/tokens | data.vocabulary=60 | {DECODER}",
        f"{STRIPES} | data.augment=none | data.image_size=auto",
        f"{OPINIONS} | task.name=classification | data.augment=none | data.image_size=auto",
    ),
    "data.length": ("256", "16"),
    "data.vocabulary": ("null", "60"),
    "data.token_dtype": ("auto", "uint16", "uint32"),
    "data.classes": ("auto", "null", NAMES),
    "data.batch_size": ("8", "12", "7"),
    "data.workers": ("auto", "2", "0"),
    "data.timeout_s": ("600", "60.5"),
    "data.drop_last": ("false", "true"),
    "data.augment": (
        "crop_flip", "auto", "none", "crop", "resized_crop_flip", "scale_crop_flip", "randaugment",
        "colour", "erasing", "cutout", "mixup", "cutmix", "[auto,colour,mixup,cutmix]",
    ),
    "data.padding": ("auto", "1"),
    "data.padding_mode": ("auto", "zero", "reflect"),
    "data.extra": ("false", "true"),
    "data.mean": ("auto", "0.4,0.5,0.6", "[0.5]"),
    "data.std": ("auto", "0.2,0.3,0.2", "[0.3]"),
    "data.train_subset": ("null", "13"),
    "data.validation": ("0", "4"),
    "data.download": ("false", "true"),
    "data.image_size": ("8", "[8, 12]", "auto"),
    "data.samples": ("20", "25"),
    "data.range": ("null", "[0, 1000]"),
    "data.background": ("white", "black"),
    "data.verify": ("auto", "full", "headers", "none"),
    "data.skip_broken": ("false", "true"),
    "data.changed": ("refuse", "accept"),
    "optim.name": ("sgd", "adamw"),
    "optim.lr": ("0.05", "auto", "0"),
    "optim.momentum": ("0.9", "0.5", "0"),
    "optim.nesterov": ("true", "false"),
    "optim.betas": ("[0.9, 0.999]", "0.8,0.9"),
    "optim.eps": ("1e-8", "1e-4"),
    "optim.weight_decay": ("1e-4", "0", "0.1"),
    "optim.decay": ("all", "matrices"),
    "optim.clip": ("null", "0.1"),
    "optim.schedule": (
        "cosine_step", "cosine_epoch", "cosine_epoch_from_0", "poly", "step", "constant",
        "multistep | optim.milestones=2",
    ),
    "optim.milestones": ("auto", "2", "[2, 5]"),
    "optim.factor": ("0.1", "0.2"),
    "optim.min_lr": ("0", "1e-6"),
    "optim.warmup_epochs": ("auto", "0", "1.5"),
    "optim.warmup_steps": ("null", "2"),
    "optim.epochs": ("2", "3", "null"),
    "optim.max_steps": ("6", "5", "2"),
    "optim.accumulate": ("1", "2"),
    "optim.ema": ("null", "0.5"),
    "optim.stages": ("{}", "{0: {lr: 0.1}}"),
    "run.seed": ("0", "1", "-3"),
    "run.device": ("cpu", "auto", "cuda"),
    "run.precision": ("fp32", "tf32", "bf16", "fp16"),
    "run.checkpointing": ("none", "block"),
    "run.capture": ("none", "graphs"),
    "run.channels_last": ("false", "true"),
    "run.threads": ("1", "2", "auto", "1,1 | pipeline.processes=2"),
    "run.deterministic": ("auto", "true", "false"),
    "run.probe": ("none", "linear"),
    "run.resume": ("auto", "never"),
    "run.overwrite": ("false", "true"),
    "run.checkpoint_every_s": ("60", "0"),
    "run.keep_checkpoints": ("2", "1"),
    "run.timeout_s": ("120", "60.5"),
    "run.recover": ("none", "stage", "stage | pipeline.processes=2"),
    "run.max_recoveries": ("3", "0"),
    "run.spares": ("0", "1 | run.recover=stage"),
    "run.evaluate_every": ("1", "2", "2 steps"),
    "run.log_every": ("10", "1"),
    "run.init_from": ("null", "{sweep}/first"),
    "run.trace": ("false", "true"),
    "run.wandb": ("null", "project"),
    "run.stop_when": ("null", "loss < 1"),
    "bench.systems": (
        "[localpipe, sequential]",
        "[localpipe, e2e, e2e-1, checkpoint]",
        "[localpipe, ddp, gpipe]",
        "[1f1b, interleaved, zb]",
        "[localpipe, frozen-copies] | method.feedback.mode=block",
    ),
    "bench.micro_batches": ("2", "2,4"),
    "bench.windows": ("1", "2"),
    "bench.window_s": ("0.02", "0.05"),
}  # fmt: skip

# Keys that are not in the table, each with the reason.
LEFT_OUT: Mapping[str, str] = {
    "model.weights_sha256": "a run writes it",
    "model.args": "each network has its own: the values of model.name set them",
    "model.layout": "each network has its own blocks",
    "model.blocks": "a run records it",
    "model.library": "a run records it",
    "task.args": "each task of a user's own has its own",
    "data.shape": "a run records it",
    "data.dtype": "a run records it",
    "data.evaluation_size": "a run records it",
    "data.root": "each data set has its own: the values of data.name set it",
    "data.test": "a folder without a test part has it: a value of data.name sets it",
    "run.dir": "every command of the sweep has its own",
}
# Choices of keys that are not in the table, each with the reason.
CHOICES_LEFT_OUT: Mapping[tuple[str, str], str] = {
    **{
        ("data.name", name): "must be fetched from the network, or is hundreds of files"
        for name in ("cifar10", "cifar100", "svhn", "stl10", "imagenet", "cityscapes")
    },
    **{
        ("model.name", name): "another depth or width of a network that is in the table"
        for name in registry.MODELS
        if name.startswith("res") and name != "resnet8" or name in ("vit_small", "vit_base")
    },
    **{
        ("model.name", name): "has a hundred million weights; test_papers.py has it"
        for name in ("vgg13_bn", "vgg19_bn")
    },
    **{
        ("model.name", name): "has nine million weights; test_plain_networks.py has it"
        for name in ("vgg8b", "vgg11b")
    },
    ("model.name", "densenet_bc_100_12"): "is slow on the CPU; test_papers.py has it",
    ("run.capture", "compile"): "a compilation takes a minute; test_captured.py has it",
    ("bench.systems", "all"): "takes every system; the values of the table name each of them",
}


def _build_values() -> dict[str, tuple[Value, ...]]:
    built = {}
    for key, texts in _TABLE.items():
        words = [tuple(f"{key}={text}".split(" | ")) for text in texts]
        built[key] = tuple(map(Value, words))
    return built


VALUES: Mapping[str, tuple[Value, ...]] = _build_values()


def list_contradictions(values: Mapping[str, Sequence[Value]]) -> list[tuple[Value, Value]]:
    """Return the pairs of two keys' values that need different data or different networks.

    Only the last of both would be in a command, so a row of both would not try what it says.
    """
    found = []
    for one, other in combinations(values, 2):
        for first in values[one]:
            found += [(first, second) for second in values[other] if _contradict(first, second)]
    return found


def _contradict(first: Value, second: Value) -> bool:
    for key in ("data.name", "model.name"):
        wanted, other = first.find(key), second.find(key)
        if None not in (wanted, other) and wanted != other:
            return True
    return False
