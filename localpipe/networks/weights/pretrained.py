"""The weights that `model.weights` names: a file, or a name whose file lies in a cache."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from localpipe.config.keys import Model
from localpipe.config.resolve import WeightsFacts
from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.weights.named_weights import (
    IMAGENET_STATISTICS,
    check_arguments,
    check_digits,
    find_source,
    locate_weights,
    rename_tensors,
)
from localpipe.networks.weights.weights_file import (
    SUFFIXES,
    WeightsFile,
    match_weights,
    read_weights,
)


@dataclass(frozen=True)
class Pretrained:
    """The weights of a configuration. name: model.weights."""

    name: str
    file: WeightsFile
    facts: WeightsFacts

    def describe(self, blueprint: Blueprint) -> str:
        """Return a note on what of the network is taken, and what stays as it is initialised.

        Raises UserError as `match_weights`.
        """
        match = match_weights(blueprint, self.file)
        lines = [f"model.weights {self.name}: {len(match.taken)} of {match.total} tensors taken"]
        if match.initialised:
            lines.append(f"  left as initialised: {', '.join(match.initialised)}")
        if match.unused:
            lines.append(f"  not used: {', '.join(match.unused)}")
        return "\n".join(lines)


def load_pretrained(model: Model) -> Pretrained | None:
    """Read the weights of a configuration, None where it names none.

    A name is looked up in the cache of its library, and fetched only with model.download. Raises
    UserError for what `read_weights` and `locate_weights` refuse, and for a file of another digest
    than model.weights_sha256.
    """
    if model.weights is None:
        return None
    source = find_source(model.name)
    if Path(model.weights).suffix in SUFFIXES:
        file = read_weights(Path(model.weights))
        # Of a file nothing is known but the network that it is for.
        statistics = IMAGENET_STATISTICS if source is not None else None
        image_size = None
    else:
        _check_name(model.weights)
        check_arguments(model.name, model.args)
        named = locate_weights(model.name, model.weights, model.download)
        file = read_weights(named.file)
        check_digits(named, file.sha256)
        statistics, image_size = named.statistics, named.image_size

    file = replace(file, tensors=rename_tensors(model.name, file.tensors))
    if model.weights_sha256 not in (None, file.sha256):
        raise UserError(
            f"model: {file.path} has the SHA-256 {file.sha256}, and model.weights_sha256 is "
            f"{model.weights_sha256}; give the file that it was, or leave model.weights_sha256 out "
            "and choose another run.dir"
        )
    return Pretrained(model.weights, file, WeightsFacts(file.sha256, statistics, image_size))


def _check_name(weights: str) -> None:
    """Raise UserError for what looks like a path, without the suffix of a file of weights."""
    if os.sep in weights or "." in weights:
        raise UserError(
            f"model: model.weights {weights} does not end in {', '.join(SUFFIXES)}; "
            "give a file of such a name, or a name of published weights, as DEFAULT"
        )
