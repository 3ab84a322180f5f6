"""How the ranks find each other: a key-value store that rank 0 serves, in which every rank checks in."""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from thinwire.comm.errors import CommError
from thinwire.comm.rank_names import ranges
from thinwire.dist.place import Place


class RendezvousError(CommError):
    """The ranks did not find each other."""

    def __init__(self, message: str, missing_ranks: Sequence[int] = ()) -> None:
        super().__init__(message, operation="rendezvous", missing_ranks=missing_ranks)


def open_store(place: Place, timeout_s: float) -> dist.Store:
    """The store of this job: served by rank 0 at the master's address, unless the launcher's agent already does.

    Keys carry the launcher's restart count, so that a restarted rank finds no address of a dead one.

    Raises:
        RendezvousError: the port is taken, or nobody serves the store within timeout_s seconds.
    """
    if place.world_size == 1:
        return dist.HashStore()
    serves = place.rank == 0 and not place.agent_store
    listener = _listener(place) if serves else None
    where = f"{place.master_addr}:{place.master_port}"
    # A server that listens on every address is reached on its machine by loopback; the job's own may be a router's.
    nearby = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listener.getsockname()[0]) if listener is not None else None
    try:
        store = dist.TCPStore(
            nearby or place.master_addr,
            place.master_port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener is not None else None,
        )
    except dist.DistError as error:
        raise RendezvousError(
            f"rank {place.rank} on {socket.gethostname()} found no rendezvous store at {where} within {timeout_s:g} s: "
            "rank 0 must be running, the address must be one of its host's that this host reaches, and no firewall "
            f"may close the port ({_first_line(error)})",
            [0],
        ) from error
    return dist.PrefixStore(f"thinwire/{place.generation}", store)


def check_in(store: dist.Store, place: Place, record: Mapping[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    """Tell the others about this rank, and return every rank's record, in rank order. Collective.

    Raises:
        RendezvousError: a rank is missing after timeout_s seconds, the store is gone, or the ranks belong to two jobs.
    """
    where = f"{place.master_addr}:{place.master_port}"
    deadline = time.monotonic() + timeout_s
    try:
        size = int(store.compare_set("size", "", str(place.world_size)))
        if size != place.world_size:
            raise RendezvousError(
                f"rank {place.rank} counts {place.world_size} ranks, others at {where} count {size}: two jobs meet at "
                "one address and port, or the launch commands of the hosts differ"
            )
        if store.add(f"taken/{place.rank}", 1) > 1:
            raise RendezvousError(
                f"another process at {where} is rank {place.rank} already: two jobs meet at one address and port, or "
                "two hosts were started with the same node rank"
            )
        store.set(f"record/{place.rank}", json.dumps(record))
        if store.add("here", 1) == place.world_size:
            store.set("all here", "")
        if not _appears(store, "all here", deadline):
            raise _absence(store, place, timeout_s)
        records = [json.loads(store.get(f"record/{rank}")) for rank in range(place.world_size)]
        # Rank 0 serves the store: it stays until all have read, to hide from none what it finds wrong next.
        if store.add("read", 1) == place.world_size:
            store.set("all read", "")
        if place.rank == 0:
            _appears(store, "all read", deadline)
        return records
    except dist.DistError as error:
        raise RendezvousError(
            f"rank {place.rank} lost the rendezvous store at {where}: rank 0 or its launcher has ended "
            f"({_first_line(error)})",
            [0],
        ) from error


def _appears(store: dist.Store, key: str, deadline: float) -> bool:
    """Whether the key is there by the deadline. Looks again and again: the store's own wait is deaf to Ctrl-C."""
    pause_s = 0.005
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.5)
    return True


def _absence(store: dist.Store, place: Place, timeout_s: float) -> RendezvousError:
    there = [rank for rank in range(place.world_size) if store.check([f"record/{rank}"])]
    missing = sorted(set(range(place.world_size)) - set(there))
    return RendezvousError(
        f"{len(missing)} of {place.world_size} ranks did not come to {place.master_addr}:{place.master_port} within "
        f"{timeout_s:g} s. Missing: {ranges(missing)}. There: {ranges(there)}. Look at the output of the missing "
        "ones; a slow start needs a larger world.rendezvous_timeout_s",
        missing,
    )


def _listener(place: Place) -> socket.socket:
    """Rank 0's listening socket: on the master's address alone where that is an address which the others can reach.

    The store asks nobody who they are, so it listens on every address only where it must: where the master's name means
    loopback on its own host (Debian's /etc/hosts) or an address that a router in between holds.
    """
    if place.listener is not None and place.listener.fileno() >= 0:
        return place.listener
    one_host = place.local_world_size == place.world_size
    try:
        family, _, _, _, target = socket.getaddrinfo(
            place.master_addr, place.master_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        family, target = socket.AF_INET, ("", place.master_port)
    if str(target[0]).startswith(("127.", "::1")) and not one_host:
        target = ("", place.master_port)
    try:
        return _bound(family, target)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return _listener_everywhere(place)
        raise _port_error(place, error) from error


def _listener_everywhere(place: Place) -> socket.socket:
    try:
        return _bound(socket.AF_INET, ("", place.master_port))
    except OSError as error:
        raise _port_error(place, error) from error


def _port_error(place: Place, error: OSError) -> RendezvousError:
    return RendezvousError(
        f"rank 0 cannot serve the rendezvous at {place.master_addr}:{place.master_port} ({error.strerror}): another "
        "job or service has the port; choose another with torchrun's --master-port or MASTER_PORT"
    )


def _bound(family: int, target: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the connections of an ended job linger
    try:
        listener.bind(target)
    except OSError:
        listener.close()
        raise
    return listener


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
