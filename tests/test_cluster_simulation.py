"""Simulated clusters: equal to the timeline where nothing disturbs them, and to theory where something does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner
from worlds import small_settings

from thinwire.comm.forecast import Exchange, Forecast
from thinwire.comm.gossip.forecast import forecast_gossip
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.dist.cluster_simulation.disturbances import Disturbances
from thinwire.dist.cluster_simulation.neighbours import sources_of, with_neighbours
from thinwire.dist.cluster_simulation.ranks import Ranks, distinct_ranks, every_rank
from thinwire.dist.cluster_simulation.restarts import Recovery, complete
from thinwire.dist.cluster_simulation.run import simulate_run
from thinwire.dist.cluster_simulation.scaling import all_counts
from thinwire.dist.cluster_simulation.steps import Steps
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.exchange_time import ComputeTime
from thinwire.dist.plan.prediction import predict, subject_of
from thinwire.dist.plan.program import Program, Send, Wait, Work, build_program
from thinwire.dist.plan.timeline import step_time
from thinwire.dist.plan.trace import StepTrace
from thinwire.dist.simulate import Circumstances, SimulatedRun
from thinwire.launch.cli import app

TRACE = StepTrace(
    forward_flops=3,
    backward_flops=6,
    ready=(("c", 0.25), ("b", 0.5), ("a", 1.0)),
    activation_bytes=0,
    used=(("a", 0.0), ("b", 0.375), ("c", 0.75)),
)
COMPUTE = ComputeTime(forward_s=1.0, backward_s=2.0, optimizer_s=0.25)


def cluster_of(*sizes: int) -> Cluster:
    levels = [
        {"name": name, "size": size, "link_bps": rate, "latency_s": 0.001}
        for name, size, rate in zip(("pair", "node", "world"), sizes, (64e6, 32e6, 8e6), strict=False)
    ]
    return Cluster.model_validate({"levels": levels, "device": {"memory_bytes": 1e9, "peak_flops": 1e9}})


def exchange(
    name: str, when: Any, needs: str = "", per_step: float = 1.0, queue: str = "main", **sent: int
) -> Exchange:
    levels = sent or {"world": 300_000}
    return Exchange(name, levels, 1, dict.fromkeys(levels, 2), when, tuple(needs), per_step, queue=queue)


BUCKETS = (exchange("b0", "backward", "c"), exchange("b1", "backward", "ba", world=900_000, node=40_000))
SHARDED = (
    *(exchange("gather", "gather", name, 4, "inside", node=1_000_000) for name in "abc"),
    exchange("gather", "gather", "a", 1, "inside", pair=5_000_000),
    *(exchange("sum", "backward", name, 2, "inside", pair=1_500_000) for name in "cba"),
    *(exchange("sum", "backward", name, 1, "main", world=100_000) for name in "cba"),
    exchange("update", "step", world=70_000),
)
FORECASTS = {
    "none": (),
    "buckets": BUCKETS,
    "sharded": SHARDED,
    "every fourth step": (*BUCKETS, exchange("outer", "step", per_step=0.25)),
    "beside": (exchange("swap", "beside", world=6_000_000), exchange("swap", "beside")),
    "beside, now and then": (exchange("swap", "beside", per_step=0.2, world=6_000_000), exchange("sync", "step")),
}


@pytest.mark.parametrize("name", FORECASTS)
@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("coupled_s", [0.0, 0.125])
def test_equals_the_timeline_where_nothing_disturbs_it(name: str, prefetch: int, coupled_s: float) -> None:
    cluster, forecast = cluster_of(2, 4, 8), Forecast(FORECASTS[name])
    compute = replace(COMPUTE, coupled_s=coupled_s)
    options: dict[str, Any] = {"micro_batches": 2, "prefetch": prefetch}
    told = step_time(forecast, TRACE, compute, cluster, **options)
    program = build_program(forecast, TRACE, compute, cluster, **options)
    for ranks in (every_rank(cluster), distinct_ranks(cluster, [])):
        steps = Steps(program, ranks, Disturbances())
        ended = [steps.next().ended_s for _ in range(60)]
        assert ended[-1] == pytest.approx(np.full(len(ranks), ended[-1][0]), rel=1e-12)
        mean_s = (ended[-1][0] - ended[19][0]) / 40  # whole periods of 4 and 5 steps
        assert mean_s == pytest.approx(told.step_s, rel=1e-9)


def test_a_slow_rank_slows_all_as_if_all_were_slow() -> None:
    cluster, forecast = cluster_of(2, 4, 8), Forecast(BUCKETS)
    program = build_program(forecast, TRACE, COMPUTE, cluster, micro_batches=1)
    steps = Steps(program, every_rank(cluster), Disturbances(slow={5: 3.0}))
    slow = ComputeTime(3.0, 6.0, 0.75)
    last, outcome = steps.next(), steps.next()
    took_s = outcome.ended_s[5] - last.ended_s[5]
    assert took_s == pytest.approx(step_time(forecast, TRACE, slow, cluster, micro_batches=1).step_s, rel=1e-12)
    assert int(np.argmin(outcome.others_s)) == 5
    assert outcome.computed_s == pytest.approx(3.25 * np.array([1, 1, 1, 1, 1, 3, 1, 1]))
    # What it does not compute, it waits.
    assert outcome.others_s[0] + outcome.wire_s[0] == pytest.approx(outcome.ended_s[0] - last.ended_s[0] - 3.25)


def test_a_level_waits_only_for_its_own_group() -> None:
    cluster = cluster_of(2, 4, 8)
    program = build_program(
        Forecast((exchange("sum", "backward", node=4_000),)), TRACE, COMPUTE, cluster, micro_batches=1
    )
    outcome = Steps(program, every_rank(cluster), Disturbances(slow={1: 2.0})).next()
    sending_s = 4_000 * 8 / 32e6 + 0.002
    assert outcome.ended_s == pytest.approx(
        [6.0 + sending_s + o for o in (0.25, 0.5, 0.25, 0.25)] + [3.25 + sending_s] * 4
    )


@pytest.mark.parametrize("slow", [{0: 2.0}, {7: 1.5, 8: 1.5}, {3: 2.0, 20: 4.0, 47: 0.5}])
def test_few_ranks_stand_for_many(slow: dict[int, float]) -> None:
    cluster = cluster_of(2, 8, 48)
    program = build_program(Forecast(SHARDED), TRACE, COMPUTE, cluster, micro_batches=2)
    every, few = every_rank(cluster), distinct_ranks(cluster, slow)
    assert len(few) < 20
    assert few.stands_for.sum() == 48
    of_all, of_few = (Steps(program, ranks, Disturbances(slow=slow)) for ranks in (every, few))
    for _ in range(3):
        all_outcome, few_outcome = of_all.next(), of_few.next()
        for name in ("ended_s", "computed_s", "others_s", "wire_s"):
            whole, part = getattr(all_outcome, name), getattr(few_outcome, name)
            assert (whole[few.numbers] == part).all(), name
            assert (part * few.stands_for).sum() == pytest.approx(whole.sum()), name


def test_tens_of_thousands_of_equal_ranks_are_few() -> None:
    assert len(distinct_ranks(cluster_of(2, 8, 65_536), {40_000})) == 1 + 1 + 1 + 1 + 1 - 1


BARRIER = Program((Work(1.0), Send(0, "barrier", "main", 0.0, "world", 0), Wait(0)), 1.0)


def mean_step(ranks: Ranks, jitter: float, steps: int) -> float:
    run = Steps(BARRIER, ranks, Disturbances(jitter=jitter, seed=1))
    return float([run.next() for _ in range(steps)][-1].ended_s[0]) / steps


def test_two_ranks_wait_for_the_later_of_them() -> None:
    """E max of two log-normals of mean 1 is 2 Phi(sigma / sqrt 2)."""
    sigma = math.sqrt(math.log1p(0.3**2))
    expected = 1 + math.erf(sigma / 2)
    assert mean_step(every_rank(cluster_of(1, 1, 2)), 0.3, 1500) == pytest.approx(expected, rel=0.015)


def test_many_ranks_wait_for_the_last() -> None:
    """E max of n is the integral of 1 - F^n."""
    sigma, count = math.sqrt(math.log1p(0.1**2)), 512
    times = np.linspace(0, 3, 200_001)
    phi = np.array(
        [0.5 * math.erfc(-(math.log(t) + sigma**2 / 2) / sigma / math.sqrt(2)) if t else 0.0 for t in times[::50]]
    )
    expected = float(np.trapezoid(1 - phi**count, times[::50]))
    assert mean_step(every_rank(cluster_of(2, 8, count)), 0.1, 150) == pytest.approx(expected, rel=0.01)


def test_failures_cost_what_theory_says() -> None:
    """Daly 2006: M e^(R/M) (e^((tau + C)/M) - 1) from one checkpoint to the next."""
    recovery = Recovery(every_steps=10, checkpoint_s=2.0, restart_s=5.0)
    between_s = 40.0
    done = complete([1.0, 3.0], 40_000, recovery, failures_per_s=1 / between_s, seed=3)
    segment_s = between_s * math.exp(5 / between_s) * (math.exp((20 + 2) / between_s) - 1)
    assert done.seconds / 4_000 == pytest.approx(segment_s, rel=0.02)
    assert done.steps_s == 80_000
    assert done.checkpoints_s == pytest.approx(2.0 * 3_999)
    assert done.seconds == pytest.approx(done.steps_s + done.checkpoints_s + done.lost_s)
    assert complete([1.0, 3.0], 7, Recovery(), failures_per_s=0.0, seed=0).seconds == 13.0
    with pytest.raises(ValueError, match="checkpoint more often"):
        complete([1.0], 10_000, Recovery(), failures_per_s=0.01, seed=0)


def config_of(folder: Path, **other: Any) -> RunConfig:
    settings = small_settings(folder) | other
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return load_config(file)


def gossip(folder: Path, **method: Any) -> RunConfig:
    train = {"steps": 20, "global_batch": 16, "eval_windows": 8}
    return config_of(folder, train=train, method={"kind": "gossip", "graph": "ring", "probes": 0} | method)


def test_lateness_goes_from_neighbour_to_neighbour(tmp_path: Path) -> None:
    config = gossip(tmp_path)
    program = with_neighbours(Program((Work(1.0), Send(0, "gossip", "main", 0.5, "world", 0), Wait(0)), 1.0))
    steps = Steps(
        program, every_rank(cluster_of(1, 1, 8)), Disturbances(slow={0: 11.0}), sources=sources_of(config, 8, 10)
    )
    assert list(steps.next().ended_s) == [11.0, 11.5, 1.5, 1.5, 1.5, 1.5, 1.5, 11.5]
    assert list(steps.next().ended_s) == [22.0, 22.5, 13.0, 3.0, 3.0, 3.0, 13.0, 22.5]


def test_agrees_with_the_scripts_of_real_machines(tmp_path: Path) -> None:
    """`thinwire simulate --hosts` lets the machines' own scripts send and wait; a slow one, one peer at a time."""
    config = config_of(
        tmp_path,
        train={"steps": 6, "global_batch": 16, "eval_windows": 0},
        method={"kind": "gossip", "graph": "one_peer_exponential", "probes": 0},
    )
    slow = {2: 3.0}
    real = SimulatedRun(config, Circumstances(8, compute_s=0.1, rate_bps=2e6, delay_s=0.01, slow=slow, scored=1))
    real.run()
    level = {"name": "world", "size": 8, "link_bps": 2e6, "latency_s": 0.01}
    cluster = Cluster.model_validate({"levels": [level], "device": {"memory_bytes": 1, "peak_flops": 1}})
    assert isinstance(config.method, GossipSettings)
    forecast = forecast_gossip(config.method, [real.numel], cluster.seat(), steps=6)
    program = build_program(forecast, TRACE, ComputeTime(0.03, 0.07, 0.0), cluster, micro_batches=1)
    sources = sources_of(config, 8, real.numel)
    steps = Steps(with_neighbours(program), every_rank(cluster), Disturbances(slow=slow), sources=sources)
    simulated = [steps.next().ended_s for _ in range(6)][-1]
    ratios = np.array([machine.ended_s for machine in real.machines]) / simulated
    assert np.median(ratios) == pytest.approx(1.0, abs=0.01)
    assert ratios == pytest.approx(1.0, abs=0.1)  # messages that meet on one line wait for each other


def test_survivors_wait_once(tmp_path: Path) -> None:
    config = gossip(tmp_path)
    program = with_neighbours(Program((Work(1.0), Send(0, "gossip", "main", 0.0, "world", 0), Wait(0)), 1.0))
    disturbances = Disturbances(failures_per_device_hour=3600 / 20, seed=4)
    ranks = every_rank(cluster_of(1, 1, 8))
    failing = disturbances.failing_s(ranks)
    first = int(np.argmin(failing))
    steps = Steps(program, ranks, disturbances, sources=sources_of(config, 8, 10), lost_after_s=100.0)
    while steps.alive[first]:
        outcome = steps.next()
    neighbour = (first + 1) % 8
    assert outcome.ended_s[neighbour] == pytest.approx(failing[first] + 100.0)


@pytest.mark.parametrize(
    "method", [{"kind": "allreduce"}, {"kind": "gossip", "graph": "ring"}, {"kind": "gossip", "algorithm": "ad_psgd"}]
)
def test_runs_of_real_configurations(tmp_path: Path, method: dict[str, Any]) -> None:
    config = config_of(tmp_path, method=method, train={"steps": 20, "global_batch": 16, "eval_windows": 8})
    cluster = cluster_of(1, 2, 8)
    subject = subject_of(config, 8)
    prediction = predict(config, cluster, subject)
    numel = sum(parameter.numel for parameter in subject.parameters)
    calm = simulate_run(prediction, Disturbances(), Recovery(), numel=numel, simulated=20)
    assert calm.mean_step_s == pytest.approx(prediction.time.step_s, rel=0.05 if method["kind"] == "gossip" else 1e-9)
    slow = simulate_run(prediction, Disturbances(slow={3: 50.0}), Recovery(), numel=numel, simulated=20)
    if method.get("algorithm") == "ad_psgd":  # nobody waits, and the run ends with the first
        assert slow.mean_step_s == pytest.approx(calm.mean_step_s)
        assert slow.others_s == pytest.approx(0.0, abs=1e-12)
        assert slow.sequences < calm.sequences
    else:
        assert slow.waited_for[0] == 3
        assert slow.mean_step_s > calm.mean_step_s


def run_cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_command(tmp_path: Path) -> None:
    config_of(tmp_path, train={"steps": 200, "global_batch": 16, "eval_windows": 8}, checkpoint={"every_steps": 10})
    levels = [{"name": "node", "size": 2, "link_bps": 1e9}, {"name": "world", "size": 8, "link_bps": 1e7}]
    described = {"levels": levels, "device": {"memory_bytes": 2e5, "peak_flops": 1e9}, "jitter": 0.1}
    cluster = tmp_path / "here.yaml"
    cluster.write_text(yaml.safe_dump(described))
    asked = [tmp_path / "run.yaml", "--cluster", cluster]
    result = run_cli(
        *asked, "--scale", "all", "--steps", 10, "--slow", "3=2", "--failures", 10,
        "--json", tmp_path / "all.json", "--plot", tmp_path / "all.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for part in (
        "weak scaling",
        "rank 3 2 times slower",
        "waited for: rank 3",
        "2 devices have no rank 3",
        "would need",
    ):
        assert part in result.output
    points = json.loads((tmp_path / "all.json").read_text())["points"]
    assert [point["ranks"] for point in points] == [2, 4, 8]
    assert points[0]["efficiency"] == 1
    assert all(point["step_s"] >= point["foretold_step_s"] for point in points)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        ([*asked, "--hosts", 4], "give --hosts N"),
        ([asked[0]], "give --hosts N"),
        ([*asked, "--kill", "1=2"], "--kill says nothing with --cluster"),
        ([asked[0], "--hosts", 4, "--jitter", 0.1], "--jitter says nothing with --hosts"),
        ([*asked, "--scale", "3"], "3 ranks do not fill groups of 2"),
        ([*asked, "--scale", "some"], "--scale: 'some'"),
        ([*asked, "--slow", "8=2"], "the ranks are 0..7"),
        ([*asked, "--jitter", -1], "--jitter: -1"),
        ([*asked, "--scale", "12", "--strong"], "cannot be shared equally by 12 ranks"),
        ([*asked, "--plot", tmp_path / "no" / "x.png"], "there is no folder"),
        ([asked[0], "--cluster", tmp_path / "none.yaml"], "there is no such file"),
    ):
        result = run_cli(*wrong)
        assert (result.exit_code, message in result.output) == (2, True), (wrong, result.output)


def test_all_counts() -> None:
    assert all_counts(cluster_of(2, 8, 384)) == [8, 16, 32, 64, 128, 256, 384]
    assert all_counts(
        Cluster.model_validate(
            {"levels": [{"name": "world", "size": 4, "link_bps": 1e9}], "device": {"memory_bytes": 1, "peak_flops": 1}}
        )
    ) == [1, 2, 4]
