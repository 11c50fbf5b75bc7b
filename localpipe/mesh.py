"""Who is where: the store, the ranks, and the process group of an edge. Process groups and stores are made only here.

A worker gets its store from localpipe's own launcher (a file in a private directory, no port) or from torchrun.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from localpipe.board import Board, FileBoard, StoreBoard
from localpipe.errors import RunError
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


def edge_group(store: dist.Store, side: int, local: bool) -> Any:
    """Connect one side (0 sends, 1 receives) of a two-rank gloo group; on one machine it hears the loopback alone."""
    gloo: Any = dist.ProcessGroupGloo
    interface = "lo" if local else os.environ.get("GLOO_SOCKET_IFNAME", "")
    named = {"interface": interface} if interface else {"hostname": _own_address(store, side)}
    options = gloo._Options()
    options._devices = [gloo.create_device(**named)]
    options._timeout = FOREVER
    return gloo(dist.PrefixStore("gloo", store), side, 2, options)


def nccl_pair(store: dist.Store, side: int, device: int) -> Any:
    """Connect one side of a two-rank NCCL group, on one of this machine's CUDA devices."""
    torch.cuda.set_device(device)
    nccl: Any = dist.ProcessGroupNCCL
    return nccl(dist.PrefixStore("nccl", store), side, 2, nccl.Options())


def _own_address(store: dist.Store, side: int) -> str:
    """Return this machine's address for one side of an edge: the one that faces the run's store.

    The machine of the store may know its own name as the loopback (Debian's /etc/hosts does); there it is the one that
    faces the edge's other side. gloo's own choice, the address of the host's name, is right only where the two agree.
    """
    own = _facing(os.environ["MASTER_ADDR"])
    store.set(f"address/{side}", own)
    if ipaddress.ip_address(own).is_loopback:
        own = _facing(store.get(f"address/{1 - side}").decode())
    return own


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
