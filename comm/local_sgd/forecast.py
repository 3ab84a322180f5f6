"""What local_sgd() will send and keep, without a process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from thinwire.comm.compress.compressors.dense import Dense
from thinwire.comm.compress.feedback import NoFeedback
from thinwire.comm.compress.forecast import exchanges_of, memory_of, pipeline_of, remarks_on
from thinwire.comm.compress.handle import in_groups
from thinwire.comm.forecast import Exchange, Forecast, Parameter, Seat
from thinwire.comm.local_sgd.outer import AverageSettings
from thinwire.comm.two_shot import TwoShotMean

if TYPE_CHECKING:
    from thinwire.comm.local_sgd.door import LocalSGDSettings


def forecast_local_sgd(
    settings: LocalSGDSettings, parameters: Sequence[Parameter], seat: Seat, *, statistics: int = 0
) -> Forecast:
    """What local_sgd() will send at the end of a round, and keep; between rounds it sends nothing.

    Args:
        parameters: of the model, in its order.
        statistics: elements of the floating-point buffers in the model's state.
    Raises:
        ValueError: the settings do not fit this number of ranks.
    """
    shapes = {p.name: p.shape for p in parameters if p.trained}
    numel = sum(shape.numel() for shape in shapes.values())
    compression, per_step = settings.compression(), 1 / settings.every
    pipeline = pipeline_of(compression, shapes, seat)
    groups = pipeline.exchanged_together(in_groups(shapes, int(settings.bucket_mb * 1e6)))
    exchanges = []
    if statistics:
        sent = seat.by_level(TwoShotMean(torch.float32).sent_bytes(statistics, seat.rank, seat.size))
        exchanges.append(
            Exchange(
                "local_sgd/statistics",
                sent,
                2 * (seat.size - 1),
                dict.fromkeys(sent, 2),
                when="step",
                per_step=per_step,
            )
        )
    for number, group in enumerate(groups):
        operation = f"local_sgd/group{number}"
        exchanges += exchanges_of(pipeline, compression, group, seat, operation, when="step", per_step=per_step)
    plain = isinstance(settings.compressor, Dense) and isinstance(settings.feedback, NoFeedback)
    averaged = plain and isinstance(settings.outer, AverageSettings)
    memory = {"theta": 4 * (numel + statistics)} | memory_of(pipeline, groups, seat)
    if settings.outer.momentum and not averaged:
        memory["momentum"] = 4 * numel
    return Forecast(tuple(exchanges), memory, tuple(remarks_on(compression)))
