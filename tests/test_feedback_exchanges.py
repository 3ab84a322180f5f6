"""Every kind of feedback through real compressors and collectives: what is constant arrives in full, on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor

from thinwire.comm.compress.standalone import CompressedMean

SIZE = 3
SHAPES = {"matrix": (40, 30), "vector": (1100,)}
STEPS = 50


def gradient(rank: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("feedback", "compressor", "converges"),
    [
        ("ef", {"kind": "topk", "density": 0.1}, False),
        ("ef21", {"kind": "topk", "density": 0.1}, True),
        ("ef21", "int4", True),
        ({"kind": "ef21_w", "smoothness": [1.0, 2.0, 5.0]}, {"kind": "topk", "density": 0.1}, True),
        ("ef21_sgdm", {"kind": "topk", "density": 0.1}, True),
        ("ef21_pp", {"kind": "topk", "density": 0.2}, True),
        ("ef21_bc", "int4", True),
        ("ef21_sgdm", "int4", True),
        ({"kind": "econtrol", "eta": 0.1}, "int4", False),
    ],
)
def test_what_is_constant_arrives_in_full(feedback: Any, compressor: Any, converges: bool) -> None:
    """The last output for the kinds that learn the gradient; the mean of all outputs for those that only owe."""

    def work(rank: Rank) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        mean = CompressedMean(gradient(rank.rank), compressor=compressor, feedback=feedback, queue=rank.queue())
        total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for _ in range(STEPS):
            tensors = gradient(rank.rank)
            assert mean.allreduce(tensors)
            for name, x in tensors.items():
                total[name] += x / STEPS
        return tensors, total

    outcomes = run_ranks(SIZE, work)
    for name in SHAPES:
        expected = torch.stack([gradient(rank)[name] for rank in range(SIZE)]).mean(0)
        for last, total in outcomes:
            assert torch.equal(last[name], outcomes[0][0][name])
            difference = (last if converges else total)[name] - expected
            assert difference.norm() < (0.01 if converges else 0.25) * expected.norm()
