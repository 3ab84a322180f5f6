"""Compile Triton kernels ahead of time for GPUs that are not there, and read what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from triton_interpreter import INTERPRETING

from thinwire.kernels.triton_kernel import TritonKernel, triton_is_installed

TARGETS = ("sm_90", "sm_100", "gfx942")

needs_compiler = pytest.mark.skipif(
    not triton_is_installed() or INTERPRETING,
    reason="Triton is interpreting, not compiling" if INTERPRETING else "Triton is not installed",
)

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target."""

    registers: int  # per lane
    spilled: int  # bytes of stack and local memory (NVIDIA) or registers (AMD)
    local_accesses: int  # instructions that load or store spilled values
    shared_bytes: int
    wide_loads: int  # instructions that load 16 bytes per lane
    wide_stores: int
    fused: tuple[str, ...]  # fused multiply-adds of floats: none, if the kernel is to equal PyTorch bit for bit
    keeps_subnormals: bool
    assembly: str  # SASS or AMD's


def compile_ahead(
    kernel: TritonKernel,
    target: str,
    *,
    tensors: Mapping[str, torch.dtype],
    constants: Mapping[str, int],
    multiples_of_16: Collection[str],
) -> Compiled:
    """Compile one variant as `TritonKernel.launch` would on such a GPU.

    Args:
        target: one of TARGETS.
        tensors: dtype of each tensor argument; other arguments need a type in the kernel's annotations.
        constants: the compile-time arguments.
        multiples_of_16: tensors whose address, and integers whose value, are divisible by 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    place = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    parameters = kernel.jitted.params
    index = {parameter.name: parameter.num for parameter in parameters}
    types = {name: _POINTERS[dtype] for name, dtype in tensors.items()}
    source = ASTSource(
        kernel.jitted,
        signature={
            p.name: "constexpr" if p.is_constexpr else types.get(p.name) or p.annotation_type for p in parameters
        },
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in multiples_of_16},
    )
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        compiled = triton.compile(source, target=place, options=kernel.options(amd=amd))
    read = _read_amd if amd else _read_nvidia
    return read(compiled.asm, compiled.metadata.shared)


def _read_nvidia(asm: Mapping[str, str | bytes], shared_bytes: int) -> Compiled:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([cuobjdump, what, cubin.name], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-resource-usage", "-sass")
        )
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        registers=resources["REG"],
        spilled=resources["STACK"] + resources["LOCAL"],
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=shared_bytes,
        wide_loads=len(re.findall(r"\bLDG\.E\S*\.128\b", sass)),
        wide_stores=len(re.findall(r"\bSTG\.E\S*\.128\b", sass)),
        fused=tuple(re.findall(r"\bfma\.r\S*f(?:16|32|64)\S*|\bfma\.rn\.bf16\S*", asm["ptx"])),
        keeps_subnormals=".ftz" not in asm["ptx"],
        assembly=sass,
    )


def _read_amd(asm: Mapping[str, str | bytes], shared_bytes: int) -> Compiled:
    text = asm["amdgcn"]
    resources = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text)}
    # v_fma_mix* rounds the product to fp32 before it rounds to fp16, like separate instructions; the others do not.
    return Compiled(
        registers=resources["vgpr_count"],
        spilled=resources["vgpr_spill_count"],
        local_accesses=len(re.findall(r"\bscratch_(?:load|store)_", text)),
        shared_bytes=shared_bytes,
        wide_loads=len(re.findall(r"\b(?:global|buffer|flat)_load_dwordx4\b", text)),
        wide_stores=len(re.findall(r"\b(?:global|buffer|flat)_store_dwordx4\b", text)),
        fused=tuple(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f(?:16|32|64)\S*", text)),
        keeps_subnormals=text.count(".amdhsa_float_denorm_mode_32 3") == 1,
        assembly=text,
    )
