"""dist/probe/codecs.py and wires.py: what is timed, by labels that forecasts know."""

from __future__ import annotations

import json

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn

from thinwire.comm.forecast import Coding, codec_label, seat_of
from thinwire.comm.gossip.forecast import HANDLING, forecast_gossip
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.partition.forecast import forecast_partition
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.traffic import unit_shapes
from thinwire.comm.partition.wires.gradients import Int4Gradients, PlainGradients
from thinwire.comm.partition.wires.label import Use, wire_label, wire_of
from thinwire.comm.partition.wires.weights import Int8Weights, SameWeights, WeightDifferences
from thinwire.comm.settings import Settings
from thinwire.dist.plan.cluster import CodecSpeed
from thinwire.dist.probe import gossip_round, wires
from thinwire.dist.probe.clock import Lockstep
from thinwire.dist.probe.codecs import COMPRESSORS, EVERY, compressor_of, measure_codecs
from thinwire.dist.probe.gossip_round import measure_round


def test_every_label_of_a_compressor_names_it_and_others_name_none() -> None:
    assert [compressor_of(codec_label(compressor)) for compressor in COMPRESSORS] == list(COMPRESSORS)
    assert set(EVERY) >= {'{"kind": "int4"}', '{"kind": "bf16"}'}
    assert compressor_of('{"kind": "something"}') is None
    assert compressor_of("no JSON") is None


def test_formats_of_partition_have_labels_of_their_own() -> None:
    given: list[tuple[Use, Settings]] = [
        ("gradients", Int4Gradients(rounding="stochastic")),
        ("gradients", PlainGradients(kind="bf16")),
        ("update", WeightDifferences(bits=8)),
        ("gather", Int8Weights()),
    ]
    for use, settings in given:
        label = wire_label(use, settings)
        assert compressor_of(label) is None
        assert wire_of(label) == (use, settings)
    for other in ('{"kind": "int4"}', '{"kind": "int4", "of": "nothing"}', '{"of": "update"}', "[]", "no JSON"):
        assert wire_of(other) is None


@pytest.mark.parametrize(
    "label",
    [*wires.EVERY, wire_label("gradients", PlainGradients(kind="bf16")), wire_label("gather", Int8Weights())],
)
def test_formats_of_partition_are_timed_as_they_are_used(label: str) -> None:
    works = wires.works_of(label, 4096, 4, torch.device("cpu"))
    assert works is not None
    encode, decode = works
    payload = encode()
    assert isinstance(payload, torch.Tensor)
    assert 0 < payload.nbytes < 4 * 4096
    decode()


def test_what_partition_codes_is_named_as_a_probe_times_it() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 5))
    given = {
        "params": "rank",
        "grads": "rank",
        "optim": "world",
        "gradients": {"world": {"kind": "int4", "rounding": "stochastic"}},
        "update": {"kind": "difference", "bits": 4},
    }
    forecast = forecast_partition(
        PartitionSettings.model_validate(given),
        unit_shapes(model, [model[0]]),
        seat_of([("world", 3)], 0),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        names={id(p): name for name, p in model.named_parameters()},
    )
    codings = [exchange.coding for exchange in forecast.exchanges]
    assert {handling.codec for handling, _ in codings} == {'{"kind": "none"}'}
    assert {coding.codec for _, coding in codings} <= set(wires.EVERY)
    assert {tuple(json.loads(coding.codec)[key] for key in ("of", "kind")) for _, coding in codings} == {
        ("gradients", "int4"),
        ("update", "difference"),
    }


def test_a_round_of_gossip_is_timed_with_one_neighbour_and_by_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossip_round, "_LARGE", 1 << 16)
    (speed, _) = run_ranks(2, lambda rank: measure_round(Lockstep(rank.queue(), torch.device("cpu"))))
    assert speed.handle_s >= speed.decode_s > 0
    assert speed.handle_call_s > 0
    assert (speed.encode_s, speed.encode_call_s) == (0, 0)
    assert HANDLING in EVERY
    seat = seat_of([("world", 4)], 0)
    for graph, messages in (("matching", 1), ("complete", 3)):
        forecast = forecast_gossip(GossipSettings.model_validate({"graph": graph}), [1000], seat, steps=3)
        codings = [coding for exchange in forecast.exchanges for coding in exchange.coding]
        more = (messages - 1) * 1000
        assert codings == [Coding(HANDLING, 0, more, 0, messages - 1, handled=1000)]


def test_what_no_probe_can_time_is_left_out_of_the_speeds() -> None:
    labels = [wires.EVERY[-1], '{"kind": "none"}', '{"kind": "something"}', wire_label("update", SameWeights())]

    def work(rank: Rank) -> dict[str, CodecSpeed]:
        return measure_codecs(Lockstep(rank.queue(), torch.device("cpu")), labels)

    for found in run_ranks(2, work):
        assert list(found) == labels[:2]
        assert found[labels[0]].encode_s > 0
        assert found[labels[0]].handle_s == 0  # which the codec "none" has for all of partition's flows
