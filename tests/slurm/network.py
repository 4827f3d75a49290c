"""Two hosts' network on one machine: a bridge, and a network namespace with an address for each node."""

import json
import os
import socket
import subprocess

__all__ = ["Network", "can_separate", "free_port", "remove_leftovers"]

_PREFIX = "adagc"  # all names are adagcPID...: the longest, adagc4194304n1, is within a device's 15 characters


def can_separate() -> bool:
    """Whether this process may make the namespaces that nodes of their own need."""
    command = (
        "unshare",
        "--net",
        "--uts",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "ip",
        "link",
        "set",
        "lo",
        "up",
    )
    return subprocess.run(command, capture_output=True).returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def remove_leftovers() -> None:
    """Namespaces and devices of processes that no longer live."""
    for name in _names():
        owner = name.removeprefix(_PREFIX).partition("n")[0]
        if owner.isdecimal() and not os.path.exists(f"/proc/{owner}"):
            _remove(name)


class Network:
    """`address` on the bridge for this machine, and for each node a namespace `netns(node)` where it is `eth0`. The
    device of the same name is the bridge's end of its cable.
    """

    def __init__(self) -> None:
        self._bridge = f"{_PREFIX}{os.getpid()}"
        if self._bridge in _names():
            raise RuntimeError("this process has a cluster already: use that, or start another one in another process")
        self._prefix = _free_prefix()
        self.address = f"{self._prefix}.1"

    def add_bridge(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{self.address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    def netns(self, node: str) -> str:
        return self._bridge + node

    def address_of(self, number: int) -> str:
        return f"{self._prefix}.{10 + number}"

    def add(self, netns: str, address: str) -> None:
        _ip("netns", "add", netns)
        _ip("link", "add", netns, "type", "veth", "peer", "name", "eth0", "netns", netns)
        _ip("link", "set", netns, "master", self._bridge, "up")
        _ip("-n", netns, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", netns, "link", "set", "eth0", "up")
        _ip("-n", netns, "link", "set", "lo", "up")

    def unplug(self, netns: str) -> None:
        _ip("link", "set", netns, "down")

    def plug(self, netns: str) -> None:
        _ip("link", "set", netns, "up")

    def remove(self) -> None:
        for name in _names():
            if name == self._bridge or name.startswith(f"{self._bridge}n"):
                _remove(name)


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(("ip", *arguments), capture_output=True, text=True)
    if check and done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _names() -> set[str]:
    """Namespaces and devices with our prefix."""
    devices = [device["ifname"] for device in json.loads(_ip("-json", "link"))]
    spaces = [space["name"] for space in json.loads(_ip("-json", "netns", "list") or "[]")]
    return {name for name in (*devices, *spaces) if name.startswith(_PREFIX)}


def _remove(name: str) -> None:
    _ip("link", "delete", name, check=False)
    _ip("netns", "delete", name, check=False)


def _free_prefix() -> str:
    taken = _ip("-4", "-oneline", "address") + _ip("-4", "route")
    return next(prefix for third in range(256) if f"{(prefix := f'10.77.{third}')}." not in taken)
