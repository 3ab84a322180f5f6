"""Directions u_i v_j^T: each is the one that the stream defines, and sums of them are exact however they are made."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinwire.comm.onebyte import subspace
from thinwire.comm.onebyte.lattice import Lattice
from thinwire.comm.onebyte.optimizer import OneByteSPSA
from thinwire.comm.onebyte.rounds import Contribution, Round
from thinwire.comm.onebyte.stream import key_of, place
from thinwire.kernels.philox import direction_reference, philox

RANK, EVERY = 4, 3
SHAPES = {
    "table": (9, 7),
    "bias": (9,),
    "narrow": (12, 4),
    "filters": (6, 2, 3),
}  # narrow has no more columns than RANK
PLACES = [place(number, slot, sample) for number in (0, 1, 2, 3, 50) for slot in (0, 7, 65534) for sample in (0, 1)]


def build(dtype: torch.dtype = torch.float32, **settings: Any) -> OneByteSPSA:
    generator = torch.Generator().manual_seed(0)
    tensors = [(n, nn.Parameter((torch.randn(s, generator=generator) / 50).to(dtype))) for n, s in SHAPES.items()]
    return OneByteSPSA(
        tensors, **{"lr": 0.01, "directions": "subspace", "rank": RANK, "basis_every": EVERY, **settings}
    )


def direction(key: int, tensor: int, shape: Sequence[int], at: Sequence[int]) -> Tensor:
    """The definition, one direction at a time, from Philox words."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    if min(rows, columns) <= RANK:
        z = direction_reference(rows * columns, key=key, tensor=tensor, place=(at[0], at[1]))
        return z.to(torch.int64).view(*shape)
    element = torch.arange((rows + columns) * RANK)
    words = torch.stack(philox(element >> 7, tensor | 3 << 28, at[0] // EVERY, 0, key))
    signs = 2 * (words[element >> 5 & 3, element] >> (element & 31) & 1) - 1
    basis = signs.view(-1, RANK)
    a, b, c, _ = (int(word) for word in philox(tensor, 2 << 28, *at, key))
    return (2 * (c & 1) - 1) * torch.outer(basis[:rows, a * RANK >> 32], basis[rows:, b * RANK >> 32]).view(*shape)


def units(lattice: Lattice) -> list[Tensor]:
    """The weights as whole numbers."""
    return [(w * 2.0**entry.exponent).to(torch.int64).view(entry.shape) for entry, w in lattice.weights()]


def expected(optimizer: OneByteSPSA, coefficients: Tensor, places: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The sums of all directions of all tensors by the definition."""
    key = key_of(optimizer.manifest.to_bytes())
    return [
        sum(
            (int(q) * direction(key, t, shape, at) for q, at in zip(row, places, strict=True)),
            torch.zeros(shape).long(),
        )
        for t, (row, shape) in enumerate(zip(coefficients, SHAPES.values(), strict=True))
    ]


def random_coefficients(count: int) -> Tensor:
    return torch.randint(-1000, 1000, (len(SHAPES), count), generator=torch.Generator().manual_seed(1)).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_perturbation_is_the_direction_that_the_stream_defines(dtype: torch.dtype) -> None:
    optimizer = build(dtype)
    replica, key = optimizer.replica, key_of(optimizer.manifest.to_bytes())
    before, digest = units(replica.lattice), replica.model_hash()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for at, sign in zip(PLACES[::4], (1, -1, 1, -1, 1, -1, 1, -1), strict=True):
        replica.perturb(at, sign)
        for t, (parameter, entry) in enumerate(zip(parameters, optimizer.manifest.tensors, strict=True)):
            eps = 2 ** (entry.exponent + entry.eps_log2)
            wanted = before[t] + sign * eps * direction(key, t, entry.shape, at)
            assert torch.equal(parameter.detach(), (wanted * 2.0**-entry.exponent).float().to(dtype))
    replica.restore()
    assert replica.model_hash() == digest


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_where_pytorch_may_round_factors_products_are_made_in_fp64(precision: Any) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        for device in ("cpu", "cuda"):
            assert subspace._fp32_products_are_exact(torch.device(device)) == (precision == "highest")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("count", [2, 4, len(PLACES)])
def test_sums_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, count: int, exact: bool) -> None:
    """With fewer and more directions than vectors, and where fp32 products may be rounded."""
    monkeypatch.setattr(subspace, "_fp32_products_are_exact", lambda device: exact)
    optimizer = build()
    lattice = optimizer.replica.lattice
    before = units(lattice)
    coefficients = random_coefficients(count)
    lattice.add(coefficients, torch.tensor(PLACES[:count]))
    for now, was, change in zip(units(lattice), before, expected(optimizer, coefficients, PLACES[:count]), strict=True):
        assert torch.equal(now, was + change)


def test_coefficients_beyond_the_whole_numbers_of_fp32_are_added_exactly() -> None:
    optimizer = build()
    lattice = optimizer.replica.lattice
    before = units(lattice)
    pair = torch.tensor([[(1 << 24) + 1, 2 - (1 << 24)]], dtype=torch.int32)  # the first of them is none of fp32's
    lattice.add(pair.expand(len(SHAPES), -1).contiguous(), torch.tensor([PLACES[0], PLACES[0]]))
    three = torch.full((len(SHAPES), 1), 3)
    for now, was, change in zip(units(lattice), before, expected(optimizer, three, PLACES[:1]), strict=True):
        assert torch.equal(now, was + change)


def random_rounds(count: int, slots: int, samples: int) -> list[Round]:
    source = random.Random(0)
    return [
        Round(number, 2**-10, tuple(Contribution(slot, source.randbytes(samples)) for slot in range(slots)))
        for number in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"basis_every": 1}, {"kept": 0.5, "snapshot_every": 20, "weight_decay": 0.01}])
def test_all_rounds_at_once_equal_step_by_step(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Over more bases than a pass takes, with fewer and with more directions than a basis has vectors."""
    rounds = [
        *random_rounds(50, 2, 1),
        *(Round(50 + r.number, r.rate, r.contributions) for r in random_rounds(3, 5, 3)),
    ]
    one, two, three = (build(dtype, **options).replica for _ in range(3))
    one.apply(rounds)
    for round_ in rounds:
        two.apply([round_])
        if round_.number % 7 == 3:
            two.perturb(place(round_.number + 1, 1, 0), -1)
    three.apply(rounds[:30])
    three.undo(rounds[29]) if "kept" not in options else three.restore()
    three.apply(rounds[three.rounds :])
    assert one.model_hash() == two.model_hash() == three.model_hash()
    assert one.model_hash() != build(dtype, **options).replica.model_hash()


def test_the_order_of_contributions_does_not_matter() -> None:
    coefficients, order = random_coefficients(len(PLACES)), list(range(len(PLACES)))
    hashes = set()
    for seed in range(4):
        lattice = build().replica.lattice
        random.Random(seed).shuffle(order)
        lattice.add(coefficients[:, order], torch.tensor(PLACES)[order])
        hashes.add(lattice.digest())
    assert len(hashes) == 1


def test_mean_and_variance_of_estimates_are_those_of_full_directions() -> None:
    """E z z^T = I and E <z, g>^2 = |g|^2 over bases; within one, N directions act like 1 / (1 / N + 1 / r^2)."""
    rows, columns, count = 6, 5, 4000
    rounds = torch.arange(count)
    words = torch.stack(philox(torch.arange(1)[:, None], 3 << 28, rounds, 0, 7), dim=-1)[0]  # 128 bits for each basis
    bits = (words[..., None] >> torch.arange(32) & 1).view(count, 128)
    basis = (2 * bits[:, : (rows + columns) * RANK] - 1).view(count, rows + columns, RANK).double()
    a, b, *_ = philox(0, 2 << 28, rounds, 0, 7)
    u = basis[rounds, :rows, a * RANK >> 32]
    v = basis[rounds, rows:, b * RANK >> 32]
    z = torch.einsum("na,nb->nab", u, v).flatten(1)
    assert (z.T @ z / count - torch.eye(rows * columns)).abs().max() < 5 / count**0.5
    gradient = torch.linspace(-1, 1, rows * columns).double()
    assert float((z @ gradient).square().mean()) == pytest.approx(float(gradient.square().sum()), rel=0.1)
    whole = torch.einsum("nar,ncr,cd,nds,nbs->nab", basis[:, :rows], basis[:, :rows], gradient.view(rows, columns),
                         basis[:, rows:], basis[:, rows:]).flatten(1) / RANK**2  # fmt: skip
    spread = float((whole - gradient).square().sum(1).mean() / gradient.square().sum())
    assert spread == pytest.approx((1 + (rows - 1) / RANK) * (1 + (columns - 1) / RANK) - 1, rel=0.1)


def test_a_network_learns_as_well_as_along_full_directions() -> None:
    """At the same number of contributions."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 12, generator=generator)
    y = torch.tanh(x @ torch.randn(12, 12, generator=generator) / 3)

    def final(directions: str, **settings: Any) -> float:
        w = nn.Parameter(torch.zeros(12, 12))
        optimizer = OneByteSPSA([("w", w)], lr=0.2, samples=16, directions=directions, **settings)
        for _ in range(24):
            optimizer.step(lambda: (torch.tanh(x @ w.detach()) - y).square().mean())
        return float((torch.tanh(x @ w.detach()) - y).square().mean())

    full, renewed, kept = final("distinct"), final("subspace", rank=8), final("subspace", rank=4, basis_every=1000)
    assert renewed < 1.25 * full
    assert kept > 1.5 * full  # r^2 = 16 of 144 dimensions, for the whole run


def test_entries_of_a_direction_are_signs() -> None:
    with pytest.raises(ValueError, match="distribution: rademacher"):
        build(distribution="gaussian")
