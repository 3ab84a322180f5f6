"""Run a test in a process of its own in which Triton interprets kernels on the CPU, with PyTorch's rounding.

Triton decides when it is imported whether it interprets, hence the process. Its interpreter truncates where a kernel
rounds fp32 to bf16, and loses carries where it rounds to fp8, so conversions between floats are handed to PyTorch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from thinwire.kernels.triton_kernel import triton_is_installed

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_TORCH_DTYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def interpreted(test: Callable[[], None]) -> Callable[..., None]:
    """Decorate a test without arguments that launches Triton kernels on CPU tensors; about 3 ms per program."""

    def here() -> None:
        _round_like_torch()
        with np.errstate(all="ignore"):
            test()

    def in_a_process_of_its_own(request: pytest.FixtureRequest) -> None:
        if not triton_is_installed():
            pytest.skip("Triton is not installed")
        node = f"{request.node.path}::{request.node.name}"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", node]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(
            command,
            env=environment,
            cwd=request.config.rootpath,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"under Triton's interpreter:\n{done.stdout}{done.stderr}"

    run = here if INTERPRETING else in_a_process_of_its_own
    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    return run


def _round_like_torch() -> None:
    from triton.runtime import interpreter

    nearest_even = (None, interpreter._ir.ROUNDING_MODE.RTNE)

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        assert rounding in nearest_even, f"a kernel asks for rounding {rounding}; only to nearest even is interpreted"
        values = torch.from_numpy(np.array(data)).view(_TORCH_DTYPES[source.name])
        converted = values.to(_TORCH_DTYPES[target.name])
        return converted.view(_BITS[converted.element_size()]).numpy()

    interpreter._convert_float = convert
