"""The configurations that come with localpipe: `configs/` of a checkout or of an installation."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def find_folder() -> Path:
    """Return the folder of the configurations: that of the package, else that of the checkout.

    It never raises. The second is returned without a check, so it may not exist.
    """
    # setup.py copies them into the package when it builds a wheel.
    inside = _PACKAGE / "configs"
    if inside.is_dir():
        return inside
    return _PACKAGE.parent / "configs"


def list_names() -> list[str]:
    """Return the names of all configurations, as `demo` or `bench/cifar10_resnet32_k2`, sorted.

    A name is the path below the folder, without `.yaml`. The list is empty without a folder.
    """
    folder = find_folder()
    paths = folder.rglob("*.yaml")
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in paths)


def find_path(name: str) -> Path | None:
    """Return the file of a name, with or without `configs/` and `.yaml`, or None without one.

    It never raises. The name must be complete, with its folder: there is no search by the last
    part.
    """
    name = name.removeprefix("configs/").removesuffix(".yaml")
    if name not in list_names():
        return None
    return find_folder() / f"{name}.yaml"


def describe(name: str) -> str:
    """Return the first line of a configuration's leading comment, "" without a comment.

    name: as `list_names` returns it. The `#` is left out. Raises FileNotFoundError for another
    name.
    """
    text = (find_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    line, _, _ = text.partition("\n")
    if not line.startswith("#"):
        return ""
    return line.removeprefix("#").strip()
