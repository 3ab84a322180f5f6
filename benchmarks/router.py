"""route and router_gradient: time, launches and bytes of a router's forward and backward pass, against eager PyTorch.

Eager is what frameworks do, well written: softmax, topk, renormalised gates, counts by scatter_add, the mean of the
scores, both losses, and autograd. Launches and bytes are those of the GPU path, counted on any machine: each operator
that computes is at least one launch that reads its inputs and writes its outputs. Times are those of this device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from runner import Row, arguments, measure, report
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thinwire.kernels import route_on_gpu, router_gradient_on_gpu
from thinwire.kernels.route import route
from thinwire.kernels.router_gradient import Gates, router_gradient
from thinwire.kernels.triton_kernel import TritonKernel

CASES = [(8192, 8, 2), (8192, 64, 4), (8192, 64, 8), (8192, 128, 8), (4096, 256, 8), (2048, 512, 10)]  # tokens, E, k
COEF, Z_COEF = 1e-2, 1e-3

FREE = ("empty", "detach", "squeeze", "scalar_tensor")  # operators that compute nothing on the device, beside views


class Launches(TorchDispatchMode):
    """Counts operators that compute, and the bytes of what they read and write; Triton's launches by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.moved_bytes = 0

    def add(self, *tensors: object) -> None:
        self.count += 1
        self.moved_bytes += sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not any(free in func.__name__ for free in FREE):
            self.add(args, kwargs, out)
        return out


class Case:
    """One layer's logits, and what comes back through its gates."""

    def __init__(self, tokens: int, experts: int, top_k: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens, self.experts, self.top_k = tokens, experts, top_k
        self.logits = torch.randn(tokens, experts, generator=generator).to(device)
        self.valid = (torch.rand(tokens, generator=generator) > 0.1).to(device)
        self.of_weights = torch.randn(tokens, top_k, generator=generator).to(device)
        self.fractions = torch.softmax(torch.randn(experts, generator=generator), 0).to(device)
        self.pull = self.fractions * (COEF * experts / tokens)
        self.z_scale = torch.tensor(Z_COEF / tokens, device=device)
        self.one = torch.ones((), device=device)
        self.ones = torch.ones(tokens * top_k, dtype=torch.int32, device=device)

    def eager(self) -> tuple[Tensor, Tensor, Tensor]:
        z = self.logits.detach().requires_grad_()
        p = torch.softmax(z, -1)
        weights, selected = p.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        where = torch.where(self.valid[:, None], selected, self.experts).flatten()
        counts = torch.zeros(self.experts + 1, dtype=torch.int32, device=z.device).scatter_add_(0, where, self.ones)
        keep = self.valid.float()
        loss = (COEF * self.experts / self.tokens) * (self.fractions * (keep @ p)).sum()
        loss = loss + (Z_COEF / self.tokens) * (keep * torch.logsumexp(z, -1).square()).sum()
        (gradient,) = torch.autograd.grad([weights, loss], z, [self.of_weights, self.one])
        return selected, counts[:-1], gradient

    def ours(self) -> tuple[Tensor, Tensor, Tensor]:
        done = route(self.logits, self.top_k, self.valid, renormalise=True)
        gates = Gates(done.selected, done.weights, self.of_weights, renormalised=True)
        gradient = router_gradient(
            self.logits, self.pull, self.z_scale, self.valid, normaliser=done.normaliser, gates=gates
        )
        return done.selected, done.tally[: self.experts], gradient

    def ours_on_gpu(self) -> None:
        """Our GPU path; where launches do nothing, its results mean nothing."""
        parts = route_on_gpu.launch(self.logits, self.top_k, self.valid, None, False, True, False)
        gates = Gates(parts[0], parts[1], self.of_weights, renormalised=True)
        out = torch.empty_like(self.logits)
        router_gradient_on_gpu.launch(
            self.logits, self.pull, self.z_scale, self.valid, parts[2], gates, out, sigmoid=False
        )


def counted(work: Callable[[], object]) -> Launches:
    """What it would launch on a GPU; Triton's kernels are counted instead of run."""

    def launch(kernel: TritonKernel, programs: int, device: torch.device, *given: object, **constants: int) -> None:
        launches.add(list({id(t): t for t in given if isinstance(t, Tensor)}.values()))

    with Launches() as launches, patch.object(TritonKernel, "launch", launch):
        work()
    return launches


def bench(tokens: int, experts: int, top_k: int, device: torch.device, repeats: int) -> Row:
    case = Case(tokens, experts, top_k, device)
    (selected, counts, gradient), (theirs, their_counts, expected) = case.ours(), case.eager()
    close = torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7 + 1e-5 * float(expected.abs().max()))
    if not (torch.equal(selected, theirs) and torch.equal(counts, their_counts) and close):
        raise SystemExit(f"the router's kernels are wrong for {tokens} tokens, {experts} experts: no speed is reported")
    launches = {"ours": counted(case.ours_on_gpu), "eager": counted(case.eager)}
    timing = measure({"ours": case.ours, "eager": case.eager}, device=device, repeats=repeats)
    ours, eager = timing["ours"], timing["eager"]
    return {
        "tokens": tokens,
        "experts": experts,
        "top_k": top_k,
        "ours_ms": ours.median_s * 1e3,
        "eager_ms": eager.median_s * 1e3,
        "times_eager": eager.median_s / ours.median_s,
        "times_eager_fastest": eager.fastest_s / ours.fastest_s,
        "launches": launches["ours"].count,
        "eager_launches": launches["eager"].count,
        "moved_bytes": launches["ours"].moved_bytes,
        "eager_moved_bytes": launches["eager"].moved_bytes,
    }


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = [bench(tokens, experts, top_k, device, options.repeats) for tokens, experts, top_k in CASES]
    report(__doc__, rows, device=device, path=options.json)


if __name__ == "__main__":
    main()
