"""dist/rendezvous.py: ranks that meet, and every way in which they do not."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from thinwire.dist.place import Place
from thinwire.dist.rendezvous import RendezvousError, check_in, open_store

LONG_S = 60.0


def bound_socket(address: str = "127.0.0.1") -> socket.socket:
    listener = socket.socket()
    listener.bind((address, 0))
    return listener


def places(size: int, **changes: Any) -> list[Place]:
    """The ranks of one host; rank 0 holds the socket, as under MPI, so that no other test takes the port."""
    listener = bound_socket()
    port = listener.getsockname()[1]
    common = [Place("openmpi", rank, size, rank, size, 0, "127.0.0.1", port) for rank in range(size)]
    return [dataclasses.replace(p, listener=listener if p.rank == 0 else None, **changes) for p in common]


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(one) for one in work]
        return [future.exception() or future.result() for future in futures]


def meet(place: Place, timeout_s: float = LONG_S) -> list[dict[str, Any]]:
    return check_in(open_store(place, LONG_S), place, {"rank": place.rank}, timeout_s)


def test_every_rank_gets_every_record() -> None:
    three = places(3)
    everything = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert in_threads(*[lambda p=p: meet(p) for p in three]) == [everything] * 3


def test_one_rank_needs_no_network() -> None:
    assert meet(Place("single", 0, 1, 0, 1, 0, "256.0.0.1", 0)) == [{"rank": 0}]


def test_generations_read_nothing_of_each_other() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    old = dataclasses.replace(places(2)[1], agent_store=True, listener=None, master_port=server.port)
    first = [dataclasses.replace(old, rank=rank) for rank in range(2)]
    second = [dataclasses.replace(place, generation=1) for place in first]
    assert in_threads(*[lambda p=p: meet(p) for p in first]) == [[{"rank": 0}, {"rank": 1}]] * 2
    late = in_threads(lambda: meet(second[1], timeout_s=0.2))[0]
    assert isinstance(late, RendezvousError)
    assert late.missing_ranks == (0,)


def test_absent_ranks_are_named() -> None:
    five = places(5)
    ended = threading.Event()  # rank 0 serves the store until the others have seen who is missing

    def first() -> Any:
        store = open_store(five[0], LONG_S)
        try:
            return check_in(store, five[0], {}, 0.5)
        finally:
            ended.wait(LONG_S)

    def other() -> Any:
        try:
            return meet(five[3], 0.5)
        finally:
            ended.set()

    for error in in_threads(first, other):
        assert isinstance(error, RendezvousError)
        assert error.missing_ranks == (1, 2, 4)
        assert "3 of 5 ranks did not come to 127.0.0.1:" in str(error)
        assert "Missing: 1-2, 4. There: 0, 3." in str(error)


def test_nobody_serves() -> None:
    unused = bound_socket()  # bound and not listening: connections are refused, and nobody takes the port
    place = Place("torchrun", 1, 2, 1, 2, 0, "127.0.0.1", unused.getsockname()[1])
    with pytest.raises(
        RendezvousError, match=rf"rank 1 .* no rendezvous store at 127.0.0.1:{place.master_port} within 1 s"
    ):
        open_store(place, 1.0)
    unused.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_port_of_somebody_else(address: str) -> None:
    with bound_socket(address) as other:
        other.listen()
        port = other.getsockname()[1]
        place = Place("torchrun", 0, 2, 0, 2, 0, "127.0.0.1", port)
        with pytest.raises(
            RendezvousError, match=rf"rank 0 cannot serve .* 127.0.0.1:{port} .*--master-port or MASTER_PORT"
        ):
            open_store(place, 5.0)


def test_store_listens_on_the_master_s_address_alone() -> None:
    with bound_socket() as free:
        port = free.getsockname()[1]
    place = Place("torchrun", 0, 2, 0, 2, 0, "127.0.0.1", port)
    store = open_store(place, 5.0)
    with socket.socket() as beside:
        beside.bind(("127.0.0.2", port))  # would be in use if the store listened on every address
    del store


def test_master_s_name_that_means_loopback_on_its_own_host() -> None:
    """Debian's /etc/hosts gives a host's own name a loopback address; ranks of other hosts must get in."""
    with bound_socket() as free:
        port = free.getsockname()[1]
    store = open_store(Place("torchrun", 0, 2, 0, 1, 0, "127.0.0.1", port), 5.0)
    socket.create_connection(("127.0.0.2", port), timeout=5.0).close()
    del store


def test_address_that_is_not_this_host_s() -> None:
    """A router or a service in between may hold the master's address: rank 0 then serves on all of its own."""
    with bound_socket() as free:
        port = free.getsockname()[1]
    store = open_store(Place("slurm", 0, 2, 0, 1, 0, "192.0.2.1", port), 5.0)
    socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
    del store


def test_two_processes_with_one_rank() -> None:
    two = places(2)
    store = open_store(two[0], LONG_S)
    results = in_threads(lambda: check_in(store, two[0], {}, LONG_S), *[lambda: meet(two[1])] * 2)
    errors = [result for result in results if isinstance(result, RendezvousError)]
    assert len(errors) == 1
    assert "is rank 1 already" in str(errors[0])


def test_two_jobs_of_different_size() -> None:
    small, big = places(2), places(3)
    stranger = dataclasses.replace(big[2], master_port=small[0].master_port)
    store = open_store(small[0], LONG_S)

    def first() -> Any:
        return check_in(store, small[0], {"rank": 0}, LONG_S)

    *met, refused = in_threads(first, lambda: meet(small[1]), lambda: meet(stranger))
    # Whoever came first says what the size is; the others are told.
    errors = [result for result in [*met, refused] if isinstance(result, RendezvousError)]
    assert errors
    assert all("two jobs meet at one address and port" in str(error) for error in errors)


def test_rank_0_ends_before_the_others_have_met() -> None:
    three = places(3)
    store = open_store(three[0], LONG_S)
    waiting = threading.Event()
    client = open_store(three[1], LONG_S)

    def first() -> None:
        nonlocal store
        waiting.wait(LONG_S)
        del store

    class Telling(dict[str, int]):
        def items(self) -> Any:  # json.dumps reads the record right before the rank begins to wait
            waiting.set()
            return super().items()

    _, error = in_threads(first, lambda: check_in(client, three[1], Telling(a=1), LONG_S))
    assert isinstance(error, RendezvousError)
    assert "lost the rendezvous store" in str(error)
