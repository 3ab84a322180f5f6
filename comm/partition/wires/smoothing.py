"""The Hadamard transform of order 32, which spreads a large value over its neighbours before they share a scale."""

from __future__ import annotations

import torch
from torch import Tensor

SPAN = 32
_TILE = 1 << 17  # values: what is transformed at a time stays in a CPU's cache


def smooth(x: Tensor) -> Tensor:
    """H x for each 32 neighbours, H the Sylvester matrix of +1 and -1, so that H H = 32.

    Added in five rounds of pairs, of distance 1, 2, 4, 8 and 16, each rounded to fp32: the same bits on every device,
    which no matrix product promises. A value that is not finite leaves no finite one among its 32.

    Args:
        x: fp32 (numel,), contiguous; zeros are thought behind its end.
    Returns: fp32, numel rounded up to a multiple of 32; new memory.
    """
    made = torch.zeros(-(-x.numel() // SPAN) * SPAN, dtype=torch.float32, device=x.device)
    made[: x.numel()] = x
    for tile in made.split(_TILE if x.device.type == "cpu" else max(made.numel(), 1)):
        _transform(tile)
    return made


def unsmooth(x: Tensor) -> Tensor:
    """What smooth() was given: H x / 32. Overwrites x, whose size is a multiple of 32, and returns it."""
    for tile in x.split(_TILE if x.device.type == "cpu" else max(x.numel(), 1)):
        _transform(tile)
        tile.mul_(1 / SPAN)
    return x


def _transform(x: Tensor) -> None:
    rows = x.view(-1, SPAN).t()
    now = rows.contiguous()
    then = torch.empty_like(now)
    distance = 1
    while distance < SPAN:
        pairs = now.view(-1, 2, distance, now.shape[1])
        into = then.view_as(pairs)
        torch.add(pairs[:, 0], pairs[:, 1], out=into[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=into[:, 1])
        now, then = then, now
        distance *= 2
    rows.copy_(now)
