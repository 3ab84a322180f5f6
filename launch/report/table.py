"""Runs side by side on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thinwire.launch.report.outcome import RunOutcome, rows_of


def print_table(outcomes: Sequence[RunOutcome], *, title: str) -> None:
    """Print one column per run, the first being what the others are compared with."""
    wide = sys.stdout.isatty()
    console = Console() if wide else Console(width=40 + 18 * len(outcomes), color_system=None)
    table = Table(title=escape(title), title_justify="left")
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        table.add_column(escape(outcome.label), justify="right", overflow="fold")
    for name, cell in rows_of(outcomes):
        table.add_row(name, *(cell(outcome) for outcome in outcomes))
    console.print(table)
