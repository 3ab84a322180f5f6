"""What spreading experts over ranks will send: rows as even loads would make them, and the gradients of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from thinwire.comm.expert_parallel.exchange import COUNTS, GRADIENTS, ROWS, count_bytes
from thinwire.comm.expert_parallel.gradients import NORM, WEIGHT_GRADIENTS, gradient_bytes, norm_bytes
from thinwire.comm.forecast import Exchange, Forecast, Seat
from thinwire.comm.two_shot import TwoShotMean

_ROWS_QUEUE, _GRADIENTS_QUEUE = "experts", "experts/gradients"


@dataclass(frozen=True)
class ExpertLayer:
    """A layer whose experts are spread. held: elements of its parameters on one rank, by name. learned: that do."""

    held: Mapping[str, int]
    learned: frozenset[str]


def forecast_experts(
    layers: Sequence[ExpertLayer],
    seat: Seat,
    *,
    ranks: Sequence[int],
    replicas: Sequence[int],
    experts: int,
    rows: int,
    row_bytes: int,
    wire_dtype: torch.dtype,
    micro_batches: int,
) -> Forecast:
    """What a rank sends in a step for experts that the ranks of its group share.

    Loads are taken to be even: of the rows that a rank has in a micro-batch, each of P ranks gets 1/P.

    Args:
        ranks: that share the experts, P of them. replicas: that hold the same experts; both ascending.
        experts: of a layer.
        rows: that a rank sends and keeps in a micro-batch and layer: its tokens times what each selects.
        row_bytes: of one row.
        wire_dtype: of the experts' gradients.
    """
    return Forecast(
        (
            *_rows(layers, seat, ranks, experts, rows * row_bytes, micro_batches),
            *_gradients(layers, seat, ranks, replicas, wire_dtype),
        ),
        remarks=("experts: the rows that travel are those of even loads",) if len(ranks) > 1 else (),
    )


def _rows(
    layers: Sequence[ExpertLayer], seat: Seat, ranks: Sequence[int], experts: int, sent_bytes: int, micro_batches: int
) -> Iterator[Exchange]:
    """In each layer and pass: how many rows come, the rows, and their results back; gradients go both ways again."""
    others = [rank for rank in ranks if rank != seat.rank]
    if not others:
        return
    counts = seat.by_level(dict.fromkeys(others, count_bytes(experts // len(ranks))))
    travelling = seat.by_level(dict.fromkeys(others, sent_bytes // len(ranks)))
    for layer in layers:
        needs = tuple(layer.held)
        for operation, levels, times, exact in (
            (COUNTS, counts, micro_batches, True),
            (ROWS, travelling, 2 * micro_batches, False),
            (GRADIENTS, travelling, 2 * micro_batches, False),
        ):
            yield Exchange(
                operation,
                levels,
                len(others),
                dict.fromkeys(levels, 1),
                "gather",
                needs,
                float(times),
                exact=exact,
                queue=_ROWS_QUEUE,
            )


def _gradients(
    layers: Sequence[ExpertLayer],
    seat: Seat,
    ranks: Sequence[int],
    replicas: Sequence[int],
    wire_dtype: torch.dtype,
) -> Iterator[Exchange]:
    mean = TwoShotMean(wire_dtype)
    for layer in reversed(layers):
        for name, numel in layer.held.items():
            levels = seat.by_level(gradient_bytes(mean, numel, seat.rank, replicas))
            if levels and name in layer.learned:
                yield Exchange(
                    WEIGHT_GRADIENTS,
                    levels,
                    2 * (len(replicas) - 1),
                    dict.fromkeys(levels, 2),
                    "backward",
                    (name,),
                    queue=_GRADIENTS_QUEUE,
                )
    levels = seat.by_level(norm_bytes(seat.rank, ranks))
    if levels:
        messages = len(ranks) - 1
        yield Exchange(NORM, levels, messages, dict.fromkeys(levels, 1), "backward", queue=_GRADIENTS_QUEUE)
