"""From one machine to several: the launch scripts, and what edges between machines need."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from localpipe.errors import RunError, UserError
from localpipe.pipeline.channels.groups import _exchange_addresses, _find_local_address
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.runs import lock
from localpipe.runs.lock import acquire_lock, read_lock, share_lock
from tests import ROOT

PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
TINY = (
    "model.name=resnet8 data.train_subset=128 data.batch_size=32 run.threads=1 "
    "run.checkpoint_every_s=0 optim.epochs=1000 optim.schedule=constant"
)
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "WORKERS": "1"}
Node = subprocess.Popen[str]
# For every wait. It is over only where something hangs, however loaded the machine is.
ENOUGH_S = 300
NEEDS_ROOT_AND_IP = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces take root and iproute2",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def digest(run_dir: Path) -> str:
    loaded: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return str(loaded["weights_sha256"])


def two_nodes(
    run_dir: Path, *more: str, host: str = "127.0.0.1", inside: tuple[str, str] = ("", "")
) -> list[Node]:
    """Start the documented commands for two nodes on one machine, with a small network.

    The page starts node 1 first, in the background. inside: the network namespaces of nodes 1
    and 0.
    """
    (block,) = re.findall(r"```sh two-nodes\n(.*?)```", PAGE, re.DOTALL)
    port, started = free_port(), []
    for line, namespace in zip(block.strip().splitlines(), inside, strict=True):
        line = line.removesuffix(" &").replace("127.0.0.1:29500", f"{host}:{port}")
        words = [
            *line.replace("run.dir=runs/two", f"run.dir={run_dir}").split(),
            *TINY.split(),
            *more,
        ]
        words = [*(["ip", "netns", "exec", namespace] if namespace else []), *words]
        started.append(
            subprocess.Popen(
                words,
                cwd=ROOT,
                env=ENVIRONMENT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    assert "torch" not in block
    return started


def ended(nodes: list[Node]) -> list[str]:
    """Wait for every node, and return what each has said; no node outlives this."""
    try:
        return [node.communicate(timeout=ENOUGH_S)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()


def alone(run_dir: Path, *more: str) -> str:
    """Return the digest of the same job in one process."""
    words = [sys.executable, "-m", "localpipe", "train", "configs/demo.yaml", *TINY.split(), *more]
    words += ["pipeline.processes=1", f"run.dir={run_dir}"]
    subprocess.run(
        words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True, timeout=ENOUGH_S
    )
    return digest(run_dir)


def test_two_nodes_stop_when_one_is_asked_and_the_same_commands_give_the_digest_of_one_process(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "two"
    nodes = two_nodes(run_dir)
    deadline = time.monotonic() + ENOUGH_S
    while (
        not list(run_dir.glob("checkpoints/step_*/manifest.json")) and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    nodes[0].send_signal(signal.SIGTERM)  # node 1, which does not read the data
    said = ended(nodes)
    assert all(node.returncode != 0 for node in nodes), said
    assert f"stopped; the same command goes on in {run_dir}" in said[1]
    assert not (run_dir / "summary.json").exists()

    reached = max(
        int(path.parent.name.removeprefix("step_"))
        for path in run_dir.glob("checkpoints/*/manifest.json")
    )
    nodes = two_nodes(run_dir, f"optim.max_steps={reached + 3}")
    said = ended(nodes)
    assert [node.returncode for node in nodes] == [0, 0] and "resuming" in said[1], said
    assert digest(run_dir) == alone(tmp_path / "one", f"optim.max_steps={reached + 3}")


def test_a_node_that_sees_another_run_directory_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_VISIBLE_S", 0.3)
    run_dir, other = tmp_path / "mine", tmp_path / "other"
    with acquire_lock(run_dir), acquire_lock(other):
        share_lock(run_dir, read_lock(run_dir)).close()
        for wrong in (other, tmp_path / "none"):
            with pytest.raises(UserError, match="not the run directory of rank 0"):
                share_lock(wrong, read_lock(run_dir))


def test_an_edge_takes_the_address_that_faces_the_store_and_between_loopbacks_the_other_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routes = {"head": "10.0.0.7", "self": "127.0.0.1", "10.0.0.7": "10.0.0.1"}
    monkeypatch.setattr(
        "localpipe.pipeline.channels.groups._find_local_address",
        lambda host: routes.get(host, host),
    )
    store = dist.HashStore()
    monkeypatch.setenv("MASTER_ADDR", "head")
    assert _exchange_addresses(store, 1, 2) == "10.0.0.7"
    monkeypatch.setenv("MASTER_ADDR", "self")  # node 0, whose own name is the loopback's
    assert _exchange_addresses(store, 0, 2) == "10.0.0.1"
    monkeypatch.undo()
    assert _find_local_address("127.0.0.1") == "127.0.0.1"
    with pytest.raises(RunError, match="no route to nowhere.invalid.*GLOO_SOCKET_IFNAME"):
        _find_local_address("nowhere.invalid")


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a link, with the addresses 10.77.0.1 and 10.77.0.2.

    In both, the machine's own name is the loopback.
    """
    tag = uuid.uuid4().hex[:6]
    names = (f"lp{tag}a", f"lp{tag}b")
    made: list[str] = []
    try:
        for name in names:
            if subprocess.run(
                ["ip", "netns", "add", name], capture_output=True, check=False
            ).returncode:
                pytest.skip("this machine makes no network namespaces")
            made.append(name)
        ends = [f"{name}0" for name in names]
        cable = [
            "ip",
            "link",
            "add",
            ends[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            ends[1],
        ]
        subprocess.run([*cable, "netns", names[1]], check=True)
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            for words in (
                f"addr add 10.77.0.{number}/24 dev {end}",
                f"link set {end} up",
                "link set lo up",
            ):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


@NEEDS_ROOT_AND_IP
def test_two_machines_with_addresses_of_their_own_give_the_digest_of_one_process(
    namespaces: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ENVIRONMENT, "GLOO_SOCKET_IFNAME", raising=False)
    nodes = two_nodes(
        tmp_path / "two", "optim.max_steps=3", host="10.77.0.1", inside=namespaces[::-1]
    )
    said = ended(nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert digest(tmp_path / "two") == alone(tmp_path / "one", "optim.max_steps=3")


def test_ranks_of_one_node_host_neighbouring_stages() -> None:
    for stages, nodes, workers in ((16, 2, 4), (9, 2, 2), (7, 3, 2)):
        hosted = assign_hosts((1,) * stages, nodes * workers)
        of_node = [
            [k for host in hosted[n * workers : (n + 1) * workers] for k in host.stages]
            for n in range(nodes)
        ]
        assert sum(of_node, []) == list(range(stages))


# -- the files of launch/ and docker/ --------------------------------------------------------------


def test_every_launch_file_is_short_and_starts_with_its_use() -> None:
    files = [path for path in (ROOT / "launch").rglob("*") if path.is_file()]
    assert len(files) == 6
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) < 40 and any(line.startswith("# ") for line in lines[:2]), path


def test_multi_node_without_its_three_words_says_how_it_is_used() -> None:
    for words in ([], ["host:1", "0"], ["host", "0", "2"]):
        result = subprocess.run(
            ["launch/multi_node.sh", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 2 and result.stderr.startswith("usage: ")


FAKE_NODE = '#!/bin/sh\necho "$@" > words\ntrap "exit 1" TERM\nwhile :; do sleep 0.05; done\n'
FAKE_SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexport SLURM_NODEID=0\nexec "$@"\n'
FAKE_SCONTROL = (
    '#!/bin/sh\nif [ "$1" = show ]; then echo head; echo other; else echo "$@" > requeued; fi\n'
)


def test_a_preempted_slurm_job_waits_for_its_checkpoint_and_goes_back_to_the_queue(
    tmp_path: Path,
) -> None:
    for name, text in (
        ("launch/multi_node.sh", FAKE_NODE),
        ("srun", FAKE_SRUN),
        ("scontrol", FAKE_SCONTROL),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "head,other", "SLURM_NNODES": "2"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(
        ["bash", ROOT / "launch/slurm.sbatch", "c.yaml", "run.seed=1"],
        cwd=tmp_path,
        env=environment,
    )
    deadline = time.monotonic() + ENOUGH_S
    while not (tmp_path / "words").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(ENOUGH_S) != 0
    assert (tmp_path / "words").read_text().split() == [
        "head:22345", "0", "2", "c.yaml", "run.seed=1", "run.dir=runs/slurm-12345",
    ]  # fmt: skip
    assert (tmp_path / "requeued").read_text() == "requeue 12345\n"


def test_kubernetes_and_compose_start_as_many_nodes_as_they_name() -> None:
    _, job = yaml.safe_load_all((ROOT / "launch/kubernetes/job.yaml").read_text())
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(args[2])
    pytorch = yaml.safe_load((ROOT / "launch/kubernetes/pytorchjob.yaml").read_text())["spec"][
        "pytorchReplicaSpecs"
    ]
    for replica in pytorch.values():
        assert int(replica["template"]["spec"]["containers"][0]["args"][2]) == sum(
            r["replicas"] for r in pytorch.values()
        )
    runtime, trainjob = yaml.safe_load_all((ROOT / "launch/kubernetes/trainjob.yaml").read_text())
    assert trainjob["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (pods,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = pods["template"]["spec"]["template"]["spec"]["containers"]
    workers = {entry["name"]: entry["value"] for entry in container["env"]}["WORKERS"]
    assert int(workers) == runtime["spec"]["mlPolicy"]["torch"]["numProcPerNode"]
    words = shlex.split(container["command"][2])
    assert words[:2] == ["exec", "launch/multi_node.sh"] and words[3:5] == [
        "$PET_NODE_RANK",
        "$PET_NNODES",
    ]
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    assert [service["command"][2] for service in services.values()] == ["0", "1"]
    assert all(
        service["command"][3] == "2" and service["ulimits"]["memlock"] == -1
        for service in services.values()
    )


def test_the_images_hold_what_the_launch_files_run() -> None:
    for name in ("Dockerfile", "Dockerfile.cpu"):
        lines = (ROOT / "docker" / name).read_text().splitlines()
        copied = {line.split()[1] for line in lines if line.startswith("COPY")}
        assert {"localpipe", "configs", "launch"} <= copied and "USER 10001" in lines
        allowed = {
            line[1:]
            for line in (ROOT / ".dockerignore").read_text().splitlines()
            if line.startswith("!")
        }
        assert all(
            word in allowed
            for line in lines
            if line.startswith("COPY")
            for word in line.split()[1].split("/")[:1]
        )


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_builds_the_package_from_what_it_has_copied_by_then(
    name: str, tmp_path: Path
) -> None:
    """Once for the dependencies, with the version alone, and once whole."""
    (tmp_path / "src").mkdir()
    source, built = tmp_path / "src", []
    text = (ROOT / "docker" / name).read_text().replace("\\\n", "")
    for line in text.partition("WORKDIR /src")[2].partition("WORKDIR")[0].splitlines():
        if line.startswith("COPY "):
            *froms, to = line.split()[1:]
            for path in froms:
                target = source / to / path if to == "./" else source / to
                target.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / path).is_dir():
                    shutil.copytree(ROOT / path, target, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / path, target)
        elif line.startswith("RUN "):
            assert re.search(r"pip install .*\.( |$)", line)
            for folder in re.findall(r"mkdir (\S+)", line):
                (source / folder).mkdir()
            wheel = [
                "-c",
                "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))",
                str(tmp_path),
            ]
            shown = subprocess.run(
                [sys.executable, *wheel],
                cwd=source,
                check=True,
                capture_output=True,
                text=True,
                timeout=ENOUGH_S,
            ).stdout
            built.append(zipfile.ZipFile(tmp_path / shown.splitlines()[-1]).namelist())
    assert len(built) == 2
    assert {
        "localpipe/configs/demo.yaml",
        "localpipe/py.typed",
        "localpipe/results/report/page.html",
    } <= {*built[1]}
