"""What partitioning must send, in closed form: for numbers of elements that divide evenly at every level."""

from __future__ import annotations

import math
from collections.abc import Sequence


def one_pass(numel: int, fanouts: Sequence[int], level: int) -> int:
    """V_l = n / (L_0 ... L_{l-1}) * (L_l - 1) / L_l elements."""
    inside = math.prod(fanouts[:level])
    assert numel % (inside * fanouts[level]) == 0
    return numel // inside * (fanouts[level] - 1) // fanouts[level]


def expected_bytes(
    root: int,
    blocks: int,
    fanouts: Sequence[int],
    names: Sequence[str],
    depths: tuple[int, int, int],
    *,
    secondary: int | None,
    micro_batches: int,
) -> dict[str, dict[str, int]]:
    """Bytes that each rank sends in a step, by operation and level: all in fp32.

    Args:
        root, blocks: elements of the root, and of all blocks together.
        names: of the levels.
        depths: how many levels params, grads and optim are sharded over.
    """
    p, g, o = depths
    found: dict[str, dict[str, int]] = {"gather": {}, "reduce": {}, "reduce_once": {}, "update": {}}
    for level, name in enumerate(names):
        once = 4 * one_pass(root + blocks, fanouts, level)
        every = 4 * one_pass(micro_batches * (root + 2 * blocks), fanouts, level)
        if level < p:
            found["gather"][name] = every if secondary is None or level < secondary else once
        if level < g:
            found["reduce"][name] = micro_batches * once
        else:
            found["reduce_once"][name] = once if level < o else 2 * once
        if p <= level < o:
            found["update"][name] = once
    return {operation: levels for operation, levels in found.items() if levels}
