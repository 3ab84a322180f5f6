"""Products of groups of rows with a matrix of their own each: what a layer of experts computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ALIGNED_BYTES = 16  # torch's grouped kernel wants every row to begin at a multiple of this
_LEAST_CAPABILITY = (8, 0)


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Row t of group e times matrix e; differentiable in rows and matrices.

    An operator of its own, so that torch.compile takes it whole although how many rows a group has is known only when
    it runs. Torch's grouped kernel does it where there is one: bf16 on CUDA. Elsewhere one product per group.

    Args:
        rows: (count, inner), sorted by group.
        matrices: (groups, inner, outer), same dtype.
        ends: (groups,) int32, where each group's rows end; the last is count.
    Returns: (count, outer).
    """
    out: Tensor = _product(rows, matrices, ends)
    return out


@torch.library.custom_op("thinwire::grouped_product", mutates_args=())
def _product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    if has_grouped_kernel(rows, matrices.shape[-1]):
        return torch._grouped_mm(rows.contiguous(), matrices, ends)
    out = rows.new_empty(len(rows), matrices.shape[-1])
    sizes = _sizes(ends)
    for part, matrix, result in zip(rows.split(sizes), matrices.unbind(), out.split(sizes), strict=True):
        if len(part):
            torch.mm(part, matrix, out=result)
    return out


@torch.library.custom_op("thinwire::grouped_outer", mutates_args=())
def _outer(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    """For each group, rows^T @ others: (groups, inner, outer); zeros where a group is empty."""
    if has_grouped_kernel(rows, others.shape[-1]):
        return torch._grouped_mm(rows.contiguous().t(), others.contiguous(), ends)
    out = rows.new_empty(len(ends), rows.shape[-1], others.shape[-1])
    sizes = _sizes(ends)
    for part, other, result in zip(rows.split(sizes), others.split(sizes), out.unbind(), strict=True):
        torch.mm(part.t(), other, out=result)  # zeros where there are no rows
    return out


def _sizes(ends: Tensor) -> list[int]:
    return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()


def has_grouped_kernel(rows: Tensor, outer: int) -> bool:
    """Whether torch's own kernel takes these rows, and results as wide as `outer`."""
    return (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and len(rows) > 0
        and all(width * rows.element_size() % _ALIGNED_BYTES == 0 for width in (rows.shape[-1], outer))
        and torch.cuda.get_device_capability(rows.device) >= _LEAST_CAPABILITY
    )


@_product.register_fake
def _(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[-1])


@_outer.register_fake
def _(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[-1], others.shape[-1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, matrices, ends = ctx.saved_tensors
    of_rows = _product(gradient, matrices.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    of_matrices = _outer(rows, gradient, ends) if ctx.needs_input_grad[1] else None
    return of_rows, of_matrices, None


_product.register_autograd(_backward, setup_context=_keep)
