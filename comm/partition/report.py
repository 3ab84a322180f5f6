"""What a partitioned model sends and keeps, in words and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from thinwire.comm.partition.gather import Gather
from thinwire.comm.partition.levels import WHOLE, Levels
from thinwire.comm.partition.placement import Placement

if TYPE_CHECKING:
    from thinwire.comm.partition.optimizer import PartitionedUnit


def bytes_by_operation(
    units: Sequence[PartitionedUnit], gathers: Sequence[Gather], micro_batches: int
) -> dict[str, Counter[str]]:
    """Payload bytes that this rank sends in one step, by what they are for and by level."""
    sent = {"weights, gathered": Counter[str](), "gradients": Counter[str](), "weights, changed": Counter[str]()}
    for gather in gathers:
        sent["weights, gathered"].update(gather.sent_bytes(micro_batches))
    for unit in units:
        sent["gradients"].update(unit.gradients.sent_bytes(micro_batches))
        sent["weights, changed"].update(unit.weights.sent_bytes(unit.unit.weights_dtype))
    return sent


def describe(
    units: Sequence[PartitionedUnit],
    gathers: Sequence[Gather],
    levels: Levels,
    placement: Placement,
    micro_batches: int,
    kept: Mapping[str, int],
) -> str:
    """Lines for the start of a run: where each state is, what a step sends, and what is kept between steps.

    Args:
        kept: bytes by state.
    """
    states = [
        f"{state} over {_where(levels, depth)}"
        for state, depth in (("params", placement.params), ("grads", placement.grads), ("optim", placement.optim))
    ]
    if placement.secondary is not None:
        states.append(f"a second copy of the weights over {_where(levels, placement.secondary)}")
    trained = sum(unit.ownership.count(0, unit.ownership.owners) for unit in units)
    mine = sum(unit.gradients.own_numel for unit in units)
    lines = [
        f"partition: {', '.join(states)}",
        f"{len(gathers)} unit{'s' * (len(gathers) > 1)}, {trained:,} trained parameters, of which this rank updates "
        f"{mine:,}",
    ]
    if levels.depth:
        lines.append(f"sent by this rank per step of {micro_batches} micro-batch{'es' * (micro_batches > 1)}, bytes:")
        lines += _table(bytes_by_operation(units, gathers, micro_batches), levels.names)
    held = ", ".join(f"{state} {count:,}" for state, count in kept.items() if count)
    lines.append(f"kept by this rank, bytes: {held}, together {sum(kept.values()):,}")
    return "\n".join(lines)


def _where(levels: Levels, depth: int) -> str:
    if depth == 0:
        return f"{WHOLE} (whole on each)"
    return f"{levels.names[depth - 1]} ({levels.size(depth)} ranks)"


def _table(sent: Mapping[str, Mapping[str, int]], names: Sequence[str]) -> list[str]:
    total = Counter[str]()
    for by_level in sent.values():
        total.update(by_level)
    rows = [["", *names]]
    rows += [
        [what, *(f"{by_level.get(name, 0):,}" for name in names)]
        for what, by_level in {**sent, "together": total}.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
