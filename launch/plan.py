"""`thinwire plan`: what a run will cost on a described cluster by each method, and which one to take."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinwire.comm.units import format_bytes, format_rate
from thinwire.launch.complaint import complain, is_ours

if TYPE_CHECKING:
    from thinwire.dist.plan.cluster import Cluster
    from thinwire.dist.plan.compare import Comparison, Option

USER_ERROR = 2


def plan(
    path: Path,
    overrides: Sequence[str],
    *,
    cluster: Path,
    steps: int | None = None,
    ranks: int | None = None,
    methods: Sequence[str] = (),
    json_path: Path | None = None,
) -> int:
    """Compare the methods and print tables; returns the exit code: 0, or 2 for a mistake of the user's."""
    from thinwire.dist.config import load_config
    from thinwire.dist.plan.cluster import load_cluster
    from thinwire.dist.plan.compare import compare

    try:
        if json_path is not None and not json_path.parent.is_dir():
            raise ValueError(f"--json: {json_path}: there is no folder {json_path.parent}; make it first")
        config = load_config(path, overrides)
        machine = load_cluster(cluster)
        if ranks is not None and ranks != machine.size:
            if machine.measured:
                raise ValueError(
                    f"--ranks: {ranks}, but {cluster} was measured by a probe of {machine.size} ranks; probe that "
                    "many, or give a description without `measured`"
                )
            machine = machine.at(ranks)
        found = compare(config, machine, check_methods(methods))
    except ValueError as error:
        if not is_ours(error):
            raise
        return complain(error, USER_ERROR)
    count = config.train.steps if steps is None else steps
    print(f"{config.name} ({config.model.kind}) on {describe_cluster(machine)}")
    print("\n".join(report(found, count)), flush=True)
    if json_path is not None:
        json_path.write_text(json.dumps(record(found, count), indent=1) + "\n", encoding="utf-8")
        print(f"{json_path}: all figures")
    return 0


def check_methods(kinds: Sequence[str]) -> Sequence[str]:
    """Raises ValueError for a kind of method that there is not."""
    allowed = ("allreduce", "compress", "local_sgd", "gossip", "partition", "onebyte")
    for kind in kinds:
        if kind not in allowed:
            raise ValueError(f"--methods: {kind!r} is no method; allowed: {', '.join(allowed)}")
    return kinds


def describe_cluster(cluster: Cluster) -> str:
    """Its levels, fastest first."""
    levels = ", ".join(
        f"{level.name} of {level.size} at {format_rate(float(f'{level.link_bps:.3g}'))}/s"
        + (f" shared by {level.ranks_per_link}" if level.ranks_per_link > 1 else "")
        + f" and {1e3 * level.latency_s:.3g} ms"
        for level in cluster.levels
    )
    source = "as a probe measured it" if cluster.measured else "as described"
    return f"{cluster.name}, {source}: {cluster.size} rank{'s' * (cluster.size > 1)}, {levels}"


def report(found: Comparison, steps: int) -> list[str]:
    """All that there is to say, as lines."""
    if not found.options:
        return ["", *left_out(found)]
    first = found.options[0].prediction
    parameters = first.forecast.memory_bytes.get("params", 0)
    lines = [
        f"{first.micro_batches} x {first.config.train.share(found.cluster.size)[0]} sequences on each rank and step; "
        f"compute {first.compute_from}" + (f"; {format_bytes(parameters)} of weights on rank 0" if parameters else ""),
        "",
        *table(times(found, steps)),
        "",
        *table(memory(found)),
        "",
        *(["*          as configured"] if any(option.candidate.is_own for option in found.options) else []),
        f"take       {found.best.label}" if found.best else "take       nothing",
        f"because    {found.reason}",
        *(f"{'break-even' if n == 0 else '':<10} {text}" for n, text in enumerate(break_even(found))),
    ]
    remarks = dict.fromkeys(remark for option in found.options for remark in option.prediction.remarks)
    lines += [f"{'but' if n == 0 else '':<10} {remark}" for n, remark in enumerate(remarks)]
    return [*lines, *left_out(found)]


def times(found: Comparison, steps: int) -> list[list[str]]:
    """Rows: seconds and bytes of a step."""
    levels = [level.name for level in found.cluster.levels if level.size > 1]
    priced = found.cluster.price_per_device_hour > 0
    head = ["per step, rank 0", *(f"sent over {name}" for name in levels), "messages", "compute", "sending", "exposed"]
    head += ["step", f"{steps:,} steps", "steps for the same loss", *(["cost of that"] if priced else [])]
    rows = [head]
    for option in found.options:
        prediction, time = option.prediction, option.prediction.time
        sent, about = prediction.sent_bytes, "" if prediction.forecast.exact else "~"
        factor = option.factor.steps
        rows.append(
            [
                name(option),
                *(about + format_bytes(sent.get(name, 0.0)) for name in levels),
                f"{prediction.forecast.messages_per_step():.4g}",
                *(seconds(value) for value in (time.compute_s, time.sending_s, time.exposed_s, time.step_s)),
                duration(steps * time.step_s),
                same_loss(option),
                *([f"{prediction.cost(steps * factor):,.2f}" if factor else "-"] if priced else []),
            ]
        )
    return rows


def name(option: Option) -> str:
    """With a mark where it is the user's own, and the rank whose figures these are, if it is not 0."""
    rank = option.prediction.rank
    return option.label + f" (rank {rank})" * bool(rank) + " *" * option.candidate.is_own


def same_loss(option: Option) -> str:
    """The factor of steps, if it is known."""
    factor = option.factor
    if not factor.was_measured:
        return "not measured"
    return "not reached" if factor.steps is None else f"x {factor.steps:.3g}"


def memory(found: Comparison) -> list[list[str]]:
    """Rows: bytes of one rank by state."""
    states = list(dict.fromkeys(state for option in found.options for state in option.prediction.memory_bytes))
    limit = found.cluster.device.memory_bytes
    rows = [["memory of a rank", *states, "together", f"of {format_bytes(limit)}"]]
    for option in found.options:
        held = option.prediction.memory_bytes
        total = sum(held.values())
        fits = f"{100 * total / limit:.0f} %" if option.prediction.fits else "does not fit"
        rows.append([name(option), *(format_bytes(held.get(state, 0)) for state in states), format_bytes(total), fits])
    return rows


def break_even(found: Comparison) -> list[str]:
    """Where another method becomes the soonest to the same loss, and where steps are no longer shorter."""
    if found.best is None or found.cluster.size == 1:
        return []
    slowest, changes = found.cluster.levels[-1].name, found.changes
    parts = [f"{changes[0].below} up to {rate(changes[0].link_bps)}"] if changes else []
    parts += [f"{a.above} from there to {rate(b.link_bps)}" for a, b in itertools.pairwise(changes)]
    parts += [f"{changes[-1].above} above {rate(changes[-1].link_bps)}"] if changes else []
    lines = [
        f"soonest to the same loss, by the rate of the links of {slowest}: " + ("; ".join(parts) or "always the same")
    ]
    if found.break_even:
        ends = "; ".join(f"{label}: {rate(link_bps)}" for label, link_bps in found.break_even)
        lines.append(f"steps are shorter than all-reduce's below: {ends}")
    return lines


def left_out(found: Comparison) -> list[str]:
    """What is not compared, and why."""
    return [f"{'not here' if n == 0 else '':<10} {label}: {why}" for n, (label, why) in enumerate(found.left_out)]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def seconds(value: float) -> str:
    """With a unit."""
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 0.9995 else f"{1e3 * value:.3g} ms" if value else "0"


def duration(value: float) -> str:
    """Seconds, minutes, hours or days."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= 2 * size:
            return f"{value / size:,.3g} {unit}"
    return seconds(value)


def rate(link_bps: float) -> str:
    """Two digits are more than the model knows."""
    return format_rate(float(f"{link_bps:.2g}"))


def record(found: Comparison, steps: int) -> dict[str, Any]:
    """Everything, as JSON."""
    return {
        "cluster": found.cluster.model_dump(mode="json"),
        "steps": steps,
        "recommended": found.best.label if found.best else None,
        "reason": found.reason,
        "soonest": [{"link_bps": c.link_bps, "below": c.below, "above": c.above} for c in found.changes],
        "break_even_bps": dict(found.break_even),
        "options": [option_record(option, steps) for option in found.options],
        "left_out": dict(found.left_out),
    }


def option_record(option: Option, steps: int) -> Mapping[str, Any]:
    """One method."""
    prediction, time, factor = option.prediction, option.prediction.time, option.factor
    return {
        "label": option.label,
        "as_configured": option.candidate.is_own,
        "method": prediction.config.method.model_dump(mode="json"),
        "memory_bytes": dict(prediction.memory_bytes),
        "fits": prediction.fits,
        "sent_bytes": prediction.sent_bytes,
        "exact": prediction.forecast.exact,
        "messages": prediction.forecast.messages_per_step(),
        "compute_s": time.compute_s,
        "compute_from": prediction.compute_from,
        "sending_s": time.sending_s,
        "exposed_s": time.exposed_s,
        "step_s": time.step_s,
        "run_s": steps * time.step_s,
        "steps_factor": factor.steps if factor.was_measured else None,
        "steps_factor_measured": factor.was_measured,
        "cost": prediction.cost(steps),
        "rank": prediction.rank,
        "remarks": prediction.remarks,
    }
