"""Settings of the formats in which weights travel: while they are gathered, and once they have changed."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from thinwire.comm.partition.weight_shard import UpdateWire
from thinwire.comm.partition.wires.block_codes import BlockCodes
from thinwire.comm.partition.wires.gradients import Block, by_name
from thinwire.comm.partition.wires.quantized import QuantizedWire
from thinwire.comm.partition.wires.update import DifferenceUpdate, PlainUpdate, QuantizedUpdate
from thinwire.comm.partition.wires.wire import Wire
from thinwire.comm.settings import Settings
from thinwire.kernels.block_quantize import Rounding


class SameWeights(Settings):
    """Weights in their own dtype."""

    kind: Literal["same"] = "same"


class Int8Weights(Settings):
    """Weights in 8 bits: round(127 w / a), where a is the largest magnitude among `block` neighbours.

    8 + 32 / block bits a weight. The qwZ of ZeRO++: Wang et al. 2023 (2306.10209), but its range is symmetric here, so
    that the largest weight of a block comes back whole.
    """

    kind: Literal["int8"] = "int8"
    block: Block = 256


class WeightDifferences(Settings):
    """Changes of weights in few bits, whose error the next change makes good.

    The owner sends Q(master - weights), and every rank, the owner too, adds what that decodes to. Jia et al. 2024
    (2410.15526); we may round stochastically too. bits + 32 / block bits a weight: 4.016 of the defaults.

    bits: 4 or 8.
    block: weights that share a scale.
    rounding: nearest or stochastic.
    """

    kind: Literal["difference"] = "difference"
    bits: Literal[4, 8] = 4
    block: Block = 2048
    rounding: Rounding = "nearest"


GatherWireSettings: TypeAlias = Annotated[
    SameWeights | Int8Weights, Field(discriminator="kind"), BeforeValidator(by_name)
]
"""Formats of the gathers in forward and backward; a string is the kind with its defaults."""

UpdateWireSettings: TypeAlias = Annotated[
    SameWeights | Int8Weights | WeightDifferences, Field(discriminator="kind"), BeforeValidator(by_name)
]
"""Formats of changed weights; a string is the kind with its defaults."""


def build_gather_wire(settings: GatherWireSettings) -> Wire | None:
    """None: the weights' own dtype."""
    return None if isinstance(settings, SameWeights) else QuantizedWire(BlockCodes(8, settings.block))


def build_update_wire(settings: UpdateWireSettings) -> UpdateWire:
    if isinstance(settings, SameWeights):
        return PlainUpdate()
    if isinstance(settings, Int8Weights):
        return QuantizedUpdate(BlockCodes(8, settings.block))
    return DifferenceUpdate(BlockCodes(settings.bits, settings.block, settings.rounding))
