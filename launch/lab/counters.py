"""What the network interfaces counted, read by the process that asks. Imports no torch; answers {} off Linux."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class InterfaceCounters:
    """Bytes (headers of every frame included) and packets of one interface since it was made."""

    rx_bytes: int
    rx_packets: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_dropped: int

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)

    def __sub__(self, earlier: InterfaceCounters) -> InterfaceCounters:
        now, before = self.as_dict(), earlier.as_dict()
        return InterfaceCounters(**{name: now[name] - before[name] for name in now})


def parse_net_dev(text: str) -> dict[str, InterfaceCounters]:
    """The interfaces in the text of a /proc/net/dev file."""
    found = {}
    for line in text.splitlines()[2:]:
        name, _, rest = line.partition(":")
        values = [int(word) for word in rest.split()]
        found[name.strip()] = InterfaceCounters(
            rx_bytes=values[0],
            rx_packets=values[1],
            rx_dropped=values[3],
            tx_bytes=values[8],
            tx_packets=values[9],
            tx_dropped=values[11],
        )
    return found


def interface_bytes(interface: str = "eth0") -> InterfaceCounters | None:
    """Counters of `interface` in the network namespace of the calling process; None where there is no such thing.

    On a host of the lab, eth0 carries all traffic between hosts and nothing else; traffic between ranks of one
    host goes over lo. (/proc/self/net follows the process; /sys/class/net would show another namespace.)
    """
    path = Path("/proc/self/net/dev")
    return parse_net_dev(path.read_text()).get(interface) if path.exists() else None
