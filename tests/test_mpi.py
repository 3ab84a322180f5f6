"""launch/mpi.py: the address where the ranks of an MPI job meet. The job itself runs in test_launchers.py."""

from __future__ import annotations

import pytest

from thinwire.dist.host import Host
from thinwire.launch.mpi import MpiError, _meeting_address

A, B, C = (Host(name, name) for name in "abc")
DOCKER = "172.17.0.1/255.255.0.0"


def test_one_host_meets_on_loopback() -> None:
    assert _meeting_address([A, A], [["10.0.0.1/24"], ["10.0.0.1/24"]]) == "127.0.0.1"


def test_address_that_the_other_hosts_are_neighbours_of() -> None:
    networks = [[DOCKER, "192.168.7.2/24", "10.0.0.1/24"], [DOCKER, "10.0.0.2/24"], [DOCKER, "10.0.0.3/24"]]
    assert _meeting_address([A, B, C], networks) == "10.0.0.1"


def test_address_behind_a_router() -> None:
    assert _meeting_address([A, B], [[DOCKER, "10.1.0.1/24"], [DOCKER, "10.2.0.1/24"]]) == "10.1.0.1"


def test_no_address_of_its_own() -> None:
    with pytest.raises(MpiError, match=r"a, the host of rank 0, .* set MASTER_ADDR"):
        _meeting_address([A, B], [[DOCKER], [DOCKER, "10.0.0.2/24"]])
