"""The command line. Imports no torch: each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="thinwire",
    help="Train neural networks over thin wires.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at configuration files.", no_args_is_help=True)
app.add_typer(config_app, name="config")

Config = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that replace the file's: a.b=c", show_default=False)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from thinwire import __version__

        typer.echo(f"thinwire {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a model: alone, or as one rank under torchrun, mpirun, srun or the lab."""
    from thinwire.launch.train import main as run

    raise typer.Exit(run(config, overrides or []))


@config_app.command("show")
def config_show(config: Config, overrides: Overrides = None) -> None:
    """Print the fully resolved configuration."""
    from thinwire.launch.train import show

    raise typer.Exit(show(config, overrides or []))


def main() -> None:
    """Entry point of the `thinwire` script."""
    app(args=sys.argv[1:])


if __name__ == "__main__":
    main()
