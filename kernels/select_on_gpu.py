"""Selection by magnitude on a GPU: one pass counts, a second one writes each entry to a place known beforehand.

Without Triton PyTorch does the same, several times slower. The number of entries selected comes to the host once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.kernels.select_on_cpu import ANY, MAGNITUDE, Addends, sample_pays, sample_plan
from thinwire.kernels.triton_kernel import triton_is_installed, triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 2048  # elements per program


def select_top(values: Tensor, k: int, addends: Addends | None = None) -> Tensor:
    """Indices of the k largest, ascending; with addends, first writes their sum into `values`."""
    numel = values.numel()
    if sample_pays(k, numel):
        stride, rank = sample_plan(k, numel)
        sample = addends[0][::stride] + addends[1][::stride] if addends else values[::stride]
        lower = _kth(_magnitudes(sample), rank).clamp_(min=ANY)
        indices, magnitudes = reaching(values, lower, addends)
        if len(indices) >= k or int(lower) == ANY:
            return _largest(indices, magnitudes, k)
    elif addends:
        torch.add(*addends, out=values)
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    return _largest(*reaching(values, _kth(_magnitudes(values), k).clamp_(min=ANY)), k)


def select_reaching(values: Tensor, lower: int, capacity: int | None, addends: Addends | None = None) -> Tensor:
    """Indices, ascending, of the `capacity` largest whose magnitude has at least the bits `lower`; addends as above."""
    indices, magnitudes = reaching(values, torch.full((1,), lower, dtype=torch.int32, device=values.device), addends)
    return _largest(indices, magnitudes, len(indices) if capacity is None else capacity)


def count_reaching(values: Tensor, lower: int) -> int:
    """How many entries have a magnitude of at least the bits `lower`."""
    return int((_magnitudes(values) >= lower).sum())


def kth_magnitude(values: Tensor, k: int) -> int:
    """The bits of the k-th largest magnitude."""
    return int(_kth(_magnitudes(values), k))


def reaching(values: Tensor, lower: Tensor, addends: Addends | None = None) -> tuple[Tensor, Tensor]:
    """Indices and magnitudes of the entries of at least the magnitude `lower`, int32 (1,)."""
    if values.numel() and values.device.type == "cuda" and triton_is_installed():
        return launch(values, lower, addends)
    if addends:
        torch.add(*addends, out=values)
    magnitudes = _magnitudes(values)
    indices = (magnitudes >= lower).nonzero().view(-1)
    return indices, magnitudes[indices]


def launch(values: Tensor, lower: Tensor, addends: Addends | None = None) -> tuple[Tensor, Tensor]:
    """`reaching` with the Triton kernels, for at least one element."""
    numel, device = values.numel(), values.device
    programs = -(-numel // BLOCK)
    counts = torch.empty(programs, dtype=torch.int32, device=device)
    first, second = addends or (values, values)
    count_kernel.launch(programs, device, first, second, values, lower, counts, numel, **compile_time(addends))
    stops = counts.cumsum(0, dtype=torch.int64)
    total = int(stops[-1])
    indices = torch.empty(total, dtype=torch.int64, device=device)
    magnitudes = torch.empty(total, dtype=torch.int32, device=device)
    if total:
        write_kernel.launch(programs, device, values, lower, stops, counts, indices, magnitudes, numel, BLOCK=BLOCK)
    return indices, magnitudes


def compile_time(addends: Addends | None) -> dict[str, int]:
    """The constants of the counting kernel."""
    return {"ADD": int(addends is not None), "BLOCK": BLOCK}


@triton_kernel(warps=8, varying=("n",))
def count_kernel(
    first: tl.tensor,
    second: tl.tensor,
    sums: tl.tensor,
    lower: tl.tensor,
    counts: tl.tensor,
    n: tl.int64,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    least = tl.load(lower)
    # Two copies: without a mask the compiler can load 16 bytes at a time whatever n is.
    if start + BLOCK <= n:
        x = tl.load(first + start + lane)
        if ADD:
            x += tl.load(second + start + lane)
            tl.store(sums + start + lane, x)
    else:
        inside = lane < n - start
        x = tl.load(first + start + lane, mask=inside, other=0.0)
        if ADD:
            x += tl.load(second + start + lane, mask=inside, other=0.0)
            tl.store(sums + start + lane, x, mask=inside)
    reached = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= least
    tl.store(counts + tl.program_id(0), tl.sum(reached.to(tl.int32)))


@triton_kernel(warps=8, varying=("n",))
def write_kernel(
    values: tl.tensor,
    lower: tl.tensor,
    stops: tl.tensor,
    counts: tl.tensor,
    indices: tl.tensor,
    magnitudes: tl.tensor,
    n: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    count = tl.load(counts + tl.program_id(0))
    if count > 0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        lane = tl.arange(0, BLOCK)
        if start + BLOCK <= n:
            x = tl.load(values + start + lane)
        else:
            x = tl.load(values + start + lane, mask=lane < n - start, other=0.0)
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        reached = magnitude >= tl.load(lower)
        begin = tl.load(stops + tl.program_id(0)) - count
        place = tl.cumsum(reached.to(tl.int32)) - 1
        tl.store(indices + begin + place, start + lane, mask=reached)
        tl.store(magnitudes + begin + place, magnitude, mask=reached)


def _magnitudes(values: Tensor) -> Tensor:
    return values.view(torch.int32) & MAGNITUDE if values.is_contiguous() else values.abs().view(torch.int32)


def _kth(magnitudes: Tensor, k: int) -> Tensor:
    return magnitudes.topk(k).values[-1:]


def _largest(indices: Tensor, magnitudes: Tensor, k: int) -> Tensor:
    """Of candidates in ascending order the k of largest magnitude, in ascending order."""
    if len(indices) <= k or k == 0:
        return indices[:k]
    kth = _kth(magnitudes, k)
    above, equal = magnitudes > kth, magnitudes == kth
    return indices[above | (equal & (equal.cumsum(0) <= k - above.sum()))]
