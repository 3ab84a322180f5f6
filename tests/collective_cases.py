"""What every test of a compressed collective needs: inputs of all ranks, one call on all of them, what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from ranks import Rank, run_ranks
from torch import Tensor

from thinwire.comm.compress.collective import Collective, Job
from thinwire.comm.compress.decoded import Decoded, to_dense
from thinwire.comm.compress.draw import Draw

SHAPES = ((5, 7), (1,), (0,), (3, 2, 11), (130,))
"""Odd sizes, different shapes, a scalar and nothing at all, in one call."""


@dataclass
class Outcome:
    """Of one call on one rank."""

    outputs: list[Tensor]
    contributed: list[Tensor] | None  # None: not finite
    next_memories: list[Tensor]


def inputs_of(rank: int, step: int = 0, shapes: Sequence[Sequence[int]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [2 * torch.randn(*shape, generator=generator) for shape in shapes]


def draws_of(rank: int, step: int = 0, count: int = len(SHAPES)) -> list[Draw]:
    return [Draw(seed=7, step=step, name=f"tensor{i}", rank=rank) for i in range(count)]


def call(
    size: int,
    make: Callable[[], Collective],
    inputs: Callable[[int], list[Tensor]] = inputs_of,
    *,
    memories: Callable[[int], list[Tensor]] | None = None,
    weights: Sequence[float] | None = None,
    one_bucket: bool = False,
    step: int = 0,
) -> list[Outcome]:
    """One call of a new collective on `size` ranks; checks the bytes and that the ranks agree.

    one_bucket: the inputs lie one after another in memory, and are the outputs too, as in a DDP bucket.
    """

    def work(rank: Rank) -> Outcome:
        queue = rank.queue()
        outcome = call_on(
            rank,
            lambda exchange: queue.submit("mean", exchange).wait(),
            make(),
            inputs(rank.rank),
            memories=memories(rank.rank) if memories else None,
            weights=weights,
            one_bucket=one_bucket,
            step=step,
            sent_bytes=lambda: sum(queue.meter.sent_bytes().values()),
        )
        queue.close()
        return outcome

    outcomes = run_ranks(size, work)
    for other in outcomes[1:]:
        assert same_bits(outcomes[0].outputs, other.outputs)
    return outcomes


def call_on(
    rank: Rank,
    submit: Callable,
    collective: Collective,
    inputs: list[Tensor],
    *,
    memories: list[Tensor] | None = None,
    weights: Sequence[float] | None = None,
    one_bucket: bool = False,
    step: int = 0,
    sent_bytes: Callable[[], int],
) -> Outcome:
    if one_bucket:
        bucket = torch.cat([x.view(-1) for x in inputs])
        inputs = [part.view_as(x) for part, x in zip(bucket.split([x.numel() for x in inputs]), inputs, strict=True)]
        outputs = inputs
    else:
        inputs = [x.clone() for x in inputs]
        outputs = [torch.full_like(x, 99.0) for x in inputs]
    draws = draws_of(rank.rank, step, len(inputs))
    before = None if memories is None else [x.clone() for x in memories]
    next_memories = [] if memories is None else [torch.full_like(x, 99.0) for x in memories]
    pairs = None if memories is None else list(zip(memories, next_memories, strict=True))
    unchanged = [x.clone() for x in inputs]
    names = [draw.name for draw in draws]
    job = Job(names=names, inputs=inputs, outputs=outputs, draws=draws, memories=pairs, weights=weights)
    earlier = sent_bytes()
    contributed: list[Decoded] | None = submit(lambda channel: collective.mean(channel, job))
    shapes = {name: x.shape for name, x in zip(names, inputs, strict=True)}
    predicted = collective.sent_bytes(shapes, rank.rank, rank.size)
    assert sorted(predicted) == [r for r in range(rank.size) if r != rank.rank]
    assert sent_bytes() - earlier == sum(predicted.values())
    if not one_bucket:
        assert same_bits(inputs, unchanged)
    if memories is not None:
        assert same_bits(memories, before)
    dense = None if contributed is None else [to_dense(x) for x in contributed]
    return Outcome(outputs, dense, next_memories)


def same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(
        a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(first, second, strict=True)
    )


def all_nan(tensors: Sequence[Tensor]) -> bool:
    return all(bool(x.isnan().all()) for x in tensors)
