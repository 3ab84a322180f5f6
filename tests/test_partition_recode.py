"""One pass instead of two changes no bit: from FSDP2's flat gradient to the first hop, and from hop to hop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from thinwire.comm.partition.wires.gradients import formats_of
from thinwire.comm.partition.wires.recode import encode_in_order, gathered
from thinwire.comm.partition.wires.wire import Wire

SHAPES = {"w": torch.Size((13, 40)), "few": torch.Size((3, 2)), "s": torch.Size(()), "bias": torch.Size((65,))}
SMOOTH = {"pair": {"kind": "int8", "smooth": True, "block": 64}, "node": {"kind": "int4", "rounding": "stochastic"}}
PLAIN = {"pair": "bf16", "node": "int4"}


def flat_of_fsdp(values: dict[str, Tensor], shards: int) -> Tensor:
    """As FSDP2 lays it out: for each shard the rows of every parameter, padded to the largest shard's."""
    found = []
    for shard in range(shards):
        for value in values.values():
            rows = value.view(-1) if value.dim() < 2 else value
            most = -(-len(rows) // shards)
            part = rows[shard * most : (shard + 1) * most]
            padded = part.new_full((most, *rows.shape[1:]), torch.nan)
            padded[: len(part)] = part
            found.append(padded.reshape(-1))
    return torch.cat(found)


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    rows=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    data=st.data(),
)
def test_fsdps_order_is_read_as_the_flat_order(cuts, rows, data) -> None:
    shapes = {str(i): torch.Size((count, 3)) for i, count in enumerate(rows)}
    total = sum(rows) * 3
    values = {name: torch.rand(shape) for name, shape in shapes.items()}
    ownership = Ownership(shapes, cuts)
    flat = torch.cat(ownership.pieces(values, 0, ownership.owners))
    cut = data.draw(st.integers(0, total))
    order = ownership.order_of_fsdp([cut, total - cut])
    assert torch.equal(gathered(flat_of_fsdp(values, cuts[0]), order), flat)


@pytest.mark.parametrize("given_formats", [SMOOTH, PLAIN])
def test_one_pass_gives_the_bits_of_two(given_formats: dict[str, Any]) -> None:
    placement = Placement(params=1, grads=2, optim=2)
    machine = (3, 2)

    def work(levels: Levels, channel: Channel, _: TrafficMeter) -> None:
        ownership = Ownership(SHAPES, cuts_of(levels, placement))
        formats = {"node": given_formats["pair"], "world": given_formats["node"]}
        found = formats_of(PartitionSettings(gradients=formats).gradients, levels, placement)
        wires = {name: one.build() for name, one in found.items()}
        generator = torch.Generator().manual_seed(levels.rank)
        values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        shard = GradientShard(ownership, levels, placement, wires)
        shard.take_from_fsdp(channel, flat_of_fsdp(values, machine[0]), 77)
        sums = hop_by_hop(channel, levels, torch.cat(ownership.pieces(values, 0, ownership.owners)), ownership, wires)
        assert shard.total is not None
        assert torch.equal(shard.total, sums)

    on_machine(machine, work)


def hop_by_hop(
    channel: Channel, levels: Levels, values: Tensor, ownership: Ownership, wires: dict[str, Wire]
) -> Tensor:
    """A cascade of one level after another, each of which reads and writes fp32."""
    counts = ownership.counts(0, ownership.owners)
    fanout = levels.fanouts[1]
    per_pair = [sum(counts[i * fanout : (i + 1) * fanout]) for i in range(levels.fanouts[0])]
    values = Cascade(levels, 0, 1).reduce_scatter(channel, values, per_pair, wires, key=77)
    mine = levels.digits[levels.rank][0]
    rest = counts[mine * fanout : (mine + 1) * fanout]
    return Cascade(levels, 1, 2).reduce_scatter(channel, values, rest, wires, key=78)


def test_runs_must_be_those_of_the_hop() -> None:
    levels = levels_of((2,), 0)
    ownership = Ownership(SHAPES, (1, 1, 2))
    order = ownership.order_of_fsdp([sum(ownership.counts(0, 2))])
    wire = formats_of({}, levels, Placement(0, 0, 1))["world"].build()
    with pytest.raises(AssertionError):
        encode_in_order(torch.zeros(600), wire, ownership.counts(0, 2), order, key=0, memory=None)
