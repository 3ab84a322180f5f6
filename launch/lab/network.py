"""The wires: a switch, one link per host, and the token buckets that make them slow. Speaks iproute2.

A rate limits frames as the interfaces count them: 14 bytes of Ethernet header and all above, so that a full frame of
1514 bytes carries 1448 of TCP (4.6 %), and acknowledgements come on top. Segmentation offload is off, so that
every frame is counted as one; in soft interrupts, 1 Gbit/s costs at most a fifth of a core.

Frames may overtake one another where several processors carry them, at gigabits often, as on no cable. TCP takes that
for loss, and its windows may stay small when the link becomes slower afterwards. Receive packet steering to a single
processor keeps the order, but was measured to cost more than it saves: its queue overflows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from thinwire.launch.lab import syscalls
from thinwire.launch.lab.namespace import Namespace
from thinwire.launch.lab.spec import LabError, LabSpec, address, host_name, mac

_SEARCH_PATH = os.pathsep.join(["/usr/sbin", "/sbin", "/usr/local/sbin", os.defpath])
_FRAME_BYTES = 1514
# A bucket lets a late timer catch up: 3 ms of traffic, which a message shorter than that does not wait for.
_BURST_S = 0.003
# What a full switch port holds before it drops, as time on the wire and at least this many bytes.
_QUEUE_S = 0.4
_MIN_QUEUE_BYTES = 1 << 20


def find_tool(name: str) -> str:
    """Path of an iproute2 program. Raises LabError."""
    found = shutil.which(name) or shutil.which(name, path=_SEARCH_PATH)
    if found is None:
        raise LabError(f"the program `{name}` is missing: install iproute2 (apt-get install iproute2)")
    return found


@dataclass
class Tools:
    """Runs iproute2 programs inside a namespace."""

    rootless: bool

    def batch(self, program: str, namespace: Namespace, lines: Iterable[str], fds: Iterable[int] = ()) -> None:
        """Give `lines` to `program -batch -` inside `namespace`; `fds` stay open in it. Raises LabError."""

        def enter() -> None:
            syscalls.setns(namespace.net_fd)
            if self.rootless:
                syscalls.keep_net_admin_over_exec()

        text = "\n".join(lines) + "\n"
        argv = [find_tool(program), "-batch", "-"]
        # Only one thread runs here, which is what makes preexec_fn safe.
        done = subprocess.run(
            argv, input=text, text=True, capture_output=True, preexec_fn=enter, pass_fds=tuple(fds), check=False
        )
        if done.returncode != 0:
            raise LabError(f"{program} failed in {namespace.name}: {done.stderr.strip()} (batch: {text.strip()})")


def burst_bytes(rate_bps: float) -> int:
    """Depth of a token bucket of `rate_bps`, bytes."""
    return max(4 * _FRAME_BYTES, int(rate_bps / 8 * _BURST_S))


def queue_bytes(rate_bps: float) -> int:
    """What may wait for a link of `rate_bps` before frames are dropped, bytes."""
    return max(_MIN_QUEUE_BYTES, int(rate_bps / 8 * _QUEUE_S))


def set_rate(tools: Tools, namespace: Namespace, interface: str, old_bps: float | None, new_bps: float | None) -> None:
    """Limit what `interface` of `namespace` sends; None stands for no limit. Raises LabError.

    Frames that wait for a link which becomes slower are lost, as when a port falls back to a lower rate: TCP hands many
    frames down as one packet, and one that is larger than the new bucket would never leave it, nor let others pass.
    """
    lines = []
    falls = old_bps is not None and (new_bps is None or burst_bytes(new_bps) < burst_bytes(old_bps))
    if falls:
        lines.append(f"qdisc del dev {interface} root")
    if new_bps is not None:
        verb = "add" if old_bps is None or falls else "change"
        burst, limit = burst_bytes(new_bps), queue_bytes(new_bps)
        lines.append(f"qdisc {verb} dev {interface} root tbf rate {new_bps:.0f}bit burst {burst} limit {limit}")
    tools.batch("tc", namespace, lines)


def set_port_open(tools: Tools, switch: Namespace, host: int, *, is_open: bool) -> None:
    """Let the switch forward frames from and to `host`, or swallow them while its link stays up. Raises LabError."""
    forwarding, disabled = 3, 0
    state = forwarding if is_open else disabled
    tools.batch("bridge", switch, [f"link set dev {host_name(host)} state {state}"])


def build_switch(tools: Tools, switch: Namespace, hosts: list[Namespace]) -> None:
    """A bridge in `switch` with one veth to eth0 of every host. Static tables: it never floods, learns or asks."""
    lines = ["link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0"]
    for index, host in enumerate(hosts):
        port = host_name(index)
        peer = f"peer name eth0 netns /proc/self/fd/{host.net_fd}"
        lines.append(f"link add {port} type veth {peer}")
        lines.append(f"link set {port} addrgenmode none master br0")
        lines.append(f"link set {port} up")
    lines += ["link set br0 addrgenmode none", "link set br0 up"]
    tools.batch("ip", switch, lines, fds=[host.net_fd for host in hosts])
    tables = []
    for index in range(len(hosts)):
        tables.append(f"link set dev {host_name(index)} learning off flood off mcast_flood off")
        tables.append(f"fdb replace {mac(index)} dev {host_name(index)} master static")
    tools.batch("bridge", switch, tables)


def build_host(tools: Tools, namespace: Namespace, index: int, spec: LabSpec) -> None:
    """Address, neighbours and loopback of one host whose eth0 exists.

    Neighbours are permanent: no ARP frames to blur the counters, and a cut link is a black hole for good
    (an unanswered ARP request would turn it into "no route to host" after three seconds).
    """
    lines = ["link set lo up", "link set eth0 addrgenmode none"]
    lines += [f"link set eth0 address {mac(index)}", "link set eth0 up"]
    lines.append(f"addr add {address(index)}/24 dev eth0")
    for other in range(spec.hosts):
        if other != index:
            lines.append(f"neigh replace {address(other)} lladdr {mac(other)} dev eth0 nud permanent")
    tools.batch("ip", namespace, lines)
    namespace.call(_tune_host)


def _tune_host() -> None:
    # Loss-based TCP, as nearly everywhere, whatever this machine itself prefers: of these, reno is always allowed.
    sysctl = Path("/proc/sys/net/ipv4")
    allowed = (sysctl / "tcp_allowed_congestion_control").read_text().split()
    (sysctl / "tcp_congestion_control").write_text("cubic" if "cubic" in allowed else "reno")
    # Segments are cut before the interface counts them, so that the headers of each frame are in its counters.
    syscalls.disable_segmentation_offload("eth0")
