"""What crosses the levels: sums and weights that are exact where the wires are, in exactly the bytes foretold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from partition_machines import levels_of, on_machine
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.partition.cascade import Cascade
from thinwire.comm.partition.gradient_shard import GradientShard
from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.ownership import Ownership
from thinwire.comm.partition.placement import Placement
from thinwire.comm.partition.process_groups import cuts_of
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.weight_shard import WeightShard
from thinwire.comm.partition.wires.gradients import formats_of
from thinwire.comm.partition.wires.plain import PlainWire
from thinwire.comm.partition.wires.weights import build_update_wire

MACHINES = [(2, 2, 2), (2, 4, 2), (3, 2, 2)]
# Fewer rows than owners, one row more than they divide, a scalar: every uneven cut that there is.
SHAPES = {"w": torch.Size((13, 5)), "few": torch.Size((3, 2)), "s": torch.Size(()), "even": torch.Size((16, 3))}
PLAIN = PlainWire(torch.float32)


def shard_of(
    levels: Levels, placement: Placement, gradients: Mapping[str, Any] | None = None, shapes: Any = None
) -> tuple[Ownership, GradientShard]:
    formats = formats_of(PartitionSettings(gradients=gradients or {}).gradients, levels, placement)
    ownership = Ownership(shapes or SHAPES, cuts_of(levels, placement))
    feedback = frozenset(name for name, one in formats.items() if one.feedback)
    wires = {name: one.build() for name, one in formats.items()}
    return ownership, GradientShard(ownership, levels, placement, wires, feedback=feedback)


def gradient(rank: int, step: int, shapes: Mapping[str, torch.Size], *, whole: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    if whole:
        return {n: torch.randint(-999, 1000, s, generator=generator).float() for n, s in shapes.items()}
    return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}


def flat(ownership: Ownership, values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(ownership.pieces(values, 0, ownership.owners))


def own_part(ownership: Ownership, levels: Levels, placement: Placement, values: Tensor) -> Tensor:
    owner = levels.number(levels.rank, placement.optim)
    return values[ownership.offsets[owner] : ownership.offsets[owner + 1]]


@pytest.mark.parametrize(
    ("psi", "fanouts", "volumes"),
    [(1600, (2, 4, 2), [800, 600, 100]), (3840, (2, 4, 48), [1920, 1440, 470]), (120, (3, 2, 2), [80, 20, 10])],
)
def test_elements_at_each_level_are_those_of_the_formula(psi: int, fanouts: Sequence[int], volumes: list[int]) -> None:
    levels = levels_of(fanouts, 5)
    cascade = Cascade(levels, 0, levels.depth)
    each = [psi // levels.world_size] * levels.world_size
    reduced = cascade.reduce_scatter_bytes(each, dict.fromkeys(levels.names, PLAIN))
    assert [reduced[name] for name in levels.names] == [4 * v for v in volumes]
    gathered = cascade.all_gather_bytes(each)
    assert [gathered[name] for name in levels.names] == volumes


def test_slices_of_a_node_of_four_in_the_order_of_their_owners() -> None:
    levels = levels_of((4, 2), 0)
    assert levels.group(2) == (0, 4, 1, 5, 2, 6, 3, 7)
    inverse = levels_of((2, 4), 0)
    assert [levels.group(2).index(rank) for rank in inverse.group(2)] == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("fanouts", MACHINES)
def test_whole_numbers_are_summed_and_spread_bit_for_bit(fanouts: tuple[int, ...]) -> None:
    """All triples, in two micro-batches: the mean of an owner's rows, then the same weights on all ranks."""
    depth = len(fanouts)
    triples = [Placement(p, g, o) for p in range(depth + 1) for g in range(p, depth + 1) for o in range(g, depth + 1)]

    def work(levels: Levels, channel: Channel, meter: TrafficMeter) -> None:
        world = range(levels.world_size)
        for placement in triples:
            ownership, shard = shard_of(levels, placement)
            total = sum(flat(ownership, gradient(r, step, SHAPES)) for r in world for step in (0, 1))
            before = meter.sent_bytes()
            for step in (0, 1):
                shard.take(channel, flat(ownership, gradient(levels.rank, step, SHAPES)), 0)
            shard.finish(channel, 0)
            mean = own_part(ownership, levels, placement, torch.as_tensor(total)) * (1.0 / levels.world_size)
            assert torch.equal(shard.own, mean), placement
            assert sent_since(meter, before) == +shard.sent_bytes(2), placement

            weights = WeightShard(ownership, levels, placement, build_update_wire(PartitionSettings().update))
            first = levels.number(levels.rank, placement.params) * (ownership.owners // ownership.cuts[0])
            last = first + ownership.owners // ownership.cuts[0]
            rows = {name: slice(ownership.rows(name, first)[0], ownership.rows(name, last - 1)[1]) for name in SHAPES}
            mine = {name: torch.zeros(s or (1,))[rows[name]] for name, s in SHAPES.items()}
            target = {
                name: value.reshape(s or (1,))
                for (name, s), value in zip(SHAPES.items(), gradient(7, 7, SHAPES).values(), strict=True)
            }
            owner = levels.number(levels.rank, placement.optim)
            new = {name: target[name][slice(*ownership.rows(name, owner))] for name in SHAPES}
            before = meter.sent_bytes()
            weights.spread(channel, mine, new, 0)
            assert all(torch.equal(mine[name], target[name][rows[name]]) for name in SHAPES), placement
            assert sent_since(meter, before) == +weights.sent_bytes(torch.float32), placement

    on_machine(fanouts, work)


def sent_since(meter: TrafficMeter, before: Mapping[str, int]) -> dict[str, int]:
    after = meter.sent_bytes()
    return {name: after[name] - before.get(name, 0) for name in after if after[name] > before.get(name, 0)}


def test_one_level_however_it_is_cut_into_levels() -> None:
    """[4] and [2, 2] of the same ranks, with whole numbers: the same means, in other places."""
    shapes = {"w": torch.Size((8, 3))}

    def means(levels: Levels, channel: Channel, meter: TrafficMeter) -> tuple[int, Tensor]:
        placement = Placement(0, levels.depth, levels.depth)
        ownership, shard = shard_of(levels, placement, shapes=shapes)
        shard.take(channel, flat(ownership, gradient(levels.rank, 0, shapes)), 0)
        shard.finish(channel, 0)
        return levels.number(levels.rank, levels.depth), shard.own.clone()

    whole = [torch.cat([own for _, own in sorted(on_machine(f, means), key=lambda x: x[0])]) for f in ((4,), (2, 2))]
    assert torch.equal(*whole)


def test_a_value_is_quantised_once_at_each_level_and_no_more() -> None:
    """Of two hops in int8 the second rounds what the first has summed in fp32: replayed by hand, to the last bit."""
    shapes = {"w": torch.Size((4, 512))}
    wires = {"node": {"kind": "int8", "smooth": True}, "world": "int4"}
    placement = Placement(0, 1, 2)
    inputs = [gradient(r, 0, shapes, whole=False)["w"].view(-1) for r in range(4)]

    def work(levels: Levels, channel: Channel, meter: TrafficMeter) -> tuple[int, Tensor]:
        ownership, shard = shard_of(levels, placement, wires, shapes)
        shard.take(channel, flat(ownership, {"w": inputs[levels.rank].view(4, 512)}), 1)
        shard.finish(channel, 2)
        assert meter.sent_bytes() == shard.sent_bytes(1)
        return levels.number(levels.rank, 2), shard.own.clone()

    made = torch.cat([own for _, own in sorted(on_machine((2, 2), work), key=lambda x: x[0])])
    fast, slow = (
        one.build()
        for one in formats_of(PartitionSettings(gradients=wires).gradients, levels_of((2, 2), 0), placement).values()
    )

    def reduce(wire: Any, parts: Sequence[Tensor]) -> Tensor:
        out = torch.empty_like(parts[0])
        wire.reduce(torch.stack([wire.encode(part, [part.numel()], key=0) for part in parts]), out, scale=1.0)
        return out

    expected = []
    for digit in (0, 1):  # of the node: half of the rows; then a quarter for each node
        halves = [reduce(fast, [inputs[node * 2 + peer].view(2, -1)[digit] for peer in (0, 1)]) for node in (0, 1)]
        expected += [reduce(slow, [half.view(2, -1)[quarter] for half in halves]) for quarter in (0, 1)]
    assert torch.equal(made, torch.cat(expected) * 0.25)
    exact = torch.stack(inputs).mean(0)
    assert (made - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("kind", ["int4", "int8", "bf16"])
def test_replicas_get_the_same_bits_and_the_right_mean(kind: str) -> None:
    """SGD's view: gradients equal to the rank give the mean of the ranks, whatever the shape."""
    shapes = {"bias": torch.Size((7,)), "square": torch.Size((7, 7)), "wide": torch.Size((16, 40))}

    def work(levels: Levels, channel: Channel, meter: TrafficMeter) -> tuple[int, Tensor]:
        placement = Placement(1, 1, 1)
        ownership, shard = shard_of(levels, placement, {"node": kind, "world": kind}, shapes)
        values = {name: torch.full(s, float(levels.rank)) for name, s in shapes.items()}
        shard.take(channel, flat(ownership, values), 5)
        shard.finish(channel, 6)
        assert meter.sent_bytes() == shard.sent_bytes(1)
        return levels.number(levels.rank, 1), shard.own.clone()

    outcomes = on_machine((2, 4), work)
    for number, own in outcomes:
        torch.testing.assert_close(own, torch.full_like(own, 3.5), rtol=1e-2, atol=0)
        assert all(torch.equal(own, other) for n, other in outcomes if n == number)


@pytest.mark.parametrize("placement", [Placement(1, 1, 2), Placement(1, 1, 1)], ids=["sharded", "replicas"])
def test_feedback_makes_good_what_was_left_out(placement: Placement) -> None:
    """What was sent in all steps and what is still kept add up to the gradients; a refused step changes no memory."""
    shapes = {"w": torch.Size((8, 96))}
    steps = 8

    def work(levels: Levels, channel: Channel, meter: TrafficMeter) -> tuple[Tensor, Tensor, Tensor]:
        wires = {"world": {"kind": "int4", "feedback": True, "rounding": "stochastic"}}
        ownership, shard = shard_of(levels, placement, wires, shapes)
        sent = torch.zeros(0)
        for step in range(steps):
            kept = {name: memory.clone() for name, memory in shard.memories.items()}
            bad = flat(ownership, gradient(levels.rank, 0, shapes, whole=False))
            bad[levels.rank] = torch.nan if step % 2 else 1.0
            shard.take(channel, bad, 10 * step)
            shard.finish(channel, 10 * step + 1)
            shard.clear()  # refused
            assert all(torch.equal(shard.memories[name], memory) for name, memory in kept.items())
            shard.take(channel, flat(ownership, gradient(levels.rank, step, shapes, whole=False)), 10 * step + 5)
            shard.finish(channel, 10 * step + 6)
            shard.commit()
            sent = shard.own + (sent if step else 0.0)
            shard.clear()
        assert {name: len(memory) for name, memory in shard.memories.items()} == shard.memory_counts()
        ranks = range(levels.world_size)
        total = sum(flat(ownership, gradient(r, s, shapes, whole=False)) for r in ranks for s in range(steps))
        exact = own_part(ownership, levels, placement, torch.as_tensor(total)) / levels.world_size
        first = flat(ownership, gradient(levels.rank, 0, shapes, whole=False))
        return sent, exact, torch.stack([memory.abs().max() for memory in shard.memories.values()]).max() / first.std()

    outcomes = on_machine((2, 2), work)
    for sent, exact, memory in outcomes:
        # A memory holds less than one step of a code: 8 steps' errors have not added up.
        assert 0 < memory < 1.5
        assert (sent - exact).abs().max() < 1.0
    unlike = [(sent - exact).norm() / exact.norm() for sent, exact, _ in outcomes]
    assert max(unlike) < 0.12


@pytest.mark.parametrize(
    ("update", "dtype"),
    [
        ("difference", torch.float32),
        ("difference", torch.bfloat16),
        ({"kind": "difference", "bits": 8, "rounding": "stochastic"}, torch.float32),
        ("int8", torch.bfloat16),
    ],
    ids=str,
)
def test_copies_stay_equal_and_small_changes_arrive(update: Any, dtype: torch.dtype) -> None:
    """A master's steady step far below one code still moves the weights; every copy has the same bits after each."""
    shapes = {"w": torch.Size((4, 64)), "b": torch.Size((4,))}
    placement = Placement(0, 0, 2)
    small, large, steps = 5e-3, 1.0, 40
    differs = update != "int8"

    def work(levels: Levels, channel: Channel, meter: TrafficMeter) -> list[Tensor]:
        ownership = Ownership(shapes, cuts_of(levels, placement))
        shard = WeightShard(ownership, levels, placement, build_update_wire(PartitionSettings(update=update).update))
        mine = {name: torch.zeros(s, dtype=dtype) for name, s in shapes.items()}
        owned = shard.own_rows(mine)
        masters = {name: torch.zeros(rows.shape) for name, rows in owned.items()}
        seen = []
        for step in range(steps):
            for name, master in masters.items():
                master.add_(small)
                if name == "w":
                    master[0, 0] += large * (-1) ** step  # makes one code of the difference about 1/7
            before = meter.sent_bytes()
            shard.spread(channel, mine, masters, step)
            assert sent_since(meter, before) == +shard.sent_bytes(dtype)
            seen.append(torch.cat([value.reshape(-1) for value in mine.values()]).clone())
        error = max(float((rows.float() - masters[name]).abs().max()) for name, rows in shard.own_rows(mine).items())
        limit = large / 14 + 2.0**-8 if differs else (large + steps * small) / 254 + 2.0**-7
        assert error <= limit, error
        return seen

    outcomes = on_machine((2, 2), work)
    for seen in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen, outcomes[0], strict=True))
    assert outcomes[0][-1].float().view(-1)[1:60].min() > 0.1
