"""benchmarks/: what all of them rest on, without any of their runs."""

from __future__ import annotations

import importlib
import json
import math
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_every_file_is_run_or_is_part_of_one_that_is(benchmarks: Path) -> None:
    scripts = module("run_all_scripts")
    names = [script.name for script in scripts.SCRIPTS]
    assert sorted([*names, *scripts.PARTS]) == sorted(path.stem for path in benchmarks.glob("*.py"))


def test_all_benchmarks_take_less_than_an_hour_and_the_quick_ones_five_minutes(benchmarks: Path) -> None:
    scripts = module("run_all_scripts").SCRIPTS
    assert sum(script.limit_s for script in scripts) <= 3600
    quick = [script.quick_limit_s for script in scripts if script.quick is not None]
    assert min(quick) > 0
    assert sum(quick) <= 300


def test_every_script_knows_the_options_that_it_is_given(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all = module("run_all")
    for script in module("run_all_scripts").SCRIPTS:
        monkeypatch.setattr(sys, "argv", [f"{script.name}.py", "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(benchmarks / f"{script.name}.py"), run_name="__main__")
        help_text = capsys.readouterr().out
        assert ended.value.code == 0
        given = [word for word in (*script.arguments, *(script.quick or ())) if word.startswith("--")]
        for option in ["--json", *given, *(["--plot"] if script.plots else [])]:
            assert option in help_text, (script.name, option)
        assert run_all.claim_of(benchmarks / f"{script.name}.py")


def test_a_script_that_fails_or_takes_too_long_is_named(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_all, scripts = module("run_all"), module("run_all_scripts")
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    (tmp_path / "well.py").write_text('"""Claim: it works."""\n')
    (tmp_path / "ill.py").write_text('"""It fails."""\nraise SystemExit("no such link")\n')
    (tmp_path / "endless.py").write_text('"""It never ends."""\nimport signal\nsignal.pause()\n')
    results = [run_all.run(scripts.Script(name, (), 1.0), (), 1.0, tmp_path) for name in ("well", "ill", "endless")]
    assert [result.claim for result in results] == ["it works.", "It fails.", "It never ends."]
    assert [result.problem for result in results] == [
        "",
        "exit code 1: no such link",
        "stopped: its limit is 1 s",
    ]


def test_out_stands_for_the_folder_of_the_results(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_all, scripts = module("run_all"), module("run_all_scripts")
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    (tmp_path / "told.py").write_text('"""It tells."""\nimport sys\nprint(*sys.argv[1:])\n')
    arguments = ("--keep", scripts.RUNS)
    assert run_all.run(scripts.Script("told", arguments, 10.0), arguments, 10.0, tmp_path).problem == ""
    assert (tmp_path / "told.log").read_text().split()[1] == str(tmp_path / "kept" / "runs.json")


def test_steps_belong_to_the_rate_that_the_links_had_all_the_while(benchmarks: Path) -> None:
    phases = module("lab_phases").Phases(
        [1e7, 1e9], warm_up_steps=2, period=2, settle_steps=1, timed_steps=3, enough_s=9.0
    )
    assert phases.rate_bps == 1e7
    steps = [9.0, 9.0, 9.0, 9.0, 5.0]  # two to warm up, and the first period
    assert not phases.see(steps)
    assert phases.see([*steps, 4.5])  # one period, but it took long enough
    assert (phases.timed, phases.rate_bps) == ({1e7: (4, 6)}, 1e9)
    steps += [4.5, 0.7, 0.1, 0.3, 0.1, 0.3, 0.1]  # the second of these began at the old rate
    assert not phases.see(steps)  # three steps are wanted, and three whole periods
    assert phases.see([*steps, 0.3])
    assert (phases.timed[1e9], phases.rate_bps) == ((7, 13), None)
    assert not phases.see([*steps, 0.3, 1.0])


def test_a_step_takes_the_median_of_whole_periods(benchmarks: Path) -> None:
    steady_step_s = module("lab_phases").steady_step_s
    assert steady_step_s((1.0, 9.0, 2.0), 1) == 2.0
    assert steady_step_s((1.0, 3.0, 1.0, 5.0, 1.0, 7.0, 100.0), 2) == 3.0
    timing = partial(module("lab_runs").Timing, (1.0, 1.0, 1.0, 9.0), 1, {}, 0.0, 0.0)
    assert (timing().seconds, timing(varies=True).seconds) == (1.0, 3.0)


def test_runs_are_kept_and_made_again_only_for_what_is_missing(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lab_runs = module("lab_runs")
    asked = []

    def run(self: object, way: object, machine: object, steps: int, rates: list[float], curve: bool) -> object:
        asked.append((list(rates), curve))
        cores = module("lab_machine").Machine().cores_per_rank
        made = {rate: lab_runs.Timing((0.5, 1.5), 2, {"world": 8.0}, 9.0, 0.1, cores) for rate in rates}
        return lab_runs.Outcome(made, lab_runs.Curve((2.0,), ((1, 1.5),)) if curve else None, (2.0,))

    monkeypatch.setattr(lab_runs.LabRuns, "_run", run)
    path, way, machine = tmp_path / "kept" / "runs.json", lab_runs.Way("one"), module("lab_machine").Machine()
    lab_runs.LabRuns(path).get(way, machine, 10, [1e9])
    again = lab_runs.LabRuns(path)
    outcome = again.get(way, machine, 10, [1e9, 1e8], curve=True)
    assert asked == [([1e9], False), ([1e8], True)]
    assert outcome.timings[1e8].seconds == 1.0
    assert lab_runs.LabRuns(path).known(way, machine, 10) == outcome
    assert lab_runs.LabRuns(path).known(lab_runs.Way("another name"), machine, 10) == outcome
    other = lab_runs.Way("one", ("method.dtype=bf16",))
    assert lab_runs.LabRuns(path).known(other, machine, 10) == lab_runs.Outcome()
    assert lab_runs.LabRuns(path).known(way, machine, 11) == lab_runs.Outcome()
    lab_runs.keep_what_was_learned(path, tmp_path / "other" / "runs.json")
    learned = lab_runs.LabRuns(tmp_path / "other" / "runs.json").known(way, machine, 10)
    assert learned == lab_runs.Outcome({}, outcome.curve, (2.0,))
    elsewhere = replace(machine, places=9)  # hosts with fewer processors: what was learned counts, not the seconds
    assert lab_runs.LabRuns(path).known(way, elsewhere, 10) == lab_runs.Outcome({}, outcome.curve, (2.0,))
    known = lab_runs.LabRuns(path, known_only=True)
    assert known.get(way, machine, 10, [1e8]).error == ""
    assert known.get(way, machine, 10, [1e7]).error == lab_runs.NOT_RUN
    asked.clear()
    varied = lab_runs.LabRuns(path).get(replace(way, label="two", period=4, varies=True), machine, 10, [1e9, 1e8])
    assert asked == [([1e9], False), ([1e8], False)]
    assert sorted(varied.timings) == [1e8, 1e9]
    assert len(asked) == 2


def test_a_run_that_makes_no_progress_ends(benchmarks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lab_runs = module("lab_runs")
    monkeypatch.setattr(lab_runs.LabRuns, "_run", lambda *_: lab_runs.Outcome())
    outcome = lab_runs.LabRuns(tmp_path / "runs.json").get(
        lab_runs.Way("one"), module("lab_machine").Machine(), 3, [1e9]
    )
    assert outcome.error == "the run has too few steps to be timed"


def test_records_are_read_as_they_grow_and_errors_from_the_logs(benchmarks: Path, tmp_path: Path) -> None:
    lab_runs = module("lab_runs")
    path = tmp_path / "metrics.jsonl"
    tail = lab_runs._Tail(path)
    tail.read()
    path.write_text('{"step_s": 1.0}\n{"step_')
    tail.read()
    assert tail.values("step_s") == [1.0]
    path.write_text('{"step_s": 1.0}\n{"step_s": 2.0}\n')
    tail.read()
    assert tail.values("step_s") == [1.0, 2.0]
    (tmp_path / "rank0.log").write_text("started\n")
    assert lab_runs._last_error(tmp_path) == "started"
    (tmp_path / "rank1.log").write_text("Traceback\n  File x\ntorch.Oddity: 1\nRuntimeError: no bf16 here\nended\n")
    assert lab_runs._last_error(tmp_path) == "RuntimeError: no bf16 here"


def test_time_to_the_target_is_steps_times_seconds_and_dense_steps(benchmarks: Path, tmp_path: Path) -> None:
    time_to_loss, lab_runs = module("time_to_loss"), module("lab_runs")
    curve = lab_runs.Curve((), ((5, 4.0), (10, 3.0), (15, 2.0), (20, 1.9)))
    assert time_to_loss.loss_at(curve, 15) == 2.0
    assert time_to_loss.loss_at(curve, 14.9) == 3.0
    assert time_to_loss.steps_to(curve, 2.5) == 12.5
    assert time_to_loss.steps_to(curve, 4.5) == 5
    assert math.isinf(time_to_loss.steps_to(curve, 1.0))
    way = time_to_loss.Contender("new", dense_steps=2)
    result = time_to_loss.Result(way, 12.5, 20, 1.9, {1e8: 0.5}, 3e6)
    assert result.seconds(1e8, dense_s=4.0) == 10.5 * 0.5 + 8.0
    ddp = time_to_loss.Result(time_to_loss.Contender(time_to_loss.DDP), 15, 20, 1.9, {1e8: 4.0}, 2e7)
    never = time_to_loss.Result(time_to_loss.Contender("thinwire x"), math.inf, 20, 2.9, {1e8: 0.1}, 10.0)
    rows = [time_to_loss.row(one, 1e8, 4.0, ddp, 2.0) for one in (ddp, result, never)]
    assert [row["times sooner"] for row in rows] == [1.0, 60 / 13.25, "-"]
    assert json.loads(json.dumps(rows)) == rows
    module("time_to_loss_plot").draw(rows, {"peer": "said no"}, 2.0, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_losses_that_are_not_ddps_are_refused(benchmarks: Path) -> None:
    time_to_loss, lab_runs = module("time_to_loss"), module("lab_runs")
    way = time_to_loss.Contender("torch FSDP2", peer="fsdp2", trains_as=time_to_loss.DDP)
    dense = lab_runs.Outcome(first_losses=(5.0, 4.0, 3.0))
    time_to_loss.check_losses(way, lab_runs.Outcome(first_losses=(5.001, 4.0)), dense)
    with pytest.raises(SystemExit, match=r"torch FSDP2: the loss of step 2 is 4\.1"):
        time_to_loss.check_losses(way, lab_runs.Outcome(first_losses=(5.0, 4.1)), dense)


def test_contenders_have_names_and_settings_of_their_own(benchmarks: Path) -> None:
    ways, config = module("time_to_loss_ways"), module("thinwire.dist.config")
    everyone = [*ways.OURS, *ways.PEERS]
    assert len({way.label for way in everyone}) == len(everyone)
    peers = module("peers.rank").NAMES
    assert {way.peer for way in ways.PEERS} <= set(peers)
    for way in ways.OURS:
        loaded = config.load_config(benchmarks.parent / "configs" / way.config, list(way.overrides))
        assert getattr(loaded.method, "every", way.period) == way.period


def test_environments_are_made_once_and_again_for_other_versions(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environments = module("peers.environments")
    commands: list[list[str]] = []

    def run(command: list[str], name: str) -> str:
        commands.append(command)
        if command[-1].startswith("refused"):
            raise environments.EnvironmentFailedError("refused cannot be installed: no such version")
        (tmp_path / name).mkdir(exist_ok=True)
        return str(tmp_path / name)

    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "_run", run)
    monkeypatch.setattr(environments, "PACKAGES", {"one": ("one==1",), "two": ("refused==2",)})
    assert environments.python_of("") == sys.executable
    python = environments.python_of("one")
    assert python == str(tmp_path / "one" / "bin" / "python")
    made = len(commands)
    assert environments.python_of("one") == python
    assert len(commands) == made
    monkeypatch.setattr(environments, "PACKAGES", {"one": ("one==2",), "two": ("refused==2",)})
    environments.python_of("one")
    assert len(commands) == 2 * made
    for _ in range(2):
        with pytest.raises(environments.EnvironmentFailedError, match="no such version"):
            environments.python_of("two")


def test_a_prediction_of_scaling_takes_the_seconds_that_were_measured(benchmarks: Path) -> None:
    scaling, config = module("scaling"), module("thinwire.dist.config")
    cluster = module("thinwire.dist.plan.cluster")
    probed = cluster.Cluster(
        levels=(cluster.LinkLevel(name="world", size=2, link_bps=1e8),),
        device=cluster.Device(memory_bytes=1e9, peak_flops=1e10),
        measured=cluster.Measured(
            hosts=("a", "b"),
            cores_per_rank=2.0,
            computes=(cluster.ComputeSpeed(config="", micro_batch=4, forward_s=1.0, backward_s=2.0, optimizer_s=1.0),),
        ),
    )
    loaded = config.load_config(scaling.CONFIGS / "demo.yaml", ["train.global_batch=8", "world.threads=1"])
    foretold = module("thinwire.dist.plan.prediction").predict(loaded, scaling.with_compute(probed, loaded, 0.75))
    assert foretold.compute_from == "measured by the probe"
    assert foretold.time.compute_s == pytest.approx(0.75)
    assert foretold.time.step_s > 0.75
