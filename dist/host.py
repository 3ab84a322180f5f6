"""Which machine a process runs on, told so that no two machines look the same. Imports no torch."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Host:
    """A machine, or a container or network namespace that has a host name of its own.

    The name alone is not enough, because cloned machines share it; nor is the boot id, because containers share it.
    """

    name: str
    boot_id: str


def this_host() -> Host:
    """The host that this process runs on."""
    try:
        boot_id = _BOOT_ID.read_text().strip()
    except OSError:  # not Linux: the hardware address differs between machines just as well
        boot_id = f"{uuid.getnode():012x}"
    return Host(platform.node() or "localhost", boot_id)


def distinct_names(hosts: Sequence[Host]) -> tuple[str, ...]:
    """One name for each entry; equal exactly where the hosts are. A name that two machines share gets their boot id."""
    machines_of: dict[str, set[Host]] = {}
    for host in hosts:
        machines_of.setdefault(host.name, set()).add(host)
    return tuple(h.name if len(machines_of[h.name]) == 1 else f"{h.name}({h.boot_id})" for h in hosts)
