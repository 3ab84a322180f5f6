"""Which level each state is sharded over: any nested triple, and the named ones that others have built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thinwire.comm.partition.levels import WHOLE, Levels

# By the names of levels.
PRESETS: dict[str, dict[str, str]] = {
    "zero1": {"params": WHOLE, "grads": WHOLE, "optim": "world"},
    "zero2": {"params": WHOLE, "grads": "world", "optim": "world"},
    "zero3": {"params": "world", "grads": "world", "optim": "world"},
    "hsdp": {"params": "node", "grads": "node", "optim": "node"},
    "mics": {"params": "node", "grads": "node", "optim": "node"},
    "hpz": {"params": "world", "grads": "world", "optim": "world", "secondary": "node"},
    "frontier": {"params": "pair", "grads": "node", "optim": "world"},
}


@dataclass(frozen=True)
class Placement:
    """How many levels, counted from the fastest, each state is sharded over.

    secondary: those that share the copy of the weights kept from one gather over `params` until the weights change, so
    that later gathers stay inside it; None = no such copy.
    """

    params: int
    grads: int
    optim: int
    secondary: int | None = None


def place(levels: Levels, *, params: str, grads: str, optim: str, secondary: str | None = None) -> Placement:
    """The placement that names of levels describe, if it is legal: params inside grads inside optim.

    Why they must nest: a gradient shard that covered less than the optimizer's would be summed over ranks that the
    optimizer's owner is not among; a parameter shard that was smaller than a gradient shard would need gradients that
    this rank has given away.

    Raises:
        ValueError: a name that no level has, or states that do not nest; says which, and what is allowed.
    """
    depth: dict[str, int] = {}
    for state, name in (("params", params), ("grads", grads), ("optim", optim)):
        try:
            depth[state] = levels.depth_of(name)
        except ValueError as error:
            raise ValueError(f"{state}: {error}") from None
    for inner, outer, inner_name, outer_name in (
        ("params", "grads", params, grads),
        ("grads", "optim", grads, optim),
    ):
        if depth[inner] > depth[outer]:
            wider = [name for name, at in levels.named.items() if at >= depth[inner]]
            raise ValueError(
                f"{outer}: {outer_name} is a faster level than {inner}: {inner_name}, and each state must be sharded "
                f"at least as widely as the one before (params, grads, optim); give {outer} one of {', '.join(wider)}"
            )
    if secondary is None:
        return Placement(**depth)
    try:
        inside = levels.depth_of(secondary)
    except ValueError as error:
        raise ValueError(f"secondary: {error}") from None
    if inside >= depth["params"]:
        raise ValueError(
            f"secondary: {secondary} is not a faster level than params: {params}, so the copy would spare no gather; "
            "give a faster level, or null"
        )
    return Placement(**depth, secondary=inside)


def preset(name: str) -> dict[str, Any]:
    """The levels of a named scheme.

    zero1, zero2, zero3: Rajbhandari et al. 2019 (1910.02054). hsdp: FSDP inside the node, replicas between nodes. mics:
    Zhang et al. 2022 (2205.00119), here the same as hsdp: both sum gradients inside the node for each micro-batch and
    between nodes once per step. hpz: Wang et al. 2023 (2306.10209). frontier: Xu et al. 2025 (2501.04266), parameters
    over a device pair, gradients over the node, optimizer state over the world.

    Raises: ValueError for a name that is none of these.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: {name!r} is none of {', '.join(PRESETS)}")
    return dict(PRESETS[name])
