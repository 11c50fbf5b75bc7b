"""The pages on clusters and on errors: their commands run, and their messages exist in the code.

```sh            run, line by line
```sh two-nodes  run by test_launch.py
```sh cluster    takes several machines: not run, but every program, file and key in it is checked
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from localpipe import config as configs
from tests import ROOT
from tests.pipeline.launch.test_launch import ENVIRONMENT, TINY

PAGES = ("docs/clusters.md", "docs/hangs.md")
BLOCKS = [
    (page, info, code)
    for page in PAGES
    for info, code in re.findall(
        r"^```([^\n]*)\n(.*?)^```$",
        (ROOT / page).read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
]
PROGRAMS = {"launch/multi_node.sh", "sbatch", "kubectl", "docker"}
FOREIGN = (  # messages of torch, gloo, NCCL or the system
    "Gloo connectFullMesh", "timed out connecting", "The hostname of the client",
    "address already in use", "NCCL", "unhandled system error", "Duplicate GPU", "SIGBUS",
)  # fmt: skip


def test_every_block_says_how_it_is_tried() -> None:
    assert {info for _, info, _ in BLOCKS} == {"sh", "sh two-nodes", "sh cluster"}
    assert [page for page, info, _ in BLOCKS if info == "sh two-nodes"] == ["docs/clusters.md"]


@pytest.mark.parametrize("code", [code for _, info, code in BLOCKS if info == "sh"])
def test_commands_of_the_pages_run(code: str, tmp_path: Path) -> None:
    short = code.replace("configs/demo.yaml", f"configs/demo.yaml {TINY} optim.epochs=1").replace(
        "runs/", f"{tmp_path}/"
    )
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "localpipe").write_text(
        f'#!/bin/sh\nexec {ENVIRONMENT["PYTHON"]} -m localpipe "$@"\n'
    )
    (bin_folder / "localpipe").chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{bin_folder}:{ENVIRONMENT['PATH']}"}
    result = subprocess.run(
        ["bash", "-euc", short],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("code", [code for _, info, code in BLOCKS if info == "sh cluster"])
def test_commands_for_several_machines_name_what_exists(code: str) -> None:
    subprocess.run(["bash", "-nc", code], check=True)
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] in PROGRAMS, f"{words[0]} can be run here: mark the block `sh`"
        for word in words:
            if word.startswith(("launch/", "configs/", "docker/")):
                assert (ROOT / word).is_file(), word
        keys = [word for word in words if re.fullmatch(r"\w+\.\w+=\S+", word)]
        configs.load(ROOT / "configs" / "demo.yaml", keys)


def test_every_message_that_the_page_on_hangs_explains_is_one_that_localpipe_says() -> None:
    source = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "localpipe").rglob("*.py")
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    rows = [
        row for row in (ROOT / "docs/hangs.md").read_text().splitlines() if row.startswith("| `")
    ]
    said = [span for row in rows for span in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(said) > 20
    unknown = []
    for message in said:
        if message.startswith(FOREIGN):
            continue
        # capitals, numbers and dots stand for what differs from run to run
        parts = [part.strip() for part in re.split(r"\.\.\.|\b[A-Z]+\b|\b\d+\b|[()]", message)]
        unknown += [message for part in parts if len(part) > 3 and part not in source]
    assert unknown == []
