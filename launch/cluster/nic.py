"""Which network interface the ranks of several nodes talk through, decided and not left to each library's guess."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

__all__ = ["Interface", "choose", "environment", "interfaces", "source_address"]

_FABRIC = ("hsn", "ib")  # Slingshot's and InfiniBand's
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Interface:
    """Attributes:
    name: the kernel's.
    address: IPv4.
    megabits: per second, as its driver says; 0 where it does not.
    """

    name: str
    address: str
    megabits: int


def interfaces() -> list[Interface]:
    """Those of this machine that are up and have an IPv4 address, loopback left out, in the order of their names."""
    states = psutil.net_if_stats()
    return [
        Interface(name, address.address, states[name].speed)
        for name, addresses in sorted(psutil.net_if_addrs().items())
        for address in addresses
        if address.family == socket.AF_INET
        and name in states
        and states[name].isup
        and not address.address.startswith("127.")
    ]


def choose(found: Sequence[Interface], peer: str, env: Mapping[str, str]) -> Interface | None:
    """The interface that ``env`` names; else the first of a fabric; else the one on the way to ``peer``.

    Args:
        found: as ``interfaces`` gives them.
        peer: name or address of another node.
        env: may hold GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, whose first name (a prefix, for NCCL) counts.
    """
    for variable in _VARIABLES:
        wanted = env.get(variable, "").split(",")[0].lstrip("=")
        if wanted and not wanted.startswith("^"):
            return next((interface for interface in found if interface.name.startswith(wanted)), None)
    fabric = (interface for prefix in _FABRIC for interface in found if interface.name.startswith(prefix))
    source = source_address(peer)
    return next(fabric, next((interface for interface in found if interface.address == source), None))


def environment(interface: Interface | None, env: Mapping[str, str]) -> dict[str, str]:
    """The variables for gloo and NCCL that ``env`` leaves open."""
    if interface is None:
        return {}
    exact = {"GLOO_SOCKET_IFNAME": interface.name, "NCCL_SOCKET_IFNAME": f"={interface.name}"}  # else a prefix
    return {variable: name for variable, name in exact.items() if variable not in env}


def source_address(peer: str) -> str:
    """The address that packets to ``peer`` leave from; empty where there is no way. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])
