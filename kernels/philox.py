"""Philox4x32-10: random words that are a function of a counter and a key alone, the same on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from thinwire.kernels.triton_kernel import triton_part

if TYPE_CHECKING:
    import triton.language as tl

Distribution: TypeAlias = Literal["rademacher", "gaussian"]
PER_BLOCK: dict[Distribution, int] = {"rademacher": 128, "gaussian": 4}  # elements of a direction per counter

_WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the two words of the key grow by in each round
ROUNDS = 10

Words: TypeAlias = "Tensor | int"


def philox(
    c0: Words, c1: Words, c2: Words, c3: Words, key: int, *, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words per counter (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Each round: (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)), then
    k0 += W0 and k1 += W1, all modulo 2^32. This is the definition that faster forms are held to, and slow.

    Args:
        c0, c1, c2, c3: whole numbers from 0 to 2^32 - 1 or int64 tensors of them, which are broadcast; what has no
            dimensions may be on another device.
        key: k0 + 2^32 k1.
        rounds: 10; the authors' known answers for 7 are the only use of another number here.

    Returns: four int64 tensors with values from 0 to 2^32 - 1.
    """
    check_key(key)
    counter = (c0, c1, c2, c3)
    device = next((word.device for word in counter if isinstance(word, Tensor) and word.dim() > 0), None)
    words = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter)
    a, b, c, d = torch.broadcast_tensors(*words)
    k0, k1 = key & _WORD, key >> 32
    for _ in range(rounds):
        low, high = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # int64 keeps the low 64 bits, which are all there are
        a, b, c, d = (
            (high >> 32 & _WORD) ^ b ^ k0,
            high & _WORD,
            (low >> 32 & _WORD) ^ d ^ k1,
            low & _WORD,
        )
        k0, k1 = k0 + WEYL[0] & _WORD, k1 + WEYL[1] & _WORD
    return a, b, c, d


def direction_reference(
    count: int,
    *,
    key: int,
    tensor: int,
    place: tuple[int, int],
    first: int = 0,
    distribution: Distribution = "rademacher",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements first, first + 1, ... of the direction that belongs to a place: the definition of z.

    Rademacher: element j is the bit (j & 31) of word (j >> 5 & 3) of block j >> 7; 1 stands for +1, 0 for -1.
    Gaussian: element j is the number of ones in word (j & 3) of block j >> 2, less 16: whole numbers of variance 8.
    The counter of a block is (block, tensor, place[0], place[1]).

    Returns: int32 (count,).
    """
    index = torch.arange(first, first + count, device=device)
    per_block = PER_BLOCK[distribution]
    blocks = torch.arange(first // per_block, -(-(first + count) // per_block), device=device)
    words = torch.stack(philox(blocks, tensor, *place, key), dim=1).flatten()
    per_word = per_block // 4
    word = words[torch.div(index, per_word, rounding_mode="floor") - 4 * (first // per_block)]
    if distribution == "rademacher":
        return (2 * (word >> (index & 31) & 1) - 1).to(torch.int32)
    ones = (word[:, None] >> torch.arange(32, device=device) & 1).sum(1)
    return (ones - 16).to(torch.int32)


def check_key(key: int) -> None:
    """Raises ValueError unless 0 <= key < 2^64."""
    if not 0 <= key < 1 << 64:
        raise ValueError(f"philox: key is {key}; it must be from 0 to 2^64 - 1")


@triton_part
def triton_philox(
    c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four words of each counter; all arguments are uint32."""
    for _ in tl.static_range(10):
        low = c0.to(tl.uint64) * 0xD2511F53
        high = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (high >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = high.to(tl.uint32)
        c2 = (low >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = low.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3
