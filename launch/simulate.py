"""`thinwire simulate --hosts`: many machines of a gossip run in this process, in virtual time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire.comm.units import format_bytes, parse_delay, parse_rate
from thinwire.launch.complaint import complain, is_ours

if TYPE_CHECKING:
    from thinwire.dist.evaluate import Evaluation
    from thinwire.dist.simulate import Circumstances, SimulatedRun
    from thinwire.dist.simulated_views import View

FAILURE = 1
USER_ERROR = 2
INTERRUPTED = 130

_COLUMNS = ("step", "virtual s", "loss", "local", "merged", "distance", "sent/machine")


def simulate(
    path: Path,
    overrides: Sequence[str],
    *,
    hosts: int,
    compute_ms: float = 100.0,
    rate: str | None = None,
    delay: str = "0",
    slow: Sequence[str] = (),
    kill: Sequence[str] = (),
    score: int = 8,
    output: Path | None = None,
) -> int:
    """Simulate the run of a file and print what it costs and reaches; returns the exit code.

    0: finished. 2: the user's mistake, told in one message. 1: the run failed, such as by weights that are not finite.
    """
    from thinwire.comm.errors import OwnWeightsError
    from thinwire.dist.config import load_config
    from thinwire.dist.simulate import Circumstances, SimulatedRun
    from thinwire.dist.step_reports import NonFiniteError

    try:
        given = Circumstances(
            hosts,
            compute_s=compute_ms / 1e3,
            rate_bps=math.inf if rate is None else parse_rate(rate),
            delay_s=parse_delay(delay),
            slow=by_machine("--slow", slow, "3=10, ten times the usual time"),
            killed_s=by_machine("--kill", kill, "3=20, at 20 virtual seconds"),
            scored=score,
        )
        if output is not None and not output.parent.is_dir():
            raise ValueError(f"--output: {output}: there is no folder {output.parent}; make it first")
        run = SimulatedRun(load_config(path, overrides), given)
    except ValueError as error:
        if not is_ours(error):
            raise
        return complain(error, USER_ERROR)
    print(run.describe(), flush=True)
    began = time.monotonic()
    views: list[View] = []
    show = _table(views)
    try:
        views.append(run.run(show))
    except (NonFiniteError, OwnWeightsError) as error:
        return complain(f"at {run.simulation.now_s:.3f} virtual seconds: {error}", FAILURE)
    except KeyboardInterrupt:
        return complain(f"interrupted at {run.simulation.now_s:.3f} virtual seconds", INTERRUPTED)
    _print_row(views[-1], first=len(views) == 1)
    print(summary(run, views[-1], given))
    print(f"simulated in {time.monotonic() - began:.1f} s")
    if output is not None:
        content = {"machines": hosts, "config": run.config.resolved(), "views": [view.record() for view in views]}
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{output}: every view, with the bytes of each edge")
    return 0


def by_machine(option: str, given: Sequence[str], example: str) -> dict[int, float]:
    """Numbers by machine, of texts such as "3=10".

    Raises:
        ValueError: a text is another, or names a machine twice.
    """
    numbers: dict[int, float] = {}
    for text in given:
        rank, equals, number = text.partition("=")
        try:
            key, value = int(rank), float(number)
        except ValueError:
            equals = ""
        if not equals or math.isnan(value):
            raise ValueError(f"{option}: {text!r} has not the form MACHINE=NUMBER, such as {example}")
        if key in numbers:
            raise ValueError(f"{option}: machine {key} is given twice")
        numbers[key] = value
    return numbers


def summary(run: SimulatedRun, view: View, given: Circumstances) -> str:
    """What the run took, sent and reached, in a few lines."""
    alive = run.alive()
    sent = [view.sent_bytes[rank] for rank in alive]
    exposed = [view.exposed_s[rank] for rank in alive]
    computed = [run.machines[rank].computed_s for rank in alive]
    steps = f"{view.step} steps" if view.step == view.least_step else f"{view.least_step} to {view.step} steps"
    waited = sum(exposed) / max(1e-12, sum(exposed) + sum(computed))
    lines = [
        f"took       {view.seconds:.3f} virtual seconds for {steps} on each of {view.alive} machines; "
        f"{100 * waited:.0f} % of their time they did not compute (most: {max(exposed):.3f} s)",
        f"sent       {format_bytes(sum(sent) / len(sent))} by each machine (least {format_bytes(min(sent))}, most "
        f"{format_bytes(max(sent))}), {format_bytes(sum(sent) / len(sent) / max(1, view.step))} a step, in "
        f"{view.messages:,} messages" + _kinds(view),
    ]
    if view.edges:
        (least, fewest), (most, highest) = (choose(view.edges.items(), key=_count) for choose in (min, max))
        lines.append(
            f"edges      {len(view.edges)} directed edges carried bytes: least {format_bytes(fewest)} "
            f"({_arrow(least)}), most {format_bytes(highest)} ({_arrow(most)})"
        )
    if given.machines > 1:
        plain = 2 * 4 * run.numel * (given.machines - 1) / given.machines * view.step
        lines.append(f"           an fp32 all-reduce after each step would send {format_bytes(plain)} by each machine")
    lines.append(
        f"distance   {view.rms_distance:.4g} from their mean (root mean square), {_share(view)} of their weights' norm"
    )
    if view.unmerged_distance is not None:
        lines[-1] += f"; {view.unmerged_distance:.4g} before the merge at the end"
    if view.merged is not None:
        local = view.unmerged or view.local
        losses = [score.loss for score in local]
        when = " before the merge" if view.unmerged else ""
        lines.append(
            f"validation local{when} {sum(losses) / len(losses):.4f} (mean of {len(losses)} machines; best "
            f"{min(losses):.4f}, worst {max(losses):.4f}), merged {view.merged.loss:.4f}" + _other(view.merged, local)
        )
    return "\n".join(lines)


def _table(views: list[View]) -> Callable[[View], None]:
    def show(view: View) -> None:
        views.append(view)
        _print_row(view, first=len(views) == 1)

    return show


def _print_row(view: View, *, first: bool) -> None:
    if first:
        print("  ".join(name.rjust(max(9, len(name))) for name in _COLUMNS))
    steps = str(view.step) if view.step == view.least_step else f"{view.least_step}-{view.step}"
    merged = math.nan if view.merged is None else view.merged.loss
    cells = (
        steps,
        f"{view.seconds:.3f}",
        f"{view.loss:.4f}",
        _number(view.local_loss),
        _number(merged),
        f"{view.rms_distance:.4g}",
        format_bytes(sum(view.sent_bytes) / len(view.sent_bytes)),
    )
    print("  ".join(cell.rjust(max(9, len(name))) for cell, name in zip(cells, _COLUMNS, strict=True)), flush=True)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _kinds(view: View) -> str:
    if len(view.kinds) < 2:
        return ""
    total = max(1, sum(view.kinds.values()))
    return ": " + ", ".join(f"{name} {100 * count / total:.3g} %" for name, count in view.kinds.items())


def _count(edge: tuple[tuple[int, int], int]) -> int:
    return edge[1]


def _arrow(edge: tuple[int, int]) -> str:
    return f"{edge[0]} -> {edge[1]}"


def _share(view: View) -> str:
    return f"{100 * view.rms_distance / view.rms_norm:.3g} %" if view.rms_norm else "all"


def _other(merged: Evaluation, local: Sequence[Evaluation]) -> str:
    """Bits per byte, or the share of right answers."""
    if not math.isnan(merged.bits_per_byte):
        own = sum(score.bits_per_byte for score in local) / len(local)
        return f" nats a token; bits per byte {own:.4f} and {merged.bits_per_byte:.4f}"
    own = sum(score.accuracy for score in local) / len(local)
    return f" nats; accuracy {own:.4f} and {merged.accuracy:.4f}"
