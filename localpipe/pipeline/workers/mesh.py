"""Who is where: the store, the ranks, and the process group of an edge. Process groups and stores are made only here.

A worker gets its store from localpipe's own launcher (a file in a private directory, no port) or from torchrun.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from localpipe.environment import PRIVATE_DIR
from localpipe.networks.cuts import split_evenly
from localpipe.pipeline.channels.groups import FOREVER, connect_gloo, connect_nccl
from localpipe.pipeline.stages.replicas import Replicas

Waiting = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Mesh:
    """One worker's place. `local` is true where every worker runs on this machine."""

    rank: int
    world: int
    store: dist.Store
    local: bool
    local_rank: int = 0

    def host(self, replicas: tuple[int, ...]) -> Host:
        """Return what this worker hosts; `replicas` counts those of every stage."""
        return assign_hosts(replicas, self.world)[self.rank]

    def edge_store(self, name: str, generation: int) -> dist.Store:
        """Return the part of the store that belongs to one edge."""
        return dist.PrefixStore(f"edge/{name}/{generation}", self.store)

    def replicas(
        self, stage: int, index: int, count: int, waiting: Waiting, device: torch.device
    ) -> Replicas:
        """Join one replica of a stage to the others: words over gloo, gradients by what serves the device."""
        if count == 1:
            return Replicas()
        store = dist.PrefixStore(f"replicas/{stage}", self.store)
        words = connect_gloo(store, index, count, self.local)
        tensors = connect_nccl(store, index, count, device) if device.type == "cuda" else words
        return Replicas(index, count, tensors, words, waiting)

    def barrier(self, name: str) -> None:
        """Wait until every worker has come here. A name is good for one use."""
        arrived = self.store.add(f"barrier/{name}/count", 1)
        if arrived == self.world:
            self.store.set(f"barrier/{name}/open", "1")
        self.store.wait([f"barrier/{name}/open"], FOREVER)


@dataclass(frozen=True)
class Host:
    """What one worker hosts: consecutive stages of one replica."""

    stages: range
    replica: int

    def __str__(self) -> str:
        first, last = self.stages[0], self.stages[-1]
        names = f"stage {first}" if first == last else f"stages {first}..{last}"
        return f"{names}, replica {self.replica}"


def assign_hosts(replicas: tuple[int, ...], processes: int) -> tuple[Host, ...]:
    """Return what every rank hosts, neighbours next to each other, so that they share a node where ranks do.

    The same number of replicas everywhere: one whole pipeline after the other, its stages spread over its ranks, sizes
    differing by at most one. Different numbers: every replica of a stage has a rank of its own, stage after stage.
    """
    each = set(replicas)
    if len(each) == 1:
        count = each.pop()
        ranges = [
            range(first, last + 1)
            for first, last in split_evenly(len(replicas), processes // count)
        ]
        return tuple(Host(stages, replica) for replica in range(count) for stages in ranges)
    return tuple(
        Host(range(k, k + 1), replica)
        for k, count in enumerate(replicas)
        for replica in range(count)
    )


def rank_of(stage: int, replica: int, replicas: tuple[int, ...], processes: int) -> int:
    """Return the rank that hosts a replica of a stage."""
    places = enumerate(assign_hosts(replicas, processes))
    return next(rank for rank, host in places if stage in host.stages and replica == host.replica)


def open_file_store(directory: Path) -> dist.Store:
    """Return the store of a run that localpipe launched itself: a file that only its own processes can open."""
    store = dist.FileStore(str(directory / "store"), -1)
    store.set_timeout(FOREVER)
    return store


def join_mesh() -> Mesh:
    """Return this worker's place, read from the environment that its launcher set."""
    if PRIVATE_DIR in os.environ:
        store = open_file_store(Path(os.environ[PRIVATE_DIR]))
        rank = int(os.environ["RANK"])
        return Mesh(rank, int(os.environ["WORLD_SIZE"]), store, local=True, local_rank=rank)
    store, rank, world = next(
        iter(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=2)))
    )
    store.set_timeout(FOREVER)
    local = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    return Mesh(rank, world, store, local, int(os.environ.get("LOCAL_RANK", rank)))


def private_dir() -> Path:
    """Return the folder that this worker shares with the launcher that started it, and with nobody else."""
    return Path(os.environ[PRIVATE_DIR])
