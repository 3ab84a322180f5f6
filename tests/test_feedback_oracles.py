"""Error feedback against what its papers prove: identities, equalities, counter-examples, noise floors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from feedback_ranks import Compress, Ranks, everything, nothing, rounded, scaled_sign, top
from torch import Tensor

from thinwire.comm.compress.decoded import Decoded, Sparse, to_dense
from thinwire.comm.compress.feedback import EF21W, build_feedback, theory


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


class Quadratics:
    """f_i(x) = x' A_i x / 2 - b_i' x on n ranks, whose largest eigenvalues L_i are spread widely."""

    def __init__(self, n: int = 20, d: int = 10) -> None:
        factors = normal(n, d, d, seed=1) / math.sqrt(d)
        spread = torch.logspace(-1, 1.5, n, dtype=torch.float64)
        self.A = factors @ factors.mT * spread.view(n, 1, 1)
        self.b = normal(n, d, seed=2)
        self.smoothness = torch.linalg.eigvalsh(self.A)[:, -1].tolist()
        self.L = float(torch.linalg.eigvalsh(self.A.mean(0))[-1])
        self.n, self.d = n, d

    def gradients(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"x": A @ x - b} for A, b in zip(self.A, self.b, strict=True)]

    def loss(self, x: Tensor) -> float:
        return float((0.5 * (self.A @ x - 2 * self.b) @ x).mean())

    def least(self) -> float:
        return self.loss(torch.linalg.solve(self.A.mean(0), self.b.mean(0)))


def hard_threshold(x: Tensor) -> Tensor:
    return torch.where(x.abs() >= 0.5, x, 0.0).reshape(-1)


def descend(problem: Quadratics, kind: Any, compress: Compress, lr: float, steps: int) -> Tensor:
    ranks, x, path = Ranks(kind, problem.n), torch.ones(problem.d, dtype=torch.float64), []
    for _ in range(steps):
        x = x - lr * ranks.step(problem.gradients(x), compress)["x"]
        path.append(x)
    return torch.stack(path)


def test_ef21_w_is_ef21_for_homogeneous_compressors_alone() -> None:
    problem = Quadratics()
    weighted = EF21W(smoothness=tuple(problem.smoothness))
    lr = theory.step_size(problem.L, 1 / problem.d, theory.arithmetic_mean(problem.smoothness))
    for compress in (top(1), scaled_sign):
        difference = descend(problem, "ef21", compress, lr, 120) - descend(problem, weighted, compress, lr, 120)
        assert difference.abs().max() < 1e-14
    control = descend(problem, "ef21", hard_threshold, lr, 50) - descend(problem, weighted, hard_threshold, lr, 50)
    assert control.abs().max() > 1e-3


def test_lyapunov_function_never_grows_at_the_larger_step() -> None:
    """Psi = f - f* + lr / (2 theta) sum_i ||g_i - grad f_i||^2 / (n^2 w_i), for EF21 unchanged."""
    problem = Quadratics()
    alpha = 1 / problem.d
    lr = theory.step_size(problem.L, alpha, theory.arithmetic_mean(problem.smoothness))
    weights = theory.weights(problem.smoothness)
    ranks, x, values = Ranks("ef21", problem.n), torch.ones(problem.d, dtype=torch.float64), []
    for _ in range(250):
        gradients = problem.gradients(x)
        direction = ranks.step(gradients, top(1))["x"]
        distortion = sum(
            float((own - gradient["x"]).square().sum()) / (problem.n**2 * weight)
            for own, gradient, weight in zip(ranks.stored("own"), gradients, weights, strict=True)
        )
        values.append(problem.loss(x) - problem.least() + lr / (2 * theory.theta(alpha)) * distortion)
        x = x - lr * direction
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(values))
    assert values[-1] < 0.5 * values[0]


def sum_of(decoded: list[Decoded]) -> Tensor:
    dense = [to_dense(message).double() if isinstance(message, Tensor) else scatter(message) for message in decoded]
    return torch.stack(dense).sum(0)


def scatter(message: Sparse) -> Tensor:
    return torch.zeros(message.numel, dtype=message.values.dtype).index_add_(0, message.indices, message.values)


@pytest.mark.parametrize("compress", [top(3), scaled_sign, rounded, nothing], ids=["top", "sign", "rounded", "nothing"])
@pytest.mark.parametrize(
    "kind", ["ef", {"kind": "dgc", "momentum": 0.0}, {"kind": "dgc", "momentum": 0.9, "masking": False}]
)
def test_nothing_is_lost(kind: Any, compress: Compress) -> None:
    """sum of what was sent + what is left = sum of what came in (under momentum: of its steps), on each rank."""
    steps, size, d = 300, 2, 64
    momentum = kind["momentum"] if isinstance(kind, dict) else 0.0
    ranks = Ranks(kind, size)
    sent, came, step = ([torch.zeros(d, dtype=torch.float64) for _ in range(size)] for _ in range(3))
    for t in range(steps):
        gradients = [{"x": normal(d, seed=size * t + rank)} for rank in range(size)]
        ranks.step(gradients, compress)
        for rank in range(size):
            sent[rank] += sum_of([ranks.sent[rank]])
            step[rank] = momentum * step[rank] + gradients[rank]["x"]
            came[rank] += step[rank]
    for rank in range(size):
        gap = sent[rank] + ranks.stored("error")[rank] - came[rank]
        assert gap.abs().max() < 1e-12 * steps


@pytest.mark.parametrize("kind", ["ef21", "ef21_bc", "ef21_pp", "ef21_sgdm", "econtrol"])
def test_the_estimate_is_the_mean_of_the_ranks_estimates(kind: str) -> None:
    """g = mean g_i, but for what the server still owes in the two-way form."""
    ranks, size = Ranks(kind, 5), 5
    for t in range(50):
        output = ranks.step([{"x": normal(32, seed=size * t + rank)} for rank in range(size)], top(4))["x"]
    mean = torch.stack(ranks.stored("own")).mean(0)
    owed = ranks.server_errors.get("x", torch.zeros(32, dtype=torch.float64))
    assert (owed.abs().max() > 0.01) == (kind == "ef21_bc")
    assert (ranks.stored("mean")[0] + owed - mean).abs().max() < 1e-12
    assert torch.equal(output, ranks.stored("mean")[0])


NOISE = math.sqrt(0.3) * torch.tensor([[2.0, 0.0], [0.0, 1.0], [-2.0, -1.0]], dtype=torch.float64)


def per_copy_top_1(x: Tensor) -> Tensor:
    """Of each row of two the larger: many copies of one experiment in one tensor."""
    larger = x[:, 0].abs() >= x[:, 1].abs()
    return torch.where(torch.stack([larger, ~larger], 1), x, 0.0).reshape(-1)


def noise_floor(kind: Any, lr: float, copies: int, warm_up: int, steps: int) -> float:
    """Mean ||grad f||^2 of f = ||x||^2 / 2 under Top-1 and unit noise, in the steady state."""
    draw, feedback, x, total = generator(3), Ranks(kind, 1), torch.zeros(copies, 2, dtype=torch.float64), 0.0
    for t in range(warm_up + steps):
        noise = NOISE[torch.randint(3, (copies,), generator=draw)]
        x = x - lr * feedback.step([{"x": x + noise}], per_copy_top_1)["x"]
        if t >= warm_up:
            total += float(x.square().sum(1).mean())
    return total / steps


@pytest.mark.parametrize("kind", [{"kind": "ef21_sgdm", "eta": 0.07}, "ef", {"kind": "econtrol", "eta": 0.1}])
def test_noise_floor_is_that_of_uncompressed_sgd(kind: Any) -> None:
    """lr / (2 - lr) for unit noise; plain EF21 ends far above it."""
    sgd = 1e-2 / (2 - 1e-2)
    assert noise_floor(kind, 1e-2, copies=500, warm_up=400, steps=300) == pytest.approx(sgd, rel=0.2)
    assert noise_floor("ef21", 1e-2, copies=500, warm_up=400, steps=300) == pytest.approx(1.3e-2, rel=0.2)


def test_the_floor_of_ef21_does_not_sink_with_the_step() -> None:
    """Ten times smaller, and still half of what it was: eleven times the 5e-4 of uncompressed SGD."""
    assert noise_floor("ef21", 1e-3, copies=200, warm_up=3000, steps=1000) == pytest.approx(5.6e-3, rel=0.2)


def test_feedback_repairs_the_sign() -> None:
    """Slope +4 with probability 1/4, else -1: the mean is +1/4, the mean sign -1/2. Only feedback goes down."""

    def end(kind: str) -> float:
        ranks, x, draw = Ranks(kind, 1), torch.zeros(64, dtype=torch.float64), generator(4)
        for _ in range(2000):
            slope = torch.where(torch.rand(64, generator=draw) < 0.25, 4.0, -1.0).double()
            x = (x - 0.005 * ranks.step([{"x": slope}], scaled_sign)["x"]).clamp(-1.0, 1.0)
        return float(x.mean())

    assert end("none") > 0.9
    assert end("ef") < -0.9


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_dgc_at_full_density_is_momentum_sgd(nesterov: bool, sparse: bool) -> None:
    """Without masking of sparse messages; dense ones are never masked."""
    ranks = Ranks({"kind": "dgc", "momentum": 0.8, "nesterov": nesterov, "masking": not sparse}, 3)
    x, parameter = torch.ones(16, dtype=torch.float64), torch.nn.Parameter(torch.ones(16, dtype=torch.float64))
    peer = torch.optim.SGD([parameter], lr=0.1, momentum=0.8, nesterov=nesterov)
    for t in range(40):
        gradients = [{"x": x * normal(16, seed=3 * t + rank)} for rank in range(3)]
        parameter.grad = torch.stack([gradient["x"] for gradient in gradients]).mean(0)
        peer.step()
        x = x - 0.1 * ranks.step(gradients, top(16) if sparse else everything)["x"]
        assert (x - parameter).abs().max() < 1e-13


def test_dgc_forgets_the_momentum_of_what_it_sent() -> None:
    ranks = Ranks("dgc", 1)
    ranks.step([{"x": torch.tensor([3.0, 1.0, -5.0, 2.0])}], top(2))
    assert ranks.stored("momentum")[0].tolist() == [0.0, 1.0, 0.0, 2.0]
    assert ranks.stored("error")[0].tolist() == [0.0, 1.0, 0.0, 2.0]
    ranks.step([{"x": torch.zeros(4)}], nothing)
    assert ranks.stored("error")[0].tolist() == pytest.approx([0.0, 1.9, 0.0, 3.8])


def test_dgc_warms_up_from_the_papers_densities() -> None:
    feedback = build_feedback({"kind": "dgc", "warmup_steps": 400}, rank=0, size=1)
    seen = []
    for step in (0, 100, 200, 300, 400, 401, 10_000):
        feedback.begin_step(step)
        seen.append(feedback.density(0.001))
    assert seen == pytest.approx([0.25, 0.063, 0.0158, 0.004, 0.001, 0.001, 0.001], rel=0.01)
    assert seen[4:] == [0.001] * 3
    feedback.begin_step(0)
    assert feedback.density(0.5) == 0.5
    assert build_feedback("ef", rank=0, size=1).density(0.01) == 0.01


def test_units_decide_at_which_rate_leftovers_arrive() -> None:
    moved = {}
    for units in ("gradient", "update"):
        rate = {"x": 1.0}
        ranks = Ranks({"kind": "ef", "units": units}, 2, learning_rate=rate.__getitem__)
        ranks.step([{"x": torch.ones(3)}] * 2, nothing)
        rate["x"] = 0.125
        moved[units] = rate["x"] * ranks.step([{"x": torch.zeros(3)}] * 2, everything)["x"]
    assert moved["gradient"].tolist() == [0.125] * 3
    assert moved["update"].tolist() == [1.0] * 3


def test_momentum_with_weight_one_is_ef21() -> None:
    problem = Quadratics()
    momentum = {"kind": "ef21_sgdm", "eta": 1.0}
    assert torch.equal(descend(problem, "ef21", top(1), 1e-3, 50), descend(problem, momentum, top(1), 1e-3, 50))


def test_econtrol_by_its_definition() -> None:
    ranks = Ranks({"kind": "econtrol", "eta": 0.3}, 1)
    e = h = torch.zeros(24, dtype=torch.float64)
    for t in range(40):
        g = normal(24, seed=t)
        delta = scatter(top(3)(0.3 * e + g - h))
        e, h = e + g - h - delta, h + delta
        output = ranks.step([{"x": g}], top(3))["x"]
        assert (output - h).abs().max() < 1e-12
    assert (ranks.stored("error")[0] - e).abs().max() < 1e-12


def test_everything_sent_is_the_plain_mean() -> None:
    """An uncompressed first step is also how EF21 starts at the first gradient, as in the paper."""
    kinds = ["none", "ef", "ef21", "ef21_sgdm", "ef21_bc", "econtrol", EF21W(smoothness=(1.0, 2.0, 4.0))]
    gradients = [{"x": normal(8, seed=rank)} for rank in range(3)]
    mean = torch.stack([gradient["x"] for gradient in gradients]).mean(0)
    for kind in kinds:
        assert (Ranks(kind, 3).step(gradients, everything)["x"] - mean).abs().max() < 1e-15
