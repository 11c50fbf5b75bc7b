"""Links between the workers of a benchmark: of a given rate in each direction, or open.

    namespace of rank 0             namespace of rank 1          one veth pair for every two ranks
    lo:link 10.77.0.1  to1 ═════════ to0  lo:link 10.77.0.2       tc tbf at both ends

Every rank has a network namespace, so that the kernel shapes what leaves it. Where that cannot be
done, all ranks share the loopback and the senders pace their connections.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from typing import Protocol

from localpipe.bench.links.rate import LinkRequest
from localpipe.bench.processes import SystemProcesses
from localpipe.environment import child_environment, start_command
from localpipe.errors import RunError, UserError
from localpipe.pipeline.launch.rank import RankNetwork, kill_ranks

_INTERFACE = "lo:link"  # the label of a rank's address, by which gloo finds it
_MTU = 1500
_PAYLOAD_SHARE = (_MTU - 52) / (_MTU + 14)  # of a frame: headers of IP, TCP and Ethernet
_BURST_S, _QUEUE_S = 0.004, 0.1
_MIN_BURST_BYTES, _MIN_QUEUE_BYTES = 2**15, 2**20
_PROBE_BITS_PER_S = 1e9
_START_S = 60.0
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
Command = list[str]


class ShapingError(RunError):
    """The kernel cannot shape links here, so that the senders do. As text it is the reason."""


class BenchLink(Protocol):
    """The links between the workers of a benchmark, open at first.

    networks: of the ranks. how: the words of the table. payload_share: the part of a link's rate
    that is left to what is sent.
    """

    networks: tuple[RankNetwork, ...]
    how: str
    payload_share: float

    def shape(self, processes: SystemProcesses, bits_per_s: float, delay_s: float) -> None:
        """Give every direction of every link a rate. processes: the system that runs next."""

    def open(self, processes: SystemProcesses) -> None:
        """Take the rate away. processes: the system that runs next."""


# -- shaped by the kernel -----------------------------------------------------------------------


def list_setup_commands(holders: Sequence[int]) -> list[Command]:
    """Return the commands that join namespaces by links, a pair of interfaces for every two.

    holders: a process inside each namespace, by rank.
    """
    commands = []
    for rank, holder in enumerate(holders):
        enter = _enter(holder)
        address = f"{_format_address(rank)}/32"
        commands.append([*enter, "ip", "link", "set", "lo", "up"])
        commands.append([*enter, *f"ip addr add {address} dev lo label {_INTERFACE}".split()])
    for a, b in combinations(range(len(holders)), 2):
        pair = f"{_name_interface(b)} netns {holders[a]} mtu {_MTU} type veth"
        pair += f" peer name {_name_interface(a)} netns {holders[b]} mtu {_MTU}"
        commands.append(f"ip link add {pair}".split())
    for rank, other in permutations(range(len(holders)), 2):
        enter, device = _enter(holders[rank]), _name_interface(other)
        route = f"{_format_address(other)}/32 dev {device} src {_format_address(rank)}"
        commands.append([*enter, *f"ip link set {device} up".split()])
        commands.append([*enter, *f"ip route add {route}".split()])
    return commands


def list_shape_commands(holders: Sequence[int], bits_per_s: float, delay_s: float) -> list[Command]:
    """Return the commands that give every direction of every link a rate, and a delay above 0."""
    rate = f"rate {round(bits_per_s)}bit"
    if delay_s:
        discipline = f"netem delay {round(delay_s * 1e6)}us {rate} limit 100000"
    else:
        burst = max(_MIN_BURST_BYTES, round(_BURST_S * bits_per_s / 8))
        queue = max(_MIN_QUEUE_BYTES, round(_QUEUE_S * bits_per_s / 8))
        discipline = f"tbf {rate} burst {burst}b limit {burst + queue}b"
    commands = []
    for rank, other in permutations(range(len(holders)), 2):
        words = f"tc qdisc replace dev {_name_interface(other)} root {discipline}"
        commands.append([*_enter(holders[rank]), *words.split()])
    return commands


def list_open_commands(holders: Sequence[int]) -> list[Command]:
    """Return the commands that take the rate of every link away, after `list_shape_commands`."""
    commands = []
    for rank, other in permutations(range(len(holders)), 2):
        words = f"tc qdisc del dev {_name_interface(other)} root"
        commands.append([*_enter(holders[rank]), *words.split()])
    return commands


class KernelLink:
    """Links that the kernel shapes, between namespaces that `holders` hold, by rank."""

    how = "shaped by the kernel (tc)"
    payload_share = _PAYLOAD_SHARE

    def __init__(self, holders: Sequence[int]) -> None:
        self._holders = holders
        self._is_shaped = False
        self.networks = tuple(RankNetwork(tuple(_enter(holder)), _INTERFACE) for holder in holders)

    def shape(self, processes: SystemProcesses | None, bits_per_s: float, delay_s: float) -> None:
        """Give every direction a rate. Raises ShapingError if the kernel refuses."""
        for command in list_shape_commands(self._holders, bits_per_s, delay_s):
            _run(command)
        self._is_shaped = True

    def open(self, processes: SystemProcesses | None) -> None:
        """Take the rate away. Raises ShapingError if the kernel refuses."""
        if self._is_shaped:
            for command in list_open_commands(self._holders):
                _run(command)
        self._is_shaped = False


def _enter(holder: int) -> Command:
    return ["nsenter", f"--net=/proc/{holder}/ns/net"]


def _format_address(rank: int) -> str:
    return f"10.77.{(rank + 1) // 256}.{(rank + 1) % 256}"


def _name_interface(rank: int) -> str:
    """Return the name of the interface that faces a rank."""
    return f"to{rank}"


def _run(command: Command) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
        raise ShapingError(f"{' '.join(command[-12:])} failed: {lines[0]}")


def find_missing() -> str | None:
    """Return why namespaces cannot be made here, as far as it is known at once, else None."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            return f"there is no {tool} (of {package})"
    return None


@contextlib.contextmanager
def _hold_namespaces(count: int) -> Iterator[list[int]]:
    """Enter a context with processes that hold a network namespace each, and give their numbers.

    They die with this process, and the namespaces with them. Raises ShapingError where one cannot
    be made.
    """
    holders: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            command = ["unshare", "--net", *start_command("localpipe.bench.links.holder")]
            holders.append(
                subprocess.Popen(
                    command,
                    env=child_environment({}),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            )
        for holder in holders:
            _wait_until_ready(holder)
        yield [holder.pid for holder in holders]
    finally:
        kill_ranks(holders)
        for holder in holders:
            for stream in (holder.stdin, holder.stdout, holder.stderr):
                if stream is not None:
                    stream.close()


def _wait_until_ready(holder: subprocess.Popen[bytes]) -> None:
    assert holder.stdout is not None and holder.stderr is not None
    readable, _, _ = select.select([holder.stdout], [], [], _START_S)
    if readable and holder.stdout.readline().strip() == b"ready":
        return
    if holder.poll() is None:
        raise ShapingError("a namespace was not made in time")
    lines = holder.stderr.read().decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else "unshare failed"
    raise ShapingError(f"a namespace was not made: {reason}")


# -- paced by the senders -----------------------------------------------------------------------


class PacedLink:
    """Connections over the loopback that the senders pace, between `world` ranks.

    reason: why the kernel does not shape them.
    """

    payload_share = 1.0

    def __init__(self, world: int, reason: str) -> None:
        self.networks = (RankNetwork((), "lo"),) * world
        self.how = f"paced by the senders, since {reason}"

    def shape(self, processes: SystemProcesses, bits_per_s: float, delay_s: float) -> None:
        """Pace every connection of a system. There is no delay."""
        assert delay_s == 0, "a delay is refused before"
        processes.limit_sending(bits_per_s / 8)

    def open(self, processes: SystemProcesses) -> None:
        """Pace no connection of a system."""
        processes.limit_sending(None)


# -- either -------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_link(request: LinkRequest, world: int) -> Iterator[BenchLink]:
    """Enter a context with open links between ranks; they and their namespaces end with it.

    The kernel shapes them, or else the senders pace. Raises UserError for a delay that the kernel
    cannot make.
    """
    with contextlib.ExitStack() as resources:
        link: BenchLink
        try:
            link = resources.enter_context(_open_kernel_link(request, world))
        except ShapingError as reason:
            if request.delay_s:
                raise UserError(
                    f"bench: --link {request.text}: no delay can be made here ({reason}); expected "
                    "root, iproute2 and the kernel's module sch_netem; leave the delay out"
                ) from None
            link = PacedLink(world, str(reason))
        yield link


@contextlib.contextmanager
def _open_kernel_link(request: LinkRequest, world: int) -> Iterator[KernelLink]:
    """Enter a context with links that the kernel shapes. Raises ShapingError where it cannot."""
    reason = find_missing()
    if reason is not None:
        raise ShapingError(reason)
    with _hold_namespaces(world) as holders:
        for command in list_setup_commands(holders):
            _run(command)
        link = KernelLink(holders)
        # The disciplines are tried once, before anything is measured.
        link.shape(None, request.bits_per_s or _PROBE_BITS_PER_S, request.delay_s)
        link.open(None)
        yield link
