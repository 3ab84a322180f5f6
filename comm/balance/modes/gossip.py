"""The mode gossip: the last step's counts, as far as a rank has heard of them from its neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thinwire.comm.balance.consensus import ConsensusBus
from thinwire.comm.balance.modes.mode import Setting
from thinwire.comm.balance.modes.stale import Stale
from thinwire.comm.gossip.graphs import EachGraph, build_graph
from thinwire.comm.gossip.mixing import Graph


class Gossip(Stale):
    """As stale, or as ema where decay is given, but f_{t-1} is this rank's estimate by dynamic average consensus.

    One message per step to each neighbour, which nobody waits for; see ConsensusBus for the rule. The estimate of a
    step's counts is off by what the graph has not yet evened out; a moving average makes that error smaller too.

    Args:
        setting: whose bus is a ConsensusBus.
    """

    def __init__(self, setting: Setting, *, decay: float = 0.0) -> None:
        super().__init__(setting, decay=decay)
        assert isinstance(setting.bus, ConsensusBus)
        self._consensus = setting.bus

    def state_dict(self) -> dict[str, Any]:
        """This rank's own."""
        state = super().state_dict()
        return state | {"consensus": self._consensus.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of other modes too: then consensus begins anew."""
        super().load_state_dict(state)
        self._consensus.load_state_dict(state.get("consensus", {}))

    def resized(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The first rank's estimates; what all ranks counted is shared out evenly."""
        both = [state["consensus"] for state in states if "consensus" in state]
        return {**states[0], "consensus": self._consensus.resized(both) if len(both) == len(states) else {}}


def consensus_graph(settings: EachGraph, size: int) -> Graph:
    """Who tells whom.

    Raises:
        ValueError: there is no such graph of so many ranks, it is not connected, or one rank tells another that does
            not tell it.
    """
    try:
        graph = build_graph(settings, size, seed=0)
    except ValueError as error:
        raise ValueError(str(error).replace("method.graph", "balance.graph")) from None
    if not graph.symmetric:
        raise ValueError(
            f"balance.graph: {graph.name} is directed: what one rank loses the other would not gain; give one in which "
            "neighbours swap, such as ring, torus, hypercube or base_k"
        )
    return graph
