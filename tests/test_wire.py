"""Messages: what is packed comes out again, and damage is noticed."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.wire import (
    FLAG_ABSENT,
    FLAG_NOT_FINITE,
    HEADER_BYTES,
    PayloadError,
    message_bytes,
    pack_message,
    unpack_message,
)

sections = st.lists(st.binary(max_size=40), max_size=5)


def tensor(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def with_right_checksum(message: Tensor) -> Tensor:
    content = bytearray(message.tolist())
    content[20:24] = struct.pack("<I", zlib.crc32(content[24:], zlib.crc32(content[:20])))
    return torch.frombuffer(content, dtype=torch.uint8)


@given(sections, st.integers(0, 255), st.sampled_from([0, FLAG_NOT_FINITE, FLAG_ABSENT]))
def test_sections_come_out_as_they_went_in(contents, codec, flags) -> None:
    message = pack_message([tensor(content) for content in contents], codec=codec, flags=flags)
    assert message.numel() == message_bytes([len(content) for content in contents])
    found = unpack_message(message, codec=codec)
    assert found.flags == flags
    assert [bytes(section.tolist()) for section in found.sections] == contents
    start = message.data_ptr()
    assert all((section.data_ptr() - start) % 4 == 0 for section in found.sections if section.numel())


def test_framing_is_a_header_and_four_bytes_for_each_further_section() -> None:
    assert message_bytes([]) == HEADER_BYTES == 24
    assert message_bytes([1001]) == 24 + 1001
    assert message_bytes([1000, 1000, 7]) == 24 + 2 * 4 + 2007
    assert message_bytes([5, 3]) == 24 + 4 + 5 + 3 + 3  # the second section is aligned


def test_the_layout_is_fixed() -> None:
    """Another machine, or an older thinwire, reads these very bytes."""
    message = bytes(pack_message([tensor(b"abcde"), tensor(b"fg")], codec=7, flags=FLAG_ABSENT).tolist())
    body = struct.pack("<I", 5) + b"abcde\0\0\0fg"
    head = struct.pack("<HBBBBBBQI", 0x5754, 1, 7, FLAG_ABSENT, 0, 0, 0, 24 + len(body), 2)
    assert message == head + struct.pack("<I", zlib.crc32(head + body)) + body


def test_sections_share_memory_with_the_message() -> None:
    message = pack_message([tensor(b"abcd"), tensor(b"efgh")], codec=0)
    unpack_message(message, codec=0).sections[1][0] = ord("x")
    assert message[-4] == ord("x")


def test_what_is_wrong_is_said() -> None:
    message = pack_message([tensor(b"abcd")], codec=3)
    with pytest.raises(PayloadError, match="codec 3 where one of codec 4"):
        unpack_message(message, codec=4)
    with pytest.raises(PayloadError, match="28 bytes of which 27 arrived"):
        unpack_message(message[:-1], codec=3)
    with pytest.raises(PayloadError, match="shorter than its header"):
        unpack_message(message[:10], codec=3)
    for place, what in ((0, "not a message of thinwire"), (2, "version 3"), (3, "checksum"), (20, "checksum")):
        damaged = message.clone()
        damaged[place] ^= 2
        with pytest.raises(PayloadError, match=what):
            unpack_message(damaged, codec=3)


def test_any_flipped_bit_is_noticed() -> None:
    message = pack_message([tensor(b"abcd"), tensor(b"efg")], codec=3)
    for bit in range(8 * message.numel()):
        damaged = message.clone()
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError):
            unpack_message(damaged, codec=3)


def test_damaged_messages_with_a_right_checksum_are_refused_or_stay_within_bounds(mutations) -> None:
    message = pack_message([tensor(b"abcd"), tensor(b"efghi"), tensor(b"")], codec=3)
    read = 0
    for damaged in mutations(message):
        if damaged.numel() < HEADER_BYTES:
            continue
        damaged[:4] = message[:4]
        damaged[8:16] = torch.tensor(list(struct.pack("<Q", damaged.numel())), dtype=torch.uint8)
        try:
            found = unpack_message(with_right_checksum(damaged), codec=3)
        except PayloadError:
            continue
        read += 1
        assert sum(section.numel() for section in found.sections) <= damaged.numel() - HEADER_BYTES
    assert read > 10  # else the checks of the sections were never reached


@pytest.mark.parametrize("count", [2, 3, 1 << 20, (1 << 32) - 1])
def test_more_sections_than_fit_are_refused(count) -> None:
    message = pack_message([tensor(b"ab")], codec=3)
    message[16:20] = torch.tensor(list(struct.pack("<I", count)), dtype=torch.uint8)
    with pytest.raises(PayloadError, match=r"sections"):
        unpack_message(with_right_checksum(message), codec=3)
