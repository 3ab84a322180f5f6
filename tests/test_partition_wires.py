"""Wire formats of partitioning: their codes by hand, their errors by bound, their bytes, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_machines import levels_of
from pydantic import ValidationError
from torch import Tensor

from thinwire.comm.partition.levels import build_levels
from thinwire.comm.partition.placement import Placement
from thinwire.comm.partition.random_keys import gradient_key, update_key
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.wires.gradients import PlainGradients, formats_of
from thinwire.comm.partition.wires.weights import build_gather_wire, build_update_wire
from thinwire.comm.partition.wires.wire import Wire

INT4 = {"kind": "int4", "smooth": False}


def wire_of(given: Any) -> Wire:
    return PartitionSettings(gradients={"world": given}).gradients["world"].build()


def decoded(wire: Wire, payload: Tensor, numel: int) -> Tensor:
    out = torch.full((numel,), 99.0)
    wire.decode(payload, out)
    return out


def there_and_back(wire: Wire, values: Tensor, key: int = 0) -> Tensor:
    return decoded(wire, wire.encode(values, [len(values)], key=key), len(values))


def test_codes_by_hand() -> None:
    """Both ends of the range come back whole, ties go to even, and of two codes in a byte the first is the low one."""
    payload = wire_of(INT4).encode(torch.tensor([7.0, -7.0, 3.5, 0.0]), [4], key=0)
    assert payload[:4].view(torch.float32).item() == 1.0
    assert payload[16:].tolist() == [0x97, 0x04, *[0] * 14]
    assert decoded(wire_of(INT4), payload, 4).tolist() == [7.0, -7.0, 4.0, 0.0]
    signs = wire_of(INT4).encode(torch.tensor([1.0, -2.0, 7.0, -7.0]), [4], key=0)
    assert signs[16:18].tolist() == [0xE1, 0x97]
    eight = there_and_back(wire_of("int8"), torch.tensor([127.0, -127.0, 0.5, 1.5, -3.4]))
    assert eight.tolist() == [127.0, -127.0, 0.0, 2.0, -3.0]


def test_a_single_large_value_becomes_codes_of_one_magnitude() -> None:
    values = torch.zeros(64)
    values[37] = 3.0
    payload = wire_of({"kind": "int4", "block": 64}).encode(values, [64], key=0)
    codes = payload[16:48]
    assert set(codes[:16].tolist()) == {0}
    assert {code & 15 for code in codes[16:].tolist()} | {code >> 4 for code in codes[16:].tolist()} == {7, 9}
    torch.testing.assert_close(decoded(wire_of({"kind": "int4", "block": 64}), payload, 64), values)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    kind=st.sampled_from(["int8", "int4"]),
    block=st.sampled_from([32, 96, 256]),
    smooth=st.booleans(),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    feedback=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_no_error_is_larger_than_a_code_allows(counts, kind, block, smooth, rounding, feedback, seed) -> None:
    """Each run for itself: half a code, a whole one if rounding is stochastic; the memory keeps the rest."""
    wire = wire_of({"kind": kind, "block": block, "smooth": smooth, "rounding": rounding})
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(counts), generator=generator) * torch.rand(sum(counts), generator=generator).pow(8)
    memory = 0.1 * torch.randn(sum(counts), generator=generator) if feedback else None
    wanted = values if memory is None else values + memory
    payload = wire.encode(values, counts, key=seed, memory=memory)
    sizes = [wire.payload_bytes(count) for count in counts]
    assert len(payload) == sum(sizes)
    assert all(size % 16 == 0 for size in sizes)
    left = [] if memory is None else memory.split(counts)
    for index, (part, run) in enumerate(zip(payload.split(sizes), wanted.split(counts), strict=True)):
        if not len(run):
            continue
        made = decoded(wire, part, len(run))
        if left:
            torch.testing.assert_close(made + left[index], run, rtol=1e-5, atol=1e-6)
        blocks = zip(made.split(block), run.split(block), strict=True)
        codes = (127 if kind == "int8" else 7) * (1 if rounding == "stochastic" else 2)
        for got, given_ in blocks:
            # The transform of 32 values is as long as they are; each of its entries is rounded as one value is.
            largest = given_.abs().max() if not smooth else 32**0.5 * max(p.norm() for p in given_.split(32))
            assert (got - given_).abs().max() <= largest / codes * (1 + 1e-5) + 1e-12


def test_what_was_sent_and_what_is_kept_are_the_gradients_exactly() -> None:
    """In whole numbers, with a scale that is one: nothing is lost and nothing is made good twice."""
    wire, memory = wire_of(INT4), torch.zeros(256)
    sent, given_ = torch.zeros(256), torch.zeros(256)
    for step in range(40):
        gradient = torch.randint(-50, 51, (256,), generator=torch.Generator().manual_seed(step)).float()
        gradient[::128] = 7 * 16.0  # so that the scale is 16
        sent += decoded(wire, wire.encode(gradient, [256], key=step, memory=memory), 256)
        given_ += gradient
        assert torch.equal(sent + memory, given_)
        assert 0 < memory.abs().max() <= 8


@pytest.mark.parametrize(
    ("settings_", "bits"),
    [("int8", 8 + 32 / 512), ("int4", 4.25), (INT4, 4.25), ({"kind": "int4", "block": 2048}, 4.015625)],
    ids=str,
)
def test_bits_of_a_value(settings_: Any, bits: float) -> None:
    assert wire_of(settings_).payload_bytes(1 << 20) * 8 == bits * (1 << 20)
    assert wire_of(settings_).payload_bytes(0) == 0
    update = build_update_wire(PartitionSettings(update="difference").update)
    assert update.payload_bytes(1 << 20, torch.bfloat16) * 8 == 4.015625 * (1 << 20)


@pytest.mark.parametrize("given_", ["int8", "int4", INT4, {"kind": "int8", "smooth": True}], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_never_lost(given_: Any, bad: float) -> None:
    """It takes its block with it, through a sum and another encoding as well, and no other block."""
    wire = wire_of(given_)
    values = torch.ones(2048)
    values[700] = bad
    made = there_and_back(wire, values)
    block = 512 if "int8" in str(given_) else 128
    bad_block = torch.zeros(2048, dtype=torch.bool)
    bad_block[700 // block * block : 700 // block * block + block] = True
    assert not made[bad_block].isfinite().any()
    assert made[~bad_block].isfinite().all()
    total = torch.empty(2048)
    wire.reduce(torch.stack([wire.encode(v, [2048], key=0) for v in (torch.ones(2048), values)]), total, scale=1.0)
    assert not total[bad_block].isfinite().any()
    assert not there_and_back(wire, total)[bad_block].isfinite().any()


@pytest.mark.parametrize("given_", ["int8", "int4", "bf16"])
def test_a_sum_adds_what_the_payloads_decode_to_in_their_order(given_: str) -> None:
    wire = wire_of(given_)
    values = torch.randn(5, 333, generator=torch.Generator().manual_seed(3))
    payloads = torch.stack([wire.encode(row.clone(), [333], key=0) for row in values])
    out = torch.empty(333)
    wire.reduce(payloads, out, scale=0.5)
    expected = torch.stack([decoded(wire, payload, 333) for payload in payloads]).sum(0) * 0.5
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_is_right_on_average_and_new_with_every_key() -> None:
    wire = wire_of({**INT4, "rounding": "stochastic"})
    values = torch.linspace(-1, 1, 256)
    made = [there_and_back(wire, values, gradient_key(0, draw, 3)) for draw in range(500)]
    assert (torch.stack(made).mean(0) - values).abs().max() < 5 * (1 / 7) / 2 / 500**0.5
    keys = {gradient_key(seed, draw, rank) for seed in range(3) for draw in range(9) for rank in range(9)}
    keys |= {
        update_key(seed, step, unit, owner) for seed in (0, 1) for step in (0, 1) for unit in "ab" for owner in (0, 1)
    }
    assert len(keys) == 3 * 81 + 16
    assert torch.equal(made[5], there_and_back(wire, values, gradient_key(0, 5, 3)))


def test_gathered_weights_of_any_dtype() -> None:
    wire = build_gather_wire(PartitionSettings(gather="int8").gather)
    assert wire is not None
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    payload = wire.encode(values, [1000], key=0)
    exact = decoded(wire, payload, 1000)
    assert (exact - values).abs().max() <= values.abs().max() / 254 * (1 + 1e-5)
    half = torch.empty(1000, dtype=torch.bfloat16)
    wire.decode(payload, half)
    assert torch.equal(half, exact.to(torch.bfloat16))
    assert build_gather_wire(PartitionSettings().gather) is None


@pytest.mark.parametrize("given_", ["int8", "int4", INT4], ids=str)
def test_damaged_payloads_decode_to_something(given_: Any, mutations: Callable[[Tensor], Iterator[Tensor]]) -> None:
    """Every byte string of the right length means values; what they are worth, the norm of the gradient shows."""
    wire = wire_of(given_)
    payload = wire.encode(torch.randn(200, generator=torch.Generator().manual_seed(2)), [200], key=0)
    seen = 0
    for damaged in mutations(payload):
        if len(damaged) == len(payload):
            out = torch.full((200,), 12345.0)
            wire.decode(damaged, out)
            assert not (out == 12345.0).all()
            seen += 1
    assert seen


@pytest.mark.parametrize(
    ("settings_", "where", "what"),
    [
        ({"gradients": {"node": {"kind": "int8", "block": 48}}}, "gradients.node.int8.block", "multiple of 32"),
        ({"gradients": {"node": "int2"}}, "gradients.node", "'fp32', 'bf16', 'fp16', 'int8', 'int4'"),
        ({"gradients": {"node": {"kind": "int4", "beta": 1}}}, "gradients.node.int4.beta", "not permitted"),
        ({"gradients": {"world": {"kind": "fp32", "feedback": True}}}, "gradients.world.fp32", "leaves nothing out"),
        ({"gather": "difference"}, "gather", "'same', 'int8'"),
        ({"update": {"kind": "difference", "bits": 2}}, "update.difference.bits", "4 or 8"),
        ({"update": "int4"}, "update", "'same', 'int8', 'difference'"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings_: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PartitionSettings(**settings_)
    (error,) = caught.value.errors()
    assert ".".join(map(str, error["loc"])) == where
    assert what in error["msg"]


def test_formats_belong_to_levels() -> None:
    levels, placement = levels_of((2, 2, 2), 0), Placement(1, 2, 3)

    def formats(**given_: Any) -> dict[str, str]:
        found = formats_of(PartitionSettings(gradients=given_).gradients, levels, placement)
        return {name: one.kind for name, one in found.items()}

    assert formats(world="int4", node="int8") == {"pair": "fp32", "node": "int8", "world": "int4"}
    assert formats(world={"kind": "bf16", "feedback": True})["world"] == "bf16"
    with pytest.raises(ValueError, match=r"gradients\.rack: the machine has no such level; it has pair, node, world"):
        formats(rack="int4")
    with pytest.raises(ValueError, match=r"gradients\.rank: the machine has no such level"):
        formats(rank="int4")
    with pytest.raises(ValueError, match=r"gradients\.node\.feedback: true inside the level of grads, node"):
        formats(node={"kind": "int4", "feedback": True})


def test_a_level_that_a_machine_lacks_stands_for_one_that_joins_the_same_ranks() -> None:
    """One node of four: node and world are the same ranks, and what is said of node counts."""
    one_node = build_levels(("node",), (4,), range(4), rank=0)
    placement = Placement(0, 1, 1)
    gradients = PartitionSettings(gradients={"world": "int4"}).gradients
    assert formats_of(gradients, one_node, placement)["node"].kind == "int4"
    both = PartitionSettings(gradients={"world": "int4", "node": "int8"}).gradients
    assert formats_of(both, one_node, placement)["node"].kind == "int8"
    assert formats_of({}, one_node, placement) == {"node": PlainGradients()}
