"""All that defines a run before its first round: with the base weights and the log, its every weight follows."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import Field

from thinwire.comm.settings import Settings

FORMAT = 1


class TensorEntry(Settings):
    """One canonical tensor: tied weights are one, buffers none.

    exponent: its weights are integers times 2^-exponent. eps_log2: it is perturbed by 2^eps_log2.
    rate_scale: its learning rate over the run's. decay: weight decay per unit of learning rate.
    crc32: of its base weights, to name the tensor where the base hash differs.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "bfloat16", "float16"]
    exponent: int
    eps_log2: int
    rate_scale: float = 1.0
    decay: float = 0.0
    crc32: int | None = None


class Numerics(Settings):
    """The settings on which the weights depend; settings.OneByteSettings explains them."""

    eps_log2: int
    directions: Literal["distinct", "shared", "subspace"]
    distribution: Literal["rademacher", "gaussian"]
    scaling: Literal["mean", "sqrt"]
    step_size: Literal["fixed", "std", "ema"]
    ema_decay: float
    snapshot_every: int = Field(gt=0)
    kept: float = Field(gt=0, le=1)
    robust: Literal["none", "clip", "drop", "median"]
    robust_steps: int = Field(ge=0, le=127)
    floor_log2: int
    rank: int = Field(gt=0)
    basis_every: int = Field(gt=0)


class Manifest(Settings):
    """base_hash: SHA-256 of the canonical tensors as they were given, hex. seed: makes equal runs differ."""

    format: Literal[1] = 1
    seed: int
    base_hash: str
    numerics: Numerics
    tensors: tuple[TensorEntry, ...]

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal manifests have equal bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises pydantic.ValidationError, a ValueError, where `data` is no manifest."""
        return cls.model_validate_json(data)

    @property
    def run_id(self) -> str:
        """SHA-256 of to_bytes(), hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()
