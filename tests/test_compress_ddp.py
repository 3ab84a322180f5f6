"""Compression through DDP's hook: buckets, memory, accumulation, resuming, another number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compress_models import (
    FEEDBACKS,
    TOPK,
    errors_of,
    gradients_alone,
    gradients_of,
    inputs_of,
    make_model,
    same,
    tensors_in,
    wrap,
)
from ranks import Rank, run_ranks, run_ranks_to_the_end
from torch import Tensor, nn

from thinwire.comm.compress.compressors import LowRank, TopK
from thinwire.comm.compress.decoded import to_dense
from thinwire.comm.compress.door import compress
from thinwire.comm.compress.draw import Draw
from thinwire.comm.errors import PeerFailedError
from thinwire.comm.wire import PayloadError

BUCKETS_MB = {"one": 25, "two": 0.008, "many": 0.001}


def expected_topk(size: int, steps: int, density: float) -> dict[str, Tensor]:
    """Classic feedback by its formula, one tensor at a time: the gradients of the last step."""
    compressor = TopK(density=density)
    errors = [{name: torch.zeros_like(g) for name, g in gradients_alone(r, 0).items()} for r in range(size)]
    means: dict[str, Tensor] = {}
    for step in range(steps):
        given = [gradients_alone(r, step) for r in range(size)]
        means = {}
        for name in given[0]:
            total = torch.zeros(given[0][name].numel())
            for r in range(size):
                c = given[r][name] + errors[r][name]
                draw = Draw(0, step, name, r)
                sent = to_dense(compressor.decode(compressor.encode(c, draw), c.shape, draw))
                errors[r][name] = c - sent.view_as(c)
                total = total + sent
            means[name] = (total * (1 / size)).view_as(given[0][name])
    return means


@pytest.mark.parametrize("bucket_cap_mb", BUCKETS_MB.values(), ids=BUCKETS_MB)
def test_classic_feedback_is_its_formula_with_1_2_and_many_buckets(bucket_cap_mb: float) -> None:
    def work(rank: Rank) -> tuple[float, dict[str, Tensor]]:
        queue = rank.queue()
        model = wrap(rank, make_model(), bucket_cap_mb=bucket_cap_mb)
        method = compress(model, compressor=TopK(density=0.1), dense_below=0, queue=queue)
        for step in range(4):  # DDP lays its buckets out anew after the first
            model.zero_grad()
            before = queue.meter.sent_bytes()
            model(inputs_of(rank.rank, step)).square().mean().backward()
            sent = {k: v - before.get(k, 0) for k, v in queue.meter.sent_bytes().items()}
            assert sent == method.predicted_bytes()
        queue.close()
        return method.metrics()["groups"], gradients_of(model.module)

    (groups, first), (_, second), _ = run_ranks(3, work)
    assert groups == {25: 1, 0.008: 2, 0.001: 10}[bucket_cap_mb]
    assert same(first, second)
    assert same(first, expected_topk(3, 4, 0.1))


@pytest.mark.parametrize(("compressor", "feedback"), FEEDBACKS.values(), ids=FEEDBACKS)
@pytest.mark.parametrize("bucket_cap_mb", [25, 0.001], ids=["one bucket", "many"])
def test_resuming_is_bit_for_bit_with_every_feedback(compressor: Any, feedback: Any, bucket_cap_mb: float) -> None:
    def train(rank: Rank, stop_at: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        queue = rank.queue(name=f"queue-{stop_at}")

        def start() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
            model = wrap(rank, make_model(3), bucket_cap_mb=bucket_cap_mb)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            method = compress(
                model,
                compressor=compressor,
                feedback=feedback,
                dense_below=30,
                queue=queue,
                optimizer=optimizer,
                seed=3,
            )
            return model, optimizer, method

        model, optimizer, method = start()
        for step in range(6):
            if step == stop_at:
                weights, state = model.state_dict(), method.state_dict()
                model, optimizer, method = start()
                model.load_state_dict(weights)
                method.load_state_dict(state)
            optimizer.zero_grad()
            model(inputs_of(rank.rank, step)).square().mean().backward()
            optimizer.step()
        queue.close()
        return dict(model.module.state_dict()), tensors_in(method.state_dict())

    def work(rank: Rank) -> dict[str, Tensor]:
        weights, state = train(rank, -1)
        weights_resumed, state_resumed = train(rank, 3)
        assert same(weights, weights_resumed)
        assert same(state, state_resumed)
        return weights

    first, second = run_ranks(2, work)
    assert same(first, second)


def test_what_breaks_torchs_powersgd_on_gloo_works() -> None:
    """Eight layers in several buckets: torch's powerSGD_hook interleaves its all-reduces, and aborts or hangs."""

    def work(rank: Rank) -> tuple[list[float], dict[str, Tensor]]:
        queue = rank.queue()
        model = wrap(rank, make_model(8, 256), bucket_cap_mb=0.3)
        method = compress(model, compressor=LowRank(rank=2), queue=queue)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = (model(inputs_of(rank.rank, 0, 256)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert method.metrics()["groups"] == 8
        queue.close()
        return losses, dict(model.module.state_dict())

    (losses, first), (_, second) = run_ranks(2, work)
    assert same(first, second)
    assert losses[-1] < 0.95 * losses[0]


def test_nothing_is_lost_what_was_sent_and_what_is_kept_add_up() -> None:
    def work(rank: Rank) -> float:
        queue = rank.queue()
        model = wrap(rank, make_model())
        method = compress(model, compressor=TopK(density=0.05, scope="global"), queue=queue)
        received = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.module.named_parameters()}
        kept = 0
        for step in range(5):
            model.zero_grad()
            model(inputs_of(rank.rank, step)).square().mean().backward()
            kept += sum(int((p.grad != 0).sum()) for p in model.parameters())
            for name, p in model.module.named_parameters():
                received[name] += p.grad
        # With one rank, what is received is what it sent.
        assert kept == 5 * round(0.05 * sum(p.numel() for p in model.parameters()))
        given = [gradients_alone(rank.rank, step) for step in range(5)]
        queue.close()
        return max(
            float((received[n] + errors_of(method)[n].double() - sum(g[n].double() for g in given)).abs().max())
            for n in received
        )

    (difference,) = run_ranks(1, work)
    assert difference < 1e-6


def test_accumulation_sends_the_sum_once() -> None:
    def work(rank: Rank) -> dict[str, Tensor]:
        queue = rank.queue()
        model = wrap(rank, make_model(), gradient_as_bucket_view=False)
        method = compress(model, compressor="none", feedback="ef", queue=queue)
        with model.no_sync():
            model(inputs_of(rank.rank, 0)).square().mean().backward()
        assert queue.meter.sent_bytes() == {}
        model(inputs_of(rank.rank, 1)).square().mean().backward()
        assert queue.meter.sent_bytes() == method.predicted_bytes()
        queue.close()
        return gradients_of(model.module)

    first, second = run_ranks(2, work)
    assert same(first, second)
    for name, gradient in first.items():
        expected = sum(gradients_alone(r, step)[name] for r in range(2) for step in range(2)) / 2
        torch.testing.assert_close(gradient, expected)


def test_another_number_of_ranks_starts_with_the_mean_of_the_errors() -> None:
    states: dict[int, Any] = {}
    errors: dict[int, dict[str, Tensor]] = {}

    def before(rank: Rank) -> None:
        queue = rank.queue()
        model = wrap(rank, make_model())
        method = compress(model, compressor=TOPK, dense_below=0, queue=queue)
        model(inputs_of(rank.rank)).square().mean().backward()
        states[rank.rank], errors[rank.rank] = method.state_dict(), errors_of(method)
        queue.close()

    def after(rank: Rank) -> dict[str, Tensor]:
        queue = rank.queue()
        method = compress(wrap(rank, make_model()), compressor=TOPK, dense_below=0, queue=queue)
        method.load_state_dict({"all_ranks": [states[r] for r in range(3)]})
        queue.close()
        return errors_of(method)

    run_ranks(3, before)
    for size in (1, 4):
        for found in run_ranks(size, after):
            for name, error in found.items():
                torch.testing.assert_close(error, sum(errors[r][name] for r in range(3)) / 3, rtol=1e-6, atol=1e-7)


def test_first_steps_are_dense_until_start_step() -> None:
    def work(rank: Rank) -> list[dict[str, Tensor]]:
        queue = rank.queue()
        model = wrap(rank, make_model(), bucket_cap_mb=0.001)
        method = compress(model, compressor=TOPK, dense_below=0, start_step=2, queue=queue)
        outcomes = []
        for step in range(3):
            model.zero_grad()
            before = queue.meter.sent_bytes()
            model(inputs_of(rank.rank, step)).square().mean().backward()
            sent = queue.meter.sent_bytes()["world"] - before.get("world", 0)
            assert sent == method.predicted_bytes()["world"]
            outcomes.append(gradients_of(model.module))
        queue.close()
        return outcomes

    for outcomes in run_ranks(2, work):
        for step in range(2):
            for name, gradient in outcomes[step].items():
                assert torch.equal(gradient, (gradients_alone(0, step)[name] + gradients_alone(1, step)[name]) * 0.5)
        assert all(int((g != 0).sum()) <= 2 * 0.1 * g.numel() + 2 for g in outcomes[2].values())


def test_half_precision_and_any_layout_are_taken() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x.to(self.conv.weight.dtype)).mean((2, 3)))

    def work(rank: Rank) -> dict[str, Tensor]:
        outcomes = {}
        for dtype in (torch.float32, torch.bfloat16):
            queue = rank.queue(name=str(dtype))
            torch.manual_seed(0)
            net = Net().to(dtype)
            with torch.no_grad():
                for p in net.parameters():
                    p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
            model = wrap(rank, net)
            compress(model, compressor="none", feedback="none", queue=queue)
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank.rank))
            x = x.contiguous(memory_format=torch.channels_last)
            model(x).square().sum().backward()
            for name, p in net.named_parameters():
                assert p.grad.dtype == dtype
                outcomes[f"{name} {dtype}"] = p.grad.clone()
            alone = Net().to(dtype)
            alone.load_state_dict(net.state_dict())
            alone(x).square().sum().backward()
            if rank.size == 1:
                for name, p in alone.named_parameters():
                    torch.testing.assert_close(outcomes[f"{name} {dtype}"], p.grad)
            queue.close()
        return outcomes

    run_ranks(1, work)
    first, second = run_ranks(2, work)
    assert same(first, second)


def test_groups_of_ranks_average_exactly_and_send_one_message() -> None:
    pairs = [[0, 1], [2, 3]]
    levels = [["self" if r == q else "pair" if r // 2 == q // 2 else "world" for q in range(4)] for r in range(4)]

    def work(rank: Rank) -> dict[str, Tensor]:
        queue = rank.queue(levels=levels[rank.rank])
        model = wrap(rank, make_model())
        method = compress(model, compressor="bf16", exact_within=pairs, queue=queue)
        model(inputs_of(rank.rank // 2)).square().mean().backward()
        sent = queue.meter.sent_bytes()
        assert sent == method.predicted_bytes()
        assert sent["pair"] > sent["world"] > 0
        queue.close()
        return gradients_of(model.module)

    def flat(rank: Rank) -> dict[str, Tensor]:
        queue = rank.queue()
        model = wrap(rank, make_model())
        compress(model, compressor="bf16", queue=queue)
        model(inputs_of(rank.rank)).square().mean().backward()
        queue.close()
        return gradients_of(model.module)

    outcomes = run_ranks(4, work)
    assert all(same(outcomes[0], other) for other in outcomes[1:])
    expected, _ = run_ranks(2, flat)  # both ranks of a pair have one batch, so a pair is as one rank
    for name, gradient in outcomes[0].items():
        assert torch.equal(gradient, expected[name])


def test_ranks_with_other_settings_are_found_out_with_typed_errors() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue(timeout_s=5)
        model = wrap(rank, make_model())
        compress(model, compressor=["bf16", "fp16"][rank.rank], queue=queue)
        try:
            model(inputs_of(rank.rank)).square().mean().backward()
        finally:
            queue.close()

    outcomes = run_ranks_to_the_end(2, work)
    assert all(isinstance(outcome, PayloadError | PeerFailedError) for outcome in outcomes), outcomes


def test_removed_method_averages_with_torchs_own_all_reduce() -> None:
    def work(rank: Rank) -> dict[str, Tensor]:
        queue = rank.queue()
        model = wrap(rank, make_model())
        compress(model, compressor="int8", queue=queue).remove()
        model(inputs_of(rank.rank)).square().mean().backward()
        assert queue.meter.sent_bytes() == {}
        queue.close()
        return gradients_of(model.module)

    first, second = run_ranks(2, work)
    assert same(first, second)


def test_the_table_says_what_is_sent_and_why() -> None:
    def work(rank: Rank) -> str:
        queue = rank.queue()
        method = compress(wrap(rank, make_model(2, 64)), compressor=TopK(density=0.01, values="int8"), queue=queue)
        queue.close()
        return method.describe()

    (table,) = run_ranks(1, work)
    lines = table.splitlines()
    assert lines[0].split() == ["tensor", "shape", "codec", "dense", "bytes", "sent", "bytes", "reason"]
    assert "0.weight" in table
    assert any(
        "16,384" in line and "topk" in line and "values int8" in line and "density 0.01" in line for line in lines
    )
    assert any("0.bias" in line and "fewer than 1,024 elements" in line for line in lines)
    assert "times smaller" in lines[-1]


def test_parameters_that_are_not_used_leave_no_trace_in_the_memory() -> None:
    """DDP itself then refuses the next forward, and names the parameters."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = make_model(1), make_model(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    def work(rank: Rank) -> None:
        queue = rank.queue()
        model = wrap(rank, Half())
        method = compress(model, compressor=TOPK, dense_below=0, queue=queue)
        model(inputs_of(rank.rank)).sum().backward()
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            model(inputs_of(rank.rank))
        assert tensors_in(method.state_dict()) == {}
        queue.close()

    run_ranks(2, work)
