"""The check of the network interfaces that edges between machines use."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from localpipe.doctor.check import Check
from localpipe.environment import gloo_interface


def check_network() -> Check:
    """Check that the interface chosen by GLOO_SOCKET_IFNAME exists.

    An error if it does not, else ok, also without any interface but the loopback. Edges on one
    machine use the loopback, whatever the result. figures: `interfaces` ({name: addresses}) and
    `GLOO_SOCKET_IFNAME` (or None).
    """
    addresses = _list_interface_addresses()
    interface = gloo_interface()
    figures = {"interfaces": addresses, "GLOO_SOCKET_IFNAME": interface}
    if interface is not None and interface not in addresses:
        text = f"GLOO_SOCKET_IFNAME={interface}"
        advice = (
            f"there is no interface {interface}; unset GLOO_SOCKET_IFNAME, "
            f"or name one of {', '.join(addresses)}"
        )
        return Check("network", "error", text, advice, figures)

    outward = [name for name in addresses if not _has_only_loopback(addresses[name])]
    names = ", ".join(outward) or "none but the loopback"
    return Check("network", "ok", f"interfaces {names}", "", figures)


def _list_interface_addresses() -> dict[str, list[str]]:
    """Return the IPv4 and IPv6 addresses of every interface."""
    addresses: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        addresses[name] = []
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                addresses[name].append(entry.address)
    return addresses


def _has_only_loopback(addresses: list[str]) -> bool:
    for address in addresses:
        number = address.partition("%")[0]  # an IPv6 address may end in %INTERFACE
        if not ipaddress.ip_address(number).is_loopback:
            return False
    return True
