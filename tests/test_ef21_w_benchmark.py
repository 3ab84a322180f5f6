"""benchmarks/ef21_w.py computes all workers at once: the same as the classes that train, one by one."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from feedback_ranks import Ranks, everything, top

from thinwire.comm.compress.feedback import EF21, EF21W, AnyFeedback, theory


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "ef21_w.py"
    monkeypatch.syspath_prepend(str(path.parent))
    specification = importlib.util.spec_from_file_location("ef21_w_benchmark", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("weighted", [False, True])
def test_vectorised_workers_do_as_the_classes_do(benchmark: ModuleType, weighted: bool) -> None:
    workers, rounds = 8, 60
    problem = benchmark.synthetic(workers, 1.5)
    smoothness = problem.smoothness()
    weights = theory.weights(smoothness if weighted else [1.0] * workers)
    kind: AnyFeedback = EF21W(smoothness=tuple(smoothness)) if weighted else EF21()
    lr = theory.step_size(problem.smoothness_of_mean(), 1 / benchmark.FEATURES, theory.arithmetic_mean(smoothness))
    expected = benchmark.descend(problem, torch.tensor(weights, dtype=torch.float64), lr, benchmark.top_1)
    ranks, x = Ranks(kind, workers), torch.zeros(benchmark.FEATURES, dtype=torch.float64)
    for t, (there, _) in enumerate(itertools.islice(expected, rounds)):
        assert (x - there).abs().max() < 1e-14
        gradients = [{"x": gradient} for gradient in problem.gradients(x)]
        x = x - lr * ranks.step(gradients, top(1) if t else everything)["x"]
    assert x.abs().max() > 1e-3


def test_gradients_and_smoothness_are_those_of_the_loss(benchmark: ModuleType) -> None:
    problem = benchmark.synthetic(3, 1.0)

    def losses(x: torch.Tensor) -> torch.Tensor:
        logistic = torch.nn.functional.softplus(-(problem.data @ x)).mean(1)
        return logistic + benchmark.LAMBDA * (x * x / (1 + x * x)).sum()

    x = torch.linspace(-1, 1, benchmark.FEATURES, dtype=torch.float64)
    assert torch.allclose(torch.autograd.functional.jacobian(losses, x), problem.gradients(x), rtol=0, atol=1e-12)
    for worker, bound in enumerate(problem.smoothness()):
        for place in (torch.zeros_like(x), x):
            hessian = torch.autograd.functional.hessian(lambda y, i=worker: losses(y)[i], place)
            assert float(torch.linalg.eigvalsh(hessian).abs().max()) <= bound * (1 + 1e-12)
