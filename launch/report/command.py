"""`thinwire report`: where the time and the bytes of runs went."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from thinwire.comm.units import parse_rate
from thinwire.launch.complaint import complain, is_ours
from thinwire.launch.report.outcome import outcome_of
from thinwire.launch.report.report import write_report
from thinwire.launch.report.run import ReportError, read_runs, with_modelled_link
from thinwire.launch.report.table import print_table

USER_ERROR = 2


def report(folders: Sequence[Path], *, out: Path | None, anyway: bool, modelled_link: str | None) -> int:
    """Print the table of the runs and write the page; returns the exit code.

    0: written. 2: runs that cannot be read or compared, told in one message.
    """
    try:
        runs = read_runs(folders)
        if modelled_link is not None:
            rate_bps = parse_rate(modelled_link, "--modelled-link")
            runs = [with_modelled_link(run, rate_bps) for run in runs]
        target = out or (folders[0] / "report" if len(folders) == 1 else Path("report"))
        if target.exists() and not target.is_dir():
            raise ReportError(f"--out: {target} is a file; give a folder")
        written = write_report(runs, target, anyway=anyway)
        outcomes = [outcome_of(run) for run in runs]
    except ValueError as error:
        if not is_ours(error):
            raise
        return complain(error, USER_ERROR)
    except OSError as error:
        return complain(f"--out: {error}", USER_ERROR)
    print_table(outcomes, title=", ".join(run.label for run in runs))
    for note in written.notes:
        print(f"note: {note}", file=sys.stderr)
    others = len(written.files) - 1
    print(f"\n{written.page}: open it in a browser; beside it {others} pictures and traces")
    return 0
