"""Checks of localpipe's, torch's and torchvision's versions."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata

import torch

import localpipe
from localpipe.doctor.check import Check
from localpipe.errors import first_line

OLDEST_TORCH = "2.11"


def check_versions() -> Check:
    """Compare torch's version with OLDEST_TORCH, the oldest that localpipe works with.

    An error if it is older, else ok. figures: `torch` and `python` (versions).
    """
    python = platform.python_version()
    text = f"localpipe {localpipe.__version__}, torch {torch.__version__}, Python {python}"
    figures = {"torch": torch.__version__, "python": python}
    if is_older(torch.__version__, OLDEST_TORCH):
        advice = f"pip install --upgrade 'torch>={OLDEST_TORCH}' torchvision"
        return Check("versions", "error", text, advice, figures)
    return Check("versions", "ok", text, "", figures)


def check_torchvision() -> Check:
    """Import torchvision, which fails if it was built for another torch.

    An error if the import fails or torchvision is not installed, else ok. figures: `torchvision`
    (its version), empty after an error.
    """
    try:
        version = metadata.version("torchvision")
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        advice = (
            "install the torchvision that belongs to this torch: "
            "pip install --upgrade torch torchvision"
        )
        return Check("torchvision", "error", first_line(error), advice)
    return Check("torchvision", "ok", version, "", {"torchvision": version})


def is_older(version: str, other: str) -> bool:
    """Return whether a version is older than another one, by its first two numbers.

    Equal ones are not older. A build such as `+cu128` is ignored. Raises ValueError if one of the
    first two parts is no whole number.
    """
    return _first_two_numbers(version) < _first_two_numbers(other)


def _first_two_numbers(version: str) -> list[int]:
    numbers = version.split("+")[0].split(".")  # `+cu128` is the build, no part of the version
    return [int(number) for number in numbers[:2]]
