"""Two hosts of two ranks each, as four processes, with a model under DeepSpeed.

    python deepspeed_program.py FOLDER

runs every function of SCENARIOS on all ranks, and writes to FOLDER/RANK.json what each raised ("" = nothing).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked_ranks import fork_ranks
from torch import nn

from thinwire.comm.allreduce import AllReduceSettings, allreduce
from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.errors import NonFiniteGradientError
from thinwire.comm.forecast import Parameter, seat_of
from thinwire.dist.engine.ddp import DDPEngine, DDPSettings, wrap_ddp
from thinwire.dist.engine.deepspeed import DeepSpeedEngine, DeepSpeedSettings
from thinwire.dist.engine.deepspeed_forecast import forecast_deepspeed
from thinwire.dist.engine.engine import Engine
from thinwire.dist.mesh import LevelSettings, MeshSettings
from thinwire.dist.models.moe import MoEGPT, MoESettings
from thinwire.dist.optimizers import AdamWSettings, SGDSettings, build_optimizer, plan_optimizer
from thinwire.dist.world import World, WorldSettings, join
from thinwire.launch.env import detect

RANKS, MICRO_BATCHES, CLIP = 4, 2, 0.5
ADAMW, SGD = AdamWSettings(lr=1e-2), SGDSettings(lr=0.3, momentum=0.5)
WHOLE_STAGE_3 = {"stage": 3, "persist_below": 0, "keep_gathered": 0}  # or a model of this size is never sharded
HPZ = {**WHOLE_STAGE_3, "secondary": "node"}


def new_model() -> nn.Sequential:
    """Weights that four ranks cannot share equally, and one that does not learn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 25), nn.Tanh(), nn.LayerNorm(25), nn.Linear(25, 7))
    model[2].bias.requires_grad_(False)
    return model


def new_engine(
    world: World, optimizer: Any = ADAMW, model: nn.Module | None = None, **settings: Any
) -> DeepSpeedEngine:
    model = model or new_model()
    return DeepSpeedEngine(
        model,
        DeepSpeedSettings.model_validate(settings),
        AllReduceSettings(),
        plan_optimizer(optimizer, model),
        world,
        micro_batches=MICRO_BATCHES,
        clip_norm=CLIP,
        precision="fp32",
        seed=0,
    )


def train(engine: Engine, world: World, steps: range) -> list[tuple[float, float]]:
    """The loss of this rank and the norm of the mean gradient in each step."""
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + world.rank)
        total = 0.0
        for i in range(MICRO_BATCHES):
            inputs = torch.randn(4, 12, generator=generator)
            targets = torch.randint(0, 7, (4,), generator=generator)
            with engine.micro_batch(last=i == MICRO_BATCHES - 1):
                loss = F.cross_entropy(engine.forward(inputs), targets) / MICRO_BATCHES
                engine.backward(loss)
            total += float(loss.detach())
        seen.append((total, engine.step()))
    return seen


def with_ddp(world: World, optimizer: Any, steps: range) -> list[tuple[float, float]]:
    model = new_model()
    wrapped = wrap_ddp(model, DDPSettings(), world.group)
    method = allreduce(wrapped, queue=world.queue)
    engine = DDPEngine(wrapped, build_optimizer(optimizer, model), method, clip_norm=CLIP, queue=world.queue)
    return train(engine, world, steps)


def refuses_what_is_not_finite(engine: DeepSpeedEngine, world: World) -> None:
    before = engine.shared_state()["model"]
    poison = torch.full((4, 12), torch.nan if world.rank == 3 else 1.0)
    for last in (False, True):
        with engine.micro_batch(last=last):
            engine.backward(engine.forward(poison).sum())
    with pytest.raises(NonFiniteGradientError):
        engine.step()
    after = engine.shared_state()["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def assert_foretold(engine: DeepSpeedEngine, world: World, **stage: Any) -> None:
    """What an engine with ADAMW and new_model() has sent in its last step is what its forecast says."""
    model = new_model()
    known = {p: Parameter(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    forecast = forecast_deepspeed(
        DeepSpeedSettings.model_validate(stage),
        AllReduceSettings(),
        [[known[p] for p in group["params"]] for group in plan_optimizer(ADAMW, model).groups],
        [parameter for parameter in known.values() if not parameter.trained],
        seat_of([("node", 2), ("world", RANKS)], world.rank),
        micro_batches=MICRO_BATCHES,
    )
    assert engine.method.predicted_bytes() == forecast.bytes_per_step(), stage


def every_stage_equals_ddp(world: World) -> None:
    """Of stage 3 some weights stay whole, some are kept from forward to backward, and some are not."""
    expected = with_ddp(world, ADAMW, range(3))
    assert expected[0][1] > CLIP
    for stage in ({"stage": 0}, {"stage": 1}, {"stage": 3, "persist_below": 100}):
        engine = new_engine(world, **stage)
        torch.testing.assert_close(train(engine, world, range(3)), expected, rtol=1e-6, atol=0, msg=str(stage))
        assert_foretold(engine, world, **stage)
        refuses_what_is_not_finite(engine, world)
        engine.close()


def a_run_resumes_bit_for_bit_and_in_another_stage(world: World) -> None:
    expected = with_ddp(world, ADAMW, range(4))
    for stage, others in (({"stage": 2}, ()), (HPZ, (0,))):
        engine = new_engine(world, **stage)
        seen = train(engine, world, range(2))
        shared, own = engine.shared_state(), engine.own_state()
        seen += train(engine, world, range(2, 4))
        torch.testing.assert_close(seen, expected, rtol=1e-6, atol=0, msg=str(stage))
        assert_foretold(engine, world, **stage)
        engine.close()
        other = new_model()
        for parameter in other.parameters():
            parameter.detach().add_(1)
        resumed = new_engine(world, model=other, **stage)
        resumed.load_state(shared, own, {})
        assert train(resumed, world, range(2, 4)) == seen[2:], stage
        resumed.close()
        for one in others:
            engine = new_engine(world, stage=one)
            engine.load_state(shared, None, {rank: own for rank in range(8)})
            torch.testing.assert_close(train(engine, world, range(2, 4)), expected[2:], rtol=1e-6, atol=0)
            part = {name: weight for name, weight in shared["model"].items() if name != "0.weight"}
            with pytest.raises(
                ValueError, match=r"not written by engine deepspeed with this model: 0\.weight are missing"
            ):
                engine.load_state({**shared, "model": part}, own, {})
            engine.close()


def sgd_sees_no_factor_and_hpz_spares_the_slow_link(world: World) -> None:
    expected = with_ddp(world, SGD, range(3))
    sent = []
    for stage in (WHOLE_STAGE_3, HPZ):
        engine = new_engine(world, SGD, **stage)
        seen = train(engine, world, range(2))
        before = world.queue.meter.sent_bytes("deepspeed")
        seen += train(engine, world, range(2, 3))
        after = world.queue.meter.sent_bytes("deepspeed")
        torch.testing.assert_close(seen, expected, rtol=1e-6, atol=0, msg=str(stage))
        sent.append({level: after[level] - before[level] for level in after})
        assert sent[-1] == engine.method.predicted_bytes()
        engine.close()
    assert sent[1]["world"] < sent[0]["world"]


def quantised_wires_train_and_leave_all_ranks_the_same_weights(world: World) -> None:
    plain = with_ddp(world, ADAMW, range(3))
    engine = new_engine(
        world, **WHOLE_STAGE_3, gather="int8", gradients={"node": "int8", "world": {"kind": "int4", "block": 32}}
    )
    engine._comm._exact_below = 64  # this model's gradients are smaller than what is worth a format
    seen = train(engine, world, range(3))
    assert seen != plain
    torch.testing.assert_close([loss for loss, _ in seen], [loss for loss, _ in plain], rtol=0.05, atol=0)
    with torch.no_grad():
        scores = engine.network(torch.ones(1, 12))
    gathered = world.queue.submit("test", lambda channel: channel.all_gather_same(scores)).wait()
    assert all(torch.equal(gathered[0], other) for other in gathered)
    engine.close()


def what_cannot_work_is_refused(world: World) -> None:
    for match, settings in (
        ("engine.secondary: the mesh has no level 'rack'", {"stage": 3, "secondary": "rack"}),
        ("engine.secondary: world holds 4 of the 4 ranks", {"stage": 3, "secondary": "world"}),
        ("secondary: node with stage 2", {"stage": 2, "secondary": "node"}),
        ("gather: stage 0 gathers no weights", {"stage": 0, "gather": "int8"}),
        ("gradients.rack: the machine has no such level", {"stage": 1, "gradients": {"rack": "bf16"}}),
        ("feedback: true, but DeepSpeed", {"stage": 1, "gradients": {"world": {"kind": "int4", "feedback": True}}}),
    ):
        with pytest.raises(ValueError, match=match):
            new_engine(world, **settings)


def balance_pulls_as_under_ddp(world: World) -> None:
    """In mode sync every micro-batch's backward pass waits for counts, while DeepSpeed has collectives under way."""
    shape = MoESettings(layers=1, heads=1, width=8, context=8, experts=5, top_k=2, expert_width=4)
    expected: list[float] = []
    for stage in (None, 2, 3):
        model = MoEGPT(shape, vocab=11)
        model.initialise(seed=0)
        queue = world.queue.beside("balance")
        # With this coefficient the gradient is that of the balancing loss for the most part.
        balance = LoadBalance(
            num_experts=5, top_k=2, coef=5.0, mode="sync", micro_batches=MICRO_BATCHES, ranks="mean", queue=queue
        )
        model.balance_with(balance)
        engine: Engine
        if stage is None:
            wrapped = wrap_ddp(model, DDPSettings(), world.group)
            method = allreduce(wrapped, queue=world.queue)
            engine = DDPEngine(wrapped, build_optimizer(SGD, model), method, clip_norm=CLIP, queue=world.queue)
        else:
            engine = new_engine(world, SGD, model, stage=stage, persist_below=0, keep_gathered=0)
        norms = []
        for step in range(2):
            tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(10 * step + world.rank))
            for i in range(MICRO_BATCHES):
                with engine.micro_batch(last=i == MICRO_BATCHES - 1):
                    scores = engine.forward(tokens[i : i + 1, :-1])
                    engine.backward(F.cross_entropy(scores.flatten(0, 1), tokens[i, 1:]) / MICRO_BATCHES)
            norms.append(engine.step())
        assert balance.metrics()["messages"] == 2 * MICRO_BATCHES
        expected = expected or norms
        torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0, msg=f"stage {stage}")
        engine.close()
        queue.close()


SCENARIOS: Sequence[Callable[[World], None]] = (
    every_stage_equals_ddp,
    a_run_resumes_bit_for_bit_and_in_another_stage,
    sgd_sees_no_factor_and_hpz_spares_the_slow_link,
    quantised_wires_train_and_leave_all_ranks_the_same_weights,
    what_cannot_work_is_refused,
    balance_pulls_as_under_ddp,
)


def run_rank(rank: int, port: int, folder: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    elastic = {"TORCHELASTIC_RUN_ID": "t", "TORCHELASTIC_USE_AGENT_STORE": True}  # the store is there already
    os.environ.update({name: str(value) for name, value in {**place, **where, **elastic}.items()})
    torch.set_num_threads(1)
    levels = MeshSettings(levels=(LevelSettings(name="node", size=2),))
    world = join(detect(), WorldSettings(timeout_s=60.0), levels)
    outcomes = {}
    for scenario in SCENARIOS:
        try:
            scenario(world)
            outcomes[scenario.__name__] = ""
        except BaseException:
            outcomes[scenario.__name__] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    world.close()


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # before the fork: importing it once takes a quarter of the time

    given = Path(sys.argv[1])
    sys.exit(any(fork_ranks(RANKS, lambda rank, port: run_rank(rank, port, given))))
