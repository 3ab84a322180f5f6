"""`thinwire onebyte ...`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

onebyte_app = typer.Typer(help="Logs of one-byte runs: replay, verify, inspect.", no_args_is_help=True)

LogFile = Annotated[Path, typer.Argument(metavar="LOG", help="Log of a one-byte run.", show_default=False)]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
_BASE_HELP = "What the run began at: a .safetensors file, a Hugging Face folder, a checkpoint or a run folder."


@onebyte_app.command("replay")
def onebyte_replay(
    log: LogFile,
    base: Annotated[Path, typer.Option(metavar="MODEL", help=_BASE_HELP)],
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the weights go.")],
    until: Annotated[int | None, typer.Option(help="Rounds to carry out.", show_default="all")] = None,
    step_by_step: Annotated[
        bool, typer.Option("--step-by-step", help="One pass over the weights for each round: same bits, slower.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Make the weights of a run again from its base and its log."""
    from thinwire.launch.onebyte import replay as run

    raise typer.Exit(run(log, base, out, until=until, step_by_step=step_by_step, device=device))


@onebyte_app.command("verify")
def onebyte_verify(
    log: LogFile,
    base: Annotated[Path | None, typer.Option(metavar="MODEL", help=_BASE_HELP, show_default=False)] = None,
    device: Device = "cpu",
) -> None:
    """Check every byte of a log and, with the base, the weights at every snapshot."""
    from thinwire.launch.onebyte import verify as run

    raise typer.Exit(run(log, base, device=device))


@onebyte_app.command("inspect")
def onebyte_inspect(
    log: LogFile, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False
) -> None:
    """Say what a log holds: who took part when, what was sent, how large it is."""
    from thinwire.launch.onebyte import inspect as run

    raise typer.Exit(run(log, as_json))
