"""What the tests of the quantising kernels share: hostile floats, planes with guards, equality to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.kernels.block_quantize import quantize_reference
from thinwire.kernels.code_planes import codes_bytes, scales_count
from thinwire.kernels.sign_quantize import quantize_sign_reference

_GUARD = 16


def floats(numel: int, seed: int) -> Tensor:
    """Finite fp32 of all magnitudes, with zeros of both signs, ties, and stretches that are zero or almost."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    kind = torch.randint(12, (numel,), generator=generator)
    x[kind == 0], x[kind == 1] = 0.0, -0.0
    x[kind == 2] = torch.round(x[kind == 2] * 4) / 4
    region = torch.randint(8, (numel // 64 + 1,), generator=generator).repeat_interleave(64)[:numel]
    x[region == 0] = 0.0
    for which, factor in ((1, 1e-31), (2, 1e-40), (3, 1e37), (4, 1e-20)):
        x[region == which] *= factor
    x[region == 5] = torch.where(x[region == 5] < 0, -3.0e38, 2.0**-120)
    return x


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    wrong = actual.view(torch.int32 if actual.itemsize == 4 else torch.uint8) != expected.view(
        torch.int32 if actual.itemsize == 4 else torch.uint8
    )
    where = wrong.nonzero().flatten()[:5]
    assert not wrong.any(), f"{what} at {where.tolist()}: {actual[where].tolist()}, not {expected[where].tolist()}"


def reference(
    x: Tensor, *, bits: int, block: int, rounding: str = "nearest", key: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    if bits == 1:
        return quantize_sign_reference(x, block=block)
    return quantize_reference(x, bits=bits, block=block, rounding=rounding, key=key, offset=offset)


class Guarded:
    """Memory for a plane between known bytes, to see whether anything else was written."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.storage = torch.full((count + 2 * _GUARD,), 7, dtype=dtype)
        self.plane = self.storage[_GUARD : _GUARD + count]

    def check(self, expected: Tensor, what: str) -> None:
        assert_same_bits(self.plane, expected, what)
        assert (self.storage[:_GUARD] == 7).all(), f"{what}: wrote before it"
        assert (self.storage[-_GUARD:] == 7).all(), f"{what}: wrote past it"


class GuardedPlanes:
    """Codes and scales for so many elements, guarded."""

    def __init__(self, numel: int, bits: int, block: int) -> None:
        self._codes = Guarded(codes_bytes(numel, bits), torch.uint8)
        self._scales = Guarded(scales_count(numel, block), torch.float32)
        self.codes, self.scales = self._codes.plane, self._scales.plane

    def check(self, expected: tuple[Tensor, Tensor]) -> None:
        self._scales.check(expected[1], "scales")
        self._codes.check(expected[0], "codes")
