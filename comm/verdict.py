"""Who is at fault when an operation fails: drawn from what the other ranks answered, and from who did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from thinwire.comm.rank_names import name_ranks


@dataclass(frozen=True)
class Progress:
    """The operation that a rank has begun last on a queue: its number in the queue's order, its name, its end."""

    sequence: int = 0
    operation: str = ""
    finished: bool = True

    def __str__(self) -> str:
        if self.sequence == 0:
            return "has not begun any operation"
        return f"{'finished' if self.finished else 'is in'} {self.operation} (operation {self.sequence})"


@dataclass(frozen=True)
class Verdict:
    """Why a job cannot go on: which ranks are lost, late or failed, at which operation, and a sentence for people.

    Ranks are those of the job.
    """

    kind: Literal["lost", "late", "failed"]
    operation: str
    ranks: tuple[int, ...]
    message: str


@dataclass
class Survey:
    """Answers to one question: each answering rank's progress; the others are silent. Ranks are those of the group."""

    progress: dict[int, Progress] = field(default_factory=dict)
    silent: tuple[int, ...] = ()


def draw_verdict(queue: str, here: Progress, rank: int, peers: Sequence[int], why: str, survey: Survey) -> Verdict:
    """Judge a failed operation.

    Args:
        queue: name of the queue that it ran on.
        here: the operation; number 0 if it did not run on the queue.
        rank: this rank, in the group.
        peers: job rank of each rank of the group.
        why: what happened to the operation on this rank.
        survey: what the other ranks of the group answered.
    """
    operation = here.operation
    number = f" (operation {here.sequence} of {queue})" if here.sequence else ""
    head = f"{operation}{number} on rank {peers[rank]} is {why}."
    if survey.silent:
        lost = tuple(peers[r] for r in survey.silent)
        answered = [peers[r] for r in (rank, *survey.progress)]
        text = f"{head} No answer from {name_ranks(lost)}: dead, stopped or cut off. Answered: {name_ranks(answered)}."
        return Verdict("lost", operation, lost, text)
    if late := {peers[r]: p for r, p in survey.progress.items() if p.sequence < here.sequence}:
        text = (
            f"{head} All ranks are alive, but {name_ranks(list(late))} had not reached it ({_list(late)}). "
            "If a rank may be that slow, raise world.timeout_s."
        )
        return Verdict("late", operation, tuple(sorted(late)), text)
    at_same_number = {r: p for r, p in survey.progress.items() if p.sequence == here.sequence}
    if elsewhere := {peers[r]: p for r, p in at_same_number.items() if p.operation != operation}:
        text = f"{head} The ranks disagree about what comes next: {_list(elsewhere)}."
        return Verdict("failed", operation, tuple(sorted(elsewhere)), text)
    text = (
        f"{head} All ranks are alive and have reached it: the link is too slow for its bytes, or broken. "
        "Raise world.timeout_s, or send less."
    )
    return Verdict("late", operation, (), text)


def _list(progress: dict[int, Progress]) -> str:
    return "; ".join(f"rank {r} {p}" for r, p in sorted(progress.items()))
