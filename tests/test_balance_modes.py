"""Each mode against its rule, written out: which counts make f, what is sent, what a resumed run needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from balance_steps import LAYERS, Order, Steps, pull_of
from ranks import Rank, run_ranks
from torch import Tensor

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.describe import own_weight
from thinwire.comm.balance.errors import RouterError

EXPERTS, RANKS, UNITS, STEPS = 6, 4, 3, 4
INNER = [[0, 1], [2, 3]]

MODES: dict[str, dict[str, Any]] = {
    "sync": {"mode": "sync"},
    "carry": {"mode": "carry"},
    "late": {"mode": "late"},
    "stale": {},
    "ema": {"mode": "ema", "decay": 0.75},
    "hier": {"mode": "hier", "inner": INNER},
    "node sync": {"scope": "node", "mode": "sync", "inner": INNER},
    "node stale": {"scope": "node", "inner": INNER},
    "micro": {"scope": "micro"},
    "gossip": {"mode": "gossip"},
    "gossip ema": {"mode": "gossip", "graph": "complete", "decay": 0.75},
}


def selections(step: int, rank: int) -> list[Tensor]:
    """Of each unit; ranks, units and steps differ in tokens and in which experts they like."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    return [
        (torch.randint(0, 3, (20 + 7 * rank + 3 * unit + step, 1), generator=draw) + rank + unit) % EXPERTS
        for unit in range(UNITS)
    ]


def counts_of(step: int, rank: int) -> Tensor:
    """(units, layers, experts)."""
    chosen = selections(step, rank)
    return torch.stack(
        [
            torch.stack([((s + n) % EXPERTS).flatten().bincount(minlength=EXPERTS) for n in range(LAYERS)])
            for s in chosen
        ]
    ).double()


C = torch.stack([torch.stack([counts_of(t, r) for r in range(RANKS)]) for t in range(STEPS)])
"""(steps, ranks, units, layers, experts)"""
TOKENS = C[..., 0, :].sum(-1)


def expected(mode: str, order: Order, step: int, rank: int, unit: int) -> Tensor:
    """The rule of a mode, in the plainest form."""
    near = next(group for group in INNER if rank in group)
    seen, part = unit + 1, (unit + 1) / UNITS
    now, tokens = C[step], TOKENS[step]
    before = C[step - 1] if step else None
    last = before.sum((0, 1)) if before is not None else torch.ones(LAYERS, EXPERTS).double()
    last_tokens = TOKENS[step - 1].sum() if step else TOKENS[0, rank, 0] * RANKS * UNITS
    match mode:
        case "late" if order == "gpipe":
            return pull_of(now.sum((0, 1)), tokens.sum())
        case "sync" | "late":
            return pull_of(now[:, :seen].sum((0, 1)), tokens[:, :seen].sum() / part)
        case "carry":
            rest = (1 - part) * last if step else 0
            return pull_of(now[:, :seen].sum((0, 1)) + rest, tokens[:, :seen].sum() / part)
        case "stale" | "gossip complete":
            return pull_of(last, last_tokens)
        case "ema":
            f = last
            for t in range(step):
                share = C[t].sum((0, 1)) / C[t].sum((0, 1)).sum(-1, keepdim=True)
                f = share if t == 0 else 0.75 * f + 0.25 * share
            return pull_of(f, last_tokens)
        case "hier":
            here, here_tokens = now[near][:, :seen].sum((0, 1)), tokens[near][:, :seen].sum() / part
            if before is None:
                return pull_of(here, here_tokens * RANKS / len(near))
            far = [r for r in range(RANKS) if r not in near]
            return pull_of(here + part * before[far].sum((0, 1)), here_tokens + TOKENS[step - 1, far].sum())
        case "node sync":
            return pull_of(now[near][:, :seen].sum((0, 1)), tokens[near][:, :seen].sum() / part * RANKS / len(near))
        case "node stale":
            if before is None:
                return pull_of(last, last_tokens)
            return pull_of(before[near].sum((0, 1)), TOKENS[step - 1, near].sum() * RANKS / len(near))
        case "micro":
            return pull_of(now[rank, unit], tokens[rank, unit] * RANKS * UNITS)
    raise AssertionError(mode)


@pytest.mark.parametrize(
    ("mode", "order"),
    [(mode, "interleaved") for mode in MODES if "gossip" not in mode] + [("late", "gpipe"), ("sync", "gpipe")],
)
def test_f_is_what_the_rule_says(mode: str, order: Order) -> None:
    """In late, all forward passes first give the exact batch; where they alternate it is the prefix, as in sync."""

    def work(rank: Rank) -> list[Tensor]:
        steps = Steps(rank, EXPERTS, UNITS, **MODES[mode])
        pulls = [steps.run(selections(step, rank.rank), order) for step in range(STEPS)]
        predicted = {level: STEPS * count for level, count in steps.balance.predicted_bytes().items()}
        steps.balance.finish()
        assert steps.queue.meter.sent_bytes("balance") == predicted
        assert (sum(predicted.values()) == 0) == (mode == "micro")
        per_step = {"micro": 0, "stale": 1, "ema": 1, "node stale": 1, "hier": 1 + UNITS}.get(mode, UNITS)
        assert steps.balance.metrics()["messages"] == STEPS * per_step
        return pulls

    for rank, pulls in enumerate(run_ranks(RANKS, work)):
        for step, pull in enumerate(pulls):
            rule = torch.stack([expected(mode, order, step, rank, unit) for unit in range(UNITS)])
            torch.testing.assert_close(pull, rule, rtol=0, atol=1e-15)
    assert not torch.allclose(expected("late", "gpipe", 1, 0, 0), expected("late", "interleaved", 1, 0, 0), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "order", "weight"),
    [
        ("micro", "interleaved", 1),
        ("sync", "interleaved", (1 + 1 / 2 + 1 / 3) / 12),
        ("late", "gpipe", 1 / 12),
        ("carry", "interleaved", 1 / 12),
        ("hier", "interleaved", (1 + 1 / 2 + 1 / 3) / 12),
        ("stale", "interleaved", 0),
        ("ema", "interleaved", 0),
        ("gossip", "interleaved", 0),
        ("node sync", "interleaved", (1 + 1 / 2 + 1 / 3) / 6),
    ],
)
def test_own_weight(mode: str, order: Order, weight: float) -> None:
    """How much of a micro-batch's f comes from itself: as measured, as metrics say, and as describe() says beforehand.

    Each unit of three steps has an expert to itself: what f says of it, is what the unit's own counts weigh there.
    """
    units = RANKS * UNITS

    def work(rank: Rank) -> tuple[float, float, float]:
        steps = Steps(rank, 3 * units, UNITS, **MODES[mode])
        for step in range(3):
            first = step * units + rank.rank * UNITS
            own = [first + unit for unit in range(UNITS)]
            pulls = steps.run([torch.full((5, 1), expert) for expert in own], order)
        tokens = 5 * units
        f = [float(pulls[unit, 0, expert]) * tokens + 1 / (3 * units) for unit, expert in enumerate(own)]
        steps.balance.begin_step()
        steps.run([torch.zeros(5, 1, dtype=torch.long)] * UNITS, order)  # stale modes know a step when the next ends
        settings = steps.balance.settings
        said = own_weight(settings, 2 if settings.scope == "node" else RANKS, UNITS)
        return sum(f) / UNITS, steps.balance.metrics()["self_weight"], said

    for measured, known, said in run_ranks(RANKS, work):
        assert measured == pytest.approx(weight, abs=1e-12)
        assert known == pytest.approx(weight, abs=1e-12)
        assert said == pytest.approx(weight, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_resumes_bit_for_bit(mode: str) -> None:
    settings = MODES[mode]

    def whole(rank: Rank) -> tuple[Tensor, dict[str, Any]]:
        steps = Steps(rank, EXPERTS, UNITS, **settings)
        for step in (0, 1):
            steps.run(selections(step, rank.rank))
        state = copy.deepcopy(steps.balance.state_dict())
        steps.run(selections(2, rank.rank))
        return steps.run(selections(3, rank.rank)), state

    unbroken = run_ranks(RANKS, whole)

    def resumed(rank: Rank) -> Tensor:
        steps = Steps(rank, EXPERTS, UNITS, **settings)
        steps.balance.load_state_dict(unbroken[rank.rank][1])
        steps.run(selections(2, rank.rank))
        return steps.run(selections(3, rank.rank))

    for (before, _), after in zip(unbroken, run_ranks(RANKS, resumed), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("mode", ["carry", "stale", "ema", "hier", "gossip"])
def test_resumes_with_another_number_of_ranks(mode: str) -> None:
    """Two ranks go on where four were: what all had counted is still known, and shared out anew."""

    def four(rank: Rank) -> dict[str, Any]:
        steps = Steps(rank, EXPERTS, UNITS, **MODES[mode])
        steps.run(selections(0, rank.rank))
        return steps.balance.state_dict()

    states = run_ranks(RANKS, four)

    def two(rank: Rank) -> Tensor:
        settings = MODES[mode] | ({"inner": [[0], [1]]} if mode == "hier" else {})
        steps = Steps(rank, EXPERTS, UNITS, **settings)
        steps.balance.load_state_dict({"all_ranks": states})
        return steps.run(selections(1, rank.rank))

    last, now = C[0].sum((0, 1)), C[1][:2]
    for rank, pulls in enumerate(run_ranks(2, two)):
        match mode:
            case "carry":
                rule = pull_of(now[:, 0].sum(0) + last * (1 - 1 / UNITS), TOKENS[1, :2, 0].sum() * UNITS)
            case "hier":
                rule = pull_of(now[rank, 0] + last / 2 / UNITS, TOKENS[1, rank, 0] * UNITS + TOKENS[0].sum() / 2)
            case "gossip":  # each rank goes on with the first one's estimate
                rule = pulls[0]
                assert rule.abs().max() > 0
            case _:
                rule = pull_of(last, TOKENS[0].sum())
        torch.testing.assert_close(pulls[0], rule, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("mode", "order", "weight"),
    [("micro", "interleaved", 1), ("sync", "interleaved", 3 / 4), ("late", "gpipe", 1 / 2)]
    + [(mode, "interleaved", weight) for mode, weight in (("carry", 1 / 2), ("stale", 0.0))],
)
def test_what_is_left_of_the_bias_of_the_micro_batch_loss(mode: str, order: Order, weight: float) -> None:
    """E[gradient] = the population's + own weight * (the micro-batch loss's - the population's): why modes matter.

    A frozen router, and steps of two micro-batches, each of one of two domains. The sequence of steps has every pair of
    a step and the one before it once, so that means over it are expectations, exactly.
    """
    tokens = 8
    draw = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(2, tokens, EXPERTS, generator=draw, dtype=torch.float64)  # of each domain
    chosen = logits.topk(1).indices
    p = logits.softmax(-1)
    f = torch.stack([c.flatten().bincount(minlength=EXPERTS) for c in chosen]).double() / tokens
    sequence = [(symbol // 2, symbol % 2) for symbol in (0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3)]

    def pull(of: Tensor) -> Tensor:
        """The mean gradient of a router that sees the domain alone, f given for each domain's micro-batches."""
        inner = (p * of[:, None]).sum(-1, keepdim=True)
        return EXPERTS / (2 * tokens) * (p * (of[:, None] - inner)).sum(1)

    def work(rank: Rank) -> Tensor:
        settings: dict[str, Any] = MODES[mode] | {"num_experts": EXPERTS, "top_k": 1, "coef": 1.0}
        balance = LoadBalance(micro_batches=2, queue=rank.queue(), **settings)
        mean = torch.zeros(2, EXPERTS, dtype=torch.float64)
        for number, step in enumerate((sequence[-1], *sequence)):
            leaves = [logits[domain].clone().requires_grad_() for domain in step]
            losses = []
            for domain, leaf in zip(step, leaves, strict=True):
                losses.append(0 * balance(0, leaf, chosen[domain]).sum())
                if order == "interleaved":
                    losses.pop().backward()
            for loss in losses:
                loss.backward()
            for domain, leaf in zip(step, leaves, strict=True):
                assert leaf.grad is not None
                mean[domain] += leaf.grad.sum(0) / len(sequence) if number else 0
        return mean

    population, alone = pull(f.mean(0).expand(2, -1)), pull(f)
    expectation = population + weight * (alone - population)
    torch.testing.assert_close(run_ranks(1, work)[0], expectation, rtol=0, atol=1e-14)
    assert (alone - population).norm() > population.norm() / 2, "or else there would be little to be rid of"


def test_a_fault_among_near_ranks_is_told_to_far_ones_too() -> None:
    """In mode hier only near ranks see each other's micro-batches: the message to all tells the others."""

    def work(rank: Rank) -> str:
        steps = Steps(rank, EXPERTS, UNITS, **MODES["hier"])
        steps.run(selections(0, rank.rank))
        for unit in range(UNITS):
            logits = torch.zeros(3, EXPERTS, requires_grad=True)
            selected = torch.full((3, 1), EXPERTS if (rank.rank, unit) == (1, 1) else 0)
            outs = [steps.balance(layer, logits, selected).sum() for layer in range(LAYERS)]
            try:
                torch.stack(outs).sum().backward()
            except RouterError as error:
                return f"unit {unit}: {error}"
        with pytest.raises(RouterError) as caught:
            steps.balance.finish()
        return f"finish: {caught.value}"

    when = run_ranks(RANKS, work)
    assert [text.split(":")[0] for text in when] == ["unit 1", "unit 1", "finish", "finish"]
    assert all("rank 1 selected experts outside 0 .. 5" in text for text in when)
