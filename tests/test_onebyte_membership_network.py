"""Real connections on loopback: rounds, bytes, secrets, strangers; and what people are told who got something wrong."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from onebyte_machine import MANIFEST, SNAPSHOT_EVERY, Integer

from thinwire.comm.errors import PeerLostError
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.membership.discover import fetch_manifest
from thinwire.comm.onebyte.membership.elastic import Membership
from thinwire.comm.onebyte.membership.errors import MessageError, NoQuorumError
from thinwire.comm.onebyte.membership.settings import MembershipSettings
from thinwire.comm.onebyte.rounds import Round

QUICK = {"heartbeat_s": 0.1, "suspicion_s": 1.0, "deadline_s": 30.0, "sync": False, "secret": "hush"}
IMPATIENT = {"heartbeat_s": 0.05, "suspicion_s": 0.1, "deadline_s": 0.1, "give_up_s": 0.5, "leave_s": 0.0}


class Machine:
    """One machine of this process. Its evaluations take no time."""

    def __init__(self, folder: Path, name: str, manifest: bytes = MANIFEST, **settings: object) -> None:
        path = folder / f"{name}.log"
        self.log = Log.open(path) if path.exists() else Log.create(path, manifest)
        self.model = Integer()
        self.exchange = Membership(
            manifest,
            self.log,
            self.model,
            MembershipSettings(**{"name": name, **QUICK, **settings}),  # type: ignore[arg-type]
            base_hash=Integer().model_hash(),
            snapshot_every=SNAPSHOT_EVERY,
        )
        self.address = self.exchange.address
        self.slots: set[int] = set()

    def work(self, rounds: int) -> None:
        """Until this machine has taken up so many rounds."""
        while self.model.rounds < rounds:
            turn = self.exchange.begin()
            self.slots.add(turn.slot)
            if turn.round < rounds:
                codes = hashlib.shake_128(repr(turn).encode()).digest(turn.samples)
                self.model.carry_out(self.exchange.commit(turn, codes, 0.25))

    def close(self) -> None:
        self.exchange.close()
        self.log.close()


@contextmanager
def machine(*arguments: object, **settings: object) -> Iterator[Machine]:
    made = Machine(*arguments, **settings)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def all_at_once(works: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_rounds_bytes_and_a_machine_that_leaves_and_returns(tmp_path: Path) -> None:
    with machine(tmp_path, "a", wait_for=3, samples=2) as a:
        by_name = a.address.replace("127.0.0.1", "localhost")
        b = Machine(tmp_path, "b", contacts=(by_name,), samples=5)
        with machine(tmp_path, "c", contacts=(b.address, a.address), samples=30) as c:
            all_at_once([lambda m=m: m.work(41) for m in (a, b, c)])
            assert a.model.value == b.model.value == c.model.value
            assert a.log.chain(len(a.log)) == b.log.chain(len(b.log)) == c.log.chain(len(c.log))
            assert {n for m in (a, b, c) for n in m.slots} == {0, 1, 2}
            for joined, samples in ((b, 5), (c, 30)):
                metrics = joined.exchange.metrics()
                assert metrics["contribution_bytes"] == (24 + samples) * metrics["contributions_sent"]
                assert metrics["contributions_sent"] >= 40
                assert metrics["rounds_committed"] == 41
            shapes = {tuple(map(len, (c.codes for c in r.contributions))) for r in a.log if isinstance(r, Round)}
            assert any(set(shape) == {2, 5, 30} for shape in shapes)
            slot = b.slots
            all_at_once([b.close])
            all_at_once([lambda m=m: m.work(55) for m in (a, c)])
            with machine(tmp_path, "b", contacts=(c.address,), samples=5) as again:
                all_at_once([lambda m=m: m.work(203) for m in (a, c, again)])
                assert again.slots == slot
                assert a.model.value == again.model.value == c.model.value


def test_strangers_do_not_disturb_and_leave_nothing_open(tmp_path: Path) -> None:
    with machine(tmp_path, "a") as a:
        host, _, port = a.address.rpartition(":")
        descriptors = Path("/proc/self/fd")
        before = len(os.listdir(descriptors))
        for number in range(100):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(
                    [b"GET / HTTP/1.1\r\n\r\n", bytes(200), b"\xff" * 200, secrets.token_bytes(300)][number % 4]
                )
        a.work(10)
        with pytest.raises((MessageError, PeerLostError), match=r"same secret|the same on all machines"):
            fetch_manifest(a.address, secret="guess")
        assert fetch_manifest(a.address, secret="hush") == MANIFEST
        a.work(20)
        assert a.exchange.metrics()["members"] == 1
        assert len(os.listdir(descriptors)) <= before + 2


def test_what_a_newcomer_is_told(tmp_path: Path) -> None:
    with machine(tmp_path, "a") as a:
        contacts = (a.address,)
        with (
            machine(tmp_path, "b", contacts=contacts, **{**IMPATIENT, "secret": "other"}) as b,
            pytest.raises(NoQuorumError, match=r"closed the connection without a greeting|must be the same on all"),
        ):
            b.work(1)
        with (
            machine(tmp_path, "c", b"another run", contacts=contacts, **IMPATIENT) as c,
            pytest.raises(NoQuorumError, match=r"it is in run .* their base weights, parameters or settings differ"),
        ):
            c.work(1)
    with (
        machine(tmp_path, "d", contacts=contacts, **IMPATIENT) as d,
        pytest.raises(NoQuorumError, match=rf"Members: nobody.*{a.address} cannot be reached"),
    ):
        d.work(1)
    with pytest.raises(PeerLostError, match="Is it running"):
        fetch_manifest(a.address, timeout_s=1)


def test_what_a_wrong_start_is_told(tmp_path: Path) -> None:
    with machine(tmp_path, "a") as a:
        a.work(3)
        with pytest.raises(OSError, match=f"listen: '{a.address}' cannot be bound"):
            Machine(tmp_path, "b", listen=a.address)
        turn = a.exchange.begin()
        for codes, rate, said in (
            (b"", 0.5, "0 codes for a turn of 1"),
            (b"a", 0.1, "0.1 is not"),
            (b"a", 1e99, "fp32"),
        ):
            with pytest.raises(ValueError, match=said):
                a.exchange.commit(turn, codes, rate)
        a.model.rounds = 1
        with pytest.raises(ValueError, match="taken up 1 of the log's 3 rounds; all or none"):
            Membership(
                MANIFEST, a.log, a.model, MembershipSettings(), base_hash=bytes(32), snapshot_every=SNAPSHOT_EVERY
            )
    with Log.open(tmp_path / "a.log") as log, pytest.raises(ValueError, match="another run: its manifest differs"):
        Membership(b"x", log, Integer(), MembershipSettings(), base_hash=bytes(32), snapshot_every=SNAPSHOT_EVERY)
    (tmp_path / "a.log.vote").unlink()
    with pytest.raises(ValueError, match="has no place in it"):
        Machine(tmp_path, "a")
