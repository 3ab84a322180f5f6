"""A post between the ranks of a job."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket

import torch

from thinwire.comm.gossip.post.post import Post
from thinwire.comm.queue import CommQueue

_ADDRESS_BYTES = 256
_KEY_BYTES = 32


def open_post(queue: CommQueue, *, lost_after_s: float = 15.0, backlog_bytes: int = 1 << 32) -> Post:
    """A Post between the ranks of a queue, over which addresses and a secret are exchanged. Collective.

    Machines are numbered as the queue's ranks; payload bytes are counted in the queue's meter.

    Args:
        queue: whose machine also listens at the address that the queue's monitor answers at.
        lost_after_s, backlog_bytes: as Post has them.
    Raises:
        PeerLostError: a rank could not be connected within the queue's timeout; says why.
    """
    if queue.size == 1:
        return Post(
            0, [("", 0)], secret=b"", listener=None, meter=queue.meter, peers=queue.peers, lost_after_s=lost_after_s
        )
    listener = listen(queue.monitor.host, 0)
    mine = json.dumps(listener.getsockname()[:2]).encode()
    told = torch.zeros(_ADDRESS_BYTES + _KEY_BYTES, dtype=torch.uint8)
    told[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    told[_ADDRESS_BYTES:] = torch.frombuffer(bytearray(secrets.token_bytes(_KEY_BYTES)), dtype=torch.uint8)
    try:
        all_told = queue.submit("control/addresses", lambda channel: channel.all_gather_same(told)).wait()
    except BaseException:
        listener.close()
        raise
    addresses = []
    for rank in range(queue.size):
        host, port = json.loads(all_told[rank, :_ADDRESS_BYTES].numpy().tobytes().rstrip(b"\0"))
        addresses.append((str(host), int(port)))
    key = hashlib.sha256(all_told[:, _ADDRESS_BYTES:].contiguous().numpy().tobytes()).digest()
    post = Post(
        queue.rank,
        addresses,
        secret=key,
        listener=listener,
        meter=queue.meter,
        peers=queue.peers,
        lost_after_s=lost_after_s,
        grace_s=queue.timeout_s,
        backlog_bytes=backlog_bytes,
    )
    try:
        post.wait_for_others(queue.size - 1, queue.timeout_s)
        # Who went on, and left again, before another had seen it connected would be missed there for the whole timeout.
        queue.submit("control/connected", lambda channel: channel.all_gather_same(told[:1])).wait()
    except BaseException:
        post.close(linger_s=0.0)
        raise
    return post


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        OSError: the address is not this machine's, or is taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener
