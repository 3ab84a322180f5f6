"""Gossip's port over TCP: what is sent arrives in order and once, whatever happens to connections and machines."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from gossip_posts import SECRET, Place, place_for, run_scripts
from gossip_worlds import ring
from ranks import Rank, run_ranks
from torch import Tensor

from thinwire.comm.errors import PeerLostError
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.mixer import SymmetricMixer
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.gossip.post.door import open_post
from thinwire.comm.gossip.post.handshake import Greeting, fresh_nonce, greet_as_dialler
from thinwire.comm.gossip.post.machines import MachinesSettings, meet
from thinwire.comm.gossip.post.post import Post, drive
from thinwire.comm.gossip.simulation import Simulation


@pytest.fixture(autouse=True)
def leaves_no_thread_and_no_descriptor_behind() -> Iterator[None]:
    before = {thread.name for thread in threading.enumerate()}
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    assert {thread.name for thread in threading.enumerate()} - before == set()
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def until(port: Port, ready: Callable[[], bool]) -> Script[None]:
    yield Wait(ready, port.now() + 30.0)
    assert ready(), "not within 30 s"


def wait_until(post: Post, ready: Callable[[], bool]) -> None:
    drive(until(post, ready), post)


def bytes_of(seed: int, count: int) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_messages_arrive_once_in_order_and_whole_though_connections_break_again_and_again() -> None:
    count = 200
    sizes = [(number * 7919) % 5000 if number % 50 else 3_000_000 for number in range(count)]

    def talk(post: Post, other: int) -> Script[None]:
        for number in range(count):
            message = Message(Kind.VALUE, number, mass=number / 7, stream=3, payload=bytes_of(number, sizes[number]))
            post.send(other, message)
            if number % 9 == 4 * post.rank:
                post.hang_up(other)
            if number % 40 == 0:  # let some arrive before the next cut
                yield from until(post, lambda number=number: post.newest(other, Kind.VALUE, 3) >= number - 20)
        for number in range(count):
            yield from until(post, lambda: post.peek(other, Kind.VALUE, 3) is not None)
            got = post.take(other, Kind.VALUE, 3)
            assert (got.round, got.mass, got.flags) == (number, number / 7, 0)
            assert torch.equal(got.payload, bytes_of(number, sizes[number]))
        assert post.peek(other, Kind.VALUE, 3) is None

    with place_for(2) as place:
        posts = place.enter_all()
        run_scripts(posts, [talk(posts[0], 1), talk(posts[1], 0)])
        for post in posts:
            assert post.meter.sent_bytes("gossip/value") == {"world": sum(sizes)}
            assert post.meter.received_bytes("gossip/value") == {"world": sum(sizes)}
            assert dict(post.sent_bytes) == {1 - post.rank: sum(sizes)}
            assert post.lost() == frozenset()
            assert post.generation(1 - post.rank) == 0


def mix(port: Port, rounds: int, cut: Callable[[int], None]) -> Script[Tensor]:
    """Rounds of D-PSGD with a step of its own in between."""
    mixer = SymmetricMixer(port, Plain(), deadline_s=30.0)
    mixing = ring(port.size)
    x = torch.full((50_000,), float(port.rank), dtype=torch.float64)
    for round in range(rounds):
        x = x + (port.rank + 1) * 0.1 ** (round % 5)
        mixer.begin(round, mixing, x)
        cut(round)
        x = (yield from mixer.finish()).onto(x)
    late = yield from mixer.settle()
    return x if late is None else late.onto(x)


def test_cut_connections_change_no_bit_of_a_run_and_the_simulation_gives_the_same() -> None:
    rounds = 25
    simulation = Simulation(4)
    simulated = simulation.run([mix(port, rounds, lambda round: None) for port in simulation.ports])
    with place_for(4) as place:
        posts = place.enter_all()

        def cut(post: Post) -> Callable[[int], None]:
            return lambda round: post.hang_up((post.rank + 1 + round % 3) % 4) if round % 2 else None

        real = run_scripts(posts, [mix(post, rounds, cut(post)) for post in posts])
        assert all(post.exposed_s > 0 for post in posts)
    for a, b in zip(real, simulated, strict=True):
        assert torch.equal(a, b)
    steps = sum(0.1 ** (round % 5) for round in range(rounds)) * 2.5
    assert torch.stack(real).mean() == pytest.approx(1.5 + steps, rel=1e-12)


def test_a_machine_that_leaves_is_lost_at_once_and_what_it_sent_before_can_be_read() -> None:
    with place_for(3, lost_after_s=600.0) as place:
        first, second, third = place.enter_all()
        payload = bytes_of(0, 2_000_000)
        for number in range(20):
            third.send(0, Message(Kind.VALUE, number, payload=payload))
        third.close()
        wait_until(first, lambda: first.lost() == {2})
        wait_until(second, lambda: second.lost() == {2})
        assert [first.take(2, Kind.VALUE).round for _ in range(20)] == list(range(20))
        assert first.problems() == {2: "has left"}
        first.send(2, Message(Kind.END, 0))  # dropped
        assert first.meter.sent_bytes("control/end") == {}
        with pytest.raises(RuntimeError, match="closed"):
            third.send(0, Message(Kind.END, 0))
        with pytest.raises(RuntimeError, match="closed"):
            drive(until(third, lambda: False), third)


def test_a_killed_machine_is_lost_and_a_new_one_in_its_place_is_taken_in() -> None:
    with place_for(3, lost_after_s=600.0) as place:
        first, second, third = place.enter_all()
        for post in (first, second):  # of the others, none may be lost because this machine is slow
            post._links[2]._limits = replace(post._links[2]._limits, lost_after_s=0.3)
        third.send(0, Message(Kind.VALUE, 7))
        wait_until(first, lambda: first.newest(2, Kind.VALUE) == 7)
        third.close(farewell=False)
        first.send(2, Message(Kind.VALUE, 1))  # meant for the old machine
        for post in (first, second):
            wait_until(post, lambda post=post: post.lost() == {2})
        assert first.peek(2, Kind.VALUE) is not None
        again = place.enter(2)
        for post in (first, second):
            again.send(post.rank, Message(Kind.JOIN_ASK, 0))
            wait_until(post, lambda post=post: post.waiting(Kind.JOIN_ASK) == [2])
            assert post.lost() == {2}  # it has not entered yet
            assert post.generation(2) == 1
            assert post.newest(2, Kind.VALUE) == -1
            assert post.peek(2, Kind.VALUE) is None
            post.send(2, Message(Kind.VALUE, 10 + post.rank))
            wait_until(again, lambda post=post: again.newest(post.rank, Kind.VALUE) == 10 + post.rank)
            assert again.take(post.rank, Kind.VALUE).round == 10 + post.rank
            assert again.peek(post.rank, Kind.VALUE) is None
        again.send(0, Message(Kind.VALUE, 3))
        wait_until(first, lambda: first.newest(2, Kind.VALUE) == 3)
        assert first.lost() == frozenset()
        assert second.lost() == {2}
        assert first.generation(1) == again.generation(0) == 0


def test_a_new_machine_is_known_as_such_even_if_nobody_had_missed_the_old_one() -> None:
    with place_for(2, lost_after_s=600.0) as place:
        first, second = place.enter_all()
        second.close(farewell=False)
        first.send(1, Message(Kind.VALUE, 0))
        again = place.enter(1)
        wait_until(first, lambda: first.generation(1) == 1)
        first.send(1, Message(Kind.VALUE, 1))
        wait_until(again, lambda: again.newest(0, Kind.VALUE) == 1)
        assert again.take(0, Kind.VALUE).round == 1
        assert again.lost() == frozenset()


def test_after_a_cut_that_was_too_long_both_begin_anew_also_the_one_that_had_not_noticed() -> None:
    with place_for(2, lost_after_s=600.0) as place:
        first, second = place.enter_all()
        for to, post in ((1, first), (0, second)):
            post.send(to, Message(Kind.VALUE, 5))
        for source, post in ((1, first), (0, second)):
            wait_until(post, lambda post=post, source=source: post.newest(source, Kind.VALUE) == 5)
        second._links[0].give_up("was silent")  # as a machine does that has heard nothing for lost_after_s
        wait_until(second, lambda: second.generation(0) == 1)
        wait_until(first, lambda: first.generation(1) == 1)
        for to, post in ((1, first), (0, second)):
            assert post.newest(to, Kind.VALUE) == -1
            post.send(to, Message(Kind.VALUE, 2))
        for source, post in ((1, first), (0, second)):
            wait_until(post, lambda post=post, source=source: post.newest(source, Kind.VALUE) == 2)
            assert post.take(source, Kind.VALUE).round == 2


def test_what_is_sent_before_a_script_can_know_of_a_new_machine_is_not_for_that_one() -> None:
    with place_for(2, lost_after_s=600.0) as place:
        first, second = place.enter_all()
        assert first.generation(1) == 0
        second.close(farewell=False)
        again = place.enter(1)
        again.wait_for_others(1, 30.0)
        again.send(0, Message(Kind.VALUE, 0))
        with first._links[1].changed:
            while not first._inbox.waiting(Kind.VALUE):  # the script has not looked
                first._links[1].changed.wait(0.01)
        first.send(1, Message(Kind.VALUE, 1))
        assert first.generation(1) == 1
        first.send(1, Message(Kind.VALUE, 2))
        wait_until(again, lambda: again.newest(0, Kind.VALUE) == 2)
        assert again.take(0, Kind.VALUE).round == 2


def impostor(place: Place, rank: int, to: int, secret: bytes = SECRET, **changes: int) -> socket.socket:
    """A socket that has greeted as machine `rank` would, and does nothing more."""
    sock = socket.create_connection(place.addresses[to], 10.0)
    fields = {"size": place.size, "sender": rank, "receiver": to, "incarnation": 99, "known": 0, "epoch": 0}
    try:
        greet_as_dialler(sock, secret, Greeting(**{**fields, **changes}, received=0, nonce=fresh_nonce()))
    except BaseException:
        sock.close()
        raise
    return sock


def test_a_machine_that_falls_silent_is_lost_though_its_connection_stands() -> None:
    with place_for(3, lost_after_s=0.6) as place:
        second, third = place.enter(1), place.enter(2)
        with impostor(place, 0, 1), impostor(place, 0, 2):
            for post in (second, third):
                wait_until(post, lambda post=post: 0 in post.lost())
        assert "silent" in second.problems()[0]


def test_a_machine_that_does_not_read_holds_up_nobody_else_and_is_lost_when_too_much_waits_for_it() -> None:
    payload = bytes_of(1, 1 << 20)
    with place_for(3, lost_after_s=600.0, backlog_bytes=40 << 20) as place:
        second, third = place.enter(1), place.enter(2)
        with impostor(place, 0, 1):
            second.wait_for_others(2, 30.0)
            for number in range(38):
                second.send(0, Message(Kind.VALUE, number, payload=payload))
                second.send(2, Message(Kind.VALUE, number, payload=payload))
            wait_until(third, lambda: third.newest(1, Kind.VALUE) == 37)
            assert second.lost() == frozenset()
            for number in range(38, 42):
                second.send(0, Message(Kind.VALUE, number, payload=payload))
            assert second.lost() == {0}
            assert "unread" in second.problems()[0]


@pytest.mark.parametrize(
    ("changes", "secret", "reason"),
    [
        ({}, b"another secret", "secret"),
        ({"receiver": 2}, SECRET, "it is machine 1, not 2"),
        ({"size": 4}, SECRET, "number 0 of 3; it is number 0 of 4"),
        ({"sender": 2}, SECRET, "closed|reset"),
        ({"sender": 77}, SECRET, "closed|reset"),
    ],
)
def test_strangers_do_not_get_in(changes: dict[str, int], secret: bytes, reason: str) -> None:
    with place_for(3) as place:
        second = place.enter(1)
        with pytest.raises((ConnectionError, ValueError), match=reason):
            impostor(place, 0, 1, secret, **changes).close()
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n" * 9, bytes(4096)):
            with socket.create_connection(place.addresses[1], 10.0) as sock, contextlib.suppress(OSError):
                sock.sendall(garbage)  # it may hang up before all is sent
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
        impostor(place, 0, 1).close()  # it still listens
        assert second.lost() == frozenset()


def test_machines_that_do_not_agree_say_why() -> None:
    with place_for(2) as place:
        first, second = place.enter(0, secret=b"one"), place.enter(1, secret=b"other")
        with pytest.raises(
            PeerLostError, match=r"0 of 1 other machines .* machine 1 \(127.0.0.1:\d+\) .*secret"
        ) as info:
            first.wait_for_others(1, 0.5)
        assert info.value.missing_ranks == (1,)
        with pytest.raises(PeerLostError, match="secret"):
            second.wait_for_others(1, 0.1)


def test_a_post_over_a_queue_counts_in_its_meter_and_numbers_machines_as_it_does() -> None:
    def work(rank: Rank) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        levels = ["node", "node", "world"] if rank.rank < 2 else ["world", "world", "self"]
        levels[rank.rank] = "self"
        queue = rank.queue(levels=levels)
        with open_post(queue) as post:
            for other in range(3):
                if other != rank.rank:
                    post.send(other, Message(Kind.VALUE, 0, payload=bytes_of(0, 100)))
                    post.send(other, Message(Kind.BARRIER, 0, payload=bytes_of(0, 5)))
            wait_until(post, lambda: len(post.waiting(Kind.BARRIER)) == 2)
        queue.close()
        queue.monitor.close()
        meter = queue.meter
        return meter.sent_bytes("gossip/"), meter.sent_bytes("control/barrier"), meter.received_bytes("gossip/value")

    first, _, third = run_ranks(3, work)
    assert first == ({"node": 100, "world": 100}, {"node": 5, "world": 5}, {"node": 100, "world": 100})
    assert third == ({"world": 200}, {"world": 10}, {"world": 200})


def test_a_queue_of_one_has_a_post_with_nobody_to_talk_to() -> None:
    def work(rank: Rank) -> int:
        queue = rank.queue()
        with open_post(queue) as post:
            post.wait(Wait(lambda: True, math.inf))
            size = post.size
        queue.close()
        return size

    assert run_ranks(1, work) == [1]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"machines": ["a:1", "b"]}, "'b' is no address"),
        ({"machines": ["a:1", "a:1"]}, "a:1 appears twice"),
        ({"machines": ["a:1", "b:0"]}, "no address that others can reach"),
        ({"machines": ["a:1", "b:2"], "rank": 2}, "rank: 2 of 2"),
        ({"machines": ["a:1", "b:2"], "wait_for": 3}, "wait_for: 3 of 2"),
        ({"machines": ["a:1", "b:2"], "secret": "short"}, "8"),
        ({"machines": ["a:1", "b:2"], "listen": "nonsense"}, "no address"),
    ],
)
def test_bad_lists_of_machines_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MachinesSettings.model_validate({"rank": 0, "secret": "long enough", **settings})


def test_machines_meet_by_address_and_one_may_come_late() -> None:
    with place_for(3) as place:
        machines = tuple(f"{host}:{port}" for host, port in place.addresses)

        def settings(rank: int, wait_for: int | None) -> MachinesSettings:
            return MachinesSettings.model_validate(
                {"machines": machines, "rank": rank, "secret": "not short", "wait_for": wait_for, "wait_s": 0.5}
            )

        alone = meet(settings(0, 1), listener=place._listeners.pop(0))
        place.posts.append(alone)
        assert alone.lost() == {1, 2}
        place._listeners.pop(1).close()
        with pytest.raises(PeerLostError, match=f"machine 1 .{machines[1]}. cannot be reached"):
            meet(settings(0, 3), listener=socket.create_server(("127.0.0.1", 0)))
        second = meet(settings(1, 2))
        place.posts.append(second)
        second.send(0, Message(Kind.VALUE, 0))
        wait_until(alone, lambda: alone.newest(1, Kind.VALUE) == 0)
        assert alone.lost() == second.lost() == {2}
        with pytest.raises(ValueError, match=f"machines.listen: {machines[0]}"):
            meet(settings(0, 1))


def test_a_failed_thread_fails_its_machine() -> None:
    with place_for(2) as place:
        first, _ = place.enter_all()
        first._links[1].take_in = lambda *_: 1 / 0  # type: ignore[assignment,method-assign,return-value]
        place.posts[1].send(0, Message(Kind.VALUE, 0))
        with pytest.raises(RuntimeError, match="thread"):
            drive(until(first, lambda: False), first)
        with pytest.raises(RuntimeError, match="thread"):
            first.close()
        first._failure = None
