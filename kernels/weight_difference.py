"""Send changes of weights in few bits: quantise new - old, and add what that decodes to, each in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.kernels.block_payload import BlockFormat, plain_runs
from thinwire.kernels.block_quantize import Rounding
from thinwire.kernels.code_planes import check_plane, needs_reference, tile_elements, tiles
from thinwire.kernels.encode_runs import RunTile, check_payload, check_values, encode_runs_reference
from thinwire.kernels.encode_runs_on_gpu import launch_encode
from thinwire.kernels.reduce_payloads import check_payloads, reduce_reference, sums_of
from thinwire.kernels.reduce_payloads_on_gpu import launch_sum


def encode_difference(
    new: Tensor,
    old: Tensor,
    form: BlockFormat,
    *,
    rounding: Rounding = "nearest",
    key: int = 0,
    payload: Tensor | None = None,
) -> Tensor:
    """Q(new - old), the difference being taken in fp32: what the owner of weights sends once it has changed them.

    Jia et al. 2024 (2410.15526). What Q leaves out is in the next difference, as long as `new` is kept in fp32 and
    `old` is what apply_difference made of it.

    Args:
        new: fp32, flat, contiguous.
        old: fp32, bf16 or fp16, as long.
        form, rounding, key, payload: as of encode_runs, for one run.

    Raises:
        ValueError: arguments other than these.
    """
    name, runs = "encode_difference", plain_runs((new.numel(),))
    check_plane(name, "new", new, (new.numel(),), new.device, torch.float32)
    check_values(name, "old", old, new.device)
    if old.numel() != new.numel():
        raise ValueError(f"{name}: old has {old.numel()} values and new {new.numel()}; they must be the same weights")
    payload = check_payload(name, runs, form, rounding, key, payload, new.device)
    if not runs.numel:
        return payload
    if needs_reference(name, new.device, form.block):
        return payload.copy_(encode_runs_reference(new - old, runs, form, rounding=rounding, key=key, memory=None))
    if new.device.type == "cuda":
        launch_encode(new, runs, form, payload, old=old, stochastic=rounding == "stochastic", key=key)
        return payload
    step = tile_elements(runs.numel, form.block)
    tile, scratch = RunTile(step, form, rounding, key), torch.empty(step)
    tile.begin(payload, runs.numel)
    for start, stop in tiles(runs.numel, form.block, step):
        tile.write(torch.sub(new[start:stop], old[start:stop], out=scratch[: stop - start]), start, start)
    return payload


def apply_difference(payload: Tensor, form: BlockFormat, weights: Tensor) -> Tensor:
    """weights <- weights + decoded, added in fp32 and rounded to their dtype; the same bits on every rank and device.

    Args:
        payload: uint8 (form.payload_bytes(weights.numel()),), contiguous, at 16 bytes.
        weights: fp32, bf16 or fp16, flat, contiguous.

    Raises:
        ValueError: arguments other than these.
    """
    name = "apply_difference"
    check_values(name, "weights", weights, payload.device)
    check_payloads(name, payload[None], form, weights.numel(), 1.0)
    if not weights.numel():
        return weights
    if needs_reference(name, weights.device, form.block):
        return weights.copy_(reduce_reference(payload[None], form, weights.numel(), 1.0).add_(weights))
    if weights.device.type == "cuda":
        launch_sum(payload[None], form, weights, factor=1.0, add=True)
        return weights
    for start, stop, change in sums_of(payload[None], form, weights.numel(), 1.0):
        part = weights[start:stop]
        if part.dtype == torch.float32:
            part.add_(change)
        else:
            part.copy_(change.add_(part))
    return weights
