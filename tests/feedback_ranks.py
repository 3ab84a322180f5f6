"""Ranks in one process, without a network: what a door and a collective do with each rank's feedback, in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.compress.decoded import Decoded, Sparse, add_to
from thinwire.comm.compress.feedback import Feedback, build_feedback

Compress = Callable[[Tensor], Decoded]


def top(k: int) -> Compress:
    def compress(x: Tensor) -> Sparse:
        flat = x.reshape(-1)
        indices = flat.abs().topk(min(k, flat.numel())).indices.sort().values
        return Sparse(flat.numel(), indices, flat[indices])

    return compress


def everything(x: Tensor) -> Tensor:
    return x.reshape(-1).clone()


def nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x).reshape(-1)


def scaled_sign(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return flat.sign() * flat.abs().mean()


def rounded(x: Tensor) -> Tensor:
    """To 15 levels of the largest value."""
    flat = x.reshape(-1)
    scale = flat.abs().max() / 7
    return (flat / scale).round() * scale


class Ranks:
    """n feedbacks and the mean that a collective would write. `server_error`: as TwoShot would keep it, unsliced."""

    def __init__(self, kind: str | Mapping[str, Any], size: int, seed: int = 0, **more: Any) -> None:
        self.feedbacks: list[Feedback] = [
            build_feedback(kind, rank=rank, size=size, seed=seed, **more) for rank in range(size)
        ]
        self.step_count = 0
        self.server_errors: dict[str, Tensor] = {}
        self.sent: list[Decoded] = []

    def step(
        self,
        gradients: Sequence[Mapping[str, Tensor]],
        compress: Compress,
        *,
        scale: float = 1.0,
        finish: bool = True,
    ) -> dict[str, Tensor]:
        """One step on all ranks; returns the gradients for the optimizer, which all ranks agree on bit for bit."""
        size = len(self.feedbacks)
        for feedback in self.feedbacks:
            feedback.begin_step(self.step_count, scale)
        outputs = {}
        for name in gradients[0]:
            mine = [rank[name].clone() * scale for rank in gradients]
            outputs[name] = self._mean(name, mine, compress, size)
        if finish:
            self.step_count += 1
            for feedback in self.feedbacks:
                feedback.commit()
        return outputs

    def _mean(self, name: str, gradients: list[Tensor], compress: Compress, size: int) -> Tensor:
        total = torch.zeros_like(gradients[0])
        sent: list[Decoded | None] = []
        self.sent = []
        for feedback, gradient in zip(self.feedbacks, gradients, strict=True):
            weights = feedback.weights(size)
            pair = feedback.memories(name, gradient)
            if pair is None:
                decoded = compress(feedback.before(name, gradient))
                sent.append(decoded)
            else:
                torch.add(gradient, pair[0], out=pair[1])
                decoded = compress(pair[1])
                add_to(pair[1], decoded, -1.0)
                sent.append(None)
            self.sent.append(decoded)
            add_to(total, decoded, 1.0 if weights is None else weights[len(sent) - 1])
        mean = total / size
        if self.feedbacks[0].server_error:
            wanted = mean + self.server_errors.get(name, torch.zeros_like(mean))
            mean = torch.zeros_like(mean)
            add_to(mean, compress(wanted))
            self.server_errors[name] = wanted - mean
        if not mean.isfinite().all():
            return mean  # a collective then says so on every rank, and no after() is called
        outputs = [mean.clone() for _ in self.feedbacks]
        for feedback, decoded_or_none, output in zip(self.feedbacks, sent, outputs, strict=True):
            feedback.after(name, decoded_or_none, output)
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        return outputs[0]

    def stored(self, label: str, name: str = "x") -> list[Tensor]:
        """What each rank has committed."""
        return [feedback.state_dict()["stores"][label][name] for feedback in self.feedbacks]
