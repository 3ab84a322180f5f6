"""Thinwire's collectives as DeepSpeed sees them: torch's results in torch's order, whatever the levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.method import Method
from thinwire.comm.partition.deepspeed_comm import DeepSpeedComm
from thinwire.comm.partition.rank_order import RankOrder
from thinwire.comm.partition.wires.plain import PlainWire
from thinwire.comm.partition.wires.wire import Wire

FP32 = PlainWire(torch.float32)
BF16 = PlainWire(torch.bfloat16)


class Torch:
    """What DeepSpeed's own backend does of that which is not ours."""

    def _reduce_op(self, op: Any) -> Any:
        return op

    def all_reduce(self, tensor: Tensor, op: Any, group: Any, async_op: bool) -> Any:
        return dist.all_reduce(tensor, op, group, async_op)

    def all_gather_into_tensor(self, output: Tensor, input: Tensor, group: Any, async_op: bool) -> Any:
        return dist.all_gather_into_tensor(output, input, group, async_op)

    def barrier(self) -> str:
        return "torch's own"


def comm_of(place: TorchRank, gather: Wire | None = None, **gradients: Wire) -> DeepSpeedComm:
    queue = place.queue()
    return DeepSpeedComm(Torch(), place.levels, queue, gradients, gather, exact_below=8, seed=0, leave=lambda: None)


def integers(rank: int, numel: int) -> Tensor:
    return torch.randint(-1000, 1000, (numel,), generator=torch.Generator().manual_seed(rank)).float()


def total(ranks: tuple[int, ...], numel: int) -> Tensor:
    return torch.stack([integers(rank, numel) for rank in ranks]).sum(0)


@pytest.mark.parametrize("sizes", [(2, 4, 8), (3, 6)])
def test_all_groups_that_levels_make_get_torchs_results_in_torchs_order(sizes: tuple[int, ...]) -> None:
    def work(place: TorchRank) -> None:
        comm, levels = comm_of(place), place.levels
        groups = [None]
        for first in range(levels.depth + 1):
            for last in range(first + 1, levels.depth + 1):
                lines = {tuple(sorted(_line(levels.digits, rank, first, last))) for rank in range(place.size)}
                groups += [g for g in (dist.new_group(line) for line in sorted(lines)) if place.rank in _ranks(g)]
        for group in groups:
            ranks = _ranks(group)
            n, me = len(ranks), ranks.index(place.rank)
            before = comm._queue.meter.sent_bytes()
            mine = integers(place.rank, n * 21)
            own = torch.empty(21)
            assert comm.reduce_scatter_tensor(own, mine, dist.ReduceOp.SUM, group) is None
            assert torch.equal(own, total(ranks, n * 21)[me * 21 : me * 21 + 21])
            whole = torch.empty(n * 21)
            whole[me * 21 : me * 21 + 21] = own
            waiting = comm.all_gather_into_tensor(whole, whole[me * 21 : me * 21 + 21], group, async_op=True)
            assert waiting.wait()
            assert waiting.is_completed()
            assert torch.equal(whole, total(ranks, n * 21))
            mine = integers(place.rank, 1037).requires_grad_()
            comm.all_reduce(mine, dist.ReduceOp.SUM, group)
            assert torch.equal(mine.detach(), total(ranks, 1037))
            comm.end_step()
            after = comm._queue.meter.sent_bytes()
            spent = {level: after[level] - before.get(level, 0) for level in after}
            assert {level: count for level, count in spent.items() if count} == comm.predicted_bytes()
            assert sum(comm.predicted_bytes().values()) > 0

    run_torch_ranks(sizes, work)


def test_gradients_that_are_the_ranks_numbers_have_the_ranks_mean_and_slow_levels_get_little() -> None:
    """What by its code DeepSpeed's own quantised reduction leaves too large by the number of devices of a node."""

    def work(place: TorchRank) -> None:
        comm = comm_of(place, BF16, node=BF16, world=BF16)
        for shape in ((96,), (8, 12), (8, 7, 7)):
            weights, gradient = torch.zeros(shape), torch.full(shape, float(place.rank))
            own = torch.empty(gradient.numel() // 4)
            comm.reduce_scatter_tensor(own, gradient.view(-1) / 4)  # DeepSpeed divides first
            comm.all_gather_into_tensor(weights, own)
            weights.mul_(-0.5)
            assert torch.equal(weights, torch.full(shape, -0.5 * 1.5))
            mean = gradient.clone()
            comm.all_reduce(mean, dist.ReduceOp.AVG)
            assert torch.equal(mean, torch.full(shape, 1.5))
        assert comm.metrics() == {"calls": 9.0, "passed_on": 0.0}
        sent = comm._queue.meter.sent_bytes("deepspeed/reduce_scatter")
        elements = 96 + 96 + 392
        assert (sent["node"], sent["world"]) == (elements // 2 * 2, elements // 4 * 2)

    run_torch_ranks((2, 4), work)


def test_what_is_small_or_exact_is_not_rounded_and_what_is_not_ours_goes_to_torch() -> None:
    def work(place: TorchRank) -> None:
        comm = comm_of(place, BF16, world=BF16)
        assert isinstance(comm, Method)
        third = torch.full((4,), 1 / 3 + place.rank)
        comm.all_reduce(third)
        assert torch.allclose(third, torch.full((4,), 2 / 3 + 1), rtol=1e-7)
        large = torch.full((64,), 1 / 3)
        comm.all_reduce(large)
        assert not torch.allclose(large, torch.full((64,), 2 / 3), rtol=1e-4)
        gathered = torch.empty(64)
        comm.all_gather_into_tensor(gathered, torch.full((32,), 1 / 3))
        assert torch.equal(gathered, torch.full((64,), 1 / 3).bfloat16().float())
        with comm.exact():
            large = torch.full((64,), 1 / 3)
            comm.all_reduce(large)
            assert torch.equal(large, torch.full((64,), 2 / 3))
            comm.all_gather_into_tensor(gathered, torch.full((32,), 1 / 3))
            assert torch.equal(gathered, torch.full((64,), 1 / 3))
        most, counts, fine = torch.full((64,), float(place.rank)), torch.arange(64), torch.ones(64, dtype=torch.float64)
        comm.all_reduce(most, dist.ReduceOp.MAX)
        comm.all_reduce(counts)
        comm.all_reduce(fine)
        assert (most[0], counts[1], fine[0]) == (1, 2, 2)
        assert comm.metrics()["passed_on"] == 3
        assert comm.barrier() == "torch's own"
        poisoned = torch.ones(64)
        poisoned[5] = torch.nan if place.rank else 1.0
        comm.all_reduce(poisoned)
        assert poisoned[5].isnan()
        state = comm.state_dict()
        other = comm_of(place)
        other.load_state_dict({"all_ranks": [state, {"calls": 3}]})
        assert other.state_dict() == state
        with pytest.raises(ValueError, match=r"\['feedback'\] of another method"):
            other.load_state_dict({"feedback": {}})

    run_torch_ranks((2,), work)


def test_ranks_that_no_level_joins_are_refused() -> None:
    def work(place: TorchRank) -> None:
        if place.rank in (0, 3):
            with pytest.raises(ValueError, match=r"joins the ranks \[0, 3\], which no level does.* name a level"):
                RankOrder(place.levels, [0, 3])

    run_torch_ranks((2, 4), work)


def _ranks(group: Any) -> tuple[int, ...]:
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        return ()
    return tuple(dist.get_process_group_ranks(group or dist.group.WORLD))


def _line(digits: Any, rank: int, first: int, last: int) -> list[int]:
    mine = digits[rank]
    return [r for r, d in enumerate(digits) if d[:first] == mine[:first] and d[last:] == mine[last:]]
