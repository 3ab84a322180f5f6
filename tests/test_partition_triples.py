"""Every legal triple on 2 x 2 x 2 ranks trains as DDP does and sends what the formula says; see partition_program."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import partition_program as program
import pytest
from partition_formula import expected_bytes

RELATIVE = 1e-6
keys = pytest.mark.parametrize("key", ["".join(str(depth) for depth in triple) for triple in program.TRIPLES])
optimizers = pytest.mark.parametrize("optimizer", list(program.MAKERS))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank reports."""
    folder = tmp_path_factory.mktemp("partition")
    done = subprocess.run(
        [sys.executable, program.__file__, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(program.RANKS)]


def losses(ranks: list[dict[str, Any]], run: str) -> list[float]:
    """The mean over the ranks after each step."""
    return [sum(step) / program.RANKS for step in zip(*(rank[run]["losses"] for rank in ranks), strict=True)]


def test_the_yardstick_moves_and_is_clipped(ranks: list[dict[str, Any]]) -> None:
    for optimizer in program.MAKERS:
        first, *_, last = losses(ranks, f"ddp/{optimizer}")
        assert last < 0.9 * first
    assert all(rank["ddp/sgd"]["norm"] > program.CLIP for rank in ranks)


@keys
@optimizers
def test_losses_are_those_of_ddp(ranks: list[dict[str, Any]], key: str, optimizer: str) -> None:
    expected = losses(ranks, f"ddp/{optimizer}")
    assert losses(ranks, f"{key}/{optimizer}") == pytest.approx(expected, rel=RELATIVE, abs=0)


@pytest.mark.parametrize(("run", "key"), [("torch/fsdp", "333"), ("torch/hsdp", "222")])
def test_where_all_states_share_a_level_it_is_torchs_own_sharding(
    ranks: list[dict[str, Any]], run: str, key: str
) -> None:
    assert losses(ranks, f"{key}/sgd") == pytest.approx(losses(ranks, run), rel=RELATIVE, abs=0)


@keys
@optimizers
def test_every_step_sends_what_was_predicted(ranks: list[dict[str, Any]], key: str, optimizer: str) -> None:
    """By operation and level; the second step has sent its last sums during backward."""
    for rank in ranks:
        found = rank[f"{key}/{optimizer}"]
        assert found["sent"] == [found["predicted"]] * program.STEPS
        assert found["predicted_bytes"] == dict(sum((Counter(one) for one in found["predicted"].values()), Counter()))


@keys
def test_even_shards_send_what_the_formula_says(ranks: list[dict[str, Any]], key: str) -> None:
    model = program.Net(even=True)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    root = sum(p.numel() for p in model.parameters()) - blocks
    p, g, o = (int(depth) for depth in key)
    expected = expected_bytes(
        root,
        blocks,
        program.FANOUTS,
        program.NAMES,
        (p, g, o),
        secondary=program.secondary_of((p, g, o)),
        micro_batches=program.MICRO_BATCHES,
    )
    for rank in ranks:
        assert rank[f"{key}/adamw"]["sent"] == [expected] * program.STEPS


@keys
@optimizers
def test_replicas_hold_the_same_bits(ranks: list[dict[str, Any]], key: str, optimizer: str) -> None:
    shards: dict[int, set[int]] = {}
    for rank in ranks:
        found = rank[f"{key}/{optimizer}"]
        shards.setdefault(found["number"], set()).add(found["weights"])
    assert len(shards) == 2 ** int(key[0])
    assert all(len(digests) == 1 for digests in shards.values())


def test_the_same_sums_make_the_same_bits_wherever_weights_and_optimizer_are(ranks: list[dict[str, Any]]) -> None:
    """The order of a sum depends on where gradients are cut, and on nothing else, if all ranks' owners add them."""
    for grads in "0123":
        runs = [key for key in ranks[0] if key.endswith("/sgd") and key[1:3] == f"{grads}3"]
        assert len(runs) == int(grads) + 1
        assert all(rank[run]["losses"] == rank[runs[0]]["losses"] for rank in ranks for run in runs)
