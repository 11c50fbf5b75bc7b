"""The configurations that come with localpipe: `configs/` of a checkout, a folder of the package where it is installed."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parents[1]  # the package


def folder() -> Path:
    """Return where they lie."""
    inside = _HERE / "configs"  # put there when a wheel is built, see setup.py
    return inside if inside.is_dir() else _HERE.parent / "configs"


def names() -> list[str]:
    """Return their names, as `demo` or `bench/cifar10_resnet32_k2`."""
    return sorted(
        str(path.relative_to(folder()).with_suffix("")) for path in folder().rglob("*.yaml")
    )


def path_of(name: str) -> Path | None:
    """Return the file of a name, with or without `configs/` and `.yaml`; None where there is none."""
    word = name.removeprefix("configs/").removesuffix(".yaml")
    return folder() / f"{word}.yaml" if word in names() else None


def describe(name: str) -> str:
    """Return the first line of a configuration's comment."""
    first = (folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
