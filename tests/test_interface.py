"""dist/interface.py and dist/host.py: the interface that routes to the others, and hosts that look alike."""

from __future__ import annotations

import socket

import psutil
import pytest

from thinwire.dist.host import Host, distinct_names, this_host
from thinwire.dist.interface import check_interface_name, interface_named, interface_to, loopback_interface


def test_loopback_is_the_interface_of_its_address() -> None:
    found = loopback_interface()
    assert "127.0.0.1" in {entry.address for entry in psutil.net_if_addrs()[found.name]}
    assert found.address == "127.0.0.1"
    assert interface_named(found.name) == found


def test_route_to_an_own_address_starts_at_it() -> None:
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                assert (interface_to(entry.address).name, interface_to(entry.address).address) == (name, entry.address)


def test_unknown_interface_lists_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match=rf"world.interface: 'eth77' does not exist.*{loopback_interface().name}.*auto"
    ):
        interface_named("eth77")


@pytest.mark.parametrize("name", ["^lo,docker0", "=eth0", "eth0,eth1", ""])
def test_notation_for_several_interfaces_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"no single interface.*gloo.*auto"):
        check_interface_name(name)


def test_host_is_the_same_every_time() -> None:
    assert this_host() == this_host()
    assert this_host().name


def test_names_are_equal_exactly_where_the_hosts_are() -> None:
    a, clone, container = Host("a", "1"), Host("a", "2"), Host("b", "1")
    assert distinct_names([a, container, a]) == ("a", "b", "a")
    names = distinct_names([a, clone, container, a])
    assert names == ("a(1)", "a(2)", "b", "a(1)")
