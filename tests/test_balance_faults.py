"""LoadBalance and what users do wrong: a clear error on every rank, and none hangs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_ranks, run_ranks_to_the_end
from torch import Tensor
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.errors import NonFiniteLogitsError, RouterError
from thinwire.comm.errors import PeerLateError, PeerLostError

EXPERTS, TOP_K, TOKENS = 5, 2, 7
SIZE = 3

Spoil = Callable[[Tensor, Tensor, Tensor], None]


def make(rank: Rank, *, timeout_s: float = 30.0, name: str = "queue", **options: Any) -> LoadBalance:
    given = {"num_experts": EXPERTS, "top_k": TOP_K, "coef": 0.1, "mode": "late"} | options
    return LoadBalance(queue=rank.queue(timeout_s, name), **given)


def forward(balance: LoadBalance, layers: Sequence[str] = ("a", "b"), spoil: Spoil | None = None) -> Tensor:
    """A forward pass through routers, the last of which `spoil` may change; the loss, whose own gradient is zero."""
    total = torch.zeros(())
    for layer in layers:
        generator = torch.Generator().manual_seed(len(layer))
        logits = torch.randn(TOKENS, EXPERTS, generator=generator)
        selected, valid = logits.topk(TOP_K).indices, torch.ones(TOKENS, dtype=torch.bool)
        if spoil and layer == layers[-1]:
            spoil(logits, selected, valid)
        total = total + 0.0 * balance(layer, logits.requires_grad_(), selected, valid).nan_to_num().sum()
    return total


def bad_id(logits: Tensor, selected: Tensor, valid: Tensor) -> None:
    selected[3, 1] = EXPERTS


def negative_id(logits: Tensor, selected: Tensor, valid: Tensor) -> None:
    selected[0, 0] = -1


def not_a_number(logits: Tensor, selected: Tensor, valid: Tensor) -> None:
    logits[2, 0] = float("nan")


def infinite(logits: Tensor, selected: Tensor, valid: Tensor) -> None:
    logits[2, 4] = float("inf")


def padded(logits: Tensor, selected: Tensor, valid: Tensor) -> None:
    """Whatever stands where a token is padding does not matter."""
    valid[2] = False
    logits[2], selected[2] = float("nan"), 99


@pytest.mark.parametrize("mode", ["late", "stale"])
@pytest.mark.parametrize(
    ("spoil", "kind", "says"),
    [
        (bad_id, RouterError, "rank 1 selected experts outside 0 .. 4 in layer b"),
        (negative_id, RouterError, "rank 1 selected experts outside"),
        (not_a_number, NonFiniteLogitsError, "those of rank 1 are NaN or infinite in layer b"),
        (infinite, NonFiniteLogitsError, "those of rank 1 are NaN or infinite"),
    ],
)
def test_a_faulty_router_is_told_to_every_rank_and_leaves_nothing_behind(
    spoil: Spoil, kind: type[Exception], says: str, mode: str
) -> None:
    def work(rank: Rank) -> Tensor:
        balance = make(rank, mode=mode)
        forward(balance).backward()
        loss = forward(balance, spoil=spoil if rank.rank == 1 else None)
        if mode == "stale":
            loss.backward()
        with pytest.raises(kind, match=says) as caught:
            balance.finish() if mode == "stale" else loss.backward()
        assert caught.value.ranks == (1,)  # type: ignore[attr-defined]
        assert caught.value.layers == ("b",)  # type: ignore[attr-defined]
        for _ in range(2):
            forward(balance).backward()
        balance.finish()
        before = balance.state_dict()["mode"]["before"]
        return before

    for rows in run_ranks(SIZE, work):
        assert rows[:, :EXPERTS].sum(-1).tolist() == [SIZE * TOKENS * TOP_K] * 2


def test_stale_raises_in_the_next_backward_pass_where_nobody_asks_before() -> None:
    def work(rank: Rank) -> None:
        balance = make(rank, mode="stale")
        forward(balance, spoil=not_a_number if rank.rank == 2 else None).backward()
        loss = forward(balance)
        with pytest.raises(NonFiniteLogitsError, match="rank 2"):
            loss.backward()
        for _ in range(2):
            forward(balance).backward()

    run_ranks(SIZE, work)


def test_scope_micro_which_sends_nothing_raises_on_the_rank_at_fault() -> None:
    def work(rank: Rank) -> None:
        balance = make(rank, scope="micro", mode=None)
        loss = forward(balance, spoil=bad_id if rank.rank == 1 else None)
        if rank.rank == 1:
            with pytest.raises(RouterError, match=r"rank 1 selected experts outside .* in layer b"):
                loss.backward()
        else:
            loss.backward()
        forward(balance).backward()

    run_ranks(2, work)


def test_padding_may_hold_anything() -> None:
    def work(rank: Rank) -> list[int]:
        balance = make(rank)
        forward(balance, spoil=padded).backward()
        return balance.state_dict()["mode"]["before"][:, EXPERTS].tolist()

    assert run_ranks(2, work) == [[2 * TOKENS, 2 * TOKENS - 2]] * 2


@pytest.mark.parametrize(
    ("of_rank_2", "layers", "says"),
    [
        ({}, ("a", "c"), r"ranks 0 and 2 .* layer 'b' on rank 0, layer 'c' on rank 2; .* hold the same layers"),
        ({}, ("a", "b", "c"), r"nothing more on rank 0, layer 'c' on rank 2"),
        ({"num_experts": 4}, ("a", "b"), r"Columns\(num_experts=5.* on rank 0, Columns\(num_experts=4.* on rank 2"),
        ({"coef": 0.2}, ("a", "b"), r"coef = 0.1 on rank 0, coef = 0.2 on rank 2"),
        ({"mode": "stale"}, ("a", "b"), r"mode = late on rank 0, mode = stale on rank 2"),
        ({"ranks": "sum"}, ("a", "b"), r"ranks = mean on rank 0, ranks = sum on rank 2"),
    ],
)
def test_ranks_that_do_not_balance_alike_are_all_told_what_differs(
    of_rank_2: dict[str, Any], layers: tuple[str, ...], says: str
) -> None:
    def work(rank: Rank) -> None:
        names, options = (layers, of_rank_2) if rank.rank == 2 else (("a", "b"), {})
        balance = make(rank, layers=names, **options)
        logits = torch.randn(TOKENS, balance.num_experts, requires_grad=True)
        for name in names:
            balance(name, logits, logits.topk(TOP_K).indices)
        for _ in range(2):  # and told again, whatever they try
            with pytest.raises(ValueError, match=says):
                balance.finish()

    run_ranks(SIZE, work)


def test_counts_of_two_micro_batches_are_never_added() -> None:
    """Rank 1 goes on to its next step while the others have one forward pass more in theirs."""

    def work(rank: Rank) -> None:
        balance = make(rank, micro_batches=2 if rank.rank == 1 else 3, mode="sync")
        losses = [forward(balance) for _ in range(3)]
        with pytest.raises(ValueError, match="rank 0 is at the forward pass 3 of its step, rank 1 at 1; give"):
            losses[-1].backward()

    run_ranks(SIZE, work)


@pytest.mark.parametrize("lost", [False, True])
def test_a_rank_that_never_comes_is_named_within_the_deadline(lost: bool) -> None:
    # Gloo's loop takes a whole core for the rest of the process where a peer closes its connections under an operation.
    held = []

    def work(rank: Rank) -> None:
        balance = make(rank, timeout_s=3.0)
        held.append(balance)
        forward(balance).backward()
        if rank.rank == 2:  # one micro-batch too few, or dead
            if lost:
                balance._queue.monitor.close()
            return
        loss = forward(balance)
        with pytest.raises(PeerLostError if lost else PeerLateError, match="balance/counts") as caught:
            loss.backward()
        assert caught.value.missing_ranks == (2,)  # type: ignore[attr-defined]

    assert run_ranks_to_the_end(SIZE, work) == [None] * SIZE


def test_a_rank_outside_the_group_is_told_so_and_the_others_go_on() -> None:
    def work(rank: TorchRank) -> None:
        group = dist.new_group([0, 2])
        if rank.rank == 1:
            with pytest.raises(ValueError, match=r"group: .* no process group that rank 1 is in"):
                LoadBalance(group, num_experts=EXPERTS, top_k=TOP_K, coef=0.1)  # type: ignore[arg-type]
            return
        balance = LoadBalance(group, num_experts=EXPERTS, top_k=TOP_K, coef=0.1, mode="late")  # type: ignore[arg-type]
        loss = forward(balance, spoil=bad_id if rank.rank == 2 else None)
        with pytest.raises(RouterError) as caught:
            loss.backward()
        assert caught.value.ranks == (2,), "ranks of the job, not of the group"

    run_torch_ranks((3,), work)


def test_two_routers_of_one_name_are_found_out() -> None:
    def work(rank: Rank) -> None:
        with pytest.raises(ValueError, match="layers: 'a' is given 2 times"):
            make(rank, layers=["a", "b", "a"])
        balance = make(rank, name="twice")
        forward(balance, ("a", "b")).backward()
        with pytest.raises(ValueError, match=r"without b; every layer calls balance once .* a name of its own"):
            forward(balance, ("a", "a"))
        balance = make(rank, name="only")
        with pytest.raises(ValueError, match=r"backward pass came after .* set micro_batches"):
            forward(balance, ("a", "a")).backward()
        balance = make(rank, name="unknown", layers=["a"])
        with pytest.raises(ValueError, match="'b' is none of the 1 layers that are balanced, a;"):
            forward(balance, ("b",))

    run_ranks(1, work)


def test_a_forward_pass_that_was_broken_off_is_told_once_and_can_be_tried_again() -> None:
    """As when a trainer catches that the device is out of memory."""

    def work(rank: Rank) -> float:
        balance = make(rank, layers=["a", "b"], micro_batches=2)
        forward(balance).backward()
        forward(balance, ("a",))
        with pytest.raises(ValueError, match="a forward pass has ended, or begun anew, without b"):
            forward(balance)
        forward(balance).backward()
        return balance.metrics()["messages"]

    assert run_ranks(2, work) == [2.0, 2.0]


def test_the_copy_of_a_model_shares_its_balance_and_pickling_is_refused() -> None:
    def work(rank: Rank) -> None:
        model = torch.nn.Linear(1, 1)
        model.balance = balance = make(rank)  # type: ignore[assignment]
        assert copy.deepcopy(model).balance is balance
        with pytest.raises(TypeError, match=r"cannot be pickled .* save model.state_dict\(\) instead"):
            pickle.dumps(model)

    run_ranks(1, work)


LOGITS, SELECTED = torch.zeros(TOKENS, EXPERTS), torch.zeros(TOKENS, TOP_K, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((LOGITS[:, :4], SELECTED), r"layer a: logits are torch.float32 of shape \(7, 4\); .* num_experts = 5\)"),
        ((LOGITS.long(), SELECTED), "layer a: logits are torch.int64"),
        ((LOGITS, SELECTED[:, :1]), r"layer a: selected is torch.int64 of shape \(7, 1\); .* \(7, 2\)"),
        ((LOGITS, SELECTED[:3]), r"selected is torch.int64 of shape \(3, 2\)"),
        ((LOGITS, SELECTED.float()), "selected is torch.float32"),
        ((LOGITS, SELECTED, torch.ones(TOKENS)), "valid_mask is torch.float32 .* allowed: bool"),
        ((LOGITS, SELECTED, torch.ones(TOKENS - 1).bool()), r"valid_mask is torch.bool of shape \(6,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(arguments: tuple[Tensor, ...], says: str) -> None:
    def work(rank: Rank) -> None:
        with pytest.raises(ValueError, match=says):
            make(rank)("a", *arguments)
        with pytest.raises(ValueError, match=r"layer: Identity.* of type Identity"):
            make(rank, name="layer")(torch.nn.Identity(), *arguments)  # type: ignore[arg-type]

    run_ranks(1, work)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_experts": 0}, "num_experts: 0; allowed: 1 or more"),
        ({"top_k": 6}, "top_k: 6; allowed: 1 to num_experts, 5"),
        ({"top_k": 0}, "top_k: 0"),
        ({"coef": -0.1}, "coef"),
        ({"coef": float("nan")}, "coef"),
        ({"mode": "early"}, "mode"),
        ({"scope": "micro"}, "mode: late, but with scope: micro nothing is waited for; remove mode"),
        ({"scope": "micro", "mode": None, "micro_coef": 0.1}, "micro_coef: .* raise coef instead"),
        ({"mode": "ema"}, "decay: goes with mode: ema"),
        ({"decay": 0.9}, "decay: goes with mode: ema, and with no other"),
        ({"scope": "node"}, "inner: not given, but scope: node counts within it"),
        ({"mode": "hier"}, "inner: not given, but mode: hier counts within it"),
        ({"scope": "node", "inner": [[0], [2]]}, r"inner: \[\[0\], \[2\]\]; allowed: .* every rank .* once"),
        ({"scope": "node", "inner": [[1, 0]]}, "inner: .* ascending order"),
        ({"inner": [[0, 1]]}, "inner: goes with scope: node or mode: hier"),
        ({"score": "tanh"}, "score: 'tanh' is not known; allowed: softmax or sigmoid"),
        ({"micro_batches": 0}, "micro_batches: 0; allowed: 1 or more"),
        ({"ranks": "max"}, "ranks: 'max' is not known; .* mean or sum"),
        ({"accumulation": 2}, "accumulation: 2 is not known"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_sent(options: dict[str, Any], says: str) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        given = {"num_experts": EXPERTS, "top_k": TOP_K, "coef": 0.1, "mode": "late"} | options
        with pytest.raises(ValueError, match=says):
            LoadBalance(queue=queue, **given)
        assert queue.meter.snapshot()["operations"] == {}

    run_ranks(2, work)


def test_a_step_that_cannot_be_is_refused() -> None:
    def work(rank: Rank) -> None:
        balance = make(rank)
        with pytest.raises(ValueError, match="micro_batches: 0; allowed: 1 or more"):
            balance.begin_step(micro_batches=0)
        with pytest.raises(ValueError, match="valid_tokens: -1; allowed: 0 or more"):
            balance.begin_step(valid_tokens=-1)

    run_ranks(1, work)
