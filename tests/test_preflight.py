"""Preflight: a rank that differs is named, with the entry, by all ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import Rank, run_ranks, run_ranks_to_the_end
from torch import nn

from thinwire.dist.preflight import (
    CATEGORIES,
    PreflightError,
    check_agreement,
    describe_config,
    describe_model,
    describe_versions,
    wait_for_all,
)

FACTS = {
    "thinwire": {"thinwire version": "1.0"},
    "torch": {"torch version": "2.13.0"},
    "config": describe_config({"optimizer": {"lr": 0.0003, "kind": "adamw"}, "seed": 1}),
    "parameters": {"model.weight": "float32[2, 3]"},
    "values": {"values of model.weight": "00ff"},
    "tokenizer": {"data.tokenizer": "bytes"},
    "data": {"training text": "10 files", "validation text": "2 files"},
    "device": {"world.device": "cpu"},
}


def compare(facts_of_rank: list[dict[str, dict[str, str]]]) -> list[object]:
    def work(rank: Rank) -> int:
        queue = rank.queue()
        try:
            check_agreement(facts_of_rank[rank.rank], queue=queue, store=rank.store)
            return sum(queue.meter.sent_bytes("control/preflight").values())
        finally:
            queue.close()
            queue.monitor.close()

    return run_ranks_to_the_end(len(facts_of_rank), work)


def test_equal_ranks_pass_and_send_128_bytes_to_each_peer() -> None:
    assert compare([FACTS] * 3) == [2 * 128] * 3
    assert compare([FACTS]) == [0]


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_rank_that_differs_is_named_in_every_category(category: str) -> None:
    odd = copy.deepcopy(FACTS)
    entry = next(iter(odd[category]))
    odd[category][entry] = "something else"
    errors = compare([FACTS, FACTS, odd, FACTS])
    for error in errors:
        assert isinstance(error, PreflightError)
        prefix = "config." if category == "config" else ""
        expected = f"{prefix}{entry}: rank 2 has something else; the others have {FACTS[category][entry]}"
        assert [line.strip() for line in str(error).splitlines()[1:]] == [expected]


def test_the_example_of_a_learning_rate() -> None:
    odd = FACTS | {"config": describe_config({"optimizer": {"lr": 0.001, "kind": "adamw"}, "seed": 1})}
    errors = compare([FACTS, odd, FACTS])
    assert "config.optimizer.lr: rank 1 has 0.001; the others have 0.0003" in str(errors[0])
    assert len({str(error) for error in errors}) == 1


def test_the_majority_is_the_reference_even_against_rank_0() -> None:
    odd = FACTS | {"torch": {"torch version": "2.9.0"}}
    assert "torch version: ranks 0, 3 have 2.9.0; the others have 2.13.0" in str(
        compare([odd, *[FACTS] * 2, odd, FACTS])[0]
    )
    assert "torch version: rank 1 has 2.13.0; rank 0 has 2.9.0" in str(compare([odd, FACTS])[1])


def test_a_missing_entry_and_a_missing_category_count() -> None:
    odd = {**FACTS, "parameters": FACTS["parameters"] | {"model.bias": "float32[2]"}}
    del odd["device"]
    text = str(compare([FACTS, odd, FACTS])[0])
    assert "model.bias: rank 1 has float32[2]; the others have nothing" in text
    assert "world.device: rank 1 has nothing; the others have cpu" in text


def test_many_differences_are_cut_short() -> None:
    odd = FACTS | {"parameters": {f"model.{i}": "x" for i in range(100)}}
    text = str(compare([FACTS, odd])[0])
    assert len(text.splitlines()) < 20
    assert "and 89 more" in text


def test_the_model_is_described_by_names_shapes_dtypes_and_values() -> None:
    model = nn.Linear(3, 2)
    described = describe_model(model)
    assert described["parameters"] == {"model.weight": "float32[2, 3]", "model.bias": "float32[2]"}
    with torch.no_grad():
        model.weight[1, 2] = model.weight[1, 2].nextafter(torch.tensor(9.0))
    changed = describe_model(model)
    assert changed["parameters"] == described["parameters"]
    assert changed["values"]["values of model.weight"] != described["values"]["values of model.weight"]
    assert changed["values"]["values of model.bias"] == described["values"]["values of model.bias"]


def test_the_network_card_may_differ_and_the_build_of_torch_too() -> None:
    assert describe_config({"world": {"interface": "eth0", "timeout_s": 1.0}}) == {"world.timeout_s": "1.0"}
    assert "+" not in describe_versions()["torch"]["torch version"]


def test_slow_ranks_are_waited_for() -> None:
    def work(rank: Rank) -> list[str]:
        queue = rank.queue()
        if rank.rank == 1:
            rank.store.wait(["ready/0", "ready/2"])
        wait_for_all(queue, rank.store, 30.0)
        there = [f"ready/{r}" for r in range(3) if rank.store.check([f"ready/{r}"])]
        queue.close()
        queue.monitor.close()
        return there

    assert run_ranks(3, work) == [["ready/0", "ready/1", "ready/2"]] * 3


def test_a_rank_that_died_before_it_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinwire.dist.preflight._ASK_EVERY_S", 0.2)

    def work(rank: Rank) -> bool:
        queue = rank.queue()
        if rank.rank == 2:
            queue.close()
            queue.monitor.close()
            return False
        wait_for_all(queue, rank.store, timeout_s=3600.0)
        queue.close()
        queue.monitor.close()
        return True

    assert run_ranks(3, work) == [True, True, False]
