"""The ranks of a run, their store, and what each rank hosts. Stores are made only in this module.

A worker gets its store from localpipe's own launcher (a file in a private folder, no port) or from
torchrun.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from localpipe.environment import (
    launched_rank,
    local_rank,
    local_workers,
    master_address,
    private_folder,
    torchrun_id,
    uses_link,
    world_size,
)
from localpipe.errors import RunError, first_line
from localpipe.networks.cuts import split_evenly
from localpipe.pipeline.channels.channel import exchange_facts
from localpipe.pipeline.channels.groups import FOREVER, connect_gloo, connect_nccl, nccl_facts
from localpipe.pipeline.stages.replicas import Replicas
from localpipe.pipeline.workers.attempt import EndAttempt, join_attempt
from localpipe.pipeline.workers.folder_store import FACTS_FOLDER, FolderStore

MarkWaiting = Callable[[], AbstractContextManager[None]]
MarkConnect = Callable[[str], AbstractContextManager[None]]
_RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=2)


@dataclass(frozen=True)
class Mesh:
    """The rank of one worker among all. `local` is true if every worker runs on this machine.

    world: the number of workers. local_rank: the worker's number on its machine. over_link: all are
    here, but what they send goes over TCP, on links that a benchmark shapes.
    """

    rank: int
    world: int
    store: dist.Store
    local: bool
    local_rank: int = 0
    over_link: bool = False

    @property
    def shares_memory(self) -> bool:
        """Whether what workers send may go through this machine's memory or loopback."""
        return self.local and not self.over_link

    def find_host(self, replicas: tuple[int, ...]) -> Host:
        """Return what this worker hosts; `replicas` are the numbers of replicas of every stage.

        Raises IndexError if the configuration has no work for this rank.
        """
        return assign_hosts(replicas, self.world)[self.rank]

    def open_edge_store(self, name: str, generation: int) -> dist.Store:
        """Return the part of the store that belongs to one edge.

        The same name and generation give the same keys, in every worker.
        """
        return dist.PrefixStore(f"edge/{name}/{generation}", self.store)

    def connect_replicas(
        self,
        stage: int,
        index: int,
        count: int,
        mark_waiting: MarkWaiting,
        mark_connect: MarkConnect,
        device: torch.device,
    ) -> Replicas:
        """Connect one replica of a stage to the other ones. Waits until all have called it.

        index: of the replica. count: the number of replicas. One replica is returned at once. Host
        tensors go over gloo. Device tensors go over NCCL on a GPU, and over gloo otherwise.
        mark_waiting: makes a context that counts the time inside as waiting. mark_connect: makes
        one in which all connect over NCCL. Raises UserError if NCCL is needed and torch has none,
        and RunError without a route, or if a replica has another NCCL.
        """
        if count == 1:
            return Replicas()
        store = dist.PrefixStore(f"replicas/{stage}", self.store)
        host_group = connect_gloo(store, index, count, self.shares_memory)
        device_group = host_group
        if device.type == "cuda":
            device_group = _connect_replicas_nccl(store, stage, index, count, mark_connect, device)
        return Replicas(index, count, device_group, host_group, mark_waiting)

    def barrier(self, name: str) -> None:
        """Wait until every worker has called this with the same name, which is for one use.

        It has no timeout. A second use of a name does not wait. The store's RuntimeError passes
        through.
        """
        if isinstance(self.store, FolderStore):
            # A worker that is replaced arrives again.
            self.store.set(f"barrier/{name}/{self.rank}", "1")
            self.store.wait([f"barrier/{name}/{rank}" for rank in range(self.world)], FOREVER)
            return
        arrived = self.store.add(f"barrier/{name}/count", 1)
        if arrived == self.world:
            self.store.set(f"barrier/{name}/open", "1")
        self.store.wait([f"barrier/{name}/open"], FOREVER)


def mark_no_connect(neighbour: str) -> AbstractContextManager[None]:
    """Return a context that marks nothing: nobody watches how long a connection takes."""
    return nullcontext()


def _connect_replicas_nccl(
    store: dist.Store,
    stage: int,
    index: int,
    count: int,
    mark_connect: MarkConnect,
    device: torch.device,
) -> Any:
    """Return the NCCL group of a stage's replicas, whose NCCL is compared with the first one's."""
    for other in range(count):
        if index == 0 or other == 0:
            name = f"replica {other} of stage {stage}"
            exchange_facts(store, nccl_facts(), f"facts/{index}", f"facts/{other}", name)
    with mark_connect(f"the other replicas of stage {stage}"):
        return connect_nccl(store, index, count, device)


@dataclass(frozen=True)
class Host:
    """What one worker hosts: consecutive stages of one replica.

    Its text is `stage 1, replica 0` or `stages 0..2, replica 0`.
    """

    stages: range
    replica: int

    def __str__(self) -> str:
        first, last = self.stages[0], self.stages[-1]
        names = f"stage {first}" if first == last else f"stages {first}..{last}"
        return f"{names}, replica {self.replica}"


def assign_hosts(replicas: tuple[int, ...], processes: int) -> tuple[Host, ...]:
    """Return what every rank hosts, by rank.

    Neighbours have neighbouring ranks, so that they share a node where the ranks do. With the same
    number of replicas everywhere, one pipeline follows the other. The stages of each are spread
    over its ranks, with sizes that differ by at most one. `processes` is then a multiple of the
    replicas, and fewer raise ZeroDivisionError. With different numbers, every replica of a stage
    has a rank of its own, stage after stage, and `processes` is not read.
    """
    hosts = []
    if len(set(replicas)) == 1:
        pipelines = replicas[0]
        bounds = split_evenly(len(replicas), processes // pipelines)
        for replica in range(pipelines):
            for first, last in bounds:
                hosts.append(Host(range(first, last + 1), replica))
    else:
        for stage, count in enumerate(replicas):
            for replica in range(count):
                hosts.append(Host(range(stage, stage + 1), replica))
    return tuple(hosts)


def find_rank(stage: int, replica: int, replicas: tuple[int, ...], processes: int) -> int:
    """Return the rank that hosts a replica of a stage.

    replicas: of every stage. Raises AssertionError if there is no such stage or replica.
    """
    hosts = assign_hosts(replicas, processes)
    for rank, host in enumerate(hosts):
        if stage in host.stages and replica == host.replica:
            return rank
    raise AssertionError(f"no rank hosts stage {stage}, replica {replica}")


def open_run_store(directory: Path) -> dist.Store:
    """Return the store of a run that localpipe launched, of the kind that its launcher has made.

    directory: the private folder of the run. It is a FolderStore where workers are replaced.
    """
    folder = directory / FACTS_FOLDER
    if folder.is_dir():
        return FolderStore(folder)
    return open_file_store(directory)


def open_file_store(directory: Path) -> dist.Store:
    """Return the store of a run that localpipe launched, in the file `store` of a folder.

    Only the run's own processes can open the file. The store waits for missing keys without end.
    """
    store = dist.FileStore(str(directory / "store"), -1)
    store.set_timeout(FOREVER)
    return store


def _leave(attempt: dist.Store) -> None:
    """Do nothing with an attempt that is over."""


def join_mesh(end_attempt: EndAttempt = _leave) -> Mesh:
    """Return this worker's mesh, read from the environment that its launcher set.

    Under torchrun it waits up to two minutes for the store. Then it waits for all other workers,
    because the store may hold keys of workers that torchrun has restarted, or of another job: the
    mesh's part of the store belongs to this attempt alone.
    end_attempt: called with the part of the attempt before, if there was one.
    Raises KeyError or ValueError where a launcher's variable is missing, RunError if a worker or
    the store does not come, and JobFinishedError if the run has ended already.
    """
    folder = private_folder()
    if folder is not None:
        rank = launched_rank()
        store = open_run_store(folder)
        return Mesh(rank, world_size(), store, True, local_rank=rank, over_link=uses_link())
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=_RENDEZVOUS_TIMEOUT)))
    except (RuntimeError, ValueError, OSError) as error:
        seconds = _RENDEZVOUS_TIMEOUT.total_seconds()
        raise RunError(
            f"torchrun: {world_size()} workers have not met at {master_address()} within "
            f"{seconds:g} s: {first_line(error)}; start them all, or, if RANK and WORLD_SIZE were "
            "left in the environment, unset both"
        ) from None
    store.set_timeout(FOREVER)
    of_job = dist.PrefixStore(f"localpipe/{torchrun_id()}", store)
    of_attempt = join_attempt(of_job, rank, world, end_attempt)
    is_local = local_workers() == world
    return Mesh(rank, world, of_attempt, local=is_local, local_rank=local_rank(rank))


def private_dir() -> Path:
    """Return the folder that only this worker, its siblings and its launcher can open.

    Raises AssertionError if localpipe's own launcher has not started this process.
    """
    folder = private_folder()
    assert folder is not None, "localpipe's launcher has started this worker"
    return folder
