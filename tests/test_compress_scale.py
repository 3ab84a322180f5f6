"""Clipping of the true gradient, and the loss scale of GradScaler, under compression."""

from __future__ import annotations

import pytest
import torch
from compress_models import (
    FEEDBACKS,
    gradients_alone,
    gradients_of,
    inputs_of,
    make_model,
    same,
    tensors_in,
    wrap,
)
from ranks import Rank, run_ranks
from torch import Tensor

from thinwire.comm.compress.compressors import TopK
from thinwire.comm.compress.door import compress


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_clipping_is_of_the_true_gradient_by_one_factor_for_all(scope: str, scale: float) -> None:
    """With a density of 1 what comes out is the mean of the clipped gradients."""

    class Scaler:
        def get_scale(self) -> float:
            return scale

    clip_norm = 0.05

    def work(rank: Rank) -> dict[str, Tensor]:
        queue = rank.queue()
        model = wrap(rank, make_model(), bucket_cap_mb=0.001)
        compressor = TopK(density=1.0, scope=scope)
        method = compress(
            model, compressor=compressor, queue=queue, clip_norm=clip_norm, scaler=Scaler(), dense_below=30
        )
        for step in range(2):
            model.zero_grad()
            before = queue.meter.sent_bytes()
            (scale * model(inputs_of(rank.rank, step)).square().mean()).backward()
            after = queue.meter.sent_bytes()
            assert after["world"] - before.get("world", 0) == method.predicted_bytes()["world"]
        norm = method.metrics()["gradient_norm"]
        squares = [sum(float(g.double().square().sum()) for g in gradients_alone(r, 1).values()) for r in range(3)]
        assert norm == pytest.approx((sum(squares) / 3) ** 0.5, rel=1e-6)
        assert norm > clip_norm
        queue.close()
        return {name: g / scale * norm / clip_norm for name, g in gradients_of(model.module).items()}

    first, second, _ = run_ranks(3, work)
    assert same(first, second)
    for name, unclipped in first.items():
        torch.testing.assert_close(unclipped, sum(gradients_alone(r, 1)[name] for r in range(3)) / 3)


def test_a_gradient_below_the_limit_is_not_touched() -> None:
    def work(rank: Rank) -> list[dict[str, Tensor]]:
        outcomes = []
        for clip_norm in (0.0, 1e3):
            queue = rank.queue(name=str(clip_norm))
            model = wrap(rank, make_model())
            compress(model, compressor="int8", queue=queue, clip_norm=clip_norm, dense_below=30)
            model(inputs_of(rank.rank)).square().mean().backward()
            outcomes.append(gradients_of(model.module))
            queue.close()
        return outcomes

    for plain, clipped in run_ranks(2, work):
        assert same(plain, clipped)


@pytest.mark.parametrize("name", ["ef", "ef21_sgdm", "ef21_bc", "dgc", "lowrank", "global"])
def test_an_overflow_on_one_rank_skips_the_step_everywhere_and_leaves_all_memory_alone(name: str) -> None:
    compressor, feedback = FEEDBACKS[name]

    def work(rank: Rank) -> list[float]:
        queue = rank.queue()
        model = wrap(rank, make_model(), bucket_cap_mb=0.001)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
        method = compress(model, compressor=compressor, feedback=feedback, queue=queue, scaler=scaler, dense_below=30)
        scales = []
        for step in range(4):
            before = tensors_in(method.state_dict())
            weights = {n: p.detach().clone() for n, p in model.module.named_parameters()}
            optimizer.zero_grad()
            loss = model(inputs_of(rank.rank, step)).square().mean()
            if step == 2 and rank.rank == 1:
                loss = loss * 1e38
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            same_weights = same(weights, {n: p.detach() for n, p in model.module.named_parameters()})
            assert same_weights == (step == 2)
            assert same(before, tensors_in(method.state_dict())) == (step == 2)
        assert method.metrics()["skipped_steps"] == 1.0
        queue.close()
        return scales

    assert run_ranks(2, work) == [[256.0, 256.0, 128.0, 128.0]] * 2


@pytest.mark.parametrize("name", ["ef", "ef-two-shot", "ef21_sgdm", "econtrol", "dgc"])
def test_memory_is_kept_without_the_loss_scale(name: str) -> None:
    """Scales are powers of two: whatever they are, and however they change, all bits are those of no scale."""
    compressor, feedback = FEEDBACKS[name]

    class Scaler:
        def __init__(self) -> None:
            self.scale = 1.0

        def get_scale(self) -> float:
            return self.scale

    def work(rank: Rank) -> tuple[dict[str, Tensor], ...]:
        outcomes = []
        for scales in ([1.0, 1.0, 1.0], [1024.0, 2.0, 65536.0]):
            queue = rank.queue(name=str(scales))
            model, scaler = wrap(rank, make_model()), Scaler()
            method = compress(
                model, compressor=compressor, feedback=feedback, queue=queue, scaler=scaler, dense_below=30
            )
            for step, scaler.scale in enumerate(scales):
                model.zero_grad()
                (scaler.scale * model(inputs_of(rank.rank, step)).square().mean()).backward()
            outcomes.append({n: g / scaler.scale for n, g in gradients_of(model.module).items()})
            outcomes.append(tensors_in(method.state_dict()))
            queue.close()
        return tuple(outcomes)

    for gradients, memory, gradients_scaled, memory_scaled in run_ranks(2, work):
        assert same(gradients, gradients_scaled)
        assert same(memory, memory_scaled)
