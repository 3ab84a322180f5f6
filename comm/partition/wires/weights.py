"""Settings of the formats in which weights travel."""

from __future__ import annotations

from typing import Literal, TypeAlias

from thinwire.comm.partition.weight_shard import UpdateWire
from thinwire.comm.partition.wires.update import PlainUpdate
from thinwire.comm.partition.wires.wire import Wire

GatherWireSettings: TypeAlias = Literal["same"]
UpdateWireSettings: TypeAlias = Literal["same"]


def build_gather_wire(settings: GatherWireSettings) -> Wire | None:
    """None: the weights' own dtype."""
    return None


def build_update_wire(settings: UpdateWireSettings) -> UpdateWire:
    return PlainUpdate()
