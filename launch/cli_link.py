"""`thinwire link ...`. Imports no torch."""

from __future__ import annotations

from typing import Annotated

import typer

link_app = typer.Typer(help="Cut, slow and restore the links of a running lab.", no_args_is_help=True)

LinkHost = Annotated[str, typer.Argument(help="Whose link: host2.")]
LabId = Annotated[str | None, typer.Option("--lab", help="Id of the lab, if several run.", show_default="the only one")]


@link_app.command("cut")
def link_cut(host: LinkHost, lab_id: LabId = None) -> None:
    """Black-hole a link: frames vanish, in both directions."""
    from thinwire.launch.lab.command import link

    raise typer.Exit(link("cut", host, rate=None, delay=None, lab_id=lab_id))


@link_app.command("restore")
def link_restore(host: LinkHost, lab_id: LabId = None) -> None:
    """Undo a cut."""
    from thinwire.launch.lab.command import link

    raise typer.Exit(link("restore", host, rate=None, delay=None, lab_id=lab_id))


@link_app.command("slow")
def link_slow(
    host: LinkHost,
    rate: Annotated[str | None, typer.Option(help="New rate: 10mbit, or unlimited.", show_default="unchanged")] = None,
    delay: Annotated[str | None, typer.Option(help="New one-way delay: 50ms.", show_default="unchanged")] = None,
    lab_id: LabId = None,
) -> None:
    """Give a link another rate or delay."""
    from thinwire.launch.lab.command import link

    raise typer.Exit(link("slow", host, rate=rate, delay=delay, lab_id=lab_id))
