"""The mode that settings name, and the bus that it sends by."""

from __future__ import annotations

from collections.abc import Sequence

from thinwire.comm.balance.bus import StatisticsBus
from thinwire.comm.balance.columns import Columns
from thinwire.comm.balance.consensus import ConsensusBus
from thinwire.comm.balance.layer_map import LayerMap
from thinwire.comm.balance.modes.gossip import Gossip, consensus_graph
from thinwire.comm.balance.modes.hier import Hier
from thinwire.comm.balance.modes.mode import Mode, Setting
from thinwire.comm.balance.modes.own import Own
from thinwire.comm.balance.modes.prefix import Prefix
from thinwire.comm.balance.modes.stale import Stale
from thinwire.comm.balance.settings import BalanceSettings
from thinwire.comm.gossip.graphs.regular import RingSettings
from thinwire.comm.queue import CommQueue


def build_bus(
    settings: BalanceSettings,
    queue: CommQueue,
    layers: LayerMap,
    columns: Columns,
    inner: Sequence[int] | None,
    told: Sequence[str],
) -> StatisticsBus:
    """The bus of a mode: arguments as StatisticsBus has them.

    Raises:
        ValueError: mode gossip has no such graph of so many ranks.
    """
    if settings.mode == "gossip":
        graph = consensus_graph(settings.graph or RingSettings(), queue.size)
        return ConsensusBus(queue, layers, columns, told, graph)
    return StatisticsBus(queue, layers, columns, inner, told)


def messages_per_step(settings: BalanceSettings, micro_batches: int) -> tuple[int, int]:
    """How many messages a rank takes part in: (among all ranks, among the near ones).

    One in each step, or, where a micro-batch is balanced against this step's counts, one for each micro-batch.
    """
    if settings.scope == "micro":
        return 0, 0
    if settings.timing == "hier":
        return 1, micro_batches
    messages = micro_batches if settings.timing in ("sync", "late", "carry") else 1
    return (0, messages) if settings.scope == "node" else (messages, 0)


def build_mode(settings: BalanceSettings, setting: Setting) -> Mode:
    """A mode that has seen nothing yet. Its bus is build_bus()'s."""
    if settings.scope == "micro":
        return Own(setting)
    match settings.timing:
        case "sync":
            return Prefix(setting)
        case "late":
            return Prefix(setting, late=True)
        case "carry":
            return Prefix(setting, carry=True)
        case "stale":
            return Stale(setting)
        case "ema":
            assert settings.decay is not None
            return Stale(setting, decay=settings.decay)
        case "hier":
            return Hier(setting)
        case "gossip":
            return Gossip(setting, decay=settings.decay or 0.0)
