"""Forecasts of what averages gradients or weights, held to the meter and to memory, on every rank of two levels."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_rows import METHODS, Row, enter_compress
from contract_run import WIDTH, make_model
from metered import Sent, bytes_of, calls, metered, shots_of, since, total
from ranks import Rank, run_ranks, seeded
from row_forecasts import before_any, forecast_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_threads import TorchRank, run_torch_ranks
from worlds import close_world, torch_world

from thinwire.comm.allreduce import AllReduce
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.natural import Natural
from thinwire.comm.compress.handle import CompressedExchange
from thinwire.comm.forecast import Coding, Parameter, seat_of
from thinwire.comm.local_sgd.door import LocalSGDSettings
from thinwire.comm.local_sgd.door import enter as enter_rounds
from thinwire.comm.local_sgd.forecast import forecast_local_sgd
from thinwire.comm.local_sgd.handle import LocalSGD
from thinwire.comm.method import Method
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.engine.build import build_engine
from thinwire.dist.models import build_model
from thinwire.dist.models.gpt import GPTSettings
from thinwire.dist.plan.forecasts import Subject, forecast_run
from thinwire.dist.plan.prediction import subject_of
from thinwire.dist.task import choose_parameters
from thinwire.dist.world import World

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
LEVELS = (("node", 2), ("world", 4))
SEATS = [seat_of(LEVELS, rank) for rank in range(4)]
STEPS = 3  # the first is left out: it may be dense, and DDP has one bucket in it
OF_GRADIENTS = [row for row in METHODS if row.name.startswith(("allreduce", "compress", "local_sgd"))]


@pytest.mark.parametrize("row", OF_GRADIENTS, ids=str)
def test_every_rank_sends_what_was_foretold(row: Row) -> None:
    def work(rank: Rank) -> None:
        seat = SEATS[rank.rank]
        queue = rank.queue(levels=list(seat.level_of_peer))
        run = row.enter(rank, queue, make_model())
        forecast, expected = forecast_of(row, run, seat), before_any(run.method)
        for step in range(STEPS):
            if step == 1:
                before, called = metered(queue.meter), calls(queue.meter)
            generator = torch.Generator().manual_seed(1000 * step + rank.rank)
            run.step(torch.randn(4, WIDTH, generator=generator))
        if "balanced" not in row.name:  # which looks for borders and thresholds now and then
            assert since(calls(queue.meter), called) == shots_of(forecast, STEPS - 1)
        if forecast.exact:
            assert since(metered(queue.meter), before) == bytes_of(forecast, STEPS - 1)
        elif not getattr(getattr(run.method, "settings", None), "start_step", 0):
            assert forecast.bytes_per_step() == expected
        assert sum(exchange.messages for exchange in forecast.exchanges) > 0
        if not isinstance(run.method, LocalSGD):  # which has had one round only
            kept = kept_by(run.method)
            assert kept == {state: count for state, count in forecast.memory_bytes.items() if state != "buffers"}
        queue.close()

    run_ranks(4, work)


BANDS = {
    "compress-topk-ef": 0.01,
    "compress-topk-int8-ef8": 0.01,
    "compress-topk-global-ef": 0.01,
    "compress-topk-leader-ef": 0.02,
    "compress-topk-balanced-ef": 0.15,
    "compress-threshold-dgc": 0.03,
    "compress-ternary_cluster-ef": 0.03,
    "local_sgd-sparseloco": 0.01,
}
"""By how much the bytes of 50 thousand gradients, in the mean over ranks, may differ from those to expect."""


@pytest.mark.parametrize("name", BANDS)
def test_bytes_that_depend_on_the_data_are_near_those_to_expect(name: str) -> None:
    (row,) = [row for row in METHODS if row.name == name]

    def work(rank: Rank) -> float:
        seat = SEATS[rank.rank]
        queue = rank.queue(levels=list(seat.level_of_peer))
        with seeded():
            model = nn.Sequential(nn.Linear(64, 400), nn.Tanh(), nn.Linear(400, 64))
        run = row.enter(rank, queue, model)
        forecast = forecast_of(row, run, seat)
        assert not forecast.exact
        assert forecast.remarks
        for step in range(STEPS):
            if step == 1:
                before = metered(queue.meter)
            run.step(torch.randn(2, 64, generator=torch.Generator().manual_seed(1000 * step + rank.rank)) / 8)
        spent = total(since(metered(queue.meter), before))
        queue.close()
        return sum(spent.values()) / (STEPS - 1) / sum(forecast.bytes_per_step().values())

    ratios = run_ranks(4, work)
    assert sum(ratios) / 4 == pytest.approx(1.0, abs=BANDS[name]), ratios


SHAPE = "model={kind: gpt, layers: 1, heads: 2, width: 32, context: 8}"
SMALLER = (SHAPE, "train.steps=6", "train.global_batch=8", "train.micro_batch=1", "engine.bucket_mb=0.03")


def small(path: Path, *overrides: str) -> RunConfig:
    """The run with a small model, in more and smaller buckets, and with shorter rounds and beginnings."""
    given = load_config(path)
    changes = [*SMALLER]
    if isinstance(given.method, LocalSGDSettings):
        changes += ["method.every=1", "method.bucket_mb=0.03"]
    elif getattr(given.method, "start_step", 0):
        changes += ["method.start_step=1"]
    return load_config(path, [*changes, *overrides])


def of_gradients() -> dict[str, RunConfig]:
    """Every configuration of these methods, but those alike in what matters here, and some more ways to train."""
    found: dict[str, RunConfig] = {}
    seen = set()
    for path in CONFIGS:
        given = load_config(path)
        if given.method.kind in ("allreduce", "compress", "local_sgd") and given.engine.kind == "ddp":
            config = small(path, "balance=null")
            if (key := (config.method, config.engine, type(config.optimizer))) not in seen:
                found[path.stem] = config
            seen.add(key)
    plain, topk, diloco = (CONFIGS[0].parent / f"{name}.yaml" for name in ("gpt_3m", "compress_topk", "diloco"))
    found["one bucket"] = small(plain, "engine.bucket_mb=25")
    found["frozen"] = small(plain, 'train.parameters=["blocks.0.*"]')
    found["momentum"] = small(plain, "optimizer={kind: sgd, lr: 0.1, momentum: 0.9}")
    found["clipped after"] = small(topk, "method.compressor=int8", "method.clip=after", "method.start_step=0")
    found["both ways"] = small(topk, "method.compressor=int8", "method.feedback=ef21_bc")
    found["averaged"] = small(diloco, "method.outer=average", "method.compressor=none")
    return found


RUNS = of_gradients()


@functools.cache
def initial(settings: GPTSettings) -> nn.Module:
    return build_model(settings, tokenizer_vocab=256, seed=0, device=torch.device("cpu"))


@functools.cache
def traced(parameters: tuple[str, ...]) -> Subject:
    """All of RUNS have the same model, and differ in what learns."""
    return subject_of(next(config for config in RUNS.values() if config.train.parameters == parameters), 4)


def subject_of_run(config: RunConfig) -> Subject:
    return dataclasses.replace(traced(config.train.parameters), config=config)


def test_configurations_send_and_keep_what_was_foretold() -> None:
    subjects = {name: subject_of_run(config) for name, config in RUNS.items()}

    def work(rank: TorchRank) -> dict[str, tuple[Sent, Sent, dict[str, int], dict[str, int]]]:
        found = {}
        world = torch_world(rank)
        for name, subject in subjects.items():
            forecast = forecast_run(subject, SEATS[rank.rank])
            sent, kept = train(subject.config, world)
            found[name] = bytes_of(forecast, STEPS - 1), sent, dict(forecast.memory_bytes), kept
        close_world(world)
        return found

    for rank, found in enumerate(run_torch_ranks([size for _, size in LEVELS], work, names=[n for n, _ in LEVELS])):
        for name, (foretold, sent, memory, kept) in found.items():
            where = f"{name}, rank {rank}"
            exact = forecast_run(subjects[name], SEATS[rank]).exact
            if exact:
                assert sent == foretold, where
            else:
                assert total(sent) == pytest.approx(total(foretold), rel=0.25), where
            assert kept == {state: memory[state] for state in kept}, where
            assert set(memory) - set(kept) <= {"grads", "buffers"}, where


def train(config: RunConfig, world: World) -> tuple[Sent, dict[str, int]]:
    """What the steps after the first have sent, and bytes by state after them."""
    model = copy.deepcopy(initial(config.model))
    choose_parameters(model, config.train.parameters)
    _, micro_batches = config.train.share(world.size)
    engine = build_engine(config, model, world, micro_batches=micro_batches)
    generator = torch.Generator().manual_seed(world.rank)
    before: Sent = {}
    for step in range(STEPS):
        if step == 1:
            before = metered(world.queue.meter)
        for i in range(micro_batches):
            tokens = torch.randint(0, 256, (1, 9), generator=generator)
            with engine.micro_batch(last=i == micro_batches - 1):
                scores = engine.forward(tokens[:, :-1])
                engine.backward(F.cross_entropy(scores.flatten(0, -2), tokens[:, 1:].flatten()) / micro_batches)
        engine.step()
    sent = since(metered(world.queue.meter), before)
    kept = {
        "params": storage_bytes(model.parameters()),
        "optim": storage_bytes(tree_leaves(engine.optimizer.state_dict()["state"])),
        **kept_by(engine.method),
    }
    engine.close()
    return sent, kept


def kept_by(method: Method) -> dict[str, int]:
    """Bytes by state that the handle holds."""
    found: dict[str, Any] = {}
    if isinstance(method, LocalSGD):
        found["theta"] = list(method._theta.values())
        found["momentum"] = list(method._outer._momentum.values()) if method._outer else []
    exchange = method._exchange if isinstance(method, LocalSGD) else method
    if isinstance(exchange, CompressedExchange):
        feedback = exchange._pipeline.feedback
        stores = feedback._stores.values()  # type: ignore[attr-defined]
        found["feedback"] = [tree_leaves([vars(store)["_now"], vars(store).get("_spare")]) for store in stores]
        found["collective"] = [c.state_dict() for _, c in exchange._pipeline._collectives.values()]
    return {state: count for state, held in found.items() if (count := storage_bytes(tree_leaves(held)))}


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Of different storages."""
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if isinstance(x, Tensor)}
    return sum(held.values())


def test_scratch_is_that_of_the_largest_bucket() -> None:
    subject = subject_of_run(RUNS["gpt_124m"])

    def work(rank: TorchRank) -> tuple[int, int]:
        world = torch_world(rank)
        engine = build_engine(subject.config, copy.deepcopy(initial(subject.config.model)), world, micro_batches=1)
        for _ in range(3):
            engine.backward(engine.forward(torch.ones(1, 8, dtype=torch.long)).square().mean())
            engine.step()
        assert isinstance(engine.method, AllReduce)
        held = storage_bytes(engine.method._mean._scratch.values())
        engine.close()
        close_world(world)
        return held, forecast_run(subject, SEATS[rank.rank]).memory_bytes["buffers"]

    for held, foretold in run_torch_ranks([size for _, size in LEVELS], work, names=[n for n, _ in LEVELS]):
        assert held == foretold > 0


def test_groups_leave_in_the_order_in_which_backward_completes_them() -> None:
    """compress_int8 in small groups: each waits for its own gradients, and for all of DDP's bucket with the last."""
    subject = subject_of_run(RUNS["clipped after"])
    forecast = forecast_run(subject, SEATS[0])
    came = [name for name, _ in subject.trace.ready]
    last = [max(came.index(name) for name in exchange.needs) for exchange in forecast.exchanges]
    assert last == sorted(last)
    assert len(set(last)) > 1
    assert {name for exchange in forecast.exchanges for name in exchange.needs} == set(came)


def test_all_wait_for_the_last_gradient_where_the_norm_is_clipped_first() -> None:
    forecast = forecast_run(subject_of_run(RUNS["compress_int8"]), SEATS[0])
    assert forecast.exchanges[0].operation == "compress/norm"
    assert all(not exchange.needs for exchange in forecast.exchanges)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("method.exact_within=rack",), r"method\.exact_within: there is no level 'rack'; it has node, world"),
        (("method.exact_within=world",), r"method\.exact_within: world holds all 4 ranks"),
        (("method.feedback={kind: ef21_pp, participation: [0.5, 0.5]}",), "2 probabilities for 4 ranks"),
    ],
)
def test_what_does_not_fit_the_levels_is_refused(overrides: tuple[str, ...], match: str) -> None:
    subject = subject_of_run(small(CONFIGS[0].parent / "compress_int8.yaml", *overrides))
    with pytest.raises(ValueError, match=match):
        forecast_run(subject, SEATS[0])


def test_what_is_not_foretold_is_said() -> None:
    def remarks(*overrides: str) -> str:
        subject = subject_of_run(small(CONFIGS[0].parent / "compress_int8.yaml", *overrides))
        return "; ".join(forecast_run(subject, SEATS[0]).remarks)

    assert remarks() == ""
    assert "the first 3 steps send all in fp32" in remarks("method.start_step=3")
    assert "auto measures 3 steps" in remarks("method.compressor={kind: auto, candidates: [int8]}")
    assert "only in the steps that it takes part in" in remarks("method.feedback=ef21_pp")
    assert "while feedback dgc warms up" in remarks(
        "method.compressor=topk", "method.feedback={kind: dgc, warmup_steps: 4}", "optimizer={kind: sgd, momentum: 0.0}"
    )
    lonely = seat_of([("world", 4)], 0)
    subject = subject_of_run(RUNS["compress_between_nodes"])
    assert any("node holds one rank here" in remark for remark in forecast_run(subject, lonely).remarks)


@pytest.mark.parametrize(("collective", "feedback"), [("two_shot", "ef"), ("two_shot", "none"), ("all_gather", "ef")])
def test_codings_are_the_calls_that_a_codec_gets(
    monkeypatch: pytest.MonkeyPatch, collective: str, feedback: str
) -> None:
    counts: Counter[str] = Counter()
    lock, inside = threading.Lock(), threading.local()

    def counted(kind: str, work: Any, numel: Callable[..., int]) -> Any:
        """What encode_with_feedback() decodes for itself is part of it."""

        def call(codec: Compressor, *given: Any) -> Any:
            if getattr(inside, "a_call", False):
                return work(codec, *given)
            with lock:
                counts[kind] += numel(*given)
                counts[f"{kind} calls"] += 1
            inside.a_call = True
            try:
                return work(codec, *given)
            finally:
                inside.a_call = False

        return call

    for name in ("encode", "encode_with_feedback"):
        monkeypatch.setattr(Natural, name, counted("encoded", getattr(Natural, name), lambda x, *_: x.numel()))
    monkeypatch.setattr(Natural, "decode", counted("decoded", Natural.decode, lambda _, shape, *__: shape.numel()))
    row = Row("compress-natural", enter_compress("natural", feedback, collective=collective), lossless=False)

    def work(rank: Rank) -> tuple[Coding, ...]:
        queue = rank.queue()
        run = row.enter(rank, queue, make_model())
        run.step(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(rank.rank)))
        queue.close()
        return tuple(coding for one in forecast_of(row, run, SEATS[rank.rank]).exchanges for coding in one.coding)

    codings = [coding for found in run_ranks(4, work) for coding in found]
    assert {coding.codec for coding in codings} == {'{"kind": "natural"}'}
    assert dict(counts) == {
        "encoded": sum(coding.encoded for coding in codings),
        "decoded": sum(coding.decoded for coding in codings),
        "encoded calls": sum(coding.encodes for coding in codings),
        "decoded calls": sum(coding.decodes for coding in codings),
    }


def test_rounds_average_running_statistics_too() -> None:
    settings = LocalSGDSettings(every=2)

    def work(rank: Rank) -> None:
        seat = SEATS[rank.rank]
        queue = rank.queue(levels=list(seat.level_of_peer))
        with seeded():
            model = nn.Sequential(nn.Linear(8, 40), nn.BatchNorm1d(40), nn.Linear(40, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = enter_rounds(model, optimizer, settings, queue=queue)
        for _ in range(4):
            model(torch.randn(4, 8, generator=torch.Generator().manual_seed(rank.rank))).square().sum().backward()
            optimizer.step()
        parameters = [Parameter(name, p.shape, p.dtype) for name, p in model.named_parameters()]
        forecast = forecast_local_sgd(settings, parameters, seat, statistics=80)
        assert metered(queue.meter) == bytes_of(forecast, 4)
        kept = {**method._theta, **method._statistics.agreed}
        assert forecast.memory_bytes["theta"] == storage_bytes(kept.values())
        queue.close()

    run_ranks(4, work)
