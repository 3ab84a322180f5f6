"""The engine that a configuration names, around a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from thinwire.dist.engine.ddp import DDPEngine, wrap_ddp
from thinwire.dist.engine.engine import Engine
from thinwire.dist.methods import attach
from thinwire.dist.optimizers import build_optimizer
from thinwire.dist.world import World

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig


def build_engine(config: RunConfig, model: nn.Module, world: World, *, micro_batches: int) -> Engine:
    """Wrap the model, build its optimizer, and let the method in. Collective.

    Args:
        model: the same on every rank.
        micro_batches: of each step.
    Raises:
        ValueError: the settings do not fit this world or this model.
    """
    return _build_ddp(config, model, world)


def _build_ddp(config: RunConfig, model: nn.Module, world: World) -> DDPEngine:
    wrapped = wrap_ddp(model, config.engine, world.group)
    optimizer = build_optimizer(config.optimizer, model)
    clip_norm = config.train.clip_norm
    method = attach(config.method, model=wrapped, optimizer=optimizer, world=world, clip_norm=clip_norm)
    return DDPEngine(wrapped, optimizer, method, clip_norm=clip_norm, queue=world.queue)
