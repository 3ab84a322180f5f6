"""The engine that a configuration names, around a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from thinwire.comm.allreduce import WIRE_DTYPES, AllReduceSettings
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.dist.engine.ddp import DDPEngine, DDPSettings, wrap_ddp
from thinwire.dist.engine.deepspeed import DeepSpeedEngine, DeepSpeedSettings
from thinwire.dist.engine.engine import Engine
from thinwire.dist.engine.expert_parallel import ExpertParallelEngine
from thinwire.dist.engine.expert_shards import ExpertShards
from thinwire.dist.engine.fsdp2 import FSDP2Engine, FSDP2Settings
from thinwire.dist.methods import attach
from thinwire.dist.models.moe import MoEGPT
from thinwire.dist.optimizers import build_optimizer, plan_optimizer
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
    match config.engine:
        case DDPSettings():
            return _build_ddp(config, config.engine, model, world)
        case FSDP2Settings():
            assert isinstance(config.method, PartitionSettings), "RunConfig refuses other pairs"
            return FSDP2Engine(
                model,
                config.engine,
                config.method,
                plan_optimizer(config.optimizer, model),
                world,
                clip_norm=config.train.clip_norm,
                precision=config.train.precision,
                micro_batches=micro_batches,
            )
        case DeepSpeedSettings():
            assert isinstance(config.method, AllReduceSettings), "RunConfig refuses other pairs"
            return DeepSpeedEngine(
                model,
                config.engine,
                config.method,
                plan_optimizer(config.optimizer, model),
                world,
                micro_batches=micro_batches,
                clip_norm=config.train.clip_norm,
                precision=config.train.precision,
                seed=config.seed,
            )


def _build_ddp(config: RunConfig, settings: DDPSettings, model: nn.Module, world: World) -> DDPEngine:
    experts = _spread_experts(config, model, world)
    wrapped = wrap_ddp(model, settings, world.group)
    optimizer = build_optimizer(config.optimizer, model)
    clip_norm = config.train.clip_norm
    method = attach(config.method, model=wrapped, optimizer=optimizer, world=world, clip_norm=clip_norm)
    if experts is not None:
        return ExpertParallelEngine(wrapped, optimizer, method, clip_norm=clip_norm, queue=world.queue, experts=experts)
    return DDPEngine(wrapped, optimizer, method, clip_norm=clip_norm, queue=world.queue)


def _spread_experts(config: RunConfig, model: nn.Module, world: World) -> ExpertShards | None:
    level = getattr(config.model, "expert_parallel", None)
    if level is None:
        return None
    assert isinstance(model, MoEGPT)
    assert isinstance(config.method, AllReduceSettings), "RunConfig refuses other methods"
    return ExpertShards(model, level, world, wire_dtype=WIRE_DTYPES[config.method.dtype])
