"""The prediction of what partitioning sends: against the closed formula, and the check values of its derivation."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from partition_formula import expected_bytes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.partition.door import partition
from thinwire.comm.partition.levels import Levels, build_levels
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.traffic import Flow, UnitShapes, predict_bytes, predict_flows, unit_shapes
from thinwire.comm.queue import CommQueue

NAMES = ("pair", "node", "world")
TRIPLES = [(p, g, o) for p in range(4) for g in range(p, 4) for o in range(g, 4)]


def machine(fanouts: Sequence[int], rank: int = 0) -> Levels:
    sizes = [1]
    for fanout in fanouts:
        sizes.append(sizes[-1] * fanout)
    return build_levels(NAMES[-len(fanouts) :], sizes[1:], range(sizes[-1]), rank=rank)


def settings(p: int, g: int, o: int, **options: object) -> PartitionSettings:
    names = ("rank", *NAMES)
    return PartitionSettings.model_validate({"params": names[p], "grads": names[g], "optim": names[o], **options})


def vector(*shape: int, is_root: bool = False) -> UnitShapes:
    return UnitShapes({"weight": torch.Size(shape)}, {}, is_root)


def by_operation(flows: Sequence[Flow]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for flow in flows:
        found.setdefault(flow.operation, {})[flow.level] = flow.payload_bytes
    return found


@pytest.mark.parametrize(
    ("numel", "fanouts", "expected"),
    [(1600, (2, 4, 2), (800, 600, 100)), (3840, (2, 4, 48), (1920, 1440, 470)), (120, (3, 2, 2), (80, 20, 10))],
)
def test_one_pass_over_all_levels_sends_what_the_derivation_says(
    numel: int, fanouts: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    wanted = {name: 4 * elements for name, elements in zip(NAMES, expected, strict=True)}
    found = by_operation(predict_flows([vector(numel, is_root=True)], machine(fanouts), settings(3, 3, 3)))
    assert found == {"gather": wanted, "reduce": wanted}
    found = by_operation(predict_flows([vector(numel, is_root=True)], machine(fanouts), settings(0, 0, 3)))
    assert found == {"reduce_once": wanted, "update": wanted}


@pytest.mark.parametrize("fanouts", [(2, 2, 2), (3, 2, 2), (2, 4, 3)], ids=str)
@pytest.mark.parametrize(("p", "g", "o"), TRIPLES)
def test_every_triple_sends_what_the_formula_says(p: int, g: int, o: int, fanouts: tuple[int, ...]) -> None:
    root, block = 1536 * 24, 768 * 24  # elements: also what replicas of an owner share is in whole pieces
    units = [vector(root, is_root=True), vector(768, 24), vector(768, 24)]
    k = 3
    for secondary in (None, *range(p)):
        expected = expected_bytes(root, 2 * block, fanouts, NAMES, (p, g, o), secondary=secondary, micro_batches=k)
        in_all = Counter({name: sum(levels.get(name, 0) for levels in expected.values()) for name in NAMES})
        chosen = settings(p, g, o, secondary=None if secondary is None else ("rank", *NAMES)[secondary])
        for rank in (0, 5):
            flows = predict_flows(units, machine(fanouts, rank), chosen, micro_batches=k)
            assert by_operation(flows) == expected
            assert predict_bytes(units, machine(fanouts, rank), chosen, micro_batches=k) == in_all


def test_the_slow_link_carries_the_same_for_any_number_of_micro_batches() -> None:
    units = [vector(4096, is_root=True), vector(4096)]
    chosen = settings(1, 2, 3)
    sent = [predict_bytes(units, machine((2, 2, 2)), chosen, micro_batches=k) for k in (1, 8)]
    assert sent[0]["world"] == sent[1]["world"] == 2 * 4 * 8192 // 8
    full = [predict_bytes(units, machine((2, 2, 2)), settings(3, 3, 3), micro_batches=k)["world"] for k in (1, 8)]
    assert full[1] == 8 * full[0] == 8 * (3 + 2) * 4 * 4096 // 8


def test_dtypes_of_the_weights_of_the_gathers_and_of_the_wires_are_counted() -> None:
    units = [vector(1600)]
    levels = machine((2, 4, 2))
    chosen = settings(1, 2, 3, weights="bf16", gradients={"node": "bf16"})
    found = by_operation(predict_flows(units, levels, chosen))
    assert found == {
        "gather": {"pair": 2 * 2 * 800},
        "reduce": {"pair": 4 * 800, "node": 2 * 600},
        "reduce_once": {"world": 4 * 100},
        "update": {"node": 2 * 600, "world": 2 * 100},
    }
    mixed = by_operation(predict_flows(units, levels, settings(1, 2, 3), compute_dtype=torch.bfloat16))
    assert mixed["gather"] == {"pair": 2 * 2 * 800}
    assert mixed["update"] == {"node": 4 * 600, "world": 4 * 100}


def test_rows_are_kept_whole_and_gathers_are_padded() -> None:
    """Three rows of 10 over two ranks: two and one; a gather carries two from each."""
    levels = [machine((2,), rank) for rank in (0, 1)]
    units = [UnitShapes({"weight": torch.Size((3, 10))}, {}, is_root=True)]
    flows = [by_operation(predict_flows(units, each, settings(3, 3, 3))) for each in levels]
    assert [found["gather"] for found in flows] == [{"world": 80}, {"world": 80}]
    assert [found["reduce"] for found in flows] == [{"world": 40}, {"world": 80}]  # what the other owns
    flows = [by_operation(predict_flows(units, each, settings(0, 0, 3))) for each in levels]
    assert [found["update"] for found in flows] == [{"world": 80}, {"world": 40}]  # what this one owns


@hypothesis.settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3), min_size=1, max_size=4),
    st.sampled_from(TRIPLES),
    st.sampled_from([(2, 2, 2), (3, 2, 2), (2, 1, 3)]),
)
def test_what_all_ranks_send_is_what_the_formula_says_for_any_shapes(
    shapes: list[list[int]], triple: tuple[int, int, int], fanouts: tuple[int, ...]
) -> None:
    """Uneven rows move bytes from rank to rank, but every element of a sum crosses each level as often as it must."""
    p, g, o = triple
    unit = UnitShapes({str(i): torch.Size(shape) for i, shape in enumerate(shapes)}, {}, is_root=True)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    total: dict[str, Counter[str]] = {"reduce": Counter(), "reduce_once": Counter(), "update": Counter()}
    size = machine(fanouts).world_size
    for rank in range(size):
        for flow in predict_flows([unit], machine(fanouts, rank), settings(p, g, o)):
            if flow.state != "params":
                total[flow.operation][flow.level] += flow.payload_bytes
    expected: dict[str, Counter[str]] = {name: Counter() for name in total}
    inside = 1
    for level, (name, fanout) in enumerate(zip(NAMES, fanouts, strict=True)):
        once = 4 * numel * size // inside * (fanout - 1) // fanout
        inside *= fanout
        expected["reduce" if level < g else "reduce_once"][name] += (2 if level >= o else 1) * once
        expected["update"][name] += once if p <= level < o else 0
    assert total == expected  # Counters: what is zero is the same as what is missing


class Net(nn.Module):
    """Blocks of their own, a frozen part, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 24, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks[1].bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


def test_units_are_read_off_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = Net()
    first, second, root = unit_shapes(model, list(model.blocks))
    assert names(first) == (["blocks.0.weight", "blocks.0.bias"], [])
    assert names(second) == (["blocks.1.weight"], ["blocks.1.bias"])
    assert names(root) == (["embedding.weight"], [])
    assert [unit.is_root for unit in (first, second, root)] == [False, False, True]
    found = by_operation(predict_flows([second], machine((2, 2, 2)), settings(1, 1, 3)))
    assert found["gather"] == {"pair": 2 * 4 * (64 + 8) // 2}  # frozen weights are gathered, but have no gradient
    assert found["reduce"] == {"pair": 4 * 64 // 2}


def names(unit: UnitShapes) -> tuple[list[str], list[str]]:
    return list(unit.trained), list(unit.frozen)


def test_levels_that_do_not_nest_are_refused() -> None:
    with pytest.raises(ValueError, match="grads: pair is a faster level than params: node"):
        predict_flows([vector(8)], machine((2, 2, 2)), settings(2, 1, 3))


WIRES: list[dict[str, Any]] = [
    {"preset": "hpz"},
    {"params": "node", "weights": "bf16", "gather": "int8", "gradients": {"node": "int8", "world": "int4"}},
    {"params": "rank", "update": "difference", "gradients": {"world": {"kind": "int4", "feedback": True}}},
    {"preset": "hsdp", "compute_dtype": torch.bfloat16, "gradients": {"world": "bf16"}},
]


def test_the_handle_predicts_the_same() -> None:
    """With frozen parts and every kind of wire: one is computed from settings, the other by what FSDP2 was given."""
    whole = Net()
    whole.blocks[0].requires_grad_(False)

    def work(rank: TorchRank) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("world", "node"))
        for options in WIRES:
            model = copy.deepcopy(whole)
            shapes = unit_shapes(model, list(model.blocks))
            own = {name: value for name, value in options.items() if name != "compute_dtype"}
            flows = predict_flows(
                shapes,
                rank.levels,
                PartitionSettings.model_validate(own),
                micro_batches=3,
                compute_dtype=options.get("compute_dtype"),
            )
            queue = rank.queue()
            optimizer = partition(model, mesh, torch.optim.SGD, queue=queue, lr=0.1, micro_batches=3, **options)
            in_all: Counter[str] = Counter()
            for flow in flows:
                in_all[flow.level] += flow.payload_bytes
            assert optimizer.predicted_bytes() == dict(in_all), options
            before: dict[tuple[str, str], tuple[int, int]] = {}
            for _ in range(2):  # what is frozen, and has a second copy, crosses the slow levels in the first step alone
                before = metered(queue)
                for micro_batch in range(3):
                    model(torch.arange(4) + micro_batch).square().mean().backward()
                optimizer.step()
            found = {(flow.operation, flow.level): (flow.payload_bytes, flow.exchanges) for flow in flows}
            for key, (sent, calls) in metered(queue).items():
                assert (sent - before[key][0], calls - before[key][1]) == found.pop(key), (options, key)
            assert not found
            queue.close()

    run_torch_ranks((2, 4), work)


def metered(queue: CommQueue) -> dict[tuple[str, str], tuple[int, int]]:
    """Bytes sent and exchanges so far, by operation and level."""
    return {
        (name.removeprefix("partition/"), level): (entry["sent_bytes"], entry["calls"])
        for name, levels in queue.meter.snapshot()["operations"].items()
        for level, entry in levels.items()
        if name.startswith("partition/")
    }
