"""Feedback ef21_w through its door: estimated L_i are exchanged, weigh the ranks, and both step sizes are told."""

from __future__ import annotations

import pytest
import torch
from ranks import Rank, run_ranks

import thinwire as tw


def test_ranks_are_weighed_by_what_each_has_estimated() -> None:
    targets = [torch.tensor([4.0, -2.0]), torch.tensor([0.0, 6.0]), torch.tensor([-1.0, -1.0])]
    curvatures = [1.0, 2.0, 5.0]

    def work(rank: Rank) -> tuple[list[float], torch.Tensor, dict[str, float], str]:
        queue = rank.queue()
        x = torch.zeros(2)
        feedback = tw.EF21W(contraction=0.5)
        mean = tw.CompressedMean(
            {"x": x}, compressor=tw.TopK(density=0.5, values="fp32"), feedback=feedback, dense_below=0, queue=queue
        )
        assert "step sizes" in mean.describe()
        estimate = tw.SmoothnessEstimate()
        told: list[float] = []
        for step in range(300):
            gradient = curvatures[rank.rank] * (x - targets[rank.rank])
            estimate.observe({"x": x}, {"x": gradient})
            if step == 3:
                told = mean.weigh_by(estimate.smoothness)
            assert mean.allreduce({"x": gradient})
            x = x - 0.05 * gradient
        queue.close()
        return told, x, mean.metrics(), mean.describe()

    optimum = sum(c * t for c, t in zip(curvatures, targets, strict=True)) / sum(curvatures)
    for told, x, metrics, text in run_ranks(3, work):
        torch.testing.assert_close(torch.tensor(told), torch.tensor(curvatures), rtol=1e-5, atol=0)
        torch.testing.assert_close(x, optimum, rtol=0, atol=1e-4)
        assert metrics["step_size"] > metrics["step_size_ef21"]
        assert f"{metrics['step_size']:.4g}" in text


def test_other_feedbacks_have_no_weights() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        mean = tw.CompressedMean({"x": torch.zeros(3)}, compressor="int8", queue=queue)
        with pytest.raises(ValueError, match="feedback ef has no weights; give feedback: ef21_w"):
            mean.weigh_by(1.0)
        queue.close()

    run_ranks(1, work)


@pytest.mark.parametrize("feedback", ["dgc", "ef21_w", "ef21_pp"])
def test_feedbacks_of_single_ranks_are_refused_for_groups_that_send_one_message(feedback: str) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        with pytest.raises(ValueError, match="give exact_within: null"):
            tw.CompressedMean(
                {"x": torch.zeros(3)}, compressor="topk", feedback=feedback, exact_within=[[0, 1]], queue=queue
            )
        queue.close()

    run_ranks(2, work)
