"""How the findings look: colours and columns on a terminal, one greppable line each elsewhere, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thinwire.comm.rank_names import ranges
from thinwire.launch.doctor.finding import Finding
from thinwire.launch.doctor.ranks import MUST_AGREE, Comparison

_MARKS = {"ok": ("ok", "green"), "limited": ("--", "yellow"), "problem": ("!!", "bold red")}


def print_findings(findings: Sequence[Finding], out: TextIO = sys.stdout) -> None:
    """All findings, and one line on what they come to."""
    if out.isatty():
        console = Console(file=out, highlight=False)
        table = Table.grid(padding=(0, 1))
        for _ in range(2):
            table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            mark, style = _MARKS[finding.state]
            table.add_row(f"[{style}]{mark}[/]", f"[bold]{finding.topic}[/]", _rich_text(finding, style))
        console.print(table)
        console.print(f"\n{escape(_summary(findings))}")
        return
    for finding in findings:
        print(f"{_MARKS[finding.state][0]} {finding.topic:<11} {'; '.join(_parts(finding))}", file=out)
    print(_summary(findings), file=out)


def print_comparison(comparison: Comparison, out: TextIO = sys.stdout) -> None:
    """One row for each host, one for each thing that ranks disagree on, and a line on what it comes to."""
    terminal = out.isatty()
    hosts = [(row.host, ranges(row.ranks), row.gpus, row.network) for row in comparison.hosts]
    _print_table(("host", "ranks", "gpus", "network"), hosts, out, terminal)
    rows = []
    for difference in comparison.differences:
        odd = difference.odd_ranks()
        for i, (value, ranks) in enumerate(difference.values):
            differs = "differs" if not odd or set(ranks) <= set(odd) else ""
            rows.append(("" if i and terminal else difference.topic, value, ranges(ranks), differs))
    if rows:
        print(file=out)
        _print_table(("topic", "found", "on ranks", ""), rows, out, terminal)
    print(file=out)
    for line in _verdicts(comparison):
        print(line, file=out)


def print_json(findings: Sequence[Finding], comparison: Comparison | None, ok: bool, out: TextIO = sys.stdout) -> None:
    """Everything, as one JSON object."""
    answer = {"ok": ok, "findings": [asdict(finding) for finding in findings]}
    if comparison is not None:
        answer["job"] = asdict(comparison)
    print(json.dumps(answer, indent=2), file=out)


def _parts(finding: Finding) -> list[str]:
    parts = [finding.found]
    if finding.detail:
        parts.append(finding.detail)
    if finding.without:
        parts.append(f"prevents: {finding.without}")
    if finding.remedy:
        parts.append(f"remedy: {finding.remedy}")
    return parts


def _rich_text(finding: Finding, style: str) -> str:
    lines = [escape(finding.found) + f"[dim]; {escape(finding.detail)}[/]" * bool(finding.detail)]
    if finding.without:
        lines.append(f"[{style}]prevents:[/] {escape(finding.without)}")
    if finding.remedy:
        lines.append(f"[{style}]remedy:[/] {escape(finding.remedy)}")
    return "\n".join(lines)


def _summary(findings: Sequence[Finding]) -> str:
    problems = [finding.topic for finding in findings if finding.state == "problem"]
    limited = [finding.topic for finding in findings if finding.state == "limited"]
    if problems:
        return f"thinwire cannot train here before this is mended: {', '.join(problems)}."
    text = "thinwire can train here."
    return f"{text} Not available: {', '.join(limited)}." if limited else text


def _verdicts(comparison: Comparison) -> list[str]:
    lines = []
    if comparison.missing_ranks:
        lines.append(
            f"No answer from rank {ranges(comparison.missing_ranks)} of {comparison.world_size}: its process has not "
            "started, cannot import torch, or does not reach the head node; look at its own output."
        )
    for rank, finding in comparison.problems:
        lines.append(f"Rank {rank}: {finding.topic}: {'; '.join(_parts(finding))}")
    for difference in comparison.differences:
        odd = difference.odd_ranks()
        who = f"rank {ranges(odd)} differs" if odd else "the ranks differ"
        refused = difference.topic in MUST_AGREE
        what = (
            "Training refuses to start: install the same on every rank." if refused else "Training starts all the same."
        )
        lines.append(f"{difference.topic}: {who}. {what}")
    return lines or [f"All {comparison.world_size} ranks answer and have found the same."]


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], out: TextIO, terminal: bool) -> None:
    if terminal:
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
