"""The forward pass of a router on a CPU: numbers that sort as the scores do, a few tokens at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_ON_ONE_THREAD = 1 << 15  # elements: PyTorch keeps operations of this size on the calling thread
_IN_CACHE = 1 << 17  # elements: what a core's cache holds
_SORT_UP_TO = 128  # experts; sorting whole rows is faster than splitting them first


def route_on_cpu(
    logits: Tensor,
    top_k: int,
    valid: Tensor | None,
    bias: Tensor | None,
    sigmoid: bool,
    renormalise: bool,
    sums: bool,
    tile: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As `route` for checked, contiguous arguments with at least one element, not fp64; tile 0 = the best one."""
    tokens, experts = logits.shape
    step = max(1, (tile or tile_elements()) // experts)
    selected = torch.empty(tokens, top_k, dtype=torch.int64)
    normaliser = torch.empty(tokens)
    total = torch.zeros(experts) if sums else None
    ranks = _Ranks(min(step, tokens), experts)
    needs_scores = sigmoid or sums or bias is not None
    scratch = torch.empty(min(step, tokens), experts) if needs_scores else None
    bad = 0
    for start in range(0, tokens, step):
        here = slice(start, min(start + step, tokens))
        z = logits[here].float()
        keep = None if valid is None else valid[here]
        sum_of, ranked = normaliser[here], z
        if scratch is not None:
            s = scratch[: len(z)]
            _scores(z, s, sum_of, sigmoid)
            ranked = z if bias is None else s + bias
            if total is not None:
                weight = torch.ones(len(z)) if keep is None else keep.float()
                weight = weight / sum_of.clamp(min=torch.finfo(torch.float32).tiny) if sigmoid else weight
                total += torch.mv(s.t(), weight, out=torch.empty_like(total))  # autocast leaves alone what has an out
        else:
            torch.logsumexp(z, -1, out=sum_of)
        low, high = torch.aminmax(z)  # NaN wins both
        is_odd = not math.isfinite(low.item() - high.item())
        if is_odd:
            wrong = ~z.isfinite().all(-1)
            bad += int((wrong if keep is None else wrong & keep).sum())
        ranks.top(ranked, top_k, selected[here].numpy(), is_odd or bias is not None)
    chosen = logits.gather(1, selected).float()
    counted = selected if valid is None else selected[valid]
    tally = torch.zeros(experts + 3, dtype=torch.int32)
    tally[:experts] = torch.from_numpy(np.bincount(counted.numpy().reshape(-1), minlength=experts))
    tally[experts], tally[experts + 2] = len(counted), bad
    return selected, _weights(chosen, normaliser, sigmoid, renormalise), normaliser, tally, total


def tile_elements() -> int:
    """Fewer where PyTorch has more threads: they cost more than they bring while other ranks compute."""
    return _IN_CACHE if torch.get_num_threads() == 1 else _ON_ONE_THREAD


def _scores(z: Tensor, s: Tensor, sum_of: Tensor, sigmoid: bool) -> None:
    if sigmoid:
        torch.sigmoid(z, out=s)
        torch.sum(s, -1, out=sum_of)
    else:
        torch.logsumexp(z, -1, out=sum_of)
        torch.sub(z, sum_of[:, None], out=s).exp_()


def _weights(chosen: Tensor, normaliser: Tensor, sigmoid: bool, renormalise: bool) -> Tensor:
    if sigmoid:
        s = chosen.sigmoid_()
    elif renormalise:
        s = chosen.sub_(chosen.amax(-1, keepdim=True)).exp_()  # PyTorch's softmax is slow on rows this short
    else:
        s = chosen.sub_(normaliser[:, None]).exp_()
    return s.div_(s.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)) if renormalise else s


class _Ranks:
    """Keys that are all different and order as the scores do, of equal ones the lower expert first.

    The bits of a positive fp32 number order like it, those of a negative one the other way; they make the upper half of
    a key, the expert's number from the end the lower half.
    """

    def __init__(self, tokens: int, experts: int) -> None:
        self._keys = np.empty((tokens, experts), np.int64)
        self._bits = np.empty((tokens, experts), np.int32)
        self._signs = np.empty_like(self._bits)
        self._from_end = np.arange(experts - 1, -1, -1, dtype=np.int64)

    def top(self, scores: Tensor, top_k: int, out: np.ndarray, may_be_nan: bool) -> None:
        """Write the best experts of each token, best first: (tokens, top_k) int64."""
        rows, experts = scores.shape
        keys, bits, signs = self._keys[:rows], self._bits[:rows], self._signs[:rows]
        numbers = bits.view(np.float32)
        np.add(scores.numpy(), 0.0, out=numbers)  # -0 becomes 0
        if may_be_nan:
            numbers[np.isnan(numbers)] = np.nan  # one NaN, which is positive: above infinity
        np.right_shift(bits, 31, out=signs)
        np.bitwise_and(signs, 0x7FFFFFFF, out=signs)
        np.bitwise_xor(bits, signs, out=bits)
        np.left_shift(bits, 32, out=keys, dtype=np.int64)
        np.bitwise_or(keys, self._from_end, out=keys)
        if top_k == 1:
            best = keys.max(1, keepdims=True)
        elif experts <= _SORT_UP_TO:
            keys.sort(axis=1)
            best = keys[:, : -top_k - 1 : -1]
        else:
            keys.partition(experts - top_k, axis=1)
            best = np.sort(keys[:, experts - top_k :], axis=1)[:, ::-1]
        np.subtract(experts - 1, best & 0xFFFFFFFF, out=out)
