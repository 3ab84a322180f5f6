"""Claim: where the ranks' L_i differ widely, EF21 may take the step size of L_AM, and needs so many fewer rounds.

    python benchmarks/ef21_w.py [--workers 1000] [--json FILE]

Richtárik, Gasanov, Burlachenko (2024), arXiv 2402.10774: logistic regression with a non-convex regulariser, Top-1, many
workers. Here on synthetic data, whose scale differs from worker to worker: f_i(x) = mean_j log(1 + exp(-a_ij' x)) +
lambda sum_k x_k^2 / (1 + x_k^2), with the labels' signs in a_ij. For each spread of the scales: rounds until
||grad f|| is a twentieth of what it was, with the step sizes 1 / (L + L_QM xi) and 1 / (L + L_AM xi); and how far apart
the iterates of EF21 and EF21-W get in 500 rounds, for Top-1 (equal) and for a fixed threshold (another algorithm).

All workers are computed at once, in fp64; tests/test_ef21_w_benchmark.py ties this to the classes that train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from runner import Row, arguments, report
from torch import Tensor

from thinwire.comm.compress.feedback import theory

LAMBDA = 0.1
FEATURES = 10
SAMPLES = 5  # of each worker
SPREADS = (0.0, 0.5, 1.0, 1.25)  # standard deviation of log(scale of a worker's data)
TARGET = 0.05  # of the first gradient's norm
ROUNDS = 100_000  # at most
COMPARED = 500  # rounds over which EF21 and EF21-W are compared

Compress = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """data: (workers, samples, features), fp64, the labels' signs included."""

    data: Tensor

    def gradients(self, x: Tensor) -> Tensor:
        """grad f_i(x) of every worker, (workers, features)."""
        _, samples, _ = self.data.shape
        slopes = torch.sigmoid(-(self.data @ x)) / -samples
        regulariser = 2 * LAMBDA * x / (1 + x * x).square()
        return torch.bmm(slopes.unsqueeze(1), self.data).squeeze(1) + regulariser

    def smoothness(self) -> list[float]:
        """L_i = lambda_max(A_i' A_i) / (4 samples) + 2 lambda."""
        return (_largest(self.data.mT @ self.data) / (4 * self.data.shape[1]) + 2 * LAMBDA).tolist()

    def smoothness_of_mean(self) -> float:
        rows = self.data.flatten(0, 1)
        return float(_largest(rows.T @ rows) / (4 * len(rows)) + 2 * LAMBDA)


def synthetic(workers: int, spread: float, seed: int = 0) -> Problem:
    """Gaussian features, labels of a hidden separator with a tenth of them flipped, log-normal scales of workers."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(workers, SAMPLES, FEATURES, generator=draw, dtype=torch.float64)
    hidden = torch.randn(FEATURES, generator=draw, dtype=torch.float64)
    labels = (features @ hidden).sign() * (torch.rand(workers, SAMPLES, generator=draw) < 0.9).double().mul(2).sub(1)
    scales = torch.exp(spread * torch.randn(workers, generator=draw, dtype=torch.float64))
    return Problem(features * labels.unsqueeze(2) * scales.view(workers, 1, 1))


def descend(problem: Problem, weights: Tensor, step_size: float, compress: Compress) -> Iterator[tuple[Tensor, Tensor]]:
    """EF21-W from g_i = grad f_i(x_0) on, x and grad f(x) round by round; weights of 1/n make it EF21.

    c_i = C(grad f_i(x) / (n w_i) - g_i);  g_i <- g_i + c_i;  g <- g + sum w_i c_i;  x <- x - step_size g
    """
    n = len(weights)
    factors, weights = (1 / (n * weights)).unsqueeze(1), weights.unsqueeze(1)
    x = torch.zeros(problem.data.shape[2], dtype=torch.float64)
    gradients = problem.gradients(x)
    own = factors * gradients
    mean = (weights * own).sum(0)
    while True:
        yield x, gradients.mean(0)
        x = x - step_size * mean
        gradients = problem.gradients(x)
        sent = compress(factors * gradients - own)
        own += sent
        mean = mean + (weights * sent).sum(0)


def top_1(x: Tensor) -> Tensor:
    largest = x.abs().argmax(1, keepdim=True)
    return torch.zeros_like(x).scatter_(1, largest, x.gather(1, largest))


def fixed_threshold(x: Tensor) -> Tensor:
    return torch.where(x.abs() >= 0.01, x, 0.0)


def rounds_to_target(problem: Problem, step_size: float) -> int:
    n = len(problem.data)
    first = 0.0
    for count, (_, gradient) in enumerate(descend(problem, torch.full((n,), 1 / n).double(), step_size, top_1)):
        norm = float(gradient.norm())
        first = first or norm
        if norm <= TARGET * first:
            return count
        if count == ROUNDS:
            break
    raise RuntimeError(f"the target was not reached in {ROUNDS} rounds")


def largest_difference(problem: Problem, step_size: float, compress: Compress) -> float:
    weights = torch.tensor(theory.weights(problem.smoothness()), dtype=torch.float64)
    plain = descend(problem, torch.full_like(weights, 1 / len(weights)), step_size, compress)
    weighted = descend(problem, weights, step_size, compress)
    return max(float((next(plain)[0] - next(weighted)[0]).abs().max()) for _ in range(COMPARED))


def measure(workers: int, spread: float) -> Row:
    problem = synthetic(workers, spread)
    smoothness, L = problem.smoothness(), problem.smoothness_of_mean()
    quadratic, arithmetic = theory.quadratic_mean(smoothness), theory.arithmetic_mean(smoothness)
    by_quadratic = theory.step_size(L, 1 / FEATURES, quadratic)
    by_arithmetic = theory.step_size(L, 1 / FEATURES, arithmetic)
    slow, fast = rounds_to_target(problem, by_quadratic), rounds_to_target(problem, by_arithmetic)
    return {
        "workers": workers,
        "spread": spread,
        "L_AM": arithmetic,
        "L_QM": quadratic,
        "step_AM/step_QM": by_arithmetic / by_quadratic,
        "rounds_QM": slow,
        "rounds_AM": fast,
        "ratio": slow / fast,
        "EF21-W_apart": largest_difference(problem, by_arithmetic, top_1),
        "apart_with_threshold": largest_difference(problem, by_arithmetic, fixed_threshold),
    }


def _largest(matrices: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrices)[..., -1]


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu")
    parser.add_argument("--workers", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(options.workers, spread) for spread in SPREADS]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)


if __name__ == "__main__":
    main()
