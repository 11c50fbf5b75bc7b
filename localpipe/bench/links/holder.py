"""A process that holds a network namespace of its own, and dies with the benchmark.

The namespace and its interfaces exist as long as a process is inside. So none is left over,
whatever ends the benchmark.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Say that the namespace is there, and wait until standard input ends."""
    print("ready", flush=True)
    sys.stdin.read()
    return 0
