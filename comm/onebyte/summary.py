"""What a log says of its run: who took part when, what was sent, how large it was."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from thinwire.comm.onebyte.byte_code import ABSENT, LARGEST, STEPS_PER_OCTAVE, ZERO
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.manifest import Manifest
from thinwire.comm.onebyte.rounds import Roster, Round, Snapshot


@dataclass
class Stay:
    """A machine on the roster, from round `first` until round `end` (not with it); None: it is still there.

    rounds: those to which it contributed.
    """

    slot: int
    name: str
    address: str
    samples: int
    first: int
    end: int | None = None
    rounds: int = 0
    codes: int = 0
    absent: int = 0


@dataclass
class Summary:
    """Sizes in bytes. The codes by value, and among them those that are zero, saturated and absent.

    octaves: slopes other than zero by floor(log2 |g|). rates: first, last, smallest and largest learning rate.
    rate_changes: after the first round. fp32_gradient_bytes: of all trained weights once.
    """

    size_bytes: int
    header_bytes: int
    torn_bytes: int
    records: int
    chain: str
    run_id: str
    base_hash: str
    tensors: int
    weights: int
    dtypes: dict[str, int]
    numerics: dict[str, object]
    seed: int
    fp32_gradient_bytes: int
    rounds: int = 0
    round_bytes: int = 0
    contributions: int = 0
    contributions_least: int = 0
    contributions_most: int = 0
    zero: int = 0
    saturated: int = 0
    absent: int = 0
    octaves: dict[int, int] = field(default_factory=dict)
    rates: tuple[float, float, float, float] | None = None
    rate_changes: int = 0
    rosters: int = 0
    stays: list[Stay] = field(default_factory=list)
    snapshots: int = 0
    last_snapshot: tuple[int, str] | None = None


def summarize(log: Log, manifest: Manifest) -> Summary:
    """Read all of a log once."""
    weights = sum(math.prod(entry.shape) for entry in manifest.tensors)
    dtypes: dict[str, int] = {}
    for entry in manifest.tensors:
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + math.prod(entry.shape)
    summary = Summary(
        size_bytes=log.size_bytes,
        header_bytes=log.size_bytes - len(log.raw(0)),
        torn_bytes=log.torn_bytes,
        records=len(log),
        chain=log.chain(len(log)).hex(),
        run_id=manifest.run_id,
        base_hash=manifest.base_hash,
        tensors=len(manifest.tensors),
        weights=weights,
        dtypes=dtypes,
        numerics=manifest.numerics.model_dump(mode="json"),
        seed=manifest.seed,
        fp32_gradient_bytes=4 * weights,
    )
    counts = [0] * 256
    present: dict[int, Stay] = {}
    for index, record in enumerate(log):
        if isinstance(record, Roster):
            summary.rosters += 1
            present = _change(summary, present, record)
        elif isinstance(record, Snapshot):
            summary.snapshots += 1
            summary.last_snapshot = record.rounds, record.model_hash.hex()
        else:
            _count_round(summary, record, present, counts)
            summary.round_bytes += log.record_bytes(index)
    summary.zero, summary.absent = counts[ZERO], counts[ABSENT]
    summary.saturated = counts[LARGEST] + counts[LARGEST | 0x80]
    for code in range(1, LARGEST + 1):
        if number := counts[code] + counts[code | 0x80]:
            octave = manifest.numerics.floor_log2 + (code - 1) // STEPS_PER_OCTAVE
            summary.octaves[octave] = summary.octaves.get(octave, 0) + number
    return summary


def _change(summary: Summary, present: dict[int, Stay], roster: Roster) -> dict[int, Stay]:
    """Who stays, comes and goes with a new roster."""
    now: dict[int, Stay] = {}
    for member in roster.members:
        stay = present.pop(member.slot, None)
        as_before = stay and (stay.name, stay.address, stay.samples) == (member.name, member.address, member.samples)
        if stay is None or not as_before:
            if stay is not None:
                stay.end = summary.rounds
            stay = Stay(member.slot, member.name, member.address, member.samples, summary.rounds)
            summary.stays.append(stay)
        now[member.slot] = stay
    for stay in present.values():
        stay.end = summary.rounds
    return now


def _count_round(summary: Summary, record: Round, present: dict[int, Stay], counts: list[int]) -> None:
    total = 0
    for contribution in record.contributions:
        codes = contribution.codes
        total += len(codes)
        for code in codes:
            counts[code] += 1
        stay = present.get(contribution.slot)
        if stay is not None:
            stay.rounds += 1
            stay.codes += len(codes)
            stay.absent += codes.count(ABSENT)
    summary.contributions += total
    summary.contributions_least = min(total, summary.contributions_least) if summary.rounds else total
    summary.contributions_most = max(total, summary.contributions_most)
    if summary.rates is None:
        summary.rates = (record.rate,) * 4
    first, last, least, most = summary.rates
    summary.rate_changes += record.rate != last
    summary.rates = first, record.rate, min(least, record.rate), max(most, record.rate)
    summary.rounds += 1
