"""Gossip between machines whose models FSDP2 shards over their ranks: scenarios of fsdp2_program.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from thinwire.comm.errors import OwnWeightsError
from thinwire.comm.gossip.door import gossip
from thinwire.comm.gossip.handle import Gossip

if TYPE_CHECKING:
    from fsdp2_program import Place

HOSTS, LOCAL, WIDTH = 2, 2, 12


def plain_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 1))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def enter(place: Place, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Gossip]:
    model = place.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
    return model, optimizer, gossip(optimizer, model=model, graph="complete", queue=place.queue, **options)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach().clone() for p in model.parameters()]  # type: ignore[attr-defined]


def gossiping_machines_average_shard_by_shard(place: Place) -> None:
    model, optimizer, method = enter(place)
    machines = [plain_model() for _ in range(HOSTS)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.125, momentum=0.5) for m in machines]
    for step in range(3):
        before = sum(place.queue.meter.sent_bytes("gossip/").values())
        train_step(model, optimizer, batch(place.rank, step))
        sent = sum(place.queue.meter.sent_bytes("gossip/").values()) - before
        shards = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
        assert sent == sum(method.predicted_bytes().values()) == 4 * shards
        for host, (plain, own) in enumerate(zip(machines, optimizers, strict=True)):
            own.zero_grad()
            for local in range(LOCAL):
                (plain(batch(host * LOCAL + local, step)).square().sum() / LOCAL).backward()
            own.step()
        with torch.no_grad():
            for pair in zip(*(plain.parameters() for plain in machines), strict=True):
                mean = (pair[0] + pair[1]) / 2
                for parameter in pair:
                    parameter.copy_(mean)
    for found, expected in zip(whole(model), machines[place.host].parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach())
    method.remove()


def a_gossip_run_of_sharded_models_resumes(place: Place) -> None:
    def train(stop_at: int | None) -> list[Tensor]:
        model, optimizer, method = enter(place)
        for step in range(4):
            if step == stop_at:
                method_state = method.state_dict()
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                method.remove()
                model, optimizer, method = enter(place)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                method.load_state_dict(method_state)
                other = {**method_state, "gossip": {**method_state["gossip"], "shard": [1 - place.local, LOCAL]}}
                with pytest.raises(ValueError, match="the state has no shard"):
                    method.load_state_dict(other)
            train_step(model, optimizer, batch(place.rank, step))
        found = whole(model)
        method.remove()
        return found

    assert all(torch.equal(a, b) for a, b in zip(train(None), train(2), strict=True))


def a_spoilt_shard_keeps_its_machine_from_gossiping(place: Place) -> None:
    model, optimizer, method = enter(place)
    train_step(model, optimizer, batch(place.rank, 0))
    before = [p.to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    optimizer.zero_grad()
    model(batch(place.rank, 1)).square().sum().backward()
    if place.rank == 3:
        next(model.parameters()).grad.to_local().fill_(torch.nan)  # type: ignore[union-attr]
    if place.host == 1:
        with pytest.raises(OwnWeightsError):
            optimizer.step()
    else:
        optimizer.step()
        assert method.metrics()["absent"] == 1
    with torch.no_grad():
        for parameter, kept in zip(model.parameters(), before, strict=True):
            parameter.to_local().copy_(kept)  # type: ignore[attr-defined]
    optimizer.state.clear()
    train_step(model, optimizer, batch(place.rank, 2))
    assert all(bool(tensor.isfinite().all()) for tensor in whole(model))
    dist.barrier()
    method.remove()


def what_gossip_cannot_do_with_shards_is_refused(place: Place) -> None:
    def refused(match: str, model: nn.Module, **options: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = place.queue.meter.sent_bytes()
        with pytest.raises(ValueError, match=match):
            gossip(optimizer, model=model, **{"graph": "ring", "queue": place.queue, **options})
        assert place.queue.meter.sent_bytes() == before, match

    hybrid = plain_model()
    fully_shard(hybrid, mesh=place.mesh)
    refused("a mesh of two dimensions", hybrid)
    refused("group: the model is sharded", place.model(), queue=None)
    refused("ad_psgd lets each rank go at its own pace", place.model(), algorithm="ad_psgd")
    _, _, method = enter(place)
    with pytest.raises(ValueError, match="the model is sharded"):
        method.stop()
    dist.barrier()
    method.remove()


SCENARIOS: Sequence[Callable[[Place], None]] = (
    gossiping_machines_average_shard_by_shard,
    a_gossip_run_of_sharded_models_resumes,
    a_spoilt_shard_keeps_its_machine_from_gossiping,
    what_gossip_cannot_do_with_shards_is_refused,
)
