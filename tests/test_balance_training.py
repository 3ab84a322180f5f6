"""`balance:` in the training loop: the same step for any ranks, micro-batches and engine; resumption; refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from memory import Memory
from torch.distributed.tensor import DTensor
from torch_threads import TorchRank, run_torch_ranks
from worlds import close_world, small_config, torch_world

from thinwire.comm.balance.errors import NonFiniteLogitsError
from thinwire.dist import domain_data
from thinwire.dist.config import ConfigError, RunConfig
from thinwire.dist.domains import Domain
from thinwire.dist.gossip_train import GossipTrainer
from thinwire.dist.metrics import Record
from thinwire.dist.simulate import Circumstances, SimulatedRun
from thinwire.dist.train import Trainer

# Its pull on the routers is as large as that of the text's loss, so that a wrong factor is another step.
MODEL = (
    "model={kind: moe, layers: 2, heads: 2, width: 32, context: 32, experts: 8, top_k: 2, expert_width: 16, "
    "shared_experts: 1}"
)
TRAIN = "train={steps: 3, global_batch: 8, eval_windows: 0, clip_norm: 0}"
BASE = (MODEL, TRAIN, "optimizer={kind: sgd, lr: 0.1}")
PARTITION = "method={kind: partition, preset: zero3}"


class Trained:
    """A rank's run. weights: its shards, at the end."""

    def __init__(self, trainer: Trainer) -> None:
        memory = Memory()
        self.records = memory.records
        self.text = trainer.describe()
        assert trainer.balance is not None
        self.predicted = dict(trainer.balance.handle.predicted_bytes())
        trainer.run([memory])
        metered = trainer.world.meter.sent_bytes("balance/")
        self.metered = {level: count for level, count in metered.items() if count}
        state = trainer.engine.network.state_dict()
        self.weights = {n: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for n, t in state.items()}
        self.norms = [record["grad_norm"] for record in self.records]
        self.losses = [record["loss"] for record in self.records]


def train(config: RunConfig, sizes: Sequence[int] = (1,)) -> list[Trained]:
    def work(rank: TorchRank) -> Trained:
        world = torch_world(rank)
        try:
            return Trained(Trainer(config, world))
        finally:
            close_world(world)

    return run_torch_ranks(sizes, work)


def mixture(folder: Path, name: str, balance: str, *overrides: str) -> RunConfig:
    return small_config(folder, f"name={name}", *BASE, f"balance={balance}", *overrides)


def test_ranks_micro_batches_and_engines_change_the_step_by_rounding_only(tmp_path: Path) -> None:
    for number, balance in enumerate(("{coef: COEF, z_coef: 0.01}", "{coef: COEF, mode: late, z_coef: 0.01}")):
        exact = balance.replace("COEF", "1.0")
        whole = train(mixture(tmp_path, f"whole{number}", exact))[0]
        (other,) = train(mixture(tmp_path, f"other{number}", balance.replace("COEF", "2.0")))
        assert abs(other.norms[2] / whole.norms[2] - 1) > 0.05  # a wrong factor would be seen
        runs = [("ddp", (2,), ["train.micro_batch=1"])]
        if number == 0:
            runs.append(("shards", (2,), [PARTITION, "train.micro_batch=2", "engine.activation_checkpointing=true"]))
        for name, sizes, overrides in runs:
            for trained in train(mixture(tmp_path, f"{name}{number}", exact, *overrides), sizes):
                assert trained.norms == pytest.approx(whole.norms, rel=1e-5), name
                assert trained.losses == pytest.approx(whole.losses, rel=1e-5), name


def test_records_say_how_the_experts_are_loaded_and_count_the_messages(tmp_path: Path) -> None:
    for mode, weight, messages in (("stale", 0.0, 1), ("sync", (1 + 1 / 2) / (2 * 2), 2)):
        config = mixture(tmp_path, mode, f"{{coef: 0.01, mode: {mode}}}", "train.micro_batch=2", "train.eval_windows=8")
        for trained in train(config, (2,)):
            levels = trained.predicted
            assert list(levels) == ["world"]
            assert trained.metered == {"world": 3 * levels["world"]}
            found = trained.records[-1]["balance"]
            assert found["messages"] == messages * 3  # evaluation sends none
            assert found["self_weight"] == weight
            assert 0 <= found["mean_max_violation"] <= found["max_violation"] <= 3
            assert 0 < found["load_entropy"] <= 1
            assert f"{messages} message" in trained.text
            assert f"{levels['world']:,} bytes over world" in trained.text


@pytest.mark.parametrize("balance", ["{coef: 0.5, mode: ema, decay: 0.5}", "{coef: 0.5, mode: carry}"])
def test_resuming_continues_bit_for_bit_and_with_other_ranks(tmp_path: Path, balance: str) -> None:
    def config(name: str, steps: int, *overrides: str) -> RunConfig:
        return mixture(tmp_path, name, balance, f"train.steps={steps}", "train.micro_batch=2", *overrides)

    whole = train(config("whole", 3), (2,))
    first = train(config("first", 2), (2,))
    for again in (2, 1):  # ranks
        begins_at = f"checkpoint.resume={tmp_path}/runs/first/checkpoints"
        second = train(config(f"second{again}", 3, begins_at), (again,))
        for rank, trained in enumerate(second):
            assert "after 2 steps" in trained.text
            losses, norms = first[rank].losses + trained.losses, first[rank].norms + trained.norms
            if again == 2:
                assert (losses, norms) == (whole[rank].losses, whole[rank].norms)
                assert all(torch.equal(weight, whole[rank].weights[n]) for n, weight in trained.weights.items())
            elif "carry" not in balance:  # whose f depends on how many micro-batches a step has
                assert norms == pytest.approx(whole[0].norms, rel=1e-5)


def test_a_level_of_the_machine_can_be_balanced_by_itself(tmp_path: Path) -> None:
    overrides = ["mesh.levels=[{name: node, size: 2}]"]
    node = train(mixture(tmp_path, "node", "{coef: 0.5, scope: node, mode: sync}", *overrides), (2, 4))
    assert list(node[0].predicted) == ["node"]
    assert "scope node, mode sync (2 ranks x 1 in a step)" in node[0].text
    loads = {rank: trained.records[-1]["balance"]["load_cv"] for rank, trained in enumerate(node)}
    assert loads[0] == loads[1] != loads[2] == loads[3]
    with pytest.raises(ValueError, match=r"balance\.within: the mesh has no level 'rack'"):
        train(mixture(tmp_path, "rack", "{coef: 0.5, scope: node, within: rack}"))


def test_an_evaluation_tells_of_each_domain_whoever_scores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[bytes([65 + kind + i % width for i in range(3000)])] for kind, width in enumerate((2, 5, 11))]
    domains = [Domain(name, text, text) for name, text in zip(("few", "some", "many"), texts, strict=True)]
    monkeypatch.setattr(domain_data, "installed_domains", lambda validation_fraction: domains)
    found = []
    for name, sizes, overrides in (("one", (1,), []), ("two", (2,), []), ("shards", (2,), [PARTITION])):
        config = mixture(
            tmp_path, name, "{coef: 0.5}", "train.steps=1", "train.eval_windows=14", "train.eval_batch=2",
            "data={corpus: domains, samples_per_domain: 4}", "optimizer.lr=1.0e-30", *overrides,
        )  # fmt: skip
        for trained in train(config, sizes):
            told = trained.records[-1]["val_domains"]
            perplexity = told.pop("perplexity")
            found.append((list(perplexity.values()), list(told.values())))
    assert list(perplexity) == ["few", "some", "many"]
    assert list(told) == ["specialisation", "max_frequency", "top_k_score", "overlap"]
    for other in found[1:]:
        assert other[0] == pytest.approx(found[0][0], rel=1e-6)
        assert other[1] == pytest.approx(found[0][1], rel=1e-6)


def test_machines_that_train_for_themselves_can_balance_by_themselves(tmp_path: Path) -> None:
    """Before they exchange anything their gradients are those of local SGD, whose ranks do as much by themselves."""

    def work(rank: TorchRank) -> list[Record]:
        world = torch_world(rank)
        try:
            memory = Memory()
            GossipTrainer(
                mixture(tmp_path, "gossip", micro, "method={kind: gossip}", "train.micro_batch=2"), world
            ).run([memory])
            return memory.records
        finally:
            close_world(world)

    micro = "{coef: 1.0, scope: micro}"
    gossip = run_torch_ranks((2,), work)
    overrides = ["method={kind: local_sgd, every: 3}", "train.micro_batch=2"]
    local = train(mixture(tmp_path, "local", micro, *overrides), (2,))
    other = train(mixture(tmp_path, "other", "{coef: 2.0, scope: micro}", *overrides), (2,))
    for rank in range(2):
        assert gossip[rank][0]["grad_norm"] == pytest.approx(local[rank].norms[0], rel=1e-6)
        assert local[rank].norms[0] != pytest.approx(other[rank].norms[0], rel=1e-2)
        assert gossip[rank][-1]["balance"]["messages"] == 0
    assert local[0].norms != local[1].norms
    with pytest.raises(ValueError, match="balance: is given, but simulated machines"):
        SimulatedRun(mixture(tmp_path, "simulated", micro, "method={kind: gossip}"), Circumstances(2))


def test_router_logits_that_are_not_finite_are_reported_by_all(tmp_path: Path) -> None:
    """In mode sync before there is a gradient, with the layer; the other modes' step reports have the rank."""

    def work(rank: TorchRank) -> str:
        world = torch_world(rank)
        try:
            trainer = Trainer(mixture(tmp_path, "broken", "{coef: 0.1, mode: sync}"), world)
            if rank.rank == 1:
                with torch.no_grad():
                    trainer.engine.network.get_parameter("blocks.1.mlp.router.weight")[0, 0] = torch.nan
            with pytest.raises(NonFiniteLogitsError) as caught:
                trainer.run()
            return str(caught.value)
        finally:
            close_world(world)

    for told in run_torch_ranks((2,), work):
        assert "logits: those of rank 1 are NaN or infinite in layer blocks.1" in told


def test_bf16_counts_and_pulls_like_fp32(tmp_path: Path) -> None:
    (fp32,) = train(mixture(tmp_path, "fp32", "{coef: 0.5}"))
    (bf16,) = train(mixture(tmp_path, "bf16", "{coef: 0.5}", "train.precision=bf16"))
    assert bf16.norms != fp32.norms
    assert bf16.norms[:2] == pytest.approx(fp32.norms[:2], rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in bf16.weights.values())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["balance={coef: 0.1, scop: node}"], r"balance\.scop: unknown key; did you mean balance\.scope\?"),
        (["balance={}"], r"balance\.coef: missing; give a number at least 0"),
        (["balance={coef: -1}"], r"balance\.coef: -1"),
        (["balance=1"], r"balance: 1 cannot be used; give keys and values \(coef, scope, mode"),
        (["balance={coef: 0.1, mode: stal}"], r"balance\.mode: 'stal' cannot be used; .*did you mean stale"),
        (["balance={coef: 0.1, mode: ema}"], r"balance: decay: goes with mode: ema"),
        (["balance={coef: 0.1, within: node}"], r"balance: within: node, but only scope: node and mode: hier"),
        (["balanc={coef: 0.1}"], r"balanc: unknown key; did you mean balance\?"),
        (["model={kind: gpt, layers: 1, heads: 2, width: 32, context: 32}"], r"model\.kind: gpt has no routers"),
        (["method={kind: gossip}"], r"balance\.scope: global, but under method gossip .* give balance\.scope=micro"),
        (["method={kind: onebyte}"], r"balance: is given, but method onebyte has no backward pass"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        small_config(tmp_path, MODEL, "balance={coef: 0.1}", *overrides)


def test_late_is_refused_where_it_would_be_another_mode(tmp_path: Path) -> None:
    config = mixture(tmp_path, "late", "{coef: 0.1, mode: late}", PARTITION, "train.micro_batch=2")
    with pytest.raises(ValueError, match=r"balance\.mode: late with 4 micro-batches .* engine fsdp2 cannot"):
        train(config)
