"""The command line. Imports no torch: each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from thinwire.launch.cli_link import link_app
from thinwire.launch.cli_onebyte import onebyte_app

app = typer.Typer(
    name="thinwire",
    help="Train neural networks over thin wires.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at configuration files.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(link_app, name="link")
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
    cores_per_rank: Annotated[
        float | None,
        typer.Option(help="Processors of each rank, such as 0.5.", show_default="shared"),
    ] = None,
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
        cores_per_rank=cores_per_rank,
        mpi=mpi,
        output=output,
        grace=grace,
        counters=counters,
    )
    raise typer.Exit(code)


@app.command()
def plan(
    config: Config,
    cluster: Annotated[Path, typer.Option(help="YAML description of the machines, or the JSON of `thinwire probe`.")],
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the run.", show_default="train.steps")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Another number of ranks on the same machines.", show_default=False)
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Look at this method only, measured or not; may be repeated.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="File for all figures.", show_default=False)] = None,
) -> None:
    """Say before a run what each method will cost on a cluster, and which one to take: bytes, memory, seconds, money.

    The cluster is one of configs/clusters/*.yaml, or like them: levels, fastest first, each with name, size (ranks in a
    group), link_bps, latency_s and ranks_per_link; device with memory_bytes, peak_flops and utilisation;
    price_per_device_hour. configs/clusters/README.md says more.
    """
    from thinwire.launch.plan import plan as run

    raise typer.Exit(
        run(
            config,
            overrides or [],
            cluster=cluster,
            steps=steps,
            ranks=ranks,
            methods=methods or [],
            json_path=json,
        )
    )


@app.command()
def simulate(
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    hosts: Annotated[
        int | None, typer.Option(min=1, help="Let so many machines of a gossip run learn.", show_default=False)
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(help="Time any run on this cluster: a description, or a probe's JSON.", show_default=False),
    ] = None,
    compute_ms: Annotated[
        float, typer.Option(help="--hosts: virtual milliseconds that a machine computes for a step.")
    ] = 100.0,
    rate: Annotated[
        str | None, typer.Option(help="--hosts: rate of each machine's line: 100mbit.", show_default="unlimited")
    ] = None,
    delay: Annotated[str, typer.Option(help="--hosts: one-way delay between machines: 20ms.")] = "0",
    slow: Annotated[
        list[str] | None,
        typer.Option(
            "--slow", "--straggler", metavar="RANK=FACTOR", help="Let a machine or rank compute so many times longer."
        ),
    ] = None,
    kill: Annotated[
        list[str] | None, typer.Option(metavar="MACHINE=SECOND", help="--hosts: let a machine die at a virtual second.")
    ] = None,
    score: Annotated[int, typer.Option(help="--hosts: machines whose own models are evaluated, spread evenly.")] = 8,
    scale: Annotated[
        str | None,
        typer.Option(metavar="N,N,...|all", help="--cluster: numbers of devices.", show_default="the whole cluster"),
    ] = None,
    strong: Annotated[
        bool, typer.Option("--strong/--weak", help="--cluster: keep the global batch, or each device's share of it.")
    ] = False,
    steps: Annotated[int, typer.Option(help="--cluster: steps that are simulated.")] = 100,
    jitter: Annotated[
        float | None,
        typer.Option(help="--cluster: relative deviation of computing.", show_default="the cluster's"),
    ] = None,
    failures: Annotated[
        float | None, typer.Option(help="--cluster: per device and hour.", show_default="the cluster's")
    ] = None,
    checkpoint_s: Annotated[float, typer.Option(help="--cluster: seconds that a checkpoint holds up training.")] = 0.0,
    restart_s: Annotated[float, typer.Option(help="--cluster: seconds from a failure to the next step.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="--cluster: of jitter and failures.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="--cluster: PNG file for the curves.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--json", help="File for all figures, as JSON.", show_default=False)
    ] = None,
) -> None:
    """Run in virtual time, in this process.

    With --hosts, many machines of a gossip run learn: what real ones would reach and send. With --cluster, a run by
    any method is timed on a described cluster of up to tens of thousands of devices, with slow ranks, jitter and
    failures, and nothing is learned.
    """
    _refuse_mixed(context)
    if cluster is not None:
        from thinwire.launch.simulate_cluster import Asked, simulate_cluster

        asked = Asked(
            cluster,
            scale,
            "strong" if strong else "weak",
            steps,
            slow or [],
            jitter,
            failures,
            checkpoint_s,
            restart_s,
            seed,
            plot,
            output,
        )
        raise typer.Exit(simulate_cluster(config, overrides or [], asked))
    assert hosts is not None
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
def probe(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML file of a run, whose computing is then measured too.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    seconds: Annotated[
        float, typer.Option(min=1, max=3600, help="How long to measure links and computing; reading data is not in it.")
    ] = 10,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="File for all figures: what plan takes as --cluster.", show_default=False),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of who reaches whom how fast.", show_default=False)] = None,
) -> None:
    """Measure links, collectives, compressors and computing: as one rank under torchrun, mpirun, srun or the lab.

    Start it on every host as the run would be: thinwire lab --hosts 4 --rate 100mbit -- thinwire probe CONFIG
    """
    from thinwire.launch.probe.command import probe as run

    raise typer.Exit(run(config, overrides or [], seconds=seconds, json_path=json, plot=plot))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page and its pictures.", show_default="RUN/report, or ./report")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Put runs side by side whose losses cannot be compared.")
    ] = False,
    modelled_link: Annotated[
        str | None,
        typer.Option(
            metavar="RATE", help="Compute the communication time of a link that the runs did not have: 100mbit."
        ),
    ] = None,
) -> None:
    """Show where the time and the bytes of runs went: a table here, one HTML page, and PNGs."""
    from thinwire.launch.report.command import report as run

    raise typer.Exit(run(runs, out=out, anyway=anyway, modelled_link=modelled_link))


_OF_HOSTS = ("hosts", "compute_ms", "rate", "delay", "kill", "score")
_OF_CLUSTER = ("cluster", "scale", "strong", "steps", "jitter", "failures", "checkpoint_s", "restart_s", "seed", "plot")


def _refuse_mixed(context: typer.Context) -> None:
    """Two kinds of simulation share a command; an option of the other kind would be ignored."""
    given = {n for n in context.params if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"}
    if ("hosts" in given) == ("cluster" in given):
        error = "give --hosts N (machines of a gossip run, which learn) or --cluster FILE (any run, which is timed)"
    else:
        kind, others = ("--hosts", _OF_CLUSTER) if "hosts" in given else ("--cluster", _OF_HOSTS)
        wrong = ["--" + name.replace("_", "-") for name in others if name in given]
        if not wrong:
            return
        error = f"{wrong[0]} says nothing with {kind}; leave it out"
    typer.echo(f"thinwire simulate: {error}", err=True)
    raise typer.Exit(2)


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


def main() -> None:
    """Entry point of the `thinwire` script."""
    app(args=sys.argv[1:])


if __name__ == "__main__":
    main()
