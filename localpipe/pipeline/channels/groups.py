"""Process groups of two ranks or of replicas, made from a store alone, over gloo or NCCL."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from typing import Any

import torch
import torch.distributed as dist

from localpipe.errors import RunError, UserError

# Edges have no timeout of their own: liveness is watched apart, and a slow neighbour is no error.
FOREVER = datetime.timedelta(days=365)


def join_world_group(
    store: dist.Store, rank: int, world: int, local: bool, device: torch.device
) -> None:
    """Make the default process group, of what serves the device, for libraries that need one: the benchmark's peers."""
    if local:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.PrefixStore("world", store)
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=bound)


def connect_nccl(store: dist.Store, rank: int, size: int, device: torch.device) -> Any:
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


def connect_gloo(store: dist.Store, rank: int, size: int, local: bool) -> Any:
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
