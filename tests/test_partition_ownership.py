"""Who owns which rows: whole rows, each once, nested level in level, and as DTensor would cut them."""

from __future__ import annotations

import math
from itertools import pairwise, product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.partition.levels import Levels, build_levels
from thinwire.comm.partition.ownership import Ownership
from thinwire.comm.partition.placement import Placement
from thinwire.comm.partition.process_groups import StateMeshes, cuts_of

NAMES = ("pair", "node", "world")
TRIPLES = [(p, g, o) for p in range(4) for g in range(p, 4) for o in range(g, 4)]

unhurried = settings(max_examples=40, deadline=None)
fanouts = st.tuples(*[st.integers(1, 4)] * 3)
cuts = st.tuples(*[st.integers(1, 4)] * 3)
shapes = st.lists(
    st.lists(st.integers(0, 5), max_size=2).flatmap(
        lambda rest: st.integers(0, 30).map(lambda rows: torch.Size([rows, *rest]))
    ),
    min_size=1,
    max_size=3,
).map(lambda found: {f"p{i}": shape for i, shape in enumerate(found)})


def machine(fanouts: tuple[int, ...], rank: int = 0) -> Levels:
    sizes = [math.prod(fanouts[: i + 1]) for i in range(len(fanouts))]
    return build_levels(NAMES, sizes, range(sizes[-1]), rank=rank)


@unhurried
@given(shapes, cuts)
def test_every_row_has_one_owner_and_owners_follow_each_other(
    shapes: dict[str, torch.Size], cuts: tuple[int, int, int]
) -> None:
    ownership = Ownership(shapes, cuts)
    for name, shape in shapes.items():
        rows = [ownership.rows(name, owner) for owner in range(ownership.owners)]
        assert rows[0][0] == 0
        assert rows[-1][1] == shape[0]
        assert all(before[1] == after[0] for before, after in pairwise(rows))
        assert all(start <= stop for start, stop in rows)
    assert ownership.offsets[-1] == sum(shape.numel() for shape in shapes.values())


@unhurried
@given(shapes, cuts)
def test_owners_below_a_level_have_what_that_levels_chunk_has(
    shapes: dict[str, torch.Size], cuts: tuple[int, int, int]
) -> None:
    """Nested: the same cuts without the innermost give the rows of the innermost together."""
    fine, coarse = Ownership(shapes, cuts), Ownership(shapes, (cuts[0], cuts[1], 1))
    for name, owner in product(shapes, range(coarse.owners)):
        inner = range(owner * cuts[2], (owner + 1) * cuts[2])
        start, stop = coarse.rows(name, owner)
        assert start == fine.rows(name, inner[0])[0] == min(fine.rows(name, i)[0] for i in inner)
        assert stop == fine.rows(name, inner[-1])[1] == max(fine.rows(name, i)[1] for i in inner)


@unhurried
@given(shapes, cuts)
def test_rows_are_those_of_nested_chunks_and_of_dtensor(
    shapes: dict[str, torch.Size], cuts: tuple[int, int, int]
) -> None:
    ownership = Ownership(shapes, cuts)
    for name, shape in shapes.items():
        for owner, place in enumerate(product(*(range(cut) for cut in cuts))):
            start, stop = ownership.rows(name, owner)
            rows = torch.arange(shape[0])
            for cut, index in zip(cuts, place, strict=True):
                chunks = rows.chunk(cut)
                rows = chunks[index] if index < len(chunks) else rows[:0]
            assert rows.tolist() == list(range(start, stop))
            local, offset = _compute_local_shape_and_global_offset(shape, cuts, list(place), [Shard(0)] * 3)
            assert local == (stop - start, *shape[1:])
            assert start == stop or offset[0] == start


def test_thirteen_rows_on_two_nodes_of_two_lie_as_torch_puts_them() -> None:
    """Fastest level first: ranks 0 and 2 are the first device of either node, and share the first half of the rows."""
    levels = build_levels(("node", "world"), (2, 4), range(4), rank=0)
    ownership = Ownership({"weight": torch.Size((13, 5))}, cuts_of(levels, Placement(1, 1, 2)))
    rows = {rank: ownership.rows("weight", levels.number(rank, 2)) for rank in range(4)}
    assert rows == {0: (0, 4), 2: (4, 7), 1: (7, 10), 3: (10, 13)}


@unhurried
@given(fanouts, st.data())
def test_numbers_count_each_group_with_the_fastest_level_first(
    fanouts: tuple[int, int, int], data: st.DataObject
) -> None:
    size = math.prod(fanouts)
    rank = data.draw(st.integers(0, size - 1))
    levels = machine(fanouts, rank)
    pair, node, world = levels.digits[rank]
    assert rank == (world * fanouts[1] + node) * fanouts[0] + pair  # neighbours share their fast levels
    assert levels.number(rank, 3) == (pair * fanouts[1] + node) * fanouts[2] + world
    for depth in range(4):
        group = levels.group(depth)
        assert rank in group
        assert [levels.number(member, depth) for member in group] == list(range(levels.size(depth)))
        assert set(group) <= set(levels.group(min(depth + 1, 3)))
    for level in range(3):
        peers = levels.peers(level)
        assert len(peers) == fanouts[level]
        assert peers == tuple(sorted(peers))
        assert [levels.digits[peer][level] for peer in peers] == list(range(fanouts[level]))
        assert set.intersection(*(set(machine(fanouts, peer).peers(level)) for peer in peers)) == set(peers)


@unhurried
@given(cuts, shapes, st.data())
def test_what_owners_have_together_is_put_in_flat_order_and_found_again(
    cuts: tuple[int, int, int], shapes: dict[str, torch.Size], data: st.DataObject
) -> None:
    ownership = Ownership(shapes, cuts)
    first = data.draw(st.integers(0, ownership.owners - 1))
    last = data.draw(st.integers(first + 1, ownership.owners))
    whole = {name: torch.randn(shape) for name, shape in shapes.items()}
    from_first = {name: values[ownership.rows(name, first)[0] :] for name, values in whole.items()}
    pieces = ownership.pieces(from_first, first, last)
    flat = torch.cat(pieces) if pieces else torch.empty(0)
    assert flat.numel() == ownership.count(first, last) == sum(ownership.counts(first, last))
    for owner, part in zip(range(first, last), flat.split(ownership.counts(first, last)), strict=True):
        for name, rows in ownership.named_pieces(part, owner).items():
            start, stop = ownership.rows(name, owner)
            assert torch.equal(rows, whole[name][start:stop])


def test_the_meshes_of_every_triple_give_each_rank_the_rows_that_it_owns() -> None:
    """The mesh of the states drops dimensions of one rank: on every rank DTensor must mean the same rows by it."""
    shape = torch.Size((13, 3))

    def work(rank: TorchRank) -> None:
        for triple in TRIPLES:
            placement = Placement(*triple)
            meshes = StateMeshes(rank.levels, placement, "cpu", 30.0)
            start, stop = Ownership({"w": shape}, cuts_of(rank.levels, placement)).rows(
                "w", rank.levels.number(rank.rank, placement.optim)
            )
            mesh = meshes.state
            assert mesh.size() == rank.levels.size(placement.optim)
            assert mesh.mesh.flatten().tolist() == list(rank.levels.group(placement.optim))
            assert mesh.ndim == max(1, sum(cut > 1 for cut in cuts_of(rank.levels, placement)))
            coordinate = mesh.get_coordinate()
            assert coordinate is not None
            local, offset = _compute_local_shape_and_global_offset(
                shape, mesh.shape, list(coordinate), [Shard(0)] * mesh.ndim
            )
            assert local == (stop - start, 3)
            assert start == stop or offset[0] == start

    run_torch_ranks((2, 2, 4), work)
