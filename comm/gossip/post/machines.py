"""A post between machines that no launcher has started: each knows the addresses of all."""

from __future__ import annotations

import hashlib
import socket

from pydantic import Field, SecretStr, model_validator

from thinwire.comm.address import split_address
from thinwire.comm.gossip.post.door import listen
from thinwire.comm.gossip.post.post import Post
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.settings import Settings


class MachinesSettings(Settings):
    """`machines: {machines: [10.0.0.1:7000, 10.0.0.2:7000], rank: 0, secret: ...}`: all but listen and rank alike.

    machines: host:port at which the others reach each machine; the first is machine 0.
    rank: which of them this one is.
    listen: host:port to accept connections at, such as 0.0.0.0:7000; default: this machine's own of `machines`.
    secret: text of 8 or more characters that all machines of the run share: each proves to each that it knows it.
      Nobody else gets in.
      What is sent is neither secret nor protected against whoever can change packets on the way: over the internet, use
      a tunnel such as WireGuard.
    lost_after_s: seconds of silence after which a machine is lost; shorter cuts cost nothing but time.
    wait_for: begin once so many machines, this one included, are connected; default: all. A machine that enters a run
      under way needs 2.
    wait_s: seconds to wait for them, at the start.
    """

    machines: tuple[str, ...] = Field(min_length=1)
    rank: int = Field(ge=0)
    listen: str = ""
    secret: SecretStr
    lost_after_s: float = Field(15.0, gt=0)
    wait_for: int | None = Field(None, ge=1)
    wait_s: float = Field(600.0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> MachinesSettings:
        size = len(self.machines)
        for address in (*self.machines, *filter(None, [self.listen])):
            host, port = split_address(address)
            if not host or (not port and address != self.listen):
                raise ValueError(f"machines: {address!r} is no address that others can reach; write host:port")
        if twice := [address for address in self.machines if self.machines.count(address) > 1]:
            raise ValueError(f"machines: {twice[0]} appears twice; each machine has an address of its own")
        secret = self.secret.get_secret_value()
        if len(secret) < 8:
            raise ValueError(f"secret: it has {len(secret)} characters; give a text of 8 or more that is hard to guess")
        if not secret.strip("*"):
            raise ValueError("secret: asterisks stand for it where settings are shown; give the text itself")
        if self.rank >= size:
            raise ValueError(f"rank: {self.rank} of {size} machines; allowed are 0 to {size - 1}")
        if self.wait_for is not None and self.wait_for > size:
            raise ValueError(f"wait_for: {self.wait_for} of {size} machines; allowed are 1 to {size}, or none for all")
        return self


def meet(settings: MachinesSettings, *, listener: socket.socket | None = None) -> Post:
    """A Post between machines that know one another's addresses.

    Returns once settings.wait_for machines are connected. Those that are not there by then count as lost until they
    come; whoever comes later, or comes back, takes its place again.

    Args:
        listener: listening socket of this machine, if there is one already; owned from here on.
    Raises:
        PeerLostError: fewer machines are there after wait_s; says what is wrong with each of the others.
        ValueError: this machine cannot listen at its address.
    """
    size = len(settings.machines)
    address = settings.listen or settings.machines[settings.rank]
    if listener is None and size > 1:
        try:
            listener = listen(*split_address(address))
        except OSError as error:
            raise ValueError(
                f"machines.listen: {address}: {error}; give an address of this machine that is free, such as "
                f"0.0.0.0:{split_address(address)[1]}, or another port here and in `machines`"
            ) from error
    levels = ["self" if rank == settings.rank else "world" for rank in range(size)]
    post = Post(
        settings.rank,
        [split_address(machine) for machine in settings.machines],
        secret=hashlib.sha256(b"thinwire gossip" + settings.secret.get_secret_value().encode()).digest(),
        listener=listener,
        meter=TrafficMeter(levels),
        lost_after_s=settings.lost_after_s,
        grace_s=settings.wait_s,
    )
    try:
        post.wait_for_others((settings.wait_for or size) - 1, settings.wait_s)
    except BaseException:
        post.close(linger_s=0.0)
        raise
    post.give_up_on_absent()
    return post
