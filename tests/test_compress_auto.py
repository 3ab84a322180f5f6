"""`compressor: auto`: measures dense steps, then sends each tensor as time allows; the same on every rank."""

from __future__ import annotations

import logging

import pytest
import torch
from ranks import Rank, run_ranks, seeded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import thinwire as tw
from thinwire.comm.compress import auto
from thinwire.comm.compress.auto import Auto
from thinwire.comm.compress.handle import CompressedExchange
from thinwire.comm.compress.measure import Link
from thinwire.comm.queue import CommQueue

WIDTH = 48


class Run:
    """A small model in DDP, its gradients compressed as auto chooses."""

    def __init__(self, rank: Rank, queue: CommQueue, compressor: Auto) -> None:
        with seeded():
            self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8))
        self.ddp = DistributedDataParallel(self.model, process_group=rank.group, init_sync=False)
        self.method: CompressedExchange = tw.compress(self.ddp, compressor=compressor, dense_below=100, queue=queue)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.rank = rank.rank

    def step(self, number: int) -> None:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * number + self.rank))
        self.optimizer.zero_grad()
        self.ddp(x).square().sum().backward()
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def codecs(self) -> dict[str, str]:
        rows = [line.split() for line in self.method.describe().splitlines()[1:-1]]
        return {row[0]: row[2] for row in rows}


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link on which bytes are all that counts: on a loopback nothing may be faster than fp32."""
    monkeypatch.setattr(auto, "measure_link", lambda channel, device: Link(latency_s=1e-3, bps=1e3))


@pytest.mark.usefixtures("slow_link")
@pytest.mark.parametrize(("share", "expected"), [(1e9, {"dense"}), (1e-9, {"topk"})])
def test_every_rank_chooses_the_same_and_stays_within_the_share(share: float, expected: set[str]) -> None:
    def work(rank: Rank) -> tuple[dict[str, str], list[Tensor]]:
        queue = rank.queue()
        run = Run(rank, queue, Auto(share=share))
        for step in range(3):
            assert set(run.codecs().values()) == {"dense"}
            run.step(step)
        for step in range(3, 6):
            before = sum(queue.meter.sent_bytes("compress").values())
            run.step(step)
            sent = sum(queue.meter.sent_bytes("compress").values()) - before
            assert sent == sum(run.method.predicted_bytes().values())
        queue.close()
        return run.codecs(), run.weights()

    (codecs, weights), *others = run_ranks(3, work)
    assert all(codecs == c and equal(weights, w) for c, w in others)
    assert codecs["0.bias"] == codecs["2.bias"] == "dense"  # too small
    assert {codecs["0.weight"], codecs["2.weight"]} <= expected


@pytest.mark.usefixtures("slow_link")
def test_the_choice_is_part_of_the_state() -> None:
    def work(rank: Rank) -> bool:
        queue = rank.queue()
        settings = Auto(share=1e-9, measure_steps=2)
        run = Run(rank, queue, settings)
        for step in range(3):
            run.step(step)
        again = Run(rank, queue, settings)
        again.model.load_state_dict(run.model.state_dict())
        again.method.load_state_dict(run.method.state_dict())
        assert again.codecs() == run.codecs()
        for step in range(3, 5):
            run.step(step)
            again.step(step)
        queue.close()
        return equal(run.weights(), again.weights())

    assert run_ranks(2, work) == [True, True]


@pytest.mark.usefixtures("slow_link")
def test_says_what_it_has_chosen_and_why(caplog: pytest.LogCaptureFixture) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        run = Run(rank, queue, Auto(share=1e-9, measure_steps=2))
        assert "auto: measuring" in run.method.describe()
        for step in range(2):
            run.step(step)
        queue.close()

    with caplog.at_level(logging.INFO, logger="thinwire"):
        run_ranks(2, work)
    (message,) = [record.getMessage() for record in caplog.records if "auto has chosen" in record.getMessage()]
    assert "0.weight" in message
    assert "ms as fp32" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feedback": "ef21"}, "ef21 remembers something of every step"),
        ({"collective": "all_gather"}, "give collective: auto"),
        ({"compressor": Auto(candidates=(tw.TopK(density=0.1, scope="global"),))}, "give scope: tensor"),
    ],
)
def test_refuses(settings: dict[str, object], message: str) -> None:
    def work(rank: Rank) -> None:
        model = DistributedDataParallel(nn.Linear(3, 3), process_group=rank.group, init_sync=False)
        queue = rank.queue()
        with pytest.raises(ValueError, match=message):
            tw.compress(model, **{"compressor": "auto", **settings}, queue=queue)
        queue.close()

    run_ranks(1, work)
