"""What a LoadBalance will send: messages of counts, from the numbers of layers, experts and ranks alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from thinwire.comm.balance.bias import QuantileBiasSettings
from thinwire.comm.balance.bus import COUNTS, message_bytes, message_shots
from thinwire.comm.balance.columns import Columns
from thinwire.comm.balance.consensus import CONSENSUS, neighbour_bytes
from thinwire.comm.balance.modes.build import messages_per_step
from thinwire.comm.balance.modes.gossip import consensus_graph
from thinwire.comm.balance.settings import BalanceSettings
from thinwire.comm.forecast import Exchange, Forecast, Seat
from thinwire.comm.gossip.graphs.regular import RingSettings

_QUEUE = "balance"
_SAMPLED_ROUNDS = 64  # of a graph that never repeats


def forecast_balance(
    settings: BalanceSettings,
    *,
    layers: int,
    num_experts: int,
    micro_batches: int,
    seat: Seat,
    inner: Sequence[int] | None = None,
) -> Forecast:
    """What a rank sends in a step beside its method.

    Args:
        layers: with experts.
        micro_batches: forward passes per step.
        inner: this rank's group of near ranks, ascending, for scope node and mode hier.
    Raises:
        ValueError: mode gossip has no such graph of so many ranks.
    """
    if seat.size == 1:
        return Forecast(())
    bins = settings.bias.bins if isinstance(settings.bias, QuantileBiasSettings) else 0
    columns = Columns(num_experts, bins)
    if settings.scope != "micro" and settings.timing == "gossip":
        return Forecast(tuple(_among_neighbours(settings, layers, columns, seat)))
    exchanges = []
    waits = settings.scope != "micro" and settings.timing in ("sync", "late", "carry")
    for messages, near in zip(messages_per_step(settings, micro_batches), (False, True), strict=True):
        ranks = list(inner) if near and inner is not None else list(range(seat.size))
        if not messages or len(ranks) == 1:
            continue
        sent = message_bytes(layers, columns, ranks.index(seat.rank), len(ranks))
        levels = seat.by_level({ranks[place]: count for place, count in sent.items()})
        shots = message_shots(layers, columns, len(ranks))
        # What a step's own counts are for is waited for in its backward pass; a message of the last step's is not.
        is_awaited = waits or (near and settings.timing == "hier")
        exchanges.append(
            Exchange(
                COUNTS,
                levels,
                shots * (len(ranks) - 1),
                dict.fromkeys(levels, shots),
                "gather" if is_awaited else "beside",
                per_step=float(messages),
                queue=_QUEUE,
            )
        )
    return Forecast(tuple(exchanges))


def _among_neighbours(settings: BalanceSettings, layers: int, columns: Columns, seat: Seat) -> Iterator[Exchange]:
    """One message per step to each neighbour; rounds that send alike are one exchange."""
    graph = consensus_graph(settings.graph or RingSettings(), seat.size)
    rounds = graph.period or _SAMPLED_ROUNDS
    each = neighbour_bytes(layers, columns)
    alike: Counter[tuple[tuple[tuple[str, int], ...], int]] = Counter()
    for round in range(rounds):
        neighbours = graph.mixing(round).sources(seat.rank)
        if neighbours:
            alike[tuple(sorted(seat.by_level(dict.fromkeys(neighbours, each)).items())), len(neighbours)] += 1
    for (levels, messages), times in alike.items():
        yield Exchange(
            CONSENSUS,
            dict(levels),
            messages,
            dict.fromkeys(dict(levels), 1),
            "beside",
            per_step=times / rounds,
            exact=bool(graph.period),
            queue=_QUEUE,
        )
