"""Add many random directions to weights on a grid, exactly, in one pass over the weights."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from thinwire.kernels.lattice_add_on_cpu import add_on_cpu
from thinwire.kernels.lattice_add_on_gpu import launch
from thinwire.kernels.philox import PER_BLOCK, Distribution, check_key, direction_reference
from thinwire.kernels.triton_kernel import triton_is_installed

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = range(-100, 127)  # 2^-k and 24 bits above it are fp32 numbers


def lattice_add(
    weights: Tensor,
    coefficients: Tensor,
    places: Tensor,
    *,
    key: int,
    tensor: int,
    exponent: int,
    first: int = 0,
    distribution: Distribution = "rademacher",
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> int:
    """Add whole multiples of random directions to weights that are whole multiples of 2^-k; exact, in one pass.

    out = weights + 2^-k * sum_s coefficients[s] * z_s, rounded once if `out` has less than fp32's precision. As whole
    numbers are added, neither the order of the contributions nor how they are split over calls nor how the tensor is
    cut into shards changes a bit, on any device, and adding the opposite coefficients gives the same weights again.

    That holds while |weights| * 2^k < 2^24 before and after, of which the result tells the second. Sums wrap around
    modulo 2^32, which changes nothing as long as the true sum with the weight is less than 2^31.

    On a GPU this is the Triton kernel, on a CPU numba's code (without either: PyTorch, with a warning; same bits).
    The GPU is waited for.

    Args:
        weights: fp32 (d,), contiguous: elements first to first + d of the tensor.
        coefficients: int32 (S,), S >= 0.
        places: int64 (S, 2), contiguous: the last two words of the directions' counters, 0 to 2^32 - 1.
            On a GPU only their low 32 bits are looked at.
        key: of the generator, 64 bits.
        tensor: the second word of the directions' counters: which tensor this is, 0 to 2^28 - 1.
        exponent: k, -100 to 126.
        first: place of weights[0] in the whole tensor.
        distribution: of the elements z; "rademacher": +1 or -1, "gaussian": see `direction_reference`.
        mask: uint8 (at least ceil((first + d) / 8),), bit i & 7 of byte i >> 3 for element i of the whole tensor;
            elements whose bit is 0 stay as they are. None: all move.
        out: fp32, bf16 or fp16 (d,), contiguous, sharing no memory with the weights unless it is the weights, which
            is the default.

    Returns: the largest |out| * 2^k before rounding, 0 if there are no elements.

    Raises:
        ValueError: a dtype, shape, stride, device or number other than these.
    """
    out = weights if out is None else out
    _check(weights, coefficients, places, key, tensor, exponent, first, distribution, mask, out)
    if weights.numel() == 0:
        return 0
    return _fastest(weights.device.type)(
        weights,
        coefficients,
        places,
        key=key,
        tensor=tensor,
        exponent=exponent,
        first=first,
        distribution=distribution,
        mask=mask,
        out=out,
    )


@functools.cache
def _fastest(device_type: str) -> Callable[..., int]:
    if device_type == "cuda" and triton_is_installed():
        return launch
    if device_type == "cpu" and importlib.util.find_spec("numba") is not None:
        return add_on_cpu
    if device_type not in ("cpu", "cuda"):
        return lattice_add_reference
    missing, extra = ("Triton", "triton") if device_type == "cuda" else ("numba", "onebyte")
    warnings.warn(
        f"lattice_add: {missing} is not installed, so PyTorch makes the directions one by one: same result, a hundred "
        f"times slower; pip install 'thinwire[{extra}]' brings it",
        RuntimeWarning,
        stacklevel=3,
    )
    return lattice_add_reference


@torch.no_grad()
def lattice_add_reference(
    weights: Tensor,
    coefficients: Tensor,
    places: Tensor,
    *,
    key: int,
    tensor: int,
    exponent: int,
    first: int = 0,
    distribution: Distribution = "rademacher",
    mask: Tensor | None = None,
    out: Tensor,
) -> int:
    """The definition of `lattice_add`."""
    d, device = len(weights), weights.device
    total = torch.zeros(d, dtype=torch.int64, device=device)
    for coefficient, (c2, c3) in zip(coefficients.tolist(), places.tolist(), strict=True):
        z = direction_reference(
            d, key=key, tensor=tensor, place=(c2, c3), first=first, distribution=distribution, device=device
        )
        total += coefficient * z.to(torch.int64)
    if mask is not None:
        index = torch.arange(first, first + d, device=device)
        total *= mask[index >> 3] >> (index & 7).to(torch.uint8) & 1
    total += (weights * 2.0**exponent).to(torch.int64)
    total = (total + (1 << 31) & 0xFFFFFFFF) - (1 << 31)
    out.copy_(total.to(torch.float32) * 2.0**-exponent)
    return int(total.abs().amax())


def _check(
    weights: Tensor,
    coefficients: Tensor,
    places: Tensor,
    key: int,
    tensor: int,
    exponent: int,
    first: int,
    distribution: Distribution,
    mask: Tensor | None,
    out: Tensor,
) -> None:
    for name, given, dtypes, shape in _expected(weights, coefficients, places, out):
        if given.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"lattice_add: {name} has dtype {given.dtype}; it must be {allowed}")
        if given.shape != shape:
            raise ValueError(f"lattice_add: {name} has shape {tuple(given.shape)}; it must be {shape}")
        if given.device != weights.device:
            raise ValueError(
                f"lattice_add: {name} is on {given.device} but weights is on {weights.device}; use one device"
            )
        if not given.is_contiguous():
            raise ValueError(f"lattice_add: {name} has strides {given.stride()}; call .contiguous() first")
    check_key(key)
    if not 0 <= tensor < 1 << 28:
        raise ValueError(f"lattice_add: tensor is {tensor}; it must be from 0 to 2^28 - 1")
    if exponent not in EXPONENTS:
        raise ValueError(f"lattice_add: exponent is {exponent}; it must be from {EXPONENTS[0]} to {EXPONENTS[-1]}")
    if distribution not in PER_BLOCK:
        raise ValueError(f"lattice_add: distribution is {distribution!r}; it must be one of {', '.join(PER_BLOCK)}")
    stop, most = first + weights.numel(), PER_BLOCK[distribution] << 32
    if first < 0 or stop > most:
        raise ValueError(
            f"lattice_add: first is {first} with {weights.numel()} weights; a {distribution} direction has elements "
            f"0 to {most - 1}"
        )
    if mask is not None:
        _check_mask(mask, stop, weights.device)
    in_place = out.data_ptr() == weights.data_ptr() and out.dtype == weights.dtype
    if not in_place and _overlap(weights, out):
        raise ValueError("lattice_add: out overlaps weights; give it memory of its own, or the same")
    if places.device.type == "cpu" and (places.numpy() >> 32).any():
        raise ValueError(
            f"lattice_add: places has values from {int(places.amin())} to {int(places.amax())}; they must be from 0 "
            "to 2^32 - 1"
        )


def _expected(
    weights: Tensor, coefficients: Tensor, places: Tensor, out: Tensor
) -> Iterator[tuple[str, Tensor, tuple[torch.dtype, ...], tuple[int, ...]]]:
    d, contributions = weights.numel(), coefficients.numel()
    yield "weights", weights, (torch.float32,), (d,)
    yield "coefficients", coefficients, (torch.int32,), (contributions,)
    yield "places", places, (torch.int64,), (contributions, 2)
    yield "out", out, OUT_DTYPES, (d,)


def _check_mask(mask: Tensor, stop: int, device: torch.device) -> None:
    if mask.dtype != torch.uint8 or mask.dim() != 1 or not mask.is_contiguous():
        raise ValueError(f"lattice_add: mask is {mask.dtype} {tuple(mask.shape)}; it must be contiguous uint8 (bytes,)")
    if mask.numel() < -(-stop // 8):
        raise ValueError(
            f"lattice_add: mask has {mask.numel()} bytes; for elements up to {stop} it needs {-(-stop // 8)}"
        )
    if mask.device != device:
        raise ValueError(f"lattice_add: mask is on {mask.device} but weights is on {device}; use one device")


def _overlap(a: Tensor, b: Tensor) -> bool:
    a_start, b_start = a.data_ptr(), b.data_ptr()
    return a_start < b_start + b.numel() * b.element_size() and b_start < a_start + a.numel() * a.element_size()
