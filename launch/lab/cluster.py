"""The emulated machines of one lab, as the guardian holds them: hosts, links and the relay."""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.launch.lab import syscalls
from thinwire.launch.lab.counters import InterfaceCounters, parse_net_dev
from thinwire.launch.lab.namespace import Namespace, create, gain_privileges
from thinwire.launch.lab.network import Tools, build_host, build_switch, set_port_open, set_rate
from thinwire.launch.lab.relay import Port, Relay
from thinwire.launch.lab.spec import LabError, LabSpec, check_link, host_name, hosts_file


@dataclass
class Link:
    """How one host is joined to the others at this moment."""

    rate_bps: float | None
    delay_s: float
    cut: bool = False


class Cluster:
    """Builds the hosts of `spec`; everything vanishes with this process. Raises LabError."""

    def __init__(self, folder: Path, spec: LabSpec) -> None:
        self._spec = spec
        self._links = [Link(spec.rate_bps, spec.delay_s) for _ in range(spec.hosts)]
        self._relay_pid = 0
        self._tools = Tools(rootless=gain_privileges())
        names = [host_name(index) for index in range(spec.hosts)]
        (folder / "hosts").write_text(hosts_file(spec.hosts))
        self._hosts = [create(name, str(folder / "hosts"), with_tap=spec.needs_delay) for name in names]
        self._switch: Namespace | None = None
        if not spec.needs_delay:
            self._switch = create("switch", str(folder / "hosts"), with_tap=False)
            build_switch(self._tools, self._switch, self._hosts)
        for index, namespace in enumerate(self._hosts):
            build_host(self._tools, namespace, index, spec)
            if spec.rate_bps is not None:
                self._set_rate(index, None, spec.rate_bps)
        if spec.needs_delay:
            self._start_relay()

    def host(self, index: int) -> Namespace:
        """Namespaces of host `index`. Raises LabError."""
        if not 0 <= index < len(self._hosts):
            raise LabError(f"host{index} does not exist: this lab has host0 to host{len(self._hosts) - 1}")
        return self._hosts[index]

    def change_link(self, host: int, **changes: Any) -> None:
        """Set rate_bps, delay_s or cut of the link of `host`; what is not named stays. Raises LabError, ValueError."""
        self.host(host)
        link = self._links[host]
        unknown = changes.keys() - {"rate_bps", "delay_s", "cut"}
        if unknown:
            raise LabError(f"a link has no {sorted(unknown)[0]!r}; it has rate_bps, delay_s and cut")
        new = Link(**{**vars(link), **changes})
        check_link(new.rate_bps, new.delay_s)
        if new.delay_s != link.delay_s and not self._relay_pid:
            raise LabError(
                "this lab was started without --delay and --loss, so its links cannot wait; start it with --delay"
            )
        self._set_rate(host, link.rate_bps, new.rate_bps)
        if self._switch is not None and new.cut != link.cut:
            set_port_open(self._tools, self._switch, host, is_open=not new.cut)
        if self._relay_pid:
            self._relay_control.send(json.dumps({"host": host, **vars(new)}).encode())
        self._links[host] = new

    def counters(self) -> list[InterfaceCounters]:
        """What eth0 of every host has counted."""
        return [parse_net_dev(namespace.net_dev())["eth0"] for namespace in self._hosts]

    def describe(self) -> dict[str, Any]:
        """Spec and present links, for JSON."""
        return {"spec": json.loads(self._spec.to_json()), "links": [vars(link) for link in self._links]}

    def pids(self) -> list[int]:
        """Processes that carry the network."""
        return [self._relay_pid] if self._relay_pid else []

    def relay_ended(self) -> bool:
        """Whether the relay, without which no host reaches another, has died."""
        return bool(self._relay_pid) and os.waitpid(self._relay_pid, os.WNOHANG)[0] != 0

    def close(self) -> None:
        """Stop the relay; the rest needs no closing."""
        if self._relay_pid:
            self._relay_control.close()

    def _set_rate(self, host: int, old_bps: float | None, new_bps: float | None) -> None:
        if old_bps == new_bps:
            return
        set_rate(self._tools, self._hosts[host], "eth0", old_bps, new_bps)
        if self._switch is not None:
            set_rate(self._tools, self._switch, host_name(host), old_bps, new_bps)

    def _start_relay(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        guardian_pid = os.getpid()
        self._relay_pid = os.fork()
        if self._relay_pid:
            theirs.close()
            self._relay_control = ours
            return
        try:
            syscalls.die_with_parent(guardian_pid)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            ours.close()
            ports = []
            for namespace, link in zip(self._hosts, self._links, strict=True):
                assert namespace.tap_fd is not None
                ports.append(Port(namespace.tap_fd, link.rate_bps, link.delay_s))
            Relay(ports, self._spec.loss, theirs).run()
        finally:
            os._exit(1)
