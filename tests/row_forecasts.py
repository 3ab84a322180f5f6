"""Forecasts of the contract's rows that average gradients or weights, by what their handles were made of."""

from __future__ import annotations

from collections.abc import Sequence

from contract_rows import GROUPS, Row
from contract_run import Run

from thinwire.comm.allreduce import AllReduce, AllReduceSettings, forecast_allreduce
from thinwire.comm.compress.ddp import CompressedDDP
from thinwire.comm.compress.forecast import forecast_compress
from thinwire.comm.forecast import Forecast, Parameter, Seat
from thinwire.comm.local_sgd.door import LocalSGDSettings
from thinwire.comm.local_sgd.forecast import forecast_local_sgd
from thinwire.comm.local_sgd.handle import LocalSGD
from thinwire.comm.local_sgd.outer import AverageSettings
from thinwire.comm.method import Method


def forecast_of(row: Row, run: Run, seat: Seat) -> Forecast:
    """By what the handle was made of."""
    parameters = [Parameter(name, p.shape, p.dtype) for name, p in run.model.named_parameters()]
    buckets = [parameters[::-1]]
    match run.method:
        case AllReduce():
            settings = AllReduceSettings.model_validate({"dtype": row.name.split("-")[1]})
            return forecast_allreduce(settings, buckets, seat, inner=groups_of(row, seat))
        case CompressedDDP():
            return forecast_compress(
                run.method.settings,
                parameters,
                seat,
                buckets=buckets,
                bucket_bytes=25 << 20,
                inner=groups_of(row, seat),
                clip_norm=run.method.clip_norm,
            )
        case LocalSGD():
            return forecast_local_sgd(settings_of(run.method), parameters, seat)
        case _:
            raise AssertionError(row.name)


def groups_of(row: Row, seat: Seat) -> Sequence[Sequence[int]] | None:
    return GROUPS[seat.size] if row.name.endswith("-in-groups") else None


def before_any(method: Method) -> dict[str, float]:
    """What the handle itself expects of a step, before there was one."""
    if isinstance(method, LocalSGD):
        return {level: count / method._every for level, count in method._bytes_of_exchange().items()}
    return dict(method.predicted_bytes())


def settings_of(method: LocalSGD) -> LocalSGDSettings:
    sent = method._exchange.settings
    return LocalSGDSettings(
        every=method._every,
        outer=method._outer._settings if method._outer else AverageSettings(),
        compressor=sent.compressor,  # type: ignore[arg-type]
        feedback=sent.feedback,
        collective=sent.collective,
        dense_below=sent.dense_below,
    )
