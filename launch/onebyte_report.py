"""How the summary of a log looks: columns on a terminal, plain lines elsewhere, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thinwire.comm.onebyte.summary import Stay, Summary

_BAR_WIDTH = 40


def print_json(summary: Summary, out: TextIO) -> None:
    """Everything, as one JSON object."""
    print(json.dumps(asdict(summary), indent=2), file=out)


def print_summary(summary: Summary, out: TextIO) -> None:
    """What, who, and how large."""
    rows = list(_facts(summary))
    if out.isatty():
        console = Console(file=out, highlight=False)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for topic, text in rows:
            table.add_row(topic, escape(text))
        console.print(table)
    else:
        for topic, text in rows:
            print(f"{topic:<13} {text}", file=out)
    if summary.stays:
        print(file=out)
        head = ("slot", "machine", "address", "samples", "from round", "until", "contributed to", "absent slopes")
        _print_table(head, [_stay(summary, stay) for stay in summary.stays], out)
    if summary.contributions:
        print(file=out)
        _print_table(("slope", "codes", ""), list(_histogram(summary)), out)


def _facts(s: Summary) -> Iterable[tuple[str, str]]:
    yield "run", f"{s.run_id[:16]}, seed {s.seed}, base weights {s.base_hash[:16]}"
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in s.dtypes.items())
    yield "weights", f"{s.tensors} tensors, {kinds}"
    yield "numerics", ", ".join(f"{name} {value}" for name, value in s.numerics.items())
    yield "rounds", f"{s.rounds:,}"
    if s.rounds:
        spread = (
            f"{s.contributions_least} to {s.contributions_most} in a round, {s.contributions / s.rounds:.4g} on average"
        )
        yield "contributions", f"{s.contributions:,}: {spread}"
    if s.rates:
        first, last, least, most = s.rates
        changed = f"{first:.6g} first, {last:.6g} last, {least:.6g} to {most:.6g}"
        yield "rate", changed if s.rate_changes else f"{first:.6g} throughout"
    if s.contributions:
        counts = (("zero", s.zero), ("saturated", s.saturated), ("absent", s.absent))
        yield "codes", ", ".join(f"{count:,} {name} ({count / s.contributions:.2%})" for name, count in counts)
    if s.last_snapshot:
        after, hashed = s.last_snapshot
        yield "snapshots", f"{s.snapshots}, the last after {after:,} rounds: {hashed}"
    else:
        yield "snapshots", "none"
    per_round = f", {s.round_bytes / s.rounds:.4g} for a round" if s.rounds else ""
    yield (
        "size",
        f"{s.size_bytes:,} bytes: {s.header_bytes:,} before the first record, {s.round_bytes:,} of rounds{per_round}",
    )
    times = s.fp32_gradient_bytes / s.size_bytes
    told = f"{times:,.0f}" if times >= 100 else f"{times:.3g}"
    yield (
        "beside",
        f"one fp32 gradient of these weights has {s.fp32_gradient_bytes:,} bytes, {told} times this file",
    )
    if s.torn_bytes:
        yield "torn", f"the last {s.torn_bytes} bytes of the file are a record that its writer did not finish"
    yield "chain", f"{s.chain} after {s.records:,} records: every byte is as it was written"


def _stay(s: Summary, stay: Stay) -> tuple[str, ...]:
    end = "the end" if stay.end is None else f"{stay.end:,}"
    there = (s.rounds if stay.end is None else stay.end) - stay.first
    contributed = f"{stay.rounds:,} of {there:,}"
    return (
        str(stay.slot),
        stay.name,
        stay.address or "-",
        str(stay.samples),
        f"{stay.first:,}",
        end,
        contributed,
        f"{stay.absent:,}",
    )


def _histogram(s: Summary) -> Iterable[tuple[str, str, str]]:
    """Slopes by octave of their size, zeros and absent ones first."""
    rows = [("absent", s.absent), ("zero", s.zero)]
    if s.octaves:
        rows += [(f"2^{octave}", s.octaves.get(octave, 0)) for octave in range(min(s.octaves), max(s.octaves) + 1)]
    most = max(count for _, count in rows)
    for name, count in rows:
        yield name, f"{count:,}", "#" * -(-count * _BAR_WIDTH // most)


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], out: TextIO) -> None:
    if out.isatty():
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in head:
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        Console(file=out, highlight=False).print(table)
        return
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=out)
