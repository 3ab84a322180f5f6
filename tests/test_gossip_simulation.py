"""The simulated world: its clock, its network, deaths and returns, and the inbox of a machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gossip_worlds import Late, run_each
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.comm.gossip.inbox import Inbox
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.gossip.simulated_network import HEADER_BYTES, Cut, Network, Trunk
from thinwire.comm.gossip.simulation import Simulation, pause


def message(round: int, payload_bytes: int = 0, kind: Kind = Kind.VALUE, stream: int = 0) -> Message:
    return Message(kind, round, stream=stream, payload=torch.zeros(payload_bytes, dtype=torch.uint8))


def is_there(port: Port, source: int) -> Callable[[], bool]:
    return lambda: port.peek(source, Kind.VALUE) is not None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "take", "forget"]),
            st.integers(0, 2),
            st.sampled_from([Kind.VALUE, Kind.PROBE]),
            st.integers(0, 1),
            st.integers(0, 9),
        ),
        max_size=60,
    )
)
def test_an_inbox_is_a_list_of_what_arrived(actions: list[tuple[str, int, Kind, int, int]]) -> None:
    """Against the plainest model: one list of everything that waits, in the order of arrival."""
    inbox = Inbox()
    model: list[tuple[int, Message]] = []
    newest: dict[tuple[int, Kind, int], int] = {}
    for action, source, kind, stream, round in actions:
        mine = [(s, m) for s, m in model if (s, m.kind, m.stream) == (source, kind, stream)]
        if action == "put":
            arrived = message(round, kind=kind, stream=stream)
            inbox.put(source, arrived)
            model.append((source, arrived))
            newest[source, kind, stream] = max(round, newest.get((source, kind, stream), -1))
        elif action == "take" and mine:
            assert inbox.take(source, kind, stream) is mine[0][1]
            model = [entry for entry in model if entry[1] is not mine[0][1]]
        elif action == "forget":
            inbox.forget(source)
            model = [entry for entry in model if entry[0] != source]
            newest = {key: value for key, value in newest.items() if key[0] != source}
        for s in range(3):
            for k in (Kind.VALUE, Kind.PROBE):
                first = next((m for t, m in model if (t, m.kind, m.stream) == (s, k, stream)), None)
                assert inbox.peek(s, k, stream) is first
                assert inbox.newest(s, k, stream) == newest.get((s, k, stream), -1)
        order = [s for s, m in model if (m.kind, m.stream) == (kind, stream)]
        assert inbox.waiting(kind, stream) == list(dict.fromkeys(order))


def arrivals(simulation: Simulation, sends: list[tuple[float, int, int, int]]) -> list[tuple[int, int, float]]:
    """(to, number, time) of each of the messages (time, source, to, payload bytes)."""
    seen: list[tuple[int, int, float]] = []
    expected = [sum(to == rank for _, _, to, _ in sends) for rank in range(len(simulation.ports))]
    for number, (at_s, source, to, payload_bytes) in enumerate(sends):

        def send(source: int = source, to: int = to, number: int = number, payload_bytes: int = payload_bytes) -> None:
            simulation.ports[source].send(to, message(number, payload_bytes))

        simulation.at(at_s, send)

    def script(rank: int) -> Script[None]:
        port = simulation.ports[rank]
        for _ in range(expected[rank]):
            yield Wait(lambda: bool(port.waiting(Kind.VALUE)), math.inf)
            taken = port.take(port.waiting(Kind.VALUE)[0], Kind.VALUE)
            seen.append((rank, taken.round, port.now()))

    run_each(simulation, script)
    return seen


KILO = 1000 - HEADER_BYTES  # a payload with which a message takes 8000 bits: 1 s at 8 kbit/s


def test_a_line_carries_one_message_after_another() -> None:
    network = Network(rate_bps=8000, delay_s=0.25)
    out = arrivals(Simulation(3, network), [(0.0, 0, 1, KILO), (0.0, 0, 2, KILO), (10.0, 0, 2, KILO)])
    assert out == [(1, 0, 1.25), (2, 1, 2.25), (2, 2, 11.25)]
    into_one = arrivals(Simulation(3, Network(rate_bps=8000)), [(0.0, 1, 0, KILO), (0.0, 2, 0, KILO)])
    assert into_one == [(0, 0, 1.0), (0, 1, 2.0)]
    both_ways = arrivals(Simulation(2, Network(rate_bps=8000)), [(0.0, 0, 1, KILO), (0.0, 1, 0, KILO)])
    assert both_ways == [(1, 0, 1.0), (0, 1, 1.0)]


def test_a_path_between_two_sites_is_shared_and_a_line_can_be_slow() -> None:
    bridge = Trunk(rate_bps=4000, delay_s=1.0)
    between = {(a, b): bridge for a in (0, 1) for b in (2, 3)}
    network = Network(rate_bps=8000, paths=between)
    crossing = arrivals(Simulation(4, network), [(0.0, 0, 2, KILO), (0.0, 1, 3, KILO), (0.0, 2, 0, KILO)])
    assert crossing == [(2, 0, 3.0), (0, 2, 3.0), (3, 1, 5.0)]
    slow = arrivals(Simulation(2, Network(rate_bps=8000, lines={1: 1000})), [(0.0, 0, 1, KILO), (0.0, 1, 0, KILO)])
    assert slow == [(1, 0, 8.0), (0, 1, 8.0)]


def test_what_is_sent_into_a_cut_waits_for_its_end() -> None:
    cuts = [Cut(frozenset({0}), 1.0, 3.0), Cut(frozenset({0}), 3.0, 4.0, frozenset({1}))]
    network = Network(cuts=cuts)
    sends = [(0.5, 0, 1, 0), (1.5, 1, 0, 0), (1.5, 0, 2, 0), (1.5, 1, 2, 0)]
    assert arrivals(Simulation(3, network), sends) == [(1, 0, 0.5), (2, 3, 1.5), (2, 2, 3.0), (0, 1, 4.0)]


def test_lost_messages_come_later_in_their_order_or_never() -> None:
    sends = [(0.1 * i, 0, 1, 0) for i in range(200)]
    resent = arrivals(Simulation(2, Network(loss=0.3, resend_s=0.5, seed=1)), sends)
    assert [number for _, number, _ in resent] == list(range(200))
    late = sum(at > 0.1 * number + 0.4 for _, number, at in resent)
    assert 60 < late < 180  # those lost, and those behind them
    assert resent == arrivals(Simulation(2, Network(loss=0.3, resend_s=0.5, seed=1)), sends)
    gone = Network(loss=0.3, resend_s=None, seed=1)
    assert 40 < sum(gone.arrival_s(0, 1, 0, 0.0) is None for _ in range(200)) < 80


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"rate_bps": 0.0}, "rate_bps: 0.0 bits per second"),
        ({"lines": {3: -1.0}}, r"lines\[3\]: -1.0 bits per second"),
        ({"delay_s": math.inf}, "delay_s: inf"),
        ({"loss": 1.0}, "loss: 1.0"),
    ],
)
def test_networks_that_cannot_be_are_refused(wrong: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Network(**wrong)


def test_between_two_machines_none_overtakes_another() -> None:
    links = Late(lambda a, b, i: [5.0, 1.0, 0.0, 7.0][i])
    assert arrivals(Simulation(2, links), [(float(i), 0, 1, 0) for i in range(4)]) == [
        (1, 0, 5.0),
        (1, 1, 5.0),
        (1, 2, 5.0),
        (1, 3, 10.0),
    ]


def test_time_passes_only_as_machines_wait() -> None:
    simulation = Simulation(2)
    log: list[tuple[int, float]] = []

    def script(rank: int) -> Script[int]:
        port = simulation.ports[rank]
        for _ in range(3):
            yield pause(port.now(), 1.0 + rank)
            log.append((rank, port.now()))
        yield Wait(lambda: True, math.inf)  # nothing to wait for
        return 10 * rank

    assert simulation.run([script(0), script(1)]) == [0, 10]
    assert log == [(0, 1.0), (1, 2.0), (0, 2.0), (0, 3.0), (1, 4.0), (1, 6.0)]
    assert simulation.now_s == 6.0
    assert simulation.run([script(0), None]) == [0, None]  # the clock goes on from there
    assert simulation.now_s == 9.0


def test_waiting_for_what_nobody_sends_is_an_error_that_names_who_waits() -> None:
    simulation = Simulation(3)

    def script(rank: int) -> Script[None]:
        yield pause(0.0, 2.0)
        if rank != 1:
            yield Wait(is_there(simulation.ports[rank], 1), math.inf)

    with pytest.raises(RuntimeError, match="at 2 s machines 0, 2 wait for ever"):
        run_each(simulation, script)


def test_the_dead_are_noticed_and_nothing_of_theirs_comes_afterwards() -> None:
    simulation = Simulation(3, Late(lambda a, b, i: 1.0))
    simulation.at(0.5, lambda: simulation.kill(2, noticed_after_s=1.0))
    seen: dict[int, Any] = {}

    def script(rank: int) -> Script[str]:
        port = simulation.ports[rank]
        if rank == 2:
            port.send(0, message(0))
            yield pause(0.0, 0.4)
            port.send(1, message(0))
            yield pause(0.0, 9.0)
            port.send(1, message(1))
            return "lived"
        yield Wait(lambda: 2 in port.lost(), 20.0)
        seen[rank] = port.now(), port.newest(2, Kind.VALUE)
        port.send(2, message(0, 100))
        yield pause(port.now(), 20.0)
        assert (port.now(), port.newest(2, Kind.VALUE)) == (21.5, seen[rank][1])
        return "went on"

    assert simulation.run([script(rank) for rank in range(3)]) == ["went on", "went on", None]
    assert seen == {0: (1.5, 0), 1: (1.5, 0)}
    assert simulation.ports[0].sent_bytes == {}  # to a lost machine nothing is sent


def test_one_that_comes_back_is_another_machine() -> None:
    """Nothing of the old one reaches the others, and nothing that was meant for it reaches the new one."""
    simulation = Simulation(3, Late(lambda a, b, i: 1.0))
    lives: list[int] = []

    def machine(port: Port, life: int) -> Script[None]:
        lives.append(life)
        port.send(0, message(10 * life))
        yield Wait(is_there(port, 0), 30.0)
        assert port.take(0, Kind.VALUE).round == 7

    def observer() -> Script[None]:
        port = simulation.ports[0]
        yield pause(0.0, 0.5)
        port.send(2, message(6))
        yield pause(port.now(), 0.25)
        simulation.kill(2, noticed_after_s=9.0)
        yield pause(port.now(), 0.1)
        assert 2 not in port.lost()
        simulation.kill(1)
        simulation.start(2, machine(simulation.revive(2), 2))
        assert port.lost() == {1}
        assert simulation.ports[2].lost() == {1}
        yield Wait(is_there(port, 2), 30.0)
        assert (port.now(), port.take(2, Kind.VALUE).round) == (1.85, 20)
        port.send(2, message(7))

    simulation.run([observer(), None, machine(simulation.ports[2], 1)])
    assert lives == [1, 2]
    assert simulation.ports[2].alive
    assert not simulation.ports[1].alive


def test_machines_that_part_are_lost_to_one_another_alone() -> None:
    simulation = Simulation(3)
    simulation.at(1.0, lambda: simulation.part(0, 1))
    lost: list[frozenset[int]] = []

    def script(rank: int) -> Script[None]:
        yield Wait(lambda: bool(simulation.ports[rank].lost()), 2.0)
        lost.append(simulation.ports[rank].lost())

    run_each(simulation, script)
    assert lost == [{1}, {0}, frozenset()]


def test_bytes_are_counted_as_they_are_sent() -> None:
    simulation = Simulation(3)
    port = simulation.ports[0]
    port.send(1, message(0, 10))
    port.send(1, message(1, 5, Kind.PROBE))
    port.send(2, message(0, 1))
    assert port.sent_bytes == {1: 15, 2: 1}
    assert port.sent == {(1, Kind.VALUE): 10, (1, Kind.PROBE): 5, (2, Kind.VALUE): 1}
    assert port.sent_messages == 3


def test_a_run_repeats_event_for_event() -> None:
    """Hundreds of machines that talk at random times over a lossy network."""

    def once() -> list[tuple[float, int, int]]:
        simulation = Simulation(200, Network(rate_bps=1e5, delay_s=0.01, loss=0.1, seed=4))
        log: list[tuple[float, int, int]] = []

        def script(rank: int) -> Script[None]:
            chance = np.random.default_rng(rank)
            port = simulation.ports[rank]
            for t in range(10):
                yield pause(port.now(), float(chance.exponential()))
                port.send((rank + 1 + int(chance.integers(199))) % 200, message(t, 100))
                for source in port.waiting(Kind.VALUE):
                    log.append((port.now(), source, port.take(source, Kind.VALUE).round))

        run_each(simulation, script)
        return log

    first = once()
    assert len(first) > 1000
    assert once() == first
