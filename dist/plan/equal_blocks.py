"""The trace of a deep model from those of one and two of its blocks: what all blocks have alike is counted once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.dist.models.gpt import GPT

_FEWEST = 4  # blocks, from which on two shorter traces take less time than the whole
_BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Counted:
    """What a trace counts, in operations. See StepTrace.

    ready: since the backward pass began. used: since the forward pass began.
    blocks: (operations of forward, bytes kept for backward, bytes of inputs).
    """

    forward_flops: int
    backward_flops: int
    ready: Sequence[tuple[str, int]]
    activation_bytes: int
    used: Sequence[tuple[str, int]]
    blocks: Sequence[tuple[int, int, int]]
    cast_bytes: int = 0


def has_equal_blocks(model: GPT) -> bool:
    """Whether its blocks differ in nothing that is counted, and are many."""
    shapes = [
        (type(block.mlp), [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()])
        for block in model.blocks
    ]
    return len(shapes) >= _FEWEST and all(shape == shapes[0] for shape in shapes)


def extend(one: Counted, two: Counted, blocks: int) -> Counted:
    """What a model of so many blocks would count.

    Args:
        one, two: of the same model with its first block, and with its first two.
    """
    forward, backward = two.forward_flops - one.forward_flops, two.backward_flops - one.backward_flops
    more = blocks - 2
    return Counted(
        two.forward_flops + more * forward,
        two.backward_flops + more * backward,
        _backwards(two.ready, backward, blocks),
        two.activation_bytes + more * (two.activation_bytes - one.activation_bytes),
        _forwards(two.used, forward, blocks),
        [two.blocks[0], *[two.blocks[1]] * (blocks - 1)],
        two.cast_bytes + more * (two.cast_bytes - one.cast_bytes),
    )


def _forwards(two: Sequence[tuple[str, int]], each: int, blocks: int) -> list[tuple[str, int]]:
    """The first block, then copies of the second, then what comes after them."""
    before, first, second, after = _parts(two, (0, 1))
    copies = [(f"blocks.{n}.{name}", at + (n - 1) * each) for n in range(1, blocks) for name, at in second]
    return [*before, *_named(0, first), *copies, *((name, at + (blocks - 2) * each) for name, at in after)]


def _backwards(two: Sequence[tuple[str, int]], each: int, blocks: int) -> list[tuple[str, int]]:
    """Copies of the second block, the last one first, then the first block and what is behind it."""
    before, second, first, after = _parts(two, (1, 0))
    more = (blocks - 2) * each
    copies = [
        (f"blocks.{n}.{name}", at + (blocks - 1 - n) * each) for n in reversed(range(1, blocks)) for name, at in second
    ]
    last = [*_named(0, first), *after]
    return [*before, *copies, *((name, at + more) for name, at in last)]


def _parts(events: Sequence[tuple[str, int]], order: tuple[int, int]) -> tuple[list[tuple[str, int]], ...]:
    """What comes before the blocks, in each of both, by their own names, and after them."""
    blocks: dict[int, list[tuple[str, int]]] = {0: [], 1: []}
    before: list[tuple[str, int]] = []
    after: list[tuple[str, int]] = []
    seen = False
    for name, at in events:
        if match := _BLOCK.fullmatch(name):
            blocks[int(match[1])].append((match[2], at))
            seen = True
        else:
            (after if seen else before).append((name, at))
    return before, blocks[order[0]], blocks[order[1]], after


def _named(block: int, events: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(f"blocks.{block}.{name}", at) for name, at in events]
