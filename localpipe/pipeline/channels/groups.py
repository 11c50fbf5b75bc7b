"""Process groups over gloo or NCCL: of the two ends of an edge, or of the replicas of a stage.

A group is made from a store alone, without torch's default group. Process groups are made and ended
only in this module.
"""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
from typing import Any

import torch
import torch.distributed as dist

from localpipe.environment import (
    gloo_interface,
    master_address,
    may_use_nccl2,
    set_gloo_interface,
)
from localpipe.errors import RunError, UserError
from localpipe.pipeline.channels.nccl_library import find_loaded_nccl

# Edges have no timeout: the watchdog detects dead workers, and a slow neighbour is no error.
FOREVER = datetime.timedelta(days=365)
_LOOPBACK = "lo"
# A multiprocessor runs one of NCCL's CTAs at a time. A copy between two GPUs needs few of them, and
# takes the others from the kernels of the stage. NCCL_MAX_CTAS of the user goes before.
_EDGE_CTAS = 4
_END_S = 30.0
# This process's groups over NCCL, in the order in which they were connected.
_open_groups: list[tuple[Any, torch.device]] = []


def join_world_group(
    store: dist.Store, rank: int, world: int, local: bool, device: torch.device
) -> None:
    """Make torch's default process group, for the benchmark's systems that need one.

    Waits for all ranks. The group is NCCL for a CUDA device, else gloo, with torch's own timeouts.
    local: whether all ranks are on this machine, so that gloo gets the loopback interface for the
    whole process. Raises ValueError if there is a default group already.
    """
    if local:
        set_gloo_interface(_LOOPBACK)
    store = dist.PrefixStore("world", store)
    if device.type == "cuda":
        dist.init_process_group("nccl", store=store, rank=rank, world_size=world, device_id=device)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def connect_nccl(
    store: dist.Store, rank: int, size: int, device: torch.device, is_edge: bool = False
) -> Any:
    """Return one rank of an NCCL group that is bound to a device. Of an edge, 0 sends, 1 receives.

    store: the same for every rank. size: the number of ranks. is_edge: the group sends from rank to
    rank only, and gets few multiprocessors. The group's class is the one that torch means by
    "nccl". From 2.15 on that is the newer one, unless TORCH_DIST_USE_NCCL2=0. Before, the newer one
    could not be bound to a device. `end_groups` ends the group. Raises UserError if torch has no
    NCCL inside.
    """
    legacy: Any = getattr(dist, "ProcessGroupNCCL", None)
    newer: Any = getattr(dist, "ProcessGroupNCCL2", None)
    if legacy is None:
        raise UserError(
            "config: pipeline.backend nccl needs a torch with NCCL inside; "
            "set pipeline.backend=gloo"
        )
    options = legacy.Options(is_high_priority_stream=True)
    options._timeout = FOREVER
    if is_edge:
        options.config.max_ctas = _EDGE_CTAS
    group_store = dist.PrefixStore("nccl", store)
    if _uses_newer_nccl(newer):
        options.global_ranks_in_group, options.group_name = list(range(size)), "edge"
        group = newer(group_store, rank, size, options, device)
    else:
        group = legacy(group_store, rank, size, options)
        # A group that is bound to its device has one communicator, which no operation must look up.
        group.eager_connect_single_device(device)
    _open_groups.append((group, device))
    return group


def _uses_newer_nccl(newer: Any) -> bool:
    """Return whether groups are of torch's newer back end, which must take a device."""
    can_bind = "device" in (newer.__init__.__doc__ or "")
    return can_bind and may_use_nccl2()


def nccl_facts() -> dict[str, Any]:
    """Return what two ranks of an NCCL group must have in common, since they hang otherwise.

    `NCCL` is the version of the library that is loaded, and `NCCL group` torch's back end.
    """
    newer: Any = getattr(dist, "ProcessGroupNCCL2", None)
    kind = "nccl2" if _uses_newer_nccl(newer) else "nccl"
    version, _ = find_loaded_nccl()
    return {"NCCL": version, "NCCL group": kind}


def end_groups() -> None:
    """End all groups over NCCL of this process, in the order in which they were connected.

    Ending may wait for the other ranks of a group. Connecting does too, so a process that ends its
    groups in the same order as the others waits for nobody who waits for it. Call it in every
    process, when all have done their work. A group that does not end is left after 30 s, since the
    process ends anyhow. A second call does nothing. It raises nothing.
    """
    if not _open_groups:
        return
    groups = list(_open_groups)
    thread = threading.Thread(target=_end_in_order, args=(groups,), name="groups", daemon=True)
    thread.start()
    thread.join(_END_S)
    # Those that have not ended stay referenced: their destructors would wait or complain.
    if not thread.is_alive():
        _open_groups.clear()


def _end_in_order(groups: list[tuple[Any, torch.device]]) -> None:
    for group, device in groups:
        torch.cuda.set_device(device)  # each thread has a current device of its own
        torch.cuda.synchronize(device)
        group.shutdown()


def connect_gloo(store: dist.Store, rank: int, size: int, local: bool) -> Any:
    """Return one rank of a gloo group, after all ranks have connected. Of an edge, 0 sends.

    store: the same for every rank. size: the number of ranks. local: whether all ranks are on this
    machine. The group then uses the loopback interface only. Otherwise it uses GLOO_SOCKET_IFNAME,
    or else the interface that faces MASTER_ADDR.
    Raises RunError without a route, KeyError if MASTER_ADDR is needed and not set, and RuntimeError
    if gloo cannot connect.
    """
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    interface = _LOOPBACK if local else gloo_interface()
    if interface:
        options._devices = [gloo.create_device(interface=interface)]
    else:
        address = _exchange_addresses(store, rank, size)
        options._devices = [gloo.create_device(hostname=address)]
    options._timeout = FOREVER
    return gloo(dist.PrefixStore("gloo", store), rank, size, options)


def _exchange_addresses(store: dist.Store, rank: int, size: int) -> str:
    """Return this machine's address for one rank of a group: the one that faces the run's store.

    The machine of the store may resolve its own name to the loopback (Debian's /etc/hosts does).
    It then takes the address that faces another rank. gloo's own choice, the address of the host's
    name, is right only where the two agree.
    """
    address = _find_local_address(master_address())
    store.set(f"address/{rank}", address)
    if not ipaddress.ip_address(address).is_loopback:
        return address
    for other_rank in range(size):
        if other_rank == rank:
            continue
        other_address = store.get(f"address/{other_rank}").decode()
        if not ipaddress.ip_address(other_address).is_loopback:
            return _find_local_address(other_address)
    return address


def _find_local_address(host: str) -> str:
    """Return the address from which this machine would reach another one."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            # Connecting a datagram socket looks up the route and sends nothing.
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RunError(
            f"mesh: no route to {host}: {error.strerror}; "
            "give all nodes an address of node 0 that they reach, or set "
            "GLOO_SOCKET_IFNAME to the network interface that faces them"
        ) from None
