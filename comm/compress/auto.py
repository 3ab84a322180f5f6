"""`compressor: auto`: measures link, codecs and the first gradients, and then gives each tensor its compressor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.compress.choice import Choice, Option, choose
from thinwire.comm.compress.collective import Collective
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors import AnyCompressor, EachCompressor, from_name
from thinwire.comm.compress.compressors.block_quantized import Int4, Int8
from thinwire.comm.compress.compressors.dense import BF16, Dense
from thinwire.comm.compress.compressors.low_rank import LowRank
from thinwire.comm.compress.compressors.top_k import TopK
from thinwire.comm.compress.decoded import add_to
from thinwire.comm.compress.draw import Draw
from thinwire.comm.compress.measure import CodecSpeed, measure_codec, measure_link
from thinwire.comm.compress.routes import Route
from thinwire.comm.settings import FROM_LIST, Settings
from thinwire.comm.two_shot import TwoShotMean

_ROUNDS = 2  # latencies of one exchange: to the owners and back, or lengths and payloads
_CANDIDATES: tuple[AnyCompressor, ...] = (
    BF16(),
    Int8(),
    Int4(),
    LowRank(rank=16, dtype="bf16"),
    LowRank(rank=4, dtype="bf16"),
    TopK(density=0.01, values="int8"),
)


class Auto(Settings):
    """Dense at first; then, for each tensor, the compressor of least error that leaves time for the computation.

    share: communication may take this share of the time that a step computes, since about so much of it overlaps.
    measure_steps: steps that are sent dense, and measured, before the choice.
    candidates: what may be chosen besides fp32.
    """

    kind: Literal["auto"] = "auto"
    share: float = Field(0.5, gt=0)
    measure_steps: int = Field(3, ge=2)
    candidates: Annotated[tuple[AnyCompressor, ...], FROM_LIST] = Field(_CANDIDATES, min_length=1)


AnyChoice: TypeAlias = Annotated[EachCompressor | Auto, Field(discriminator="kind"), BeforeValidator(from_name)]
"""Settings of a compressor, or of auto; a string is the kind with its defaults."""


class Chooser:
    """Watches the dense steps, and makes the choice after the last of them: the same on every rank.

    The error of a candidate is measured on the mean gradient of the last dense step, the time of its encoding and
    decoding on this machine, and its bytes are what its collective says; choose() then minimises the error within
    share * (seconds that a step computes). All figures are the slowest rank's.

    Args:
        settings: of `compressor: auto`.
        build: makes the collective of a compressor.
        seed: of what candidates draw at random.
    """

    def __init__(self, settings: Auto, build: Callable[[Compressor], Collective], *, seed: int) -> None:
        self.settings = settings
        self._build = build
        self._seed = seed
        self._observed = 0
        self._last: tuple[float, float] | None = None
        self._compute_s = math.inf
        self._dense = TwoShotMean(torch.float32)

    def observe(self, exposed_s: float) -> bool:
        """At the end of each dense step; returns whether it was the last one, so that the choice is due.

        Args:
            exposed_s: seconds for which the trainer has waited for communication since the start.
        """
        self._observed += 1
        now = time.monotonic()
        if self._last is not None:
            period_s, waited_s = now - self._last[0], exposed_s - self._last[1]
            self._compute_s = min(self._compute_s, max(0.0, period_s - waited_s))
        self._last = now, exposed_s
        return self._observed == self.settings.measure_steps

    def choose(
        self, channel: Channel, gradients: Mapping[str, Tensor], routes: Mapping[str, Route], buckets: int
    ) -> dict[str, Route]:
        """The way of each tensor from now on. Collective, on the CommQueue's thread.

        Args:
            gradients: the mean gradient of the last step, by name; the same on every rank.
            routes: the present ones; a tensor that goes dense by rule is left alone.
            buckets: messages in which a step's tensors are sent.
        """
        names = [name for name, route in routes.items() if route.reason == MEASURING and name in gradients]
        candidates = self.settings.candidates
        device = next(iter(gradients.values())).device
        link = measure_link(channel, device)
        speeds = [measure_codec(candidate, device) for candidate in candidates]
        errors = [self._error(gradients[name], candidate, name) for name in names for candidate in candidates]
        mine = [self._compute_s, *(s for speed in speeds for s in (speed.encode_s, speed.decode_s)), *errors]
        gathered = channel.all_gather_same(torch.tensor(mine, dtype=torch.float64, device=device))
        compute_s, *rest = gathered.amax(0).tolist()
        speeds = [CodecSpeed(*rest[2 * i : 2 * i + 2]) for i in range(len(speeds))]
        errors = rest[2 * len(speeds) :]
        norm = math.fsum(float(gradients[name].double().square().sum()) for name in names)
        latency_s = _ROUNDS * link.latency_s * buckets / max(1, len(names))  # a tensor's part of its bucket's
        options: dict[str, list[Option]] = {}
        for row, name in enumerate(names):
            shape = gradients[name].shape
            sent_bytes = [
                self._sent_bytes(candidate, name, shape, channel.size) for candidate in (Dense(), *candidates)
            ]
            times_s = [0.0, *(_coding_s(c, s, shape, channel.size) for c, s in zip(candidates, speeds, strict=True))]
            found = [0.0, *errors[row * len(candidates) : (row + 1) * len(candidates)]]
            options[name] = [
                Option(_label(c), count, coding_s + 8 * count / link.bps + latency_s, error / norm if norm else 0.0)
                for c, count, coding_s, error in zip((Dense(), *candidates), sent_bytes, times_s, found, strict=True)
            ]
        choices = choose(options, self.settings.share * compute_s)
        return {name: self._route(choices[name]) if name in choices else route for name, route in routes.items()}

    def _error(self, gradient: Tensor, candidate: Compressor, name: str) -> float:
        """||g - C(g)||^2."""
        left = gradient.float().clone(memory_format=torch.contiguous_format)
        draw = Draw(self._seed, 0, name, 0)
        add_to(left, candidate.decode(candidate.encode(left, draw), left.shape, draw), -1.0)
        return float(left.double().square().sum())

    def _sent_bytes(self, candidate: Compressor, name: str, shape: torch.Size, size: int) -> int:
        if isinstance(candidate, Dense):
            return sum(self._dense.sent_bytes(shape.numel(), 0, size).values())
        return sum(self._build(candidate).sent_bytes({name: shape}, 0, size).values())

    def _route(self, choice: Choice) -> Route:
        by_label = {_label(candidate): candidate for candidate in self.settings.candidates}
        return Route(by_label.get(choice.option.label), f"auto: {choice.option.label}; {choice.reason}")


MEASURING = "auto: measuring"
"""The reason of a route that auto has not chosen yet."""


def measuring_routes(shapes: Mapping[str, torch.Size], dense_below: int) -> dict[str, Route]:
    """All tensors dense: the small ones for good, the others until the choice."""
    small = f"fewer than {dense_below:,} elements"
    return {name: Route(None, small if shape.numel() < dense_below else MEASURING) for name, shape in shapes.items()}


def _coding_s(compressor: Compressor, speed: CodecSpeed, shape: torch.Size, size: int) -> float:
    """What is gathered from all is decoded n times; what its owner reduces, about twice."""
    return shape.numel() * (speed.encode_s + (size if compressor.sparse else 2) * speed.decode_s)


def _label(compressor: Compressor) -> str:
    if isinstance(compressor, Dense):
        return "fp32"
    given = compressor.model_dump(exclude_defaults=True)
    kind = given.pop("kind", None) or getattr(compressor, "kind", "?")
    return " ".join([str(kind), *(f"{key}={value}" for key, value in given.items())])
