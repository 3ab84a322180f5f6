"""Settings of the formats in which gradients travel over one level."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from thinwire.comm.partition.wires.plain import DTYPES, PlainWire
from thinwire.comm.partition.wires.wire import Wire
from thinwire.comm.settings import Settings


class PlainGradients(Settings):
    """Gradients cast to fp32, bf16 or fp16. feedback: keep what rounding leaves out (levels beyond grads only)."""

    kind: Literal["fp32", "bf16", "fp16"] = "fp32"
    feedback: bool = False

    def build(self) -> Wire:
        return PlainWire(DTYPES[self.kind])


def _by_name(given: Any) -> Any:
    return {"kind": given} if isinstance(given, str) else given


GradientWireSettings = Annotated[PlainGradients, BeforeValidator(_by_name), Field()]
