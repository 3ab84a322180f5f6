"""A cluster as a YAML file describes it, or as `thinwire probe` has measured it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from thinwire.comm.forecast import Seat, seat_of
from thinwire.comm.settings import Settings
from thinwire.comm.units import parse_delay, parse_rate
from thinwire.dist.config_errors import ConfigError, explain
from thinwire.dist.probe.records import CollectiveTime, PairTimes

_STEADY = 0.1  # by which the timing of matrix products differs on a machine that does nothing else


def _rate(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)  # YAML 1.1 takes 1e9 for a word
    except ValueError:
        return parse_rate(value, "link_bps")


def _seconds(value: Any) -> Any:
    return parse_delay(value, "seconds") if isinstance(value, str) else value


Rate = Annotated[float, BeforeValidator(_rate), Field(gt=0)]
"""Bits per second: a number, or a text such as 1gbit."""
Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0)]
"""Seconds: a number, or a text such as 20ms."""


class LinkLevel(Settings):
    """What joins the groups of the level before.

    name: such as pair, node, world. size: ranks in each group, those of the faster levels included.
    link_bps: of one link, in each direction. latency_s: one way, of a small message.
    ranks_per_link: how many ranks send over one link at a time: 8 where the GPUs of a node share one card.
    shots: what a probe measured: (bytes that each rank sends in one shot, seconds), of more and more bytes. A line
      between them takes the place of rate and latency, which small and large messages do not have in common.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    size: int = Field(gt=0)
    link_bps: Rate
    latency_s: Seconds = 0.0
    ranks_per_link: int = Field(1, gt=0)
    shots: tuple[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]], ...] = ()

    @model_validator(mode="after")
    def _shots_ascend(self) -> LinkLevel:
        sizes = [size for size, _ in self.shots]
        if any(b <= a for a, b in itertools.pairwise(sizes)):
            raise ValueError(f"shots: bytes must ascend, and are {', '.join(f'{size:g}' for size in sizes)}")
        return self

    def send_s(self, sent_bytes: float, shots: float = 0.0) -> float:
        """Seconds until all ranks have sent these bytes each, and waited for so many latencies: the alpha-beta model.

        Hockney 1994: alpha + n / beta for each message, where a link is shared by as many as send over it. Where a
        probe has measured messages of many sizes, between them.
        """
        if self.shots and shots:
            return shots * _between(self.shots, sent_bytes / shots)
        return 8 * sent_bytes * self.ranks_per_link / self.link_bps + shots * self.latency_s

    def with_rate(self, link_bps: float) -> LinkLevel:
        """The same level with other links; what was measured is as much slower or faster, but for the latency."""
        slower = self.link_bps / link_bps
        shots = tuple((size, min(s, self.latency_s) + max(0.0, s - self.latency_s) * slower) for size, s in self.shots)
        return self.model_copy(update={"link_bps": link_bps, "shots": shots})


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """On the lines that join the points; before the first what it has, after the last in proportion to x."""
    for (x0, y0), (x1, y1) in itertools.pairwise(((0.0, points[0][1]), *points)):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1] * x / max(points[-1][0], 1.0)


class Device(Settings):
    """One rank's processor. peak_flops: per second, at the precision of the run; utilisation: the share that is got."""

    name: str = ""
    memory_bytes: float = Field(gt=0)
    peak_flops: float = Field(gt=0)
    utilisation: float = Field(0.4, gt=0, le=1)

    @property
    def flops_per_s(self) -> float:
        """What training gets."""
        return self.peak_flops * self.utilisation


class CodecSpeed(Settings):
    """Seconds per element on one rank while all ranks work, and in addition of one call whatever its size.

    handle: what the pipeline of method compress does besides with a group of tensors.
    """

    encode_s: float = Field(ge=0)
    decode_s: float = Field(ge=0)
    encode_call_s: float = Field(0.0, ge=0)
    decode_call_s: float = Field(0.0, ge=0)
    handle_s: float = Field(0.0, ge=0)
    handle_call_s: float = Field(0.0, ge=0)


class SweepSpeed(Settings):
    """Of one-byte updates, seconds per element on one rank while all ranks work.

    pass_s: of a pass over the weights. direction_s: of each direction that is added in it.
    """

    pass_s: float = Field(ge=0)
    direction_s: float = Field(ge=0)


class ComputeSpeed(Settings):
    """Seconds that one rank computes while all do, of one micro-batch, and of the optimizer.

    config: digest of the settings that it depends on: see compute_digest().
    coupled_s: by which a step is longer where the ranks wait for one another in its backward pass, whatever they send:
      they are not all equally fast at all times, least of all where they share processors.
    forward_alone_s: of a forward pass that keeps nothing for a backward pass; 0: not timed.
    """

    config: str
    micro_batch: int = Field(gt=0)
    forward_s: float = Field(ge=0)
    backward_s: float = Field(ge=0)
    optimizer_s: float = Field(ge=0)
    coupled_s: float = Field(0.0, ge=0)
    forward_alone_s: float = Field(0.0, ge=0)


class Measured(Settings):
    """What a probe adds to a description.

    hosts: a name for each rank's.
    cores_per_rank: processors that a rank has for itself; the ranks of an emulated cluster share some.
    drift: by what part matrix products were faster at the probe's end than at its beginning; null: unknown.
    cpu_s_per_byte: seconds for which a processor is busy with each byte that a rank sends, and receives, while all do;
      copies and sums included. 0 where the processor has nothing to do with it.
    sweep: of method onebyte; null: unknown.
    codecs: by Coding.codec.
    pairs, collectives: for people; a plan takes its figures from the levels.
    """

    hosts: tuple[str, ...]
    cores_per_rank: float = Field(gt=0)
    drift: float | None = Field(None, gt=-1)
    cpu_s_per_byte: float = Field(0.0, ge=0)
    sweep: SweepSpeed | None = None
    codecs: dict[str, CodecSpeed] = Field(default_factory=dict)
    computes: tuple[ComputeSpeed, ...] = ()
    pairs: PairTimes | None = None
    collectives: tuple[CollectiveTime, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """What makes the figures uncertain."""
        if self.drift is None or abs(self.drift) <= _STEADY:
            return []
        change = f"{abs(self.drift):.0%} {'faster' if self.drift > 0 else 'slower'}"
        return [
            f"the speed of the probed machines changes: matrix products were {change} at the end of the probe than at "
            "its beginning, and what is foretold from it is as uncertain; probe when nothing else runs on these hosts"
        ]


class Cluster(Settings):
    """A described cluster.

    levels: fastest first; the last holds all ranks, and may be cut shorter or made longer by at().
    price_per_device_hour: in the currency that you count in; 0 = not asked.
    failures_per_device_hour: of devices that take their job down; for `thinwire simulate`.
    jitter: relative standard deviation of the computing of a step; for `thinwire simulate`.
    """

    name: str = ""
    levels: tuple[LinkLevel, ...]
    device: Device
    price_per_device_hour: float = Field(0.0, ge=0)
    failures_per_device_hour: float = Field(0.0, ge=0)
    jitter: float = Field(0.0, ge=0)
    measured: Measured | None = None

    @model_validator(mode="after")
    def _levels_nest(self) -> Cluster:
        if not self.levels:
            raise ValueError("levels: is empty; give one at least, such as {name: world, size: 4, link_bps: 1gbit}")
        names = [level.name for level in self.levels]
        for i, level in enumerate(self.levels):
            before = self.levels[i - 1].size if i else 1
            if level.name in ("self", "rank", *names[:i]):
                raise ValueError(f"levels[{i}].name: {level.name!r} is taken; give every level a name of its own")
            if level.size % before or level.size < before:
                raise ValueError(
                    f"levels[{i}].size: {level.size} is no multiple of {before}, the size of {names[i - 1]!r} before "
                    "it; a size counts the ranks of the faster levels too"
                )
            if level.ranks_per_link > before:
                raise ValueError(
                    f"levels[{i}].ranks_per_link: {level.ranks_per_link} ranks cannot share a link that leaves a group "
                    f"of {before}; allowed is 1 to {before}"
                )
        if self.measured and len(self.measured.hosts) != self.size:
            raise ValueError(
                f"measured.hosts: {len(self.measured.hosts)} hosts for {self.size} ranks; a probe names one for each"
            )
        if self.measured and self.measured.pairs and len(self.measured.pairs.bps) != self.size:
            raise ValueError(
                f"measured.pairs: {len(self.measured.pairs.bps)} rows for {self.size} ranks; a probe has one for each"
            )
        return self

    @property
    def size(self) -> int:
        """Ranks of the whole cluster."""
        return self.levels[-1].size

    def level(self, name: str) -> LinkLevel:
        """The level of that name. Raises KeyError."""
        return {level.name: level for level in self.levels}[name]

    def seat(self, rank: int = 0) -> Seat:
        """The place of a rank, where the ranks of a group are neighbours."""
        return seat_of([(level.name, level.size) for level in self.levels if level.size > 1] or [("world", 1)], rank)

    def at(self, ranks: int) -> Cluster:
        """The same machine with another number of ranks: its slowest level made as large; what was measured, left out.

        Raises:
            ValueError: the faster levels do not divide it.
        """
        inner = [level for level in self.levels[:-1] if level.size <= ranks]
        if inner and ranks % inner[-1].size:
            raise ValueError(
                f"{ranks} ranks do not fill groups of {inner[-1].size} ({inner[-1].name}); give a multiple of it"
            )
        if inner and inner[-1].size == ranks:
            levels = inner
        else:
            shots = self.levels[-1].shots if ranks == self.size else ()
            levels = [*inner, self.levels[-1].model_copy(update={"size": ranks, "shots": shots})]
        kept = self.measured if ranks == self.size else None
        return self.model_copy(update={"levels": tuple(levels), "measured": kept})


def load_cluster(path: Path) -> Cluster:
    """Read a description (YAML) or what a probe wrote (JSON).

    Raises:
        ConfigError: with every mistake: path of the setting, value, what is allowed.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give one of configs/clusters/*.yaml, or a probe's JSON")
    is_json = path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if is_json else yaml.safe_load(text)  # YAML 1.1 takes JSON's 1e-05 for a word
    except (yaml.YAMLError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not valid {'JSON' if is_json else 'YAML'}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, such as `levels: [...]`; found {data!r}")
    data.setdefault("name", path.stem)
    try:
        return Cluster.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, Cluster, str(path))) from None
