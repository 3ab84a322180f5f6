"""What OneByteSPSA will send and keep: in a fixed job to the byte; where machines come and go, what to expect."""

from __future__ import annotations

from collections.abc import Sequence

from thinwire.comm.forecast import Exchange, Forecast, Parameter, Seat
from thinwire.comm.onebyte.fixed_exchange import HASH_BYTES, OPERATION, SNAPSHOT, spread_of
from thinwire.comm.onebyte.flood import FloodSettings
from thinwire.comm.onebyte.log import CHECK_BYTES
from thinwire.comm.onebyte.membership.connections import packed_bytes
from thinwire.comm.onebyte.membership.frame import FRAME_BYTES
from thinwire.comm.onebyte.membership.messages import Propose
from thinwire.comm.onebyte.record_code import Context, encode
from thinwire.comm.onebyte.rounds import Contribution, Member, Roster, Round
from thinwire.comm.onebyte.settings import OneByteSettings

_LEADER = 0  # the founder, as long as it lives


def forecast_onebyte(settings: OneByteSettings, parameters: Sequence[Parameter], seat: Seat) -> Forecast:
    """What the rank in this seat sends in a round of a fixed job, in the mean over rounds, and keeps.

    A byte for each direction, from each rank to each other; at a snapshot the 32 bytes of the weights' hash besides.

    Args:
        parameters: of the model, those that do not learn included.
    Raises:
        ValueError: the graph is not one of so many ranks.
    """
    flood = settings.exchange if isinstance(settings.exchange, FloodSettings) else None
    spread = spread_of(flood, seat.rank, seat.size, settings.samples)
    exchanges = []
    if seat.size > 1:
        for operation, sent, hops, times in (
            (OPERATION, spread.sent_bytes(), spread.hops, 1.0),
            (SNAPSHOT, spread.gather_bytes(HASH_BYTES), spread.gather_hops, 1 / settings.snapshot_every),
        ):
            levels = seat.by_level(dict(enumerate(sent)))
            exchanges.append(
                Exchange(
                    operation,
                    levels,
                    spread.messages(hops),
                    dict.fromkeys(levels, hops),
                    "step",
                    per_step=times,
                )
            )
    lag = f"a round's bytes take {spread.lag + 1} steps to reach all ranks, and act so much later"
    return Forecast(tuple(exchanges), kept_bytes(settings, parameters), (lag,) if spread.lag else ())


def forecast_membership(
    settings: OneByteSettings, parameters: Sequence[Parameter], seat: Seat, *, rate_changes: bool
) -> Forecast:
    """The same where machines come and go, each of which is a rank here: what to expect while all of them stay.

    Every machine sends a frame to the leader, rank 0, and the leader the round's record to every other. TCP's own bytes
    are not in it, and no meter of the job counts these: they are `sent_bytes` in the method's metrics.

    Args:
        rate_changes: whether the learning rate is another one in each round, which then travels with it.
    """
    others = [rank for rank in range(seat.size) if rank != seat.rank]
    sent = {_LEADER: FRAME_BYTES + settings.samples}
    if seat.rank == _LEADER:
        record = _round_bytes(seat.size, settings.samples, rate_changes=rate_changes)
        sent = dict.fromkeys(others, packed_bytes(Propose(0, 0, bytes(8), 0, 0, False, False, 1, record)))
    exchanges = []
    if others:
        levels = seat.by_level(sent)
        exchanges.append(
            Exchange(OPERATION, levels, len(sent), dict.fromkeys(levels, 2), "step", exact=False)  # there and back
        )
    remark = "signs of life, joins and what is compared at snapshots come on top; rank 0 is taken to lead"
    return Forecast(tuple(exchanges), kept_bytes(settings, parameters), (remark,))


def kept_bytes(settings: OneByteSettings, parameters: Sequence[Parameter]) -> dict[str, int]:
    """Beside the weights: fp32 copies of those in 16 bits, which weights move, and the signs of a subspace."""
    trained = [p for p in parameters if p.trained]
    states = {
        "masters": sum(4 * p.numel for p in trained if p.dtype.itemsize < 4),
        "masks": sum(-(-p.numel // 8) for p in trained) if settings.kept < 1 else 0,
        "basis": 0,
    }
    if settings.directions == "subspace":
        sides = [(p.shape[0], p.numel // p.shape[0]) for p in trained if len(p.shape) > 1]
        states["basis"] = sum(settings.rank * sum(pair) for pair in sides if min(pair) > settings.rank)
    return {state: count for state, count in states.items() if count}


def _round_bytes(machines: int, samples: int, *, rate_changes: bool) -> bytes:
    """The record of a round to which all have contributed, with its check bytes, whatever they are."""
    roster = Roster(0, tuple(Member(slot, str(slot), "", samples) for slot in range(machines)))
    contributions = tuple(Contribution(slot, bytes(samples)) for slot in range(machines))
    context = Context().after(roster).after(Round(0, 1.0, contributions))
    return encode(Round(1, 0.5 if rate_changes else 1.0, contributions), context) + bytes(CHECK_BYTES)
