"""Settings of `graph: auto`; choose.py is what they ask for."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from thinwire.comm.gossip.graphs.links import ASSUMED, Link, Links
from thinwire.comm.settings import Settings
from thinwire.comm.units import parse_delay, parse_rate


class AutoSettings(Settings):
    """`graph: auto`: the graph with the fewest predicted seconds to consensus.

    link, latency: of every link, such as 100mbit and 20ms; null: measured when a job starts. As measurements vary, so
        may the graph: give them for a run that is to be repeated bit for bit.
    """

    kind: Literal["auto"] = "auto"
    link: str | None = None
    latency: str | None = None

    @field_validator("link")
    @classmethod
    def _rate(cls, link: str | None) -> str | None:
        if link is not None:
            parse_rate(link, "link")
        return link

    @field_validator("latency")
    @classmethod
    def _delay(cls, latency: str | None) -> str | None:
        if latency is not None:
            parse_delay(latency, "latency")
        return latency

    def links(self) -> Links | None:
        """The links as given; None if nothing is."""
        if self.link is None and self.latency is None:
            return None
        bps = ASSUMED.bps if self.link is None else parse_rate(self.link, "link")
        latency_s = ASSUMED.latency_s if self.latency is None else parse_delay(self.latency, "latency")
        return Links(Link(bps, latency_s))
