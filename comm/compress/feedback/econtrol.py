"""EControl: EF21's estimate and classic feedback's error together, with a dial for how hard the error pushes."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.decoded import Decoded, add_to
from thinwire.comm.compress.feedback.ef21 import EF21Feedback
from thinwire.comm.compress.feedback.protocol import FeedbackSettings, Place
from thinwire.comm.compress.feedback.store import Storage


class EControl(FeedbackSettings):
    """`feedback: econtrol`: one message that carries the change of the gradient and a share of the error.

    Gao, Islamov, Stich (2023), arXiv 2311.05645. Each rank keeps an error e and an estimate h_i; all keep h = mean h_i:

        c = C(eta e + g_t - h_i);  e <- e + g_t - h_i - c;  h_i <- h_i + c;  h <- h + mean c;  x <- x - lr h

    All states start at zero. Memory: 20 bytes per parameter, or with storage "int8", which e alone may have, 14.03.

    Args:
        eta: how much of the error is sent at once; around the compressor's contraction factor, or above for speed.
    """

    kind: Literal["econtrol"] = "econtrol"
    eta: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    storage: Storage = "fp32"

    def build(self, place: Place) -> EControlFeedback:
        return EControlFeedback(self, place)


class EControlFeedback(EF21Feedback):
    """The memory of EControl: h_i (own), h (mean) and e (error)."""

    kind = "econtrol"

    def __init__(self, settings: EControl, place: Place) -> None:
        self._eta = settings.eta
        self._errors = self._buffered(settings.storage, "error")
        super().__init__(place, error=self._errors)

    def before(self, name: str, gradient: Tensor) -> Tensor:
        change = super().before(name, gradient)
        error = self._errors.now(name, gradient)
        torch.add(change, error, out=self._errors.next(name, gradient))
        return change.add_(error, alpha=self._eta)

    def after(self, name: str, sent: Decoded | None, mean: Tensor) -> None:
        assert sent is not None
        add_to(self._errors.next(name, mean), sent, -1.0)
        self._errors.seal(name)
        super().after(name, sent, mean)
