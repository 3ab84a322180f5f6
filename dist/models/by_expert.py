"""Rows in the order of the experts that they go to, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ByExpert:
    """A stable order in which the rows of each expert are neighbours.

    Args:
        numbers: (count,) int64, the expert of each row.
        experts: how many there are.

    Attributes: ends, (experts,) int32, where the rows of each end.
    """

    def __init__(self, numbers: Tensor, experts: int) -> None:
        self._order = numbers.argsort(stable=True)
        here = torch.arange(len(numbers), device=numbers.device)
        self._places = torch.empty_like(self._order).scatter_(0, self._order, here)
        of_all = torch.arange(experts, device=numbers.device)
        self.ends = torch.searchsorted(numbers[self._order], of_all, right=True, out_int32=True)

    def sort(self, rows: Tensor, copies: int = 1) -> Tensor:
        """Args: rows (count / copies, width), each of which goes to that many experts, one after another."""
        out: Tensor = _Take.apply(rows, self._order // copies, self._places, copies)  # type: ignore[no-untyped-call]
        return out

    def restore(self, rows: Tensor) -> Tensor:
        """The inverse, where each row went to one."""
        out: Tensor = _Take.apply(rows, self._places, self._order, 1)  # type: ignore[no-untyped-call]
        return out


class _Take(torch.autograd.Function):
    """Rows by number, where it is known how to go back: no sum of gradients in an order that might differ."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return rows[numbers]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        rows = gradient[back].unflatten(0, (len(back) // ctx.copies, ctx.copies))
        return rows.sum(1), None, None, None
