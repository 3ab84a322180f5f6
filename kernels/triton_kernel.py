"""A Triton kernel that stays a plain Python function until it is launched, so that only then is Triton imported."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


@functools.cache
def triton_is_installed() -> bool:
    """Whether `import triton` would find something, without importing it."""
    return importlib.util.find_spec("triton") is not None


class TritonKernel:
    """A function in Triton's language (which it knows as the global `tl` of its module), and how it is launched."""

    def __init__(self, function: Callable[..., None], warps: int, varying: Sequence[str]) -> None:
        self.function = function
        self.warps = warps
        self.varying = varying

    @functools.cached_property
    def jitted(self) -> Any:
        """What `triton.jit` makes of it: compiled when first launched (or interpreted, with TRITON_INTERPRET=1)."""
        import triton

        _give_language(self.function.__globals__)
        return triton.jit(self.function, do_not_specialize=self.varying)

    def options(self, *, amd: bool) -> dict[str, Any]:
        """Compiler options; without fusion, because a fused multiply-add rounds once where PyTorch rounds twice."""
        return {"num_warps": self.warps // 2 if amd else self.warps, "enable_fp_fusion": False}

    def launch(self, programs: int, device: torch.device, *arguments: Tensor | float, **constants: int) -> None:
        """Run `programs` instances on the current stream of `device`; `constants` are compile-time arguments."""
        assert programs > 0, "CUDA refuses an empty grid"
        options = self.options(amd=torch.version.hip is not None)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.jitted[(programs,)](*arguments, **constants, **options)


class TritonPart:
    """A function in Triton's language that kernels call, of this module or of one that imports it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError(f"{self.function.__name__} can only be called by a Triton kernel")

    @functools.cached_property
    def jitted(self) -> Any:
        import triton

        return triton.jit(self.function)


def _give_language(module: dict[str, Any]) -> None:
    """Make the names in a module what Triton takes them for: its language, and its own kind of functions."""
    module["tl"] = importlib.import_module("triton.language")
    for name, value in list(module.items()):
        if isinstance(value, TritonPart):
            module[name] = value.jitted
            _give_language(value.function.__globals__)


triton_part = TritonPart


def triton_kernel(*, warps: int, varying: Sequence[str] = ()) -> Callable[[Callable[..., None]], TritonKernel]:
    """Make a function in Triton's language a TritonKernel.

    Args:
        warps: per program, of 32 lanes each. AMD has 64 lanes in a warp, so half as many are launched there.
        varying: integer arguments whose divisibility by 16 shall not make Triton compile another variant.
    """
    return lambda function: TritonKernel(function, warps, varying)
