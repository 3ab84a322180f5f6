"""tw.gossip in somebody's own loop: what it refuses, overlap, 16 bits, statistics, the optimizer's memory, leaving."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm.gossip.door import gossip
from thinwire.comm.gossip.handle import Gossip

SIZE = 3


def make_model(seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * step + rank)) + rank


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(rank, step).to(next(model.parameters()).dtype)).float().square().sum().backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refused(rank: Rank, match: str, model: nn.Module | None = None, **options: Any) -> None:
    model = make_model() if model is None else model
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=match):
        gossip(optimizer, **{"model": model, "queue": options.pop("queue", None), "graph": "ring", **options})


def test_what_cannot_work_is_refused_before_anything_is_sent() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        model = make_model()
        adam = torch.optim.AdamW(model.parameters())
        refused(
            rank, "AdamW, but method.algorithm: decentlam", model, queue=queue, optimizer=adam, algorithm="decentlam"
        )
        part = torch.optim.SGD(model[0].parameters(), lr=0.1)
        refused(rank, "does not train 1.weight, 1.bias, 2.weight", model, queue=queue, optimizer=part)
        refused(rank, "defined only for an exchange after every step", queue=queue, algorithm="d2", schedule="random")
        refused(rank, "merge_at: 9 lies past the end", queue=queue, steps=5, schedule={"kind": "every", "merge_at": 9})
        refused(rank, "recalibrate runs the model", queue=queue, statistics="recalibrate")
        refused(rank, "hypercube", queue=queue, graph="hypercube")
        refused(rank, "disconnected: nothing of machine 0", queue=queue, graph={"kind": "edges", "edges": [[0, 1]]})
        wrapped = DistributedDataParallel(make_model(), process_group=rank.group, init_sync=False)
        refused(rank, "DistributedDataParallel averages its gradients among 3 ranks", wrapped, queue=queue)
        frozen = make_model().requires_grad_(False)
        refused(rank, "none of its parameters requires a gradient", frozen, queue=queue)
        assert sum(queue.meter.sent_bytes().values()) == 0
        queue.close()

    run_ranks(SIZE, work)


def test_machines_that_begin_with_other_weights_are_named_on_all() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        refused(rank, "rank 1 begins with other parameters than rank 0", make_model(int(rank.rank == 1)), queue=queue)
        queue.close()

    run_ranks(SIZE, work)


def test_a_run_that_overlaps_resumes_where_it_saved() -> None:
    """What is under way is finished when a run saves; so both go on from what was saved."""

    def work(rank: Rank) -> bool:
        queue = rank.queue()

        def enter() -> tuple[nn.Module, torch.optim.Optimizer, Gossip]:
            model = make_model()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
            algorithm = {"kind": "dpsgd", "overlap": True}
            return model, optimizer, gossip(optimizer, model=model, queue=queue, graph="ring", algorithm=algorithm)

        model, optimizer, method = enter()
        train(model, optimizer, rank.rank, range(3))
        state = method.state_dict()
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        other, other_optimizer, other_method = enter()
        other.load_state_dict(saved[0])
        other_optimizer.load_state_dict(saved[1])
        other_method.load_state_dict(state)
        train(model, optimizer, rank.rank, range(3, 6))
        train(other, other_optimizer, rank.rank, range(3, 6))
        method.remove()
        other_method.remove()
        queue.close()
        return equal(weights(model), weights(other))

    assert run_ranks(SIZE, work) == [True] * SIZE


def test_weights_of_16_bits_keep_what_is_below_their_last_bit() -> None:
    def work(rank: Rank) -> tuple[list[Tensor], Tensor]:
        queue = rank.queue()
        model = make_model().to(torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        method = gossip(optimizer, model=model, queue=queue, graph="complete", statistics="local")
        train(model, optimizer, rank.rank, range(3))
        own = weights(model)
        with method.agreed():
            agreed = weights(model)
        assert equal(own, weights(model))
        master = method.state_dict()["weights"]
        method.remove()
        queue.close()
        return agreed, master

    (agreed, master), *others = run_ranks(SIZE, work)
    assert master.dtype == torch.float32
    assert not torch.equal(master, master.bfloat16().float())
    for other, other_master in others:
        assert equal(other, agreed)
        torch.testing.assert_close(other_master, master, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("policy", ["keep", "reset", "mix"])
def test_the_optimizers_memory_at_a_merge(policy: str) -> None:
    def work(rank: Rank) -> tuple[list[Tensor], list[Tensor]]:
        queue = rank.queue()
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
        schedule = {"kind": "single_merge", "probability": 0.5, "every": 2}
        method = gossip(
            optimizer, model=model, queue=queue, graph="ring", schedule=schedule, steps=3, optimizer_state=policy
        )
        train(model, optimizer, rank.rank, range(3))
        assert method.ended
        momentum = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
        method.remove()
        queue.close()
        return weights(model), momentum

    (first, momentum), *others = run_ranks(SIZE, work)
    assert all(equal(other, first) for other, _ in others)
    if policy == "reset":
        assert all(not memory for _, memory in [(first, momentum), *others])
    else:
        assert [equal(memory, momentum) for _, memory in others] == [policy == "mix"] * 2


def test_statistics_are_measured_anew_for_the_merged_model() -> None:
    def work(rank: Rank) -> tuple[Tensor, Tensor, list[Tensor]]:
        queue = rank.queue()
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def calibrate() -> None:
            for step in range(4):
                model(batch(0, 50 + step))

        method = gossip(
            optimizer, model=model, queue=queue, graph="ring", statistics="recalibrate", calibrate=calibrate
        )
        train(model, optimizer, rank.rank, range(2))
        own = model[1].running_mean.clone()
        with method.agreed():
            inside, merged = model[1].running_mean.clone(), weights(model)
        assert torch.equal(model[1].running_mean, own)
        method.remove()
        queue.close()
        return own, inside, merged

    (own, inside, merged), (other, other_inside, other_merged), _ = run_ranks(SIZE, work)
    assert not torch.equal(own, other)
    assert equal(merged, other_merged)
    assert torch.equal(inside, other_inside)


def test_a_machine_that_leaves_trains_on_alone_and_the_others_without_it() -> None:
    def work(rank: Rank) -> bool:
        queue = rank.queue()
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        method = gossip(optimizer, model=model, queue=queue, graph="ring", deadline_s=30.0)
        train(model, optimizer, rank.rank, range(2))
        if rank.rank == 2:
            method.remove()
        before = sum(queue.meter.sent_bytes().values())
        train(model, optimizer, rank.rank, range(2, 4))
        if rank.rank == 2:
            assert sum(queue.meter.sent_bytes().values()) == before
            queue.close()
            return True
        gone = 2 in method.lost
        method.remove()
        queue.close()
        return gone

    assert run_ranks(SIZE, work) == [True] * SIZE
