"""An exchange of A2CiD2 in one pass: weights and their companion flow together, and take up a difference."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.kernels.triton_kernel import triton_is_installed, triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024
_CPU_TILE = 1 << 14  # four vectors and two scratches of it stay in the cache


def swap_with_momentum(
    x: Tensor, y: Tensor, mine: Tensor, theirs: Tensor, *, decay: float, step: float, momentum_step: float
) -> None:
    """Move x and y in place, the same bits on every device; every product and every sum is rounded by itself.

        keep = (1 + decay) / 2,  give = (1 - decay) / 2,  d = theirs - mine
        x, y <- (keep x + give y) + step d,  (give x + keep y) + momentum_step d

    The first part is what x' = eta (y - x), y' = eta (x - y) does in a time t with decay = exp(-2 eta t); the second a
    pairwise exchange. Eager PyTorch takes some ten passes over memory for it.

    On a GPU this is a Triton kernel (without Triton: PyTorch, with a warning), elsewhere PyTorch in tiles.

    Args:
        x, y: (m,), fp32 (or fp64, without the kernel), contiguous, on one device, sharing no memory.
        mine, theirs: as x; not changed.
        decay: 0..1; 1 = no time has passed.
        step, momentum_step: finite.

    Raises:
        ValueError: a dtype, shape, device or number other than these.
    """
    _check(x, y, mine, theirs, decay, step, momentum_step)
    if x.numel() == 0:
        return
    numbers = ((1 + decay) / 2, (1 - decay) / 2, step, momentum_step)
    with torch.no_grad():
        if x.is_cuda and x.dtype == torch.float32 and triton_is_installed():
            launch(x, y, mine, theirs, numbers)
        else:
            if x.is_cuda and x.dtype == torch.float32:
                warnings.warn(
                    "swap_with_momentum: Triton is not installed, so PyTorch mixes GPU tensors: same result, several "
                    "times slower; pip install 'thinwire[triton]' brings it",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _swap_in_tiles(x, y, mine, theirs, numbers, x.numel() if x.is_cuda else _CPU_TILE)


def swap_with_momentum_reference(
    x: Tensor, y: Tensor, mine: Tensor, theirs: Tensor, *, decay: float, step: float, momentum_step: float
) -> tuple[Tensor, Tensor]:
    """The definition of `swap_with_momentum`: new (x, y)."""
    keep, give, difference = (1 + decay) / 2, (1 - decay) / 2, theirs - mine
    return (x * keep + y * give) + difference * step, (x * give + y * keep) + difference * momentum_step


@triton_kernel(warps=8, varying=("m",))
def kernel(
    x: tl.tensor,
    y: tl.tensor,
    mine: tl.tensor,
    theirs: tl.tensor,
    keep: tl.float32,
    give: tl.float32,
    step: tl.float32,
    momentum_step: tl.float32,
    m: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = start + tl.arange(0, BLOCK)
    inside = lane < m
    if start + BLOCK <= m:
        a = tl.load(x + lane)
        b = tl.load(y + lane)
        d = tl.load(theirs + lane, eviction_policy="evict_first") - tl.load(mine + lane, eviction_policy="evict_first")
        tl.store(x + lane, (a * keep + b * give) + d * step)
        tl.store(y + lane, (a * give + b * keep) + d * momentum_step)
    else:
        a = tl.load(x + lane, mask=inside)
        b = tl.load(y + lane, mask=inside)
        d = tl.load(theirs + lane, mask=inside) - tl.load(mine + lane, mask=inside)
        tl.store(x + lane, (a * keep + b * give) + d * step, mask=inside)
        tl.store(y + lane, (a * give + b * keep) + d * momentum_step, mask=inside)


def launch(x: Tensor, y: Tensor, mine: Tensor, theirs: Tensor, numbers: tuple[float, float, float, float]) -> None:
    """Run the Triton kernel on checked, non-empty arguments; numbers: keep, give, step, momentum_step."""
    kernel.launch(-(-x.numel() // BLOCK), x.device, x, y, mine, theirs, *numbers, x.numel(), BLOCK=BLOCK)


def _swap_in_tiles(
    x: Tensor, y: Tensor, mine: Tensor, theirs: Tensor, numbers: tuple[float, float, float, float], tile: int
) -> None:
    keep, give, step, momentum_step = numbers
    m = x.numel()
    moved, scratch = (torch.empty(min(m, tile), dtype=x.dtype, device=x.device) for _ in range(2))
    for start in range(0, m, tile):
        stop = min(start + tile, m)
        a, b = x[start:stop], y[start:stop]
        new, other = moved[: stop - start], scratch[: stop - start]
        torch.mul(a, keep, out=new).add_(torch.mul(b, give, out=other))  # x, but for the difference
        torch.mul(b, keep, out=other)
        torch.mul(a, give, out=a).add_(other)  # y, but for the difference; the sum is the same in either order
        b.copy_(a)
        a.copy_(new)
        torch.sub(theirs[start:stop], mine[start:stop], out=new)
        a.add_(torch.mul(new, step, out=other))
        b.add_(torch.mul(new, momentum_step, out=other))


def _check(x: Tensor, y: Tensor, mine: Tensor, theirs: Tensor, decay: float, step: float, momentum_step: float) -> None:
    for name, tensor in (("x", x), ("y", y), ("mine", mine), ("theirs", theirs)):
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != x.dtype:
            raise ValueError(f"swap_with_momentum: {name} has dtype {tensor.dtype}; all must be fp32, or all fp64")
        if tensor.dim() != 1 or tensor.shape != x.shape:
            raise ValueError(
                f"swap_with_momentum: {name} has shape {tuple(tensor.shape)}; all must have one shape (m,)"
            )
        if tensor.device != x.device:
            raise ValueError(f"swap_with_momentum: {name} is on {tensor.device}, x on {x.device}; use one device")
        if not tensor.is_contiguous():
            raise ValueError(f"swap_with_momentum: {name} is not contiguous; call .contiguous() first")
    if not 0 <= decay <= 1:
        raise ValueError(f"swap_with_momentum: decay is {decay}; it must be in 0..1")
    if not (math.isfinite(step) and math.isfinite(momentum_step)):
        raise ValueError(f"swap_with_momentum: step is {step} and momentum_step {momentum_step}; both must be finite")
    for name, written in (("x", x), ("y", y)):
        for other_name, other in (("x", x), ("y", y), ("mine", mine), ("theirs", theirs)):
            ends = (written.data_ptr() + written.nbytes, other.data_ptr() + other.nbytes)
            if other_name != name and written.data_ptr() < ends[1] and other.data_ptr() < ends[0]:
                raise ValueError(f"swap_with_momentum: {name} shares memory with {other_name}; give it its own")
