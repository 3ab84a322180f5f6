"""thinwire plan: what it compares, recommends and refuses, and that it takes every configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from thinwire.dist.config import ConfigError, RunConfig, load_config
from thinwire.dist.models import build_model
from thinwire.dist.plan import compare as compare_module
from thinwire.dist.plan.candidates import candidates_for
from thinwire.dist.plan.cluster import Cluster, load_cluster
from thinwire.dist.plan.compare import Comparison, compare, crossing
from thinwire.dist.plan.forecasts import Subject
from thinwire.dist.plan.prediction import compute_digest, predict, subject_of
from thinwire.dist.plan.steps_factor import StepsTable, includes, load_steps_table, steps_factor
from thinwire.dist.plan.trace import StepTrace
from thinwire.launch.plan import plan

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CLUSTERS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))
SMALL = ROOT / "configs" / "gpt_0.8m.yaml"
BOXES = ROOT / "configs" / "clusters" / "four_boxes_1gbit.yaml"
# Why a configuration cannot be planned on a cluster: the reasons that there may be.
REASONS = (
    "sequences cannot be shared equally",
    "addresses, but the cluster has",
    "holds no config.json",
    "but the machines are",
    "disconnected: no rates",
    "the run gives node of 2 ranks",
)


configuration = cache(load_config)


@cache
def model_of(model: str, tokenizer: str) -> nn.Module:
    config = load_config(SMALL, [f"model={model}", f"data.tokenizer={tokenizer}"])
    return build_model(config.model, tokenizer_vocab=256, seed=0, device=torch.device("meta"))


def forged(config: RunConfig, ranks: int) -> Subject:
    """A subject as subject_of() makes it, with a trace that is made up: gradients come in the reverse order."""
    config.train.share(ranks)
    if config.model.kind == "hf":
        return subject_of(config, ranks)
    model = model_of(json.dumps(config.model.model_dump(mode="json")), config.data.tokenizer)
    names = [name for name, _ in model.named_parameters()]
    used = tuple((name, place / len(names)) for place, name in enumerate(names))
    ready = tuple((name, (place + 1) / len(names)) for place, name in enumerate(reversed(names)))
    return Subject(config, model, StepTrace(10**9, 2 * 10**9, ready, 10**6, used))


@cache
def small() -> Subject:
    """Of SMALL on four ranks, really traced."""
    return subject_of(load_config(SMALL), 4)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.setattr(compare_module, "subject_of", forged)
    return compare(load_config(SMALL), load_cluster(BOXES))


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda path: path.stem)
def test_every_configuration_is_planned_or_refused_with_a_reason(cluster: Path) -> None:
    machine = load_cluster(cluster)
    reasons, planned = {}, []
    for path in CONFIGS:
        config = configuration(path)
        try:
            found = predict(config, machine, forged(config, machine.size))
        except ValueError as error:
            reasons[path.stem] = str(error)
            continue
        planned.append(path.stem)
        assert found.time.step_s >= found.time.compute_s > 0, path.stem
        assert sum(found.sent_bytes.values()) > 0, path.stem
        assert found.memory_bytes["params"] > 0, path.stem
        assert set(found.sent_bytes) <= {level.name for level in machine.levels}, path.stem
    unclear = {name: text for name, text in reasons.items() if not any(reason in text for reason in REASONS)}
    assert not unclear
    assert len(planned) >= len(CONFIGS) - 5 or machine.size > 64, reasons


def test_large_clusters_take_a_batch_that_fits_them() -> None:
    for cluster, batch in (("frontier", 384), ("swarm_100_homes", 100)):
        machine = load_cluster(ROOT / "configs" / "clusters" / f"{cluster}.yaml")
        config = load_config(ROOT / "configs" / "gpt_0.8m.yaml", [f"train.global_batch={batch}"])
        assert predict(config, machine, forged(config, machine.size)).time.exposed_s > 0


def test_methods_are_compared_and_one_is_recommended(compared: Comparison) -> None:
    labels = [option.label for option in compared.options]
    assert labels[0] == "all-reduce fp32"
    assert compared.options[0].candidate.is_own
    assert {"low rank 16", "int4", "DiLoCo, every 10", "gossip, pairs every 4", "partition, fp32", "ZeRO-3"} <= {
        *labels
    }
    assert not compared.left_out
    assert compared.best is not None
    assert compared.best.factor.was_measured
    able = [option for option in compared.options if option.factor.steps is not None]
    assert compared.best.seconds(1) == min(option.seconds(1) for option in able)
    assert "all-reduce fp32 of this model takes" in compared.reason
    assert compared.best.label in compared.reason


def test_break_even_is_where_the_seconds_are_equal(compared: Comparison) -> None:
    dense = compared.options[0].prediction
    by_label = {option.label: option.prediction for option in compared.options}
    assert compared.break_even
    for label, link_bps in compared.break_even:
        level = compared.cluster.levels[-1].with_rate(link_bps)
        there = compared.cluster.model_copy(update={"levels": (level,)})
        assert by_label[label].on(there).time.step_s == pytest.approx(dense.on(there).time.step_s, rel=1e-4)


def test_crossing_finds_where_two_times_meet() -> None:
    # 1 s + 10^9 / x against 2 s: equal at 10^9.
    assert crossing(lambda _: 2.0, lambda x: 1.0 + 1e9 / x, 1e6, 1e12) == pytest.approx(1e9, rel=1e-4)


def test_a_method_without_measured_steps_is_shown_but_chosen_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "subject_of", forged)
    only = StepsTable.model_validate(
        {
            "source": "x",
            "measured_on": "x",
            "factors": [{"factor": 1.0, "method": {"kind": "allreduce", "dtype": "fp32"}}],
        }
    )
    monkeypatch.setattr(compare_module, "steps_factor", lambda config: steps_factor(config, only))
    config, boxes = load_config(SMALL), load_cluster(BOXES)
    everything = compare(config, boxes)
    assert everything.best is not None
    assert everything.best.label == "all-reduce fp32"
    named = compare(config, boxes, ["local_sgd"])
    assert {option.candidate.config.method.kind for option in named.options} == {"local_sgd"}
    assert named.best is not None
    assert "not being measured" in named.reason or "takes" in named.reason


def test_what_does_not_fit_into_memory_is_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "subject_of", forged)
    boxes = load_cluster(BOXES)
    config = load_config(SMALL)
    least = min(compare(config, boxes).options, key=lambda option: sum(option.prediction.memory_bytes.values()))
    bytes_of_least = sum(least.prediction.memory_bytes.values())
    tight = boxes.model_copy(update={"device": boxes.device.model_copy(update={"memory_bytes": bytes_of_least})})
    found = compare(config, tight)
    assert found.best is not None
    assert found.best.label == least.label == "ZeRO-3"
    assert "does not fit" in found.reason
    none = boxes.model_copy(update={"device": boxes.device.model_copy(update={"memory_bytes": 1e6})})
    found = compare(config, none)
    assert found.best is None
    assert "nothing fits" in found.reason


def test_one_rank_has_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "subject_of", forged)
    found = compare(load_config(SMALL, ["method.dtype=bf16"]), load_cluster(BOXES).at(1))
    assert found.best is not None
    assert found.best.candidate.is_own
    assert "nobody to send to" in found.reason
    assert not found.changes
    assert all(option.prediction.time.exposed_s == 0 for option in found.options)


def test_what_a_run_cannot_be_is_left_out_with_the_reason() -> None:
    config = load_config(ROOT / "configs" / "moe_expert_parallel.yaml")
    found = candidates_for(config, load_cluster(BOXES))
    assert found[0].is_own
    reasons = {one.label: one.why_not for one in found if one.why_not}
    assert "model.expert_parallel" in reasons["int4"]
    # A run without an optimizer's settings gets those of the others, and loses what they do not know.
    onebyte = load_config(ROOT / "configs" / "demo_onebyte.yaml")
    kinds = {one.config.method.kind for one in candidates_for(onebyte, load_cluster(BOXES)) if one.why_not is None}
    assert kinds == {"onebyte", "allreduce", "compress", "local_sgd", "gossip", "partition"}


def test_where_ranks_share_a_link_a_plan_offers_to_average_within_a_node_first() -> None:
    config, nodes = load_config(SMALL), load_cluster(ROOT / "configs" / "clusters" / "two_nodes_8gpu_25gbit.yaml")
    offered = {one.label: one.config for one in candidates_for(config, nodes)}
    assert not any("between" in one.label for one in candidates_for(config, load_cluster(BOXES)))
    flat, two_level = (
        predict(offered[label], nodes, forged(offered[label], 16))
        for label in ("all-reduce bf16", "all-reduce bf16 between nodes")
    )
    # Of 16 ranks the 8 on the other node get 2/16 of 2 bytes each from every rank; else 1/8 goes to one of them.
    assert flat.sent_bytes["world"] == pytest.approx(8 * two_level.sent_bytes["world"], rel=1e-3)
    assert two_level.time.exposed_s < flat.time.exposed_s
    assert steps_factor(two_level.config) == steps_factor(flat.config)


def test_steps_are_as_measured_or_not_known() -> None:
    table = load_steps_table()
    assert (ROOT / table.source).is_file()
    assert steps_factor(load_config(SMALL)).steps == 1.0
    unknown = steps_factor(load_config(ROOT / "configs" / "demo_onebyte.yaml"))
    assert (unknown.steps, unknown.was_measured) == (None, False)
    assert includes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}})
    assert not includes({"a": {"b": 1}}, {"a": {}})
    assert not includes({"a": {"b": 1}}, {"a": {"b": 2}})


def test_a_probe_s_computing_is_taken_for_the_same_run_alone() -> None:
    config, boxes = load_config(SMALL), load_cluster(BOXES)
    one = {"config": compute_digest(config, 8), "micro_batch": 8, "forward_s": 1, "backward_s": 2, "optimizer_s": 3}
    measured = {"hosts": ["a", "b", "c", "d"], "cores_per_rank": 1, "computes": [one]}
    probed = Cluster.model_validate({**boxes.model_dump(), "measured": measured})
    found = predict(config, probed, forged(config, 4))
    assert (found.time.compute_s, found.remarks) == (6, [])
    half = load_config(SMALL, ["train.micro_batch=4"])
    other = predict(half, probed, forged(half, 4))
    assert other.time.compute_s < 1
    assert "has not timed the computing" in other.remarks[0]


def test_a_compressor_that_the_probe_has_not_timed_is_named() -> None:
    config = load_config(SMALL, ["method={kind: compress, compressor: int8}"])
    boxes, speed = load_cluster(BOXES), {"encode_s": 1e-9, "decode_s": 1e-9}

    def remarks(codecs: dict[str, dict[str, float]]) -> list[str]:
        measured = {"hosts": ["a", "b", "c", "d"], "cores_per_rank": 1, "codecs": codecs}
        return predict(config, Cluster.model_validate({**boxes.model_dump(), "measured": measured})).remarks

    assert not any("encoding" in remark for remark in remarks({'{"kind": "int8"}': speed}))
    assert 'encoding by {"kind": "int8"} counts as nothing' in remarks({'{"kind": "int4"}': speed})[0]
    assert "until `thinwire probe` has timed them" in remarks({})[0]


def test_one_byte_computes_forward_passes_alone() -> None:
    boxes, passes = load_cluster(BOXES), {}
    for samples in (1, 4):
        given = f"method={{kind: onebyte, samples: {samples}, estimate: one_sided}}"
        config = load_config(ROOT / "configs" / "demo_onebyte.yaml", [given])
        passes[samples] = predict(config, boxes, replace(small(), config=config))
    assert passes[4].compute.forward_s == pytest.approx(5 / 2 * passes[1].compute.forward_s)
    assert passes[4].compute.backward_s == 0
    assert passes[4].memory_bytes["activations"] < small().trace.activation_bytes / 2


def test_the_machine_at_the_slow_link_is_the_one_that_is_shown() -> None:
    config = load_config(ROOT / "configs" / "gossip_two_sites.yaml")
    sites = load_cluster(ROOT / "configs" / "clusters" / "two_sites_internet.yaml")
    found = predict(config, sites, forged(config, 8))
    assert found.rank in (3, 4)
    assert "world" not in predict(config, sites, forged(config, 8), rank=0).sent_bytes


def test_the_command_prints_tables_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "subject_of", forged)
    nodes = ROOT / "configs" / "clusters" / "two_nodes_8gpu_25gbit.yaml"
    told = tmp_path / "plan.json"
    assert plan(SMALL, [], cluster=nodes, steps=500, json_path=told) == 0
    text = capsys.readouterr().out
    for word in ("sent over node", "500 steps", "cost", "break-even", "take       ", "because    ", "of 80.0 GB", " *"):
        assert word in text
    assert "\r" not in text
    found = json.loads(told.read_text())
    assert found["recommended"] in text
    first = found["options"][0]
    assert first["as_configured"]
    assert first["exact"]
    assert first["sent_bytes"]["world"] == 3281408
    assert first["run_s"] == pytest.approx(500 * first["step_s"])
    assert plan(SMALL, ["train.global_batch=16"], cluster=BOXES, ranks=16, methods=["allreduce"]) == 0
    assert "world of 16" in capsys.readouterr().out


BAD_CLUSTERS = {
    "levels[1].size: 6 is no multiple of 4": {"levels": [{"size": 4}, {"name": "world", "size": 6}]},
    "levels[0].link_bps": {"levels": [{"link_bps": -1}]},
    "levels[0].latency_s": {"levels": [{"latency_s": "fast"}]},
    "levels[0].ranks_per_link: 2": {"levels": [{"ranks_per_link": 2}]},
    "levels[1].name": {"levels": [{}, {"name": "node", "size": 8}]},
    "levels: is empty": {"levels": []},
    "devise: unknown key; did you mean device": {"devise": {}},
    "device.memory_bytes: missing": {"device": {"peak_flops": 1}},
    "device.utilisation": {"device": {"memory_bytes": 1, "peak_flops": 1, "utilisation": 1.5}},
    "measured.hosts: 1 hosts for 4 ranks": {"measured": {"hosts": ["a"], "cores_per_rank": 1}},
}


@pytest.mark.parametrize("message", BAD_CLUSTERS)
def test_an_impossible_cluster_is_refused(message: str, tmp_path: Path) -> None:
    data = {"device": {"memory_bytes": 1e9, "peak_flops": 1e12}, "levels": [{}], **BAD_CLUSTERS[message]}
    data["levels"] = [{"name": "node", "size": 4, "link_bps": 1e9, **level} for level in data["levels"]]
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert message in str(caught.value)


def test_mistakes_of_the_user_are_told_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*overrides: str, config: Path = SMALL, cluster: Path = BOXES, **more) -> str:
        assert plan(config, overrides, cluster=cluster, **more) == 2
        return capsys.readouterr().err

    assert "there is no such file" in complaint(cluster=tmp_path / "none.yaml")
    assert "sequences cannot be shared equally by 4 ranks" in complaint("train.global_batch=30")
    assert "'topk' is no method" in complaint(methods=["topk"])
    assert "there is no folder" in complaint(json_path=tmp_path / "no" / "plan.json")
    assert "mesh.levels[0]: the run gives node of 2 ranks" in complaint("mesh={levels: [{name: node, size: 2}]}")
    boxes = load_cluster(BOXES)
    probed = {**boxes.model_dump(mode="json"), "measured": {"hosts": list("abcd"), "cores_per_rank": 1}}
    (tmp_path / "probe.json").write_text(json.dumps(probed))
    assert "was measured by a probe of 4 ranks" in complaint(cluster=tmp_path / "probe.json", ranks=8)
    assert "do not fill groups of 8" in complaint(
        cluster=ROOT / "configs" / "clusters" / "two_nodes_8gpu_25gbit.yaml", ranks=12
    )


def test_without_a_subject_the_run_s_own_micro_batch_is_traced() -> None:
    config, boxes = load_config(SMALL), load_cluster(BOXES)
    half = load_config(SMALL, ["train.micro_batch=4"])
    assert predict(half, boxes).trace.forward_flops == small().trace.forward_flops / 2
    # Half as much at a time takes as long in all.
    whole = predict(config, boxes, small())
    assert predict(half, boxes).time.compute_s == pytest.approx(whole.time.compute_s)
