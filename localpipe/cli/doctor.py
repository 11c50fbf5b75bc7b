"""`localpipe doctor`: is this machine ready, and with `--gpu`, what does its GPU do."""

from __future__ import annotations

import argparse
import time

from localpipe.cli.command import Command, optional_path, split_words, to_path
from localpipe.errors import UserError

# The flags of the plain command and those of --gpu. None is a flag that was not given.
_PLAIN_FLAGS = ("quick", "dir")
_GPU_FLAGS = ("minutes", "out", "cifar", "steps", "size")


def run(arguments: argparse.Namespace) -> int:
    """Check this machine, print the results, and return 1 if something is not right, else 0.

    Raises UserError for a word that is no flag, for flags that do not go together, and for a
    `--dir` that is no directory. With `--gpu` also as `run_gpu_doctor`.
    """
    began_s = time.monotonic()
    if arguments.overrides:
        raise UserError(
            f"command line: doctor takes no {arguments.overrides[0]}; see localpipe doctor --help"
        )
    _check_flags(arguments)
    if arguments.gpu:
        from localpipe.doctor.gpu.gpu_doctor import GpuDoctorRequest, run_gpu_doctor

        request = GpuDoctorRequest(
            minutes=8.0 if arguments.minutes is None else arguments.minutes,
            out=optional_path(arguments.out),
            cifar=optional_path(arguments.cifar),
            size=arguments.size or "full",
            names=arguments.steps,
        )
        return run_gpu_doctor(request, arguments.json, began_s)

    from localpipe.doctor.doctor import doctor

    return doctor(bool(arguments.quick), arguments.json, to_path(arguments.dir or "."))


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise UserError for a flag that belongs to the other kind of call."""
    for flag in _PLAIN_FLAGS:
        if arguments.gpu and getattr(arguments, flag) is not None:
            raise UserError(
                f"command line: doctor: --{flag} does not go with --gpu; leave one of them out"
            )
    for flag in _GPU_FLAGS:
        if not arguments.gpu and getattr(arguments, flag) is not None:
            raise UserError(
                f"command line: doctor: --{flag} goes with --gpu alone; add --gpu, or leave it out"
            )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    text = "without the pings and with a small file: a health check"
    parser.add_argument("--quick", action="store_true", default=None, help=text)
    text = "the directory that will hold run directories (.)"
    parser.add_argument("--dir", help=text)
    text = "what the CUDA devices do: exactness, memory, speed, in a few minutes"
    parser.add_argument("--gpu", action="store_true", help=text)
    parser.add_argument("--minutes", type=float, metavar="M", help="of --gpu, at most (8)")
    text = "of --gpu: where gpu.json and gpu.md go (a new directory under runs)"
    parser.add_argument("--out", metavar="DIR", help=text)
    text = "of --gpu: CIFAR-10 as an .npz, to train on in the time that is left"
    parser.add_argument("--cifar", metavar="FILE", help=text)
    text = "of --gpu: only these steps, as nccl,throughput; they share the minutes"
    parser.add_argument("--steps", type=split_words, metavar="A,B", help=text)
    text = "of --gpu: tiny is a rehearsal, whose figures mean nothing (full)"
    parser.add_argument("--size", choices=("full", "tiny"), help=text)


COMMAND = Command(
    "is this machine ready: versions, devices, links, a two-rank ping, memory, disk; "
    "status 1 if not; --gpu: what its GPUs do",
    _add_arguments,
    run,
)
