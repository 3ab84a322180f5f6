"""CommQueue and PeerMonitor: order, deadlines, and who is blamed."""

from __future__ import annotations

import socket
import threading

import pytest
import torch
from ranks import Rank, run_ranks, run_ranks_to_the_end

from thinwire.comm.channel import Channel
from thinwire.comm.errors import CommError, PeerFailedError, PeerLateError, PeerLostError


def gather_rank(channel: Channel) -> list[int]:
    return channel.all_gather_same(torch.tensor([channel.rank])).flatten().tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_exchanges_run_in_submission_order(size: int) -> None:
    def work(rank: Rank) -> list[int]:
        queue = rank.queue()
        ran: list[int] = []
        pending = []
        for i in range(20):

            def exchange(channel: Channel, i: int = i) -> list[int]:
                ran.append(i)
                return channel.all_gather_same(torch.tensor([100 * channel.rank + i])).flatten().tolist()

            pending.append(queue.submit(f"op{i}", exchange))
        results = [p.wait() for p in pending]
        assert results == [[100 * r + i for r in range(size)] for i in range(20)]
        queue.close()
        return ran

    assert run_ranks(size, work) == [list(range(20))] * size


@pytest.mark.parametrize("in_rounds", [False, True])
def test_uneven_slices_reach_their_owners_and_are_metered(in_rounds: bool) -> None:
    splits = [3, 0, 5]

    def work(rank: Rank) -> None:
        queue = rank.queue()
        rows = torch.arange(8.0).unsqueeze(1).repeat(1, 2) + 10 * rank.rank
        received = torch.empty(3 * splits[rank.rank], 2)
        exchange = lambda c: c.all_to_all(  # noqa: E731
            received, rows, [splits[c.rank]] * 3, splits, in_rounds=in_rounds
        )
        queue.submit("move", exchange).wait()
        start = sum(splits[: rank.rank])
        expected = [10.0 * r + start + i for r in range(3) for i in range(splits[rank.rank])]
        assert received[:, 0].tolist() == expected
        others = [r for r in range(3) if r != rank.rank]
        assert queue.meter.sent_bytes("move") == {"world": sum(splits[r] * 8 for r in others)}
        assert queue.meter.received_bytes("move") == {"world": 2 * splits[rank.rank] * 8}
        queue.close()

    run_ranks(3, work)


def test_an_error_of_an_exchange_keeps_its_type_and_is_told_to_the_others() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()

        def exchange(channel: Channel) -> list[int]:
            if channel.rank == 1:
                raise KeyError("no such bucket")
            return gather_rank(channel)

        queue.submit("broken", exchange).wait()

    outcomes = run_ranks_to_the_end(3, work)
    assert isinstance(outcomes[1], KeyError)
    for survivor in (0, 2):
        error = outcomes[survivor]
        assert isinstance(error, PeerFailedError)
        assert error.missing_ranks == (1,)
        assert "KeyError" in str(error)
        assert error.operation == "broken"


def test_a_failed_queue_refuses_what_comes_later_with_the_same_error() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        if rank.rank == 1:
            with pytest.raises(ZeroDivisionError):
                queue.submit("divide", lambda channel: 1 // 0).wait()
            with pytest.raises(ZeroDivisionError):
                queue.submit("later", gather_rank).wait()
        else:
            with pytest.raises(PeerFailedError):
                queue.submit("divide", gather_rank).wait()
            with pytest.raises(PeerFailedError):
                queue.submit("later", gather_rank).wait()
        queue.close()

    run_ranks(2, work)


def test_a_late_rank_is_named_with_what_it_does_instead() -> None:
    done = threading.Barrier(3)

    def work(rank: Rank) -> None:
        queue = rank.queue(timeout_s=0.5)
        queue.submit("first", gather_rank).wait()
        try:
            if rank.rank != 2:
                queue.submit("second", gather_rank).wait()
        finally:
            done.wait(30)

    outcomes = run_ranks_to_the_end(3, work)
    for error in outcomes[:2]:
        assert isinstance(error, PeerLateError)
        assert error.missing_ranks == (2,)
        assert "finished first (operation 1)" in str(error)
        assert "second (operation 2 of queue)" in str(error)
        assert "world.timeout_s" in str(error)


def test_a_silent_rank_is_lost() -> None:
    done = threading.Barrier(3)

    def work(rank: Rank) -> None:
        queue = rank.queue(timeout_s=0.5)
        if rank.rank == 0:
            queue.monitor.close()  # neither takes part nor answers, as a stopped process
        else:
            try:
                queue.submit("sum", gather_rank).wait()
            finally:
                done.wait(30)
            return
        done.wait(30)

    outcomes = run_ranks_to_the_end(3, work)
    for rank in (1, 2):
        error = outcomes[rank]
        assert isinstance(error, PeerLostError)
        assert error.missing_ranks == (0,)
        assert "Answered: ranks 1-2" in str(error)


def test_ranks_that_disagree_about_the_operation_are_told_so() -> None:
    judged = threading.Event()

    def work(rank: Rank) -> None:
        queue = rank.queue(timeout_s=0.5)
        if rank.rank == 1:
            queue.submit("bucket1", lambda channel: judged.wait(30)).wait()
            return
        try:
            queue.submit("bucket0", gather_rank).wait()
        finally:
            judged.set()

    error = run_ranks_to_the_end(2, work)[0]
    assert isinstance(error, CommError)
    assert "rank 1 is in bucket1" in str(error)


def test_the_monitor_drops_datagrams_without_the_key() -> None:
    def work(rank: Rank) -> list[int]:
        queue = rank.queue()
        if rank.rank == 0:
            address = queue.monitor._addresses[1]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                for junk in (b"", b"x" * 15, b"x" * 5000, b"\0" * 16 + b'{"kind": "verdict"}'):
                    stranger.sendto(junk, address)
        result = queue.submit("after", gather_rank).wait()
        answer = queue.monitor.survey("queue", timeout_s=10.0)
        assert answer.silent == ()
        queue.submit("done", gather_rank).wait()
        queue.close()
        queue.monitor.close()
        return result

    assert run_ranks(2, work) == [[0, 1]] * 2


@pytest.mark.parametrize("lost", [False, True])
def test_an_error_from_elsewhere_is_blamed_on_a_lost_rank_only_if_there_is_one(lost: bool) -> None:
    ready, judged = threading.Event(), threading.Event()

    def work(rank: Rank) -> BaseException | None:
        queue = rank.queue()
        if rank.rank == 1:
            if lost:
                queue.monitor.close()
            ready.set()
            judged.wait(30)
            return None
        ready.wait(30)
        error = RuntimeError("[pair.cc:553] Connection closed by peer. This is typically caused by magic")
        try:
            return queue.blame(error, "train")
        finally:
            judged.set()

    found = run_ranks_to_the_end(2, work)[0]
    if lost:
        assert isinstance(found, PeerLostError)
        assert found.missing_ranks == (1,)
        assert str(found).startswith("train on rank 0 is broken: Connection closed by peer. No answer from rank 1")
    else:
        assert type(found) is RuntimeError


def test_a_connection_that_is_broken_when_an_operation_begins_is_the_lost_ranks_fault() -> None:
    """Gloo then raises from the call that would begin it; whoever calls it has done nothing wrong."""
    ready, judged = threading.Event(), threading.Event()

    def begin(channel: Channel) -> None:
        raise RuntimeError("[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer. This is typically caused by")

    def work(rank: Rank) -> None:
        queue = rank.queue()
        if rank.rank == 1:
            queue.monitor.close()
            ready.set()
            judged.wait(30)
            return
        ready.wait(30)
        try:
            queue.submit("sum", begin).wait()
        finally:
            judged.set()

    error = run_ranks_to_the_end(2, work)[0]
    assert isinstance(error, PeerLostError)
    assert error.missing_ranks == (1,)
    assert "broken: Connection closed by peer. No answer from rank 1" in str(error)


def test_timeout_must_be_positive() -> None:
    def work(rank: Rank) -> None:
        with pytest.raises(ValueError, match="timeout_s: 0 must be a positive number"):
            rank.queue(timeout_s=0)

    run_ranks(1, work)
