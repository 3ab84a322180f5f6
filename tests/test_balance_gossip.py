"""Balance without a message to all: what ranks know together is kept to the last unit, and errors die out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from balance_steps import LAYERS, Steps
from pydantic import ValidationError
from ranks import Rank, run_ranks, run_ranks_to_the_end
from torch import Tensor

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.errors import RouterError
from thinwire.comm.errors import PeerFailedError

EXPERTS = 5
UNIT = 1 << 16  # what one selection is in the shares


def likes(step: int, rank: int, tokens: int = 50) -> Tensor:
    """Each rank has two experts of its own; those of rank 0 change in each step."""
    draw = torch.Generator().manual_seed(10 * step + rank)
    return (torch.randint(0, 2, (tokens + rank, 1), generator=draw) + (rank or step)) % EXPERTS


def counts(selected: Tensor) -> Tensor:
    """(layers, experts + 1): selections and tokens."""
    by_layer = [((selected + n) % EXPERTS).flatten().bincount(minlength=EXPERTS) for n in range(LAYERS)]
    return torch.cat((torch.stack(by_layer), torch.full((LAYERS, 1), len(selected))), 1)


def shares_after(rank: Rank, steps: list[Tensor], **settings: Any) -> tuple[list[Tensor], list[dict[str, int]]]:
    """s_j after each step, and what this rank sent in it, by peer: predicted, and after it metered."""
    queue = rank.queue(levels=["self" if r == rank.rank else f"to {r}" for r in range(rank.size)])
    run = Steps(rank, EXPERTS, 1, queue=queue, mode="gossip", **settings)
    shares: list[Tensor] = []
    sent: list[dict[str, int]] = []
    before: dict[str, int] = {}
    for selected in steps:
        predicted = run.balance.predicted_bytes()
        run.run([selected])
        shares.append(run.balance.state_dict()["mode"]["consensus"]["shares"])
        total = {level: count for level, count in queue.meter.sent_bytes("balance").items() if count}
        now = {level: count - before.get(level, 0) for level, count in total.items()}
        before = total
        sent += [predicted, {level: count for level, count in now.items() if count}]
    return shares, sent


@pytest.mark.parametrize(
    ("graph", "size"), [("ring", 5), ("hypercube", 4), ({"kind": "base_k", "k": 1}, 6), ("ring", 1)]
)
def test_what_all_have_is_kept_exactly(graph: Any, size: int) -> None:
    """sum_j s_j = sum_j c_j in every step, in integers, although loads change and nobody knows the sum."""
    steps = 6
    results = run_ranks(size, lambda rank: shares_after(rank, [likes(t, rank.rank) for t in range(steps)], graph=graph))
    for t in range(steps):
        total = torch.stack([counts(likes(t, rank)) for rank in range(size)]).sum(0) * UNIT
        assert torch.equal(torch.stack([shares[t] for shares, _ in results]).sum(0), total)
    row_bytes = LAYERS * (EXPERTS + 1) * 8
    for rank, (_, sent) in enumerate(results):
        assert sent[2::2] == sent[3::2], "predicted for the next step, and metered"
        if graph == "ring":
            neighbours = {(rank - 1) % size, (rank + 1) % size} - {rank}
            assert sent[-1] == {f"to {n}": row_bytes for n in neighbours}


def test_error_dies_out_as_fast_as_the_graph_allows() -> None:
    """While loads stay the same: |s_j - mean| <= lambda_2^t, down to the rounding of shares."""
    size, steps = 5, 24
    results = run_ranks(size, lambda rank: shares_after(rank, [likes(1, rank.rank)] * steps, graph="ring")[0])
    mean = torch.stack([counts(likes(1, rank)) for rank in range(size)]).double().mean(0) * UNIT
    errors = [float((torch.stack([shares[t] for shares in results]) - mean).norm()) for t in range(steps)]
    second = (1 + 2 * math.cos(2 * math.pi / size)) / 3  # eigenvalue of the ring's Metropolis weights
    for before, after in itertools.pairwise(errors):
        assert after <= second * before + 20
    assert errors[0] > 1e5
    assert errors[-1] < 40  # units of which 65536 make one selection


def test_others_get_an_even_share_of_what_was_counted() -> None:
    """Three ranks go on where five were: each begins at its share, so that the invariant holds from then on."""

    def five(rank: Rank) -> dict[str, Any]:
        run = Steps(rank, EXPERTS, 1, mode="gossip")
        run.run([likes(0, rank.rank)])
        return run.balance.state_dict()

    states = run_ranks(5, five)

    def three(rank: Rank) -> Tensor:
        run = Steps(rank, EXPERTS, 1, mode="gossip")
        run.balance.load_state_dict({"all_ranks": states})
        run.run([likes(1, rank.rank)])
        shares: Tensor = run.balance.state_dict()["mode"]["consensus"]["shares"]
        return shares

    total = torch.stack([counts(likes(1, rank)) for rank in range(3)]).sum(0) * UNIT
    assert torch.equal(torch.stack(run_ranks(3, three)).sum(0), total)


def test_a_fault_reaches_every_rank_although_no_message_does() -> None:
    def work(rank: Rank) -> None:
        # Short, so that nobody still waits for rank 1 when the tests' process ends.
        run = Steps(rank, EXPERTS, 1, queue=rank.queue(timeout_s=10), mode="gossip")
        for step in range(2):
            run.run([likes(step, rank.rank)])
        logits = torch.zeros(3, EXPERTS, requires_grad=True)
        selected = torch.full((3, 1), 7 if rank.rank == 1 else 0)
        for layer in range(LAYERS):
            run.balance(layer, logits, selected)
        run.balance.finish()
        for step in range(3, 5):  # who has no edge to rank 1 may have ended that step before the news was there
            run.run([likes(step, rank.rank)])

    outcomes = run_ranks_to_the_end(4, work)
    assert isinstance(outcomes[1], RouterError)
    for other in (0, 2, 3):
        assert isinstance(outcomes[other], PeerFailedError)
        assert "rank 1 failed with RouterError: selected: rank 1 selected experts outside 0 .. 4" in str(
            outcomes[other]
        )


def test_refusals() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()

        def build(**settings: Any) -> LoadBalance:
            defaults: dict[str, Any] = {"num_experts": EXPERTS, "top_k": 1, "coef": 0.0, "queue": queue}
            return LoadBalance(**defaults | settings)

        for settings, message in (
            ({"graph": "one_peer_exponential"}, r"balance.graph: one-peer exponential.* is directed: .* such as ring"),
            ({"graph": "hypercube"}, r"balance.graph: a hypercube has a power of two"),
            ({"graph": "auto"}, "auto"),
            ({"bias": "sign"}, "mode: gossip"),
            ({"inner": [[0, 1, 2]]}, "inner"),
            ({"mode": "stale", "graph": "ring"}, "graph: goes with mode: gossip, not with stale"),
        ):
            with pytest.raises((ValueError, ValidationError), match=message):
                build(**{"mode": "gossip"} | settings)

    run_ranks(3, work)
