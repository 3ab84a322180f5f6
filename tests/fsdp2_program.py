"""Two hosts of two ranks each, as four processes: FSDP2 needs torch's own groups, which ranks that are threads lack.

    python fsdp2_program.py FOLDER

runs every function of SCENARIOS on all ranks, and writes to FOLDER/RANK.json what each raised ("" = nothing).
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsdp2_gossip
import pytest
import torch
import torch.distributed as dist
from forked_ranks import fork_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from thinwire.comm.compress.compressors.top_k import TopK
from thinwire.comm.compress.decoded import to_dense
from thinwire.comm.compress.door import compress
from thinwire.comm.compress.draw import Draw
from thinwire.comm.compress.handle import CompressedExchange
from thinwire.comm.method import Method
from thinwire.comm.queue import CommQueue, open_queue

HOSTS, LOCAL = 2, 2
WIDTH = 12
SPARSE = TopK(density=0.25)


class Place:
    """This process: its ranks, its mesh, and the queue to the other host."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.host, self.local = divmod(self.rank, LOCAL)
        self.mesh: DeviceMesh = init_device_mesh("cpu", (HOSTS, LOCAL), mesh_dim_names=("hosts", "node"))
        self.queue: CommQueue = open_queue(self.mesh["hosts"].get_group(), timeout_s=30)

    def model(self, **options: Any) -> nn.Module:
        """Weights whose rows two ranks cannot share equally, and one that only the first has."""
        model = plain_model()
        fully_shard(model[0], mesh=self.mesh["node"], **options)
        fully_shard(model, mesh=self.mesh["node"], **options)
        return model


def plain_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 1))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).float().square().sum().backward()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    backward(model, x)
    optimizer.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}


def own_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    backward(model, x)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal_on_all_hosts(tensors: dict[str, Tensor]) -> bool:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    gathered = [torch.empty_like(flat) for _ in range(HOSTS * LOCAL)]
    dist.all_gather(gathered, flat)
    return all(torch.equal(gathered[0], other) for other in gathered)


def the_mean_over_all_ranks_without_compression(place: Place) -> None:
    model, plain = place.model(), plain_model()
    method = compress(model, compressor="none", feedback="none", queue=place.queue)
    assert isinstance(method, Method)
    optimizer, plain_optimizer = make_optimizer(model), make_optimizer(plain)
    for step in range(3):
        before = place.queue.meter.sent_bytes()
        train_step(model, optimizer, batch(place.rank, step))
        sent = {level: n - before.get(level, 0) for level, n in place.queue.meter.sent_bytes().items()}
        assert sent == method.predicted_bytes() != {"world": 0}
        plain_optimizer.zero_grad()
        for rank in range(HOSTS * LOCAL):
            (plain(batch(rank, step)).square().sum() / (HOSTS * LOCAL)).backward()
        plain_optimizer.step()
    found = whole(model)
    assert equal_on_all_hosts(found)
    for name, expected in plain.named_parameters():
        torch.testing.assert_close(found[name], expected.detach())


def the_shards_of_each_host_with_error_feedback(place: Place) -> None:
    model, plain = place.model(), plain_model()
    method = compress(model, compressor=SPARSE, feedback="ef", dense_below=0, queue=place.queue)
    optimizer, plain_optimizer = make_optimizer(model), make_optimizer(plain)
    errors: dict[tuple[str, int, int], Tensor] = {}

    def sent(name: str, host: int, local: int, shard: Tensor, step: int) -> Tensor:
        total = shard + errors.get((name, host, local), torch.zeros_like(shard))
        draw = Draw(0, step, name, host)
        decoded = to_dense(SPARSE.decode(SPARSE.encode(total, draw), total.shape, draw)).view_as(total)
        errors[name, host, local] = total - decoded
        return decoded

    for step in range(4):
        train_step(model, optimizer, batch(place.rank, step))
        per_host = []
        for host in range(HOSTS):
            of_ranks = [own_gradients(plain, batch(host * LOCAL + local, step)) for local in range(LOCAL)]
            per_host.append({name: (of_ranks[0][name] + of_ranks[1][name]) / LOCAL for name in of_ranks[0]})
        for name, parameter in plain.named_parameters():
            shards = []
            for local in range(len(parameter.chunk(LOCAL))):
                parts = [per_host[host][name].chunk(LOCAL)[local] for host in range(HOSTS)]
                messages = [sent(name, host, local, part, step) for host, part in enumerate(parts)]
                shards.append((messages[0] + messages[1]) / HOSTS)
            parameter.grad = torch.cat(shards)
        plain_optimizer.step()
    found = whole(model)
    assert equal_on_all_hosts(found)
    assert equal(found, {name: p.detach() for name, p in plain.named_parameters()})
    kept = method.state_dict()["feedback"]["stores"]["error"]
    assert kept["0.weight"].shape == model[0].weight.to_local().shape != model[0].weight.shape
    assert method.metrics()["error_norm"] > 0


def a_resumed_run_equals_one_that_did_not_stop(place: Place) -> None:
    def train(stop_at: int | None) -> dict[str, Tensor]:
        model = place.model()
        method = compress(model, compressor=SPARSE, feedback="ef", dense_below=0, queue=place.queue)
        optimizer = make_optimizer(model)
        for step in range(6):
            if step == stop_at:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), method.state_dict()))
                model = place.model()
                method = compress(model, compressor=SPARSE, feedback="ef", dense_below=0, queue=place.queue)
                optimizer = make_optimizer(model)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                method.load_state_dict(saved[2])
            train_step(model, optimizer, batch(place.rank, step))
        return whole(model)

    assert equal(train(None), train(3))


def the_errors_of_other_hosts_are_averaged_shard_by_shard(place: Place) -> None:
    def enter() -> tuple[nn.Module, CompressedExchange]:
        model = place.model()
        return model, compress(model, compressor=SPARSE, feedback="ef", dense_below=0, queue=place.queue)

    model, method = enter()
    optimizer = make_optimizer(model)
    for step in range(2):
        train_step(model, optimizer, batch(place.rank, step))
    states: list[Any] = [None] * HOSTS * LOCAL
    dist.all_gather_object(states, method.state_dict())
    _, other = enter()
    other.load_state_dict({"all_ranks": states})
    merged = other.state_dict()["feedback"]["stores"]["error"]
    for name, error in merged.items():
        old = [states[host * LOCAL + place.local]["feedback"]["stores"]["error"][name] for host in range(HOSTS)]
        torch.testing.assert_close(error, (old[0] + old[1]) / HOSTS)
    assert bool(merged["0.weight"].any())


def a_spoilt_shard_is_seen_by_all_ranks_and_remembered_by_none(place: Place) -> None:
    model = place.model()
    method = compress(model, compressor=SPARSE, feedback="ef", dense_below=0, queue=place.queue)
    optimizer = make_optimizer(model)
    train_step(model, optimizer, batch(place.rank, 0))
    before = method.state_dict()["feedback"]["stores"]["error"]
    factor = torch.ones(7)
    if place.rank == 3:
        factor[6] = torch.nan  # the last row of the first weight: in the shard of the second rank of each host
    hook = model[1].register_forward_pre_hook(lambda _, inputs: inputs[0].register_hook(lambda g: g * factor) and None)
    optimizer.zero_grad()
    backward(model, batch(place.rank, 1))
    hook.remove()
    for name, parameter in model.named_parameters():
        assert not bool(parameter.grad.to_local().isfinite().any()), name
    assert equal(before, method.state_dict()["feedback"]["stores"]["error"])
    assert method.metrics()["skipped_steps"] == 1
    train_step(model, optimizer, batch(place.rank, 2))
    assert all(bool(tensor.isfinite().all()) for tensor in whole(model).values())


def accumulated_gradients_are_sent_once(place: Place) -> None:
    plain = plain_model()
    for rank in range(HOSTS * LOCAL):
        for step in range(3):
            (plain(batch(rank, step)).square().sum() / (HOSTS * LOCAL)).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for switch in ("set_requires_all_reduce", "set_requires_gradient_sync"):
        model = place.model()
        method = compress(model, compressor="none", feedback="none", queue=place.queue)
        before = place.queue.meter.sent_bytes()["world"]
        for step in range(3):
            getattr(model, switch)(step == 2)
            backward(model, batch(place.rank, step))
            if step < 2:
                assert place.queue.meter.sent_bytes()["world"] == before
        assert place.queue.meter.sent_bytes()["world"] - before == method.predicted_bytes()["world"]
        for name, found in gradients(model).items():
            torch.testing.assert_close(found, expected[name], msg=f"{switch}: {name}")


def gradients_of_half_precision_are_reduced_in_fp32(place: Place) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = place.model(mp_policy=policy)
    compress(model, compressor=SPARSE, feedback="ef", dense_below=0, queue=place.queue)
    optimizer = make_optimizer(model)
    for step in range(2):
        train_step(model, optimizer, batch(place.rank, step))
    found = whole(model)
    assert equal_on_all_hosts(found)
    assert not equal(found, {name: p.detach() for name, p in plain_model().named_parameters()})


def without_the_method_hosts_train_apart(place: Place) -> None:
    model = place.model()
    method = compress(model, compressor="none", feedback="none", queue=place.queue)
    method.remove()
    before = place.queue.meter.sent_bytes()
    backward(model, batch(place.rank, 0))
    assert place.queue.meter.sent_bytes() == before
    plain = plain_model()
    mine = [own_gradients(plain, batch(place.host * LOCAL + local, 0)) for local in range(LOCAL)]
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, (mine[0][name] + mine[1][name]) / LOCAL)
    compress(model, compressor="none", feedback="none", queue=place.queue)


def what_cannot_work_is_refused(place: Place) -> None:
    def refused(match: str, model: nn.Module, **options: Any) -> None:
        before = place.queue.meter.sent_bytes()
        with pytest.raises(ValueError, match=match):
            compress(model, **{"compressor": "none", "feedback": "none", "queue": place.queue, **options})
        assert place.queue.meter.sent_bytes() == before, match

    hybrid = plain_model()
    fully_shard(hybrid, mesh=place.mesh)
    refused("a mesh of two dimensions", hybrid)
    refused("clip_norm", place.model(), clip_norm=1.0)
    refused("group: give the ranks that hold the same shard", place.model(), queue=None)
    refused("scope: global", place.model(), compressor=TopK(density=0.5, scope="global"))
    refused("float64", fully_shard(plain_model().double(), mesh=place.mesh["node"]))
    with torch.device("meta"):
        empty = nn.Linear(WIDTH, WIDTH)
    refused("0.weight has no values yet", fully_shard(nn.Sequential(empty), mesh=place.mesh["node"]))
    twice = place.model()
    method = compress(twice, compressor="none", feedback="none", queue=place.queue)
    refused("already has an all-reduce hook", twice)
    other = {**method.state_dict(), "shard": [1 - place.local, LOCAL]}
    with pytest.raises(ValueError, match="the state is that of shard"):
        method.load_state_dict(other)

    different = plain_model()
    with torch.no_grad():
        different[0].weight[0, 0] += place.host
    fully_shard(different, mesh=place.mesh["node"])
    if place.local == 0:  # whose shard it is
        with pytest.raises(ValueError, match="rank 2 begins with other parameters than rank 0"):
            compress(different, compressor="none", queue=place.queue)


def parameters_without_a_gradient_are_refused_or_count_as_zero(place: Place) -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.unused = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    for zeros in (False, True):
        model = fully_shard(Partial(), mesh=place.mesh["node"])
        model.set_reduce_scatter_unused_params(zeros)
        compress(model, compressor=SPARSE, dense_below=0, queue=place.queue)
        if zeros:
            backward(model, batch(place.rank, 0))
            assert not bool(model.unused.weight.grad.to_local().any())
            assert bool(model.used.weight.grad.to_local().any())
        else:
            with pytest.raises(ValueError, match=r"only 26 of 52 elements .* set_reduce_scatter_unused_params"):
                backward(model, batch(place.rank, 0))


SCENARIOS: Sequence[Callable[[Place], None]] = (
    the_mean_over_all_ranks_without_compression,
    the_shards_of_each_host_with_error_feedback,
    a_resumed_run_equals_one_that_did_not_stop,
    the_errors_of_other_hosts_are_averaged_shard_by_shard,
    a_spoilt_shard_is_seen_by_all_ranks_and_remembered_by_none,
    accumulated_gradients_are_sent_once,
    gradients_of_half_precision_are_reduced_in_fp32,
    without_the_method_hosts_train_apart,
    what_cannot_work_is_refused,
    parameters_without_a_gradient_are_refused_or_count_as_zero,
    *fsdp2_gossip.SCENARIOS,
)


def run_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=HOSTS * LOCAL, timeout=timedelta(seconds=60))
    place = Place()
    outcomes = {}
    for scenario in SCENARIOS:
        try:
            scenario(place)
            outcomes[scenario.__name__] = ""
        except BaseException:
            outcomes[scenario.__name__] = traceback.format_exc()
    place.queue.close()
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    gc.collect()
    dist.barrier()


if __name__ == "__main__":
    given = Path(sys.argv[1])
    sys.exit(any(fork_ranks(HOSTS * LOCAL, lambda rank, port: run_rank(rank, port, given))))
