"""What a probe found, as tables for people. Imports no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from thinwire.comm.units import format_bytes

if TYPE_CHECKING:
    from thinwire.dist.plan.cluster import Cluster
    from thinwire.dist.probe.probe import Probe
    from thinwire.dist.probe.records import CollectiveTime

Matrix = Sequence[Sequence[float | None]]
_WIDEST_MATRIX = 16  # ranks


def print_probe(found: Probe) -> None:
    """All tables, and what the figures mean for a plan."""
    wide = sys.stdout.isatty()
    console = Console() if wide else Console(width=160, color_system=None)
    cluster, measured = found.cluster, found.cluster.measured
    assert measured is not None
    assert measured.pairs is not None
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items())
    console.print(f"probed in {sum(found.seconds.values()):.1f} s: {took}\n", highlight=False)
    rates = [[None if bps is None else bps / 1e6 for bps in row] for row in measured.pairs.bps]
    delays = [[None if s is None else 1e3 * s for s in row] for row in measured.pairs.latency_s]
    _print_matrix(console, "bandwidth from rank (row) to rank (column), Mbit/s of payload", rates, min)
    _print_matrix(console, "latency between ranks, one way, ms", delays, max)
    console.print("collectives, seconds of the slowest rank")
    console.print(_collectives(measured.collectives))
    console.print("levels, as the all-reduces above explain best")
    console.print(_levels(cluster))
    console.print("compressors on one rank while all work, million elements per second")
    console.print(_codecs(cluster))
    for speed in measured.computes:
        console.print(
            f"one micro-batch of {speed.micro_batch} on every rank at once: forward {1e3 * speed.forward_s:.1f} ms, "
            f"backward {1e3 * speed.backward_s:.1f} ms; optimizer {1e3 * speed.optimizer_s:.1f} ms; a step in which "
            f"the ranks wait for one another takes {1e3 * speed.coupled_s:.1f} ms more",
            highlight=False,
        )
    device = cluster.device
    console.print(
        f"{device.name}: matrix products at {device.peak_flops / 1e9:.4g} GFLOP/s"
        + (f", of which the run gets {device.utilisation:.0%}" if measured.computes else "")
        + (f" ({measured.drift:+.0%} from the probe's beginning to its end)" if measured.drift is not None else "")
        + f"; {measured.cores_per_rank:.3g} cores per rank; each MB that is sent keeps one busy for "
        f"{1e9 * measured.cpu_s_per_byte:.3g} ms",
        highlight=False,
    )
    for remark in found.remarks:
        console.print(remark, highlight=False)


def _print_matrix(console: Console, title: str, matrix: Matrix, worst: Callable[[Iterable[float]], float]) -> None:
    """The matrix; of many ranks its extremes and the worst pair."""
    known = {(a, b): value for a, row in enumerate(matrix) for b, value in enumerate(row) if value is not None}
    if len(matrix) > _WIDEST_MATRIX:
        (a, b), value = next((pair, v) for pair, v in known.items() if v == worst(known.values()))
        ordered = sorted(known.values())
        console.print(
            f"{title}: {ordered[0]:.4g} to {ordered[-1]:.4g}, median {ordered[len(ordered) // 2]:.4g}; "
            f"worst from {a} to {b}: {value:.4g}",
            highlight=False,
        )
        return
    console.print(title, highlight=False)
    table = Table()
    table.add_column("")
    for rank in range(len(matrix)):
        table.add_column(str(rank), justify="right")
    for rank, row in enumerate(matrix):
        table.add_row(str(rank), *("-" if value is None else f"{value:.4g}" for value in row))
    console.print(table)


def _collectives(times: Sequence[CollectiveTime]) -> Table:
    table = Table()
    for name in ("collective", "level", "ranks", "size", "median ms", "p90 ms", "algorithm Mbit/s", "bus Mbit/s"):
        table.add_column(name, justify="left" if name in ("collective", "level") else "right")
    for time in times:
        table.add_row(
            time.operation,
            time.level,
            str(time.ranks),
            format_bytes(time.size_bytes),
            f"{1e3 * time.median_s:.3g}",
            f"{1e3 * time.p90_s:.3g}",
            f"{time.algorithm_bps / 1e6:.4g}",
            f"{time.bus_bps / 1e6:.4g}",
        )
    return table


def _levels(cluster: Cluster) -> Table:
    table = Table()
    for name in ("level", "ranks in a group", "ranks on a link", "link Mbit/s", "latency ms"):
        table.add_column(name, justify="left" if name == "level" else "right")
    for level in cluster.levels:
        table.add_row(
            level.name,
            str(level.size),
            str(level.ranks_per_link),
            f"{level.link_bps / 1e6:.4g}",
            f"{1e3 * level.latency_s:.3g}",
        )
    return table


def _codecs(cluster: Cluster) -> Table:
    table = Table()
    for name in ("codec", "encode", "decode", "handle", "encode call us", "decode call us", "handle call us"):
        table.add_column(name, justify="left" if name == "codec" else "right")
    assert cluster.measured is not None
    for codec, speed in cluster.measured.codecs.items():
        settings = json.loads(codec)
        kind = settings.pop("kind")
        given = " ".join(f"{key}={value}" for key, value in settings.items())
        table.add_row(
            f"{kind} {given}".strip(),
            _millions(speed.encode_s),
            _millions(speed.decode_s),
            _millions(speed.handle_s),
            f"{1e6 * speed.encode_call_s:.0f}",
            f"{1e6 * speed.decode_call_s:.0f}",
            f"{1e6 * speed.handle_call_s:.0f}",
        )
    return table


def _millions(seconds: float) -> str:
    return f"{1e-6 / seconds:.4g}" if seconds > 0 else "-"
