"""`thinwire lab` and `thinwire link`: the lab on the command line."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType

from thinwire.comm.units import format_bytes, format_rate, parse_delay, parse_loss, parse_rate
from thinwire.launch.lab.client import Lab, Links
from thinwire.launch.lab.control import the_running_lab
from thinwire.launch.lab.counters import InterfaceCounters
from thinwire.launch.lab.run import Output, Run
from thinwire.launch.lab.spec import LabError, host_name, host_number

_EXAMPLE = "thinwire lab --hosts 4 --rate 100mbit -- thinwire train CONFIG"
_USAGE = 2
_CANNOT = 3


class _Ended(BaseException):
    """SIGTERM asked this process to end."""


def lab(
    command: list[str],
    *,
    hosts: int,
    rate: str | None,
    delay: str,
    loss: str,
    ranks_per_host: int,
    cores_per_rank: float | None,
    mpi: bool,
    output: str,
    grace: str,
    counters: Path | None,
) -> int:
    """Run `command` on an emulated cluster; the exit code of `thinwire lab`."""
    if not command:
        return _fail(f"thinwire lab: what shall run on the hosts? Put it after --, as in\n  {_EXAMPLE}", _USAGE)
    if mpi and output != "all":
        return _fail(
            f"thinwire lab: --output {output}: with --mpi, mpirun owns the ranks' output; leave it out", _USAGE
        )
    try:
        cluster = Lab(
            hosts=hosts,
            rate_bps=None if rate is None else parse_rate(rate),
            delay_s=parse_delay(delay),
            loss=parse_loss(loss),
            ranks_per_host=ranks_per_host,
            cores_per_rank=cores_per_rank,
        )
        grace_s = parse_delay(grace, "--grace", limit_s=3600)
        where: Output = output if output in ("all", "rank0") else Path(output)
    except ValueError as error:
        return _fail(f"thinwire lab: {error}", _USAGE)
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        with cluster:
            print(f"lab {cluster.id}: {cluster.spec.describe()}", file=sys.stderr, flush=True)
            run = cluster.start_mpi(command) if mpi else cluster.start(command, output=where)
            code = _watch(run, grace_s)
            for line in run.report():
                print(line, file=sys.stderr)
            _show_counters(cluster.counters(), counters)
            return code
    except LabError as error:
        return _fail(f"thinwire lab: {error}", _CANNOT)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _watch(run: Run, grace_s: float) -> int:
    """Wait for the end of the run; Ctrl-C and SIGTERM end it in order, a second Ctrl-C at once."""
    signal.signal(signal.SIGUSR1, lambda *_: run.signal_all(signal.SIGUSR1))
    try:
        return run.wait(grace_s=grace_s)
    except (KeyboardInterrupt, _Ended) as reason:
        interrupted = isinstance(reason, KeyboardInterrupt)
        print(f"\nending the ranks (they have {grace_s:g} s)", file=sys.stderr, flush=True)
        try:
            run.stop(grace_s)
        except (KeyboardInterrupt, _Ended):
            run.stop(0)
        return 128 + (signal.SIGINT if interrupted else signal.SIGTERM)


def link(action: str, host: str, *, rate: str | None, delay: str | None, lab_id: str | None) -> int:
    """Cut, restore or slow the link of a host of a running lab; the exit code of `thinwire link`."""
    try:
        index = host_number(host)
        links = Links(lab_id or the_running_lab())
        if action == "cut":
            links.cut(index)
        elif action == "restore":
            links.restore(index)
        else:
            changes: dict[str, float | None] = {}
            if rate is not None:
                changes["rate_bps"] = None if rate == "unlimited" else parse_rate(rate)
            if delay is not None:
                changes["delay_s"] = parse_delay(delay)
            links.slow(index, **changes)  # type: ignore[arg-type]
        state = links.describe()["links"][index]
    except ValueError as error:
        return _fail(f"thinwire link: {error}", _USAGE)
    except LabError as error:
        return _fail(f"thinwire link: {error}", _CANNOT)
    cut = "cut (frames vanish)" if state["cut"] else "open"
    print(f"{host_name(index)}: {cut}, {format_rate(state['rate_bps'])}, {state['delay_s'] * 1e3:g} ms one way")
    return 0


def _show_counters(counters: list[InterfaceCounters], file: Path | None) -> None:
    for index, host in enumerate(counters):
        sent, received = format_bytes(host.tx_bytes), format_bytes(host.rx_bytes)
        print(
            f"{host_name(index)}: sent {sent} in {host.tx_packets} frames, received {received} in {host.rx_packets}",
            file=sys.stderr,
        )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        named = {host_name(index): host.as_dict() for index, host in enumerate(counters)}
        file.write_text(json.dumps(named, indent=2) + "\n")


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise _Ended


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
