"""The timeline of a step: cases that are worked out by hand, with links of a million bytes per second."""

from __future__ import annotations

import pytest
import torch

from thinwire.comm.allreduce import AllReduceSettings, forecast_allreduce
from thinwire.comm.forecast import Coding, Exchange, Forecast, Parameter, When, seat_of
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.exchange_time import exchange_s
from thinwire.dist.plan.timeline import ComputeTime, StepTime, step_time
from thinwire.dist.plan.trace import StepTrace

COMPUTE = ComputeTime(1.0, 2.0, 0.5)
# Of units a and b, b is the second in forward and the first in backward, half of each pass.
TRACE = StepTrace(1, 1, (("b", 0.5), ("a", 1.0)), 0, (("a", 0.0), ("b", 0.5)))
DEVICE = {"memory_bytes": 1e9, "peak_flops": 1e12}


def cluster(**more) -> Cluster:
    return Cluster.model_validate({"levels": [{"name": "world", "size": 4, "link_bps": 8e6}], "device": DEVICE, **more})


def exchange(when: When, seconds: float, *needs: str, per_step: float = 1.0, queue: str = "main") -> Exchange:
    return Exchange(
        f"{when} {' '.join(needs)}",
        {"world": int(1e6 * seconds)},
        messages=3,
        shots={},
        when=when,
        needs=needs,
        per_step=per_step,
        queue=queue,
    )


def play(*exchanges: Exchange, micro_batches: int = 1, prefetch: int = 0, on: Cluster | None = None) -> StepTime:
    return step_time(
        Forecast(exchanges), TRACE, COMPUTE, on or cluster(), micro_batches=micro_batches, prefetch=prefetch
    )


def exposed(*exchanges: Exchange, **how) -> float:
    found = play(*exchanges, **how)
    assert found.step_s == pytest.approx(found.compute_s + found.exposed_s)
    return found.exposed_s


def test_the_plain_arithmetic_of_four_boxes() -> None:
    """124 M parameters, four boxes on 1 Gbit: 496 MB of gradients, 744 MB out of each card, 6.3 s."""
    seat = seat_of([("world", 4)], 0)
    weights = Parameter("w", torch.Size([124_000_000]), torch.float32)
    (one,) = forecast_allreduce(AllReduceSettings(), [[weights]], seat).exchanges
    assert one.sent_bytes["world"] == pytest.approx(744e6, rel=1e-6)
    boxes = cluster(levels=[{"name": "world", "size": 4, "link_bps": "0.94gbit", "latency_s": "100us"}])
    assert exchange_s(one, boxes) == pytest.approx(8 * 744e6 / 0.94e9 + 2e-4, rel=1e-6)
    assert f"{exchange_s(one, boxes):.1f}" == "6.3"


def test_gradients_go_out_behind_the_rest_of_backward() -> None:
    # b at 2 s, half-way through backward, until 3 s; a from 3 s to 4 s; the optimizer from there.
    found = play(exchange("backward", 1, "b"), exchange("backward", 1, "a"))
    assert [(s.ready_s, s.begin_s, s.end_s) for s in found.spans] == [(2, 2, 3), (3, 3, 4)]
    assert (found.compute_s, found.exposed_s, found.sending_s) == (3.5, 1.0, 2.0)
    # In order of the queue: a waits for b, until 5 s.
    assert exposed(exchange("backward", 3, "b"), exchange("backward", 1, "a")) == 3.0
    # What needs all gradients begins at the end of backward.
    assert exposed(exchange("backward", 0.75)) == 0.75
    assert exposed() == 0.0


def test_of_several_micro_batches_the_last_one_sends() -> None:
    # Backward of the second one from 4 s to 6 s.
    found = play(exchange("backward", 1, "b"), micro_batches=2)
    assert (found.spans[0].begin_s, found.compute_s, found.exposed_s) == (5, 6.5, 0)
    assert exposed(exchange("backward", 2.5, "b"), micro_batches=2) == 1.5


def test_sums_of_every_micro_batch_share_a_queue() -> None:
    found = play(exchange("backward", 3.5, "b", per_step=2), micro_batches=2)
    # b at 2 s until 5.5 s, then the one that is ready at 5 s until 9 s; backward has ended at 6 s.
    assert [(s.begin_s, s.end_s) for s in found.spans] == [(2, 5.5), (5.5, 9)]
    assert found.exposed_s == 3.0


def test_what_has_the_same_needs_goes_level_by_level() -> None:
    two = [exchange("backward", 1, name, queue=queue) for queue in ("inside", "main") for name in ("b", "a")]
    # inside: b 2-3, a 3-4. beyond: b 3-4, a 4-5.
    assert exposed(*two) == 2.0
    assert exposed(*(exchange("backward", 1, name) for name in ("b", "b", "a", "a"))) == 3.0  # one queue


@pytest.mark.parametrize(("prefetch", "seconds", "waited"), [(0, 0.25, 1.0), (1, 0.25, 0.5), (0, 1, 4.0), (1, 1, 2.5)])
def test_units_wait_for_their_weights(prefetch: int, seconds: float, waited: float) -> None:
    """With seconds 1 ahead by one unit: forward 0-1 a, 1-2 b (a computes to 1.5), 2.5; backward b 3.5, a 4.5, 5.5."""
    gathers = [exchange("gather", seconds, name, per_step=2) for name in ("b", "a")]  # forward says the order
    assert exposed(*gathers, prefetch=prefetch) == pytest.approx(waited)


def test_gathers_that_come_less_often_come_in_forward() -> None:
    once = [exchange("gather", 1, "a", per_step=1)]
    assert exposed(*once, micro_batches=3) == 1.0
    assert exposed(exchange("gather", 1, "a", per_step=3), micro_batches=3) == 3.0
    # The slow level once, the fast one every time, after it.
    both = [exchange("gather", 1, "a", per_step=1), exchange("gather", 0.5, "a", per_step=4)]
    assert exposed(*both, micro_batches=2) == 1 + 4 * 0.5


def test_gathers_and_sums_of_a_queue_stand_in_each_others_way() -> None:
    gathers = [exchange("gather", 0.5, name, per_step=2) for name in ("a", "b")]
    # Forward ends at 2 s; b is gathered until 2.5 s, computed until 3.5 s, its sum goes out until 5.5 s, and only then
    # a is gathered, until 6 s, and computed until 7 s.
    assert exposed(*gathers, exchange("backward", 2, "b")) == pytest.approx(7.5 - 3.5)
    assert exposed(*gathers, exchange("backward", 2, "b", queue="other")) == pytest.approx(
        6 - 3.5
    )  # it ends 0.5 s after backward


def test_what_comes_after_the_step_is_waited_for() -> None:
    assert exposed(exchange("step", 2)) == 2.0
    found = play(exchange("step", 2, per_step=0.1))
    assert found.exposed_s == pytest.approx(0.2)
    assert [(s.begin_s, s.end_s) for s in found.spans] == [(3.5, 5.5)]
    # Two that come together, and a rarer one in some of these steps.
    rare = [exchange("step", 2, per_step=0.5), exchange("step", 1, per_step=0.5), exchange("step", 4, per_step=0.25)]
    assert exposed(*rare) == pytest.approx(0.5 * 3 + 0.25 * 4)


def test_rare_sums_of_gradients_are_exposed_in_their_share_of_the_steps() -> None:
    assert exposed(exchange("backward", 3, "b", per_step=0.5)) == pytest.approx(0.5 * 2)


@pytest.mark.parametrize(("per_step", "waited"), [(1.0, 1.5), (0.5, 0.75), (0.1, 0.15)])
def test_what_goes_on_beside_the_next_step_is_waited_for_after_it(per_step: float, waited: float) -> None:
    assert exposed(exchange("beside", 5, per_step=per_step)) == pytest.approx(waited)
    assert exposed(exchange("beside", 3, per_step=per_step)) == 0.0


def test_alternatives_beside_a_step_are_not_added_up() -> None:
    """Every other step sends to one neighbour, the others to another: each has the whole next step."""
    assert exposed(*(exchange("beside", 3, name, per_step=0.5) for name in "ab")) == 0.0
    assert exposed(*(exchange("beside", 5, name, per_step=0.5) for name in "ab")) == pytest.approx(1.5)


def test_beside_does_not_hold_up_the_gradients() -> None:
    assert exposed(exchange("beside", 3), exchange("backward", 1, "a")) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("sent", "longer"),
    [
        ((), 0.0),
        ((exchange("backward", 0, "b"),), 0.25),
        ((exchange("backward", 0, "b"), exchange("gather", 0, "a", per_step=2)), 0.25),
        ((exchange("step", 0, per_step=0.1),), 0.025),
        ((exchange("beside", 0),), 0.0),
    ],
)
def test_ranks_that_wait_for_one_another_lose_what_was_measured(sent: tuple[Exchange, ...], longer: float) -> None:
    coupled = ComputeTime(1.0, 2.0, 0.5, coupled_s=0.25)
    found = step_time(Forecast(sent), TRACE, coupled, cluster(), micro_batches=1)
    assert (found.compute_s, found.exposed_s) == (3.5, pytest.approx(longer))


def test_bytes_that_a_processor_moves_are_not_computed_with() -> None:
    measured = {"hosts": ["a"] * 4, "cores_per_rank": 1.0, "cpu_s_per_byte": 0.5e-6}
    # From 2 s to 3 s half of the processor is left: backward ends at 3.5 s, and nothing computes while a is sent.
    slowed = exposed(exchange("backward", 1, "b"), exchange("backward", 1, "a"), on=cluster(measured=measured))
    assert slowed == pytest.approx(1.5)


def test_an_exchange_takes_its_slowest_level_and_its_coding() -> None:
    coding = Coding('{"kind": "int4"}', encoded=1_000_000, decoded=2_000_000, encodes=2, decodes=4)
    measured = {
        "hosts": ["a"] * 8,
        "cores_per_rank": 2.0,
        "codecs": {coding.codec: {"encode_s": 1e-6, "decode_s": 0.25e-6, "encode_call_s": 0.5, "decode_call_s": 0.25}},
    }
    levels = [
        {"name": "node", "size": 4, "link_bps": 80e6, "latency_s": 0.001},
        {"name": "world", "size": 8, "link_bps": 8e6, "latency_s": "20ms", "ranks_per_link": 4},
    ]
    one = Exchange("x", {"node": 1_000_000, "world": 500_000}, 2, {"node": 2, "world": 3}, "step", coding=(coding,))
    bare = cluster(levels=levels)
    assert exchange_s(one, bare) == pytest.approx(4 * 0.5 + 3 * 0.02)  # four ranks share the card
    assert exchange_s(one, cluster(levels=levels, measured=measured)) == pytest.approx(
        2.06 + 1 + 0.5 + 2 * 0.5 + 4 * 0.25
    )
    assert exchange_s(Exchange("x", {}, 0, {}, "step"), bare) == 0.0
