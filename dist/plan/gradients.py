"""Forecasts of the methods that keep a whole model on each rank: allreduce, compress, local_sgd; and of DeepSpeed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from thinwire.comm.allreduce import AllReduceSettings, forecast_allreduce
from thinwire.comm.compress.forecast import forecast_compress
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.forecast import Forecast, Seat
from thinwire.comm.local_sgd.door import LocalSGDSettings
from thinwire.comm.local_sgd.forecast import forecast_local_sgd
from thinwire.dist.engine.ddp import DDPSettings
from thinwire.dist.engine.deepspeed import DeepSpeedSettings
from thinwire.dist.engine.deepspeed_forecast import forecast_deepspeed
from thinwire.dist.methods import exact_groups
from thinwire.dist.optimizers import plan_optimizer
from thinwire.dist.plan.states import optimizer_bytes, replica_states

if TYPE_CHECKING:
    from thinwire.dist.plan.forecasts import Subject


def forecast_gradients(
    subject: Subject, settings: AllReduceSettings | CompressSettings | LocalSGDSettings, seat: Seat
) -> Forecast:
    """What the rank in this seat will send in a step, and keep, under the engine of the run.

    Raises:
        ValueError: the settings do not fit this model or these levels.
    """
    engine = subject.config.engine
    match settings:
        case AllReduceSettings() if isinstance(engine, DeepSpeedSettings):
            return _forecast_deepspeed(subject, engine, settings, seat)
        case AllReduceSettings():
            inner = exact_groups(settings.exact_within, seat)
            forecast = forecast_allreduce(settings, subject.buckets, seat, inner=inner)
            return _of_replica(subject, _remarking(forecast, settings.exact_within, seat))
        case CompressSettings():
            return _of_replica(subject, _forecast_compress(subject, settings, seat))
        case LocalSGDSettings():
            forecast = forecast_local_sgd(settings, subject.parameters, seat, statistics=statistics_of(subject))
            return _of_replica(subject, forecast, unused_buckets=True)


def _forecast_compress(subject: Subject, settings: CompressSettings, seat: Seat) -> Forecast:
    config = subject.config
    assert isinstance(config.engine, DDPSettings)
    forecast = forecast_compress(
        settings,
        subject.parameters,
        seat,
        buckets=subject.buckets,
        bucket_bytes=config.engine.bucket_bytes,
        inner=exact_groups(settings.exact_within, seat),
        clip_norm=config.train.clip_norm if settings.clip == "before" else 0.0,
    )
    return _remarking(forecast, settings.exact_within, seat)


def _remarking(forecast: Forecast, exact_within: str | None, seat: Seat) -> Forecast:
    if exact_within is None or seat.size_of(exact_within) > 1:
        return forecast
    alone = f"method.exact_within: {exact_within} holds one rank here, so every rank sends by itself"
    return replace(forecast, remarks=(*forecast.remarks, alone))


def _forecast_deepspeed(subject: Subject, engine: DeepSpeedSettings, method: AllReduceSettings, seat: Seat) -> Forecast:
    config, named = subject.config, {p.name: p for p in subject.parameters}
    names = {id(p): name for name, p in subject.model.named_parameters()}
    groups = [
        [named[names[id(p)]] for p in group["params"]]
        for group in plan_optimizer(config.optimizer, subject.model).groups
    ]
    frozen = [p for p in subject.parameters if not p.trained]
    _, micro_batches = config.train.share(seat.size)
    forecast = forecast_deepspeed(engine, method, groups, frozen, seat, micro_batches=micro_batches)
    states = optimizer_bytes(config.optimizer, subject.parameters)
    optim = states if engine.stage == 0 else -(-states // seat.size)
    return replace(forecast, memory_bytes={**forecast.memory_bytes, "optim": optim})


def _of_replica(subject: Subject, forecast: Forecast, *, unused_buckets: bool = False) -> Forecast:
    """With what engine ddp keeps besides; a method without gradients to send leaves DDP's buckets beside them."""
    states = replica_states(subject.config.optimizer, subject.parameters)
    memory = Counter(states) + Counter(forecast.memory_bytes)
    if unused_buckets:
        memory["buffers"] += states["grads"]
    return replace(forecast, memory_bytes=dict(memory))


def statistics_of(subject: Subject) -> int:
    """Elements of the floating-point buffers in the model's state."""
    kept = subject.model.state_dict(keep_vars=True).keys()
    return sum(b.numel() for n, b in subject.model.named_buffers() if n in kept and b.is_floating_point())
