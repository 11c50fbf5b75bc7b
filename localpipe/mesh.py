"""Who is where: the store, the ranks, and the process group of an edge. Process groups and stores are made only here.

A worker gets its store from localpipe's own launcher (a file in a private directory, no port) or from torchrun.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from localpipe.board import Board, FileBoard, StoreBoard
from localpipe.launched import PRIVATE_DIR
from localpipe.partition import split

# Edges have no timeout of their own: liveness is watched apart, and a slow neighbour is no error.
FOREVER = datetime.timedelta(days=365)


@dataclass(frozen=True)
class Mesh:
    """One worker's place. `local` is true where every worker runs on this machine."""

    rank: int
    world: int
    store: dist.Store
    local: bool

    def hosted(self, stages: int) -> range:
        """Return the stages that this worker hosts."""
        return hosts(stages, self.world)[self.rank]

    def edge_store(self, name: str, generation: int) -> dist.Store:
        """Return the part of the store that belongs to one edge."""
        return dist.PrefixStore(f"edge/{name}/{generation}", self.store)

    def board(self) -> Board:
        """Return where this run's notes are pinned; with a store of its own, since another thread uses it."""
        private = os.environ.get(PRIVATE_DIR)
        return StoreBoard(self.store.clone()) if private is None else FileBoard(Path(private))

    def barrier(self, name: str) -> None:
        """Wait until every worker has come here. A name is good for one use."""
        arrived = self.store.add(f"barrier/{name}/count", 1)
        if arrived == self.world:
            self.store.set(f"barrier/{name}/open", "1")
        self.store.wait([f"barrier/{name}/open"], FOREVER)


def hosts(stages: int, processes: int) -> tuple[range, ...]:
    """Return the consecutive stages of every worker, sizes differing by at most one."""
    return tuple(range(first, last + 1) for first, last in split(stages, processes))


def owner(stage: int, stages: int, processes: int) -> int:
    """Return the rank that hosts a stage."""
    return next(rank for rank, hosted in enumerate(hosts(stages, processes)) if stage in hosted)


def file_store(directory: Path) -> dist.Store:
    """Return the store of a run that localpipe launched itself: a file that only its own processes can open."""
    store = dist.FileStore(str(directory / "store"), -1)
    store.set_timeout(FOREVER)
    return store


def join() -> Mesh:
    """Return this worker's place, read from the environment that its launcher set."""
    if PRIVATE_DIR in os.environ:
        store = file_store(Path(os.environ[PRIVATE_DIR]))
        return Mesh(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), store, local=True)
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=2))))
    store.set_timeout(FOREVER)
    return Mesh(rank, world, store, local=os.environ.get("LOCAL_WORLD_SIZE") == str(world))


def private_dir() -> Path:
    """Return the folder that this worker shares with the launcher that started it, and with nobody else."""
    return Path(os.environ[PRIVATE_DIR])


def world_group(place: Mesh) -> None:
    """Make the default process group, over gloo, for libraries that need one: the benchmark's peers."""
    if place.local:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.PrefixStore("world", place.store)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world)


def edge_group(store: dist.Store, side: int, local: bool) -> Any:
    """Connect one side (0 sends, 1 receives) of a two-rank gloo group; on one machine it hears the loopback alone."""
    gloo: Any = dist.ProcessGroupGloo
    interface = "lo" if local else os.environ.get("GLOO_SOCKET_IFNAME", "")
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=interface) if interface else gloo.create_default_device()]
    options._timeout = FOREVER
    return gloo(dist.PrefixStore("gloo", store), side, 2, options)
