"""Deep Gradient Compression: momentum on each rank before the compression, forgotten where it has been sent."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.decoded import Decoded, Sparse, add_to
from thinwire.comm.compress.feedback.protocol import FeedbackSettings, Place
from thinwire.comm.compress.feedback.rank_memory import RankMemory
from thinwire.comm.compress.feedback.store import Storage


class DGC(FeedbackSettings):
    """`feedback: dgc`: accumulate the momentum's steps until they are sent.

    Lin, Han, Mao, Wang, Dally (2017), arXiv 1712.01887. On each rank, with m = momentum:

        u <- m u + g_t;  v <- v + u;  send C(v);  v <- v - C(v);  u <- 0 where something was sent (masking)
        nesterov:  u <- m (u + g_t);  v <- v + u + g_t

    The optimizer must then be SGD without momentum. Masking concerns messages that are sparse: with a density of 1 it
    would leave SGD without momentum; a tensor sent densely keeps its u, so that it gets momentum SGD, as biases should.
    Unlike in the paper v keeps what the coding of the values has lost. Clipping is the door's.
    Memory: 16 bytes per parameter, or 4.06 with storage "int8".

    Args:
        warmup_steps: in these the density falls geometrically from first_density to the compressor's own. Four times
            the steps of an epoch give the paper's 25 %, 6.3 %, 1.6 %, 0.4 %, 0.1 % at the ends of the epochs.
    """

    kind: Literal["dgc"] = "dgc"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = False
    masking: bool = True
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    first_density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    storage: Storage = "fp32"

    def build(self, place: Place) -> DGCFeedback:
        return DGCFeedback(self, place)


class DGCFeedback(RankMemory):
    """The memory of DGC: u (momentum) and v (error)."""

    kind = "dgc"
    gives_back_to = ("error", 1.0)

    def __init__(self, settings: DGC, place: Place) -> None:
        self._settings = settings
        self._momentum = self._buffered(settings.storage, "momentum")
        self._errors = self._buffered(settings.storage, "error")
        super().__init__(place, momentum=self._momentum, error=self._errors)

    def before(self, name: str, gradient: Tensor) -> Tensor:
        self._take_in(name, gradient)
        momentum, error = self._momentum.next(name, gradient), self._errors.next(name, gradient)
        decayed, kept = self._settings.momentum, self._momentum.now(name, gradient)
        if self._settings.nesterov:
            torch.add(kept, gradient, out=momentum).mul_(decayed)
            torch.add(self._errors.now(name, gradient), momentum, out=error).add_(gradient)
        else:
            torch.add(gradient, kept, alpha=decayed, out=momentum)
            torch.add(self._errors.now(name, gradient), momentum, out=error)
        return error

    def after(self, name: str, sent: Decoded | None, mean: Tensor) -> None:
        assert sent is not None
        if self._settings.masking and isinstance(sent, Sparse):
            self._momentum.next(name, mean).view(-1).index_fill_(0, sent.indices, 0.0)
        add_to(self._errors.next(name, mean), sent, -1.0)
        self._momentum.seal(name)
        self._errors.seal(name)
        if self._scale != 1.0:
            mean.mul_(self._scale)

    def density(self, final: float) -> float:
        done = min(1.0, self._step / max(1, self._settings.warmup_steps))
        first = max(final, self._settings.first_density)
        return final if done == 1.0 or not self._settings.warmup_steps else first ** (1 - done) * final**done
