"""Runs benchmarks/partition_host.py on the hosts of a lab, for all benchmarks of partitioning."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.launch.lab import Lab

HOST = Path(__file__).resolve().parent / "partition_host.py"


@dataclass(frozen=True)
class Machine:
    """The lab's hosts and links. levels: of the ranks, by name and size, fastest first."""

    hosts: int
    ranks_per_host: int
    rate_bps: float | None
    levels: tuple[tuple[str, int], ...]

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host


def run(machine: Machine, settings: Mapping[str, Any], *, timeout_s: float = 600.0) -> list[dict[str, Any]]:
    """What each rank wrote. Raises SystemExit where a rank fails."""
    whole = {
        "levels": machine.levels,
        "ranks_per_host": machine.ranks_per_host,
        "timeout_s": 300.0,
        "bf16": False,
        **settings,
    }
    print(f"--- {machine.hosts} hosts x {machine.ranks_per_host} ranks: {json.dumps(settings)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with Lab(hosts=machine.hosts, rate_bps=machine.rate_bps, ranks_per_host=machine.ranks_per_host) as lab:
            command = [sys.executable, str(HOST), folder, json.dumps(whole)]
            code = lab.start(command, output="all").wait(timeout_s)
        if code:
            raise SystemExit(f"{settings} failed with exit code {code}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(machine.ranks)]


def per_host(machine: Machine, values: Sequence[float]) -> list[float]:
    """Sums of the values of each host's ranks."""
    return [
        sum(values[host * machine.ranks_per_host : (host + 1) * machine.ranks_per_host])
        for host in range(machine.hosts)
    ]
