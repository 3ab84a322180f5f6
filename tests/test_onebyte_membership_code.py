"""What elastic machines send and keep: quorums, damaged messages, frames and promises, settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onebyte_simulation import BASE_HASH, RUN
from pydantic import ValidationError
from torch import Tensor

from thinwire.comm.address import join_address, split_address
from thinwire.comm.onebyte.membership import handshake, message_code, messages
from thinwire.comm.onebyte.membership.errors import MessageError
from thinwire.comm.onebyte.membership.frame import FRAME_BYTES, pack_frame, parse_frame
from thinwire.comm.onebyte.membership.handshake import TO_TAKE_PART, Greeting
from thinwire.comm.onebyte.membership.messages import NO_SLOT
from thinwire.comm.onebyte.membership.promise import Promise, PromiseFile
from thinwire.comm.onebyte.membership.quorum import is_quorum
from thinwire.comm.onebyte.membership.settings import MembershipSettings
from thinwire.comm.onebyte.rounds import Member, Roster


@given(st.integers(1, 9), st.sets(st.integers(0, 8)), st.sets(st.integers(0, 8)))
def test_two_quorums_share_a_machine(size: int, one: set[int], other: set[int]) -> None:
    roster = Roster(0, tuple(Member(slot, str(slot), "", 1) for slot in range(size)))
    if is_quorum(one, roster) and is_quorum(other, roster):
        assert one & other & set(range(size))
    assert not is_quorum(one, roster) or not is_quorum(set(range(size)) - one, roster)
    assert is_quorum(set(range(size)), roster)


MESSAGES = [
    messages.Propose(3, 7, b"12345678", 5, 6, True, False, 2, b"records"),
    messages.Ack(3, 1, True, 7, b"12345678", 6),
    messages.VoteRequest(4, 1, True, 3, 7),
    messages.Vote(4, 1, True, False, "näme"),
    messages.Join(NO_SLOT, 4, 14, BASE_HASH, "name"),
    messages.Assign(4),
    messages.Hint(4, "host:1"),
    messages.Refuse("no"),
    messages.Leave(2),
    messages.Samples(2, 8),
    messages.HashReport(2, 14, BASE_HASH),
    messages.Rebuild(14),
    messages.Resign(3),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_damaged_messages(message: messages.Control, mutations: Callable[[Tensor], Iterator[Tensor]]) -> None:
    kind, body = message_code.encode(message)
    assert message_code.decode(kind, body) == message
    for damaged in mutations(torch.frombuffer(bytearray(kind.to_bytes(2, "little") + body), dtype=torch.uint8)):
        data = damaged.numpy().tobytes()
        try:
            found = message_code.decode(int.from_bytes(data[:2], "little"), data[2:])
        except MessageError:
            continue
        assert message_code.encode(found)[1] == data[2:] or any(byte > 1 for byte in data)


def test_damaged_frames_and_greetings(mutations: Callable[[Tensor], Iterator[Tensor]]) -> None:
    chain = hashlib.sha256(b"chain").digest()
    frame = pack_frame(RUN, 9, 70000, 3, b"codes", secret=b"secret", term=2, chain=chain)
    assert len(frame) == FRAME_BYTES + 5 == 29
    parsed = parse_frame(frame, RUN)
    assert (parsed.round, parsed.epoch, parsed.slot, parsed.codes) == (9, 70000 & 0xFFFF, 3, b"codes")
    assert parsed.is_from(b"secret", 2, chain)
    for damaged in mutations(torch.frombuffer(bytearray(frame), dtype=torch.uint8)):
        data = damaged.numpy().tobytes()
        try:
            assert data == frame or not parse_frame(data, RUN).is_from(b"secret", 2, chain)
        except MessageError:
            continue
    greeting = Greeting(TO_TAKE_PART, RUN, bytes(range(16)), "10.0.0.1:7000")
    packed = handshake.pack_greeting(greeting, b"secret")
    assert handshake.parse_greeting(packed, b"secret") == greeting
    for damaged in mutations(torch.frombuffer(bytearray(packed), dtype=torch.uint8)):
        data = damaged.numpy().tobytes()
        if data != packed:
            with pytest.raises(MessageError):
                handshake.parse_greeting(data, b"secret")


def test_a_damaged_promise_is_not_believed(tmp_path, mutations: Callable[[Tensor], Iterator[Tensor]]) -> None:
    path = tmp_path / "run.log.vote"
    store = PromiseFile(path, RUN, sync=True)
    assert store.load() == Promise()
    store.save(Promise(7, 2, 6, 4))
    assert PromiseFile(path, RUN, sync=False).load() == Promise(7, 2, 6, 4)
    with pytest.raises(ValueError, match="another run"):
        PromiseFile(path, bytes(8), sync=False).load()
    intact = path.read_bytes()
    for damaged in mutations(torch.frombuffer(bytearray(intact), dtype=torch.uint8)):
        path.write_bytes(damaged.numpy().tobytes())
        if path.read_bytes() != intact:
            with pytest.raises(ValueError, match="is damaged"):
                store.load()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heartbeat_s": 2.0}, "suspicion_s at least twice heartbeat_s"),
        ({"deadline_s": 1.0}, "deadline_s at least suspicion_s"),
        ({"give_up_s": 30.0}, "no time to replace a leader"),
        ({"listen": "0.0.0.0:7000"}, "also give advertise"),
        ({"listen": "here"}, "write host:port"),
        ({"contacts": ("::1:70",)}, "in brackets"),
        ({"contacts": ("a:99999",)}, "write host:port"),
        ({"heart_beat_s": 1.0}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_work(settings: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        MembershipSettings(**settings)


def test_addresses() -> None:
    for address in ("10.0.0.1:7000", "[::1]:7000", "host.name:1"):
        assert join_address(*split_address(address)) == address
