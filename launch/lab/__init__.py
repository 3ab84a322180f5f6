"""A slow cluster on one machine: emulated hosts, limited links, faults on demand, exact byte counters."""

from __future__ import annotations

from thinwire.launch.lab.client import Lab, Links
from thinwire.launch.lab.control import running_labs
from thinwire.launch.lab.counters import InterfaceCounters, interface_bytes
from thinwire.launch.lab.run import Run
from thinwire.launch.lab.spec import LabError, LabSpec
from thinwire.launch.lab.why_not import why_not, why_not_cores

__all__ = [
    "InterfaceCounters",
    "Lab",
    "LabError",
    "LabSpec",
    "Links",
    "Run",
    "interface_bytes",
    "running_labs",
    "why_not",
    "why_not_cores",
]
