"""`thinwire probe`: who measures with whom, what the figures say, and the file that plan reads."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Rank, run_ranks
from torch_threads import TorchRank, run_torch_ranks
from worlds import close_world, small_config, small_settings, small_text, torch_world

import thinwire as tw
from thinwire.comm.forecast import Coding, Exchange, codec_label
from thinwire.comm.two_shot import TwoShotMean
from thinwire.dist.config import load_config
from thinwire.dist.config_errors import ConfigError
from thinwire.dist.plan.cluster import Cluster, CodecSpeed, LinkLevel, load_cluster
from thinwire.dist.plan.exchange_time import taken_s
from thinwire.dist.plan.prediction import predict
from thinwire.dist.probe import codecs as codecs_module
from thinwire.dist.probe import collectives as collectives_module
from thinwire.dist.probe import probe as probe_module
from thinwire.dist.probe.clock import Lockstep, percentile
from thinwire.dist.probe.collectives import fit
from thinwire.dist.probe.pairs import measure_pairs
from thinwire.dist.probe.probe import Probe, run_probe
from thinwire.dist.probe.records import CollectiveTime, Operation
from thinwire.dist.probe.rounds import circle, pair_rounds
from thinwire.launch.probe import command
from thinwire.launch.probe.plot import draw
from thinwire.launch.probe.tables import print_probe


@pytest.mark.parametrize("players", range(10))
def test_circle_lets_each_meet_every_other_once(players: int) -> None:
    rounds = circle(players)
    assert len(rounds) == (0 if players < 2 else players - 1 + players % 2)
    assert Counter(itertools.chain(*rounds)) == Counter(itertools.combinations(range(players), 2))
    for pairs in rounds:
        busy = list(itertools.chain(*pairs))
        assert len(busy) == len(set(busy))


@pytest.mark.parametrize("hosts", ["abcd", "aabb", "aabbcc", "aaab", "abab", "a", "aaaa", "aabbbc"])
def test_no_link_has_two_pairs_at_a_time(hosts: str) -> None:
    rounds = pair_rounds(hosts, most=1000)
    assert Counter(itertools.chain(*rounds)) == Counter(itertools.combinations(range(len(hosts)), 2))
    for pairs in rounds:
        across = [hosts[rank] for pair in pairs for rank in pair if hosts[pair[0]] != hosts[pair[1]]]
        assert len(across) == len(set(across))
        busy = list(itertools.chain(*pairs))
        assert len(busy) == len(set(busy))


def test_four_hosts_take_three_rounds_and_many_ranks_are_thinned_out() -> None:
    assert len(pair_rounds("abcd", most=1000)) == 3
    hosts = [f"host{i // 4}" for i in range(32)]
    thinned = pair_rounds(hosts, most=20)
    assert len(thinned) == 3 + 7
    across = [pair for pairs in thinned for pair in pairs if hosts[pair[0]] != hosts[pair[1]]]
    assert sorted(across) == [(a, b) for a in range(0, 32, 4) for b in range(a + 4, 32, 4)]


def all_reduce(size_bytes: int, seconds: float) -> CollectiveTime:
    return CollectiveTime(
        operation="all_reduce", level="world", ranks=4, size_bytes=size_bytes, median_s=seconds, p90_s=seconds
    )


def sent_bytes(size_bytes: int) -> int:
    return sum(TwoShotMean(torch.float32).sent_bytes(size_bytes // 4, 0, 4).values())


def test_latency_and_rate_are_found_again() -> None:
    sizes = [4**k for k in range(6, 12)]
    link = fit([all_reduce(size, 2 * 3e-4 + 8 * sent_bytes(size) / 94e6) for size in sizes], sent_bytes)
    assert link.latency_s == pytest.approx(3e-4, rel=1e-9)
    assert link.bps == pytest.approx(94e6, rel=1e-9)
    # What noise makes of a link too fast to be measured: never a negative figure.
    faster_when_larger = fit([all_reduce(4096, 1e-3), all_reduce(16384, 9e-4)], sent_bytes)
    assert faster_when_larger.bps == pytest.approx(8 * sent_bytes(16384) / 9e-4)
    no_latency = fit([all_reduce(4096, 1e-4), all_reduce(65536, 8e-3)], sent_bytes)
    assert no_latency.latency_s == 0
    assert no_latency.bps > 0
    with pytest.raises(ValueError, match="1 sizes"):
        fit([all_reduce(4096, 1e-3)], sent_bytes)


class ForetoldTimes:
    """Stands in for Lockstep: a collective takes as long as an alpha-beta model says. `work` is its size in bytes."""

    device = torch.device("cpu")

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s

    def slowest(self, seconds: float) -> float:
        return seconds

    def time_exchange(self, name: str, work: int, repeats: int) -> list[float]:
        return [self._latency_s + work / self._bytes_per_s] * repeats


@pytest.mark.parametrize(
    ("latency_s", "bytes_per_s", "largest_bytes"),
    [
        (0.03, 3e7, 1 << 22),  # of which four times as much is expected to take 0.6 s
        (0.3, 1e4, 1 << 18),  # long from the first on; from here the slices are exchanged in rounds
        (0.0, 1e12, 1 << 26),
    ],
)
def test_all_reduces_go_on_while_they_are_short(
    latency_s: float, bytes_per_s: float, largest_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives_module, "_exchange", lambda operation, size_bytes, group, device: size_bytes)
    lockstep: Any = ForetoldTimes(latency_s, bytes_per_s)
    times = collectives_module.sweep(lockstep, "world", range(8), 0.0)
    assert max(time.size_bytes for time in times if time.operation == "all_reduce") == largest_bytes
    assert {time.size_bytes for time in times if time.operation != "all_reduce"} == {1 << 12}  # no time was given


@pytest.mark.parametrize(
    ("operation", "bus_share"),
    [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("all_to_all", 0.75)],
)
def test_bus_bandwidth_is_that_of_nccl_tests(operation: Operation, bus_share: float) -> None:
    time = CollectiveTime(operation=operation, level="world", ranks=4, size_bytes=1000, median_s=1e-3, p90_s=2e-3)
    assert time.algorithm_bps == pytest.approx(8e6)
    assert time.bus_bps == pytest.approx(8e6 * bus_share)


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [float(n) for n in range(1, 11)]
    assert [percentile(values, share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)] == [1, 1, 5, 9, 10]
    assert percentile([7.0], 0.9) == 7


@pytest.mark.parametrize("hosts", ["ab", "aab"])
def test_pairs_fill_the_matrix(hosts: str) -> None:
    def work(rank: Rank) -> Any:
        with_queue = rank.queue()
        pairs = measure_pairs(Lockstep(with_queue, torch.device("cpu")), hosts, 0.05)
        with_queue.close()
        return pairs

    found = run_ranks(len(hosts), work)
    assert all(pairs == found[0] for pairs in found)
    for matrix in (found[0].bps, found[0].latency_s):
        for a, row in enumerate(matrix):
            for b, value in enumerate(row):
                assert (value is None) == (a == b)
                assert value is None or 0 < value < math.inf


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Probe, Path]:
    """A probe of two hosts of two ranks that are threads, and the run that it was made for."""
    folder = tmp_path_factory.mktemp("probed")
    small_text()
    method = "method={kind: compress, compressor: {kind: topk, density: 0.125}, clip: after}"
    config = small_config(folder, method)

    def work(rank: TorchRank) -> Probe | None:
        world = torch_world(rank)
        found = run_probe(world, config, 0.5)
        close_world(world)
        return found if rank.rank == 0 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_module, "EVERY", (codec_label(tw.Int8()),))
        patch.setattr(codecs_module, "_BLOCK_S", 1e-3)
        found = run_torch_ranks([2, 4], work, names=["node", "world"])[0]
    assert found is not None
    return found, folder


def test_a_probe_is_a_cluster_that_plan_reads(probed: tuple[Probe, Path]) -> None:
    found, folder = probed
    path = folder / "probe.json"
    command.write(found, path)
    cluster = load_cluster(path)
    assert cluster == found.cluster
    assert [(level.name, level.size, level.ranks_per_link) for level in cluster.levels] == [
        ("node", 2, 1),
        ("world", 4, 2),
    ]
    measured = cluster.measured
    assert measured is not None
    assert len(measured.hosts) == 4
    assert measured.cores_per_rank > 0
    assert measured.cpu_s_per_byte >= 0
    assert measured.drift is not None
    assert set(measured.codecs) == {'{"kind": "int8"}', '{"density": 0.125, "kind": "topk"}'}
    assert {(time.operation, time.level) for time in measured.collectives} == set(
        itertools.product(("all_reduce", "all_gather", "reduce_scatter", "all_to_all"), ("node", "world"))
    )
    config = small_config(folder)
    prediction = predict(config, cluster)
    assert prediction.compute_from == "measured by the probe"
    (speed,) = measured.computes
    assert speed.micro_batch == 2
    assert prediction.time.compute_s == pytest.approx(speed.forward_s + speed.backward_s + speed.optimizer_s)
    other = predict(small_config(folder, "model.width=64"), cluster)
    assert other.compute_from.startswith("counted operations at")


def test_a_probe_is_shown(probed: tuple[Probe, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found, folder = probed
    print_probe(found)
    said = capsys.readouterr().out
    for part in ("bandwidth from rank", "all_reduce", "topk density=0.125", "one micro-batch of 2", "cores per rank"):
        assert part in said
    assert "\r" not in said
    draw(found.cluster, folder / "probe.png")
    assert (folder / "probe.png").read_bytes().startswith(b"\x89PNG")


HOSTILE = [
    (("levels", 1, "link_bps"), float("inf"), "levels"),
    (("levels", 0, "link_bps"), 0, "levels"),
    (("levels", 1, "latency_s"), -1e-3, "latency_s"),
    (("device", "peak_flops"), float("nan"), "peak_flops"),
    (("measured", "hosts"), ["a"], "measured.hosts"),
    (("measured", "cpu_s_per_byte"), -1, "cpu_s_per_byte"),
    (("measured", "drift"), -1, "drift: -1 cannot be used; give a number or null above -1"),
    (("measured", "computes", 0, "forward_s"), "soon", "forward_s"),
    (("measured", "pairs", "bps"), [[1.0]], "measured.pairs"),
    (("measured", "collectives", 0, "operation"), "gossip", "operation"),
    (("measured", "unknown"), 1, "unknown"),
]


@pytest.mark.parametrize(("place", "value", "said"), HOSTILE)
def test_a_damaged_probe_is_refused(
    probed: tuple[Probe, Path], tmp_path: Path, place: tuple[str | int, ...], value: object, said: str
) -> None:
    data = json.loads(probed[0].cluster.model_dump_json())
    node: Any = data
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=said):
        load_cluster(path)


def test_half_a_file_is_refused(probed: tuple[Probe, Path], tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    path.write_text(probed[0].cluster.model_dump_json()[:500])
    with pytest.raises(ConfigError, match=r"half\.json: not valid JSON"):
        load_cluster(path)


@pytest.mark.parametrize(
    ("drift", "said"), [(None, ""), (0.09, ""), (-0.09, ""), (0.25, "were 25% faster"), (-0.25, "were 25% slower")]
)
def test_a_machine_whose_speed_changes_is_named(
    probed: tuple[Probe, Path], drift: float | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, folder = probed
    assert found.cluster.measured is not None
    measured = found.cluster.measured.model_copy(update={"drift": drift})
    cluster = found.cluster.model_copy(update={"measured": measured})
    remarks = [one for one in predict(small_config(folder), cluster).remarks if "matrix products" in one]
    assert len(remarks) == bool(said)
    assert all(said in one for one in remarks)
    print_probe(Probe(cluster, {}, tuple(measured.remarks)))
    shown = " ".join(capsys.readouterr().out.split())
    assert ("from the probe's beginning to its end" in shown) == (drift is not None)
    assert said in shown


def test_the_drift_is_that_of_the_matrix_products(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the first and the last measurement, whatever the machine does here."""
    speeds = {rank: iter((4e9, 3e9)) for rank in range(2)}

    def work(rank: TorchRank) -> Cluster:
        world = torch_world(rank)
        found = run_probe(world, None, 0.1)
        close_world(world)
        return found.cluster

    monkeypatch.setattr(probe_module, "measure_flops", lambda lockstep, seconds: next(speeds[lockstep.queue.rank]))
    monkeypatch.setattr(probe_module, "EVERY", ())
    for cluster in run_torch_ranks([2], work):
        assert cluster.measured is not None
        assert cluster.measured.drift == pytest.approx(-0.25)
        assert cluster.device.peak_flops == pytest.approx(3.5e9)
        assert cluster.device.utilisation == 0.4


def test_at_another_number_of_ranks_nothing_is_measured(probed: tuple[Probe, Path]) -> None:
    cluster: Cluster = probed[0].cluster
    assert cluster.at(4).measured == cluster.measured
    assert cluster.at(8).measured is None


def test_alone_there_is_nothing_to_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.probe(None, [], seconds=1, json_path=tmp_path / "a.json", plot=None) == 2
    assert "no link to measure" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()
    assert command.probe(None, [], seconds=1, json_path=tmp_path / "no" / "a.json", plot=None) == 2
    assert "there is no folder" in capsys.readouterr().err


MEASURED = LinkLevel(
    name="world", size=4, link_bps=1e6, latency_s=1e-3, shots=((100, 2e-3), (1000, 4e-3), (10_000, 40e-3))
)


@pytest.mark.parametrize(
    ("sent_bytes", "shots", "seconds"),
    [
        (0, 1, 2e-3),
        (50, 1, 2e-3),
        (100, 1, 2e-3),
        (550, 1, 3e-3),
        (1100, 2, 2 * 3e-3),  # two shots of half the bytes
        (10_000, 1, 40e-3),
        (20_000, 1, 80e-3),
    ],
)
def test_what_was_measured_takes_the_place_of_rate_and_latency(sent_bytes: int, shots: int, seconds: float) -> None:
    assert MEASURED.send_s(sent_bytes, shots) == pytest.approx(seconds)


def test_measured_links_of_another_rate() -> None:
    assert MEASURED.with_rate(1e6) == MEASURED
    half = MEASURED.with_rate(0.5e6)
    assert half.link_bps == 0.5e6
    assert half.send_s(1000, 1) == pytest.approx(1e-3 + 2 * 3e-3)
    with pytest.raises(ValueError, match="bytes must ascend"):
        LinkLevel(name="world", size=4, link_bps=1e6, shots=((100, 2e-3), (100, 4e-3)))


def test_processors_that_ranks_share(probed: tuple[Probe, Path]) -> None:
    """What an exchange takes from computing, where there is no second processor for its bytes and its coding."""
    cluster = probed[0].cluster
    assert cluster.measured is not None
    speeds = {"c": CodecSpeed(encode_s=1e-6, decode_s=2e-6, encode_call_s=0.25e-3, decode_call_s=0.25e-3)}
    exchange = Exchange("x", {"world": 1000}, 3, {"world": 1}, "backward", coding=(Coding("c", 1000, 500, 1, 3),))
    for cores, lost in ((0.5, 1.0), (1.0, 1.0), (1.5, 1 / 3), (2.0, 0.0), (8.0, 0.0)):
        update = {"cores_per_rank": cores, "cpu_s_per_byte": 1e-7, "codecs": speeds}
        measured = cluster.measured.model_copy(update=update)
        taken = taken_s(exchange, cluster.model_copy(update={"measured": measured}))
        assert taken == pytest.approx(lost * (1000 * 1e-7 + 3e-3))
    assert taken_s(exchange, cluster.model_copy(update={"measured": None})) == 0


def test_forward_passes_alone_foretell_no_training(probed: tuple[Probe, Path]) -> None:
    found, folder = probed
    assert found.cluster.measured is not None
    (speed,) = found.cluster.measured.computes
    assert 0 < speed.forward_alone_s < speed.forward_s + speed.backward_s
    forward_only = speed.model_copy(
        update={"forward_s": 0.25, "backward_s": 0.0, "optimizer_s": 0.0, "forward_alone_s": 0.25}
    )
    measured = found.cluster.measured.model_copy(update={"computes": (forward_only,)})
    cluster = found.cluster.model_copy(update={"measured": measured})
    assert predict(small_config(folder), cluster).compute_from.startswith("counted operations at")
    settings = small_settings(folder) | {"method": {"kind": "onebyte"}}
    del settings["optimizer"]  # of the same kind where none is given
    (folder / "one_byte.yaml").write_text(yaml.safe_dump(settings))
    one_byte = predict(load_config(folder / "one_byte.yaml"), cluster)
    assert one_byte.compute_from == "measured by the probe"
    assert one_byte.time.compute_s >= 2 * 0.25
    by_training = predict(load_config(folder / "one_byte.yaml"), found.cluster)
    passes_s = 2 * (0.25 - speed.forward_alone_s)
    assert one_byte.time.compute_s - by_training.time.compute_s == pytest.approx(passes_s)
