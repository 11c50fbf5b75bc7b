"""`doctor --gpu` in tiny size on a CUDA device, real or emulated: it must come to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localpipe.doctor.gpu.step import STEPS
from localpipe.pipeline.workers.device import EMULATED_GPU

# Runs words of localpipe's command line, and returns the exit status and all that was printed.
CommandRunner = Callable[[Sequence[str]], tuple[int, str]]
# A few findings that every machine with a device has, by step.
_EXPECTED = {
    "versions": {"versions", "devices", "links", "NCCL", "topology", "Triton", "NVML"},
    "exactness": {"eager", "captured", "captured against eager"},
    "flat memory": {"one process"},
    "infopro memory": {"end to end", "InfoPro, K = 2", "InfoPro, K = 4"},
    "loader": {"loader", "device", "together"},
    "throughput": {"eager: sequential", "eager: e2e", "eager: checkpoint", "captured: sequential"},
    "accuracy": {"end to end", "AugLocal, 4 stages"},
}


def check_rehearsal(folder: Path, run_command: CommandRunner) -> dict[str, Any]:
    """Run the command, check both of its files, and return the content of the JSON.

    folder: exists. run_command: in an environment with a device.
    """
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (48, 32, 32, 3), dtype=np.uint8), np.arange(48) % 10
    cifar, out = folder / "cifar.npz", folder / "out"
    np.savez(cifar, x_train=images, y_train=labels, x_test=images[:16], y_test=labels[:16])
    words = ["doctor", "--gpu", "--size", "tiny", "--minutes", "15"]
    status, text = run_command([*words, "--out", str(out), "--cifar", str(cifar)])
    assert status == 0, text

    report: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    check_report(report)
    table = (out / "gpu.md").read_text()
    for step in STEPS:
        assert f"| **{step.name}** | {step.question} | ended, " in table
    assert ("**emulated: true**" in table) == report["emulated"]
    return report


def check_report(report: Mapping[str, Any]) -> None:
    """Check that every step has come to its end, and has found what every machine has."""
    assert [step["name"] for step in report["steps"]] == [step.name for step in STEPS]
    devices = report["machine"]["devices"]
    assert report["size"] == "tiny" and report["emulated"] == (EMULATED_GPU in devices)
    for step in report["steps"]:
        assert step["status"] == "ended" and step["wall_s"] <= step["limit_s"] + 5
        names = {finding["name"] for finding in step["findings"]}
        assert names >= _EXPECTED.get(step["name"], set()) and names
        for finding in step["findings"]:
            assert finding["status"] in ("ok", "absent"), finding
    check_devices(report, len(devices))


def check_devices(report: Mapping[str, Any], devices: int) -> None:
    """Check what depends on the number of devices, and on their kind."""
    found = {}
    for step in report["steps"]:
        for finding in step["findings"]:
            found[step["name"], finding["name"]] = finding["status"]
    if devices == 1:
        assert found["throughput", "several devices"] == "absent"
    else:
        for system in ("localpipe", "ddp"):
            assert found["throughput", f"several devices: {system}"] == "ok"
    if report["emulated"]:
        assert found["throughput", "compiled"] == "absent"
        assert found["energy", "energy"] == "absent"
        assert found["nccl", "eager, depth 4"] == found["nccl", "captured, depth 4"] == "ok"
