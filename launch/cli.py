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
link_app = typer.Typer(help="Cut, slow and restore the links of a running lab.", no_args_is_help=True)
app.add_typer(link_app, name="link")
onebyte_app = typer.Typer(help="Logs of one-byte runs: replay, verify, inspect.", no_args_is_help=True)
app.add_typer(onebyte_app, name="onebyte")

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


@config_app.command("import-deepspeed")
def config_import_deepspeed(
    file: Annotated[Path, typer.Argument(help="DeepSpeed's JSON file.", show_default=False)],
    base: Annotated[
        Path | None,
        typer.Option(help="YAML file for what DeepSpeed does not know: model, data, steps.", show_default=False),
    ] = None,
) -> None:
    """Print a DeepSpeed configuration as YAML, and say what has no counterpart."""
    from thinwire.launch.import_deepspeed import main as run

    raise typer.Exit(run(file, base))


@app.command(context_settings={"allow_interspersed_args": False})
def lab(
    command: Annotated[
        list[str] | None, typer.Argument(help="What every rank runs, after --", show_default=False)
    ] = None,
    hosts: Annotated[int, typer.Option(help="Number of emulated hosts.")] = 4,
    rate: Annotated[
        str | None, typer.Option(help="Rate of each host's link: 100mbit.", show_default="unlimited")
    ] = None,
    delay: Annotated[str, typer.Option(help="One-way delay between hosts: 20ms.")] = "0",
    loss: Annotated[str, typer.Option(help="Share of frames lost between hosts: 0.1%.")] = "0",
    ranks_per_host: Annotated[int, typer.Option(help="Ranks on each host, joined without a limit.")] = 1,
    mpi: Annotated[bool, typer.Option("--mpi", help="Start the ranks with one mpirun across the hosts.")] = False,
    output: Annotated[
        str, typer.Option(help="Output of ranks other than 0: all, rank0 (none but 0's), or a folder.")
    ] = "all",
    grace: Annotated[str, typer.Option(help="How long ranks may take to end once one has failed.")] = "15s",
    counters: Annotated[
        Path | None, typer.Option(help="File for what the interfaces counted, as JSON.", show_default=False)
    ] = None,
) -> None:
    """Run COMMAND on a slow cluster emulated on this machine."""
    from thinwire.launch.lab.command import lab as run

    code = run(
        command or [],
        hosts=hosts,
        rate=rate,
        delay=delay,
        loss=loss,
        ranks_per_host=ranks_per_host,
        mpi=mpi,
        output=output,
        grace=grace,
        counters=counters,
    )
    raise typer.Exit(code)


@app.command()
def simulate(
    config: Config,
    hosts: Annotated[int, typer.Option(min=1, help="Machines, each with a model of its own.")],
    overrides: Overrides = None,
    compute_ms: Annotated[float, typer.Option(help="Virtual milliseconds that a machine computes for a step.")] = 100.0,
    rate: Annotated[
        str | None, typer.Option(help="Rate of each machine's line: 100mbit.", show_default="unlimited")
    ] = None,
    delay: Annotated[str, typer.Option(help="One-way delay between machines: 20ms.")] = "0",
    slow: Annotated[
        list[str] | None, typer.Option(metavar="MACHINE=FACTOR", help="Let a machine compute so many times longer.")
    ] = None,
    kill: Annotated[
        list[str] | None, typer.Option(metavar="MACHINE=SECOND", help="Let a machine die at a virtual second.")
    ] = None,
    score: Annotated[int, typer.Option(help="Machines whose own models are evaluated, spread evenly.")] = 8,
    output: Annotated[Path | None, typer.Option(help="File for all figures, as JSON.", show_default=False)] = None,
) -> None:
    """Run many machines of a gossip method in this process, in virtual time: what real ones would reach and send."""
    from thinwire.launch.simulate import simulate as run

    code = run(
        config,
        overrides or [],
        hosts=hosts,
        compute_ms=compute_ms,
        rate=rate,
        delay=delay,
        slow=slow or [],
        kill=kill or [],
        score=score,
        output=output,
    )
    raise typer.Exit(code)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds that rank 0 waits for the others' answers.")] = 60.0,
) -> None:
    """Say what is here, what is missing and what that prevents; under a launcher, where ranks differ."""
    from thinwire.launch.doctor.command import doctor as run

    raise typer.Exit(run(as_json, wait))


@app.command()
def demo(
    hosts: Annotated[int, typer.Option(min=2, help="Emulated hosts, one rank each.")] = 4,
    rate: Annotated[str, typer.Option(help="Rate of each host's link: 100mbit, 1gbit.")] = "100mbit",
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of each run.", show_default="40")] = None,
    folder: Annotated[Path, typer.Option(help="Where the runs and the plot go.")] = Path("runs/demo"),
) -> None:
    """Train a GPT on emulated hosts by each method, and show what each cost."""
    from thinwire.comm.units import parse_rate
    from thinwire.launch.demo import demo as run

    try:
        rate_bps = parse_rate(rate)
    except ValueError as error:
        typer.echo(f"thinwire demo: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(run(hosts=hosts, rate_bps=rate_bps, steps=steps, folder=folder))


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


def main() -> None:
    """Entry point of the `thinwire` script."""
    app(args=sys.argv[1:])


if __name__ == "__main__":
    main()
