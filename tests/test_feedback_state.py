"""What every kind of feedback owes its door: nothing before commit(), resuming, loss scaling, a new world size."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from feedback_ranks import Ranks, everything, nothing, top
from pydantic import BaseModel
from torch import Tensor

from thinwire.comm.compress.decoded import to_dense
from thinwire.comm.compress.feedback import (
    DGC,
    EF,
    EF21,
    EF21BC,
    EF21PP,
    EF21SGDM,
    EF21W,
    AnyFeedback,
    EControl,
    NoFeedback,
    SmoothnessEstimate,
    WeightedEF21,
    build_feedback,
    parse_feedback,
)
from thinwire.comm.compress.feedback.blocks import BlockPair
from thinwire.comm.compress.feedback.store import Pair

SIZE = 3
SHAPES = {"a": (7, 40), "b": (300,), "scalar": ()}
KINDS: dict[str, AnyFeedback] = {
    "none": NoFeedback(),
    "ef": EF(),
    "ef_update": EF(units="update"),
    "ef_int8": EF(storage="int8"),
    "ef21": EF21(),
    "ef21_w": EF21W(smoothness=(1.0, 2.0, 5.0)),
    "ef21_sgdm": EF21SGDM(),
    "ef21_sgdm_int8": EF21SGDM(storage="int8"),
    "ef21_bc": EF21BC(),
    "ef21_pp": EF21PP(participation=0.6),
    "econtrol": EControl(),
    "econtrol_int8": EControl(storage="int8"),
    "dgc": DGC(nesterov=True),
    "dgc_int8": DGC(storage="int8"),
}
WITH_MEMORY = [name for name in KINDS if name != "none"]
every_kind = pytest.mark.parametrize("name", KINDS)


def ranks_of(name: str, size: int = SIZE) -> Ranks:
    kind = EF21W(smoothness=tuple(range(1, size + 1))) if name == "ef21_w" else KINDS[name]
    return Ranks(kind, size, seed=5, learning_rate=lambda _: 0.25)


def gradients(step: int, size: int = SIZE) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(step)
    return [{name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()} for _ in range(size)]


def train(ranks: Ranks, first: int, last: int, scale: float = 1.0) -> list[dict[str, Tensor]]:
    size = len(ranks.feedbacks)
    return [ranks.step(gradients(t, size), top(9), scale=scale) for t in range(first, last)]


def states(ranks: Ranks) -> list[dict[str, Any]]:
    return [feedback.state_dict() for feedback in ranks.feedbacks]


def assert_same(left: Any, right: Any) -> None:
    """Equal bits in nested dictionaries and lists of tensors."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


@every_kind
@pytest.mark.parametrize("after_steps", [0, 3])
def test_a_step_that_is_not_taken_leaves_no_trace(name: str, after_steps: int) -> None:
    ranks, untouched = ranks_of(name), ranks_of(name)
    train(ranks, 0, after_steps)
    train(untouched, 0, after_steps)
    before = states(ranks)
    server = copy.deepcopy(ranks.server_errors)
    poison = gradients(99)
    poison[1]["a"][2, 3] = torch.inf
    poison[2]["b"][5] = torch.nan
    ranks.step(poison, everything, finish=False)
    for feedback in ranks.feedbacks:
        feedback.rollback()
    ranks.server_errors = server
    assert_same(states(ranks), before)
    assert_same(train(ranks, after_steps, after_steps + 3), train(untouched, after_steps, after_steps + 3))
    assert_same(states(ranks), states(untouched))


@every_kind
def test_a_step_that_was_left_in_the_middle_is_forgotten(name: str) -> None:
    """A door that fails before commit() need not roll back: the next begin_step() does."""
    ranks, untouched = ranks_of(name), ranks_of(name)
    train(ranks, 0, 2)
    train(untouched, 0, 2)
    server = copy.deepcopy(ranks.server_errors)
    ranks.step(gradients(99), top(5), finish=False)
    ranks.server_errors = server
    assert_same(train(ranks, 2, 4), train(untouched, 2, 4))


@every_kind
def test_resumes_bit_for_bit(name: str) -> None:
    ranks, resumed = ranks_of(name), ranks_of(name)
    train(ranks, 0, 4)
    saved = states(ranks)
    kept = copy.deepcopy(saved)
    for feedback, state in zip(resumed.feedbacks, saved, strict=True):
        feedback.load_state_dict(state)
    resumed.step_count, resumed.server_errors = ranks.step_count, copy.deepcopy(ranks.server_errors)
    assert_same(train(resumed, 4, 8), train(ranks, 4, 8))
    assert_same(states(resumed), states(ranks))
    assert_same(saved, kept)  # a state is a copy: neither run has written to it


@every_kind
def test_the_loss_scale_is_in_no_memory(name: str) -> None:
    plain, scaled = ranks_of(name), ranks_of(name)
    for step, scale in enumerate((65536.0, 65536.0, 32768.0, 2.0, 1.0)):
        expected = train(plain, step, step + 1)[0]
        actual = train(scaled, step, step + 1, scale)[0]
        assert_same({name: x / scale for name, x in actual.items()}, expected)
    assert_same(states(scaled), states(plain))


def mean_of(values: list[Tensor]) -> Tensor:
    return torch.stack([value.double() for value in values]).mean(0)


EXACT = [name for name in WITH_MEMORY if not name.endswith("int8") and name != "ef21_w"]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_new_world_size_keeps_the_means(name: str, size: int) -> None:
    old, new = ranks_of(name), ranks_of(name, size)
    train(old, 0, 5)
    for feedback in new.feedbacks:
        feedback.load_state_dict(feedback.merge(states(old)))
    for label in states(old)[0]["stores"]:
        for parameter in SHAPES:
            gap = mean_of(new.stored(label, parameter)) - mean_of(old.stored(label, parameter))
            assert gap.abs().max() < 1e-6
    train(new, 5, 8)


def test_a_new_world_size_keeps_the_weighted_sum() -> None:
    old, new = ranks_of("ef21_w"), ranks_of("ef21_w", 5)
    train(old, 0, 5)
    for feedback in new.feedbacks:
        feedback.load_state_dict(feedback.merge(states(old)))
    for ranks in (old, new):
        size = len(ranks.feedbacks)
        weights = ranks.feedbacks[0].weights(size)
        assert weights is not None
        total = sum(w / size * own.double() for w, own in zip(weights, ranks.stored("own", "a"), strict=True))
        assert (total - ranks.stored("mean", "a")[0]).abs().max() < 1e-6  # type: ignore[operator]


def test_a_new_world_size_with_8_bits_keeps_the_mean_of_the_errors_without_bias() -> None:
    old, new = ranks_of("ef_int8"), ranks_of("ef_int8", 40)
    train(old, 0, 5)

    def errors(ranks: Ranks) -> list[Tensor]:
        like = torch.empty(SHAPES["b"])
        return [feedback._stores["error"].now("b", like) for feedback in ranks.feedbacks]  # type: ignore[attr-defined]

    before = mean_of(errors(old))
    for feedback in new.feedbacks:
        feedback.load_state_dict(feedback.merge(states(old)))
    step = before.abs().max() / 127
    assert not torch.equal(errors(new)[0], errors(new)[1])
    assert (mean_of(errors(new)) - before).abs().max() < 0.4 * step  # five standard deviations


def test_merging_wants_every_rank_in_order() -> None:
    old = ranks_of("ef")
    train(old, 0, 1)
    zeroth, first, second = states(old)
    target = build_feedback("ef", rank=0, size=2)
    for wrong in ([zeroth, first], [first, zeroth, second], [*states(ranks_of("dgc"))]):
        with pytest.raises(ValueError, match=r"feedback: the state has"):
            target.merge(wrong)


@pytest.mark.parametrize(
    ("saved", "loaded"), [("ef", "ef21"), ("ef", "ef_update"), ("ef", "ef_int8"), ("dgc_int8", "dgc")]
)
def test_no_state_of_another_kind(saved: str, loaded: str) -> None:
    ranks = ranks_of(saved)
    train(ranks, 0, 1)
    with pytest.raises(ValueError, match="feedback: the state has"):
        ranks_of(loaded).feedbacks[0].load_state_dict(states(ranks)[0])


def test_no_state_of_another_model() -> None:
    ranks = ranks_of("ef")
    train(ranks, 0, 1)
    with pytest.raises(ValueError, match=r"memory of a has shape \(7, 40\)"):
        ranks.feedbacks[0].memories("a", torch.zeros(5))


@pytest.mark.parametrize("name", [name for name in WITH_MEMORY if name != "ef21_pp"])
def test_given_back_errors_are_sent_next(name: str) -> None:
    given, plain = ranks_of(name), ranks_of(name)
    train(given, 0, 3)
    train(plain, 0, 3)
    error = torch.tensor([1.0, -2.0, 0.5])
    given.feedbacks[1].give_back("a", 11, error)
    for ranks in (given, plain):
        ranks.step([{"a": torch.zeros(SHAPES["a"])}] * SIZE, everything)
    expected = torch.zeros(7 * 40)
    expected[11:14] = error
    difference = to_dense(given.sent[1]) - to_dense(plain.sent[1])
    assert (difference - expected).abs().max() < (0.2 if name.endswith("int8") else 1e-5)


def test_errors_cannot_be_given_where_there_is_no_memory() -> None:
    with pytest.raises(ValueError, match="kind none keeps no memory"):
        ranks_of("none").feedbacks[0].give_back("a", 0, torch.zeros(1))
    with pytest.raises(ValueError, match="no memory yet"):
        ranks_of("ef").feedbacks[0].give_back("a", 0, torch.zeros(1))
    ranks = ranks_of("ef")
    train(ranks, 0, 1)
    with pytest.raises(ValueError, match=r"from position 279 of a, which has 280"):
        ranks.feedbacks[0].give_back("a", 279, torch.zeros(2))


def stored_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(stored_bytes, value.values())) if isinstance(value, Mapping) else 0


@pytest.mark.parametrize(
    ("name", "expected"), [("ef", 4), ("ef_int8", 1.016), ("ef21", 8), ("ef21_sgdm", 12), ("econtrol", 12), ("dgc", 8)]
)
def test_checkpoint_bytes_per_parameter(name: str, expected: float) -> None:
    ranks = Ranks(KINDS[name], 1)
    ranks.step([{"x": torch.randn(256 * 100)}], nothing)
    assert stored_bytes(states(ranks)[0]["stores"]) / 25600 == pytest.approx(expected, rel=0.001)


def test_8_bit_rounding_has_no_bias() -> None:
    """Leftovers of a tenth of the smallest step survive in the mean."""
    x = torch.full((256,), 0.1 / 127)
    x[0] = 1.0
    total = torch.zeros(256, dtype=torch.float64)
    for trial in range(400):
        store = BlockPair(lambda name, trial=trial: 1000 + trial)  # type: ignore[misc]
        store.next("x", x).copy_(x)
        store.seal("x")
        store.commit()
        total += store.now("x", x)
    mean = total / 400
    assert mean[0] == pytest.approx(1.0)
    assert float(mean[1:].mean()) == pytest.approx(0.1 / 127, rel=0.05)


def test_buffers_change_places_without_copies() -> None:
    for store in (Pair(), BlockPair(lambda name: 1)):
        x = torch.arange(10.0)
        for _ in range(3):
            store.next("x", x).copy_(x)
            assert "x" not in store or not torch.equal(store.now("x", x), x)
            store.seal("x")
            store.commit()
            assert (store.now("x", x) - x).abs().max() < 0.1
            x = x + 1


def test_absent_ranks_are_agreed_on_and_change_nothing() -> None:
    ranks, present = Ranks(EF21PP(participation=(0.2, 0.5, 1.0)), SIZE, seed=1), []
    for t in range(300):
        before = states(ranks)
        train(ranks, t, t + 1)
        weights = [feedback.weights(SIZE) for feedback in ranks.feedbacks]
        assert weights[0] == weights[1] == weights[2]
        present.append(weights[0])
        for rank, weight in enumerate(weights[0] or []):
            if t > 20 and not weight:
                assert_same(states(ranks)[rank]["stores"]["own"], before[rank]["stores"]["own"])
    frequency = torch.tensor(present).mean(0)
    assert frequency.tolist() == pytest.approx([0.2, 0.5, 1.0], abs=0.09)  # three standard deviations


def test_new_weights_keep_what_all_know() -> None:
    ranks = Ranks("ef21_w", SIZE)
    train(ranks, 0, 4)

    def weighted_sum() -> Tensor:
        weights = ranks.feedbacks[0].weights(SIZE) or []
        return sum(w / SIZE * own for w, own in zip(weights, ranks.stored("own", "a"), strict=True))  # type: ignore

    before = weighted_sum()
    for feedback in ranks.feedbacks:
        assert isinstance(feedback, WeightedEF21)
        feedback.set_smoothness([1.0, 1e-6, 3.0])
    assert ranks.feedbacks[0].weights(SIZE) == pytest.approx([0.75, 0.1, 2.25])  # clipped to a tenth
    assert (weighted_sum() - before).abs().max() < 1e-6
    with pytest.raises(ValueError, match="2 values for 3 ranks"):
        ranks.feedbacks[0].set_smoothness([1.0, 2.0])  # type: ignore[attr-defined]
    resumed = Ranks("ef21_w", SIZE)
    for feedback, state in zip(resumed.feedbacks, states(ranks), strict=True):
        feedback.load_state_dict(state)
    assert_same(train(resumed, 4, 6), [ranks.step(gradients(t), top(9)) for t in (4, 5)])


def test_ef21_w_reports_both_step_sizes() -> None:
    settings = EF21W(smoothness=(1.0, 1.0, 1.0, 100.0), contraction=0.1, smoothness_of_mean=20.0)
    metrics = build_feedback(settings, rank=3, size=4).metrics()
    assert metrics["weight"] == 100 / 103
    assert metrics["l_qm_over_l_am"] == pytest.approx(50.01 / 25.75, rel=1e-4)
    assert 1 / metrics["step_size"] == pytest.approx(20 + 25.75 * 18.48683298)
    assert 1 / metrics["step_size_ef21"] == pytest.approx(20 + 50.01 * 18.48683298, rel=1e-4)


def test_smoothness_is_estimated_from_consecutive_gradients() -> None:
    slope, estimate = torch.tensor([1.0, 4.0]), SmoothnessEstimate()
    x = torch.zeros(2)
    assert estimate.observe({"x": x}, {"x": slope * x}) == 0.0
    assert estimate.observe({"x": x}, {"x": slope * x}) == 0.0  # has not moved
    x = torch.tensor([1.0, 0.0])
    assert estimate.observe({"x": x}, {"x": slope * x}) == 1.0
    x.add_(torch.tensor([0.0, 0.5]))  # in place, as optimizers do
    assert estimate.observe({"x": x}, {"x": slope * x}) == 4.0
    assert estimate.observe({"x": x + 1}, {"x": slope * torch.nan}) == 4.0


def test_settings_are_known_by_name() -> None:
    class Method(BaseModel):
        feedback: AnyFeedback

    for kind in ("none", "ef", "ef21", "ef21_w", "ef21_sgdm", "ef21_bc", "ef21_pp", "econtrol", "dgc"):
        parsed = parse_feedback(kind)
        assert parsed.kind == kind
        assert Method.model_validate({"feedback": kind}).feedback == parsed
        assert Method.model_validate(json.loads(Method(feedback=parsed).model_dump_json())).feedback == parsed
    assert parse_feedback({"kind": "ef", "units": "update"}) == EF(units="update")
    assert parse_feedback(EF21()) == EF21()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("ef22", "ef21_sgdm"),
        ({"kind": "ef21", "storage": "int8"}, "storage"),
        ({"kind": "ef", "units": "kg"}, "units"),
        ({"kind": "ef21_sgdm", "eta": 0.0}, "eta"),
        ({"kind": "ef21_pp", "participation": 1.5}, "participation"),
    ],
)
def test_unknown_settings_are_named(wrong: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_feedback(wrong)


def test_settings_that_do_not_fit_the_ranks() -> None:
    with pytest.raises(ValueError, match=r"feedback\.smoothness: 2 values for 3 ranks"):
        Ranks(EF21W(smoothness=(1.0, 2.0)), 3)
    with pytest.raises(ValueError, match=r"feedback\.participation: 2 probabilities for 3 ranks"):
        Ranks(EF21PP(participation=(0.5, 0.5)), 3)
    with pytest.raises(ValueError, match=r"feedback\.units: 'update'"):
        Ranks(EF(units="update"), 1)
    zero = Ranks(EF(units="update"), 1, learning_rate=lambda name: 0.0)
    with pytest.raises(ValueError, match=r"learning rate, but that of a is 0\.0 in step 0"):
        zero.step(gradients(0, 1), everything)


def test_metrics_are_the_norms() -> None:
    ranks = Ranks("ef", 1)
    ranks.step([{"x": torch.full((4,), 2.0), "y": torch.full((9,), 1.0)}], nothing)
    assert ranks.feedbacks[0].metrics() == {"error_norm": 5.0}
