"""The kernels of gossip: one pass over memory where eager PyTorch takes one for every term."""

from __future__ import annotations

import torch
from runner import Row, arguments, copying, measure, report
from torch import Tensor

from thinwire.kernels.swap_with_momentum import swap_with_momentum, swap_with_momentum_reference
from thinwire.kernels.weighted_sum import weighted_sum, weighted_sum_reference

ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
MIXES = [(2, torch.float32), (3, torch.float32), (5, torch.float32), (3, torch.bfloat16), (9, torch.float32)]


def naive_sum(vectors: list[Tensor], weights: list[float]) -> Tensor:
    return sum((v.float() * w for v, w in zip(vectors[1:], weights[1:], strict=True)), start=vectors[0] * weights[0])


def bench_sum(n: int, dtype: torch.dtype, device: torch.device, repeats: int, m: int) -> Row:
    vectors = [torch.randn(m, device=device), *(torch.randn(m, device=device).to(dtype) for _ in range(n - 1))]
    weights = [1 / n] * n
    out = torch.empty(m, device=device)
    if not torch.equal(weighted_sum(vectors, weights, out=out), weighted_sum_reference(vectors, weights)):
        raise SystemExit(f"weighted_sum is wrong for n={n}, {dtype}: no speed is reported")
    moved_bytes = sum(v.nbytes for v in vectors) + out.nbytes
    works = {
        "ours": lambda: weighted_sum(vectors, weights, out=out),
        "copy": copying(moved_bytes, device=device),
        "naive": lambda: naive_sum(vectors, weights),
    }
    return _row(f"sum of {n}, {str(dtype).removeprefix('torch.')}", m, moved_bytes, works, device, repeats)


def bench_swap(device: torch.device, repeats: int, m: int) -> Row:
    x, y, mine, theirs = (torch.randn(m, device=device) for _ in range(4))
    options = {"decay": 0.9, "step": 0.5, "momentum_step": 0.6}
    expected = swap_with_momentum_reference(x, y, mine, theirs, **options)
    swap_with_momentum(x, y, mine, theirs, **options)
    if not (torch.equal(x, expected[0]) and torch.equal(y, expected[1])):
        raise SystemExit("swap_with_momentum is wrong: no speed is reported")
    moved_bytes = 6 * x.nbytes
    works = {
        "ours": lambda: swap_with_momentum(x, y, mine, theirs, **options),
        "copy": copying(moved_bytes, device=device),
        "naive": lambda: swap_with_momentum_reference(x, y, mine, theirs, **options),
    }
    return _row("swap with momentum", m, moved_bytes, works, device, repeats)


def _row(what: str, m: int, moved_bytes: int, works: dict, device: torch.device, repeats: int) -> Row:
    timing = measure(works, device=device, repeats=repeats)
    ours, copy = timing["ours"].median_s, timing["copy"].median_s
    return {
        "what": what,
        "m": m,
        "ms": ours * 1e3,
        "GB/s": moved_bytes / ours / 1e9,
        "share_of_copy": copy / ours,
        "times_naive": timing["naive"].median_s / ours,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--elements", type=int, help="length of the vectors")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    m = options.elements or ELEMENTS[device.type]
    rows = [bench_sum(n, dtype, device, options.repeats, m) for n, dtype in MIXES]
    rows.append(bench_swap(device, options.repeats, m))
    claim = "mixing k neighbours takes one pass: faster than eager PyTorch, which takes one for every term"
    report(claim, rows, device=device, path=options.json)


if __name__ == "__main__":
    main()
