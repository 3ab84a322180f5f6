"""The log of a one-byte run: exact, small, verified, and sound whenever its writer is killed."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.onebyte.log import Log, LogError, LogLockedError
from thinwire.comm.onebyte.rounds import Contribution, Member, Record, Roster, Round, Snapshot

MANIFEST = b'{"run": 1}'
HEADER_BYTES = 14 + len(zlib.compress(MANIFEST, 9)) + 32


def roster(epoch: int, samples: dict[int, int]) -> Roster:
    members = (Member(slot, f"machine {slot} ä", f"10.0.0.{slot}:9", n) for slot, n in samples.items())
    return Roster(epoch, tuple(members))


def round_of(number: int, codes: dict[int, bytes], rate: float = 0.5) -> Round:
    return Round(number, rate, tuple(Contribution(slot, codes[slot]) for slot in sorted(codes)))


# Every form of a record: other slots than the roster's, new rate, absent members, such as only seem absent, and so on.
EVERY_FORM: list[Record] = [
    round_of(0, {3: b"\x01\x02"}, rate=2.0**-149),
    roster(0, {0: 1, 1: 2, 5: 0}),
    round_of(1, {0: b"\x07", 1: b"\x08\x80", 5: b""}),
    round_of(2, {0: b"\x07", 1: b"\x08\x80"}),
    round_of(3, {1: b"\x09\x81"}, rate=0.25),
    round_of(4, {1: b"\x80\x80"}, rate=0.25),
    round_of(5, {}, rate=0.25),
    Snapshot(6, sha256(b"weights").digest()),
    round_of(6, {0: b"\x80"}, rate=-0.0),
    round_of(7, {0: b"\x01\x02", 1: b"\x03", 65535: b"\x04"}, rate=0.0),
    roster(7, {}),
    round_of(8, {}, rate=0.0),
    roster(8, {slot: 1 for slot in range(9)}),
    round_of(9, {slot: bytes([slot]) for slot in range(9)}),
    round_of(10, {0: b"\x01", 8: b"\x80"}),
    roster(9, {0: 1, 1: 1, 2: 1, 3: 1}),
    *(round_of(number, {slot: bytes([number]) for slot in range(4)}) for number in range(11, 20)),
]


def written(path: Path, records: list[Record]) -> Path:
    with Log.create(path, MANIFEST) as log:
        for record in records:
            log.append(record)
    return path


def read(path: Path) -> list[Record]:
    with Log.open(path, read_only=True) as log:
        return list(log)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = written(tmp_path / "run.log", EVERY_FORM)
    chain = sha256(MANIFEST).digest()
    with Log.open(path) as log:
        assert (log.manifest, len(log), log.rounds, log.torn_bytes) == (MANIFEST, len(EVERY_FORM), 20, 0)
        assert list(log) == EVERY_FORM
        assert [log[i] for i in range(len(log))] == EVERY_FORM == [log[i] for i in range(-len(log), 0)]
        assert log.roster == EVERY_FORM[15]
        assert log.size_bytes == path.stat().st_size
        assert log.chain(0) == chain
        for i in range(len(log)):
            raw = log.raw(i, i + 1)
            chain = sha256(chain + raw[:-4]).digest()
            assert raw[-4:] == chain[:4]
            assert log.chain(i + 1) == chain
        for wrong in (len(log), -len(log) - 1):
            with pytest.raises(IndexError, match="of a log of"):
                log[wrong]
    rate = next(r.rate for r in EVERY_FORM if isinstance(r, Round) and r.number == 6)
    found = next(r.rate for r in read(path) if isinstance(r, Round) and r.number == 6)
    assert struct.pack("<f", rate) == struct.pack("<f", found)  # -0.0 is not 0.0


def test_a_round_of_four_machines_takes_nine_bytes(tmp_path: Path) -> None:
    rounds = [round_of(n, {slot: bytes([n % 128]) for slot in range(4)}) for n in range(1000)]
    path = written(tmp_path / "run.log", [roster(0, {0: 1, 1: 1, 2: 1, 3: 1}), *rounds])
    with Log.open(path) as log:
        assert len(log.raw(2, 1001)) == 999 * 9
        assert len(log.raw(1, 2)) == 9 + 4  # the rate
        absent = round_of(1000, {0: b"\x01", 2: b"\x05"})
        log.append(absent)
        assert len(log.raw(1001)) == 9
        assert log[-1] == absent


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (round_of(19, {}), "round 19 after 20 rounds"),
        (round_of(21, {}), "round 21 after 20 rounds"),
        (round_of(20, {}, rate=0.1), "rate 0.1 is not a finite fp32 number"),
        (round_of(20, {}, rate=float("nan")), "finite fp32"),
        (round_of(20, {}, rate=1e300), "finite fp32"),
        (Round(20, 0.5, (Contribution(2, b"a"), Contribution(1, b"b"))), "slot 1 after slot 2"),
        (Round(20, 0.5, (Contribution(65536, b"a"),)), "slot 65536"),
        (round_of(20, {0: bytes(65536)}), "65536 codes"),
        (Snapshot(19, bytes(32)), "snapshot of 19 rounds after 20"),
        (Snapshot(20, bytes(31)), "31 bytes"),
        (roster(9, {0: 1}), "epoch 9 after epoch 9"),
        (roster(10, {65535: 1}), "slot 65535"),
        (roster(10, {0: -1}), "-1 samples"),
        (Roster(10, (Member(0, "n" * 65536, "", 1),)), "more than 65535 bytes"),
    ],
)
def test_what_cannot_follow_is_refused(tmp_path: Path, wrong: Record, message: str) -> None:
    path = written(tmp_path / "run.log", EVERY_FORM)
    with Log.open(path) as log:
        before = log.size_bytes, log.chain(len(log))
        with pytest.raises(ValueError, match=message):
            log.append(wrong)
        assert (log.size_bytes, log.chain(len(log))) == before
    assert read(path) == EVERY_FORM


def test_a_tail_torn_anywhere_is_cut_off(tmp_path: Path) -> None:
    whole = written(tmp_path / "run.log", EVERY_FORM).read_bytes()
    with Log.open(tmp_path / "run.log") as log:
        ends = [log.size_bytes - len(log.raw(i)) for i in range(len(log) + 1)]
    torn = tmp_path / "torn.log"
    for size in range(len(whole)):
        torn.write_bytes(whole[:size])
        if size < HEADER_BYTES:
            with pytest.raises(LogError, match="header"):
                Log.open(torn)
            continue
        kept = sum(end <= size for end in ends) - 1
        with Log.open(torn, read_only=True) as log:
            assert list(log) == EVERY_FORM[:kept]
            assert log.torn_bytes == size - ends[kept]
        assert torn.stat().st_size == size
        with Log.open(torn) as log:
            assert log.torn_bytes == size - ends[kept]
            log.extend_raw(whole[ends[kept] :])
        assert torn.read_bytes() == whole


def test_an_interrupted_creation_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    header = written(path, []).read_bytes()
    for size in (0, 5, len(header) - 1):
        path.write_bytes(header[:size])
        assert not Log.begun(path)
        Log.create(path, MANIFEST).close()
        assert path.read_bytes() == header
        assert Log.begun(path)
    for kept in (header, header[:20] + b"!", header + b"\x0f"):
        path.write_bytes(kept)
        with pytest.raises(FileExistsError, match=r"continue it with Log\.open"):
            Log.create(path, MANIFEST)
        assert path.read_bytes() == kept
    assert not Log.begun(tmp_path / "nothing")
    path.write_bytes(b"another kind of file")
    assert Log.begun(path)


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    whole = written(tmp_path / "run.log", EVERY_FORM).read_bytes()
    path = tmp_path / "damaged.log"
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(LogError):
            Log.open(path)
        assert path.read_bytes() == damaged
    assert b"machine 5" in whole
    end = HEADER_BYTES + 1 + 8 + 4 + 4 + 2 + 4  # of the first record, which is listed
    path.write_bytes(whole.replace(b"machine 5", b"machine 6"))
    with pytest.raises(LogError, match=rf"damaged\.log: record 1, at byte {end}: .*truncate -s {end}"):
        Log.open(path)
    path.write_bytes(whole[:end])
    assert read(path) == EVERY_FORM[:1]
    path.write_bytes(whole[:14] + bytes(HEADER_BYTES - 46) + whole[HEADER_BYTES - 32 :])
    with pytest.raises(LogError, match=f"the manifest, in the first {HEADER_BYTES} bytes, or its"):
        Log.open(path)
    for odd in (b"nothing that zlib knows", zlib.compress(b"{}")[:-1]):
        header = whole[:10] + struct.pack("<I", len(odd)) + odd
        path.write_bytes(header + sha256(header).digest())
        with pytest.raises(LogError, match="the manifest was never whole"):
            Log.open(path)
    path.write_bytes(b"\x89tw1byte\x02\x00" + whole[10:])
    with pytest.raises(LogError, match="version 2; this thinwire reads version 1"):
        Log.open(path)


def test_damaged_files_never_give_wrong_records(
    tmp_path: Path, mutations: Callable[[Tensor], Iterator[Tensor]]
) -> None:
    whole = written(tmp_path / "run.log", EVERY_FORM).read_bytes()
    path = tmp_path / "damaged.log"
    for damaged in mutations(torch.frombuffer(bytearray(whole), dtype=torch.uint8)):
        data = damaged.numpy().tobytes()
        path.write_bytes(data)
        try:
            found = read(path)
        except LogError:
            continue
        assert found == EVERY_FORM[: len(found)]
        assert data[: len(whole)] == whole[: len(data)], "damage was taken for a torn tail"


def test_damaged_transfers_leave_the_log_as_it_was(
    tmp_path: Path, mutations: Callable[[Tensor], Iterator[Tensor]]
) -> None:
    with Log.open(written(tmp_path / "run.log", EVERY_FORM)) as log:
        raw = log.raw(3)
    with Log.open(written(tmp_path / "other.log", EVERY_FORM[:3])) as log:
        before = log.path.read_bytes()
        for damaged in mutations(torch.frombuffer(bytearray(raw), dtype=torch.uint8)):
            data = damaged.numpy().tobytes()
            try:
                taken = log.extend_raw(data)
            except LogError:
                assert log.path.read_bytes() == before
            else:
                assert data[:taken] == raw[:taken]
            log.truncate(3)
        with pytest.raises(LogError, match="byte 0 of what should follow record 2: type 0x00"):
            log.extend_raw(bytes(9))
        assert log.extend_raw(raw) == len(raw)
        assert list(log) == EVERY_FORM


def test_one_writer_and_any_readers(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    with Log.create(path, MANIFEST) as log:
        log.append(EVERY_FORM[0])
        for attempt in (lambda: Log.open(path), lambda: Log.create(path, MANIFEST)):
            with pytest.raises(LogLockedError, match="open for writing elsewhere"):
                attempt()
        with Log.open(path, read_only=True) as reader:
            for refused in (lambda: reader.append(EVERY_FORM[1]), lambda: reader.truncate(0), reader.sync):
                with pytest.raises(LogError, match="opened read-only"):
                    refused()
            assert list(reader) == EVERY_FORM[:1]
    with Log.open(path) as log:
        log.append(EVERY_FORM[1])
    with pytest.raises(FileNotFoundError):
        Log.open(tmp_path / "other.log")


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    with Log.open(written(tmp_path / "run.log", EVERY_FORM[:2])) as log:
        write = os.pwrite

        def full(file: int, data: Any, offset: int) -> int:
            if offset > log.size_bytes:
                raise OSError(28, "No space left on device")
            return write(file, data[:3], offset)

        before = log.path.read_bytes()
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            log.append(EVERY_FORM[2])
        assert log.path.read_bytes() == before
        monkeypatch.undo()
        log.append(EVERY_FORM[2])
        assert list(log) == EVERY_FORM[:3]
    assert read(log.path) == EVERY_FORM[:3]


WRITER = """
import sys
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.rounds import Contribution, Round
log = Log.open(sys.argv[1])
for number in range(log.rounds, 1 << 30):
    log.append(Round(number, 0.5, (Contribution(1, bytes([number & 127])),)))
    sys.stdout.write(".")
    sys.stdout.flush()
"""


def test_a_killed_writer_leaves_all_that_it_acknowledged(tmp_path: Path) -> None:
    path = written(tmp_path / "run.log", [])
    before = 0
    for wanted in (1, 57, 400):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.read(wanted) == b"." * wanted
            writer.send_signal(signal.SIGKILL)  # wherever it is now
            acknowledged = wanted + len(writer.stdout.read())
        with Log.open(path) as log:
            assert log.rounds >= before + acknowledged
            assert list(log) == [round_of(n, {1: bytes([n & 127])}) for n in range(log.rounds)]
            before = log.rounds


ROSTERS = st.dictionaries(st.integers(0, 12), st.integers(0, 3), max_size=10)
CODES = st.dictionaries(
    st.integers(0, 12), st.lists(st.sampled_from([0, 1, 0x7F, 0x80, 0x81, 0xFF]), max_size=3).map(bytes), max_size=10
)
STEPS = st.one_of(
    st.tuples(st.just("roster"), ROSTERS),
    st.tuples(st.just("full"), st.sampled_from([0.5, 0.25])),
    st.tuples(st.just("round"), CODES),
    st.tuples(st.just("snapshot"), st.binary(min_size=32, max_size=32)),
    st.tuples(st.just("truncate"), st.floats(0, 1)),
    st.tuples(st.just("reopen"), st.none()),
    st.tuples(st.just("transfer"), st.floats(0, 1)),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=40))
def test_a_log_is_a_list(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = Log.create(folder / "run.log", MANIFEST)
    model: list[Record] = []
    for step, value in steps:
        rounds = sum(isinstance(r, Round) for r in model)
        rosters = [r for r in model if isinstance(r, Roster)]
        record: Record | None = None
        if step == "roster":
            record = roster(rosters[-1].epoch + 1 if rosters else 0, dict(sorted(value.items())))
        elif step == "full":
            members = rosters[-1].members if rosters else ()
            record = round_of(rounds, {m.slot: bytes(range(m.samples)) for m in members}, rate=value)
        elif step == "round":
            record = round_of(rounds, value)
        elif step == "snapshot":
            record = Snapshot(rounds, value)
        elif step == "truncate":
            del model[round(value * len(model)) :]
            log.truncate(len(model))
        elif step == "reopen":
            log.close()
            log = Log.open(log.path)
        else:
            start = round(value * len(model))
            raw = log.raw(start)
            log.truncate(start)
            assert log.extend_raw(raw) == len(raw)
        if record is not None:
            model.append(record)
            log.append(record)
        assert (len(log), log.rounds) == (len(model), sum(isinstance(r, Round) for r in model))
    assert list(log) == model
    assert [log[i] for i in range(len(model))] == model
    half = len(model) // 2
    assert list(log.records(half)) == model[half:]
    log.close()
    assert read(log.path) == model


def test_a_suffix_arrives_in_pieces(tmp_path: Path) -> None:
    """A receiver may get chunks that end anywhere; what it has then equals the sender's log byte for byte."""
    with Log.open(written(tmp_path / "run.log", EVERY_FORM)) as sender:
        for size in (1, 7, 50, 10000):
            with Log.open(written(tmp_path / f"{size}.log", EVERY_FORM[:2])) as receiver:
                raw, waiting = sender.raw(2), b""
                for at in range(0, len(raw), size):
                    waiting += raw[at : at + size]
                    waiting = waiting[receiver.extend_raw(waiting) :]
                assert waiting == b""
                assert receiver.chain(len(receiver)) == sender.chain(len(sender))
            assert receiver.path.read_bytes() == sender.path.read_bytes()
