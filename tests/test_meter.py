"""TrafficMeter: bytes go to the level that joins the two ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from thinwire.comm.meter import TrafficMeter

LEVELS = ["self", "pair", "node", "node", "world", "world"]
peers = st.dictionaries(st.integers(1, 5), st.integers(0, 1 << 40))
calls = st.lists(st.tuples(st.sampled_from(["a/x", "a/y", "b"]), peers, peers, st.floats(0, 10)))


@given(calls)
def test_totals_by_level_and_operation_are_sums_of_what_was_recorded(recorded) -> None:
    meter = TrafficMeter(LEVELS)
    for operation, sent, received, seconds in recorded:
        meter.record(operation, sent, received, seconds)
    for prefix in ("", "a/", "a/x", "b", "none"):
        expected: dict[str, list[int]] = {}
        for operation, sent, received, _ in recorded:
            if operation.startswith(prefix):
                for peer in {*sent, *received}:
                    total = expected.setdefault(LEVELS[peer], [0, 0])
                    total[0] += sent.get(peer, 0)
                    total[1] += received.get(peer, 0)
        assert meter.sent_bytes(prefix) == {level: total[0] for level, total in expected.items()}
        assert meter.received_bytes(prefix) == {level: total[1] for level, total in expected.items()}


def test_a_snapshot_is_plain_data_with_calls_and_seconds() -> None:
    meter = TrafficMeter(LEVELS)
    meter.record("a", {1: 10, 4: 20, 5: 5}, {2: 7}, 0.5)
    meter.record("a", {4: 1}, {4: 2}, 0.25)
    snapshot = meter.snapshot()
    assert snapshot["levels"] == {
        "pair": {"sent_bytes": 10, "received_bytes": 0},
        "node": {"sent_bytes": 0, "received_bytes": 7},
        "world": {"sent_bytes": 26, "received_bytes": 2},
    }
    assert snapshot["operations"]["a"]["world"] == {
        "calls": 2,
        "sent_bytes": 26,
        "received_bytes": 2,
        "seconds": 0.75,
    }
