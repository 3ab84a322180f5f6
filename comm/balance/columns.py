"""What is counted of one layer in one micro-batch: a row of integers, all of which may be added."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """The order of the integers in a row: selections of each expert, tokens, two numbers of faults, and histograms.

    Faults travel with the counts, so that a bad router on one rank becomes an error on every rank.

    Attributes: bad_ids, selections outside 0 .. num_experts - 1; bad_logits, tokens with a NaN or infinite logit; bins,
    of each expert's histogram of margins, see margins.py; 0 = there are none.
    """

    num_experts: int
    bins: int = 0

    @property
    def width(self) -> int:
        """Integers in a row."""
        return self.num_experts * (1 + self.bins) + 3

    @property
    def tokens(self) -> int:
        """The column of valid tokens."""
        return self.num_experts

    @property
    def faults(self) -> slice:
        """The columns of bad_ids and bad_logits."""
        return slice(self.num_experts + 1, self.num_experts + 3)

    def loads(self, rows: Tensor) -> Tensor:
        """The counts of the experts: (..., num_experts)."""
        return rows[..., : self.num_experts]

    def margins(self, rows: Tensor) -> Tensor:
        """The histograms: (..., num_experts, bins)."""
        return rows[..., self.num_experts + 3 :].view(*rows.shape[:-1], self.num_experts, self.bins)

    def fit(self, rows: Tensor | None) -> Tensor | None:
        """Rows that were counted with other histograms, or none: those are left out, and ours are empty."""
        if rows is None or rows.shape[-1] == self.width:
            return rows
        fitted = rows.new_zeros(*rows.shape[:-1], self.width)
        fixed = self.faults.stop
        fitted[..., :fixed] = rows[..., :fixed]
        return fitted

    def of_tally(self, tally: Tensor) -> Tensor:
        """The row of what kernels.route has counted, (num_experts + 3,) int32 in our order; histograms are empty."""
        return F.pad(tally, (0, self.width - len(tally))) if self.bins else tally

    def row(self, logits: Tensor, selected: Tensor, valid: Tensor | None) -> Tensor:
        """Count all but the histograms: (width,) int32, on the device of the logits, without waiting for it.

        Args:
            logits: (tokens, num_experts), floating.
            selected: (tokens, top_k) integers.
            valid: (tokens,) bool, or None where all are.
        """
        experts = self.num_experts
        keep = torch.ones_like(selected[:, :1], dtype=torch.bool) if valid is None else valid[:, None]
        inside = (selected >= 0) & (selected < experts)
        places = torch.where(inside & keep, selected, experts).flatten().long()
        row = torch.zeros(self.width, dtype=torch.int32, device=logits.device)
        row.scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        row[experts] = keep.sum() if valid is not None else len(logits)
        row[experts + 1] = (~inside & keep).sum()
        row[experts + 2] = (~logits.isfinite().all(-1, keepdim=True) & keep).sum()
        return row
