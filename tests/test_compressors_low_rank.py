"""Low rank: exact where it can be, correct at rank 1, robust against zero and thin matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import thinwire as tw
from thinwire.comm.compress.compressors.low_rank import orthonormalise
from thinwire.comm.compress.draw import Draw

DRAW = Draw(seed=1, step=2, name="w", rank=0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(compressor: tw.LowRank, x: Tensor) -> Tensor:
    return compressor.decode(compressor.encode(x, DRAW), x.shape, DRAW).view_as(x)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (16, 3, 5, 5)], ids=str)
def test_exact_on_matrices_of_no_more_than_its_rank(rank: int, shape: tuple[int, ...]) -> None:
    rows = shape[0]
    x = (normal(rows, rank) @ normal(rank, torch.Size(shape).numel() // rows, seed=1)).view(shape)
    for compressor in (tw.LowRank(rank=rank), tw.LowRank(rank=rank + 1)):
        assert float((through(compressor, x) - x).norm() / x.norm()) < 1e-5
    assert float((through(tw.LowRank(rank=rank, dtype="bf16"), x) - x).norm() / x.norm()) < 2e-2


def test_never_further_away_than_zero() -> None:
    """C(M) = P P^T M is a projection: ||M||^2 = ||C(M)||^2 + ||M - C(M)||^2."""
    x = normal(50, 60)
    y = through(tw.LowRank(rank=3), x)
    assert float(y.square().sum() + (x - y).square().sum()) == pytest.approx(float(x.square().sum()), rel=1e-5)


def test_sizes() -> None:
    assert tw.LowRank(rank=4).payload_bytes(torch.Size((1024, 4096))) == 4 * 5120 * 4
    assert tw.LowRank(rank=4, dtype="fp16").payload_bytes(torch.Size((1024, 4096))) == 2 * 5120 * 4
    assert tw.LowRank(rank=9).payload_bytes(torch.Size((1000,))) == 4000
    assert tw.LowRank(rank=9).payload_bytes(torch.Size((10, 10))) == 400
    assert tw.LowRank(rank=1).payload_bytes(torch.Size((2, 2))) == 16


@pytest.mark.parametrize("shape", [(7,), (1, 9), (3, 3)], ids=str)
def test_what_factors_would_not_shrink_is_sent_whole(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    assert torch.equal(through(tw.LowRank(rank=4), x), x)


def test_zero_matrices_stay_zero() -> None:
    assert torch.equal(through(tw.LowRank(rank=4), torch.zeros(40, 30)), torch.zeros(40, 30))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_batch_is_the_same_as_one_at_a_time(rank: int) -> None:
    """Rank 1 too: each matrix is normalised by itself, not all together."""
    batch = normal(6, 20, rank) * torch.logspace(-3, 3, 6)[:, None, None]
    together = orthonormalise(batch)
    for matrix, basis in zip(batch, together, strict=True):
        assert torch.equal(orthonormalise(matrix[None])[0], basis)
        assert torch.allclose(basis.mT @ basis, torch.eye(rank), atol=1e-5)
        # The span is that of the columns.
        assert torch.allclose(basis @ (basis.mT @ matrix), matrix, rtol=1e-4, atol=1e-5 * float(matrix.abs().max()))


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(8, 3), torch.ones(8, 3), torch.zeros(8, 1), normal(8, 3) * 1e-30, normal(8, 3) * 1e18],
    ids=["zero", "dependent", "zero of rank 1", "tiny", "huge"],
)
def test_a_basis_of_anything_is_orthonormal(matrix: Tensor) -> None:
    basis = orthonormalise(matrix[None])[0]
    assert torch.allclose(basis.mT @ basis, torch.eye(matrix.shape[1]), atol=1e-5)


def test_more_columns_than_rows_leave_zeros() -> None:
    basis = orthonormalise(normal(2, 3, 5))
    assert basis.shape == (2, 3, 5)
    assert torch.allclose(basis @ basis.mT, torch.eye(3).expand(2, 3, 3), atol=1e-5)
    assert torch.equal(basis[:, :, 3:], torch.zeros(2, 3, 2))
