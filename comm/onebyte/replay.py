"""The weights of a run again, from its base weights and its log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.comm.onebyte.canonical import check_base
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.manifest import Manifest
from thinwire.comm.onebyte.replica import Replica
from thinwire.comm.onebyte.rounds import Round, Snapshot

_MOST_CONTRIBUTIONS = 1 << 13  # handed to the replica at once: bounds the memory, and how seldom progress is told

Progress = Callable[[int], None]
"""Told the number of rounds that are carried out."""


class ReplayError(ValueError):
    """Log and base do not belong together."""


class WrongWeightsError(ReplayError):
    """Replayed weights are not those that a snapshot in the log tells of."""


@dataclass(frozen=True)
class Replayed:
    """Weights after `rounds` rounds.

    tensors: the trained ones by canonical name, in the dtypes of the run. model_hash: SHA-256 of the weights on their
    grids. proved: the rounds after which a snapshot in the log has confirmed the hash, the last such; 0: none did.
    """

    rounds: int
    tensors: dict[str, Tensor]
    model_hash: bytes
    proved: int


def replay(
    log: Log,
    base: Mapping[str, Tensor],
    *,
    until: int | None = None,
    step_by_step: bool = False,
    progress: Progress | None = None,
) -> Replayed:
    """Carry out a log's rounds on the base weights; compare the hash at the last snapshot.

    As whole numbers are added, many rounds take one pass over the weights (up to where these decay, or others begin to
    move) and give the same bits as one pass for each.

    Args:
        base: the weights at which the run began, by canonical name; others are ignored. They stay as they are.
        until: carry out that many rounds; None: all.
        step_by_step: one pass for each round, as in the run.
    Raises:
        ReplayError: the base is not the run's, or the log has fewer rounds.
        WrongWeightsError: the snapshot has another hash.
    """
    until = _checked_end(log, until)
    snapshots = [s.rounds for s in log if isinstance(s, Snapshot) and s.rounds <= until]
    replica, tensors = _begin(log, base)
    proved = 0
    for part in _parts(log, until, stops=snapshots[-1:]):
        if isinstance(part, Snapshot):
            _compare(log, replica, part, proved)
            proved = part.rounds
        elif step_by_step:
            for round_ in part:
                replica.apply([round_])
        else:
            replica.apply(part)
        if progress is not None:
            progress(replica.rounds)
    return Replayed(replica.rounds, tensors, replica.model_hash(), proved)


def verify(log: Log, base: Mapping[str, Tensor], *, progress: Progress | None = None) -> Replayed:
    """Carry out all rounds, and compare the hash of the weights at every snapshot.

    Raises:
        ReplayError: the base is not the run's.
        WrongWeightsError: a hash differs; names the snapshot before, which agreed.
    """
    replica, tensors = _begin(log, base)
    proved = 0
    for part in _parts(log, log.rounds, stops=None):
        if isinstance(part, Snapshot):
            _compare(log, replica, part, proved)
            proved = part.rounds
        else:
            replica.apply(part)
        if progress is not None:
            progress(replica.rounds)
    return Replayed(replica.rounds, tensors, replica.model_hash(), proved)


def manifest_of(log: Log) -> Manifest:
    """The manifest in a log. Raises ReplayError if this thinwire cannot read it."""
    try:
        return Manifest.from_bytes(log.manifest)
    except ValueError as error:
        raise ReplayError(f"{log.path}: this thinwire cannot read its manifest: {error}") from None


def _begin(log: Log, base: Mapping[str, Tensor]) -> tuple[Replica, dict[str, Tensor]]:
    manifest = manifest_of(log)
    try:
        check_base(manifest, base)
    except ValueError as error:
        raise ReplayError(f"{log.path}: {error}") from None
    tensors = {
        entry.name: base[entry.name].detach().clone(memory_format=torch.contiguous_format) for entry in manifest.tensors
    }
    return Replica(manifest, list(tensors.values())), tensors


def _checked_end(log: Log, until: int | None) -> int:
    if until is None:
        return log.rounds
    if not 0 <= until <= log.rounds:
        raise ReplayError(f"{log.path} has {log.rounds} rounds, not {until}; give a number from 0 to {log.rounds}")
    return until


def _parts(log: Log, until: int, stops: list[int] | None) -> Iterator[list[Round] | Snapshot]:
    """Rounds that may be carried out together, and snapshots: those after `stops` rounds, or all."""
    waiting: list[Round] = []
    contributions = 0
    for record in log:
        if isinstance(record, Round):
            if record.number >= until:
                break
            waiting.append(record)
            contributions += sum(len(c.codes) for c in record.contributions)
            if contributions >= _MOST_CONTRIBUTIONS:
                yield waiting
                waiting, contributions = [], 0
        elif isinstance(record, Snapshot) and (stops is None or record.rounds in stops):
            yield waiting
            yield record
            waiting, contributions = [], 0
    yield waiting


def _compare(log: Log, replica: Replica, snapshot: Snapshot, proved: int) -> None:
    found = replica.model_hash()
    if found != snapshot.model_hash:
        raise WrongWeightsError(
            f"{log.path}: after {snapshot.rounds} rounds the run's weights had the SHA-256 "
            f"{snapshot.model_hash.hex()[:16]}..., the replayed ones have {found.hex()[:16]}...; they agreed after "
            f"{proved} rounds. The log's chain is intact: the machine that wrote the snapshot, or this one, computes "
            "wrongly, or they run different versions of thinwire"
        )
