"""Which interface the ranks of several nodes use."""

import psutil
import pytest

from launch.cluster.nic import Interface, choose, environment, interfaces, source_address

ETHERNET, STORAGE = Interface("eno1", "10.0.0.5", 1000), Interface("eno2", "10.1.0.5", 25000)
INFINIBAND, SLINGSHOT = Interface("ib0", "10.2.0.5", 0), Interface("hsn0", "10.3.0.5", 200000)


def test_a_fabric_comes_before_the_way_to_the_peer() -> None:
    assert choose([ETHERNET, SLINGSHOT, INFINIBAND], "127.0.0.1", {}) == SLINGSHOT
    assert choose([ETHERNET, INFINIBAND], "127.0.0.1", {}) == INFINIBAND


def test_the_site_decides_where_it_has_an_opinion() -> None:
    assert choose([ETHERNET, STORAGE, INFINIBAND], "127.0.0.1", {"NCCL_SOCKET_IFNAME": "=eno2,eno1"}) == STORAGE
    assert choose([ETHERNET, INFINIBAND], "127.0.0.1", {"GLOO_SOCKET_IFNAME": "eno"}) == ETHERNET
    assert choose([ETHERNET, INFINIBAND], "127.0.0.1", {"NCCL_SOCKET_IFNAME": "^eno1"}) == INFINIBAND
    assert choose([ETHERNET], "127.0.0.1", {"GLOO_SOCKET_IFNAME": "eth9"}) is None


def test_without_a_fabric_it_is_the_one_on_the_way() -> None:
    here = interfaces()
    if not here:
        pytest.skip("this machine has no network")
    assert choose([ETHERNET, here[0]], here[0].address, {}) in here
    assert choose([ETHERNET], "no.such.host.invalid", {}) is None


def test_the_variables_name_it_where_the_site_has_not() -> None:
    assert environment(None, {}) == {}
    assert environment(ETHERNET, {}) == {"GLOO_SOCKET_IFNAME": "eno1", "NCCL_SOCKET_IFNAME": "=eno1"}
    assert environment(ETHERNET, {"NCCL_SOCKET_IFNAME": "eno2"}) == {"GLOO_SOCKET_IFNAME": "eno1"}


def test_interfaces_are_those_of_this_machine_that_are_up() -> None:
    found = interfaces()
    assert all(interface.name in psutil.net_if_addrs() for interface in found)
    assert not any(interface.address.startswith("127.") for interface in found)
    assert source_address("127.0.0.1") == "127.0.0.1"
