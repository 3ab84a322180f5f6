"""What a lab looks like: how many hosts, how they are joined, who has which address."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from thinwire.comm.units import format_rate

MAX_HOSTS = 254
_NETWORK = "10.77.0."


class LabError(RuntimeError):
    """The lab cannot be built on this machine, or a request to it failed; the text says why and what to do."""


@dataclass(frozen=True)
class LabSpec:
    """The hosts and their links.

    hosts: how many; rate_bps: bits per second of every host's link, each direction, None for unlimited;
    delay_s: one-way seconds between two hosts; loss: probability that a frame between two hosts is lost;
    ranks_per_host: processes started on every host; cores_per_rank: processors that each has for itself, as machines of
    their own would; None = all share this machine's.
    """

    hosts: int = 4
    rate_bps: float | None = None
    delay_s: float = 0.0
    loss: float = 0.0
    ranks_per_host: int = 1
    cores_per_rank: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.hosts <= MAX_HOSTS:
            raise ValueError(f"hosts: {self.hosts} is outside 1 to {MAX_HOSTS}")
        if not 1 <= self.ranks_per_host <= 1024:
            raise ValueError(f"ranks_per_host: {self.ranks_per_host} is outside 1 to 1024")
        check_link(self.rate_bps, self.delay_s)
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss: {self.loss} is not a probability in [0, 1)")
        if self.cores_per_rank is not None and not 0.1 <= self.cores_per_rank <= 1024:
            raise ValueError(f"cores_per_rank: {self.cores_per_rank} is outside 0.1 to 1024 processors")

    @property
    def needs_delay(self) -> bool:
        """Whether the links do something that a token bucket cannot: wait or lose."""
        return self.delay_s > 0 or self.loss > 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.hosts * self.ranks_per_host

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{self.hosts} hosts x {self.ranks_per_host} ranks", format_rate(self.rate_bps)]
        if self.delay_s:
            parts.append(f"{self.delay_s * 1e3:g} ms one way")
        if self.loss:
            parts.append(f"{self.loss:.3%} loss")
        if self.cores_per_rank is not None:
            parts.append(f"{self.cores_per_rank:g} processors each rank")
        return ", ".join(parts)

    def to_json(self) -> str:
        """The inverse of from_json."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LabSpec:
        """The inverse of to_json."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**fields)


def check_link(rate_bps: float | None, delay_s: float) -> None:
    """Raise ValueError for a rate or delay that no link of the lab can have."""
    if rate_bps is not None and not 8e3 <= rate_bps <= 1e12:
        raise ValueError(f"rate_bps: {rate_bps} is outside 8e3 to 1e12 bits per second; None means unlimited")
    if not 0 <= delay_s <= 10:
        raise ValueError(f"delay_s: {delay_s} is outside 0 to 10 seconds")


def host_name(host: int) -> str:
    """The name of host number `host`, which is also the name of its port on the switch."""
    return f"host{host}"


def address(host: int) -> str:
    """The IPv4 address of host number `host`; every lab may use the same ones, as none sees another."""
    return f"{_NETWORK}{host + 1}"


def mac(host: int) -> str:
    """The Ethernet address of host number `host`; its last byte is what the relay reads."""
    return f"02:77:00:00:00:{host:02x}"


def host_number(text: str) -> int:
    """The host meant by "host2", its address, or "2". Raises ValueError."""
    digits = text.removeprefix("host").removeprefix(_NETWORK)
    if not digits.isdecimal():
        raise ValueError(f"HOST: {text!r} is no host; write host0, host1, ... (or 0, 1, ...)")
    return int(digits) - text.startswith(_NETWORK)


def hosts_file(hosts: int) -> str:
    """Text of /etc/hosts inside. The mapped addresses spare torch's dual-stack sockets a warning on every rank."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
    lines += [f"{address(host)} {host_name(host)}" for host in range(hosts)]
    lines += [f"::ffff:{address(host)} {host_name(host)}.mapped" for host in range(hosts)]
    return "\n".join(lines) + "\n"
