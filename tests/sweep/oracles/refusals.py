"""Combinations that are meant to be refused, and what a refusal must do: name a key, and help.

A refusal of anything else is a fault: something that should run does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tests.sweep.values import Value

# One combination a line: keys, or keys with their value. A command in brackets stands where it
# alone refuses. A combination that has more values than a line is meant too.
MEANT: tuple[str, ...] = (
    # What this machine lacks, and what is reserved.
    "pipeline.backend=nccl",
    "run.device=cuda",
    "run.precision=tf32",
    "run.capture=graphs",
    "run.wandb=project",
    "optim.stages",
    "run.stop_when",
    # Stages, replicas and workers.
    "pipeline.replicas + pipeline.processes",
    "pipeline.stages + pipeline.processes",
    "pipeline.stages + pipeline.cuts",
    "pipeline.stages + pipeline.replicas",
    "pipeline.replicas + bench.systems",
    "pipeline.stages + bench.systems",
    "data.batch_size + bench.systems",
    "data.batch_size + bench.micro_batches",
    # Batches and their messages.
    "pipeline.replicas + data.batch_size",
    "optim.accumulate + data.batch_size",
    "optim.accumulate + [bench --memory]",
    "model.name=chain + [bench --memory]",
    "model.name=chain + bench.systems",
    "run.precision=fp16 + [plan --cluster]",
    "optim.accumulate + pipeline.replicas",
    "model.name=chain + data.batch_size",
    "model.name=chain + optim.accumulate",
    # Images of other shapes than the data's.
    "data.mean=[0.5]",
    "data.std=[0.3]",
    "data.name=npz + data.image_size",
    "data.name=digits + data.image_size",
    "data.skip_broken=true + data.verify=none",
    # SVHN alone has an extra split. A mixture has probabilities of classes, and no class.
    "data.extra=true",
    "data.augment=scale_crop_flip",
    "data.augment=mixup + task.targets=index",
    "data.augment=cutmix + task.targets=index",
    "data.augment=[auto,colour,mixup,cutmix] + task.targets=index",
    "data.augment=mixup + method.objective",
    "data.augment=cutmix + method.objective",
    "data.augment=[auto,colour,mixup,cutmix] + method.objective",
    # Tokens: a decoder alone takes them, and few objectives read them.
    "data.name=bytes + model.name",
    "data.name=tokens + model.name",
    "data.name=bytes + method.objective",
    "data.name=tokens + method.objective",
    "data.name=bytes + data.augment",
    "data.name=tokens + data.augment",
    "data.name=bytes + model.num_classes",
    "data.name=tokens + model.num_classes",
    "data.name=tokens + data.vocabulary",
    "data.name=tokens + data.token_dtype=uint32",
    "model.name=gpt + data.name",
    "task.name=classification + data.name=bytes",
    "task.name=classification + data.name=tokens",
    "task.name=next_token + data.name",
    "task.name=next_token + model.name",
    # Masks and numbers: networks that give them, and objectives that read them.
    "data.name=shapes + method.objective",
    "data.name=areas + method.objective",
    "data.name=shapes + data.augment",
    "data.name=areas + data.augment",
    "data.name=shapes + task.ignore_index",
    "data.name=areas + model.num_classes",
    "data.name=areas + method.reconcile.distance=l2",
    "data.name=areas + model.name",
    "task.name=classification + data.name=shapes",
    "task.name=classification + data.name=areas",
    "task.name=segmentation + data.name",
    "task.name=segmentation + model.name",
    "task.name=regression + data.name",
    "task.name=regression + model.name",
    "task.class_weights=balanced + data.name",
    "task.class_weights + model.num_classes",
    # Items of a user: their size, augmentation and classes are as they are.
    "data.name=tests.data.user.sets:stripes + data.augment",
    "data.name=tests.data.user.sets:stripes + data.image_size",
    "data.name=tests.data.user.sets:opinions + data.augment",
    "data.name=tests.data.user.sets:opinions + data.image_size",
    "data.name=tests.data.user.sets:opinions + model.num_classes",
    "data.name=tests.data.user.sets:opinions + method.objective",
    "data.name=tests.data.user.sets:opinions + task.targets=index",
    "task.targets=probabilities + model.num_classes",
    "task.targets=probabilities + method.objective",
    # Features: no convolution reads them.
    "model.name=mlp + method.objective",
    "model.name=mlp + method.context.mode",
    # A folder of few images.
    "data.validation + data.drop_last",
    "data.validation + data.batch_size",
    # Weights and blocks of another network than that of base.yaml.
    "model.name + model.weights",
    "model.name + model.freeze",
    "model.weights + run.init_from",
    "model.freeze + pipeline.cuts=time",
    "model.freeze + method.reconcile.distance",
    "model.freeze + bench.systems",
    "model.freeze + [plan --cluster]",
    "model.freeze + [plan --measure]",
    # The rest: each in its rule in config/rules.py.
    "method.reconcile.distance + run.checkpointing",
    "method.reconcile.distance=l2 + method.objective",
    "method.feedback.mode + method.objective",
    "method.feedback.mode=block + model.crossing=2",
    "method.feedback.mode=readout + model.name",
    "method.feedback.mode=readout + task.name",
    "method.feedback.mode=readout + data.name=shapes",
    "run.recover=stage + pipeline.replicas",
    "pipeline.devices + run.threads=2",
    "bench.systems + method.feedback.mode",
    "bench.systems + method.objective",
    "bench.systems + model.crossing",
    "optim.momentum=0 + optim.nesterov=true",
    "optim.warmup_epochs + optim.warmup_steps",
    "optim.lr + optim.min_lr",
    "optim.schedule=multistep + optim.milestones=auto",
    "optim.clip + bench.systems",
)

_SETTING = re.compile(r"\b([a-z_]+\.[a-z_.]+)=([^\s,;()]+)")


def is_meant(words: Sequence[str]) -> bool:
    """Return whether a line of MEANT is part of a combination that is refused.

    words: `key=value` of every value, all words of those that have several, and the command in
    brackets.
    """
    known = {part for word in words for part in [word, word.partition("=")[0]]}
    return any(set(line.split(" + ")) <= known for line in MEANT)


def names_a_key(sentence: str, values: Sequence[Value]) -> bool:
    """Return whether a refusal names one of the keys that cause it, whole or its last part."""
    for value in values:
        for word in value.words:
            key = word.partition("=")[0]
            if key in sentence or re.search(rf"\b{key.rpartition('.')[2]}\b", sentence):
                return True
    return False


def advised_words(sentence: str) -> Iterator[tuple[str, ...]]:
    """Yield the `section.key=value` that a refusal advises to set, those together that belong so.

    Words in one part of the sentence belong together: `or` and a semicolon part it.
    """
    for part in re.split(r"\bor\b|;", sentence):
        found = [
            f"{key}={value}"
            for key, value in _SETTING.findall(part)
            if not re.fullmatch(r"[A-Z_.]+", value)
        ]
        if found:
            yield tuple(found)
