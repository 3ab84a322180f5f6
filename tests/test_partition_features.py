"""What FSDP2 can do besides, under partition(): precision, prefetch, checkpointing, groups, meta device, schedulers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from partition_nets import SGD, START, Net, backward, batch, close, enter, net, reference, train, whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.partition.gather import Gather
from thinwire.comm.partition.optimizer import PartitionedOptimizer
from thinwire.dist.models.gpt import GPT, GPTSettings


def keeps_what_is_gathered_and_computed_in_bf16(place: TorchRank) -> None:
    """compute_dtype casts gathers, not shards; the oracle sees rounded weights and inputs and sums in fp32."""
    model = copy.deepcopy(START)
    queue = place.queue(name="bf16")
    optimizer = enter(place, model, compute_dtype=torch.bfloat16, queue=queue)
    oracle, rounded = copy.deepcopy(START), copy.deepcopy(START).bfloat16()
    for step in range(2):
        before = queue.meter.sent_bytes()
        backward(model, place.rank, step)
        optimizer.step()
        sent = {level: n - before.get(level, 0) for level, n in queue.meter.sent_bytes().items()}
        assert sum(optimizer.predicted_bytes().values()) == sum(sent.values()) - NORM_BYTES
        total = {name: torch.zeros_like(p) for name, p in oracle.named_parameters()}
        for rank in range(place.size):
            rounded.load_state_dict(oracle.state_dict())
            rounded.zero_grad()
            rounded(batch(rank, step).bfloat16()).float().square().mean().backward()
            for name, p in rounded.named_parameters():
                total[name] += p.grad.float()  # type: ignore[union-attr]
        with torch.no_grad():
            for name, p in oracle.named_parameters():
                p.sub_(0.25 * total[name] / place.size)
    close(whole(model), dict(oracle.named_parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


NORM_BYTES = 16  # of the gradient's norm and whether it is finite, to one other rank


def keeps_bf16_weights_and_exact_masters(place: TorchRank) -> None:
    """Updates far below the resolution of bf16 add up in the masters, which begin from the values before rounding."""
    model = copy.deepcopy(START)
    optimizer = enter(place, model, weights="bf16", lr=2**-10)
    masters = {name: p.detach().clone() for name, p in START.named_parameters()}
    rounded = copy.deepcopy(START).bfloat16()
    for step in range(3):
        backward(model, place.rank, step)
        optimizer.step()
        total = {name: torch.zeros_like(p) for name, p in masters.items()}
        for rank in range(place.size):
            rounded.load_state_dict(masters)
            rounded.zero_grad()
            rounded(batch(rank, step).bfloat16()).float().square().mean().backward()
            for name, p in rounded.named_parameters():
                total[name] += p.grad.float()  # type: ignore[union-attr]
        for name in masters:
            masters[name] -= 2**-10 * (total[name] / place.size)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    close(whole(model), {name: p.bfloat16() for name, p in masters.items()}, 2**-8)
    for part in optimizer._units:
        for name, master in part.masters.items():
            assert isinstance(master, DTensor)
            assert master.dtype == torch.float32
            torch.testing.assert_close(master.full_tensor().detach(), masters[name], rtol=1e-6, atol=1e-7)


def gathers_as_often_with_checkpoints_and_prefetch(place: TorchRank) -> None:
    """Recomputation shares the gather of its backward: two per block, one of the root, whatever is fetched ahead."""
    expected = reference(place.size, 2)
    for ahead in (0, 1, 2):
        model = copy.deepcopy(START)
        model.checkpointed = ahead != 1
        optimizer = enter(place, model, prefetch=ahead, queue=place.queue(name=f"ahead{ahead}"))
        under_way: list[int] = []
        watch_gathers(optimizer, under_way)
        for step in range(2):
            backward(model, place.rank, step)
            optimizer.step()
            assert optimizer.metrics()["gathers"] == 2 * len(model.blocks) + 1
        assert max(under_way) == ahead + 1
        close(whole(model), expected)
        optimizer.remove()


def watch_gathers(optimizer: PartitionedOptimizer, under_way: list[int]) -> None:
    """Note how many blocks are gathered or about to be, each time that one more is asked for."""
    groups = [gather.unit._group for gather in optimizer._gathers if not gather.unit.is_root]

    def watch(gather: Gather) -> None:
        submit = gather._queue.submit

        def submit_and_note(operation: str, exchange: Any) -> Any:
            held = [g for g in groups if g._all_gather_result is not None or g.is_unsharded]
            under_way.append(len(held) + (not gather.unit.is_root))
            return submit(operation, exchange)

        gather._queue = SimpleNamespace(submit=submit_and_note)  # type: ignore[assignment]

    for gather in optimizer._gathers:
        watch(gather)


def accumulates_with_and_without_gradient_sync(place: TorchRank) -> None:
    """Four micro-batches reduced one by one, or kept whole until the last, or sent with the last backward."""
    oracle = copy.deepcopy(START)
    for step in range(4):
        for rank in range(place.size):
            backward(oracle, rank, step, 1 / place.size)
    for way in ("one by one", "no sync", "overlapped"):
        model = copy.deepcopy(START)
        optimizer = enter(place, model, lr=1.0, queue=place.queue(name=way.replace(" ", "_")))
        for step in range(4):
            if way == "no sync":
                model.set_requires_gradient_sync(step == 3)
            if way == "overlapped":
                model.set_requires_all_reduce(step == 3)
            backward(model, place.rank, step)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        close(whole(model), {name: p - p.grad for name, p in oracle.named_parameters()})  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"optimizer.step\(\): there is no gradient"):
            optimizer.step()


def clips_by_the_norm_of_the_mean(place: TorchRank) -> None:
    oracle = copy.deepcopy(START)
    for rank in range(place.size):
        backward(oracle, rank, 0, 1 / place.size)
    norm = float(nn.utils.clip_grad_norm_(oracle.parameters(), 0.01))
    model = copy.deepcopy(START)
    optimizer = enter(place, model, lr=1.0, clip_norm=0.01)
    backward(model, place.rank, 0)
    optimizer.step()
    assert optimizer.metrics()["gradient_norm"] == pytest.approx(norm, rel=1e-6)
    close(whole(model), {name: p - p.grad for name, p in oracle.named_parameters()})  # type: ignore[operator]


def leaves_frozen_and_groups_to_themselves(place: TorchRank) -> None:
    """A frozen block, a frozen bias, two groups with rates of their own, and a scheduler that changes both."""

    def freeze(model: Net) -> Net:
        model.blocks[1].requires_grad_(False)
        model.last.bias.requires_grad_(False)
        return model

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in trained if name.endswith("bias")], "lr": 0.5},
            {"params": [p for name, p in trained if not name.endswith("bias")], "weight_decay": 0.125},
        ]

    model, plain = freeze(copy.deepcopy(START)), freeze(copy.deepcopy(START))
    queue = place.queue()
    optimizer = enter(place, model, parameter_groups=groups(model), queue=queue)
    inner = SGD(groups(plain), lr=0.25)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (optimizer, inner)]
    for step in range(3):
        before = sum(queue.meter.sent_bytes().values())
        backward(model, place.rank, step)
        predicted = sum(optimizer.predicted_bytes().values())
        optimizer.step()
        assert sum(queue.meter.sent_bytes().values()) - before == predicted + NORM_BYTES
        inner.zero_grad()
        for rank in range(place.size):
            backward(plain, rank, step, 1 / place.size)
        inner.step()
        for schedule in schedules:
            schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0625, 0.03125]
    close(whole(model), dict(plain.named_parameters()))
    assert "model.blocks.1" not in optimizer.describe()
    model.last.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"requires_grad of last.bias has changed since partition\(\)"):
        backward(model, place.rank, 0)


def counts_what_no_rank_used_as_zero(place: TorchRank) -> None:
    """A block is left out of the first step, and of the third: SGD leaves it as it was."""
    model, plain = copy.deepcopy(START), copy.deepcopy(START)
    optimizer, inner = enter(place, model), SGD(plain.parameters(), lr=0.25)
    for step, skipped in enumerate([(1,), (), (1,)]):
        model.skipped = plain.skipped = skipped
        backward(model, place.rank, step)
        optimizer.step()
        inner.zero_grad()
        for rank in range(place.size):
            backward(plain, rank, step, 1 / place.size)
        inner.step()
    close(whole(model), dict(plain.named_parameters()))


def evaluates_between_backward_and_step(place: TorchRank) -> None:
    """The root stays gathered after an evaluation, blocks that were fetched ahead too: a step must let go of both."""
    model = copy.deepcopy(START)
    optimizer = enter(place, model, prefetch=2)
    for step in range(2):
        backward(model, place.rank, step)
        model.skipped = (2,)
        with torch.no_grad():
            model(batch(0, 7))
        model.skipped = ()
        optimizer.step()
    close(whole(model), reference(place.size, 2))


def begins_on_the_meta_device(place: TorchRank) -> None:
    with torch.device("meta"):
        model = Net()
    optimizer = enter(place, model, torch.optim.AdamW, lr=0.01)
    with pytest.raises(ValueError, match=r"still on the meta device, without values; call model.to_empty"):
        backward(model, place.rank, 0)
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        mine = torch.distributed.tensor.distribute_tensor(
            START.get_parameter(name).detach(), p.device_mesh, p.placements
        )
        p.data.copy_(mine)
    train(place, model, optimizer, 3)
    close(whole(model), reference(place.size, 3, torch.optim.AdamW, lr=0.01))
    with torch.device("meta"):
        rounded = Net()
    enter(place, rounded, weights="bf16", params="rank", grads="rank", queue=optimizer._queue)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    rounded.to_empty(device="cpu")
    for p in rounded.parameters():
        p.data.fill_(1.0 + (place.rank if p is rounded.last.bias else 0))
    with pytest.raises(
        ValueError, match="rank 1 begins with other values than the first rank that holds the same shard"
    ):
        rounded(batch(0, 0))


def refuses_other_weights(place: TorchRank) -> None:
    model = net(seed=place.rank == 1)
    with pytest.raises(ValueError, match="model: rank 1 begins with other parameters than rank 0"):
        enter(place, model)
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def compiles_between_its_gathers(place: TorchRank) -> None:
    with pytest.raises(ValueError, match=r"model: it is compiled already.*model.compile\(\)"):
        enter(place, torch.compile(copy.deepcopy(START)))
    model = copy.deepcopy(START)
    optimizer = enter(place, model)
    model.compile(backend="aot_eager")
    train(place, model, optimizer, 2)
    assert optimizer.metrics()["gathers"] == 2 * len(model.blocks) + 1
    close(whole(model), reference(place.size, 2))


def leaves_a_plain_fsdp2_model(place: TorchRank) -> None:
    model = copy.deepcopy(START)
    optimizer = enter(place, model)
    train(place, model, optimizer, 1)
    optimizer.remove()
    plain = SGD(model.parameters(), lr=0.25, foreach=True)
    backward(model, place.rank, 1)
    plain.step()
    close(whole(model), reference(place.size, 2))


def gathers_over_the_slow_level_once_until_weights_change(place: TorchRank) -> None:
    """hpZ with two micro-batches: after an edit in place, and after a load, a copy is not used again."""
    model, queue = copy.deepcopy(START), place.queue()
    optimizer = enter(place, model, secondary="pair", micro_batches=2, queue=queue)
    units, calls = len(model.blocks) + 1, 2 * (2 * len(model.blocks) + 1)

    def step(number: int, between: Callable[[], object]) -> tuple[float, float]:
        backward(model, place.rank, 2 * number, 0.5)
        between()
        backward(model, place.rank, 2 * number + 1, 0.5)
        optimizer.step()
        metrics = optimizer.metrics()
        return metrics["gathers"], metrics["kept_gathers"]

    def edit() -> None:
        with torch.no_grad():
            for p in model.blocks[0].parameters():
                p.mul_(1.0)

    before = Counter(queue.meter.sent_bytes())
    assert step(0, lambda: None) == (units, calls - units)
    sent = Counter(queue.meter.sent_bytes()) - before
    sent.subtract({"pair": NORM_BYTES, "world": 2 * NORM_BYTES})
    assert sent == optimizer.predicted_bytes()
    assert step(1, edit) == (units + 1, calls - units - 1)
    assert step(2, lambda: model.load_state_dict(model.state_dict())) == (2 * units, calls - 2 * units)
    oracle = copy.deepcopy(START)
    inner = SGD(oracle.parameters(), lr=0.25)
    for number in range(3):
        inner.zero_grad()
        for rank in range(place.size):
            for micro in range(2):
                backward(oracle, rank, 2 * number + micro, 0.5 / place.size)
        inner.step()
    close(whole(model), dict(oracle.named_parameters()))


def test_four_ranks() -> None:
    run_torch_ranks((2, 4), gathers_over_the_slow_level_once_until_weights_change, names=("pair", "world"))


def shares_tied_weights(place: TorchRank) -> None:
    """One embedding for input and output, both in the root's unit."""
    settings = GPTSettings(layers=1, heads=1, width=8, context=4)
    tokens = torch.arange(8).view(2, 4)

    def loss(model: nn.Module, rank: int) -> Tensor:
        return F.cross_entropy(model(tokens + rank).flatten(0, 1), tokens.flatten())

    model = GPT(settings, 12)
    model.initialise(seed=1)
    plain = copy.deepcopy(model)
    optimizer, inner = enter(place, model, torch.optim.AdamW), torch.optim.AdamW(plain.parameters(), lr=0.25)
    for _ in range(2):
        optimizer.step(lambda: backward_of(loss(model, place.rank)))
        inner.zero_grad()
        for rank in range(place.size):
            (loss(plain, rank) / place.size).backward()
        inner.step()
    close(whole(model), dict(plain.named_parameters()), 1e-5)


def backward_of(loss: Tensor) -> float:
    loss.backward()
    return float(loss.detach())


FEATURES = (
    shares_tied_weights,
    keeps_what_is_gathered_and_computed_in_bf16,
    keeps_bf16_weights_and_exact_masters,
    gathers_as_often_with_checkpoints_and_prefetch,
    accumulates_with_and_without_gradient_sync,
    clips_by_the_norm_of_the_mean,
    leaves_frozen_and_groups_to_themselves,
    counts_what_no_rank_used_as_zero,
    evaluates_between_backward_and_step,
    begins_on_the_meta_device,
    compiles_between_its_gathers,
    refuses_other_weights,
    leaves_a_plain_fsdp2_model,
)


@pytest.mark.parametrize("feature", FEATURES)
def test_two_ranks(feature: Callable[[TorchRank], None]) -> None:
    run_torch_ranks((2,), feature)
