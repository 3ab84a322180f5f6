"""Settings of the formats in which gradients travel over one level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from thinwire.comm.partition.levels import WHOLE, Levels
from thinwire.comm.partition.placement import Placement
from thinwire.comm.partition.wires.block_codes import BlockCodes
from thinwire.comm.partition.wires.plain import DTYPES, PlainWire
from thinwire.comm.partition.wires.quantized import QuantizedWire
from thinwire.comm.partition.wires.wire import Wire
from thinwire.comm.settings import Settings
from thinwire.kernels.block_quantize import Rounding

Block = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]
"""Values that share a scale. On a GPU powers of two are fast."""


class PlainGradients(Settings):
    """Gradients cast to fp32, bf16 or fp16.

    feedback: keep what rounding leaves out for the next step; only on levels beyond those of grads.
    """

    kind: Literal["fp32", "bf16", "fp16"] = "fp32"
    feedback: bool = False

    @model_validator(mode="after")
    def _leaves_something_out(self) -> PlainGradients:
        if self.feedback and self.kind == "fp32":
            raise ValueError("feedback: true with fp32, which leaves nothing out; set it to false, or choose bf16")
        return self

    def build(self) -> Wire:
        return PlainWire(DTYPES[self.kind])


class _QuantizedGradients(Settings):
    bits: ClassVar[Literal[8, 4]]

    block: Block = 256
    rounding: Rounding = "nearest"
    smooth: bool = False
    feedback: bool = False

    def build(self) -> Wire:
        return QuantizedWire(BlockCodes(self.bits, self.block, self.rounding, self.smooth))


class Int8Gradients(_QuantizedGradients):
    """Gradients in 8 bits: round(127 g / a), where a is the largest magnitude among `block` neighbours.

    8 + 32 / block bits a value. Each hop quantises once and adds in fp32, as the qgZ of ZeRO++ (Wang et al. 2023,
    2306.10209), but with a symmetric range and fp32 scales, and over any number of hops.

    block: values that share a scale.
    rounding: nearest, or stochastic: up with the probability of the fraction, so that the mean of the error is 0.
    smooth: transform each 32 neighbours by a Hadamard matrix first, so that one large value does not silence the rest
      of its block: Jia et al. 2024 (2410.15526).
    feedback: keep what is left out for the next step; only on levels beyond those of grads.
    """

    kind: Literal["int8"] = "int8"
    bits: ClassVar[Literal[8, 4]] = 8
    block: Block = 512


class Int4Gradients(_QuantizedGradients):
    """Gradients in 4 bits: round(7 g / a). 4 + 32 / block bits a value; otherwise as int8, but smooth by default."""

    kind: Literal["int4"] = "int4"
    bits: ClassVar[Literal[8, 4]] = 4
    block: Block = 128
    smooth: bool = True


def by_name(given: Any) -> Any:
    """Settings of a kind with its defaults, where only its name is given."""
    return {"kind": given} if isinstance(given, str) else given


GradientWireSettings: TypeAlias = Annotated[
    PlainGradients | Int8Gradients | Int4Gradients, Field(discriminator="kind"), BeforeValidator(by_name)
]
"""Formats of gradients; a string is the kind with its defaults."""


def formats_of(
    gradients: Mapping[str, GradientWireSettings], levels: Levels, placement: Placement
) -> dict[str, GradientWireSettings]:
    """The format of every level of the machine, by its name: fp32 where none is given.

    A name of a level that this machine lacks, because there it would be equal to a faster one, stands for that one,
    unless that one has a format of its own; one that joins single ranks stands for no traffic.

    Raises:
        ValueError: a name that no level has, or feedback at a level whose sums are made in every micro-batch.
    """
    given: dict[str, GradientWireSettings] = {}
    for name, settings in gradients.items():
        if name == WHOLE or name not in levels.named:
            known = ", ".join(known for known in levels.named if known != WHOLE)
            raise ValueError(f"gradients.{name}: the machine has no such level; it has {known}")
        depth = levels.named[name]
        if not depth:
            continue
        level = levels.names[depth - 1]
        if settings.feedback and depth <= placement.grads:
            raise ValueError(
                f"gradients.{name}.feedback: true inside the level of grads, {levels.names[placement.grads - 1]}, "
                "where gradients are summed in every micro-batch; only sums made once per step have an error memory: "
                "set it to false, or shard grads over a faster level"
            )
        if name == level or level not in gradients:
            given[level] = settings
    return {name: given.get(name, PlainGradients()) for name in levels.names}
