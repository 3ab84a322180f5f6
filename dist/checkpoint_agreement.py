"""Steps that all ranks take together: each does its part, all hear how it went, and one failure is everybody's."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from thinwire.comm.errors import CommError

MESSAGE_LIMIT_BYTES = 64 << 20
TICK_S = 1.0


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says by which rank, which file, and what to do."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint is sound, but belongs to another model, world size or run than this one."""


class Agreement:
    """JSON messages among the ranks of a group. Never torch's *_object collectives: they unpickle what peers send."""

    def __init__(self, group: ProcessGroup | None, rank: int, world_size: int) -> None:
        if group is None and world_size > 1:
            raise ValueError(f"Agreement: group is None with world_size={world_size}; pass the job's control group")
        self.group = group if world_size > 1 else None
        self.rank = rank
        self.world_size = world_size

    def run(self, operation: str, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on every rank and return what each rank's returned (JSON values), in rank order. Collective.

        The work is done by a thread, and ranks tell each other once a second that theirs goes on: however long the
        disk of one takes, no collective waits longer than that, so the group's deadline keeps its meaning. If it
        raises on any rank, every rank raises: CheckpointMismatchError if all failures are of that kind,
        CheckpointError otherwise.
        """
        outcome: dict[str, Any] = {}
        failure: list[BaseException] = []

        def body() -> None:
            try:
                outcome["result"] = work()
            except BaseException as error:
                failure.append(error)
                outcome["error"] = _explain(error)
                outcome["mismatch"] = isinstance(error, CheckpointMismatchError)

        if self.group is None:
            body()
            outcomes = [outcome]
        else:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # the thread reads tensors on its own stream
            worker = threading.Thread(target=body, name=f"checkpoint {operation}", daemon=True)
            worker.start()
            outcomes = self._when_all_are_done(operation, worker, outcome)
        errors = {rank: o["error"] for rank, o in enumerate(outcomes) if "error" in o}
        if errors:
            told = "; ".join(text if self.group is None else f"rank {rank}: {text}" for rank, text in errors.items())
            kind = CheckpointMismatchError if all(outcomes[r]["mismatch"] for r in errors) else CheckpointError
            if failure and not isinstance(failure[0], Exception):
                raise failure[0]
            raise kind(f"checkpoint: {operation} failed: {told}") from (failure[0] if failure else None)
        return [o["result"] for o in outcomes]

    def _when_all_are_done(
        self, operation: str, worker: threading.Thread, outcome: dict[str, Any]
    ) -> list[dict[str, Any]]:
        payload = b""
        while True:
            worker.join(TICK_S)
            if not payload and not worker.is_alive():
                payload = json.dumps(outcome).encode()
            # A length of 0 says: still at work.
            lengths = [int(t.item()) for t in self._all_gather(operation, torch.tensor([len(payload)]))]
            if all(lengths):
                break
        if max(lengths) > MESSAGE_LIMIT_BYTES or min(lengths) < 0:
            raise CheckpointError(
                f"checkpoint: {operation}: messages of {lengths} bytes; at most {MESSAGE_LIMIT_BYTES}"
            )
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        gathered = self._all_gather(operation, padded)
        return [json.loads(t[:n].numpy().tobytes()) for t, n in zip(gathered, lengths, strict=True)]

    def _all_gather(self, operation: str, local: Tensor) -> list[Tensor]:
        assert self.group is not None
        gathered = [torch.empty_like(local) for _ in range(self.world_size)]
        try:
            self.group.allgather([gathered], [local]).wait()
        except RuntimeError as error:
            raise CommError(f"checkpoint: {operation}: a rank is gone or late: {error}", operation=operation) from error
        return gathered


def _explain(error: BaseException) -> str:
    if isinstance(error, CheckpointError | ValueError):
        return str(error).removeprefix("checkpoint: ")
    if isinstance(error, OSError):
        return f"on {socket.gethostname()}: {error.strerror or error} ({error.filename or 'while writing or reading'})"
    return f"{type(error).__name__}: {error}"
