"""Running statistics of a model, such as those of batch normalisation: each rank's own, until they are averaged."""

from __future__ import annotations

import torch
from torch import nn

from thinwire.comm.finite import are_finite
from thinwire.comm.queue import CommQueue
from thinwire.comm.two_shot import TwoShotMean


class Statistics:
    """The floating-point buffers in a model's state_dict.

    Attributes: live, the model's own tensors by name; agreed, copies of what they were after the last average.
    """

    def __init__(self, model: nn.Module) -> None:
        kept = model.state_dict(keep_vars=True).keys()
        self.live = {name: b for name, b in model.named_buffers() if name in kept and b.is_floating_point()}
        self.agreed = {name: buffer.clone() for name, buffer in self.live.items()}
        self._numel = sum(buffer.numel() for buffer in self.live.values())
        self._mean = TwoShotMean(torch.float32)

    def average(self, queue: CommQueue) -> bool:
        """live, agreed <- their mean over the ranks, in fp32; False, and nothing is changed, if that is not finite."""
        if not self.live:
            return True
        flat = torch.cat([buffer.reshape(-1).float() for buffer in self.live.values()])
        queue.submit("local_sgd/statistics", lambda channel: self._mean(channel, flat)).wait()
        if not are_finite([flat]):
            return False
        for name, mean in zip(self.live, flat.split([b.numel() for b in self.live.values()]), strict=True):
            self.agreed[name].copy_(mean.view_as(self.agreed[name]))
        self.go_back()
        return True

    def go_back(self) -> None:
        """live <- agreed."""
        for name, buffer in self.live.items():
            buffer.copy_(self.agreed[name])

    def sent_bytes(self, queue: CommQueue) -> dict[int, int]:
        """Payload bytes of one average, by rank of the queue."""
        return self._mean.sent_bytes(self._numel, queue.rank, queue.size) if self.live else {}
