"""Who is where: the store, the ranks, and the process group of an edge. Process groups and stores are made only here.

A worker gets its store from localpipe's own launcher (a file in a private directory, no port) or from torchrun.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from localpipe.board import Board, FileBoard, StoreBoard
from localpipe.errors import RunError, UserError
from localpipe.launched import PRIVATE_DIR
from localpipe.partition import split
from localpipe.replicas import Replicas

Waiting = Callable[[], AbstractContextManager[None]]
# Edges have no timeout of their own: liveness is watched apart, and a slow neighbour is no error.
FOREVER = datetime.timedelta(days=365)


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
        return hosts(replicas, self.world)[self.rank]

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
        words = gloo_group(store, index, count, self.local)
        tensors = nccl_group(store, index, count, device) if device.type == "cuda" else words
        return Replicas(index, count, tensors, words, waiting)

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


@dataclass(frozen=True)
class Host:
    """What one worker hosts: consecutive stages of one replica."""

    stages: range
    replica: int

    def __str__(self) -> str:
        first, last = self.stages[0], self.stages[-1]
        names = f"stage {first}" if first == last else f"stages {first}..{last}"
        return f"{names}, replica {self.replica}"


def hosts(replicas: tuple[int, ...], processes: int) -> tuple[Host, ...]:
    """Return what every rank hosts, neighbours next to each other, so that they share a node where ranks do.

    The same number of replicas everywhere: one whole pipeline after the other, its stages spread over its ranks, sizes
    differing by at most one. Different numbers: every replica of a stage has a rank of its own, stage after stage.
    """
    each = set(replicas)
    if len(each) == 1:
        count = each.pop()
        ranges = [
            range(first, last + 1) for first, last in split(len(replicas), processes // count)
        ]
        return tuple(Host(stages, replica) for replica in range(count) for stages in ranges)
    return tuple(
        Host(range(k, k + 1), replica)
        for k, count in enumerate(replicas)
        for replica in range(count)
    )


def owner(stage: int, replica: int, replicas: tuple[int, ...], processes: int) -> int:
    """Return the rank that hosts a replica of a stage."""
    places = enumerate(hosts(replicas, processes))
    return next(rank for rank, host in places if stage in host.stages and replica == host.replica)


def file_store(directory: Path) -> dist.Store:
    """Return the store of a run that localpipe launched itself: a file that only its own processes can open."""
    store = dist.FileStore(str(directory / "store"), -1)
    store.set_timeout(FOREVER)
    return store


def join() -> Mesh:
    """Return this worker's place, read from the environment that its launcher set."""
    if PRIVATE_DIR in os.environ:
        store = file_store(Path(os.environ[PRIVATE_DIR]))
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


def world_group(place: Mesh, device: torch.device) -> None:
    """Make the default process group, of what serves the device, for libraries that need one: the benchmark's peers."""
    if place.local:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.PrefixStore("world", place.store)
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world, device_id=bound
    )


def nccl_group(store: dist.Store, rank: int, size: int, device: torch.device) -> Any:
    """Connect one rank of an NCCL group bound to a device; of an edge, 0 sends and 1 receives.

    Made from a store alone, without a world group, by the back end that torch means by "nccl": from 2.15 on the newer one,
    unless TORCH_DIST_USE_NCCL2=0. Before that the newer one, where it was there, could not be bound to a device.
    """
    legacy: Any = getattr(dist, "ProcessGroupNCCL", None)
    newer: Any = getattr(dist, "ProcessGroupNCCL2", None)
    if legacy is None:
        raise UserError(
            "config: pipeline.backend nccl needs a torch with NCCL inside; set pipeline.backend=gloo"
        )
    options = legacy.Options(is_high_priority_stream=True)
    options._timeout = FOREVER
    own = dist.PrefixStore("nccl", store)
    binds = "device" in (newer.__init__.__doc__ or "")
    if binds and os.environ.get("TORCH_DIST_USE_NCCL2") != "0":
        options.global_ranks_in_group, options.group_name = list(range(size)), "edge"
        return newer(own, rank, size, options, device)
    group = legacy(own, rank, size, options)
    # Bound to its device, the group has one communicator, and no operation has to find one first.
    group.eager_connect_single_device(device)
    return group


def gloo_group(store: dist.Store, rank: int, size: int, local: bool) -> Any:
    """Connect one rank of a gloo group; on one machine it hears the loopback alone. Of an edge, 0 sends and 1 receives."""
    gloo: Any = dist.ProcessGroupGloo
    interface = "lo" if local else os.environ.get("GLOO_SOCKET_IFNAME", "")
    named = {"interface": interface} if interface else {"hostname": _own_address(store, rank, size)}
    options = gloo._Options()
    options._devices = [gloo.create_device(**named)]
    options._timeout = FOREVER
    return gloo(dist.PrefixStore("gloo", store), rank, size, options)


def _own_address(store: dist.Store, rank: int, size: int) -> str:
    """Return this machine's address for one member of a group: the one that faces the run's store.

    The machine of the store may know its own name as the loopback (Debian's /etc/hosts does); there it is the one that
    faces another member. gloo's own choice, the address of the host's name, is right only where the two agree.
    """
    own = _facing(os.environ["MASTER_ADDR"])
    store.set(f"address/{rank}", own)
    if not ipaddress.ip_address(own).is_loopback:
        return own
    others = [store.get(f"address/{other}").decode() for other in range(size) if other != rank]
    away = [address for address in others if not ipaddress.ip_address(address).is_loopback]
    return _facing(away[0]) if away else own


def _facing(host: str) -> str:
    """Return the address from which this machine would reach another one."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as asking:
            asking.connect(address)  # of a datagram socket: looks up the route, sends nothing
            return str(asking.getsockname()[0])
    except OSError as error:
        raise RunError(
            f"mesh: no route to {host}: {error.strerror}; give all nodes an address of node 0 that they reach, or set "
            "GLOO_SOCKET_IFNAME to the network interface that faces them"
        ) from None
