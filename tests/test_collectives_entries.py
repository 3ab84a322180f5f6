"""Entries in a message: what comes back, and what bytes that nobody wrote do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.compress.collectives.entries import most_bytes, read_entries, write_entries
from thinwire.comm.compress.value_code import ValueKind
from thinwire.comm.wire import Message, PayloadError, message_bytes

KINDS: tuple[ValueKind, ...] = ("fp32", "bf16", "int8", "int4_stochastic", "2bit", "sign")


def entries(numel: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(numel, generator=generator)[:count].sort().values
    return places, torch.randn(count, generator=generator)


@given(numel=st.integers(0, 400), density=st.floats(0, 1), kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=100)
def test_places_come_back_exactly_and_no_message_is_longer_than_allowed(
    numel: int, density: float, kind: ValueKind, seed: int
) -> None:
    places, values = entries(numel, int(density * numel), seed)
    sections = write_entries(places, values, numel, kind, key=seed)
    found, rounded = read_entries(Message(0, sections), numel, kind, sender=0)
    assert torch.equal(found, places)
    assert len(rounded) == len(values)
    if kind == "fp32":
        assert torch.equal(rounded, values)
    assert message_bytes([len(section) for section in sections]) <= most_bytes(numel)


@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(0, 60),
    section=st.integers(0, 2),
    change=st.sampled_from(["flip", "cut", "extend"]),
    where=st.integers(0, 10_000),
    byte=st.integers(1, 255),
)
@settings(deadline=None, max_examples=400)
def test_mutated_sections_give_entries_or_a_typed_error(
    kind: ValueKind, count: int, section: int, change: str, where: int, byte: int
) -> None:
    numel = 300
    sections = write_entries(*entries(numel, count, seed=count), numel, kind, key=1)
    data = sections[section].clone()
    if change == "flip" and len(data):
        data[where % len(data)] ^= byte
    elif change == "cut":
        data = data[: where % (len(data) + 1)]
    else:
        data = torch.cat([data, torch.full((1 + where % 9,), byte, dtype=torch.uint8)])
    sections[section] = data
    try:
        indices, values = read_entries(Message(0, sections), numel, kind, sender=3)
    except PayloadError:
        return
    assert len(indices) == len(values) <= numel
    assert bool((indices.diff() > 0).all())
    assert not len(indices) or (indices[0] >= 0 and indices[-1] < numel)
    assert bool(values.isfinite().all())


def test_a_negative_count_is_refused() -> None:
    sections = write_entries(*entries(10, 3, seed=0), 10, "fp32", key=0)
    sections[0] = torch.tensor([-1]).view(torch.uint8)
    with pytest.raises(PayloadError, match="from rank 0"):
        read_entries(Message(0, sections), 10, "fp32", sender=0)
