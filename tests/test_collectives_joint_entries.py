"""Many tensors' entries in one list: what each compressor would send of them, in fewer bytes; and hostile bytes."""

from __future__ import annotations

import pytest
import torch
from collective_cases import SHAPES, draws_of, inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.compress.collectives.joint_entries import contribute_jointly, decode_jointly, longest_message
from thinwire.comm.compress.compressors.sparse import SparseCompressor
from thinwire.comm.compress.compressors.top_k import TopK
from thinwire.comm.compress.decoded import Sparse
from thinwire.comm.wire import PayloadError, message_bytes

SIZES = [torch.Size(shape) for shape in SHAPES]
COMPRESSORS = [TopK(density=0.2, values=v) for v in ("fp32", "bf16", "int8", "int4_stochastic", "2bit", "sign")]
COMPRESSORS += [TopK(density=1.0), TopK(density=0.9, values="int8")]


def sections_of(compressor: SparseCompressor, inputs: list[Tensor]) -> list[Tensor]:
    flags, sections = contribute_jointly(compressor, inputs, draws_of(0), None, absent=False)
    assert flags == 0
    return sections


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_it_says_what_the_compressors_own_payloads_say(compressor: SparseCompressor) -> None:
    inputs, draws = inputs_of(0), draws_of(0)
    sections = sections_of(compressor, inputs)
    assert message_bytes([len(section) for section in sections]) <= longest_message(SIZES)
    decoded = decode_jointly(compressor, sections, SIZES, draws, sender=0)
    for x, draw, part in zip(inputs, draws, decoded, strict=True):
        if x.numel():
            own = compressor.decode(compressor.encode(x, draw), x.shape, draw)
            assert isinstance(part, Sparse)
            assert torch.equal(part.indices, own.indices)
            assert torch.equal(part.values, own.values)


def test_one_list_takes_fewer_bytes_than_many() -> None:
    compressor = TopK(density=0.01, values="int8")
    tensors = inputs_of(0, shapes=[(64, 64)] * 20)
    draws = draws_of(0, count=20)
    _, sections = contribute_jointly(compressor, tensors, draws, None, absent=False)
    alone = [len(compressor.encode(x, draw)) for x, draw in zip(tensors, draws, strict=True)]
    assert message_bytes([len(section) for section in sections]) < message_bytes(alone)


@given(
    compressor=st.sampled_from(COMPRESSORS),
    section=st.integers(0, len(SHAPES) + 1),
    change=st.sampled_from(["flip", "cut", "extend"]),
    where=st.integers(0, 10_000),
    byte=st.integers(1, 255),
)
@settings(deadline=None, max_examples=300)
def test_mutated_sections_give_tensors_or_a_typed_error(
    compressor: SparseCompressor, section: int, change: str, where: int, byte: int
) -> None:
    sections = sections_of(compressor, inputs_of(0))
    data = sections[section].clone()
    if change == "flip" and len(data):
        data[where % len(data)] ^= byte
    elif change == "cut":
        data = data[: where % (len(data) + 1)]
    else:
        data = torch.cat([data, torch.full((1 + where % 9,), byte, dtype=torch.uint8)])
    sections[section] = data
    try:
        decoded = decode_jointly(compressor, sections, SIZES, draws_of(0), sender=0)
    except PayloadError:
        return
    for part, shape in zip(decoded, SIZES, strict=True):
        if isinstance(part, Sparse):
            assert part.numel == shape.numel()
            assert len(part.indices) == len(part.values)
            assert bool((part.indices.diff() > 0).all())
            assert not len(part.indices) or (part.indices[0] >= 0 and part.indices[-1] < part.numel)
            assert bool(part.values.isfinite().all())
