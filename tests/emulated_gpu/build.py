"""Builds the libraries of the emulated GPU, and says how a process loads them.

The headers come from the pip packages that torch's CUDA wheel brings along. The result is kept in
the user's cache folder, by a digest of all that it depends on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

from tests import ROOT

_FOLDER = Path(__file__).resolve().parent
_SOURCE = _FOLDER / "source"
_CUDA_MAJOR = "13"
_FLAGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-pthread")
_DRIVER, _RUNTIME, _NCCL = "libcuda.so.1", "libcudart.so.13", "libnccl.so.2"
_SOURCES = {
    _DRIVER: ("driver",),
    _RUNTIME: (
        "absent", "devices", "events", "graphs", "kernels", "memory", "races", "settings",
        "streams",
    ),
    _NCCL: ("absent_nccl", "nccl", "sockets"),
}  # fmt: skip


def missing_part() -> str | None:
    """Return why the emulated GPU cannot be built here, or None if it can."""
    version = torch.version.cuda
    if version is None:
        return f"torch {torch.__version__} is built for the CPU only"
    if version.split(".")[0] != _CUDA_MAJOR:
        return f"torch is built for CUDA {version}, and CUDA {_CUDA_MAJOR} is emulated"
    if shutil.which("g++") is None:
        return "there is no g++"
    for folder, header in zip(_header_folders(), ("cuda_runtime_api.h", "nccl.h"), strict=True):
        if not (folder / header).exists():
            return f"there is no {folder / header}"
    return None


def build() -> Path:
    """Return the folder of the built libraries. It builds them if they are not in the cache.

    Raises CalledProcessError if the compiler fails; its messages go to standard error.
    """
    folder = _cache_folder() / f"emulated_gpu-{_digest()}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for name in _SOURCES:
            _compile(name, made)
        made.chmod(0o755)
        made.rename(folder)
    except OSError:  # another process was faster
        assert folder.exists()
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Return a copy of this process's environment for a process under the emulation.

    folder: of the built libraries.
    """
    paths = [str(_FOLDER / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    libraries = [str(folder / name) for name in (_RUNTIME, _DRIVER, _NCCL)]
    folders = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "LD_LIBRARY_PATH": ":".join(path for path in folders if path),
        "PYTHONPATH": ":".join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
    }


def _compile(library: str, folder: Path) -> None:
    sources = [str(_SOURCE / f"{name}.cpp") for name in _SOURCES[library]]
    includes = [f"-I{path}" for path in (_SOURCE / "stubs", _SOURCE, *_header_folders())]
    more = [f"-Wl,-soname,{library}"]
    if library == _RUNTIME:
        more += [f"-Wl,--version-script={_SOURCE / 'exports.map'}", "-ldl"]
    if library == _NCCL:
        more.append(str(folder / _RUNTIME))
    command = ["g++", *_FLAGS, *includes, *sources, "-o", str(folder / library), *more]
    subprocess.run(command, check=True)


def _header_folders() -> tuple[Path, Path]:
    """Return the folders of the headers of the CUDA runtime and of NCCL."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return packages / "cu13" / "include", packages / "nccl" / "include"


def _digest() -> str:
    """Return a digest of the sources and of the versions that the headers come with."""
    digest = hashlib.sha256(f"{torch.__version__} {_FLAGS} {_header_folders()}".encode())
    for path in sorted(_SOURCE.rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    from localpipe.environment import cache_folder

    return cache_folder() or Path(tempfile.gettempdir()) / f"localpipe-{os.getuid()}"


def main() -> None:
    """Print the shell commands after which every process of the shell sees the emulated GPU."""
    names = ("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH")
    made = environment(build())
    for name in names:
        print(f"export {name}={made[name]}")


if __name__ == "__main__":
    main()
