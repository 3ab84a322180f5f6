"""The owner's error memory: what the second encoding leaves behind is sent later, wherever the slices have moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from collective_cases import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Rank, run_ranks
from torch import Tensor
from toy_compressors import ToyGrid

from thinwire.comm.compress.collective import Job
from thinwire.comm.compress.collectives.owner_errors import OwnerErrors
from thinwire.comm.compress.collectives.two_shot import TwoShot
from thinwire.comm.compress.draw import Draw

SHAPES = {"a": (70,), "b": (3, 11), "c": (50,)}


def gradient(rank: int, name: str, step: int) -> Tensor:
    seed = 100 * step + 10 * rank + list(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


class Worker:
    """One rank with a two-shot mean; whatever it surrenders it adds to its next input, as a feedback would."""

    def __init__(self, rank: Rank, collective: TwoShot) -> None:
        self.rank = rank
        self.queue = rank.queue(name=f"queue{rank.size}")
        self.collective = collective
        self.extra = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in SHAPES.items()}

    def step(self, step: int, buckets: Sequence[str], *, bad: bool = False, keep: bool = True) -> dict[str, Tensor]:
        """One step over buckets such as "ab", "c"; returns the means."""
        outputs: dict[str, Tensor] = {}
        for bucket in buckets:
            inputs = [gradient(self.rank.rank, name, step) for name in bucket]
            inputs = [x + self.extra[name].view_as(x) for name, x in zip(bucket, inputs, strict=True)]
            if bad and self.rank.rank == 1:
                inputs[0].view(-1)[0] = float("nan")
            results = [torch.empty_like(x) for x in inputs]
            draws = [Draw(7, step, name, self.rank.rank) for name in bucket]
            job = Job(list(bucket), inputs, results, draws)
            sent = self.queue.submit("mean", lambda channel, job=job: self.collective.mean(channel, job)).wait()
            assert (sent is None) == bad
            outputs |= dict(zip(bucket, results, strict=True))
        if bad or not keep:
            self.collective.rollback()
            return outputs
        self.collective.commit()
        for extra in self.extra.values():
            extra.zero_()
        for name, offset, error in self.collective.surrendered():
            self.extra[name][offset : offset + error.numel()] += error
        assert self.collective.surrendered() == []
        return outputs

    def debt(self) -> dict[str, Tensor]:
        """This rank's part of the mean that has not been sent."""
        debt = {name: extra / self.rank.size for name, extra in self.extra.items()}
        for name, pieces in self.collective.state_dict()["errors"].items():
            for offset, piece in pieces.items():
                debt[name][int(offset) : int(offset) + piece.numel()] += piece
        return debt


def total(debts: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([torch.stack([debt[name] for debt in debts]).sum(0) for name in SHAPES])


def flat(outputs: dict[str, Tensor]) -> Tensor:
    return torch.cat([outputs[name].view(-1) for name in SHAPES])


class Exact(ToyGrid):
    """fp32; the first encoding loses nothing, so that all that is missing is the server's."""

    def payload_bytes(self, shape: torch.Size) -> int:
        return 4 * shape.numel()

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        x = (tensor * 8).round() / 8 if draw.name.endswith("/mean") else tensor.clone()
        return x.view(-1).view(torch.uint8)

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Tensor:
        return payload.view(torch.float32)


def test_nothing_is_lost_when_buckets_change_and_steps_are_rolled_back() -> None:
    """Sum of all that was asked for = sum of all that was sent + what the owners still owe, after every step."""
    size = 3

    def work(rank: Rank) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        worker = Worker(rank, TwoShot(Exact(), server_error=True))
        steps = []
        for step, buckets in enumerate((["abc"], ["abc"], ["bc", "a"], ["a", "c", "b"], ["a", "c", "b"], ["cab"])):
            before = worker.debt()
            worker.step(90, buckets, bad=True)
            worker.step(91, buckets, keep=False)
            assert same_bits(list(before.values()), list(worker.debt().values()))
            steps.append((worker.step(step, buckets), worker.debt()))
        worker.queue.close()
        return steps

    asked = sent = torch.zeros(sum(torch.Size(shape).numel() for shape in SHAPES.values()))
    owed_before = asked
    for step, outcomes in enumerate(zip(*run_ranks(size, work), strict=True)):
        for outputs, _ in outcomes[1:]:
            assert same_bits(list(outputs.values()), list(outcomes[0][0].values()))
        asked = asked + torch.stack([flat({n: gradient(r, n, step) for n in SHAPES}) for r in range(size)]).mean(0)
        sent = sent + flat(outcomes[0][0])
        owed = total([debt for _, debt in outcomes])
        torch.testing.assert_close(sent + owed, asked, rtol=0, atol=1e-5)
        assert 0.01 < owed.abs().max() < 0.2
        assert not torch.equal(owed, owed_before)
        owed_before = owed


@pytest.mark.parametrize("new_size", [1, 2, 5])
def test_the_errors_move_to_a_group_of_another_size(new_size: int) -> None:
    def before(rank: Rank) -> tuple[dict[str, Any], dict[str, Tensor]]:
        worker = Worker(rank, TwoShot(Exact(), server_error=True))
        worker.step(0, ["ab", "c"])
        worker.step(1, ["ab", "c"])
        worker.queue.close()
        return worker.collective.state_dict(), worker.debt()

    old = run_ranks(3, before)
    owed = total([debt for _, debt in old])
    states = [state for state, _ in old]

    def after(rank: Rank) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        collective = TwoShot(Exact(), server_error=True)
        collective.load_state_dict(collective.merge(states, rank.rank, rank.size))
        worker = Worker(rank, collective)
        first = worker.step(2, ["ab", "c"])
        second = worker.step(3, ["ab", "c"])
        worker.queue.close()
        return {name: first[name] + second[name] for name in first}, worker.debt()

    new = run_ranks(new_size, after)
    asked = sum(
        torch.stack([flat({n: gradient(r, n, step) for n in SHAPES}) for r in range(new_size)]).mean(0)
        for step in (2, 3)
    )
    torch.testing.assert_close(flat(new[0][0]) + total([debt for _, debt in new]), owed + asked, rtol=0, atol=1e-5)


def test_resuming_equals_not_stopping() -> None:
    def train(rank: Rank, stop_at: int | None) -> list[dict[str, Tensor]]:
        worker = Worker(rank, TwoShot(ToyGrid(), server_error=True))
        outputs = []
        for step in range(4):
            if step == stop_at:
                state = worker.collective.state_dict()
                worker.collective = TwoShot(ToyGrid(), server_error=True)
                worker.collective.load_state_dict(state)
            outputs.append(worker.step(step, ["ab", "c"]))
        worker.queue.close()
        return outputs

    for whole, resumed in zip(
        run_ranks(2, lambda rank: train(rank, None)), run_ranks(2, lambda rank: train(rank, 2)), strict=True
    ):
        for a, b in zip(whole, resumed, strict=True):
            assert same_bits(list(a.values()), list(b.values()))


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_every_element_is_owned_surrendered_or_owed_no_more(data: st.DataObject) -> None:
    """Layouts at random: what is read and what is surrendered are together what was kept."""
    numels = {name: data.draw(st.integers(1, 9), label=name) for name in "abcd"}
    errors = OwnerErrors()
    kept = {name: torch.zeros(numel) for name, numel in numels.items()}
    for step in range(1, 4):
        names = data.draw(st.permutations("abcd"))
        joined_numel = sum(numels.values())
        start = data.draw(st.integers(0, joined_numel))
        length = data.draw(st.integers(0, joined_numel - start))
        error, next_error = errors.next(names, [numels[n] for n in names], start, torch.empty(length), size=2)
        expected = torch.cat([kept[n] for n in names])
        assert torch.equal(error, expected[start : start + length])
        next_error.copy_(torch.arange(length) + 100.0 * step)
        errors.commit()
        for name, offset, piece in errors.surrendered():
            kept[name][offset : offset + piece.numel()] -= piece / 2
        rest = torch.cat([kept[n] for n in names])
        assert not rest[:start].any()
        assert not rest[start + length :].any()
        owned = torch.zeros(joined_numel)
        owned[start : start + length] = torch.arange(length) + 100.0 * step
        kept = dict(zip(names, owned.split([numels[n] for n in names]), strict=True))
        kept = {name: part.clone() for name, part in kept.items()}
