"""Who averages with whom: one file for each family of graphs, and what can be known of a graph before it is used.

build_graph      settings to a Graph, checked
thinned          each edge only with some probability
spectrum.py      rounds and seconds to consensus, effective resistance
edge_rates.py    how often each link is best used
choose.py        `graph: auto`
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field

from thinwire.comm.gossip.graphs.auto import AutoSettings
from thinwire.comm.gossip.graphs.base_k import BaseKSettings
from thinwire.comm.gossip.graphs.checks import check_graph, check_stochastic
from thinwire.comm.gossip.graphs.edges import EdgesSettings
from thinwire.comm.gossip.graphs.exponential import ExponentialSettings, OnePeerExponentialSettings
from thinwire.comm.gossip.graphs.random_graphs import EquiSettings, ErdosRenyiSettings, MatchingSettings
from thinwire.comm.gossip.graphs.regular import (
    CompleteSettings,
    HypercubeSettings,
    PathSettings,
    RingSettings,
    StarSettings,
    TorusSettings,
)
from thinwire.comm.gossip.graphs.thin import thinned
from thinwire.comm.gossip.graphs.weights import complete_mixing
from thinwire.comm.gossip.mixing import Graph

__all__ = ["EachGraph", "GraphSettings", "build_graph", "check_graph", "check_stochastic", "complete_mixing", "thinned"]

EachGraph: TypeAlias = (
    RingSettings
    | PathSettings
    | TorusSettings
    | HypercubeSettings
    | CompleteSettings
    | StarSettings
    | ExponentialSettings
    | OnePeerExponentialSettings
    | BaseKSettings
    | MatchingSettings
    | ErdosRenyiSettings
    | EquiSettings
    | EdgesSettings
)


def from_name(given: Any) -> Any:
    """Settings of a kind with its defaults, where only its name is given."""
    return {"kind": given} if isinstance(given, str) else given


GraphSettings: TypeAlias = Annotated[EachGraph | AutoSettings, Field(discriminator="kind"), BeforeValidator(from_name)]
"""Settings of any graph, or of auto, by `kind`; a string is the kind with its defaults."""


def build_graph(settings: EachGraph, size: int, seed: int) -> Graph:
    """The graph of so many machines.

    Args:
        seed: 0..2^64-1, of what is drawn.
    Raises:
        ValueError: there is no such graph of so many machines, it is not connected, or its weights are not stochastic.
    """
    if size < 1:
        raise ValueError(f"size: {size}; a graph has one machine or more")
    graph: Graph = settings.build(size, seed)
    check_graph(graph)
    return graph
