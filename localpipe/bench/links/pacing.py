"""Pacing of a worker's TCP connections, where the kernel cannot shape a whole link."""

from __future__ import annotations

import os
import socket
import struct

_MAX_PACING_RATE = 47  # SO_MAX_PACING_RATE of Linux, which Python's socket module does not name
_UNLIMITED = 2**64 - 1


def limit_connections(bytes_per_s: float | None) -> int:
    """Let each open TCP connection of this process send at most so many bytes a second.

    None takes the limit away. The kernel spreads what is written over the time, in pieces of up to
    64 KiB. Connections that are opened later have no limit. Returns the number of connections.
    Raises OSError where the kernel has no pacing.
    """
    rate = _UNLIMITED
    if bytes_per_s is not None:
        rate = max(1, round(bytes_per_s))
    count = 0
    for name in os.listdir("/proc/self/fd"):
        connection = _open_connection(int(name))
        if connection is None:
            continue
        with connection:
            connection.setsockopt(socket.SOL_SOCKET, _MAX_PACING_RATE, struct.pack("=Q", rate))
        count += 1
    return count


def _open_connection(number: int) -> socket.socket | None:
    """Return a second handle of an open TCP connection, or None for any other file."""
    try:
        if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
            return None
        connection = socket.socket(fileno=os.dup(number))
    except OSError:
        return None  # closed meanwhile
    is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
    if not is_tcp or connection.type != socket.SOCK_STREAM or not _is_connected(connection):
        connection.close()
        return None
    return connection


def _is_connected(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False
    return True
