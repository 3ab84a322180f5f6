"""A Triton kernel that stays a plain Python function until it is launched, so Triton is imported only then."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def triton_is_installed() -> bool:
    """Whether `import triton` would find something, without importing it."""
    return importlib.util.find_spec("triton") is not None


class TritonKernel:
    """Decorates a function written in Triton's language, which its module sees as the global `tl`.

    warps: per program, of 32 lanes each. AMD has 64 lanes in one, so half as many are launched there.
    """

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.function: Callable[..., None]

    def __call__(self, function: Callable[..., None]) -> TritonKernel:
        self.function = function
        return self

    def bind(self) -> Callable[..., None]:
        """The function itself, now that Triton is imported and its language is visible to it as `tl`."""
        import triton.language

        self.function.__globals__["tl"] = triton.language
        return self.function

    @functools.cached_property
    def jitted(self) -> Any:
        """What `triton.jit` makes of the function (under Triton's interpreter: an interpreted one)."""
        function = self.bind()
        import triton

        return triton.jit(function)

    def options(self, *, amd: bool) -> dict[str, Any]:
        """Compiler options. No fusion: a fused multiply-add rounds once where PyTorch rounds twice."""
        return {"num_warps": self.warps // 2 if amd else self.warps, "enable_fp_fusion": False}

    def launch(self, programs: int, device: torch.device, *arguments: Tensor | int | float, **constants: int) -> None:
        """Run `programs` instances on the current stream of `device`; `constants` are compile-time arguments."""
        assert programs > 0, "CUDA refuses an empty grid"
        options = self.options(amd=torch.version.hip is not None)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.jitted[(programs,)](*arguments, **constants, **options)
