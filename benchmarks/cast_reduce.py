"""cast_reduce: share of the memory's speed that it reaches, and how many times naive PyTorch takes."""

from __future__ import annotations

import torch
from runner import Row, arguments, copying, measure, report
from torch import Tensor

from thinwire.kernels.cast_reduce import cast_reduce, cast_reduce_reference

CASES = {  # (n, m, dtype): far more bytes than the caches of such a device hold
    "cpu": [
        (2, 1 << 23, torch.bfloat16),
        (4, 1 << 23, torch.bfloat16),
        (4, 1 << 23, torch.float16),
        (4, 1 << 23, torch.float32),
        (16, 1 << 21, torch.bfloat16),
    ],
    "cuda": [
        (2, 1 << 27, torch.bfloat16),
        (4, 1 << 27, torch.bfloat16),
        (4, 1 << 27, torch.float16),
        (4, 1 << 27, torch.float32),
        (8, (1 << 26) - 16, torch.bfloat16),
        (8, (1 << 26) - 1, torch.bfloat16),  # odd rows: no 16-byte loads
        (16, 1 << 26, torch.bfloat16),
        (64, 1 << 24, torch.bfloat16),
    ],
}


def naive(payloads: Tensor, scale: float) -> Tensor:
    return (payloads.float().sum(0) * scale).to(payloads.dtype)


def bench(n: int, m: int, dtype: torch.dtype, device: torch.device, repeats: int) -> Row:
    payloads = torch.randn(n, m, device=device).to(dtype)
    out = torch.empty(m, dtype=dtype, device=device)
    scale = 1 / n
    cast_reduce(payloads, scale=scale, out=out)
    if not torch.equal(out, cast_reduce_reference(payloads, scale=scale, dtype=dtype)):
        raise SystemExit(f"cast_reduce is wrong for n={n}, m={m}, {dtype}: no speed is reported")

    moved_bytes = n * m * payloads.element_size() + m * out.element_size()
    works = {
        "ours": lambda: cast_reduce(payloads, scale=scale, out=out),
        "copy": copying(moved_bytes, device=device),
        "naive": lambda: naive(payloads, scale),
    }
    timing = measure(works, device=device, repeats=repeats)
    ours, copy = timing["ours"].median_s, timing["copy"].median_s
    return {
        "n": n,
        "m": m,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": ours * 1e3,
        "fastest_ms": timing["ours"].fastest_s * 1e3,
        "moved_bytes": moved_bytes,
        "GB/s": moved_bytes / ours / 1e9,
        "copy_GB/s": moved_bytes / copy / 1e9,
        "share_of_copy": copy / ours,
        "times_naive": timing["naive"].median_s / ours,
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    cases = CASES[device.type]
    with torch.no_grad():
        rows = [bench(n, m, dtype, device, options.repeats) for n, m, dtype in cases]
    report(__doc__, rows, device=device, path=options.json)


if __name__ == "__main__":
    main()
