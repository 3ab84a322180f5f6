"""What membership of a run can fail with."""

from __future__ import annotations

from thinwire.comm.errors import CommError
from thinwire.comm.onebyte.errors import ModelMismatchError

__all__ = ["HistoryError", "MessageError", "ModelMismatchError", "NoQuorumError", "RefusedError"]


class NoQuorumError(CommError):
    """Nothing was committed for as long as this machine was told to wait: too few machines reach each other."""


class RefusedError(CommError):
    """The run does not take this machine, and says why."""


class HistoryError(CommError):
    """A machine holds another history of rounds that were already committed: two runs of one manifest have met."""


class MessageError(ValueError):
    """Received bytes are not what they should be: damaged, of another run, or of another program."""
